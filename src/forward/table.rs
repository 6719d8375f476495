//! Which host carries which subnet: the udp backend's route table.
//!
//! Nearly every subnet of a network has the length that the network config gives, so such a subnet's place in the network
//! is its index in an array, and a look-up is a mask, a shift and a load. Other lengths (reservations, leases of an earlier
//! config) go to sorted lists beside it. The longest prefix wins, as in a kernel.

use std::net::{Ipv4Addr, SocketAddrV4};

use ipnet::Ipv4Net;

/// Networks with more subnets than this do without the array (8 bytes a subnet) and live in the sorted lists alone.
const MAX_SLOTS: usize = 1 << 16;

/// Subnet → underlay address and port of its host. It grows with the leases, which the store bounds.
#[derive(Debug)]
pub struct Table {
    network: Ipv4Net,
    subnet_len: u8,
    /// One slot for each subnet of the network, in order of address.
    slots: Box<[Option<SocketAddrV4>]>,
    /// Every other prefix, longest first.
    others: Vec<Group>,
}

/// All prefixes of one length, sorted by address.
#[derive(Debug)]
struct Group {
    prefix_len: u8,
    routes: Vec<(Ipv4Net, SocketAddrV4)>,
}

impl Group {
    fn position(&self, subnet: Ipv4Net) -> Result<usize, usize> {
        self.routes.binary_search_by_key(&subnet, |(known, _)| *known)
    }

    fn lookup(&self, destination: Ipv4Addr) -> Option<SocketAddrV4> {
        let subnet = Ipv4Net::new(destination, self.prefix_len).ok()?.trunc();
        self.position(subnet).ok().map(|at| self.routes[at].1)
    }
}

impl Table {
    /// An empty table for a network that is cut into subnets of `subnet_len` bits.
    pub fn new(network: Ipv4Net, subnet_len: u8) -> Self {
        let bits = u32::from(subnet_len.min(32)).checked_sub(u32::from(network.prefix_len()));
        let slots =
            bits.and_then(|bits| 1usize.checked_shl(bits)).filter(|slots| *slots <= MAX_SLOTS);
        Self {
            network: network.trunc(),
            subnet_len: subnet_len.min(32),
            slots: vec![None; slots.unwrap_or(0)].into(),
            others: Vec::new(),
        }
    }

    /// Adds a subnet, or gives it another next hop. Host bits of `subnet` are ignored.
    pub fn set(&mut self, subnet: Ipv4Net, hop: SocketAddrV4) {
        let subnet = subnet.trunc();
        if let Some(slot) = self.slot_of(subnet) {
            self.slots[slot] = Some(hop);
            return;
        }
        let len = subnet.prefix_len();
        let at = self.others.partition_point(|group| group.prefix_len > len);
        if self.others.get(at).is_none_or(|group| group.prefix_len != len) {
            self.others.insert(at, Group { prefix_len: len, routes: Vec::new() });
        }
        let group = &mut self.others[at];
        match group.position(subnet) {
            Ok(at) => group.routes[at].1 = hop,
            Err(at) => group.routes.insert(at, (subnet, hop)),
        }
    }

    /// Removes a subnet. An unknown one is none of our business.
    pub fn remove(&mut self, subnet: Ipv4Net) {
        let subnet = subnet.trunc();
        if let Some(slot) = self.slot_of(subnet) {
            self.slots[slot] = None;
            return;
        }
        for group in self.others.iter_mut().filter(|group| group.prefix_len == subnet.prefix_len())
        {
            if let Ok(at) = group.position(subnet) {
                group.routes.remove(at);
            }
        }
        self.others.retain(|group| !group.routes.is_empty());
    }

    /// Where packets for `destination` go.
    #[inline]
    pub fn lookup(&self, destination: Ipv4Addr) -> Option<SocketAddrV4> {
        let indexed = self.slot(destination).and_then(|slot| self.slots[slot]);
        if self.others.is_empty() {
            return indexed;
        }
        let beats_index = |group: &&Group| indexed.is_none() || group.prefix_len > self.subnet_len;
        let other =
            self.others.iter().take_while(beats_index).find_map(|group| group.lookup(destination));
        other.or(indexed)
    }

    /// The slot of a whole subnet, when it has one.
    fn slot_of(&self, subnet: Ipv4Net) -> Option<usize> {
        if subnet.prefix_len() == self.subnet_len { self.slot(subnet.network()) } else { None }
    }

    /// The slot in whose subnet `address` lies.
    #[inline]
    fn slot(&self, address: Ipv4Addr) -> Option<usize> {
        // below the network wraps around to a large offset, which no slot has
        let offset = address.to_bits().wrapping_sub(self.network.network().to_bits());
        let slot = offset.checked_shr(32 - u32::from(self.subnet_len)).unwrap_or(0);
        usize::try_from(slot).ok().filter(|slot| *slot < self.slots.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    fn ip(text: &str) -> Ipv4Addr {
        text.parse().unwrap()
    }

    fn hop(last: u8) -> SocketAddrV4 {
        SocketAddrV4::new(Ipv4Addr::new(192, 168, 0, last), 8285)
    }

    #[test]
    fn finds_sets_anew_and_removes() {
        let mut table = Table::new(net("10.5.0.0/16"), 24);
        assert_eq!(table.lookup(ip("10.5.3.4")), None);
        table.set(net("10.5.3.0/24"), hop(1));
        table.set(net("10.5.0.0/24"), hop(2));
        table.set(net("10.5.255.0/24"), hop(3));
        assert_eq!(table.lookup(ip("10.5.3.0")), Some(hop(1)));
        assert_eq!(table.lookup(ip("10.5.3.255")), Some(hop(1)));
        assert_eq!(table.lookup(ip("10.5.4.0")), None);
        assert_eq!(table.lookup(ip("10.5.255.255")), Some(hop(3)));
        for outside in ["10.4.255.255", "10.6.0.0", "0.0.0.0", "255.255.255.255"] {
            assert_eq!(table.lookup(ip(outside)), None, "{outside}");
        }
        table.set(net("10.5.3.0/24"), hop(9));
        assert_eq!(table.lookup(ip("10.5.3.1")), Some(hop(9)));
        table.remove(net("10.5.3.0/24"));
        table.remove(net("10.5.77.0/24"));
        assert_eq!(table.lookup(ip("10.5.3.1")), None);
        assert_eq!(table.lookup(ip("10.5.0.1")), Some(hop(2)));
    }

    #[test]
    fn longest_prefix_wins_on_either_side_of_the_index() {
        let mut table = Table::new(net("10.5.0.0/16"), 24);
        table.set(net("10.5.0.0/16"), hop(16));
        table.set(net("10.5.3.0/24"), hop(24));
        table.set(net("10.5.3.128/25"), hop(25));
        table.set(net("172.16.0.0/24"), hop(7));
        assert_eq!(table.lookup(ip("10.5.3.200")), Some(hop(25)));
        assert_eq!(table.lookup(ip("10.5.3.1")), Some(hop(24)));
        assert_eq!(table.lookup(ip("10.5.9.1")), Some(hop(16)));
        assert_eq!(
            table.lookup(ip("172.16.0.9")),
            Some(hop(7)),
            "outside the network, with the usual length"
        );
        table.remove(net("10.5.3.128/25"));
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
            let mut table = Table::new(net(network), len);
            let subnet = Ipv4Net::new(ip("10.0.0.0"), len).unwrap();
            table.set(subnet, hop(1));
            assert_eq!(table.lookup(ip("10.0.0.0")), Some(hop(1)), "{network} {len}");
            table.remove(subnet);
            assert_eq!(table.lookup(ip("10.0.0.0")), None, "{network} {len}");
        }
    }

    /// Against the obvious model, with prefixes of every length around the index.
    #[test]
    fn agrees_with_a_linear_search() {
        let mut seed = 7u32;
        let mut random = || {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            seed >> 8
        };
        let mut table = Table::new(net("10.5.0.0/20"), 24);
        let mut model: Vec<(Ipv4Net, SocketAddrV4)> = Vec::new();
        let mut hits = 0;
        for _ in 0..5000 {
            let address = Ipv4Addr::from(0x0a05_0000 | (random() & 0x1fff));
            let len = 18 + u8::try_from(random() % 13).unwrap();
            let subnet =
                Ipv4Net::new(address, if random() % 2 == 0 { 24 } else { len }).unwrap().trunc();
            model.retain(|(known, _)| *known != subnet);
            if random() % 3 == 0 {
                table.remove(subnet);
            } else {
                let hop = hop(random().to_le_bytes()[0]);
                table.set(subnet, hop);
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
