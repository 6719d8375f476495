//! vxlan: the kernel carries the packets, one device a family, every entry programmed by us (backends spec 5 and 6).
//!
//! Options: `VNI`, `Port`, `MTU` (of the underlay), `Learning`, `GBP`, `DirectRouting`. `MacPrefix` concerns Windows hosts
//! alone and is ignored like any unknown option.

mod settings;
mod vtep;

use std::net::IpAddr;

use ipnet::{IpNet, Ipv6Net};

use self::settings::Settings;
use self::vtep::{Family, Vtep};
use super::{Backend, BackendError, Direct, Memory, PeerError, PeerPlan, Underlay, peer};
use crate::config::NetworkConfig;
use crate::kernel::{Address, IfName, Link, LinkKind, Object, Sysctl, Vxlan as Device};
use crate::lease::{Lease, LeaseAttrs, Subnets};

const NAME: &str = "vxlan";

/// The vxlan backend.
#[derive(Debug)]
pub(super) struct Vxlan {
    settings: Settings,
    lower: IfName,
    v4: Option<Vtep>,
    v6: Option<Vtep>,
}

impl Vxlan {
    pub(super) fn new(
        config: &NetworkConfig,
        underlay: &Underlay,
        memory: &Memory,
    ) -> Result<Self, BackendError> {
        let settings = Settings::parse(&config.backend).map_err(BackendError)?;
        if let Some(mtu) = settings.mtu.filter(|mtu| *mtu > underlay.mtu) {
            let (name, actual) = (underlay.name, underlay.mtu);
            log::warn!(
                "Backend.MTU is {mtu}, but {name} carries {actual}: using {actual}, as the kernel would"
            );
        }
        let vtep = |family, exclusive, public: IpAddr| {
            Vtep::new(family, &settings, underlay, memory, public, exclusive).map(Some)
        };
        let v4 = match &config.v4 {
            Some(v4) => vtep(Family::V4, v4.network.into(), underlay.need_public_v4(NAME)?.into())?,
            None => None,
        };
        // Of IPv6 addresses only link-local ones are not ours (backends spec 2.1).
        let v6 = match &config.v6 {
            Some(_) => {
                vtep(Family::V6, Ipv6Net::default().into(), underlay.need_public_v6(NAME)?.into())?
            }
            None => None,
        };
        Ok(Self { settings, lower: underlay.name, v4, v6 })
    }

    fn vteps(&self) -> impl Iterator<Item = &Vtep> {
        self.v4.iter().chain(&self.v6)
    }

    /// The device, made so that router advertisements do not configure it, and this host's address on it.
    fn device(&self, vtep: &Vtep, subnet: IpAddr) -> [Object; 3] {
        let link = vtep.link;
        let device = Device {
            vni: self.settings.vni,
            port: self.settings.port,
            lower: self.lower,
            local: vtep.local,
            mac: vtep.mac,
            learning: self.settings.learning,
            gbp: self.settings.gbp,
        };
        [
            Object::Link(Link {
                name: link,
                kind: LinkKind::Vxlan(Box::new(device)),
                mtu: vtep.mtu,
            }),
            Object::Sysctl(Sysctl {
                link,
                path: format!("net/ipv6/conf/{link}/accept_ra").into(),
                value: "0".into(),
            }),
            Object::Address(Address { link, addr: subnet.into(), exclusive: vtep.exclusive }),
        ]
    }
}

impl Backend for Vxlan {
    fn name(&self) -> &'static str {
        NAME
    }

    fn attrs(&self) -> LeaseAttrs {
        let mut attrs = LeaseAttrs { backend_type: NAME.into(), ..LeaseAttrs::default() };
        for vtep in self.vteps() {
            // Exactly this text: the Go flanneld finds its MAC by cutting it, not by parsing it (backends spec 1.3).
            let data = format!(r#"{{"VNI":{},"VtepMAC":"{}"}}"#, self.settings.vni, vtep.mac);
            match vtep.public {
                IpAddr::V4(public) => {
                    attrs.public_ip = Some(public);
                    attrs.backend_data = Some(data.into());
                }
                IpAddr::V6(public) => {
                    attrs.public_ipv6 = Some(public);
                    attrs.backend_v6_data = Some(data.into());
                }
            }
        }
        attrs
    }

    /// What fits through every device, because containers have one MTU for both families.
    fn mtu(&self) -> u32 {
        self.vteps().map(|vtep| vtep.mtu).min().unwrap_or_default()
    }

    fn host_objects(&self, own: &Subnets) -> Result<Vec<Object>, BackendError> {
        let mut objects = Vec::new();
        if let Some(vtep) = &self.v4 {
            objects.extend(self.device(vtep, own.need_v4()?.network().into()));
        }
        if let Some(vtep) = &self.v6 {
            objects.extend(self.device(vtep, own.need_v6()?.network().into()));
        }
        Ok(objects)
    }

    fn peer_plan(&self, peer: &Lease, direct: Direct) -> Result<PeerPlan, PeerError> {
        peer::expect_type(NAME, peer)?;
        peer::plan(peer, |family| {
            let (vtep, on_link) = match family.subnet {
                IpNet::V4(_) => (self.v4.as_ref()?, direct.v4),
                IpNet::V6(_) => (self.v6.as_ref()?, direct.v6),
            };
            let objects = vtep.peer_objects(family, on_link && self.settings.direct_routing);
            Some(objects.map(|objects| PeerPlan { objects, ..PeerPlan::default() }))
        })
    }

    fn watches_paths(&self) -> bool {
        self.settings.direct_routing
    }

    fn devices(&self) -> Vec<IfName> {
        self.vteps().map(|vtep| vtep.link).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{dual, lease, own, underlay, v4, v6};
    use super::*;
    use crate::kernel::Mac;

    fn vxlan(config: &NetworkConfig) -> Vxlan {
        Vxlan::new(config, &underlay(), &memory()).unwrap()
    }

    fn memory() -> Memory {
        Memory { random: [0xff, 1, 2, 3, 4, 5, 0x10, 6, 7, 8, 9, 10], ..Memory::default() }
    }

    fn error(options: &str) -> String {
        Vxlan::new(&dual(NAME, options), &underlay(), &memory()).unwrap_err().0
    }

    fn texts(plan: &PeerPlan) -> Vec<String> {
        plan.objects.iter().map(ToString::to_string).collect()
    }

    fn peer() -> Lease {
        let mut peer = lease(NAME);
        peer.attrs.backend_data = Some(r#"{"VNI":1,"VtepMAC":"0a:00:00:00:00:02"}"#.into());
        peer.attrs.backend_v6_data = Some(r#"{"VNI":1,"VtepMAC":"0a:00:00:00:00:06"}"#.into());
        peer
    }

    #[test]
    fn publishes_exactly_what_go_publishes() {
        let attrs = vxlan(&dual(NAME, r#"{"vni":42}"#)).attrs();
        assert_eq!(&*attrs.backend_type, "vxlan");
        assert_eq!(
            attrs.backend_data.as_deref(),
            Some(r#"{"VNI":42,"VtepMAC":"fe:01:02:03:04:05"}"#)
        );
        assert_eq!(
            attrs.backend_v6_data.as_deref(),
            Some(r#"{"VNI":42,"VtepMAC":"12:06:07:08:09:0a"}"#)
        );
        assert_eq!(
            (attrs.public_ip, attrs.public_ipv6),
            (underlay().public_v4, underlay().public_v6)
        );
        let attrs = vxlan(&v6(NAME, "{}")).attrs();
        assert_eq!((attrs.public_ip, attrs.backend_data), (None, None));
    }

    #[test]
    fn host_gets_a_device_and_an_address_a_family() {
        let objects = vxlan(&dual(NAME, r#"{"Port":4789,"Learning":true,"GBP":true}"#))
            .host_objects(&own())
            .unwrap();
        let texts: Vec<String> = objects.iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                "link flannel.1 mtu 1450",
                "sysctl net/ipv6/conf/flannel.1/accept_ra = 0",
                "address 10.5.1.0/32 dev flannel.1",
                "link flannel-v6.1 mtu 1430",
                "sysctl net/ipv6/conf/flannel-v6.1/accept_ra = 0",
                "address fd00:5:0:1::/128 dev flannel-v6.1",
            ]
        );
        let Object::Link(Link { kind: LinkKind::Vxlan(device), .. }) = &objects[0] else {
            panic!()
        };
        let expected = Device {
            vni: 1,
            port: Some(4789),
            lower: underlay().name,
            local: [192, 168, 0, 11].into(),
            mac: Mac([0xfe, 1, 2, 3, 4, 5]),
            learning: true,
            gbp: true,
        };
        assert_eq!(**device, expected);
        let exclusive = |object: &Object| match object {
            Object::Address(address) => address.exclusive.to_string(),
            _ => panic!(),
        };
        assert_eq!(
            (exclusive(&objects[2]), exclusive(&objects[5])),
            ("10.5.0.0/16".into(), "::/0".into())
        );
    }

    #[test]
    fn own_lease_must_have_the_enabled_families() {
        let backend = vxlan(&dual(NAME, "{}"));
        let error = backend.host_objects(&Subnets { v6: None, ..own() }).unwrap_err();
        assert!(error.0.contains("10.5.1.0/24") && error.0.contains("IPv6"), "{error}");
    }

    #[test]
    fn peer_gets_a_neighbour_an_fdb_entry_and_a_route_a_family() {
        let plan =
            vxlan(&dual(NAME, "{}")).peer_plan(&peer(), Direct { v4: true, v6: true }).unwrap();
        assert_eq!(plan.trouble, None);
        assert_eq!(
            texts(&plan),
            [
                "neighbour 10.5.2.0 lladdr 0a:00:00:00:00:02 dev flannel.1",
                "fdb 0a:00:00:00:00:02 dst 192.168.0.12 dev flannel.1",
                "route 10.5.2.0/24 via 10.5.2.0 dev flannel.1 onlink",
                "neighbour fd00:5:0:2:: lladdr 0a:00:00:00:00:06 dev flannel-v6.1",
                "fdb 0a:00:00:00:00:06 dst fd01::12 dev flannel-v6.1",
                "route fd00:5:0:2::/64 via fd00:5:0:2:: dev flannel-v6.1 onlink",
            ]
        );
    }

    #[test]
    fn direct_routing_needs_the_option_and_the_path() {
        let backend = vxlan(&dual(NAME, r#"{"DirectRouting":true}"#));
        assert!(backend.watches_paths() && !vxlan(&dual(NAME, "{}")).watches_paths());
        let plan = backend.peer_plan(&peer(), Direct { v4: true, v6: false }).unwrap();
        assert_eq!(texts(&plan)[0], "route 10.5.2.0/24 via 192.168.0.12");
        assert_eq!(
            texts(&plan)[1],
            "neighbour fd00:5:0:2:: lladdr 0a:00:00:00:00:06 dev flannel-v6.1"
        );
        let plan = backend.peer_plan(&peer(), Direct { v4: false, v6: true }).unwrap();
        assert_eq!(texts(&plan)[3], "route fd00:5:0:2::/64 via fd01::12");
    }

    #[test]
    fn peer_data_as_others_write_them() {
        let backend = vxlan(&v4(NAME, "{}"));
        for data in [
            r#"{"VtepMAC":"0a:00:00:00:00:02"}"#,
            r#"{"vtepmac":"0A-00-00-00-00-02","VNI":4096,"Extra":[1]}"#,
            r#" { "VNI" : 1, "VtepMAC" : "0a00.0000.0002" } "#,
        ] {
            let mut peer = peer();
            peer.attrs.backend_data = Some(data.into());
            peer.attrs.backend_v6_data =
                Some("rubbish for a family that is not enabled here".into());
            let plan = backend.peer_plan(&peer, Direct::default()).unwrap();
            assert_eq!(
                texts(&plan)[0],
                "neighbour 10.5.2.0 lladdr 0a:00:00:00:00:02 dev flannel.1",
                "{data}"
            );
            assert_eq!((plan.objects.len(), plan.trouble), (3, None));
        }
    }

    #[test]
    fn bad_peer_data_harm_one_family_of_one_peer() {
        let backend = vxlan(&dual(NAME, "{}"));
        for (data, why) in [
            (None, "no BackendData"),
            (Some("null"), "no VtepMAC"),
            (Some("[1]"), "must be a JSON object"),
            (Some("{"), "must be a JSON object"),
            (Some(r#"{"VNI":1}"#), "no VtepMAC"),
            (Some(r#"{"VNI":1,"VtepMAC":""}"#), "no VtepMAC"),
            (Some(r#"{"VtepMAC":7}"#), "must be a string"),
            (Some(r#"{"VtepMAC":"0a:00"}"#), "not a MAC address"),
            (Some(r#"{"VtepMAC":"00:00:00:00:00:00"}"#), "not a host's MAC"),
            (Some(r#"{"VtepMAC":"01:00:5e:00:00:01"}"#), "not a host's MAC"),
            (Some(r#"{"VtepMAC":"ff:ff:ff:ff:ff:ff"}"#), "not a host's MAC"),
            (Some(r#"{"VtepMAC":"fe:01:02:03:04:05"}"#), "this host's MAC"),
        ] {
            let mut peer = peer();
            peer.attrs.backend_data = data.map(Into::into);
            let plan = backend.peer_plan(&peer, Direct::default()).unwrap();
            assert_eq!(plan.objects.len(), 3, "IPv6 works");
            let trouble = plan.trouble.unwrap().0;
            assert!(trouble.starts_with("IPv4: ") && trouble.contains(why), "{trouble}");
            peer.subnets.v6 = None;
            assert_eq!(backend.peer_plan(&peer, Direct::default()).unwrap_err().0, trouble);
        }
        assert!(
            backend
                .peer_plan(&lease("host-gw"), Direct::default())
                .unwrap_err()
                .0
                .contains("host-gw")
        );
    }

    #[test]
    fn mtu_is_what_every_device_carries() {
        assert_eq!(vxlan(&v4(NAME, "{}")).mtu(), 1450);
        assert_eq!(vxlan(&v6(NAME, "{}")).mtu(), 1430);
        assert_eq!(vxlan(&dual(NAME, "{}")).mtu(), 1430);
        assert_eq!(vxlan(&dual(NAME, r#"{"MTU":1400}"#)).mtu(), 1330);
        assert_eq!(
            vxlan(&v4(NAME, r#"{"MTU":9000}"#)).mtu(),
            1450,
            "the kernel does not allow more"
        );
        assert_eq!(vxlan(&v4(NAME, r#"{"MTU":118}"#)).mtu(), 68);
        assert!(error(r#"{"MTU":1349}"#).contains("1350"), "an IPv6 device needs 1280");
        for bad in ["0", "-1", "65536", "1500.0"] {
            let error = error(&format!(r#"{{"MTU":{bad}}}"#));
            assert!(error.starts_with("Backend.MTU must be ") && error.ends_with(bad), "{error}");
        }
    }

    #[test]
    fn vni_and_port_limits() {
        let names = |config: &NetworkConfig| {
            let devices = vxlan(config).devices();
            devices.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(names(&v4(NAME, r#"{"VNI":9999999}"#)), ["flannel.9999999"]);
        assert_eq!(names(&dual(NAME, r#"{"VNI":9999}"#)), ["flannel.9999", "flannel-v6.9999"]);
        let too_long = error(r#"{"VNI":10000}"#);
        assert!(too_long.contains("flannel-v6.10000") && too_long.contains("9999"), "{too_long}");
        for bad in ["0", "-1", "16777216"] {
            assert_eq!(
                error(&format!(r#"{{"VNI":{bad}}}"#)),
                format!("Backend.VNI must be 1 to 16777215, got {bad}")
            );
        }
        assert!(error(r#"{"Port":65536}"#).starts_with("Backend.Port must be "));
        for default in ["0", "-5", "null"] {
            let json = format!(r#"{{"Port":{default}}}"#);
            assert_eq!(vxlan(&v4(NAME, &json)).settings.port, None, "the kernel's default");
        }
    }

    #[test]
    fn mac_of_the_live_device_then_of_the_lease_then_made_up() {
        let mac = |memory: &Memory| {
            let backend = Vxlan::new(&v4(NAME, "{}"), &underlay(), memory).unwrap();
            backend.v4.unwrap().mac.to_string()
        };
        let mut memory = memory();
        assert_eq!(mac(&memory), "fe:01:02:03:04:05");
        for (published, expected) in [
            (r#"{"VNI":1,"VtepMAC":"0A:00:00:00:00:09"}"#, "0a:00:00:00:00:09"),
            (r#"{"VNI":1,"VtepMAC":"01:00:00:00:00:09"}"#, "fe:01:02:03:04:05"),
            ("rubbish", "fe:01:02:03:04:05"),
        ] {
            let attrs =
                LeaseAttrs { backend_data: Some(published.into()), ..LeaseAttrs::default() };
            memory.published = Some(attrs);
            assert_eq!(mac(&memory), expected, "{published}");
        }
        memory.live_macs = vec![(IfName::new("flannel.1").unwrap(), Mac([0; 6]))];
        assert_eq!(mac(&memory), "fe:01:02:03:04:05", "a device of another kind, without a MAC");
        memory.live_macs = vec![
            (IfName::new("flannel-v6.1").unwrap(), Mac([2, 0, 0, 0, 0, 6])),
            (IfName::new("flannel.1").unwrap(), Mac([2, 0, 0, 0, 0, 4])),
        ];
        assert_eq!(mac(&memory), "02:00:00:00:00:04");
    }

    #[test]
    fn sends_from_the_public_address_only_if_this_host_has_it() {
        let mut underlay = underlay();
        underlay.public_v4 = Some([203, 0, 113, 9].into());
        let local = |underlay: &Underlay| {
            Vxlan::new(&v4(NAME, "{}"), underlay, &memory())
                .map(|backend| backend.v4.unwrap().local)
        };
        assert_eq!(
            local(&underlay),
            Ok([203, 0, 113, 9].into()),
            "on another interface of this host"
        );
        underlay.public_v4_is_local = false;
        assert_eq!(local(&underlay), Ok([192, 168, 0, 11].into()), "behind NAT");
        underlay.local_v4 = None;
        assert!(local(&underlay).unwrap_err().0.contains("eth0"));
        underlay.public_v4 = None;
        assert!(local(&underlay).unwrap_err().0.contains("--public-ip"));
    }
}
