//! Network namespaces, for tests: a thread gets one of its own.

#![allow(unsafe_code)]

use std::io;

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
