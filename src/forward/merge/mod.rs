//! Joins packets of one flow that follow each other into super-packets, so that the kernel takes dozens of them at once
//! (GRO). Cut again by the kernel's rules, a super-packet gives the packets that went in, byte for byte; what would not is
//! never joined. (One thing aside: the id of packets that must not be fragmented has no meaning, RFC 6864, 4.1; where it
//! stood still it may count afterwards.)
//!
//! Packets lie in a buffer of the caller's and stay there; what comes out are headers and ranges of that buffer. Packets of
//! one flow leave in the order in which they came, whatever flow they are mixed with.

mod flow;

use std::ops::Range;

use self::flow::{Append, DONT_FRAGMENT, Flow, Shape, V4_FLOW, V6_FLOW};
use crate::wire::vnet::{Header, Kind};
use crate::wire::{ip, ipv4, ipv6, tcp, udp};

/// Flows that are looked after side by side.
const FLOWS: usize = 32;
/// Packets joined into one, at most.
pub(super) const MAX_SEGMENTS: usize = 64;

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
        Self {
            kinds,
            flows: Box::new([Flow::EMPTY; FLOWS]),
            hashes: [0; FLOWS],
            used: 0,
            next_victim: 0,
        }
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
        self.flows[place].finish(out);
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
