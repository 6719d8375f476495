//! Masquerade and forward rules, kept in the kernel: which, where, and that they stay.
//!
//! ```text
//!   plan      which rules a network needs, in order                      (pure)
//!   choose    nftables, iptables-nft or iptables-legacy                  (pure)
//!   change    what is there  x  what is wanted  ->  steps                (pure)
//!      |
//!      +-- nft       reads and writes over nf_tables netlink; looks again when anybody changes anything
//!      +-- legacy    reads and writes through iptables-legacy-save and -restore; looks again after -iptables-resync
//! ```
//!
//! [`Firewall`] puts them together. It owns no socket, no child and no clock: the loop carries datagrams and runs commands.

pub mod change;
pub mod choose;
pub mod legacy;
pub mod nft;
mod old;
pub mod plan;
mod port;
pub mod rule;
pub mod seen;
pub mod site;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use ipnet::IpNet;

use self::change::{Ours, Want};
use self::choose::{Choice, Facts, Mode, choose};
use self::legacy::{Command, Finished, Legacy};
use self::nft::Native;
use self::plan::Share;
pub use self::port::Port;
use self::site::{Part, Site, Style};
use crate::family::Family;

/// What the operator wants.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    /// `-ip-masq`.
    pub masquerade: bool,
    /// Not `-ip-masq-fully-random-disable`.
    pub fully_random: bool,
    /// `-iptables-forward-rules`.
    pub forward: bool,
    /// `-iptables-resync`: between looks at legacy rules; `None` looks at the start only.
    pub resync: Option<Duration>,
    /// `-firewall`, unless it is `auto`.
    pub mode: Option<Mode>,
}

/// What does not work.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Trouble {
    /// Which rules are concerned; `None` for all.
    pub part: Option<Part>,
    /// Why.
    pub reason: String,
}

/// What the operator should know.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// It is known now where the rules go.
    Chosen(Choice),
    /// The rules of this family are in the kernel.
    InPlace(Family),
    /// Somebody changed what is ours; it is being put back.
    Healed {
        /// Family.
        family: Family,
        /// Which rules, where.
        what: String,
        /// Who, if the kernel says so.
        by: Option<String>,
    },
    /// Somebody changes what is ours again and again.
    Quarrel {
        /// Family.
        family: Family,
        /// Who, if the kernel says so.
        by: String,
        /// When it is put back again.
        retry_in: Duration,
    },
    /// The kernel, or a program, refuses.
    Refused {
        /// What and why.
        reason: String,
        /// When it is tried again, if it is.
        retry_in: Option<Duration>,
    },
    /// No `xt_comment` here: comments are kept as `nft` keeps them.
    WithoutCommentMatch(Family),
    /// No fully random ports here.
    WithoutFullyRandom(Family),
    /// No `xt_MASQUERADE` here, so `iptables` could not show the rules.
    WithoutTarget(Family),
    /// A chain of ours is empty, but stays: somebody else's rule jumps to it.
    Stuck(String),
    /// Rules in tables of our own cannot help against the policy of `FORWARD`.
    ForwardDrops(Family),
}

/// The rules of one agent.
#[derive(Debug)]
pub struct Firewall {
    options: Options,
    facts: Facts,
    native: Native,
    legacy: Legacy,
    /// By family, IPv4 first.
    shares: [Option<Share>; 2],
    ours: Ours,
    /// Rules of networks of earlier lives have yet to be removed.
    has_past: bool,
    mode: Option<Choice>,
    /// What the side that keeps no rules has to remove, once the other one has them in place.
    leftovers: Option<Vec<Want>>,
    events: VecDeque<Event>,
}

impl Firewall {
    /// Looks around, and wants nothing yet. Of the facts, those that only a look at the rules shows are filled in later.
    pub fn new(options: Options, facts: Facts, native: Native, legacy: Legacy) -> Self {
        Self {
            options,
            facts,
            native,
            legacy,
            shares: [None; 2],
            ours: Ours::default(),
            has_past: false,
            mode: None,
            leftovers: None,
            events: VecDeque::new(),
        }
    }

    /// The network and this host's subnet by family, IPv4 first. `past` are networks of earlier lives, whose rules are
    /// removed, and `config` is `EnableNFTables`.
    pub fn set(&mut self, shares: [Option<Share>; 2], past: &[IpNet], config: bool, now: Instant) {
        let mut networks: Vec<IpNet> = shares.iter().flatten().map(|share| share.network).collect();
        for net in past.iter().chain(&self.ours.networks) {
            if !networks.contains(net) {
                networks.push(*net);
            }
        }
        let ours = Ours { networks, ..Ours::default() };
        let same = (&self.shares, &self.ours, self.facts.config) == (&shares, &ours, config);
        (self.shares, self.ours) = (shares, ours);
        self.has_past = true;
        if self.facts.config != config {
            self.facts.config = config;
            self.mode = None;
        }
        if !same && self.mode.is_some() {
            self.declare(now);
        }
        self.decide(now);
    }

    /// Wants nothing of any flannel on this host. `past` are networks that are known to be flannel's.
    pub fn clean_up(&mut self, past: Vec<IpNet>, now: Instant) {
        self.ours = Ours { networks: past, everything: true, ..Ours::default() };
        self.options.masquerade = false;
        self.options.forward = false;
        self.decide(now);
    }

    /// The netlink side.
    pub fn native(&mut self) -> &mut Native {
        &mut self.native
    }

    /// Both sides have looked around, and somebody has said what is wanted.
    fn decide(&mut self, now: Instant) {
        let wanted = self.shares.iter().any(Option::is_some) || self.ours.everything;
        let (Some(nft_hint), true, true) = (self.native.hint(), self.legacy.has_looked(), wanted)
        else {
            return;
        };
        if self.mode.is_some() {
            return;
        }
        let (legacy_hint, legacy_rules) = self.legacy.in_use();
        let mut families = Family::ALL.into_iter().zip(&self.shares);
        let legacy_tools =
            families.all(|(family, share)| share.is_none() || self.legacy.has_tools(family));
        self.facts = Facts {
            no_nf_tables: self.native.unsupported().map(Into::into),
            nft_hint,
            nft_tables: self.native.has_iptables(),
            legacy_hint,
            legacy_rules,
            legacy_tools,
            ..self.facts.clone()
        };
        let choice = choose(&self.facts);
        self.events.push_back(Event::Chosen(choice.clone()));
        self.mode = Some(choice);
        self.declare(now);
    }

    /// Tells both sides what is wanted from them, which for one of them is nothing.
    fn declare(&mut self, now: Instant) {
        let mode = self.mode.as_ref().and_then(|choice| choice.mode);
        if mode.is_none() && (self.options.masquerade || self.options.forward) {
            // what an earlier life has set is better than nothing
            return;
        }
        let place = |site: Site, here: bool| -> Want {
            (site, if here { self.rules(site) } else { Vec::new() })
        };
        let own = Site::all(Style::Nftables).map(|site| place(site, mode == Some(Mode::Nftables)));
        let shared =
            Site::all(Style::Iptables).map(|site| place(site, mode == Some(Mode::IptablesNft)));
        let native: Vec<Want> = own.chain(shared).collect();
        let is_legacy = self.is_legacy();
        let legacy: Vec<Want> =
            Site::all(Style::Iptables).map(|site| place(site, is_legacy)).collect();
        if is_legacy {
            self.legacy.set(legacy, self.ours.clone(), self.options.resync, now);
            self.leftovers = Some(native);
        } else {
            self.native.set(native, self.ours.clone(), now);
            self.leftovers = Some(legacy);
        }
        self.remove_leftovers(now);
    }

    /// A switch leaves no moment without rules: the old ones go when the new ones are there.
    fn remove_leftovers(&mut self, now: Instant) {
        let is_legacy = self.is_legacy();
        let waits = if is_legacy { !self.legacy.is_in_place() } else { !self.native.is_in_place() };
        // without nf_tables there is nothing that could get in place
        if waits && self.native.unsupported().is_none() {
            return;
        }
        match self.leftovers.take() {
            Some(native) if is_legacy => self.native.set(native, self.ours.clone(), now),
            Some(legacy) => self.legacy.set(legacy, self.ours.clone(), None, now),
            None => {}
        }
    }

    /// Once nothing is left of the networks of earlier lives, they may be another flannel's on this host.
    fn forget_past(&mut self) {
        let done = self.is_in_place()
            && self.leftovers.is_none()
            && self.native.is_settled()
            && self.legacy.is_clean();
        if !self.has_past || self.ours.everything || !done {
            return;
        }
        self.has_past = false;
        self.ours.networks = self.shares.iter().flatten().map(|share| share.network).collect();
        self.native.set_networks(self.ours.networks.clone());
        self.legacy.set_networks(self.ours.networks.clone());
    }

    fn is_legacy(&self) -> bool {
        self.mode.as_ref().is_some_and(|choice| choice.mode == Some(Mode::IptablesLegacy))
    }

    fn rules(&self, site: Site) -> Vec<rule::Rule> {
        let wanted = match site.part {
            Part::Masquerade => self.options.masquerade,
            Part::Forward => self.options.forward,
        };
        let share = self.shares[usize::from(site.family == Family::V6)].filter(|_| wanted);
        share.map(|share| plan::rules(site, share, self.options.fully_random)).unwrap_or_default()
    }

    /// The next program to run, if there is one.
    pub fn poll_command(&mut self, now: Instant) -> Option<Command> {
        self.legacy.poll_command(now)
    }

    /// It has ended.
    pub fn handle_finished(&mut self, finished: &Finished, now: Instant) {
        self.legacy.handle_finished(finished, now);
        self.decide(now);
    }

    /// The next datagram to send, if there is one.
    pub fn poll_transmit(&mut self, now: Instant) -> Option<&[u8]> {
        self.native.poll_transmit(now)
    }

    /// A datagram from the socket that the requests go out by.
    pub fn handle_reply(&mut self, datagram: &[u8], now: Instant) {
        self.native.handle_reply(datagram, now);
        self.decide(now);
    }

    /// When something is due, if nothing happens.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.native.poll_timeout().into_iter().chain(self.legacy.poll_timeout()).min()
    }

    /// What happened since the last call. To be asked after every turn.
    pub fn poll_event(&mut self, now: Instant) -> Option<Event> {
        self.remove_leftovers(now);
        self.forget_past();
        if let Some(event) = self.events.pop_front() {
            return Some(event);
        }
        let event = self.native.poll_event().or_else(|| self.legacy.poll_event())?;
        if let Event::WithoutTarget(_) = event {
            // what iptables cannot show goes where it does not look
            self.mode = Some(Choice {
                mode: Some(Mode::Nftables),
                why: "this kernel has no xt_MASQUERADE".into(),
                warning: None,
            });
            self.declare(now);
        }
        Some(event)
    }

    /// Where the rules go: a mode's name, `none` or `undecided`.
    pub fn mode(&self) -> &'static str {
        match &self.mode {
            None => "undecided",
            Some(Choice { mode: None, .. }) => "none",
            Some(Choice { mode: Some(mode), .. }) => mode.name(),
        }
    }

    /// Is everything that is wanted in the kernel?
    pub fn is_in_place(&self) -> bool {
        match self.mode.as_ref().map(|choice| choice.mode) {
            None => false,
            Some(Some(Mode::IptablesLegacy)) => self.legacy.is_in_place(),
            Some(Some(_)) => self.native.is_in_place(),
            Some(None) => !self.options.masquerade && !self.options.forward,
        }
    }

    /// May we not look at rules at all?
    pub fn is_denied(&self) -> bool {
        self.native.is_denied()
    }

    /// Are there tables in the kernel that nobody here can read?
    pub fn is_blind(&self) -> bool {
        self.legacy.is_blind()
    }

    /// Is nothing of ours left, after [`Firewall::clean_up`]?
    pub fn is_clean(&self) -> bool {
        self.mode.is_some()
            && self.leftovers.is_none()
            && self.native.is_settled()
            && self.legacy.is_clean()
    }

    /// What does not work, if something does not.
    pub fn trouble(&self) -> Option<Trouble> {
        if self.ours.everything {
            let denied = || {
                let reason = self.native.unsupported()?.to_owned();
                (!self.native.is_settled()).then_some(Trouble { part: None, reason })
            };
            return self.native.trouble().or(self.legacy.trouble()).cloned().or_else(denied);
        }
        match self.mode.as_ref()? {
            Choice { mode: Some(Mode::IptablesLegacy), .. } => self.legacy.trouble().cloned(),
            Choice { mode: Some(_), .. } => self.native.trouble().cloned(),
            Choice { mode: None, why, .. } => Some(Trouble { part: None, reason: why.clone() }),
        }
    }

    /// Transactions sent to `nf_tables` so far.
    pub fn written(&self) -> u64 {
        self.native.written()
    }
}
