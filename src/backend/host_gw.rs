//! host-gw: every other host is the gateway to its subnet. All hosts share one layer-2 segment (backends spec 4).

use std::net::IpAddr;

use super::{Backend, BackendError, Direct, PeerError, PeerPlan, Underlay, peer};
use crate::config::NetworkConfig;
use crate::kernel::{IfName, Object, Route};
use crate::lease::{Lease, LeaseAttrs, Subnets};

const NAME: &str = "host-gw";

/// The host-gw backend.
#[derive(Debug)]
pub(super) struct HostGw {
    link: IfName,
    mtu: u32,
    attrs: LeaseAttrs,
}

impl HostGw {
    pub(super) fn new(config: &NetworkConfig, underlay: &Underlay) -> Result<Self, BackendError> {
        let mut attrs = LeaseAttrs { backend_type: NAME.into(), ..LeaseAttrs::default() };
        if config.v4.is_some() {
            let public = underlay.need_public_v4(NAME)?;
            refuse_nat(underlay, public.into(), underlay.local_v4.map(IpAddr::V4))?;
            attrs.public_ip = Some(public);
        }
        if config.v6.is_some() {
            let public = underlay.need_public_v6(NAME)?;
            refuse_nat(underlay, public.into(), underlay.local_v6.map(IpAddr::V6))?;
            attrs.public_ipv6 = Some(public);
        }
        Ok(Self { link: underlay.name, mtu: underlay.mtu, attrs })
    }
}

/// Peers use the public address as a gateway, so it has to be the interface's own.
fn refuse_nat(
    underlay: &Underlay,
    public: IpAddr,
    local: Option<IpAddr>,
) -> Result<(), BackendError> {
    if local == Some(public) {
        return Ok(());
    }
    let local = local.map_or_else(|| "none".to_owned(), |local| local.to_string());
    Err(BackendError(format!(
        "host-gw cannot work behind NAT: the public address is {public}, but the address of {} is {local}; \
         let both be the same (--iface, --public-ip, --public-ipv6), or use vxlan",
        underlay.name,
    )))
}

impl Backend for HostGw {
    fn name(&self) -> &'static str {
        NAME
    }

    fn attrs(&self) -> LeaseAttrs {
        self.attrs.clone()
    }

    fn mtu(&self) -> u32 {
        self.mtu
    }

    fn host_objects(&self, _own: &Subnets) -> Result<Vec<Object>, BackendError> {
        Ok(Vec::new())
    }

    fn peer_plan(&self, peer: &Lease, _direct: Direct) -> Result<PeerPlan, PeerError> {
        peer::expect_type(NAME, peer)?;
        peer::plan(peer, |family| {
            let own = match family.subnet.addr() {
                IpAddr::V4(_) => self.attrs.public_ip.map(IpAddr::V4),
                IpAddr::V6(_) => self.attrs.public_ipv6.map(IpAddr::V6),
            }?;
            Some(family.public(&[own]).map(|via| {
                let route = Route {
                    dst: family.subnet,
                    via: Some(via),
                    link: Some(self.link),
                    onlink: false,
                };
                PeerPlan { objects: vec![Object::Route(route)], ..PeerPlan::default() }
            }))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{dual, lease, underlay, v4, v6};
    use super::*;

    fn plan(backend: &HostGw, peer: &Lease) -> Result<Vec<String>, String> {
        let plan = backend.peer_plan(peer, Direct::default()).map_err(|error| error.0)?;
        Ok(plan.objects.iter().map(ToString::to_string).chain(plan.trouble.map(|t| t.0)).collect())
    }

    #[test]
    fn peers_are_gateways() {
        let backend = HostGw::new(&dual(NAME, "{}"), &underlay()).unwrap();
        assert_eq!(backend.mtu(), 1500);
        let attrs = backend.attrs();
        assert_eq!((&*attrs.backend_type, attrs.backend_data.as_deref()), ("host-gw", None));
        assert_eq!(
            (attrs.public_ip, attrs.public_ipv6),
            (underlay().public_v4, underlay().public_v6)
        );
        assert_eq!(
            plan(&backend, &lease(NAME)),
            Ok(vec![
                "route 10.5.2.0/24 via 192.168.0.12 dev eth0".to_owned(),
                "route fd00:5:0:2::/64 via fd01::12 dev eth0".to_owned(),
            ])
        );
        assert_eq!(backend.host_objects(&Subnets::default()), Ok(vec![]));
    }

    #[test]
    fn families_that_one_side_lacks_are_left_out() {
        let v4_only = HostGw::new(&v4(NAME, "{}"), &underlay()).unwrap();
        assert_eq!(plan(&v4_only, &lease(NAME)).unwrap().len(), 1);
        let dual = HostGw::new(&dual(NAME, "{}"), &underlay()).unwrap();
        let mut peer = lease(NAME);
        peer.subnets.v6 = None;
        assert_eq!(plan(&dual, &peer).unwrap(), ["route 10.5.2.0/24 via 192.168.0.12 dev eth0"]);
        let v6_only = HostGw::new(&v6(NAME, "{}"), &underlay()).unwrap();
        assert!(plan(&v6_only, &peer).unwrap_err().contains("no subnet of an address family"));
    }

    #[test]
    fn bad_family_leaves_the_other_alone() {
        let backend = HostGw::new(&dual(NAME, "{}"), &underlay()).unwrap();
        let mut peer = lease(NAME);
        peer.attrs.public_ipv6 = None;
        assert_eq!(
            plan(&backend, &peer).unwrap(),
            ["route 10.5.2.0/24 via 192.168.0.12 dev eth0", "IPv6: publishes no public address"]
        );
        for bad in ["0.0.0.0", "224.0.0.1", "255.255.255.255", "127.0.0.1", "192.168.0.11"] {
            peer.attrs.public_ip = Some(bad.parse().unwrap());
            assert!(plan(&backend, &peer).unwrap_err().contains(bad), "{bad}");
        }
    }

    #[test]
    fn other_backends_leases_are_refused_by_name() {
        let backend = HostGw::new(&v4(NAME, "{}"), &underlay()).unwrap();
        assert_eq!(
            plan(&backend, &lease("vxlan")),
            Err("uses backend type \"vxlan\", this host uses \"host-gw\"".into())
        );
    }

    #[test]
    fn nat_is_refused() {
        let mut behind = underlay();
        behind.public_v4 = Some([203, 0, 113, 9].into());
        let error = HostGw::new(&v4(NAME, "{}"), &behind).unwrap_err().0;
        assert!(error.contains("203.0.113.9") && error.contains("192.168.0.11"), "{error}");
        assert!(HostGw::new(&v6(NAME, "{}"), &behind).is_ok(), "the other family is not concerned");
        behind.local_v6 = None;
        assert!(HostGw::new(&v6(NAME, "{}"), &behind).is_err());
        behind.public_v4 = None;
        assert!(HostGw::new(&v4(NAME, "{}"), &behind).unwrap_err().0.contains("--public-ip"));
    }
}
