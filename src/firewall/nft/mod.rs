//! Rules kept over `nf_tables` netlink: in tables of our own, and in those that `iptables-nft` shares with everybody.
//!
//! A look reads the few chains that concern us; what differs is set right in one transaction per family, which the kernel
//! takes whole or not at all, and only if nothing has changed since the look (`NFNL_BATCH_GENID`). Looks are caused by the
//! notification that ends every transaction on the host, whoever made it; a slow one once a minute trusts nobody.

mod decode;
mod encode;
#[cfg(test)]
mod tests;
pub(crate) mod wire;

use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant};

use ipnet::IpNet;

use self::encode::Dialect;
use super::change::{self, Change, Ours, Want};
use super::rule::Verdict;
use super::seen::Seen;
use super::site::{OLD_CHAIN, Part, Site, Style};
use super::{Event, Trouble};
use crate::backoff::Backoff;
use crate::family::Family;
use crate::netlink::{DONE, ERROR, Message, Writer, attributes, flag, messages, outcome};

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
        family: Family,
        begin: u32,
        steps: Vec<Option<(Site, Change)>>,
        errors: Vec<(usize, i32, String)>,
    },
}

/// How one family is doing.
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
    sides: [Side; 2],
    /// Why there is no `nf_tables` here.
    unsupported: Option<String>,
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
    /// Families whose turn to be written it is.
    writes: VecDeque<Family>,
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
            sides: [side(4), side(6)],
            unsupported: None,
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
        for family in Family::ALL {
            let side = &mut self.sides[index(family)];
            side.in_place = false;
            side.retry_at = None;
            self.thorough = true;
            if !side.fully_random {
                self.forget_fully_random(family);
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

    /// Why there is no `nf_tables` here, if there is none.
    pub fn unsupported(&self) -> Option<&str> {
        self.unsupported.as_deref()
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
            Some((Job::Write { family, .. }, _)) => {
                let code = error.raw_os_error().unwrap_or(0);
                self.refused(family, None, code, error.to_string(), now);
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
            if let Some(family) = self.writes.pop_front() {
                match self.write(family, now) {
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

    /// Asks which of the tables and chains that concern us are there.
    fn look(&mut self, now: Instant) -> Job {
        self.look_at = None;
        let pause = self.looked_at.is_none_or(|at| now.saturating_duration_since(at) > GAP);
        self.hurried = if pause { 0 } else { self.hurried + 1 };
        self.looked_at = Some(now);
        self.blamed = self.culprit.take();
        self.seen = Seen::default();
        let mut asks = vec![Ask::Generation];
        let thorough = self.thorough;
        let wanted =
            |site: Site| self.wants.iter().any(|(s, rules)| *s == site && !rules.is_empty());
        let all = Site::all(Style::Iptables).chain(Site::all(Style::Nftables));
        for site in all.filter(|site| thorough || wanted(*site)) {
            let table = Ask::Table(site.family, site.table());
            if !asks.contains(&table) {
                asks.push(table);
            }
            let chain = |chain| Ask::Chain(site.family, site.table(), chain);
            asks.extend(site.hook().map(chain));
            asks.push(chain(site.chain()));
            match (site.style, site.part) {
                (Style::Iptables, Part::Masquerade) if thorough => asks.push(chain(OLD_CHAIN)),
                (Style::Nftables, Part::Forward) if wanted(site) => {
                    asks.push(Ask::Policy(site.family))
                }
                _ => {}
            }
        }
        if self.hint.is_none() {
            let hints =
                HINTS.map(|hint| Family::ALL.map(|family| Ask::Chain(family, "mangle", hint)));
            asks.extend(hints.into_iter().flatten());
        }
        let first = self.sequence.wrapping_add(1);
        for ask in &asks {
            let sequence = self.next_sequence();
            match *ask {
                Ask::Generation => encode::get_generation(&mut self.writer, sequence),
                Ask::Table(family, name) => {
                    encode::get_table(&mut self.writer, sequence, family, name);
                }
                Ask::Chain(family, table, name) => {
                    encode::get_chain(&mut self.writer, sequence, family, table, name);
                }
                Ask::Policy(family) => {
                    encode::get_chain(&mut self.writer, sequence, family, "filter", "FORWARD");
                }
            }
        }
        let left = asks.len();
        Job::Gets { first, asks, left }
    }

    fn list(&mut self, family: Family, table: &'static str, chain: &'static str) -> Job {
        let sequence = self.next_sequence();
        encode::list_rules(&mut self.writer, sequence, family, table, chain);
        Job::List { sequence, family, table, chain, intact: true }
    }

    /// Writes one family's transaction, if there is something to write.
    fn write(&mut self, family: Family, now: Instant) -> Option<Job> {
        let steps = change::changes(&self.wants, family, &self.ours, &self.seen);
        let broken = self.broken(family);
        let last = self.writes.is_empty();
        let culprit = if last { self.blamed.take() } else { self.blamed.clone() };
        let side = &mut self.sides[index(family)];
        if steps.is_empty() {
            side.retry_at = None;
            if let Some((part, reason)) = broken {
                side.in_place = false;
                let trouble = Trouble { part: Some(part), reason: reason.clone() };
                if side.trouble.replace(trouble.clone()) != Some(trouble) {
                    self.events.push_back(Event::Refused { reason, retry_in: None });
                }
                return None;
            }
            if side.trouble.take().is_some() {
                side.backoff.succeeded();
            }
            if !std::mem::replace(&mut side.in_place, true) && has_any(&self.wants, family) {
                self.events.push_back(Event::InPlace(family));
            }
            self.thorough = !self.sides.iter().all(|side| side.in_place);
            return None;
        }
        if side.retry_at.is_some_and(|at| at > now) {
            self.look_at = [self.look_at, side.retry_at].into_iter().flatten().min();
            return None;
        }
        let waited = side.retry_at.take().is_some();
        if side.repairs >= PATIENCE && !waited {
            let retry_in = side.backoff.failed();
            side.retry_at = Some(now + retry_in);
            self.look_at = [self.look_at, side.retry_at].into_iter().flatten().min();
            let by = culprit.unwrap_or_else(|| "somebody".into());
            self.events.push_back(Event::Quarrel { family, by, retry_in });
            return None;
        }
        side.repairs += 1;
        if side.in_place {
            self.events.push_back(Event::Healed { family, what: what(&steps), by: culprit });
        }
        side.in_place = false;
        let begin = self.next_sequence();
        encode::begin_batch(&mut self.writer, begin, self.generation);
        let dialect = self.sides[index(family)].dialect;
        let mut sent = Vec::new();
        for (site, change) in steps {
            let sequence = self.next_sequence();
            encode::change(&mut self.writer, sequence, site, &change, dialect);
            sent.push(Some((site, change)));
        }
        self.writer.add_flags(flag::ACK);
        let end = self.next_sequence();
        encode::end_batch(&mut self.writer, end);
        self.written += 1;
        Some(Job::Write { family, begin, steps: sent, errors: Vec::new() })
    }

    /// Everybody's chain or table that is not as `iptables` makes it, so that rules of ours in it have no effect.
    fn broken(&self, family: Family) -> Option<(Part, String)> {
        let wanted = |(site, rules): &&Want| site.family == family && !rules.is_empty();
        self.wants.iter().filter(wanted).find_map(|(site, _)| {
            let (table, hook) = (site.table(), site.hook()?);
            let what = if self.seen.odd.contains(&(family, table, hook)) {
                format!(
                    "chain {} {table} {hook} is not hung in the kernel as iptables does it",
                    keyword(family)
                )
            } else if self.seen.asleep.contains(&(family, table)) {
                format!("table {} {table} is switched off (flags dormant)", keyword(family))
            } else {
                return None;
            };
            Some((site.part, format!("{what}: put it right, or choose -firewall=nftables")))
        })
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
                Job::Write { family, begin, steps, errors } => {
                    self.answered(*family, *begin, steps, errors, &message, now)
                }
            };
            if !over {
                self.job = Some((job, deadline));
            }
        }
    }

    fn got(
        &mut self,
        first: u32,
        asks: &[Ask],
        left: &mut usize,
        message: &Message<'_>,
        now: Instant,
    ) -> bool {
        let number = usize::try_from(message.sequence.wrapping_sub(first)).unwrap_or(usize::MAX);
        let Some(ask) = asks.get(number) else { return false };
        let data = message.payload.get(4..).unwrap_or_default();
        let refusal = if message.kind == ERROR { outcome(message) } else { None };
        match (*ask, refusal) {
            (Ask::Generation, Some((code, _))) => {
                self.no_generation(code, now);
                return true;
            }
            (_, Some((code, _))) => {
                const ABSENT: [i32; 4] = [2, 93, 95, 97]; // ENOENT, and families that the kernel lacks
                if !ABSENT.contains(&code) {
                    self.handle_lost_replies(now);
                    return true;
                }
            }
            (Ask::Generation, None) => {
                self.generation = decode::number(data, wire::generation::ID).unwrap_or(0);
            }
            (Ask::Table(family, table), None) => {
                const DORMANT: u32 = 1;
                self.seen.tables.insert((family, table));
                if decode::number(data, wire::table::FLAGS)
                    .is_some_and(|flags| flags & DORMANT != 0)
                {
                    self.seen.asleep.insert((family, table));
                }
            }
            (Ask::Chain(_, _, chain), None) if HINTS.contains(&chain) => self.hint = Some(true),
            (Ask::Chain(family, table, chain), None) => {
                self.found_chain((family, table, chain), data)
            }
            (Ask::Policy(family), None) => {
                const DROP: u32 = 0;
                if decode::number(data, wire::chain::POLICY) == Some(DROP) {
                    self.seen.forward_drops.insert(family);
                }
            }
        }
        *left -= 1;
        if *left > 0 {
            return false;
        }
        self.hint.get_or_insert(false);
        if self.lists.is_empty() {
            self.conclude(now);
        }
        true
    }

    /// Without `nf_tables`, or without the right to use it, this side is of no use. Anything else passes.
    fn no_generation(&mut self, code: i32, now: Instant) {
        const EPERM: i32 = 1;
        const NONE: [i32; 3] = [22, 93, 95]; // EINVAL, EPROTONOSUPPORT, EOPNOTSUPP
        let error = io::Error::from_raw_os_error(code);
        match code {
            EPERM if self.hint.is_none() => {
                self.set_unsupported(format!("{error}: CAP_NET_ADMIN is needed"));
            }
            _ if self.hint.is_none() && NONE.contains(&code) => {
                self.set_unsupported(error.to_string());
            }
            _ => self.handle_lost_replies(now),
        }
    }

    /// A chain is there: does it hang in the kernel as it should, and what is in it?
    fn found_chain(&mut self, place: (Family, &'static str, &'static str), data: &[u8]) {
        let (family, table, chain) = place;
        let all = Site::all(Style::Iptables).chain(Site::all(Style::Nftables));
        let mut here = all.filter(|site| (site.family, site.table()) == (family, table));
        let base = decode::base(data);
        let odd = here.any(|site| {
            let right = site.base();
            if site.hook() == Some(chain) {
                // others may hang it in at another place of the same hook
                base.is_none_or(|(_, hook, _)| hook != right.hook)
            } else if site.chain() == chain && site.style == Style::Nftables {
                let accepts =
                    decode::number(data, wire::chain::POLICY) == Some(wire::ACCEPT.cast_unsigned());
                base != Some((right.kind, right.hook, right.priority)) || !accepts
            } else {
                site.chain() == chain && base.is_some()
            }
        });
        if odd {
            self.seen.odd.insert(place);
        }
        // the first look only finds out what kind of host this is
        if !self.wants.is_empty() {
            self.lists.push_back(place);
        }
        self.seen.chains.insert(place, Vec::new());
    }

    fn listed(
        &mut self,
        place: (Family, &'static str, &'static str),
        intact: &mut bool,
        message: &Message<'_>,
        now: Instant,
    ) -> bool {
        let (family, table, chain) = place;
        *intact &= message.flags & flag::DUMP_INTR == 0;
        if message.kind == DONE || message.kind == ERROR {
            let code = outcome(&Message { flags: 0, ..*message }).map_or(0, |(code, _)| code);
            if !*intact || code != 0 {
                // it changed while it was read
                self.handle_lost_replies(now);
            } else if self.lists.is_empty() {
                self.conclude(now);
            }
            return true;
        }
        if message.kind == wire::NEWRULE
            && message.payload.first() == Some(&wire::protocol(family))
            && let Some(listed) = decode::listed(family, message.payload)
            && (listed.table, listed.chain) == (table, chain)
        {
            let found = listed.found;
            let everybodys = matches!(chain, "POSTROUTING" | "FORWARD");
            if !everybodys || found.rule.is_some() || found.jump.is_some() {
                self.seen.chains.entry(place).or_default().push(found);
            }
        }
        false
    }

    /// Everything is read: now it can be said what is to be done.
    fn conclude(&mut self, now: Instant) {
        if now.saturating_duration_since(self.counting_since) >= AUDIT {
            self.counting_since = now;
            for side in &mut self.sides {
                side.repairs = 0;
                if side.trouble.is_none() {
                    side.backoff.succeeded();
                }
            }
        }
        let due = now + AUDIT;
        self.look_at = Some(self.look_at.map_or(due, |at| at.min(due)));
        if self.wants.is_empty() {
            return;
        }
        self.writes.extend(Family::ALL);
        self.warn_of_drops();
    }

    /// Rules in tables of our own accept for those tables only: a policy elsewhere still drops (firewall spec 2.5).
    fn warn_of_drops(&mut self) {
        let own = |(site, rules): &&Want| {
            (site.style, site.part) == (Style::Nftables, Part::Forward) && !rules.is_empty()
        };
        let dropped = self
            .wants
            .iter()
            .filter(own)
            .map(|(site, _)| site.family)
            .find(|family| self.seen.forward_drops.contains(family));
        if let Some(family) = dropped
            && !std::mem::replace(&mut self.drops_told, true)
        {
            self.events.push_back(Event::ForwardDrops(family));
        }
    }

    fn answered(
        &mut self,
        family: Family,
        begin: u32,
        steps: &mut [Option<(Site, Change)>],
        errors: &mut Vec<(usize, i32, String)>,
        message: &Message<'_>,
        now: Instant,
    ) -> bool {
        let Some((code, text)) =
            Some(message).filter(|message| message.kind == ERROR).and_then(outcome)
        else {
            return false;
        };
        let reason = || {
            let errno = io::Error::from_raw_os_error(code).to_string();
            text.map_or(errno.clone(), |text| format!("{text} ({errno})"))
        };
        if message.sequence == begin {
            const ERESTART: i32 = 85;
            const EINTR: i32 = 4;
            if [ERESTART, EINTR].contains(&code) {
                // somebody was faster: look again
                self.writes.clear();
                self.look_at = Some(now + STIR);
            } else {
                self.refused(family, None, code, reason(), now);
            }
            return true;
        }
        let number = usize::try_from(message.sequence.wrapping_sub(begin)).unwrap_or(usize::MAX);
        if number > steps.len() {
            return false;
        }
        if code != 0 {
            errors.push((number.wrapping_sub(1), code, reason()));
        }
        if number != steps.len() {
            return false;
        }
        match errors.first() {
            None => {
                // our own transaction; and see how it looks now
                self.generation = self.generation.wrapping_add(1);
                self.look_at = Some(now);
            }
            Some((at, code, reason)) => {
                let step = steps.get_mut(*at).and_then(Option::take);
                self.refused(family, step, *code, reason.clone(), now);
            }
        }
        true
    }

    /// The kernel did not take a transaction. What it lacks is done without, where that is possible.
    fn refused(
        &mut self,
        family: Family,
        step: Option<(Site, Change)>,
        code: i32,
        reason: String,
        now: Instant,
    ) {
        const ENOENT: i32 = 2;
        const EBUSY: i32 = 16;
        const EINVAL: i32 = 22;
        const EOPNOTSUPP: i32 = 95;
        if let (EBUSY, Some((site, Change::RemoveChain(chain)))) = (code, &step) {
            self.ours.stuck.insert((family, site.table(), *chain));
            self.look_at = Some(now);
            let chain = format!("{} {} {chain}", keyword(family), site.table());
            return self.events.push_back(Event::Stuck(chain));
        }
        let lacks = [ENOENT, EINVAL, EOPNOTSUPP].contains(&code);
        let side = &mut self.sides[index(family)];
        let rule = match &step {
            Some((_, Change::Insert(rule) | Change::Append { rule, .. })) => Some(rule),
            _ => None,
        };
        if let (Some((site, _)), Some(rule), true) = (&step, rule, lacks) {
            let masquerades = matches!(rule.verdict, Verdict::Masquerade { .. });
            let fully_random = rule.verdict == Verdict::Masquerade { fully_random: true };
            if site.style == Style::Iptables && side.dialect.comment_match && !masquerades {
                side.dialect.comment_match = false;
                self.look_at = Some(now);
                return self.events.push_back(Event::WithoutCommentMatch(family));
            }
            let target = site.style == Style::Iptables && masquerades && family == Family::V4;
            if target && code == EINVAL && !side.dialect.short_target {
                side.dialect.short_target = true;
                self.look_at = Some(now);
                return;
            }
            if fully_random && code != ENOENT && side.fully_random {
                side.fully_random = false;
                self.forget_fully_random(family);
                self.look_at = Some(now);
                return self.events.push_back(Event::WithoutFullyRandom(family));
            }
            if site.style == Style::Iptables && masquerades {
                self.look_at = None;
                return self.events.push_back(Event::WithoutTarget(family));
            }
        }
        let (part, object) = match &step {
            Some((site, change)) => (Some(site.part), describe(*site, change)),
            None => (None, format!("the {family} rules")),
        };
        let hint = match &step {
            Some((_, Change::MakeTable)) if lacks => {
                format!(
                    " (the kernel needs CONFIG_NF_TABLES_{})",
                    family.to_string().to_uppercase()
                )
            }
            Some((site, Change::MakeChain | Change::MakeHook)) if lacks => match site.base().kind {
                "nat" => " (the kernel needs CONFIG_NFT_NAT, module nft_chain_nat)".into(),
                _ => String::new(),
            },
            Some((_, _)) if lacks && rule.is_some_and(|rule| rule.source.is_some()) => {
                " (the kernel may need CONFIG_NFT_MASQ, module nft_masq)".into()
            }
            _ => String::new(),
        };
        let reason = format!("{object}: {reason}{hint}");
        let retry_in = side.backoff.failed();
        side.retry_at = Some(now + retry_in);
        side.trouble = Some(Trouble { part, reason: reason.clone() });
        self.look_at = Some(self.look_at.map_or(now + retry_in, |at| at.min(now + retry_in)));
        self.events.push_back(Event::Refused { reason, retry_in: Some(retry_in) });
    }

    fn forget_fully_random(&mut self, family: Family) {
        let rules = self.wants.iter_mut().filter(|(site, _)| site.family == family);
        for rule in rules.flat_map(|(_, rules)| rules) {
            if let Verdict::Masquerade { fully_random } = &mut rule.verdict {
                *fully_random = false;
            }
        }
    }
}

fn index(family: Family) -> usize {
    usize::from(family == Family::V6)
}

fn has_any(wants: &[Want], family: Family) -> bool {
    wants.iter().any(|(site, rules)| site.family == family && !rules.is_empty())
}

/// The places that steps concern: `masquerade rules in ip nat, forward rules in ip filter`.
fn what(steps: &[(Site, Change)]) -> String {
    let mut places: Vec<String> = Vec::new();
    for (site, _) in steps {
        let place = format!("{} in {} {}", site.part.name(), keyword(site.family), site.table());
        if !places.contains(&place) {
            places.push(place);
        }
    }
    places.join(", ")
}

fn keyword(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

/// A step in words: `rule "-s 10.5.0.0/16 -j ACCEPT" in ip filter FLANNEL-FWD`.
fn describe(site: Site, change: &Change) -> String {
    let (family, table) = (keyword(site.family), site.table());
    match change {
        Change::MakeTable | Change::RemoveTable => format!("table {family} {table}"),
        Change::MakeHook => format!("chain {family} {table} {}", site.hook().unwrap_or_default()),
        Change::MakeChain | Change::RemakeChain => {
            format!("chain {family} {table} {}", site.chain())
        }
        Change::RemoveChain(chain) | Change::Flush(chain) => {
            format!("chain {family} {table} {chain}")
        }
        Change::Delete { chain, handle } => {
            format!("rule {handle} of {family} {table} {chain}")
        }
        Change::Insert(rule) => format!("rule [{rule}] in {family} {table} {}", site.chain()),
        Change::Append { chain, rule } => format!("rule [{rule}] in {family} {table} {chain}"),
    }
}
