//! The other hosts' leases: which are believed, and what each change in the store means for the data plane.
//!
//! Leases are hostile until shown otherwise. A lease is believed when its subnets lie inside of the network, the backend can
//! use it, and nobody older claims the same addresses; this host's own subnets are nobody else's. A bad lease harms itself.

use std::collections::BTreeMap;
use std::collections::btree_map::Range;
use std::rc::Rc;

use ipnet::{Ipv4Net, Ipv6Net};

use super::{Lease, LeaseEvent, Subnets};

/// What a change in the store means here. Leases are shared with the table: thousands may change at once.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Change {
    /// A peer that was not there, or not believed.
    Added(Rc<Lease>),
    /// A peer published something else.
    Updated {
        /// Before.
        old: Rc<Lease>,
        /// Now.
        new: Rc<Lease>,
    },
    /// A peer that was believed is gone.
    Removed(Rc<Lease>),
    /// A lease is not believed; if it was before, what it needed goes.
    Refused {
        /// The lease.
        lease: Rc<Lease>,
        /// Why.
        reason: String,
    },
}

/// Says whether the backend can use a lease at all.
pub type Judge<'a> = &'a dyn Fn(&Lease) -> Result<(), String>;

#[derive(Clone, PartialEq, Eq, Debug)]
struct Row {
    lease: Rc<Lease>,
    refused: Option<Box<str>>,
}

/// The table.
#[derive(Debug)]
pub struct LeaseTable {
    v4: Option<Ipv4Net>,
    v6: Option<Ipv6Net>,
    own: Subnets,
    rows: BTreeMap<Subnets, Row>,
    believed: Claims,
    /// Leases that are refused because an older one has their addresses.
    contested: usize,
}

/// Who has which addresses. The ranges never overlap.
#[derive(Debug, Default)]
struct Claims {
    v4: BTreeMap<u128, (u128, Subnets)>,
    v6: BTreeMap<u128, (u128, Subnets)>,
}

impl Claims {
    fn ranges(subnets: &Subnets) -> [Option<(u128, u128)>; 2] {
        [
            subnets
                .v4
                .map(|net| (u32::from(net.network()).into(), u32::from(net.broadcast()).into())),
            subnets.v6.map(|net| (net.network().into(), net.broadcast().into())),
        ]
    }

    fn rival(&self, subnets: &Subnets) -> Option<Subnets> {
        let find = |map: &BTreeMap<u128, (u128, Subnets)>, range: Option<(u128, u128)>| {
            let (first, last) = range?;
            let mut before: Range<'_, _, _> = map.range(..=last);
            before.next_back().filter(|(_, (end, _))| *end >= first).map(|(_, (_, owner))| *owner)
        };
        let [v4, v6] = Self::ranges(subnets);
        find(&self.v4, v4).or_else(|| find(&self.v6, v6))
    }

    fn insert(&mut self, subnets: Subnets) {
        let [v4, v6] = Self::ranges(&subnets);
        if let Some((first, last)) = v4 {
            self.v4.insert(first, (last, subnets));
        }
        if let Some((first, last)) = v6 {
            self.v6.insert(first, (last, subnets));
        }
    }

    fn remove(&mut self, subnets: &Subnets) {
        let [v4, v6] = Self::ranges(subnets);
        for (map, range) in [(&mut self.v4, v4), (&mut self.v6, v6)] {
            if let Some((first, _)) = range
                && map.get(&first).is_some_and(|(_, owner)| owner == subnets)
            {
                map.remove(&first);
            }
        }
    }
}

impl LeaseTable {
    /// An empty table for a network with these prefixes.
    pub fn new(v4: Option<Ipv4Net>, v6: Option<Ipv6Net>) -> Self {
        let (own, rows, believed) = (Subnets::default(), BTreeMap::new(), Claims::default());
        Self { v4, v6, own, rows, believed, contested: 0 }
    }

    /// Believed peers.
    pub fn len(&self) -> usize {
        self.believed().count()
    }

    /// Is nobody believed?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Every lease but our own, refused ones included.
    pub fn leases(&self) -> impl Iterator<Item = &Lease> {
        self.rows.values().map(|row| &*row.lease)
    }

    /// Believed peers' leases.
    pub fn believed(&self) -> impl Iterator<Item = &Lease> {
        self.rows.values().filter(|row| row.refused.is_none()).map(|row| &*row.lease)
    }

    /// The lease of one believed peer.
    pub fn get(&self, peer: &Subnets) -> Option<Rc<Lease>> {
        self.rows.get(peer).filter(|row| row.refused.is_none()).map(|row| Rc::clone(&row.lease))
    }

    /// Leases that are not believed, and why.
    pub fn refused(&self) -> impl Iterator<Item = (&Lease, &str)> {
        self.rows.values().filter_map(|row| Some((&*row.lease, row.refused.as_deref()?)))
    }

    /// These are this host's subnets now.
    pub fn set_own(&mut self, own: Subnets, judge: Judge<'_>) -> Vec<Change> {
        self.own = own;
        let leases = self.rows.values().map(|row| row.lease.clone()).collect();
        self.replace(leases, judge)
    }

    /// Replaces the whole table, and says what differs from before.
    pub fn reset(&mut self, leases: Vec<Lease>, judge: Judge<'_>) -> Vec<Change> {
        self.replace(leases.into_iter().map(Rc::new).collect(), judge)
    }

    fn replace(&mut self, mut leases: Vec<Rc<Lease>>, judge: Judge<'_>) -> Vec<Change> {
        let before = std::mem::take(&mut self.rows);
        self.believed = Claims::default();
        self.contested = 0;
        leases.retain(|lease| lease.subnets != self.own);
        leases.sort_by_key(|lease| (lease.created, lease.subnets));
        for lease in leases {
            let refused = self.enter(&lease, judge);
            self.rows.insert(lease.subnets, Row { lease, refused });
        }
        self.differences(before)
    }

    /// One change in the store.
    pub fn apply(&mut self, event: LeaseEvent, judge: Judge<'_>) -> Vec<Change> {
        let subnets = match &event {
            LeaseEvent::Put(lease) => lease.subnets,
            LeaseEvent::Removed(subnets) => *subnets,
        };
        if subnets == self.own {
            return Vec::new();
        }
        let lease = match event {
            LeaseEvent::Put(lease) => Some(Rc::new(lease)),
            LeaseEvent::Removed(_) => None,
        };
        let old = self.rows.get(&subnets);
        if old.map(|row| &row.lease) == lease.as_ref() {
            return Vec::new();
        }
        let contested = self.contested > 0
            || lease.as_ref().is_some_and(|lease| {
                self.believed.rival(&lease.subnets).is_some_and(|rival| rival != lease.subnets)
            });
        if contested {
            // who believes whom may change for others, too
            let mut leases: Vec<Rc<Lease>> = self
                .rows
                .values()
                .map(|row| &row.lease)
                .filter(|other| other.subnets != subnets)
                .cloned()
                .collect();
            leases.extend(lease);
            return self.replace(leases, judge);
        }
        let mut before = BTreeMap::new();
        if let Some(row) = self.rows.remove(&subnets) {
            self.believed.remove(&subnets);
            before.insert(subnets, row);
        }
        if let Some(lease) = lease {
            let refused = self.enter(&lease, judge);
            self.rows.insert(subnets, Row { lease, refused });
        }
        difference(before.remove(&subnets), self.rows.get(&subnets)).into_iter().collect()
    }

    /// Believes a lease or gives the reason why not. Older leases were entered before.
    fn enter(&mut self, lease: &Lease, judge: Judge<'_>) -> Option<Box<str>> {
        let reason = self.check(lease).err().or_else(|| judge(lease).err());
        if reason.is_some() {
            return reason.map(Into::into);
        }
        if let Some(rival) = self.believed.rival(&lease.subnets) {
            self.contested += 1;
            return Some(format!("its addresses belong to the older lease {rival}").into());
        }
        self.believed.insert(lease.subnets);
        None
    }

    fn check(&self, lease: &Lease) -> Result<(), String> {
        let Subnets { v4, v6 } = lease.subnets;
        if let (Some(network), Some(subnet)) = (self.v4, v4)
            && (!network.contains(&subnet) || subnet.prefix_len() <= network.prefix_len())
        {
            return Err(format!("its subnet {subnet} is not a part of the network {network}"));
        }
        if let (Some(network), Some(subnet)) = (self.v6, v6)
            && (!network.contains(&subnet) || subnet.prefix_len() <= network.prefix_len())
        {
            return Err(format!("its subnet {subnet} is not a part of the network {network}"));
        }
        if (self.v4.is_none() || v4.is_none()) && (self.v6.is_none() || v6.is_none()) {
            return Err("it has no subnet of an enabled address family".into());
        }
        let mut own = Claims::default();
        own.insert(self.own);
        match own.rival(&lease.subnets) {
            Some(own) => Err(format!("it overlaps this host's own lease {own}")),
            None => Ok(()),
        }
    }

    fn differences(&self, mut before: BTreeMap<Subnets, Row>) -> Vec<Change> {
        let mut changes = Vec::new();
        let mut coming = Vec::new();
        for (subnets, row) in &self.rows {
            match difference(before.remove(subnets), Some(row)) {
                // what goes comes first, so that the addresses are free for those who get them
                Some(change @ Change::Refused { .. }) => changes.push(change),
                change => coming.extend(change),
            }
        }
        changes.extend(before.into_values().filter_map(|row| difference(Some(row), None)));
        changes.extend(coming);
        changes
    }
}

fn difference(old: Option<Row>, new: Option<&Row>) -> Option<Change> {
    let old_lease = |row: Row| row.refused.is_none().then_some(row.lease);
    match (old, new) {
        (Some(old), Some(new)) if old == *new => None,
        (Some(old), Some(Row { refused: Some(reason), .. }))
            if old.refused.as_ref() == Some(reason) =>
        {
            None
        }
        (_, Some(Row { lease, refused: Some(reason) })) => {
            Some(Change::Refused { lease: lease.clone(), reason: reason.to_string() })
        }
        (old, Some(new)) => Some(match old.and_then(old_lease) {
            Some(old) => Change::Updated { old, new: new.lease.clone() },
            None => Change::Added(new.lease.clone()),
        }),
        (Some(old), None) => old_lease(old).map(Change::Removed),
        (None, None) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::LeaseAttrs;

    fn subnets(v4: &str) -> Subnets {
        Subnets { v4: v4.parse().ok(), v6: None }
    }

    fn lease(v4: &str, created: u64) -> Lease {
        let attrs = LeaseAttrs { public_ip: Some([192, 0, 2, 1].into()), ..LeaseAttrs::default() };
        Lease { subnets: subnets(v4), attrs, created }
    }

    fn table() -> LeaseTable {
        let mut table = LeaseTable::new("10.5.0.0/16".parse().ok(), None);
        table.set_own(subnets("10.5.1.0/24"), &fine);
        table
    }

    fn fine(_: &Lease) -> Result<(), String> {
        Ok(())
    }

    fn put(table: &mut LeaseTable, lease: &Lease) -> Vec<Change> {
        table.apply(LeaseEvent::Put(lease.clone()), &fine)
    }

    #[test]
    fn changes_are_whole_value_differences() {
        let mut table = table();
        let (one, two) = (lease("10.5.2.0/24", 2), lease("10.5.3.0/24", 3));
        assert_eq!(put(&mut table, &one), [Change::Added(one.clone().into())]);
        assert_eq!(put(&mut table, &one), []);
        let mut other = one.clone();
        other.attrs.public_ip = Some([192, 0, 2, 9].into());
        assert_eq!(
            table.reset(vec![two.clone(), other.clone()], &fine),
            [
                Change::Updated { old: one.into(), new: other.clone().into() },
                Change::Added(two.clone().into())
            ]
        );
        assert_eq!(
            table.apply(LeaseEvent::Removed(two.subnets), &fine),
            [Change::Removed(two.into())]
        );
        assert_eq!(table.reset(Vec::new(), &fine), [Change::Removed(other.into())]);
    }

    #[test]
    fn our_own_lease_is_no_peer() {
        let mut table = table();
        assert_eq!(put(&mut table, &lease("10.5.1.0/24", 1)), []);
        assert_eq!(table.leases().count(), 0);
        put(&mut table, &lease("10.5.2.0/24", 2));
        let changes = table.set_own(subnets("10.5.2.0/24"), &fine);
        assert_eq!(changes, [Change::Removed(lease("10.5.2.0/24", 2).into())]);
    }

    #[test]
    fn bad_ones_are_refused_alone() {
        let mut table = table();
        for (bad, says) in [
            ("10.6.2.0/24", "not a part"),
            ("10.5.0.0/16", "not a part"),
            ("0.0.0.0/1", "not a part"),
            ("224.0.0.0/24", "not a part"),
            ("10.5.1.128/25", "own lease"),
            ("10.5.0.0/20", "own lease"),
        ] {
            let changes = put(&mut table, &lease(bad, 1));
            let [Change::Refused { reason, .. }] = &changes[..] else {
                panic!("{bad}: {changes:?}")
            };
            assert!(reason.contains(says), "{bad}: {reason}");
        }
        let good = lease("10.5.2.0/24", 2);
        assert_eq!(put(&mut table, &good), [Change::Added(good.into())]);
        assert_eq!((table.len(), table.refused().count()), (1, 6));
        let judge = |_: &Lease| Err("publishes rubbish".to_owned());
        let changes = table.apply(LeaseEvent::Put(lease("10.5.3.0/24", 3)), &judge);
        assert!(
            matches!(&changes[..], [Change::Refused { reason, .. }] if reason == "publishes rubbish")
        );
    }

    #[test]
    fn the_older_of_two_rivals_is_believed_whatever_the_order() {
        let (old, young, third) =
            (lease("10.5.2.0/24", 2), lease("10.5.2.0/23", 9), lease("10.5.3.0/24", 10));
        for order in [[&old, &young, &third], [&third, &young, &old], [&young, &third, &old]] {
            let mut table = table();
            for lease in order {
                put(&mut table, lease);
            }
            let believed: Vec<_> = table.believed().cloned().collect();
            assert_eq!(believed, [old.clone(), third.clone()], "{order:?}");
            let changes = table.apply(LeaseEvent::Removed(old.subnets), &fine);
            assert_eq!(changes.len(), 3, "{changes:?}");
            assert!(matches!(&changes[0], Change::Refused { lease, .. } if **lease == third));
            assert_eq!(
                changes[1..],
                [Change::Removed(old.clone().into()), Change::Added(young.clone().into())]
            );
        }
    }

    /// Whatever happens, the table is the one that a fresh list would give, and the changes lead to it.
    #[test]
    fn events_and_lists_agree() {
        let mut state = 12345u64;
        let mut random = |below: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        for _ in 0..50 {
            let mut table = table();
            let mut store = BTreeMap::new();
            let mut plane: BTreeMap<Subnets, Rc<Lease>> = BTreeMap::new();
            for step in 0..60 {
                let len = 22 + random(5);
                let net: Ipv4Net =
                    format!("10.5.{}.{}/{len}", random(16), random(4) * 64).parse().unwrap();
                let subnets = Subnets { v4: Some(net.trunc()), v6: None };
                let changes = if random(3) == 0 {
                    store.remove(&subnets);
                    table.apply(LeaseEvent::Removed(subnets), &fine)
                } else {
                    let mut lease = lease("10.5.2.0/24", random(step + 1));
                    lease.subnets = subnets;
                    store.insert(subnets, lease.clone());
                    table.apply(LeaseEvent::Put(lease), &fine)
                };
                for change in changes {
                    match change {
                        Change::Added(lease) => {
                            assert!(plane.insert(lease.subnets, lease).is_none())
                        }
                        Change::Updated { old, new } => {
                            assert_eq!(plane.insert(new.subnets, new), Some(old))
                        }
                        Change::Removed(lease) => {
                            assert_eq!(plane.remove(&lease.subnets), Some(lease))
                        }
                        Change::Refused { lease, .. } => drop(plane.remove(&lease.subnets)),
                    }
                }
                let mut fresh = self::table();
                fresh.reset(store.values().cloned().collect(), &fine);
                assert_eq!(fresh.rows, table.rows);
                assert!(plane.values().map(|lease| &**lease).eq(table.believed()));
            }
        }
    }
}
