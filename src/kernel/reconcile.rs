//! Brings the kernel to the desired state and keeps it there. A plain value: it yields datagrams to send and takes those
//! that arrive, and owns no socket and no clock.
//!
//! One job is in flight at a time: a list, a batch of writes, or a batch of route lookups. Only the last message of a batch
//! asks for an acknowledgement; the kernel reports every error anyway, and in order.
//!
//! Before the first complete list of peers ([`Reconciler::sweep`]) everything that is declared is compared with what the
//! kernel has before it is written, so a restart writes nothing. From then on notifications tell at once what others
//! change, and an audit every minute finds what they do not tell: the kernel drops IPv4 routes silently with their link.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;

use super::compare::{self, PROTOCOL, Stray};
use super::desired::{Clash, Desired, State};
use super::encode::{self, Dump};
use super::links::{Links, Verdict, judge};
use super::message::{DONE, ERROR, Message, Writer, flag, messages, outcome};
use super::object::{Address, IfName, Key, Link, LinkKind, Object, Owner};
use super::paths::Paths;
use super::seen::{Seen, SeenLink, UNICAST, decode, kind};

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
    /// Removes a link so that the next item can make it anew.
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
    /// Number of the last audit.
    epoch: u32,
    audit_now: bool,
    audit_at: Instant,
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
            epoch: 1,
            audit_now: false,
            audit_at: now + AUDIT,
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
        [job, Some(self.audit_at), self.stir_at, self.desired.next_retry()]
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
            self.desired.calm();
            self.audit_now = true;
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

    fn write_batch(&mut self, now: Instant) -> Option<Job> {
        let first = self.sequence.wrapping_add(1);
        let mut items = Vec::new();
        while items.is_empty() && self.desired.has_wanted() {
            for key in self.desired.batch(BATCH) {
                self.put(&key, &mut items, now);
            }
        }
        if items.is_empty() {
            while items.len() < BATCH {
                let Some((_, object)) = self.doomed.pop_last() else { break };
                if self.delete(&object) {
                    items.push(Some(Item::Delete(object)));
                }
            }
        }
        if items.is_empty() {
            return None;
        }
        self.writer.add_flags(flag::ACK);
        self.writes += u64::try_from(items.len()).unwrap_or(0);
        Some(Job::Batch { first, items })
    }

    /// Writes the messages that make one object; or notes why it cannot be made now.
    fn put(&mut self, key: &Key, items: &mut Vec<Option<Item>>, now: Instant) {
        let Some(entry) = self.desired.get(key) else { return };
        let object = entry.object.clone();
        let link = compare::link_of(&object);
        let index = link.and_then(|link| self.links.index(link));
        if link.is_some() && index.is_none() {
            return self.desired.set(key, State::Waiting);
        }
        if let Object::Sysctl(sysctl) = object {
            self.sysctls.push_back((sysctl.path, sysctl.value));
            return self.desired.set(key, State::Present);
        }
        if let Object::Link(link) = &object {
            return self.put_link(key, link, items, now);
        }
        let sequence = self.next_sequence();
        let index_or_zero = index.unwrap_or(0);
        match &object {
            Object::Address(address) => {
                encode::address(&mut self.writer, sequence, address, index_or_zero, false)
            }
            Object::Fdb(fdb) => encode::fdb(&mut self.writer, sequence, fdb, index_or_zero, false),
            Object::Neighbour(neighbour) => {
                encode::neighbour(&mut self.writer, sequence, neighbour, index_or_zero, false);
            }
            Object::Route(route) => {
                encode::put_route(&mut self.writer, sequence, route, index, PROTOCOL)
            }
            Object::Link(_) | Object::Sysctl(_) => {}
        }
        self.desired.set(key, State::Sent);
        items.push(Some(Item::Put(key.clone())));
    }

    fn put_link(&mut self, key: &Key, link: &Link, items: &mut Vec<Option<Item>>, now: Instant) {
        let lower = match &link.kind {
            LinkKind::Vxlan(vxlan) => {
                let Some(lower) = self.links.index(vxlan.lower) else {
                    return self.desired.set(key, State::Waiting);
                };
                Some(lower)
            }
            LinkKind::Existing => None,
        };
        let seen = self.links.get(link.name);
        let verdict = seen.map(|seen| {
            (seen.index, seen.mtu, seen.mac, judge(link, seen, lower, self.scope.vxlan_port))
        });
        match (verdict, &link.kind) {
            (None, LinkKind::Existing) => return self.desired.set(key, State::Waiting),
            (Some((_, _, _, Verdict::Same)), _) => return self.desired.set(key, State::Present),
            (Some((index, mtu, mac, Verdict::Change)), kind) => {
                let sequence = self.next_sequence();
                let mac = match kind {
                    LinkKind::Vxlan(vxlan) => Some(vxlan.mac).filter(|want| Some(*want) != mac),
                    LinkKind::Existing => None,
                };
                let mtu = Some(link.mtu).filter(|want| *want != mtu);
                encode::change_link(&mut self.writer, sequence, index, mtu, mac);
            }
            (None, LinkKind::Vxlan(_)) => {
                let sequence = self.next_sequence();
                encode::create_link(&mut self.writer, sequence, link, lower.unwrap_or(0));
            }
            (Some((index, _, _, Verdict::Incompatible(reason))), _) => {
                if !self.desired.heal(key, now) {
                    return;
                }
                self.events.push_back(KernelEvent::Remade { link: link.name, reason });
                let sequence = self.next_sequence();
                encode::delete_link(&mut self.writer, sequence, index);
                items.push(Some(Item::Clear));
                let sequence = self.next_sequence();
                encode::create_link(&mut self.writer, sequence, link, lower.unwrap_or(0));
            }
        }
        self.list_links = true;
        self.desired.set(key, State::Sent);
        items.push(Some(Item::Put(key.clone())));
    }

    /// Writes the message that removes an object. Returns whether there is something to remove.
    fn delete(&mut self, object: &Object) -> bool {
        let link = compare::link_of(object);
        let index = link.and_then(|link| self.links.index(link));
        if link.is_some() && index.is_none() {
            return false;
        }
        let sequence = self.next_sequence();
        let index_or_zero = index.unwrap_or(0);
        match object {
            Object::Address(address) => {
                encode::address(&mut self.writer, sequence, address, index_or_zero, true)
            }
            Object::Fdb(fdb) => encode::fdb(&mut self.writer, sequence, fdb, index_or_zero, true),
            Object::Neighbour(neighbour) => {
                encode::neighbour(&mut self.writer, sequence, neighbour, index_or_zero, true);
            }
            Object::Route(route) => encode::delete_route(&mut self.writer, sequence, route, index),
            Object::Link(_) | Object::Sysctl(_) => return false,
        }
        true
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

    /// Returns whether the batch is over.
    fn batch_reply(
        &mut self,
        first: u32,
        items: &mut [Option<Item>],
        message: &Message<'_>,
        now: Instant,
    ) -> bool {
        let Some((code, text)) =
            Some(message).filter(|message| message.kind == ERROR).and_then(outcome)
        else {
            return false;
        };
        let number = usize::try_from(message.sequence.wrapping_sub(first)).unwrap_or(usize::MAX);
        let last = number + 1 == items.len();
        if code != 0 {
            match items.get_mut(number).and_then(Option::take) {
                Some(Item::Put(key)) => self.refused(&key, code, text, now),
                Some(Item::Delete(object)) => self.not_deleted(&object, code, text),
                Some(Item::Clear) | None => {}
            }
        }
        if last {
            for item in items.iter_mut().filter_map(Option::take) {
                if let Item::Put(key) = item {
                    // it may have been declared otherwise since it was sent
                    if self.desired.get(&key).is_some_and(|entry| entry.state == State::Sent) {
                        self.desired.set(&key, State::Present);
                    }
                }
            }
        }
        last
    }

    fn refused(&mut self, key: &Key, code: i32, text: Option<&str>, now: Instant) {
        let Some(entry) = self.desired.get(key).filter(|entry| entry.state == State::Sent) else {
            return;
        };
        let (object, owner) = (entry.object.clone(), entry.holder);
        let reason = self.explain(&object, code, text);
        let retry_in = self.desired.failed(key, &reason, now);
        self.events.push_back(KernelEvent::Failed {
            object: object.to_string(),
            owner,
            reason,
            retry_in,
        });
    }

    fn explain(&self, object: &Object, code: i32, text: Option<&str>) -> String {
        let mut reason = errno(code);
        if let Some(text) = text {
            reason = format!("{text} ({reason})");
        }
        let Object::Link(Link { name, kind: LinkKind::Vxlan(want), .. }) = object else {
            return reason;
        };
        if code == EEXIST {
            let rival = self.links.iter().find(|link| {
                link.name != *name && link.vxlan.as_ref().is_some_and(|vxlan| vxlan.vni == want.vni)
            });
            if let Some(rival) = rival {
                return format!(
                    "device {} already uses VNI {} (is another network plugin on this host?): remove it, or set another \
                     VNI or Port in the network config",
                    rival.name, want.vni
                );
            }
        }
        if code == EOPNOTSUPP {
            return format!(
                "{reason}: this kernel cannot make VXLAN devices (CONFIG_VXLAN, module vxlan)"
            );
        }
        reason
    }

    fn not_deleted(&mut self, object: &Object, code: i32, text: Option<&str>) {
        if ![ENOENT, ESRCH, ENODEV, EADDRNOTAVAIL].contains(&code) {
            log::debug!(
                "could not remove {object}: {} ({})",
                text.unwrap_or("no reason given"),
                errno(code)
            );
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

    /// Returns whether the list is over.
    fn list_reply(
        &mut self,
        dump: Dump,
        intact: &mut bool,
        indexes: &mut HashSet<u32>,
        message: &Message<'_>,
        now: Instant,
    ) -> bool {
        *intact &= message.flags & flag::DUMP_INTR == 0;
        if message.kind == DONE || message.kind == ERROR {
            // DONE has an error number, too
            let code = outcome(&Message { flags: 0, ..*message }).map_or(0, |(code, _)| code);
            // a table or a device that does not exist has no content
            *intact &= [0, ENOENT, ESRCH, ENODEV].contains(&code);
            if *intact {
                self.end_list(dump, indexes, now);
            } else if let Some(audit) = &mut self.audit {
                log::debug!(
                    "listing {dump:?} again: {}",
                    if code == 0 { "it changed meanwhile".into() } else { errno(code) }
                );
                if code == 0 && audit.len() < 64 {
                    audit.push_back(dump);
                } else {
                    self.audit = None;
                    self.stir(now, ANSWER);
                }
            } else {
                self.list_links = true;
            }
            return true;
        }
        match decode(message) {
            Some(Seen::Link(link)) => {
                indexes.insert(link.index);
                self.note_link(link, true, now);
            }
            Some(seen) => self.audited(dump, &seen, now),
            None => {}
        }
        false
    }

    /// One object in a list.
    fn audited(&mut self, dump: Dump, seen: &Seen, now: Instant) {
        let Some(key) = compare::key(seen, &self.links).filter(|key| compare::covers(dump, key))
        else {
            return self.judge_stray(seen);
        };
        let Some(entry) = self.desired.get(&key) else { return self.judge_stray(seen) };
        if compare::same(&entry.object, seen, &self.links) {
            return self.desired.seen(&key, self.epoch);
        }
        let state = entry.state.clone();
        self.desired.excuse(&key, self.epoch);
        match state {
            State::Unknown => self.desired.set(&key, State::Wanted),
            State::Present => self.heal(&key, "changed", now),
            _ => {}
        }
    }

    fn judge_stray(&mut self, seen: &Seen) {
        if let Seen::Address(address) = seen {
            let Some(link) = self.links.at(address.index).map(|link| link.name) else { return };
            let intruder = compare::intruder(seen, &self.links, self.addresses_on(link));
            if let Some(object) = intruder {
                self.events.push_back(KernelEvent::Swept(object.to_string()));
                self.doomed.insert(object.key(), object);
            }
            return;
        }
        if !self.swept {
            return;
        }
        match compare::stray(seen, &self.links, &self.scope.networks, &self.scope.devices) {
            Stray::Remove(object) => {
                self.events.push_back(KernelEvent::Swept(object.to_string()));
                self.doomed.insert(object.key(), object);
            }
            Stray::Mention(object) if !std::mem::replace(&mut self.mentioned, true) => {
                self.events.push_back(KernelEvent::Leftover(object.to_string()));
            }
            Stray::Mention(_) | Stray::Leave => {}
        }
    }

    fn addresses_on(&self, link: IfName) -> impl Iterator<Item = &Address> {
        self.desired.addresses().filter(move |address| address.link == link)
    }

    fn end_list(&mut self, dump: Dump, indexes: &HashSet<u32>, now: Instant) {
        if dump == Dump::Links {
            let gone: Vec<u32> = self
                .links
                .iter()
                .map(|link| link.index)
                .filter(|index| !indexes.contains(index))
                .collect();
            for index in gone {
                self.forget_link(index, now);
            }
            self.unpark();
            if self.audit.as_ref().is_some_and(VecDeque::is_empty) {
                self.plan_audit(now);
            }
        } else {
            let missing = self.desired.keys_where(|entry| {
                entry.epoch != self.epoch
                    && matches!(entry.state, State::Unknown | State::Present)
                    && compare::covers(dump, &entry.object.key())
            });
            for key in missing {
                match self.desired.get(&key).map(|entry| &entry.state) {
                    Some(State::Unknown) => self.desired.set(&key, State::Wanted),
                    _ => self.heal(&key, "deleted", now),
                }
            }
        }
        if self.audit.as_ref().is_some_and(VecDeque::is_empty) {
            self.audit = None;
            // what was declared meanwhile
            self.audit_now |= self.desired.has_unknown();
            let spread = Duration::from_secs(self.scope.seed % 13);
            self.audit_at = now + AUDIT - Duration::from_secs(6) + spread;
        }
    }

    /// The links are known: chooses the lists that this audit needs.
    fn plan_audit(&mut self, now: Instant) {
        self.paths.ask_all();
        for key in self
            .desired
            .keys_where(|entry| matches!(entry.object, Object::Link(_) | Object::Sysctl(_)))
        {
            let Some(entry) = self.desired.get(&key) else { continue };
            match (&entry.object, &entry.state) {
                (Object::Link(link), State::Present) if self.links.get(link.name).is_none() => {
                    self.heal(&key, "deleted", now);
                }
                (Object::Link(_), State::Unknown) => self.desired.set(&key, State::Wanted),
                // read again, and written if it differs
                (Object::Sysctl(_), State::Unknown | State::Present) => {
                    self.desired.set(&key, State::Wanted)
                }
                _ => {}
            }
        }
        let mut lists = VecDeque::from([Dump::Addresses]);
        let families = [true, false];
        for v4 in families {
            if self.scope.networks.iter().any(|network| matches!(network, IpNet::V4(_)) == v4) {
                lists.push_back(Dump::Routes { v4 });
                let there =
                    self.scope.devices.iter().filter(|link| self.links.index(**link).is_some());
                lists.extend(there.map(|link| Dump::Neighbours { link: *link, v4 }));
            }
        }
        lists.extend(self.scope.devices.iter().filter_map(|link| {
            self.links.get(*link)?.vxlan.as_ref()?;
            Some(Dump::Fdb { link: *link })
        }));
        self.audit = Some(lists);
        // what sits on a link that does not exist cannot be listed
        let lost = self.desired.keys_where(|entry| {
            let link = compare::link_of(&entry.object);
            matches!(entry.state, State::Unknown | State::Present)
                && link.is_some_and(|link| self.links.index(link).is_none())
        });
        for key in lost {
            self.desired.set(&key, State::Waiting);
        }
    }

    /// The link without which an object cannot be made, if it is not there.
    fn missing_link(&self, object: &Object) -> Option<IfName> {
        let needed = match object {
            Object::Link(Link { kind: LinkKind::Vxlan(vxlan), .. }) => Some(vxlan.lower),
            Object::Link(Link { kind: LinkKind::Existing, name, .. }) => Some(*name),
            other => compare::link_of(other),
        };
        needed.filter(|link| self.links.index(*link).is_none())
    }

    /// What waited for a link that is there now is written.
    fn unpark(&mut self) {
        let ready = self.desired.keys_where(|entry| {
            entry.state == State::Waiting && self.missing_link(&entry.object).is_none()
        });
        for key in ready {
            self.desired.set(&key, State::Wanted);
        }
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

    /// A datagram from the notification socket.
    pub fn handle_notice(&mut self, datagram: &[u8], now: Instant) {
        for message in messages(datagram) {
            if message.port != 0 && message.port == self.scope.port {
                continue;
            }
            let deleted = matches!(
                message.kind,
                kind::DELLINK | kind::DELADDR | kind::DELROUTE | kind::DELNEIGH
            );
            match (decode(&message), deleted) {
                (Some(Seen::Link(link)), false) => {
                    // it may be older than what we know, so the list decides
                    self.list_links |= self.desired.get(&Key::Link(link.name)).is_some();
                    self.note_link(link, false, now);
                }
                (Some(Seen::Link(link)), true) => self.forget_link(link.index, now),
                (Some(seen), deleted) => self.noticed(&seen, deleted, now),
                (None, _) => {}
            }
        }
    }

    fn noticed(&mut self, seen: &Seen, deleted: bool, now: Instant) {
        match seen {
            // routes go with the addresses that they depend on, untold
            Seen::Address(_) => self.stir(now, STIR),
            Seen::Route(route) if route.protocol != PROTOCOL && !self.paths.is_empty() => {
                self.stir(now, STIR_ROUTES)
            }
            _ => {}
        }
        let Some(key) = compare::key(seen, &self.links) else { return };
        let Some(entry) = self.desired.get(&key).filter(|entry| entry.state == State::Present)
        else {
            return;
        };
        let same = compare::same(&entry.object, seen, &self.links);
        match (deleted, same) {
            (true, true) => self.heal(&key, "deleted", now),
            (false, false) => self.heal(&key, "changed", now),
            _ => {}
        }
    }

    /// `certain` says that this is how the link is now, and not how it was a while ago.
    fn note_link(&mut self, link: SeenLink, certain: bool, now: Instant) {
        let (name, up) = (link.name, link.up);
        let old = self.links.put(link);
        if let Some(other) = old.as_ref().filter(|old| old.name != name) {
            self.strand(other.name, now);
        }
        if old.as_ref().is_none_or(|old| old.up != up || old.name != name) && self.concerns_us(name)
        {
            self.stir(now, STIR);
        }
        let key = Key::Link(name);
        let Some(entry) = self.desired.get(&key) else { return };
        let (Object::Link(want), Some(have)) = (&entry.object, self.links.get(name)) else {
            return;
        };
        let lower = match &want.kind {
            LinkKind::Vxlan(vxlan) => self.links.index(vxlan.lower),
            LinkKind::Existing => None,
        };
        let same = judge(want, have, lower, self.scope.vxlan_port) == Verdict::Same;
        match (&entry.state, same) {
            (State::Unknown | State::Waiting, true) => self.desired.set(&key, State::Present),
            (State::Unknown | State::Waiting, false) => self.desired.set(&key, State::Wanted),
            (State::Present, false) if certain => self.heal(&key, "changed", now),
            _ => {}
        }
    }

    fn forget_link(&mut self, index: u32, now: Instant) {
        let old = self.links.remove(index);
        // a device that was made anew has the same name
        if let Some(old) = old.filter(|old| self.links.index(old.name).is_none()) {
            self.strand(old.name, now);
        }
    }

    /// A link is gone, and all that was on it.
    fn strand(&mut self, name: IfName, now: Instant) {
        if self.concerns_us(name) {
            self.stir(now, STIR);
        }
        let key = Key::Link(name);
        if self.desired.get(&key).is_some_and(|entry| entry.state == State::Present) {
            self.heal(&key, "deleted", now);
        }
        for key in self.desired.keys_where(|entry| compare::link_of(&entry.object) == Some(name)) {
            self.desired.set(&key, State::Waiting);
        }
    }

    fn concerns_us(&self, name: IfName) -> bool {
        !self.paths.is_empty()
            || self.desired.entries().any(|(_, entry)| match &entry.object {
                Object::Link(Link { name: own, kind: LinkKind::Vxlan(vxlan), .. }) => {
                    *own == name || vxlan.lower == name
                }
                Object::Link(Link { name: own, .. }) => *own == name,
                Object::Route(route) => route.link.is_none_or(|link| link == name),
                other => compare::link_of(other) == Some(name),
            })
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
