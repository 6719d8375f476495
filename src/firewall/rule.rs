//! One rule, as data: what it matches and what becomes of the packet. Every renderer writes it and every reader makes it.

use std::borrow::Cow;
use std::fmt;

use ipnet::IpNet;

/// Bits of the packet mark: `mark & mask == value`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mark {
    /// The bits that must be set.
    pub value: u32,
    /// The bits that are looked at.
    pub mask: u32,
}

/// An address inside a prefix, or outside of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Term {
    /// The prefix, host bits zero.
    pub net: IpNet,
    /// Outside.
    pub not: bool,
}

impl Term {
    /// Inside of `net`.
    pub fn is(net: IpNet) -> Option<Self> {
        Some(Self { net, not: false })
    }

    /// Outside of `net`.
    pub fn is_not(net: IpNet) -> Option<Self> {
        Some(Self { net, not: true })
    }
}

/// What becomes of a packet that matches.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// It may pass this hook.
    Accept,
    /// The rest of this chain is not for it.
    Return,
    /// Its source becomes an address of the interface that it leaves by.
    Masquerade {
        /// Ports are chosen at random (`NF_NAT_RANGE_PROTO_RANDOM_FULLY`).
        fully_random: bool,
    },
    /// Another chain is for it.
    Jump(Cow<'static, str>),
}

/// A rule.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rule {
    /// Packet mark.
    pub mark: Option<Mark>,
    /// Source address.
    pub source: Option<Term>,
    /// Destination address.
    pub destination: Option<Term>,
    /// Remark for people; empty for none.
    pub comment: Cow<'static, str>,
    /// Verdict.
    pub verdict: Verdict,
}

impl Rule {
    /// A rule for every packet.
    pub fn new(verdict: Verdict) -> Self {
        Self { mark: None, source: None, destination: None, comment: "".into(), verdict }
    }
}

/// Reads as the arguments of `iptables -A CHAIN`, in the order and with the quotes of `iptables -S`.
impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (flag, term) in [("-s", self.source), ("-d", self.destination)] {
            if let Some(Term { net, not }) = term {
                write!(f, "{}{flag} {net} ", if not { "! " } else { "" })?;
            }
        }
        if let Some(Mark { value, mask }) = self.mark {
            write!(f, "-m mark --mark {value:#x}/{mask:#x} ")?;
        }
        if !self.comment.is_empty() {
            write!(f, "-m comment --comment \"{}\" ", self.comment)?;
        }
        match &self.verdict {
            Verdict::Accept => f.write_str("-j ACCEPT"),
            Verdict::Return => f.write_str("-j RETURN"),
            Verdict::Masquerade { fully_random: false } => f.write_str("-j MASQUERADE"),
            Verdict::Masquerade { fully_random: true } => {
                f.write_str("-j MASQUERADE --random-fully")
            }
            Verdict::Jump(chain) => write!(f, "-j {chain}"),
        }
    }
}
