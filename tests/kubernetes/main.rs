//! The program in a Kubernetes cluster: a real kube-apiserver over a real etcd, real kernels and real packets. Needs root and
//! a kube-apiserver; see `make test-kubernetes`.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)] // helpers of tests; the tests wait

mod api;
mod away;
#[path = "../lab/certificates.rs"]
mod certificates;
mod joining;
mod nodes;
mod packaging;
mod proxy;
mod rights;
#[path = "../lab/world.rs"]
mod world;
