//! The network config document (control-plane spec 2): JSON text in, validated [`NetworkConfig`] out. No I/O.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};

/// One address family's share of the network. `A` is the address type, `N` the prefix type.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FamilyConfig<A, N> {
    /// The whole network, host bits zero.
    pub network: N,
    /// Prefix length of one host's subnet.
    pub subnet_len: u8,
    /// Base address of the first subnet that may be leased.
    pub subnet_min: A,
    /// Base address of the last subnet that may be leased, inclusive.
    pub subnet_max: A,
}

/// The validated network config.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NetworkConfig {
    /// IPv4, when enabled.
    pub v4: Option<FamilyConfig<Ipv4Addr, Ipv4Net>>,
    /// IPv6, when enabled.
    pub v6: Option<FamilyConfig<Ipv6Addr, Ipv6Net>>,
    /// Lower-cased backend type; `udp` when the document has no `Backend`.
    pub backend_type: String,
    /// The whole `Backend` object, verbatim JSON (`{}` when absent).
    pub backend: String,
    /// Masquerade through nftables rather than iptables.
    pub enable_nftables: bool,
}
