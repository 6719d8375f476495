//! The UDP socket of the data plane, which does not block: bursts of datagrams out and in, many in one call.
//!
//! * A message out may hold a run of up to 64 equal datagrams, the last of which may be shorter (`UDP_SEGMENT`, `udp(7)`).
//!   A run needs an interface that computes checksums, or a kernel that does it in its place (6.11): else `EIO`.
//!   (`sendmmsg` of musl is a loop around `sendmsg`; there a run is what is worth it.)
//! * A message in may hold such a run too, with the length of each datagram beside it (`UDP_GRO`).
//! * Path MTU: datagrams carry "don't fragment", as they do by default, but one that is too long for its way is refused
//!   (`EMSGSIZE`) instead of being cut: the sender of what is in it is to be told. Where the system does not discover path
//!   MTUs (`net.ipv4.ip_no_pmtu_disc`), this socket does not either.

#![allow(unsafe_code)]
// sizes and constants have types of their own in each C library
#![allow(clippy::cast_possible_truncation, clippy::unnecessary_cast)]

mod message;

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use mio::net::UdpSocket;

use self::message::{Arrays, Control};
use super::buffer;

/// Messages in one call, at most.
pub const MESSAGES: usize = 64;
/// Bytes that each received message has room for: the longest there is.
pub const SLOT: usize = 65_536;
/// Parts of all messages of one call, at most. (One message may have 1024.)
const PARTS: usize = 512;

/// Socket buffers in bytes. A run counts for the memory that the kernel spends on it, which is more than its bytes.
const RECEIVE_BUFFER: usize = 4 << 20;
const SEND_BUFFER: usize = 2 << 20;

/// A bound UDP socket.
pub struct UdpPort {
    socket: UdpSocket,
    local: SocketAddr,
    /// Does a datagram that is too long for its way fail? Else it is cut.
    strict: bool,
    arrays: Box<Arrays>,
}

impl fmt::Debug for UdpPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "UdpPort({})", self.local)
    }
}

/// A message that came in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Received {
    /// Bytes.
    pub len: usize,
    /// Bytes of each datagram in it, but the last.
    pub segment: usize,
    /// Who sent it.
    pub from: IpAddr,
}

impl Received {
    /// To be overwritten.
    pub const NONE: Self =
        Self { len: 0, segment: 0, from: IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED) };
}

impl UdpPort {
    /// Binds to one address of this host, which is then the source of everything sent.
    ///
    /// # Errors
    /// The text names the address, and what to do when it is taken.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let socket = open(address).map_err(|error| {
            let remedy = match error.kind() {
                io::ErrorKind::AddrInUse => {
                    "; another flanneld or VXLAN device has the port: set Backend.Port"
                }
                _ => "",
            };
            io::Error::new(error.kind(), format!("listen on UDP {address}: {error}{remedy}"))
        })?;
        buffer::grow_receive(&socket, RECEIVE_BUFFER);
        buffer::grow_send(&socket, SEND_BUFFER);
        // SAFETY: integers, byte arrays and raw pointers, for all of which zeroes are a value.
        let arrays = Box::new(unsafe { std::mem::zeroed::<Arrays>() });
        let mut port = Self { socket, local: address, strict: false, arrays };
        let (level, option, default, _) = port.discovery();
        port.strict = port.get(level, option).is_ok_and(|value| value == default);
        port.allow_fragments(false);
        Ok(port)
    }

    /// The address that it is bound to.
    pub fn local(&self) -> SocketAddr {
        self.local
    }

    /// Does the kernel know runs of datagrams in one message?
    pub fn has_gso(&self) -> bool {
        self.set(libc::SOL_UDP, libc::UDP_SEGMENT, 0).is_ok()
    }

    /// Has runs of datagrams received as one message, or no longer. `false` when the kernel does not know how.
    pub fn set_gro(&self, on: bool) -> bool {
        self.set(libc::SOL_UDP, libc::UDP_GRO, on.into()).is_ok()
    }

    /// Cuts datagrams that are too long for their way, or refuses them (`EMSGSIZE`), as the kernel is told by `ip(7)`.
    pub fn allow_fragments(&self, allow: bool) {
        if self.strict {
            let (level, option, default, strict) = self.discovery();
            // both values are known to every kernel
            let _ = self.set(level, option, if allow { default } else { strict });
        }
    }

    /// Level, option, default value, and the value for "never longer than the way carries".
    fn discovery(&self) -> (libc::c_int, libc::c_int, libc::c_int, libc::c_int) {
        if self.local.is_ipv4() {
            (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_WANT, libc::IP_PMTUDISC_DO)
        } else {
            (
                libc::IPPROTO_IPV6,
                libc::IPV6_MTU_DISCOVER,
                libc::IPV6_PMTUDISC_WANT,
                libc::IPV6_PMTUDISC_DO,
            )
        }
    }

    /// The longest IP packet in bytes that the kernel believes the way to `to` carries.
    ///
    /// # Errors
    /// As `connect(2)`: no way.
    pub fn path_mtu(&self, to: SocketAddr) -> io::Result<u32> {
        let probe = std::net::UdpSocket::bind(SocketAddr::new(self.local.ip(), 0))?;
        probe.connect(to)?;
        let (level, option) = if to.is_ipv4() {
            (libc::IPPROTO_IP, libc::IP_MTU)
        } else {
            (libc::IPPROTO_IPV6, libc::IPV6_MTU)
        };
        get(&probe, level, option).map(|mtu| u32::try_from(mtu).unwrap_or(0))
    }

    /// Begins a burst.
    pub fn burst<'p, 'd>(&'p mut self) -> Burst<'p, 'd> {
        Burst { port: self, messages: 0, parts: 0, data: PhantomData }
    }

    /// Reads as many messages as wait, up to the length of `received`: message `n` into `buffer` from `n` × [`SLOT`] on.
    /// `WouldBlock` when none waits.
    ///
    /// # Errors
    /// As `recvmmsg(2)`.
    pub fn receive(&mut self, buffer: &mut [u8], received: &mut [Received]) -> io::Result<usize> {
        let slots = buffer.chunks_exact_mut(SLOT).take(received.len().min(MESSAGES));
        let Arrays { headers, names, controls, parts } = &mut *self.arrays;
        let mut count: libc::c_uint = 0;
        for ((((slot, header), name), control), part) in
            slots.zip(&mut *headers).zip(&mut *names).zip(&mut *controls).zip(&mut *parts)
        {
            *part = libc::iovec { iov_base: slot.as_mut_ptr().cast(), iov_len: slot.len() };
            header.msg_len = 0;
            message::fill(&mut header.msg_hdr, name, (&raw mut *part, 1));
            header.msg_hdr.msg_control = control.as_mut_ptr().cast();
            header.msg_hdr.msg_controllen = size_of::<Control>() as _;
            count += 1;
        }
        // SAFETY: the first `count` headers point to names, controls and parts in `self.arrays`, which is borrowed mutably
        // until the call returns, with their true lengths; the parts point to disjoint chunks of `buffer`, likewise.
        let got = unsafe {
            libc::recvmmsg(
                self.socket.as_raw_fd(),
                headers.as_mut_ptr(),
                count,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        };
        let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
        for (((received, header), name), control) in
            received.iter_mut().zip(&*headers).zip(&*names).zip(&*controls).take(got)
        {
            let len = header.msg_len as usize;
            let segment = message::segment(control, header.msg_hdr.msg_controllen as usize);
            *received = Received {
                len,
                segment: segment.filter(|segment| *segment > 0).unwrap_or(len).max(1),
                from: message::address(name),
            };
        }
        Ok(got)
    }

    fn set(&self, level: libc::c_int, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
        set(&self.socket, level, option, value)
    }

    fn get(&self, level: libc::c_int, option: libc::c_int) -> io::Result<libc::c_int> {
        get(&self.socket, level, option)
    }
}

fn set(
    socket: &impl AsRawFd,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the descriptor is open while it is borrowed; the pointer is to a c_int that outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn get(socket: &impl AsRawFd, level: libc::c_int, option: libc::c_int) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the descriptor is open while it is borrowed; value and length outlive the call and agree.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, option, (&raw mut value).cast(), &raw mut len)
    };
    if result == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

/// A bound socket that does not block.
///
/// A new IPv6 address is not to be bound to while its host looks for others who have it (RFC 4862), for one or two seconds:
/// `IP_FREEBIND` allows it all the same. What is sent meanwhile is refused.
fn open(address: SocketAddr) -> io::Result<UdpSocket> {
    if address.is_ipv4() {
        return UdpSocket::bind(address);
    }
    let kind = libc::SOCK_DGRAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: a system call without pointers.
    let descriptor = unsafe { libc::socket(libc::AF_INET6, kind, 0) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new, open, and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(descriptor) };
    // without it only the address's first seconds are lost
    let _ = set(&socket, libc::IPPROTO_IP, libc::IP_FREEBIND, 1);
    // SAFETY: all zeroes is a value of a structure of integers.
    let mut name: libc::sockaddr_in6 = unsafe { std::mem::zeroed() };
    let len = message::set_address(&mut name, address);
    // SAFETY: name and length agree, and the name outlives the call.
    if unsafe { libc::bind(socket.as_raw_fd(), (&raw const name).cast(), len) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(UdpSocket::from_std(socket.into()))
}

/// Messages that are put together for one call. What their parts point to is borrowed until then.
#[derive(Debug)]
pub struct Burst<'p, 'd> {
    port: &'p mut UdpPort,
    messages: usize,
    parts: usize,
    data: PhantomData<&'d [u8]>,
}

impl<'d> Burst<'_, 'd> {
    /// Adds a message of these parts, one after the other. With `segment` it is a run of datagrams of so many bytes.
    /// `false`, and nothing added, when the burst is full; one message of up to 128 parts always fits into an empty one.
    #[inline]
    pub fn add<'e>(
        &mut self,
        to: SocketAddr,
        segment: Option<u16>,
        parts: impl ExactSizeIterator<Item = &'d [u8]>,
    ) -> bool {
        let (index, first, count) = (self.messages, self.parts, parts.len());
        let arrays = &mut *self.port.arrays;
        if index == MESSAGES || first + count > PARTS {
            return false;
        }
        let room = &mut arrays.parts[first..first + count];
        for (room, part) in room.iter_mut().zip(parts) {
            // the kernel only reads through this pointer
            *room = libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() };
        }
        let (header, name) = (&mut arrays.headers[index].msg_hdr, &mut arrays.names[index]);
        let name_len = message::set_address(name, to);
        message::fill(header, name, (room.as_mut_ptr(), count));
        header.msg_namelen = name_len;
        header.msg_control = std::ptr::null_mut();
        header.msg_controllen = 0;
        if let Some(segment) = segment {
            let control = &mut arrays.controls[index];
            header.msg_controllen = message::set_segment(control, segment) as _;
            header.msg_control = control.as_mut_ptr().cast();
        }
        self.messages += 1;
        self.parts += count;
        true
    }

    /// Sends. Returns how many messages have gone: at least one.
    ///
    /// # Errors
    /// Those of the first message, as `sendmsg(2)`; then none has gone. `WouldBlock` when the send buffer is full: the
    /// socket becomes writable.
    pub fn send(self) -> io::Result<usize> {
        let count = libc::c_uint::try_from(self.messages).unwrap_or(0);
        // SAFETY: the first `count` headers point into `port.arrays`, which is borrowed mutably, with true lengths; the
        // parts point to data that is borrowed for 'd, which outlives this burst.
        let sent = unsafe {
            libc::sendmmsg(
                self.port.socket.as_raw_fd(),
                self.port.arrays.headers.as_mut_ptr(),
                count,
                libc::MSG_DONTWAIT as _,
            )
        };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }
}

/// Does this error say that a datagram is longer than its way carries, or than one can be?
pub fn is_too_long(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EMSGSIZE)
}

/// Does this error say that the interface cannot send runs?
pub fn is_not_able(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EIO)
}

/// Does this error say that the kernel does not know what it was asked for?
pub fn is_invalid(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EINVAL)
}

/// Does this error say that there is no way to the host?
pub fn is_unreachable(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENETUNREACH | libc::EHOSTUNREACH))
}

super::source::source_by_descriptor!(UdpPort, socket);
