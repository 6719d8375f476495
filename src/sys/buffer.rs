//! Socket buffers.

#![allow(unsafe_code)]

use std::os::fd::AsRawFd;

/// Asks for a receive buffer of `bytes`: beyond the system's limit when we may (`CAP_NET_ADMIN`), else up to it. Less than
/// asked for is no error.
pub fn grow_receive(socket: &impl AsRawFd, bytes: usize) {
    grow(socket, [libc::SO_RCVBUFFORCE, libc::SO_RCVBUF], bytes);
}

/// The same for the send buffer.
pub fn grow_send(socket: &impl AsRawFd, bytes: usize) {
    grow(socket, [libc::SO_SNDBUFFORCE, libc::SO_SNDBUF], bytes);
}

fn grow(socket: &impl AsRawFd, options: [libc::c_int; 2], bytes: usize) {
    let value = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    let Ok(size) = libc::socklen_t::try_from(size_of_val(&value)) else { return };
    for option in options {
        // SAFETY: the descriptor is open while it is borrowed; the pointer is to a c_int that outlives the call.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                option,
                (&raw const value).cast(),
                size,
            )
        };
        if result == 0 {
            return;
        }
    }
}
