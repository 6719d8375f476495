//! Moves bytes between a [`Reconciler`] and the kernel.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;
use std::time::Instant;

use log::{debug, warn};
use mio::{Interest, Registry, Token};

use super::reconcile::Reconciler;
use crate::sys::netlink::{Netlink, Received};

/// Datagrams of one kind that are handled in one turn.
const BUDGET: usize = 64;
/// The longest datagram that the kernel makes.
const DATAGRAM: usize = 32 << 10;

/// The two netlink sockets of one network.
#[derive(Debug)]
pub struct Port {
    requests: Netlink,
    notices: Netlink,
    buffer: Vec<u8>,
    /// Settings that could not be made; said once each.
    refused: BTreeSet<Box<str>>,
}

impl Port {
    /// Opens both sockets. The one for notifications comes first, so that nothing is missed.
    ///
    /// # Errors
    /// As `socket(2)`.
    pub fn open() -> io::Result<Self> {
        let notices = Netlink::notices()?;
        Ok(Self {
            requests: Netlink::requests()?,
            notices,
            buffer: vec![0; DATAGRAM],
            refused: BTreeSet::new(),
        })
    }

    /// What marks notifications of our own doings; see [`super::Scope::port`].
    pub fn number(&self) -> u32 {
        self.requests.port()
    }

    /// Makes both sockets known to the loop. Readiness of either is answered with [`Port::turn`].
    ///
    /// # Errors
    /// As `epoll_ctl(2)`.
    pub fn register(
        &mut self,
        registry: &Registry,
        requests: Token,
        notices: Token,
    ) -> io::Result<()> {
        registry.register(&mut self.requests, requests, Interest::READABLE)?;
        registry.register(&mut self.notices, notices, Interest::READABLE)
    }

    /// Undoes [`Port::register`].
    ///
    /// # Errors
    /// As `epoll_ctl(2)`.
    pub fn deregister(&mut self, registry: &Registry) -> io::Result<()> {
        registry.deregister(&mut self.requests)?;
        registry.deregister(&mut self.notices)
    }

    /// Reads what waits and writes what is to be written, both within a budget. Returns whether there is more to do.
    ///
    /// # Errors
    /// A socket is broken for good.
    pub fn turn(&mut self, reconciler: &mut Reconciler, now: Instant) -> io::Result<bool> {
        let mut more = true;
        for _ in 0..BUDGET {
            match self.notices.recv(&mut self.buffer)? {
                Received::Datagram(len) => reconciler.handle_notice(&self.buffer[..len], now),
                Received::Overrun => reconciler.handle_lost_notices(now),
                Received::Nothing => {
                    more = false;
                    break;
                }
            }
        }
        for _ in 0..BUDGET {
            match self.requests.recv(&mut self.buffer)? {
                Received::Datagram(len) => {
                    reconciler.handle_reply(&self.buffer[..len], now);
                    continue;
                }
                Received::Overrun => reconciler.handle_lost_replies(now),
                Received::Nothing => {}
            }
            let Some(datagram) = reconciler.poll_transmit(now) else {
                self.apply_sysctls(reconciler);
                return Ok(more);
            };
            if let Err(error) = self.requests.send(datagram) {
                debug!("netlink request: {error}");
                reconciler.handle_lost_replies(now);
                self.apply_sysctls(reconciler);
                return Ok(more);
            }
            self.apply_sysctls(reconciler);
        }
        Ok(true)
    }

    /// A kernel setting that cannot be had is worth a warning, not more: the system may forbid it for good reasons.
    fn apply_sysctls(&mut self, reconciler: &mut Reconciler) {
        while let Some((path, value)) = reconciler.poll_sysctl() {
            let file = Path::new("/proc/sys").join(&*path);
            let result = match fs::read_to_string(&file) {
                Ok(current) if current.trim_end() == &*value => continue,
                Ok(_) => fs::write(&file, value.as_bytes()),
                Err(error) => Err(error),
            };
            match result {
                Ok(()) => debug!("sysctl {path} = {value}"),
                // in a container's file system nothing of the sort can be set, and nobody can do anything about it
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::ReadOnlyFilesystem
                    ) =>
                {
                    debug!("sysctl {path} = {value}: {error}");
                }
                Err(error) if self.refused.insert(path.clone()) => {
                    warn!("sysctl {path} = {value}: {error}; set it on the host");
                }
                Err(_) => {}
            }
        }
    }
}
