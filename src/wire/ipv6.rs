//! IPv6 header (RFC 8200), as a view over a packet.

use std::net::Ipv6Addr;

use super::Malformed;

/// Length in bytes of the fixed header.
pub const HEADER_LEN: usize = 40;
/// Length in bytes of a packet that every link carries.
pub const MIN_MTU: usize = 1280;
/// Protocol number of ICMPv6.
pub const PROTOCOL_ICMPV6: u8 = 58;

/// Extension headers before the payload that are looked through, at most.
const EXTENSIONS: usize = 8;

mod field {
    use std::ops::Range;

    pub(super) const LENGTH: Range<usize> = 4..6;
    pub(super) const NEXT_HEADER: usize = 6;
    pub(super) const HOP_LIMIT: usize = 7;
    pub(super) const SOURCE: Range<usize> = 8..24;
    pub(super) const DESTINATION: Range<usize> = 24..40;
}

/// An IPv6 packet whose length agrees with the buffer that holds it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packet<T> {
    buffer: T,
}

impl<T: AsRef<[u8]>> Packet<T> {
    /// Checks version and length. Bytes after the packet's total length are allowed and never looked at.
    ///
    /// # Errors
    /// Not IPv6, or longer than the buffer. (Jumbograms give 0 for their length, and so lose their payload here.)
    pub fn new(buffer: T) -> Result<Self, Malformed> {
        let packet = Self::front(buffer)?;
        if packet.total_len() <= packet.buffer.as_ref().len() { Ok(packet) } else { Err(Malformed) }
    }

    /// The front of a packet: like [`Packet::new`], but the buffer need only hold the fixed header.
    ///
    /// # Errors
    /// Not IPv6, or too short.
    pub fn front(buffer: T) -> Result<Self, Malformed> {
        let bytes = buffer.as_ref();
        if bytes.len() >= HEADER_LEN && bytes[0] >> 4 == 6 {
            Ok(Self { buffer })
        } else {
            Err(Malformed)
        }
    }

    /// Length of the whole packet in bytes.
    #[inline]
    pub fn total_len(&self) -> usize {
        let bytes = &self.buffer.as_ref()[field::LENGTH];
        HEADER_LEN + usize::from(u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    /// The packet itself, header included; of a [`Packet::front`] what is there.
    #[inline]
    pub fn bytes(&self) -> &[u8] {
        let buffer = self.buffer.as_ref();
        &buffer[..self.total_len().min(buffer.len())]
    }

    /// Hops that it may still make.
    #[inline]
    pub fn hop_limit(&self) -> u8 {
        self.buffer.as_ref()[field::HOP_LIMIT]
    }

    /// What follows the fixed header: a protocol number, or an extension header.
    #[inline]
    pub fn next_header(&self) -> u8 {
        self.buffer.as_ref()[field::NEXT_HEADER]
    }

    /// Source address.
    #[inline]
    pub fn source(&self) -> Ipv6Addr {
        self.address(field::SOURCE)
    }

    /// Destination address.
    #[inline]
    pub fn destination(&self) -> Ipv6Addr {
        self.address(field::DESTINATION)
    }

    /// Protocol number and bytes of what comes after the extension headers; empty bytes for a later fragment. `None` when
    /// the headers do not end within the packet.
    pub fn upper_layer(&self) -> Option<(u8, &[u8])> {
        let bytes = self.bytes();
        let (mut next, mut at) = (self.next_header(), HEADER_LEN);
        for _ in 0..EXTENSIONS {
            let (following, len) = match next {
                // hop-by-hop options, routing, destination options: length in units of 8 bytes beyond the first
                0 | 43 | 60 => (*bytes.get(at)?, 8 + 8 * usize::from(*bytes.get(at + 1)?)),
                // fragment
                44 => {
                    let offset =
                        u16::from_be_bytes([*bytes.get(at + 2)?, *bytes.get(at + 3)?]) & !7;
                    if offset != 0 {
                        return Some((*bytes.get(at)?, &[]));
                    }
                    (*bytes.get(at)?, 8)
                }
                protocol => return Some((protocol, bytes.get(at..)?)),
            };
            (next, at) = (following, at + len);
        }
        None
    }

    fn address(&self, range: std::ops::Range<usize>) -> Ipv6Addr {
        let mut octets = [0; 16];
        octets.copy_from_slice(&self.buffer.as_ref()[range]);
        octets.into()
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> Packet<T> {
    /// Takes one hop off the hop limit. A packet without a hop to spare is left as it is, and `false` returned.
    #[inline]
    pub fn take_hop(&mut self) -> bool {
        let hops = self.hop_limit();
        if hops <= 1 {
            return false;
        }
        self.buffer.as_mut()[field::HOP_LIMIT] = hops - 1;
        true
    }
}

/// What a header of ours carries; traffic class and flow label are zero.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// Bytes after the header.
    pub payload_len: u16,
    /// Protocol number of the payload.
    pub next_header: u8,
    /// Hops that it may make.
    pub hop_limit: u8,
    /// Source address.
    pub source: Ipv6Addr,
    /// Destination address.
    pub destination: Ipv6Addr,
}

impl Header {
    /// The header's bytes.
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0] = 0x60;
        bytes[field::LENGTH].copy_from_slice(&self.payload_len.to_be_bytes());
        bytes[field::NEXT_HEADER] = self.next_header;
        bytes[field::HOP_LIMIT] = self.hop_limit;
        bytes[field::SOURCE].copy_from_slice(&self.source.octets());
        bytes[field::DESTINATION].copy_from_slice(&self.destination.octets());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(next_header: u8, payload: &[u8]) -> Vec<u8> {
        let header = Header {
            payload_len: u16::try_from(payload.len()).unwrap(),
            next_header,
            hop_limit: 2,
            source: "fd00:5::1".parse().unwrap(),
            destination: "fd00:6::2".parse().unwrap(),
        };
        [&header.to_bytes()[..], payload].concat()
    }

    #[test]
    fn reads_fields() {
        let mut bytes = packet(17, b"12345678");
        bytes.extend([0xee; 4]);
        let view = Packet::new(&bytes[..]).unwrap();
        assert_eq!((view.total_len(), view.hop_limit(), view.next_header()), (48, 2, 17));
        assert_eq!(view.source(), "fd00:5::1".parse::<Ipv6Addr>().unwrap());
        assert_eq!(view.destination(), "fd00:6::2".parse::<Ipv6Addr>().unwrap());
        assert_eq!(view.bytes(), &bytes[..48]);
        assert_eq!(view.upper_layer(), Some((17, &b"12345678"[..])));
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let bytes = packet(17, b"12345678");
        for len in 0..48 {
            assert!(Packet::new(&bytes[..len]).is_err(), "{len}");
            assert_eq!(Packet::front(&bytes[..len]).is_ok(), len >= 40);
        }
        let mut version4 = bytes;
        version4[0] = 0x45;
        assert!(Packet::new(&version4[..]).is_err());
    }

    #[test]
    fn hops() {
        let mut bytes = packet(17, b"");
        assert!(Packet::new(&mut bytes[..]).unwrap().take_hop());
        assert_eq!(bytes[7], 1);
        assert!(!Packet::new(&mut bytes[..]).unwrap().take_hop());
        assert_eq!(bytes[7], 1);
    }

    #[test]
    fn looks_through_extension_headers() {
        // hop-by-hop of 8 bytes, destination options of 16, fragment with offset 0, then ICMPv6
        let mut payload = vec![60, 0, 0, 0, 0, 0, 0, 0, 44, 1];
        payload.extend([0; 14]);
        payload.extend([58, 0, 0, 1, 0, 0, 0, 9, 128, 0]);
        let bytes = packet(0, &payload);
        assert_eq!(Packet::new(&bytes[..]).unwrap().upper_layer(), Some((58, &[128, 0][..])));
        let mut later = bytes.clone();
        later[40 + 24 + 3] = 8;
        assert_eq!(Packet::new(&later[..]).unwrap().upper_layer(), Some((58, &[][..])));
        for cut in 41..bytes.len() - 2 {
            let short = packet(0, &bytes[40..cut]);
            assert!(
                Packet::new(&short[..])
                    .unwrap()
                    .upper_layer()
                    .is_none_or(|(_, rest)| rest.is_empty())
            );
        }
        let endless = packet(0, &[0; 100]);
        assert_eq!(Packet::new(&endless[..]).unwrap().upper_layer(), None);
    }
}
