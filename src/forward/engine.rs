//! The decisions of the data plane: what becomes of one packet.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Instant;

use ipnet::IpNet;

use super::limit::Limiter;
use super::stats::{Reason, Stats};
use super::table::Table;
use crate::wire::ip::Packet;
use crate::wire::{icmp, icmpv6, ip, ipv6};

/// Room for one answer to a packet that cannot be forwarded.
pub type ReplyBuffer = [u8; icmpv6::MAX_ERROR_LEN];

/// Which host carries which subnet. Packets of each version are carried over the same version.
#[derive(Debug)]
pub struct Routes {
    /// IPv4, if it is carried.
    pub v4: Option<Table<Ipv4Addr>>,
    /// IPv6, if it is carried.
    pub v6: Option<Table<Ipv6Addr>>,
}

impl Routes {
    /// Sends packets for `subnet` to `hop` from now on. `false` for versions that are not carried, or differ.
    pub fn set(&mut self, subnet: IpNet, hop: IpAddr) -> bool {
        match (subnet, hop, &mut self.v4, &mut self.v6) {
            (IpNet::V4(subnet), IpAddr::V4(hop), Some(table), _) => {
                table.set(subnet.addr(), subnet.prefix_len(), hop);
                true
            }
            (IpNet::V6(subnet), IpAddr::V6(hop), _, Some(table)) => {
                table.set(subnet.addr(), subnet.prefix_len(), hop);
                true
            }
            _ => false,
        }
    }

    /// Sends packets for `subnet` nowhere from now on.
    pub fn remove(&mut self, subnet: IpNet) {
        match (subnet, &mut self.v4, &mut self.v6) {
            (IpNet::V4(subnet), Some(table), _) => table.remove(subnet.addr(), subnet.prefix_len()),
            (IpNet::V6(subnet), _, Some(table)) => table.remove(subnet.addr(), subnet.prefix_len()),
            _ => {}
        }
    }

    /// The host that carries `address`.
    #[inline]
    pub fn lookup(&self, address: IpAddr) -> Option<IpAddr> {
        match address {
            IpAddr::V4(address) => self.v4.as_ref()?.lookup(address).map(IpAddr::V4),
            IpAddr::V6(address) => self.v6.as_ref()?.lookup(address).map(IpAddr::V6),
        }
    }
}

/// What becomes of a packet from the TUN device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outbound {
    /// Send its first `len` bytes there.
    Send {
        /// The other host.
        to: IpAddr,
        /// Bytes.
        len: usize,
    },
    /// Drop it, and write this many bytes of the reply buffer to the TUN device.
    Reply(usize),
    /// Drop it.
    Drop,
}

/// The decisions.
#[derive(Debug)]
pub struct Engine {
    /// Which host carries which subnet.
    pub routes: Routes,
    /// Counters.
    pub stats: Stats,
    /// Must a packet come from the host that carries its source?
    check_source: bool,
    refusals: Limiter,
    /// On its own, so that a scan of unknown addresses cannot keep path MTUs from being found.
    too_big: Limiter,
}

impl Engine {
    /// An engine that starts without a packet counted.
    ///
    /// With `check_source` a packet is taken only from the host that carries its source address. Without, where it came
    /// from is not looked at, as in the Go flanneld: behind NAT a host sends from another address than it publishes.
    pub fn new(routes: Routes, check_source: bool) -> Self {
        Self {
            routes,
            stats: Stats::default(),
            check_source,
            refusals: Limiter::new(),
            too_big: Limiter::new(),
        }
    }

    /// A packet, or a super-packet, from the TUN device, to be changed in place: one hop is taken off.
    #[inline]
    pub fn outbound(
        &mut self,
        bytes: &mut [u8],
        reply: &mut ReplyBuffer,
        now: Instant,
    ) -> Outbound {
        let mut packet = match parse(bytes) {
            Ok(packet) => packet,
            Err(reason) => return self.drop(reason),
        };
        let destination = packet.destination();
        if is_link_scope(destination) {
            return self.drop(Reason::LinkScope);
        }
        let Some(to) = self.routes.lookup(destination) else {
            self.stats.drops.add(Reason::NoRoute);
            return self.refuse(icmp::Error::NetUnreachable, bytes, reply, now);
        };
        if !packet.take_hop() {
            self.stats.drops.add(Reason::HopsUsedUp);
            return self.refuse(icmp::Error::TimeExceeded, bytes, reply, now);
        }
        Outbound::Send { to, len: packet.total_len() }
    }

    /// The packet that begins with `front` is longer than the way to its host carries: it is dropped, and its sender told of
    /// the MTU that `mtu` finds out. Not for one that [may be carried in fragments](may_be_cut).
    pub fn too_big(
        &mut self,
        front: &[u8],
        mtu: impl FnOnce() -> u16,
        reply: &mut ReplyBuffer,
        now: Instant,
    ) -> Outbound {
        self.stats.drops.add(Reason::TooBig);
        if !self.too_big.allow(now) {
            return Outbound::Drop;
        }
        let mtu = match ip::version(front) {
            // hosts are told of no less than they must be able to use
            6 => mtu().max(1280),
            _ => mtu(),
        };
        message(icmp::Error::TooBig { mtu }, front, reply).map_or(Outbound::Drop, Outbound::Reply)
    }

    /// There is no way to the host of the packet that begins with `front`.
    pub fn unreachable(&mut self, front: &[u8], reply: &mut ReplyBuffer, now: Instant) -> Outbound {
        self.refuse(icmp::Error::NetUnreachable, front, reply, now)
    }

    /// A datagram from `from`, to be changed in place. Returns how many of its bytes to give to the TUN device.
    #[inline]
    pub fn inbound(&mut self, datagram: &mut [u8], from: IpAddr) -> Option<usize> {
        match self.accept(datagram, from) {
            Ok(len) => Some(len),
            Err(reason) => {
                self.stats.drops.add(reason);
                None
            }
        }
    }

    #[inline]
    fn accept(&self, datagram: &mut [u8], from: IpAddr) -> Result<usize, Reason> {
        let mut packet = parse(datagram)?;
        if self.check_source {
            match self.routes.lookup(packet.source()) {
                None => return Err(Reason::UnknownSource),
                Some(host) if host != from => return Err(Reason::WrongSender),
                Some(_) => {}
            }
        }
        if !packet.take_hop() {
            return Err(Reason::HopsUsedUp);
        }
        Ok(packet.total_len())
    }

    fn drop(&mut self, reason: Reason) -> Outbound {
        self.stats.drops.add(reason);
        Outbound::Drop
    }

    /// Tells the source of a packet that was dropped why, unless that was done too often of late.
    ///
    /// The message comes from the address that the packet was for. The Go flanneld writes the device's own address, and so
    /// its messages never arrive: to the kernel a packet from outside with one of its own addresses is a martian.
    fn refuse(
        &mut self,
        error: icmp::Error,
        front: &[u8],
        reply: &mut ReplyBuffer,
        now: Instant,
    ) -> Outbound {
        match message(error, front, reply) {
            Some(len) if self.refusals.allow(now) => Outbound::Reply(len),
            _ => Outbound::Drop,
        }
    }
}

/// Writes what the source of a packet that begins with `front` is told. Returns its length.
fn message(error: icmp::Error, front: &[u8], reply: &mut ReplyBuffer) -> Option<usize> {
    match Packet::front(front) {
        Ok(Packet::V4(packet)) => {
            error.reply(&packet, packet.destination(), reply.first_chunk_mut()?)
        }
        Ok(Packet::V6(packet)) => icmpv6::reply(error, &packet, packet.destination(), reply),
        Err(_) => None,
    }
}

/// May the packet that begins with `front` be carried in fragments, if it is too long for its way? It does not ask for anything
/// else, or it is as short as every IPv6 link must carry.
pub fn may_be_cut(front: &[u8]) -> bool {
    match Packet::front(front) {
        Ok(Packet::V4(packet)) => !packet.dont_fragment(),
        Ok(Packet::V6(packet)) => packet.total_len() <= ipv6::MIN_MTU,
        Err(_) => false,
    }
}

#[inline]
fn parse(bytes: &mut [u8]) -> Result<Packet<&mut [u8]>, Reason> {
    let is_ip = matches!(ip::version(bytes), 4 | 6);
    Packet::new(bytes).map_err(|_| if is_ip { Reason::Malformed } else { Reason::NotIp })
}

/// Is this for the hosts of one link, so that no router passes it on?
#[inline]
fn is_link_scope(destination: IpAddr) -> bool {
    match destination {
        IpAddr::V4(v4) => v4.is_multicast() || v4.is_broadcast() || v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_multicast() || v6.is_unicast_link_local(),
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)]
mod tests {
    use super::*;
    use crate::wire::{checksum, ipv4};

    const HOP6: &str = "2001:db8::12";
    const FROM: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 168, 0, 99));
    const HOP: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 168, 0, 12));

    fn engine() -> Engine {
        let v4 = Table::new(Ipv4Addr::new(10, 5, 0, 0), 16, 24);
        let v6 = Table::new("fd00:5::".parse().unwrap(), 48, 64);
        let mut routes = Routes { v4: Some(v4), v6: Some(v6) };
        assert!(routes.set("10.5.2.0/24".parse().unwrap(), HOP));
        assert!(routes.set("fd00:5:0:2::/64".parse().unwrap(), HOP6.parse().unwrap()));
        Engine::new(routes, false)
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
        let mut reply = [0; icmpv6::MAX_ERROR_LEN];
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
        assert_eq!(engine.inbound(&mut bytes, FROM), Some(36));
    }

    #[test]
    fn unknown_subnet_is_answered_from_the_address_it_was_for() {
        let mut engine = engine();
        let (verdict, reply) = out(&mut engine, &mut packet([10, 5, 9, 7], 64));
        assert_eq!(verdict, Outbound::Reply(56));
        let answer = ipv4::Packet::new(&reply[..56]).unwrap();
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
            assert_eq!(engine.inbound(&mut packet([10, 5, 1, 2], ttl), FROM), None);
            assert_eq!(engine.stats.drops.count(Reason::HopsUsedUp), 2);
        }
    }

    #[test]
    fn inbound_takes_a_hop_too() {
        let (mut engine, mut bytes) = (engine(), packet([10, 5, 1, 2], 2));
        assert_eq!(engine.inbound(&mut bytes, FROM), Some(36));
        assert_eq!(bytes, packet([10, 5, 1, 2], 1));
    }

    #[test]
    fn too_big_is_told_when_it_must_not_be_fragmented() {
        let (mut engine, mut reply) = (engine(), [0; icmpv6::MAX_ERROR_LEN]);
        let mut bytes = packet([10, 5, 2, 7], 64);
        assert!(may_be_cut(&bytes));
        bytes[6] = 0x40;
        assert!(!may_be_cut(&bytes));
        // the front of it is enough
        let front = &bytes[..28];
        let verdict = engine.too_big(front, || 1472, &mut reply, Instant::now());
        assert_eq!(verdict, Outbound::Reply(56));
        assert_eq!(reply[20..22], [3, 4]);
        assert_eq!(reply[26..28], [0x05, 0xc0]);
        assert_eq!(engine.stats.drops.count(Reason::TooBig), 1);
    }

    #[test]
    fn rubbish_is_counted_by_kind() {
        let mut engine = engine();
        for rubbish in [&mut [][..], &mut [0x50; 40], &mut [0; 20]] {
            assert_eq!(engine.inbound(rubbish, FROM), None);
        }
        assert_eq!(engine.inbound(&mut [0x45; 19], FROM), None);
        assert_eq!(out(&mut engine, &mut [0x45; 36]).0, Outbound::Drop, "longer than its buffer");
        assert_eq!(engine.stats.drops.count(Reason::NotIp), 3);
        assert_eq!(engine.stats.drops.count(Reason::Malformed), 2);
    }

    #[test]
    fn answers_are_limited_drops_are_not() {
        let (mut engine, now, mut reply) = (engine(), Instant::now(), [0; icmpv6::MAX_ERROR_LEN]);
        let mut answered = 0;
        for _ in 0..10_000 {
            let verdict = engine.outbound(&mut packet([10, 5, 9, 7], 64), &mut reply, now);
            answered += usize::from(matches!(verdict, Outbound::Reply(_)));
        }
        assert!((1..=200).contains(&answered), "{answered}");
        assert_eq!(engine.stats.drops.count(Reason::NoRoute), 10_000);
    }

    fn packet6(destination: &str, hop_limit: u8, len: u16) -> Vec<u8> {
        let header = ipv6::Header {
            payload_len: len,
            next_header: 17,
            hop_limit,
            source: "fd00:5:0:1::2".parse().unwrap(),
            destination: destination.parse().unwrap(),
        };
        [&header.to_bytes()[..], &vec![7; len.into()]].concat()
    }

    #[test]
    fn ipv6_goes_to_ipv6_hosts() {
        let mut engine = engine();
        let mut bytes = packet6("fd00:5:0:2::7", 64, 16);
        let to = HOP6.parse().unwrap();
        assert_eq!(out(&mut engine, &mut bytes).0, Outbound::Send { to, len: 56 });
        assert_eq!(bytes, packet6("fd00:5:0:2::7", 63, 16));
        assert_eq!(engine.inbound(&mut bytes, FROM), Some(56));
        let (verdict, reply) = out(&mut engine, &mut packet6("fd00:5:0:9::7", 64, 16));
        assert_eq!((verdict, reply[40]), (Outbound::Reply(104), 1));
        let (verdict, reply) = out(&mut engine, &mut packet6("fd00:5:0:2::7", 1, 16));
        assert_eq!((verdict, reply[40]), (Outbound::Reply(104), 3));
        let v4: IpAddr = HOP;
        assert!(!engine.routes.set("fd00:5:0:3::/64".parse().unwrap(), v4), "no IPv6 over IPv4");
    }

    #[test]
    fn ipv6_is_told_of_no_less_than_1280() {
        let (mut engine, mut reply) = (engine(), [0; icmpv6::MAX_ERROR_LEN]);
        let long = packet6("fd00:5:0:2::7", 64, 1300);
        let verdict = engine.too_big(&long, || 1000, &mut reply, Instant::now());
        assert_eq!((verdict, may_be_cut(&long)), (Outbound::Reply(1280), false));
        assert_eq!((reply[40], &reply[44..48]), (2, &1280u32.to_be_bytes()[..]));
        let short = packet6("fd00:5:0:2::7", 64, 1240);
        assert!(may_be_cut(&short));
    }

    #[test]
    fn what_is_for_the_link_stays_here_and_is_not_answered() {
        let mut engine = engine();
        for destination in [[224, 0, 0, 1], [255, 255, 255, 255], [169, 254, 1, 1]] {
            assert_eq!(out(&mut engine, &mut packet(destination, 64)).0, Outbound::Drop);
        }
        for destination in ["ff02::2", "fe80::1"] {
            assert_eq!(out(&mut engine, &mut packet6(destination, 255, 8)).0, Outbound::Drop);
        }
        assert_eq!(engine.stats.drops.count(Reason::LinkScope), 5);
    }

    #[test]
    fn source_check() {
        let mut engine = engine();
        engine.check_source = true;
        let from = |source: [u8; 4]| {
            let mut bytes = packet([10, 5, 1, 2], 64);
            bytes[12..16].copy_from_slice(&source);
            bytes
        };
        assert_eq!(engine.inbound(&mut from([10, 5, 2, 9]), HOP), Some(36));
        assert_eq!(engine.inbound(&mut from([10, 5, 2, 9]), FROM), None, "another host");
        assert_eq!(engine.inbound(&mut from([10, 5, 3, 9]), HOP), None, "nobody's subnet");
        assert_eq!(engine.inbound(&mut from([8, 8, 8, 8]), HOP), None, "outside of the network");
        let counts =
            [Reason::WrongSender, Reason::UnknownSource].map(|r| engine.stats.drops.count(r));
        assert_eq!(counts, [1, 2]);
    }

    /// Hostile bytes: no panic, and never a length beyond the buffer.
    #[test]
    fn mutated_packets() {
        let (mut engine, now) = (engine(), Instant::now());
        let mut reply = [0; icmpv6::MAX_ERROR_LEN];
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
            if let Some(len) = engine.inbound(&mut bytes[..cut], FROM) {
                assert!(len <= cut);
                delivered += 1;
            }
        }
        assert!(sent > 1000 && delivered > 1000);
    }
}
