//! Rules in the tables of the old `iptables`, which only its own programs can change safely.
//!
//! One `iptables-legacy-save` per family reads what is there; one `iptables-legacy-restore --noflush` writes what differs,
//! each table at once. Neither runs as long as no host here uses those tables.

mod text;
mod tools;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use self::text::Saved;
pub use self::tools::{Tools, Variant, find as find_tools, host_variant, tables_in_use};
use super::change::{self, Ours, Want};
use super::rule::Verdict;
use super::{Event, Trouble};
use crate::backoff::Backoff;
use crate::family::Family;

/// Exit status of `iptables-restore` when another process holds the lock.
const BUSY: i32 = 4;
/// A lock that is busy for longer than this is worth a line.
const BUSY_LONG: Duration = Duration::from_secs(5);

/// A program to run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Command {
    /// Path.
    pub program: PathBuf,
    /// Arguments.
    pub args: Vec<&'static str>,
    /// What it is given to read.
    pub input: String,
}

/// How a program ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finished {
    /// Exit status; `None` if it was ended, or could not be started.
    pub status: Option<i32>,
    /// What it wrote.
    pub output: Vec<u8>,
    /// What it complained about.
    pub complaint: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Read(Family),
    Write(Family),
}

/// The x_tables side of the rules.
#[derive(Debug)]
pub struct Legacy {
    tools: [Option<Tools>; 2],
    /// The tables of the family are in the kernel: there may be rules in them.
    in_use: [bool; 2],
    wants: Vec<Want>,
    ours: Ours,
    /// Between looks; `None` looks once.
    period: Option<Duration>,
    due: VecDeque<Step>,
    running: Option<Step>,
    input: String,
    look_at: Option<Instant>,
    /// Rules are kept here, not just removed.
    keeps: bool,
    in_place: [bool; 2],
    trouble: Option<Trouble>,
    busy_since: Option<Instant>,
    backoff: Backoff,
    /// `--wait` is known to this `iptables-restore`.
    waits: bool,
    fully_random: bool,
    hint: bool,
    foreign: usize,
    looked: bool,
    events: VecDeque<Event>,
}

impl Legacy {
    /// `tools` by family, IPv4 first; `in_use` are the families whose tables are in the kernel. Looks once at those.
    pub fn new(tools: [Option<Tools>; 2], in_use: [bool; 2], seed: u64, now: Instant) -> Self {
        let mut legacy = Self {
            tools,
            in_use,
            wants: Vec::new(),
            ours: Ours::default(),
            period: None,
            due: VecDeque::new(),
            running: None,
            input: String::new(),
            look_at: Some(now),
            keeps: false,
            in_place: [false; 2],
            trouble: None,
            busy_since: None,
            backoff: Backoff::new(Duration::from_millis(200), Duration::from_secs(30), seed),
            waits: true,
            fully_random: true,
            hint: false,
            foreign: 0,
            looked: false,
            events: VecDeque::new(),
        };
        if legacy.of_interest().next().is_none() {
            legacy.looked = true;
            legacy.look_at = None;
        }
        legacy
    }

    /// What is wanted from now on. Without a `period`, what is there is set right once, and not looked at again.
    pub fn set(&mut self, wants: Vec<Want>, ours: Ours, period: Option<Duration>, now: Instant) {
        self.keeps = wants.iter().any(|(_, rules)| !rules.is_empty());
        (self.wants, self.ours, self.period) = (wants, ours, period);
        if !self.fully_random {
            self.forget_fully_random();
        }
        self.in_place = [false; 2];
        let concerned = self.keeps || self.of_interest().next().is_some();
        self.look_at = concerned.then_some(now);
    }

    /// Has it been seen what is there?
    pub fn has_looked(&self) -> bool {
        self.looked
    }

    /// Does kubelet use `iptables-legacy`? And how many rules of others are there?
    pub fn in_use(&self) -> (bool, usize) {
        (self.hint, self.foreign)
    }

    /// Is everything in place?
    pub fn is_in_place(&self) -> bool {
        self.wants.iter().all(|(site, rules)| rules.is_empty() || self.in_place[index(site.family)])
    }

    /// Has everything that is there been set right?
    pub fn is_clean(&self) -> bool {
        self.running.is_none()
            && self.due.is_empty()
            && self.of_interest().all(|family| self.in_place[index(family)])
    }

    /// What is in the way, if something is.
    pub fn trouble(&self) -> Option<&Trouble> {
        self.trouble.as_ref()
    }

    /// What happened since the last call.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When [`Legacy::poll_command`] wants to be called next, if nothing happens.
    pub fn poll_timeout(&self) -> Option<Instant> {
        if self.running.is_some() { None } else { self.look_at }
    }

    /// The program to run now, if there is one. Nothing else is asked for before [`Legacy::handle_finished`].
    pub fn poll_command(&mut self, now: Instant) -> Option<Command> {
        if self.running.is_some() {
            return None;
        }
        if self.due.is_empty() && self.look_at.is_some_and(|at| at <= now) {
            self.look_at = None;
            self.due = self.of_interest().map(Step::Read).collect();
            let lacking = Family::ALL
                .into_iter()
                .find(|family| self.is_wanted(*family) && self.tools[index(*family)].is_none());
            if let Some(family) = lacking {
                let reason =
                    format!("there is no iptables-legacy-restore for {family} on this host");
                self.trouble = Some(Trouble { part: None, reason });
            }
        }
        let step = self.due.pop_front()?;
        let (Step::Read(family) | Step::Write(family)) = step;
        let tools = self.tools[index(family)].as_ref()?;
        let command = match step {
            Step::Read(_) => {
                Command { program: tools.save.clone(), args: Vec::new(), input: String::new() }
            }
            Step::Write(_) => {
                let mut args = vec!["--noflush"];
                if self.waits {
                    args.extend(["-w", "1"]);
                }
                Command {
                    program: tools.restore.clone(),
                    args,
                    input: std::mem::take(&mut self.input),
                }
            }
        };
        self.running = Some(step);
        Some(command)
    }

    /// The program has ended.
    pub fn handle_finished(&mut self, finished: &Finished, now: Instant) {
        let Some(step) = self.running.take() else { return };
        match (step, finished.status) {
            (Step::Read(family), Some(0)) => {
                let text = String::from_utf8_lossy(&finished.output);
                self.read(family, text::parse(&text, family));
            }
            (Step::Write(_), Some(0)) => {
                // and see how it looks now
                (self.busy_since, self.trouble) = (None, None);
                self.backoff.succeeded();
                self.look_again(now);
            }
            _ => self.failed(step, finished, now),
        }
        if self.due.is_empty() {
            self.looked = true;
            if let Some(period) = self.period {
                self.look_at.get_or_insert(now + period);
            }
        }
    }

    /// The families that can be read, and in which there is or should be something.
    fn of_interest(&self) -> impl Iterator<Item = Family> {
        Family::ALL.into_iter().filter(|family| {
            self.tools[index(*family)].is_some()
                && (self.in_use[index(*family)] || self.is_wanted(*family))
        })
    }

    fn is_wanted(&self, family: Family) -> bool {
        self.wants.iter().any(|(site, rules)| site.family == family && !rules.is_empty())
    }

    fn look_again(&mut self, at: Instant) {
        self.due.clear();
        self.look_at = Some(at);
    }

    fn read(&mut self, family: Family, saved: Saved) {
        self.hint |= saved.hint;
        self.foreign += if self.looked { 0 } else { saved.foreign };
        if self.wants.is_empty() {
            return;
        }
        let mut seen = saved.seen;
        // what iptables-save does not list the kernel makes when it is first used
        for (site, _) in self.wants.iter().filter(|(site, _)| site.family == family) {
            seen.tables.insert((family, site.table()));
            if let Some(hook) = site.hook() {
                seen.chains.entry((family, site.table(), hook)).or_default();
            }
        }
        let steps = change::changes(&self.wants, family, &self.ours, &seen);
        self.input = text::render(&steps);
        let in_place = &mut self.in_place[index(family)];
        if self.input.is_empty() {
            self.trouble.take_if(|_| self.tools.iter().all(Option::is_some));
            if !std::mem::replace(in_place, true) && self.keeps {
                self.events.push_back(Event::InPlace(family));
            }
            return;
        }
        if std::mem::replace(in_place, false) {
            let what = "rules of iptables-legacy".into();
            self.events.push_back(Event::Healed { family, what, by: None });
        }
        self.due.push_front(Step::Write(family));
    }

    fn failed(&mut self, step: Step, finished: &Finished, now: Instant) {
        let complaint = finished.complaint.trim();
        let lower = complaint.to_ascii_lowercase();
        if matches!(step, Step::Write(_)) {
            if finished.status == Some(BUSY) && lower.contains("holding the xtables lock") {
                return self.lock_is_busy(now);
            }
            if self.waits && lower.contains("option") && lower.contains("-w") {
                self.waits = false;
                return self.look_again(now);
            }
            if self.fully_random && lower.contains("random-fully") {
                self.fully_random = false;
                self.forget_fully_random();
                self.events.push_back(Event::WithoutFullyRandom(Family::V4));
                return self.look_again(now);
            }
        }
        let retry_in = self.backoff.failed().max(Duration::from_secs(1));
        let (name, family) = match step {
            Step::Read(family) => ("iptables-legacy-save", family),
            Step::Write(family) => ("iptables-legacy-restore", family),
        };
        let complaint = complaint.lines().next().filter(|line| !line.is_empty());
        let mut reason = format!(
            "{name} for {family}: {}",
            complaint.unwrap_or(if finished.status.is_some() { "failed" } else { "took too long" })
        );
        if lower.contains("lock") && lower.contains("open") {
            reason.push_str(" (mount the host's /run/xtables.lock, writable)");
        }
        self.trouble = Some(Trouble { part: None, reason: reason.clone() });
        self.events.push_back(Event::Refused { reason, retry_in });
        self.look_again(now + retry_in);
    }

    fn lock_is_busy(&mut self, now: Instant) {
        let retry_in = self.backoff.failed();
        let since = *self.busy_since.get_or_insert(now);
        if now.saturating_duration_since(since) >= BUSY_LONG && self.trouble.is_none() {
            let reason = "another process holds the xtables lock (/run/xtables.lock); `fuser /run/xtables.lock` names it";
            self.trouble = Some(Trouble { part: None, reason: reason.into() });
            self.events.push_back(Event::Refused { reason: reason.into(), retry_in });
        }
        self.look_again(now + retry_in);
    }

    fn forget_fully_random(&mut self) {
        for rule in self.wants.iter_mut().flat_map(|(_, rules)| rules) {
            if let Verdict::Masquerade { fully_random } = &mut rule.verdict {
                *fully_random = false;
            }
        }
    }
}

fn index(family: Family) -> usize {
    usize::from(family == Family::V6)
}
