//! The udp backend's data plane as one part of a network: its descriptors, its routes, and what happens when somebody
//! deletes its device.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use log::{info, warn};
use mio::{Registry, Token};

use super::{Fatal, token};
use crate::backend::Backend;
use crate::forward::{Drops, Family, Offload, Plane, Reason, Settings, Stats, Turn};
use crate::lease::Subnets;

/// A `%d` becomes the first free number, as with Go nodes.
const DEVICE: &str = "flannel%d";
/// A device that cannot be made is tried again after this.
const RETRY: Duration = Duration::from_secs(1);
/// Drops are told this long after the first one, all in one line.
const DROPS_AFTER: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(super) struct Tunnel {
    plane: Plane,
    routes: BTreeMap<Subnets, Vec<IpNet>>,
    more: bool,
    /// The device is gone, and a new one is due then.
    reopen_at: Option<Instant>,
    /// What was dropped up to the last line about it.
    told: Stats,
    tell_at: Option<Instant>,
}

impl Tunnel {
    /// Opens device and sockets, if the backend has a userspace data plane at all.
    pub(super) fn open(
        backend: &mut dyn Backend,
        registry: &Registry,
    ) -> Result<Option<Self>, Fatal> {
        let Some(settings) = backend.forward().cloned() else { return Ok(None) };
        let mut plane = Plane::open(DEVICE, &settings).map_err(|error| Fatal(error.to_string()))?;
        backend.set_tun(plane.tun().name());
        info!("{}", describe(&plane, &settings));
        plane
            .register(registry, token::TUN, [token::UDP_V4, token::UDP_V6])
            .map_err(|error| Fatal(format!("watch the tunnel's descriptors: {error}")))?;
        Ok(Some(Self {
            plane,
            routes: BTreeMap::new(),
            more: true,
            reopen_at: None,
            told: Stats::default(),
            tell_at: None,
        }))
    }

    /// These are the routes of one peer from now on.
    pub(super) fn set_routes(&mut self, peer: Subnets, routes: &[(IpNet, IpAddr)]) {
        let before = self.routes.remove(&peer).unwrap_or_default();
        for subnet in before.iter().filter(|subnet| !routes.iter().any(|(kept, _)| kept == *subnet))
        {
            self.plane.del_route(*subnet);
        }
        let set: Vec<IpNet> = routes
            .iter()
            .filter(|(subnet, hop)| self.plane.set_route(*subnet, *hop))
            .map(|(subnet, _)| *subnet)
            .collect();
        if !set.is_empty() {
            self.routes.insert(peer, set);
        }
    }

    /// An event of one of our descriptors.
    pub(super) fn handle_ready(&mut self, token: Token) {
        match token {
            token::TUN => self.plane.tun_is_ready(),
            token::UDP_V4 => self.plane.udp_is_ready(Family::V4),
            _ => self.plane.udp_is_ready(Family::V6),
        }
    }

    /// Moves packets. Returns whether the device was made anew, so that it must be set up again.
    pub(super) fn turn(&mut self, backend: &mut dyn Backend, now: Instant) -> bool {
        self.tell_drops(now);
        if let Some(at) = self.reopen_at {
            return at <= now && self.reopen(backend, now);
        }
        let gone = match self.plane.turn(now) {
            Ok(turn) => {
                self.more = turn == Turn::More;
                None
            }
            Err(gone) => Some(gone.0),
        };
        while let Some(demotion) = self.plane.poll_demotion() {
            let name = Offload::ALL.iter().find(|(offload, _)| *offload == demotion.offload);
            warn!(
                "offload {} does not work here ({}): off from now on, nothing was lost; \
                 Backend.Offloads can switch it off for good",
                name.map_or("?", |(_, name)| name),
                demotion.error
            );
        }
        let Some(error) = gone else { return false };
        warn!("device {} is gone: {error}; making it anew", self.plane.tun().name());
        self.more = false;
        self.reopen(backend, now)
    }

    /// What is for the link only is of no interest: every kernel sends it on every device.
    fn tell_drops(&mut self, now: Instant) {
        let drops = self.plane.engine.stats.drops;
        let counts = || {
            let since = |reason| drops.count(reason) - self.told.drops.count(reason);
            Drops::REASONS.into_iter().filter_map(move |(reason, name)| {
                let count = since(reason);
                (count > 0 && reason != Reason::LinkScope).then_some((name, count))
            })
        };
        match self.tell_at {
            None if counts().next().is_some() => self.tell_at = Some(now + DROPS_AFTER),
            Some(at) if at <= now => {
                let mut line = String::new();
                counts().for_each(|(name, count)| {
                    let _ = write!(line, " {name} {count}");
                });
                info!("packets dropped in the last minute:{line}");
                self.told = self.plane.engine.stats;
                self.tell_at = None;
            }
            _ => {}
        }
    }

    fn reopen(&mut self, backend: &mut dyn Backend, now: Instant) -> bool {
        match self.plane.reopen_tun() {
            Ok(()) => {
                backend.set_tun(self.plane.tun().name());
                self.reopen_at = None;
                self.more = true;
                true
            }
            Err(error) => {
                if self.reopen_at.replace(now + RETRY).is_none() {
                    warn!("{error}; trying again every second");
                }
                false
            }
        }
    }

    /// `name value` lines for the status page.
    pub(super) fn status(&self, out: &mut String) {
        let Stats { sent, delivered, replies, drops } = self.plane.engine.stats;
        let _ = writeln!(out, "device {}", self.plane.tun().name());
        let _ = writeln!(out, "offloads {}", self.plane.offloads());
        let _ = writeln!(out, "packets_sent {sent}");
        let _ = writeln!(out, "packets_delivered {delivered}");
        let _ = writeln!(out, "icmp_replies {replies}");
        for (reason, name) in Drops::REASONS {
            let _ = writeln!(out, "dropped_{name} {}", drops.count(reason));
        }
    }

    pub(super) fn poll_timeout(&self, now: Instant) -> Option<Instant> {
        self.reopen_at.or(self.more.then_some(now)).into_iter().chain(self.tell_at).min()
    }

    pub(super) fn is_up(&self) -> bool {
        self.reopen_at.is_none()
    }
}

/// One line on how packets go.
fn describe(plane: &Plane, settings: &Settings) -> String {
    let locals = [
        settings.v4.map(|side| IpAddr::V4(side.local)),
        settings.v6.map(|side| IpAddr::V6(side.local)),
    ];
    let locals: Vec<String> = locals.into_iter().flatten().map(|local| local.to_string()).collect();
    let mut line = format!(
        "packets go between {} and UDP port {} of {}; offloads: {}",
        plane.tun().name(),
        settings.port,
        locals.join(" and "),
        plane.offloads()
    );
    let missing: Vec<&str> = Offload::ALL
        .iter()
        .filter(|(offload, _)| settings.offloads.has(*offload) && !plane.offloads().has(*offload))
        .map(|(_, name)| *name)
        .collect();
    if !missing.is_empty() {
        let _ = write!(line, "; this kernel has no {}", missing.join(" "));
    }
    if settings.check_source {
        line.push_str("; sources are checked");
    }
    line
}
