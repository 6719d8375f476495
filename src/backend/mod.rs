//! Backends: which kernel objects carry the packets to a lease. A backend decides and declares; `kernel` and `forward` do.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;

use crate::config::NetworkConfig;
use crate::kernel::{IfName, Mac, Object};
use crate::lease::{Lease, LeaseAttrs, Subnets};

/// The underlay interface and addresses that were chosen at start (control-plane spec 3).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Underlay {
    /// Interface name.
    pub name: IfName,
    /// Interface MTU in bytes.
    pub mtu: u32,
    /// The interface's own IPv4 address.
    pub local_v4: Option<Ipv4Addr>,
    /// The interface's own IPv6 address.
    pub local_v6: Option<Ipv6Addr>,
    /// The IPv4 address that peers are told; differs from `local_v4` behind NAT.
    pub public_v4: Option<Ipv4Addr>,
    /// The IPv6 address that peers are told.
    pub public_v6: Option<Ipv6Addr>,
    /// `public_v4` is an address of this host (on any interface).
    pub public_v4_is_local: bool,
    /// `public_v6` is an address of this host (on any interface).
    pub public_v6_is_local: bool,
}

/// What this host knows of its own past, for keeping MAC addresses over restarts, reboots and re-created devices.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Memory {
    /// MAC addresses of the links that exist now, by name.
    pub live_macs: Vec<(IfName, Mac)>,
    /// The attributes that our own lease carries in the store, or in the saved view.
    pub published: Option<LeaseAttrs>,
    /// 12 random bytes for MAC addresses that must be made up.
    pub random: [u8; 12],
}

/// What one peer needs.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PeerPlan {
    /// Kernel objects.
    pub objects: Vec<Object>,
    /// Entries of the userspace forwarding table (udp backend).
    pub forward: Vec<(IpNet, SocketAddr)>,
}

/// Which families of a peer's underlay addresses are on-link here, so that a direct route works (backends spec 2.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Direct {
    /// Its IPv4 public address is.
    pub v4: bool,
    /// Its IPv6 public address is.
    pub v6: bool,
}

/// The backend cannot work on this host with this config. The text says what, where and what to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BackendError(pub String);

impl fmt::Display for BackendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BackendError {}

/// A peer's data cannot be used; it harms that peer only.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerError(pub String);

impl fmt::Display for PeerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for PeerError {}

/// The verbs that the agent uses on any backend. All of them are pure.
pub trait Backend: fmt::Debug {
    /// Name as in the config: `vxlan`.
    fn name(&self) -> &'static str;
    /// What this host publishes with its lease.
    fn attrs(&self) -> LeaseAttrs;
    /// The MTU for the containers, written to the subnet file.
    fn mtu(&self) -> u32;
    /// What this host itself needs: devices, addresses.
    ///
    /// # Errors
    /// The lease lacks an enabled family.
    fn host_objects(&self, own: &Subnets) -> Result<Vec<Object>, BackendError>;
    /// What a peer needs. `direct` is only looked at when [`Backend::watches_paths`].
    ///
    /// # Errors
    /// The peer's data are unusable.
    fn peer_plan(&self, peer: &Lease, direct: Direct) -> Result<PeerPlan, PeerError>;
    /// Must the agent ask the kernel whether peers' public addresses are on-link?
    fn watches_paths(&self) -> bool {
        false
    }
    /// Does this backend follow other hosts' leases at all?
    fn follows_peers(&self) -> bool {
        true
    }
    /// Devices of this backend: everything of ours on them that no lease needs is stale.
    fn devices(&self) -> Vec<IfName> {
        Vec::new()
    }
    /// The UDP port of the userspace data plane, if this backend has one.
    fn forward_port(&self) -> Option<u16> {
        None
    }
}

/// Makes the backend that `config` names.
///
/// # Errors
/// Unknown type, bad options, or a host on which it cannot work.
pub fn create(
    config: &NetworkConfig,
    underlay: &Underlay,
    memory: &Memory,
) -> Result<Box<dyn Backend>, BackendError> {
    let _ = (underlay, memory);
    Err(BackendError(format!("unknown backend type {:?}", config.backend_type)))
}
