//! IPv4 header (RFC 791), as a view over a packet.

use std::net::Ipv4Addr;

use super::{Malformed, checksum};

/// Length in bytes of a header without options.
pub const MIN_HEADER_LEN: usize = 20;
/// Length in bytes of the longest packet.
pub const MAX_LEN: usize = 65_535;
/// Protocol number of ICMP.
pub const PROTOCOL_ICMP: u8 = 1;

mod field {
    use std::ops::Range;

    pub(super) const VERSION_IHL: usize = 0;
    pub(super) const LENGTH: Range<usize> = 2..4;
    pub(super) const FLAGS_OFFSET: Range<usize> = 6..8;
    pub(super) const TTL: usize = 8;
    pub(super) const PROTOCOL: usize = 9;
    pub(super) const CHECKSUM: Range<usize> = 10..12;
    pub(super) const SOURCE: Range<usize> = 12..16;
    pub(super) const DESTINATION: Range<usize> = 16..20;
}

/// An IPv4 packet whose lengths agree with the buffer that holds it: [`MIN_HEADER_LEN`] ≤ header length ≤ total length ≤
/// buffer. The header checksum is not looked at: the host that receives the packet checks it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packet<T> {
    buffer: T,
}

impl<T: AsRef<[u8]>> Packet<T> {
    /// Checks version and lengths. Bytes after the packet's total length are allowed and never looked at.
    ///
    /// # Errors
    /// Not IPv4, or a length that cannot be.
    pub fn new(buffer: T) -> Result<Self, Malformed> {
        let packet = Self::front(buffer)?;
        if packet.total_len() <= packet.buffer.as_ref().len() { Ok(packet) } else { Err(Malformed) }
    }

    /// The front of a packet: like [`Packet::new`], but the buffer need only hold the header.
    ///
    /// # Errors
    /// Not IPv4, or a length that cannot be.
    pub fn front(buffer: T) -> Result<Self, Malformed> {
        if buffer.as_ref().len() < MIN_HEADER_LEN || buffer.as_ref()[field::VERSION_IHL] >> 4 != 4 {
            return Err(Malformed);
        }
        let packet = Self { buffer };
        let header = packet.header_len();
        let consistent = MIN_HEADER_LEN <= header
            && header <= packet.total_len()
            && header <= packet.buffer.as_ref().len();
        if consistent { Ok(packet) } else { Err(Malformed) }
    }

    /// Header length in bytes, options included: 20 to 60.
    #[inline]
    pub fn header_len(&self) -> usize {
        usize::from(self.buffer.as_ref()[field::VERSION_IHL] & 0x0f) * 4
    }

    /// Length of the whole packet in bytes.
    #[inline]
    pub fn total_len(&self) -> usize {
        usize::from(self.word(field::LENGTH))
    }

    /// The packet itself, header included, without what follows it in the buffer; of a [`Packet::front`] what is there.
    #[inline]
    pub fn bytes(&self) -> &[u8] {
        let buffer = self.buffer.as_ref();
        &buffer[..self.total_len().min(buffer.len())]
    }

    /// What follows the header.
    #[inline]
    pub fn payload(&self) -> &[u8] {
        &self.bytes()[self.header_len()..]
    }

    /// Time to live, in hops.
    #[inline]
    pub fn ttl(&self) -> u8 {
        self.buffer.as_ref()[field::TTL]
    }

    /// Protocol number of the payload.
    #[inline]
    pub fn protocol(&self) -> u8 {
        self.buffer.as_ref()[field::PROTOCOL]
    }

    /// Must routers not fragment it?
    #[inline]
    pub fn dont_fragment(&self) -> bool {
        self.word(field::FLAGS_OFFSET) & 0x4000 != 0
    }

    /// Is it a fragment other than the first one, so that its payload does not begin with a transport header?
    #[inline]
    pub fn is_later_fragment(&self) -> bool {
        self.word(field::FLAGS_OFFSET) & 0x1fff != 0
    }

    /// Source address.
    #[inline]
    pub fn source(&self) -> Ipv4Addr {
        self.address(field::SOURCE)
    }

    /// Destination address.
    #[inline]
    pub fn destination(&self) -> Ipv4Addr {
        self.address(field::DESTINATION)
    }

    fn word(&self, range: std::ops::Range<usize>) -> u16 {
        let bytes = &self.buffer.as_ref()[range];
        u16::from_be_bytes([bytes[0], bytes[1]])
    }

    fn address(&self, range: std::ops::Range<usize>) -> Ipv4Addr {
        let bytes = &self.buffer.as_ref()[range];
        Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3])
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> Packet<T> {
    /// Takes one hop off the time to live and patches the header checksum. A packet without a hop to spare (time to live
    /// 0 or 1) is left as it is, and `false` returned: it must not be forwarded (RFC 1812, 5.3.1).
    #[inline]
    pub fn take_hop(&mut self) -> bool {
        let (ttl, protocol) = (self.ttl(), self.protocol());
        if ttl <= 1 {
            return false;
        }
        let old = u16::from_be_bytes([ttl, protocol]);
        let new = u16::from_be_bytes([ttl - 1, protocol]);
        let patched = checksum::update(self.word(field::CHECKSUM), old, new);
        let buffer = self.buffer.as_mut();
        buffer[field::TTL] = ttl - 1;
        buffer[field::CHECKSUM].copy_from_slice(&patched.to_be_bytes());
        true
    }
}

/// What a header without options carries; the other fields are zero.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// Length of the whole packet in bytes.
    pub total_len: u16,
    /// Time to live, in hops.
    pub ttl: u8,
    /// Protocol number of the payload.
    pub protocol: u8,
    /// Source address.
    pub source: Ipv4Addr,
    /// Destination address.
    pub destination: Ipv4Addr,
}

impl Header {
    /// The header's bytes, checksum included.
    pub fn to_bytes(self) -> [u8; MIN_HEADER_LEN] {
        let mut bytes = [0; MIN_HEADER_LEN];
        bytes[field::VERSION_IHL] = 0x45;
        bytes[field::LENGTH].copy_from_slice(&self.total_len.to_be_bytes());
        bytes[field::TTL] = self.ttl;
        bytes[field::PROTOCOL] = self.protocol;
        bytes[field::SOURCE].copy_from_slice(&self.source.octets());
        bytes[field::DESTINATION].copy_from_slice(&self.destination.octets());
        let checksum = checksum::of(&bytes);
        bytes[field::CHECKSUM].copy_from_slice(&checksum.to_be_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The forward vector of backends spec 8.6.
    const PACKET: [u8; 36] = [
        0x45, 0x00, 0x00, 0x24, 0x12, 0x34, 0x00, 0x00, 0x40, 0x11, 0x51, 0x83, 0x0a, 0x05, 0x01,
        0x02, 0x0a, 0x05, 0x02, 0x07, 0x41, 0x42, 0x43, 0x44, 0x45, 0x46, 0x47, 0x48, 0x49, 0x4a,
        0x4b, 0x4c, 0x4d, 0x4e, 0x4f, 0x50,
    ];

    fn is_packet(bytes: &[u8]) -> bool {
        Packet::new(bytes).is_ok()
    }

    #[test]
    fn reads_the_fields() {
        let packet = Packet::new(PACKET).unwrap();
        assert_eq!((packet.header_len(), packet.total_len(), packet.ttl()), (20, 36, 64));
        assert_eq!(packet.protocol(), 17);
        assert_eq!(packet.source(), Ipv4Addr::new(10, 5, 1, 2));
        assert_eq!(packet.destination(), Ipv4Addr::new(10, 5, 2, 7));
        assert_eq!(packet.payload(), &PACKET[20..]);
        assert!(!packet.dont_fragment() && !packet.is_later_fragment());
    }

    #[test]
    fn refuses_what_does_not_fit() {
        assert!(is_packet(&PACKET[..]));
        let wrong = |at: usize, value: u8| {
            let mut bytes = PACKET;
            bytes[at] = value;
            !is_packet(&bytes)
        };
        assert!(wrong(0, 0x65), "version 6");
        assert!(wrong(0, 0x44), "header of 16 bytes");
        assert!(wrong(0, 0x4a), "header beyond the end");
        assert!(wrong(3, 37), "longer than the buffer");
        assert!(wrong(3, 19), "shorter than its header");
        for len in 0..36 {
            assert!(!is_packet(&PACKET[..len]), "cut to {len}");
        }
    }

    #[test]
    fn trailing_bytes_are_not_part_of_it() {
        let mut long = [0xee; 40];
        long[..36].copy_from_slice(&PACKET);
        assert_eq!(Packet::new(long).unwrap().bytes(), PACKET);
    }

    #[test]
    fn hop_vectors() {
        let mut bytes = PACKET;
        assert!(Packet::new(&mut bytes[..]).unwrap().take_hop());
        assert_eq!(bytes[8..12], [0x3f, 0x11, 0x52, 0x83]);
        assert!(Packet::new(&mut bytes[..]).unwrap().take_hop());
        assert_eq!(bytes[8..12], [0x3e, 0x11, 0x53, 0x83]);
        assert_eq!(bytes[12..], PACKET[12..]);
    }

    #[test]
    fn hop_checksum_carries() {
        for (before, after) in
            [(0xfffe_u16, 0x00ff_u16), (0xff00, 0x0001), (0xfeff, 0x0000), (0xfefe, 0xfffe)]
        {
            let mut bytes = PACKET;
            bytes[10..12].copy_from_slice(&before.to_be_bytes());
            assert!(Packet::new(&mut bytes[..]).unwrap().take_hop());
            assert_eq!(bytes[10..12], after.to_be_bytes(), "{before:04x}");
        }
    }

    #[test]
    fn no_hop_to_spare() {
        for ttl in [0, 1] {
            let mut bytes = PACKET;
            bytes[8] = ttl;
            let before = bytes;
            assert!(!Packet::new(&mut bytes[..]).unwrap().take_hop());
            assert_eq!(bytes, before);
        }
    }

    #[test]
    fn built_header_is_a_packet_with_a_right_checksum() {
        let bytes = Header {
            total_len: 20,
            ttl: 8,
            protocol: 1,
            source: Ipv4Addr::new(10, 5, 1, 0),
            destination: Ipv4Addr::new(10, 5, 1, 2),
        }
        .to_bytes();
        assert_eq!(checksum::of(&bytes), 0);
        let packet = Packet::new(bytes).unwrap();
        assert_eq!((packet.ttl(), packet.total_len()), (8, 20));
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let mut seed = 1u32;
        let mut accepted = 0;
        for round in 0..50_000usize {
            let mut bytes = PACKET;
            for _ in 0..round % 5 {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let [at, value, ..] = seed.to_be_bytes();
                bytes[usize::from(at) % 24] = value;
            }
            let len = round % 37;
            if let Ok(mut packet) = Packet::new(&mut bytes[..len]) {
                accepted += 1;
                let _ = packet.take_hop();
                assert_eq!(packet.header_len() + packet.payload().len(), packet.total_len());
                assert!(packet.total_len() <= len);
                let _ = (packet.source(), packet.destination(), packet.is_later_fragment());
            }
        }
        assert!(accepted > 100, "the mutations must not all be refused");
    }
}
