//! Joins packets of one flow that follow each other into super-packets, so that the kernel takes dozens of them at once
//! (GRO). Cut again by the kernel's rules, a super-packet gives the packets that went in, byte for byte; what would not is
//! never joined. (One thing aside: the id of packets that must not be fragmented has no meaning, RFC 6864, 4.1; where it
//! stood still it may count afterwards.)
//!
//! Packets lie in a buffer of the caller's and stay there; what comes out are headers and ranges of that buffer. Packets of
//! one flow leave in the order in which they came, whatever flow they are mixed with.

use std::ops::Range;

use crate::wire::vnet::{Header, Kind};
use crate::wire::{checksum, ip, ipv4, ipv6, tcp, udp};

/// Flows that are looked after side by side.
const FLOWS: usize = 32;
/// Packets joined into one, at most.
pub(super) const MAX_SEGMENTS: usize = 64;
/// Length in bytes of the longest headers of a packet that is joined: IPv6 and TCP with all options.
const MAX_HEADER_LEN: usize = 100;
/// Bytes of the longest super-packet.
const MAX_LEN: usize = 65_535;

const IPV4_LENGTH: Range<usize> = 2..4;
const IPV4_ID: Range<usize> = 4..6;
const IPV4_CHECKSUM: Range<usize> = 10..12;
const IPV6_LENGTH: Range<usize> = 4..6;
/// "Don't fragment" in the sixth byte of an IPv4 header.
const DONT_FRAGMENT: u8 = 0x40;

/// A range of the caller's buffer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Part {
    /// Where it starts.
    pub start: u32,
    /// Bytes.
    pub len: u32,
}

impl Part {
    /// The part's bytes.
    #[inline]
    pub fn of(self, buffer: &[u8]) -> &[u8] {
        &buffer[self.start as usize..][..self.len as usize]
    }

    /// The part that is this range.
    #[inline]
    #[allow(clippy::cast_possible_truncation)] // no buffer is that long
    pub fn from_range(range: &Range<usize>) -> Self {
        Self { start: range.start as u32, len: range.len() as u32 }
    }
}

/// One packet for the TUN device.
#[derive(Clone, Copy, Debug)]
pub struct Joined<'a> {
    /// What goes before it.
    pub offload: Header,
    /// Its headers; empty when it is one packet that goes as it came.
    pub headers: &'a [u8],
    /// What follows them: payloads, or the one packet.
    pub parts: &'a [Part],
}

impl<'a> Joined<'a> {
    fn single(parts: &'a [Part; 1]) -> Self {
        Self { offload: Header::default(), headers: &[], parts }
    }

    /// The packets that it was made of, as they came, as ranges of the buffer: in front of each payload there are its own
    /// headers, as long as the first one's.
    pub fn singles(&self) -> impl Iterator<Item = Range<usize>> {
        self.parts.iter().map(|part| {
            let start = part.start as usize;
            start - self.headers.len()..start + part.len as usize
        })
    }
}

/// Which kinds are joined.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Kinds {
    /// TCP over both versions.
    pub tcp: bool,
    /// UDP over both versions.
    pub udp: bool,
}

/// Where things are in a TCP or UDP packet.
#[derive(Clone, Copy, Debug)]
struct Shape {
    kind: Kind,
    /// Where the transport header starts.
    transport: usize,
    /// Where the payload starts.
    header_len: usize,
    /// Hash of what tells flows apart, never 0.
    hash: u32,
    /// May it be part of a super-packet?
    joinable: bool,
    /// Does it end one?
    push: bool,
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
enum Append {
    Joined,
    /// Joined, and nothing more can be.
    Last,
    Refused,
}

#[derive(Clone, Copy, Debug)]
struct Flow {
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

/// The flows of one burst of packets.
#[derive(Debug)]
pub struct Merger {
    kinds: Kinds,
    flows: Box<[Flow; FLOWS]>,
    /// The hash of each flow, 0 where a place is free.
    hashes: [u32; FLOWS],
    /// Places from here on have not been used since the last flush.
    used: usize,
    /// The place that is made free when none is.
    next_victim: usize,
}

impl Merger {
    /// Nothing waits in it.
    pub fn new(kinds: Kinds) -> Self {
        let empty = Flow {
            shape: Shape {
                kind: Kind::Single,
                transport: 0,
                header_len: 0,
                hash: 0,
                joinable: false,
                push: false,
            },
            headers: [0; MAX_HEADER_LEN],
            parts: [Part::default(); MAX_SEGMENTS],
            count: 0,
            size: 0,
            len: 0,
            next_sequence: 0,
            id: Id::First,
            last_id: 0,
            verified: false,
        };
        Self { kinds, flows: Box::new([empty; FLOWS]), hashes: [0; FLOWS], used: 0, next_victim: 0 }
    }

    /// Joins other kinds from now on. To be called between bursts.
    pub fn set_kinds(&mut self, kinds: Kinds) {
        self.kinds = kinds;
    }

    /// Takes the packet that `range` of `buffer` holds exactly; its lengths are those of a valid IP packet. What is ready
    /// goes to `out`. Until [`Merger::flush`] the bytes must stay as they are.
    #[inline]
    pub fn push(&mut self, buffer: &[u8], range: Range<usize>, out: &mut impl FnMut(Joined<'_>)) {
        let packet = &buffer[range.clone()];
        let shape = match self.shape(packet) {
            Sight::Flow(shape) => shape,
            Sight::Other => return out(Joined::single(&[Part::from_range(&range)])),
            Sight::Unclear => {
                self.flush(out);
                return out(Joined::single(&[Part::from_range(&range)]));
            }
        };
        let place = self.find(&shape, packet);
        if let Some(place) = place {
            match self.flows[place].append(&shape, buffer, &range) {
                Append::Joined => return,
                Append::Last => return self.emit(place, out),
                // what follows must not overtake it
                Append::Refused => self.emit(place, out),
            }
        }
        if !shape.joinable || shape.push {
            return out(Joined::single(&[Part::from_range(&range)]));
        }
        let place = place.unwrap_or_else(|| self.free_place(out));
        self.hashes[place] = shape.hash;
        self.flows[place].begin(shape, packet, &range);
    }

    /// Gives out everything that is left.
    pub fn flush(&mut self, out: &mut impl FnMut(Joined<'_>)) {
        for place in 0..self.used {
            self.emit(place, out);
        }
        self.used = 0;
    }

    /// Gives out one flow, if there is one in this place, and frees the place.
    fn emit(&mut self, place: usize, out: &mut impl FnMut(Joined<'_>)) {
        self.hashes[place] = 0;
        let flow = &mut self.flows[place];
        match flow.count {
            0 => {}
            1 => {
                let Part { start, len } = flow.parts[0];
                #[allow(clippy::cast_possible_truncation)] // at most MAX_HEADER_LEN
                let header_len = flow.shape.header_len as u32;
                out(Joined::single(&[Part { start: start - header_len, len: len + header_len }]));
            }
            count => {
                let offload = flow.seal();
                out(Joined {
                    offload,
                    headers: &flow.headers[..flow.shape.header_len],
                    parts: &flow.parts[..count],
                });
            }
        }
        flow.count = 0;
    }

    fn free_place(&mut self, out: &mut impl FnMut(Joined<'_>)) -> usize {
        if let Some(place) = self.hashes[..self.used].iter().position(|hash| *hash == 0) {
            return place;
        }
        if self.used < FLOWS {
            self.used += 1;
            return self.used - 1;
        }
        let place = self.next_victim;
        self.next_victim = (place + 1) % FLOWS;
        self.emit(place, out);
        place
    }

    fn find(&self, shape: &Shape, packet: &[u8]) -> Option<usize> {
        (0..self.used).find(|place| {
            self.hashes[*place] == shape.hash && self.flows[*place].is_flow_of(shape, packet)
        })
    }

    #[inline]
    fn shape(&self, packet: &[u8]) -> Sight {
        let (transport, protocol, addresses) = match ip::version(packet) {
            4 if packet.len() >= ipv4::MIN_HEADER_LEN => {
                let is_plain =
                    packet[0] == 0x45 && packet[6] & !DONT_FRAGMENT == 0 && packet[7] == 0;
                if !is_plain {
                    return Sight::Unclear;
                }
                (ipv4::MIN_HEADER_LEN, packet[9], V4_FLOW)
            }
            6 if packet.len() >= ipv6::HEADER_LEN => match packet[6] {
                // extension headers
                0 | 43 | 44 | 60 => return Sight::Unclear,
                protocol => (ipv6::HEADER_LEN, protocol, V6_FLOW),
            },
            _ => return Sight::Other,
        };
        let segment = &packet[transport..];
        let kind = match (protocol, transport) {
            (tcp::PROTOCOL, ipv4::MIN_HEADER_LEN) if self.kinds.tcp => Kind::TcpV4,
            (tcp::PROTOCOL, _) if self.kinds.tcp => Kind::TcpV6,
            (udp::PROTOCOL, _) if self.kinds.udp => Kind::Udp,
            _ => return Sight::Other,
        };
        let (len, joinable, push) = if kind == Kind::Udp {
            if segment.len() < udp::HEADER_LEN {
                return Sight::Unclear;
            }
            let len = usize::from(u16::from_be_bytes([segment[4], segment[5]]));
            // one without a checksum must stay without
            (udp::HEADER_LEN, len == segment.len() && segment[udp::CHECKSUM] != [0, 0], false)
        } else {
            let Some(len) = tcp::header_len(segment) else { return Sight::Unclear };
            let flags = segment[tcp::FLAGS];
            (len, flags & !(tcp::PSH | tcp::ECE) == tcp::ACK, flags & tcp::PSH != 0)
        };
        let header_len = transport + len;
        let hash = packet[addresses].as_chunks::<4>().0.iter().fold(0u32, |hash, word| {
            (hash.rotate_left(5) ^ u32::from_ne_bytes(*word)).wrapping_mul(0x9e37_79b1)
        });
        Sight::Flow(Shape {
            kind,
            transport,
            header_len,
            hash: hash | 1,
            joinable: joinable && header_len < packet.len(),
            push,
        })
    }
}

/// What a packet is to the merger.
#[derive(Clone, Copy, Debug)]
enum Sight {
    /// Of a flow that may be joined.
    Flow(Shape),
    /// Of no such flow: nothing waits that it could overtake.
    Other,
    /// It may be of any flow: a fragment, options, extension headers, a transport header that is none.
    Unclear,
}

/// Addresses and ports.
const V4_FLOW: Range<usize> = 12..24;
const V6_FLOW: Range<usize> = 8..44;

impl Flow {
    fn begin(&mut self, shape: Shape, packet: &[u8], range: &Range<usize>) {
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
    fn is_flow_of(&self, shape: &Shape, packet: &[u8]) -> bool {
        let flow = if self.is_v4() { V4_FLOW } else { V6_FLOW };
        self.shape.kind == shape.kind
            && self.shape.transport == shape.transport
            && self.headers[flow.clone()] == packet[flow]
    }

    #[inline]
    fn append(&mut self, shape: &Shape, buffer: &[u8], range: &Range<usize>) -> Append {
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
