//! Lists of leases: what each row is, and what a complete list means.

use super::Etcd;
use super::dialect::Row;
use crate::lease::{Lease, LeaseAttrs, Subnets, key, value};
use crate::quote::shorten;
use crate::store::{Now, StoreEvent};

/// The last list, until it has been passed on.
#[derive(Debug, Default)]
pub(super) struct Listing {
    pub(super) leases: Vec<Lease>,
    /// Subnets that any key claims, bad ones included.
    pub(super) taken: Vec<Subnets>,
    /// Leases with our public address.
    pub(super) mine: Vec<(Subnets, Row)>,
    /// Our own key's row, once we have a lease.
    pub(super) own: Option<Row>,
}

impl Etcd {
    pub(super) fn row(&mut self, row: Row, now: Now) {
        // what is larger than the network is nobody's subnet and must not take everybody's
        if let Some(subnets) = key::claim(&row.key).filter(|subnets| self.is_part(subnets)) {
            self.reading.taken.push(subnets);
        }
        let own_key = self.own.as_ref().is_some_and(|own| own.key == row.key);
        if own_key {
            self.reading.own = Some(row.clone());
        }
        match self.lease(&row) {
            Ok(lease) => {
                if self.is_mine(&lease.attrs) {
                    self.reading.mine.push((lease.subnets, row));
                }
                self.reading.leases.push(lease);
            }
            Err(reason) => self.bad_key(row.key, reason, now),
        }
    }

    pub(super) fn is_part(&self, subnets: &Subnets) -> bool {
        let Some(config) = &self.config else { return false };
        let v4 = config
            .v4
            .zip(subnets.v4)
            .is_some_and(|(config, net)| net.prefix_len() > config.network.prefix_len());
        v4 || config
            .v6
            .zip(subnets.v6)
            .is_some_and(|(config, net)| net.prefix_len() > config.network.prefix_len())
    }

    pub(super) fn lease(&self, row: &Row) -> Result<Lease, String> {
        let subnets = key::parse(&row.key).ok_or("the key is not one of a subnet")?;
        Ok(Lease { subnets, attrs: value::parse(&row.value)?, created: row.created })
    }

    pub(super) fn bad_key(&mut self, key: String, reason: String, now: Now) {
        let shown = shorten(&key);
        let text = format!("the lease {}/subnets/{shown} is ignored: {reason}", self.prefix);
        self.bad_keys.note(&key, &reason, &text, now.mono);
    }

    /// Does this lease carry our address?
    pub(super) fn is_mine(&self, attrs: &LeaseAttrs) -> bool {
        let Some(identity) = &self.identity else { return false };
        if self.config.as_ref().is_some_and(|config| config.v4.is_some()) {
            identity.public_ip.is_some() && attrs.public_ip == identity.public_ip
        } else {
            identity.public_ipv6.is_some() && attrs.public_ipv6 == identity.public_ipv6
        }
    }

    pub(super) fn handle_listed(&mut self, cursor: u64, now: Now) {
        self.cursor = Some(cursor);
        let listing = std::mem::take(&mut self.reading);
        self.relist = false;
        let Some(own) = &mut self.own else {
            let mine = listing.mine.first().and_then(|(subnets, _)| {
                listing.leases.iter().find(|lease| lease.subnets == *subnets)
            });
            // while a lost lease is replaced the peers are followed by lists
            if self.acquired_once {
                self.events.push_back(StoreEvent::Snapshot(listing.leases.clone()));
            }
            let found = mine.map(|lease| Box::new(lease.clone()));
            self.listing = Some(listing);
            if !std::mem::replace(&mut self.found_said, true) {
                self.events.push_back(StoreEvent::Found(found));
            }
            return;
        };
        let row = listing.own.clone();
        self.events.push_back(StoreEvent::Snapshot(listing.leases));
        match row {
            Some(row) if row.revision == own.revision => {}
            Some(_) => self.check_own = Some(u64::MAX),
            None => self.handle_checked(None, now),
        }
    }
}
