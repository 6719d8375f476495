//! The ways of moving many packets at once, each of which can be switched off: by the operator, by a kernel that lacks it,
//! or by a device that turns out not to bear it.

use std::fmt;

/// Which ways are in use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Offloads {
    /// TCP super-packets from the TUN device, cut here.
    pub tso: bool,
    /// UDP super-packets from the TUN device, cut here (Linux 6.2).
    pub uso: bool,
    /// Packets that follow each other are joined before they are given to the TUN device.
    pub merge: bool,
    /// Runs of datagrams in one message (`UDP_SEGMENT`, Linux 4.18).
    pub gso: bool,
    /// Runs of datagrams received as one (`UDP_GRO`, Linux 5.0).
    pub gro: bool,
    /// Many messages in one call (`sendmmsg`, `recvmmsg`).
    pub batch: bool,
}

/// One of the ways.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)] // the fields of [`Offloads`]
pub enum Offload {
    Tso,
    Uso,
    Merge,
    Gso,
    Gro,
    Batch,
}

impl Offload {
    /// Every way, with the name that the backend config and the log have for it.
    pub const ALL: [(Self, &'static str); 6] = [
        (Self::Tso, "TSO"),
        (Self::Uso, "USO"),
        (Self::Merge, "Merge"),
        (Self::Gso, "GSO"),
        (Self::Gro, "GRO"),
        (Self::Batch, "Batch"),
    ];
}

impl Offloads {
    /// Everything.
    pub const ALL: Self =
        Self { tso: true, uso: true, merge: true, gso: true, gro: true, batch: true };
    /// Nothing: one packet a call.
    pub const NONE: Self =
        Self { tso: false, uso: false, merge: false, gso: false, gro: false, batch: false };

    /// Is this way in use?
    pub fn has(self, offload: Offload) -> bool {
        let mut copy = self;
        *copy.field(offload)
    }

    /// Uses a way or not.
    pub fn set(&mut self, offload: Offload, on: bool) {
        *self.field(offload) = on;
    }

    fn field(&mut self, offload: Offload) -> &mut bool {
        match offload {
            Offload::Tso => &mut self.tso,
            Offload::Uso => &mut self.uso,
            Offload::Merge => &mut self.merge,
            Offload::Gso => &mut self.gso,
            Offload::Gro => &mut self.gro,
            Offload::Batch => &mut self.batch,
        }
    }

    /// Must packets on the TUN device have a header in front of them?
    pub fn need_vnet(self) -> bool {
        self.tso || self.uso || self.merge
    }
}

/// `TSO USO Merge GSO GRO Batch`, or `none`.
impl fmt::Display for Offloads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut names = Offload::ALL
            .into_iter()
            .filter(|(offload, _)| self.has(*offload))
            .map(|(_, name)| name);
        match names.next() {
            None => f.write_str("none"),
            Some(first) => {
                f.write_str(first)?;
                names.try_for_each(|name| write!(f, " {name}"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_a_switch_of_its_own() {
        for (one, name) in Offload::ALL {
            let mut offloads = Offloads::NONE;
            offloads.set(one, true);
            assert_eq!(offloads.to_string(), name);
            for (other, _) in Offload::ALL {
                assert_eq!(offloads.has(other), other == one);
            }
        }
        assert_eq!(Offloads::ALL.to_string(), "TSO USO Merge GSO GRO Batch");
        assert_eq!(Offloads::NONE.to_string(), "none");
    }
}
