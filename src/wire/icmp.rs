//! ICMP error messages about packets that cannot be forwarded (RFC 792, RFC 1191; when not to answer: RFC 1812, 4.3.2.7).

use std::net::Ipv4Addr;

use super::{checksum, ipv4};

/// Length in bytes of the longest message that [`Error::reply`] makes: IP header, ICMP header, and the quote.
pub const MAX_ERROR_LEN: usize = ipv4::MIN_HEADER_LEN + HEADER_LEN + 60 + QUOTED_PAYLOAD;

/// Length in bytes of an ICMP header.
const HEADER_LEN: usize = 8;
/// How many bytes of the offending packet's payload are quoted, at most.
const QUOTED_PAYLOAD: usize = 8;
/// Time to live of our messages: they never leave the host. It is the one that the Go flanneld's proxy uses.
const TTL: u8 = 8;

/// Why a packet cannot be forwarded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Error {
    /// No route to its destination (type 3, code 0).
    NetUnreachable,
    /// Too long for the next hop and not to be fragmented (type 3, code 4; ICMPv6: type 2).
    TooBig {
        /// The longest packet in bytes that would have passed.
        mtu: u16,
    },
    /// No hop left (type 11, code 0).
    TimeExceeded,
}

impl Error {
    /// Writes the message that tells `offender`'s source about the error, coming from `from`, and returns its length in bytes.
    /// `None` when such a packet must not be answered: an ICMP error, a later fragment, or one whose source is not a host.
    ///
    /// It quotes the header and up to 8 payload bytes, never more than the packet has.
    pub fn reply<T: AsRef<[u8]>>(
        self,
        offender: &ipv4::Packet<T>,
        from: Ipv4Addr,
        out: &mut [u8; MAX_ERROR_LEN],
    ) -> Option<usize> {
        if !may_be_answered(offender) {
            return None;
        }
        let quoted = offender.header_len() + offender.payload().len().min(QUOTED_PAYLOAD);
        let len = ipv4::MIN_HEADER_LEN + HEADER_LEN + quoted;
        let header = ipv4::Header {
            total_len: u16::try_from(len).ok()?, // at most MAX_ERROR_LEN
            ttl: TTL,
            protocol: ipv4::PROTOCOL_ICMP,
            source: from,
            destination: offender.source(),
        };
        let (ip, icmp) = out[..len].split_at_mut(ipv4::MIN_HEADER_LEN);
        ip.copy_from_slice(&header.to_bytes());
        let (kind, code, mtu) = match self {
            Self::NetUnreachable => (3, 0, 0),
            Self::TooBig { mtu } => (3, 4, mtu),
            Self::TimeExceeded => (11, 0, 0),
        };
        let [high, low] = u16::to_be_bytes(mtu);
        icmp[..HEADER_LEN].copy_from_slice(&[kind, code, 0, 0, 0, 0, high, low]);
        icmp[HEADER_LEN..].copy_from_slice(&offender.bytes()[..quoted]);
        let checksum = checksum::of(icmp);
        icmp[2..4].copy_from_slice(&checksum.to_be_bytes());
        Some(len)
    }
}

fn may_be_answered<T: AsRef<[u8]>>(offender: &ipv4::Packet<T>) -> bool {
    let source = offender.source();
    let from_a_host =
        !source.is_unspecified() && !source.is_multicast() && source != Ipv4Addr::BROADCAST;
    let to_a_host =
        !offender.destination().is_multicast() && offender.destination() != Ipv4Addr::BROADCAST;
    // Errors are never answered with errors. Queries, echo requests among them, are.
    let is_icmp_error = offender.protocol() == ipv4::PROTOCOL_ICMP
        && offender.payload().first().is_none_or(|kind| matches!(kind, 3 | 4 | 5 | 11 | 12));
    from_a_host && to_a_host && !is_icmp_error && !offender.is_later_fragment()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TUN: Ipv4Addr = Ipv4Addr::new(10, 5, 1, 0);

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
        digits
            .chunks(2)
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
            .collect()
    }

    /// The offender of backends spec 8.5.
    fn offender() -> Vec<u8> {
        bytes("45000024 12340000 40114a83 0a050102 0a050907 4142434445464748 494a4b4c4d4e4f50")
    }

    fn reply(error: Error, offender: &[u8]) -> Option<Vec<u8>> {
        let mut out = [0xaa; MAX_ERROR_LEN];
        let len = error.reply(&ipv4::Packet::new(offender).unwrap(), TUN, &mut out)?;
        Some(out[..len].to_vec())
    }

    #[test]
    fn net_unreachable_vector() {
        let expected = "45000038 00000000 08019cba 0a050100 0a050102 0300ebea 00000000 \
                        45000024 12340000 40114a83 0a050102 0a050907 4142434445464748";
        assert_eq!(reply(Error::NetUnreachable, &offender()), Some(bytes(expected)));
    }

    #[test]
    fn options_are_quoted_up_to_the_longest_header() {
        for (options, total) in [(36, 0x5c_u8), (40, 0x60)] {
            let mut packet = offender();
            packet[0] = 0x45 + u8::try_from(options / 4).unwrap();
            packet.splice(20..20, std::iter::repeat_n(1, options));
            packet[3] = u8::try_from(packet.len()).unwrap();
            let answer = reply(Error::NetUnreachable, &packet).unwrap();
            assert_eq!(answer[2..4], [0, total]);
            assert_eq!(answer[28..], packet[..28 + options]);
            if options == 36 {
                assert_eq!(answer[10..12], [0x9c, 0x96], "vector of backends spec 8.5");
            }
        }
    }

    #[test]
    fn quotes_only_what_is_there() {
        for payload in 0..8 {
            let mut packet = offender();
            packet[3] = 20 + payload; // the bytes behind belong to someone else
            let answer = reply(Error::NetUnreachable, &packet).unwrap();
            assert_eq!(answer.len(), 48 + usize::from(payload));
            assert_eq!(usize::from(answer[3]), answer.len());
            assert_eq!(answer[28..], packet[..20 + usize::from(payload)]);
            assert_eq!(checksum::of(&answer[20..]), 0);
        }
    }

    #[test]
    fn types_and_codes() {
        let head = |error| reply(error, &offender()).unwrap()[20..28].to_vec();
        assert_eq!(head(Error::TimeExceeded)[..2], [11, 0]);
        let needed = head(Error::TooBig { mtu: 1472 });
        assert_eq!(
            (needed[..2].to_vec(), needed[4..].to_vec()),
            (vec![3, 4], vec![0, 0, 0x05, 0xc0])
        );
        for error in [Error::TimeExceeded, Error::TooBig { mtu: 1472 }] {
            assert_eq!(checksum::of(&reply(error, &offender()).unwrap()[20..]), 0);
        }
    }

    #[test]
    fn what_is_answered() {
        let answered = |change: &dyn Fn(&mut [u8])| {
            let mut packet = offender();
            change(&mut packet);
            reply(Error::NetUnreachable, &packet).is_some()
        };
        assert!(answered(&|p| p[6] = 0x20), "first fragment");
        assert!(!answered(&|p| p[7] = 1), "later fragment");
        assert!(answered(&|p| (p[9], p[20]) = (1, 8)), "echo request");
        assert!(!answered(&|p| (p[9], p[20]) = (1, 3)), "destination unreachable");
        assert!(!answered(&|p| (p[9], p[20]) = (1, 11)), "time exceeded");
        assert!(!answered(&|p| (p[9], p[3]) = (1, 20)), "ICMP without a type");
        assert!(!answered(&|p| p[12..16].fill(0)), "from 0.0.0.0");
        assert!(!answered(&|p| p[12] = 224), "from a group");
        assert!(!answered(&|p| p[12..16].fill(255)), "from broadcast");
        assert!(!answered(&|p| p[16] = 239), "to a group");
    }
}
