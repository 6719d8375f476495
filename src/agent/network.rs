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

use std::fmt;
use std::time::{Duration, Instant};

use log::{debug, error, info, warn};
use mio::Registry;
use mio::event::Event;

use super::dataplane::Dataplane;
use super::underlay;
use crate::backend::{self, Memory, Underlay};
use crate::cli::Settings;
use crate::config::NetworkConfig;
use crate::http::client::Client;
use crate::lease::{LeaseAttrs, OwnLease, Subnets};
use crate::store::{Identity, Now, Store, StoreEvent, StoreRequest};
use crate::subnet_file::{self, SubnetFile};
use crate::view::{self, View};

/// How long the store may take for its first word before the saved view is used in its place.
const PATIENCE: Duration = Duration::from_secs(3);
/// The view is saved this long after a change, so that a burst of changes is one write.
const SAVE_DELAY: Duration = Duration::from_secs(5);

/// Something that ends the start: what failed and what to do.
#[derive(Debug)]
pub(super) struct Fatal(pub(super) String);

impl fmt::Display for Fatal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

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
    /// Config and interface, once the store's config is there and until the backend is made.
    joining: Option<(NetworkConfig, Underlay)>,
    dataplane: Option<Dataplane>,
    own: Option<OwnLease>,
    /// Why our lease is not ours any more.
    lost: Option<String>,
    file_written: bool,
    save_at: Option<Instant>,
}

impl Network {
    /// Starts to join. Nothing is sent before the loop runs.
    pub(super) fn new(settings: Settings, store: Box<dyn Store>, client: Client, now: Now) -> Self {
        let saved = view::load(&settings.data_dir, store.name());
        let offline_at = saved.as_ref().map(|_| now.mono + PATIENCE);
        info!("leases are kept in {}", store.describe());
        Self {
            settings,
            store,
            client,
            saved,
            offline_at,
            joining: None,
            dataplane: None,
            own: None,
            lost: None,
            file_written: false,
            save_at: None,
        }
    }

    /// Why this network is not ready, if it is not.
    pub(super) fn unready(&self) -> Option<String> {
        let Some(dataplane) = &self.dataplane else {
            return Some(if self.joining.is_some() { "waiting for a lease" } else { "waiting for the network config" }.into());
        };
        if let Some(lost) = &self.lost {
            return Some(format!("the lease was lost: {lost}"));
        }
        if self.own.is_none() {
            return Some("waiting for a lease".into());
        }
        if let Some(reason) = dataplane.unready() {
            return Some(reason);
        }
        (!self.file_written).then(|| format!("{} is not written", self.settings.subnet_file.display()))
    }

    fn handle_store_event(&mut self, event: StoreEvent, registry: &Registry, now: Now) -> Result<(), Fatal> {
        match event {
            StoreEvent::Config(config) => self.handle_config(*config, now),
            StoreEvent::Found(mine) => self.handle_found(mine.map(|lease| lease.attrs), registry, now),
            StoreEvent::Acquired(own) => self.handle_acquired(*own, now),
            StoreEvent::Renewed(own) => {
                debug!("lease {} renewed", own.lease.subnets);
                self.own = Some(*own);
                Ok(())
            }
            StoreEvent::Lost(reason) => {
                error!("our lease is lost: {reason}; the data plane stays as it is while another is taken");
                self.lost = Some(reason);
                Ok(())
            }
            StoreEvent::Snapshot(leases) => {
                self.saved = None;
                if let Some(dataplane) = &mut self.dataplane {
                    dataplane.handle_snapshot(leases, true, now.mono);
                }
                self.changed(now);
                Ok(())
            }
            StoreEvent::Event(event) => {
                if let Some(dataplane) = &mut self.dataplane {
                    if dataplane.handle_lease_event(event, now.mono) {
                        self.changed(now);
                    }
                }
                Ok(())
            }
            StoreEvent::Trouble(reason) => {
                warn!("{reason}; the data plane stays as it is, trying again");
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

    fn changed(&mut self, now: Now) {
        self.save_at.get_or_insert(now.mono + SAVE_DELAY);
    }
}
