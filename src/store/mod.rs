//! Where leases live. A store is a plain value: it decides which HTTP exchanges it wants, is told how they went, and
//! yields [`StoreEvent`]s. It owns no socket and no clock.

mod complaints;
pub mod etcd;
pub mod kube;
mod trouble;
mod turn;

use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::{Instant, SystemTime};

use crate::config::NetworkConfig;
use crate::http::{HttpEvent, Request};
use crate::lease::{Lease, LeaseAttrs, LeaseEvent, OwnLease, Subnets};

/// A store has two exchanges in flight at most, one on each lane; a lane keeps its connection alive between exchanges.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Lane {
    /// Short requests with one answer.
    Unary,
    /// The long watch.
    Watch,
}

/// What the loop must do for the store.
#[derive(Debug)]
pub enum StoreRequest {
    /// Start this exchange on this lane. The lane is free: the last exchange on it ended or was cancelled.
    Start(Lane, Request),
    /// Drop the exchange that is under way on this lane, together with its connection. No further event is delivered for it.
    Cancel(Lane),
}

/// Who this host is, for finding its own lease among the others.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Identity {
    /// Advertised IPv4 address.
    pub public_ip: Option<Ipv4Addr>,
    /// Advertised IPv6 address.
    pub public_ipv6: Option<Ipv6Addr>,
    /// The subnets this host had in its last life (subnet.env or the saved view), if any.
    pub previous: Subnets,
    /// How many peers it had then.
    pub peers: usize,
}

/// The clock readings of one wake-up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Now {
    /// Monotonic, for deadlines.
    pub mono: Instant,
    /// Wall clock, for lease expiry only.
    pub wall: SystemTime,
}

/// What a store tells the agent.
#[derive(Debug, PartialEq, Eq)]
pub enum StoreEvent {
    /// The network config is there and valid. Sent once; the agent answers with [`Store::identify`].
    Config(Box<NetworkConfig>),
    /// The leases were listed; this is the one that carries our public address, if any. The agent answers with [`Store::acquire`].
    Found(Option<Box<Lease>>),
    /// The lease is ours, in the store. Also sent when, after a loss, a lease on other subnets was taken.
    Acquired(Box<OwnLease>),
    /// Our lease was extended, or somebody else changed its time to live.
    Renewed(Box<OwnLease>),
    /// Our lease is gone from the store or belongs to another host now (the text says which); a new `Acquired` follows. The
    /// data plane stays as it is until then.
    Lost(String),
    /// Every lease at one moment, our own included if we have one: complete, so what is not in it is gone. Also sent while a
    /// lost lease is being replaced.
    Snapshot(Vec<Lease>),
    /// One change after the last snapshot. Our own lease's changes never appear here.
    Event(LeaseEvent),
    /// Something keeps the store from working. Said once per distinct trouble, not once per try.
    Trouble(String),
    /// The trouble is over.
    Recovered,
}

/// Addresses that the store's operator has set for this host; they go before the flags.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PublicAddresses {
    /// Instead of `-public-ip`.
    pub v4: Option<Ipv4Addr>,
    /// Instead of `-public-ipv6`.
    pub v6: Option<Ipv6Addr>,
}

/// The verbs that the agent uses on any store.
pub trait Store: std::fmt::Debug {
    /// What tells this store's leases from those of another one, for the view saved on disk.
    fn name(&self) -> String;
    /// For the log: what and where this store is, without secrets.
    fn describe(&self) -> String;
    /// Tells the store who we are; it lists the leases and answers [`StoreEvent::Found`].
    fn identify(&mut self, identity: Identity, now: Now);
    /// Takes the lease, publishing `attrs`; then watches and renews by itself. Called again later, it publishes changed attributes.
    fn acquire(&mut self, attrs: LeaseAttrs, now: Now);
    /// The network config, if it does not take the store's servers to know it.
    fn known_config(&self) -> Option<&NetworkConfig> {
        None
    }
    /// What the store's operator has set for this host; known with the network config.
    fn public_addresses(&self) -> PublicAddresses {
        PublicAddresses::default()
    }
    /// The network works on this host. Said once.
    fn set_ready(&mut self) {}
    /// `name value` lines for operators: what the store knows and nobody else does.
    fn status(&self, out: &mut String) {
        let _ = out;
    }
    /// The next thing to do for the store, until `None`.
    fn poll_request(&mut self, now: Now) -> Option<StoreRequest>;
    /// The next thing that the store has to say, until `None`.
    fn poll_event(&mut self) -> Option<StoreEvent>;
    /// How the exchange on `lane` is going. After [`HttpEvent::Done`] or [`HttpEvent::Failed`] the lane is free.
    fn handle_http(&mut self, lane: Lane, event: HttpEvent<'_>, now: Now);
    /// When [`Store::poll_request`] wants to be called next, if nothing happens.
    fn poll_timeout(&self) -> Option<Instant>;
}
