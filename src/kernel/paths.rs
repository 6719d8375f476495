//! Which underlay addresses are on-link: the kernel is asked for its route to each, at first and when routes have changed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

#[derive(Debug, Default)]
struct Path {
    watchers: u32,
    direct: Option<bool>,
}

/// The addresses that somebody wants to know about.
#[derive(Debug, Default)]
pub(super) struct Paths {
    known: BTreeMap<IpAddr, Path>,
    asking: BTreeSet<IpAddr>,
}

impl Paths {
    pub(super) fn watch(&mut self, ip: IpAddr) {
        let path = self.known.entry(ip).or_default();
        path.watchers += 1;
        if path.direct.is_none() {
            self.asking.insert(ip);
        }
    }

    pub(super) fn unwatch(&mut self, ip: IpAddr) {
        let Some(path) = self.known.get_mut(&ip) else { return };
        path.watchers -= 1;
        if path.watchers == 0 {
            self.known.remove(&ip);
            self.asking.remove(&ip);
        }
    }

    /// `None` until the kernel has answered.
    pub(super) fn direct(&self, ip: IpAddr) -> Option<bool> {
        self.known.get(&ip)?.direct
    }

    pub(super) fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    pub(super) fn is_asking(&self) -> bool {
        !self.asking.is_empty()
    }

    /// Routes may have changed.
    pub(super) fn ask_all(&mut self) {
        self.asking.extend(self.known.keys());
    }

    /// The next addresses to ask the kernel about.
    pub(super) fn take(&mut self, limit: usize) -> Vec<IpAddr> {
        std::iter::from_fn(|| self.asking.pop_first()).take(limit).collect()
    }

    /// The kernel's answer. Returns whether it is news.
    pub(super) fn answer(&mut self, ip: IpAddr, direct: bool) -> bool {
        self.known.get_mut(&ip).is_some_and(|path| path.direct.replace(direct) != Some(direct))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_asked_for_as_long_as_somebody_watches() {
        let ip = IpAddr::from([192, 0, 2, 1]);
        let mut paths = Paths::default();
        paths.watch(ip);
        paths.watch(ip);
        assert_eq!((paths.take(9), paths.direct(ip)), (vec![ip], None));
        assert!(paths.answer(ip, true));
        assert!(!paths.answer(ip, true));
        paths.unwatch(ip);
        paths.ask_all();
        assert_eq!(paths.take(9), [ip]);
        paths.unwatch(ip);
        paths.ask_all();
        assert!(paths.is_empty() && paths.take(9).is_empty());
        assert!(!paths.answer(ip, false), "an answer that comes too late");
    }
}
