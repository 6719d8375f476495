//! Kubernetes as a store: a lease is a node's podCIDR and what its agent has written as annotations of the node
//! (control-plane spec 6).
//!
//! ```text
//!   (pod ->) own node -> Config -> identify, acquire -> annotations -> Acquired -> list -> Snapshot -> watch -> Event ...
//!                ^                                           |                      ^                    |
//!                +------------- something changed -----------+                      +---- 410 Gone ------+
//! ```
//!
//! * **Heart-beats cost next to nothing.** The watch shows metadata only, in protobuf. A node is read, alone and whole, when it
//!   is new or its annotations of ours have changed: podCIDR, which is not in the metadata, never changes while a node lives.
//! * **Nothing is forgotten while the server is away**: the watch goes on from where it was; if the server cannot, the list of
//!   metadata says which nodes must be read again.
//! * **Every list is as cheap as it can be** for a server with 5,000 agents: from its cache, in protobuf, at moments of chance.

pub mod annotations;
mod failure;
mod listing;
mod nodes;
mod own;
mod request;
mod stream;
mod unary;
mod watch;
mod wire;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use self::annotations::Prefix;
use self::listing::Listing;
use self::nodes::Nodes;
use self::own::Own;
use self::request::Answer;
use self::stream::Frames;
use self::unary::Task;
use super::complaints::Complaints;
use super::trouble::Trouble;
use super::turn::Turn;
use super::{Identity, Lane, Now, PublicAddresses, Store, StoreEvent, StoreRequest};
use crate::backoff::{Backoff, Chance};
use crate::config::NetworkConfig;
use crate::http::{HttpEvent, Request};
use crate::lease::LeaseAttrs;

/// Waits between tries of a server that is away.
const RETRY_FIRST: Duration = Duration::from_millis(200);
/// Waits for something that only an operator, or another part of the cluster, can put right.
const WAIT_FIRST: Duration = Duration::from_secs(1);
const WAIT_CAP: Duration = Duration::from_secs(15);
/// Waits before our annotations are written again when somebody else writes them, too.
const FIGHT_FIRST: Duration = Duration::from_secs(1);
const FIGHT_CAP: Duration = Duration::from_secs(60);
/// What is done on the unary lane, in the order of urgency.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Job {
    /// Finding out which node this is.
    Name,
    /// Reading our own node.
    Own,
    /// Writing our annotations.
    Publish,
    /// Listing the nodes.
    List,
    /// Reading one node that is new or has changed.
    Fetch,
    /// Setting our node's condition.
    Condition,
}

/// What a trouble is about.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Subject {
    /// One of the jobs.
    Job(Job),
    /// Opening the watch.
    Watch,
    /// Hearing from it.
    Stream,
    /// Reaching the server at all.
    Server,
}

impl From<Job> for Subject {
    fn from(job: Job) -> Self {
        Self::Job(job)
    }
}

/// How this host knows its node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Who {
    /// It was told.
    Node(String),
    /// By the pod that it runs in.
    Pod {
        /// Namespace of the pod.
        namespace: String,
        /// Its name.
        name: String,
    },
}

/// What the store must know.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Which node this is.
    pub who: Who,
    /// Prefix of annotations.
    pub prefix: Prefix,
    /// The network config, which is a file of this host.
    pub config: NetworkConfig,
    /// Set the node's condition once the network works.
    pub set_condition: bool,
    /// The servers, for messages and for their number.
    pub endpoints: Vec<String>,
    /// What the credentials are, for messages.
    pub credential: String,
}

/// The store.
#[derive(Debug)]
pub struct Kube {
    name: String,
    who: Who,
    prefix: Prefix,
    config: NetworkConfig,
    /// The backend follows nobody.
    alone: bool,
    endpoints: Vec<String>,
    credential: String,
    set_condition: bool,
    chance: Chance,

    /// The agent has heard of the config.
    begun: bool,
    addresses: PublicAddresses,
    /// How many peers there were in an earlier life.
    expected: usize,
    attrs: Option<LeaseAttrs>,
    ready: bool,
    own: Own,
    nodes: Nodes,
    /// A list is wanted, or being read.
    listing: Option<Listing>,
    listed: bool,
    cursor: Option<String>,
    /// Nodes to be read, and how fresh.
    queue: BTreeMap<Box<str>, String>,
    /// The one that was read last.
    read_last: Box<str>,
    /// Nodes that are looked at again.
    pending: BTreeMap<Box<str>, (Instant, Backoff)>,

    task: Option<Task>,
    unary: Turn,
    /// Until when a job is left alone.
    waits: BTreeMap<Job, Instant>,
    backoffs: BTreeMap<Job, Backoff>,
    watch: Turn,
    watch_answer: Answer,
    frames: Frames,
    watch_open: bool,
    /// Something was heard since it was opened.
    watch_heard: bool,
    /// The watch has failed: our own node is read before it is opened again.
    watch_broken: bool,
    cancel_watch: bool,
    endpoint: usize,
    /// Failures of servers since the last success.
    failures: usize,
    troubles: BTreeMap<Subject, Trouble>,
    complaints: Complaints,
    events: VecDeque<StoreEvent>,
}

impl Kube {
    /// A store. `random` seeds jitter.
    pub fn new(setup: Setup, random: u64) -> Self {
        let Setup { who, prefix, config, set_condition, endpoints, credential } = setup;
        // also while a pod does not know its node yet
        let of = match &who {
            Who::Node(name) => format!("node {name}"),
            Who::Pod { namespace, .. } => format!("pods of {namespace}"),
        };
        let name = format!("kubernetes {} {of}", prefix.as_str());
        let turn = |seed| Turn::new(RETRY_FIRST, Duration::from_secs(60), seed);
        Self {
            name,
            who,
            prefix,
            alone: config.backend_type == "alloc",
            config,
            endpoints,
            credential,
            chance: Chance::new(random),
            set_condition,
            begun: false,
            addresses: PublicAddresses::default(),
            expected: 0,
            attrs: None,
            ready: false,
            own: Own::new(random),
            nodes: Nodes::default(),
            listing: None,
            listed: false,
            cursor: None,
            queue: BTreeMap::new(),
            read_last: Box::default(),
            pending: BTreeMap::new(),
            task: None,
            unary: turn(random),
            waits: BTreeMap::new(),
            backoffs: BTreeMap::new(),
            watch: turn(random ^ 0x5555),
            watch_answer: Answer::default(),
            frames: Frames::default(),
            watch_open: false,
            watch_heard: false,
            watch_broken: false,
            cancel_watch: false,
            endpoint: 0,
            failures: 0,
            troubles: BTreeMap::new(),
            complaints: Complaints::default(),
            events: VecDeque::new(),
        }
    }

    /// The name of our node, if it is known.
    fn node_name(&self) -> &str {
        match &self.who {
            Who::Node(name) => name,
            Who::Pod { .. } => "",
        }
    }

    /// The next exchange on the unary lane.
    fn next_task(&mut self, now: Now) -> Option<(Job, Request)> {
        let may = |job: Job| !self.waits.contains_key(&job);
        if let Who::Pod { namespace, name } = &self.who {
            return may(Job::Name).then(|| (Job::Name, self.get_pod(namespace, name)));
        }
        if self.own.due && may(Job::Own) {
            return Some((Job::Own, self.get_node(self.node_name(), "")));
        }
        if !self.own.changes.is_empty() && may(Job::Publish) {
            return Some((Job::Publish, self.patch(self.annotations_patch())));
        }
        if let Some(listing) = self.listing.as_ref().filter(|_| may(Job::List)) {
            let request = self.list(listing.metadata_only, listing.freshness, &listing.next);
            return Some((Job::List, request));
        }
        if self.listing.is_none()
            && may(Job::Fetch)
            && let Some((name, version)) = self.next_wanted()
        {
            return Some((Job::Fetch, self.get_node(name, version)));
        }
        if self.wants_condition() && may(Job::Condition) {
            return Some((Job::Condition, self.patch(Self::condition_patch(now))));
        }
        None
    }

    /// Must our node's condition be set?
    fn wants_condition(&self) -> bool {
        let unset = self.own.node.as_ref().is_some_and(|node| !node.has_network);
        unset && self.set_condition && self.ready && self.own.lease.is_some()
    }
}

impl Store for Kube {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn describe(&self) -> String {
        format!(
            "Kubernetes nodes at {}, annotations {}",
            self.endpoints.join(","),
            self.prefix.as_str()
        )
    }

    fn known_config(&self) -> Option<&NetworkConfig> {
        Some(&self.config)
    }

    fn public_addresses(&self) -> PublicAddresses {
        self.addresses
    }

    fn identify(&mut self, identity: Identity, _now: Now) {
        self.expected = identity.peers;
        self.events.push_back(StoreEvent::Found(self.found()));
    }

    fn acquire(&mut self, attrs: LeaseAttrs, now: Now) {
        self.attrs = Some(attrs);
        self.settle(now.mono);
        self.begin_list(now.mono);
    }

    fn set_ready(&mut self) {
        self.ready = true;
    }

    fn status(&self, out: &mut String) {
        let _ = writeln!(out, "nodes {}", self.nodes.len());
        let _ = writeln!(out, "nodes_ignored {}", self.complaints.iter().len());
        for (node, reason) in self.complaints.iter().take(20) {
            let _ = writeln!(out, "node_ignored {node} {reason}");
        }
    }

    fn poll_request(&mut self, now: Now) -> Option<StoreRequest> {
        if std::mem::take(&mut self.cancel_watch) {
            self.watch.busy = false;
            return Some(StoreRequest::Cancel(Lane::Watch));
        }
        self.unary.refresh(now.mono);
        self.watch.refresh(now.mono);
        self.waits.retain(|_, at| *at > now.mono);
        let due: Vec<Box<str>> = self
            .pending
            .iter()
            .filter(|(_, (at, _))| *at <= now.mono)
            .map(|(name, _)| name.clone())
            .collect();
        for name in due {
            if let Some((at, backoff)) = self.pending.get_mut(&name) {
                *at = now.mono + backoff.failed();
            }
            self.want(name, self.cursor.clone().unwrap_or_default(), now.mono);
        }
        if self.unary.may_start(now.mono)
            && let Some((job, request)) = self.next_task(now)
        {
            return Some(self.start(job, request));
        }
        if !self.watch.may_start(now.mono) || self.listing.is_some() || self.watch_broken {
            return None;
        }
        let cursor = self.cursor.clone()?;
        let seconds = 300 + self.chance.draw() % 300;
        self.watch.busy = true;
        Some(StoreRequest::Start(Lane::Watch, self.watch(&cursor, seconds)))
    }

    fn poll_event(&mut self) -> Option<StoreEvent> {
        self.events.pop_front()
    }

    fn handle_http(&mut self, lane: Lane, event: HttpEvent<'_>, now: Now) {
        match lane {
            Lane::Unary => self.handle_unary(event, now),
            Lane::Watch => self.handle_watch(event, now),
        }
    }

    fn poll_timeout(&self) -> Option<Instant> {
        let watch = self.watch.not_before.filter(|_| !self.watch.busy);
        if self.unary.busy {
            return watch;
        }
        let pending = self.pending.values().map(|(at, _)| *at);
        let unary = self.waits.values().copied().chain(pending).chain(self.unary.not_before).min();
        watch.into_iter().chain(unary).min()
    }
}
