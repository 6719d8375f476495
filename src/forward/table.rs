//! Which host carries which subnet: the udp backend's route table, one for each address family.
//!
//! Nearly every subnet of a network has the length that the network config gives, so such a subnet's place in the network
//! is its index in an array, and a look-up is a mask, a shift and a load. Other lengths (reservations, leases of an earlier
//! config) go to sorted lists beside it. The longest prefix wins, as in a kernel.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

/// Networks with more subnets than this do without the array and live in the sorted lists alone.
const MAX_SLOTS: usize = 1 << 16;

/// An address of either family, as a number.
pub trait Address: Copy + fmt::Debug {
    /// The number itself; 0 is no host's address and stands for none.
    type Raw: Copy + Default + PartialEq + fmt::Debug;
    /// Bits of an address.
    const BITS: u8;

    /// The address as the upper bits of a number, for arithmetic with prefixes.
    fn key(self) -> u128;
    /// The number.
    fn raw(self) -> Self::Raw;
    /// The address of a number.
    fn from_raw(raw: Self::Raw) -> Self;
}

impl Address for Ipv4Addr {
    type Raw = u32;
    const BITS: u8 = 32;

    #[inline]
    fn key(self) -> u128 {
        u128::from(self.to_bits()) << 96
    }

    fn raw(self) -> u32 {
        self.to_bits()
    }

    #[inline]
    fn from_raw(raw: u32) -> Self {
        Self::from_bits(raw)
    }
}

impl Address for Ipv6Addr {
    type Raw = u128;
    const BITS: u8 = 128;

    #[inline]
    fn key(self) -> u128 {
        self.to_bits()
    }

    fn raw(self) -> u128 {
        self.to_bits()
    }

    #[inline]
    fn from_raw(raw: u128) -> Self {
        Self::from_bits(raw)
    }
}

/// Subnet → underlay address of its host. It grows with the leases, which the store bounds.
#[derive(Debug)]
pub struct Table<A: Address> {
    network: u128,
    subnet_len: u8,
    /// One slot for each subnet of the network, in order of address. Memory that no lease needs is never touched.
    slots: Box<[A::Raw]>,
    /// Every other prefix, longest first.
    others: Vec<Group<A>>,
}

/// All prefixes of one length, sorted by address.
#[derive(Debug)]
struct Group<A> {
    prefix_len: u8,
    routes: Vec<(u128, A)>,
}

impl<A: Address> Group<A> {
    fn position(&self, network: u128) -> Result<usize, usize> {
        self.routes.binary_search_by_key(&network, |(known, _)| *known)
    }

    fn lookup(&self, destination: u128) -> Option<A> {
        let at = self.position(truncate(destination, self.prefix_len)).ok()?;
        Some(self.routes[at].1)
    }
}

/// The prefix of this length.
#[inline]
fn truncate(key: u128, prefix_len: u8) -> u128 {
    key & u128::MAX.checked_shl(128 - u32::from(prefix_len)).unwrap_or(0)
}

impl<A: Address> Table<A> {
    /// An empty table for a network that is cut into subnets of `subnet_len` bits. Host bits of `network` are ignored.
    pub fn new(network: A, prefix_len: u8, subnet_len: u8) -> Self {
        let subnet_len = subnet_len.min(A::BITS);
        let bits = u32::from(subnet_len).checked_sub(u32::from(prefix_len));
        let slots =
            bits.and_then(|bits| 1usize.checked_shl(bits)).filter(|slots| *slots <= MAX_SLOTS);
        Self {
            network: truncate(network.key(), prefix_len),
            subnet_len,
            slots: vec![A::Raw::default(); slots.unwrap_or(0)].into(),
            others: Vec::new(),
        }
    }

    /// Adds a subnet, or gives it another next hop. Host bits of `subnet` are ignored.
    pub fn set(&mut self, subnet: A, prefix_len: u8, hop: A) {
        let subnet = truncate(subnet.key(), prefix_len);
        if let Some(slot) = self.slot_of(subnet, prefix_len) {
            self.slots[slot] = hop.raw();
            return;
        }
        let at = self.others.partition_point(|group| group.prefix_len > prefix_len);
        if self.others.get(at).is_none_or(|group| group.prefix_len != prefix_len) {
            self.others.insert(at, Group { prefix_len, routes: Vec::new() });
        }
        let group = &mut self.others[at];
        match group.position(subnet) {
            Ok(at) => group.routes[at].1 = hop,
            Err(at) => group.routes.insert(at, (subnet, hop)),
        }
    }

    /// Removes a subnet. An unknown one is none of our business.
    pub fn remove(&mut self, subnet: A, prefix_len: u8) {
        let subnet = truncate(subnet.key(), prefix_len);
        if let Some(slot) = self.slot_of(subnet, prefix_len) {
            self.slots[slot] = A::Raw::default();
            return;
        }
        for group in self.others.iter_mut().filter(|group| group.prefix_len == prefix_len) {
            if let Ok(at) = group.position(subnet) {
                group.routes.remove(at);
            }
        }
        self.others.retain(|group| !group.routes.is_empty());
    }

    /// Where packets for `destination` go.
    #[inline]
    pub fn lookup(&self, destination: A) -> Option<A> {
        let key = destination.key();
        let indexed = self.slot(key).map(|slot| self.slots[slot]);
        let indexed = indexed.filter(|raw| *raw != A::Raw::default()).map(A::from_raw);
        if self.others.is_empty() {
            return indexed;
        }
        let beats_index =
            |group: &&Group<A>| indexed.is_none() || group.prefix_len > self.subnet_len;
        let other = self.others.iter().take_while(beats_index).find_map(|group| group.lookup(key));
        other.or(indexed)
    }

    /// The slot of a whole subnet, when it has one.
    fn slot_of(&self, subnet: u128, prefix_len: u8) -> Option<usize> {
        if prefix_len == self.subnet_len { self.slot(subnet) } else { None }
    }

    /// The slot in whose subnet an address lies.
    #[inline]
    fn slot(&self, key: u128) -> Option<usize> {
        // below the network wraps around to a large offset, which no slot has
        let offset = key.wrapping_sub(self.network);
        let slot = offset.checked_shr(128 - u32::from(self.subnet_len)).unwrap_or(0);
        usize::try_from(slot).ok().filter(|slot| *slot < self.slots.len())
    }
}

#[cfg(test)]
mod tests {
    use ipnet::Ipv4Net;

    use super::*;

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    fn new(network: Ipv4Net, subnet_len: u8) -> Table<Ipv4Addr> {
        Table::new(network.addr(), network.prefix_len(), subnet_len)
    }

    fn set(table: &mut Table<Ipv4Addr>, subnet: Ipv4Net, hop: Ipv4Addr) {
        table.set(subnet.addr(), subnet.prefix_len(), hop);
    }

    fn remove(table: &mut Table<Ipv4Addr>, subnet: Ipv4Net) {
        table.remove(subnet.addr(), subnet.prefix_len());
    }

    fn ip(text: &str) -> Ipv4Addr {
        text.parse().unwrap()
    }

    fn hop(last: u8) -> Ipv4Addr {
        Ipv4Addr::new(192, 168, 0, last)
    }

    #[test]
    fn finds_sets_anew_and_removes() {
        let mut table = new(net("10.5.0.0/16"), 24);
        assert_eq!(table.lookup(ip("10.5.3.4")), None);
        set(&mut table, net("10.5.3.0/24"), hop(1));
        set(&mut table, net("10.5.0.0/24"), hop(2));
        set(&mut table, net("10.5.255.0/24"), hop(3));
        assert_eq!(table.lookup(ip("10.5.3.0")), Some(hop(1)));
        assert_eq!(table.lookup(ip("10.5.3.255")), Some(hop(1)));
        assert_eq!(table.lookup(ip("10.5.4.0")), None);
        assert_eq!(table.lookup(ip("10.5.255.255")), Some(hop(3)));
        for outside in ["10.4.255.255", "10.6.0.0", "0.0.0.0", "255.255.255.255"] {
            assert_eq!(table.lookup(ip(outside)), None, "{outside}");
        }
        set(&mut table, net("10.5.3.0/24"), hop(9));
        assert_eq!(table.lookup(ip("10.5.3.1")), Some(hop(9)));
        remove(&mut table, net("10.5.3.0/24"));
        remove(&mut table, net("10.5.77.0/24"));
        assert_eq!(table.lookup(ip("10.5.3.1")), None);
        assert_eq!(table.lookup(ip("10.5.0.1")), Some(hop(2)));
    }

    #[test]
    fn longest_prefix_wins_on_either_side_of_the_index() {
        let mut table = new(net("10.5.0.0/16"), 24);
        set(&mut table, net("10.5.0.0/16"), hop(16));
        set(&mut table, net("10.5.3.0/24"), hop(24));
        set(&mut table, net("10.5.3.128/25"), hop(25));
        set(&mut table, net("172.16.0.0/24"), hop(7));
        assert_eq!(table.lookup(ip("10.5.3.200")), Some(hop(25)));
        assert_eq!(table.lookup(ip("10.5.3.1")), Some(hop(24)));
        assert_eq!(table.lookup(ip("10.5.9.1")), Some(hop(16)));
        assert_eq!(
            table.lookup(ip("172.16.0.9")),
            Some(hop(7)),
            "outside the network, with the usual length"
        );
        remove(&mut table, net("10.5.3.128/25"));
        assert_eq!(table.lookup(ip("10.5.3.200")), Some(hop(24)));
    }

    #[test]
    fn odd_shapes() {
        // whole address space, one subnet for all, one host a subnet, subnet shorter than the network, too many for an index
        for (network, len) in [
            ("0.0.0.0/0", 0),
            ("10.0.0.0/8", 8),
            ("10.0.0.0/20", 32),
            ("10.0.0.0/24", 16),
            ("10.0.0.0/8", 30),
        ] {
            let mut table = new(net(network), len);
            let subnet = Ipv4Net::new(ip("10.0.0.0"), len).unwrap();
            set(&mut table, subnet, hop(1));
            assert_eq!(table.lookup(ip("10.0.0.0")), Some(hop(1)), "{network} {len}");
            remove(&mut table, subnet);
            assert_eq!(table.lookup(ip("10.0.0.0")), None, "{network} {len}");
        }
    }

    #[test]
    fn ipv6() {
        let ip = |text: &str| text.parse::<Ipv6Addr>().unwrap();
        let mut table = Table::new(ip("fd00:5::"), 48, 64);
        table.set(ip("fd00:5:0:7::"), 64, ip("2001:db8::7"));
        table.set(ip("fd00:5:0:ffff::"), 64, ip("2001:db8::ff"));
        table.set(ip("fd00:6::"), 64, ip("2001:db8::6"));
        assert_eq!(table.lookup(ip("fd00:5:0:7::9")), Some(ip("2001:db8::7")));
        assert_eq!(table.lookup(ip("fd00:5:0:ffff:ffff::")), Some(ip("2001:db8::ff")));
        assert_eq!(table.lookup(ip("fd00:6::1")), Some(ip("2001:db8::6")));
        for nowhere in ["fd00:5:0:8::", "fd00:4:ffff:7::9", "::", "ffff::"] {
            assert_eq!(table.lookup(ip(nowhere)), None, "{nowhere}");
        }
        table.remove(ip("fd00:5:0:7::"), 64);
        assert_eq!(table.lookup(ip("fd00:5:0:7::9")), None);
    }

    /// Against the obvious model, with prefixes of every length around the index.
    #[test]
    fn agrees_with_a_linear_search() {
        let mut seed = 7u32;
        let mut random = || {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            seed >> 8
        };
        let mut table = new(net("10.5.0.0/20"), 24);
        let mut model: Vec<(Ipv4Net, Ipv4Addr)> = Vec::new();
        let mut hits = 0;
        for _ in 0..5000 {
            let address = Ipv4Addr::from(0x0a05_0000 | (random() & 0x1fff));
            let len = 18 + u8::try_from(random() % 13).unwrap();
            let subnet =
                Ipv4Net::new(address, if random() % 2 == 0 { 24 } else { len }).unwrap().trunc();
            model.retain(|(known, _)| *known != subnet);
            if random() % 3 == 0 {
                remove(&mut table, subnet);
            } else {
                let hop = hop(random().to_le_bytes()[0]);
                set(&mut table, subnet, hop);
                model.push((subnet, hop));
            }
            let probe = Ipv4Addr::from(0x0a05_0000 | (random() & 0x1fff));
            let best = model
                .iter()
                .filter(|(net, _)| net.contains(&probe))
                .max_by_key(|(net, _)| net.prefix_len());
            assert_eq!(table.lookup(probe), best.map(|(_, hop)| *hop));
            hits += usize::from(best.is_some());
        }
        assert!(hits > 1000);
    }
}
