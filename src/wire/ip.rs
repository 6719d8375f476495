//! A packet of either version.

use std::net::IpAddr;

use super::{Malformed, ipv4, ipv6};

/// An IPv4 or IPv6 packet, by the first four bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Packet<T> {
    /// Version 4.
    V4(ipv4::Packet<T>),
    /// Version 6.
    V6(ipv6::Packet<T>),
}

/// Version number in the first byte of a packet; 0 for no bytes.
#[inline]
pub fn version(bytes: &[u8]) -> u8 {
    bytes.first().map_or(0, |first| first >> 4)
}

impl<T: AsRef<[u8]>> Packet<T> {
    /// As [`ipv4::Packet::new`] and [`ipv6::Packet::new`].
    ///
    /// # Errors
    /// Neither, or a length that cannot be.
    #[inline]
    pub fn new(buffer: T) -> Result<Self, Malformed> {
        match version(buffer.as_ref()) {
            4 => ipv4::Packet::new(buffer).map(Self::V4),
            6 => ipv6::Packet::new(buffer).map(Self::V6),
            _ => Err(Malformed),
        }
    }

    /// As [`ipv4::Packet::front`] and [`ipv6::Packet::front`].
    ///
    /// # Errors
    /// Neither, or a length that cannot be.
    pub fn front(buffer: T) -> Result<Self, Malformed> {
        match version(buffer.as_ref()) {
            4 => ipv4::Packet::front(buffer).map(Self::V4),
            6 => ipv6::Packet::front(buffer).map(Self::V6),
            _ => Err(Malformed),
        }
    }

    /// Length of the whole packet in bytes.
    #[inline]
    pub fn total_len(&self) -> usize {
        match self {
            Self::V4(packet) => packet.total_len(),
            Self::V6(packet) => packet.total_len(),
        }
    }

    /// Source address.
    #[inline]
    pub fn source(&self) -> IpAddr {
        match self {
            Self::V4(packet) => packet.source().into(),
            Self::V6(packet) => packet.source().into(),
        }
    }

    /// Destination address.
    #[inline]
    pub fn destination(&self) -> IpAddr {
        match self {
            Self::V4(packet) => packet.destination().into(),
            Self::V6(packet) => packet.destination().into(),
        }
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> Packet<T> {
    /// Takes one hop off; `false`, and nothing changed, if there is none to spare.
    #[inline]
    pub fn take_hop(&mut self) -> bool {
        match self {
            Self::V4(packet) => packet.take_hop(),
            Self::V6(packet) => packet.take_hop(),
        }
    }
}
