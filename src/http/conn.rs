//! One connection: a socket, what lies on it (TLS or nothing), and the exchange that it carries.

use std::io;
use std::net::SocketAddr;

use mio::net::TcpStream;
use mio::{Interest, Registry, Token};

use super::exchange::Exchange;
use super::tls::{Fill, Transport};
use super::{Endpoint, HttpEvent, Request};
use crate::sys::tcp;

/// Bytes read at one turn, about; the loop has other work too.
const BUDGET: usize = 64 * 1024;

/// What one turn came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Wait for the socket.
    Waiting,
    /// The budget is used up: come back without waiting.
    More,
    /// The exchange is complete. The connection may carry another one, or not.
    Done { reusable: bool },
}

/// A connection.
#[derive(Debug)]
pub(super) struct Conn {
    socket: TcpStream,
    connected: bool,
    transport: Transport,
    exchange: Option<Exchange>,
    out: Vec<u8>,
    sent: usize,
    /// Received and not consumed yet.
    input: Vec<u8>,
    /// Something was received for the exchange under way.
    heard: bool,
}

impl Conn {
    /// Begins to connect.
    pub(super) fn open(
        address: SocketAddr,
        transport: Transport,
        registry: &Registry,
        token: Token,
    ) -> io::Result<Self> {
        let mut socket = TcpStream::connect(address)?;
        socket.set_nodelay(true)?;
        tcp::notice_dead_peer(&socket)?;
        registry.register(&mut socket, token, Interest::READABLE | Interest::WRITABLE)?;
        Ok(Self {
            socket,
            connected: false,
            transport,
            exchange: None,
            out: Vec::new(),
            sent: 0,
            input: Vec::new(),
            heard: false,
        })
    }

    /// Puts a request on the connection, which carries none.
    pub(super) fn start(&mut self, endpoint: &Endpoint, request: &Request) -> Result<(), String> {
        self.out.clear();
        self.sent = 0;
        self.heard = false;
        self.exchange = Some(Exchange::new(endpoint, request, &mut self.out)?);
        Ok(())
    }

    /// Can an idle connection carry another request? Whatever arrived meanwhile, an end or bytes that nobody asked for,
    /// says no.
    pub(super) fn is_fit(&mut self) -> bool {
        let fill = self.transport.fill(&mut self.socket, &mut self.input, 1);
        matches!(fill, Ok(Fill::Drained)) && self.input.is_empty()
    }

    /// Is the connection established?
    pub(super) fn is_connected(&self) -> bool {
        self.connected
    }

    /// Takes the connection out of the poll; called before it is dropped.
    pub(super) fn close(&mut self, registry: &Registry) {
        // dropping the socket closes it, whatever this says
        let _ = registry.deregister(&mut self.socket);
    }

    /// Does not look at the socket for a while.
    pub(super) fn pause(&mut self, registry: &Registry) {
        self.close(registry);
    }

    /// Looks at the socket again, under the same token.
    ///
    /// # Errors
    /// As `epoll_ctl(2)`.
    pub(super) fn resume(&mut self, registry: &Registry, token: Token) -> Result<(), String> {
        let interest = Interest::READABLE | Interest::WRITABLE;
        registry.register(&mut self.socket, token, interest).map_err(|error| error.to_string())
    }

    /// Was anything received for the exchange under way since the last call?
    pub(super) fn heard(&mut self) -> bool {
        std::mem::take(&mut self.heard)
    }

    /// Moves the exchange on as far as the socket allows.
    ///
    /// # Errors
    /// What broke the connection or the exchange; the connection is of no more use.
    pub(super) fn turn(&mut self, sink: &mut dyn FnMut(HttpEvent<'_>)) -> Result<Turn, String> {
        if !self.connected && !self.check_connected()? {
            return Ok(Turn::Waiting);
        }
        let Some(exchange) = &mut self.exchange else { return Ok(Turn::Waiting) };
        // a server may answer before it has read everything, and close: the answer counts
        let flushed = self.transport.flush(&mut self.socket, &self.out, &mut self.sent);
        let before = self.input.len();
        let fill = self.transport.fill(&mut self.socket, &mut self.input, BUDGET);
        self.heard |= self.input.len() > before;
        let used = exchange.consume(&self.input, sink)?;
        self.input.drain(..used);
        if exchange.done().is_none() && matches!(fill, Ok(Fill::Closed)) {
            exchange.handle_close()?;
        }
        if let Some(reusable) = exchange.done() {
            self.exchange = None;
            let whole = self.sent == self.out.len() && self.input.is_empty();
            return Ok(Turn::Done {
                reusable: reusable && whole && matches!(fill, Ok(Fill::Drained)),
            });
        }
        flushed.map_err(|error| error.to_string())?;
        let fill = fill.map_err(|error| error.to_string())?;
        // reading may give TLS something to say
        self.transport
            .flush(&mut self.socket, &self.out, &mut self.sent)
            .map_err(|error| error.to_string())?;
        Ok(if fill == Fill::More { Turn::More } else { Turn::Waiting })
    }

    /// The three steps that mio prescribes for finding out how connecting went.
    fn check_connected(&mut self) -> Result<bool, String> {
        if let Ok(Some(error)) | Err(error) = self.socket.take_error() {
            return Err(error.to_string());
        }
        match self.socket.peer_addr() {
            Ok(_) => {
                self.connected = true;
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(false),
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(false),
            Err(error) => Err(error.to_string()),
        }
    }
}
