//! ICMPv6 error messages about packets that cannot be forwarded (RFC 4443; when not to answer: its section 2.4 e).

use std::net::Ipv6Addr;

use super::icmp::Error;
use super::{checksum, ipv6};

/// Length in bytes of the longest message that [`reply`] makes.
pub const MAX_ERROR_LEN: usize = ipv6::MIN_MTU;

const HEADER_LEN: usize = 8;
/// Hop limit of our messages: they never leave the host.
const HOP_LIMIT: u8 = 64;

/// Writes the message that tells `offender`'s source about `error`, coming from `from`, and returns its length in bytes.
/// `None` when such a packet must not be answered.
///
/// It quotes as much of the packet as fits.
pub fn reply<T: AsRef<[u8]>>(
    error: Error,
    offender: &ipv6::Packet<T>,
    from: Ipv6Addr,
    out: &mut [u8; MAX_ERROR_LEN],
) -> Option<usize> {
    if !may_be_answered(offender) {
        return None;
    }
    let quote = offender.bytes();
    let quote = &quote[..quote.len().min(MAX_ERROR_LEN - ipv6::HEADER_LEN - HEADER_LEN)];
    let payload_len = u16::try_from(HEADER_LEN + quote.len()).ok()?;
    let header = ipv6::Header {
        payload_len,
        next_header: ipv6::PROTOCOL_ICMPV6,
        hop_limit: HOP_LIMIT,
        source: from,
        destination: offender.source(),
    };
    let (kind, code, mtu) = match error {
        Error::NetUnreachable => (1, 0, 0),
        Error::TooBig { mtu } => (2, 0, u32::from(mtu)),
        Error::TimeExceeded => (3, 0, 0),
    };
    let len = ipv6::HEADER_LEN + usize::from(payload_len);
    let (ip, icmp) = out[..len].split_at_mut(ipv6::HEADER_LEN);
    ip.copy_from_slice(&header.to_bytes());
    icmp[..4].copy_from_slice(&[kind, code, 0, 0]);
    icmp[4..HEADER_LEN].copy_from_slice(&mtu.to_be_bytes());
    icmp[HEADER_LEN..].copy_from_slice(quote);
    // the pseudo-header: both addresses, the length, the protocol number (RFC 8200, 8.1)
    let pseudo = checksum::add(checksum::sum(&ip[8..]), payload_len);
    let pseudo = checksum::add(pseudo, u16::from(ipv6::PROTOCOL_ICMPV6));
    let checksum = !checksum::add(pseudo, checksum::sum(icmp));
    icmp[2..4].copy_from_slice(&checksum.to_be_bytes());
    Some(len)
}

fn may_be_answered<T: AsRef<[u8]>>(offender: &ipv6::Packet<T>) -> bool {
    let (source, destination) = (offender.source(), offender.destination());
    let between_hosts =
        !source.is_unspecified() && !source.is_multicast() && !destination.is_multicast();
    let is_icmp_error = match offender.upper_layer() {
        // errors are the types below 128; 137 is a redirect
        Some((ipv6::PROTOCOL_ICMPV6, message)) => {
            message.first().is_none_or(|kind| *kind < 128 || *kind == 137)
        }
        Some(_) => false,
        None => true,
    };
    between_hosts && !is_icmp_error
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offender(next_header: u8, payload: &[u8]) -> Vec<u8> {
        let header = ipv6::Header {
            payload_len: u16::try_from(payload.len()).unwrap(),
            next_header,
            hop_limit: 9,
            source: "fd00:5::1".parse().unwrap(),
            destination: "fd00:6::2".parse().unwrap(),
        };
        [&header.to_bytes()[..], payload].concat()
    }

    fn answer(error: Error, offender: &[u8]) -> Option<Vec<u8>> {
        let mut out = [0xaa; MAX_ERROR_LEN];
        let from = "fd00:6::2".parse().unwrap();
        let len = reply(error, &ipv6::Packet::new(offender).unwrap(), from, &mut out)?;
        Some(out[..len].to_vec())
    }

    /// The whole message with its pseudo-header sums to zero.
    fn is_right(message: &[u8]) -> bool {
        let icmp = &message[40..];
        let len = u16::try_from(icmp.len()).unwrap();
        let pseudo = checksum::add(checksum::sum(&message[8..40]), len);
        checksum::add(checksum::add(pseudo, 58), checksum::sum(icmp)) == 0xffff
    }

    #[test]
    fn types_codes_and_quotes() {
        let bytes = offender(17, b"ABCDEFGHIJ");
        for (error, kind, word) in [
            (Error::NetUnreachable, 1, 0u32),
            (Error::TooBig { mtu: 1400 }, 2, 1400),
            (Error::TimeExceeded, 3, 0),
        ] {
            let message = answer(error, &bytes).unwrap();
            assert_eq!(message[40..42], [kind, 0]);
            assert_eq!(message[44..48], word.to_be_bytes());
            assert_eq!(message[48..], bytes);
            assert!(is_right(&message));
            assert_eq!(message[8..24], bytes[24..40], "from the address it was for");
            assert_eq!(message[24..40], bytes[8..24]);
        }
    }

    #[test]
    fn never_longer_than_every_link_carries() {
        let bytes = offender(17, &[7; 2000]);
        let message = answer(Error::NetUnreachable, &bytes).unwrap();
        assert_eq!(message.len(), 1280);
        assert!(is_right(&message));
    }

    #[test]
    fn what_is_answered() {
        let answered = |bytes: &[u8]| answer(Error::NetUnreachable, bytes).is_some();
        assert!(answered(&offender(58, &[128, 0, 0, 0])), "echo request");
        assert!(!answered(&offender(58, &[1, 0, 0, 0])), "unreachable");
        assert!(!answered(&offender(58, &[137, 0, 0, 0])), "redirect");
        assert!(!answered(&offender(58, &[])), "ICMP without a type");
        assert!(!answered(&offender(0, &[0; 3])), "headers cut short");
        let mut to_group = offender(17, b"x");
        to_group[24] = 0xff;
        assert!(!answered(&to_group));
        let mut from_nobody = offender(17, b"x");
        from_nobody[8..24].fill(0);
        assert!(!answered(&from_nobody));
    }
}
