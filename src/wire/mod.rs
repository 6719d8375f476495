//! The packet headers that the udp backend reads and writes: checked views over bytes that the caller owns.
//!
//! * A view is made by a checking constructor. After that no accessor can fail or panic, whatever the bytes are.
//! * Nothing here allocates, logs, or knows a socket. All multi-byte fields are big-endian on the wire and in host order
//!   in the accessors; all lengths are in bytes.
//! * A malformed packet has no interesting reason at run time, so [`Malformed`] is one unit value.

pub mod checksum;
pub mod icmp;
pub mod icmpv6;
pub mod ip;
pub mod ipv4;
pub mod ipv6;
pub mod tcp;
pub mod udp;
pub mod vnet;

use std::fmt;

/// The bytes are not a packet of the kind that was asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Malformed;

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("malformed packet")
    }
}

impl std::error::Error for Malformed {}
