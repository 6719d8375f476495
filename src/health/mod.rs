//! `/healthz` and `/readyz` (control-plane spec 1.8), and `/status`, answered by the loop itself: a loop that hangs does not
//! answer.
//!
//! The first two have upstream's bodies to the byte; `/status` is `name value` lines that the owner of the loop makes. Why
//! something is not ready is in the header `X-Flannel-Reason`. Every connection carries one exchange, and there are few of
//! them for a short time.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use log::debug;
use mio::net::{TcpListener, TcpStream};
use mio::{Interest, Registry, Token};

/// Connections at one time; more wait in the kernel.
const MOST: usize = 32;
/// Longest request, in bytes.
const LONGEST: usize = 8 * 1024;
/// How long a client may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// The health server.
#[derive(Debug)]
pub struct Health {
    listener: TcpListener,
    /// The listener's token; connections have the ones above.
    first_token: usize,
    connections: [Option<Connection>; MOST],
    /// There may be connections to accept that no event will announce again.
    waiting: bool,
    unready: Option<String>,
}

#[derive(Debug)]
struct Connection {
    socket: TcpStream,
    until: Instant,
    request: Vec<u8>,
    answer: Vec<u8>,
    sent: usize,
}

impl Health {
    /// Listens at `address`. Not ready to begin with.
    ///
    /// # Errors
    /// The text names the address and the flags.
    pub fn listen(
        address: SocketAddr,
        registry: &Registry,
        first_token: usize,
    ) -> io::Result<Self> {
        let open = || -> io::Result<TcpListener> {
            let mut listener = TcpListener::bind(address)?;
            registry.register(&mut listener, Token(first_token), Interest::READABLE)?;
            Ok(listener)
        };
        let explain = |error: io::Error| {
            io::Error::new(
                error.kind(),
                format!("listen on {address} (-healthz-ip, -healthz-port): {error}"),
            )
        };
        Ok(Self {
            listener: open().map_err(explain)?,
            first_token,
            connections: Default::default(),
            waiting: false,
            unready: Some("starting".into()),
        })
    }

    /// Says why flanneld is not ready, or that it is.
    pub fn set_unready(&mut self, unready: Option<String>) {
        self.unready = unready;
    }

    /// Is this token one of ours?
    pub fn owns(&self, token: Token) -> bool {
        (self.first_token..=self.first_token + MOST).contains(&token.0)
    }

    /// Something happened to the listener or a connection. `status` makes the page of that name.
    pub fn ready(
        &mut self,
        token: Token,
        registry: &Registry,
        now: Instant,
        status: &dyn Fn() -> String,
    ) {
        match (token.0 - self.first_token).checked_sub(1) {
            None => self.waiting = true,
            Some(at) => self.serve(at, status),
        }
        self.accept(registry, now, status);
    }

    /// When [`Health::handle_timeout`] wants to be called.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.connections.iter().flatten().map(|connection| connection.until).min()
    }

    /// Drops clients that take too long.
    pub fn handle_timeout(
        &mut self,
        registry: &Registry,
        now: Instant,
        status: &dyn Fn() -> String,
    ) {
        for slot in &mut self.connections {
            if slot.as_ref().is_some_and(|connection| connection.until <= now) {
                *slot = None;
            }
        }
        self.accept(registry, now, status);
    }

    fn accept(&mut self, registry: &Registry, now: Instant, status: &dyn Fn() -> String) {
        while self.waiting {
            let Some(at) = self.connections.iter().position(Option::is_none) else { return };
            match self.listener.accept() {
                Ok((mut socket, _)) => {
                    let token = Token(self.first_token + 1 + at);
                    let interests = Interest::READABLE | Interest::WRITABLE;
                    if let Err(error) = registry.register(&mut socket, token, interests) {
                        debug!("a health check was dropped: {error}");
                        continue;
                    }
                    let until = now + PATIENCE;
                    let connection = Connection {
                        socket,
                        until,
                        request: Vec::new(),
                        answer: Vec::new(),
                        sent: 0,
                    };
                    self.connections[at] = Some(connection);
                    self.serve(at, status);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.waiting = false,
                // the client has gone already, or descriptors are short: the next event tries again
                Err(error) => {
                    debug!("a health check was not accepted: {error}");
                    self.waiting = false;
                }
            }
        }
    }

    fn serve(&mut self, at: usize, status: &dyn Fn() -> String) {
        let Some(slot) = self.connections.get_mut(at) else { return };
        if let Some(connection) = slot
            && connection.turn(self.unready.as_deref(), status)
        {
            *slot = None;
        }
    }
}

impl Connection {
    /// Moves on as far as the socket allows; says whether this was the end.
    fn turn(&mut self, unready: Option<&str>, status: &dyn Fn() -> String) -> bool {
        if self.answer.is_empty() {
            match self.read() {
                Ok(true) => self.answer = answer(&self.request, unready, status),
                Ok(false) => return false,
                Err(_) => return true,
            }
        }
        while self.sent < self.answer.len() {
            match self.socket.write(&self.answer[self.sent..]) {
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Err(_) => return true,
            }
        }
        true
    }

    /// Is the request's head complete?
    fn read(&mut self) -> io::Result<bool> {
        let mut piece = [0; 1024];
        loop {
            match self.socket.read(&mut piece) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.request.extend_from_slice(&piece[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
            if self.request.windows(4).any(|end| end == b"\r\n\r\n") || self.request.len() > LONGEST
            {
                return Ok(true);
            }
        }
    }
}

/// The whole answer to a request, of which only the first line matters.
fn answer(request: &[u8], unready: Option<&str>, status_page: &dyn Fn() -> String) -> Vec<u8> {
    let page;
    let line = request.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let words: Vec<&str> = std::str::from_utf8(line).unwrap_or_default().split(' ').collect();
    let path = match words[..] {
        [_, target, version] if version.starts_with("HTTP/1.") => target.split('?').next(),
        _ => None,
    };
    let (status, body) = match (path, unready) {
        (Some("/healthz"), _) => ("200 OK", "flanneld is running"),
        (Some("/readyz"), None) => ("200 OK", "flanneld is ready"),
        (Some("/readyz"), Some(_)) => ("503 Service Unavailable", "flanneld is not ready yet"),
        (Some("/status"), _) => {
            page = status_page();
            ("200 OK", &*page)
        }
        (Some(_), _) => ("404 Not Found", "404 page not found\n"),
        (None, _) => ("400 Bad Request", "400 Bad Request\n"),
    };
    let reason = match (path, unready) {
        (Some("/readyz"), Some(reason)) => {
            let plain = |c: char| if c.is_ascii_graphic() || c == ' ' { c } else { '?' };
            format!("X-Flannel-Reason: {}\r\n", reason.chars().map(plain).collect::<String>())
        }
        _ => String::new(),
    };
    let body = if words.first() == Some(&"HEAD") { ("", body.len()) } else { (body, body.len()) };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\n{reason}\
         Connection: close\r\n\r\n{}",
        body.1, body.0
    )
    .into_bytes()
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)]
mod tests {
    use std::net::TcpStream as Blocking;

    use mio::{Events, Poll};

    use super::*;

    fn page() -> String {
        "backend udp\n".into()
    }

    fn text(request: &str, unready: Option<&str>) -> String {
        String::from_utf8(answer(request.as_bytes(), unready, &page)).unwrap()
    }

    /// Control-plane spec 1.8.
    #[test]
    fn bodies_are_upstreams() {
        let check = |request: &str, unready, status: &str, body: &str| {
            let answer = text(request, unready);
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
            assert!(answer.ends_with(&format!("\r\n\r\n{body}")), "{answer}");
        };
        check("GET /healthz HTTP/1.1\r\n\r\n", Some("x"), "200", "flanneld is running");
        check("POST /healthz?verbose HTTP/1.0\r\n\r\n", None, "200", "flanneld is running");
        check("GET /readyz HTTP/1.1\r\n\r\n", None, "200", "flanneld is ready");
        check("GET /readyz HTTP/1.1\r\n\r\n", Some("x"), "503", "flanneld is not ready yet");
        check("GET /status HTTP/1.1\r\n\r\n", None, "200", "backend udp\n");
        check("GET / HTTP/1.1\r\n\r\n", None, "404", "404 page not found\n");
        check("HEAD /readyz HTTP/1.1\r\n\r\n", None, "200", "");
        for garbage in ["", "\r\n", "GET /healthz\r\n\r\n", "\u{0}\u{1}", "GET  /healthz HTTP/1.1"]
        {
            check(garbage, None, "400", "400 Bad Request\n");
        }
    }

    #[test]
    fn reason_cannot_forge_a_header() {
        let answer = text("GET /readyz HTTP/1.1\r\n\r\n", Some("peer said\r\nX-Evil: é"));
        assert!(answer.contains("X-Flannel-Reason: peer said??X-Evil: ?\r\n"), "{answer}");
    }

    #[test]
    fn serves_more_clients_than_it_has_room_for_and_drops_slow_ones() {
        let mut poll = Poll::new().unwrap();
        let registry = poll.registry().try_clone().unwrap();
        let mut health = Health::listen("127.0.0.1:0".parse().unwrap(), &registry, 100).unwrap();
        let address = health.listener.local_addr().unwrap();
        let start = Instant::now();
        let slow: Vec<Blocking> = (0..MOST).map(|_| Blocking::connect(address).unwrap()).collect();
        let client = std::thread::spawn(move || {
            let mut quick = Blocking::connect(address).unwrap();
            quick.write_all(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
            let mut answer = String::new();
            quick.read_to_string(&mut answer).unwrap();
            answer
        });
        health.set_unready(None);
        let mut events = Events::with_capacity(64);
        // a clock that runs ahead of the real one
        for tick in 0..1000u32 {
            poll.poll(&mut events, Some(Duration::from_millis(5))).unwrap();
            let now = start + tick * Duration::from_millis(20);
            for event in &events {
                assert!(health.owns(event.token()));
                health.ready(event.token(), &registry, now, &page);
            }
            if health.poll_timeout().is_some_and(|at| at <= now) {
                health.handle_timeout(&registry, now, &page);
            }
            if client.is_finished() {
                break;
            }
        }
        assert!(client.join().unwrap().ends_with("flanneld is ready"));
        drop(slow);
    }
}
