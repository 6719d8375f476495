//! Which interface carries the overlay, and with which addresses (control-plane spec 3). A pure choice over an
//! [`Inventory`]; every step of it can be read in the log.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use regex_lite::Regex;

use crate::backend::Underlay;
use crate::cli::settings;
use crate::kernel::{IfName, Interface, InterfaceAddress, Inventory};

/// What was chosen, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Choice {
    /// The interface and its addresses.
    pub underlay: Underlay,
    /// Lines for the operator: why the others were not taken, then why this one was.
    pub why: Vec<String>,
}

/// Address families that the network config enables.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Families {
    /// IPv4.
    pub v4: bool,
    /// IPv6.
    pub v6: bool,
}

/// An interface, and the addresses on it that the way of finding it has fixed.
#[derive(Clone, Copy, Debug)]
struct Found<'a> {
    interface: &'a Interface,
    v4: Option<Ipv4Addr>,
    v6: Option<Ipv6Addr>,
}

impl<'a> Found<'a> {
    fn of(interface: &'a Interface) -> Self {
        Self { interface, v4: None, v6: None }
    }
}

/// Chooses.
///
/// # Errors
/// No interface fits. The text says what was asked for, what this host has, and what to do.
pub fn choose(
    wanted: &settings::Interface,
    families: Families,
    host: &Inventory,
) -> Result<Choice, String> {
    let chooser = Chooser { wanted, families, host };
    let mut why = Vec::new();
    let found = chooser.find(&mut why)?;
    let (name, addresses) = (found.interface.name, found.interface);
    if found.interface.mtu == 0 {
        return Err(format!("interface {name} has MTU 0: set one, or choose another --iface"));
    }
    let local_v4 = found.v4.or_else(|| preferred(addresses).find_map(v4_of));
    let local_v6 = found.v6.or_else(|| preferred(addresses).find_map(v6_of));
    let lacks = |family: &str| {
        format!(
            "interface {name} has no {family} address, which the network config needs: give it one, or choose another --iface"
        )
    };
    if families.v4 && local_v4.is_none() {
        return Err(lacks("IPv4"));
    }
    if families.v6 && local_v6.is_none() {
        return Err(lacks("IPv6"));
    }
    let (local_v4, local_v6) = (local_v4.filter(|_| families.v4), local_v6.filter(|_| families.v6));
    let public_v4 = wanted.public_ip.or(local_v4);
    let public_v6 = wanted.public_ipv6.or(local_v6);
    let text = |ip: Option<IpAddr>| ip.map_or("none".to_owned(), |ip| ip.to_string());
    for (enabled, local, public) in [
        (families.v4, local_v4.map(IpAddr::V4), public_v4.map(IpAddr::V4)),
        (families.v6, local_v6.map(IpAddr::V6), public_v6.map(IpAddr::V6)),
    ] {
        if enabled {
            why.push(format!(
                "interface {name}: address {}, advertised to peers as {}",
                text(local),
                text(public)
            ));
        }
    }
    let underlay = Underlay {
        name,
        mtu: found.interface.mtu,
        local_v4,
        local_v6,
        public_v4,
        public_v6,
        public_v4_is_local: public_v4.is_some_and(|ip| chooser.owner(ip.into()).is_some()),
        public_v6_is_local: public_v6.is_some_and(|ip| chooser.owner(ip.into()).is_some()),
    };
    Ok(Choice { underlay, why })
}

struct Chooser<'a> {
    wanted: &'a settings::Interface,
    families: Families,
    host: &'a Inventory,
}

impl<'a> Chooser<'a> {
    fn find(&self, why: &mut Vec<String>) -> Result<Found<'a>, String> {
        let wanted = self.wanted;
        if wanted.names.is_empty() && wanted.patterns.is_empty() && wanted.can_reach.is_none() {
            return self.unselected(why);
        }
        for name in &wanted.names {
            let found = match name.parse::<IpAddr>() {
                Ok(ip) => self.by_address(ip),
                Err(_) => self.by_name(name),
            };
            match found {
                Ok(found) => {
                    why.push(format!(
                        "interface {} is chosen by --iface={name}",
                        found.interface.name
                    ));
                    return Ok(found);
                }
                Err(reason) => why.push(format!("--iface={name}: {reason}")),
            }
        }
        for pattern in &wanted.patterns {
            match self.by_pattern(pattern)? {
                Some((found, what)) => {
                    let name = found.interface.name;
                    why.push(format!("interface {name} is chosen by --iface-regex={pattern}, which matches {what}"));
                    return Ok(found);
                }
                None => {
                    why.push(format!("--iface-regex={pattern}: matches no address and no name"))
                }
            }
        }
        if let Some(target) = wanted.can_reach {
            match self.by_route(target) {
                Ok(found) => {
                    why.push(format!(
                        "interface {} is chosen: the route to {target} leaves there",
                        found.interface.name
                    ));
                    return Ok(found);
                }
                Err(reason) => why.push(format!("--iface-can-reach={target}: {reason}")),
            }
        }
        Err(format!("no interface fits. {}. This host has: {}", why.join(". "), self.listing()))
    }

    /// Without a selector: the interface of the advertised address, or of the default route.
    fn unselected(&self, why: &mut Vec<String>) -> Result<Found<'a>, String> {
        let public =
            self.wanted.public_ip.map(IpAddr::V4).or(self.wanted.public_ipv6.map(IpAddr::V6));
        if let Some(public) = public {
            match self.by_address(public) {
                Ok(found) => {
                    why.push(format!(
                        "interface {} is chosen: it has the public address {public}",
                        found.interface.name
                    ));
                    return Ok(found);
                }
                // behind NAT
                Err(reason) => why.push(format!("{reason}: it is only advertised")),
            }
        }
        let found = self.by_default_route()?;
        why.push(format!("interface {} is chosen: it has the default route", found.interface.name));
        Ok(found)
    }

    fn by_default_route(&self) -> Result<Found<'a>, String> {
        let one = |route: Option<Option<IfName>>, family: &str| match route {
            None => Err(format!(
                "there is no {family} default route to find the interface by: choose one with --iface, --iface-regex or \
                 --iface-can-reach. This host has: {}",
                self.listing()
            )),
            Some(None) => Err(format!(
                "the {family} default route has several next hops: choose an interface with --iface"
            )),
            Some(Some(name)) => Ok(name),
        };
        let (v4, v6) = (self.host.default_v4, self.host.default_v6);
        let name = match (self.families.v4, self.families.v6) {
            (true, true) => {
                let (v4, v6) = (one(v4, "IPv4")?, one(v6, "IPv6")?);
                if v4 != v6 {
                    return Err(format!(
                        "the IPv4 default route leaves by {v4} and the IPv6 one by {v6}: choose an interface with --iface"
                    ));
                }
                v4
            }
            (_, false) => one(v4, "IPv4")?,
            (false, true) => one(v6, "IPv6")?,
        };
        self.by_name(name.as_str())
    }

    fn by_name(&self, name: &str) -> Result<Found<'a>, String> {
        let interface =
            self.host.interfaces.iter().find(|interface| interface.name.as_str() == name);
        interface.map(Found::of).ok_or_else(|| "there is no such interface".into())
    }

    fn owner(&self, ip: IpAddr) -> Option<&'a Interface> {
        let owns = |interface: &&Interface| {
            interface.addresses.iter().any(|address| address.addr.addr() == ip)
        };
        self.host.interfaces.iter().find(owns)
    }

    fn by_address(&self, ip: IpAddr) -> Result<Found<'a>, String> {
        let interface =
            self.owner(ip).ok_or_else(|| format!("no interface has the address {ip}"))?;
        let mut found = Found::of(interface);
        match ip {
            IpAddr::V4(v4) => found.v4 = Some(v4),
            IpAddr::V6(v6) => found.v6 = Some(v6),
        }
        // with both families the other public address is this host's too, and on the same interface, or only advertised
        let other = match ip {
            IpAddr::V4(_) => self.wanted.public_ipv6.map(IpAddr::V6).filter(|_| self.families.v6),
            IpAddr::V6(_) => self.wanted.public_ip.map(IpAddr::V4).filter(|_| self.families.v4),
        };
        if let Some(other) = other {
            match self.owner(other) {
                Some(there) if there.name != interface.name => {
                    return Err(format!(
                        "{ip} is on {} but {other} is on {}: both must be on one interface",
                        interface.name, there.name
                    ));
                }
                Some(_) => match other {
                    IpAddr::V4(v4) => found.v4 = Some(v4),
                    IpAddr::V6(v6) => found.v6 = Some(v6),
                },
                None => {}
            }
        }
        Ok(found)
    }

    fn by_pattern(&self, pattern: &str) -> Result<Option<(Found<'a>, String)>, String> {
        let regex = Regex::new(pattern).map_err(|error| {
            format!("--iface-regex={pattern} is not a valid regular expression: {error}")
        })?;
        for interface in &self.host.interfaces {
            let matching = |ip: &IpAddr| regex.is_match(&ip.to_string());
            let v4 = preferred(interface).filter(matching).find_map(v4_of);
            let v6 = preferred(interface).filter(matching).find_map(v6_of);
            if (v4.is_some() || !self.families.v4) && (v6.is_some() || !self.families.v6) {
                let addresses: Vec<String> = [
                    v4.filter(|_| self.families.v4).map(|ip| ip.to_string()),
                    v6.filter(|_| self.families.v6).map(|ip| ip.to_string()),
                ]
                .into_iter()
                .flatten()
                .collect();
                return Ok(Some((Found { interface, v4, v6 }, addresses.join(" and "))));
            }
        }
        let named =
            self.host.interfaces.iter().find(|interface| regex.is_match(interface.name.as_str()));
        Ok(named.map(|interface| (Found::of(interface), "its name".into())))
    }

    fn by_route(&self, target: IpAddr) -> Result<Found<'a>, String> {
        let reached = self.host.reached.ok_or_else(|| format!("there is no route to {target}"))?;
        let mut found = self.by_name(reached.link.as_str())?;
        let owned = |source: &IpAddr| {
            found.interface.addresses.iter().any(|address| address.addr.addr() == *source)
        };
        match reached.source.filter(owned) {
            Some(IpAddr::V4(v4)) => found.v4 = Some(v4),
            Some(IpAddr::V6(v6)) => found.v6 = Some(v6),
            None => {}
        }
        Ok(found)
    }

    fn listing(&self) -> String {
        let lines = self.host.interfaces.iter().map(|interface| {
            let addresses: Vec<String> =
                interface.addresses.iter().map(|address| address.addr.to_string()).collect();
            let addresses =
                if addresses.is_empty() { "no address".into() } else { addresses.join(" ") };
            format!("{} ({addresses})", interface.name)
        });
        lines.collect::<Vec<_>>().join(", ")
    }
}

fn v4_of(ip: IpAddr) -> Option<Ipv4Addr> {
    match ip {
        IpAddr::V4(v4) => Some(v4),
        IpAddr::V6(_) => None,
    }
}

fn v6_of(ip: IpAddr) -> Option<Ipv6Addr> {
    match ip {
        IpAddr::V4(_) => None,
        IpAddr::V6(v6) => Some(v6),
    }
}

/// The addresses of an interface that peers could send to, the best one first (spec 3.4).
fn preferred(interface: &Interface) -> impl Iterator<Item = IpAddr> {
    let mut usable: Vec<&InterfaceAddress> = interface
        .addresses
        .iter()
        .filter(|address| !address.deprecated && is_unicast(address.addr.addr()))
        .collect();
    usable.sort_by_key(|address| {
        (is_link_local(address.addr.addr()), !address.permanent, address.temporary)
    });
    usable.into_iter().map(|address| address.addr.addr())
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

fn is_unicast(ip: IpAddr) -> bool {
    let broadcast = matches!(ip, IpAddr::V4(v4) if v4.is_broadcast());
    !ip.is_loopback() && !ip.is_multicast() && !ip.is_unspecified() && !broadcast
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::Reached;

    const V4: Families = Families { v4: true, v6: false };
    const V6: Families = Families { v4: false, v6: true };
    const DUAL: Families = Families { v4: true, v6: true };

    fn address(text: &str) -> InterfaceAddress {
        InterfaceAddress {
            addr: text.parse().unwrap(),
            permanent: true,
            temporary: false,
            deprecated: false,
        }
    }

    fn interface(index: u32, name: &str, addresses: &[&str]) -> Interface {
        Interface {
            name: IfName::new(name).unwrap(),
            index,
            mtu: 1500,
            mac: None,
            up: true,
            addresses: addresses.iter().map(|text| address(text)).collect(),
        }
    }

    /// The host of the vectors (spec 10.4), with an `eth0` that has the default routes.
    fn host() -> Inventory {
        let dummy = [
            "1.10.100.1/32",
            "192.168.200.128/32",
            "172.16.30.18/32",
            "172.16.31.200/32",
            "172.16.32.100/32",
            "2001:db8::1/64",
            "fe80::1/64",
        ];
        let name = IfName::new("eth0");
        Inventory {
            interfaces: vec![
                interface(1, "lo", &["127.0.0.1/8", "::1/128"]),
                interface(2, "eth0", &["192.0.2.1/24", "fe80::2/64", "2001:db8:1::1/64"]),
                interface(3, "dummy0", &dummy),
            ],
            default_v4: Some(name),
            default_v6: Some(name),
            reached: Some(Reached {
                link: IfName::new("dummy0").unwrap(),
                source: "172.16.32.100".parse().ok(),
            }),
        }
    }

    fn names(names: &[&str]) -> settings::Interface {
        settings::Interface {
            names: names.iter().map(ToString::to_string).collect(),
            ..Default::default()
        }
    }

    fn patterns(patterns: &[&str]) -> settings::Interface {
        settings::Interface {
            patterns: patterns.iter().map(ToString::to_string).collect(),
            ..Default::default()
        }
    }

    fn chosen(wanted: &settings::Interface, families: Families) -> (String, String, String) {
        let underlay = choose(wanted, families, &host()).unwrap().underlay;
        let text = |ip: Option<IpAddr>| ip.map_or(String::new(), |ip| ip.to_string());
        (
            underlay.name.to_string(),
            text(underlay.local_v4.map(Into::into)),
            text(underlay.local_v6.map(Into::into)),
        )
    }

    fn error(wanted: &settings::Interface, families: Families) -> String {
        choose(wanted, families, &host()).unwrap_err()
    }

    fn expect(got: (String, String, String), name: &str, v4: &str, v6: &str) {
        assert_eq!(got, (name.into(), v4.into(), v6.into()));
    }

    #[test]
    fn upstream_vectors() {
        expect(chosen(&patterns(&[r"192\.168\.200\.\d+"]), V4), "dummy0", "192.168.200.128", "");
        expect(chosen(&patterns(&[r"dummy\d+"]), V4), "dummy0", "1.10.100.1", "");
        expect(chosen(&names(&["dummy0"]), V4), "dummy0", "1.10.100.1", "");
        expect(chosen(&names(&["172.16.30.18"]), V4), "dummy0", "172.16.30.18", "");
        expect(chosen(&names(&["172.16.30.18"]), DUAL), "dummy0", "172.16.30.18", "2001:db8::1");
        let reach =
            settings::Interface { can_reach: "172.16.32.254".parse().ok(), ..Default::default() };
        expect(chosen(&reach, V4), "dummy0", "172.16.32.100", "");
        let public = settings::Interface {
            public_ip: "172.16.31.200".parse().ok(),
            ..patterns(&[r"172\.16\.30\.\d+"])
        };
        let underlay = choose(&public, V4, &host()).unwrap().underlay;
        assert_eq!(underlay.local_v4, "172.16.30.18".parse().ok());
        assert_eq!(
            (underlay.public_v4, underlay.public_v4_is_local),
            ("172.16.31.200".parse().ok(), true)
        );
    }

    #[test]
    fn default_routes() {
        let any = settings::Interface::default();
        expect(chosen(&any, V4), "eth0", "192.0.2.1", "");
        expect(chosen(&any, V6), "eth0", "", "2001:db8:1::1");
        expect(chosen(&any, DUAL), "eth0", "192.0.2.1", "2001:db8:1::1");
        let mut host = host();
        host.default_v6 = Some(IfName::new("dummy0"));
        assert!(
            choose(&any, DUAL, &host).unwrap_err().contains("by eth0 and the IPv6 one by dummy0")
        );
        host.default_v6 = Some(None);
        assert!(choose(&any, V6, &host).unwrap_err().contains("several next hops"));
        host.default_v6 = None;
        let error = choose(&any, DUAL, &host).unwrap_err();
        assert!(
            error.contains("no IPv6 default route") && error.contains("dummy0 (1.10.100.1/32"),
            "{error}"
        );
    }

    #[test]
    fn a_public_address_finds_its_interface_or_is_only_advertised() {
        let public = |v4: &str, v6: &str| settings::Interface {
            public_ip: v4.parse().ok(),
            public_ipv6: v6.parse().ok(),
            ..Default::default()
        };
        expect(chosen(&public("172.16.31.200", ""), V4), "dummy0", "172.16.31.200", "");
        expect(chosen(&public("", "2001:db8::1"), V6), "dummy0", "", "2001:db8::1");
        let nat = choose(&public("203.0.113.9", ""), V4, &host()).unwrap().underlay;
        assert_eq!((nat.name.as_str(), nat.public_v4_is_local), ("eth0", false));
        assert_eq!(
            (nat.local_v4, nat.public_v4),
            ("192.0.2.1".parse().ok(), "203.0.113.9".parse().ok())
        );
        let dual = choose(&public("172.16.31.200", "2001:db8::1"), DUAL, &host()).unwrap().underlay;
        assert_eq!(dual.local_v6, "2001:db8::1".parse().ok());
    }

    #[test]
    fn families_keep_apart() {
        expect(chosen(&names(&["2001:db8::1"]), V6), "dummy0", "", "2001:db8::1");
        expect(chosen(&names(&["2001:db8::1"]), DUAL), "dummy0", "1.10.100.1", "2001:db8::1");
        // both families must match on one interface; a name then matches as a whole
        expect(chosen(&patterns(&["^(192|2001)"]), DUAL), "eth0", "192.0.2.1", "2001:db8:1::1");
        assert!(error(&patterns(&["^192"]), DUAL).contains("matches no address and no name"));
    }

    #[test]
    fn the_first_selector_that_works_wins_and_the_others_are_explained() {
        let wanted = settings::Interface {
            names: vec!["nope".into(), "10.9.9.9".into()],
            patterns: vec!["zzz".into(), "^eth".into()],
            can_reach: "172.16.32.254".parse().ok(),
            ..Default::default()
        };
        let choice = choose(&wanted, V4, &host()).unwrap();
        assert_eq!(
            choice.why,
            [
                "--iface=nope: there is no such interface",
                "--iface=10.9.9.9: no interface has the address 10.9.9.9",
                "--iface-regex=zzz: matches no address and no name",
                "interface eth0 is chosen by --iface-regex=^eth, which matches its name",
                "interface eth0: address 192.0.2.1, advertised to peers as 192.0.2.1",
            ]
        );
        assert!(error(&names(&["nope"]), V4).contains("no interface fits"));
        assert!(error(&patterns(&["("]), V4).contains("not a valid regular expression"));
        assert!(error(&names(&["lo"]), V4).contains("lo has no IPv4 address"));
    }

    #[test]
    fn better_addresses_come_first() {
        let mut eth = interface(1, "eth0", &[]);
        let flagged = |text: &str, permanent, temporary, deprecated| InterfaceAddress {
            permanent,
            temporary,
            deprecated,
            ..address(text)
        };
        eth.addresses = vec![
            flagged("fe80::1/64", true, false, false),
            flagged("2001:db8::1/64", true, false, true),
            flagged("2001:db8::2/64", false, true, false),
            flagged("2001:db8::3/64", false, false, false),
            flagged("2001:db8::4/64", true, false, false),
            flagged("2001:db8::5/64", true, false, false),
        ];
        let order: Vec<String> = preferred(&eth).map(|ip| ip.to_string()).collect();
        assert_eq!(order, ["2001:db8::4", "2001:db8::5", "2001:db8::3", "2001:db8::2", "fe80::1"]);
    }
}
