//! TCP options that std does not offer.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Makes the kernel notice a peer that vanished without a word: probes after 30 s of silence, and gives up on data that
/// stay unacknowledged for 30 s (`tcp(7)`).
///
/// # Errors
/// As `setsockopt(2)`.
pub fn notice_dead_peer(socket: &impl AsFd) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
    set(socket, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 30)?;
    set(socket, libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 10)?;
    set(socket, libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 3)?;
    set(socket, libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 30_000)
}

fn set(
    socket: &impl AsFd,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    let size = libc::socklen_t::try_from(size_of_val(&value)).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open while it is borrowed; the pointer is to a c_int that outlives the call.
    let result = unsafe {
        libc::setsockopt(socket.as_fd().as_raw_fd(), level, option, (&raw const value).cast(), size)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
