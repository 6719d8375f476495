//! Lists of what the kernel has, held against what is wanted.

use std::collections::{HashSet, VecDeque};
use std::time::{Duration, Instant};

use ipnet::IpNet;

use super::{ANSWER, AUDIT, ENODEV, ENOENT, ESRCH, KernelEvent, Reconciler, errno};
use crate::kernel::compare::{self, Stray};
use crate::kernel::desired::State;
use crate::kernel::encode::Dump;
use crate::kernel::object::{Address, IfName, Link, LinkKind, Object};
use crate::kernel::seen::{Seen, decode};
use crate::netlink::{DONE, ERROR, Message, flag, outcome};

/// So often an audit lists again what changed while it was listed; then it comes back later.
const INTERRUPTIONS: u8 = 10;

impl Reconciler {
    /// Returns whether the list is over.
    pub(super) fn list_reply(
        &mut self,
        dump: Dump,
        intact: &mut bool,
        indexes: &mut HashSet<u32>,
        message: &Message<'_>,
        now: Instant,
    ) -> bool {
        *intact &= message.flags & flag::DUMP_INTR == 0;
        if message.kind == DONE || message.kind == ERROR {
            // DONE has an error number, too
            let code = outcome(&Message { flags: 0, ..*message }).map_or(0, |(code, _)| code);
            // a table or a device that does not exist has no content
            *intact &= [0, ENOENT, ESRCH, ENODEV].contains(&code);
            if *intact {
                self.end_list(dump, indexes, now);
            } else if let Some(audit) = &mut self.audit {
                log::debug!(
                    "listing {dump:?} again: {}",
                    if code == 0 { "it changed meanwhile".into() } else { errno(code) }
                );
                self.interruptions += 1;
                if code == 0 && self.interruptions < INTERRUPTIONS {
                    audit.push_back(dump);
                } else {
                    self.audit = None;
                    self.stir(now, ANSWER);
                }
            } else {
                self.list_links = true;
            }
            return true;
        }
        match decode(message) {
            Some(Seen::Link(link)) => {
                indexes.insert(link.index);
                self.note_link(link, true, now);
            }
            Some(seen) => self.audited(dump, &seen, now),
            None => {}
        }
        false
    }

    /// One object in a list.
    pub(super) fn audited(&mut self, dump: Dump, seen: &Seen, now: Instant) {
        let Some(key) = compare::key(seen, &self.links).filter(|key| compare::covers(dump, key))
        else {
            return self.judge_stray(seen);
        };
        let Some(entry) = self.desired.get(&key) else { return self.judge_stray(seen) };
        if compare::same(&entry.object, seen, &self.links) {
            return self.desired.seen(&key, self.epoch);
        }
        let state = entry.state.clone();
        self.desired.excuse(&key, self.epoch);
        match state {
            State::Unknown => self.desired.set(&key, State::Wanted),
            State::Present => self.heal(&key, "changed", now),
            _ => {}
        }
    }

    pub(super) fn judge_stray(&mut self, seen: &Seen) {
        if let Seen::Address(address) = seen {
            let Some(link) = self.links.at(address.index).map(|link| link.name) else { return };
            let intruder = compare::intruder(seen, &self.links, self.addresses_on(link));
            if let Some(object) = intruder {
                self.events.push_back(KernelEvent::Swept(object.to_string()));
                self.doomed.insert(object.key(), object);
            }
            return;
        }
        if !self.swept {
            return;
        }
        match compare::stray(seen, &self.links, &self.scope.networks, &self.scope.devices) {
            Stray::Remove(object) => {
                self.events.push_back(KernelEvent::Swept(object.to_string()));
                self.doomed.insert(object.key(), object);
            }
            Stray::Mention(object) if !std::mem::replace(&mut self.mentioned, true) => {
                self.events.push_back(KernelEvent::Leftover(object.to_string()));
            }
            Stray::Mention(_) | Stray::Leave => {}
        }
    }

    pub(super) fn addresses_on(&self, link: IfName) -> impl Iterator<Item = &Address> {
        self.desired.addresses().filter(move |address| address.link == link)
    }

    pub(super) fn end_list(&mut self, dump: Dump, indexes: &HashSet<u32>, now: Instant) {
        if dump == Dump::Links {
            let gone: Vec<u32> = self
                .links
                .iter()
                .map(|link| link.index)
                .filter(|index| !indexes.contains(index))
                .collect();
            for index in gone {
                self.forget_link(index, now);
            }
            self.unpark();
            if self.audit.as_ref().is_some_and(VecDeque::is_empty) {
                self.plan_audit(now);
            }
        } else {
            let missing = self.desired.keys_where(|entry| {
                entry.epoch != self.epoch
                    && matches!(entry.state, State::Unknown | State::Present)
                    && compare::covers(dump, &entry.object.key())
            });
            for key in missing {
                match self.desired.get(&key).map(|entry| &entry.state) {
                    Some(State::Unknown) => self.desired.set(&key, State::Wanted),
                    _ => self.heal(&key, "deleted", now),
                }
            }
        }
        if self.audit.as_ref().is_some_and(VecDeque::is_empty) {
            self.audit = None;
            // what no list shows is not there: the entries of a device that is none of ours yet
            let epoch = self.epoch;
            for key in self
                .desired
                .keys_where(|entry| entry.state == State::Unknown && entry.epoch != epoch)
            {
                self.desired.set(&key, State::Wanted);
            }
            // what was declared meanwhile
            self.audit_now |= self.desired.has_unknown();
            let spread = Duration::from_secs(self.scope.seed % 13);
            self.audit_at = now + AUDIT - Duration::from_secs(6) + spread;
        }
    }

    /// The links are known: chooses the lists that this audit needs.
    pub(super) fn plan_audit(&mut self, now: Instant) {
        self.paths.ask_all();
        for key in self
            .desired
            .keys_where(|entry| matches!(entry.object, Object::Link(_) | Object::Sysctl(_)))
        {
            let Some(entry) = self.desired.get(&key) else { continue };
            match (&entry.object, &entry.state) {
                (Object::Link(link), State::Present) if self.links.get(link.name).is_none() => {
                    self.heal(&key, "deleted", now);
                }
                (Object::Link(_), State::Unknown) => self.desired.set(&key, State::Wanted),
                // read again, and written if it differs
                (Object::Sysctl(_), State::Unknown | State::Present) => {
                    self.desired.set(&key, State::Wanted)
                }
                _ => {}
            }
        }
        let mut lists = VecDeque::from([Dump::Addresses]);
        let families = [true, false];
        for v4 in families {
            if self.scope.networks.iter().any(|network| matches!(network, IpNet::V4(_)) == v4) {
                lists.push_back(Dump::Routes { v4 });
                let there =
                    self.scope.devices.iter().filter(|link| self.links.index(**link).is_some());
                lists.extend(there.map(|link| Dump::Neighbours { link: *link, v4 }));
            }
        }
        lists.extend(self.scope.devices.iter().filter_map(|link| {
            self.links.get(*link)?.vxlan.as_ref()?;
            Some(Dump::Fdb { link: *link })
        }));
        self.audit = Some(lists);
        // what sits on a link that does not exist cannot be listed
        let lost = self.desired.keys_where(|entry| {
            let link = compare::link_of(&entry.object);
            matches!(entry.state, State::Unknown | State::Present)
                && link.is_some_and(|link| self.links.index(link).is_none())
        });
        for key in lost {
            self.desired.set(&key, State::Waiting);
        }
    }

    /// The link without which an object cannot be made, if it is not there.
    pub(super) fn missing_link(&self, object: &Object) -> Option<IfName> {
        let needed = match object {
            Object::Link(Link { kind: LinkKind::Vxlan(vxlan), .. }) => Some(vxlan.lower),
            Object::Link(Link { kind: LinkKind::Existing, name, .. }) => Some(*name),
            other => compare::link_of(other),
        };
        needed.filter(|link| self.links.index(*link).is_none())
    }

    /// What waited for a link that is there now is written.
    pub(super) fn unpark(&mut self) {
        let ready = self.desired.keys_where(|entry| {
            entry.state == State::Waiting && self.missing_link(&entry.object).is_none()
        });
        for key in ready {
            self.desired.set(&key, State::Wanted);
        }
    }
}
