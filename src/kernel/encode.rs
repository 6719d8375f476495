//! Objects as `rtnetlink(7)` requests.

use std::net::IpAddr;

use ipnet::IpNet;

use super::object::{Address, Fdb, IfName, Link, LinkKind, Mac, Neighbour, Route};
use super::seen::{
    AF_BRIDGE, AF_INET, AF_INET6, BLACKHOLE, MAIN, ONLINK, PERMANENT, SELF, UNICAST, UP, kind,
};
use crate::netlink::{Writer, flag};

const UPDATE: u16 = flag::CREATE | flag::REPLACE;

pub(super) fn family(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { AF_INET } else { AF_INET6 }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// `struct ifinfomsg`.
fn ifinfo(index: u32, flags: u32, change: u32) -> [u8; 16] {
    let mut header = [0; 16];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..16].copy_from_slice(&change.to_ne_bytes());
    header
}

/// Creates a VXLAN device and brings it up (backends spec 6.2). `lower` is the index of its underlay link.
pub(super) fn create_link(out: &mut Writer, sequence: u32, link: &Link, lower: u32) {
    let LinkKind::Vxlan(vxlan) = &link.kind else { return };
    out.begin(kind::NEWLINK, flag::CREATE | flag::EXCL, sequence);
    out.fixed(&ifinfo(0, UP, UP));
    out.text(3, link.name.as_str());
    out.u32(4, link.mtu);
    out.u32(13, 0); // no queue
    out.attribute(1, &vxlan.mac.0);
    out.nest(18, |info| {
        info.attribute(1, b"vxlan");
        info.nest(2, |data| {
            data.u32(1, vxlan.vni);
            data.u32(3, lower);
            data.attribute(if vxlan.local.is_ipv4() { 4 } else { 17 }, &octets(vxlan.local));
            data.attribute(5, &[0]);
            data.attribute(6, &[0]);
            data.attribute(7, &[u8::from(vxlan.learning)]);
            for off in [11, 12, 13, 14, 19, 20] {
                data.attribute(off, &[0]);
            }
            if vxlan.gbp {
                data.attribute(23, &[]);
            }
            if let Some(port) = vxlan.port {
                data.attribute(15, &port.to_be_bytes());
            }
        });
    });
    out.end();
}

/// Brings a link up; sets its MTU and MAC where given.
pub(super) fn change_link(
    out: &mut Writer,
    sequence: u32,
    index: u32,
    mtu: Option<u32>,
    mac: Option<Mac>,
) {
    out.begin(kind::SETLINK, 0, sequence);
    out.fixed(&ifinfo(index, UP, UP));
    if let Some(mtu) = mtu {
        out.u32(4, mtu);
    }
    if let Some(mac) = mac {
        out.attribute(1, &mac.0);
    }
    out.end();
}

pub(super) fn delete_link(out: &mut Writer, sequence: u32, index: u32) {
    out.begin(kind::DELLINK, 0, sequence);
    out.fixed(&ifinfo(index, 0, 0));
    out.end();
}

pub(super) fn address(
    out: &mut Writer,
    sequence: u32,
    address: &Address,
    index: u32,
    remove: bool,
) {
    const IFA_F_NODAD: u32 = 2;
    if remove {
        out.begin(kind::DELADDR, 0, sequence);
    } else {
        out.begin(kind::NEWADDR, UPDATE, sequence);
    }
    let (ip, len) = (address.addr.addr(), address.addr.prefix_len());
    let mut header = [family(ip), len, 0, 0, 0, 0, 0, 0];
    header[4..].copy_from_slice(&index.to_ne_bytes());
    out.fixed(&header);
    out.attribute(2, &octets(ip));
    out.attribute(1, &octets(ip));
    if !remove && ip.is_ipv6() {
        // nobody else can have it, and waiting for duplicates would delay everyone
        out.u32(8, IFA_F_NODAD);
    }
    out.end();
}

/// Metric that routes of ours have: none for IPv4, the kernel's default for IPv6.
pub(super) fn metric(dst: IpNet) -> u32 {
    if matches!(dst, IpNet::V4(_)) { 0 } else { 1024 }
}

/// Metric of the blackhole routes: every other route comes first.
pub(super) const LAST_METRIC: u32 = u32::MAX;

pub(super) fn blackhole(out: &mut Writer, sequence: u32, dst: IpNet, protocol: u8, remove: bool) {
    if remove {
        out.begin(kind::DELROUTE, 0, sequence);
    } else {
        out.begin(kind::NEWROUTE, UPDATE, sequence);
    }
    out.fixed(&rtmsg(dst, protocol, 0, BLACKHOLE, 0));
    out.attribute(1, &octets(dst.addr()));
    out.u32(6, LAST_METRIC);
    out.end();
}

/// `struct rtmsg` for a route in the main table.
fn rtmsg(dst: IpNet, protocol: u8, scope: u8, kind: u8, flags: u32) -> [u8; 12] {
    let table = u8::try_from(MAIN).unwrap_or_default();
    let mut header =
        [family(dst.addr()), dst.prefix_len(), 0, 0, table, protocol, scope, kind, 0, 0, 0, 0];
    header[8..].copy_from_slice(&flags.to_ne_bytes());
    header
}

pub(super) fn put_route(
    out: &mut Writer,
    sequence: u32,
    route: &Route,
    index: Option<u32>,
    protocol: u8,
) {
    const SCOPE_LINK: u8 = 253;
    let scope =
        if route.via.is_none() && matches!(route.dst, IpNet::V4(_)) { SCOPE_LINK } else { 0 };
    out.begin(kind::NEWROUTE, UPDATE, sequence);
    out.fixed(&rtmsg(route.dst, protocol, scope, UNICAST, if route.onlink { ONLINK } else { 0 }));
    route_attributes(out, route, index);
    out.end();
}

/// Deletes the route whatever its protocol: the one that a Go flanneld left has another.
pub(super) fn delete_route(out: &mut Writer, sequence: u32, route: &Route, index: Option<u32>) {
    const ANY_PROTOCOL: u8 = 0;
    const SCOPE_NOWHERE: u8 = 255; // any scope
    out.begin(kind::DELROUTE, 0, sequence);
    out.fixed(&rtmsg(route.dst, ANY_PROTOCOL, SCOPE_NOWHERE, UNICAST, 0));
    route_attributes(out, route, index);
    out.end();
}

fn route_attributes(out: &mut Writer, route: &Route, index: Option<u32>) {
    out.attribute(1, &octets(route.dst.addr()));
    if let Some(via) = route.via {
        out.attribute(5, &octets(via));
    }
    if let Some(index) = index {
        out.u32(4, index);
    }
    out.u32(6, metric(route.dst));
}

/// `struct ndmsg`.
fn ndmsg(family: u8, index: u32, state: u16, flags: u8) -> [u8; 12] {
    let mut header = [0; 12];
    header[0] = family;
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..10].copy_from_slice(&state.to_ne_bytes());
    header[10] = flags;
    header[11] = UNICAST;
    header
}

pub(super) fn neighbour(
    out: &mut Writer,
    sequence: u32,
    neighbour: &Neighbour,
    index: u32,
    remove: bool,
) {
    entry(
        out,
        sequence,
        ndmsg(family(neighbour.ip), index, PERMANENT, 0),
        neighbour.ip,
        neighbour.mac,
        remove,
    );
}

pub(super) fn fdb(out: &mut Writer, sequence: u32, fdb: &Fdb, index: u32, remove: bool) {
    entry(out, sequence, ndmsg(AF_BRIDGE, index, PERMANENT, SELF), fdb.dst, fdb.mac, remove);
}

fn entry(out: &mut Writer, sequence: u32, header: [u8; 12], dst: IpAddr, mac: Mac, remove: bool) {
    if remove {
        out.begin(kind::DELNEIGH, 0, sequence);
    } else {
        out.begin(kind::NEWNEIGH, UPDATE, sequence);
    }
    out.fixed(&header);
    out.attribute(1, &octets(dst));
    out.attribute(2, &mac.0);
    out.end();
}

/// What to list.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Dump {
    Links,
    Addresses,
    /// Of the main table, of one family.
    Routes {
        v4: bool,
    },
    /// Of one link, of one family.
    Neighbours {
        link: IfName,
        v4: bool,
    },
    /// Of one VXLAN device.
    Fdb {
        link: IfName,
    },
}

/// Asks for a list. The filters are a favour: old kernels ignore them, so the answers are filtered again.
pub(super) fn dump(out: &mut Writer, sequence: u32, dump: Dump, index: u32) {
    match dump {
        Dump::Links => {
            out.begin(kind::GETLINK, flag::DUMP, sequence);
            out.fixed(&ifinfo(0, 0, 0));
        }
        Dump::Addresses => {
            out.begin(kind::GETADDR, flag::DUMP, sequence);
            out.fixed(&[0; 8]);
        }
        Dump::Routes { v4 } => {
            const RTA_TABLE: u16 = 15;
            out.begin(kind::GETROUTE, flag::DUMP, sequence);
            let mut header = [0; 12];
            header[0] = if v4 { AF_INET } else { AF_INET6 };
            out.fixed(&header);
            out.u32(RTA_TABLE, MAIN);
        }
        Dump::Neighbours { v4, .. } => {
            const NDA_IFINDEX: u16 = 8;
            out.begin(kind::GETNEIGH, flag::DUMP, sequence);
            let mut header = [0; 12];
            header[0] = if v4 { AF_INET } else { AF_INET6 };
            out.fixed(&header);
            out.u32(NDA_IFINDEX, index);
        }
        Dump::Fdb { .. } => {
            out.begin(kind::GETNEIGH, flag::DUMP, sequence);
            let mut header = [0; 12];
            header[0] = AF_BRIDGE;
            header[4..8].copy_from_slice(&index.to_ne_bytes());
            out.fixed(&header);
        }
    }
    out.end();
}

/// Asks which route packets to `ip` take.
pub(super) fn lookup(out: &mut Writer, sequence: u32, ip: IpAddr) {
    const RTM_F_LOOKUP_TABLE: u32 = 0x1000;
    out.begin(kind::GETROUTE, 0, sequence);
    let mut header = [0; 12];
    header[0] = family(ip);
    header[1] = if ip.is_ipv4() { 32 } else { 128 };
    if ip.is_ipv4() {
        // IPv6 tells the table unasked, and does not take the flag
        header[8..].copy_from_slice(&RTM_F_LOOKUP_TABLE.to_ne_bytes());
    }
    out.fixed(&header);
    out.attribute(1, &octets(ip));
    out.end();
}
