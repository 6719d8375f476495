//! One joined network, whole: its store, its data plane, its files. A second network is a second value.
//!
//! ```text
//!            store                         this host
//!   Config ----------> choose the interface, identify
//!   Found  ----------> make the backend (its MAC is known now), acquire
//!   Acquired --------> declare device and address, write the subnet file
//!   Snapshot, Event -> declare the peers, save the view
//! ```
//!
//! When the store does not answer at start, the view saved on disk plays its part until it does.

use std::fmt::Write;
use std::io;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use log::{debug, error, info, warn};
use mio::{Registry, Token};

use super::dataplane::Dataplane;
use super::rules::Rules;
use super::saver::Saver;
use super::{Fatal, token};
use crate::backend::{self, Memory, Underlay};
use crate::cli::Settings;
use crate::config::NetworkConfig;
use crate::http::client::Client;
use crate::kernel::Inventory;
use crate::lease::{Lease, LeaseAttrs, OwnLease, Subnets};
use crate::store::{Identity, Now, PublicAddresses, Store, StoreEvent, StoreRequest};
use crate::subnet_file;
use crate::sys::random;
use crate::underlay::{self, Families};
use crate::view::{self, View};

/// How long the store may take for its first word before the saved view is used in its place.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long the store may take for the peers, once it has given us a lease, before the saved ones are used.
const FILL: Duration = Duration::from_millis(500);
/// The view is saved this long after a change, so that a burst of changes is one write.
const SAVE_DELAY: Duration = Duration::from_secs(5);
/// A view that could not be saved is tried again after this.
const SAVE_RETRY: Duration = Duration::from_secs(60);
/// A subnet file that could not be written is tried again after this.
const FILE_RETRY: Duration = Duration::from_secs(10);
/// Store events handled in one turn, at most.
const BUDGET: usize = 1024;

/// One network.
#[derive(Debug)]
pub(super) struct Network {
    settings: Settings,
    store: Box<dyn Store>,
    client: Client,
    /// What was saved in an earlier life; given up as soon as the store has spoken.
    saved: Option<View>,
    /// When the saved view takes over, if the store stays silent.
    offline_at: Option<Instant>,
    /// When the saved peers are used, if the store has given us a lease and no peers.
    fill_at: Option<Instant>,
    /// Config, interface and host, once the store's config is there and until the backend is made.
    joining: Option<(NetworkConfig, Underlay, Inventory)>,
    dataplane: Option<Dataplane>,
    /// Opened when there is something to set.
    rules: Option<Rules>,
    /// Networks of earlier lives, whose rules are removed.
    past: Vec<IpNet>,
    own: Option<OwnLease>,
    /// Addresses that the store's operator has set.
    set: PublicAddresses,
    /// Why our lease is not ours any more.
    lost: Option<String>,
    /// The subnet file must be written as soon as what it promises is there.
    file_due: bool,
    file_written: bool,
    file_retry_at: Option<Instant>,
    save_at: Option<Instant>,
    saver: Saver,
    save_failed: bool,
    /// It has worked.
    works: bool,
    /// The budget of the last turn ran out.
    more: bool,
}

impl Network {
    /// Starts to join. Nothing is sent before the loop runs.
    pub(super) fn new(settings: Settings, store: Box<dyn Store>, client: Client, now: Now) -> Self {
        let saved = view::load(&settings.data_dir, &store.name()).unwrap_or_else(|reason| {
            warn!("the saved view is of no use: {reason}");
            None
        });
        let past = saved.as_ref().map(|view| view.config.networks().collect()).unwrap_or_default();
        let saved = saved.filter(|view| {
            let fits = store.known_config().is_none_or(|config| *config == view.config);
            if !fits {
                info!("the network config has changed since the view was saved: it is not used");
            }
            fits
        });
        let offline_at = saved.as_ref().map(|_| now.mono + PATIENCE);
        info!("leases are kept in {}", store.describe());

        Self {
            settings,
            store,
            client,
            saved,
            offline_at,
            fill_at: None,
            joining: None,
            dataplane: None,
            rules: None,
            past,
            own: None,
            set: PublicAddresses::default(),
            lost: None,
            file_due: false,
            file_written: false,
            file_retry_at: None,
            save_at: None,
            saver: Saver::default(),
            save_failed: false,
            works: false,
            more: false,
        }
    }

    /// Why this network is not ready, if it is not.
    pub(super) fn unready(&self) -> Option<String> {
        let Some(dataplane) = &self.dataplane else {
            let waiting = if self.joining.is_some() {
                "waiting for a lease"
            } else {
                "waiting for the network config"
            };
            return Some(waiting.into());
        };
        if let Some(lost) = &self.lost {
            return Some(format!("the lease was lost: {lost}"));
        }
        if self.own.is_none() {
            return Some("waiting for a lease".into());
        }
        let rules = || self.rules.as_ref().and_then(Rules::unready);
        if let Some(reason) = dataplane.unready().or_else(rules) {
            return Some(reason);
        }
        (!self.file_written)
            .then(|| format!("{} is not written", self.settings.subnet_file.display()))
    }

    /// What operators ask for: `name value` lines.
    pub(super) fn status(&self) -> String {
        let mut out = String::new();
        let _ = writeln!(out, "version {}", env!("CARGO_PKG_VERSION"));
        let _ = writeln!(out, "ready {}", self.unready().as_deref().unwrap_or("yes"));
        let _ = writeln!(out, "store {}", self.store.describe());
        if let Some(own) = &self.own {
            let _ = writeln!(out, "lease {}", own.lease.subnets);
        }
        if let Some(dataplane) = &self.dataplane {
            dataplane.status(&mut out);
        }
        if let Some(rules) = &self.rules {
            rules.status(&mut out);
        }
        self.store.status(&mut out);
        out
    }

    /// An event of one of our descriptors.
    pub(super) fn handle_ready(&mut self, token: Token, registry: &Registry, now: Now) {
        let store = &mut self.store;
        if self.client.owns(token) {
            self.client.ready(token, registry, now.mono, &mut |lane, event| {
                store.handle_http(lane, event, now)
            });
        } else if token == token::WAKER {
            self.client.handle_waker(registry, now.mono);
        } else if Rules::owns(token) {
            self.rules.iter_mut().for_each(Rules::handle_ready);
        } else if let Some(dataplane) = &mut self.dataplane {
            dataplane.handle_ready(token);
        }
    }

    /// Does what is due, within budgets. Returns whether anything but packets was moved.
    pub(super) fn turn(&mut self, registry: &Registry, now: Now) -> Result<bool, Fatal> {
        let mut stirred = false;
        if self.client.poll_timeout().is_some_and(|at| at <= now.mono) {
            let store = &mut self.store;
            self.client.handle_timeout(registry, now.mono, &mut |lane, event| {
                store.handle_http(lane, event, now)
            });
        }
        self.more = true;
        for _ in 0..BUDGET {
            while let Some(request) = self.store.poll_request(now) {
                stirred = true;
                match request {
                    StoreRequest::Start(lane, request) => {
                        self.client.start(lane, request, registry, now.mono)
                    }
                    StoreRequest::Cancel(lane) => self.client.cancel(lane, registry),
                }
            }
            let Some(event) = self.store.poll_event() else {
                self.more = false;
                break;
            };
            stirred = true;
            self.handle_store_event(event, registry, now)?;
        }
        if self.offline_at.is_some_and(|at| at <= now.mono) {
            self.offline_at = None;
            self.join_offline(registry, now)?;
        }
        if self.fill_at.is_some_and(|at| at <= now.mono) {
            self.fill_at = None;
            self.fill(now);
        }
        if self.file_retry_at.is_some_and(|at| at <= now.mono) {
            stirred = true;
            self.write_file(now);
        }
        self.save(now.mono);
        if let Some(rules) = &mut self.rules {
            stirred |= rules.turn(registry, now.mono)?;
        }
        if let Some(dataplane) = &mut self.dataplane {
            stirred |= dataplane.turn(now.mono)?;
            // whoever reads the file starts containers, whose packets need the rules
            let ruled = self.rules.as_ref().is_some_and(Rules::has_tried);
            if self.file_due && dataplane.host_is_up() && ruled {
                self.write_file(now);
            }
        }
        if stirred && !self.works && self.unready().is_none() {
            self.works = true;
            self.store.set_ready();
            self.more = true;
        }
        Ok(stirred)
    }

    /// When [`Network::turn`] wants to be called next, if nothing happens.
    pub(super) fn poll_timeout(&self, now: Instant) -> Option<Instant> {
        [
            self.more.then_some(now),
            self.client.poll_timeout(),
            self.store.poll_timeout(),
            self.offline_at,
            self.fill_at,
            self.file_retry_at,
            if self.saver.is_busy() { self.saver.poll_timeout() } else { self.save_at },
            self.dataplane.as_ref().and_then(|dataplane| dataplane.poll_timeout(now)),
            self.rules.as_ref().and_then(|rules| rules.poll_timeout(now)),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// The process ends: everything stays as it is, for the next life.
    pub(super) fn stop(&mut self, now: Instant) {
        let _ = self.saver.wait();
        if self.save_at.is_some() {
            self.save_at = Some(now);
            self.save(now);
        }
        if let Some(Err(error)) = self.saver.wait() {
            warn!("{error}");
        }
    }

    fn handle_store_event(
        &mut self,
        event: StoreEvent,
        registry: &Registry,
        now: Now,
    ) -> Result<(), Fatal> {
        match event {
            StoreEvent::Config(config) => self.handle_config(*config, registry, now),
            StoreEvent::Found(mine) => {
                self.handle_found(mine.map(|lease| lease.attrs), registry, now)
            }
            StoreEvent::Acquired(own) => self.handle_acquired(*own, registry, now),
            StoreEvent::Renewed(own) => {
                info!("lease {} renewed{}", own.lease.subnets, until(&own, now));
                self.own = Some(*own);
                Ok(())
            }
            StoreEvent::Lost(reason) => {
                error!(
                    "our lease is lost: {reason}; the data plane stays as it is while another is taken"
                );
                self.lost = Some(reason);
                Ok(())
            }
            StoreEvent::Snapshot(leases) => {
                self.saved = None;
                self.fill_at = None;
                if let Some(dataplane) = &mut self.dataplane {
                    dataplane.handle_snapshot(leases, true, now.mono);
                }
                self.changed(now);
                Ok(())
            }
            StoreEvent::Event(event) => {
                if let Some(dataplane) = &mut self.dataplane
                    && dataplane.handle_lease_event(event, now.mono)
                {
                    self.changed(now);
                }
                Ok(())
            }
            StoreEvent::Trouble(reason) => {
                let meanwhile =
                    if self.own.is_some() { "; the data plane stays as it is" } else { "" };
                warn!("{reason}{meanwhile}; trying again");
                // the view need not wait for the full patience when the store says no at once
                self.offline_at = self.offline_at.map(|at| at.min(now.mono));
                Ok(())
            }
            StoreEvent::Recovered => {
                info!("{} works again", self.store.describe());
                Ok(())
            }
        }
    }

    fn handle_config(
        &mut self,
        config: NetworkConfig,
        registry: &Registry,
        now: Now,
    ) -> Result<(), Fatal> {
        self.offline_at = None;
        info!(
            "network config: {}",
            config.document.split_whitespace().collect::<Vec<_>>().join(" ")
        );
        // the saved view may have brought up something else than what is wanted now
        let set = self.store.public_addresses();
        let same_config = |dataplane: &Dataplane| *dataplane.config() == config;
        let other = match &self.dataplane {
            Some(dataplane) if !same_config(dataplane) => Some("network config"),
            Some(_) if set != self.set => Some("address that the operator sets"),
            _ => None,
        };
        self.set = set;
        if let Some((what, dataplane)) = other.and_then(|what| Some((what, self.dataplane.take()?)))
        {
            warn!("the {what} has changed since the view was saved: starting over");
            dataplane.close(registry);
            self.own = None;
            self.file_written = false;
        }
        let underlay = match &self.dataplane {
            Some(dataplane) => dataplane.underlay().clone(),
            None => {
                let (underlay, inventory) = self.choose_underlay(&config)?;
                self.joining = Some((config, underlay.clone(), inventory));
                underlay
            }
        };
        let file = subnet_file::previous(&self.settings.subnet_file);
        file.complaints.iter().for_each(|complaint| warn!("{complaint}"));
        self.past.extend(file.networks);
        let mut previous = file.subnets;
        if previous == Subnets::default() {
            previous = self.saved.as_ref().map(|view| view.own.subnets).unwrap_or_default();
        }
        let identity = Identity {
            public_ip: underlay.public_v4,
            public_ipv6: underlay.public_v6,
            previous,
            peers: self.saved.as_ref().map_or(0, |view| view.peers.len()),
        };
        self.store.identify(identity, now);
        Ok(())
    }

    fn choose_underlay(&self, config: &NetworkConfig) -> Result<(Underlay, Inventory), Fatal> {
        let mut wanted = self.settings.interface.clone();
        wanted.public_ip = self.set.v4.or(wanted.public_ip);
        wanted.public_ipv6 = self.set.v6.or(wanted.public_ipv6);
        let inventory = Inventory::read(wanted.can_reach)
            .map_err(|error| Fatal(format!("list the network interfaces: {error}")))?;
        let families = Families { v4: config.v4.is_some(), v6: config.v6.is_some() };
        let choice = underlay::choose(&wanted, families, &inventory).map_err(Fatal)?;
        choice.why.iter().for_each(|line| info!("{line}"));
        Ok((choice.underlay, inventory))
    }

    fn handle_found(
        &mut self,
        published: Option<LeaseAttrs>,
        registry: &Registry,
        now: Now,
    ) -> Result<(), Fatal> {
        if let Some((config, underlay, inventory)) = self.joining.take() {
            let saved = self.saved.as_ref().map(|view| view.own.attrs.clone());
            // Our old lease, which carries our old address, is still there for a day, and its MAC with it: peers would go on
            // sending to the old address.
            let moved = published.is_none()
                && saved.as_ref().is_some_and(|saved| {
                    (saved.public_ip, saved.public_ipv6) != (underlay.public_v4, underlay.public_v6)
                });
            let (known, inventory) =
                if moved { (None, Inventory::default()) } else { (published.or(saved), inventory) };
            let dataplane = self.open(config, underlay, &inventory, known, registry, now)?;
            self.dataplane = Some(dataplane);
        }
        if let Some(dataplane) = &self.dataplane {
            self.store.acquire(dataplane.backend().attrs(), now);
        }
        Ok(())
    }

    fn handle_acquired(
        &mut self,
        own: OwnLease,
        registry: &Registry,
        now: Now,
    ) -> Result<(), Fatal> {
        let subnets = own.lease.subnets;
        info!("lease {subnets} is ours{}", until(&own, now));
        let before = self.own.replace(own).map(|own| own.lease.subnets);
        if let Some(before) = before.filter(|before| *before != subnets) {
            warn!(
                "this host's subnet was {before} and is {subnets} now: containers with old addresses must be restarted"
            );
        }
        self.lost = None;
        // nothing is saved before the store has told us of the peers: that would lose those that are saved
        if self.saved.is_some() {
            self.fill_at = Some(now.mono + FILL);
        } else {
            self.changed(now);
        }
        self.come_up(subnets, registry, now)
    }

    fn come_up(&mut self, subnets: Subnets, registry: &Registry, now: Now) -> Result<(), Fatal> {
        let Some(dataplane) = &mut self.dataplane else { return Ok(()) };
        dataplane.set_own(subnets, now.mono)?;
        let rules = match &mut self.rules {
            Some(rules) => rules,
            none => none.insert(Rules::open(&self.settings.firewall, registry, now.mono)?),
        };
        rules.set(dataplane.config(), subnets, &std::mem::take(&mut self.past), now.mono);
        info!("backend {}, MTU {}", dataplane.backend().name(), dataplane.backend().mtu());
        self.file_due = true;
        Ok(())
    }

    fn write_file(&mut self, now: Now) {
        let (Some(dataplane), Some(own)) = (&self.dataplane, &self.own) else { return };
        self.file_due = false;
        let mtu = dataplane.backend().mtu();
        let ip_masq = self.settings.firewall.masquerade;
        let content = subnet_file::render(dataplane.config(), &own.lease.subnets, mtu, ip_masq);
        let path = &self.settings.subnet_file;
        match subnet_file::write(path, &content) {
            Ok(()) => {
                self.file_retry_at = None;
                if !std::mem::replace(&mut self.file_written, true) {
                    info!("{} is written", path.display());
                }
            }
            Err(error) => {
                if self.file_retry_at.is_none() {
                    warn!("{error}; trying again every {} s", FILE_RETRY.as_secs());
                }
                self.file_written = false;
                self.file_retry_at = Some(now.mono + FILE_RETRY);
            }
        }
    }

    /// The store is silent: the overlay comes up as it was.
    fn join_offline(&mut self, registry: &Registry, now: Now) -> Result<(), Fatal> {
        if self.dataplane.is_some() || self.joining.is_some() {
            return Ok(());
        }
        let Some(View { config, own, peers, set }) = self.saved.clone() else { return Ok(()) };
        self.set = set;
        warn!(
            "{} does not answer: coming up with the view of an earlier life, lease {} and {} peers",
            self.store.describe(),
            own.subnets,
            peers.len()
        );
        let (underlay, inventory) = self.choose_underlay(&config)?;
        if (underlay.public_v4, underlay.public_v6) != (own.attrs.public_ip, own.attrs.public_ipv6)
        {
            warn!(
                "this host's public address has changed since then: peers cannot reach it before the store is back"
            );
        }
        self.past.extend(subnet_file::previous(&self.settings.subnet_file).networks);
        let dataplane =
            self.open(config, underlay, &inventory, Some(own.attrs.clone()), registry, now)?;
        let subnets = own.subnets;
        self.dataplane = Some(dataplane);
        self.own = Some(OwnLease { lease: own, expiry: None });
        self.come_up(subnets, registry, now)?;
        if let Some(dataplane) = &mut self.dataplane {
            dataplane.handle_snapshot(peers, false, now.mono);
        }
        Ok(())
    }

    /// The store has given us a lease and tells nothing of the peers: those of an earlier life are better than none.
    fn fill(&mut self, now: Now) {
        let (Some(view), Some(dataplane)) = (&self.saved, &mut self.dataplane) else { return };
        if dataplane.leases().next().is_none() && view.config == *dataplane.config() {
            info!(
                "the store does not tell the peers: using the {} of an earlier life",
                view.peers.len()
            );
            dataplane.handle_snapshot(view.peers.clone(), false, now.mono);
        }
    }

    fn changed(&mut self, now: Now) {
        self.save_at.get_or_insert(now.mono + SAVE_DELAY);
    }

    /// Begins to save the view, or sees how the last saving went.
    fn save(&mut self, now: Instant) {
        if let Some(result) = self.saver.poll(now) {
            self.saved_view(result, now);
        }
        if self.saver.is_busy() || self.save_at.is_none_or(|at| at > now) {
            return;
        }
        self.save_at = None;
        let (Some(dataplane), Some(own)) = (&self.dataplane, &self.own) else { return };
        let peers: Vec<&Lease> = dataplane.leases().collect();
        let config = dataplane.config();
        let started =
            view::render(&self.store.name(), config, &own.lease, self.set, peers.iter().copied())
                .and_then(|content| self.saver.start(self.settings.data_dir.clone(), content, now));
        if let Err(error) = started {
            self.saved_view(Err(error), now);
        }
    }

    fn saved_view(&mut self, result: io::Result<()>, now: Instant) {
        let Err(error) = result else {
            self.save_failed = false;
            return;
        };
        self.save_at.get_or_insert(now + SAVE_RETRY);
        if !std::mem::replace(&mut self.save_failed, true) {
            warn!(
                "{error}: without a saved view this host cannot come up while the store is away (see -data-dir)"
            );
        }
    }

    /// Makes the backend and what it stands on.
    fn open(
        &self,
        config: NetworkConfig,
        underlay: Underlay,
        inventory: &Inventory,
        published: Option<LeaseAttrs>,
        registry: &Registry,
        now: Now,
    ) -> Result<Dataplane, Fatal> {
        let mut memory = Memory { published, ..Memory::default() };
        random::fill(&mut memory.random)
            .map_err(|error| Fatal(format!("read random bytes: {error}")))?;
        memory.live_macs = inventory
            .interfaces
            .iter()
            .filter_map(|interface| Some((interface.name, interface.mac?)))
            .collect();
        let backend = backend::create(&config, &underlay, &memory)
            .map_err(|error| Fatal(error.to_string()))?;
        debug!("{backend:?}");
        Dataplane::open(config, underlay, backend, self.settings.blackhole, registry, now.mono)
    }
}

fn until(own: &OwnLease, now: Now) -> String {
    match own.expiry.map(|expiry| expiry.duration_since(now.wall).unwrap_or_default().as_secs()) {
        None => ", for ever".into(),
        Some(seconds) => format!(" for {} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}
