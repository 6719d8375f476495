//! What happens when the server cannot be reached, or says no: who waits how long, and what is said.

use std::time::{Duration, Instant};

use log::debug;

use super::request::Refusal;
use super::{Job, Kube, RETRY_FIRST, Subject, WAIT_CAP, WAIT_FIRST};
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
            self.tell(Subject::Server, reason.to_owned());
        } else {
            debug!("{reason}");
        }
    }

    /// The server answers.
    pub(super) fn reached(&mut self) {
        self.failures = 0;
        self.unary.backoff.succeeded();
        self.done(Subject::Server);
    }

    /// The server says no.
    pub(super) fn refused(&mut self, job: Job, refusal: &Refusal, now: Instant) {
        let text = self.explain_job(job, refusal);
        let Refusal { status, retry_after, .. } = refusal;
        if refusal.is_expired()
            && match (job, &mut self.listing) {
                // the cache cannot answer: etcd can
                (Job::List, Some(listing)) => listing.go_fresh(),
                // it was put back without a version
                (Job::Fetch, _) => true,
                _ => false,
            }
        {
            debug!("{text}");
            self.waits.insert(job, now + RETRY_FIRST);
            return;
        }
        if job == Job::Publish && matches!(status, 404 | 409) {
            self.own.due = true;
        }
        match status {
            // too much is asked of it, by us or by others
            429 => {
                let shortest = self.backoff_capped(false);
                let wait = retry_after.map_or(shortest, |wait| wait.max(shortest));
                self.unary.not_before = Some(now + wait);
            }
            // another server may do better
            500.. => self.endpoint = (self.endpoint + 1) % self.endpoints.len().max(1),
            // it answers, which is all that can be said for it
            _ => {
                self.failures = 0;
                self.done(Subject::Server);
            }
        }
        self.wait(job, text, retry_after.unwrap_or_default(), now);
    }

    /// This job cannot be done now, nor for `at_least` so long; others can.
    pub(super) fn wait(&mut self, job: Job, reason: String, at_least: Duration, now: Instant) {
        let seed = self.chance.draw();
        let backoff =
            self.backoffs.entry(job).or_insert_with(|| Backoff::new(WAIT_FIRST, WAIT_CAP, seed));
        let wait = backoff.failed().max(at_least);
        self.waits.insert(job, now + wait);
        self.tell(job, reason);
    }

    pub(super) fn tell(&mut self, subject: impl Into<Subject>, reason: String) {
        if let Some(text) = self.troubles.entry(subject.into()).or_default().say(&reason) {
            self.events.push_back(StoreEvent::Trouble(text));
        } else {
            debug!("{reason}");
        }
    }

    /// There is no trouble with this any more.
    pub(super) fn done(&mut self, subject: impl Into<Subject>) {
        let was_on = self.troubles.get_mut(&subject.into()).is_some_and(Trouble::over);
        if was_on && !self.troubles.values().any(Trouble::is_on) {
            self.events.push_back(StoreEvent::Recovered);
        }
    }
}
