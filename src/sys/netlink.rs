//! Netlink sockets (`netlink(7)`) that do not block: for requests and their answers, and for notifications.

#![allow(unsafe_code)]

use std::fmt;
use std::io;

use neli::consts::socket::{Msg, NlFamily};
use neli::socket::NlSocket;
use neli::utils::Groups;

/// Room for answers and notifications that wait to be read, in bytes: some thousand messages.
const BUFFER: usize = 4 << 20;
/// `RTNLGRP_*` of `linux/rtnetlink.h`: links, neighbours, IPv4 addresses and routes, IPv6 addresses and routes.
const GROUPS: [u32; 6] = [1, 3, 5, 7, 9, 11];
/// `NFNLGRP_NFTABLES` of `linux/netfilter/nfnetlink.h`.
const RULESETS: [u32; 1] = [7];

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

/// A netlink socket.
pub struct Netlink {
    socket: NlSocket,
}

impl fmt::Debug for Netlink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Netlink({})", self.port())
    }
}

impl Netlink {
    /// A socket for requests about links, addresses, routes and neighbours (`NETLINK_ROUTE`).
    ///
    /// # Errors
    /// As `socket(2)` and `bind(2)`.
    pub fn requests() -> io::Result<Self> {
        Self::open_requests(NlFamily::Route)
    }

    /// A socket for requests about firewall rules (`NETLINK_NETFILTER`).
    ///
    /// # Errors
    /// As `socket(2)` and `bind(2)`.
    pub fn ruleset_requests() -> io::Result<Self> {
        let netlink = Self::open_requests(NlFamily::Netfilter)?;
        // a transaction is one datagram
        super::buffer::grow_send(&netlink.socket, BUFFER);
        Ok(netlink)
    }

    fn open_requests(family: NlFamily) -> io::Result<Self> {
        let netlink = Self::open(family, Groups::empty())?;
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
        Self::open(NlFamily::Route, Groups::new_groups(&GROUPS))
    }

    /// A socket for notifications of changes to the firewall rules, of those only whose type is `kind`: what was changed
    /// can be ten thousand rules every few seconds.
    ///
    /// # Errors
    /// As `socket(2)` and `bind(2)`.
    pub fn ruleset_notices(kind: u16) -> io::Result<Self> {
        let netlink = Self::open(NlFamily::Netfilter, Groups::empty())?;
        // a favour: whoever reads looks at the type, too
        let _ = netlink.hear_only(kind);
        netlink.socket.add_mcast_membership(Groups::new_groups(&RULESETS))?;
        Ok(netlink)
    }

    /// Lets the kernel throw away datagrams whose first message is of another type (`SO_ATTACH_FILTER`).
    fn hear_only(&self, kind: u16) -> io::Result<()> {
        const OFFSET_OF_TYPE: u32 = 4;
        // the program loads in network order what the header has in the host's
        let kind = u32::from(u16::from_be_bytes(kind.to_ne_bytes()));
        let step = |code: u32, jt, jf, k| libc::sock_filter {
            code: u16::try_from(code).unwrap_or(0),
            jt,
            jf,
            k,
        };
        let mut program = [
            step(libc::BPF_LD | libc::BPF_H | libc::BPF_ABS, 0, 0, OFFSET_OF_TYPE),
            step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, kind),
            step(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
            step(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
        ];
        let program = libc::sock_fprog { len: 4, filter: program.as_mut_ptr() };
        let len = libc::socklen_t::try_from(size_of_val(&program)).unwrap_or(0);
        // SAFETY: the program and its four steps outlive the call, which copies them; the descriptor is open.
        let result = unsafe {
            libc::setsockopt(
                std::os::fd::AsRawFd::as_raw_fd(&self.socket),
                libc::SOL_SOCKET,
                libc::SO_ATTACH_FILTER,
                (&raw const program).cast(),
                len,
            )
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    fn open(family: NlFamily, groups: Groups) -> io::Result<Self> {
        let socket = NlSocket::connect(family, None, groups)?;
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
