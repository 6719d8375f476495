//! What a message is to the kernel: `struct msghdr`, its name, its parts, and the ancillary message beside it.

#![allow(unsafe_code)]
// sizes and constants have types of their own in each C library
#![allow(clippy::cast_possible_truncation, clippy::unnecessary_cast)]

use std::net::{IpAddr, SocketAddr};

use super::{MESSAGES, PARTS};

/// Room for one ancillary message with a number in it, aligned as the kernel wants it.
pub(super) type Control = [u64; 4];

/// What the kernel reads and writes during a call. Its pointers are set before each call and mean nothing after it.
pub(super) struct Arrays {
    pub(super) headers: [libc::mmsghdr; MESSAGES],
    pub(super) names: [libc::sockaddr_in6; MESSAGES],
    pub(super) controls: [Control; MESSAGES],
    pub(super) parts: [libc::iovec; PARTS],
}

/// Sets name and parts. (Some libraries have padding fields, so the structure is not made by a literal.)
#[inline]
pub(super) fn fill(
    header: &mut libc::msghdr,
    name: &mut libc::sockaddr_in6,
    parts: (*mut libc::iovec, usize),
) {
    header.msg_name = (&raw mut *name).cast();
    header.msg_namelen = size_of::<libc::sockaddr_in6>() as libc::socklen_t;
    header.msg_iov = parts.0;
    header.msg_iovlen = parts.1 as _;
    header.msg_flags = 0;
}

/// Writes an address to where an address of either family fits. Returns its length.
#[inline]
pub(super) fn set_address(name: &mut libc::sockaddr_in6, address: SocketAddr) -> libc::socklen_t {
    match address {
        SocketAddr::V4(v4) => {
            // SAFETY: all zeroes is a value of a structure of integers.
            let mut short: libc::sockaddr_in = unsafe { std::mem::zeroed() };
            short.sin_family = libc::AF_INET as libc::sa_family_t;
            short.sin_port = v4.port().to_be();
            short.sin_addr.s_addr = u32::from_ne_bytes(v4.ip().octets());
            // SAFETY: a sockaddr_in6 is longer than a sockaddr_in and aligned as strictly; both consist of integers.
            unsafe { (&raw mut *name).cast::<libc::sockaddr_in>().write(short) };
            size_of::<libc::sockaddr_in>() as libc::socklen_t
        }
        SocketAddr::V6(v6) => {
            name.sin6_family = libc::AF_INET6 as libc::sa_family_t;
            name.sin6_port = v6.port().to_be();
            name.sin6_flowinfo = 0;
            name.sin6_addr.s6_addr = v6.ip().octets();
            name.sin6_scope_id = v6.scope_id();
            size_of::<libc::sockaddr_in6>() as libc::socklen_t
        }
    }
}

/// The address that the kernel wrote.
#[inline]
pub(super) fn address(name: &libc::sockaddr_in6) -> IpAddr {
    if name.sin6_family == libc::AF_INET as libc::sa_family_t {
        // SAFETY: a sockaddr_in6 is longer than a sockaddr_in and aligned as strictly; both consist of integers.
        let short = unsafe { (&raw const *name).cast::<libc::sockaddr_in>().read() };
        IpAddr::V4(short.sin_addr.s_addr.to_ne_bytes().into())
    } else {
        IpAddr::V6(name.sin6_addr.s6_addr.into())
    }
}

/// Offset of the data in an ancillary message.
const CONTROL_DATA: usize =
    size_of::<libc::cmsghdr>().next_multiple_of(align_of::<libc::cmsghdr>());

/// Writes the ancillary message that makes a run. Returns its length.
#[inline]
pub(super) fn set_segment(control: &mut Control, segment: u16) -> usize {
    let len = CONTROL_DATA + size_of::<u16>();
    // SAFETY: all zeroes is a value of a structure of integers (and padding).
    let mut header: libc::cmsghdr = unsafe { std::mem::zeroed() };
    header.cmsg_len = len as _;
    header.cmsg_level = libc::SOL_UDP;
    header.cmsg_type = libc::UDP_SEGMENT;
    let start: *mut u8 = control.as_mut_ptr().cast();
    // SAFETY: a Control has room for a cmsghdr and a number behind it, and is aligned as strictly.
    unsafe {
        start.cast::<libc::cmsghdr>().write(header);
        start.add(CONTROL_DATA).cast::<u16>().write_unaligned(segment);
    }
    len.next_multiple_of(size_of::<usize>())
}

/// Reads the length of the datagrams in a run from the `len` bytes of ancillary messages that the kernel wrote.
#[inline]
pub(super) fn segment(control: &Control, len: usize) -> Option<usize> {
    if len < CONTROL_DATA + size_of::<libc::c_int>() || len > size_of::<Control>() {
        return None;
    }
    let start: *const u8 = control.as_ptr().cast();
    // SAFETY: the kernel wrote `len` bytes, a header and a number among them, and a Control is aligned for it.
    let (header, value) = unsafe {
        (
            start.cast::<libc::cmsghdr>().read(),
            start.add(CONTROL_DATA).cast::<libc::c_int>().read_unaligned(),
        )
    };
    let is_ours = header.cmsg_level == libc::SOL_UDP && header.cmsg_type == libc::UDP_GRO;
    is_ours.then(|| usize::try_from(value).unwrap_or(0))
}
