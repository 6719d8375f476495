//! Where a server is: `http://host:port/path` or `https://…`.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// A host, as typed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Host {
    /// An address: no resolving.
    Address(IpAddr),
    /// A name.
    Name(String),
}

/// One server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoint {
    pub(super) tls: bool,
    pub(super) host: Host,
    pub(super) port: u16,
    /// Prefix of every path, without a trailing slash; mostly empty.
    pub(super) path: String,
}

/// A URL that names no server of ours: which, and what is wrong with it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BadEndpoint(String);

impl fmt::Display for BadEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadEndpoint {}

impl Endpoint {
    /// Does it take TLS?
    pub fn is_tls(&self) -> bool {
        self.tls
    }

    /// `host:port`, with brackets around an IPv6 address.
    pub(super) fn authority(&self) -> String {
        match &self.host {
            Host::Address(IpAddr::V6(v6)) => format!("[{v6}]:{}", self.port),
            Host::Address(address) => format!("{address}:{}", self.port),
            Host::Name(name) => format!("{name}:{}", self.port),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}{}", if self.tls { "https" } else { "http" }, self.authority(), self.path)
    }
}

impl FromStr for Endpoint {
    type Err = BadEndpoint;

    fn from_str(url: &str) -> Result<Self, BadEndpoint> {
        let bad = |wrong: &str| BadEndpoint(format!("{url:?} is no endpoint: {wrong}"));
        let (scheme, rest) =
            url.split_once("://").ok_or_else(|| bad("begin it with http:// or https://"))?;
        let tls = match scheme.to_ascii_lowercase().as_str() {
            "http" => false,
            "https" => true,
            _ => return Err(bad("its scheme must be http or https")),
        };
        let (authority, path) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
        if authority.contains('@') {
            // the text must not show a password
            return Err(BadEndpoint(
                "an endpoint must not hold a user name: there are settings for that".into(),
            ));
        }
        if path.contains(['?', '#']) || !path.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(bad("its path must be plain"));
        }
        let (host, port) = match authority.strip_prefix('[') {
            Some(v6) => v6.split_once(']').ok_or_else(|| bad("a bracket is not closed"))?,
            None => authority.find(':').map_or((authority, ""), |at| authority.split_at(at)),
        };
        let port = match port.strip_prefix(':') {
            None if port.is_empty() => {
                if tls {
                    443
                } else {
                    80
                }
            }
            digits => digits
                .filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()))
                .and_then(|digits| digits.parse().ok())
                .filter(|port| *port != 0)
                .ok_or_else(|| bad("its port must be a number from 1 to 65535"))?,
        };
        let is_name = |host: &str| {
            !host.is_empty()
                && host
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'))
        };
        let host = match host.parse() {
            Ok(address) => Host::Address(address),
            Err(_) if is_name(host) && !authority.starts_with('[') => Host::Name(host.to_owned()),
            Err(_) => {
                return Err(bad("its host must be a name or an address, an IPv6 one in brackets"));
            }
        };
        Ok(Self { tls, host, port, path: path.trim_end_matches('/').to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms() {
        for (url, shown) in [
            ("http://127.0.0.1:2379", "http://127.0.0.1:2379"),
            ("HTTPS://etcd.example", "https://etcd.example:443"),
            ("http://[fd77::1]:2379/", "http://[fd77::1]:2379"),
            ("http://[::1]", "http://[::1]:80"),
            ("http://proxy/etcd/", "http://proxy:80/etcd"),
        ] {
            assert_eq!(url.parse::<Endpoint>().unwrap().to_string(), shown);
        }
    }

    #[test]
    fn refusals() {
        for (url, says) in [
            ("127.0.0.1:2379", "begin it with http://"),
            ("unix:///run/etcd", "scheme must be"),
            ("http://", "its host must be"),
            ("http://fd77::1:2379", "port must be"),
            ("http://host:0", "port must be"),
            ("http://host:65536", "port must be"),
            ("http://host:+1", "port must be"),
            ("http://[fd77::1:2379", "bracket"),
            ("http://[name]:1", "its host must be"),
            ("http://a b", "its host must be"),
            ("http://host/?x", "path must be plain"),
        ] {
            let error = url.parse::<Endpoint>().unwrap_err().to_string();
            assert!(error.contains(says) && error.contains(url), "{url}: {error}");
        }
        let error = "http://root:hunter2@host".parse::<Endpoint>().unwrap_err().to_string();
        assert!(!error.contains("hunter2"), "{error}");
    }
}
