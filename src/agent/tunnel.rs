//! The udp backend's data plane as one part of a network: its descriptors, its routes, and what happens when somebody
//! deletes its device.

use std::collections::BTreeMap;
use std::net::{SocketAddr, SocketAddrV4};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use log::{info, warn};
use mio::Registry;

use super::{Fatal, token};
use crate::backend::{Backend, Underlay};
use crate::config::NetworkConfig;
use crate::forward::{Engine, Plane, Table, Turn};
use crate::lease::Subnets;
use crate::sys::tun::Tun;
use crate::sys::udp::UdpPort;

/// A `%d` becomes the first free number, as with Go nodes.
const DEVICE: &str = "flannel%d";
/// A device that cannot be made is tried again after this.
const RETRY: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Tunnel {
    plane: Plane,
    routes: BTreeMap<Subnets, Vec<IpNet>>,
    more: bool,
    /// The device is gone, and a new one is due then.
    reopen_at: Option<Instant>,
}

impl Tunnel {
    /// Opens device and socket, if the backend has a userspace data plane at all.
    pub(super) fn open(
        backend: &mut dyn Backend,
        config: &NetworkConfig,
        underlay: &Underlay,
        registry: &Registry,
    ) -> Result<Option<Self>, Fatal> {
        let Some(port) = backend.forward_port() else { return Ok(None) };
        let (Some(v4), Some(local)) = (config.v4, underlay.local_v4) else {
            return Err(Fatal(format!("the {} backend needs IPv4", backend.name())));
        };
        let tun = Tun::open(DEVICE).map_err(|error| Fatal(error.to_string()))?;
        backend.set_tun(tun.name());
        let udp = UdpPort::bind(SocketAddrV4::new(local, port))
            .map_err(|error| Fatal(error.to_string()))?;
        let engine = Engine::new(Table::new(v4.network, v4.subnet_len));
        info!("packets go between {} and UDP port {port} of {local}", tun.name());
        let mut plane = Plane::new(engine, tun, udp, backend.mtu());
        plane
            .register(registry, token::TUN, token::UDP)
            .map_err(|error| Fatal(format!("watch the tunnel's descriptors: {error}")))?;
        Ok(Some(Self { plane, routes: BTreeMap::new(), more: false, reopen_at: None }))
    }

    /// These are the routes of one peer from now on.
    pub(super) fn set_routes(&mut self, peer: Subnets, routes: &[(IpNet, SocketAddr)]) {
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

    /// Moves packets. Returns whether the device was made anew, so that it must be set up again.
    pub(super) fn turn(
        &mut self,
        backend: &mut dyn Backend,
        registry: &Registry,
        now: Instant,
    ) -> bool {
        if let Some(at) = self.reopen_at {
            return at <= now && self.reopen(backend, registry, now);
        }
        match self.plane.turn(now) {
            Ok(turn) => {
                self.more = turn == Turn::More;
                false
            }
            Err(gone) => {
                warn!("device {} is gone: {}; making it anew", self.plane.tun().name(), gone.0);
                self.more = false;
                self.reopen(backend, registry, now)
            }
        }
    }

    fn reopen(&mut self, backend: &mut dyn Backend, registry: &Registry, now: Instant) -> bool {
        let made = Tun::open(DEVICE).and_then(|tun| {
            let name = tun.name();
            self.plane.replace_tun(tun, registry, token::TUN).map(|()| name)
        });
        match made {
            Ok(name) => {
                backend.set_tun(name);
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

    pub(super) fn poll_timeout(&self, now: Instant) -> Option<Instant> {
        self.reopen_at.or(self.more.then_some(now))
    }

    pub(super) fn is_up(&self) -> bool {
        self.reopen_at.is_none()
    }
}
