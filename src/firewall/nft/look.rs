//! Looks: which of the tables and chains that concern us are there, how they hang in the kernel, and what is in them.

use std::io;
use std::time::Instant;

use super::{AUDIT, Ask, GAP, GROUPS, HINTS, Job, Native, decode, encode, wire};
use crate::family::Family;
use crate::firewall::Event;
use crate::firewall::change::Want;
use crate::firewall::seen::Seen;
use crate::firewall::site::{OLD_CHAIN, Part, Site, Style};
use crate::netlink::{DONE, ERROR, Message, flag, outcome};

impl Native {
    /// Asks which of the tables and chains that concern us are there.
    pub(super) fn look(&mut self, now: Instant) -> Job {
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

    pub(super) fn list(&mut self, family: Family, table: &'static str, chain: &'static str) -> Job {
        let sequence = self.next_sequence();
        encode::list_rules(&mut self.writer, sequence, family, table, chain);
        Job::List { sequence, family, table, chain, intact: true }
    }

    pub(super) fn got(
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
            EPERM if self.hint.is_none() => self.set_denied(),
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

    pub(super) fn listed(
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
        self.writes.extend(GROUPS);
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
}
