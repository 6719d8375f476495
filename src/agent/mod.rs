//! The agent: one thread, one loop. It alone reads clocks and waits; everything else is told.
//!
//! Each wake-up reads the clock once, hands every ready descriptor to its owner, lets the network do what is due within
//! budgets, and sleeps until the next descriptor or the earliest deadline.

mod child;
mod clean_up;
mod clock;
mod dataplane;
mod network;
mod rules;
mod saver;
mod token;
mod tunnel;

use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{debug, info, warn};
use mio::{Events, Interest, Poll, Waker};

pub use self::clean_up::clean_up;
use self::network::Network;
use crate::cli::{Settings, settings};
use crate::config::NetworkConfig;
use crate::health::Health;
use crate::http::client::Client;
use crate::http::{Access, Credentials, Pem, TlsSettings};
use crate::store::Store;
use crate::store::etcd::Etcd;
use crate::store::kube::{self, Kube};
use crate::sys::random;
use crate::sys::signal::Signals;
use crate::{kubeconfig, notify};

/// Ends the process: what failed and what to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fatal(pub String);

impl fmt::Display for Fatal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Fatal {}

/// Context for errors of set-up calls.
fn fatal(what: &str) -> impl FnOnce(io::Error) -> Fatal {
    move |error| Fatal(format!("{what}: {error}"))
}

/// Runs until SIGTERM or SIGINT. `notify_socket` is the value of `NOTIFY_SOCKET`.
///
/// # Errors
/// What keeps this host from joining for as long as nobody changes something.
pub fn run(settings: Settings, notify_socket: Option<OsString>) -> Result<(), Fatal> {
    let mut signals = Signals::catch().map_err(fatal("catch signals"))?;
    let mut poll = Poll::new().map_err(fatal("set up the event loop"))?;
    let registry = poll.registry().try_clone().map_err(fatal("set up the event loop"))?;
    registry
        .register(&mut signals, token::SIGNALS, Interest::READABLE)
        .map_err(fatal("watch signals"))?;
    let waker = Arc::new(Waker::new(&registry, token::WAKER).map_err(fatal("set up the waker"))?);

    info!("flanneld {}, {}", env!("CARGO_PKG_VERSION"), settings.notes.options);
    settings.notes.warnings.iter().for_each(|warning| warn!("{warning}"));
    let mut health = match settings.health {
        Some(address) => {
            let health = Health::listen(address, &registry, token::HEALTH).map_err(|error| {
                Fatal(format!("listen on {address} for health checks: {error}"))
            })?;
            info!("health checks are answered on {address}");
            Some(health)
        }
        None => None,
    };

    let mut seed = [0; 8];
    random::fill(&mut seed).map_err(fatal("read random bytes"))?;
    let (store, access) = store(&settings, u64::from_ne_bytes(seed)).map_err(Fatal)?;
    let client = Client::new(access, waker, token::HTTP).map_err(Fatal)?;
    let mut network = Network::new(settings, store, client, clock::now());

    let mut ready = Readiness::new(notify_socket);
    let mut events = Events::with_capacity(64);
    loop {
        let now = clock::now();
        if network.turn(&registry, now)? {
            ready.update(network.unready());
            if let Some(health) = &mut health {
                health.set_unready(ready.unready.clone());
            }
        }
        if let Some(health) = &mut health
            && health.poll_timeout().is_some_and(|at| at <= now.mono)
        {
            health.handle_timeout(&registry, now.mono, &|| network.status());
        }
        let deadlines =
            [network.poll_timeout(now.mono), health.as_ref().and_then(Health::poll_timeout)];
        wait(&mut poll, &mut events, deadlines.into_iter().flatten().min(), now.mono)?;
        let now = clock::now();
        for event in &events {
            let token = event.token();
            if token == token::SIGNALS {
                if let Some(name) = signals.next() {
                    info!("{name}: leaving; devices, routes, lease and files stay as they are");
                    // a second signal ends the process at once
                    signals.release().map_err(fatal("release signals"))?;
                    network.stop(now.mono);
                    return Ok(());
                }
            } else if let Some(health) = health.as_mut().filter(|health| health.owns(token)) {
                health.ready(token, &registry, now.mono, &|| network.status());
            } else {
                network.handle_ready(token, &registry, now);
            }
        }
    }
}

/// The store that the settings name, and how it is reached.
fn store(settings: &Settings, seed: u64) -> Result<(Box<dyn Store>, Access), String> {
    match &settings.store {
        settings::Store::Etcd(etcd) => {
            let file = |path: &PathBuf| Pem::File(path.clone());
            let tls = TlsSettings {
                ca: etcd.ca.as_ref().map(file),
                identity: etcd.identity.as_ref().map(|(chain, key)| (file(chain), file(key))),
                ..TlsSettings::default()
            };
            let endpoints = etcd.endpoints.clone();
            let store = Etcd::new(etcd, settings.renew_margin, seed);
            Ok((Box::new(store), Access { endpoints, tls, credentials: Credentials::default() }))
        }
        settings::Store::Kube(kube) => {
            let path = kube.config.display();
            let document = fs::read_to_string(&kube.config).map_err(|error| {
                format!("read the network config {path}: {error}; -net-config-path names the file")
            })?;
            let config = NetworkConfig::parse(&document)
                .map_err(|error| format!("the network config in {path} is not valid: {error}"))?;
            let who = kube.who.clone().ok_or(
                "which node is this? Set NODE_NAME in the environment (or POD_NAME and POD_NAMESPACE, in a pod)",
            )?;
            let found = kubeconfig::find(kube)?;
            found.warnings.iter().for_each(|warning| warn!("{warning}"));
            let setup = kube::Setup {
                who,
                prefix: kube.prefix.clone(),
                config,
                set_condition: kube.set_condition,
                endpoints: found.access.endpoints.clone(),
                credential: found.credential(),
            };
            Ok((Box::new(Kube::new(setup, seed)), found.access))
        }
    }
}

fn wait(
    poll: &mut Poll,
    events: &mut Events,
    deadline: Option<Instant>,
    now: Instant,
) -> Result<(), Fatal> {
    // epoll counts milliseconds and rounds down: a deadline within one would spin
    let timeout = deadline.map(|at| at.saturating_duration_since(now)).map(|wait| match wait {
        Duration::ZERO => wait,
        wait => wait + Duration::from_micros(999),
    });
    match poll.poll(events, timeout) {
        Err(error) if error.kind() != io::ErrorKind::Interrupted => {
            Err(fatal("wait for events")(error))
        }
        _ => Ok(()),
    }
}

/// Are we ready, and who knows?
#[derive(Debug)]
struct Readiness {
    notify_socket: Option<OsString>,
    unready: Option<String>,
    told: bool,
}

impl Readiness {
    fn new(notify_socket: Option<OsString>) -> Self {
        Self { notify_socket, unready: Some("starting".into()), told: false }
    }

    fn update(&mut self, unready: Option<String>) {
        if self.unready == unready {
            return;
        }
        if let Some(reason) = &unready {
            debug!("not ready: {reason}");
        }
        self.unready = unready;
        if self.unready.is_none() && !std::mem::replace(&mut self.told, true) {
            info!("ready");
            if let Some(Err(error)) = self.notify_socket.as_deref().map(notify::ready) {
                warn!("tell the service manager that we are ready: {error}");
            }
        }
    }
}
