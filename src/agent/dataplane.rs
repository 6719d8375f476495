//! What one network has on this host: its backend, the peers, the kernel objects and, for the udp backend, the packets.
//! Built from a network config and an own lease, wherever those came from: the store, or the view saved on disk.

mod tunnel;

use std::net::IpAddr;
use std::time::Instant;

use log::{debug, info, warn};
use mio::Registry;

use self::tunnel::Tunnel;
use super::throttle::{Throttle, throttled};
use crate::backend::{Backend, BackendError, Direct, PeerPlan, Underlay};
use crate::config::NetworkConfig;
use crate::kernel::{KernelEvent, Owner, Reconciler};
use crate::lease::table::{Change, LeaseTable};
use crate::lease::{Lease, LeaseEvent, Subnets};
use crate::sys::netlink::Netlink;

/// How far this host's own objects have come.
#[derive(Debug, PartialEq, Eq)]
enum Host {
    /// Not declared, or on their way.
    Pending,
    /// In the kernel.
    Programmed,
    /// Refused, with the reason.
    Failed(String),
}

/// How far the first view of the peers has come.
#[derive(Debug, PartialEq, Eq)]
enum Filling {
    /// Nobody has told us about peers yet.
    Waiting,
    /// Declared at this time, not all written yet.
    Since(Instant),
    /// Every object is in the kernel, or was refused at least once.
    Done,
}

/// The data plane of one network.
#[derive(Debug)]
pub(super) struct Dataplane {
    config: NetworkConfig,
    underlay: Underlay,
    backend: Box<dyn Backend>,
    kernel: Reconciler,
    netlink: Netlink,
    tunnel: Option<Tunnel>,
    peers: LeaseTable,
    host: Host,
    filling: Filling,
    log: Throttles,
}

/// One throttle for each sort of line that peers can cause.
#[derive(Debug, Default)]
struct Throttles {
    refused: Throttle,
    failed: Throttle,
    healed: Throttle,
    joined: Throttle,
}

impl Dataplane {
    pub(super) fn config(&self) -> &NetworkConfig {
        &self.config
    }

    pub(super) fn underlay(&self) -> &Underlay {
        &self.underlay
    }

    pub(super) fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    /// Every lease that is known, refused ones included.
    pub(super) fn leases(&self) -> impl Iterator<Item = &Lease> {
        self.peers.leases()
    }

    /// Declares what this host itself needs for its lease on `own`.
    pub(super) fn set_own(&mut self, own: Subnets, now: Instant) -> Result<(), BackendError> {
        let objects = self.backend.host_objects(&own)?;
        self.host = Host::Pending;
        self.kernel.declare(Owner::Host, objects, now);
        let changes = self.peers.set_own(own);
        self.apply(changes, now);
        Ok(())
    }

    /// Every lease there is. `complete` says that it comes from the store and not from a saved view, so that what is not
    /// in it may be removed from the kernel.
    pub(super) fn handle_snapshot(&mut self, leases: Vec<Lease>, complete: bool, now: Instant) {
        if self.backend.follows_peers() {
            let changes = self.peers.reset(leases);
            if self.filling == Filling::Waiting {
                info!("{} peers known, {} of them refused", self.peers.len(), self.peers.refused().count());
            }
            self.apply(changes, now);
        }
        if self.filling == Filling::Waiting {
            self.filling = Filling::Since(now);
        }
        if complete {
            self.kernel.sweep();
        }
    }

    /// One change. Returns whether anything is different now.
    pub(super) fn handle_lease_event(&mut self, event: LeaseEvent, now: Instant) -> bool {
        if !self.backend.follows_peers() {
            return false;
        }
        let changes = self.peers.apply(event);
        let changed = !changes.is_empty();
        self.apply(changes, now);
        changed
    }

    fn apply(&mut self, changes: Vec<Change>, now: Instant) {
        for change in changes {
            match change {
                Change::Added(lease) => {
                    self.announce(now, "peer", &lease);
                    self.plan(&lease, now);
                }
                Change::Updated { old, new } => {
                    self.announce(now, "peer changed:", &new);
                    self.forget_paths(&old);
                    self.plan(&new, now);
                }
                Change::Removed(lease) => {
                    self.announce(now, "peer gone:", &lease);
                    self.forget(&lease, now);
                }
                Change::Refused { lease, reason } => {
                    throttled!(self.log.refused, now, warn, "lease {} refused: {reason}", lease.subnets);
                    self.forget(&lease, now);
                }
            }
        }
    }

    /// Lines about single peers make sense once the first view is in; before, there is one line about all of them.
    fn announce(&mut self, now: Instant, what: &str, lease: &Lease) {
        if self.filling == Filling::Waiting {
            debug!("{what} {}", lease.subnets);
        } else {
            throttled!(self.log.joined, now, info, "{what} {}", lease.subnets);
        }
    }

    /// Declares what one peer needs; what it needed before and does not need now goes away with it.
    fn plan(&mut self, lease: &Lease, now: Instant) {
        let direct = if self.backend.watches_paths() { self.watch_paths(lease) } else { Direct::default() };
        let plan = self.backend.peer_plan(lease, direct).unwrap_or_else(|error| {
            PeerPlan { trouble: Some(error), ..PeerPlan::default() }
        });
        if let Some(trouble) = plan.trouble {
            throttled!(self.log.refused, now, warn, "peer {}: {trouble}", lease.subnets);
        }
        self.kernel.declare(Owner::Peer(lease.subnets), plan.objects, now);
        if let Some(tunnel) = &mut self.tunnel {
            tunnel.set_routes(lease.subnets, &plan.forward);
        }
    }

    fn forget(&mut self, lease: &Lease, now: Instant) {
        self.forget_paths(lease);
        self.kernel.withdraw(Owner::Peer(lease.subnets), now);
        if let Some(tunnel) = &mut self.tunnel {
            tunnel.set_routes(lease.subnets, &[]);
        }
    }

    fn watch_paths(&mut self, lease: &Lease) -> Direct {
        let mut ask = |ip: Option<IpAddr>| {
            ip.is_some_and(|ip| {
                self.kernel.watch_path(ip);
                self.kernel.direct(ip).unwrap_or(false)
            })
        };
        Direct { v4: ask(lease.attrs.public_ip.map(IpAddr::V4)), v6: ask(lease.attrs.public_ipv6.map(IpAddr::V6)) }
    }

    fn forget_paths(&mut self, lease: &Lease) {
        if self.backend.watches_paths() {
            let attrs = &lease.attrs;
            let addresses = [attrs.public_ip.map(IpAddr::V4), attrs.public_ipv6.map(IpAddr::V6)];
            addresses.into_iter().flatten().for_each(|ip| self.kernel.unwatch_path(ip));
        }
    }

    fn handle_kernel_event(&mut self, event: KernelEvent, now: Instant) {
        let _ = (event, now);
    }

    /// Why the data plane is not ready to carry packets, if it is not.
    pub(super) fn unready(&self) -> Option<String> {
        match (&self.host, &self.filling) {
            (Host::Failed(reason), _) => Some(reason.clone()),
            (Host::Pending, _) => Some("this host's device and address are not in place".into()),
            (Host::Programmed, Filling::Waiting) => Some("waiting for the list of peers".into()),
            (Host::Programmed, Filling::Since(_)) => Some("peers are being programmed".into()),
            (Host::Programmed, Filling::Done) => None,
        }
    }
}
