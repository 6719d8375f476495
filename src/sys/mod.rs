//! Every unsafe block and system call.

pub mod tun;
pub mod udp;
