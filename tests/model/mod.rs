//! The obvious way to do what `forward` does fast: packets built field by field, super-packets cut one segment at a time,
//! checksums added word by word. Written from the RFCs and the kernel's rules, without a line of the code under test.

#![allow(dead_code, unreachable_pub, missing_docs)] // each user needs a part of it

use flanneld::wire::vnet::{Header, Kind};

/// RFC 1071, one word after the other.
pub fn ones_sum(data: &[u8], mut sum: u32) -> u32 {
    for pair in data.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum
}

pub fn is_v4(packet: &[u8]) -> bool {
    packet[0] >> 4 == 4
}

/// Sum over the pseudo-header of a packet whose transport header starts at `transport`.
fn pseudo(packet: &[u8], transport: usize, protocol: u8) -> u32 {
    let addresses = if is_v4(packet) { &packet[12..20] } else { &packet[8..40] };
    let len = u32::try_from(packet.len() - transport).unwrap();
    ones_sum(&len.to_be_bytes(), ones_sum(addresses, u32::from(protocol)))
}

fn set(packet: &mut [u8], at: usize, value: usize) {
    packet[at..at + 2].copy_from_slice(&u16::try_from(value).unwrap().to_be_bytes());
}

fn complement(sum: u32) -> usize {
    usize::try_from(!sum & 0xffff).unwrap()
}

/// Sets lengths and the IPv4 header checksum to what the bytes say.
pub fn seal_ip(packet: &mut [u8]) {
    if is_v4(packet) {
        let header = usize::from(packet[0] & 15) * 4;
        set(packet, 2, packet.len());
        set(packet, 10, 0);
        let sum = complement(ones_sum(&packet[..header], 0));
        set(packet, 10, sum);
    } else {
        set(packet, 4, packet.len() - 40);
    }
}

/// Sets the checksum of the transport header at `transport`.
pub fn seal_transport(packet: &mut [u8], transport: usize, protocol: u8) {
    let field = transport + if protocol == 6 { 16 } else { 6 };
    if protocol == 17 {
        let len = packet.len() - transport;
        set(packet, transport + 4, len);
    }
    set(packet, field, 0);
    let sum = ones_sum(&packet[transport..], pseudo(packet, transport, protocol));
    let checksum = complement(sum);
    set(packet, field, if protocol == 17 && checksum == 0 { 0xffff } else { checksum });
}

/// Leaves only the pseudo-header's sum in the checksum field, as a kernel that does not compute it.
pub fn leave_partial(packet: &mut [u8], transport: usize, protocol: u8) {
    let field = transport + if protocol == 6 { 16 } else { 6 };
    let sum = usize::try_from(pseudo(packet, transport, protocol)).unwrap();
    set(packet, field, sum);
}

/// The packets that a packet and the header before it stand for.
pub fn expand(offload: &Header, packet: &[u8]) -> Vec<Vec<u8>> {
    let transport = usize::from(offload.checksum_start);
    if offload.kind == Kind::Single {
        let mut packet = packet.to_vec();
        if offload.needs_checksum {
            let field = transport + usize::from(offload.checksum_offset);
            let checksum = complement(ones_sum(&packet[transport..], 0));
            let is_udp = offload.checksum_offset == 6;
            set(&mut packet, field, if is_udp && checksum == 0 { 0xffff } else { checksum });
        }
        return vec![packet];
    }
    let protocol = if offload.kind == Kind::Udp { 17 } else { 6 };
    let header =
        transport + if protocol == 6 { usize::from(packet[transport + 12] >> 4) * 4 } else { 8 };
    let (headers, payload) = packet.split_at(header);
    let size = usize::from(offload.segment);
    let mut pieces: Vec<&[u8]> = payload.chunks(size).collect();
    if pieces.is_empty() {
        pieces.push(&[]);
    }
    let last = pieces.len() - 1;
    let mut packets = Vec::new();
    for (index, piece) in pieces.iter().enumerate() {
        let mut segment = [headers, piece].concat();
        if is_v4(&segment) {
            let id = u16::from_be_bytes([segment[4], segment[5]]);
            let id = id.wrapping_add(u16::try_from(index % 65536).unwrap());
            segment[4..6].copy_from_slice(&id.to_be_bytes());
        }
        if protocol == 6 {
            let at = transport + 4..transport + 8;
            let first = u32::from_be_bytes(segment[at.clone()].try_into().unwrap());
            let sequence = first.wrapping_add(u32::try_from(index * size).unwrap());
            segment[at].copy_from_slice(&sequence.to_be_bytes());
            let flags = &mut segment[transport + 13];
            if index != last {
                *flags &= !0x09; // FIN, PSH
            }
            if index != 0 {
                *flags &= !0x80; // CWR
            }
        }
        seal_ip(&mut segment);
        seal_transport(&mut segment, transport, protocol);
        packets.push(segment);
    }
    packets
}

/// One hop less, the header checksum made anew.
pub fn take_hop(packet: &mut [u8]) {
    if is_v4(packet) {
        packet[8] -= 1;
        // patched as RFC 1624 does, so that a wrong checksum stays wrong
        let old = u32::from(packet[8] + 1) << 8;
        let new = u32::from(packet[8]) << 8;
        let checksum = u32::from(u16::from_be_bytes([packet[10], packet[11]]));
        let mut sum = (!checksum & 0xffff) + (!old & 0xffff) + new;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        set(packet, 10, complement(sum));
    } else {
        packet[7] -= 1;
    }
}

/// The id of a packet that must not be fragmented has no meaning (RFC 6864, 4.1): made 0, for comparing.
pub fn without_id(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if packet.len() >= 20 && is_v4(&packet) && packet[6] & 0x60 == 0x40 && packet[7] == 0 {
        let header = usize::from(packet[0] & 15) * 4;
        // only of right ones: a super-packet is made of nothing else
        if header >= 20 && header <= packet.len() && ones_sum(&packet[..header], 0) == 0xffff {
            packet[4..6].fill(0);
            set(&mut packet, 10, 0);
            let sum = complement(ones_sum(&packet[..header], 0));
            set(&mut packet, 10, sum);
        }
    }
    packet
}

/// What must stay in order among itself: everything between the same hosts with the same ports.
pub fn flow(packet: &[u8]) -> Vec<u8> {
    let (addresses, protocol, transport) = if is_v4(packet) {
        (&packet[12..20], packet[9], usize::from(packet[0] & 15) * 4)
    } else {
        (&packet[8..40], packet[6], 40)
    };
    let mut key = addresses.to_vec();
    key.push(protocol);
    let is_fragment = is_v4(packet) && (packet[6] & 0x3f != 0 || packet[7] != 0);
    if matches!(protocol, 6 | 17) && !is_fragment {
        key.extend(packet.iter().skip(transport).take(4));
    }
    key
}

/// Sets the checksum of an ICMPv6 message behind a bare IPv6 header.
pub fn seal_icmpv6(packet: &mut [u8]) {
    set(packet, 42, 0);
    let sum = complement(ones_sum(&packet[40..], pseudo(packet, 40, 58)));
    set(packet, 42, sum);
}
