//! Lists of nodes, and nodes that are read one by one: what each says, and when which is due.

use std::collections::BTreeSet;
use std::ops::Bound;
use std::time::{Duration, Instant};

use log::{debug, info};

use super::nodes::{Outcome, Seen, Standing};
use super::request::Freshness;
use super::unary::Task;
use super::wire::{self, Metadata};
use super::{Job, Kube, Who};
use crate::backoff::Backoff;
use crate::store::StoreEvent;

/// A list waits up to so long for each node that there is, so that agents that start together do not all list together.
const JITTER_PER_NODE: Duration = Duration::from_millis(1);
const JITTER_CAP: Duration = Duration::from_secs(10);
/// A node that takes part, has no podCIDR and is silent is looked at again; seldom, if that goes on.
const PENDING_FIRST: Duration = Duration::from_secs(30);
const PENDING_CAP: Duration = Duration::from_secs(600);
/// So many nodes are looked at like that.
const PENDING: usize = 1000;
/// When so many nodes have changed at once, a list of all is cheaper than reading each.
const MANY: usize = 256;

/// A list that is wanted or being read.
#[derive(Debug)]
pub(super) struct Listing {
    pub(super) metadata_only: bool,
    pub(super) freshness: Freshness,
    pub(super) version: String,
    pub(super) next: String,
    /// Of whole nodes.
    pub(super) seen: Vec<Seen>,
    /// Of metadata.
    pub(super) names: BTreeSet<Box<str>>,
    /// Our own node, if it was there.
    own: Option<u64>,
    pub(super) changed: Vec<Box<str>>,
}

impl Listing {
    pub(super) fn new(metadata_only: bool, freshness: Freshness) -> Self {
        Self {
            metadata_only,
            freshness,
            version: String::new(),
            next: String::new(),
            seen: Vec::new(),
            names: BTreeSet::new(),
            own: None,
            changed: Vec::new(),
        }
    }

    /// From now on it comes from etcd. Returns whether that is new.
    pub(super) fn go_fresh(&mut self) -> bool {
        std::mem::replace(&mut self.freshness, Freshness::Now) != Freshness::Now
    }
}

impl Kube {
    /// A moment of chance, sooner in a small cluster.
    pub(super) fn jitter(&mut self, nodes: usize) -> Duration {
        let nodes = u32::try_from(nodes).unwrap_or(u32::MAX);
        let most = JITTER_PER_NODE.saturating_mul(nodes).min(JITTER_CAP);
        let share = u32::try_from(self.chance.draw() % 1000).unwrap_or(0);
        most * share / 1000
    }

    /// Nodes must be listed: because there never was a list, or because changes were missed.
    pub(super) fn list_again(&mut self, metadata_only: bool, freshness: Freshness, now: Instant) {
        self.cancel_watch |= self.watch.busy;
        self.watch_open = false;
        let metadata_only = metadata_only && self.listed;
        if !metadata_only {
            self.queue.clear();
            self.pending.clear();
            self.done(Job::Fetch);
        }
        self.listing = Some(Listing::new(metadata_only, freshness));
        let nodes = if self.listed { self.nodes.len() } else { self.expected };
        let wait = self.jitter(nodes);
        self.waits.insert(Job::List, now + wait);
    }

    /// An item of the list of nodes.
    pub(super) fn handle_listed(&mut self, bytes: &[u8]) -> Result<(), String> {
        let own = match &self.who {
            Who::Node(name) => &**name,
            Who::Pod { .. } => "",
        };
        let Some(listing) = &mut self.listing else { return Ok(()) };
        let (name, print) = if listing.metadata_only {
            let metadata = wire::decode::<Metadata>(bytes)?.metadata.unwrap_or_default();
            let print = self.prefix.print(&metadata.annotations, &metadata.uid);
            (metadata.name.into(), print)
        } else {
            let seen = Seen::new(wire::decode(bytes)?, &self.prefix, &self.config);
            let (name, print) = (seen.name.clone(), seen.print);
            if *name != *own {
                listing.seen.push(seen);
            }
            (name, print)
        };
        if *name == *own {
            listing.own = Some(print);
        } else if listing.metadata_only {
            if !self.nodes.knows(&name, print) {
                listing.changed.push(name.clone());
            }
            listing.names.insert(name);
        }
        Ok(())
    }

    /// We have a lease: now the others matter.
    pub(super) fn begin_list(&mut self, now: Instant) {
        if self.own.lease.is_some() && !self.listed && self.listing.is_none() {
            self.list_again(false, Freshness::Known, now);
        }
    }

    /// A store that was set back has forgotten what we knew when we asked, and would say nothing until it has caught up.
    pub(super) fn notice_setback(&mut self, task: &Task, now: Instant) {
        let number = |text: &str| text.parse::<u64>().ok();
        let known = task.cursor.as_deref().and_then(number);
        let is_back = known.zip(number(&task.version)).is_some_and(|(known, is)| is < known);
        if is_back && self.listing.is_none() {
            info!("the API server's store was set back: listing again");
            self.cursor = None;
            self.list_again(true, Freshness::Now, now);
        }
    }

    pub(super) fn handle_page(&mut self, now: Instant) {
        let Some(listing) = self.listing.take() else { return };
        if !listing.next.is_empty() {
            self.listing = Some(listing);
            return;
        }
        self.done(Job::List);
        self.cursor = Some(listing.version.clone());
        // no watch has told what became of it since it was read
        self.own.due |= listing.own != self.own.node.as_ref().map(|node| node.print);
        if !listing.metadata_only {
            let mut seen = listing.seen;
            seen.iter_mut().for_each(|seen| self.judge(seen, now));
            let (leases, rivals) = self.nodes.reset(seen);
            let nodes = &self.nodes;
            self.complaints.retain(|name| nodes.has(name));
            for (name, rival) in rivals {
                self.contested(&name, &rival, now);
            }
            self.listed = true;
            self.events.push_back(StoreEvent::Snapshot(leases));
            return;
        }
        let gone = self.nodes.names().filter(|name| !listing.names.contains(*name));
        for name in gone.map(Into::into).collect::<Vec<Box<str>>>() {
            self.handle_deleted(&name, now);
        }
        for name in listing.changed {
            self.want(name, listing.version.clone(), now);
        }
        self.check_queue(now);
    }

    /// So many nodes may have changed that they are listed rather than read.
    pub(super) fn check_queue(&mut self, now: Instant) {
        if self.queue.len() > MANY && self.listing.is_none() {
            debug!("{} nodes have changed: listing all", self.queue.len());
            self.list_again(false, Freshness::Known, now);
        }
    }

    pub(super) fn handle_fetched(&mut self, task: Task, now: Instant) {
        if task.outdated {
            return;
        }
        match task.node {
            None => self.handle_deleted(&task.name, now),
            Some(mut seen) => {
                self.judge(&mut seen, now);
                let name = seen.name.clone();
                let outcome = self.nodes.put(seen);
                self.tell_outcome(&name, outcome, now);
            }
        }
    }

    /// Notes what is wrong with a node, and forgets what was.
    pub(super) fn judge(&mut self, seen: &mut Seen, now: Instant) {
        if matches!(&seen.standing, Standing::Peer(lease) if Some(lease.subnets) == self.own.told) {
            seen.standing = Standing::Wrong("its podCIDR is that of this host".into());
        }
        let name = &seen.name;
        let reason = match &seen.standing {
            Standing::Wrong(reason) => reason,
            Standing::Early => "it has no podCIDR",
            Standing::Apart | Standing::Peer(_) => {
                self.complaints.forget(name);
                self.pending.remove(name);
                return;
            }
        };
        self.complaints.note(name, reason, &format!("node {name:?} is ignored: {reason}"), now);
        // its next event may be about a podCIDR, which the metadata does not show; should there be none, it is looked at by and by
        if !matches!(seen.standing, Standing::Early) {
            self.pending.remove(name);
        } else if self.pending.len() < PENDING || self.pending.contains_key(name) {
            let fresh = || (now, Backoff::new(PENDING_FIRST, PENDING_CAP, 0));
            let (at, backoff) = self.pending.entry(name.clone()).or_insert_with(fresh);
            *at = now + backoff.failed();
        }
    }

    /// This node must be read, not older than `version`. A moment later: all agents have heard of it at the same time.
    pub(super) fn want(&mut self, name: Box<str>, version: String, now: Instant) {
        if self.queue.is_empty() && !self.waits.contains_key(&Job::Fetch) {
            let wait = self.jitter(self.nodes.len());
            self.waits.insert(Job::Fetch, now + wait);
        }
        self.queue.insert(name, version);
    }

    /// The node that is read next: each has its turn.
    pub(super) fn next_wanted(&self) -> Option<(&str, &str)> {
        let after = (Bound::Excluded(self.read_last.clone()), Bound::Unbounded);
        let next = self.queue.range(after).next().or_else(|| self.queue.first_key_value());
        next.map(|(name, version)| (&**name, &**version))
    }

    pub(super) fn contested(&mut self, name: &str, rival: &str, now: Instant) {
        let reason = format!("its podCIDR is that of the older node {rival:?}");
        let text = format!("node {name:?} is ignored: {reason}");
        self.complaints.note(name, &reason, &text, now);
    }

    pub(super) fn tell_outcome(&mut self, name: &str, outcome: Outcome, now: Instant) {
        self.events.extend(outcome.events.into_iter().map(StoreEvent::Event));
        for heir in outcome.heirs {
            self.want(heir, self.cursor.clone().unwrap_or_default(), now);
        }
        if let Some(rival) = outcome.rival {
            self.contested(name, &rival, now);
        }
        if let Some(displaced) = outcome.displaced {
            self.contested(&displaced, name, now);
        }
    }

    pub(super) fn handle_deleted(&mut self, name: &str, now: Instant) {
        self.queue.remove(name);
        self.pending.remove(name);
        self.complaints.forget(name);
        if let Some(task) =
            self.task.as_mut().filter(|task| task.job == Job::Fetch && *task.name == *name)
        {
            task.outdated = true;
        }
        let reading = self.task.as_ref().is_some_and(|task| task.job == Job::Fetch);
        if self.queue.is_empty() && !reading {
            self.done(Job::Fetch);
        }
        let outcome = self.nodes.remove(name);
        self.tell_outcome(name, outcome, now);
    }
}
