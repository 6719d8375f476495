//! Desired kernel state against actual kernel state.

mod object;

pub use object::{
    Address, Fdb, IfName, Key, Link, LinkKind, Mac, Neighbour, Object, Owner, Route, Sysctl, Vxlan,
};
