//! The header that stands before every packet on a TUN device with `IFF_VNET_HDR`: `struct virtio_net_hdr`
//! (kernel `include/uapi/linux/virtio_net.h`), fields in the machine's byte order.

use super::{Malformed, tcp, udp};

/// Length in bytes.
pub const LEN: usize = 10;

/// The checksum field holds only the pseudo-header's sum, the rest is still to be added.
const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
/// A bit beside the type: the first segment has CWR.
const GSO_ECN: u8 = 0x80;

/// What a packet is made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Kind {
    /// One packet.
    #[default]
    Single,
    /// TCP segments over IPv4.
    TcpV4,
    /// TCP segments over IPv6.
    TcpV6,
    /// UDP datagrams over either.
    Udp,
}

/// The header.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Header {
    /// What the packet is made of.
    pub kind: Kind,
    /// Is the checksum still to be completed?
    pub needs_checksum: bool,
    /// Its first segment has CWR set.
    pub ecn: bool,
    /// Bytes of headers before the payload: a hint.
    pub header_len: u16,
    /// Payload bytes of each segment but the last, which may have fewer.
    pub segment: u16,
    /// From where on the checksum counts: the start of the transport header.
    pub checksum_start: u16,
    /// Where the checksum field is, counted from there.
    pub checksum_offset: u16,
}

impl Header {
    /// Reads the header.
    ///
    /// # Errors
    /// A kind that is not known here.
    #[inline]
    pub fn parse(bytes: &[u8; LEN]) -> Result<Self, Malformed> {
        let word = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        let kind = match bytes[1] & !GSO_ECN {
            GSO_NONE => Kind::Single,
            GSO_TCPV4 => Kind::TcpV4,
            GSO_TCPV6 => Kind::TcpV6,
            GSO_UDP_L4 => Kind::Udp,
            _ => return Err(Malformed),
        };
        Ok(Self {
            kind,
            needs_checksum: bytes[0] & NEEDS_CSUM != 0,
            ecn: bytes[1] & GSO_ECN != 0,
            header_len: word(2),
            segment: word(4),
            checksum_start: word(6),
            checksum_offset: word(8),
        })
    }

    /// The header's bytes.
    #[inline]
    pub fn to_bytes(self) -> [u8; LEN] {
        let kind = match self.kind {
            Kind::Single => GSO_NONE,
            Kind::TcpV4 => GSO_TCPV4,
            Kind::TcpV6 => GSO_TCPV6,
            Kind::Udp => GSO_UDP_L4,
        };
        let mut bytes = [0; LEN];
        bytes[0] = if self.needs_checksum { NEEDS_CSUM } else { 0 };
        bytes[1] = kind | if self.ecn { GSO_ECN } else { 0 };
        let words = [self.header_len, self.segment, self.checksum_start, self.checksum_offset];
        for (field, word) in bytes[2..].chunks_exact_mut(2).zip(words) {
            field.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }
}

impl Kind {
    /// Where the transport header has its checksum, for a packet of segments.
    #[inline]
    pub fn checksum_offset(self) -> usize {
        if self == Self::Udp { udp::CHECKSUM.start } else { tcp::CHECKSUM.start }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        for kind in [Kind::Single, Kind::TcpV4, Kind::TcpV6, Kind::Udp] {
            for (needs_checksum, ecn) in [(false, false), (true, false), (true, true)] {
                let header = Header {
                    kind,
                    needs_checksum,
                    ecn,
                    header_len: 54,
                    segment: 1420,
                    checksum_start: 20,
                    checksum_offset: 16,
                };
                assert_eq!(Header::parse(&header.to_bytes()), Ok(header));
            }
        }
        assert_eq!(Header::default().to_bytes(), [0; LEN]);
    }

    /// As a kernel on a little-endian machine wrote it for 44 segments of 1420 bytes.
    #[test]
    #[cfg(target_endian = "little")]
    fn vector() {
        let header = Header::parse(&[1, 1, 0x34, 0, 0x8c, 5, 0x14, 0, 0x10, 0]).unwrap();
        let expected = Header {
            kind: Kind::TcpV4,
            needs_checksum: true,
            ecn: false,
            header_len: 52,
            segment: 1420,
            checksum_start: 20,
            checksum_offset: 16,
        };
        assert_eq!(header, expected);
    }

    #[test]
    fn unknown_kinds() {
        for kind in [2, 3, 6, 0x7f] {
            assert_eq!(Header::parse(&[0, kind, 0, 0, 0, 0, 0, 0, 0, 0]), Err(Malformed));
        }
    }
}
