//! What one network has on this host: its backend, the peers, the kernel objects and, for the udp backend, the packets.
//! Built from a network config, wherever that came from: the store, or the view saved on disk.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::net::IpAddr;
use std::time::Instant;

use ipnet::IpNet;
use log::{debug, info, warn};
use mio::{Registry, Token};

use super::tunnel::Tunnel;
use super::{Fatal, token};
use crate::backend::{Backend, Direct, PeerPlan, Underlay};
use crate::config::NetworkConfig;
use crate::kernel::{KernelEvent, Object, Owner, Port, Progress, Reconciler, Scope};
use crate::lease::table::{Change, LeaseTable};
use crate::lease::{Lease, LeaseEvent, Subnets};
use crate::sys::random;
use crate::throttle::{Throttle, throttled};

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
    port: Port,
    tunnel: Option<Tunnel>,
    /// Our subnet gets a blackhole route.
    blackhole: bool,
    own: Option<Subnets>,
    peers: LeaseTable,
    /// Whose underlay addresses are watched, and by which peers.
    watched: BTreeMap<IpAddr, BTreeSet<Subnets>>,
    filling: Filling,
    /// The kernel's sockets or its desired state need a turn.
    kernel_due: bool,
    tunnel_due: bool,
    log: Throttles,
}

/// One throttle for each sort of line that others can cause.
#[derive(Debug, Default)]
struct Throttles {
    refused: Throttle,
    failed: Throttle,
    healed: Throttle,
    joined: Throttle,
    swept: Throttle,
}

impl Dataplane {
    /// Opens the descriptors.
    pub(super) fn open(
        config: NetworkConfig,
        underlay: Underlay,
        mut backend: Box<dyn Backend>,
        blackhole: bool,
        registry: &Registry,
        now: Instant,
    ) -> Result<Self, Fatal> {
        let tunnel = Tunnel::open(&mut *backend, registry)?;
        let mut port =
            Port::open().map_err(|error| Fatal(format!("open netlink sockets: {error}")))?;
        port.register(registry, token::NETLINK_REPLIES, token::NETLINK_NOTICES)
            .map_err(|error| Fatal(format!("watch netlink sockets: {error}")))?;
        let (v4, v6) = (config.v4.map(|v4| v4.network), config.v6.map(|v6| v6.network));
        let mut seed = [0; 8];
        random::fill(&mut seed).map_err(|error| Fatal(format!("read random bytes: {error}")))?;
        let scope = Scope {
            networks: config.networks().collect(),
            devices: backend.devices(),
            vxlan_port: vxlan_port(),
            port: port.number(),
            seed: u64::from_ne_bytes(seed),
        };
        Ok(Self {
            kernel: Reconciler::new(scope, now),
            peers: LeaseTable::new(v4, v6),
            config,
            underlay,
            backend,
            port,
            tunnel,
            blackhole,
            own: None,
            watched: BTreeMap::new(),
            filling: Filling::Waiting,
            kernel_due: true,
            tunnel_due: false,
            log: Throttles::default(),
        })
    }

    /// Lets go of the descriptors; what is in the kernel stays.
    pub(super) fn close(mut self, registry: &Registry) {
        if let Err(error) = self.port.deregister(registry) {
            debug!("forget netlink sockets: {error}");
        }
    }

    pub(super) fn config(&self) -> &NetworkConfig {
        &self.config
    }

    pub(super) fn underlay(&self) -> &Underlay {
        &self.underlay
    }

    pub(super) fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    /// Every lease that is known but our own, refused ones included.
    pub(super) fn leases(&self) -> impl Iterator<Item = &Lease> {
        self.peers.leases()
    }

    /// Declares what this host itself needs for its lease on `own`.
    pub(super) fn set_own(&mut self, own: Subnets, now: Instant) -> Result<(), Fatal> {
        let mut objects =
            self.backend.host_objects(&own).map_err(|error| Fatal(error.to_string()))?;
        if self.blackhole {
            let subnets = own.v4.map(IpNet::V4).into_iter().chain(own.v6.map(IpNet::V6));
            objects.extend(subnets.map(Object::Blackhole));
        }
        self.kernel.declare(Owner::Host, objects);
        self.kernel_due = true;
        self.own = Some(own);
        let changes = self.peers.set_own(own, &judge(&*self.backend));
        self.apply(changes, now);
        Ok(())
    }

    /// Every lease there is. `complete` says that it comes from the store and not from a saved view, so that what is not
    /// in it may be removed from the kernel.
    pub(super) fn handle_snapshot(&mut self, leases: Vec<Lease>, complete: bool, now: Instant) {
        if self.backend.follows_peers() {
            let changes = self.peers.reset(leases, &judge(&*self.backend));
            self.apply(changes, now);
            if self.filling == Filling::Waiting {
                info!(
                    "{} peers known, {} leases refused",
                    self.peers.len(),
                    self.peers.refused().count()
                );
            }
        }
        if self.filling == Filling::Waiting {
            self.filling = Filling::Since(now);
        }
        if complete {
            self.kernel.sweep();
        }
        self.kernel_due = true;
    }

    /// One change. Returns whether anything is different now.
    pub(super) fn handle_lease_event(&mut self, event: LeaseEvent, now: Instant) -> bool {
        if !self.backend.follows_peers() {
            return false;
        }
        let changes = self.peers.apply(event, &judge(&*self.backend));
        let changed = !changes.is_empty();
        self.apply(changes, now);
        changed
    }

    fn apply(&mut self, changes: Vec<Change>, now: Instant) {
        for change in changes {
            match change {
                Change::Added(lease) => {
                    self.announce(now, "joined", &lease);
                    self.enter(&lease, now);
                }
                Change::Updated { old, new } => {
                    self.announce(now, "changed", &new);
                    self.forget_old_paths(&old, &new);
                    self.enter(&new, now);
                }
                Change::Removed(lease) => {
                    self.announce(now, "left", &lease);
                    self.forget(&lease);
                }
                Change::Refused { lease, reason } => {
                    throttled!(
                        self.log.refused,
                        now,
                        warn,
                        "lease {} is refused: {reason}",
                        lease.subnets
                    );
                    self.forget(&lease);
                }
            }
        }
    }

    /// Lines about single peers make sense once the first view is in; before, there is one line about all of them.
    fn announce(&mut self, now: Instant, what: &str, lease: &Lease) {
        if self.filling == Filling::Waiting {
            debug!("peer {} {what}", lease.subnets);
        } else {
            throttled!(self.log.joined, now, info, "peer {} {what}", lease.subnets);
        }
    }

    fn enter(&mut self, lease: &Lease, now: Instant) {
        self.watch_paths(lease);
        self.plan(lease, now);
    }

    /// Declares what one peer needs; what it needed before and does not need now goes away with it.
    fn plan(&mut self, lease: &Lease, now: Instant) {
        let Some(direct) = self.direct(lease) else {
            // the kernel will say whether the peer's address is on-link
            self.kernel_due = true;
            return;
        };
        let plan = self
            .backend
            .peer_plan(lease, direct)
            .unwrap_or_else(|error| PeerPlan { trouble: Some(error), ..PeerPlan::default() });
        if let Some(trouble) = plan.trouble {
            throttled!(self.log.refused, now, warn, "peer {}: {trouble}", lease.subnets);
        }
        self.kernel.declare(Owner::Peer(lease.subnets), plan.objects);
        self.kernel_due = true;
        if let Some(tunnel) = &mut self.tunnel {
            tunnel.set_routes(lease.subnets, &plan.forward);
        }
    }

    fn forget(&mut self, lease: &Lease) {
        self.unwatch_paths(lease);
        self.kernel.withdraw(Owner::Peer(lease.subnets));
        self.kernel_due = true;
        if let Some(tunnel) = &mut self.tunnel {
            tunnel.set_routes(lease.subnets, &[]);
        }
    }

    /// Which of a peer's addresses are on-link; `None` while one of them is being found out.
    fn direct(&self, lease: &Lease) -> Option<Direct> {
        if !self.backend.watches_paths() {
            return Some(Direct::default());
        }
        let ask = |ip: Option<IpAddr>| ip.map_or(Some(false), |ip| self.kernel.direct(ip));
        let [v4, v6] = addresses(lease);
        Some(Direct { v4: ask(v4)?, v6: ask(v6)? })
    }

    fn watch_paths(&mut self, lease: &Lease) {
        if !self.backend.watches_paths() {
            return;
        }
        for ip in addresses(lease).into_iter().flatten() {
            let peers = self.watched.entry(ip).or_default();
            if peers.is_empty() {
                self.kernel.watch_path(ip);
            }
            peers.insert(lease.subnets);
        }
    }

    fn unwatch_paths(&mut self, lease: &Lease) {
        self.unwatch(lease.subnets, addresses(lease));
    }

    fn forget_old_paths(&mut self, old: &Lease, new: &Lease) {
        let kept = addresses(new);
        self.unwatch(
            old.subnets,
            addresses(old).map(|ip| ip.filter(|ip| !kept.contains(&Some(*ip)))),
        );
    }

    fn unwatch(&mut self, peer: Subnets, ips: [Option<IpAddr>; 2]) {
        for ip in ips.into_iter().flatten() {
            let Some(peers) = self.watched.get_mut(&ip) else { continue };
            peers.remove(&peer);
            if peers.is_empty() {
                self.watched.remove(&ip);
                self.kernel.unwatch_path(ip);
            }
        }
    }

    fn handle_kernel_event(&mut self, event: KernelEvent, now: Instant) {
        match event {
            KernelEvent::Healed { object, how } => {
                throttled!(
                    self.log.healed,
                    now,
                    warn,
                    "{object} was {how} by something else on this host: put back"
                );
            }
            KernelEvent::Failed { object, owner, reason, retry_in } => {
                let seconds = retry_in.as_secs();
                throttled!(
                    self.log.failed,
                    now,
                    error,
                    "cannot set {object} for {owner}: {reason}; next try in {seconds} s"
                );
            }
            KernelEvent::Remade { link, reason } => {
                warn!(
                    "device {link} does not fit, {reason}: it is made anew, which interrupts its traffic for a moment"
                );
            }
            KernelEvent::Clash { holder, other, object } => {
                throttled!(
                    self.log.refused,
                    now,
                    warn,
                    "{other} asks for {object}, which {holder} has otherwise: not set"
                );
            }
            KernelEvent::Swept(object) => {
                throttled!(self.log.swept, now, info, "removed stale {object}");
            }
            KernelEvent::Leftover(object) => {
                warn!(
                    "{object} leads into the network, but no lease needs it and it is not known to be ours: if an earlier \
                     flanneld left it, remove it with `ip route del` (there may be more of them)"
                );
            }
            KernelEvent::PathChanged(ip) => {
                for peer in self.watched.get(&ip).cloned().unwrap_or_default() {
                    if let Some(lease) = self.peers.get(&peer) {
                        self.plan(&lease, now);
                    }
                }
            }
        }
    }

    /// An event of one of our descriptors.
    pub(super) fn handle_ready(&mut self, token: Token) {
        match token {
            token::NETLINK_REPLIES | token::NETLINK_NOTICES => self.kernel_due = true,
            token => {
                self.tunnel_due = true;
                if let Some(tunnel) = &mut self.tunnel {
                    tunnel.handle_ready(token);
                }
            }
        }
    }

    /// Does what is due, within budgets. Returns whether anything but packets was moved.
    pub(super) fn turn(&mut self, now: Instant) -> Result<bool, Fatal> {
        let mut stirred = false;
        if self.kernel.poll_timeout().is_some_and(|at| at <= now) {
            self.kernel.handle_timeout(now);
            self.kernel_due = true;
        }
        if self.kernel_due {
            stirred = true;
            self.kernel_due = self
                .port
                .turn(&mut self.kernel, now)
                .map_err(|error| Fatal(format!("netlink socket: {error}")))?;
            while let Some(event) = self.kernel.poll_event() {
                self.handle_kernel_event(event, now);
            }
            self.note_progress(now);
        }
        if let Some(tunnel) = &mut self.tunnel {
            let due = self.tunnel_due || tunnel.poll_timeout(now).is_some_and(|at| at <= now);
            self.tunnel_due = false;
            if due && tunnel.turn(&mut *self.backend, now) {
                stirred = true;
                if let Some(own) = self.own {
                    self.set_own(own, now)?;
                }
            }
        }
        Ok(stirred)
    }

    fn note_progress(&mut self, now: Instant) {
        let Filling::Since(start) = self.filling else { return };
        if !self.kernel.is_settled() {
            return;
        }
        self.filling = Filling::Done;
        let took = now.saturating_duration_since(start).as_millis();
        match self.kernel.missing() {
            0 => info!(
                "all {} peers programmed in {took} ms, {} kernel writes",
                self.peers.len(),
                self.kernel.writes()
            ),
            missing => warn!(
                "{} peers programmed in {took} ms, but {missing} of their kernel objects could not be set yet",
                self.peers.len()
            ),
        }
    }

    /// When [`Dataplane::turn`] wants to be called next, if nothing happens.
    pub(super) fn poll_timeout(&self, now: Instant) -> Option<Instant> {
        let tunnel = self.tunnel.as_ref().and_then(|tunnel| tunnel.poll_timeout(now));
        let kernel = if self.kernel_due { Some(now) } else { self.kernel.poll_timeout() };
        tunnel.into_iter().chain(kernel).min()
    }

    /// `name value` lines for the status page.
    pub(super) fn status(&self, out: &mut String) {
        let _ = writeln!(out, "backend {}", self.backend.name());
        let _ = writeln!(out, "mtu {}", self.backend.mtu());
        let _ = writeln!(out, "peers {}", self.peers.len());
        let _ = writeln!(out, "leases_refused {}", self.peers.refused().count());
        let _ = writeln!(out, "kernel_objects_missing {}", self.kernel.missing());
        let _ = writeln!(out, "kernel_writes {}", self.kernel.writes());
        if let Some(tunnel) = &self.tunnel {
            tunnel.status(out);
        }
    }

    /// Are this host's own device and address in place?
    pub(super) fn host_is_up(&self) -> bool {
        self.kernel.progress(Owner::Host) == Some(Progress::Programmed)
    }

    /// Why the data plane is not ready to carry packets, if it is not.
    pub(super) fn unready(&self) -> Option<String> {
        match self.kernel.progress(Owner::Host) {
            None => return Some("this host has no lease yet".into()),
            Some(Progress::Pending) => {
                return Some("this host's device and address are not in place".into());
            }
            Some(Progress::Failed(reason)) => return Some(reason),
            Some(Progress::Programmed) => {}
        }
        if self.tunnel.as_ref().is_some_and(|tunnel| !tunnel.is_up()) {
            return Some("the TUN device is gone".into());
        }
        match self.filling {
            Filling::Waiting => Some("waiting for the list of peers".into()),
            Filling::Since(_) => Some("peers are being programmed".into()),
            Filling::Done => None,
        }
    }
}

/// A lease that the backend can make nothing of must not keep others from its addresses.
fn judge(backend: &dyn Backend) -> impl Fn(&Lease) -> Result<(), String> {
    move |lease| {
        backend.peer_plan(lease, Direct::default()).map(drop).map_err(|error| error.to_string())
    }
}

fn addresses(lease: &Lease) -> [Option<IpAddr>; 2] {
    [lease.attrs.public_ip.map(IpAddr::V4), lease.attrs.public_ipv6.map(IpAddr::V6)]
}

/// The UDP port of VXLAN devices that are made without one.
fn vxlan_port() -> u16 {
    const LINUX: u16 = 8472;
    let text = fs::read_to_string("/sys/module/vxlan/parameters/udp_port");
    text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(LINUX)
}
