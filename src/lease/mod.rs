//! Leases: which host owns which subnet, and what the others need to know to reach it.

pub mod acquire;
pub mod allocate;
pub mod key;
pub mod table;
pub mod value;

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::SystemTime;

use ipnet::{Ipv4Net, Ipv6Net};

/// The subnets of one lease: its identity. At least one family is present in a valid lease.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Subnets {
    /// IPv4 subnet, host bits zero.
    pub v4: Option<Ipv4Net>,
    /// IPv6 subnet, host bits zero.
    pub v6: Option<Ipv6Net>,
}

impl fmt::Display for Subnets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.v4, self.v6) {
            (Some(v4), Some(v6)) => write!(f, "{v4},{v6}"),
            (Some(v4), None) => write!(f, "{v4}"),
            (None, Some(v6)) => write!(f, "{v6}"),
            (None, None) => f.write_str("no subnet"),
        }
    }
}

/// What a host publishes about itself with its lease (control-plane spec 4.3).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct LeaseAttrs {
    /// Underlay IPv4 address; `None` is written as `0.0.0.0`.
    pub public_ip: Option<Ipv4Addr>,
    /// Underlay IPv6 address; `None` is written as `null`.
    pub public_ipv6: Option<Ipv6Addr>,
    /// Lease type of the backend, empty for udp and alloc.
    pub backend_type: Box<str>,
    /// The backend's IPv4 data, verbatim JSON text.
    pub backend_data: Option<Box<str>>,
    /// The backend's IPv6 data, verbatim JSON text.
    pub backend_v6_data: Option<Box<str>>,
}

/// One host's lease.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Lease {
    /// The subnets, which are also the lease's key.
    pub subnets: Subnets,
    /// What its host published.
    pub attrs: LeaseAttrs,
    /// When the key came into being, in the store's own order (create revision, created index): of two leases that claim
    /// the same addresses the older one is right.
    pub created: u64,
}

/// This host's own lease.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OwnLease {
    /// The lease as the store holds it.
    pub lease: Lease,
    /// When it runs out; `None` is a reservation, which never does.
    pub expiry: Option<SystemTime>,
}

/// One change in the store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LeaseEvent {
    /// A lease was created or rewritten.
    Put(Lease),
    /// A lease was deleted or ran out.
    Removed(Subnets),
}
