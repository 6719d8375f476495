//! Notifications: what others do to the kernel's state, as it happens.

use std::time::Instant;

use super::{Reconciler, STIR, STIR_ROUTES};
use crate::kernel::compare::{self, PROTOCOL};
use crate::kernel::desired::State;
use crate::kernel::links::{Verdict, judge};
use crate::kernel::object::{IfName, Key, Link, LinkKind, Object};
use crate::kernel::seen::{Seen, SeenLink, decode, kind};
use crate::netlink::messages;

impl Reconciler {
    /// A datagram from the notification socket.
    pub fn handle_notice(&mut self, datagram: &[u8], now: Instant) {
        for message in messages(datagram) {
            if message.port != 0 && message.port == self.scope.port {
                continue;
            }
            let deleted = matches!(
                message.kind,
                kind::DELLINK | kind::DELADDR | kind::DELROUTE | kind::DELNEIGH
            );
            match (decode(&message), deleted) {
                (Some(Seen::Link(link)), false) => {
                    // it may be older than what we know, so the list decides
                    self.list_links |= self.desired.get(&Key::Link(link.name)).is_some();
                    self.note_link(link, false, now);
                }
                (Some(Seen::Link(link)), true) => self.forget_link(link.index, now),
                (Some(seen), deleted) => self.noticed(&seen, deleted, now),
                (None, _) => {}
            }
        }
    }

    pub(super) fn noticed(&mut self, seen: &Seen, deleted: bool, now: Instant) {
        match seen {
            // routes go with the addresses that they depend on, untold
            Seen::Address(address) => {
                let link = self.links.at(address.index).map(|link| link.name);
                if link.is_some_and(|link| self.concerns_us(link)) {
                    self.stir(now, STIR);
                }
            }
            Seen::Route(route) if route.protocol != PROTOCOL && !self.paths.is_empty() => {
                self.stir(now, STIR_ROUTES)
            }
            _ => {}
        }
        let Some(key) = compare::key(seen, &self.links) else { return };
        let Some(entry) = self.desired.get(&key).filter(|entry| entry.state == State::Present)
        else {
            return;
        };
        let same = compare::same(&entry.object, seen, &self.links);
        match (deleted, same) {
            (true, true) => self.heal(&key, "deleted", now),
            (false, false) => self.heal(&key, "changed", now),
            _ => {}
        }
    }

    /// `certain` says that this is how the link is now, and not how it was a while ago.
    pub(super) fn note_link(&mut self, link: SeenLink, certain: bool, now: Instant) {
        let (name, up) = (link.name, link.up);
        let old = self.links.put(link);
        if let Some(other) = old.as_ref().filter(|old| old.name != name) {
            self.strand(other.name, now);
        }
        if old.as_ref().is_none_or(|old| old.up != up || old.name != name) && self.concerns_us(name)
        {
            self.stir(now, STIR);
        }
        let key = Key::Link(name);
        let Some(entry) = self.desired.get(&key) else { return };
        let (Object::Link(want), Some(have)) = (&entry.object, self.links.get(name)) else {
            return;
        };
        let lower = match &want.kind {
            LinkKind::Vxlan(vxlan) => self.links.index(vxlan.lower),
            LinkKind::Existing => None,
        };
        let same = judge(want, have, lower, self.scope.vxlan_port) == Verdict::Same;
        match (&entry.state, same) {
            (State::Unknown | State::Waiting, true) => self.desired.set(&key, State::Present),
            (State::Unknown | State::Waiting, false) => self.desired.set(&key, State::Wanted),
            (State::Present, false) if certain => self.heal(&key, "changed", now),
            _ => {}
        }
    }

    pub(super) fn forget_link(&mut self, index: u32, now: Instant) {
        let old = self.links.remove(index);
        // a device that was made anew has the same name
        if let Some(old) = old.filter(|old| self.links.index(old.name).is_none()) {
            self.strand(old.name, now);
        }
    }

    /// A link is gone, and all that was on it.
    pub(super) fn strand(&mut self, name: IfName, now: Instant) {
        if self.concerns_us(name) {
            self.stir(now, STIR);
        }
        let key = Key::Link(name);
        if self.desired.get(&key).is_some_and(|entry| entry.state == State::Present) {
            self.heal(&key, "deleted", now);
        }
        for key in self.desired.keys_where(|entry| compare::link_of(&entry.object) == Some(name)) {
            self.desired.set(&key, State::Waiting);
        }
    }

    pub(super) fn concerns_us(&self, name: IfName) -> bool {
        !self.paths.is_empty()
            || self.desired.entries().any(|(_, entry)| match &entry.object {
                Object::Link(Link { name: own, kind: LinkKind::Vxlan(vxlan), .. }) => {
                    *own == name || vxlan.lower == name
                }
                Object::Link(Link { name: own, .. }) => *own == name,
                Object::Route(route) => route.link.is_none_or(|link| link == name),
                other => compare::link_of(other) == Some(name),
            })
    }
}
