//! Brings the kernel to the desired state and keeps it there. A plain value: it yields datagrams to send and takes those
//! that arrive, and owns no socket and no clock.
//!
//! One job is in flight at a time: a list, a batch of writes, or a batch of route lookups. Only the last message of a batch
//! asks for an acknowledgement; the kernel reports every error anyway, and in order.
//!
//! Before the first complete list of peers ([`Reconciler::sweep`]) everything that is declared is compared with what the
//! kernel has before it is written, so a restart writes nothing. From then on notifications tell at once what others
//! change, and an audit every minute finds what they do not tell: the kernel drops IPv4 routes silently with their link.

mod audit;
mod notice;
mod write;

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;

use crate::kernel::desired::{Clash, Desired, State};
use crate::kernel::encode::{self, Dump};
use crate::kernel::links::Links;
use crate::kernel::object::{IfName, Key, Object, Owner};
use crate::kernel::paths::Paths;
use crate::kernel::seen::{Seen, UNICAST, decode};
use crate::netlink::{Message, Writer, messages};

/// Messages of one batch: about a millisecond of the kernel's time.
const BATCH: usize = 256;
/// The kernel answers within the system call; an answer that takes this long was lost.
const ANSWER: Duration = Duration::from_secs(5);
/// A change of links or addresses comes with others; the audit that follows it waits for them.
const STIR: Duration = Duration::from_millis(30);
/// As [`STIR`], for routes of others when somebody watches paths.
const STIR_ROUTES: Duration = Duration::from_secs(1);
/// Between audits, about.
const AUDIT: Duration = Duration::from_secs(60);

/// What the reconciler must know of the network.
#[derive(Clone, Debug)]
pub struct Scope {
    /// Prefixes of the overlay: a stale route outside of them is somebody else's.
    pub networks: Vec<IpNet>,
    /// The backend's own links: everything on them is ours.
    pub devices: Vec<IfName>,
    /// The UDP port that the kernel gives to VXLAN devices made without one.
    pub vxlan_port: u16,
    /// Netlink port of the socket that sends the requests, by which our own doings are known among the notifications.
    pub port: u32,
    /// Any number; spreads the audits of many hosts over the minute.
    pub seed: u64,
}

/// What the operator or the agent should know.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum KernelEvent {
    /// Somebody deleted or changed an object; it is being put back.
    Healed {
        /// What.
        object: String,
        /// `deleted` or `changed`.
        how: &'static str,
    },
    /// The kernel refused an object, or somebody changes it again and again.
    Failed {
        /// What.
        object: String,
        /// Who needs it.
        owner: Owner,
        /// The kernel's reason.
        reason: String,
        /// When it is tried again.
        retry_in: Duration,
    },
    /// A device had to be made anew.
    Remade {
        /// The device.
        link: IfName,
        /// What was wrong with it.
        reason: String,
    },
    /// Two owners want different values of the same object; the first one has it.
    Clash {
        /// Who has it.
        holder: Owner,
        /// Who must wait.
        other: Owner,
        /// What the other wants.
        object: String,
    },
    /// A left-over of an earlier life was removed.
    Swept(String),
    /// A route into the network that may be a left-over of another flanneld.
    Leftover(String),
    /// Whether an address is on-link is known now, or has changed.
    PathChanged(IpAddr),
}

/// How far everything of one owner has come.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Progress {
    /// On its way.
    Pending,
    /// In the kernel.
    Programmed,
    /// Refused; the first reason.
    Failed(String),
}

#[derive(Debug)]
enum Job {
    /// The items' messages are numbered from `first`. Items that failed are gone.
    Batch {
        first: u32,
        items: Vec<Option<Item>>,
    },
    List {
        dump: Dump,
        sequence: u32,
        intact: bool,
        indexes: HashSet<u32>,
    },
    Lookups {
        first: u32,
        ips: Vec<IpAddr>,
        left: usize,
    },
}

#[derive(Debug)]
enum Item {
    Put(Key),
    /// Removes what is in the way of the next item.
    Clear,
    Delete(Object),
}

/// The reconciler.
#[derive(Debug)]
pub struct Reconciler {
    scope: Scope,
    desired: Desired,
    doomed: BTreeMap<Key, Object>,
    links: Links,
    paths: Paths,
    writer: Writer,
    sequence: u32,
    job: Option<(Job, Instant)>,
    /// Lists that the audit under way still needs; `None` when no audit is under way.
    audit: Option<VecDeque<Dump>>,
    /// Lists of this audit that changed while they were read.
    interruptions: u8,
    /// Number of the last audit.
    epoch: u32,
    audit_now: bool,
    audit_at: Instant,
    /// When the fights of the past are forgiven.
    calm_at: Instant,
    stir_at: Option<Instant>,
    /// Links must be listed: at the start, and to learn the index of a new device.
    list_links: bool,
    swept: bool,
    mentioned: bool,
    sysctls: VecDeque<(Box<str>, Box<str>)>,
    events: VecDeque<KernelEvent>,
    writes: u64,
}

impl Reconciler {
    /// Wants nothing yet.
    pub fn new(scope: Scope, now: Instant) -> Self {
        Self {
            scope,
            desired: Desired::default(),
            doomed: BTreeMap::new(),
            links: Links::default(),
            paths: Paths::default(),
            writer: Writer::default(),
            sequence: 0,
            job: None,
            audit: None,
            interruptions: 0,
            epoch: 1,
            audit_now: false,
            audit_at: now + AUDIT,
            calm_at: now + AUDIT,
            stir_at: None,
            list_links: true,
            swept: false,
            mentioned: false,
            sysctls: VecDeque::new(),
            events: VecDeque::new(),
            writes: 0,
        }
    }

    /// Replaces everything that `owner` wants.
    pub fn declare(&mut self, owner: Owner, objects: Vec<Object>) {
        let state = if self.swept { State::Wanted } else { State::Unknown };
        self.audit_now |= !self.swept && !objects.is_empty();
        if !self.doomed.is_empty() {
            for object in &objects {
                self.doomed.remove(&object.key());
            }
        }
        let mut clashes = Vec::new();
        let dropped = self.desired.declare(owner, objects, &state, self.epoch, &mut clashes);
        self.doom(dropped);
        for Clash { holder, other, object } in clashes {
            self.events.push_back(KernelEvent::Clash { holder, other, object: object.to_string() });
        }
    }

    /// `owner` wants nothing any more.
    pub fn withdraw(&mut self, owner: Owner) {
        let dropped = self.desired.withdraw(owner);
        self.doom(dropped);
    }

    fn doom(&mut self, objects: Vec<Object>) {
        for object in objects {
            // links stay, so that a restart finds them; what is left behind by an earlier life goes with the sweep
            if !matches!(object, Object::Link(_) | Object::Sysctl(_)) {
                self.doomed.insert(object.key(), object);
            }
        }
    }

    /// Everybody who is there has declared: what nobody wants is stale from now on.
    pub fn sweep(&mut self) {
        self.audit_now |= !self.swept;
        self.swept = true;
    }

    /// Begins to find out whether `ip` is on-link; [`KernelEvent::PathChanged`] tells.
    pub fn watch_path(&mut self, ip: IpAddr) {
        self.paths.watch(ip);
    }

    /// Ends a [`Reconciler::watch_path`].
    pub fn unwatch_path(&mut self, ip: IpAddr) {
        self.paths.unwatch(ip);
    }

    /// Is `ip` on-link? `None` until the kernel has said so.
    pub fn direct(&self, ip: IpAddr) -> Option<bool> {
        self.paths.direct(ip)
    }

    /// How far everything of `owner` has come; `None` if it declared nothing.
    pub fn progress(&self, owner: Owner) -> Option<Progress> {
        let mut progress = Progress::Programmed;
        for key in self.desired.claimed(owner)? {
            match self.desired.get(key).map(|entry| (&entry.state, &entry.object)) {
                Some((State::Failed(failure), object)) => {
                    return Some(Progress::Failed(format!("{object}: {}", failure.reason)));
                }
                Some((State::Waiting, object)) => {
                    let link =
                        self.missing_link(object).map_or("of it".into(), |link| link.to_string());
                    return Some(Progress::Failed(format!("{object}: there is no link {link}")));
                }
                Some((State::Present, _)) | None => {}
                Some(_) => progress = Progress::Pending,
            }
        }
        Some(progress)
    }

    /// Is every object in the kernel, or refused, or waiting for its link, and nothing under way?
    pub fn is_settled(&self) -> bool {
        self.desired.is_settled()
            && self.doomed.is_empty()
            && !self.audit_now
            && self.audit.is_none()
            && !matches!(self.job, Some((Job::Batch { .. } | Job::Lookups { .. }, _)))
            && !self.paths.is_asking()
    }

    /// Objects that are not in the kernel though they are wanted.
    pub fn missing(&self) -> usize {
        self.desired.entries().filter(|(_, entry)| entry.state != State::Present).count()
    }

    /// How many messages were sent that change something.
    pub fn writes(&self) -> u64 {
        self.writes
    }

    /// The next thing to tell.
    pub fn poll_event(&mut self) -> Option<KernelEvent> {
        self.events.pop_front()
    }

    /// The next file below `/proc/sys` that must have this content.
    pub fn poll_sysctl(&mut self) -> Option<(Box<str>, Box<str>)> {
        self.sysctls.pop_front()
    }

    /// When [`Reconciler::handle_timeout`] wants to be called next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let job = self.job.as_ref().map(|(_, deadline)| *deadline);
        [job, Some(self.audit_at), Some(self.calm_at), self.stir_at, self.desired.next_retry()]
            .into_iter()
            .flatten()
            .min()
    }

    /// A deadline has passed.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.job.as_ref().is_some_and(|(_, deadline)| *deadline <= now) {
            self.handle_lost_replies(now);
        }
        if self.stir_at.is_some_and(|at| at <= now) {
            self.stir_at = None;
            self.desired.encourage();
            self.audit_now = true;
        }
        if self.audit_at <= now {
            self.audit_at = now + AUDIT;
            self.audit_now = true;
        }
        if self.calm_at <= now {
            self.calm_at = now + AUDIT;
            self.desired.calm();
        }
        self.desired.retry(now);
    }

    /// Answers were lost, or a request could not be sent: what was under way is unknown.
    pub fn handle_lost_replies(&mut self, now: Instant) {
        if let Some((Job::Batch { items, .. }, _)) = self.job.take() {
            for item in items.into_iter().flatten() {
                if let Item::Put(key) = item {
                    self.desired.set(&key, State::Unknown);
                }
            }
        }
        self.audit = None;
        self.list_links = true;
        self.stir(now, STIR);
    }

    /// Notifications were lost.
    pub fn handle_lost_notices(&mut self, now: Instant) {
        self.stir(now, STIR);
    }

    fn stir(&mut self, now: Instant, delay: Duration) {
        let at = now + delay;
        self.stir_at = Some(self.stir_at.map_or(at, |other| other.min(at)));
    }

    /// The next datagram to send on the request socket; none while answers are due.
    pub fn poll_transmit(&mut self, now: Instant) -> Option<&[u8]> {
        if self.job.is_some() {
            return None;
        }
        self.writer.clear();
        let job = self.next_job(now)?;
        self.job = Some((job, now + ANSWER));
        Some(self.writer.bytes())
    }

    fn next_job(&mut self, now: Instant) -> Option<Job> {
        if std::mem::take(&mut self.list_links) {
            return Some(self.list(Dump::Links));
        }
        let ips = self.paths.take(BATCH);
        if !ips.is_empty() {
            let first = self.sequence.wrapping_add(1);
            for ip in &ips {
                let sequence = self.next_sequence();
                encode::lookup(&mut self.writer, sequence, *ip);
            }
            return Some(Job::Lookups { first, left: ips.len(), ips });
        }
        if let Some(dump) = self.audit.as_mut().and_then(VecDeque::pop_front) {
            return Some(self.list(dump));
        }
        if std::mem::take(&mut self.audit_now) {
            self.epoch = self.epoch.wrapping_add(1);
            self.audit = Some(VecDeque::new());
            self.interruptions = 0;
            return Some(self.list(Dump::Links));
        }
        self.write_batch(now)
    }

    fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    fn list(&mut self, dump: Dump) -> Job {
        let sequence = self.next_sequence();
        let index = match dump {
            Dump::Neighbours { link, .. } | Dump::Fdb { link } => {
                self.links.index(link).unwrap_or(0)
            }
            _ => 0,
        };
        encode::dump(&mut self.writer, sequence, dump, index);
        Job::List { dump, sequence, intact: true, indexes: HashSet::new() }
    }

    /// A datagram from the request socket.
    pub fn handle_reply(&mut self, datagram: &[u8], now: Instant) {
        for message in messages(datagram) {
            let Some((mut job, deadline)) = self.job.take() else { return };
            let over = match &mut job {
                Job::Batch { first, items } => self.batch_reply(*first, items, &message, now),
                Job::List { dump, sequence, intact, indexes } => {
                    *sequence == message.sequence
                        && self.list_reply(*dump, intact, indexes, &message, now)
                }
                Job::Lookups { first, ips, left } => self.lookup_reply(*first, ips, left, &message),
            };
            if !over {
                self.job = Some((job, deadline));
            }
        }
    }

    fn lookup_reply(
        &mut self,
        first: u32,
        ips: &[IpAddr],
        left: &mut usize,
        message: &Message<'_>,
    ) -> bool {
        let number = usize::try_from(message.sequence.wrapping_sub(first)).unwrap_or(usize::MAX);
        let Some(ip) = ips.get(number) else { return false };
        let direct = match decode(message) {
            Some(Seen::Route(route)) => route.kind == UNICAST && route.via.is_none() && !route.odd,
            _ => false,
        };
        if self.paths.answer(*ip, direct) {
            self.events.push_back(KernelEvent::PathChanged(*ip));
        }
        *left -= 1;
        *left == 0
    }

    fn heal(&mut self, key: &Key, how: &'static str, now: Instant) {
        let Some(entry) = self.desired.get(key) else { return };
        let (object, owner) = (entry.object.to_string(), entry.holder);
        let at_once = self.desired.heal(key, now);
        self.events.push_back(match self.desired.get(key).map(|entry| &entry.state) {
            Some(State::Failed(failure)) if !at_once => {
                let retry_in = failure.retry_at.saturating_duration_since(now);
                KernelEvent::Failed { object, owner, reason: failure.reason.clone(), retry_in }
            }
            _ => KernelEvent::Healed { object, how },
        });
    }
}

const ENOENT: i32 = 2;
const ESRCH: i32 = 3;
const EEXIST: i32 = 17;
const ENODEV: i32 = 19;
const EOPNOTSUPP: i32 = 95;
const EADDRNOTAVAIL: i32 = 99;

fn errno(code: i32) -> String {
    io::Error::from_raw_os_error(code).to_string()
}
