//! etcd as a store: what is decided here holds for both of its languages (`v3`, `v2`).
//!
//! ```text
//!   Config -> identify -> List -> acquire -> claim -> confirm -> Acquired, Snapshot, Event ...
//!                          ^                   |                      |
//!                          +--- somebody was --+---- compacted -------+---- our key is gone
//!                               faster
//! ```
//!
//! * **One owner.** A key is created only if no key with its IPv4 subnet exists, rewritten and deleted only if unchanged
//!   since it was read. A new lease counts once everything that was created since the list is known and nobody older
//!   overlaps it: that covers subnets of other lengths, and IPv6 halves, for which the store has no comparison.
//! * **Two lanes.** Short operations take turns on one, the watch has the other. Each retries by itself.
//! * **Nothing is forgotten while the store is away**, and nobody hears of it twice.

mod dialect;
mod listing;
mod own;
mod v2;
mod v3;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use log::{debug, info};

use self::dialect::{Answer, Call, Dialect, Notice, Op, Refusal, Row, Step};
use self::listing::Listing;
use self::own::Own;

use self::v2::V2;
use self::v3::V3;
use super::complaints::Complaints;
use super::trouble::Trouble;
use super::turn::Turn;
use super::{Identity, Lane, Now, Store, StoreEvent, StoreRequest};

use crate::backoff::Chance;
use crate::cli::settings::{self, EtcdApi};
use crate::config::NetworkConfig;
use crate::http::{HttpEvent, Request};
use crate::lease::{LeaseAttrs, LeaseEvent, Subnets, key, value};

/// A short operation's time limit, for each of its exchanges.
const DEADLINE: Duration = Duration::from_secs(5);
/// A page of a list may take longer, if bytes keep coming.
const LIST_DEADLINE: Duration = Duration::from_secs(60);
/// A watch says something every ten minutes even if nothing happens (`progress_notify`).
const WATCH_SILENCE: Duration = Duration::from_secs(20 * 60);
/// Waits between tries.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_CAP: Duration = Duration::from_secs(5);
/// Between looks for a network config that is not there, or not valid.
const CONFIG_RETRY: Duration = Duration::from_secs(1);

/// What the operation under way is for.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Task {
    Config,
    List,
    /// Delete a lease of ours that the config would not give now.
    Discard,
    Create(Subnets),
    Reuse(Subnets, Row),
    /// See whether an older lease has come up that overlaps ours.
    Confirm,
    /// Extend our lease, or publish other attributes.
    Renew,
    /// See what has become of our key.
    Check,
    /// Give up a lease that an older one overlaps.
    Yield,
}

/// The store.
#[derive(Debug)]
pub struct Etcd {
    prefix: String,
    endpoints: Vec<String>,
    dialect: Box<dyn Dialect>,
    /// The other language, as long as either may hold the config.
    alternative: Option<Box<dyn Dialect>>,
    renew_margin: Duration,
    chance: Chance,

    config: Option<NetworkConfig>,
    /// Why the first of the two languages gave no config, while the second is asked.
    elsewhere: Option<(String, bool)>,
    /// Why the last config was not one.
    bad_config: Option<String>,
    identity: Option<Identity>,
    attrs: Option<LeaseAttrs>,
    /// Complete; not passed on yet.
    listing: Option<Listing>,
    /// Being read.
    reading: Listing,
    found_said: bool,
    acquired_once: bool,
    own: Option<Own>,
    /// Our key was seen with this revision, and that was not our doing.
    check_own: Option<u64>,
    /// The watch has failed. Before it is opened again our key is looked at: that finds a store that has lost its data, and
    /// renews what lets us in.
    watch_broken: bool,
    /// There was no free subnet.
    full: bool,
    relist: bool,
    yielding: bool,

    task: Option<Task>,
    unary: Turn,
    call: Option<Call>,
    cursor: Option<u64>,
    watch: Turn,
    watch_open: bool,
    watch_again: Option<Call>,
    cancel_watch: bool,
    endpoint: usize,
    /// Failures since the last success; a full round of the endpoints is one.
    failures: usize,
    trouble: Trouble,
    bad_keys: Complaints,
    events: VecDeque<StoreEvent>,
}

impl Etcd {
    /// A store on these servers. `random` seeds jitter and the choice of a subnet.
    pub fn new(settings: &settings::Etcd, renew_margin: Duration, random: u64) -> Self {
        let v3 =
            || -> Box<dyn Dialect> { Box::new(V3::new(&settings.prefix, settings.user.clone())) };
        let v2 =
            || -> Box<dyn Dialect> { Box::new(V2::new(&settings.prefix, settings.user.as_ref())) };
        let (dialect, alternative) = match settings.api {
            EtcdApi::Auto => (v3(), Some(v2())),
            EtcdApi::V3 => (v3(), None),
            EtcdApi::V2 => (v2(), None),
        };
        Self {
            prefix: settings.prefix.clone(),
            endpoints: settings.endpoints.clone(),
            dialect,
            alternative,
            renew_margin,
            chance: Chance::new(random),
            config: None,
            elsewhere: None,
            bad_config: None,
            identity: None,
            attrs: None,
            listing: None,
            reading: Listing::default(),
            found_said: false,
            acquired_once: false,
            own: None,
            check_own: None,
            watch_broken: false,
            full: false,
            relist: false,
            yielding: false,
            task: None,
            unary: Turn::new(RETRY_FIRST, RETRY_CAP, random),
            call: None,
            cursor: None,
            watch: Turn::new(RETRY_FIRST, RETRY_CAP, random ^ 0x5555),
            watch_open: false,
            watch_again: None,
            cancel_watch: false,
            endpoint: 0,
            failures: 0,
            trouble: Trouble::default(),
            bad_keys: Complaints::default(),
            events: VecDeque::new(),
        }
    }

    /// What is to be done next, and how to say it to the store.
    fn next_task(&mut self, now: Now) -> Option<(Task, Op)> {
        if self.config.is_none() {
            return Some((Task::Config, Op::Config));
        }
        self.identity?;
        if self.yielding {
            let own = self.own.as_ref()?;
            return Some((
                Task::Yield,
                Op::Delete { key: own.key.clone(), revision: own.revision },
            ));
        }
        if self.listing.is_none() && (self.own.is_none() || self.relist) {
            return Some((Task::List, Op::List));
        }
        let attrs = self.attrs.clone()?;
        let text = value::format(&attrs);
        let Some(own) = &self.own else { return self.claim(text, now) };
        if own.unconfirmed {
            return Some((Task::Confirm, Op::Since { cursor: self.cursor? }));
        }
        if self.watch_broken || self.check_own.is_some_and(|revision| revision > own.revision) {
            return Some((Task::Check, Op::Read { key: own.key.clone() }));
        }
        let due = own.renew_at.is_some_and(|at| at <= now.mono);
        let renew = || Op::Update {
            key: own.key.clone(),
            value: text.clone(),
            revision: own.revision,
            reserved: own.reserved,
        };
        let differs = own.value != text && own.hold_until.is_none_or(|at| at <= now.mono);
        (due || differs).then(|| (Task::Renew, renew()))
    }

    /// An operation has come to its end.
    fn handle_answer(&mut self, answer: Answer, now: Now) {
        self.unary.busy = false;
        let Some(task) = self.task.take() else { return };
        // A list that can be read does not say that a lease can be taken. A config is judged by its content, and a race is
        // no success.
        let says_little = task == Task::Config || task == Task::List && self.own.is_none();
        if !says_little && answer != Answer::Conflict {
            self.worked();
        }
        match (task, answer) {
            (Task::Config, Answer::Config(document)) => self.handle_config(document, now),
            (Task::List, Answer::Listed { cursor }) => self.handle_listed(cursor, now),
            (Task::Confirm, Answer::Listed { .. }) => self.handle_confirmation(),
            (Task::Create(subnets), Answer::Written { revision, ttl }) => {
                self.hold(subnets, revision, revision, false, ttl, now);
            }
            (Task::Reuse(subnets, row), Answer::Written { revision, ttl }) => {
                self.hold(subnets, row.created, revision, row.reserved, ttl, now);
                self.acquired();
            }
            (Task::Renew, Answer::Written { revision, ttl }) => {
                if let Some(own) = &mut self.own {
                    own.revision = revision;
                    if let Some(attrs) = &self.attrs {
                        own.lease.lease.attrs = attrs.clone();
                        own.value = value::format(attrs);
                    }
                }
                self.extend(ttl, true, now);
            }
            (Task::Renew, Answer::Conflict) => self.check_own = Some(u64::MAX),
            (Task::Check, Answer::Row(row, store)) => {
                // a store that was set back: what happened since then did not happen
                if self.cursor.is_some_and(|cursor| store < cursor) {
                    self.relist = true;
                    self.cursor = None;
                }
                self.handle_checked(row, now);
            }
            (Task::Yield, _) => {
                self.yielding = false;
                self.lose("an older lease overlaps it".into());
            }
            // the list is out of date
            (task @ (Task::Create(_) | Task::Reuse(..) | Task::Discard), answer) => {
                self.listing = None;
                if answer == Answer::Conflict {
                    self.unary.not_before = Some(now.mono + self.unary.backoff.failed());
                }
                // somebody has it, perhaps under a name that says nothing to us
                if let (Task::Create(subnets), Some(identity)) = (task, &mut self.identity)
                    && identity.previous == subnets
                {
                    identity.previous = Subnets::default();
                }
            }
            (task, answer) => debug!("{task:?} was answered with {answer:?}"),
        }
    }

    fn handle_config(&mut self, document: Option<String>, now: Now) {
        let place = format!("{}/config", self.prefix);
        let parsed = match &document {
            Some(document) => NetworkConfig::parse(document)
                .map_err(|error| format!("the network config in {place} is not valid: {error}")),
            None => Err(format!(
                "there is no network config: put one into {place}, such as {{\"Network\":\"10.5.0.0/16\",\"Backend\":{{\"Type\":\"vxlan\"}}}}"
            )),
        };
        match parsed {
            Ok(config) => {
                self.alternative = None;
                self.bad_config = None;
                self.worked();
                self.config = Some(config.clone());
                self.events.push_back(StoreEvent::Config(Box::new(config)));
            }
            Err(reason) if document.is_some() => {
                self.bad_config(reason, now);
            }
            Err(reason) => self.config_elsewhere(reason, true, now),
        }
    }

    fn bad_config(&mut self, reason: String, now: Now) {
        self.failures = 0;
        self.unary.backoff.succeeded();
        self.unary.not_before = Some(now.mono + CONFIG_RETRY);
        if self.bad_config.as_ref() != Some(&reason) {
            self.bad_config = Some(reason.clone());
            if let Some(text) = self.trouble.say(&reason) {
                self.events.push_back(StoreEvent::Trouble(text));
            }
        }
    }

    /// This language has no config for us: looks into the other one at once; when neither has one, waits. `served` says that
    /// the server speaks the language, so that its answer tells more than the other's.
    fn config_elsewhere(&mut self, reason: String, served: bool, now: Now) {
        let Some(other) = &mut self.alternative else {
            if !served {
                self.next_endpoint();
            }
            return self.bad_config(reason, now);
        };
        std::mem::swap(other, &mut self.dialect);
        match self.elsewhere.take() {
            None => self.elsewhere = Some((reason, served)),
            Some((first, true)) => self.bad_config(first, now),
            Some((_, false)) if served => self.bad_config(reason, now),
            Some((first, false)) => {
                // whatever answers there, it is no etcd
                self.next_endpoint();
                self.bad_config(first, now);
            }
        }
    }

    fn stop_watch(&mut self) {
        self.cancel_watch |= self.watch.busy;
        self.watch_open = false;
        self.watch_again = None;
    }

    fn handle_notice(&mut self, notice: Notice, now: Now) {
        match notice {
            Notice::Open => {
                self.watch_open = true;
                self.watch.backoff.succeeded();
                self.worked();
            }
            Notice::Put(row) => self.handle_put(row, now),
            Notice::Deleted { key, revision } => {
                if self.own.as_ref().is_some_and(|own| own.key == key) {
                    self.check_own = self.check_own.max(Some(revision));
                } else if let Some(subnets) = key::parse(&key) {
                    self.bad_keys.forget(&key);
                    self.events.push_back(StoreEvent::Event(LeaseEvent::Removed(subnets)));
                }
            }
            Notice::Cursor(revision) => {
                self.cursor = self.cursor.map(|cursor| cursor.max(revision));
            }
            Notice::Refused(Refusal::Compacted) => {
                info!(
                    "the store has forgotten the changes since the last one that we know: listing again"
                );
                self.relist = true;
                self.cursor = None;
                self.stop_watch();
            }
            Notice::Refused(
                Refusal::Away(reason) | Refusal::No(reason) | Refusal::Absent(reason),
            ) => self.watch_failed(&reason, now),
        }
    }

    fn handle_put(&mut self, row: Row, now: Now) {
        if self.own.as_ref().is_some_and(|own| own.key == row.key) {
            self.check_own = self.check_own.max(Some(row.revision));
            return;
        }
        match self.lease(&row) {
            Ok(lease) => {
                self.bad_keys.forget(&row.key);
                self.events.push_back(StoreEvent::Event(LeaseEvent::Put(lease)));
            }
            Err(reason) => {
                // a list would not show it either
                if let Some(subnets) = key::parse(&row.key) {
                    self.events.push_back(StoreEvent::Event(LeaseEvent::Removed(subnets)));
                }
                self.bad_key(row.key, reason, now);
            }
        }
    }

    fn watch_failed(&mut self, reason: &str, now: Now) {
        self.watch_broken = true;
        let was_open = std::mem::replace(&mut self.watch_open, false);
        self.stop_watch();
        let wait = self.watch.backoff.failed();
        self.watch.not_before = Some(now.mono + if was_open { RETRY_FIRST } else { wait });
        if was_open {
            // servers restart, connections break: only if it does not come back there is something to tell
            debug!("watch: {reason}");
            return;
        }
        self.next_endpoint();
        self.tell(reason);
    }

    /// An operation failed; it is tried again.
    fn fail(&mut self, reason: &str, server_is_away: bool, now: Now) {
        self.unary.busy = false;
        self.call = None;
        if matches!(self.task.take(), Some(Task::Create(_) | Task::Reuse(..) | Task::Discard)) {
            // it may have taken effect all the same
            self.listing = None;
        }
        let round_over = self.next_endpoint();
        // the next server is asked at once, the first one again after a while
        let wait = if server_is_away && !round_over {
            Duration::ZERO
        } else {
            self.unary.backoff.failed()
        };
        self.unary.not_before = Some(now.mono + wait);
        self.tell(reason);
    }

    /// Returns whether every endpoint has had its turn.
    fn next_endpoint(&mut self) -> bool {
        self.endpoint = (self.endpoint + 1) % self.endpoints.len().max(1);
        self.failures += 1;
        self.failures.is_multiple_of(self.endpoints.len().max(1))
    }

    fn tell(&mut self, reason: &str) {
        // one server of several may fail without anybody's noticing
        if self.failures >= self.endpoints.len() {
            if let Some(text) = self.trouble.say(reason) {
                self.events.push_back(StoreEvent::Trouble(text));
            }
        } else {
            debug!("{reason}");
        }
    }

    fn worked(&mut self) {
        self.failures = 0;
        self.unary.backoff.succeeded();
        if self.trouble.over() {
            self.events.push_back(StoreEvent::Recovered);
        }
    }

    fn handle_unary(&mut self, event: HttpEvent<'_>, now: Now) {
        match event {
            HttpEvent::Head { status, headers } => self.dialect.head(status, headers),
            HttpEvent::Body(bytes) => {
                let mut rows = Vec::new();
                self.dialect.body(bytes, &mut |row| rows.push(row));
                rows.into_iter().for_each(|row| self.row(row, now));
            }
            HttpEvent::Done => match self.dialect.done() {
                Step::Call(call) => self.call = Some(call),
                Step::Answer(answer) => self.handle_answer(answer, now),
                Step::Refused(Refusal::Away(reason)) => self.fail(&reason, true, now),
                Step::Refused(Refusal::No(reason)) => self.fail(&reason, false, now),
                Step::Refused(Refusal::Absent(reason)) if self.task == Some(Task::Config) => {
                    self.unary.busy = false;
                    self.task = None;
                    self.config_elsewhere(reason, false, now);
                }
                Step::Refused(Refusal::Absent(reason)) => self.fail(&reason, false, now),
                Step::Refused(Refusal::Compacted) => {
                    self.fail("the list was compacted while it was read", true, now)
                }
            },
            HttpEvent::Failed(reason) => self.fail(reason, true, now),
        }
    }

    fn handle_watch(&mut self, event: HttpEvent<'_>, now: Now) {
        let mut notices = Vec::new();
        let mut say = |notice| notices.push(notice);
        match event {
            HttpEvent::Head { status, headers } => {
                self.dialect.watch_head(status, headers, &mut say)
            }
            HttpEvent::Body(bytes) => self.dialect.watch_body(bytes, &mut say),
            HttpEvent::Done => {
                self.watch.busy = false;
                let again = self.dialect.watch_done(&mut say);
                notices.into_iter().for_each(|notice| self.handle_notice(notice, now));
                if again {
                    self.watch_again = self.cursor.map(|cursor| self.dialect.watch(cursor));
                }
                return;
            }
            HttpEvent::Failed(reason) => {
                self.watch.busy = false;
                return self.watch_failed(reason, now);
            }
        }
        for notice in notices {
            self.handle_notice(notice, now);
        }
    }

    fn request(
        &self,
        call: Call,
        deadline: Option<Duration>,
        silence: Option<Duration>,
    ) -> Request {
        let Call { method, path, headers, body } = call;
        Request { endpoint: self.endpoint, method, path, headers, body, deadline, silence }
    }
}

impl Store for Etcd {
    fn name(&self) -> String {
        format!("etcd {}", self.prefix)
    }

    fn describe(&self) -> String {
        let api = match &self.alternative {
            Some(_) => "",
            None => self.dialect.name(),
        };
        let space = if api.is_empty() { "" } else { " " };
        format!("etcd{space}{api} at {} below {}", self.endpoints.join(","), self.prefix)
    }

    fn identify(&mut self, identity: Identity, _now: Now) {
        self.identity = Some(identity);
    }

    fn acquire(&mut self, attrs: LeaseAttrs, _now: Now) {
        self.attrs = Some(attrs);
    }

    fn poll_request(&mut self, now: Now) -> Option<StoreRequest> {
        if std::mem::take(&mut self.cancel_watch) {
            self.watch.busy = false;
            return Some(StoreRequest::Cancel(Lane::Watch));
        }
        self.unary.refresh(now.mono);
        self.watch.refresh(now.mono);
        if let Some(own) = &mut self.own {
            own.hold_until = own.hold_until.filter(|at| *at > now.mono);
        }
        // the next exchange of an operation under way
        if let Some(call) = self.call.take() {
            let silence = matches!(self.task, Some(Task::List | Task::Confirm)).then_some(DEADLINE);
            let deadline = if silence.is_some() { LIST_DEADLINE } else { DEADLINE };
            return Some(StoreRequest::Start(
                Lane::Unary,
                self.request(call, Some(deadline), silence),
            ));
        }
        if self.unary.may_start(now.mono)
            && let Some((task, op)) = self.next_task(now)
        {
            if matches!(task, Task::List | Task::Confirm) {
                self.reading = Listing::default();
            }
            self.task = Some(task);
            self.unary.busy = true;
            self.unary.not_before = None;
            self.call = Some(self.dialect.begin(op));
            return self.poll_request(now);
        }
        let may_watch = self.own.as_ref().is_some_and(|own| !own.unconfirmed)
            && !self.relist
            && !self.yielding
            && !self.watch_broken;
        if let Some(cursor) = self.cursor.filter(|_| may_watch && self.watch.may_start(now.mono)) {
            let call = self.watch_again.take().unwrap_or_else(|| self.dialect.watch(cursor));
            self.watch.busy = true;
            self.watch.not_before = None;
            return Some(StoreRequest::Start(
                Lane::Watch,
                self.request(call, None, Some(WATCH_SILENCE)),
            ));
        }
        None
    }

    fn poll_event(&mut self) -> Option<StoreEvent> {
        self.events.pop_front()
    }

    fn handle_http(&mut self, lane: Lane, event: HttpEvent<'_>, now: Now) {
        match lane {
            Lane::Unary => self.handle_unary(event, now),
            Lane::Watch => self.handle_watch(event, now),
        }
    }

    fn poll_timeout(&self) -> Option<Instant> {
        let renewal =
            self.own.as_ref().and_then(|own| own.renew_at.into_iter().chain(own.hold_until).min());
        let of = |turn: &Turn, other: Option<Instant>| {
            if turn.busy { None } else { turn.not_before.or(other) }
        };
        [of(&self.unary, renewal), of(&self.watch, None)].into_iter().flatten().min()
    }
}
