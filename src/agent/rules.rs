//! The traffic rules as one part of a network: their sockets, the program that writes legacy ones, and what is said of them.

use std::env;
use std::ffi::OsString;
use std::fmt::Write;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use log::{debug, error, info, warn};
use mio::{Registry, Token};

use super::child::Running;
use super::{Fatal, token};
use crate::config::NetworkConfig;
use crate::family::Family;
use crate::firewall::choose::{Choice, Facts, Mode};
use crate::firewall::legacy::{self, Finished, Legacy};
use crate::firewall::nft::Native;
use crate::firewall::plan::Share;
use crate::firewall::site::Part;
use crate::firewall::{Event, Firewall, Options, Port};
use crate::lease::Subnets;
use crate::sys::random;
use crate::throttle::{Throttle, throttled};

#[derive(Debug)]
pub(super) struct Rules {
    firewall: Firewall,
    masquerade: bool,
    /// The operator has said where rules go.
    forced: bool,
    /// Chains that cannot be removed.
    stuck: Vec<String>,
    /// Everything is to be removed, so it does not matter where rules would go.
    cleans_up: bool,
    port: Option<Port>,
    child: Option<Running>,
    due: bool,
    log: Throttles,
}

/// One throttle for each sort of line that others can cause.
#[derive(Debug, Default)]
struct Throttles {
    healed: Throttle,
    refused: Throttle,
    placed: Throttle,
}

impl Rules {
    /// Opens the sockets. A kernel without `nf_tables` is no error here.
    pub(super) fn open(
        options: &Options,
        registry: &Registry,
        now: Instant,
    ) -> Result<Self, Fatal> {
        let mut seed = [0; 8];
        random::fill(&mut seed).map_err(|error| Fatal(format!("read random bytes: {error}")))?;
        let seed = u64::from_ne_bytes(seed);
        let mut native = Native::new(seed, now);
        let port = Port::open().and_then(|mut port| {
            port.register(registry, token::RULESET_REPLIES, token::RULESET_NOTICES)?;
            Ok(port)
        });
        let port = port.map_err(|error| match error.kind() {
            io::ErrorKind::PermissionDenied => native.set_denied(),
            _ => native.set_unsupported(error.to_string()),
        });
        let port = port.ok();
        let path = env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/sbin:/sbin"));
        let tools = Family::ALL.map(|family| legacy::find_tools(&path, family));
        let in_use = Family::ALL.map(legacy::tables_in_use);
        let facts = Facts {
            forced: options.mode,
            legacy_tables: in_use.contains(&true),

            host: legacy::host_variant(&path),
            ..Facts::default()
        };
        let legacy = Legacy::new(tools, in_use, seed, now);
        Ok(Self {
            firewall: Firewall::new(options.clone(), facts, native, legacy),
            masquerade: options.masquerade,
            forced: options.mode.is_some(),
            stuck: Vec::new(),
            cleans_up: false,
            port,
            child: None,
            due: true,
            log: Throttles::default(),
        })
    }

    /// What the rules are for from now on. `past` are networks of earlier lives.
    pub(super) fn set(
        &mut self,
        config: &NetworkConfig,
        own: Subnets,
        past: &[IpNet],
        now: Instant,
    ) {
        let share = |network, subnet| Some(Share { network, subnet });
        let v4 = config.v4.zip(own.v4).and_then(|(v4, own)| share(v4.network.into(), own.into()));
        let v6 = config.v6.zip(own.v6).and_then(|(v6, own)| share(v6.network.into(), own.into()));
        self.firewall.set([v4, v6], past, config.enable_nftables, now);
        self.due = true;
    }

    /// Wants nothing of any flannel on this host.
    pub(super) fn clean_up(&mut self, past: Vec<IpNet>, now: Instant) {
        self.firewall.clean_up(past, now);
        self.cleans_up = true;
        self.due = true;
    }

    /// Is the descriptor one of ours?
    pub(super) fn owns(token: Token) -> bool {
        matches!(
            token,
            token::RULESET_REPLIES
                | token::RULESET_NOTICES
                | token::CHILD_INPUT
                | token::CHILD_OUTPUT
                | token::CHILD_COMPLAINT
        )
    }

    /// An event of one of our descriptors.
    pub(super) fn handle_ready(&mut self) {
        self.due = true;
    }

    /// Does what is due, within budgets. Returns whether anything was moved.
    pub(super) fn turn(&mut self, registry: &Registry, now: Instant) -> Result<bool, Fatal> {
        if !self.due && self.poll_timeout(now).is_none_or(|at| at > now) {
            return Ok(false);
        }
        self.due = false;
        if let Some(child) = &mut self.child
            && let Some(finished) = child.turn(registry, now)
        {
            self.child = None;
            self.firewall.handle_finished(&finished, now);
        }
        while self.child.is_none()
            && let Some(command) = self.firewall.poll_command(now)
        {
            debug!("running {} {}", command.program.display(), command.args.join(" "));
            match Running::start(&command, registry, now) {
                Ok(child) => self.child = Some(child),
                Err(error) => {
                    let complaint = format!("start {}: {error}", command.program.display());
                    let finished = Finished { status: None, output: Vec::new(), complaint };
                    self.firewall.handle_finished(&finished, now);
                }
            }
        }
        if let Some(port) = &mut self.port {
            self.due = port
                .turn(&mut self.firewall, now)
                .map_err(|error| Fatal(format!("netlink socket: {error}")))?;
        }
        while let Some(event) = self.firewall.poll_event(now) {
            self.due = true;
            self.tell(event, now);
        }
        Ok(true)
    }

    fn tell(&mut self, event: Event, now: Instant) {
        match event {
            Event::Chosen(_) if self.cleans_up => {}
            Event::Chosen(choice) => self.tell_choice(&choice),
            Event::InPlace(family) => {
                throttled!(self.log.placed, now, info, "{family} traffic rules are in place");
            }
            Event::Healed { family, what, by } => {
                let by = by.unwrap_or_else(|| "something else on this host".into());
                throttled!(self.log.healed, now, warn, "{family}: {by} changed {what}: put back");
            }
            Event::Quarrel { family, by, retry_in } => {
                let seconds = retry_in.as_secs_f32();
                throttled!(
                    self.log.refused,
                    now,
                    error,
                    "{by} changes our {family} traffic rules again and again: put back in {seconds:.1} s, and then more \
                     slowly; find out what it is and stop it"
                );
            }
            Event::Refused { reason, retry_in } => {
                let next =
                    retry_in.map(|wait| format!("; next try in {:.1} s", wait.as_secs_f32()));
                let next = next.unwrap_or_default();
                throttled!(
                    self.log.refused,
                    now,
                    error,
                    "cannot set traffic rules: {reason}{next}"
                );
            }
            Event::Stuck(chain) => {
                throttled!(
                    self.log.refused,
                    now,
                    warn,
                    "chain {chain} is of no use any more and empty, but a rule of somebody else jumps to it: remove that \
                     rule, then the chain"
                );
                self.stuck.push(chain);
            }
            Event::WithoutCommentMatch(family) => info!(
                "{family}: this kernel has no xt_comment: comments are kept as nft keeps them, which iptables shows as well"
            ),
            Event::WithoutFullyRandom(family) => warn!(
                "{family}: fully random ports cannot be had here: ports are chosen the usual way (see \
                 -ip-masq-fully-random-disable)"
            ),
            Event::WithoutTarget(family) => warn!(
                "{family}: this kernel has no xt_MASQUERADE (CONFIG_NFT_COMPAT, CONFIG_NETFILTER_XT_TARGET_MASQUERADE), so \
                 iptables could not show the rules: they go to nftables tables of our own"
            ),
            Event::ForwardDrops(family) => warn!(
                "{family}: the FORWARD chain of iptables drops what no rule there accepts, and rules in nftables tables of \
                 our own cannot help against that: accept the network there, or use -firewall=iptables-nft"
            ),
        }
    }

    fn tell_choice(&self, choice: &Choice) {
        match choice.mode {
            Some(mode) => info!("traffic rules go to {}: {}", mode.name(), choice.why),
            None if self.masquerade || self.forced => {
                error!("there is nowhere to put traffic rules: {}", choice.why)
            }
            None => info!("no traffic rules: {}", choice.why),
        }
        if let Some(warning) = &choice.warning {
            warn!("{warning}");
        }
        let iptables = matches!(choice.mode, Some(Mode::IptablesNft | Mode::IptablesLegacy));
        if iptables && !Path::new("/proc/sys/net/bridge/bridge-nf-call-iptables").exists() {
            debug!(
                "br_netfilter is not loaded: packets between containers on one bridge do not pass iptables, which \
                 Kubernetes services need"
            );
        }
    }

    /// When [`Rules::turn`] wants to be called next, if nothing happens.
    pub(super) fn poll_timeout(&self, now: Instant) -> Option<Instant> {
        let child = self.child.as_ref().map(Running::poll_timeout);
        [self.due.then_some(now), child, self.firewall.poll_timeout()].into_iter().flatten().min()
    }

    /// Have all rules been set, or refused?
    pub(super) fn has_tried(&self) -> bool {
        self.firewall.is_in_place() || self.firewall.trouble().is_some()
    }

    /// Is nothing of any flannel left?
    pub(super) fn is_clean(&self) -> bool {
        self.firewall.is_clean() && self.child.is_none()
    }

    /// Why containers cannot rely on the rules, if they cannot. Forward rules are of use on some hosts only: that they cannot
    /// be had is said, and holds up nothing.
    pub(super) fn unready(&self) -> Option<String> {
        match self.firewall.trouble() {
            Some(trouble) if self.masquerade && trouble.part != Some(Part::Forward) => {
                Some(format!("traffic rules: {}", trouble.reason))
            }
            None if !self.firewall.is_in_place() => Some("traffic rules are not in place".into()),
            _ => None,
        }
    }

    /// May we not look at rules at all?
    pub(super) fn is_denied(&self) -> bool {
        self.firewall.is_denied()
    }

    /// Chains that cannot be removed.
    pub(super) fn stuck(&self) -> &[String] {
        &self.stuck
    }

    /// Are there tables in the kernel that nobody here can read?
    pub(super) fn is_blind(&self) -> bool {
        self.firewall.is_blind()
    }

    /// What an operator can do something about, if something is wrong.
    pub(super) fn trouble(&self) -> Option<String> {
        self.firewall.trouble().map(|trouble| trouble.reason)
    }

    /// `name value` lines for the status page.
    pub(super) fn status(&self, out: &mut String) {
        let _ = writeln!(out, "firewall {}", self.firewall.mode());
        let rules = match self.firewall.trouble() {
            Some(trouble) => trouble.reason,
            None if self.firewall.is_in_place() => "in place".into(),
            None => "not in place".into(),
        };
        let _ = writeln!(out, "firewall_rules {rules}");
        let _ = writeln!(out, "firewall_writes {}", self.firewall.written());
    }
}

/// A bound for waiting on programs and the kernel together.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
