//! Local wall-clock time, for log lines only.

#![allow(unsafe_code)]
#![allow(clippy::disallowed_methods)]

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

/// A moment in local time, shown as `mmdd hh:mm:ss.uuuuuu`.
#[derive(Clone, Copy, Debug)]
pub struct Local {
    month: i32,
    day: i32,
    hour: i32,
    minute: i32,
    second: i32,
    micros: u32,
}

/// Now, in the zone that `TZ` or `/etc/localtime` names; UTC when there is none.
pub fn local() -> Local {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = libc::time_t::try_from(since.as_secs()).unwrap_or_default();
    // SAFETY: tm consists of integers and a pointer, for which all zeroes is a value.
    let mut tm: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to values that live until the call returns; the function keeps neither.
    unsafe { libc::localtime_r(&raw const seconds, &raw mut tm) };
    Local {
        month: tm.tm_mon + 1,
        day: tm.tm_mday,
        hour: tm.tm_hour,
        minute: tm.tm_min,
        second: tm.tm_sec,
        micros: since.subsec_micros(),
    }
}

impl fmt::Display for Local {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { month, day, hour, minute, second, micros } = self;
        write!(f, "{month:02}{day:02} {hour:02}:{minute:02}:{second:02}.{micros:06}")
    }
}
