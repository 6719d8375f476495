//! A peer's lease, one address family at a time: the families stand and fall alone.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{PeerError, PeerPlan};
use crate::lease::Lease;

/// What a lease says about one family.
#[derive(Debug)]
pub(super) struct PeerFamily<'a> {
    /// The subnet to reach.
    pub(super) subnet: IpNet,
    public: Option<IpAddr>,
    /// The backend's data, JSON text.
    pub(super) data: Option<&'a str>,
}

impl PeerFamily<'_> {
    /// The address to send to: there, a host's, and none of our `own`.
    pub(super) fn public(&self, own: &[IpAddr]) -> Result<IpAddr, PeerError> {
        let Some(public) = self.public else {
            return Err(PeerError("publishes no public address".into()));
        };
        let is_broadcast = matches!(public, IpAddr::V4(public) if public.is_broadcast());
        if public.is_unspecified() || public.is_multicast() || public.is_loopback() || is_broadcast
        {
            return Err(PeerError(format!(
                "publishes {public}, which is not the address of a host"
            )));
        }
        if own.contains(&public) {
            return Err(PeerError(format!("publishes {public}, which is this host's address")));
        }
        Ok(public)
    }
}

/// Checks that a lease is of this backend's kind.
pub(super) fn expect_type(ours: &str, peer: &Lease) -> Result<(), PeerError> {
    let theirs = &*peer.attrs.backend_type;
    if theirs == ours {
        return Ok(());
    }
    Err(PeerError(format!("uses backend type {theirs:?}, this host uses {ours:?}")))
}

/// Plans each family of `peer` with `plan_family`, which gives `None` for a family that is not enabled here. What fails in one
/// family is told in [`PeerPlan::trouble`] while the other is of use.
pub(super) fn plan(
    peer: &Lease,
    plan_family: impl Fn(&PeerFamily<'_>) -> Option<Result<PeerPlan, PeerError>>,
) -> Result<PeerPlan, PeerError> {
    let attrs = &peer.attrs;
    let v4 = peer.subnets.v4.map(|subnet| PeerFamily {
        subnet: subnet.trunc().into(),
        public: attrs.public_ip.map(IpAddr::V4),
        data: attrs.backend_data.as_deref(),
    });
    let v6 = peer.subnets.v6.map(|subnet| PeerFamily {
        subnet: subnet.trunc().into(),
        public: attrs.public_ipv6.map(IpAddr::V6),
        data: attrs.backend_v6_data.as_deref(),
    });
    let (mut whole, mut trouble): (Option<PeerPlan>, Option<PeerError>) = (None, None);
    for family in v4.iter().chain(&v6) {
        match plan_family(family) {
            None => {}
            Some(Ok(part)) => {
                let whole = whole.get_or_insert_default();
                whole.objects.extend(part.objects);
                whole.forward.extend(part.forward);
            }
            Some(Err(PeerError(reason))) => {
                let name = if family.subnet.addr().is_ipv4() { "IPv4" } else { "IPv6" };
                trouble.get_or_insert_with(|| PeerError(format!("{name}: {reason}")));
            }
        }
    }
    match (whole, trouble) {
        (Some(whole), trouble) => Ok(PeerPlan { trouble, ..whole }),
        (None, Some(trouble)) => Err(trouble),
        (None, None) => Err(PeerError(
            "has no subnet of an address family that this host's backend carries".into(),
        )),
    }
}
