//! A rate limit on our answers, so that a host that scans an empty network does not make us answer every packet.

use std::time::{Duration, Instant};

/// One answer is earned in this time, which makes 100 a second.
const INTERVAL: Duration = Duration::from_millis(10);
/// Answers that may come at once after a quiet time.
const BURST: u32 = 50;

/// A token bucket, kept as the one moment at which it would be full again (the "virtual scheduling" of ITU-T I.371).
#[derive(Debug, Default)]
pub struct Limiter {
    full_at: Option<Instant>,
}

impl Limiter {
    /// A full bucket.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a token if there is one.
    pub fn allow(&mut self, now: Instant) -> bool {
        let full_at = self.full_at.map_or(now, |at| at.max(now));
        let allowed = full_at.duration_since(now) <= INTERVAL * (BURST - 1);
        if allowed {
            self.full_at = Some(full_at + INTERVAL);
        }
        allowed
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)]
mod tests {
    use super::*;

    fn allowed(limiter: &mut Limiter, tries: usize, now: Instant) -> usize {
        (0..tries).filter(|_| limiter.allow(now)).count()
    }

    #[test]
    fn a_burst_then_the_rate() {
        let (mut limiter, start) = (Limiter::new(), Instant::now());
        assert_eq!(allowed(&mut limiter, 1000, start), 50);
        assert_eq!(allowed(&mut limiter, 1000, start + INTERVAL), 1);
        assert_eq!(allowed(&mut limiter, 1000, start + INTERVAL * 8), 7);
        assert_eq!(
            allowed(&mut limiter, 1000, start + Duration::from_secs(3600)),
            50,
            "no more than a burst is saved"
        );
    }

    #[test]
    fn time_that_stands_still_or_goes_back_is_harmless() {
        let (mut limiter, start) = (Limiter::new(), Instant::now());
        let later = start + Duration::from_secs(1);
        assert_eq!(allowed(&mut limiter, 1000, later), 50);
        assert_eq!(allowed(&mut limiter, 1000, start), 0);
    }
}
