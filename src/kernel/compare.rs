//! What the kernel has, held against what is wanted.

use ipnet::IpNet;

use super::encode::{Dump, LAST_METRIC, metric};
use super::links::Links;
use super::object::{Address, Fdb, IfName, Key, Neighbour, Object, Route};
use super::seen::{
    BLACKHOLE, MAIN, ONLINK, PERMANENT, PROTO_BOOT, PROTO_KERNEL, SELF, Seen, SeenRoute, UNICAST,
};

/// The route protocol number that marks our routes (`ip route show proto 241`); no name in `rt_protos` has it.
pub(super) const PROTOCOL: u8 = 241;
/// `RTM_F_CLONED`: a cache entry.
const CLONED: u32 = 0x200;

/// Which object this would be if it were ours. Links are compared elsewhere.
pub(super) fn key(seen: &Seen, links: &Links) -> Option<Key> {
    let name = |index| links.at(index).map(|link| link.name);
    match seen {
        Seen::Link(_) => None,
        Seen::Address(address) => Some(Key::Address(name(address.index)?, address.addr)),
        Seen::Route(route) if is_blackhole(route) => Some(Key::Blackhole(route.dst)),
        Seen::Route(route) => is_in_our_slot(route).then_some(Key::Route(route.dst)),
        Seen::Neighbour(neighbour) => Some(Key::Neighbour(name(neighbour.index)?, neighbour.ip)),
        Seen::Fdb(fdb) => Some(Key::Fdb(name(fdb.index)?, fdb.mac)),
    }
}

fn is_in_our_slot(route: &SeenRoute) -> bool {
    route.table == MAIN && route.flags & CLONED == 0 && route.metric == metric(route.dst)
}

pub(super) fn is_blackhole(route: &SeenRoute) -> bool {
    route.table == MAIN
        && route.kind == BLACKHOLE
        && route.metric == LAST_METRIC
        && route.protocol == PROTOCOL
}

/// Is the object in the kernel exactly the wanted one? Both have the same [`key`].
pub(super) fn same(want: &Object, have: &Seen, links: &Links) -> bool {
    match (want, have) {
        (Object::Address(_), Seen::Address(_)) => true,
        (Object::Blackhole(_), Seen::Route(have)) => is_blackhole(have),
        (Object::Route(want), Seen::Route(have)) => {
            !have.odd
                && have.kind == UNICAST
                && have.protocol == PROTOCOL
                && have.via == want.via
                && (have.flags & ONLINK != 0) == want.onlink
                && want.link.is_none_or(|link| links.index(link) == Some(have.oif))
        }
        (Object::Neighbour(want), Seen::Neighbour(have)) => {
            have.state & PERMANENT != 0 && have.mac == Some(want.mac)
        }
        (Object::Fdb(want), Seen::Fdb(have)) => {
            have.state & PERMANENT != 0 && have.flags & SELF != 0 && have.dst == Some(want.dst)
        }
        _ => false,
    }
}

/// Does a list of this sort show all objects of this key's sort?
pub(super) fn covers(dump: Dump, key: &Key) -> bool {
    match (dump, key) {
        (Dump::Addresses, Key::Address(..)) => true,
        (Dump::Routes { v4 }, Key::Route(dst) | Key::Blackhole(dst)) => {
            matches!(dst, IpNet::V4(_)) == v4
        }
        (Dump::Neighbours { link, v4 }, Key::Neighbour(on, ip)) => {
            *on == link && ip.is_ipv4() == v4
        }
        (Dump::Fdb { link }, Key::Fdb(on, _)) => *on == link,
        _ => false,
    }
}

/// The link that an object needs.
pub(super) fn link_of(object: &Object) -> Option<IfName> {
    match object {
        Object::Link(_) | Object::Blackhole(_) => None,
        Object::Sysctl(sysctl) => Some(sysctl.link),
        Object::Address(address) => Some(address.link),
        Object::Fdb(fdb) => Some(fdb.link),
        Object::Neighbour(neighbour) => Some(neighbour.link),
        Object::Route(route) => route.link,
    }
}

/// What to do with something that no lease wants.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Stray {
    /// It is not ours.
    Leave,
    /// It was ours, or sits on a device of ours.
    Remove(Object),
    /// Perhaps a Go flanneld left it; it could as well be the operator's.
    Mention(Object),
}

/// Judges a stray. `networks` are the overlay's prefixes, `devices` the backend's links.
pub(super) fn stray(seen: &Seen, links: &Links, networks: &[IpNet], devices: &[IfName]) -> Stray {
    let device =
        |index| links.at(index).map(|link| link.name).filter(|name| devices.contains(name));
    match seen {
        Seen::Route(route) => {
            let in_network = networks.iter().any(|network| network.contains(&route.dst));
            if !in_network || route.table != MAIN || route.flags & CLONED != 0 {
                return Stray::Leave;
            }
            if is_blackhole(route) {
                return Stray::Remove(Object::Blackhole(route.dst));
            }
            if route.kind != UNICAST {
                return Stray::Leave;
            }
            let link = links.at(route.oif).map(|link| link.name);
            let object = Object::Route(Route {
                dst: route.dst,
                via: route.via,
                link,
                onlink: route.flags & ONLINK != 0,
            });
            let on_device = device(route.oif).is_some();
            if is_in_our_slot(route)
                && (route.protocol == PROTOCOL || on_device && route.protocol != PROTO_KERNEL)
            {
                Stray::Remove(object)
            } else if route.protocol == PROTO_BOOT && route.via.is_some() {
                Stray::Mention(object)
            } else {
                Stray::Leave
            }
        }
        Seen::Neighbour(neighbour) => match (device(neighbour.index), neighbour.mac) {
            (Some(link), Some(mac)) if neighbour.state & PERMANENT != 0 => {
                Stray::Remove(Object::Neighbour(Neighbour { link, ip: neighbour.ip, mac }))
            }
            _ => Stray::Leave,
        },
        Seen::Fdb(fdb) => match (device(fdb.index), fdb.dst) {
            (Some(link), Some(dst)) if fdb.state & PERMANENT != 0 && fdb.mac.is_unicast() => {
                Stray::Remove(Object::Fdb(Fdb { link, mac: fdb.mac, dst }))
            }
            _ => Stray::Leave,
        },
        Seen::Link(_) | Seen::Address(_) => Stray::Leave,
    }
}

/// An address that must not stay beside the wanted ones of its link.
pub(super) fn intruder<'a>(
    seen: &Seen,
    links: &Links,
    mut wanted: impl Iterator<Item = &'a Address>,
) -> Option<Object> {
    let Seen::Address(seen) = seen else { return None };
    let link = links.at(seen.index)?.name;
    let link_local = match seen.addr {
        IpNet::V4(v4) => v4.addr().is_link_local(),
        IpNet::V6(v6) => v6.addr().is_unicast_link_local(),
    };
    let unwanted =
        !link_local && wanted.any(|address| address.exclusive.contains(&seen.addr.addr()));
    unwanted.then_some(Object::Address(Address { link, addr: seen.addr, exclusive: seen.addr }))
}
