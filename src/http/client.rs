//! The HTTP client of one store: two lanes, each with one exchange at most and one connection that is kept between them.
//!
//! The loop calls [`Client::ready`] for events of tokens that [`Client::owns`], [`Client::handle_waker`] when the waker
//! fired, and [`Client::handle_timeout`] when [`Client::poll_timeout`] has passed. Everything that happens to an exchange
//! comes out through the `sink` of these calls; [`Client::start`] and [`Client::cancel`] never call back.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::{Registry, Token, Waker};

use super::conn::{Conn, Turn};
use super::credentials::{Fields, Keeper};
use super::endpoint::{Endpoint, Host};
use super::resolve::Resolver;
use super::tls::{Tls, Transport};
use super::{Access, HttpEvent, Request};
use crate::store::Lane;

/// How long a name may take to be resolved: glibc gives each name server five seconds.
const RESOLVE: Duration = Duration::from_secs(30);
/// A watch that has so much to say that it speaks again within twice this time is listened to at such intervals: waking up is
/// dearer than reading.
const PAUSE: Duration = Duration::from_millis(20);
/// How long a credential plugin may take.
const PLUGIN: Duration = Duration::from_secs(65);
/// How long one address may take to connect while there are others to try.
const CONNECT: Duration = Duration::from_secs(3);
/// How long connecting may take at all when the request has no deadline of its own.
const CONNECT_AT_ALL: Duration = Duration::from_secs(10);

/// Who hears what happens to exchanges.
pub type Sink<'a> = &'a mut dyn FnMut(Lane, HttpEvent<'_>);

/// The client.
#[derive(Debug)]
pub struct Client {
    endpoints: Vec<Endpoint>,
    tls: Option<Tls>,
    keeper: Keeper,
    resolver: Resolver,
    /// Tokens from here up are ours: one for each connection ever opened.
    first_token: usize,
    opened: usize,
    lanes: [Slot; 2],
}

/// One lane.
#[derive(Debug, Default)]
struct Slot {
    state: State,
    /// The number of the connection, for telling its events from those of an earlier one.
    number: usize,
}

#[derive(Debug, Default)]
#[allow(clippy::large_enum_variant)] // there are two of them
enum State {
    /// Nothing is asked; a connection to this endpoint may be kept.
    #[default]
    Free,
    Kept {
        endpoint: usize,
        conn: Conn,
    },
    /// It failed before anything was sent; to be told at the next opportunity.
    Failed {
        reason: String,
        since: Instant,
    },
    /// A credential plugin is running.
    Waiting {
        request: Request,
        until: Instant,
    },
    /// The request's own limits begin when its name is known: a resolver may take longer than they allow.
    Resolving {
        request: Request,
        until: Instant,
        ticket: u64,
    },
    Busy(Box<Busy>),
}

/// An exchange with a connection.
#[derive(Debug)]
struct Busy {
    conn: Conn,
    request: Request,
    limits: Limits,
    /// Addresses not tried yet.
    others: VecDeque<SocketAddr>,
    /// When this address has had its time.
    connect_by: Option<Instant>,
    /// The budget ran out in the last turn.
    more_since: Option<Instant>,
    /// When it was heard of last.
    heard_at: Option<Instant>,
    /// Nobody listens until then.
    paused_until: Option<Instant>,
    /// The server does not know us: the next request goes over a connection of its own, with the certificate that we have then.
    refused: bool,
}

/// When to give up.
#[derive(Debug, Clone, Copy)]
struct Limits {
    deadline: Option<Instant>,
    silence: Option<(Duration, Instant)>,
}

impl Limits {
    fn new(request: &Request, now: Instant) -> Self {
        Self {
            deadline: request.deadline.map(|after| now + after),
            silence: request.silence.map(|after| (after, now + after)),
        }
    }

    fn next(&self) -> Option<Instant> {
        self.deadline.into_iter().chain(self.silence.map(|(_, at)| at)).min()
    }

    fn passed(&self, now: Instant) -> Option<&'static str> {
        if self.deadline.is_some_and(|at| at <= now) {
            return Some("no complete answer in time");
        }
        self.silence
            .is_some_and(|(_, at)| at <= now)
            .then_some("the server has been silent for too long")
    }
}

impl Client {
    /// A client of these servers. TLS files are read now, if any endpoint takes TLS.
    ///
    /// # Errors
    /// The text says what is wrong with an endpoint or a file.
    pub fn new(access: Access, waker: Arc<Waker>, first_token: usize) -> Result<Self, String> {
        let Access { endpoints, tls, credentials } = access;
        let parsed: Result<Vec<Endpoint>, _> = endpoints.iter().map(|url| url.parse()).collect();
        let endpoints = parsed.map_err(|error| error.to_string())?;
        let tls = endpoints.iter().any(Endpoint::is_tls).then(|| Tls::load(tls)).transpose()?;
        let keeper = Keeper::new(credentials, Arc::clone(&waker));
        let resolver = Resolver::new(waker);
        let lanes = Default::default();
        Ok(Self { endpoints, tls, keeper, resolver, first_token, opened: 0, lanes })
    }

    /// Starts an exchange on a free lane.
    pub fn start(&mut self, lane: Lane, mut request: Request, registry: &Registry, now: Instant) {
        match self.keeper.fields(now) {
            Ok(Fields::Ready(fields)) => request.headers.extend(fields),
            Ok(Fields::Later) => {
                self.cancel(lane, registry);
                self.lanes[index(lane)].state = State::Waiting { request, until: now + PLUGIN };
                return;
            }
            Err(reason) => {
                self.cancel(lane, registry);
                self.lanes[index(lane)].state = State::Failed { reason, since: now };
                return;
            }
        }
        if self.tls.as_mut().is_some_and(Tls::refresh) {
            self.drop_kept(registry);
        }
        let limits = Limits::new(&request, now);
        let Some(request) = self.reuse(lane, request, limits, registry, now) else { return };
        let slot = &mut self.lanes[index(lane)];
        let Some(endpoint) = self.endpoints.get(request.endpoint) else {
            slot.state = State::Failed { reason: "there is no such endpoint".into(), since: now };
            return;
        };
        match endpoint.host.clone() {
            Host::Address(address) => {
                let addresses = VecDeque::from([SocketAddr::new(address, endpoint.port)]);
                self.connect(lane, request, limits, addresses, registry, now);
            }
            Host::Name(name) => {
                self.opened += 1;
                let ticket = self.opened as u64;
                slot.state = match self.resolver.ask(ticket, &name, endpoint.port) {
                    Ok(()) => State::Resolving { request, until: now + RESOLVE, ticket },
                    Err(reason) => State::Failed { reason, since: now },
                };
            }
        }
    }

    /// Puts the request on the connection that was kept, if it is fit and leads to the right server; gives it back if not.
    fn reuse(
        &mut self,
        lane: Lane,
        request: Request,
        limits: Limits,
        registry: &Registry,
        now: Instant,
    ) -> Option<Request> {
        let slot = &mut self.lanes[index(lane)];
        match std::mem::take(&mut slot.state) {
            State::Kept { endpoint, mut conn } => {
                if endpoint != request.endpoint || !conn.is_fit() {
                    conn.close(registry);
                    return Some(request);
                }
                slot.state = match conn.start(&self.endpoints[endpoint], &request) {
                    Ok(()) => State::Busy(Box::new(Busy {
                        conn,
                        request,
                        limits,
                        others: VecDeque::new(),
                        connect_by: None,
                        // its socket is writable and says so no more: the first turn comes by itself
                        more_since: Some(now),
                        heard_at: None,
                        paused_until: None,
                        refused: false,
                    })),
                    Err(reason) => State::Failed { reason, since: now },
                };
                None
            }
            State::Busy(mut busy) => {
                busy.conn.close(registry);
                Some(request)
            }
            _ => Some(request),
        }
    }

    /// Drops the exchange on this lane, and its connection.
    pub fn cancel(&mut self, lane: Lane, registry: &Registry) {
        match std::mem::take(&mut self.lanes[index(lane)].state) {
            State::Busy(mut busy) => busy.conn.close(registry),
            State::Kept { mut conn, .. } => conn.close(registry),
            _ => {}
        }
    }

    /// Is this token one of ours?
    pub fn owns(&self, token: Token) -> bool {
        token.0 >= self.first_token
    }

    /// Something happened to the connection with this token.
    pub fn ready(&mut self, token: Token, registry: &Registry, now: Instant, sink: Sink<'_>) {
        for lane in [Lane::Unary, Lane::Watch] {
            if self.first_token + self.lanes[index(lane)].number == token.0 {
                self.turn(lane, registry, now, sink);
            }
        }
    }

    /// Connections that were opened as somebody else are of no more use.
    fn drop_kept(&mut self, registry: &Registry) {
        for slot in &mut self.lanes {
            if let State::Kept { conn, .. } = &mut slot.state {
                conn.close(registry);
                slot.state = State::Free;
            }
        }
    }

    /// The waker has fired: names may have been resolved, a credential plugin may have ended.
    pub fn handle_waker(&mut self, registry: &Registry, now: Instant) {
        self.handle_resolved(registry, now);
        let (answered, identity) = self.keeper.handle_answer(now);
        let set = self.tls.as_mut().zip(identity).map(|(tls, identity)| tls.set_identity(identity));
        if set.is_some() {
            self.drop_kept(registry);
        }
        for lane in [Lane::Unary, Lane::Watch] {
            let state = &mut self.lanes[index(lane)].state;
            match (std::mem::take(state), &set) {
                (State::Waiting { .. }, Some(Err(reason))) => {
                    *state = State::Failed { reason: reason.clone(), since: now };
                }
                (State::Waiting { request, .. }, _) if answered => {
                    self.start(lane, request, registry, now);
                }
                (other, _) => *state = other,
            }
        }
    }

    fn handle_resolved(&mut self, registry: &Registry, now: Instant) {
        while let Some(answer) = self.resolver.next() {
            for lane in [Lane::Unary, Lane::Watch] {
                let state = &mut self.lanes[index(lane)].state;
                match std::mem::take(state) {
                    State::Resolving { request, ticket, .. } if ticket == answer.ticket => {
                        let limits = Limits::new(&request, now);
                        match &answer.addresses {
                            Ok(found) => self.connect(
                                lane,
                                request,
                                limits,
                                found.iter().copied().collect(),
                                registry,
                                now,
                            ),
                            Err(reason) => {
                                *state = State::Failed { reason: reason.clone(), since: now }
                            }
                        }
                    }
                    other => *state = other,
                }
            }
        }
    }

    /// When [`Client::handle_timeout`] wants to be called. In the past when there is something to do at once.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let due = |slot: &Slot| match &slot.state {
            State::Free | State::Kept { .. } => None,
            State::Failed { since, .. } => Some(*since),
            State::Resolving { until, .. } | State::Waiting { until, .. } => Some(*until),
            State::Busy(busy) => {
                let limits = busy.limits.next().into_iter().chain(busy.connect_by);
                limits.chain(busy.more_since).chain(busy.paused_until).min()
            }
        };
        self.lanes.iter().filter_map(due).min()
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, registry: &Registry, now: Instant, sink: Sink<'_>) {
        for lane in [Lane::Unary, Lane::Watch] {
            let slot = &mut self.lanes[index(lane)];
            match &mut slot.state {
                State::Free | State::Kept { .. } => {}
                State::Failed { reason, .. } => {
                    let reason = std::mem::take(reason);
                    self.fail(lane, None, &reason, registry, sink);
                }
                State::Waiting { until, .. } => {
                    if *until <= now {
                        self.fail(
                            lane,
                            None,
                            "the credential plugin took too long",
                            registry,
                            sink,
                        );
                    }
                }
                State::Resolving { until, request, .. } => {
                    if *until <= now {
                        let endpoint = request.endpoint;
                        self.fail(
                            lane,
                            Some(endpoint),
                            "its name was not resolved in time",
                            registry,
                            sink,
                        );
                    }
                }
                State::Busy(busy) => {
                    let endpoint = busy.request.endpoint;
                    if let Some(reason) = busy.limits.passed(now) {
                        let reason = if busy.conn.is_connected() {
                            reason
                        } else {
                            "connecting took too long"
                        };
                        self.fail(lane, Some(endpoint), reason, registry, sink);
                    } else if busy.connect_by.is_some_and(|at| at <= now) {
                        self.try_next(lane, "connecting took too long", registry, now, sink);
                    } else if busy.paused_until.is_some_and(|at| at <= now) {
                        self.resume(lane, registry, now, sink);
                    } else if busy.more_since.is_some() {
                        self.turn(lane, registry, now, sink);
                    }
                }
            }
        }
    }

    /// Connects to the first of these addresses that can be tried.
    fn connect(
        &mut self,
        lane: Lane,
        request: Request,
        limits: Limits,
        mut addresses: VecDeque<SocketAddr>,
        registry: &Registry,
        now: Instant,
    ) {
        let mut reason = "it has no address".to_owned();
        while let Some(address) = addresses.pop_front() {
            self.opened += 1;
            let number = self.opened;
            match self.open(address, &request, registry, number) {
                Ok(conn) => {
                    let connect_by = match (addresses.is_empty(), limits.deadline) {
                        (false, _) => Some(now + CONNECT),
                        (true, None) => Some(now + CONNECT_AT_ALL),
                        (true, Some(_)) => None,
                    };
                    let busy = Busy {
                        conn,
                        request,
                        limits,
                        others: addresses,
                        connect_by,
                        more_since: None,
                        heard_at: None,
                        paused_until: None,
                        refused: false,
                    };
                    self.lanes[index(lane)] = Slot { state: State::Busy(Box::new(busy)), number };
                    return;
                }
                Err(error) => reason = error,
            }
        }
        let reason = format!("{}: {reason}", self.endpoints[request.endpoint]);
        self.lanes[index(lane)].state = State::Failed { reason, since: now };
    }

    fn open(
        &self,
        address: SocketAddr,
        request: &Request,
        registry: &Registry,
        number: usize,
    ) -> Result<Conn, String> {
        let endpoint = &self.endpoints[request.endpoint];
        let transport = match (&self.tls, endpoint.tls, &endpoint.host) {
            (Some(tls), true, Host::Name(name)) => tls.session(name)?,
            (Some(tls), true, Host::Address(address)) => tls.session(&address.to_string())?,
            _ => Transport::Plain,
        };
        let token = Token(self.first_token + number);
        let mut conn =
            Conn::open(address, transport, registry, token).map_err(|error| error.to_string())?;
        conn.start(endpoint, request)?;
        Ok(conn)
    }

    fn turn(&mut self, lane: Lane, registry: &Registry, now: Instant, sink: Sink<'_>) {
        let slot = &mut self.lanes[index(lane)];
        let busy = match &mut slot.state {
            State::Busy(busy) => busy,
            // whatever an idle connection has to say, it can be kept no longer
            State::Kept { conn, .. } => {
                if !conn.is_fit() {
                    conn.close(registry);
                    slot.state = State::Free;
                }
                return;
            }
            _ => return,
        };
        // an event from before the pause
        if busy.paused_until.is_some() {
            return;
        }
        busy.more_since = None;
        let mut refused = false;
        let turn = busy.conn.turn(&mut |event| {
            refused |= matches!(event, HttpEvent::Head { status: 401, .. });
            sink(lane, event);
        });
        if refused {
            self.keeper.refused();
            busy.refused = true;
        }
        if busy.conn.is_connected() {
            busy.connect_by = None;
        }
        if busy.conn.heard() {
            if let Some((after, at)) = &mut busy.limits.silence {
                *at = now + *after;
            }
            let before = busy.heard_at.replace(now);
            if lane == Lane::Watch
                && turn == Ok(Turn::Waiting)
                && before.is_some_and(|before| now.saturating_duration_since(before) < PAUSE * 2)
            {
                busy.conn.pause(registry);
                busy.paused_until = Some(now + PAUSE);
            }
        }
        match turn {
            Ok(Turn::Waiting) => {}
            Ok(Turn::More) => busy.more_since = Some(now),
            Ok(Turn::Done { reusable }) => {
                if let State::Busy(mut busy) = std::mem::take(&mut slot.state) {
                    if reusable && !busy.refused {
                        slot.state =
                            State::Kept { endpoint: busy.request.endpoint, conn: busy.conn };
                    } else {
                        busy.conn.close(registry);
                    }
                }
                sink(lane, HttpEvent::Done);
            }
            Err(reason) if !busy.conn.is_connected() => {
                self.try_next(lane, &reason, registry, now, sink)
            }
            Err(reason) => {
                let endpoint = busy.request.endpoint;
                self.fail(lane, Some(endpoint), &reason, registry, sink);
            }
        }
    }

    /// The pause of a busy watch is over.
    fn resume(&mut self, lane: Lane, registry: &Registry, now: Instant, sink: Sink<'_>) {
        let Slot { state: State::Busy(busy), number } = &mut self.lanes[index(lane)] else {
            return;
        };
        busy.paused_until = None;
        match busy.conn.resume(registry, Token(self.first_token + *number)) {
            Ok(()) => self.turn(lane, registry, now, sink),
            Err(reason) => {
                let endpoint = busy.request.endpoint;
                self.fail(lane, Some(endpoint), &reason, registry, sink);
            }
        }
    }

    /// This address did not work: on to the next, if there is one.
    fn try_next(
        &mut self,
        lane: Lane,
        reason: &str,
        registry: &Registry,
        now: Instant,
        sink: Sink<'_>,
    ) {
        let State::Busy(mut busy) = std::mem::take(&mut self.lanes[index(lane)].state) else {
            return;
        };
        busy.conn.close(registry);
        let endpoint = busy.request.endpoint;
        if busy.others.is_empty() {
            self.fail(lane, Some(endpoint), reason, registry, sink);
        } else {
            self.connect(lane, busy.request, busy.limits, busy.others, registry, now);
        }
    }

    fn fail(
        &mut self,
        lane: Lane,
        endpoint: Option<usize>,
        reason: &str,
        registry: &Registry,
        sink: Sink<'_>,
    ) {
        self.cancel(lane, registry);
        match endpoint.and_then(|at| self.endpoints.get(at)) {
            Some(endpoint) => sink(lane, HttpEvent::Failed(&format!("{endpoint}: {reason}"))),
            None => sink(lane, HttpEvent::Failed(reason)),
        }
    }
}

fn index(lane: Lane) -> usize {
    match lane {
        Lane::Unary => 0,
        Lane::Watch => 1,
    }
}
