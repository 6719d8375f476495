//! Desired kernel state against actual kernel state.
//!
//! [`Reconciler`] is told what each [`Owner`] wants ([`Object`]s) and finds out, over `rtnetlink(7)`, what of it to write.
//! It reads and writes bytes only; the sockets are `sys::netlink`, the loop that moves the bytes is the agent's.

mod compare;
mod desired;
mod encode;
mod inventory;
mod leftovers;
mod links;
mod object;
mod paths;
mod port;
mod reconcile;
mod seen;

pub use inventory::{Interface, InterfaceAddress, Inventory, Reached};
pub use leftovers::remove as remove_leftovers;
pub use object::{
    Address, Fdb, IfName, Key, Link, LinkKind, Mac, Neighbour, Object, Owner, Route, Sysctl, Vxlan,
};
pub use port::Port;
pub use reconcile::{KernelEvent, Progress, Reconciler, Scope};
