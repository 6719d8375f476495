//! What happens when the server cannot be reached, or says no: who waits how long, and what is said.

use std::time::{Duration, Instant};

use log::debug;

use super::request::{Freshness, Refusal};
use super::{Job, Kube, WAIT_CAP, WAIT_FIRST};
use crate::backoff::Backoff;
use crate::store::StoreEvent;
use crate::store::trouble::Trouble;

/// Longest wait between tries of a server that is away.
const RETRY_CAP: Duration = Duration::from_secs(5);
/// In a large cluster they grow with it: many agents must not fall upon a server that has just come back.
const RETRY_PER_NODE: Duration = Duration::from_millis(5);

impl Kube {
    /// The wait after a failure: longer in a large cluster.
    pub(super) fn backoff_capped(&mut self, watch: bool) -> Duration {
        let nodes = u32::try_from(self.nodes.len()).unwrap_or(u32::MAX);
        let cap = (RETRY_CAP + RETRY_PER_NODE.saturating_mul(nodes)).min(Duration::from_secs(30));
        let turn = if watch { &mut self.watch } else { &mut self.unary };
        turn.backoff.failed().min(cap)
    }

    /// The server cannot be reached, or what it says makes no sense.
    pub(super) fn away(&mut self, reason: &str, now: Instant) {
        let count = self.endpoints.len().max(1);
        self.endpoint = (self.endpoint + 1) % count;
        self.failures += 1;
        // the next server is asked at once, the first one again after a while
        let wait = if self.failures.is_multiple_of(count) {
            self.backoff_capped(false)
        } else {
            Duration::ZERO
        };
        self.unary.not_before = Some(now + wait);
        // one server of several may fail without anybody's noticing
        if self.failures >= count {
            self.tell(Job::Server, reason.to_owned());
        } else {
            debug!("{reason}");
        }
    }

    /// The server answers.
    pub(super) fn reached(&mut self) {
        self.failures = 0;
        self.unary.backoff.succeeded();
        self.done(Job::Server);
    }

    /// The server says no.
    pub(super) fn refused(&mut self, job: Job, refusal: &Refusal, now: Instant) {
        let text = self.explain(job, refusal);
        let Refusal { status, retry_after, .. } = refusal;
        if job == Job::List && refusal.is_expired() {
            // the cache cannot answer: etcd can
            debug!("{text}");
            if let Some(listing) = &mut self.listing {
                let wait =
                    if listing.freshness == Freshness::Now { WAIT_FIRST } else { Duration::ZERO };
                listing.freshness = Freshness::Now;
                self.waits.insert(job, now + wait);
            }
            return;
        }
        if job == Job::Publish && matches!(status, 404 | 409) {
            self.own.due = true;
        }
        if matches!(status, 429 | 500..) {
            // it is not this request that is wrong
            let shortest = self.backoff_capped(false);
            let wait = retry_after.map_or(shortest, |wait| wait.max(shortest));
            self.unary.not_before = Some(now + wait);
            if *status != 429 {
                self.endpoint = (self.endpoint + 1) % self.endpoints.len().max(1);
            }
            return self.tell(Job::Server, text);
        }
        // the server answers, which is all that can be said for it
        self.failures = 0;
        self.done(Job::Server);
        self.wait(job, text, now);
    }

    /// This job cannot be done now; others can.
    pub(super) fn wait(&mut self, job: Job, reason: String, now: Instant) {
        let seed = self.random();
        let backoff =
            self.backoffs.entry(job).or_insert_with(|| Backoff::new(WAIT_FIRST, WAIT_CAP, seed));
        let wait = backoff.failed();
        self.waits.insert(job, now + wait);
        self.tell(job, reason);
    }

    pub(super) fn tell(&mut self, job: Job, reason: String) {
        if let Some(text) = self.troubles.entry(job).or_default().say(&reason) {
            self.events.push_back(StoreEvent::Trouble(text));
        } else {
            debug!("{reason}");
        }
    }

    /// This job is done, or has no trouble any more.
    pub(super) fn done(&mut self, job: Job) {
        let was_on = self.troubles.get_mut(&job).is_some_and(Trouble::over);
        if was_on && !self.troubles.values().any(Trouble::is_on) {
            self.events.push_back(StoreEvent::Recovered);
        }
    }
}
