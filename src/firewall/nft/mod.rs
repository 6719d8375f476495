//! Rules kept over `nf_tables` netlink: in tables of our own, and in those that `iptables-nft` shares with everybody.
//!
//! A look reads the few chains that concern us; what differs is set right in one transaction for each family and
//! purpose, which the kernel takes whole or not at all, and only if nothing has changed since the look (`NFNL_BATCH_GENID`). Looks are caused by the
//! notification that ends every transaction on the host, whoever made it; a slow one once a minute trusts nobody.

mod decode;
mod encode;
mod look;
#[cfg(test)]
mod tests;
pub(crate) mod wire;
mod write;

use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant};

use ipnet::IpNet;

use self::encode::Dialect;
use super::change::{Change, Ours, Want};
use super::seen::Seen;
use super::site::{Part, Site};
use super::{Event, Trouble};
use crate::backoff::Backoff;
use crate::family::Family;
use crate::netlink::{Writer, attributes, messages};

/// The kernel answers within the system call; an answer that takes this long was lost.
const ANSWER: Duration = Duration::from_secs(5);
/// Others make changes in bursts.
const STIR: Duration = Duration::from_millis(10);
/// So many looks that others cause follow each other without delay.
const BURST: u32 = 5;
/// Between the looks after those, at least; as long a pause ends the burst.
const GAP: Duration = Duration::from_millis(250);
/// Between looks that nobody causes, about.
const AUDIT: Duration = Duration::from_secs(60);
/// So many transactions in a minute are fine; more are a quarrel with somebody, which is not won by speed.
const PATIENCE: u32 = 30;

/// A chain that says that kubelet's `iptables` is the nft variant (firewall spec 1.15), in table `mangle`.
const HINTS: [&str; 2] = ["KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Ask {
    Generation,
    Table(Family, &'static str),
    Chain(Family, &'static str, &'static str),
    /// Of the `FORWARD` chain of `iptables`.
    Policy(Family),
}

#[derive(Debug)]
enum Job {
    /// The answer to `asks[i]` has sequence number `first + i`.
    Gets {
        first: u32,
        asks: Vec<Ask>,
        left: usize,
    },
    List {
        sequence: u32,
        family: Family,
        table: &'static str,
        chain: &'static str,
        intact: bool,
    },
    /// Sequence `begin` is the transaction's, those after it are the changes'.
    Write {
        group: Group,
        begin: u32,
        steps: Vec<(Site, Change)>,
        /// The first thing that was refused: which step, and why.
        error: Option<(usize, i32, String)>,
    },
}

/// What is written together: the rules of one purpose for one family.
type Group = (Family, Part);

/// All of them. What is said first of their troubles matters most.
const GROUPS: [Group; 4] = [
    (Family::V4, Part::Masquerade),
    (Family::V6, Part::Masquerade),
    (Family::V4, Part::Forward),
    (Family::V6, Part::Forward),
];

/// How one group is doing.
#[derive(Debug)]
struct Side {
    /// The last look found everything right.
    in_place: bool,
    trouble: Option<Trouble>,
    retry_at: Option<Instant>,
    backoff: Backoff,
    dialect: Dialect,
    fully_random: bool,
    /// Transactions since `counting_since`.
    repairs: u32,
}

/// The `nf_tables` side of the rules.
#[derive(Debug)]
pub struct Native {
    wants: Vec<Want>,
    ours: Ours,
    /// In the order of [`GROUPS`].
    sides: [Side; 4],
    /// Why there is no `nf_tables` here.
    unsupported: Option<String>,
    /// There is, and we may not use it.
    denied: bool,
    /// kubelet uses `iptables-nft`; `None` before the first look.
    hint: Option<bool>,
    seen: Seen,
    /// The state that [`Native::seen`] shows.
    generation: u32,
    /// Looks go to every place where any flanneld may have left something, until nothing is left.
    thorough: bool,
    /// Lists that this look still needs.
    lists: VecDeque<(Family, &'static str, &'static str)>,
    looked_at: Option<Instant>,
    /// Looks that followed closely upon another.
    hurried: u32,
    look_at: Option<Instant>,
    counting_since: Instant,
    /// Groups whose turn to be written it is.
    writes: VecDeque<Group>,
    written: u64,
    /// Who was the first to change something since the last look, as the kernel names them.
    culprit: Option<String>,
    /// Whom this look is about.
    blamed: Option<String>,
    drops_told: bool,
    writer: Writer,
    sequence: u32,
    job: Option<(Job, Instant)>,
    events: VecDeque<Event>,
}

impl Native {
    /// Begins with a look, and wants nothing before [`Native::set`].
    pub fn new(seed: u64, now: Instant) -> Self {
        let side = |salt| Side {
            in_place: false,
            trouble: None,
            retry_at: None,
            backoff: Backoff::new(Duration::from_secs(1), Duration::from_secs(60), seed ^ salt),
            dialect: Dialect { comment_match: true, short_target: false },
            fully_random: true,
            repairs: 0,
        };
        Self {
            wants: Vec::new(),
            ours: Ours::default(),
            sides: [side(4), side(6), side(24), side(26)],
            unsupported: None,
            denied: false,
            hint: None,
            seen: Seen::default(),
            generation: 0,
            thorough: true,
            lists: VecDeque::new(),
            looked_at: None,
            hurried: 0,
            look_at: Some(now),
            counting_since: now,
            writes: VecDeque::new(),
            written: 0,
            culprit: None,
            blamed: None,
            drops_told: false,
            writer: Writer::default(),
            sequence: 0,
            job: None,
            events: VecDeque::new(),
        }
    }

    /// What is wanted from now on, in every place of both styles.
    pub fn set(&mut self, wants: Vec<Want>, ours: Ours, now: Instant) {
        self.wants = wants;
        self.ours = ours;
        // a look under way did not go everywhere where it has to go now
        self.job = None;
        self.lists.clear();
        self.writes.clear();
        self.thorough = true;
        for group in GROUPS {
            let side = &mut self.sides[index(group)];
            side.in_place = false;
            side.retry_at = None;
            if !side.fully_random {
                self.forget_fully_random(group.0);
            }
        }
        self.look_at = Some(now);
    }

    /// The networks of earlier lives are somebody else's from now on.
    pub fn set_networks(&mut self, networks: Vec<IpNet>) {
        self.ours.networks = networks;
    }

    /// There is no socket to talk to `nf_tables`.
    pub fn set_unsupported(&mut self, reason: String) {
        self.unsupported = Some(reason);
        self.hint = Some(false);
        self.look_at = None;
    }

    /// `nf_tables` is there, and refuses us.
    pub fn set_denied(&mut self) {
        self.denied = true;
        self.set_unsupported("not permitted: CAP_NET_ADMIN is needed".into());
    }

    /// Why there is no `nf_tables` here, if there is none.
    pub fn unsupported(&self) -> Option<&str> {
        self.unsupported.as_deref()
    }

    /// Is there `nf_tables`, and may we not use it?
    pub fn is_denied(&self) -> bool {
        self.denied
    }

    /// Is it sure that nothing of ours is there, or as it should be?
    pub fn is_settled(&self) -> bool {
        self.is_in_place() || self.unsupported.is_some() && !self.denied
    }

    /// Does kubelet use `iptables-nft`? `None` before the first look.
    pub fn hint(&self) -> Option<bool> {
        self.hint
    }

    /// Are there tables that `iptables-nft` makes? True or false after the first look.
    pub fn has_iptables(&self) -> bool {
        self.seen.tables.iter().any(|(_, table)| matches!(*table, "nat" | "filter"))
    }

    /// Is everything in place?
    pub fn is_in_place(&self) -> bool {
        self.unsupported.is_none() && self.sides.iter().all(|side| side.in_place)
    }

    /// What the kernel refuses, if it does.
    pub fn trouble(&self) -> Option<&Trouble> {
        self.sides.iter().find_map(|side| side.trouble.as_ref())
    }

    /// Transactions sent so far.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// What happened since the last call.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When [`Native::poll_transmit`] wants to be called next, if nothing happens.
    pub fn poll_timeout(&self) -> Option<Instant> {
        match &self.job {
            Some((_, deadline)) => Some(*deadline),
            None => self.look_at.filter(|_| self.unsupported.is_none()),
        }
    }

    /// A datagram from the socket that hears of other people's transactions.
    pub fn handle_notice(&mut self, datagram: &[u8], now: Instant) {
        for message in messages(datagram).filter(|message| message.kind == wire::NEWGEN) {
            let data = message.payload.get(4..).unwrap_or_default();
            let Some(id) = decode::number(data, wire::generation::ID) else { continue };
            // what the last look, or our own transaction, has covered; the numbers wrap
            let news = id.wrapping_sub(self.generation);
            if news == 0 || news > u32::MAX / 2 {
                continue;
            }
            let name = attributes(data).find(|(kind, _)| *kind == wire::generation::PROCESS_NAME);
            let name = name.and_then(|(_, value)| decode::text(value));
            let process = decode::number(data, wire::generation::PROCESS);
            if let (None, Some(name), Some(process)) = (&self.culprit, name, process) {
                self.culprit = Some(format!("{name} (process {process})"));
            }
            self.stir(now);
        }
    }

    /// Notifications were lost.
    pub fn handle_lost_notices(&mut self, now: Instant) {
        self.stir(now);
    }

    fn stir(&mut self, now: Instant) {
        if self.unsupported.is_some() {
            return;
        }
        let gap = if self.hurried < BURST { Duration::ZERO } else { GAP };
        let at = self.looked_at.map_or(now, |looked| looked + gap).max(now + STIR);
        self.look_at = Some(self.look_at.map_or(at, |due| due.min(at)));
    }

    /// Answers were lost: what is under way begins anew.
    pub fn handle_lost_replies(&mut self, now: Instant) {
        self.job = None;
        self.lists.clear();
        self.writes.clear();
        self.look_at = Some(now + GAP);
    }

    /// The datagram that was to be sent last could not be sent.
    pub fn handle_send_error(&mut self, error: &io::Error, now: Instant) {
        match self.job.take() {
            Some((Job::Write { group, .. }, _)) => {
                let code = error.raw_os_error().unwrap_or(0);
                self.refused(group, None, code, error.to_string(), now);
            }
            _ => self.handle_lost_replies(now),
        }
    }

    /// The next datagram to send, if it is time for one.
    pub fn poll_transmit(&mut self, now: Instant) -> Option<&[u8]> {
        if self.job.as_ref().is_some_and(|(_, deadline)| *deadline <= now) {
            self.handle_lost_replies(now);
        }
        if self.job.is_some() {
            return None;
        }
        self.writer.clear();
        let job = loop {
            if let Some((family, table, chain)) = self.lists.pop_front() {
                break self.list(family, table, chain);
            }
            if let Some(group) = self.writes.pop_front() {
                match self.write(group, now) {
                    Some(job) => break job,
                    None => continue,
                }
            }
            if self.unsupported.is_some() || self.look_at.is_none_or(|at| at > now) {
                return None;
            }
            break self.look(now);
        };
        self.job = Some((job, now + ANSWER));
        Some(self.writer.bytes())
    }

    fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    /// A datagram from the socket that the requests go out by.
    pub fn handle_reply(&mut self, datagram: &[u8], now: Instant) {
        for message in messages(datagram) {
            let Some((mut job, deadline)) = self.job.take() else { return };
            let over = match &mut job {
                Job::Gets { first, asks, left } => self.got(*first, asks, left, &message, now),
                Job::List { sequence, family, table, chain, intact } => {
                    *sequence == message.sequence
                        && self.listed((*family, table, chain), intact, &message, now)
                }
                Job::Write { group, begin, steps, error } => {
                    self.answered(*group, *begin, steps, error, &message, now)
                }
            };
            if !over {
                self.job = Some((job, deadline));
            }
        }
    }
}

fn index(group: Group) -> usize {
    GROUPS.iter().position(|known| *known == group).unwrap_or(0)
}
