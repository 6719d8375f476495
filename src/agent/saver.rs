//! Writes the saved view beside the loop: a slow disk must not hold up packets or timers.

use std::io;
use std::path::PathBuf;
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use crate::view;

/// The thread does nothing but write.
const STACK: usize = 64 << 10;
/// How often it is looked whether the disk has it.
const LOOK: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub(super) struct Saver {
    running: Option<(JoinHandle<io::Result<()>>, Instant)>,
}

impl Saver {
    /// Begins to write. The last view must not be on its way any more.
    pub(super) fn start(&mut self, dir: PathBuf, content: Vec<u8>, now: Instant) -> io::Result<()> {
        let write = move || view::write(&dir, &content);
        let thread = Builder::new().name("saver".into()).stack_size(STACK).spawn(write)?;
        self.running = Some((thread, now + LOOK));
        Ok(())
    }

    /// Is a view on its way?
    pub(super) fn is_busy(&self) -> bool {
        self.running.is_some()
    }

    /// How it went, once that is known.
    pub(super) fn poll(&mut self, now: Instant) -> Option<io::Result<()>> {
        let (thread, look_at) = self.running.as_mut()?;
        if !thread.is_finished() {
            if *look_at <= now {
                *look_at = now + LOOK;
            }
            return None;
        }
        self.wait()
    }

    /// Waits for the end.
    pub(super) fn wait(&mut self) -> Option<io::Result<()>> {
        let (thread, _) = self.running.take()?;
        Some(
            thread.join().unwrap_or_else(|_| {
                Err(io::Error::other("the thread that saves the view has failed"))
            }),
        )
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.running.as_ref().map(|(_, look_at)| *look_at)
    }
}
