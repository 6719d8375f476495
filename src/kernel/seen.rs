//! What the kernel says it has: messages of `rtnetlink(7)` decoded as far as we care. Anything odd is `None`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::object::{IfName, Mac};
use crate::netlink::{Message, attributes, u16_at, u32_at};

/// Message types of `linux/rtnetlink.h`; a NEW, its DEL, and its GET lie side by side.
pub(super) mod kind {
    pub(in super::super) const NEWLINK: u16 = 16;
    pub(in super::super) const DELLINK: u16 = 17;
    pub(in super::super) const GETLINK: u16 = 18;
    pub(in super::super) const SETLINK: u16 = 19;
    pub(in super::super) const NEWADDR: u16 = 20;
    pub(in super::super) const DELADDR: u16 = 21;
    pub(in super::super) const GETADDR: u16 = 22;
    pub(in super::super) const NEWROUTE: u16 = 24;
    pub(in super::super) const DELROUTE: u16 = 25;
    pub(in super::super) const GETROUTE: u16 = 26;
    pub(in super::super) const NEWNEIGH: u16 = 28;
    pub(in super::super) const DELNEIGH: u16 = 29;
    pub(in super::super) const GETNEIGH: u16 = 30;
}

pub(super) const AF_INET: u8 = 2;
pub(super) const AF_BRIDGE: u8 = 7;
pub(super) const AF_INET6: u8 = 10;
/// `NUD_PERMANENT`.
pub(super) const PERMANENT: u16 = 0x80;
/// `NTF_SELF`.
pub(super) const SELF: u8 = 2;
/// `RT_TABLE_MAIN`.
pub(super) const MAIN: u32 = 254;
/// `RTN_UNICAST`.
pub(super) const UNICAST: u8 = 1;
/// `RTN_BLACKHOLE`.
pub(super) const BLACKHOLE: u8 = 6;
/// `RTPROT_KERNEL`.
pub(super) const PROTO_KERNEL: u8 = 2;
pub(super) const PROTO_BOOT: u8 = 3;
/// `RTNH_F_ONLINK`.
pub(super) const ONLINK: u32 = 4;
/// `IFF_UP`.
pub(super) const UP: u32 = 1;

/// A VXLAN device's parameters, as far as they decide whether it can be used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct SeenVxlan {
    pub(super) vni: u32,
    pub(super) port: u16,
    pub(super) lower: u32,
    pub(super) local: Option<IpAddr>,
    pub(super) learning: bool,
    pub(super) l2miss: bool,
    pub(super) gbp: bool,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct SeenLink {
    pub(super) index: u32,
    pub(super) name: IfName,
    pub(super) up: bool,
    pub(super) loopback: bool,
    pub(super) mtu: u32,
    pub(super) mac: Option<Mac>,
    pub(super) kind: Box<str>,
    pub(super) vxlan: Option<Box<SeenVxlan>>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct SeenAddress {
    pub(super) index: u32,
    pub(super) addr: IpNet,
    /// `IFA_F_*`.
    pub(super) flags: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct SeenRoute {
    pub(super) dst: IpNet,
    pub(super) via: Option<IpAddr>,
    /// A next hop of the other family (`RTA_VIA`) or several next hops.
    pub(super) odd: bool,
    pub(super) oif: u32,
    pub(super) src: Option<IpAddr>,
    pub(super) metric: u32,
    pub(super) table: u32,
    pub(super) protocol: u8,
    pub(super) kind: u8,
    /// `RTNH_F_*` and `RTM_F_*`.
    pub(super) flags: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct SeenNeighbour {
    pub(super) index: u32,
    pub(super) ip: IpAddr,
    pub(super) mac: Option<Mac>,
    pub(super) state: u16,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct SeenFdb {
    pub(super) index: u32,
    pub(super) mac: Mac,
    pub(super) dst: Option<IpAddr>,
    pub(super) state: u16,
    pub(super) flags: u8,
}

/// One object that the kernel has, or had.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Seen {
    Link(SeenLink),
    Address(SeenAddress),
    Route(SeenRoute),
    Neighbour(SeenNeighbour),
    Fdb(SeenFdb),
}

/// Decodes a NEW or DEL message.
pub(super) fn decode(message: &Message<'_>) -> Option<Seen> {
    let payload = message.payload;
    match message.kind {
        kind::NEWLINK | kind::DELLINK => link(payload).map(Seen::Link),
        kind::NEWADDR | kind::DELADDR => address(payload).map(Seen::Address),
        kind::NEWROUTE | kind::DELROUTE => route(payload).map(Seen::Route),
        kind::NEWNEIGH | kind::DELNEIGH if payload.first() == Some(&AF_BRIDGE) => {
            fdb(payload).map(Seen::Fdb)
        }
        kind::NEWNEIGH | kind::DELNEIGH => neighbour(payload).map(Seen::Neighbour),
        _ => None,
    }
}

/// `struct ifinfomsg` is 16 bytes.
fn link(payload: &[u8]) -> Option<SeenLink> {
    const IFLA_ADDRESS: u16 = 1;
    const IFLA_IFNAME: u16 = 3;
    const IFLA_MTU: u16 = 4;
    const IFLA_LINKINFO: u16 = 18;
    const LOOPBACK: u32 = 8;
    // the bridge's own notifications about its ports have the same type
    if *payload.first()? == AF_BRIDGE {
        return None;
    }
    let flags = u32_at(payload, 8)?;
    let (mut name, mut mtu, mut mac, mut kind, mut vxlan) = (None, 0, None, "", None);
    for (attribute, value) in attributes(payload.get(16..)?) {
        match attribute {
            IFLA_IFNAME => name = IfName::new(text(value)?),
            IFLA_MTU => mtu = u32_at(value, 0)?,
            IFLA_ADDRESS => mac = value.try_into().ok().map(Mac),
            IFLA_LINKINFO => (kind, vxlan) = link_info(value)?,
            _ => {}
        }
    }
    Some(SeenLink {
        index: u32_at(payload, 4)?,
        name: name?,
        up: flags & UP != 0,
        loopback: flags & LOOPBACK != 0,
        mtu,
        mac,
        kind: kind.into(),
        vxlan: vxlan.map(Box::new),
    })
}

fn link_info(info: &[u8]) -> Option<(&str, Option<SeenVxlan>)> {
    const INFO_KIND: u16 = 1;
    const INFO_DATA: u16 = 2;
    let (mut kind, mut data) = ("", None);
    for (attribute, value) in attributes(info) {
        match attribute {
            INFO_KIND => kind = text(value)?,
            INFO_DATA => data = Some(value),
            _ => {}
        }
    }
    let vxlan = match (kind, data) {
        ("vxlan", Some(data)) => Some(vxlan(data)?),
        _ => None,
    };
    Some((kind, vxlan))
}

/// `IFLA_VXLAN_*` of `linux/if_link.h`.
fn vxlan(data: &[u8]) -> Option<SeenVxlan> {
    let mut seen = SeenVxlan {
        vni: 0,
        port: 0,
        lower: 0,
        local: None,
        learning: false,
        l2miss: false,
        gbp: false,
    };
    for (attribute, value) in attributes(data) {
        match attribute {
            1 => seen.vni = u32_at(value, 0)?,
            3 => seen.lower = u32_at(value, 0)?,
            4 | 17 => seen.local = ip(value).filter(|local| !local.is_unspecified()),
            7 => seen.learning = *value.first()? != 0,
            13 => seen.l2miss = *value.first()? != 0,
            15 => seen.port = u16::from_be_bytes(value.get(..2)?.try_into().ok()?),
            23 => seen.gbp = true,
            _ => {}
        }
    }
    Some(seen)
}

/// `struct ifaddrmsg` is 8 bytes.
fn address(payload: &[u8]) -> Option<SeenAddress> {
    const IFA_ADDRESS: u16 = 1;
    const IFA_LOCAL: u16 = 2;
    const IFA_FLAGS: u16 = 8;
    let (mut address, mut local, mut flags) = (None, None, u32::from(*payload.get(2)?));
    for (attribute, value) in attributes(payload.get(8..)?) {
        match attribute {
            IFA_ADDRESS => address = ip(value),
            IFA_LOCAL => local = ip(value),
            IFA_FLAGS => flags = u32_at(value, 0)?,
            _ => {}
        }
    }
    // on a point-to-point link IFA_ADDRESS is the other end's
    let addr = IpNet::new(local.or(address)?, *payload.get(1)?).ok()?;
    Some(SeenAddress { index: u32_at(payload, 4)?, addr, flags })
}

/// `struct rtmsg` is 12 bytes.
fn route(payload: &[u8]) -> Option<SeenRoute> {
    const RTA_DST: u16 = 1;
    const RTA_OIF: u16 = 4;
    const RTA_GATEWAY: u16 = 5;
    const RTA_PRIORITY: u16 = 6;
    const RTA_PREFSRC: u16 = 7;
    const RTA_MULTIPATH: u16 = 9;
    const RTA_TABLE: u16 = 15;
    const RTA_VIA: u16 = 18;
    let &[family, len, _, _, table, protocol, _, kind, ..] = payload else { return None };
    let zero: IpAddr = match family {
        AF_INET => Ipv4Addr::UNSPECIFIED.into(),
        AF_INET6 => Ipv6Addr::UNSPECIFIED.into(),
        _ => return None,
    };
    let mut dst = zero;
    let mut seen = SeenRoute {
        dst: IpNet::new(zero, 0).ok()?,
        via: None,
        odd: false,
        oif: 0,
        src: None,
        metric: 0,
        table: table.into(),
        protocol,
        kind,
        flags: u32_at(payload, 8)?,
    };
    for (attribute, value) in attributes(payload.get(12..)?) {
        match attribute {
            RTA_DST => dst = ip(value)?,
            RTA_GATEWAY => seen.via = ip(value),
            RTA_OIF => seen.oif = u32_at(value, 0)?,
            RTA_PRIORITY => seen.metric = u32_at(value, 0)?,
            RTA_PREFSRC => seen.src = ip(value),
            RTA_TABLE => seen.table = u32_at(value, 0)?,
            RTA_VIA | RTA_MULTIPATH => seen.odd = true,
            _ => {}
        }
    }
    seen.dst = IpNet::new(dst, len).ok()?;
    Some(seen)
}

const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;

/// `struct ndmsg` is 12 bytes.
fn neighbour(payload: &[u8]) -> Option<SeenNeighbour> {
    let (mut address, mut mac) = (None, None);
    for (attribute, value) in attributes(payload.get(12..)?) {
        match attribute {
            NDA_DST => address = ip(value),
            NDA_LLADDR => mac = value.try_into().ok().map(Mac),
            _ => {}
        }
    }
    Some(SeenNeighbour {
        index: u32_at(payload, 4)?,
        ip: address?,
        mac,
        state: u16_at(payload, 8)?,
    })
}

fn fdb(payload: &[u8]) -> Option<SeenFdb> {
    let (mut dst, mut mac) = (None, None);
    for (attribute, value) in attributes(payload.get(12..)?) {
        match attribute {
            NDA_DST => dst = ip(value),
            NDA_LLADDR => mac = value.try_into().ok().map(Mac),
            _ => {}
        }
    }
    let (state, flags) = (u16_at(payload, 8)?, *payload.get(10)?);
    Some(SeenFdb { index: u32_at(payload, 4)?, mac: mac?, dst, state, flags })
}

fn ip(value: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(value).ok().map(IpAddr::from);
    v4.or_else(|| <[u8; 16]>::try_from(value).ok().map(IpAddr::from))
}

fn text(value: &[u8]) -> Option<&str> {
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    std::str::from_utf8(&value[..end]).ok()
}
