//! What has to be done so that what is there becomes what is wanted: a pure function.
//!
//! A chain of ours holds our rules in order, and nothing else but the rules of other flannel networks: several flanneld on
//! one host share the chains, so rules that are about another network, in a form that a flanneld writes, are left alone.
//! In everybody's chains there is one rule of ours, the jump, wherever it stands. It is appended when it is missing, as
//! upstream does since 0.21.3, so an earlier rule of somebody else wins.

use std::collections::BTreeSet;

use ipnet::IpNet;

use super::old;
use super::plan::{hook_rule, network_of};
use super::rule::Rule;
use super::seen::{Found, Seen};
use super::site::{Part, Site, Style};
use crate::family::Family;

/// How to know our rules from those of other flannel networks.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Ours {
    /// The networks of this agent, now and in earlier lives.
    pub networks: Vec<IpNet>,
    /// Every flannel network on this host is ours to clean up.
    pub everything: bool,
    /// Chains that cannot be removed, because a rule of somebody else jumps to them: table and name.
    pub stuck: BTreeSet<(Family, &'static str, &'static str)>,
}

impl Ours {
    pub(super) fn concerns(&self, net: &IpNet) -> bool {
        self.everything || self.networks.iter().any(|ours| ours.contains(net) || net.contains(ours))
    }
}

/// One step. The steps for one family and purpose are taken together or not at all.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Change {
    /// Makes the site's table.
    MakeTable,
    /// Makes everybody's chain, which nobody has made yet.
    MakeHook,
    /// Makes our chain.
    MakeChain,
    /// Makes our chain anew, with nothing in it: it does not hang in the kernel as it should.
    RemakeChain,
    /// Empties a chain.
    Flush(&'static str),
    /// Deletes a rule.
    Delete {
        /// The chain that it is in.
        chain: &'static str,
        /// [`Found::handle`].
        handle: u64,
    },
    /// Puts a rule at the head of our chain.
    Insert(Rule),
    /// Puts a rule at the end of a chain.
    Append {
        /// The chain.
        chain: &'static str,
        /// The rule.
        rule: Rule,
    },
    /// Removes a chain with all that is in it.
    RemoveChain(&'static str),
    /// Removes the site's table with all that is in it.
    RemoveTable,
}

/// What is wanted in one place: rules in order, or nothing at all.
pub type Want = (Site, Vec<Rule>);

/// The steps that are next for those places that `concerns` says. What is only to be removed comes last and by itself, so
/// that it can keep nothing from being set.
pub fn changes(
    wants: &[Want],
    concerns: impl Fn(Site) -> bool,
    ours: &Ours,
    seen: &Seen,
) -> Vec<(Site, Change)> {
    let mut changes = Vec::new();
    let here = || wants.iter().filter(|(site, _)| concerns(*site));
    for (site, rules) in here().filter(|(_, rules)| !rules.is_empty()) {
        put(*site, rules, ours, seen, &mut |change| changes.push((*site, change)));
    }
    for (site, _) in here().filter(|(_, rules)| rules.is_empty()) {
        remove(*site, ours, seen, &mut |change| changes.push((*site, change)));
        remove_own_table(*site, wants, seen, &mut |change| changes.push((*site, change)));
    }
    changes.sort_by_key(|(_, change)| rank(change));
    if changes.first().is_some_and(|(_, change)| rank(change) < REMOVAL) {
        changes.retain(|(_, change)| rank(change) < REMOVAL);
    }
    changes
}

fn put(site: Site, want: &[Rule], ours: &Ours, seen: &Seen, push: &mut impl FnMut(Change)) {
    let (family, table, own) = (site.family, site.table(), site.chain());
    if site.style == Style::Nftables && seen.asleep.contains(&(family, table)) {
        // the kernel wakes it up and adds chains to it one after the other only
        return push(Change::MakeTable);
    }
    if !seen.tables.contains(&(family, table)) {
        push(Change::MakeTable);
    }
    let mut found = seen.chain(family, table, own).unwrap_or_default();
    if seen.chain(family, table, own).is_none() {
        push(Change::MakeChain);
    } else if seen.odd.contains(&(family, table, own)) {
        push(Change::RemakeChain);
        found = &[];
    }
    fill(site, want, ours, found, push);
    let (Some(hook), Some(jump)) = (site.hook(), hook_rule(site)) else { return };
    let found = seen.chain(family, table, hook);
    if found.is_none() {
        push(Change::MakeHook);
    }
    let found = found.unwrap_or_default();
    let keep = found.iter().position(|found| found.rule.as_ref() == Some(&jump));
    let surplus = |(at, found): (usize, &Found)| {
        (Some(at) != keep && is_our_jump(found, own)).then_some(found.handle)
    };
    delete(hook, found.iter().enumerate().filter_map(surplus), push);
    old::remove(site, ours, seen, push);
    if keep.is_none() {
        push(Change::Append { chain: hook, rule: jump });
    }
}

/// Our chain's content. Either it is right, or all of it that is ours is written anew, in one go.
fn fill(site: Site, want: &[Rule], ours: &Ours, found: &[Found], push: &mut impl FnMut(Change)) {
    let own = || found.iter().filter(|found| !is_theirs(found, site, ours));
    let right = own().map(|found| found.rule.as_ref()).eq(want.iter().map(Some));
    // the first rule of all networks is the same, and holds for all of them
    let shared = want.first().filter(|first| first.mark.is_some());
    let leads =
        shared.is_none_or(|first| found.first().and_then(|f| f.rule.as_ref()) == Some(first));
    if right && leads {
        return;
    }
    if own().count() < found.len() {
        delete(site.chain(), own().map(|found| found.handle), push);
    } else if !found.is_empty() {
        push(Change::Flush(site.chain()));
    }
    if let Some(first) = shared {
        push(Change::Insert(first.clone()));
    }
    for rule in want.iter().skip(usize::from(shared.is_some())) {
        push(Change::Append { chain: site.chain(), rule: rule.clone() });
    }
}

fn remove(site: Site, ours: &Ours, seen: &Seen, push: &mut impl FnMut(Change)) {
    let (family, table, own) = (site.family, site.table(), site.chain());
    let found = seen.chain(family, table, own).unwrap_or_default();
    // the rule of the mark is about no network: it stays as long as others need it
    let others = found.iter().any(|found| is_theirs(found, site, ours));
    if others {
        let own = found.iter().filter(|found| {
            found.rule.as_ref().is_none_or(|rule| rule.mark.is_none())
                && !is_theirs(found, site, ours)
        });
        delete(site.chain(), own.map(|found| found.handle), push);
    } else {
        if let Some(hook) = site.hook() {
            let jumps = seen.chain(family, table, hook).unwrap_or_default();
            let jumps = jumps.iter().filter(|found| is_our_jump(found, own));
            delete(hook, jumps.map(|found| found.handle), push);
        }
        let stuck = ours.stuck.contains(&(family, table, own));
        if seen.chain(family, table, own).is_some() && !stuck {
            push(Change::RemoveChain(own));
        } else if !found.is_empty() {
            push(Change::Flush(own));
        }
    }
    old::remove(site, ours, seen, push);
}

/// A table of our own goes when nothing is wanted in it, and none of its chains is left.
fn remove_own_table(site: Site, wants: &[Want], seen: &Seen, push: &mut impl FnMut(Change)) {
    let mut siblings =
        wants.iter().filter(|(other, _)| (other.family, other.style) == (site.family, site.style));
    let unused = siblings.all(|(other, rules)| {
        rules.is_empty() && seen.chain(other.family, other.table(), other.chain()).is_none()
    });
    let there = seen.tables.contains(&(site.family, site.table()));
    if (site.style, site.part) == (Style::Nftables, Part::Forward) && unused && there {
        push(Change::RemoveTable);
    }
}

/// Does it lead all packets into a chain of ours? A jump for some packets only is the operator's.
fn is_our_jump(found: &Found, own: &str) -> bool {
    let all = found.rule.as_ref().is_some_and(|rule| {
        rule.mark.is_none() && rule.source.is_none() && rule.destination.is_none()
    });
    all && found.jump.as_deref() == Some(own)
}

/// Is a rule in a chain of ours another flannel network's?
fn is_theirs(found: &Found, site: Site, ours: &Ours) -> bool {
    let network = found.rule.as_ref().and_then(|rule| network_of(rule, site));
    network.is_some_and(|network| !ours.concerns(&network))
}

pub(super) fn delete(
    chain: &'static str,
    handles: impl Iterator<Item = u64>,
    push: &mut impl FnMut(Change),
) {
    handles.for_each(|handle| push(Change::Delete { chain, handle }));
}

/// [`rank`] of the first step that only removes.
const REMOVAL: u8 = 4;

/// Things are made first and removed last.
fn rank(change: &Change) -> u8 {
    match change {
        Change::MakeTable => 0,
        Change::MakeHook | Change::MakeChain | Change::RemakeChain => 1,
        Change::Delete { .. } | Change::Flush(_) => 2,
        Change::Insert(_) | Change::Append { .. } => 3,
        Change::RemoveChain(_) => REMOVAL,
        Change::RemoveTable => 5,
    }
}

#[cfg(test)]
mod tests {
    use super::super::plan::{self, Share};
    use super::super::rule::{Term, Verdict};
    use super::super::site::OLD_CHAIN;
    use super::*;

    const MASQUERADE: Site =
        Site { family: Family::V4, style: Style::Iptables, part: Part::Masquerade };
    const OWN: Site = Site { style: Style::Nftables, ..MASQUERADE };

    fn share(network: &str, subnet: &str) -> Share {
        Share { network: network.parse().unwrap(), subnet: subnet.parse().unwrap() }
    }

    fn first() -> Share {
        share("10.1.0.0/16", "10.1.7.0/24")
    }

    fn second() -> Share {
        share("10.2.0.0/16", "10.2.9.0/24")
    }

    fn ours(networks: &[&str]) -> Ours {
        let networks = networks.iter().map(|net| net.parse().unwrap()).collect();
        Ours { networks, ..Ours::default() }
    }

    fn wants(share: Option<Share>, style: Style) -> Vec<Want> {
        let rules =
            |site: Site| share.map(|share| plan::rules(site, share, true)).unwrap_or_default();
        Site::all(style)
            .filter(|site| site.family == Family::V4)
            .map(|site| (site, rules(site)))
            .collect()
    }

    /// A host whose rules are changed as the kernel or `iptables-restore` would.
    #[derive(Default)]
    struct Host {
        seen: Seen,
        handles: u64,
    }

    impl Host {
        fn chain(&mut self, site: Site, chain: &'static str) -> &mut Vec<Found> {
            self.seen.chains.get_mut(&(site.family, site.table(), chain)).expect(chain)
        }

        fn add(&mut self, site: Site, chain: &'static str, at_head: bool, rule: Rule) {
            self.handles += 1;
            let found = Found::new(self.handles, rule);
            let rules = self.chain(site, chain);
            rules.insert(if at_head { 0 } else { rules.len() }, found);
        }

        fn apply(&mut self, changes: Vec<(Site, Change)>) {
            for (site, change) in changes {
                let table = (site.family, site.table());
                let key = |chain| (site.family, site.table(), chain);
                match change {
                    Change::MakeTable => {
                        assert!(self.seen.tables.insert(table) || site.style == Style::Nftables)
                    }
                    Change::MakeHook => {
                        assert!(
                            self.seen.chains.insert(key(site.hook().unwrap()), vec![]).is_none()
                        )
                    }
                    Change::MakeChain => {
                        assert!(self.seen.chains.insert(key(site.chain()), vec![]).is_none())
                    }
                    Change::RemakeChain => self.chain(site, site.chain()).clear(),
                    Change::Flush(chain) => self.chain(site, chain).clear(),
                    Change::Delete { chain, handle } => {
                        let rules = self.chain(site, chain);
                        let at = rules.iter().position(|found| found.handle == handle).unwrap();
                        rules.remove(at);
                    }
                    Change::Insert(rule) => self.add(site, site.chain(), true, rule),
                    Change::Append { chain, rule } => self.add(site, chain, false, rule),
                    Change::RemoveChain(chain) => {
                        let jumped = self.seen.chains.iter().any(|((_, table, _), rules)| {
                            *table == site.table()
                                && rules.iter().any(|found| found.jump.as_deref() == Some(chain))
                        });
                        assert!(!jumped, "{chain} is still jumped to");
                        assert!(self.seen.chains.remove(&key(chain)).is_some());
                    }
                    Change::RemoveTable => {
                        assert!(self.seen.tables.remove(&table));
                        self.seen.chains.retain(|(family, table, _), _| {
                            (*family, *table) != (site.family, site.table())
                        });
                    }
                }
            }
        }

        /// Brings it to what is wanted, which takes a few goes at most. How many steps it took.
        fn settle(&mut self, wants: &[Want], ours: &Ours) -> usize {
            let mut count = 0;
            for _ in 0..5 {
                let steps = changes(wants, |_| true, ours, &self.seen);
                if steps.is_empty() {
                    return count;
                }
                count += steps.len();
                self.apply(steps);
            }
            panic!("{:?}", changes(wants, |_| true, ours, &self.seen));
        }

        fn text(&self, site: Site, chain: &'static str) -> Vec<String> {
            let found = self.seen.chain(site.family, site.table(), chain).unwrap_or_default();
            let text = |found: &Found| found.rule.as_ref().map_or("?".into(), Rule::to_string);
            found.iter().map(text).collect()
        }
    }

    #[test]
    fn from_nothing_and_back() {
        for style in [Style::Iptables, Style::Nftables] {
            let mut host = Host::default();
            let ours = ours(&["10.1.0.0/16"]);
            assert!(host.settle(&wants(Some(first()), style), &ours) > 8);
            let site = Site { style, ..MASQUERADE };
            assert_eq!(host.text(site, site.chain()).len(), 6);
            host.settle(&wants(None, style), &ours);
            assert!(host.seen.chain(Family::V4, site.table(), site.chain()).is_none());
            assert_eq!(host.seen.tables.is_empty(), style == Style::Nftables);
            assert!(host.text(MASQUERADE, "POSTROUTING").is_empty());
        }
    }

    /// Deleted, doubled, swapped and foreign rules in our chain, a doubled and a lost jump: what is wanted comes back.
    #[test]
    fn damage_is_found() {
        let ours = ours(&["10.1.0.0/16"]);
        for style in [Style::Iptables, Style::Nftables] {
            let want = wants(Some(first()), style);
            let site = Site { style, ..MASQUERADE };
            let mut host = Host::default();
            host.settle(&want, &ours);
            let right = (host.text(site, site.chain()), host.text(MASQUERADE, "POSTROUTING"));
            type Damage = fn(&mut Vec<Found>);
            let damages: [Damage; 5] = [
                |rules| drop(rules.remove(3)),
                |rules| rules.swap(1, 4),
                |rules| rules.push(Found { handle: 77, ..rules[2].clone() }),
                |rules| rules.push(Found { handle: 78, rule: None, jump: None }),
                |rules| rules.clear(),
            ];
            for damage in damages {
                damage(host.chain(site, site.chain()));
                assert!(host.settle(&want, &ours) > 0);
                assert_eq!(host.text(site, site.chain()), right.0);
            }
            if let Some(hook) = site.hook() {
                let jump = host.chain(site, hook)[0].clone();
                host.chain(site, hook).push(Found { handle: 80, ..jump.clone() });
                // a rule that says more is the operator's, wherever it leads
                host.chain(site, hook).push(Found { handle: 81, rule: None, ..jump });
                host.settle(&want, &ours);
                assert_eq!(host.text(site, hook), [right.1[0].as_str(), "?"]);
                host.chain(site, hook).pop();
                host.settle(&want, &ours);
                assert_eq!(host.text(site, hook), right.1);
                host.chain(site, hook).clear();
                host.settle(&want, &ours);
                assert_eq!(host.text(site, hook), right.1);
            }
        }
    }

    #[test]
    fn a_jump_stays_where_it_is() {
        let ours = ours(&["10.1.0.0/16"]);
        let mut host = Host::default();
        host.settle(&wants(Some(first()), Style::Iptables), &ours);
        let other = Found { handle: 90, rule: None, jump: Some("KUBE-POSTROUTING".into()) };
        host.chain(MASQUERADE, "POSTROUTING").extend([other.clone(), other]);
        assert_eq!(host.settle(&wants(Some(first()), Style::Iptables), &ours), 0);
    }

    /// Two agents with two networks share the chains, in whatever order they come and go.
    #[test]
    fn several_networks_live_side_by_side() {
        for style in [Style::Iptables, Style::Nftables] {
            let site = Site { style, ..MASQUERADE };
            let mut host = Host::default();
            let (a, b) = (ours(&["10.1.0.0/16"]), ours(&["10.2.0.0/16"]));
            let (want_a, want_b) = (wants(Some(first()), style), wants(Some(second()), style));
            host.settle(&want_a, &a);
            host.settle(&want_b, &b);
            assert_eq!(host.settle(&want_a, &a), 0, "they do not fight");
            let lines = host.text(site, site.chain());
            assert_eq!(lines.len(), 11);
            assert!(lines[0].contains("0x4000") && lines[10].contains("10.2.0.0/16"));
            // somebody shuffles them
            host.chain(site, site.chain()).rotate_left(1);
            host.settle(&want_a, &a);
            host.settle(&want_b, &b);
            assert_eq!(host.settle(&want_a, &a), 0);
            host.settle(&wants(None, style), &a);
            assert_eq!(host.text(site, site.chain()).len(), 6, "the other one's are whole");
            assert_eq!(host.settle(&want_b, &b), 0);
            host.settle(&wants(None, style), &b);
            assert!(host.seen.chain(Family::V4, site.table(), site.chain()).is_none());
        }
    }

    #[test]
    fn rules_of_an_earlier_network_go_and_cleaning_up_takes_all() {
        for style in [Style::Iptables, Style::Nftables] {
            let mut host = Host::default();
            host.settle(&wants(Some(first()), style), &ours(&["10.1.0.0/16"]));
            let now = ours(&["10.2.0.0/16", "10.1.0.0/16"]);
            host.settle(&wants(Some(second()), style), &now);
            let site = Site { style, ..MASQUERADE };
            assert_eq!(host.text(site, site.chain()).len(), 6);
            let all = Ours { everything: true, ..Ours::default() };
            host.settle(&wants(None, style), &all);
            assert!(host.seen.chain(Family::V4, site.table(), site.chain()).is_none());
        }
    }

    fn rule(source: Option<Term>, destination: Option<Term>, verdict: Verdict) -> Rule {
        Rule { source, destination, ..Rule::new(verdict) }
    }

    /// Firewall spec 1.12: what versions before 0.20 left in everybody's chains goes; what an operator wrote stays.
    #[test]
    fn leftovers_of_old_versions() {
        let network: IpNet = "10.1.0.0/16".parse().unwrap();
        let subnet: IpNet = "10.1.7.0/24".parse().unwrap();
        let nat = Verdict::Masquerade { fully_random: true };
        let multicast = Term::is_not("224.0.0.0/4".parse().unwrap());
        let old = [
            rule(Term::is(network), Term::is(network), Verdict::Return),
            rule(Term::is(network), multicast, nat.clone()),
            rule(Term::is_not(network), Term::is(subnet), Verdict::Return),
            rule(Term::is_not(network), Term::is(network), nat.clone()),
        ];
        let operators = [
            rule(Term::is(network), Term::is_not(network), nat.clone()),
            rule(Term::is(subnet), Term::is(network), Verdict::Return),
            rule(Term::is("192.168.0.0/16".parse().unwrap()), multicast, nat.clone()),
            rule(
                Term::is("192.168.122.0/24".parse().unwrap()),
                Term::is("224.0.0.0/24".parse().unwrap()),
                Verdict::Return,
            ),
        ];
        for remark in ["", "flanneld masq", "flannel masq"] {
            for everything in [false, true] {
                let mut host = Host::default();
                let ours = Ours { everything, ..ours(&["10.1.0.0/16"]) };
                let want = wants((!everything).then(first), Style::Iptables);
                host.settle(&wants(Some(first()), Style::Iptables), &ours);
                for rule in &operators {
                    host.add(MASQUERADE, "POSTROUTING", false, rule.clone());
                }
                for rule in &old {
                    let rule = Rule { comment: remark.into(), ..rule.clone() };
                    host.add(MASQUERADE, "POSTROUTING", false, rule);
                }
                assert!(host.settle(&want, &ours) >= 4);
                let left = host.text(MASQUERADE, "POSTROUTING");
                assert_eq!(left.len(), if everything { 4 } else { 5 }, "{left:#?}");
            }
        }
        // without the one that is only ever flannel's nobody can say
        let mut host = Host::default();
        let ours = ours(&["10.1.0.0/16"]);
        host.settle(&wants(Some(first()), Style::Iptables), &ours);
        host.add(MASQUERADE, "POSTROUTING", false, old[0].clone());
        assert_eq!(host.settle(&wants(Some(first()), Style::Iptables), &ours), 0);
    }

    #[test]
    fn the_chain_of_old_goes_with_its_jump() {
        let network: IpNet = "10.1.0.0/16".parse().unwrap();
        let mut host = Host::default();
        let ours = ours(&["10.1.0.0/16"]);
        host.settle(&wants(Some(first()), Style::Iptables), &ours);
        let accept = rule(None, Term::is(network), Verdict::Accept);
        host.seen.chains.insert((Family::V4, "nat", OLD_CHAIN), vec![Found::new(99, accept)]);
        let jump = rule(Term::is(network), None, Verdict::Jump(OLD_CHAIN.into()));
        host.add(MASQUERADE, "POSTROUTING", true, jump);
        let to = rule(
            Term::is_not(network),
            Term::is(network),
            Verdict::Masquerade { fully_random: false },
        );
        host.add(MASQUERADE, "POSTROUTING", true, to);
        host.settle(&wants(Some(first()), Style::Iptables), &ours);
        assert!(host.seen.chain(Family::V4, "nat", OLD_CHAIN).is_none());
        assert_eq!(host.text(MASQUERADE, "POSTROUTING").len(), 1);
    }

    #[test]
    fn a_style_that_is_not_wanted_goes_in_the_same_go() {
        let mut host = Host::default();
        let ours = ours(&["10.1.0.0/16"]);
        let both = |first_style, second_style| {
            let mut both = wants(Some(first()), first_style);
            both.extend(wants(None, second_style));
            both
        };
        host.settle(&both(Style::Iptables, Style::Nftables), &ours);
        host.settle(&both(Style::Nftables, Style::Iptables), &ours);
        assert!(host.text(MASQUERADE, "POSTROUTING").is_empty());
        assert_eq!(host.text(OWN, "postrtg").len(), 6);
        host.settle(&both(Style::Iptables, Style::Nftables), &ours);
        assert!(!host.seen.tables.contains(&(Family::V4, "flannel-ipv4")));
    }
}
