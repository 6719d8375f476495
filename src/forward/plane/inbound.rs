//! UDP to TUN.

use std::io;

use super::super::merge::{Joined, Part};
use super::super::offload::Offload;
use super::super::stats::Reason;
use super::{FEW_SLOTS, Plane, SLOTS, Step, TunGone, write};
use crate::family::Family;
use crate::sys::tun::{self, Tun};
use crate::sys::udp::{Received, SLOT};
use crate::wire::vnet;

/// Bytes from which on a message counts as a long run.
const LONG: usize = 16 * 1024;

impl Plane {
    /// UDP to TUN: one burst.
    ///
    /// Long messages are received a few at a time, and what they hold is delivered at once, but for flows that may go on
    /// in the next: a super-packet does not end where a call ends.
    pub(super) fn step_inbound(&mut self, family: Family) -> Result<Step, TunGone> {
        let lane = match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        };
        let Some(lane) = lane.as_mut().filter(|lane| lane.ready) else { return Ok(Step::Blocked) };
        let mut outlet = Outlet::new(&self.tun);
        let mut received = [Received::NONE; SLOTS];
        let mut used = 0;
        while lane.ready && used < if self.offloads.batch { lane.limit() } else { 1 } {
            let most = if self.offloads.batch { lane.most.min(SLOTS - used) } else { 1 };
            let slots = &mut self.inbox[used * SLOT..];
            let count = match lane.udp.receive(slots, &mut received[..most]) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => {
                    self.engine.stats.drops.add(Reason::ReceiveFailed);
                    break;
                }
            };
            // there was no more, and what comes now is announced
            lane.ready = count == most;
            lane.is_long = received[..count].iter().any(|message| message.len >= LONG);
            lane.most = if lane.ready && !lane.is_long { SLOTS } else { FEW_SLOTS };
            for (message, slot) in received[..count].iter().zip(used..) {
                let (mut start, end) = (slot * SLOT, slot * SLOT + message.len);
                if message.len == 0 {
                    // an empty datagram is one, too
                    self.engine.inbound(&mut [], message.from);
                }
                while start < end {
                    let next = (start + message.segment).min(end);
                    let datagram = &mut self.inbox[start..next];
                    if let Some(len) = self.engine.inbound(datagram, message.from) {
                        let inbox = &self.inbox;
                        self.merger.push(inbox, start..start + len, &mut |joined| {
                            outlet.write(joined, inbox);
                        });
                    }
                    start = next;
                }
            }
            used += count;
        }
        let inbox = &self.inbox;
        self.merger.flush(&mut |joined| outlet.write(joined, inbox));
        let Outlet { gone, refused, delivered, failed, .. } = outlet;
        self.engine.stats.delivered += delivered;
        (0..failed).for_each(|_| self.engine.stats.drops.add(Reason::DeliverFailed));
        if let Some(error) = refused {
            self.give_up(Offload::Merge, error);
        }
        match gone {
            Some(error) => Err(TunGone(error)),
            None if used > 0 => Ok(Step::Moved),
            None if self.lane(family).is_some_and(|lane| lane.ready) => Ok(Step::Moved),
            None => Ok(Step::Blocked),
        }
    }
}

/// Where the merger's packets go.
struct Outlet<'a> {
    tun: &'a Tun,
    gone: Option<io::Error>,
    /// The kernel does not take super-packets.
    refused: Option<io::Error>,
    delivered: u64,
    failed: u64,
}

impl<'a> Outlet<'a> {
    fn new(tun: &'a Tun) -> Self {
        Self { tun, gone: None, refused: None, delivered: 0, failed: 0 }
    }

    /// A full queue or a device that is down costs the packet; waiting would only move the queue in here.
    fn write(&mut self, joined: Joined<'_>, inbox: &[u8]) {
        let Err(error) = write(self.tun, &joined, inbox) else {
            self.delivered += joined.parts.len() as u64;
            return;
        };
        if joined.headers.is_empty() || tun::is_down(&error) || tun::is_gone(&error) {
            self.failed += joined.parts.len() as u64;
        } else {
            for single in joined.singles() {
                let parts = [Part::from_range(&single)];
                let single =
                    Joined { offload: vnet::Header::default(), headers: &[], parts: &parts };
                match write(self.tun, &single, inbox) {
                    Ok(()) => self.delivered += 1,
                    Err(_) => self.failed += 1,
                }
            }
            if tun::is_unknown(&error) {
                self.refused = Some(error);
                return;
            }
        }
        if tun::is_gone(&error) {
            self.gone = Some(error);
        }
    }
}
