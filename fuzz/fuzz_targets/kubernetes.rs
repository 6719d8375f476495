#![no_main]

#[path = "../bodies.rs"]
mod bodies;
#[path = "../../tests/model/mod.rs"]
mod model;

libfuzzer_sys::fuzz_target!(|data: &[u8]| bodies::kubernetes(data));
