//! Network namespaces, for tests: a thread gets one of its own, or enters one with a name.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Moves the calling thread into a new, empty network namespace (`unshare(2)`). The namespace goes with the thread.
///
/// # Errors
/// Needs `CAP_SYS_ADMIN`.
pub fn unshare() -> io::Result<()> {
    // SAFETY: a system call without pointers; it concerns the calling thread only.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Moves the calling thread into the network namespace that `ip netns` made under this name (`setns(2)`).
///
/// # Errors
/// There is none of that name. Needs `CAP_SYS_ADMIN`.
pub fn enter(name: &str) -> io::Result<()> {
    let namespace = File::open(format!("/run/netns/{name}"))?;
    // SAFETY: a system call without pointers, on a descriptor that is open; it concerns the calling thread only.
    if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
