//! One family's end of the VXLAN: its device, its MAC, and what a peer needs on it.

use std::net::IpAddr;

use ipnet::IpNet;

use super::settings::Settings;
use crate::backend::peer::PeerFamily;
use crate::backend::{BackendError, Memory, PeerError, Underlay};
use crate::json::Fields;
use crate::kernel::{Fdb, IfName, Mac, Neighbour, Object, Route};

/// Address family of overlay and underlay alike.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Family {
    V4,
    V6,
}

impl Family {
    fn device_prefix(self) -> &'static str {
        match self {
            Self::V4 => "flannel.",
            Self::V6 => "flannel-v6.",
        }
    }

    /// Outer IP, UDP, VXLAN and inner Ethernet headers, in bytes.
    fn overhead(self) -> u32 {
        match self {
            Self::V4 => 20 + 8 + 8 + 14,
            Self::V6 => 40 + 8 + 8 + 14,
        }
    }

    /// The smallest MTU in bytes that the family allows (RFC 791, RFC 8200).
    fn smallest_mtu(self) -> u32 {
        match self {
            Self::V4 => 68,
            Self::V6 => 1280,
        }
    }
}

/// This host's tunnel end point in one family.
#[derive(Debug)]
pub(super) struct Vtep {
    /// The device.
    pub(super) link: IfName,
    /// Its MTU in bytes.
    pub(super) mtu: u32,
    /// Its MAC, which peers are told.
    pub(super) mac: Mac,
    /// Outer source address.
    pub(super) local: IpAddr,
    /// The address that peers send to.
    pub(super) public: IpAddr,
    /// Where no other address than ours belongs on the device.
    pub(super) exclusive: IpNet,
}

impl Vtep {
    pub(super) fn new(
        family: Family,
        settings: &Settings,
        underlay: &Underlay,
        memory: &Memory,
        public: IpAddr,
        exclusive: IpNet,
    ) -> Result<Self, BackendError> {
        let link = device_name(family, settings.vni)?;
        Ok(Self {
            link,
            mtu: device_mtu(family, settings.mtu, underlay)?,
            mac: choose_mac(family, link, memory),
            local: local_address(family, underlay, public)?,
            public,
            exclusive,
        })
    }

    /// What a peer needs: a neighbour, a forwarding entry and a route, or, when it is `direct`ly reachable, only a route.
    pub(super) fn peer_objects(
        &self,
        peer: &PeerFamily<'_>,
        direct: bool,
    ) -> Result<Vec<Object>, PeerError> {
        let (dst, link) = (peer.subnet, self.link);
        let public = peer.public(&[self.public, self.local])?;
        if direct {
            return Ok(vec![Object::Route(Route {
                dst,
                via: Some(public),
                link: None,
                onlink: false,
            })]);
        }
        let mac = self.peer_mac(peer)?;
        let gateway = dst.addr();
        Ok(vec![
            Object::Neighbour(Neighbour { link, ip: gateway, mac }),
            Object::Fdb(Fdb { link, mac, dst: public }),
            Object::Route(Route { dst, via: Some(gateway), link: Some(link), onlink: true }),
        ])
    }

    fn peer_mac(&self, peer: &PeerFamily<'_>) -> Result<Mac, PeerError> {
        let name = data_name(peer.subnet.addr());
        let data = peer.data.ok_or_else(|| PeerError(format!("publishes no {name}")))?;
        let text =
            Fields::parse(name, data).and_then(|data| data.text("VtepMAC")).map_err(PeerError)?;
        let Some(text) = text.filter(|text| !text.is_empty()) else {
            // A Windows host that is not ready yet.
            return Err(PeerError(format!("publishes no VtepMAC in its {name} (yet)")));
        };
        let mac: Mac = text
            .parse()
            .map_err(|error| PeerError(format!("publishes a VtepMAC that is {error}")))?;
        if !mac.is_unicast() {
            return Err(PeerError(format!("publishes {mac}, which is not a host's MAC")));
        }
        if mac == self.mac {
            return Err(PeerError(format!("publishes {mac}, which is this host's MAC")));
        }
        Ok(mac)
    }
}

fn device_name(family: Family, vni: u32) -> Result<IfName, BackendError> {
    let name = format!("{}{vni}", family.device_prefix());
    IfName::new(&name).ok_or_else(|| {
        // The prefix leaves room for this many digits.
        let digits = 15 - family.device_prefix().len();
        BackendError(format!(
            "Backend.VNI {vni} is too large: the device would be called {name}, longer than the 15 bytes that the kernel \
             allows; choose a VNI up to {}",
            "9".repeat(digits)
        ))
    })
}

/// The kernel allows a device no more than what fits through its underlay, whatever the config says.
fn device_mtu(
    family: Family,
    config: Option<u32>,
    underlay: &Underlay,
) -> Result<u32, BackendError> {
    let base = config.unwrap_or(underlay.mtu).min(underlay.mtu);
    let mtu = base.saturating_sub(family.overhead());
    if mtu >= family.smallest_mtu() {
        return Ok(mtu);
    }
    let source = if base == underlay.mtu {
        format!("the MTU of {}", underlay.name)
    } else {
        "Backend.MTU".into()
    };
    Err(BackendError(format!(
        "{source} is {base}, too small for {} over VXLAN: at least {} are needed",
        match family {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        },
        family.smallest_mtu() + family.overhead(),
    )))
}

/// A live device keeps its MAC, and a device that comes back gets the one that peers know from the lease: what they have
/// programmed goes on working. Else one is made up, marked as locally administered, which also keeps udev from replacing it.
fn choose_mac(family: Family, link: IfName, memory: &Memory) -> Mac {
    let live = memory
        .live_macs
        .iter()
        .find(|(name, mac)| *name == link && mac.is_unicast())
        .map(|(_, mac)| *mac);
    let published = || {
        let attrs = memory.published.as_ref()?;
        let data = match family {
            Family::V4 => attrs.backend_data.as_deref()?,
            Family::V6 => attrs.backend_v6_data.as_deref()?,
        };
        let mac: Mac =
            Fields::parse("own lease", data).ok()?.text("VtepMAC").ok()??.parse().ok()?;
        mac.is_unicast().then_some(mac)
    };
    live.or_else(published).unwrap_or_else(|| {
        let [a, b, c, d, e, f, g, h, i, j, k, l] = memory.random;
        match family {
            Family::V4 => Mac([a & 0xfe | 0x02, b, c, d, e, f]),
            Family::V6 => Mac([g & 0xfe | 0x02, h, i, j, k, l]),
        }
    })
}

/// The kernel drops everything that is sent from an address that it does not have, as behind a 1:1 NAT.
fn local_address(
    family: Family,
    underlay: &Underlay,
    public: IpAddr,
) -> Result<IpAddr, BackendError> {
    let (public_is_local, local) = match family {
        Family::V4 => (underlay.public_v4_is_local, underlay.local_v4.map(IpAddr::V4)),
        Family::V6 => (underlay.public_v6_is_local, underlay.local_v6.map(IpAddr::V6)),
    };
    let usable = if public_is_local { Some(public) } else { local };
    usable.ok_or_else(|| {
        BackendError(format!(
            "the public address {public} is not this host's, and {} has none of its family to send from: give it one, or \
             choose another --iface",
            underlay.name
        ))
    })
}

fn data_name(subnet: IpAddr) -> &'static str {
    if subnet.is_ipv4() { "BackendData" } else { "BackendV6Data" }
}
