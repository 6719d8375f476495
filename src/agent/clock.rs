//! The only reader of the clocks.

#![allow(clippy::disallowed_methods)]

use std::time::{Instant, SystemTime};

use crate::store::Now;

/// Both clocks, read once per wake-up and passed down from there.
pub(super) fn now() -> Now {
    Now { mono: Instant::now(), wall: SystemTime::now() }
}
