//! The udp backend's data plane: IP packets from a TUN device go out as the payload of UDP datagrams, one packet a datagram
//! and nothing else in it, and back (backends spec 8).
//!
//! [`Engine`] decides about one packet at a time, in the caller's buffers: no descriptor, no clock, no allocation, no log.
//! What happened to packets is counted in [`Stats`]. [`Plane`] is the thin owner of the two descriptors.

mod limit;
mod plane;
mod table;

use std::net::SocketAddrV4;
use std::time::Instant;

pub use self::limit::Limiter;
pub use self::plane::{Plane, TunGone, Turn};
pub use self::table::Table;
use crate::wire::icmp;
use crate::wire::ipv4::Packet;

/// Bytes that carrying a packet costs: an IPv4 header without options and a UDP header.
pub const OVERHEAD: u32 = 20 + 8;

/// Room for one answer to a packet that cannot be forwarded.
pub type ReplyBuffer = [u8; icmp::MAX_ERROR_LEN];

/// Why a packet was dropped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reason {
    /// Not IPv4, such as the router solicitations that the kernel sends on every device.
    NotIpv4,
    /// Lengths that cannot be.
    Malformed,
    /// No host is known for the destination.
    NoRoute,
    /// It has made too many hops.
    HopsUsedUp,
    /// Too long for a datagram.
    TooBig,
    /// The UDP socket refused it: no route to the host, an interface that is down.
    SendFailed,
    /// The TUN device refused it: its queue is full, or it is down.
    DeliverFailed,
    /// The UDP socket reported an error instead of a datagram.
    ReceiveFailed,
}

/// Packets dropped, by reason.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Drops([u64; 8]);

impl Drops {
    /// Every reason, in the order of declaration.
    pub const REASONS: [Reason; 8] = [
        Reason::NotIpv4,
        Reason::Malformed,
        Reason::NoRoute,
        Reason::HopsUsedUp,
        Reason::TooBig,
        Reason::SendFailed,
        Reason::DeliverFailed,
        Reason::ReceiveFailed,
    ];

    /// How many packets were dropped for this reason.
    pub fn count(&self, reason: Reason) -> u64 {
        self.0[reason as usize]
    }

    fn add(&mut self, reason: Reason) {
        self.0[reason as usize] += 1;
    }
}

/// What happened so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// Packets sent to other hosts.
    pub sent: u64,
    /// Packets given to the TUN device.
    pub delivered: u64,
    /// ICMP errors written back to senders on this host.
    pub replies: u64,
    /// Packets dropped in either direction.
    pub drops: Drops,
}

/// What becomes of a packet from the TUN device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outbound {
    /// Send its first `len` bytes there.
    Send {
        /// The other host.
        to: SocketAddrV4,
        /// Bytes.
        len: usize,
    },
    /// Drop it, and write this many bytes of the reply buffer to the TUN device.
    Reply(usize),
    /// Drop it.
    Drop,
}

/// The decisions of the data plane.
#[derive(Debug)]
pub struct Engine {
    /// Which host carries which subnet.
    pub table: Table,
    /// Counters.
    pub stats: Stats,
    limiter: Limiter,
}

impl Engine {
    /// An engine that starts without a packet counted.
    pub fn new(table: Table) -> Self {
        Self { table, stats: Stats::default(), limiter: Limiter::new() }
    }

    /// A packet from the TUN device, to be changed in place: one hop is taken off.
    pub fn outbound(
        &mut self,
        packet: &mut [u8],
        reply: &mut ReplyBuffer,
        now: Instant,
    ) -> Outbound {
        let mut packet = match self.parse(packet) {
            Ok(packet) => packet,
            Err(reason) => return self.drop(reason),
        };
        let Some(to) = self.table.lookup(packet.destination()) else {
            return self.refuse(Reason::NoRoute, icmp::Error::NetUnreachable, &packet, reply, now);
        };
        if !packet.take_hop() {
            return self.refuse(Reason::HopsUsedUp, icmp::Error::TimeExceeded, &packet, reply, now);
        }
        Outbound::Send { to, len: packet.total_len() }
    }

    /// The packet that [`Engine::outbound`] wanted sent did not fit into a datagram; `mtu` bytes would have.
    pub fn too_big(
        &mut self,
        packet: &[u8],
        mtu: u16,
        reply: &mut ReplyBuffer,
        now: Instant,
    ) -> Outbound {
        match Packet::new(packet) {
            Ok(packet) if packet.dont_fragment() => self.refuse(
                Reason::TooBig,
                icmp::Error::FragmentationNeeded { mtu },
                &packet,
                reply,
                now,
            ),
            _ => self.drop(Reason::TooBig),
        }
    }

    /// A datagram from any host, to be changed in place. Returns how many of its bytes to give to the TUN device.
    ///
    /// Where it came from is not looked at, as in the Go flanneld: behind NAT a host sends from another address than the
    /// one it publishes.
    pub fn inbound(&mut self, datagram: &mut [u8]) -> Option<usize> {
        let hop_taken = self.parse(datagram).and_then(|mut packet| {
            if packet.take_hop() { Ok(packet.total_len()) } else { Err(Reason::HopsUsedUp) }
        });
        hop_taken.map_err(|reason| self.stats.drops.add(reason)).ok()
    }

    fn parse<'a>(&self, bytes: &'a mut [u8]) -> Result<Packet<&'a mut [u8]>, Reason> {
        let is_ipv4 = bytes.first().is_some_and(|first| first >> 4 == 4);
        Packet::new(bytes).map_err(|_| if is_ipv4 { Reason::Malformed } else { Reason::NotIpv4 })
    }

    fn drop(&mut self, reason: Reason) -> Outbound {
        self.stats.drops.add(reason);
        Outbound::Drop
    }

    /// Drops a packet and tells its source why, unless that was done too often of late.
    ///
    /// The message comes from the address that the packet was for. The Go flanneld writes the device's own address, and so
    /// its messages never arrive: to the kernel a packet from outside with one of its own addresses is a martian.
    fn refuse<T: AsRef<[u8]>>(
        &mut self,
        reason: Reason,
        error: icmp::Error,
        packet: &Packet<T>,
        reply: &mut ReplyBuffer,
        now: Instant,
    ) -> Outbound {
        self.stats.drops.add(reason);
        match error.reply(packet, packet.destination(), reply) {
            Some(len) if self.limiter.allow(now) => Outbound::Reply(len),
            _ => Outbound::Drop,
        }
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::wire::{checksum, ipv4};

    const HOP: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 168, 0, 12), 8285);

    fn engine() -> Engine {
        let mut table = Table::new("10.5.0.0/16".parse().unwrap(), 24);
        table.set("10.5.2.0/24".parse().unwrap(), HOP);
        Engine::new(table)
    }

    fn packet(destination: [u8; 4], ttl: u8) -> Vec<u8> {
        let header = ipv4::Header {
            total_len: 36,
            ttl,
            protocol: 17,
            source: Ipv4Addr::new(10, 5, 1, 2),
            destination: destination.into(),
        };
        [&header.to_bytes()[..], b"ABCDEFGHIJKLMNOP"].concat()
    }

    fn out(engine: &mut Engine, packet: &mut [u8]) -> (Outbound, ReplyBuffer) {
        let mut reply = [0; icmp::MAX_ERROR_LEN];
        (engine.outbound(packet, &mut reply, Instant::now()), reply)
    }

    #[test]
    fn known_subnet_is_sent_with_a_hop_less() {
        let (mut engine, mut bytes) = (engine(), packet([10, 5, 2, 7], 64));
        assert_eq!(out(&mut engine, &mut bytes).0, Outbound::Send { to: HOP, len: 36 });
        assert_eq!(bytes, packet([10, 5, 2, 7], 63));
    }

    #[test]
    fn bytes_after_the_packet_stay_home() {
        let (mut engine, mut bytes) = (engine(), packet([10, 5, 2, 7], 64));
        bytes.extend([0xee; 5]);
        assert_eq!(out(&mut engine, &mut bytes).0, Outbound::Send { to: HOP, len: 36 });
        bytes[8] = 64;
        assert_eq!(engine.inbound(&mut bytes), Some(36));
    }

    #[test]
    fn unknown_subnet_is_answered_from_the_address_it_was_for() {
        let mut engine = engine();
        let (verdict, reply) = out(&mut engine, &mut packet([10, 5, 9, 7], 64));
        assert_eq!(verdict, Outbound::Reply(56));
        let answer = Packet::new(&reply[..56]).unwrap();
        assert_eq!(answer.source(), Ipv4Addr::new(10, 5, 9, 7));
        assert_eq!(answer.destination(), Ipv4Addr::new(10, 5, 1, 2));
        assert_eq!(answer.payload()[..2], [3, 0]);
        assert_eq!(checksum::of(answer.payload()), 0);
        assert_eq!(engine.stats.drops.count(Reason::NoRoute), 1);
    }

    #[test]
    fn last_hop_is_answered_on_the_way_out_only() {
        for ttl in [0, 1] {
            let mut engine = engine();
            let (verdict, reply) = out(&mut engine, &mut packet([10, 5, 2, 7], ttl));
            assert_eq!(verdict, Outbound::Reply(56));
            assert_eq!(reply[20..22], [11, 0]);
            assert_eq!(reply[28 + 8], ttl, "the quote shows the packet as it was");
            assert_eq!(engine.inbound(&mut packet([10, 5, 1, 2], ttl)), None);
            assert_eq!(engine.stats.drops.count(Reason::HopsUsedUp), 2);
        }
    }

    #[test]
    fn inbound_takes_a_hop_too() {
        let (mut engine, mut bytes) = (engine(), packet([10, 5, 1, 2], 2));
        assert_eq!(engine.inbound(&mut bytes), Some(36));
        assert_eq!(bytes, packet([10, 5, 1, 2], 1));
    }

    #[test]
    fn too_big_is_told_when_it_must_not_be_fragmented() {
        let (mut engine, mut reply) = (engine(), [0; icmp::MAX_ERROR_LEN]);
        let mut bytes = packet([10, 5, 2, 7], 64);
        assert_eq!(engine.too_big(&bytes, 1472, &mut reply, Instant::now()), Outbound::Drop);
        bytes[6] = 0x40;
        assert_eq!(engine.too_big(&bytes, 1472, &mut reply, Instant::now()), Outbound::Reply(56));
        assert_eq!(reply[20..22], [3, 4]);
        assert_eq!(reply[26..28], [0x05, 0xc0]);
        assert_eq!(engine.stats.drops.count(Reason::TooBig), 2);
    }

    #[test]
    fn rubbish_is_counted_by_kind() {
        let mut engine = engine();
        for rubbish in [&mut [][..], &mut [0x60; 40], &mut [0; 20]] {
            assert_eq!(engine.inbound(rubbish), None);
        }
        assert_eq!(engine.inbound(&mut [0x45; 19]), None);
        assert_eq!(out(&mut engine, &mut [0x45; 36]).0, Outbound::Drop, "longer than its buffer");
        assert_eq!(engine.stats.drops.count(Reason::NotIpv4), 3);
        assert_eq!(engine.stats.drops.count(Reason::Malformed), 2);
    }

    #[test]
    fn answers_are_limited_drops_are_not() {
        let (mut engine, now, mut reply) = (engine(), Instant::now(), [0; icmp::MAX_ERROR_LEN]);
        let mut answered = 0;
        for _ in 0..10_000 {
            let verdict = engine.outbound(&mut packet([10, 5, 9, 7], 64), &mut reply, now);
            answered += usize::from(matches!(verdict, Outbound::Reply(_)));
        }
        assert!((1..=200).contains(&answered), "{answered}");
        assert_eq!(engine.stats.drops.count(Reason::NoRoute), 10_000);
    }

    #[test]
    fn every_reason_has_its_own_counter() {
        let mut drops = Drops::default();
        for (index, reason) in (1..).zip(Drops::REASONS) {
            (0..index).for_each(|_| drops.add(reason));
        }
        assert_eq!(Drops::REASONS.map(|reason| drops.count(reason)), [1, 2, 3, 4, 5, 6, 7, 8]);
    }

    /// Hostile bytes: no panic, and never a length beyond the buffer.
    #[test]
    fn mutated_packets() {
        let (mut engine, now) = (engine(), Instant::now());
        let mut reply = [0; icmp::MAX_ERROR_LEN];
        let mut seed = 3u32;
        let (mut sent, mut delivered) = (0, 0);
        for round in 0..30_000usize {
            let mut bytes = packet([10, 5, 2, 7], 64);
            for _ in 0..round % 4 {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let [at, value, ..] = seed.to_be_bytes();
                bytes[usize::from(at) % 36] = value;
            }
            let cut = if round % 3 == 0 { round % 37 } else { 36 };
            match engine.outbound(&mut bytes[..cut], &mut reply, now) {
                Outbound::Send { len, .. } => {
                    assert!(len <= cut);
                    sent += 1;
                }
                Outbound::Reply(len) => assert!(len <= reply.len()),
                Outbound::Drop => {}
            }
            if let Some(len) = engine.inbound(&mut bytes[..cut]) {
                assert!(len <= cut);
                delivered += 1;
            }
        }
        assert!(sent > 1000 && delivered > 1000);
    }
}
