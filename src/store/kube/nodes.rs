//! The other nodes: what is remembered of each, so that a heart-beat is told from a change, and whose subnets are whose.
//!
//! A lease is known by its subnets, and nothing keeps two nodes from having the same ones: then the older node's lease
//! counts, and the other's when that is gone.

use std::collections::{BTreeMap, HashMap};

use super::annotations::{self, Prefix};
use super::wire::Node;
use crate::config::NetworkConfig;
use crate::lease::{Lease, LeaseEvent, Subnets};

/// A node as it was read, whole.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) name: Box<str>,
    pub(super) print: u64,
    pub(super) created: u64,
    pub(super) standing: Standing,
}

/// Is a node a peer?
#[derive(Debug)]
pub(super) enum Standing {
    /// It does not take part.
    Apart,
    /// It does, with this lease.
    Peer(Box<Lease>),
    /// It says that it does, and this is wrong with it.
    Wrong(String),
    /// It says that it does, and has no podCIDR yet.
    Early,
}

impl Seen {
    pub(super) fn new(node: Node, prefix: &Prefix, config: &NetworkConfig) -> Self {
        let cidrs = node.pod_cidrs();
        let metadata = node.metadata.clone().unwrap_or_default();
        let published = prefix.read(&metadata.annotations);
        let created = metadata.created();
        let lease = || {
            let subnets = annotations::subnets(&cidrs, config)?;
            Ok(Lease { subnets, attrs: published.attrs(config)?, created })
        };
        let standing = if !published.takes_part() {
            Standing::Apart
        } else if cidrs.is_empty() {
            Standing::Early
        } else {
            lease().map_or_else(Standing::Wrong, |lease| Standing::Peer(Box::new(lease)))
        };
        let print = prefix.print(&metadata.annotations, &metadata.uid);
        Self { name: metadata.name.into(), print, created, standing }
    }
}

#[derive(Debug)]
struct Known {
    print: u64,
    created: u64,
    subnets: Option<Subnets>,
}

/// What a change comes to.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// For the agent.
    pub(super) events: Vec<LeaseEvent>,
    /// Nodes one of whose leases may count now; they must be read for it.
    pub(super) heirs: Vec<Box<str>>,
    /// The node whose subnets these are, too, and older.
    pub(super) rival: Option<Box<str>>,
    /// A younger node that had these subnets until now.
    pub(super) displaced: Option<Box<str>>,
}

/// A node, and an older one with the same subnets.
pub(super) type Contest = (Box<str>, Box<str>);

/// All nodes but our own.
#[derive(Debug, Default)]
pub(super) struct Nodes {
    known: BTreeMap<Box<str>, Known>,
    owners: HashMap<Subnets, Box<str>>,
}

impl Nodes {
    pub(super) fn len(&self) -> usize {
        self.known.len()
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.known.keys().map(|name| &**name)
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.known.contains_key(name)
    }

    /// Is this what is known of the node?
    pub(super) fn knows(&self, name: &str, print: u64) -> bool {
        self.known.get(name).is_some_and(|known| known.print == print)
    }

    /// The node is now so.
    pub(super) fn put(&mut self, seen: Seen) -> Outcome {
        let Seen { name, print, created, standing } = seen;
        let mut outcome = Outcome::default();
        let lease = match standing {
            Standing::Peer(lease) => Some(lease),
            Standing::Apart | Standing::Wrong(_) | Standing::Early => None,
        };
        let subnets = lease.as_ref().map(|lease| lease.subnets);
        let before = self.known.insert(name.clone(), Known { print, created, subnets });
        if let Some(before) = before
            && let Some(had) = before.subnets
        {
            if Some(had) != subnets {
                self.release(&name, had, &mut outcome);
            } else if before.created < created {
                // made anew, it is younger than some who had to stand back
                outcome.heirs = self.others(&name, had);
            }
        }
        let Some(lease) = lease else { return outcome };
        let older = self.owners.get(&lease.subnets).filter(|owner| {
            let since = self.known.get(*owner).map_or(u64::MAX, |known| known.created);
            **owner != name && (since, *owner) < (created, &name)
        });
        match older {
            Some(owner) => outcome.rival = Some(owner.clone()),
            None => {
                let before = self.owners.insert(lease.subnets, name.clone());
                outcome.displaced = before.filter(|before| *before != name);
                outcome.events.push(LeaseEvent::Put(*lease));
            }
        }
        outcome
    }

    /// The node is gone.
    pub(super) fn remove(&mut self, name: &str) -> Outcome {
        let mut outcome = Outcome::default();
        if let Some(subnets) = self.known.remove(name).and_then(|known| known.subnets) {
            self.release(name, subnets, &mut outcome);
        }
        outcome
    }

    fn release(&mut self, name: &str, subnets: Subnets, outcome: &mut Outcome) {
        if self.owners.get(&subnets).is_none_or(|owner| **owner != *name) {
            return;
        }
        self.owners.remove(&subnets);
        outcome.events.push(LeaseEvent::Removed(subnets));
        outcome.heirs = self.others(name, subnets);
    }

    /// The nodes with these subnets but `name`.
    fn others(&self, name: &str, subnets: Subnets) -> Vec<Box<str>> {
        let others = self
            .known
            .iter()
            .filter(|(other, known)| ***other != *name && known.subnets == Some(subnets));
        others.map(|(other, _)| other.clone()).collect()
    }

    /// These are all nodes: the leases that count, and each node that has an older one's subnets, with that one's name.
    pub(super) fn reset(&mut self, mut all: Vec<Seen>) -> (Vec<Lease>, Vec<Contest>) {
        *self = Self::default();
        all.sort_by(|a, b| (a.created, &a.name).cmp(&(b.created, &b.name)));
        let (mut leases, mut rivals) = (Vec::with_capacity(all.len()), Vec::new());
        for seen in all {
            let name = seen.name.clone();
            let outcome = self.put(seen);
            leases.extend(outcome.events.into_iter().filter_map(|event| match event {
                LeaseEvent::Put(lease) => Some(lease),
                LeaseEvent::Removed(_) => None,
            }));
            rivals.extend(outcome.rival.map(|rival| (name, rival)));
        }
        (leases, rivals)
    }
}

#[cfg(test)]
mod tests {
    use super::super::wire;
    use super::*;

    fn config() -> NetworkConfig {
        NetworkConfig::parse(r#"{"Network":"10.244.0.0/16"}"#).unwrap()
    }

    fn seen(name: &str, created: u64, subnet: &str, ip: &str) -> Seen {
        let key = |suffix: &str| format!("flannel.alpha.coreos.com/{suffix}");
        let (marker, address) = (key("kube-subnet-manager"), key("public-ip"));
        let annotations = [(&*marker, "true"), (&*address, ip)];
        let annotations = if ip.is_empty() { &annotations[..0] } else { &annotations };
        let node = wire::node(name, name, &[subnet], annotations);
        let prefix = Prefix::parse("flannel.alpha.coreos.com").unwrap();
        let mut seen = Seen { created, ..Seen::new(node, &prefix, &config()) };
        if let Standing::Peer(lease) = &mut seen.standing {
            lease.created = created;
        }
        seen
    }

    fn told(outcome: &Outcome) -> Vec<String> {
        let text = |event: &LeaseEvent| match event {
            LeaseEvent::Put(lease) => {
                format!("+{} {}", lease.subnets, lease.attrs.public_ip.unwrap())
            }
            LeaseEvent::Removed(subnets) => format!("-{subnets}"),
        };
        outcome.events.iter().map(text).collect()
    }

    #[test]
    fn a_node_comes_changes_and_goes() {
        let mut nodes = Nodes::default();
        assert_eq!(told(&nodes.put(seen("a", 1, "10.244.1.0/24", ""))), [""; 0]);
        assert_eq!(
            told(&nodes.put(seen("a", 1, "10.244.1.0/24", "1.1.1.1"))),
            ["+10.244.1.0/24 1.1.1.1"]
        );
        assert!(nodes.knows("a", seen("a", 1, "10.244.1.0/24", "1.1.1.1").print));
        assert!(!nodes.knows("a", seen("a", 1, "10.244.1.0/24", "1.1.1.2").print));
        assert_eq!(
            told(&nodes.put(seen("a", 1, "10.244.2.0/24", "1.1.1.1"))),
            ["-10.244.1.0/24", "+10.244.2.0/24 1.1.1.1"]
        );
        assert_eq!(told(&nodes.put(seen("a", 1, "10.244.2.0/24", ""))), ["-10.244.2.0/24"]);
        assert_eq!(told(&nodes.remove("a")), [""; 0]);
        assert_eq!((nodes.len(), nodes.owners.len()), (0, 0));
    }

    #[test]
    fn the_older_of_two_with_one_subnet_counts() {
        let subnet = "10.244.1.0/24";
        let mut nodes = Nodes::default();
        nodes.put(seen("young", 7, subnet, "1.1.1.7"));
        let taken = nodes.put(seen("old", 3, subnet, "1.1.1.3"));
        assert_eq!(told(&taken), ["+10.244.1.0/24 1.1.1.3"]);
        let refused = nodes.put(seen("young", 7, subnet, "1.1.1.8"));
        assert_eq!((told(&refused), refused.rival.as_deref()), (vec![], Some("old")));
        let gone = nodes.remove("old");
        assert_eq!(
            (told(&gone), gone.heirs),
            (vec!["-10.244.1.0/24".into()], vec!["young".into()])
        );
        // who had nothing leaves without a word
        nodes.put(seen("young", 7, subnet, "1.1.1.8"));
        nodes.put(seen("third", 8, subnet, "1.1.1.9"));
        assert_eq!(told(&nodes.remove("third")), [""; 0]);

        let all = vec![seen("young", 7, subnet, "1.1.1.7"), seen("old", 3, subnet, "1.1.1.3")];
        let (leases, rivals) = nodes.reset(all);
        assert_eq!(leases.iter().map(|lease| lease.created).collect::<Vec<_>>(), [3]);
        assert_eq!(rivals, [("young".into(), "old".into())]);
    }

    #[test]
    fn what_is_wrong_is_said() {
        let wrong = seen("a", 1, "bad", "1.1.1.1").standing;
        assert!(matches!(wrong, Standing::Wrong(reason) if reason.contains("no prefix")));
        let wrong = seen("a", 1, "10.244.1.0/24", "here").standing;
        assert!(matches!(wrong, Standing::Wrong(reason) if reason.contains("public-ip")));
    }
}
