//! The store without a network.
