//! What a host has at one moment: interfaces, addresses, default routes. Read once, before the loop runs.

use std::io;
use std::net::IpAddr;

use ipnet::IpNet;

use super::encode::{self, Dump};
use super::object::{IfName, Mac};
use super::seen::{MAIN, Seen, UNICAST, decode};
use crate::netlink::{DONE, ERROR, Writer, flag, messages, outcome};
use crate::sys::netlink::{Netlink, Received};

/// An address of an interface.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InterfaceAddress {
    /// Address and prefix length.
    pub addr: IpNet,
    /// Assigned by hand (`IFA_F_PERMANENT`).
    pub permanent: bool,
    /// An IPv6 privacy address (`IFA_F_TEMPORARY`).
    pub temporary: bool,
    /// Not for new connections any more (`IFA_F_DEPRECATED`).
    pub deprecated: bool,
}

/// A network interface.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Interface {
    /// Name.
    pub name: IfName,
    /// Index, the kernel's order.
    pub index: u32,
    /// MTU in bytes.
    pub mtu: u32,
    /// Ethernet address, if it has one.
    pub mac: Option<Mac>,
    /// Administratively up.
    pub up: bool,
    /// Addresses in the kernel's order.
    pub addresses: Vec<InterfaceAddress>,
}

/// The way to one address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reached {
    /// The interface that leads there.
    pub link: IfName,
    /// The source address that the kernel would choose.
    pub source: Option<IpAddr>,
}

/// A host at one moment.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Inventory {
    /// Interfaces in the kernel's order.
    pub interfaces: Vec<Interface>,
    /// The interface of the first IPv4 default route in the main table; `Some(None)` is a route with several next hops.
    pub default_v4: Option<Option<IfName>>,
    /// As `default_v4`, for IPv6.
    pub default_v6: Option<Option<IfName>>,
    /// The way to the address that was asked for, if there is one.
    pub reached: Option<Reached>,
}

impl Inventory {
    /// Asks the kernel. `reach` is an address whose way is of interest.
    ///
    /// # Errors
    /// As `socket(2)`, or the kernel's refusal.
    pub fn read(reach: Option<IpAddr>) -> io::Result<Self> {
        let mut reader = Reader::open()?;
        let mut inventory = Self::default();
        for seen in reader.ask(|out, sequence| encode::dump(out, sequence, Dump::Links, 0))? {
            if let Seen::Link(link) = seen {
                inventory.interfaces.push(Interface {
                    name: link.name,
                    index: link.index,
                    mtu: link.mtu,
                    mac: link.mac,
                    up: link.up,
                    addresses: Vec::new(),
                });
            }
        }
        for seen in reader.ask(|out, sequence| encode::dump(out, sequence, Dump::Addresses, 0))? {
            let Seen::Address(seen) = seen else { continue };
            if let Some(interface) =
                inventory.interfaces.iter_mut().find(|it| it.index == seen.index)
            {
                interface.addresses.push(InterfaceAddress {
                    addr: seen.addr,
                    permanent: seen.flags & 0x80 != 0,
                    // the same bit says "secondary" for IPv4
                    temporary: matches!(seen.addr, IpNet::V6(_)) && seen.flags & 1 != 0,
                    deprecated: seen.flags & 0x20 != 0,
                });
            }
        }
        inventory.default_v4 = inventory.default_route(&mut reader, true)?;
        inventory.default_v6 = inventory.default_route(&mut reader, false)?;
        if let Some(ip) = reach {
            // no route at all is an answer, too
            let answer =
                reader.ask(|out, sequence| encode::lookup(out, sequence, ip)).unwrap_or_default();
            inventory.reached = answer.iter().find_map(|seen| match seen {
                Seen::Route(route) => {
                    Some(Reached { link: inventory.name(route.oif)?, source: route.src })
                }
                _ => None,
            });
        }
        Ok(inventory)
    }

    fn default_route(&self, reader: &mut Reader, v4: bool) -> io::Result<Option<Option<IfName>>> {
        let routes =
            reader.ask(|out, sequence| encode::dump(out, sequence, Dump::Routes { v4 }, 0))?;
        let defaults = routes.iter().filter_map(|seen| match seen {
            Seen::Route(route) => {
                let ours = route.table == MAIN
                    && route.kind == UNICAST
                    && matches!(route.dst, IpNet::V4(_)) == v4;
                (ours && route.dst.prefix_len() == 0).then_some(route)
            }
            _ => None,
        });
        Ok(defaults.min_by_key(|route| route.metric).map(|route| self.name(route.oif)))
    }

    fn name(&self, index: u32) -> Option<IfName> {
        self.interfaces
            .iter()
            .find(|interface| interface.index == index)
            .map(|interface| interface.name)
    }
}

/// Asks the kernel, one question after the other, and waits for each answer.
pub(super) struct Reader {
    netlink: Netlink,
    buffer: Vec<u8>,
    sequence: u32,
}

impl Reader {
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self { netlink: Netlink::requests()?, buffer: vec![0; 32 << 10], sequence: 0 })
    }

    /// Sends one order and waits for its acknowledgement.
    pub(super) fn order(&mut self, write: impl FnOnce(&mut Writer, u32)) -> io::Result<()> {
        let acknowledged = |out: &mut Writer, sequence| {
            write(out, sequence);
            out.add_flags(flag::ACK);
        };
        self.ask(acknowledged).map(drop)
    }

    /// Sends one request and collects the answers. The kernel has them ready when the request returns.
    pub(super) fn ask(&mut self, write: impl FnOnce(&mut Writer, u32)) -> io::Result<Vec<Seen>> {
        self.sequence += 1;
        let mut writer = Writer::default();
        write(&mut writer, self.sequence);
        let is_list = messages(writer.bytes()).any(|message| message.flags & 0x300 != 0);
        self.netlink.send(writer.bytes())?;
        let mut answers = Vec::new();
        loop {
            let len = match self.netlink.recv(&mut self.buffer)? {
                Received::Datagram(len) => len,
                Received::Overrun | Received::Nothing => {
                    return Err(io::Error::other(
                        "the kernel did not answer a netlink request in full",
                    ));
                }
            };
            for message in
                messages(&self.buffer[..len]).filter(|message| message.sequence == self.sequence)
            {
                match message.kind {
                    DONE => return Ok(answers),
                    ERROR => {
                        const ENOENT: i32 = 2; // a table that does not exist is empty
                        return match outcome(&message) {
                            Some((0 | ENOENT, _)) => Ok(answers),
                            Some((code, _)) => Err(io::Error::from_raw_os_error(code)),
                            None => Err(io::Error::other("the kernel's answer makes no sense")),
                        };
                    }
                    _ => answers.extend(decode(&message)),
                }
            }
            if !is_list {
                return Ok(answers);
            }
        }
    }
}
