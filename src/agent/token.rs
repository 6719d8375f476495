//! Who a readiness event is for.

use mio::Token;

/// Signals.
pub(super) const SIGNALS: Token = Token(0);
/// Results of the name-resolution worker.
pub(super) const WAKER: Token = Token(1);
/// Answers to our netlink requests.
pub(super) const NETLINK_REPLIES: Token = Token(2);
/// Netlink notifications.
pub(super) const NETLINK_NOTICES: Token = Token(3);
/// The udp backend's TUN device.
pub(super) const TUN: Token = Token(4);
/// The udp backend's IPv4 socket.
pub(super) const UDP_V4: Token = Token(5);
/// The udp backend's IPv6 socket.
pub(super) const UDP_V6: Token = Token(6);
/// Answers to our requests about firewall rules.
pub(super) const RULESET_REPLIES: Token = Token(7);
/// News of changes to the firewall rules.
pub(super) const RULESET_NOTICES: Token = Token(8);
/// What a child process is given to read.
pub(super) const CHILD_INPUT: Token = Token(11);
/// What a child process writes.
pub(super) const CHILD_OUTPUT: Token = Token(9);
/// What a child process complains about.
pub(super) const CHILD_COMPLAINT: Token = Token(10);
/// The health server: its listener and connections use tokens from here up to [`HTTP`].
pub(super) const HEALTH: usize = 0x100;
/// The store's HTTP client uses tokens from here up.
pub(super) const HTTP: usize = 0x1_0000;
