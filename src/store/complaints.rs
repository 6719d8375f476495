//! What is wrong with others' entries in the store: each is said once, a few of them loudly, and all are counted.

use std::collections::BTreeMap;

use log::{debug, warn};

/// So many entries are remembered.
const KNOWN: usize = 1000;
/// So many of them are warned of.
const LOUD: usize = 10;

#[derive(Debug, Default)]
pub(super) struct Complaints {
    reasons: BTreeMap<Box<str>, Box<str>>,
}

impl Complaints {
    /// Notes what is wrong with an entry, and says `text` if that is news.
    pub(super) fn note(&mut self, entry: &str, reason: &str, text: &str) {
        if self.reasons.get(entry).is_some_and(|known| **known == *reason) {
            return;
        }
        if self.reasons.len() < LOUD {
            warn!("{text}");
        } else {
            debug!("{text}");
        }
        if self.reasons.len() < KNOWN {
            self.reasons.insert(entry.into(), reason.into());
        }
    }

    /// The entry is right, or gone.
    pub(super) fn forget(&mut self, entry: &str) {
        self.reasons.remove(entry);
    }

    /// Entries that are wrong, and why.
    pub(super) fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &str)> {
        self.reasons.iter().map(|(entry, reason)| (&**entry, &**reason))
    }
}
