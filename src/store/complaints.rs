//! What is wrong with others' entries in the store: each is said once, not too many at a time, and all are counted.

use std::collections::BTreeMap;
use std::time::Instant;

use crate::throttle::{Throttle, throttled};

/// So many entries are remembered.
const KNOWN: usize = 1000;

#[derive(Debug, Default)]
pub(super) struct Complaints {
    reasons: BTreeMap<Box<str>, Box<str>>,
    throttle: Throttle,
}

impl Complaints {
    /// Notes what is wrong with an entry, and says `text` if that is news.
    pub(super) fn note(&mut self, entry: &str, reason: &str, text: &str, now: Instant) {
        if self.reasons.get(entry).is_some_and(|known| **known == *reason) {
            return;
        }
        throttled!(self.throttle, now, warn, "{text}");
        if self.reasons.len() < KNOWN || self.reasons.contains_key(entry) {
            self.reasons.insert(entry.into(), reason.into());
        }
    }

    /// The entry is right, or gone.
    pub(super) fn forget(&mut self, entry: &str) {
        self.reasons.remove(entry);
    }

    /// Only entries for which this holds are still there.
    pub(super) fn retain(&mut self, mut is_there: impl FnMut(&str) -> bool) {
        self.reasons.retain(|entry, _| is_there(entry));
    }

    /// Entries that are wrong, and why.
    pub(super) fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &str)> {
        self.reasons.iter().map(|(entry, reason)| (&**entry, &**reason))
    }
}
