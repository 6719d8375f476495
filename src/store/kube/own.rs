//! Our own node: what it must have, what we write to it, and what becomes of our lease when others change it.

use std::time::{Duration, Instant};

use log::{info, warn};

use super::annotations::{self, Published};
use super::request::Freshness;
use super::wire::{self, Metadata, Node, NodeConditions};
use super::{FIGHT_CAP, FIGHT_FIRST, Job, Kube, WAIT_CAP, WAIT_FIRST};
use crate::backoff::Backoff;
use crate::lease::{Lease, OwnLease, Subnets};
use crate::store::{Now, StoreEvent};

/// The condition that keeps pods away from a node without a network (control-plane spec 6.9).
const CONDITION: &str = "NetworkUnavailable";
const CONDITION_REASON: &str = "FlannelIsUp";
/// What we wrote has stood for so long: who changes it then does not fight with us.
const PEACE: Duration = Duration::from_secs(600);

/// Our own node and lease.
#[derive(Debug)]
pub(super) struct Own {
    /// As it was when it was last read.
    pub(super) node: Option<OwnNode>,
    /// It must be read, or read again.
    pub(super) due: bool,
    pub(super) lease: Option<OwnLease>,
    /// The subnets that the agent was last told to be ours: others' leases on them mean nothing to it.
    pub(super) told: Option<Subnets>,
    /// Annotations that it does not have as they should be.
    pub(super) changes: Vec<(String, String)>,
    /// What we wrote last. When somebody else writes it, too, we answer slower and slower.
    written: Vec<(String, String)>,
    written_at: Option<Instant>,
    fight: Backoff,
    /// While it is not as it must be it is read again and again.
    retry: Backoff,
}

/// A node, as far as its owner cares.
#[derive(Debug)]
pub(super) struct OwnNode {
    uid: String,
    /// The node's version, not the store's: the server's cache of nodes has seen it, or will in a moment.
    pub(super) version: String,
    pub(super) print: u64,
    published: Published,
    cidrs: Vec<String>,
    created: u64,
    /// Its condition says so.
    pub(super) has_network: bool,
}

impl Own {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            node: None,
            due: true,
            lease: None,
            told: None,
            changes: Vec::new(),
            written: Vec::new(),
            written_at: None,
            fight: Backoff::new(FIGHT_FIRST, FIGHT_CAP, seed),
            retry: Backoff::new(WAIT_FIRST, WAIT_CAP, seed),
        }
    }
}

impl OwnNode {
    /// Reads it, whole.
    pub(super) fn read(kube: &Kube, bytes: &[u8]) -> Result<Self, String> {
        let node: Node = wire::decode(bytes)?;
        let conditions: NodeConditions = wire::decode(bytes)?;
        let has_network = conditions.get(CONDITION).is_some_and(|condition| {
            condition.status == b"False" && condition.reason == CONDITION_REASON.as_bytes()
        });
        let cidrs = node.pod_cidrs().into_iter().map(str::to_owned).collect();
        let metadata = node.metadata.unwrap_or_default();
        let published = kube.prefix.read(&metadata.annotations);
        Ok(Self {
            print: kube.prefix.print(&metadata.annotations, &metadata.uid),
            published,
            cidrs,
            created: metadata.created(),
            version: metadata.resource_version,
            uid: metadata.uid,
            has_network,
        })
    }
}

impl Kube {
    /// Our node was read; `None` says that there is none.
    pub(super) fn handle_own(&mut self, node: Option<OwnNode>, now: Now) {
        let Some(node) = node else {
            self.lose("the node object is gone");
            self.own.node = None;
            self.own.written.clear();
            let name = self.node_name();
            let reason = format!(
                "there is no node called {name:?}: is NODE_NAME right, and has the kubelet registered it?"
            );
            return self.look_again(reason, now.mono);
        };
        if let Some(before) = self.own.node.replace(node) {
            let node = self.own.node.as_ref();
            if node.is_some_and(|node| node.uid != before.uid) {
                info!("the node object was made anew");
                self.own.written.clear();
            }
        }
        self.notice_fight(now.mono);
        self.begin();
        self.settle(now.mono);
    }

    /// Has somebody else written what we had written?
    fn notice_fight(&mut self, now: Instant) {
        let Some(node) = &self.own.node else { return };
        if self.own.written.is_empty() || node.published.carries(&self.prefix, &self.own.written) {
            return;
        }
        self.own.written.clear();
        if self.own.written_at.take().is_some_and(|at| now.saturating_duration_since(at) > PEACE) {
            self.own.fight.succeeded();
        }
        // the first time may be a mistake; what happens again and again is another host with our name
        let first = self.own.fight.failures() == 0;
        let wait = self.own.fight.failed();
        if !first {
            self.waits.insert(Job::Publish, now + wait);
        }
        if self.own.fight.failures() == 2 {
            let name = self.node_name();
            self.tell(
                Job::Publish,
                format!("something else writes our annotations of node {name:?}: does another host have this NODE_NAME?"),
            );
        }
    }

    /// The first word to the agent: what it needs for choosing interface and addresses.
    fn begin(&mut self) {
        let Some(node) = self.own.node.as_ref().filter(|_| !self.begun) else { return };
        match node.published.public_addresses() {
            Ok(addresses) => self.addresses = addresses,
            Err(reason) => {
                warn!("the annotation {}{reason}: it has no effect", self.prefix.as_str());
            }
        }
        self.begun = true;
        self.events.push_back(StoreEvent::Config(Box::new(self.config.clone())));
    }

    /// What the node carries of an earlier life of ours, or of another implementation's.
    pub(super) fn found(&self) -> Option<Box<Lease>> {
        let node = self.own.node.as_ref()?;
        let attrs = node.published.attrs(&self.config).ok()?;
        let nothing = attrs.backend_data.is_none() && attrs.backend_v6_data.is_none();
        let lease =
            Lease { subnets: self.own_subnets().unwrap_or_default(), attrs, created: node.created };
        Some(Box::new(lease)).filter(|_| !nothing)
    }

    /// Compares the node with what it should be: something is to be written, or we have our lease.
    pub(super) fn settle(&mut self, now: Instant) {
        let (Some(node), Some(attrs)) = (&self.own.node, &self.attrs) else { return };
        let subnets = match self.own_subnets() {
            Ok(subnets) => subnets,
            Err(reason) => {
                self.lose(&reason);
                return self.look_again(reason, now);
            }
        };
        self.own.retry.succeeded();
        self.own.changes = self.prefix.changes(attrs, &node.published);
        if !self.own.changes.is_empty() {
            return;
        }
        let lease = Lease { subnets, attrs: attrs.clone(), created: node.created };
        let own = OwnLease { lease, expiry: None };
        self.done(Job::Own);
        self.done(Job::Publish);
        self.backoffs.remove(&Job::Publish);
        let moved = self.own.told.replace(subnets).is_some_and(|before| before != subnets);
        if self.own.lease.as_ref() != Some(&own) {
            self.own.lease = Some(own.clone());
            self.events.push_back(StoreEvent::Acquired(Box::new(own)));
        }
        // leases on the subnets that were ours count now, and those on the ones that are ours do not
        if moved && self.listed {
            self.list_again(false, Freshness::Known, now);
        }
    }

    /// Our subnets, if the node has what the network config wants.
    fn own_subnets(&self) -> Result<Subnets, String> {
        let node = self.own.node.as_ref().ok_or("the node was not read")?;
        let name = self.node_name();
        let cidrs: Vec<&str> = node.cidrs.iter().map(|cidr| &**cidr).collect();
        if cidrs.is_empty() {
            return Err(format!(
                "node {name:?} has no podCIDR yet: kube-controller-manager gives one with --allocate-node-cidrs and --cluster-cidr"
            ));
        }
        let subnets = annotations::subnets(&cidrs, &self.config)
            .map_err(|reason| format!("node {name:?}: {reason}"))?;
        let shown = cidrs.join(",");
        let lacks = |family: &str| {
            Err(format!(
                "node {name:?} has podCIDR {shown}, and the network config enables {family}: give nodes both families, or disable it"
            ))
        };
        let outside = |subnet: &dyn std::fmt::Display, network: &dyn std::fmt::Display| {
            Err(format!(
                "the podCIDR {subnet} of node {name:?} is not a part of the network {network}: the network config must have the cluster's prefix"
            ))
        };
        match (self.config.v4, subnets.v4) {
            (Some(_), None) => return lacks("IPv4"),
            (Some(v4), Some(subnet)) if !v4.network.contains(&subnet) => {
                return outside(&subnet, &v4.network);
            }
            _ => {}
        }
        match (self.config.v6, subnets.v6) {
            (Some(_), None) => lacks("IPv6"),
            (Some(v6), Some(subnet)) if !v6.network.contains(&subnet) => {
                outside(&subnet, &v6.network)
            }
            _ => Ok(subnets),
        }
    }

    /// Tells what is wrong with our node and reads it again after a while.
    fn look_again(&mut self, reason: String, now: Instant) {
        self.own.changes.clear();
        self.own.due = true;
        let wait = self.own.retry.failed();
        self.waits.insert(Job::Own, now + wait);
        self.tell(Job::Own, reason);
    }

    fn lose(&mut self, reason: &str) {
        if self.own.lease.take().is_some() {
            self.events.push_back(StoreEvent::Lost(reason.to_owned()));
        }
    }

    /// Our annotations are written; `answer` is the node's metadata now.
    pub(super) fn handle_published(&mut self, answer: Result<Metadata, String>, now: Instant) {
        self.own.written = std::mem::take(&mut self.own.changes);
        self.own.written_at = Some(now);
        match (answer.ok().and_then(|answer| answer.metadata), &mut self.own.node) {
            (Some(metadata), Some(node)) if metadata.uid == node.uid => {
                node.published = self.prefix.read(&metadata.annotations);
                node.print = self.prefix.print(&metadata.annotations, &metadata.uid);
                node.version = metadata.resource_version;
                let kept = node.published.carries(&self.prefix, &self.own.written);
                self.settle(now);
                if !kept {
                    let reason = format!(
                        "the API server does not keep the annotations that we write to node {:?}: an admission plugin changes them",
                        self.node_name()
                    );
                    self.wait(Job::Publish, reason, Duration::ZERO, now);
                }
            }
            _ => self.own.due = true,
        }
    }

    /// The body of the patch that sets annotations.
    pub(super) fn annotations_patch(&self) -> Vec<u8> {
        let changes =
            self.own.changes.iter().map(|(key, value)| (key.clone(), value.clone().into()));
        let annotations: serde_json::Map<String, serde_json::Value> = changes.collect();
        serde_json::json!({ "metadata": { "annotations": annotations } }).to_string().into_bytes()
    }

    /// The body of the patch that sets the condition.
    pub(super) fn condition_patch(now: Now) -> Vec<u8> {
        let time = humantime::format_rfc3339_seconds(now.wall).to_string();
        serde_json::json!({ "status": { "conditions": [{
            "type": CONDITION,
            "status": "False",
            "reason": CONDITION_REASON,
            "message": "Flannel is running on this node",
            "lastHeartbeatTime": time,
            "lastTransitionTime": time,
        }] } })
        .to_string()
        .into_bytes()
    }
}
