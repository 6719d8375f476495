//! Transactions: what differs is set right, one group at a time, and what the kernel says to it.

use std::io;
use std::time::Instant;

use super::{Group, Job, Native, PATIENCE, STIR, encode, index};
use crate::family::Family;
use crate::firewall::change::{self, Change, Want};
use crate::firewall::rule::Verdict;
use crate::firewall::site::{Part, Site, Style};
use crate::firewall::{Event, Trouble};
use crate::netlink::{ERROR, Message, flag, outcome};

impl Native {
    /// Writes one group's transaction, if there is something to write.
    pub(super) fn write(&mut self, group: Group, now: Instant) -> Option<Job> {
        let (family, part) = group;
        let here = |site: Site| (site.family, site.part) == group;
        let steps = change::changes(&self.wants, here, &self.ours, &self.seen);
        let broken = self.broken(group);
        let last = self.writes.is_empty();
        let culprit = if last { self.blamed.take() } else { self.blamed.clone() };
        let side = &mut self.sides[index(group)];
        if steps.is_empty() {
            side.retry_at = None;
            if let Some(reason) = broken {
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
            if !std::mem::replace(&mut side.in_place, true) && self.is_family_in_place(family) {
                self.events.push_back(Event::InPlace(family));
            }
            self.thorough = !self.sides.iter().all(|side| side.in_place);
            return None;
        }
        let was_in_place = std::mem::replace(&mut side.in_place, false);
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
            let reason = format!("{by} changes them again and again");
            side.trouble = Some(Trouble { part: Some(part), reason });
            self.events.push_back(Event::Quarrel { family, by, retry_in });
            return None;
        }
        side.repairs += 1;
        if was_in_place {
            self.events.push_back(Event::Healed { family, what: what(&steps), by: culprit });
        }
        let begin = self.next_sequence();
        encode::begin_batch(&mut self.writer, begin, self.generation);
        let dialect = self.sides[index(group)].dialect;
        for (site, change) in &steps {
            let sequence = self.next_sequence();
            encode::change(&mut self.writer, sequence, *site, change, dialect);
        }
        self.writer.add_flags(flag::ACK);
        let end = self.next_sequence();
        encode::end_batch(&mut self.writer, end);
        self.written += 1;
        Some(Job::Write { group, begin, steps, error: None })
    }

    /// Everybody's chain or table that is not as `iptables` makes it, so that rules of ours in it have no effect.
    fn broken(&self, group: Group) -> Option<String> {
        let wanted = |(site, rules): &&Want| (site.family, site.part) == group && !rules.is_empty();
        self.wants.iter().filter(wanted).find_map(|(site, _)| {
            let (family, table, hook) = (site.family, site.table(), site.hook()?);
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
            Some(format!("{what}: put it right, or choose -firewall=nftables"))
        })
    }

    /// Is something wanted for the family, and all of it there?
    fn is_family_in_place(&self, family: Family) -> bool {
        let wanted =
            self.wants.iter().any(|(site, rules)| site.family == family && !rules.is_empty());
        wanted && Part::ALL.into_iter().all(|part| self.sides[index((family, part))].in_place)
    }

    pub(super) fn answered(
        &mut self,
        group: Group,
        begin: u32,
        steps: &[(Site, Change)],
        error: &mut Option<(usize, i32, String)>,
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
                self.refused(group, None, code, reason(), now);
            }
            return true;
        }
        let number = usize::try_from(message.sequence.wrapping_sub(begin)).unwrap_or(usize::MAX);
        if number > steps.len() {
            return false;
        }
        if code != 0 {
            error.get_or_insert_with(|| (number.wrapping_sub(1), code, reason()));
        }
        if number != steps.len() {
            return false;
        }
        match error.take() {
            None => {
                // our own transaction; and see how it looks now
                self.generation = self.generation.wrapping_add(1);
                self.look_at = Some(now);
            }
            Some((at, code, reason)) => {
                self.refused(group, steps.get(at).cloned(), code, reason, now);
            }
        }
        true
    }

    /// The kernel did not take a transaction. What it lacks is done without, where that is possible.
    pub(super) fn refused(
        &mut self,
        group: Group,
        step: Option<(Site, Change)>,
        code: i32,
        reason: String,
        now: Instant,
    ) {
        let (family, part) = group;
        const ENOENT: i32 = 2;
        const EBUSY: i32 = 16;
        const EINVAL: i32 = 22;
        const EOPNOTSUPP: i32 = 95;
        if let (EBUSY, Some((site, Change::RemoveChain(chain)))) = (code, &step) {
            self.look_at = Some(now);
            if self.ours.stuck.insert((family, site.table(), *chain)) {
                let chain = format!("{} {} {chain}", keyword(family), site.table());
                self.events.push_back(Event::Stuck(chain));
            }
            return;
        }
        let lacks = [ENOENT, EINVAL, EOPNOTSUPP].contains(&code);
        let side = &mut self.sides[index(group)];
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
        let object = match &step {
            Some((site, change)) => describe(*site, change),
            None => format!("the {family} {}", part.name()),
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
        side.trouble = Some(Trouble { part: Some(part), reason: reason.clone() });
        self.look_at = Some(self.look_at.map_or(now + retry_in, |at| at.min(now + retry_in)));
        self.events.push_back(Event::Refused { reason, retry_in: Some(retry_in) });
    }

    pub(super) fn forget_fully_random(&mut self, family: Family) {
        let rules = self.wants.iter_mut().filter(|(site, _)| site.family == family);
        for rule in rules.flat_map(|(_, rules)| rules) {
            if let Verdict::Masquerade { fully_random } = &mut rule.verdict {
                *fully_random = false;
            }
        }
    }
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
