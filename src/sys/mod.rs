//! All of the unsafe code and the raw system calls, each behind a small safe type.

pub mod buffer;
pub mod child;
pub mod netlink;
pub mod netns;
pub mod random;
pub mod signal;
mod source;
pub mod tcp;
pub mod time;
pub mod tun;
pub mod udp;
pub mod vector;
