//! How long to wait before the next try: doubling, capped, with jitter.

use std::time::Duration;

/// A capped exponential back-off with jitter.
///
/// The jitter comes from a seeded generator, so a test can repeat a run and 5,000 agents that lost the same store do not
/// come back in the same millisecond.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    cap: Duration,
    failures: u32,
    chance: Chance,
}

/// Numbers that look random (xorshift): for jitter and for spreading choices, not for secrets.
#[derive(Debug, Clone)]
pub struct Chance(u64);

impl Chance {
    /// The numbers that follow from `seed`.
    pub fn new(seed: u64) -> Self {
        // it must not start at zero
        Self(seed | 1)
    }

    /// The next one.
    pub fn draw(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

impl Backoff {
    /// Waits about `first` after the first failure, doubling up to `cap`.
    pub fn new(first: Duration, cap: Duration, seed: u64) -> Self {
        Self { first, cap, failures: 0, chance: Chance::new(seed) }
    }

    /// Counts a failure and returns the wait before the next try: 75 % to 125 % of the nominal one, never above `cap`.
    pub fn failed(&mut self) -> Duration {
        let nominal = self.first.saturating_mul(1 << self.failures.min(20)).min(self.cap);
        self.failures = self.failures.saturating_add(1);
        let per_mille = u32::try_from(self.chance.draw() % 501).unwrap_or(0) + 750;
        (nominal * per_mille / 1000).min(self.cap)
    }

    /// Forgets the failures.
    pub fn succeeded(&mut self) {
        self.failures = 0;
    }

    /// Failures since the last success.
    pub fn failures(&self) -> u32 {
        self.failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_up_to_the_cap_within_the_jitter() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5), 7);
        for nominal in [100, 200, 400, 800, 1600, 3200, 5000, 5000] {
            let wait = backoff.failed().as_millis();
            assert!(
                wait >= nominal * 3 / 4 && wait <= (nominal * 5 / 4).min(5000),
                "{wait} around {nominal}"
            );
        }
        assert_eq!(backoff.failures(), 8);
        backoff.succeeded();
        assert!(backoff.failed().as_millis() <= 125);
    }

    #[test]
    fn never_overflows() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60), 0);
        for _ in 0..10_000 {
            assert!(backoff.failed() <= Duration::from_secs(60));
        }
    }
}
