//! Termination signals as readable events (`signalfd(2)`).

#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// SIGTERM and SIGINT, caught.
#[derive(Debug)]
pub struct Signals {
    fd: OwnedFd,
}

impl Signals {
    /// Blocks both signals for this thread and the ones it starts later, so it is called before any other thread exists.
    ///
    /// # Errors
    /// As `signalfd(2)`.
    pub fn catch() -> io::Result<Self> {
        let set = set();
        mask(libc::SIG_BLOCK, &set)?;
        // SAFETY: the set was initialised and lives until the call returns; -1 asks for a new descriptor.
        let fd =
            unsafe { libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call succeeded, so the descriptor is open and nobody else's.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// The name of a signal that has arrived, if one has.
    pub fn next(&self) -> Option<&'static str> {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: the buffer is writable and `size` bytes long.
        let read = unsafe { libc::read(self.fd.as_raw_fd(), info.as_mut_ptr().cast(), size) };
        if usize::try_from(read) != Ok(size) {
            return None;
        }
        // SAFETY: the kernel filled the whole structure, which consists of integers.
        let info = unsafe { info.assume_init() };
        Some(if i32::try_from(info.ssi_signo) == Ok(libc::SIGINT) { "SIGINT" } else { "SIGTERM" })
    }

    /// Gives the signals their usual effect again, so that a second one ends the process at once.
    ///
    /// # Errors
    /// As `pthread_sigmask(3)`.
    pub fn release(self) -> io::Result<()> {
        mask(libc::SIG_UNBLOCK, &set())
    }
}

fn set() -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set it is given.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    for signal in [libc::SIGTERM, libc::SIGINT] {
        // SAFETY: the set is initialised, the signal number is valid.
        unsafe { libc::sigaddset(set.as_mut_ptr(), signal) };
    }
    // SAFETY: initialised above.
    unsafe { set.assume_init() }
}

fn mask(how: libc::c_int, set: &libc::sigset_t) -> io::Result<()> {
    // SAFETY: the set lives until the call returns; the old mask is not asked for.
    match unsafe { libc::pthread_sigmask(how, &raw const *set, std::ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

super::source::source_by_descriptor!(Signals, fd);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_read_and_not_acted_on() {
        let signals = Signals::catch().unwrap();
        assert_eq!(signals.next(), None);
        // SAFETY: sends a signal that this thread blocks to this thread.
        unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGTERM) };
        assert_eq!(signals.next(), Some("SIGTERM"));
        assert_eq!(signals.next(), None);
    }
}
