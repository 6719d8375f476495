//! Batches of changes, and what the kernel says to them.

use std::time::Instant;

use super::{
    BATCH, EADDRNOTAVAIL, EEXIST, ENODEV, ENOENT, EOPNOTSUPP, ESRCH, Item, Job, KernelEvent,
    Reconciler, errno,
};
use crate::kernel::compare::{self, PROTOCOL};
use crate::kernel::desired::State;
use crate::kernel::encode;
use crate::kernel::links::{Verdict, judge};
use crate::kernel::object::{Key, Link, LinkKind, Object};
use crate::netlink::{ERROR, Message, flag, outcome};

impl Reconciler {
    pub(super) fn write_batch(&mut self, now: Instant) -> Option<Job> {
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
    pub(super) fn put(&mut self, key: &Key, items: &mut Vec<Option<Item>>, now: Instant) {
        let Some(entry) = self.desired.get(key) else { return };
        let (object, retried) = (entry.object.clone(), entry.has_failed());
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
        if let (Object::Route(route), true) = (&object, retried) {
            // Another route was put in front of ours: while ours is there, too, the kernel does not replace it.
            let sequence = self.next_sequence();
            encode::delete_route(&mut self.writer, sequence, route, index);
            items.push(Some(Item::Clear));
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
            Object::Blackhole(dst) => {
                encode::blackhole(&mut self.writer, sequence, *dst, PROTOCOL, false);
            }
            Object::Link(_) | Object::Sysctl(_) => {}
        }
        self.desired.set(key, State::Sent);
        items.push(Some(Item::Put(key.clone())));
    }

    pub(super) fn put_link(
        &mut self,
        key: &Key,
        link: &Link,
        items: &mut Vec<Option<Item>>,
        now: Instant,
    ) {
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
    pub(super) fn delete(&mut self, object: &Object) -> bool {
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
            Object::Blackhole(dst) => {
                encode::blackhole(&mut self.writer, sequence, *dst, PROTOCOL, true);
            }
            Object::Link(_) | Object::Sysctl(_) => return false,
        }
        true
    }

    /// Returns whether the batch is over.
    pub(super) fn batch_reply(
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

    pub(super) fn refused(&mut self, key: &Key, code: i32, text: Option<&str>, now: Instant) {
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

    pub(super) fn explain(&self, object: &Object, code: i32, text: Option<&str>) -> String {
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

    pub(super) fn not_deleted(&mut self, object: &Object, code: i32, text: Option<&str>) {
        if ![ENOENT, ESRCH, ENODEV, EADDRNOTAVAIL].contains(&code) {
            log::debug!(
                "could not remove {object}: {} ({})",
                text.unwrap_or("no reason given"),
                errno(code)
            );
        }
    }
}
