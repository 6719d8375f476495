//! Rules in the tables of the old `iptables`, which only its own programs can change safely.
//!
//! One `iptables-legacy-save` per family reads what is there; one `iptables-legacy-restore --noflush` writes what differs,
//! each table at once. Neither runs as long as no host here uses those tables.

#[cfg(test)]
mod tests;
mod text;
mod tools;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ipnet::IpNet;

use self::text::Saved;
pub use self::tools::{Tools, Variant, find as find_tools, host_variant, tables_in_use};
use super::change::{self, Change, Ours, Want};
use super::rule::Verdict;
use super::{Event, Trouble};
use crate::backoff::Backoff;
use crate::family::Family;

/// So many writes after which the rules are still not right are fine; more are a quarrel with somebody.
const PATIENCE: u32 = 5;
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
enum Doing {
    Reading,
    Writing,
}

/// One family.
#[derive(Debug)]
struct Side {
    tools: Option<Tools>,
    /// The tables are in the kernel: there may be rules in them.
    in_use: bool,
    look_at: Option<Instant>,
    /// What is to be written now.
    input: Option<String>,
    in_place: bool,
    trouble: Option<Trouble>,
    busy_since: Option<Instant>,
    /// Writes since everything was right.
    writes: u32,
    backoff: Backoff,
    /// The chain that this write is to remove.
    removing: Option<(Family, &'static str, &'static str)>,
}

/// The x_tables side of the rules.
#[derive(Debug)]
pub struct Legacy {
    /// By family, IPv4 first.
    sides: [Side; 2],
    wants: Vec<Want>,
    ours: Ours,
    /// Between looks; `None` looks once.
    period: Option<Duration>,
    running: Option<(Family, Doing)>,
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
        let [v4, v6] = tools;
        let side = |tools: Option<Tools>, in_use, salt| Side {
            look_at: (in_use && tools.is_some()).then_some(now),
            tools,
            in_use,
            input: None,
            in_place: false,
            trouble: None,
            busy_since: None,
            writes: 0,
            backoff: Backoff::new(Duration::from_millis(200), Duration::from_secs(30), seed ^ salt),
            removing: None,
        };
        let sides = [side(v4, in_use[0], 4), side(v6, in_use[1], 6)];
        Self {
            looked: sides.iter().all(|side| side.look_at.is_none()),
            sides,
            wants: Vec::new(),
            ours: Ours::default(),
            period: None,
            running: None,
            waits: true,
            fully_random: true,
            hint: false,
            foreign: 0,
            events: VecDeque::new(),
        }
    }

    /// What is wanted from now on. Without a `period`, what is there is set right once, and not looked at again.
    pub fn set(&mut self, wants: Vec<Want>, ours: Ours, period: Option<Duration>, now: Instant) {
        (self.wants, self.ours, self.period) = (wants, ours, period);
        if !self.fully_random {
            self.forget_fully_random();
        }
        for family in Family::ALL {
            let concerned = self.concerns(family);
            let lacking = self.is_wanted(family) && !self.has_tools(family);
            let side = &mut self.sides[index(family)];
            side.in_place = false;
            side.trouble = None;
            side.input = None;
            side.look_at = concerned.then_some(now);
            if lacking {
                let reason =
                    format!("there is no iptables-legacy-restore for {family} on this host");
                side.trouble = Some(Trouble { part: None, reason: reason.clone() });
                self.events.push_back(Event::Refused { reason, retry_in: None });
            }
        }
    }

    /// The networks of earlier lives are somebody else's from now on.
    pub fn set_networks(&mut self, networks: Vec<IpNet>) {
        self.ours.networks = networks;
    }

    /// Are the programs for this family here?
    pub fn has_tools(&self, family: Family) -> bool {
        self.sides[index(family)].tools.is_some()
    }

    /// Has it been seen what is there?
    pub fn has_looked(&self) -> bool {
        self.looked
    }

    /// Does kubelet use `iptables-legacy`? And how many rules of others are there?
    pub fn in_use(&self) -> (bool, usize) {
        (self.hint, self.foreign)
    }

    /// Are there tables in the kernel that nobody here can read?
    pub fn is_blind(&self) -> bool {
        self.sides.iter().any(|side| side.in_use && side.tools.is_none())
    }

    /// Is everything in place?
    pub fn is_in_place(&self) -> bool {
        Family::ALL
            .into_iter()
            .all(|family| !self.is_wanted(family) || self.sides[index(family)].in_place)
    }

    /// Has everything that is there been set right?
    pub fn is_clean(&self) -> bool {
        self.running.is_none()
            && Family::ALL
                .into_iter()
                .all(|family| !self.concerns(family) || self.sides[index(family)].in_place)
    }

    /// What is in the way, if something is.
    pub fn trouble(&self) -> Option<&Trouble> {
        self.sides.iter().find_map(|side| side.trouble.as_ref())
    }

    /// What happened since the last call.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When [`Legacy::poll_command`] wants to be called next, if nothing happens.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let due = self.sides.iter().filter_map(|side| side.look_at).min();
        due.filter(|_| self.running.is_none())
    }

    /// The program to run now, if there is one. Nothing else is asked for before [`Legacy::handle_finished`].
    pub fn poll_command(&mut self, now: Instant) -> Option<Command> {
        if self.running.is_some() {
            return None;
        }
        let due = |side: &Side| side.look_at.is_some_and(|at| at <= now);
        let family = Family::ALL
            .into_iter()
            .filter(|family| due(&self.sides[index(*family)]))
            .min_by_key(|family| self.sides[index(*family)].look_at)?;
        let side = &mut self.sides[index(family)];
        let tools = side.tools.as_ref()?;
        side.look_at = None;
        let (doing, command) = match side.input.take() {
            None => {
                let program = tools.save.clone();
                (Doing::Reading, Command { program, args: Vec::new(), input: String::new() })
            }
            Some(input) => {
                let mut args = vec!["--noflush"];
                if self.waits {
                    args.extend(["-w", "1"]);
                }
                (Doing::Writing, Command { program: tools.restore.clone(), args, input })
            }
        };
        self.running = Some((family, doing));
        Some(command)
    }

    /// The program has ended.
    pub fn handle_finished(&mut self, finished: &Finished, now: Instant) {
        let Some((family, doing)) = self.running.take() else { return };
        match (doing, finished.status) {
            (Doing::Reading, Some(0)) => {
                let text = String::from_utf8_lossy(&finished.output);
                self.read(family, &text::parse(&text, family), now);
            }
            (Doing::Writing, Some(0)) => {
                // and see how it looks now
                let side = &mut self.sides[index(family)];
                (side.busy_since, side.trouble, side.look_at) = (None, None, Some(now));
                side.writes += 1;
            }
            _ => self.failed(family, doing, finished, now),
        }
        self.looked |= self.sides.iter().all(|side| side.look_at.is_none_or(|at| at > now));
    }

    /// Can the family be read, and is there, or should there be, something in it?
    fn concerns(&self, family: Family) -> bool {
        let side = &self.sides[index(family)];
        side.tools.is_some() && (side.in_use || self.is_wanted(family))
    }

    fn is_wanted(&self, family: Family) -> bool {
        self.wants.iter().any(|(site, rules)| site.family == family && !rules.is_empty())
    }

    fn read(&mut self, family: Family, saved: &Saved, now: Instant) {
        self.hint |= saved.hint;
        self.foreign += if self.looked { 0 } else { saved.foreign };
        if self.wants.is_empty() {
            return;
        }
        let mut seen = saved.seen.clone();
        // what iptables-save does not list the kernel makes when it is first used
        for (site, _) in self.wants.iter().filter(|(site, _)| site.family == family) {
            seen.tables.insert((family, site.table()));
            if let Some(hook) = site.hook() {
                seen.chains.entry((family, site.table(), hook)).or_default();
            }
        }
        let steps = change::changes(&self.wants, |site| site.family == family, &self.ours, &seen);
        let is_wanted = self.is_wanted(family);
        let side = &mut self.sides[index(family)];
        side.look_at = self.period.map(|period| now + period);
        if steps.is_empty() {
            side.writes = 0;
            side.backoff.succeeded();
            side.trouble = None;
            if !std::mem::replace(&mut side.in_place, true) && is_wanted {
                self.events.push_back(Event::InPlace(family));
            }
            return;
        }
        if side.writes >= PATIENCE {
            // one write for each wait
            side.writes -= 1;
            let retry_in = side.backoff.failed().max(Duration::from_secs(1));
            side.look_at = Some(now + retry_in);
            let by = "somebody".into();
            return self.events.push_back(Event::Quarrel { family, by, retry_in });
        }
        side.removing = match steps[0] {
            (site, Change::RemoveChain(chain)) => Some((family, site.table(), chain)),
            _ => None,
        };
        // one chain at a time, so that it is known which of them cannot be removed
        let next = if side.removing.is_some() { &steps[..1] } else { &steps[..] };
        side.input = Some(text::render(next, saved));
        side.look_at = Some(now);
        if std::mem::replace(&mut side.in_place, false) {
            let what = "rules of iptables-legacy".into();
            self.events.push_back(Event::Healed { family, what, by: None });
        }
    }

    fn failed(&mut self, family: Family, doing: Doing, finished: &Finished, now: Instant) {
        let complaint = finished.complaint.trim();
        let lower = complaint.to_ascii_lowercase();
        let side = &mut self.sides[index(family)];
        if doing == Doing::Writing {
            side.look_at = Some(now);
            if finished.status == Some(BUSY) && lower.contains("holding the xtables lock") {
                return self.lock_is_busy(family, now);
            }
            if self.waits && is_about_waiting(&lower) {
                self.waits = false;
                return;
            }
            if self.fully_random && lower.contains("random-fully") {
                self.fully_random = false;
                self.forget_fully_random();
                return self.events.push_back(Event::WithoutFullyRandom(family));
            }
            if finished.status.is_some() && side.backoff.failures() == 0 {
                // somebody may have changed what was read meanwhile
                side.look_at = Some(now + side.backoff.failed());
                return;
            }
            if let Some(chain) = side.removing.filter(|_| finished.status.is_some()) {
                self.ours.stuck.insert(chain);
                let (_, table, chain) = chain;
                let chain = format!("{table} {chain} of iptables-legacy for {family}");
                return self.events.push_back(Event::Stuck(chain));
            }
        }
        let retry_in = side.backoff.failed().max(Duration::from_secs(1));
        let name = match doing {
            Doing::Reading => "iptables-legacy-save",
            Doing::Writing => "iptables-legacy-restore",
        };
        let complaint = complaint.lines().next().filter(|line| !line.is_empty());
        let mut reason = format!(
            "{name} for {family}: {}",
            complaint.unwrap_or(if finished.status.is_some() { "failed" } else { "took too long" })
        );
        if lower.contains("lock") && lower.contains("open") {
            reason.push_str(" (mount the host's /run/xtables.lock, writable)");
        }
        side.trouble = Some(Trouble { part: None, reason: reason.clone() });
        side.look_at = Some(now + retry_in);
        self.events.push_back(Event::Refused { reason, retry_in: Some(retry_in) });
    }

    fn lock_is_busy(&mut self, family: Family, now: Instant) {
        let side = &mut self.sides[index(family)];
        let retry_in = side.backoff.failed();
        let since = *side.busy_since.get_or_insert(now);
        side.look_at = Some(now + retry_in);
        if now.saturating_duration_since(since) >= BUSY_LONG && side.trouble.is_none() {
            let reason = "another process holds the xtables lock (/run/xtables.lock); `fuser /run/xtables.lock` names it";
            side.trouble = Some(Trouble { part: None, reason: reason.into() });
            self.events
                .push_back(Event::Refused { reason: reason.into(), retry_in: Some(retry_in) });
        }
    }

    fn forget_fully_random(&mut self) {
        for rule in self.wants.iter_mut().flat_map(|(_, rules)| rules) {
            if let Verdict::Masquerade { fully_random } = &mut rule.verdict {
                *fully_random = false;
            }
        }
    }
}

/// Does an `iptables-restore` before 1.6.2 complain that it knows no `-w`? It says so in its C library's words, and then
/// takes the seconds for a file.
fn is_about_waiting(complaint: &str) -> bool {
    ["invalid option -- 'w'", "unrecognized option: w", "invalid option -- w", "can't open 1"]
        .iter()
        .any(|words| complaint.contains(words))
}

fn index(family: Family) -> usize {
    usize::from(family == Family::V6)
}
