//! One flow: does a packet come next, and what do they make together?

use std::ops::Range;

use super::{Joined, MAX_SEGMENTS, Part};
use crate::wire::vnet::{Header, Kind};
use crate::wire::{checksum, ipv4, tcp, udp};

/// Length in bytes of the longest headers of a packet that is joined: IPv6 and TCP with all options.
const MAX_HEADER_LEN: usize = 100;
/// Bytes of the longest super-packet.
const MAX_LEN: usize = 65_535;

const IPV4_LENGTH: Range<usize> = 2..4;
const IPV4_ID: Range<usize> = 4..6;
const IPV4_CHECKSUM: Range<usize> = 10..12;
const IPV6_LENGTH: Range<usize> = 4..6;
/// "Don't fragment" in the sixth byte of an IPv4 header.
pub(super) const DONT_FRAGMENT: u8 = 0x40;

/// Where things are in a TCP or UDP packet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) kind: Kind,
    /// Where the transport header starts.
    pub(super) transport: usize,
    /// Where the payload starts.
    pub(super) header_len: usize,
    /// Hash of what tells flows apart, never 0.
    pub(super) hash: u32,
    /// May it be part of a super-packet?
    pub(super) joinable: bool,
    /// Does it end one?
    pub(super) push: bool,
}

/// How the ids of a flow's packets go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Id {
    /// One packet has been seen so far.
    First,
    /// They count.
    Counts,
    /// They stand still.
    Fixed,
}

/// What became of a packet that came to its flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Append {
    Joined,
    /// Joined, and nothing more can be.
    Last,
    Refused,
}

/// Packets that follow each other.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flow {
    shape: Shape,
    /// The first packet's headers; they become the super-packet's.
    headers: [u8; MAX_HEADER_LEN],
    /// Payloads.
    parts: [Part; MAX_SEGMENTS],
    /// How many there are; 0 for a place that is free.
    count: usize,
    /// Payload bytes of all packets but the last.
    size: usize,
    /// Bytes of headers and payloads.
    len: usize,
    next_sequence: u32,
    id: Id,
    last_id: u16,
    /// The first packet's checksums are looked at only when a second one is there.
    verified: bool,
}

/// Addresses and ports.
pub(super) const V4_FLOW: Range<usize> = 12..24;
pub(super) const V6_FLOW: Range<usize> = 8..44;

impl Flow {
    /// A place that is free.
    pub(super) const EMPTY: Self = Self {
        shape: Shape {
            kind: Kind::Single,
            transport: 0,
            header_len: 0,
            hash: 0,
            joinable: false,
            push: false,
        },
        headers: [0; MAX_HEADER_LEN],
        parts: [Part { start: 0, len: 0 }; MAX_SEGMENTS],
        count: 0,
        size: 0,
        len: 0,
        next_sequence: 0,
        id: Id::First,
        last_id: 0,
        verified: false,
    };

    pub(super) fn begin(&mut self, shape: Shape, packet: &[u8], range: &Range<usize>) {
        let headers = &packet[..shape.header_len];
        self.shape = shape;
        self.headers[..shape.header_len].copy_from_slice(headers);
        self.parts[0] = Part::from_range(&(range.start + shape.header_len..range.end));
        self.count = 1;
        self.size = packet.len() - shape.header_len;
        self.len = packet.len();
        self.next_sequence = sequence(&headers[shape.transport..]).wrapping_add(self.parts[0].len);
        self.id = Id::First;
        self.last_id = word(headers, IPV4_ID);
        self.verified = false;
    }

    #[inline]
    fn is_v4(&self) -> bool {
        self.shape.transport == ipv4::MIN_HEADER_LEN
    }

    #[inline]
    pub(super) fn is_flow_of(&self, shape: &Shape, packet: &[u8]) -> bool {
        let flow = if self.is_v4() { V4_FLOW } else { V6_FLOW };
        self.shape.kind == shape.kind
            && self.shape.transport == shape.transport
            && self.headers[flow.clone()] == packet[flow]
    }

    #[inline]
    pub(super) fn append(&mut self, shape: &Shape, buffer: &[u8], range: &Range<usize>) -> Append {
        let packet = &buffer[range.clone()];
        let payload_len = packet.len() - self.shape.header_len.min(packet.len());
        if !shape.joinable
            || shape.header_len != self.shape.header_len
            || payload_len > self.size
            || self.len + payload_len > MAX_LEN
        {
            return Append::Refused;
        }
        let Some(id) = self.goes_on(packet) else { return Append::Refused };
        if !self.verified {
            let first = self.parts[0].start as usize;
            let first = &buffer[first - self.shape.header_len..first + self.size];
            if !self.is_right(first) {
                return Append::Refused;
            }
            self.verified = true;
        }
        if !self.is_right(packet) {
            return Append::Refused;
        }
        let part = Part::from_range(&(range.start + self.shape.header_len..range.end));
        self.parts[self.count] = part;
        self.count += 1;
        self.len += payload_len;
        self.next_sequence = self.next_sequence.wrapping_add(part.len);
        self.id = id;
        self.last_id = word(packet, IPV4_ID);
        if shape.push {
            self.headers[self.shape.transport + tcp::FLAGS] |= tcp::PSH;
        }
        if shape.push || payload_len < self.size || self.count == MAX_SEGMENTS {
            return Append::Last;
        }
        Append::Joined
    }

    /// Do this packet's headers say that it comes next, and nothing else than the first one's? How ids go on, if so.
    #[inline]
    fn goes_on(&self, packet: &[u8]) -> Option<Id> {
        let same = |range: Range<usize>| self.headers[range.clone()] == packet[range];
        let id = if self.is_v4() {
            // version, type of service; fragmentation, time to live
            if !same(0..2) || !same(6..9) {
                return None;
            }
            let id = word(packet, IPV4_ID);
            let counts = id == self.last_id.wrapping_add(1);
            let fixed = id == self.last_id && packet[6] & DONT_FRAGMENT != 0;
            match self.id {
                Id::First | Id::Counts if counts => Id::Counts,
                Id::First | Id::Fixed if fixed => Id::Fixed,
                _ => return None,
            }
        } else {
            // version, traffic class, flow label; hop limit
            if !same(0..4) || !same(7..8) {
                return None;
            }
            self.id
        };
        if self.shape.kind != Kind::Udp {
            let at = self.shape.transport;
            // acknowledgment, header length; window; urgent pointer, options
            let fields = [at + 8..at + 13, at + 14..at + 16, at + 18..self.shape.header_len];
            // the first one's PSH is that of packets joined since, and the last of these ended it
            if sequence(&packet[at..]) != self.next_sequence
                || (self.headers[at + tcp::FLAGS] ^ packet[at + tcp::FLAGS]) & !tcp::PSH != 0
                || !fields.into_iter().all(same)
            {
                return None;
            }
        }
        Some(id)
    }

    /// Are the packet's checksums right? A super-packet gets new ones, which must not hide a damage.
    fn is_right(&self, packet: &[u8]) -> bool {
        let transport = &packet[self.shape.transport..];
        (!self.is_v4() || checksum::of(&packet[..self.shape.transport]) == 0)
            && checksum::add(self.pseudo_sum(packet, transport.len()), checksum::sum(transport))
                == 0xffff
    }

    /// Sum over the pseudo-header of a transport header and payload of `len` bytes.
    fn pseudo_sum(&self, packet: &[u8], len: usize) -> u16 {
        let addresses = if self.is_v4() { 12..20 } else { 8..40 };
        let protocol = if self.shape.kind == Kind::Udp { udp::PROTOCOL } else { tcp::PROTOCOL };
        #[allow(clippy::cast_possible_truncation)] // no packet is longer than MAX_LEN
        let len = len as u16;
        let sum = checksum::add(checksum::sum(&packet[addresses]), u16::from(protocol));
        checksum::add(sum, len)
    }

    /// Gives out what there is, and frees the place.
    pub(super) fn finish(&mut self, out: &mut impl FnMut(Joined<'_>)) {
        match self.count {
            0 => {}
            1 => {
                let Part { start, len } = self.parts[0];
                #[allow(clippy::cast_possible_truncation)] // at most MAX_HEADER_LEN
                let header_len = self.shape.header_len as u32;
                out(Joined::single(&[Part { start: start - header_len, len: len + header_len }]));
            }
            count => {
                let offload = self.seal();
                let headers = &self.headers[..self.shape.header_len];
                out(Joined { offload, headers, parts: &self.parts[..count] });
            }
        }
        self.count = 0;
    }

    /// Makes the first packet's headers those of the super-packet, and says what goes before them.
    fn seal(&mut self) -> Header {
        let Shape { kind, transport, header_len, .. } = self.shape;
        #[allow(clippy::cast_possible_truncation)] // no packet is longer than MAX_LEN
        let [total, transport_len, headers, start, segment] =
            [self.len, self.len - transport, header_len, transport, self.size]
                .map(|len| len as u16);
        let pseudo = self.pseudo_sum(&self.headers, self.len - transport);
        if self.is_v4() {
            put(&mut self.headers, IPV4_LENGTH, total);
            put(&mut self.headers, IPV4_CHECKSUM, 0);
            let checksum = checksum::of(&self.headers[..transport]);
            put(&mut self.headers, IPV4_CHECKSUM, checksum);
        } else {
            put(&mut self.headers, IPV6_LENGTH, transport_len);
        }
        let offset = kind.checksum_offset();
        put(&mut self.headers, transport + offset..transport + offset + 2, pseudo);
        if kind == Kind::Udp {
            put(&mut self.headers, transport + 4..transport + 6, transport_len);
        }
        Header {
            kind,
            needs_checksum: true,
            ecn: false,
            header_len: headers,
            segment,
            checksum_start: start,
            #[allow(clippy::cast_possible_truncation)] // 6 or 16
            checksum_offset: offset as u16,
        }
    }
}

/// The sequence number of a TCP segment; of a UDP datagram something that is not looked at.
#[inline]
fn sequence(segment: &[u8]) -> u32 {
    u32::from_be_bytes([segment[4], segment[5], segment[6], segment[7]])
}

#[inline]
fn word(bytes: &[u8], field: Range<usize>) -> u16 {
    let bytes = &bytes[field];
    u16::from_be_bytes([bytes[0], bytes[1]])
}

#[inline]
fn put(bytes: &mut [u8], field: Range<usize>, value: u16) {
    bytes[field].copy_from_slice(&value.to_be_bytes());
}
