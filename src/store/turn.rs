//! One lane's turn: is it busy, and when may it begin again?

use std::time::{Duration, Instant};

use crate::backoff::Backoff;

#[derive(Debug)]
pub(super) struct Turn {
    pub(super) busy: bool,
    pub(super) not_before: Option<Instant>,
    pub(super) backoff: Backoff,
}

impl Turn {
    /// Waits about `first` after the first failure, doubling up to `cap`.
    pub(super) fn new(first: Duration, cap: Duration, seed: u64) -> Self {
        Self { busy: false, not_before: None, backoff: Backoff::new(first, cap, seed) }
    }

    /// Forgets a wait that is over, so that nobody wakes up for it again.
    pub(super) fn refresh(&mut self, now: Instant) {
        self.not_before = self.not_before.filter(|at| *at > now);
    }

    pub(super) fn may_start(&self, now: Instant) -> bool {
        !self.busy && self.not_before.is_none_or(|at| at <= now)
    }
}
