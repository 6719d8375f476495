//! What happened to packets.

/// Why a packet was dropped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reason {
    /// Neither IPv4 nor IPv6.
    NotIp,
    /// Lengths that cannot be.
    Malformed,
    /// For this link only, such as the router solicitations that the kernel sends on every device.
    LinkScope,
    /// No host is known for the destination.
    NoRoute,
    /// It has made too many hops.
    HopsUsedUp,
    /// Longer than the way to its host carries.
    TooBig,
    /// The UDP socket refused it: no route to the host, an interface that is down.
    SendFailed,
    /// The TUN device refused it: its queue is full, or it is down.
    DeliverFailed,
    /// The UDP socket reported an error instead of a datagram.
    ReceiveFailed,
    /// No host is known for its source (source check).
    UnknownSource,
    /// Its source belongs to another host than the one that sent it (source check).
    WrongSender,
}

/// Packets dropped, by reason.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Drops([u64; 11]);

impl Drops {
    /// Every reason with its name, in the order of declaration.
    pub const REASONS: [(Reason, &'static str); 11] = [
        (Reason::NotIp, "not_ip"),
        (Reason::Malformed, "malformed"),
        (Reason::LinkScope, "link_scope"),
        (Reason::NoRoute, "no_route"),
        (Reason::HopsUsedUp, "hops_used_up"),
        (Reason::TooBig, "too_big"),
        (Reason::SendFailed, "send_failed"),
        (Reason::DeliverFailed, "deliver_failed"),
        (Reason::ReceiveFailed, "receive_failed"),
        (Reason::UnknownSource, "unknown_source"),
        (Reason::WrongSender, "wrong_sender"),
    ];

    /// How many packets were dropped for this reason.
    pub fn count(&self, reason: Reason) -> u64 {
        self.0[reason as usize]
    }

    pub(super) fn add(&mut self, reason: Reason) {
        self.0[reason as usize] += 1;
    }
}

/// What happened so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// Packets sent to other hosts.
    pub sent: u64,
    /// Packets given to the TUN device.
    pub delivered: u64,
    /// ICMP errors written back to senders on this host.
    pub replies: u64,
    /// Packets dropped in either direction.
    pub drops: Drops,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_own_counter() {
        let mut drops = Drops::default();
        for (index, (reason, _)) in (1..).zip(Drops::REASONS) {
            (0..index).for_each(|_| drops.add(reason));
        }
        let counts = Drops::REASONS.map(|(reason, _)| drops.count(reason));
        assert_eq!(counts, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]);
    }
}
