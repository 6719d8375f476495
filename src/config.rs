//! The network config document (control-plane spec 2): JSON text in, validated [`NetworkConfig`] out. No I/O.
//!
//! Decoding follows Go's `encoding/json`, derivation and validation follow upstream's rules since v0.10 (spec 2.4, "Rules B").

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::json::Fields;

/// One address family's share of the network. `A` is the address type, `N` the prefix type.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FamilyConfig<A, N> {
    /// The whole network, host bits zero.
    pub network: N,
    /// Prefix length of one host's subnet.
    pub subnet_len: u8,
    /// Base address of the first subnet that may be leased.
    pub subnet_min: A,
    /// Base address of the last subnet that may be leased, inclusive.
    pub subnet_max: A,
}

/// The validated network config.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NetworkConfig {
    /// IPv4, when enabled.
    pub v4: Option<FamilyConfig<Ipv4Addr, Ipv4Net>>,
    /// IPv6, when enabled.
    pub v6: Option<FamilyConfig<Ipv6Addr, Ipv6Net>>,
    /// Lower-cased backend type; `udp` when the document has no `Backend`.
    pub backend_type: String,
    /// The whole `Backend` object, verbatim JSON (`{}` when absent).
    pub backend: String,
    /// Masquerade through nftables rather than iptables.
    pub enable_nftables: bool,
    /// The document itself, for keeping it.
    pub document: String,
}

/// What is wrong with a document, where, and what would be right.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ConfigError(String);

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ConfigError {}

impl From<String> for ConfigError {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl NetworkConfig {
    /// Parses, completes and validates a document.
    ///
    /// # Errors
    /// The first thing that is wrong, IPv4 before IPv6.
    pub fn parse(document: &str) -> Result<Self, ConfigError> {
        let object = Fields::parse("the network config", document)?;
        let (backend_type, backend) = backend(&object)?;
        let v4 = object.flag("EnableIPv4")?.unwrap_or(true);
        let v6 = object.flag("EnableIPv6")?.unwrap_or(false);
        if !v4 && !v6 {
            return Err("EnableIPv4 is false and EnableIPv6 is not true: enable one of them"
                .to_owned()
                .into());
        }
        let v4 = v4.then(|| family(&V4, &object)).transpose()?;
        let v6 = v6.then(|| family(&V6, &object)).transpose()?;
        Ok(Self {
            v4: v4.map(|v4| FamilyConfig {
                network: Ipv4Net::new_assert(v4_of(v4.network), v4.prefix_len),
                subnet_len: v4.subnet_len,
                subnet_min: v4_of(v4.min),
                subnet_max: v4_of(v4.max),
            }),
            v6: v6.map(|v6| FamilyConfig {
                network: Ipv6Net::new_assert(v6.network.into(), v6.prefix_len),
                subnet_len: v6.subnet_len,
                subnet_min: v6.min.into(),
                subnet_max: v6.max.into(),
            }),
            backend_type,
            backend,
            enable_nftables: object.flag("EnableNFTables")?.unwrap_or(false),
            document: document.to_owned(),
        })
    }
}

impl NetworkConfig {
    /// The prefixes of both families.
    pub fn networks(&self) -> impl Iterator<Item = IpNet> {
        let v4 = self.v4.map(|v4| IpNet::V4(v4.network));
        v4.into_iter().chain(self.v6.map(|v6| IpNet::V6(v6.network)))
    }
}

/// Type, lower-cased, and verbatim text of the `Backend` object.
fn backend(object: &Fields<'_>) -> Result<(String, String), ConfigError> {
    let Some(text) = object.raw("Backend") else {
        return Ok(("udp".into(), "{}".into()));
    };
    let kind = Fields::parse("Backend", text)?.text("Type")?.unwrap_or_default();
    if kind.is_empty() {
        return Err("Backend has no Type: name one, such as \"vxlan\"".to_owned().into());
    }
    Ok((kind.to_ascii_lowercase(), text.to_owned()))
}

/// What distinguishes the families in the document and in the arithmetic, which is done on 128 bits for both.
struct Family {
    network: &'static str,
    len: &'static str,
    min: &'static str,
    max: &'static str,
    bits: u8,
    /// Subnet length when the network has room for it.
    usual_len: u8,
    is_v4: bool,
}

const V4: Family = Family {
    network: "Network",
    len: "SubnetLen",
    min: "SubnetMin",
    max: "SubnetMax",
    bits: 32,
    usual_len: 24,
    is_v4: true,
};

const V6: Family = Family {
    network: "IPv6Network",
    len: "IPv6SubnetLen",
    min: "IPv6SubnetMin",
    max: "IPv6SubnetMax",
    bits: 128,
    usual_len: 64,
    is_v4: false,
};

struct Derived {
    network: u128,
    prefix_len: u8,
    subnet_len: u8,
    min: u128,
    max: u128,
}

/// An IPv4 value that was widened.
fn v4_of(value: u128) -> Ipv4Addr {
    Ipv4Addr::from(u32::try_from(value).unwrap_or(u32::MAX))
}

fn widen(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u32::from(v4).into(),
        IpAddr::V6(v6) => v6.into(),
    }
}

impl Family {
    fn show(&self, value: u128) -> IpAddr {
        if self.is_v4 { v4_of(value).into() } else { Ipv6Addr::from(value).into() }
    }

    /// `1 << (bits - len)`, the number of addresses in a subnet of this length (at least 1 bit long).
    fn size(&self, len: u8) -> u128 {
        1 << (self.bits - len)
    }

    fn network(&self, object: &Fields<'_>) -> Result<(u128, u8), ConfigError> {
        let name = self.network;
        let example = if self.is_v4 { "10.5.0.0/16" } else { "fd00:5::/48" };
        let text = object.text(name)?.ok_or_else(|| {
            format!("{name} is missing: set it to the whole network, such as {example}")
        })?;
        let net = prefix(&text)
            .filter(|net| matches!(net, IpNet::V4(_)) == self.is_v4)
            .ok_or_else(|| object.wrong(name, &format!("a prefix such as {example}"), &text))?;
        let len = net.prefix_len();
        if len == 0 {
            return Err(format!("{name} is {net}, which is every address there is: set it to a prefix such as {example}").into());
        }
        Ok((widen(net.network()), len))
    }

    fn address(&self, object: &Fields<'_>, name: &str) -> Result<Option<u128>, ConfigError> {
        let Some(text) = object.text(name)? else { return Ok(None) };
        let address: IpAddr = text
            .parse()
            .ok()
            .filter(|address: &IpAddr| address.is_ipv4() == self.is_v4)
            .ok_or_else(|| {
                object.wrong(
                    name,
                    if self.is_v4 { "an IPv4 address" } else { "an IPv6 address" },
                    &text,
                )
            })?;
        // all zeroes means "not set", as upstream's zero value does
        Ok(Some(widen(address)).filter(|value| *value != 0))
    }
}

/// Parses `address/length`. Stricter than `ipnet`, which takes octets with leading zeroes for decimal ones.
pub(crate) fn prefix(text: &str) -> Option<IpNet> {
    let (address, len) = text.split_once('/')?;
    let len = Some(len).filter(|len| len.bytes().all(|b| b.is_ascii_digit()))?.parse().ok()?;
    IpNet::new(address.parse().ok()?, len).ok()
}

/// Upstream's "Rules B" for one family: at least four subnets, the first of which is not leased.
fn family(family: &Family, object: &Fields<'_>) -> Result<Derived, ConfigError> {
    let (network, prefix_len) = family.network(object)?;
    let shown = format!("{} {}/{prefix_len}", family.network, family.show(network));
    let longest = family.bits - 2;
    let subnet_len = match object.integer(family.len)? {
        None | Some(0) if prefix_len > longest - 2 => {
            return Err(format!(
                "{shown} is too small for four subnets: it must be /{} or larger",
                longest - 2
            )
            .into());
        }
        None | Some(0) if prefix_len <= family.usual_len - 2 => family.usual_len,
        None | Some(0) => prefix_len + 2,
        Some(len) => match u8::try_from(len) {
            Ok(len) if len > longest => {
                return Err(format!("{} is {len}: it must be {longest} or less", family.len).into());
            }
            Ok(len) if len < prefix_len + 2 => {
                return Err(format!(
                    "{} is {len}, which gives {shown} fewer than four subnets: it must be {} or more",
                    family.len,
                    prefix_len + 2
                )
                .into());
            }
            Ok(len) => len,
            Err(_) => {
                return Err(object
                    .wrong(family.len, &format!("between 1 and {longest}"), len)
                    .into());
            }
        },
    };
    let size = family.size(subnet_len);
    let last = network + (family.size(prefix_len) - 1);
    let bound = |name, default: u128| -> Result<u128, ConfigError> {
        let Some(value) = family.address(object, name)? else { return Ok(default) };
        if value < network || value > last {
            return Err(format!("{name} {} is outside {shown}", family.show(value)).into());
        }
        if value % size != 0 {
            let base = family.show(value - value % size);
            return Err(format!(
                "{name} {} is not the base of a /{subnet_len} subnet: {base} is",
                family.show(value)
            )
            .into());
        }
        Ok(value)
    };
    let min = bound(family.min, network + size)?;
    let max = bound(family.max, last - (size - 1))?;
    if min > max {
        let (min, max) = (family.show(min), family.show(max));
        return Err(format!(
            "{} {min} is above {} {max}: no subnet is left",
            family.min, family.max
        )
        .into());
    }
    Ok(Derived { network, prefix_len, subnet_len, min, max })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v4(document: &str) -> Result<(u8, String, String, u128), String> {
        let config = NetworkConfig::parse(document).map_err(|error| error.to_string())?;
        let v4 = config.v4.unwrap();
        let (min, max) = (u32::from(v4.subnet_min), u32::from(v4.subnet_max));
        let count = u128::from((max - min) >> (32 - v4.subnet_len)) + 1;
        Ok((v4.subnet_len, v4.subnet_min.to_string(), v4.subnet_max.to_string(), count))
    }

    /// Control-plane spec 2.4, column "Rules B".
    #[test]
    fn ipv4_derivation() {
        for (network, options, len, min, max, count) in [
            ("10.3.0.0/16", "", 24, "10.3.1.0", "10.3.255.0", 255),
            ("10.0.0.0/8", "", 24, "10.0.1.0", "10.255.255.0", 65535),
            ("10.1.0.0/22", "", 24, "10.1.1.0", "10.1.3.0", 3),
            ("10.1.0.0/23", "", 25, "10.1.0.128", "10.1.1.128", 3),
            ("10.0.0.0/24", "", 26, "10.0.0.64", "10.0.0.192", 3),
            ("10.0.0.0/28", "", 30, "10.0.0.4", "10.0.0.12", 3),
            ("10.3.0.0/16", r#","SubnetLen":18"#, 18, "10.3.64.0", "10.3.192.0", 3),
            (
                "10.0.0.0/8",
                r#","SubnetLen":20,"SubnetMin":"10.10.0.0","SubnetMax":"10.99.0.0""#,
                20,
                "10.10.0.0",
                "10.99.0.0",
                1425,
            ),
            (
                "10.3.0.0/16",
                r#","SubnetLen":28,"SubnetMin":"10.3.5.0","SubnetMax":"10.3.8.0""#,
                28,
                "10.3.5.0",
                "10.3.8.0",
                49,
            ),
            ("255.0.0.0/8", "", 24, "255.0.1.0", "255.255.255.0", 65535),
        ] {
            let document = format!(r#"{{"Network":"{network}"{options}}}"#);
            assert_eq!(v4(&document), Ok((len, min.into(), max.into(), count)), "{document}");
        }
    }

    /// Control-plane spec 2.5.
    #[test]
    fn ipv6_derivation() {
        for (network, len, min, max) in [
            ("fc00::/48", 64, "fc00:0:0:1::", "fc00:0:0:ffff::"),
            ("2001:cafe:42::/56", 64, "2001:cafe:42:1::", "2001:cafe:42:ff::"),
            ("2001:db8::/62", 64, "2001:db8:0:1::", "2001:db8:0:3::"),
            ("fd00::/63", 65, "fd00::8000:0:0:0", "fd00:0:0:1:8000::"),
            ("fd00::/64", 66, "fd00::4000:0:0:0", "fd00::c000:0:0:0"),
            ("fd00::/120", 122, "fd00::40", "fd00::c0"),
            ("fd00::/124", 126, "fd00::4", "fd00::c"),
            ("8000::/1", 64, "8000:0:0:1::", "ffff:ffff:ffff:ffff::"),
        ] {
            let document =
                format!(r#"{{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"{network}"}}"#);
            let config = NetworkConfig::parse(&document).unwrap();
            let v6 = config.v6.unwrap();
            assert_eq!(config.v4, None);
            let expected = (len, min.parse().unwrap(), max.parse().unwrap());
            assert_eq!((v6.subnet_len, v6.subnet_min, v6.subnet_max), expected, "{network}");
        }
    }

    /// Control-plane spec 10.1.
    #[test]
    fn upstream_vectors() {
        let config = NetworkConfig::parse(r#"{"network":"10.3.0.0/16"}"#).unwrap();
        assert_eq!(config.v4.unwrap().network.to_string(), "10.3.0.0/16");
        assert_eq!((config.backend_type.as_str(), config.backend.as_str()), ("udp", "{}"));
        let config = NetworkConfig::parse(
            r#"{"EnableIPv6":true,"IPv6Network":"fc00::/48","IPv6SubnetMin":"fc00:0:0:1::",
                "IPv6SubnetMax":"fc00:0:0:f::","IPv6SubnetLen":124,"EnableIPv4":false}"#,
        );
        let v6 = config.unwrap().v6.unwrap();
        assert_eq!((v6.subnet_len, v6.subnet_max), (124, "fc00:0:0:f::".parse().unwrap()));
    }

    #[test]
    fn decoding_is_gos() {
        let config = NetworkConfig::parse(
            r#"{"NETWORK":"10.9.0.0/16","network":"10.3.5.7/16","Unknown":[1],"subnetMIN":"0.0.0.0",
                "IPv6SubnetMin":null,"Backend":{"tYpE":"VXLAN","VNI":7}}"#,
        )
        .unwrap();
        assert_eq!(config.v4.unwrap().network.to_string(), "10.3.0.0/16");
        assert_eq!(config.v4.unwrap().subnet_min, Ipv4Addr::new(10, 3, 1, 0));
        assert_eq!(config.backend_type, "vxlan");
        assert_eq!(config.backend, r#"{"tYpE":"VXLAN","VNI":7}"#);
        assert!(!config.enable_nftables);
    }

    /// Control-plane spec 2.6: each failure says what, where and what to do.
    #[test]
    fn failures_are_precise() {
        for (document, says) in [
            ("", "the network config must be a JSON object"),
            ("[]", "the network config must be a JSON object"),
            (r#"{"Network":"10.3.0.0/16"} x"#, "the network config must be a JSON object"),
            ("{}", "Network is missing"),
            (r#"{"Network":""}"#, "Network must be a prefix such as 10.5.0.0/16"),
            (r#"{"Network":7}"#, "Network must be a string"),
            (r#"{"Network":"fd00::/48"}"#, "Network must be a prefix such as 10.5.0.0/16"),
            (r#"{"Network":"10.03.0.0/16"}"#, "Network must be a prefix"),
            (r#"{"Network":"0.0.0.0/0"}"#, "every address there is"),
            (
                r#"{"Network":"10.0.0.0/29"}"#,
                "too small for four subnets: it must be /28 or larger",
            ),
            (r#"{"Network":"10.0.0.0/30"}"#, "too small"),
            (r#"{"Network":"10.3.0.0/16","SubnetLen":16}"#, "it must be 18 or more"),
            (r#"{"Network":"10.3.0.0/16","SubnetLen":17}"#, "it must be 18 or more"),
            (
                r#"{"Network":"10.3.0.0/16","SubnetLen":31}"#,
                "SubnetLen is 31: it must be 30 or less",
            ),
            (r#"{"Network":"10.3.0.0/16","SubnetLen":-1}"#, "SubnetLen must be between"),
            (r#"{"Network":"10.3.0.0/16","SubnetLen":"24"}"#, "SubnetLen must be an integer"),
            (r#"{"Network":"10.3.0.0/16","SubnetLen":24.0}"#, "SubnetLen must be an integer"),
            (
                r#"{"Network":"10.3.0.0/16","SubnetMin":"10.4.0.0"}"#,
                "SubnetMin 10.4.0.0 is outside Network 10.3.0.0/16",
            ),
            (r#"{"Network":"10.3.0.0/16","SubnetMax":"10.3.9.1"}"#, "10.3.9.0 is"),
            (
                r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.9.0","SubnetMax":"10.3.8.0"}"#,
                "no subnet is left",
            ),
            (r#"{"Network":"10.3.0.0/16","SubnetMin":"::1"}"#, "SubnetMin must be an IPv4 address"),
            (r#"{"Network":"10.3.0.0/16","EnableIPv6":true}"#, "IPv6Network is missing"),
            (
                r#"{"Network":"10.3.0.0/16","EnableIPv6":true,"IPv6Network":"::/0"}"#,
                "every address",
            ),
            (
                r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/125"}"#,
                "/124 or larger",
            ),
            (
                r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/48","IPv6SubnetLen":127}"#,
                "126 or less",
            ),
            (
                r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"10.0.0.0/8"}"#,
                "IPv6Network must be a prefix",
            ),
            (r#"{"EnableIPv4":false}"#, "enable one of them"),
            (r#"{"Network":"10.3.0.0/16","EnableIPv4":"yes"}"#, "EnableIPv4 must be true or false"),
            (r#"{"Network":"10.3.0.0/16","Backend":{}}"#, "Backend has no Type"),
            (r#"{"Network":"10.3.0.0/16","Backend":null}"#, "Backend has no Type"),
            (r#"{"Network":"10.3.0.0/16","Backend":"vxlan"}"#, "Backend must be a JSON object"),
            (r#"{"Network":"10.3.0.0/16","Backend":{"Type":1}}"#, "Type must be a string"),
        ] {
            let error = NetworkConfig::parse(document).unwrap_err().to_string();
            assert!(error.contains(says), "{document}: {error}");
        }
    }

    #[test]
    fn mutated_documents_never_panic() {
        let seed = br#"{"Network":"10.3.0.0/16","SubnetLen":28,"SubnetMin":"10.3.5.0","EnableIPv6":true,"IPv6Network":"fc00::/48","Backend":{"Type":"vxlan"}}"#;
        let mut state = 1u32;
        for round in 0..20_000 {
            let mut bytes = seed.to_vec();
            for _ in 0..=round % 3 {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let [high, low, value, _] = state.to_be_bytes();
                let at = usize::from(u16::from_be_bytes([high, low])) % bytes.len();
                bytes[at] = value & 0x7f;
            }
            let _ = NetworkConfig::parse(&String::from_utf8(bytes).unwrap());
        }
    }
}
