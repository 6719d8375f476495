//! `flanneld -cleanup`: takes every flannel's rules, routes and devices from this host, and ends.

use std::fs;
use std::os::unix::fs::MetadataExt;

use log::{error, info};
use mio::{Events, Poll};

use super::rules::{PATIENCE, Rules};
use super::{Fatal, clock, fatal, wait};
use crate::cli::Settings;
use crate::kernel;
use crate::subnet_file;

/// Files stay: the subnet file and the saved view are the operator's to delete.
///
/// # Errors
/// A flanneld is running here, or something cannot be removed.
pub fn clean_up(settings: &Settings) -> Result<(), Fatal> {
    if let Some(process) = running() {
        return Err(Fatal(format!(
            "a flanneld is running here, process {process}: stop it first, it would put everything back"
        )));
    }
    let rules = remove_rules(settings);
    let objects = kernel::remove_leftovers(&mut |what| info!("removed {what}"))
        .map_err(|error| Fatal(error.to_string()));
    if let (Err(error), Err(_)) = (&rules, &objects) {
        error!("{error}");
    }
    objects.and(rules)?;
    info!(
        "flannel's rules, VXLAN devices and routes with protocol 241 are gone; files stay as they are"
    );
    Ok(())
}

fn remove_rules(settings: &Settings) -> Result<(), Fatal> {
    let mut poll = Poll::new().map_err(fatal("set up the event loop"))?;
    let registry = poll.registry().try_clone().map_err(fatal("set up the event loop"))?;
    let start = clock::now().mono;
    let mut rules = Rules::open(&settings.firewall, &registry, start)?;
    rules.clean_up(subnet_file::previous(&settings.subnet_file).networks, start);
    let mut events = Events::with_capacity(16);
    loop {
        let now = clock::now().mono;
        rules.turn(&registry, now)?;
        if rules.is_denied() {
            return Err(Fatal(
                "nothing can be removed without CAP_NET_ADMIN: run this as root".into(),
            ));
        }
        if rules.is_clean() && rules.is_blind() {
            return Err(Fatal(
                "the tables of the old iptables are in use, and without iptables-legacy-save and -restore nobody can look for \
                 rules in them: install iptables and try again"
                    .into(),
            ));
        }
        if rules.is_clean() && !rules.stuck().is_empty() {
            return Err(Fatal(format!(
                "all rules are removed, but not these chains, which rules of somebody else jump to: {}",
                rules.stuck().join(", ")
            )));
        }
        if rules.is_clean() {
            return Ok(());
        }
        let patience = if rules.poll_timeout(now).is_none() { now } else { start + PATIENCE };
        if now >= patience {
            let reason = rules.trouble().unwrap_or_else(|| "it takes too long".into());
            return Err(Fatal(format!("some traffic rules could not be removed: {reason}")));
        }
        let deadline = rules.poll_timeout(now).unwrap_or(now + PATIENCE).min(start + PATIENCE);
        wait(&mut poll, &mut events, Some(deadline), now)?;
        if !events.is_empty() {
            rules.handle_ready();
        }
    }
}

/// Another process that is called as we are, in our network namespace.
fn running() -> Option<u32> {
    let namespace = |process: &str| {
        fs::metadata(format!("/proc/{process}/ns/net")).map(|meta| (meta.dev(), meta.ino())).ok()
    };
    let here = namespace("self")?;
    let processes = fs::read_dir("/proc").ok()?.flatten();
    processes
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|process| *process != std::process::id())
        .find(|process| {
            let name = fs::read_to_string(format!("/proc/{process}/comm"));
            name.is_ok_and(|name| name.trim_end() == "flanneld")
                && namespace(&process.to_string()) == Some(here)
        })
}
