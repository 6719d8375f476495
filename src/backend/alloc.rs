//! alloc: a lease and nothing else. Something outside of flanneld carries the packets (backends spec 3).

use super::{Backend, BackendError, Direct, PeerError, PeerPlan, Underlay};
use crate::config::NetworkConfig;
use crate::kernel::Object;
use crate::lease::{Lease, LeaseAttrs, Subnets};

/// The alloc backend.
#[derive(Debug)]
pub(super) struct Alloc {
    attrs: LeaseAttrs,
    mtu: u32,
}

impl Alloc {
    /// Publishes the IPv4 address alone, as the Go flanneld does, but the IPv6 one in a network without IPv4, where that
    /// one crashes.
    pub(super) fn new(config: &NetworkConfig, underlay: &Underlay) -> Result<Self, BackendError> {
        let mut attrs = LeaseAttrs::default();
        if config.v4.is_some() {
            attrs.public_ip = Some(underlay.need_public_v4("alloc")?);
        } else {
            attrs.public_ipv6 = Some(underlay.need_public_v6("alloc")?);
        }
        Ok(Self { attrs, mtu: underlay.mtu })
    }
}

impl Backend for Alloc {
    fn name(&self) -> &'static str {
        "alloc"
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

    fn peer_plan(&self, _peer: &Lease, _direct: Direct) -> Result<PeerPlan, PeerError> {
        Ok(PeerPlan::default())
    }

    fn follows_peers(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{dual, lease, underlay, v4, v6};
    use super::*;

    #[test]
    fn publishes_an_address_and_wants_nothing() {
        let backend = Alloc::new(&dual("alloc", "{}"), &underlay()).unwrap();
        assert_eq!(
            backend.attrs(),
            LeaseAttrs { public_ip: underlay().public_v4, ..LeaseAttrs::default() }
        );
        assert_eq!(backend.mtu(), 1500);
        assert_eq!(backend.host_objects(&Subnets::default()), Ok(vec![]));
        assert_eq!(backend.peer_plan(&lease("vxlan"), Direct::default()), Ok(PeerPlan::default()));
        assert!(!backend.follows_peers());
    }

    #[test]
    fn works_without_ipv4() {
        let mut underlay = underlay();
        underlay.public_v4 = None;
        let backend = Alloc::new(&v6("alloc", "{}"), &underlay).unwrap();
        assert_eq!(backend.attrs().public_ipv6, underlay.public_v6);
        assert!(Alloc::new(&v4("alloc", "{}"), &underlay).is_err());
    }
}
