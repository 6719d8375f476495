//! Child processes whose output is read without blocking for ever.

#![allow(unsafe_code)]

use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What is kept of a pipe's content, in bytes.
const KEPT: usize = 1 << 20;
/// How long a pipe is read after the program has ended: a child of its own may keep it open.
const AFTER: Duration = Duration::from_millis(200);
/// How often it is looked whether the program has ended.
const LOOK: Duration = Duration::from_millis(20);

/// How a program ended.
#[derive(Debug)]
pub struct Finished {
    /// Exit status; none when a signal ended it, ours included.
    pub status: Option<i32>,
    /// What it wrote.
    pub output: Vec<u8>,
    /// What it wrote to its standard error.
    pub complaint: Vec<u8>,
}

/// Starts a program with pipes for input, output and errors. It has the usual signal mask: ours, in which the termination
/// signals are blocked, would make it deaf to them.
///
/// # Errors
/// As `execve(2)`.
pub fn spawn(program: &Path, args: &[&str]) -> io::Result<Child> {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::piped());
    start(command)
}

/// Runs a program to its end, without input; blocks. After `patience` it is ended, and all that it has started.
///
/// # Errors
/// It cannot be started.
#[allow(clippy::disallowed_methods)] // for threads beside the loop
pub fn run(mut command: Command, patience: Duration) -> io::Result<Finished> {
    command.stdin(Stdio::null()).process_group(0);
    let mut deadline = Instant::now() + patience;
    let mut child = start(command)?;
    let mut status = None;
    let (mut output, mut complaint) = (Vec::new(), Vec::new());
    let (mut stdout, mut stderr) = (child.stdout.take(), child.stderr.take());
    while stdout.is_some() || stderr.is_some() {
        let now = Instant::now();
        if status.is_none() {
            status = child.try_wait()?;
            if status.is_some() {
                deadline = deadline.min(now + AFTER);
            }
        }
        let left = deadline.saturating_duration_since(now).min(LOOK);
        if left.is_zero() {
            break;
        }
        let fd = |fd: Option<i32>| libc::pollfd {
            fd: fd.unwrap_or(-1),
            events: libc::POLLIN,
            revents: 0,
        };
        let mut fds = [
            fd(stdout.as_ref().map(AsRawFd::as_raw_fd)),
            fd(stderr.as_ref().map(AsRawFd::as_raw_fd)),
        ];
        let millis = i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX);
        // SAFETY: the pointer and the count are those of an array that lives until the call returns.
        unsafe { libc::poll(fds.as_mut_ptr(), 2, millis) };
        if fds[0].revents != 0 && !read(&mut stdout, &mut output) {
            stdout = None;
        }
        if fds[1].revents != 0 && !read(&mut stderr, &mut complaint) {
            stderr = None;
        }
    }
    // it has closed its pipes, or its time is over
    while status.is_none() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
        status = child.try_wait()?;
    }
    if status.is_none() {
        if let Ok(group) = i32::try_from(child.id()) {
            // SAFETY: a system call without pointers. The group is the child's own, and the child was not waited for: the
            // number is nobody else's.
            unsafe { libc::kill(-group, libc::SIGKILL) };
        }
        let _ = child.wait();
    }
    Ok(Finished { status: status.and_then(|status| status.code()), output, complaint })
}

/// Reads what there is. Returns whether there may be more.
fn read(pipe: &mut Option<impl Read>, into: &mut Vec<u8>) -> bool {
    let mut chunk = [0; 4096];
    let Some(pipe) = pipe else { return false };
    match pipe.read(&mut chunk) {
        Ok(0) => false,
        Ok(len) => {
            let room = KEPT.saturating_sub(into.len());
            into.extend_from_slice(&chunk[..len.min(room)]);
            true
        }
        Err(error) => error.kind() == io::ErrorKind::Interrupted,
    }
}

fn start(mut command: Command) -> io::Result<Child> {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    // SAFETY: the closure runs between fork and exec and calls nothing but sigemptyset and sigprocmask, which are
    // async-signal-safe; it allocates nothing.
    unsafe {
        command.pre_exec(|| {
            let mut set = MaybeUninit::<libc::sigset_t>::uninit();
            libc::sigemptyset(set.as_mut_ptr());
            match libc::sigprocmask(libc::SIG_SETMASK, set.as_ptr(), std::ptr::null_mut()) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        });
    }
    command.spawn()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str, patience: Duration) -> Finished {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        run(command, patience).unwrap()
    }

    #[test]
    fn runs_to_the_end() {
        let finished = sh("echo out; echo err >&2; exit 7", Duration::from_secs(20));
        assert_eq!(finished.status, Some(7));
        assert_eq!((&*finished.output, &*finished.complaint), (&b"out\n"[..], &b"err\n"[..]));
    }

    #[test]
    fn is_ended_when_it_takes_too_long() {
        for script in ["exec sleep 100", "exec >&- 2>&-; exec sleep 100", "sleep 100; true"] {
            let finished = sh(script, Duration::from_millis(100));
            assert_eq!(finished.status, None, "{script}");
        }
    }

    /// A child of its own keeps the pipes: that is no reason to wait for that one.
    #[test]
    #[allow(clippy::disallowed_methods)]
    fn its_children_are_not_waited_for() {
        let start = Instant::now();
        let finished = sh("echo out; sleep 5 &", Duration::from_secs(20));
        assert_eq!((finished.status, &*finished.output), (Some(0), &b"out\n"[..]));
        assert!(start.elapsed() < Duration::from_secs(3));
    }
}
