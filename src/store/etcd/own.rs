//! Our own lease: taking it, keeping it, losing it.

use std::time::{Duration, Instant};

use log::info;

use super::dialect::{Op, Row};
use super::{Etcd, RETRY_CAP, Task};
use crate::backoff::Backoff;
use crate::lease::acquire::{Plan, overlap, plan};
use crate::lease::{Lease, OwnLease, Subnets, key, value};
use crate::store::{Now, StoreEvent};

/// Waits before our lease is written again when somebody else writes it, too.
const FIGHT_FIRST: Duration = Duration::from_secs(1);
const FIGHT_CAP: Duration = Duration::from_secs(60);

/// Our lease.
#[derive(Debug)]
pub(super) struct Own {
    pub(super) lease: OwnLease,
    pub(super) key: String,
    pub(super) revision: u64,
    pub(super) reserved: bool,
    pub(super) renew_at: Option<Instant>,
    /// The store has this value.
    pub(super) value: String,
    /// Somebody else writes our lease: we answer slower and slower. Until then nothing is written.
    pub(super) fight: Backoff,
    pub(super) hold_until: Option<Instant>,
    /// An older lease may still turn up.
    pub(super) unconfirmed: bool,
}

impl Etcd {
    /// Takes a lease, according to the list.
    pub(super) fn claim(&mut self, text: String, now: Now) -> Option<(Task, Op)> {
        let random = [self.chance.draw(), self.chance.draw()];
        let (config, listing) = (self.config.as_ref()?, self.listing.as_ref()?);
        let previous = self.identity.map(|identity| identity.previous).unwrap_or_default();
        let mine: Vec<Subnets> = listing.mine.iter().map(|(subnets, _)| *subnets).collect();
        match plan(config, &mine, &previous, &listing.taken, random) {
            Ok(Plan::Reuse(number)) => {
                let (subnets, row) = listing.mine.get(number)?.clone();
                let (key, revision, reserved) = (row.key.clone(), row.revision, row.reserved);
                Some((
                    Task::Reuse(subnets, row),
                    Op::Update { key, value: text, revision, reserved },
                ))
            }
            Ok(Plan::Delete(number)) => {
                let (subnets, row) = listing.mine.get(number)?;
                info!(
                    "our lease {subnets} does not fit the network config any more: taking another one"
                );
                Some((Task::Discard, Op::Delete { key: row.key.clone(), revision: row.revision }))
            }
            Ok(Plan::Create(subnets)) => Some((
                Task::Create(subnets),
                Op::Create { key: key::format(&subnets), value: text },
            )),
            Err(reason) => {
                // somebody may leave
                self.listing = None;
                self.unary.not_before = Some(now.mono + RETRY_CAP);
                if !std::mem::replace(&mut self.full, true) {
                    self.events.push_back(StoreEvent::Trouble(reason));
                }
                None
            }
        }
    }

    /// Everything that was created between our list and our lease is known.
    pub(super) fn handle_confirmation(&mut self) {
        let Some(own) = &self.own else { return };
        let ours = &own.lease.lease;
        let older = std::mem::take(&mut self.reading).leases.into_iter().find(|lease| {
            lease.subnets != ours.subnets
                && lease.created < ours.created
                && overlap(&lease.subnets, &ours.subnets)
        });
        match older {
            Some(older) => {
                info!(
                    "{} was taken at the same time, and before our {}",
                    older.subnets, ours.subnets
                );
                self.yielding = true;
            }
            None => self.acquired(),
        }
    }

    /// The lease is in the store.
    pub(super) fn hold(
        &mut self,
        subnets: Subnets,
        created: u64,
        revision: u64,
        reserved: bool,
        ttl: Option<Duration>,
        now: Now,
    ) {
        let Some(attrs) = self.attrs.clone() else { return };
        let value = value::format(&attrs);
        let lease = OwnLease { lease: Lease { subnets, attrs, created }, expiry: None };
        let key = key::format(&subnets);
        let unconfirmed = created == revision;
        let fight = Backoff::new(FIGHT_FIRST, FIGHT_CAP, self.chance.draw());
        self.own = Some(Own {
            lease,
            key,
            revision,
            reserved,
            renew_at: None,
            value,
            fight,
            hold_until: None,
            unconfirmed,
        });
        self.set_ttl(ttl, true, now);
    }

    /// `granted` says that the time to live begins now, and is not what is left of it.
    pub(super) fn set_ttl(&mut self, ttl: Option<Duration>, granted: bool, now: Now) {
        let Some(own) = &mut self.own else { return };
        own.lease.expiry = ttl.map(|ttl| now.wall + ttl);
        // a server that grants less than the margin must not be asked for ever
        let shortest = |ttl: Duration| if granted { ttl / 2 } else { Duration::ZERO };
        own.renew_at = ttl.map(|ttl| {
            now.mono + ttl.checked_sub(self.renew_margin).unwrap_or_else(|| shortest(ttl))
        });
        own.reserved = ttl.is_none();
    }

    pub(super) fn extend(&mut self, ttl: Option<Duration>, granted: bool, now: Now) {
        self.set_ttl(ttl, granted, now);
        if let Some(own) = &self.own {
            self.events.push_back(StoreEvent::Renewed(Box::new(own.lease.clone())));
        }
    }

    /// Our lease is certain: passes on all that is known.
    pub(super) fn acquired(&mut self) {
        let Some(own) = &mut self.own else { return };
        own.unconfirmed = false;
        self.full = false;
        self.acquired_once = true;
        self.events.push_back(StoreEvent::Acquired(Box::new(own.lease.clone())));
        if let Some(listing) = self.listing.take() {
            self.events.push_back(StoreEvent::Snapshot(listing.leases));
        }
    }

    /// What our key holds now.
    pub(super) fn handle_checked(&mut self, row: Option<Row>, now: Now) {
        self.check_own = None;
        self.watch_broken = false;
        let Some(row) = row else { return self.lose("it is gone from the store".into()) };
        let attrs = value::parse(&row.value);
        let mine = attrs.as_ref().is_ok_and(|attrs| self.is_mine(attrs));
        let Some(own) = &mut self.own else { return };
        if row.revision != own.revision && row.value != own.value {
            // the first time may be a mistake; what happens again and again is another host with our address
            let first = own.fight.failures() == 0;
            let wait = own.fight.failed();
            own.hold_until = (!first).then_some(now.mono + wait);
            if own.fight.failures() == 2 {
                self.events.push_back(StoreEvent::Trouble(format!(
                    "something else writes our lease {}: does another host have our public address?",
                    own.lease.lease.subnets
                )));
            }
        }
        match attrs {
            Ok(_) if mine => {
                let unchanged = row.revision == own.revision;
                (own.revision, own.value) = (row.revision, row.value);
                let ttl = if row.reserved { None } else { Some(row.ttl.unwrap_or_default()) };
                if unchanged {
                    self.set_ttl(ttl, false, now);
                } else {
                    self.extend(ttl, false, now);
                }
            }
            Ok(attrs) => {
                let other = attrs
                    .public_ip
                    .map(|ip| ip.to_string())
                    .or(attrs.public_ipv6.map(|ip| ip.to_string()));
                self.lose(format!(
                    "it belongs to {} now",
                    other.unwrap_or_else(|| "another host".into())
                ));
            }
            // somebody wrote rubbish over our lease: it is still our key, and we write it anew
            Err(_) => {
                own.revision = row.revision;
                own.value = row.value;
            }
        }
    }

    pub(super) fn lose(&mut self, reason: String) {
        let Some(own) = self.own.take() else { return };
        self.listing = None;
        if let Some(identity) = &mut self.identity {
            identity.previous = own.lease.lease.subnets;
        }
        self.stop_watch();
        self.cursor = None;
        self.check_own = None;
        self.watch_broken = false;
        if !own.unconfirmed {
            self.events.push_back(StoreEvent::Lost(reason));
        }
    }
}
