//! A million packets through everything that is pure in the data plane: cut, sent, received, joined; and the model beside it,
//! which does without any of that. What comes out are the packets that went in, byte for byte, each two hops older.
#![allow(clippy::unwrap_used)] // in the helpers of tests as well

mod model;

use std::collections::HashMap;
use std::net::IpAddr;

use flanneld::forward::{
    Engine, Joined, Kinds, Merger, Outbound, Outbox, ReplyBuffer, Routes, Table,
};
use flanneld::wire::vnet::{Header, Kind};

const PACKETS: usize = 1_000_000;
/// Super-packets and packets between two looks at what has come.
const ROUND: usize = 12;

/// A source of numbers.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() >> 33).unwrap() % bound
    }

    fn one_in(&mut self, chance: usize) -> bool {
        self.below(chance) == 0
    }
}

/// What one flow's packets have in common.
struct Flow {
    is_v4: bool,
    protocol: u8,
    ports: [u8; 4],
    host: u8,
    sequence: u32,
    id: u16,
    id_stands_still: bool,
    dont_fragment: bool,
    options: usize,
    tos: u8,
    window: u8,
}

impl Flow {
    fn new(random: &mut Random, number: usize) -> Self {
        Self {
            is_v4: !random.one_in(3),
            protocol: if random.one_in(3) { 17 } else { 6 },
            ports: [1, u8::try_from(number).unwrap(), 2, random.below(4).to_le_bytes()[0]],
            host: random.below(4).to_le_bytes()[0],
            sequence: u32::try_from(random.next() >> 32).unwrap(),
            id: u16::try_from(random.next() >> 48).unwrap(),
            id_stands_still: random.one_in(3),
            dont_fragment: !random.one_in(3),
            options: [0, 12, 12, 40, 4][random.below(5)],
            tos: [0, 0, 2, 1][random.below(4)],
            window: 9,
        }
    }

    /// Headers for a payload that begins here, without lengths and checksums. Returns where the transport header is.
    fn headers(&self, flags: u8) -> (Vec<u8>, usize) {
        let mut bytes = if self.is_v4 {
            let mut ip = vec![0x45, self.tos, 0, 0, 0, 0, 0, 0, 64, self.protocol, 0, 0];
            ip[4..6].copy_from_slice(&self.id.to_be_bytes());
            ip[6] = if self.dont_fragment { 0x40 } else { 0 };
            ip.extend([10, 5, 1, self.host, 10, 5, 2, 9]);
            ip
        } else {
            let mut ip = vec![0x60, self.tos << 4, 3, 4, 0, 0, self.protocol, 64];
            ip.extend([0xfd, 0, 0, 5, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, self.host]);
            ip.extend([0xfd, 0, 0, 5, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 9]);
            ip
        };
        let transport = bytes.len();
        bytes.extend(self.ports);
        if self.protocol == 6 {
            bytes.extend(self.sequence.to_be_bytes());
            bytes.extend([0, 0, 0, 77]);
            bytes.extend([u8::try_from((20 + self.options) / 4).unwrap() << 4, flags]);
            bytes.extend([self.window, 1, 0, 0, 0, 0]);
            bytes.extend(vec![1; self.options]);
        } else {
            bytes.extend([0; 4]);
        }
        (bytes, transport)
    }

    /// Sends something: a super-packet of segments, or a single packet with or without its checksum.
    fn send(&mut self, random: &mut Random) -> (Header, Vec<u8>) {
        if random.one_in(20) {
            self.window = self.window.wrapping_add(1);
        }
        let flags = match random.below(24) {
            0 => 0x02,     // SYN
            1 => 0x11,     // FIN ACK
            2 => 0x14,     // RST ACK
            3 => 0x90,     // CWR ACK
            4 => 0x50,     // ECE ACK
            5 => 0x30,     // URG ACK
            6..=9 => 0x18, // PSH ACK
            _ => 0x10,     // ACK
        };
        let size = [1, 7, 64, 100, 500, 536, 1400][random.below(7)];
        let most = if size > 500 { 6 } else { 40 };
        let len = match random.below(6) {
            0 => 0,
            1 => random.below(size) + 1,
            2 => size * (1 + random.below(most)),
            _ => size * (1 + random.below(most)) + random.below(size),
        };
        let (mut packet, transport) = self.headers(flags);
        packet.extend((0..len).map(|at| at.wrapping_mul(31).to_le_bytes()[0] ^ self.ports[1]));
        let payload = usize::from(self.protocol == 6 && flags & 2 != 0) + len;
        self.sequence = self.sequence.wrapping_add(u32::try_from(payload).unwrap());
        let count = len.div_ceil(size).max(1);
        if !self.id_stands_still || count > 1 {
            self.id = self.id.wrapping_add(u16::try_from(count).unwrap());
        }
        let is_super = len > size;
        let kind = match (self.protocol, self.is_v4) {
            _ if !is_super => Kind::Single,
            (6, true) => Kind::TcpV4,
            (6, false) => Kind::TcpV6,
            _ => Kind::Udp,
        };
        model::seal_ip(&mut packet);
        model::seal_transport(&mut packet, transport, self.protocol);
        let needs_checksum = is_super || random.one_in(2);
        let offset = if self.protocol == 6 { 16 } else { 6 };
        if needs_checksum {
            model::leave_partial(&mut packet, transport, self.protocol);
        } else if self.protocol == 17 && self.is_v4 && random.one_in(8) {
            packet[transport + 6..transport + 8].fill(0); // no checksum
        }
        let offload = Header {
            kind,
            needs_checksum,
            ecn: is_super && flags & 0x80 != 0,
            header_len: 0, // a hint that nobody should need
            segment: if is_super { u16::try_from(size).unwrap() } else { 0 },
            checksum_start: if needs_checksum { u16::try_from(transport).unwrap() } else { 0 },
            checksum_offset: if needs_checksum { offset } else { 0 },
        };
        (offload, packet)
    }
}

/// Packets that are nobody's flow: fragments, options, other protocols, extension headers.
fn stray(random: &mut Random) -> Vec<u8> {
    let payload: Vec<u8> = (0..random.below(60)).map(|at| at.to_le_bytes()[0]).collect();
    let mut packet = vec![0x45, 0, 0, 0, 9, 9, 0, 0, 64, 17, 0, 0, 10, 5, 1, 1, 10, 5, 2, 9];
    match random.below(5) {
        0 => packet[6] = 0x20,
        1 => packet[7] = 3,
        2 => packet[9] = 1,
        3 => {
            packet[0] = 0x46;
            packet.extend([1, 1, 1, 0]);
        }
        _ => {
            packet = vec![0x60, 0, 0, 0, 0, 0, 0, 64];
            packet.extend([0xfd, 0, 0, 5, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1]);
            packet.extend([0xfd, 0, 0, 5, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 9]);
            packet.extend([17, 0, 0, 0, 0, 0, 0, 0]);
        }
    }
    packet.extend(payload);
    model::seal_ip(&mut packet);
    packet
}

fn engine() -> Engine {
    let mut v4 = Table::new([10, 5, 0, 0].into(), 16, 24);
    v4.set([10, 5, 2, 0].into(), 24, [192, 168, 0, 2].into());
    let mut v6 = Table::new("fd00:5::".parse().unwrap(), 32, 64);
    v6.set("fd00:5:0:2::".parse().unwrap(), 64, "2001:db8::2".parse().unwrap());
    v6.set("fd00:5:0:1::".parse().unwrap(), 64, "2001:db8::1".parse().unwrap());
    Engine::new(Routes { v4: Some(v4), v6: Some(v6) }, false)
}

/// Everything that goes out, as datagrams.
fn drain(outbox: &mut Outbox, wire: &mut Vec<(IpAddr, Vec<u8>)>, longest_run: &mut u16) {
    for run in outbox.waiting() {
        let bytes: Vec<u8> =
            outbox.parts(run).iter().flat_map(|part| part.of(outbox.bytes())).copied().collect();
        let mut datagrams: Vec<_> = bytes.chunks(usize::from(run.segment)).collect();
        assert_eq!((datagrams.len(), bytes.len()), (usize::from(run.count), run.len));
        assert!(run.count < 64 && run.len <= 65_507);
        *longest_run = run.count.max(*longest_run);
        wire.extend(datagrams.drain(..).map(|datagram| (run.to, datagram.to_vec())));
    }
    outbox.done(outbox.waiting().len());
}

#[test]
fn a_million_packets_come_out_as_they_went_in() {
    std::thread::scope(|scope| {
        for seed in [0x1234_5678_9abc_def1, 0x0fed_cba9_8765_4321] {
            scope.spawn(move || packets_come_out_as_they_went_in(Random(seed), PACKETS / 2));
        }
    });
}

fn packets_come_out_as_they_went_in(mut random: Random, packets: usize) {
    let (mut engine, mut reply): (_, ReplyBuffer) = (engine(), [0; 1280]);
    let mut outbox = Outbox::new(64);
    let mut merger = Merger::new(Kinds { tcp: true, udp: true });
    let mut flows: Vec<Flow> = (0..40).map(|number| Flow::new(&mut random, number)).collect();
    let (mut total, mut writes, mut longest_run, mut longest_join) = (0, 0usize, 0, 0);
    #[allow(clippy::disallowed_methods)] // nothing is refused here, so no time matters
    let now = std::time::Instant::now();
    while total < packets {
        // this host's containers send; the model says what the packets are
        let active = 1 + random.below(flows.len());
        let (mut expected, mut wire) = (Vec::new(), Vec::new());
        for _ in 0..ROUND {
            let (offload, packet) = if random.one_in(12) {
                (Header::default(), stray(&mut random))
            } else {
                flows[random.below(active)].send(&mut random)
            };
            expected.extend(model::expand(&offload, &packet));
            if !outbox.has_room() {
                drain(&mut outbox, &mut wire, &mut longest_run);
            }
            let room = outbox.room();
            room[..packet.len()].copy_from_slice(&packet);
            match engine.outbound(&mut room[..packet.len()], &mut reply, now) {
                Outbound::Send { to, len } => outbox.push(to, 0..len, &offload).unwrap(),
                verdict => panic!("{verdict:?}"),
            }
        }
        drain(&mut outbox, &mut wire, &mut longest_run);
        for packet in &mut expected {
            model::take_hop(packet);
        }
        assert_eq!(wire.len(), expected.len());
        for ((_, datagram), packet) in wire.iter().zip(&expected) {
            assert_eq!(datagram, packet);
        }
        total += wire.len();

        // on the way some are lost, doubled, swapped, damaged
        for _ in 0..random.below(4) {
            let (at, other) = (random.below(wire.len()), random.below(wire.len()));
            match random.below(5) {
                0 => drop(wire.remove(at)),
                1 => wire.insert(at, wire[other].clone()),
                2 => wire.swap(at, other),
                _ => {
                    let len = wire[at].1.len();
                    // not the version and the lengths: such packets never get to the merger
                    let byte = 6 + random.below(len - 6);
                    wire[at].1[byte] ^= 1 << random.below(8);
                }
            }
            if wire.is_empty() {
                break;
            }
        }

        // the other host joins what it gets
        let mut inbox = Vec::new();
        let mut ranges = Vec::new();
        let mut arrived: Vec<Vec<u8>> = Vec::new();
        for (from, mut datagram) in wire {
            let before = datagram.clone();
            let Some(len) = engine.inbound(&mut datagram, from) else { continue };
            let mut model = before;
            model.truncate(len);
            model::take_hop(&mut model);
            arrived.push(model);
            ranges.push(inbox.len()..inbox.len() + len);
            inbox.extend(datagram);
        }
        let mut delivered: Vec<Vec<u8>> = Vec::new();
        let mut out = |joined: Joined<'_>| {
            writes += 1;
            longest_join = longest_join.max(joined.parts.len());
            let mut bytes = joined.headers.to_vec();
            joined.parts.iter().for_each(|part| bytes.extend(part.of(&inbox)));
            assert!(bytes.len() <= 65_535);
            let packets = model::expand(&joined.offload, &bytes);
            assert_eq!(packets.len(), joined.parts.len());
            let singles: Vec<_> = joined.singles().map(|single| inbox[single].to_vec()).collect();
            for (single, packet) in singles.iter().zip(&packets) {
                assert_eq!(model::without_id(single), model::without_id(packet));
            }
            delivered.extend(packets);
        };
        for range in ranges {
            merger.push(&inbox, range, &mut out);
        }
        merger.flush(&mut out);
        let (delivered, arrived) = (by_flow(&delivered), by_flow(&arrived));
        for (flow, arrived) in &arrived {
            let delivered = delivered.get(flow).map_or(&[][..], |packets| packets);
            let differs = |at: &usize| delivered.get(*at) != arrived.get(*at);
            if let Some(at) = (0..arrived.len().max(delivered.len())).find(differs) {
                panic!(
                    "packet {at} of flow {flow:?} after {total}:\n came {:02x?}\n went {:02x?}",
                    arrived.get(at),
                    delivered.get(at)
                );
            }
        }
        assert_eq!(delivered.len(), arrived.len());
    }
    assert!(writes * 3 < total, "{writes} writes for {total} packets: nothing is joined");
    assert!(longest_run == 63 && longest_join > 30, "{longest_run} {longest_join}");
}

/// The packets of each flow in their order. Ids are compared too, but where they have no meaning.
fn by_flow(packets: &[Vec<u8>]) -> HashMap<Vec<u8>, Vec<Vec<u8>>> {
    let mut flows: HashMap<_, Vec<_>> = HashMap::new();
    for packet in packets {
        flows.entry(model::flow(packet)).or_default().push(model::without_id(packet));
    }
    flows
}
