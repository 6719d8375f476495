//! TUN to UDP.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use super::super::engine::{Outbound, may_be_cut};
use super::super::merge::Joined;
use super::super::offload::Offload;
use super::super::outbox::{self, Run};
use super::super::stats::Reason;
use super::super::{OVERHEAD_V4, OVERHEAD_V6};
use super::{Lane, Plane, Step, TunGone, write};
use crate::family::Family;
use crate::sys::tun;
use crate::sys::udp;
use crate::wire::{ip, vnet};

/// Runs refused one after the other, whose datagrams pass alone, before no more are tried.
const PATIENCE: u32 = 16;

/// Who has been told about a refused run: source and destination.
type Told = Option<(IpAddr, IpAddr)>;

/// What became of datagrams that were sent alone.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Alone {
    /// All have gone.
    Gone,
    /// Some were refused.
    Refused,
    /// The socket is full; the rest waits.
    Full,
}

impl Plane {
    /// One burst.
    pub(super) fn step_outbound(&mut self, now: Instant) -> Result<Step, TunGone> {
        if self.full.is_some() && !std::mem::take(&mut self.retry) {
            return Ok(Step::Blocked);
        }
        if self.outbox.is_empty() {
            self.gather(now)?;
        }
        if self.outbox.is_empty() {
            return Ok(if self.tun_ready { Step::Moved } else { Step::Blocked });
        }
        self.send(now)?;
        Ok(if self.full.is_some() { Step::Blocked } else { Step::Moved })
    }

    /// Reads a burst from the device. The first packet after a rest does not wait for others.
    fn gather(&mut self, now: Instant) -> Result<(), TunGone> {
        let before = if self.tun.has_vnet() { vnet::LEN } else { 0 };
        // packets that are refused take no room, and must not keep us here
        for _ in 0..outbox::MANY {
            if !self.tun_ready || !self.outbox.has_room() {
                break;
            }
            let room = self.outbox.room();
            let len = match self.tun.recv(room) {
                Ok(len) => len,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.tun_ready = false;
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if tun::is_gone(&error) => return Err(TunGone(error)),
                Err(_) => {
                    // this one packet cannot be described to us
                    self.engine.stats.drops.add(Reason::Malformed);
                    continue;
                }
            };
            let offload = match room.first_chunk().filter(|_| before > 0).map(vnet::Header::parse) {
                None => vnet::Header::default(),
                Some(Ok(offload)) if len >= before => offload,
                Some(_) => {
                    self.engine.stats.drops.add(Reason::Malformed);
                    continue;
                }
            };
            match self.engine.outbound(&mut room[before..len], &mut self.reply, now) {
                Outbound::Send { to, len } => {
                    if self.outbox.push(to, before..before + len, &offload).is_err() {
                        self.engine.stats.drops.add(Reason::Malformed);
                    }
                }
                verdict => self.answer(verdict)?,
            }
            if std::mem::take(&mut self.tun_rested) || !self.offloads.batch {
                break;
            }
        }
        Ok(())
    }

    /// Sends what waits, until the socket is full.
    fn send(&mut self, now: Instant) -> Result<(), TunGone> {
        while let Some(first) = self.outbox.waiting().first() {
            let (family, first_is_run) = (Family::of(first.to), first.count > 1);
            let lane = match family {
                Family::V4 => &mut self.v4,
                Family::V6 => &mut self.v6,
            };
            let Some(Lane { udp, .. }) = lane else {
                // a route needs its socket
                self.outbox.done(1);
                continue;
            };
            let mut burst = udp.burst();
            let bytes = self.outbox.bytes();
            let most = if self.offloads.batch { udp::MESSAGES } else { 1 };
            for run in self.outbox.waiting().iter().take(most) {
                let segment = (run.count > 1).then_some(run.segment);
                let parts = self.outbox.parts(run).iter().map(|part| part.of(bytes));
                if Family::of(run.to) != family
                    || !burst.add(SocketAddr::new(run.to, self.port), segment, parts)
                {
                    break;
                }
            }
            match burst.send() {
                Ok(count) => {
                    let gone = self.outbox.waiting().iter().take(count);
                    self.engine.stats.sent += gone.map(|run| u64::from(run.count)).sum::<u64>();
                    if first_is_run {
                        self.refused_runs = 0;
                    }
                    self.outbox.done(count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.set_full(Some(family));
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if first_is_run => match self.send_singly(now)? {
                    Alone::Gone => self.run_refused(error),
                    Alone::Refused => {}
                    Alone::Full => return Ok(()),
                },
                Err(error) => {
                    if !self.refused(&error, now, &mut None)? {
                        return Ok(());
                    }
                }
            }
        }
        self.set_full(None);
        Ok(())
    }

    /// A run was refused, but not the datagrams in it: does the interface take any? That its way carries less, or that there
    /// is none, would have been said of the datagrams as well.
    fn run_refused(&mut self, error: io::Error) {
        if !self.offloads.gso || !(udp::is_not_able(&error) || udp::is_invalid(&error)) {
            return;
        }
        self.refused_runs += 1;
        if self.refused_runs >= PATIENCE {
            self.give_up(Offload::Gso, error);
        }
    }

    /// Sends the datagrams of the first run one by one.
    fn send_singly(&mut self, now: Instant) -> Result<Alone, TunGone> {
        let Some(count) = self.outbox.waiting().first().map(|run| run.count) else {
            return Ok(Alone::Gone);
        };
        let (mut result, mut told, mut done) = (Alone::Gone, None, 0);
        while done < count {
            let Some(alone) = self.outbox.first_datagram() else { break };
            match self.send_alone(&alone) {
                Ok(()) => {
                    self.engine.stats.sent += 1;
                    self.outbox.done_datagram();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.set_full(Some(Family::of(alone.to)));
                    return Ok(Alone::Full);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    result = Alone::Refused;
                    if !self.refused(&error, now, &mut told)? {
                        return Ok(Alone::Full);
                    }
                }
            }
            done += 1;
        }
        Ok(result)
    }

    fn send_alone(&mut self, alone: &Run) -> io::Result<()> {
        let lane = if alone.to.is_ipv4() { &mut self.v4 } else { &mut self.v6 };
        let Some(Lane { udp, .. }) = lane else { return Ok(()) };
        let bytes = self.outbox.bytes();
        let parts = self.outbox.parts(alone).iter().map(|part| part.of(bytes));
        let mut burst = udp.burst();
        burst.add(SocketAddr::new(alone.to, self.port), None, parts);
        burst.send().map(drop)
    }

    /// The kernel refused the first datagram that waits, which was on its own: done with it, and its sender told unless it is
    /// the one that was `told` last. `false` when it still waits, because the socket is full.
    fn refused(
        &mut self,
        error: &io::Error,
        now: Instant,
        told: &mut Told,
    ) -> Result<bool, TunGone> {
        let Some(alone) = self.outbox.first_datagram() else { return Ok(true) };
        // headers are in one piece, and all that is looked at
        let front = self.outbox.parts(&alone)[0].of(self.outbox.bytes());
        let is_too_long = udp::is_too_long(error);
        if is_too_long && may_be_cut(front) {
            return Ok(self.send_in_fragments(&alone));
        }
        let ends = ip::Packet::front(front).ok().map(|front| (front.source(), front.destination()));
        let is_news = ends != std::mem::replace(told, ends);
        let mut verdict = Outbound::Drop;
        if is_too_long && is_news {
            let (lane, port, mtu) =
                (if alone.to.is_ipv4() { &self.v4 } else { &self.v6 }, self.port, self.mtu);
            let room = || room_on_the_way(lane.as_ref(), SocketAddr::new(alone.to, port), mtu);
            verdict = self.engine.too_big(front, room, &mut self.reply, now);
        } else if is_too_long {
            self.engine.stats.drops.add(Reason::TooBig);
        } else {
            self.engine.stats.drops.add(Reason::SendFailed);
            if is_news && udp::is_unreachable(error) {
                verdict = self.engine.unreachable(front, &mut self.reply, now);
            }
        }
        self.outbox.done_datagram();
        self.answer(verdict)?;
        Ok(true)
    }

    /// Sends the first packet that waits, which may not be refused, in a datagram that the kernel cuts. `false` when it still
    /// waits, because the socket is full.
    fn send_in_fragments(&mut self, alone: &Run) -> bool {
        let family = Family::of(alone.to);
        let allow = |plane: &mut Self, allowed| {
            if let Some(lane) = plane.lane(family) {
                lane.udp.allow_fragments(allowed);
            }
        };
        allow(self, true);
        let result = self.send_alone(alone);
        allow(self, false);
        match result {
            Ok(()) => self.engine.stats.sent += 1,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.set_full(Some(family));
                return false;
            }
            Err(_) => self.engine.stats.drops.add(Reason::SendFailed),
        }
        self.outbox.done_datagram();
        true
    }

    /// Writes the reply that the engine made, if it did.
    fn answer(&mut self, verdict: Outbound) -> Result<(), TunGone> {
        let Outbound::Reply(len) = verdict else { return Ok(()) };
        let reply =
            Joined { offload: vnet::Header::default(), headers: &self.reply[..len], parts: &[] };
        match write(&self.tun, &reply, &[]) {
            Ok(()) => self.engine.stats.replies += 1,
            Err(error) => {
                self.engine.stats.drops.add(Reason::DeliverFailed);
                if tun::is_gone(&error) {
                    return Err(TunGone(error));
                }
            }
        }
        Ok(())
    }
}

/// The longest packet in bytes that fits into a datagram on its way to a host; the device's `mtu` if nobody knows better.
fn room_on_the_way(lane: Option<&Lane>, to: SocketAddr, mtu: u32) -> u16 {
    let overhead = if to.is_ipv4() { OVERHEAD_V4 } else { OVERHEAD_V6 };
    let known = lane.and_then(|lane| lane.udp.path_mtu(to).ok());
    let room = known.map_or(mtu, |known| known.saturating_sub(overhead)).min(mtu);
    u16::try_from(room).unwrap_or(u16::MAX)
}
