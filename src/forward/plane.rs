//! The data plane's I/O: one TUN device, one UDP socket a family, and the buffers between them.
//!
//! * All memory is made at the start. Its pages are used as traffic needs them.
//! * A burst is read from the device until there is enough to send, or nothing more. While the socket is full nothing is
//!   read: the device's queue is where packets belong then, and the kernel drops what it cannot hold.
//! * A burst that the kernel refuses is sent again one packet at a time, and the way of sending is given up if that is how
//!   the refusal reads. No packet is lost by trying.

use std::io::{self, IoSlice};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Instant;

use ipnet::IpNet;
use mio::{Interest, Registry, Token};

use super::engine::{Engine, Outbound, ReplyBuffer, Routes};
use super::merge::{Joined, Kinds, MAX_SEGMENTS, Merger, Part};
use super::offload::{Offload, Offloads};
use super::outbox::{self, Outbox, Run};
use super::stats::Reason;
use super::table::{Address, Table};
use super::{OVERHEAD_V4, OVERHEAD_V6};
use crate::sys::tun::{self, Tun};
use crate::sys::udp::{self, Received, SLOT, UdpPort};
use crate::wire::{icmpv6, vnet};

/// Bursts moved in each direction in one turn. They are up to half a megabyte each, so that a turn takes a few
/// milliseconds at most.
const BURSTS: usize = 4;
/// Messages received in one call.
const SLOTS: usize = 32;
/// Messages received in one call while they are long runs: more would fall out of the processor's cache.
const FEW_SLOTS: usize = 4;
/// Messages of one burst while they are long runs.
const BURST_SLOTS: usize = 16;
/// Bytes from which on a message counts as a long run.
const LONG: usize = 16 * 1024;
/// Runs refused one after the other, for a reason that may be the one way's, before no more are tried.
const PATIENCE: u32 = 16;

/// What a turn left behind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Turn {
    /// Nothing to do before the next event.
    Idle,
    /// The budget ran out; no event will tell that there is more.
    More,
}

/// Somebody deleted the TUN device.
#[derive(Debug)]
pub struct TunGone(pub io::Error);

/// A way of moving packets was given up.
#[derive(Debug)]
pub struct Demotion {
    /// Which.
    pub offload: Offload,
    /// Why: what the kernel said to it.
    pub error: io::Error,
}

/// The owner of device and sockets.
#[derive(Debug)]
pub struct Plane {
    /// The decisions and the counters.
    pub engine: Engine,
    tun: Tun,
    v4: Option<Lane>,
    v6: Option<Lane>,
    template: String,
    port: u16,
    mtu: u32,
    wanted: Offloads,
    offloads: Offloads,
    demotions: [Option<Demotion>; 2],
    outbox: Outbox,
    /// The socket is full: nothing is read from the device.
    full: bool,
    tun_ready: bool,
    /// There was nothing for a while: the first packet does not wait for others.
    tun_rested: bool,
    refused_runs: u32,
    inbox: Box<[u8]>,
    merger: Merger,
    reply: ReplyBuffer,
    watch: Option<Watch>,
}

/// Who is told of events.
#[derive(Debug)]
struct Watch {
    registry: Registry,
    tun: Token,
    udp: Token,
}

/// One family's way to other hosts.
#[derive(Debug)]
struct Lane {
    udp: UdpPort,
    ready: bool,
    /// How many messages to ask for: many only if many wait, and are short.
    most: usize,
    /// Were the last messages long runs?
    is_long: bool,
}

impl Lane {
    /// Messages of one burst.
    fn limit(&self) -> usize {
        if self.is_long { BURST_SLOTS } else { SLOTS }
    }
}

/// What one step found.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Moved,
    Blocked,
}

/// What a plane is to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Settings {
    /// Where every host listens.
    pub port: u16,
    /// The device's MTU in bytes: what hosts are told when the kernel has no better idea of the way.
    pub mtu: u32,
    /// What to use as far as the kernel has it.
    pub offloads: Offloads,
    /// As for [`Engine::new`].
    pub check_source: bool,
    /// IPv4, if it is to be carried.
    pub v4: Option<Side<Ipv4Addr>>,
    /// IPv6, if it is to be carried.
    pub v6: Option<Side<Ipv6Addr>>,
}

/// What a plane is to do for one address family.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Side<A> {
    /// The network that the subnets are cut from.
    pub network: A,
    /// Its prefix length.
    pub prefix_len: u8,
    /// Prefix length of nearly every subnet.
    pub subnet_len: u8,
    /// This host's address on the underlay.
    pub local: A,
}

impl<A: Address> Side<A> {
    fn table(&self) -> Table<A> {
        Table::new(self.network, self.prefix_len, self.subnet_len)
    }
}

impl Plane {
    /// Opens the device and the sockets. What the kernel lacks of the offloads is left out.
    ///
    /// # Errors
    /// The text says what failed and what to do.
    pub fn open(template: &str, settings: &Settings) -> io::Result<Self> {
        let Settings { port, mtu, offloads, check_source, v4, v6 } = settings;
        let tun = Tun::open(template, offloads.need_vnet())?;
        let lane = |local: IpAddr| {
            let udp = UdpPort::bind(SocketAddr::new(local, *port))?;
            io::Result::Ok(Lane { udp, ready: true, most: FEW_SLOTS, is_long: false })
        };
        let routes = Routes { v4: v4.as_ref().map(Side::table), v6: v6.as_ref().map(Side::table) };
        let mut plane = Self {
            engine: Engine::new(routes, *check_source),
            tun,
            v4: v4.map(|side| lane(side.local.into())).transpose()?,
            v6: v6.map(|side| lane(side.local.into())).transpose()?,
            template: template.to_owned(),
            port: *port,
            mtu: *mtu,
            wanted: *offloads,
            offloads: *offloads,
            demotions: [None, None],
            outbox: Outbox::new(1),
            full: false,
            tun_ready: true,
            tun_rested: true,
            refused_runs: 0,
            inbox: vec![0; SLOTS * SLOT].into(),
            merger: Merger::new(Kinds { tcp: false, udp: false }),
            reply: [0; icmpv6::MAX_ERROR_LEN],
            watch: None,
        };
        plane.probe();
        Ok(plane)
    }

    /// Finds out what of the wanted ways the kernel has, and uses it.
    fn probe(&mut self) {
        let Offloads { tso, uso, merge, gso, gro, batch } = self.wanted;
        let has_vnet = self.tun.has_vnet();
        let offers = |tcp, udp| has_vnet && (tcp || udp) && self.tun.offer(tcp, udp).is_ok();
        let (tso, uso) = match (tso, uso) {
            (true, true) if offers(true, true) => (true, true),
            (true, _) if offers(true, false) => (true, false),
            (_, true) if offers(false, true) => (false, true),
            _ => (false, false),
        };
        // a kernel that cuts no UDP super-packets takes none either
        let takes_udp = has_vnet && (uso || (self.tun.offer(tso, true).is_ok()));
        if !uso && has_vnet {
            // the question was an offer
            let _ = self.tun.offer(tso, false);
        }
        let merge = merge && has_vnet;
        self.merger.set_kinds(Kinds { tcp: merge, udp: merge && takes_udp });
        let mut lanes = self.v4.iter().chain(&self.v6);
        let gso = gso && lanes.clone().all(|lane| lane.udp.has_gso());
        let gro = lanes.all(|lane| lane.udp.set_gro(gro) && gro);
        self.offloads = Offloads { tso, uso, merge, gso, gro, batch };
        self.outbox.set_most(if gso { outbox::MAX_SEGMENTS } else { 1 });
        self.refused_runs = 0;
    }

    /// The TUN device.
    pub fn tun(&self) -> &Tun {
        &self.tun
    }

    /// The ways of moving packets that are in use.
    pub fn offloads(&self) -> Offloads {
        self.offloads
    }

    /// A way that was given up since the last call.
    pub fn poll_demotion(&mut self) -> Option<Demotion> {
        self.demotions.iter_mut().find_map(Option::take)
    }

    /// Registers the descriptors. Any event of `tun` is a reason for [`Plane::tun_is_ready`], any of `udp` for
    /// [`Plane::udp_is_ready`]; then for a [`Plane::turn`].
    ///
    /// # Errors
    /// As `epoll_ctl(2)`.
    pub fn register(&mut self, registry: &Registry, tun: Token, udp: Token) -> io::Result<()> {
        registry.register(&mut self.tun, tun, Interest::READABLE)?;
        for lane in self.v4.iter_mut().chain(&mut self.v6) {
            registry.register(&mut lane.udp, udp, Interest::READABLE)?;
        }
        self.watch = Some(Watch { registry: registry.try_clone()?, tun, udp });
        Ok(())
    }

    /// The device may have packets for us.
    pub fn tun_is_ready(&mut self) {
        self.tun_ready = true;
        self.tun_rested = true;
    }

    /// A socket may have packets for us, or room for ours.
    pub fn udp_is_ready(&mut self) {
        self.set_full(false);
        for lane in self.v4.iter_mut().chain(&mut self.v6) {
            lane.ready = true;
        }
    }

    /// The socket is full, or it may have room again. Only while it is full do we want to hear of room: else there would
    /// be an event for every packet that has left.
    fn set_full(&mut self, full: bool) {
        if std::mem::replace(&mut self.full, full) == full {
            return;
        }
        let Some(Watch { registry, udp, .. }) = &self.watch else { return };
        let interest =
            if full { Interest::READABLE | Interest::WRITABLE } else { Interest::READABLE };
        for lane in self.v4.iter_mut().chain(&mut self.v6) {
            // fails for descriptors that are not registered only
            let _ = registry.reregister(&mut lane.udp, *udp, interest);
        }
    }

    /// Makes a new device in the place of one that is gone. The routes stay.
    ///
    /// # Errors
    /// As [`Plane::open`].
    pub fn reopen_tun(&mut self) -> io::Result<()> {
        let mut tun = Tun::open(&self.template, self.wanted.need_vnet())?;
        if let Some(Watch { registry, tun: token, .. }) = &self.watch {
            // The kernel forgets a descriptor when it is closed, but mio wants to be told.
            let _ = registry.deregister(&mut self.tun);
            registry.register(&mut tun, *token, Interest::READABLE)?;
        }
        self.tun = tun;
        self.tun_ready = true;
        self.probe();
        Ok(())
    }

    /// Sends packets for `subnet` to `hop` from now on. `false` for a version that is not carried here.
    pub fn set_route(&mut self, subnet: IpNet, hop: IpAddr) -> bool {
        self.engine.routes.set(subnet, hop)
    }

    /// Sends packets for `subnet` nowhere from now on.
    pub fn del_route(&mut self, subnet: IpNet) {
        self.engine.routes.remove(subnet);
    }

    /// Moves packets in both directions until both sides are drained or the budget is used up.
    ///
    /// # Errors
    /// The TUN device is gone. Everything else that can go wrong costs a packet and is counted.
    pub fn turn(&mut self, now: Instant) -> Result<Turn, TunGone> {
        let bursts = if self.offloads.batch { BURSTS } else { BURSTS * 16 };
        for _ in 0..bursts {
            let outbound = self.step_outbound(now)?;
            let v4 = self.step_inbound(Family::V4)?;
            let v6 = self.step_inbound(Family::V6)?;
            if [outbound, v4, v6] == [Step::Blocked; 3] {
                return Ok(Turn::Idle);
            }
        }
        Ok(Turn::More)
    }

    /// TUN to UDP: one burst.
    fn step_outbound(&mut self, now: Instant) -> Result<Step, TunGone> {
        if self.full {
            return Ok(Step::Blocked);
        }
        if self.outbox.is_empty() {
            self.gather(now)?;
        }
        if self.outbox.is_empty() {
            return Ok(if self.tun_ready { Step::Moved } else { Step::Blocked });
        }
        self.send(now)?;
        Ok(if self.full { Step::Blocked } else { Step::Moved })
    }

    /// Reads a burst from the device.
    fn gather(&mut self, now: Instant) -> Result<(), TunGone> {
        let before = if self.tun.has_vnet() { vnet::LEN } else { 0 };
        while self.tun_ready && self.outbox.has_room() {
            let room = self.outbox.room();
            let len = match self.tun.recv(room) {
                Ok(len) => len,
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => {
                        self.tun_ready = false;
                        return Ok(());
                    }
                    io::ErrorKind::Interrupted => continue,
                    // neither "nothing there" nor "interrupted": the device was taken from us
                    _ => return Err(TunGone(error)),
                },
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
                return Ok(());
            }
        }
        Ok(())
    }

    /// Sends what waits, until the socket is full.
    fn send(&mut self, now: Instant) -> Result<(), TunGone> {
        while let Some(first) = self.outbox.waiting().first() {
            let is_v4 = first.to.is_ipv4();
            let first_is_run = first.count > 1;
            let lane = if is_v4 { &mut self.v4 } else { &mut self.v6 };
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
                if run.to.is_ipv4() != is_v4
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
                    self.set_full(true);
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if first_is_run => {
                    self.run_refused(error);
                    if !self.send_singly(now)? {
                        return Ok(());
                    }
                }
                Err(error) => self.refused(&error, now, true)?,
            }
        }
        Ok(())
    }

    /// Sends the datagrams of the first run one by one. `false` when the socket is full meanwhile.
    fn send_singly(&mut self, now: Instant) -> Result<bool, TunGone> {
        let Some(count) = self.outbox.waiting().first().map(|run| run.count) else {
            return Ok(true);
        };
        // its sender hears of the first one that is too long
        let mut tell = true;
        for _ in 0..count {
            match self.send_first() {
                Ok(()) => {
                    self.engine.stats.sent += 1;
                    self.outbox.done_datagram();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.set_full(true);
                    return Ok(false);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.refused(&error, now, tell)?;
                    tell = false;
                }
            }
        }
        Ok(true)
    }

    /// Sends the first datagram that waits, alone.
    fn send_first(&mut self) -> io::Result<()> {
        let Some(alone) = self.outbox.first_datagram() else { return Ok(()) };
        let lane = if alone.to.is_ipv4() { &mut self.v4 } else { &mut self.v6 };
        let Some(Lane { udp, .. }) = lane else { return Ok(()) };
        let bytes = self.outbox.bytes();
        let parts = self.outbox.parts(&alone).iter().map(|part| part.of(bytes));
        let mut burst = udp.burst();
        burst.add(SocketAddr::new(alone.to, self.port), None, parts);
        burst.send().map(drop)
    }

    /// The kernel refused the first datagram that waits, which is on its own: done with it.
    fn refused(&mut self, error: &io::Error, now: Instant, tell: bool) -> Result<(), TunGone> {
        let Some(alone) = self.outbox.first_datagram() else { return Ok(()) };
        // headers are in one piece, and all that is looked at
        let front = self.outbox.parts(&alone)[0].of(self.outbox.bytes());
        let mut verdict = Outbound::Drop;
        if udp::is_too_long(error) {
            let mtu = self.room_on_the_way(&alone);
            match self.engine.too_big(front, mtu, &mut self.reply, now) {
                Some(answer) => verdict = answer,
                None if self.send_in_fragments(&alone) => self.engine.stats.sent += 1,
                None => self.engine.stats.drops.add(Reason::TooBig),
            }
        } else {
            self.engine.stats.drops.add(Reason::SendFailed);
            if udp::is_unreachable(error) && tell {
                verdict = self.engine.unreachable(front, &mut self.reply, now);
            }
        }
        self.outbox.done_datagram();
        if tell { self.answer(verdict) } else { Ok(()) }
    }

    /// The longest packet in bytes that fits into a datagram to the host of `run`.
    fn room_on_the_way(&self, run: &Run) -> u16 {
        let (lane, overhead) = match run.to {
            IpAddr::V4(_) => (&self.v4, OVERHEAD_V4),
            IpAddr::V6(_) => (&self.v6, OVERHEAD_V6),
        };
        let to = SocketAddr::new(run.to, self.port);
        let mtu = lane.as_ref().and_then(|lane| lane.udp.path_mtu(to).ok());
        let room = mtu.map_or(self.mtu, |mtu| mtu.saturating_sub(overhead)).min(self.mtu);
        u16::try_from(room).unwrap_or(u16::MAX)
    }

    /// Sends a packet that may not be refused, in a datagram that the kernel cuts.
    fn send_in_fragments(&mut self, alone: &Run) -> bool {
        let lane = if alone.to.is_ipv4() { &mut self.v4 } else { &mut self.v6 };
        let Some(Lane { udp, .. }) = lane else { return false };
        udp.allow_fragments(true);
        let bytes = self.outbox.bytes();
        let parts = self.outbox.parts(alone).iter().map(|part| part.of(bytes));
        let mut burst = udp.burst();
        burst.add(SocketAddr::new(alone.to, self.port), None, parts);
        let sent = burst.send().is_ok();
        udp.allow_fragments(false);
        sent
    }

    /// The kernel refused a run. That may be the host's way, which carries less, or the interface.
    fn run_refused(&mut self, error: io::Error) {
        self.refused_runs += 1;
        if udp::is_not_able(&error) || self.refused_runs >= PATIENCE {
            self.offloads.gso = false;
            self.outbox.set_most(1);
            self.demotions[0] = Some(Demotion { offload: Offload::Gso, error });
        }
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

    /// UDP to TUN: one burst.
    ///
    /// Long messages are received a few at a time, and what they hold is delivered at once, but for flows that may go on
    /// in the next: a super-packet does not end where a call ends.
    fn step_inbound(&mut self, family: Family) -> Result<Step, TunGone> {
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
            self.offloads.merge = false;
            self.merger.set_kinds(Kinds { tcp: false, udp: false });
            self.demotions[1] = Some(Demotion { offload: Offload::Merge, error });
        }
        match gone {
            Some(error) => Err(TunGone(error)),
            None if used > 0 => Ok(Step::Moved),
            None => Ok(if self.lane_is_ready(family) { Step::Moved } else { Step::Blocked }),
        }
    }

    fn lane_is_ready(&self, family: Family) -> bool {
        let lane = match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        };
        lane.as_ref().is_some_and(|lane| lane.ready)
    }
}

#[derive(Clone, Copy)]
enum Family {
    V4,
    V6,
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

/// Writes one packet, with what goes before it if the device wants that.
#[inline]
fn write(tun: &Tun, packet: &Joined<'_>, inbox: &[u8]) -> io::Result<()> {
    let offload = packet.offload.to_bytes();
    let mut slices = [IoSlice::new(&[]); 2 + MAX_SEGMENTS];
    let mut used = 0;
    if tun.has_vnet() {
        slices[0] = IoSlice::new(&offload);
        used = 1;
    }
    if !packet.headers.is_empty() {
        slices[used] = IoSlice::new(packet.headers);
        used += 1;
    }
    for part in packet.parts {
        slices[used] = IoSlice::new(part.of(inbox));
        used += 1;
    }
    tun.send(&slices[..used])
}
