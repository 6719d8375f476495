//! udp: packets go through this process, one bare IPv4 packet a datagram (backends spec 8). `forward` carries them; this
//! file says what the kernel and the forwarding table need. IPv4 only.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use ipnet::{IpNet, Ipv4Net};

use super::{Backend, BackendError, Direct, PeerError, PeerPlan, Underlay, peer};
use crate::config::NetworkConfig;
use crate::forward::OVERHEAD;
use crate::json::Fields;
use crate::kernel::{Address, IfName, Link, LinkKind, Object, Route};
use crate::lease::{Lease, LeaseAttrs, Subnets};

const NAME: &str = "udp";
const DEFAULT_PORT: u16 = 8285;
/// The longest packet in bytes of any device, and the shortest that IPv4 may be asked to carry (RFC 791).
const MTU_LIMITS: (u32, u32) = (68, 65_535);

/// The udp backend.
#[derive(Debug)]
pub(super) struct Udp {
    network: Ipv4Net,
    public: Ipv4Addr,
    local: Ipv4Addr,
    /// Where every host listens: ports are not published.
    port: u16,
    mtu: u32,
    tun: Option<IfName>,
}

impl Udp {
    pub(super) fn new(config: &NetworkConfig, underlay: &Underlay) -> Result<Self, BackendError> {
        let Some(v4) = &config.v4 else {
            return Err(BackendError(
                "the udp backend carries IPv4 only, and the network config has no IPv4 network: use vxlan or host-gw"
                    .into(),
            ));
        };
        if let Some(v6) = &config.v6 {
            log::warn!("the udp backend carries IPv4 only: no packets will flow in {}", v6.network);
        }
        let options = Fields::parse("Backend", &config.backend).map_err(BackendError)?;
        let port = match options.integer("Port").map_err(BackendError)? {
            None => DEFAULT_PORT,
            Some(port) => u16::try_from(port)
                .ok()
                .filter(|port| *port != 0)
                .ok_or_else(|| BackendError(options.wrong("Port", "1 to 65535", port)))?,
        };
        let (shortest, longest) = MTU_LIMITS;
        let mtu = underlay.mtu.min(longest).saturating_sub(OVERHEAD);
        if mtu < shortest {
            return Err(BackendError(format!(
                "the MTU of {} is {}, too small for the udp backend: at least {} are needed",
                underlay.name,
                underlay.mtu,
                shortest + OVERHEAD
            )));
        }
        let public = underlay.need_public_v4(NAME)?;
        let Some(local) = underlay.local_v4 else {
            return Err(BackendError(format!(
                "the udp backend needs an IPv4 address on {} to listen on: give it one, or choose another --iface",
                underlay.name
            )));
        };
        Ok(Self { network: v4.network, public, local, port, mtu, tun: None })
    }
}

impl Backend for Udp {
    fn name(&self) -> &'static str {
        NAME
    }

    fn attrs(&self) -> LeaseAttrs {
        LeaseAttrs { public_ip: Some(self.public), ..LeaseAttrs::default() }
    }

    fn mtu(&self) -> u32 {
        self.mtu
    }

    fn set_tun(&mut self, name: IfName) {
        self.tun = Some(name);
    }

    fn host_objects(&self, own: &Subnets) -> Result<Vec<Object>, BackendError> {
        let Some(link) = self.tun else {
            return Err(BackendError("the TUN device of the udp backend is not open yet".into()));
        };
        let network = IpNet::V4(self.network);
        let address = IpAddr::V4(own.need_v4()?.network()).into();
        Ok(vec![
            Object::Link(Link { name: link, kind: LinkKind::Existing, mtu: self.mtu }),
            Object::Address(Address { link, addr: address, exclusive: network }),
            Object::Route(Route { dst: network, via: None, link: Some(link), onlink: false }),
        ])
    }

    /// Leases of every backend type are used, as they always were: this backend publishes none.
    fn peer_plan(&self, peer: &Lease, _direct: Direct) -> Result<PeerPlan, PeerError> {
        peer::plan(peer, |family| {
            if family.subnet.addr().is_ipv6() {
                return None;
            }
            Some(family.public(&[self.public.into(), self.local.into()]).map(|public| PeerPlan {
                forward: vec![(family.subnet, SocketAddr::new(public, self.port))],
                ..PeerPlan::default()
            }))
        })
    }

    fn devices(&self) -> Vec<IfName> {
        self.tun.into_iter().collect()
    }

    fn forward_port(&self) -> Option<u16> {
        Some(self.port)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{dual, lease, own, underlay, v4, v6};
    use super::*;

    fn udp(options: &str) -> Result<Udp, String> {
        Udp::new(&v4(NAME, options), &underlay()).map_err(|error| error.0)
    }

    #[test]
    fn port() {
        for (options, port) in [
            ("{}", 8285),
            (r#"{"Port":null}"#, 8285),
            (r#"{"port":1}"#, 1),
            (r#"{"Port":65535}"#, 65535),
        ] {
            assert_eq!(udp(options).unwrap().forward_port(), Some(port));
        }
        for bad in ["0", "-1", "65536", "99999999999"] {
            let error = udp(&format!(r#"{{"Port":{bad}}}"#)).unwrap_err();
            assert_eq!(error, format!("Backend.Port must be 1 to 65535, got {bad}"));
        }
        assert!(udp(r#"{"Port":"8285"}"#).is_err());
    }

    #[test]
    fn device_address_and_route_of_the_whole_network() {
        let mut backend = udp("{}").unwrap();
        assert!(backend.host_objects(&own()).is_err(), "no device yet");
        assert_eq!(backend.devices(), []);
        backend.set_tun(IfName::new("flannel3").unwrap());
        let objects = backend.host_objects(&own()).unwrap();
        let texts: Vec<String> = objects.iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                "link flannel3 mtu 1472",
                "address 10.5.1.0/32 dev flannel3",
                "route 10.5.0.0/16 dev flannel3"
            ]
        );
        assert_eq!(backend.devices(), [IfName::new("flannel3").unwrap()]);
        assert!(backend.host_objects(&Subnets { v4: None, ..own() }).is_err());
    }

    #[test]
    fn every_lease_with_ipv4_is_used_whatever_its_type() {
        let backend = Udp::new(&dual(NAME, r#"{"Port":9000}"#), &underlay()).unwrap();
        let expected = vec![("10.5.2.0/24".parse().unwrap(), "192.168.0.12:9000".parse().unwrap())];
        for kind in ["", "vxlan"] {
            let plan = backend.peer_plan(&lease(kind), Direct::default()).unwrap();
            assert_eq!(
                (plan.forward, plan.objects, plan.trouble),
                (expected.clone(), vec![], None)
            );
        }
        let mut v6_peer = lease("");
        v6_peer.subnets.v4 = None;
        assert!(backend.peer_plan(&v6_peer, Direct::default()).is_err());
        let mut own_address = lease("");
        own_address.attrs.public_ip = underlay().local_v4;
        assert!(backend.peer_plan(&own_address, Direct::default()).is_err());
    }

    #[test]
    fn publishes_no_type() {
        let attrs = udp("{}").unwrap().attrs();
        assert_eq!(attrs, LeaseAttrs { public_ip: underlay().public_v4, ..LeaseAttrs::default() });
    }

    #[test]
    fn hosts_on_which_it_cannot_work() {
        assert!(Udp::new(&v6(NAME, "{}"), &underlay()).unwrap_err().0.contains("IPv4 only"));
        let with = |change: &dyn Fn(&mut Underlay)| {
            let mut underlay = underlay();
            change(&mut underlay);
            Udp::new(&v4(NAME, "{}"), &underlay)
        };
        assert!(with(&|u| u.mtu = 95).unwrap_err().0.contains("96"));
        assert_eq!(with(&|u| u.mtu = 96).unwrap().mtu(), 68);
        assert_eq!(with(&|u| u.mtu = 65_536).unwrap().mtu(), 65_507, "the longest datagram");
        assert!(with(&|u| u.local_v4 = None).unwrap_err().0.contains("eth0"));
        assert!(with(&|u| u.public_v4 = None).unwrap_err().0.contains("--public-ip"));
    }
}
