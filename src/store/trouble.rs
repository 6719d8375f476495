//! Says a trouble once, however often it comes back before it is over.

use std::collections::BTreeSet;

/// So many different troubles are told before the first is over.
const TOLD: usize = 8;

#[derive(Debug, Default)]
pub(super) struct Trouble {
    told: BTreeSet<String>,
}

impl Trouble {
    /// Notes a trouble. Returns it if it is news.
    pub(super) fn say(&mut self, reason: &str) -> Option<String> {
        let news = self.told.len() < TOLD && self.told.insert(reason.to_owned());
        news.then(|| reason.to_owned())
    }

    /// Was anything told that is not over?
    pub(super) fn is_on(&self) -> bool {
        !self.told.is_empty()
    }

    /// It is over. Returns whether there was any.
    pub(super) fn over(&mut self) -> bool {
        !std::mem::take(&mut self.told).is_empty()
    }
}
