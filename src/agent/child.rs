//! One child process at a time, beside the loop: its pipes are events like others, and it is ended when it takes too long.

use std::io::{self, Read, Write};
use std::process::Child;
use std::time::{Duration, Instant};

use mio::unix::pipe::{Receiver, Sender};
use mio::{Interest, Registry};

use super::token;
use crate::firewall::legacy::{Command, Finished};
use crate::sys;

/// A program that takes longer is ended.
const PATIENCE: Duration = Duration::from_secs(15);
/// What is kept of the output: a rule set of some hundred thousand rules.
const OUTPUT: usize = 64 << 20;
/// What is kept of the complaints.
const COMPLAINT: usize = 4 << 10;
/// Reads of 16 KiB in one turn, at most.
const BUDGET: usize = 16;
/// A child that has closed its pipes is about to end; its end is looked for this often.
const LOOK: Duration = Duration::from_millis(5);

/// A running program.
#[derive(Debug)]
pub(super) struct Running {
    child: Child,
    /// What it is still to be given; `None` when it has all.
    input: Option<(Sender, Vec<u8>)>,
    output: Pipe,
    complaint: Pipe,
    deadline: Instant,
    look_at: Option<Instant>,
}

#[derive(Debug)]
struct Pipe {
    /// `None` at its end.
    receiver: Option<Receiver>,
    bytes: Vec<u8>,
    limit: usize,
}

impl Running {
    /// Starts `command`.
    ///
    /// # Errors
    /// It cannot be started, or be watched.
    pub(super) fn start(command: &Command, registry: &Registry, now: Instant) -> io::Result<Self> {
        let mut child = sys::child::spawn(&command.program, &command.args)?;
        let input =
            child.stdin.take().map(|pipe| (Sender::from(pipe), command.input.clone().into()));
        let output = child.stdout.take().map(Receiver::from);
        let complaint = child.stderr.take().map(Receiver::from);
        let mut running = Self {
            child,
            input,
            output: Pipe { receiver: output, bytes: Vec::new(), limit: OUTPUT },
            complaint: Pipe { receiver: complaint, bytes: Vec::new(), limit: COMPLAINT },
            deadline: now + PATIENCE,
            look_at: Some(now),
        };
        if let Some((sender, _)) = &mut running.input {
            sender.set_nonblocking(true)?;
            registry.register(sender, token::CHILD_INPUT, Interest::WRITABLE)?;
        }
        for (pipe, token) in [
            (&mut running.output, token::CHILD_OUTPUT),
            (&mut running.complaint, token::CHILD_COMPLAINT),
        ] {
            if let Some(receiver) = &mut pipe.receiver {
                receiver.set_nonblocking(true)?;
                registry.register(receiver, token, Interest::READABLE)?;
            }
        }
        Ok(running)
    }

    /// Reads what there is to read. Returns how it ended, once it has.
    pub(super) fn turn(&mut self, registry: &Registry, now: Instant) -> Option<Finished> {
        self.give(registry);
        let more = self.output.read(registry) | self.complaint.read(registry);
        let closed = self.output.receiver.is_none() && self.complaint.receiver.is_none();
        if !closed && now < self.deadline {
            self.look_at = more.then_some(now);
            return None;
        }
        let status = match self.child.try_wait() {
            Ok(Some(status)) => status.code(),
            Ok(None) if now < self.deadline => {
                self.look_at = Some(now + LOOK);
                return None;
            }
            Ok(None) | Err(_) => {
                let _ = self.child.kill();
                let _ = self.child.wait();
                None
            }
        };
        self.output.close(registry);
        self.complaint.close(registry);
        if let Some((mut sender, _)) = self.input.take() {
            let _ = registry.deregister(&mut sender);
        }
        Some(Finished {
            status,
            output: std::mem::take(&mut self.output.bytes),
            complaint: String::from_utf8_lossy(&self.complaint.bytes).into_owned(),
        })
    }

    /// Writes what fits. A program that does not want it says why when it ends.
    fn give(&mut self, registry: &Registry) {
        while let Some((sender, left)) = &mut self.input {
            match sender.write(left) {
                Ok(len @ 1..) if len < left.len() => drop(left.drain(..len)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                _ => {
                    let _ = registry.deregister(sender);
                    self.input = None;
                }
            }
        }
    }

    pub(super) fn poll_timeout(&self) -> Instant {
        self.look_at.unwrap_or(self.deadline)
    }
}

/// The agent ends, or gives up on it.
impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

impl Pipe {
    /// Reads what there is, up to a limit. Returns whether there may be more.
    fn read(&mut self, registry: &Registry) -> bool {
        let mut chunk = [0; 16 << 10];
        for _ in 0..BUDGET {
            let Some(receiver) = &mut self.receiver else { return false };
            match receiver.read(&mut chunk) {
                Ok(0) => self.close(registry),
                Ok(len) => {
                    let room = self.limit.saturating_sub(self.bytes.len());
                    self.bytes.extend_from_slice(&chunk[..len.min(room)]);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Err(_) => self.close(registry),
            }
        }
        true
    }

    fn close(&mut self, registry: &Registry) {
        if let Some(mut receiver) = self.receiver.take() {
            let _ = registry.deregister(&mut receiver);
        }
    }
}
