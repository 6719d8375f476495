//! The data plane's I/O: one TUN device, one UDP socket a family, and the buffers between them.
//!
//! * All memory is made at the start. Its pages are used as traffic needs them.
//! * A burst is read from the device until there is enough to send, or nothing more. While the socket is full nothing is
//!   read: the device's queue is where packets belong then, and the kernel drops what it cannot hold.
//! * A run that the kernel refuses is sent again one packet at a time; if these pass, again and again, runs are given up. The
//!   same goes for super-packets to the device. No packet is lost by trying.

mod inbound;
mod outbound;

use std::io::{self, IoSlice};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Instant;

use ipnet::IpNet;
use mio::{Interest, Registry, Token};

use super::engine::{Engine, ReplyBuffer, Routes};
use super::merge::{Joined, Kinds, MAX_SEGMENTS, Merger};
use super::offload::{Offload, Offloads};
use super::outbox::{self, Outbox};
use super::table::{Address, Table};
use crate::family::Family;
use crate::sys::tun::Tun;
use crate::sys::udp::{SLOT, UdpPort};
use crate::wire::icmpv6;

/// Bursts moved in each direction in one turn. Most are some 100 KiB and a tenth of a millisecond; the worst, 2,048 datagrams
/// that cannot be joined, are a few milliseconds.
const BURSTS: usize = 4;
/// Messages received in one call.
const SLOTS: usize = 32;
/// Messages received in one call while they are long runs: more would fall out of the processor's cache.
const FEW_SLOTS: usize = 4;
/// Messages of one burst while they are long runs.
const BURST_SLOTS: usize = 16;

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
    demotions: Vec<Demotion>,
    outbox: Outbox,
    /// This socket is full: nothing is read from the device.
    full: Option<Family>,
    /// It may have room again.
    retry: bool,
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
    udp: [Token; 2],
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
            demotions: Vec::new(),
            outbox: Outbox::new(1),
            full: None,
            retry: false,
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

    /// A way does not work: it is not tried again.
    fn give_up(&mut self, offload: Offload, error: io::Error) {
        self.wanted.set(offload, false);
        self.offloads.set(offload, false);
        match offload {
            Offload::Gso => self.outbox.set_most(1),
            _ => self.merger.set_kinds(Kinds { tcp: false, udp: false }),
        }
        self.demotions.push(Demotion { offload, error });
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
        self.demotions.pop()
    }

    /// Registers the descriptors. Any event of `tun` is a reason for [`Plane::tun_is_ready`], any of `udp`, IPv4 and IPv6, for
    /// [`Plane::udp_is_ready`]; then for a [`Plane::turn`].
    ///
    /// # Errors
    /// As `epoll_ctl(2)`.
    pub fn register(&mut self, registry: &Registry, tun: Token, udp: [Token; 2]) -> io::Result<()> {
        registry.register(&mut self.tun, tun, Interest::READABLE)?;
        for (lane, token) in [&mut self.v4, &mut self.v6].into_iter().zip(udp) {
            if let Some(lane) = lane {
                registry.register(&mut lane.udp, token, Interest::READABLE)?;
            }
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
    pub fn udp_is_ready(&mut self, family: Family) {
        self.retry |= self.full == Some(family);
        if let Some(lane) = self.lane(family) {
            lane.ready = true;
        }
    }

    fn lane(&mut self, family: Family) -> Option<&mut Lane> {
        match family {
            Family::V4 => self.v4.as_mut(),
            Family::V6 => self.v6.as_mut(),
        }
    }

    /// A socket is full, or none is any more. Only while one is full do we want to hear of room: else there would be an
    /// event for every packet that has left.
    fn set_full(&mut self, full: Option<Family>) {
        let before = std::mem::replace(&mut self.full, full);
        if before != full {
            before.into_iter().for_each(|family| self.watch_lane(family, Interest::READABLE));
            let both = Interest::READABLE | Interest::WRITABLE;
            full.into_iter().for_each(|family| self.watch_lane(family, both));
        }
    }

    fn watch_lane(&mut self, family: Family, interest: Interest) {
        let Some(Watch { registry, udp, .. }) = &self.watch else { return };
        let (lane, token) = match family {
            Family::V4 => (&mut self.v4, udp[0]),
            Family::V6 => (&mut self.v6, udp[1]),
        };
        if let Some(lane) = lane {
            // fails for descriptors that are not registered only
            let _ = registry.reregister(&mut lane.udp, token, interest);
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
