//! The lab: the program with a real etcd, real kernels and real packets. Needs root; see `make test`.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)] // helpers of tests; the tests wait

mod certificates;
mod hostile;
mod membership;
mod overlay;
mod program;
mod quiet;
mod restart;
mod rules;
mod store;
mod world;
