//! Bounded logging: a burst of lines of one sort is cut and summed up, so that 5,000 peers failing together are a dozen
//! lines and not 5,000.

use std::time::{Duration, Instant};

/// Lines of one sort that may be written at once.
const BURST: u32 = 10;
/// A line more every so often.
const REFILL: Duration = Duration::from_secs(6);

/// Decides which lines of one sort are written.
#[derive(Debug, Default)]
pub(crate) struct Throttle {
    used: u32,
    since: Option<Instant>,
    hidden: u64,
}

impl Throttle {
    /// May a line be written now? `Some(n)` says yes, and that `n` lines were left out since the last one.
    pub(crate) fn admit(&mut self, now: Instant) -> Option<u64> {
        let since = *self.since.get_or_insert(now);
        let refilled = now.saturating_duration_since(since).as_secs() / REFILL.as_secs();
        if refilled > 0 {
            self.used = self.used.saturating_sub(u32::try_from(refilled).unwrap_or(u32::MAX));
            self.since = Some(now);
        }
        if self.used == BURST {
            self.hidden += 1;
            return None;
        }
        self.used += 1;
        Some(std::mem::take(&mut self.hidden))
    }
}

/// Logs at a level unless the throttle says no; says how many were left out.
macro_rules! throttled {
    ($throttle:expr, $now:expr, $level:ident, $($arg:tt)+) => {
        match $throttle.admit($now) {
            Some(0) => log::$level!($($arg)+),
            Some(hidden) => log::$level!("{} ({hidden} lines like this left out)", format_args!($($arg)+)),
            None => {}
        }
    };
}
pub(crate) use throttled;

#[cfg(test)]
#[allow(clippy::disallowed_methods)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_cut_and_summed_up() {
        let start = Instant::now();
        let mut throttle = Throttle::default();
        let admitted = (0..5000).filter(|_| throttle.admit(start).is_some()).count();
        assert_eq!(admitted, 10);
        assert_eq!(throttle.admit(start + REFILL), Some(4990));
        assert_eq!(throttle.admit(start + REFILL), None);
        assert_eq!(throttle.admit(start + REFILL * 100), Some(1));
    }
}
