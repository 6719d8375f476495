//! Lists of nodes, and nodes that are read one by one: what each says, and when which is due.

use std::collections::BTreeSet;
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
/// A node that takes part and has no podCIDR is looked at again; seldom, if that goes on.
const PENDING_FIRST: Duration = Duration::from_secs(5);
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
            changed: Vec::new(),
        }
    }
}

impl Kube {
    /// A moment of chance, sooner in a small cluster.
    pub(super) fn jitter(&mut self, nodes: usize) -> Duration {
        let nodes = u32::try_from(nodes).unwrap_or(u32::MAX);
        let most = JITTER_PER_NODE.saturating_mul(nodes).min(JITTER_CAP);
        let share = u32::try_from(self.random() % 1000).unwrap_or(0);
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
        }
        self.listing = Some(Listing::new(metadata_only, freshness));
        let nodes = if self.listed {
            self.nodes.len()
        } else {
            self.identity.map_or(0, |identity| identity.peers)
        };
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
        if !listing.metadata_only {
            let seen = Seen::new(wire::decode(bytes)?, &self.prefix, &self.config);
            if *seen.name != *own {
                listing.seen.push(seen);
            }
            return Ok(());
        }
        let metadata = wire::decode::<Metadata>(bytes)?.metadata.unwrap_or_default();
        let published = self.prefix.read(&metadata.annotations);
        let print = published.print(&metadata.uid);
        let name: Box<str> = metadata.name.into();
        if *name == *own {
            self.own.due |= self.own.node.as_ref().is_none_or(|node| node.print != print);
            return Ok(());
        }
        if !self.nodes.knows(&name, print) {
            listing.changed.push(name.clone());
        }
        listing.names.insert(name);
        Ok(())
    }

    /// We have a lease: now the others matter.
    pub(super) fn begin_list(&mut self, now: Instant) {
        if self.own.lease.is_some() && !self.listed && self.listing.is_none() {
            self.list_again(false, Freshness::Any, now);
        }
    }

    /// A store that was set back has forgotten what we know, and would say nothing until it has caught up.
    pub(super) fn notice_setback(&mut self, version: &str, now: Instant) {
        let number = |text: &str| text.parse::<u64>().ok();
        let cursor = self.cursor.as_deref().and_then(number);
        if self.listing.is_none()
            && cursor.zip(number(version)).is_some_and(|(cursor, now)| now < cursor)
        {
            info!("the API server's store was set back: listing again");
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
        if !listing.metadata_only {
            let mut seen = listing.seen;
            seen.iter_mut().for_each(|seen| self.judge(seen, now));
            let (leases, rivals) = self.nodes.reset(seen);
            for (name, rival) in rivals {
                self.contested(&name, &rival);
            }
            self.listed = true;
            self.events.push_back(StoreEvent::Snapshot(leases));
            return;
        }
        let gone = self.nodes.names().filter(|name| !listing.names.contains(*name));
        for name in gone.map(Into::into).collect::<Vec<Box<str>>>() {
            self.handle_deleted(&name);
        }
        for name in listing.changed {
            self.queue.insert(name, listing.version.clone());
        }
        self.check_queue(now);
    }

    /// So many nodes may have changed that they are listed rather than read.
    pub(super) fn check_queue(&mut self, now: Instant) {
        if self.queue.len() > MANY && self.listing.is_none() {
            debug!("{} nodes have changed: listing all", self.queue.len());
            self.list_again(false, Freshness::Cursor, now);
        }
    }

    pub(super) fn handle_fetched(&mut self, task: Task, now: Instant) {
        if task.outdated {
            return;
        }
        match task.node {
            None => self.handle_deleted(&task.name),
            Some(mut seen) => {
                self.judge(&mut seen, now);
                let name = seen.name.clone();
                let outcome = self.nodes.put(seen);
                self.tell_outcome(&name, outcome);
            }
        }
    }

    /// Notes what is wrong with a node, and forgets what was.
    pub(super) fn judge(&mut self, seen: &mut Seen, now: Instant) {
        let ours = self.own.lease.as_ref().map(|own| own.lease.subnets);
        if matches!(&seen.standing, Standing::Peer(lease) if Some(lease.subnets) == ours) {
            seen.standing = Standing::Wrong("its podCIDR is that of this host".into());
        }
        let Standing::Wrong(reason) = &seen.standing else {
            self.complaints.forget(&seen.name);
            self.pending.remove(&seen.name);
            return;
        };
        let text = format!("node {:?} is ignored: {reason}", seen.name);
        self.complaints.note(&seen.name, reason, &text);
        // a podCIDR that comes late is not to be seen in the metadata
        let seed = self.random();
        if self.pending.len() < PENDING || self.pending.contains_key(&seen.name) {
            let fresh = || (now, Backoff::new(PENDING_FIRST, PENDING_CAP, seed));
            let (at, backoff) = self.pending.entry(seen.name.clone()).or_insert_with(fresh);
            *at = now + backoff.failed();
        }
    }

    pub(super) fn contested(&mut self, name: &str, rival: &str) {
        let reason = format!("its podCIDR is that of the older node {rival:?}");
        self.complaints.note(name, &reason, &format!("node {name:?} is ignored: {reason}"));
    }

    pub(super) fn tell_outcome(&mut self, name: &str, outcome: Outcome) {
        self.events.extend(outcome.events.into_iter().map(StoreEvent::Event));
        if let Some(heir) = outcome.heir {
            self.queue.insert(heir, String::new());
        }
        if let Some(rival) = outcome.rival {
            self.contested(name, &rival);
        }
    }

    pub(super) fn handle_deleted(&mut self, name: &str) {
        self.queue.remove(name);
        self.pending.remove(name);
        self.complaints.forget(name);
        if let Some(task) =
            self.task.as_mut().filter(|task| task.job == Job::Fetch && *task.name == *name)
        {
            task.outdated = true;
        }
        let outcome = self.nodes.remove(name);
        self.tell_outcome(name, outcome);
    }
}
