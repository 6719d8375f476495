//! The udp backend's data plane: IP packets from a TUN device go out as the payload of UDP datagrams, one packet a datagram
//! and nothing else in it, and back (backends spec 8).
//!
//! ```text
//!   TUN --read--> Engine::outbound --> Outbox: cut into segments, gathered into runs --sendmmsg, UDP_SEGMENT--> UDP
//!   TUN <-writev-- Merger: joined into super-packets <-- Engine::inbound <--recvmmsg, UDP_GRO-- UDP
//! ```
//!
//! The kernel hands over, and takes, up to 64 KiB of a flow as one packet; on the wire there is still one packet a datagram,
//! so that a Go flanneld at the other end never knows. [`Engine`] decides about one packet at a time, [`Split`] and
//! [`Merger`] cut and join: pure, in the caller's buffers, without descriptor, clock, allocation or log. [`Plane`] is the
//! owner of the descriptors.

mod engine;
mod limit;
mod merge;
mod offload;
mod outbox;
mod plane;
mod split;
mod stats;
mod table;

pub use self::engine::{Engine, Outbound, ReplyBuffer, Routes, may_be_cut};
pub use self::limit::Limiter;
pub use self::merge::{Joined, Kinds, Merger, Part};
pub use self::offload::{Offload, Offloads};
pub use self::outbox::{Outbox, Run};
pub use self::plane::{Demotion, Plane, Settings, Side, TunGone, Turn};
pub use self::split::{MAX_HEADER_LEN, Split, complete_checksum};
pub use self::stats::{Drops, Reason, Stats};
pub use self::table::{Address, Table};
pub use crate::family::Family;

/// Bytes that carrying a packet over IPv4 costs: a header without options and a UDP header.
pub const OVERHEAD_V4: u32 = 20 + 8;
/// Bytes that carrying a packet over IPv6 costs.
pub const OVERHEAD_V6: u32 = 40 + 8;
