//! The kernel objects that leases need, as plain data. Links are meant by name: an index changes when a link is re-created.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;

use crate::lease::Subnets;

/// Name of a network interface: 1 to 15 bytes, no `/`, no white space (kernel `dev_valid_name`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IfName([u8; 16]);

impl IfName {
    /// Comes before every name in order.
    pub(super) const FIRST: Self = Self([0; 16]);

    /// `None` when the kernel would refuse the name.
    pub fn new(name: &str) -> Option<Self> {
        let bytes = name.as_bytes();
        let valid = !bytes.is_empty()
            && bytes.len() < 16
            && name != "."
            && name != ".."
            && !bytes.iter().any(|b| matches!(b, b'/' | b':' | 0) || b.is_ascii_whitespace());
        valid.then(|| {
            let mut array = [0; 16];
            array[..bytes.len()].copy_from_slice(bytes);
            Self(array)
        })
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        let len = self.0.iter().position(|b| *b == 0).unwrap_or(16);
        std::str::from_utf8(&self.0[..len]).unwrap_or("?")
    }
}

impl fmt::Display for IfName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for IfName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.as_str())
    }
}

/// Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// Can this be a VTEP's address: unicast and not all zero?
    pub fn is_unicast(&self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// The text is not a 6-byte Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BadMac;

impl fmt::Display for BadMac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a MAC address")
    }
}

impl std::error::Error for BadMac {}

impl FromStr for Mac {
    type Err = BadMac;

    /// Go's three notations of an EUI-48: `01:23:45:67:89:ab`, `01-23-45-67-89-ab`, `0123.4567.89ab`.
    fn from_str(text: &str) -> Result<Self, BadMac> {
        let (separator, width) = match text.as_bytes().get(2) {
            Some(b':') => (':', 2),
            Some(b'-') => ('-', 2),
            _ => ('.', 4),
        };
        let mut mac = [0; 6];
        let mut filled = 0;
        for group in text.split(separator) {
            if group.len() != width || !group.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(BadMac);
            }
            for start in (0..width).step_by(2) {
                let byte = u8::from_str_radix(&group[start..start + 2], 16).map_err(|_| BadMac)?;
                *mac.get_mut(filled).ok_or(BadMac)? = byte;
                filled += 1;
            }
        }
        if filled == 6 { Ok(Self(mac)) } else { Err(BadMac) }
    }
}

/// Who wants an object. Several owners may want the same one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Owner {
    /// This host: its device and address.
    Host,
    /// The peer that holds these subnets.
    Peer(Subnets),
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("this host"),
            Self::Peer(subnets) => write!(f, "peer {subnets}"),
        }
    }
}

/// A VXLAN device's parameters (backends spec 6.2).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Vxlan {
    /// VXLAN network identifier, below 2^24.
    pub vni: u32,
    /// UDP port; `None` leaves it to the kernel (`vxlan.udp_port`, 8472).
    pub port: Option<u16>,
    /// The underlay interface it is bound to.
    pub lower: IfName,
    /// Outer source address.
    pub local: IpAddr,
    /// The MAC that peers were told.
    pub mac: Mac,
    /// Source-address learning.
    pub learning: bool,
    /// Group-based policy extension.
    pub gbp: bool,
}

/// What kind of link, and whether we make it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LinkKind {
    /// Made by us, re-made when it vanishes or is incompatible.
    Vxlan(Box<Vxlan>),
    /// Made elsewhere (a TUN descriptor); only its MTU and up state are ours.
    Existing,
}

/// A link that must exist and be up.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Link {
    /// Name.
    pub name: IfName,
    /// Kind.
    pub kind: LinkKind,
    /// MTU in bytes.
    pub mtu: u32,
}

/// An address on a link.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Address {
    /// The link.
    pub link: IfName,
    /// Address with its prefix length (host bits kept).
    pub addr: IpNet,
    /// Other addresses of the same family on this link that lie in here are removed; link-local ones never are.
    pub exclusive: IpNet,
}

/// A unicast route in the main table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Route {
    /// Destination, host bits zero.
    pub dst: IpNet,
    /// Next hop; `None` for a device route.
    pub via: Option<IpAddr>,
    /// Output link; `None` lets the kernel find it from the next hop.
    pub link: Option<IfName>,
    /// `RTNH_F_ONLINK`: the next hop is on the link whatever the addresses say.
    pub onlink: bool,
}

/// A permanent neighbour (ARP or ND) entry.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Neighbour {
    /// The link.
    pub link: IfName,
    /// Network-layer address.
    pub ip: IpAddr,
    /// Its Ethernet address.
    pub mac: Mac,
}

/// A permanent forwarding entry of a VXLAN device (`bridge fdb … self permanent`).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fdb {
    /// The VXLAN device.
    pub link: IfName,
    /// Inner destination.
    pub mac: Mac,
    /// Outer destination.
    pub dst: IpAddr,
}

/// A file below `/proc/sys`. Written when it differs; a refusal is a warning, never a failure of the owner.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sysctl {
    /// The link whose existence the file depends on.
    pub link: IfName,
    /// Path below `/proc/sys`, such as `net/ipv6/conf/flannel.1/accept_ra`.
    pub path: Box<str>,
    /// Content without the line feed.
    pub value: Box<str>,
}

/// One kernel object.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Object {
    /// Link.
    Link(Link),
    /// Address.
    Address(Address),
    /// Route.
    Route(Route),
    /// Where packets to this prefix go when no other route takes them: nowhere. Its metric is the largest there is, so that
    /// a bridge's own route always comes first.
    Blackhole(IpNet),
    /// Neighbour entry.
    Neighbour(Neighbour),
    /// VXLAN forwarding entry.
    Fdb(Fdb),
    /// Kernel setting.
    Sysctl(Sysctl),
}

/// What makes an object the same one in the kernel. The order is the order in which objects are made.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Key {
    /// By name.
    Link(IfName),
    /// By path.
    Sysctl(Box<str>),
    /// By link, address and prefix length.
    Address(IfName, IpNet),
    /// By link and MAC.
    Fdb(IfName, Mac),
    /// By link and address.
    Neighbour(IfName, IpAddr),
    /// By destination, in the main table at the family's default metric.
    Route(IpNet),
    /// By destination, in the main table at the largest metric.
    Blackhole(IpNet),
}

impl Object {
    /// The object's identity.
    pub fn key(&self) -> Key {
        match self {
            Self::Link(link) => Key::Link(link.name),
            Self::Address(address) => Key::Address(address.link, address.addr),
            Self::Route(route) => Key::Route(route.dst),
            Self::Blackhole(dst) => Key::Blackhole(*dst),
            Self::Neighbour(neighbour) => Key::Neighbour(neighbour.link, neighbour.ip),
            Self::Fdb(fdb) => Key::Fdb(fdb.link, fdb.mac),
            Self::Sysctl(sysctl) => Key::Sysctl(sysctl.path.clone()),
        }
    }
}

/// Reads like the command that would make it: `route 10.5.3.0/24 via 10.5.3.0 dev flannel.1 onlink`.
impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Link(link) => write!(f, "link {} mtu {}", link.name, link.mtu),
            Self::Address(address) => write!(f, "address {} dev {}", address.addr, address.link),
            Self::Route(route) => {
                write!(f, "route {}", route.dst)?;
                if let Some(via) = route.via {
                    write!(f, " via {via}")?;
                }
                if let Some(link) = route.link {
                    write!(f, " dev {link}")?;
                }
                if route.onlink { f.write_str(" onlink") } else { Ok(()) }
            }
            Self::Blackhole(dst) => write!(f, "blackhole route {dst}"),
            Self::Neighbour(n) => write!(f, "neighbour {} lladdr {} dev {}", n.ip, n.mac, n.link),
            Self::Fdb(fdb) => write!(f, "fdb {} dst {} dev {}", fdb.mac, fdb.dst, fdb.link),
            Self::Sysctl(sysctl) => write!(f, "sysctl {} = {}", sysctl.path, sysctl.value),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_notations() {
        let mac = Mac([0x01, 0x23, 0x45, 0x67, 0x89, 0xab]);
        for text in ["01:23:45:67:89:ab", "01-23-45-67-89-AB", "0123.4567.89ab"] {
            assert_eq!(text.parse(), Ok(mac), "{text}");
        }
        for text in [
            "",
            "01:23:45:67:89",
            "01:23:45:67:89:ab:cd",
            "01:23-45:67:89:ab",
            "0123.4567",
            "g1:23:45:67:89:ab",
            "01:23:45:67:89:é",
        ] {
            assert_eq!(text.parse::<Mac>(), Err(BadMac), "{text}");
        }
        assert_eq!(mac.to_string(), "01:23:45:67:89:ab");
        assert!(!mac.is_unicast());
        assert!(Mac([2, 0, 0, 0, 0, 1]).is_unicast());
    }

    #[test]
    fn interface_names() {
        assert_eq!(IfName::new("flannel-v6.1").map(|n| n.to_string()), Some("flannel-v6.1".into()));
        for bad in ["", ".", "..", "a/b", "a b", "a:b", "sixteen-bytes-xx"] {
            assert_eq!(IfName::new(bad), None, "{bad:?}");
        }
    }
}
