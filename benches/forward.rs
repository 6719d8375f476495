//! The arithmetic of the data plane, without a kernel: checksums, cutting, joining, looking up. See `make bench`.
#![allow(clippy::print_stdout, clippy::unwrap_used, clippy::disallowed_methods)]

#[path = "../tests/model/mod.rs"]
mod model;

use std::hint::black_box;
use std::net::Ipv4Addr;
use std::time::Instant;

use flanneld::forward::{Kinds, Merger, Split, Table};
use flanneld::wire::checksum;
use flanneld::wire::vnet::{Header, Kind};

/// Seconds that one call takes: the best of five series.
fn time(calls: u32, mut work: impl FnMut()) -> f64 {
    let series = |_| {
        let start = Instant::now();
        (0..calls).for_each(|_| work());
        start.elapsed().as_secs_f64() / f64::from(calls)
    };
    (0..5).map(series).fold(f64::MAX, f64::min)
}

fn main() {
    println!("checksum, GB/s            ours   word by word   ratio");
    for len in [64usize, 1420, 65_535] {
        let data = vec![0xa5; len];
        let calls = u32::try_from(100_000_000 / len / 10).unwrap();
        let ours = time(calls, || {
            black_box(checksum::sum(black_box(&data)));
        });
        let obvious = time(calls / 10, || {
            black_box(model::ones_sum(black_box(&data), 0));
        });
        let speed = |seconds| f64::from(u32::try_from(len).unwrap()) / seconds / 1e9;
        println!(
            "{len:>8} bytes {:>14.1} {:>14.1} {:>7.1}",
            speed(ours),
            speed(obvious),
            obvious / ours
        );
    }

    println!("\nper packet, ns");
    let (offload, packet) = super_packet(1420, 45);
    let split = Split::new(&packet, &offload).unwrap();
    let mut headers = [0; 256];
    let cut = time(2000, || {
        for index in 0..split.count() {
            black_box(split.segment(black_box(&packet), index, &mut headers));
        }
    });
    println!("cut a super-packet into packets of 1472 bytes  {:>8.1}", cut / 45.0 * 1e9);

    for (size, count) in [(1420, 45), (64, 64)] {
        let (offload, packet) = super_packet(size, count);
        let packets = model::expand(&offload, &packet);
        let (mut buffer, mut ranges) = (Vec::new(), Vec::new());
        for packet in &packets {
            ranges.push(buffer.len()..buffer.len() + packet.len());
            buffer.extend(packet);
        }
        let mut merger = Merger::new(Kinds { tcp: true, udp: true });
        let mut out = |joined: flanneld::forward::Joined<'_>| {
            black_box(joined.parts.len());
        };
        let joined = time(2000, || {
            for range in &ranges {
                merger.push(black_box(&buffer), range.clone(), &mut out);
            }
            merger.flush(&mut out);
        });
        let packets = f64::from(u32::try_from(count).unwrap());
        println!(
            "join packets of {:>4} bytes                     {:>8.1}",
            size + 52,
            joined / packets * 1e9
        );
    }

    let mut table: Table<Ipv4Addr> = Table::new([10, 0, 0, 0].into(), 8, 24);
    for number in 0..5000u32 {
        let subnet = 0x0a00_0000 + (number << 8);
        table.set(subnet.into(), 24, (0xc0a8_0000 + number).into());
    }
    let mut address = 0u32;
    let found = time(1_000_000, || {
        address = address.wrapping_add(0x9e37_79b1);
        black_box(table.lookup((0x0a00_0000 | (address & 0x001f_ffff)).into()));
    });
    println!("find one of 5000 hosts                         {:>8.1}", found * 1e9);
}

/// A TCP super-packet with time stamps.
fn super_packet(size: usize, count: usize) -> (Header, Vec<u8>) {
    let mut packet = vec![0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 5, 1, 2, 10, 5, 2, 9];
    packet.extend([0, 80, 0, 81, 0, 0, 0, 1, 0, 0, 0, 1, 0x80, 0x10, 1, 1, 0, 0, 0, 0]);
    packet.extend([1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
    packet.extend((0..size * count).map(|at| at.to_le_bytes()[0]));
    model::seal_ip(&mut packet);
    model::leave_partial(&mut packet, 20, 6);
    let offload = Header {
        kind: Kind::TcpV4,
        needs_checksum: true,
        segment: u16::try_from(size).unwrap(),
        checksum_start: 20,
        checksum_offset: 16,
        ..Header::default()
    };
    (offload, packet)
}
