//! The thin owner of the data plane's descriptors: moves packets between them as [`Engine`] decides.
//!
//! The loop calls [`Plane::turn`] whenever either descriptor has something to say (edge-triggered), and again after its
//! other duties while a turn says [`Turn::More`]. All memory is there from the start.

use std::io;
use std::net::{SocketAddr, SocketAddrV4};
use std::time::Instant;

use ipnet::IpNet;
use mio::{Interest, Registry, Token};

use super::{Engine, Outbound, Reason, ReplyBuffer};
use crate::sys::tun::{self, Tun};
use crate::sys::udp::{self, UdpPort};
use crate::wire::{icmp, ipv4};

/// Packets moved from each side in one turn, at most: the loop's other work waits no longer than that takes.
const BUDGET: usize = 128;

/// Is there more to move?
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Turn {
    /// No: wait for the next readiness event.
    Idle,
    /// The budget ran out first: come back without waiting for an event.
    More,
}

/// The TUN device is gone, because somebody deleted it: open another and hand it to [`Plane::replace_tun`].
#[derive(Debug)]
pub struct TunGone(pub io::Error);

/// The running data plane.
#[derive(Debug)]
pub struct Plane {
    /// The decisions and their counters.
    pub engine: Engine,
    tun: Tun,
    udp: UdpPort,
    /// Longest packet in bytes that peers are promised to carry, for telling senders.
    mtu: u16,
    /// The packet under way to another host. It stays here while the socket is full.
    outbound: Box<[u8]>,
    /// Where the packet in `outbound` waits to go, and its length.
    waiting: Option<(SocketAddrV4, usize)>,
    inbound: Box<[u8]>,
    reply: ReplyBuffer,
}

/// What one attempt to move a packet came to.
enum Step {
    /// One packet was moved or dropped.
    Moved,
    /// Nothing to do before the next readiness event.
    Blocked,
}

impl Plane {
    /// Takes over both descriptors; `mtu` is the TUN device's, in bytes.
    pub fn new(engine: Engine, tun: Tun, udp: UdpPort, mtu: u32) -> Self {
        Self {
            engine,
            tun,
            udp,
            mtu: u16::try_from(mtu).unwrap_or(u16::MAX),
            outbound: vec![0; ipv4::MAX_LEN].into(),
            waiting: None,
            inbound: vec![0; ipv4::MAX_LEN].into(),
            reply: [0; icmp::MAX_ERROR_LEN],
        }
    }

    /// The TUN device.
    pub fn tun(&self) -> &Tun {
        &self.tun
    }

    /// Registers both descriptors. Any event of either is a reason for a [`Plane::turn`].
    ///
    /// # Errors
    /// As `epoll_ctl(2)`.
    pub fn register(&mut self, registry: &Registry, tun: Token, udp: Token) -> io::Result<()> {
        registry.register(&mut self.tun, tun, Interest::READABLE)?;
        registry.register(&mut self.udp, udp, Interest::READABLE | Interest::WRITABLE)
    }

    /// Puts a new device in the place of one that is gone. The routes stay.
    ///
    /// # Errors
    /// As `epoll_ctl(2)`.
    pub fn replace_tun(
        &mut self,
        mut tun: Tun,
        registry: &Registry,
        token: Token,
    ) -> io::Result<()> {
        // The kernel forgets a descriptor when it is closed, but mio wants to be told.
        let _ = registry.deregister(&mut self.tun);
        registry.register(&mut tun, token, Interest::READABLE)?;
        self.tun = tun;
        Ok(())
    }

    /// Sends packets for `subnet` to `hop` from now on. Only IPv4 is carried; other pairs are not taken and give `false`.
    pub fn set_route(&mut self, subnet: IpNet, hop: SocketAddr) -> bool {
        let (IpNet::V4(subnet), SocketAddr::V4(hop)) = (subnet, hop) else {
            return false;
        };
        self.engine.table.set(subnet, hop);
        true
    }

    /// Sends packets for `subnet` nowhere from now on.
    pub fn del_route(&mut self, subnet: IpNet) {
        if let IpNet::V4(subnet) = subnet {
            self.engine.table.remove(subnet);
        }
    }

    /// Moves packets in both directions until both sides are drained or the budget is used up.
    ///
    /// # Errors
    /// The TUN device is gone. Everything else that can go wrong costs a packet and is counted.
    pub fn turn(&mut self, now: Instant) -> Result<Turn, TunGone> {
        let (mut from_tun, mut from_udp) = (Step::Moved, Step::Moved);
        for _ in 0..BUDGET {
            if let Step::Moved = from_tun {
                from_tun = self.step_outbound(now)?;
            }
            if let Step::Moved = from_udp {
                from_udp = self.step_inbound()?;
            }
            if let (Step::Blocked, Step::Blocked) = (&from_tun, &from_udp) {
                return Ok(Turn::Idle);
            }
        }
        Ok(Turn::More)
    }

    /// TUN to UDP. While a packet waits for room in the socket, no other is read: the device's queue is where packets
    /// belong then, and the kernel drops what it cannot hold.
    fn step_outbound(&mut self, now: Instant) -> Result<Step, TunGone> {
        if let Some((to, len)) = self.waiting.take() {
            return self.send(to, len, now);
        }
        let len = match self.tun.recv(&mut self.outbound) {
            Ok(len) => len,
            Err(error) => return blocked_or(error),
        };
        match self.engine.outbound(&mut self.outbound[..len], &mut self.reply, now) {
            Outbound::Send { to, len } => self.send(to, len, now),
            verdict => self.answer(verdict),
        }
    }

    fn send(&mut self, to: SocketAddrV4, len: usize, now: Instant) -> Result<Step, TunGone> {
        match self.udp.send(&self.outbound[..len], to) {
            Ok(()) => self.engine.stats.sent += 1,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.waiting = Some((to, len));
                return Ok(Step::Blocked);
            }
            Err(error) if udp::is_too_long(&error) => {
                let verdict =
                    self.engine.too_big(&self.outbound[..len], self.mtu, &mut self.reply, now);
                return self.answer(verdict);
            }
            Err(_) => self.engine.stats.drops.add(Reason::SendFailed),
        }
        Ok(Step::Moved)
    }

    /// Writes the reply that the engine made, if it did.
    fn answer(&mut self, verdict: Outbound) -> Result<Step, TunGone> {
        if let Outbound::Reply(len) = verdict {
            match self.tun.send(&self.reply[..len]) {
                Ok(()) => self.engine.stats.replies += 1,
                Err(error) => return self.not_delivered(error),
            }
        }
        Ok(Step::Moved)
    }

    /// UDP to TUN.
    fn step_inbound(&mut self) -> Result<Step, TunGone> {
        let len = match self.udp.recv(&mut self.inbound) {
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Step::Blocked),
            Err(_) => {
                self.engine.stats.drops.add(Reason::ReceiveFailed);
                return Ok(Step::Moved);
            }
        };
        if let Some(len) = self.engine.inbound(&mut self.inbound[..len]) {
            match self.tun.send(&self.inbound[..len]) {
                Ok(()) => self.engine.stats.delivered += 1,
                Err(error) => return self.not_delivered(error),
            }
        }
        Ok(Step::Moved)
    }

    /// A full queue or a device that is down costs the packet; waiting would only move the queue in here.
    fn not_delivered(&mut self, error: io::Error) -> Result<Step, TunGone> {
        self.engine.stats.drops.add(Reason::DeliverFailed);
        if tun::is_gone(&error) { Err(TunGone(error)) } else { Ok(Step::Moved) }
    }
}

/// Sorts the errors of a read from the TUN device. One that is neither "nothing there" nor "interrupted" means that there
/// is nothing more to be had from this descriptor: the device was taken from us.
fn blocked_or(error: io::Error) -> Result<Step, TunGone> {
    match error.kind() {
        io::ErrorKind::WouldBlock => Ok(Step::Blocked),
        io::ErrorKind::Interrupted => Ok(Step::Moved),
        _ => Err(TunGone(error)),
    }
}
