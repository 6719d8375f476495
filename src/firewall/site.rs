//! Where rules live: which table and chain of the kernel, for which purpose, in whose manner.
//!
//! | | [`Style::Iptables`] | [`Style::Nftables`] |
//! |---|---|---|
//! | [`Part::Masquerade`] | `nat`: `POSTROUTING` → `FLANNEL-POSTRTG` | `flannel-ipv4`: `postrtg` |
//! | [`Part::Forward`] | `filter`: `FORWARD` → `FLANNEL-FWD` | `flannel-ipv4`: `forward` |
//!
//! The names are upstream's (firewall spec 1.2 and 2.2). Scripts and dashboards look for them.

use crate::family::Family;

/// Whose tables the rules are in.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Style {
    /// In the tables that `iptables` shows; chains of ours, which its base chains jump to.
    Iptables,
    /// In tables of our own.
    Nftables,
}

/// What the rules are for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Part {
    /// Packets that leave the overlay get an address that finds its way back.
    Masquerade,
    /// Packets of the overlay are forwarded whatever the policy.
    Forward,
}

impl Part {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Masquerade, Self::Forward];

    /// The remark on each rule in iptables style.
    pub fn comment(self) -> &'static str {
        match self {
            Self::Masquerade => "flanneld masq",
            Self::Forward => "flanneld forward",
        }
    }

    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Masquerade => "masquerade rules",
            Self::Forward => "forward rules",
        }
    }
}

/// How a base chain hangs in the kernel (`linux/netfilter.h`, `linux/netfilter_ipv4.h`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Base {
    /// Chain type.
    pub kind: &'static str,
    /// Hook number.
    pub hook: u32,
    /// Priority; lower ones come first.
    pub priority: i32,
}

/// One place for rules.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Site {
    /// Address family.
    pub family: Family,
    /// Manner.
    pub style: Style,
    /// Purpose.
    pub part: Part,
}

impl Site {
    /// All places of a style.
    pub fn all(style: Style) -> impl Iterator<Item = Self> {
        Family::ALL
            .into_iter()
            .flat_map(move |family| Part::ALL.map(|part| Self { family, style, part }))
    }

    /// The table's name.
    pub fn table(self) -> &'static str {
        match (self.style, self.part, self.family) {
            (Style::Iptables, Part::Masquerade, _) => "nat",
            (Style::Iptables, Part::Forward, _) => "filter",
            (Style::Nftables, _, Family::V4) => "flannel-ipv4",
            (Style::Nftables, _, Family::V6) => "flannel-ipv6",
        }
    }

    /// The remark on the table, if it is our own.
    pub fn table_comment(self) -> Option<&'static str> {
        match (self.style, self.family) {
            (Style::Iptables, _) => None,
            (Style::Nftables, Family::V4) => Some("rules for flannel-ipv4"),
            (Style::Nftables, Family::V6) => Some("rules for flannel-ipv6"),
        }
    }

    /// The name of our chain.
    pub fn chain(self) -> &'static str {
        match (self.style, self.part) {
            (Style::Iptables, Part::Masquerade) => "FLANNEL-POSTRTG",
            (Style::Iptables, Part::Forward) => "FLANNEL-FWD",
            (Style::Nftables, Part::Masquerade) => "postrtg",
            (Style::Nftables, Part::Forward) => "forward",
        }
    }

    /// The remark on our chain.
    pub fn chain_comment(self) -> Option<&'static str> {
        match (self.style, self.part) {
            (Style::Iptables, _) => None,
            (_, Part::Masquerade) => Some("chain to manage traffic masquerading by flannel"),
            (_, Part::Forward) => Some("chain to accept flannel traffic"),
        }
    }

    /// The chain that jumps to ours and is everybody's. `None` when ours hangs in the kernel itself.
    pub fn hook(self) -> Option<&'static str> {
        match (self.style, self.part) {
            (Style::Iptables, Part::Masquerade) => Some("POSTROUTING"),
            (Style::Iptables, Part::Forward) => Some("FORWARD"),
            (Style::Nftables, _) => None,
        }
    }

    /// How the chain hangs in the kernel, be it ours or the one that jumps to ours.
    pub fn base(self) -> Base {
        match self.part {
            Part::Masquerade => Base { kind: "nat", hook: 4, priority: 100 },
            Part::Forward => Base { kind: "filter", hook: 2, priority: 0 },
        }
    }
}

/// A chain that versions before 0.5.6 made in `nat`.
pub const OLD_CHAIN: &str = "FLANNEL";
