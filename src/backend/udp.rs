//! udp: packets go through this process, one bare IP packet a datagram (backends spec 8). `forward` carries them; this file
//! says what the kernel and the forwarding table need.
//!
//! IPv6 is an extension: its packets go over IPv6, to hosts that publish an IPv6 address. The Go flanneld's udp backend
//! publishes none, so it never gets any.
//!
//! Options: `Port`; and of our own, which the Go flanneld ignores, `CheckSource` and `Offloads`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv6Net};

use super::{Backend, BackendError, Direct, PeerError, PeerPlan, Underlay, peer};
use crate::config::{FamilyConfig, NetworkConfig};
use crate::forward::{OVERHEAD_V4, OVERHEAD_V6, Offload, Offloads, Settings, Side};
use crate::json::Fields;
use crate::kernel::{Address, IfName, Link, LinkKind, Object, Route, Sysctl};
use crate::lease::{Lease, LeaseAttrs, Subnets};

const NAME: &str = "udp";
const DEFAULT_PORT: u16 = 8285;
/// The longest packet in bytes of any device.
const MAX_MTU: u32 = 65_535;
/// The shortest MTU in bytes that IPv4 may be asked to live with (RFC 791), and IPv6 (RFC 8200).
const MIN_MTU_V4: u32 = 68;
const MIN_MTU_V6: u32 = 1280;

/// The udp backend.
#[derive(Debug)]
pub(super) struct Udp {
    settings: Settings,
    networks: Vec<IpNet>,
    public_v4: Option<Ipv4Addr>,
    public_v6: Option<Ipv6Addr>,
    tun: Option<IfName>,
}

impl Udp {
    pub(super) fn new(config: &NetworkConfig, underlay: &Underlay) -> Result<Self, BackendError> {
        let options = Fields::parse("Backend", &config.backend).map_err(BackendError)?;
        let port = match options.integer("Port").map_err(BackendError)? {
            None => DEFAULT_PORT,
            Some(port) => u16::try_from(port)
                .ok()
                .filter(|port| *port != 0)
                .ok_or_else(|| BackendError(options.wrong("Port", "1 to 65535", port)))?,
        };
        let (overhead, shortest) = match config.v6 {
            None => (OVERHEAD_V4, MIN_MTU_V4),
            Some(_) => (OVERHEAD_V6, MIN_MTU_V6),
        };
        let mtu = underlay.mtu.min(MAX_MTU).saturating_sub(overhead);
        if mtu < shortest {
            return Err(BackendError(format!(
                "the MTU of {} is {}, too small for the udp backend: at least {} are needed",
                underlay.name,
                underlay.mtu,
                shortest + overhead
            )));
        }
        let local = |family: &str| {
            BackendError(format!(
                "the udp backend needs an {family} address on {} to listen on: give it one, or choose another --iface",
                underlay.name
            ))
        };
        let (mut v4, mut v6) = (None, None);
        let (mut public_v4, mut public_v6) = (None, None);
        let mut networks = Vec::new();
        if let Some(FamilyConfig { network, subnet_len, .. }) = config.v4 {
            public_v4 = Some(underlay.need_public_v4(NAME)?);
            let local = underlay.local_v4.ok_or_else(|| local("IPv4"))?;
            let (prefix_len, net) = (network.prefix_len(), network.network());
            v4 = Some(Side { network: net, prefix_len, subnet_len, local });
            networks.push(network.into());
        }
        if let Some(FamilyConfig { network, subnet_len, .. }) = config.v6 {
            public_v6 = Some(underlay.need_public_v6(NAME)?);
            let local = underlay.local_v6.ok_or_else(|| local("IPv6"))?;
            let (prefix_len, net) = (network.prefix_len(), network.network());
            v6 = Some(Side { network: net, prefix_len, subnet_len, local });
            networks.push(network.into());
        }
        let offloads = offloads(&options).map_err(BackendError)?;
        let check_source = options.flag("CheckSource").map_err(BackendError)?.unwrap_or(false);
        let settings = Settings { port, mtu, offloads, check_source, v4, v6 };
        Ok(Self { settings, networks, public_v4, public_v6, tun: None })
    }

    /// Our own addresses, which no peer's can be.
    fn own_addresses(&self) -> [Option<IpAddr>; 4] {
        let Settings { v4, v6, .. } = &self.settings;
        [
            self.public_v4.map(IpAddr::V4),
            self.public_v6.map(IpAddr::V6),
            v4.map(|side| side.local.into()),
            v6.map(|side| side.local.into()),
        ]
    }
}

/// `"Offloads": {"TSO": false, …}`: each is on unless it is switched off.
fn offloads(options: &Fields<'_>) -> Result<Offloads, String> {
    let mut offloads = Offloads::ALL;
    if let Some(text) = options.raw("Offloads") {
        let switches = Fields::parse("Backend.Offloads", text)?;
        let names = Offload::ALL.map(|(_, name)| name);
        if let Some(unknown) = switches.unknown(&names) {
            let names = names.join(", ");
            return Err(format!("Backend.Offloads has no {unknown:?}; there are {names}"));
        }
        for (offload, name) in Offload::ALL {
            offloads.set(offload, switches.flag(name)?.unwrap_or(true));
        }
    }
    Ok(offloads)
}

impl Backend for Udp {
    fn name(&self) -> &'static str {
        NAME
    }

    fn attrs(&self) -> LeaseAttrs {
        LeaseAttrs {
            public_ip: self.public_v4,
            public_ipv6: self.public_v6,
            ..LeaseAttrs::default()
        }
    }

    fn mtu(&self) -> u32 {
        self.settings.mtu
    }

    fn set_tun(&mut self, name: IfName) {
        self.tun = Some(name);
    }

    fn host_objects(&self, own: &Subnets) -> Result<Vec<Object>, BackendError> {
        let Some(link) = self.tun else {
            return Err(BackendError("the TUN device of the udp backend is not open yet".into()));
        };
        let mut objects = vec![Object::Link(Link {
            name: link,
            kind: LinkKind::Existing,
            mtu: self.settings.mtu,
        })];
        for network in &self.networks {
            let (addr, exclusive): (IpAddr, IpNet) = match network {
                IpNet::V4(_) => (own.need_v4()?.network().into(), *network),
                IpNet::V6(_) => {
                    objects.push(Object::Sysctl(Sysctl {
                        link,
                        path: format!("net/ipv6/conf/{link}/accept_ra").into(),
                        value: "0".into(),
                    }));
                    (own.need_v6()?.network().into(), Ipv6Net::default().into())
                }
            };
            objects.push(Object::Address(Address { link, addr: addr.into(), exclusive }));
            objects.push(Object::Route(Route {
                dst: *network,
                via: None,
                link: Some(link),
                onlink: false,
            }));
        }
        Ok(objects)
    }

    /// Leases of every backend type are used, as they always were: this backend publishes none.
    fn peer_plan(&self, peer: &Lease, _direct: Direct) -> Result<PeerPlan, PeerError> {
        let own: Vec<IpAddr> = self.own_addresses().into_iter().flatten().collect();
        peer::plan(peer, |family| {
            let carried = match family.subnet {
                IpNet::V4(_) => self.settings.v4.is_some(),
                // a Go host, which carries no IPv6 here, publishes no address for it
                IpNet::V6(_) => self.settings.v6.is_some() && peer.attrs.public_ipv6.is_some(),
            };
            carried.then(|| {
                family.public(&own).map(|public| PeerPlan {
                    forward: vec![(family.subnet, public)],
                    ..PeerPlan::default()
                })
            })
        })
    }

    fn devices(&self) -> Vec<IfName> {
        self.tun.into_iter().collect()
    }

    fn forward(&self) -> Option<&Settings> {
        Some(&self.settings)
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
            assert_eq!(udp(options).unwrap().settings.port, port);
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
    fn every_lease_is_used_whatever_its_type() {
        let backend = Udp::new(&dual(NAME, r#"{"Port":9000}"#), &underlay()).unwrap();
        let expected = vec![
            ("10.5.2.0/24".parse().unwrap(), "192.168.0.12".parse().unwrap()),
            ("fd00:5:0:2::/64".parse().unwrap(), lease("").attrs.public_ipv6.unwrap().into()),
        ];
        for kind in ["", "vxlan"] {
            let plan = backend.peer_plan(&lease(kind), Direct::default()).unwrap();
            assert_eq!(
                (plan.forward, plan.objects, plan.trouble),
                (expected.clone(), vec![], None)
            );
        }
        let mut v6_peer = lease("");
        (v6_peer.subnets.v4, v6_peer.attrs.public_ipv6) = (None, None);
        assert!(backend.peer_plan(&v6_peer, Direct::default()).is_err());
        let mut own_address = lease("");
        own_address.attrs.public_ip = underlay().local_v4;
        own_address.attrs.public_ipv6 = None;
        assert!(backend.peer_plan(&own_address, Direct::default()).is_err());
    }

    #[test]
    fn ipv6_beside_ipv4_and_alone() {
        let mut backend = Udp::new(&dual(NAME, "{}"), &underlay()).unwrap();
        backend.set_tun(IfName::new("flannel0").unwrap());
        let texts = |backend: &Udp| -> Vec<String> {
            backend.host_objects(&own()).unwrap().iter().map(ToString::to_string).collect()
        };
        let v6 = [
            "sysctl net/ipv6/conf/flannel0/accept_ra = 0",
            "address fd00:5:0:1::/128 dev flannel0",
            "route fd00:5::/48 dev flannel0",
        ];
        assert_eq!(texts(&backend)[0], "link flannel0 mtu 1452");
        assert_eq!(texts(&backend)[3..], v6);
        assert_eq!(backend.attrs().public_ipv6, underlay().public_v6);

        let mut alone = Udp::new(&super::super::tests::v6(NAME, "{}"), &underlay()).unwrap();
        alone.set_tun(IfName::new("flannel0").unwrap());
        assert_eq!(texts(&alone)[1..], v6);
        assert_eq!((alone.settings.v4, alone.attrs().public_ip), (None, None));
    }

    #[test]
    fn go_hosts_get_no_ipv6() {
        let backend = Udp::new(&dual(NAME, "{}"), &underlay()).unwrap();
        let mut go = lease("");
        go.attrs.public_ipv6 = None;
        let plan = backend.peer_plan(&go, Direct::default()).unwrap();
        assert_eq!((plan.forward.len(), plan.trouble), (1, None));
        assert!(plan.forward[0].0.addr().is_ipv4());
        // nor does a host whose network has no IPv6 send any
        let plan = udp("{}").unwrap().peer_plan(&lease(""), Direct::default()).unwrap();
        assert_eq!(plan.forward.len(), 1);
    }

    #[test]
    fn switches() {
        let settings = udp("{}").unwrap().settings;
        assert_eq!((settings.offloads, settings.check_source), (Offloads::ALL, false));
        let settings =
            udp(r#"{"checkSource":true,"Offloads":{"gso":false,"TSO":false,"Batch":true}}"#)
                .unwrap()
                .settings;
        let expected = Offloads { tso: false, gso: false, ..Offloads::ALL };
        assert_eq!((settings.offloads, settings.check_source), (expected, true));
        let error = udp(r#"{"Offloads":{"TS0":false}}"#).unwrap_err();
        assert!(error.contains("TS0") && error.contains("TSO, USO, Merge"), "{error}");
        let error = udp(r#"{"Offloads":{"TSO":0}}"#).unwrap_err();
        assert!(error.contains("Backend.Offloads.TSO must be true or false"), "{error}");
        assert!(udp(r#"{"Offloads":false}"#).is_err());
        assert!(udp(r#"{"CheckSource":1}"#).is_err());
    }

    #[test]
    fn publishes_no_type() {
        let attrs = udp("{}").unwrap().attrs();
        assert_eq!(attrs, LeaseAttrs { public_ip: underlay().public_v4, ..LeaseAttrs::default() });
    }

    #[test]
    fn hosts_on_which_it_cannot_work() {
        let mut short = underlay();
        short.mtu = 1327;
        let error = Udp::new(&v6(NAME, "{}"), &short).unwrap_err().0;
        assert!(error.contains("at least 1328"), "{error}");
        short.mtu = 1328;
        assert_eq!(Udp::new(&v6(NAME, "{}"), &short).unwrap().mtu(), 1280);
        short.local_v6 = None;
        assert!(Udp::new(&v6(NAME, "{}"), &short).unwrap_err().0.contains("IPv6 address on eth0"));
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
