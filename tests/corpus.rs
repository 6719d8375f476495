//! Replays the inputs that fuzzing has found worth keeping (`fuzz/corpus`) through what is fuzzed.
#![allow(clippy::unwrap_used)] // in the helpers of tests as well

#[path = "../fuzz/bodies.rs"]
mod bodies;
mod model;

use std::fs;
use std::path::Path;

fn replay(name: &str, body: fn(&[u8])) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let mut inputs = 0;
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let data = fs::read(&path).unwrap();
        eprintln!("{}", path.display()); // shown when it fails
        body(&data);
        inputs += 1;
    }
    assert!(inputs >= 20, "the corpus of {name} is gone");
}

#[test]
fn headers() {
    replay("headers", bodies::headers);
}

#[test]
fn split() {
    replay("split", bodies::split);
}

#[test]
fn merge() {
    replay("merge", bodies::merge);
}

#[test]
fn refuse() {
    replay("refuse", bodies::refuse);
}

#[test]
fn kubernetes() {
    replay("kubernetes", bodies::kubernetes);
}
