//! Backends: which kernel objects carry the packets to a lease. A backend decides and declares; `kernel` and `forward` do.

mod alloc;
mod host_gw;
mod peer;
mod udp;
mod vxlan;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::config::NetworkConfig;
use crate::forward;
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

impl Underlay {
    fn need_public_v4(&self, backend: &str) -> Result<Ipv4Addr, BackendError> {
        self.public_v4.ok_or_else(|| self.no_public_address(backend, "IPv4", "--public-ip"))
    }

    fn need_public_v6(&self, backend: &str) -> Result<Ipv6Addr, BackendError> {
        self.public_v6.ok_or_else(|| self.no_public_address(backend, "IPv6", "--public-ipv6"))
    }

    fn no_public_address(&self, backend: &str, family: &str, flag: &str) -> BackendError {
        BackendError(format!(
            "the {backend} backend has no {family} address to tell its peers, and the network config enables {family}: \
             give {} one, choose another --iface, or set {flag}",
            self.name
        ))
    }
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
    pub forward: Vec<(IpNet, IpAddr)>,
    /// Why one of the peer's families cannot be used, when the other can.
    pub trouble: Option<PeerError>,
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
    /// What the userspace data plane of this backend is to do, if it has one.
    fn forward(&self) -> Option<&forward::Settings> {
        None
    }
    /// The TUN device is open under this name. Only for a backend with [`Backend::forward`], and before its
    /// [`Backend::host_objects`] are asked for.
    fn set_tun(&mut self, name: IfName) {
        let _ = name;
    }
}

/// What the lease of this host must have for the families that the network config enables.
impl Subnets {
    fn need_v4(&self) -> Result<Ipv4Net, BackendError> {
        self.v4.ok_or_else(|| self.lacks("IPv4"))
    }

    fn need_v6(&self) -> Result<Ipv6Net, BackendError> {
        self.v6.ok_or_else(|| self.lacks("IPv6"))
    }

    fn lacks(&self, family: &str) -> BackendError {
        BackendError(format!(
            "this host's lease {self} has no {family} subnet, which the network config enables"
        ))
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
    Ok(match config.backend_type.to_ascii_lowercase().as_str() {
        "alloc" => Box::new(alloc::Alloc::new(config, underlay)?),
        "host-gw" => Box::new(host_gw::HostGw::new(config, underlay)?),
        "udp" => Box::new(udp::Udp::new(config, underlay)?),
        "vxlan" => Box::new(vxlan::Vxlan::new(config, underlay, memory)?),
        "" => {
            return Err(BackendError(format!(
                "the network config has a Backend without a Type: set it to {KNOWN}"
            )));
        }
        other if ELSEWHERE.contains(&other) => {
            return Err(BackendError(format!(
                "backend type {other:?} is not in this build; it has {KNOWN}"
            )));
        }
        other => {
            return Err(BackendError(format!(
                "unknown backend type {other:?}; this build has {KNOWN}"
            )));
        }
    })
}

/// The backends of this build, for messages.
const KNOWN: &str = "alloc, host-gw, udp, vxlan";
/// Backends that the Go flanneld has or had.
const ELSEWHERE: [&str; 8] =
    ["ipip", "wireguard", "ipsec", "extension", "tencent-vpc", "aws-vpc", "gce", "ali-vpc"];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::FamilyConfig;

    /// Two hosts on one segment: this one is .11, its subnets end in 1; [`lease`] is .12's, whose subnets end in 2.
    pub(super) fn underlay() -> Underlay {
        Underlay {
            name: IfName::new("eth0").unwrap(),
            mtu: 1500,
            local_v4: Some([192, 168, 0, 11].into()),
            local_v6: Some("fd01::11".parse().unwrap()),
            public_v4: Some([192, 168, 0, 11].into()),
            public_v6: Some("fd01::11".parse().unwrap()),
            public_v4_is_local: true,
            public_v6_is_local: true,
        }
    }

    pub(super) fn own() -> Subnets {
        Subnets { v4: "10.5.1.0/24".parse().ok(), v6: "fd00:5:0:1::/64".parse().ok() }
    }

    pub(super) fn lease(backend_type: &str) -> Lease {
        Lease {
            subnets: Subnets { v4: "10.5.2.0/24".parse().ok(), v6: "fd00:5:0:2::/64".parse().ok() },
            attrs: LeaseAttrs {
                public_ip: Some([192, 168, 0, 12].into()),
                public_ipv6: Some("fd01::12".parse().unwrap()),
                backend_type: backend_type.into(),
                ..LeaseAttrs::default()
            },
            created: 1,
        }
    }

    pub(super) fn dual(backend_type: &str, options: &str) -> NetworkConfig {
        NetworkConfig {
            v4: Some(FamilyConfig {
                network: "10.5.0.0/16".parse().unwrap(),
                subnet_len: 24,
                subnet_min: [10, 5, 1, 0].into(),
                subnet_max: [10, 5, 255, 0].into(),
            }),
            v6: Some(FamilyConfig {
                network: "fd00:5::/48".parse().unwrap(),
                subnet_len: 64,
                subnet_min: "fd00:5:0:1::".parse().unwrap(),
                subnet_max: "fd00:5:0:ffff::".parse().unwrap(),
            }),
            backend_type: backend_type.into(),
            backend: options.into(),
            enable_nftables: false,
            document: String::new(),
        }
    }

    pub(super) fn v4(backend_type: &str, options: &str) -> NetworkConfig {
        NetworkConfig { v6: None, ..dual(backend_type, options) }
    }

    pub(super) fn v6(backend_type: &str, options: &str) -> NetworkConfig {
        NetworkConfig { v4: None, ..dual(backend_type, options) }
    }

    fn named(backend_type: &str) -> Result<&'static str, String> {
        let made = create(&v4(backend_type, "{}"), &underlay(), &Memory::default());
        made.map(|backend| backend.name()).map_err(|error| error.0)
    }

    #[test]
    fn types_by_name_whatever_the_case() {
        for (typed, name) in
            [("alloc", "alloc"), ("Host-GW", "host-gw"), ("udp", "udp"), ("VXLAN", "vxlan")]
        {
            assert_eq!(named(typed), Ok(name));
        }
    }

    #[test]
    fn other_types_are_refused_with_what_there_is() {
        for (typed, says) in [
            ("", "without a Type"),
            ("WireGuard", "not in this build"),
            ("vxlam", "unknown backend type \"vxlam\""),
        ] {
            let error = named(typed).unwrap_err();
            assert!(error.contains(says) && error.contains(KNOWN), "{error}");
        }
    }

    #[test]
    fn options_must_be_an_object() {
        for kind in ["udp", "vxlan"] {
            assert!(create(&v4(kind, "[]"), &underlay(), &Memory::default()).is_err());
        }
    }
}
