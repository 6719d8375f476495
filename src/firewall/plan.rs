//! Which rules a network needs: a pure function of the network, this host's subnet and the options.
//!
//! The list is upstream's (firewall spec 1.3 and 1.4) in both styles. In nftables style upstream compares the mark without
//! a mask and has the operands of the fourth rule swapped, so that a host's own packets to pods elsewhere keep an address
//! that finds no way back; here both styles do the same.

use ipnet::IpNet;

use super::rule::{Mark, Rule, Term, Verdict};
use super::site::{Part, Site, Style};
use crate::family::Family;

/// The bit by which kube-proxy marks what it masquerades itself.
const KUBE_PROXY: Mark = Mark { value: 0x4000, mask: 0x4000 };

/// One family's share of a network.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Share {
    /// The whole network.
    pub network: IpNet,
    /// This host's subnet.
    pub subnet: IpNet,
}

/// Where nobody is masqueraded to.
pub(super) fn multicast(family: Family) -> IpNet {
    match family {
        Family::V4 => IpNet::V4(ipnet::Ipv4Net::new_assert([224, 0, 0, 0].into(), 4)),
        Family::V6 => {
            IpNet::V6(ipnet::Ipv6Net::new_assert([0xff00, 0, 0, 0, 0, 0, 0, 0].into(), 8))
        }
    }
}

/// The content of our chain, in order.
pub fn rules(site: Site, share: Share, fully_random: bool) -> Vec<Rule> {
    let Share { network, subnet } = share;
    let comment = match site.style {
        Style::Iptables => site.part.comment(),
        Style::Nftables => "",
    };
    let rule = |source, destination, verdict| Rule {
        mark: None,
        source,
        destination,
        comment: comment.into(),
        verdict,
    };
    match site.part {
        Part::Masquerade => {
            let multicast = multicast(site.family);
            let masquerade = Verdict::Masquerade { fully_random };
            vec![
                Rule { mark: Some(KUBE_PROXY), ..rule(None, None, Verdict::Return) },
                rule(Term::is(subnet), Term::is(network), Verdict::Return),
                rule(Term::is(network), Term::is(subnet), Verdict::Return),
                rule(Term::is_not(network), Term::is(subnet), Verdict::Return),
                rule(Term::is(network), Term::is_not(multicast), masquerade.clone()),
                rule(Term::is_not(network), Term::is(network), masquerade),
            ]
        }
        Part::Forward => vec![
            rule(Term::is(network), None, Verdict::Accept),
            rule(None, Term::is(network), Verdict::Accept),
        ],
    }
}

/// The rule by which everybody's chain jumps to ours.
pub fn hook_rule(site: Site) -> Option<Rule> {
    site.hook()?;
    let jump = Rule::new(Verdict::Jump(site.chain().into()));
    Some(Rule { comment: site.part.comment().into(), ..jump })
}

/// The network that a rule in one of our chains is about, if it has one of the forms that any flanneld since 0.20 writes
/// there. Rules that are about no network (the mark's) have none.
pub(super) fn network_of(rule: &Rule, site: Site) -> Option<IpNet> {
    let comment = match site.style {
        Style::Iptables => site.part.comment(),
        Style::Nftables => "",
    };
    if rule.mark.is_some() || rule.comment != comment {
        return None;
    }
    let inside = |term: Option<Term>| term.filter(|term| !term.not).map(|term| term.net);
    let outside = |term: Option<Term>| term.filter(|term| term.not).map(|term| term.net);
    let (source, destination) = (rule.source, rule.destination);
    match (site.part, &rule.verdict) {
        (Part::Forward, Verdict::Accept) => match (source, destination) {
            (Some(term), None) | (None, Some(term)) if !term.not => Some(term.net),
            _ => None,
        },
        (Part::Masquerade, Verdict::Return) => match (inside(source), inside(destination)) {
            (Some(a), Some(b)) => Some(if a.contains(&b) { a } else { b }),
            // not from the network (or, upstream's mistake, not from the subnet)
            (None, Some(b)) => outside(source).map(|a| if a.contains(&b) { a } else { b }),
            _ => None,
        },
        (Part::Masquerade, Verdict::Masquerade { .. }) => {
            let to_the_outside = outside(destination) == Some(multicast(site.family));
            let from_the_outside =
                outside(source).filter(|network| inside(destination) == Some(*network));
            inside(source).filter(|_| to_the_outside).or(from_the_outside)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    fn site(part: Part, style: Style, family: Family) -> Site {
        Site { family, style, part }
    }

    const V4: (&str, &str) = ("10.244.0.0/16", "10.244.1.0/24");
    const V6: (&str, &str) = ("2001:cafe:42::/56", "2001:cafe:42:1::/64");

    fn share((network, subnet): (&str, &str)) -> Share {
        Share { network: network.parse().unwrap(), subnet: subnet.parse().unwrap() }
    }

    fn text(rules: &[Rule]) -> String {
        rules.iter().map(|rule| format!("{rule}\n")).collect()
    }

    /// Firewall spec 1.3, the worked expansion, to the byte.
    #[test]
    fn reference_lists() {
        let masquerade = site(Part::Masquerade, Style::Iptables, Family::V4);
        assert_eq!(
            text(&rules(masquerade, share(V4), true)),
            r#"-m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
-s 10.244.1.0/24 -d 10.244.0.0/16 -m comment --comment "flanneld masq" -j RETURN
-s 10.244.0.0/16 -d 10.244.1.0/24 -m comment --comment "flanneld masq" -j RETURN
! -s 10.244.0.0/16 -d 10.244.1.0/24 -m comment --comment "flanneld masq" -j RETURN
-s 10.244.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
! -s 10.244.0.0/16 -d 10.244.0.0/16 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
"#
        );
        let v6 =
            text(&rules(site(Part::Masquerade, Style::Iptables, Family::V6), share(V6), false));
        assert!(v6.contains("-s 2001:cafe:42::/56 ! -d ff00::/8 -m comment"), "{v6}");
        assert!(!v6.contains("random"), "{v6}");
        assert_eq!(
            text(&rules(site(Part::Forward, Style::Iptables, Family::V4), share(V4), true)),
            "-s 10.244.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT\n\
             -d 10.244.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT\n"
        );
        assert_eq!(
            hook_rule(masquerade).unwrap().to_string(),
            r#"-m comment --comment "flanneld masq" -j FLANNEL-POSTRTG"#
        );
        let own = site(Part::Masquerade, Style::Nftables, Family::V4);
        assert_eq!(hook_rule(own), None);
        assert!(rules(own, share(V4), true).iter().all(|rule| rule.comment.is_empty()));
    }

    /// What becomes of a packet: the first rule that matches decides.
    fn walk(rules: &[Rule], source: &str, destination: &str, mark: u32) -> &'static str {
        let (source, destination): (IpAddr, IpAddr) =
            (source.parse().unwrap(), destination.parse().unwrap());
        let fits = |term: Option<Term>, address: IpAddr| {
            term.is_none_or(|term| term.net.contains(&address) != term.not)
        };
        let first = rules.iter().find(|rule| {
            rule.mark.is_none_or(|wanted| mark & wanted.mask == wanted.value)
                && fits(rule.source, source)
                && fits(rule.destination, destination)
        });
        match first.map(|rule| &rule.verdict) {
            Some(Verdict::Masquerade { .. }) => "masquerade",
            Some(Verdict::Accept) => "accept",
            Some(Verdict::Return | Verdict::Jump(_)) | None => "as it is",
        }
    }

    /// Firewall spec 1.3, the table of decisions, for both styles and families.
    #[test]
    fn packets_walk_through_the_rules() {
        // local pod, other local pod, remote pod, pod of a third host, this host, the internet, multicast
        let places = [
            [
                "10.244.1.5",
                "10.244.1.6",
                "10.244.2.5",
                "10.244.3.5",
                "192.168.0.1",
                "8.8.8.8",
                "239.1.1.1",
            ],
            [
                "2001:cafe:42:1::5",
                "2001:cafe:42:1::6",
                "2001:cafe:42:2::5",
                "2001:cafe:42:3::5",
                "fd00::1",
                "2001:db8::8",
                "ff05::1",
            ],
        ];
        for style in [Style::Iptables, Style::Nftables] {
            for (family, share_of, place) in
                [(Family::V4, V4, places[0]), (Family::V6, V6, places[1])]
            {
                let [local, other, remote, third, host, world, multicast] = place;
                let rules = rules(site(Part::Masquerade, style, family), share(share_of), true);
                for (from, to, decision) in [
                    (local, other, "as it is"),
                    (local, remote, "as it is"),
                    (local, world, "masquerade"),
                    (local, host, "masquerade"),
                    (local, multicast, "as it is"),
                    (remote, multicast, "as it is"),
                    (remote, local, "as it is"),
                    (remote, third, "masquerade"),
                    (remote, world, "masquerade"),
                    (host, local, "as it is"),
                    (world, local, "as it is"),
                    (host, remote, "masquerade"),
                    (world, remote, "masquerade"),
                    (host, world, "as it is"),
                    (host, multicast, "as it is"),
                ] {
                    assert_eq!(walk(&rules, from, to, 0), decision, "{style:?} {from} -> {to}");
                    assert_eq!(walk(&rules, from, to, 0x1000), decision, "{from} -> {to}");
                    // kube-proxy's mark, alone and beside others
                    assert_eq!(walk(&rules, from, to, 0x4000), "as it is", "{from} -> {to}");
                    assert_eq!(walk(&rules, from, to, 0xf4001), "as it is", "{from} -> {to}");
                }
                let rules = super::rules(site(Part::Forward, style, family), share(share_of), true);
                for (from, to, decision) in [
                    (local, remote, "accept"),
                    (local, world, "accept"),
                    (world, remote, "accept"),
                    (host, world, "as it is"),
                ] {
                    assert_eq!(walk(&rules, from, to, 0), decision, "{from} -> {to}");
                }
            }
        }
    }

    #[test]
    fn every_rule_says_which_network_it_is_about() {
        for style in [Style::Iptables, Style::Nftables] {
            for part in Part::ALL {
                for (family, prefixes) in [(Family::V4, V4), (Family::V6, V6)] {
                    let site = site(part, style, family);
                    let share = share(prefixes);
                    for rule in rules(site, share, true) {
                        let expected = rule.mark.is_none().then_some(share.network);
                        assert_eq!(network_of(&rule, site), expected, "{rule}");
                        let elsewhere = Rule { comment: "mine".into(), ..rule };
                        assert_eq!(network_of(&elsewhere, site), None);
                    }
                }
            }
        }
        // the first rule of 0.20, upstream's fourth in nftables style
        let (network, subnet) = (V4.0.parse().unwrap(), V4.1.parse().unwrap());
        let own = site(Part::Masquerade, Style::Nftables, Family::V4);
        let old = Rule {
            source: Term::is(network),
            destination: Term::is(network),
            ..Rule::new(Verdict::Return)
        };
        assert_eq!(network_of(&old, own), Some(network));
        let swapped = Rule {
            source: Term::is_not(subnet),
            destination: Term::is(network),
            ..Rule::new(Verdict::Return)
        };
        assert_eq!(network_of(&swapped, own), Some(network));
    }
}
