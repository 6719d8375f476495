//! Netlink sockets (`netlink(7)`) that do not block: one for requests and their answers, one for notifications.

use std::fmt;
use std::io;

use neli::consts::socket::{Msg, NlFamily};
use neli::socket::NlSocket;
use neli::utils::Groups;

/// Room for answers and notifications that wait to be read, in bytes: some thousand messages.
const BUFFER: usize = 4 << 20;
/// `RTNLGRP_*` of `linux/rtnetlink.h`: links, neighbours, IPv4 addresses and routes, IPv6 addresses and routes.
const GROUPS: [u32; 6] = [1, 3, 5, 7, 9, 11];

/// What a read came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Received {
    /// One datagram of this many bytes, which holds any number of messages.
    Datagram(usize),
    /// Messages were lost for want of room.
    Overrun,
    /// Nothing waits.
    Nothing,
}

/// A socket of the `NETLINK_ROUTE` family.
pub struct Netlink {
    socket: NlSocket,
}

impl fmt::Debug for Netlink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Netlink({})", self.port())
    }
}

impl Netlink {
    /// A socket for requests.
    ///
    /// # Errors
    /// As `socket(2)` and `bind(2)`.
    pub fn requests() -> io::Result<Self> {
        let netlink = Self::open(Groups::empty())?;
        // both only make answers better, and old kernels have neither
        let _ = netlink.socket.enable_ext_ack(true);
        let _ = netlink.socket.enable_strict_checking(true);
        Ok(netlink)
    }

    /// A socket for notifications of everything that the reconciler looks after.
    ///
    /// # Errors
    /// As `socket(2)` and `bind(2)`.
    pub fn notices() -> io::Result<Self> {
        Self::open(Groups::new_groups(&GROUPS))
    }

    fn open(groups: Groups) -> io::Result<Self> {
        let socket = NlSocket::connect(NlFamily::Route, None, groups)?;
        socket.nonblock()?;
        super::buffer::grow_receive(&socket, BUFFER);
        Ok(Self { socket })
    }

    /// The port number that the kernel gave this socket; it marks notifications of what the socket caused.
    pub fn port(&self) -> u32 {
        self.socket.pid().unwrap_or(0)
    }

    /// Sends one datagram.
    ///
    /// # Errors
    /// As `sendto(2)`.
    pub fn send(&self, datagram: &[u8]) -> io::Result<()> {
        self.socket.send(datagram, Msg::empty()).map(drop)
    }

    /// Reads one datagram; `buffer` must hold the longest that the kernel makes, 32 KiB.
    ///
    /// # Errors
    /// As `recvfrom(2)`, but for what [`Received`] covers.
    pub fn recv(&self, buffer: &mut [u8]) -> io::Result<Received> {
        match self.socket.recv(buffer, Msg::empty()) {
            Ok((len, _)) => Ok(Received::Datagram(len)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Received::Nothing),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Received::Nothing),
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(Received::Overrun),
            Err(error) => Err(error),
        }
    }
}

super::source::source_by_descriptor!(Netlink, socket);
