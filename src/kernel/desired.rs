//! What this host and its peers want of the kernel, and how far each object has come.
//!
//! ```text
//!             audit finds it equal
//!   Unknown -----------------------> Present <----------- Sent
//!      |  audit does not                |                 |  ^
//!      +-----------> Wanted <-----------+ gone, changed   |  | batch
//!                     ^  | +------------------------------|--+
//!          link there |  | link is missing                | refused
//!                    Waiting                            Failed (tried again later)
//! ```

use std::collections::btree_map::Entry as MapEntry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use ipnet::Ipv4Net;

use super::object::{Address, IfName, Key, Object, Owner};

/// The first retry of an object that the kernel refused comes after this; the waits double.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_CAP: Duration = Duration::from_secs(60);
/// So often an object is put back at once between two audits; then somebody is fighting us, and we slow down.
const HEALS: u8 = 30;

/// How far an object has come.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum State {
    /// Perhaps left by an earlier life; the next audit tells.
    Unknown,
    /// To be written.
    Wanted,
    /// On its way to the kernel.
    Sent,
    /// In the kernel.
    Present,
    /// Cannot be written before a link exists.
    Waiting,
    /// Refused by the kernel.
    Failed(Box<Failure>),
}

/// A refusal; behind a pointer, because entries are many and refusals few.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Failure {
    pub(super) retry_at: Instant,
    pub(super) reason: String,
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) object: Object,
    pub(super) holder: Owner,
    pub(super) state: State,
    /// The last audit that saw it, or that began before it was declared.
    pub(super) epoch: u32,
    failures: u8,
    heals: u8,
}

impl Entry {
    /// Has the kernel refused it since it was there last?
    pub(super) fn has_failed(&self) -> bool {
        self.failures > 0
    }
}

/// Two owners want different values of one object. The first one has it.
#[derive(PartialEq, Eq, Debug)]
pub(super) struct Clash {
    pub(super) holder: Owner,
    pub(super) other: Owner,
    pub(super) object: Object,
}

/// The desired state.
#[derive(Debug, Default)]
pub(super) struct Desired {
    entries: BTreeMap<Key, Entry>,
    claims: HashMap<Owner, Box<[Key]>>,
    /// Others than the holder who want exactly the same.
    sharers: BTreeMap<Key, Vec<Owner>>,
    /// Values that lost to another owner's.
    losers: BTreeMap<Key, Vec<(Owner, Object)>>,
    /// Entries in state Wanted.
    wanted: usize,
    retries: BTreeSet<(Instant, Key)>,
    /// Entries in state Unknown or Sent.
    open: usize,
}

impl Desired {
    /// Replaces everything that `owner` wants. New objects begin in `state`, excused from the audit `epoch`. Returns what
    /// nobody wants any more.
    pub(super) fn declare(
        &mut self,
        owner: Owner,
        objects: Vec<Object>,
        state: &State,
        epoch: u32,
        clashes: &mut Vec<Clash>,
    ) -> Vec<Object> {
        let keys: Box<[Key]> = objects.iter().map(Object::key).collect();
        let before = self.claims.insert(owner, keys.clone()).unwrap_or_default();
        let mut dropped = Vec::new();
        for key in before {
            if !keys.contains(&key) {
                dropped.extend(self.release(owner, &key));
            }
        }
        for (key, object) in keys.into_vec().into_iter().zip(objects) {
            clashes.extend(self.claim(owner, key, object, state, epoch));
        }
        dropped
    }

    /// `owner` wants nothing any more.
    pub(super) fn withdraw(&mut self, owner: Owner) -> Vec<Object> {
        let keys = self.claims.remove(&owner).unwrap_or_default();
        keys.iter().filter_map(|key| self.release(owner, key)).collect()
    }

    fn claim(
        &mut self,
        owner: Owner,
        key: Key,
        object: Object,
        state: &State,
        epoch: u32,
    ) -> Option<Clash> {
        let entry = match self.entries.entry(key.clone()) {
            MapEntry::Vacant(vacant) => {
                vacant.insert(Entry {
                    object,
                    holder: owner,
                    state: State::Present,
                    epoch,
                    failures: 0,
                    heals: 0,
                });
                self.set(&key, state.clone());
                return None;
            }
            MapEntry::Occupied(occupied) => occupied.into_mut(),
        };
        if entry.object == object {
            // it may have wanted something else before
            if let Some(losers) = self.losers.get_mut(&key) {
                losers.retain(|(loser, _)| *loser != owner);
                if losers.is_empty() {
                    self.losers.remove(&key);
                }
            }
            if entry.holder != owner {
                let sharers = self.sharers.entry(key).or_default();
                if !sharers.contains(&owner) {
                    sharers.push(owner);
                }
            }
            return None;
        }
        if entry.holder == owner && !self.sharers.contains_key(&key) {
            entry.object = object;
            if entry.state != State::Unknown {
                self.set(&key, State::Wanted);
            }
            return None;
        }
        // the others keep what we all wanted
        self.leave(owner, &key);
        let holder = self.entries.get(&key).map_or(owner, |entry| entry.holder);
        let clash = Clash { holder, other: owner, object: object.clone() };
        let losers = self.losers.entry(key).or_default();
        match losers.iter_mut().find(|(loser, _)| *loser == owner) {
            Some((_, old)) if *old == object => return None,
            Some((_, old)) => *old = object,
            None => losers.push((owner, object)),
        }
        Some(clash)
    }

    /// One of several who want the same leaves. Returns whether somebody still wants it.
    fn leave(&mut self, owner: Owner, key: &Key) -> bool {
        let Some(entry) = self.entries.get_mut(key) else { return false };
        let Some(sharers) = self.sharers.get_mut(key) else { return entry.holder != owner };
        if entry.holder == owner {
            entry.holder = sharers.remove(0);
        } else {
            sharers.retain(|other| *other != owner);
        }
        if sharers.is_empty() {
            self.sharers.remove(key);
        }
        true
    }

    /// One owner wants one object no more: it goes to those who wanted the same, or to one who wanted it otherwise, or away.
    fn release(&mut self, owner: Owner, key: &Key) -> Option<Object> {
        if let Some(losers) = self.losers.get_mut(key) {
            let before = losers.len();
            losers.retain(|(loser, _)| *loser != owner);
            let lost = losers.len() < before;
            if losers.is_empty() {
                self.losers.remove(key);
            }
            if lost {
                return None;
            }
        }
        if self.leave(owner, key) {
            return None;
        }
        let entry = self.entries.get_mut(key)?;
        if let Some(losers) = self.losers.get_mut(key) {
            (entry.holder, entry.object) = losers.remove(0);
            if losers.is_empty() {
                self.losers.remove(key);
            }
            self.set(key, State::Wanted);
            return None;
        }
        self.set(key, State::Present);
        self.entries.remove(key).map(|entry| entry.object)
    }

    pub(super) fn get(&self, key: &Key) -> Option<&Entry> {
        self.entries.get(key)
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = (&Key, &Entry)> {
        self.entries.iter()
    }

    /// Every wanted address.
    pub(super) fn addresses(&self) -> impl Iterator<Item = &Address> {
        let first = Key::Address(IfName::FIRST, Ipv4Net::default().into());
        self.entries.range(first..).map_while(|(_, entry)| match &entry.object {
            Object::Address(address) => Some(address),
            _ => None,
        })
    }

    /// The keys that `owner` claims.
    pub(super) fn claimed(&self, owner: Owner) -> Option<&[Key]> {
        self.claims.get(&owner).map(|keys| &**keys)
    }

    /// Moves an object to another state.
    pub(super) fn set(&mut self, key: &Key, state: State) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        let old = std::mem::replace(&mut entry.state, state);
        match old {
            State::Unknown | State::Sent => self.open -= 1,
            State::Wanted => self.wanted -= 1,
            State::Failed(failure) => drop(self.retries.remove(&(failure.retry_at, key.clone()))),
            State::Present | State::Waiting => {}
        }
        match &entry.state {
            State::Unknown | State::Sent => self.open += 1,
            State::Wanted => self.wanted += 1,
            State::Failed(failure) => drop(self.retries.insert((failure.retry_at, key.clone()))),
            State::Present => entry.failures = 0,
            State::Waiting => {}
        }
    }

    /// The kernel has the object, says audit number `epoch`.
    pub(super) fn seen(&mut self, key: &Key, epoch: u32) {
        if let Some(entry) = self.entries.get_mut(key) {
            entry.epoch = epoch;
            self.set(key, State::Present);
        }
    }

    /// The audit has seen the key, with another value.
    pub(super) fn excuse(&mut self, key: &Key, epoch: u32) {
        if let Some(entry) = self.entries.get_mut(key) {
            entry.epoch = epoch;
        }
    }

    /// The kernel refused the object. Returns when it is tried again.
    pub(super) fn failed(&mut self, key: &Key, reason: &str, now: Instant) -> Duration {
        let Some(entry) = self.entries.get_mut(key) else { return RETRY_FIRST };
        let wait = RETRY_FIRST.saturating_mul(1 << entry.failures.min(6)).min(RETRY_CAP);
        entry.failures = entry.failures.saturating_add(1);
        self.set(
            key,
            State::Failed(Box::new(Failure { retry_at: now + wait, reason: reason.to_owned() })),
        );
        wait
    }

    /// An object that was present is not, or is different. Returns whether it is put back at once: whoever changes it again
    /// and again gets slower and slower answers.
    pub(super) fn heal(&mut self, key: &Key, now: Instant) -> bool {
        let Some(entry) = self.entries.get_mut(key) else { return false };
        entry.heals = entry.heals.saturating_add(1);
        let at_once = entry.heals <= HEALS;
        if at_once {
            self.set(key, State::Wanted);
        } else {
            self.failed(key, "something else on this host changes it again and again", now);
        }
        at_once
    }

    /// A periodic audit forgives the fights of the past.
    pub(super) fn calm(&mut self) {
        self.entries.values_mut().for_each(|entry| entry.heals = 0);
    }

    /// The next objects to write, at most `limit`, in the order of keys, which is the order of creation; links apart from
    /// all else.
    pub(super) fn batch(&self, limit: usize) -> Vec<Key> {
        if self.wanted == 0 {
            return Vec::new();
        }
        let mut wanted =
            self.entries.iter().filter(|(_, entry)| entry.state == State::Wanted).peekable();
        let links = matches!(wanted.peek(), Some((Key::Link(_), _)));
        let same_sort = wanted.take_while(|(key, _)| matches!(key, Key::Link(_)) == links);
        same_sort.take(limit.min(self.wanted)).map(|(key, _)| key.clone()).collect()
    }

    pub(super) fn has_wanted(&self) -> bool {
        self.wanted > 0
    }

    /// Is there something that only an audit can decide?
    pub(super) fn has_unknown(&self) -> bool {
        self.open > 0 && self.entries.values().any(|entry| entry.state == State::Unknown)
    }

    /// Is every object in the kernel, refused, or waiting for a link?
    pub(super) fn is_settled(&self) -> bool {
        self.wanted == 0 && self.open == 0
    }

    pub(super) fn next_retry(&self) -> Option<Instant> {
        self.retries.first().map(|(at, _)| *at)
    }

    /// Tries failed objects again whose time has come.
    pub(super) fn retry(&mut self, now: Instant) {
        while let Some((at, key)) = self.retries.first() {
            if *at > now {
                return;
            }
            let key = key.clone();
            self.set(&key, State::Wanted);
        }
    }

    /// Links or addresses have changed, so what failed or waited may work now.
    pub(super) fn encourage(&mut self) {
        let keys =
            self.keys_where(|entry| matches!(entry.state, State::Waiting | State::Failed(_)));
        for key in keys {
            self.set(&key, State::Wanted);
        }
    }

    pub(super) fn keys_where(&self, which: impl Fn(&Entry) -> bool) -> Vec<Key> {
        self.entries.iter().filter(|(_, entry)| which(entry)).map(|(key, _)| key.clone()).collect()
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)]
mod tests {
    use super::super::object::Route;
    use super::*;
    use crate::lease::Subnets;

    fn route(dst: &str, via: &str) -> Object {
        Object::Route(Route {
            dst: dst.parse().unwrap(),
            via: via.parse().ok(),
            link: None,
            onlink: false,
        })
    }

    fn peer(subnet: &str) -> Owner {
        Owner::Peer(Subnets { v4: subnet.parse().ok(), v6: None })
    }

    fn declare(
        desired: &mut Desired,
        owner: Owner,
        objects: &[Object],
    ) -> (Vec<Object>, Vec<Clash>) {
        let mut clashes = Vec::new();
        let dropped = desired.declare(owner, objects.to_vec(), &State::Wanted, 0, &mut clashes);
        (dropped, clashes)
    }

    #[test]
    fn what_is_declared_again_changes_and_what_is_left_out_goes() {
        let mut desired = Desired::default();
        let (one, two) = (route("10.0.1.0/24", "192.0.2.1"), route("10.0.2.0/24", "192.0.2.1"));
        let owner = peer("10.0.1.0/24");
        declare(&mut desired, owner, &[one.clone(), two.clone()]);
        desired.set(&one.key(), State::Present);
        desired.set(&two.key(), State::Present);
        assert!(desired.is_settled());
        let other = route("10.0.1.0/24", "192.0.2.9");
        let (dropped, clashes) = declare(&mut desired, owner, std::slice::from_ref(&other));
        assert_eq!((dropped, clashes.len()), (vec![two], 0));
        assert_eq!(desired.get(&one.key()).unwrap().object, other);
        assert_eq!(desired.batch(10), [one.key()]);
        assert_eq!(desired.withdraw(owner), [other]);
        assert!(desired.is_settled());
    }

    #[test]
    fn the_first_of_two_values_wins_and_the_second_follows_when_it_goes() {
        let mut desired = Desired::default();
        let (a, b) = (peer("10.0.1.0/24"), peer("10.0.2.0/24"));
        let (first, second) =
            (route("10.0.9.0/24", "192.0.2.1"), route("10.0.9.0/24", "192.0.2.2"));
        declare(&mut desired, a, std::slice::from_ref(&first));
        let (_, clashes) = declare(&mut desired, b, std::slice::from_ref(&second));
        assert_eq!(clashes, [Clash { holder: a, other: b, object: second.clone() }]);
        assert_eq!(declare(&mut desired, b, std::slice::from_ref(&second)).1, [], "said once");
        assert_eq!(desired.get(&first.key()).unwrap().object, first);
        assert_eq!(desired.withdraw(a), []);
        assert_eq!(desired.get(&first.key()).unwrap().object, second);
        assert_eq!(desired.withdraw(b), [second]);
    }

    #[test]
    fn a_loser_that_comes_round_leaves_like_everybody() {
        let mut desired = Desired::default();
        let (a, b) = (peer("10.0.1.0/24"), peer("10.0.2.0/24"));
        let (first, second) =
            (route("10.0.9.0/24", "192.0.2.1"), route("10.0.9.0/24", "192.0.2.2"));
        declare(&mut desired, a, std::slice::from_ref(&first));
        declare(&mut desired, b, std::slice::from_ref(&second));
        declare(&mut desired, b, std::slice::from_ref(&first));
        assert_eq!(desired.withdraw(b), []);
        assert_eq!(desired.withdraw(a), [first]);
    }

    #[test]
    fn what_two_want_stays_until_both_have_gone() {
        let mut desired = Desired::default();
        let (a, b) = (peer("10.0.1.0/24"), peer("10.0.2.0/24"));
        let shared = route("10.0.9.0/24", "192.0.2.1");
        declare(&mut desired, a, std::slice::from_ref(&shared));
        declare(&mut desired, b, std::slice::from_ref(&shared));
        assert_eq!(desired.withdraw(a), []);
        assert_eq!(desired.withdraw(b), [shared]);
    }

    #[test]
    fn refusals_wait_longer_and_longer_and_a_fight_is_not_endless() {
        let now = Instant::now();
        let mut desired = Desired::default();
        let object = route("10.0.1.0/24", "192.0.2.1");
        let key = object.key();
        declare(&mut desired, Owner::Host, &[object]);
        let waits: Vec<u64> = (0..8).map(|_| desired.failed(&key, "no", now).as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
        desired.retry(now);
        assert!(!desired.has_wanted());
        desired.retry(now + RETRY_CAP);
        assert!(desired.has_wanted());
        desired.set(&key, State::Present);
        assert_eq!((0..40).filter(|_| desired.heal(&key, now)).count(), 30);
        assert!(matches!(desired.get(&key).unwrap().state, State::Failed(_)));
        desired.calm();
        assert!(desired.heal(&key, now));
    }
}
