//! Subnet keys: a lease's name in the store, `10.5.34.0-24` or `10.5.34.0-24&fd00:5:0:22::-64` (control-plane spec 4.2).

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};

use super::Subnets;

/// The key of a lease. Without IPv4 its place is taken by `0.0.0.0-0`, as Go nodes write it.
pub fn format(subnets: &Subnets) -> String {
    let v4 =
        subnets.v4.map_or("0.0.0.0-0".into(), |v4| format!("{}-{}", v4.network(), v4.prefix_len()));
    match subnets.v6 {
        Some(v6) => format!("{v4}&{}-{}", v6.network(), v6.prefix_len()),
        None => v4,
    }
}

/// The subnets that a key names, if it is written as [`format()`] writes it. Two keys never name the same lease.
pub fn parse(key: &str) -> Option<Subnets> {
    let subnets = claim(key)?;
    (format(&subnets) == key).then_some(subnets)
}

/// The subnets that a key claims, however oddly it is written: nobody else should be given them.
pub fn claim(key: &str) -> Option<Subnets> {
    let (v4, v6) = match key.split_once('&') {
        Some((v4, v6)) => (v4, Some(v6)),
        None => (key, None),
    };
    let (address, len) = split(v4)?;
    let v4 =
        Ipv4Net::new(address.parse::<Ipv4Addr>().ok()?, len).ok().filter(|_| len < 32)?.trunc();
    // rubbish in the second half does not free the first
    let v6 = v6.and_then(split).and_then(|(address, len)| {
        let net =
            Ipv6Net::new(address.parse::<Ipv6Addr>().ok()?, len).ok().filter(|_| len < 128)?;
        Some(net.trunc())
    });
    let none = v4 == Ipv4Net::default();
    if none && v6.is_none() {
        return None;
    }
    Some(Subnets { v4: (!none).then_some(v4), v6 })
}

fn split(text: &str) -> Option<(&str, u8)> {
    let (address, len) = text.rsplit_once('-')?;
    let plain = !len.is_empty() && len.len() <= 3 && len.bytes().all(|byte| byte.is_ascii_digit());
    Some((address, len.parse().ok().filter(|_| plain)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upstream_vectors() {
        let v4 = parse("10.12.13.0-24").unwrap();
        assert_eq!((v4.v4, v4.v6), ("10.12.13.0/24".parse().ok(), None));
        let dual = parse("10.12.13.0-24&fd00:12:13::-56").unwrap();
        assert_eq!(
            (dual.v4, dual.v6),
            ("10.12.13.0/24".parse().ok(), "fd00:12:13::/56".parse().ok())
        );
        for key in [
            "10.12.13.0-24",
            "10.12.13.0-24&fd00:12:13::-56",
            "10.5.1.0-24&fc00::-64",
            "0.0.0.0-0&fd00::-64",
        ] {
            assert_eq!(parse(key).map(|subnets| format(&subnets)), Some(key.into()));
        }
        for key in [
            "10",
            "10.12.13.0",
            "10.12.13-24",
            "10.12.13.300-24",
            "10.12.13.0-24hi",
            "&2001::-56",
            "10.12.13.0-24&:12:13:-56",
            "10.12.13.0-24&20011::-56",
            "10.12.13.0-24&2001-56",
            "10.12.13.0-24&2001::",
            "10.12.13.0-24&2001::-56hi",
            "255.255.255.255-32",
            "garbage",
            "",
        ] {
            assert_eq!(parse(key), None, "{key:?}");
        }
    }

    #[test]
    fn one_lease_has_one_key() {
        for (key, claims) in [
            ("10.5.1.7-24", "10.5.1.0/24"),
            ("10.5.1.0-024", "10.5.1.0/24"),
            ("10.5.1.0-24&FD00::-64", "10.5.1.0/24,fd00::/64"),
            ("10.5.1.0-24&::-128", "10.5.1.0/24"),
            ("10.5.1.0-24&rubbish", "10.5.1.0/24"),
            ("10.5.1.0-24&fd00:0::-64", "10.5.1.0/24,fd00::/64"),
        ] {
            assert_eq!(parse(key), None, "{key}");
            assert_eq!(claim(key).map(|subnets| subnets.to_string()), Some(claims.into()));
        }
        for key in ["0.0.0.0-0", "10.5.1.0-+24", "10.5.1.0-33", "10.05.1.0-24"] {
            assert_eq!((parse(key), claim(key)), (None, None), "{key}");
        }
    }
}
