//! What a host publishes about itself as annotations of its node, byte for byte as Go nodes write it (control-plane spec 6.4
//! to 6.7).

use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::wire::Annotation;
use crate::config::NetworkConfig;
use crate::lease::{LeaseAttrs, Subnets, value};
use crate::quote::shorten;
use crate::store::PublicAddresses;

/// What stands for no data.
const NO_DATA: &str = "null";
/// The marker's value.
const MANAGED: &str = "true";

/// What our annotations end with.
const SUFFIXES: [&str; 10] = [
    "kube-subnet-manager",
    "backend-type",
    "backend-data",
    "backend-v6-data",
    "public-ip",
    "public-ipv6",
    "public-ip-overwrite",
    "public-ipv6-overwrite",
    "node-public-ip",
    "node-public-ipv6",
];

/// What all of our annotations begin with: a domain, a slash, and perhaps more.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Prefix(String);

impl Prefix {
    /// # Errors
    /// It cannot begin the name of an annotation.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut prefix = text.to_owned();
        if !prefix.contains('/') {
            prefix.push('/');
        }
        if !prefix.ends_with(['/', '-']) {
            prefix.push('-');
        }
        let label = |text: &str| {
            let fits =
                |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'_' | b'-');
            !text.is_empty() && text.bytes().all(fits)
        };
        let fits = prefix.split_once('/').is_some_and(|(domain, rest)| {
            domain.contains('.')
                && domain.split('.').all(label)
                && (rest.is_empty() || rest.strip_suffix('-').is_some_and(label))
        });
        if fits {
            Ok(Self(prefix))
        } else {
            Err(format!(
                "{text:?} must be a domain such as flannel.example.com, and may have a /part in lower case"
            ))
        }
    }

    /// The prefix as it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Picks our annotations from all that a node has.
    pub(super) fn read(&self, annotations: &[Annotation]) -> Published {
        let mut published = Published::default();
        for Annotation { key, value } in annotations {
            let suffix =
                key.strip_prefix(self.0.as_bytes()).and_then(|suffix| str::from_utf8(suffix).ok());
            if let Some(field) = suffix.and_then(|suffix| published.field(suffix)) {
                *field = Some(String::from_utf8_lossy(value).into());
            }
        }
        published
    }

    /// Tells these annotations of ours, on the node with this uid, from any others. Nearly every change of a node is a heart-beat,
    /// and this is what it costs to see that.
    pub(super) fn print(&self, annotations: &[Annotation], uid: &str) -> u64 {
        let hash = |what: &dyn Fn(&mut DefaultHasher)| {
            let mut hasher = DefaultHasher::new();
            what(&mut hasher);
            hasher.finish()
        };
        let ours = annotations.iter().filter_map(|Annotation { key, value }| {
            let suffix = key.strip_prefix(self.0.as_bytes())?;
            let known = SUFFIXES.iter().any(|known| known.as_bytes() == suffix);
            known.then(|| hash(&|hasher| (suffix, value).hash(hasher)))
        });
        // in whatever order they come
        ours.fold(hash(&|hasher| uid.hash(hasher)), u64::wrapping_add)
    }

    /// What must be written so that the node carries `attrs`: keys and values. Others' annotations stay as they are.
    pub(super) fn changes(
        &self,
        attrs: &LeaseAttrs,
        published: &Published,
    ) -> Vec<(String, String)> {
        let mut wanted = vec![("backend-type", attrs.backend_type.to_string())];
        let data = |data: &Option<Box<str>>| data.as_deref().unwrap_or(NO_DATA).to_owned();
        let vxlan = &*attrs.backend_type == "vxlan";
        if !vxlan || attrs.backend_data.is_some() {
            let ip = attrs.public_ip.unwrap_or(Ipv4Addr::UNSPECIFIED).to_string();
            wanted.push(("backend-data", data(&attrs.backend_data)));
            wanted.push(("public-ip", overwritten(&published.ip_overwrite).unwrap_or(ip)));
        }
        if let Some(ip) = attrs.public_ipv6
            && (!vxlan || attrs.backend_v6_data.is_some())
        {
            wanted.push(("backend-v6-data", data(&attrs.backend_v6_data)));
            let ip = overwritten(&published.ipv6_overwrite).unwrap_or(ip.to_string());
            wanted.push(("public-ipv6", ip));
        }
        wanted.push(("kube-subnet-manager", MANAGED.into()));
        let mut present = published.clone();
        wanted.retain(|(suffix, value)| {
            present.field(suffix).is_none_or(|field| field.as_deref() != Some(value))
        });
        wanted.into_iter().map(|(suffix, value)| (format!("{}{suffix}", self.0), value)).collect()
    }
}

fn overwritten(annotation: &Option<Box<str>>) -> Option<String> {
    annotation.as_deref().filter(|text| !text.is_empty()).map(str::to_owned)
}

/// A node's annotations of ours, as they are.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Published {
    marker: Option<Box<str>>,
    backend_type: Option<Box<str>>,
    data: Option<Box<str>>,
    v6_data: Option<Box<str>>,
    ip: Option<Box<str>>,
    ipv6: Option<Box<str>>,
    ip_overwrite: Option<Box<str>>,
    ipv6_overwrite: Option<Box<str>>,
    node_ip: Option<Box<str>>,
    node_ipv6: Option<Box<str>>,
}

impl Published {
    fn field(&mut self, suffix: &str) -> Option<&mut Option<Box<str>>> {
        Some(match suffix {
            "kube-subnet-manager" => &mut self.marker,
            "backend-type" => &mut self.backend_type,
            "backend-data" => &mut self.data,
            "backend-v6-data" => &mut self.v6_data,
            "public-ip" => &mut self.ip,
            "public-ipv6" => &mut self.ipv6,
            "public-ip-overwrite" => &mut self.ip_overwrite,
            "public-ipv6-overwrite" => &mut self.ipv6_overwrite,
            "node-public-ip" => &mut self.node_ip,
            "node-public-ipv6" => &mut self.node_ipv6,
            _ => return None,
        })
    }

    /// Does this node take part?
    pub(super) fn takes_part(&self) -> bool {
        self.marker.as_deref() == Some(MANAGED)
    }

    /// Does the node carry all of these?
    pub(super) fn carries(&self, prefix: &Prefix, written: &[(String, String)]) -> bool {
        let mut published = self.clone();
        written.iter().all(|(key, value)| {
            let field = key.strip_prefix(&*prefix.0).and_then(|suffix| published.field(suffix));
            field.is_some_and(|field| field.as_deref() == Some(value))
        })
    }

    /// The addresses that the operator has set instead of the flags'.
    ///
    /// # Errors
    /// The text says which is no address.
    pub(super) fn public_addresses(&self) -> Result<PublicAddresses, String> {
        let v4 = parse(&self.node_ip, "node-public-ip", "an IPv4 address")?;
        let v6 = parse(&self.node_ipv6, "node-public-ipv6", "an IPv6 address")?;
        Ok(PublicAddresses { v4, v6 })
    }

    /// What the node publishes, of the families that `config` enables; a family that is wrong is left out.
    ///
    /// # Errors
    /// Nothing is left: the text says what is wrong.
    pub(super) fn attrs(&self, config: &NetworkConfig) -> Result<LeaseAttrs, String> {
        let all = [&self.data, &self.v6_data, &self.backend_type, &self.ip, &self.ipv6];
        if all.into_iter().flatten().any(|text| text.len() > value::LONGEST) {
            return Err(format!("an annotation is longer than {} bytes", value::LONGEST));
        }
        let data = |data: &Option<Box<str>>| {
            data.clone().filter(|text| text.trim() != NO_DATA && !text.is_empty())
        };
        let ip = parse::<Ipv4Addr>(&self.ip, "public-ip", "an IPv4 address");
        let ipv6 = parse::<Ipv6Addr>(&self.ipv6, "public-ipv6", "an IPv6 address");
        let (v4, v6) = (config.v4.is_some(), config.v6.is_some());
        let wrong = match (v4, v6) {
            (true, true) => ip.as_ref().err().filter(|_| !matches!(ipv6, Ok(Some(_)))),
            (true, false) => ip.as_ref().err(),
            (false, _) => ipv6.as_ref().err(),
        };
        if let Some(reason) = wrong {
            return Err(reason.clone());
        }
        Ok(LeaseAttrs {
            public_ip: ip.ok().flatten().filter(|ip| v4 && !ip.is_unspecified()),
            public_ipv6: ipv6.ok().flatten().filter(|ip| v6 && !ip.is_unspecified()),
            backend_type: self.backend_type.clone().unwrap_or_default(),
            backend_data: data(&self.data).filter(|_| v4),
            backend_v6_data: data(&self.v6_data).filter(|_| v6),
        })
    }
}

fn parse<A: FromStr>(text: &Option<Box<str>>, name: &str, what: &str) -> Result<Option<A>, String> {
    match text.as_deref() {
        None | Some("") => Ok(None),
        Some(text) => text
            .parse()
            .map(Some)
            .map_err(|_| format!("{name} is {:?}, which is not {what}", shorten(text))),
    }
}

/// A node's subnets, of the families that `config` enables.
///
/// # Errors
/// There is none that can be used: the text says why.
pub(super) fn subnets(cidrs: &[&str], config: &NetworkConfig) -> Result<Subnets, String> {
    if cidrs.is_empty() {
        return Err("it has no podCIDR".into());
    }
    if cidrs.len() > 2 {
        return Err(format!("it has {} podCIDRs, more than one of each family", cidrs.len()));
    }
    let (mut v4, mut v6): (Option<Ipv4Net>, Option<Ipv6Net>) = (None, None);
    for cidr in cidrs {
        match cidr.parse::<IpNet>().map_err(|_| format!("its podCIDR {cidr:?} is no prefix"))? {
            IpNet::V4(net) => v4 = v4.or(Some(net.trunc())),
            IpNet::V6(net) => v6 = v6.or(Some(net.trunc())),
        }
    }
    let subnets =
        Subnets { v4: v4.filter(|_| config.v4.is_some()), v6: v6.filter(|_| config.v6.is_some()) };
    if subnets == Subnets::default() {
        let families = if config.v4.is_some() { "IPv4" } else { "IPv6" };
        return Err(format!(
            "its podCIDR {} is not {families}, which the network config enables",
            cidrs.join(",")
        ));
    }
    Ok(subnets)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix() -> Prefix {
        Prefix::parse("flannel.alpha.coreos.com").unwrap()
    }

    fn read(annotations: &[(&str, &str)]) -> Published {
        prefix().read(&all(annotations))
    }

    fn all(annotations: &[(&str, &str)]) -> Vec<Annotation> {
        let of = |(key, value): &(&str, &str)| Annotation {
            key: format!("flannel.alpha.coreos.com/{key}").into(),
            value: value.to_string().into(),
        };
        let mut all: Vec<Annotation> = annotations.iter().map(of).collect();
        let others =
            [("a/b", &b"caf\xe9"[..]), ("flannel.alpha.coreos.com/prefix-public-ip", b"9.9.9.9")];
        all.extend(others.map(|(key, value)| Annotation { key: key.into(), value: value.into() }));
        all
    }

    fn config(text: &str) -> NetworkConfig {
        NetworkConfig::parse(text).unwrap()
    }

    fn v4() -> NetworkConfig {
        config(r#"{"Network":"10.244.0.0/16"}"#)
    }

    fn dual() -> NetworkConfig {
        config(r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48"}"#)
    }

    fn v6() -> NetworkConfig {
        config(r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/48"}"#)
    }

    /// The table of spec 10.5, and an anchored start.
    #[test]
    fn prefixes() {
        for (text, key) in [
            ("flannel.alpha.coreos.com", "flannel.alpha.coreos.com/"),
            ("flannel.alpha.coreos.com/", "flannel.alpha.coreos.com/"),
            ("flannel.alpha.coreos.com/prefix", "flannel.alpha.coreos.com/prefix-"),
            ("flannel.alpha.coreos.com/prefix-", "flannel.alpha.coreos.com/prefix-"),
            ("org.com", "org.com/"),
            ("org9.com", "org9.com/"),
            ("org.com/9", "org.com/9-"),
        ] {
            assert_eq!(Prefix::parse(text).map(|prefix| prefix.0), Ok(key.into()));
        }
        for text in [
            "",
            "org",
            "org/",
            "org/prefix",
            "org.COM",
            "org.com/PREFIX",
            "a.b/c/d",
            "X.org.com",
            ".com",
            "a..b",
        ] {
            assert!(Prefix::parse(text).is_err(), "{text}");
        }
    }

    fn attrs(kind: &str) -> LeaseAttrs {
        LeaseAttrs {
            public_ip: Some([192, 168, 0, 1].into()),
            backend_type: kind.into(),
            ..LeaseAttrs::default()
        }
    }

    fn changes(attrs: &LeaseAttrs, published: &[(&str, &str)]) -> Vec<(String, String)> {
        let all = prefix().changes(attrs, &read(published));
        let short = |(key, value): (String, String)| {
            (key["flannel.alpha.coreos.com/".len()..].to_owned(), value)
        };
        all.into_iter().map(short).collect()
    }

    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
    }

    const DATA: &str = r#"{"VNI":1,"VtepMAC":"12:c6:65:89:b4:e3"}"#;

    #[test]
    fn what_is_published() {
        let vxlan = LeaseAttrs { backend_data: Some(DATA.into()), ..attrs("vxlan") };
        let all = [
            ("backend-type", "vxlan"),
            ("backend-data", DATA),
            ("public-ip", "192.168.0.1"),
            ("kube-subnet-manager", "true"),
        ];
        assert_eq!(changes(&vxlan, &[]), pairs(&all));
        assert_eq!(changes(&vxlan, &all), []);
        assert_eq!(changes(&attrs("vxlan"), &all), [], "what an old node left stays");
        assert_eq!(
            changes(&attrs("host-gw"), &all),
            pairs(&[("backend-type", "host-gw"), ("backend-data", "null")])
        );
        // the operator's address goes before ours
        let with = |overwrite| [&all[..], &[("public-ip-overwrite", overwrite)]].concat();
        assert_eq!(changes(&vxlan, &with("172.18.0.2")), pairs(&[("public-ip", "172.18.0.2")]));
        assert_eq!(changes(&vxlan, &with("")), []);
        // empty for udp
        assert_eq!(changes(&attrs(""), &[])[0], ("backend-type".into(), String::new()));
    }

    #[test]
    fn what_is_published_for_ipv6() {
        let ipv6 = "fd01::1".parse().ok();
        let six = LeaseAttrs { public_ip: None, public_ipv6: ipv6, ..attrs("vxlan") };
        let data = LeaseAttrs { backend_v6_data: Some(DATA.into()), ..six.clone() };
        assert_eq!(
            changes(&data, &[]),
            pairs(&[
                ("backend-type", "vxlan"),
                ("backend-v6-data", DATA),
                ("public-ipv6", "fd01::1"),
                ("kube-subnet-manager", "true"),
            ])
        );
        let gateway = LeaseAttrs { backend_type: "host-gw".into(), ..six };
        assert_eq!(
            changes(&gateway, &[("public-ipv6-overwrite", "fd02::9")]),
            pairs(&[
                ("backend-type", "host-gw"),
                ("backend-data", "null"),
                ("public-ip", "0.0.0.0"),
                ("backend-v6-data", "null"),
                ("public-ipv6", "fd02::9"),
                ("kube-subnet-manager", "true"),
            ])
        );
    }

    #[test]
    fn what_peers_publish() {
        let go = read(&[
            ("backend-data", DATA),
            ("backend-type", "vxlan"),
            ("kube-subnet-manager", "true"),
            ("public-ip", "192.168.0.1"),
        ]);
        assert!(go.takes_part());
        let expected = LeaseAttrs { backend_data: Some(DATA.into()), ..attrs("vxlan") };
        assert_eq!(go.attrs(&v4()), Ok(expected.clone()));
        assert_eq!(go.attrs(&dual()), Ok(expected));
        assert_eq!(read(&[("backend-data", "null")]).attrs(&v4()).unwrap().backend_data, None);
        assert!(!read(&[("kube-subnet-manager", "True")]).takes_part());
        let bad = read(&[("public-ip", "bad"), ("public-ipv6", "fd01::1")]);
        assert!(bad.attrs(&v4()).unwrap_err().contains("public-ip is \"bad\""));
        assert_eq!(bad.attrs(&dual()).unwrap().public_ipv6, "fd01::1".parse().ok());
        assert!(read(&[("public-ipv6", "192.168.0.1")]).attrs(&v6()).is_err());
        assert!(read(&[("public-ip", "::1")]).attrs(&v4()).is_err());
        assert!(read(&[("backend-data", &"x".repeat(value::LONGEST + 1))]).attrs(&v4()).is_err());
    }

    #[test]
    fn addresses_that_the_operator_sets() {
        let set =
            read(&[("node-public-ip", "1.2.3.4"), ("node-public-ipv6", "")]).public_addresses();
        assert_eq!(set, Ok(PublicAddresses { v4: Some([1, 2, 3, 4].into()), v6: None }));
        assert!(read(&[("node-public-ip", "here")]).public_addresses().is_err());
    }

    #[test]
    fn prints() {
        let print = |annotations: &[(&str, &str)], uid| prefix().print(&all(annotations), uid);
        let one = print(&[("public-ip", "1.2.3.4"), ("backend-type", "")], "u");
        assert_eq!(
            one,
            print(&[("backend-type", ""), ("unknown", "x"), ("public-ip", "1.2.3.4")], "u")
        );
        for (other, uid) in [
            (&[("public-ip", "1.2.3.4"), ("backend-type", "")][..], "v"),
            (&[("public-ip", "1.2.3.5"), ("backend-type", "")], "u"),
            (&[("public-ipv6", "1.2.3.4"), ("backend-type", "")], "u"),
            (&[("public-ip", "1.2.3.4")], "u"),
        ] {
            assert_ne!(one, print(other, uid));
        }
        // every one that is read counts
        for suffix in SUFFIXES {
            assert!(Published::default().field(suffix).is_some());
            assert_ne!(
                one,
                print(&[("public-ip", "1.2.3.4"), ("backend-type", ""), (suffix, "x")], "u")
            );
        }
    }

    #[test]
    fn pod_cidrs() {
        let of = |v4: &str, v6: &str| Subnets { v4: v4.parse().ok(), v6: v6.parse().ok() };
        let (four, six) = ("10.244.1.0/24", "fd00:0:0:1::/64");
        for (cidrs, config, expected) in [
            (&[four][..], v4(), of(four, "")),
            (&[four, six], v4(), of(four, "")),
            (&[four, six], dual(), of(four, six)),
            (&[six, four], dual(), of(four, six)),
            (&[four], dual(), of(four, "")),
            (&[four, six], v6(), of("", six)),
            (&["10.244.1.7/24"], v4(), of(four, "")),
        ] {
            assert_eq!(subnets(cidrs, &config), Ok(expected), "{cidrs:?}");
        }
        for (cidrs, config, says) in [
            (&[][..], v4(), "no podCIDR"),
            (&[six], v4(), "is not IPv4"),
            (&[four], v6(), "is not IPv6"),
            (&["bad"], v4(), "no prefix"),
            (&[four, six, "10.244.2.0/24"], dual(), "more than one of each"),
        ] {
            let error = subnets(cidrs, &config).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }
}
