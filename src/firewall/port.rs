//! Moves bytes between a [`Firewall`] and the kernel's `nf_tables`.

use std::io;
use std::time::Instant;

use mio::{Interest, Registry, Token};

use super::Firewall;
use crate::sys::netlink::{Netlink, Received};

/// Datagrams of one kind that are handled in one turn.
const BUDGET: usize = 64;
/// Bytes of answers that are handled in one turn: of a long list about two milliseconds' worth, so that packets of the udp
/// backend need not wait for more.
const BYTES: usize = 256 << 10;
/// The longest datagram that the kernel makes.
const DATAGRAM: usize = 32 << 10;

/// The two netlink sockets: for requests, and for the news that somebody has changed something.
#[derive(Debug)]
pub struct Port {
    requests: Netlink,
    notices: Netlink,
    buffer: Vec<u8>,
}

impl Port {
    /// Opens both sockets. The one for news comes first, so that nothing is missed.
    ///
    /// # Errors
    /// As `socket(2)`: this kernel has no netfilter netlink.
    pub fn open() -> io::Result<Self> {
        let notices = Netlink::ruleset_notices(super::nft::wire::NEWGEN)?;
        Ok(Self { requests: Netlink::ruleset_requests()?, notices, buffer: vec![0; DATAGRAM] })
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

    /// Reads what waits and writes what is to be written, both within a budget. Returns whether there is more to do.
    ///
    /// # Errors
    /// A socket is broken for good.
    pub fn turn(&mut self, firewall: &mut Firewall, now: Instant) -> io::Result<bool> {
        let mut more = true;
        for _ in 0..BUDGET {
            match self.notices.recv(&mut self.buffer)? {
                Received::Datagram(len) => {
                    firewall.native().handle_notice(&self.buffer[..len], now);
                }
                Received::Overrun => firewall.native().handle_lost_notices(now),
                Received::Nothing => {
                    more = false;
                    break;
                }
            }
        }
        let mut bytes = 0;
        for _ in 0..BUDGET {
            if bytes > BYTES {
                return Ok(true);
            }
            match self.requests.recv(&mut self.buffer)? {
                Received::Datagram(len) => {
                    firewall.handle_reply(&self.buffer[..len], now);
                    bytes += len;
                    continue;
                }
                Received::Overrun => firewall.native().handle_lost_replies(now),
                Received::Nothing => {}
            }
            let Some(datagram) = firewall.poll_transmit(now) else { return Ok(more) };
            if let Err(error) = self.requests.send(datagram) {
                firewall.native().handle_send_error(&error, now);
                return Ok(more);
            }
        }
        Ok(true)
    }
}
