//! flanneld: one subnet per host, and the packets between the subnets.
//!
//! # The house, top floor first
//!
//! ```text
//!   agent     the one loop: descriptors, clock, deadlines, start-up and shutdown order
//!     |
//!     +-- cli, config      what was typed; what the network's document says
//!     +-- kubeconfig       where the API server of Kubernetes is, and who we are there
//!     +-- underlay         which interface and addresses carry the overlay
//!     +-- store            where leases live (etcd v3 and v2, Kubernetes): decides, asks for HTTP exchanges
//!     +-- http             non-blocking HTTP/1.1 over mio, TLS included
//!     +-- backend          which kernel objects a lease needs (vxlan, host-gw, udp, alloc)
//!     +-- kernel           desired state against actual state, over netlink
//!     +-- firewall         masquerade and forward rules: planned, compared, kept in nf_tables or iptables-legacy
//!     +-- health, notify   /healthz, /readyz, /status, sd_notify
//!     +-- subnet_file, view    what is told to others on this host, and to our next life
//!     |
//!   netlink, family        messages as bytes; IPv4 and IPv6
//!   lease                  leases, subnet keys, the table of peers and its differences
//!   forward -> wire        the udp backend's data plane: decide, cut, join; and the packet headers it reads
//!   sys                    every unsafe block and system call
//! ```
//!
//! Everything but `agent`, `sys` and the thin owners of sockets is a plain value: inputs go in through `handle_*(…, now)`,
//! outputs come out through `poll_*`, and `poll_timeout()` says when to call again. There is no clock and no descriptor
//! inside, so every decision can be tested on a desk.

pub mod agent;
pub mod backend;
pub mod backoff;
pub mod cli;
pub mod config;
pub mod family;
pub mod firewall;
pub mod forward;
pub mod health;
pub mod http;
mod json;
pub mod kernel;
pub mod kubeconfig;
pub mod lease;
mod netlink;
pub mod notify;
mod quote;
pub mod store;
pub mod subnet_file;
pub mod sys;
mod throttle;
pub mod underlay;
pub mod view;
pub mod wire;
