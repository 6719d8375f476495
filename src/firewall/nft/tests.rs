//! Kernels that lack something, answer late or wrongly: what a real one cannot be made to do.

#![allow(clippy::disallowed_methods)] // the tests read the clock

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::*;
use crate::firewall::choose::{Facts, Mode};
use crate::firewall::legacy::{Legacy, Variant};
use crate::firewall::plan::Share;
use crate::firewall::{Firewall, Options};
use crate::netlink::{DONE, ERROR, Message, flag};

const ENOENT: i32 = 2;
const EINVAL: i32 = 22;
const ERESTART: i32 = 85;
const EOPNOTSUPP: i32 = 95;
const EAFNOSUPPORT: i32 = 97;

/// A rule: its handle, and the attributes that made it.
type Kept = (u64, Vec<u8>);

/// A kernel of our own: keeps what it is given, and refuses what `lacks` says.
struct Kernel {
    lacks: fn(kind: u16, protocol: u8, payload: &[u8]) -> Option<i32>,
    /// Transactions that it lets fail as overtaken.
    overtaken: usize,
    generation: u32,
    tables: Vec<(u8, String)>,
    chains: BTreeMap<(u8, String, String), Vec<Kept>>,
    /// The attributes that made each chain.
    made: BTreeMap<(u8, String, String), Vec<u8>>,
    handles: u64,
}

fn text_of(payload: &[u8], kind: u16) -> String {
    let value = attributes(&payload[4..]).find(|(found, _)| *found == kind);
    value.and_then(|(_, value)| decode::text(value)).unwrap_or_default().to_owned()
}

fn contains(payload: &[u8], text: &[u8]) -> bool {
    payload.windows(text.len()).any(|window| window == text)
}

impl Kernel {
    fn new(lacks: fn(u16, u8, &[u8]) -> Option<i32>) -> Self {
        Self {
            lacks,
            overtaken: 0,
            generation: 1,
            tables: vec![],
            chains: BTreeMap::new(),
            made: BTreeMap::new(),
            handles: 0,
        }
    }

    fn complete() -> Self {
        Self::new(|_, _, _| None)
    }

    /// Its answers, as one datagram.
    fn answer(&mut self, request: &[u8]) -> Vec<u8> {
        let mut out = Writer::default();
        let all: Vec<Message<'_>> = messages(request).collect();
        if all.first().is_some_and(|first| first.kind == wire::BATCH_BEGIN) {
            self.transaction(&all, &mut out);
            return out.bytes().to_vec();
        }
        for message in all {
            let protocol = message.payload[0];
            match message.kind {
                wire::GETGEN => match (self.lacks)(message.kind, protocol, message.payload) {
                    Some(code) => error(&mut out, message.sequence, code),
                    None => {
                        out.begin(wire::NEWGEN, 0, message.sequence);
                        out.fixed(&[0; 4]);
                        out.attribute(1, &self.generation.to_be_bytes());
                        out.end();
                    }
                },
                wire::GETTABLE => {
                    let name = text_of(message.payload, 1);
                    if self.tables.contains(&(protocol, name)) {
                        out.begin(wire::NEWTABLE, 0, message.sequence);
                        out.fixed(&message.payload[..4]);
                        out.end();
                    } else {
                        error(&mut out, message.sequence, ENOENT);
                    }
                }
                wire::GETCHAIN => {
                    let key = (protocol, text_of(message.payload, 1), text_of(message.payload, 3));
                    if self.chains.contains_key(&key) {
                        out.begin(wire::NEWCHAIN, 0, message.sequence);
                        out.fixed(&message.payload[..4]);
                        out.fixed(&self.made[&key]);
                        out.end();
                    } else {
                        error(&mut out, message.sequence, ENOENT);
                    }
                }
                wire::GETRULE => {
                    let key = (protocol, text_of(message.payload, 1), text_of(message.payload, 2));
                    for (handle, attributes) in self.chains.get(&key).into_iter().flatten() {
                        out.begin(wire::NEWRULE, 0, message.sequence);
                        out.fixed(&message.payload[..4]);
                        out.fixed(attributes);
                        out.attribute(wire::rule::HANDLE, &handle.to_be_bytes());
                        out.end();
                    }
                    out.begin(DONE, 0, message.sequence);
                    out.fixed(&[0; 4]);
                    out.end();
                }
                other => panic!("request {other}"),
            }
        }
        out.bytes().to_vec()
    }

    fn transaction(&mut self, all: &[Message<'_>], out: &mut Writer) {
        let generation = decode::number(&all[0].payload[4..], wire::BATCH_GENERATION);
        assert_eq!(all.last().map(|last| last.kind), Some(wire::BATCH_END));
        if self.overtaken > 0 || generation != Some(self.generation) {
            self.overtaken = self.overtaken.saturating_sub(1);
            self.generation += 1;
            return error(out, all[0].sequence, ERESTART);
        }
        let steps = &all[1..all.len() - 1];
        let refusal = |step: &Message<'_>| (self.lacks)(step.kind, step.payload[0], step.payload);
        let fails = steps.iter().any(|step| refusal(step).is_some());
        for step in steps {
            match refusal(step) {
                Some(code) => error(out, step.sequence, code),
                None if step.flags & flag::ACK != 0 => error(out, step.sequence, 0),
                None => {}
            }
        }
        if fails {
            return;
        }
        self.generation += 1;
        for step in steps {
            let protocol = step.payload[0];
            let (first, second) = (text_of(step.payload, 1), text_of(step.payload, 2));
            match step.kind {
                wire::NEWTABLE => self.tables.push((protocol, first)),
                wire::DELTABLE => {
                    self.tables.retain(|table| *table != (protocol, first.clone()));
                    self.chains.retain(|(p, table, _), _| (*p, table) != (protocol, &first));
                }
                wire::NEWCHAIN => {
                    let key = (protocol, first, text_of(step.payload, 3));
                    self.made.insert(key.clone(), step.payload[4..].to_vec());
                    self.chains.entry(key).or_default();
                }
                wire::DELCHAIN => {
                    self.chains.remove(&(protocol, first, text_of(step.payload, 3)));
                }
                wire::NEWRULE => {
                    self.handles += 1;
                    let Some(rules) = self.chains.get_mut(&(protocol, first, second)) else {
                        continue;
                    };
                    let at = if step.flags & wire::APPEND != 0 { rules.len() } else { 0 };
                    rules.insert(at, (self.handles, step.payload[4..].to_vec()));
                }
                wire::DELRULE => {
                    let handle = attributes(&step.payload[4..])
                        .find(|(kind, _)| *kind == wire::rule::HANDLE)
                        .map(|(_, value)| u64::from_be_bytes(value.try_into().unwrap()));
                    let Some(rules) = self.chains.get_mut(&(protocol, first, second)) else {
                        continue;
                    };
                    rules.retain(|(found, _)| handle.is_some_and(|handle| handle != *found));
                }
                other => panic!("step {other}"),
            }
        }
    }

    fn rules(&self, protocol: u8, chain: &str) -> usize {
        let found = self.chains.iter().find(|((p, _, c), _)| (*p, &**c) == (protocol, chain));
        found.map_or(0, |(_, rules)| rules.len())
    }
}

fn error(out: &mut Writer, sequence: u32, code: i32) {
    out.begin(ERROR, 0, sequence);
    out.fixed(&(-code).to_ne_bytes());
    out.fixed(&[0; 16]);
    out.end();
}

fn firewall(mode: Option<Mode>, now: Instant) -> Firewall {
    let options =
        Options { masquerade: true, fully_random: true, forward: true, resync: None, mode };
    let facts = Facts { host: Some(Variant::Nft), forced: mode, ..Facts::default() };
    let legacy = Legacy::new([None, None], [false; 2], 7, now);
    let mut firewall = Firewall::new(options, facts, Native::new(7, now), legacy);
    let share = |network: &str, subnet: &str| {
        Some(Share { network: network.parse().unwrap(), subnet: subnet.parse().unwrap() })
    };
    let shares = [share("10.5.0.0/16", "10.5.7.0/24"), share("fd00:5::/48", "fd00:5:0:7::/64")];
    firewall.set(shares, &[], false, now);
    firewall
}

/// Lets both talk until nothing is due before `now`; what was told.
fn talk(firewall: &mut Firewall, kernel: &mut Kernel, now: Instant) -> Vec<Event> {
    let mut events = Vec::new();
    for _ in 0..200 {
        let request = firewall.poll_transmit(now).map(<[u8]>::to_vec);
        if let Some(request) = &request {
            let answer = kernel.answer(request);
            firewall.handle_reply(&answer, now);
        }
        let before = events.len();
        while let Some(event) = firewall.poll_event(now) {
            events.push(event);
        }
        if request.is_none() && events.len() == before {
            return events;
        }
    }
    panic!("no end: {events:?}");
}

#[test]
fn a_complete_kernel() {
    let now = Instant::now();
    for mode in [Mode::IptablesNft, Mode::Nftables] {
        let (mut firewall, mut kernel) = (firewall(Some(mode), now), Kernel::complete());
        let events = talk(&mut firewall, &mut kernel, now);
        assert!(firewall.is_in_place(), "{events:?}");
        assert_eq!(firewall.written(), 4, "one transaction for each family and purpose");
        let chain = if mode == Mode::Nftables { "postrtg" } else { "FLANNEL-POSTRTG" };
        assert_eq!((kernel.rules(2, chain), kernel.rules(10, chain)), (6, 6));
    }
}

#[test]
fn without_xt_comment() {
    let now = Instant::now();
    let mut firewall = firewall(None, now);
    let mut kernel = Kernel::new(|kind, protocol, payload| {
        let refused = kind == wire::NEWRULE && protocol == 2 && contains(payload, b"comment\0");
        refused.then_some(ENOENT)
    });
    let events = talk(&mut firewall, &mut kernel, now);
    assert!(events.contains(&Event::WithoutCommentMatch(Family::V4)), "{events:?}");
    assert!(!events.contains(&Event::WithoutCommentMatch(Family::V6)), "{events:?}");
    assert!(firewall.is_in_place(), "{events:?}");
    assert_eq!((kernel.rules(2, "FLANNEL-POSTRTG"), kernel.rules(10, "FLANNEL-FWD")), (6, 2));
}

#[test]
fn without_fully_random_ports() {
    let now = Instant::now();
    let mut firewall = firewall(Some(Mode::Nftables), now);
    let mut kernel = Kernel::new(|kind, protocol, payload| {
        // masq { flags 0x10 }
        let refused = kind == wire::NEWRULE
            && protocol == 2
            && contains(payload, b"masq\0")
            && contains(payload, &[8, 0, 1, 0, 0, 0, 0, 0x10]);
        refused.then_some(EOPNOTSUPP)
    });
    let events = talk(&mut firewall, &mut kernel, now);
    assert!(events.contains(&Event::WithoutFullyRandom(Family::V4)), "{events:?}");
    assert!(
        !events.contains(&Event::WithoutFullyRandom(Family::V6)),
        "IPv4 does not decide for it"
    );
    assert!(firewall.is_in_place(), "{events:?}");
}

#[test]
fn without_xt_masquerade_the_rules_go_elsewhere() {
    let now = Instant::now();
    let mut firewall = firewall(None, now);
    let mut kernel = Kernel::new(|kind, _, payload| {
        (kind == wire::NEWRULE && contains(payload, b"MASQUERADE\0")).then_some(ENOENT)
    });
    let events = talk(&mut firewall, &mut kernel, now);
    assert!(events.contains(&Event::WithoutTarget(Family::V4)), "{events:?}");
    assert!(firewall.is_in_place(), "{events:?}");
    assert_eq!((firewall.mode(), kernel.rules(2, "postrtg")), ("nftables", 6));
    assert_eq!(kernel.rules(2, "FLANNEL-POSTRTG"), 0);
}

#[test]
fn a_family_that_the_kernel_lacks_harms_no_other() {
    let now = Instant::now();
    let mut firewall = firewall(Some(Mode::Nftables), now);
    let mut kernel = Kernel::new(|_, protocol, _| (protocol == 10).then_some(EAFNOSUPPORT));
    let events = talk(&mut firewall, &mut kernel, now);
    assert_eq!(kernel.rules(2, "postrtg"), 6);
    let refused = |event: &Event| matches!(event, Event::Refused { reason, .. } if reason.contains("ip6 flannel-ipv6"));
    assert_eq!(
        events.iter().filter(|event| refused(event)).count(),
        2,
        "one a purpose: {events:?}"
    );
    assert!(firewall.trouble().is_some() && !firewall.is_in_place());
    // tried again, more and more rarely, and well once it is there
    let events = talk(&mut firewall, &mut kernel, now + Duration::from_secs(2));
    assert_eq!(
        events.iter().filter(|event| refused(event)).count(),
        2,
        "one a purpose: {events:?}"
    );
    let mut kernel = Kernel { lacks: |_, _, _| None, ..kernel };
    talk(&mut firewall, &mut kernel, now + Duration::from_secs(120));
    assert!(firewall.is_in_place() && firewall.trouble().is_none());
    assert_eq!(kernel.rules(10, "postrtg"), 6);
}

#[test]
fn without_nat_the_option_is_named() {
    let now = Instant::now();
    let mut firewall = firewall(Some(Mode::Nftables), now);
    let mut kernel = Kernel::new(|kind, _, payload| {
        (kind == wire::NEWCHAIN && contains(payload, b"nat\0")).then_some(ENOENT)
    });
    let events = talk(&mut firewall, &mut kernel, now);
    let said = |event: &Event| matches!(event, Event::Refused { reason, .. } if reason.contains("CONFIG_NFT_NAT"));
    assert!(events.iter().any(said), "{events:?}");
}

#[test]
fn without_nf_tables() {
    let now = Instant::now();
    let mut kernel = Kernel::new(|kind, _, _| (kind == wire::GETGEN).then_some(EINVAL));
    let mut firewall = firewall(None, now);
    let events = talk(&mut firewall, &mut kernel, now);
    assert!(
        matches!(&events[0], Event::Chosen(choice) if choice.mode.is_none() && choice.why.contains("CONFIG_NF_TABLES")),
        "{events:?}"
    );
    assert!(firewall.trouble().is_some() && !firewall.is_in_place());
    assert_eq!(firewall.poll_timeout(), None, "nothing will change by itself");
}

#[test]
fn overtaken_transactions_are_made_anew() {
    let now = Instant::now();
    let mut firewall = firewall(None, now);
    let mut kernel = Kernel { overtaken: 5, ..Kernel::complete() };
    for step in 0..10 {
        let now = now + Duration::from_millis(20) * step;
        let events = talk(&mut firewall, &mut kernel, now);
        assert!(!events.iter().any(|event| matches!(event, Event::Refused { .. })), "{events:?}");
    }
    assert!(firewall.is_in_place());
}

#[test]
fn lost_answers_are_asked_for_again() {
    let now = Instant::now();
    let (mut firewall, mut kernel) = (firewall(None, now), Kernel::complete());
    assert!(firewall.poll_transmit(now).is_some());
    assert!(firewall.poll_transmit(now + Duration::from_secs(1)).is_none(), "one at a time");
    let later = now + Duration::from_secs(6);
    firewall.poll_transmit(later);
    talk(&mut firewall, &mut kernel, later + Duration::from_secs(1));
    assert!(firewall.is_in_place());
}

fn news(id: u32, process: &str) -> Vec<u8> {
    let mut out = Writer::default();
    out.begin(wire::NEWGEN, 0, 0);
    out.fixed(&[0; 4]);
    out.attribute(1, &id.to_be_bytes());
    out.attribute(2, &77u32.to_be_bytes());
    out.text(3, process);
    out.end();
    out.bytes().to_vec()
}

#[test]
fn news_of_others_cause_a_look_and_our_own_do_not() {
    let now = Instant::now();
    let (mut firewall, mut kernel) = (firewall(None, now), Kernel::complete());
    talk(&mut firewall, &mut kernel, now);
    let quiet = firewall.poll_timeout();
    assert!(quiet.is_some_and(|at| at > now + Duration::from_secs(50)));
    firewall.native().handle_notice(&news(kernel.generation, "flanneld"), now);
    assert_eq!(firewall.poll_timeout(), quiet);
    // a thousand transactions of others are a few looks
    let mut looks = 0;
    for step in 0..1000u32 {
        let at = now + Duration::from_millis(step.into());
        kernel.generation += 1;
        firewall.native().handle_notice(&news(kernel.generation, "kube-proxy"), at);
        looks += usize::from(
            firewall.poll_transmit(at).map(|request| kernel.answer(request)).is_some_and(
                |answer| {
                    firewall.handle_reply(&answer, at);
                    true
                },
            ),
        );
        talk(&mut firewall, &mut kernel, at);
    }
    assert!((4..=12).contains(&looks), "{looks}");
    talk(&mut firewall, &mut kernel, now + Duration::from_secs(3));
    let rules = kernel.chains.get_mut(&(2, "nat".into(), "FLANNEL-POSTRTG".into())).unwrap();
    rules.remove(2);
    kernel.generation += 1;
    let late = now + Duration::from_secs(5);
    firewall.native().handle_notice(&news(kernel.generation, "nft"), late);
    let events = talk(&mut firewall, &mut kernel, late + Duration::from_secs(1));
    assert!(
        matches!(&events[0], Event::Healed { by: Some(by), .. } if by == "nft (process 77)"),
        "{events:?}"
    );
}

#[test]
fn mutated_answers_never_panic() {
    let now = Instant::now();
    let mut state = 7u32;
    for round in 0..3000u32 {
        let mode = if round % 2 == 0 { Mode::IptablesNft } else { Mode::Nftables };
        let (mut firewall, mut kernel) = (firewall(Some(mode), now), Kernel::complete());
        for _ in 0..20 {
            let Some(request) = firewall.poll_transmit(now) else { break };
            let mut answer = kernel.answer(request);
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            if state.is_multiple_of(3) && !answer.is_empty() {
                let at = usize::try_from(state >> 8).unwrap() % answer.len();
                answer[at] = state.to_be_bytes()[0];
                // the kernel of this test is not made for what it does not know
                answer.truncate(answer.len() - at % 7);
            }
            firewall.handle_reply(&answer, now);
            firewall.native().handle_notice(&answer, now);
            if firewall.native().job.is_some() {
                break;
            }
        }
    }
}

#[test]
fn a_datagram_that_cannot_be_sent_is_said() {
    let now = Instant::now();
    let (mut firewall, mut kernel) = (firewall(None, now), Kernel::complete());
    let mut events = Vec::new();
    for _ in 0..20 {
        let Some(request) = firewall.poll_transmit(now).map(<[u8]>::to_vec) else { break };
        if messages(&request).any(|message| message.kind == wire::BATCH_BEGIN) {
            firewall.native().handle_send_error(&io::Error::from_raw_os_error(90), now);
        } else {
            firewall.handle_reply(&kernel.answer(&request), now);
        }
        events.extend(std::iter::from_fn(|| firewall.poll_event(now)));
    }
    let said = |event: &&Event| matches!(event, Event::Refused { reason, .. } if reason.contains("Message too long"));
    assert_eq!(events.iter().filter(said).count(), 4, "one a group: {events:?}");
    assert!(firewall.trouble().is_some());
    assert!(firewall.poll_timeout().is_some_and(|at| at > now), "not at once");
}

#[test]
fn one_refused_look_is_not_the_end() {
    let now = Instant::now();
    let (mut firewall, mut kernel) = (firewall(None, now), Kernel::complete());
    talk(&mut firewall, &mut kernel, now);
    assert!(firewall.is_in_place());
    // ENOMEM, in the minute's look
    kernel.lacks = |kind, _, _| (kind == wire::GETGEN).then_some(12);
    let later = now + Duration::from_secs(61);
    let request = firewall.poll_transmit(later).map(<[u8]>::to_vec).unwrap();
    firewall.handle_reply(&kernel.answer(&request), later);
    kernel.lacks = |_, _, _| None;
    kernel.chains.values_mut().for_each(Vec::clear);
    kernel.generation += 1;
    talk(&mut firewall, &mut kernel, later + Duration::from_secs(1));
    assert!(firewall.is_in_place());
    assert_eq!(kernel.rules(2, "FLANNEL-POSTRTG"), 6);
}

#[test]
fn a_kernel_with_another_alignment() {
    let now = Instant::now();
    let mut firewall = firewall(None, now);
    // a target of 24 bytes: attribute 3 of 28
    let mut kernel = Kernel::new(|kind, protocol, payload| {
        let long = contains(payload, b"MASQUERADE\0") && contains(payload, &[28, 0, 3, 0]);
        (kind == wire::NEWRULE && protocol == 2 && long).then_some(EINVAL)
    });
    let events = talk(&mut firewall, &mut kernel, now);
    assert!(firewall.is_in_place(), "{events:?}");
    assert_eq!((firewall.mode(), kernel.rules(2, "FLANNEL-POSTRTG")), ("iptables-nft", 6));
    assert!(!events.contains(&Event::WithoutFullyRandom(Family::V4)), "{events:?}");
}
