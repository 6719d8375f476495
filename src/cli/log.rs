//! Where the log goes: standard error, one line a fact, in the layout that readers of flannel's log know (control-plane
//! spec 1.10): `I1121 07:00:00.123456     812 network.rs:41] text`, local time.

use std::io::Write;

use log::{Level, LevelFilter};

use crate::sys::time;

/// Starts the log. `verbosity` is `-v`: 0 says facts, 1 to 3 steps, more everything.
pub fn init(verbosity: i64) {
    let level = match verbosity {
        ..=0 => LevelFilter::Info,
        1..=3 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    };
    let pid = std::process::id();
    env_logger::Builder::new()
        .filter_level(LevelFilter::Warn)
        .filter_module("flanneld", level)
        // at trace this one writes every byte of an exchange, tokens and passwords too
        .filter_module("ureq_proto", level.min(LevelFilter::Warn))
        .format(move |out, record| {
            let letter = match record.level() {
                Level::Error => 'E',
                Level::Warn => 'W',
                Level::Info | Level::Debug | Level::Trace => 'I',
            };
            let now = time::local();
            let file = record.file().and_then(|path| path.rsplit('/').next()).unwrap_or("?");
            // one line, whatever a peer's data contain
            let text = record.args().to_string().replace(['\n', '\r'], " ");
            writeln!(out, "{letter}{now} {pid:>7} {file}:{}] {text}", record.line().unwrap_or(0))
        })
        .init();
}
