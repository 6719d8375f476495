//! What of the rules on a host concerns us, whoever has read it: a netlink dump or the text of `iptables-save`.

use std::collections::{BTreeMap, BTreeSet};

use super::rule::{Rule, Verdict};
use crate::family::Family;

/// One rule that is there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Found {
    /// What names it when it is deleted: the kernel's handle, or its number in the text that was read.
    pub handle: u64,
    /// What it says, if it says nothing but what we understand.
    pub rule: Option<Rule>,
    /// The chain that it jumps to, whatever else it says.
    pub jump: Option<Box<str>>,
}

impl Found {
    /// A rule that we understand.
    pub fn new(handle: u64, rule: Rule) -> Self {
        let jump = match &rule.verdict {
            Verdict::Jump(chain) => Some(chain.as_ref().into()),
            _ => None,
        };
        Self { handle, rule: Some(rule), jump }
    }
}

/// Tables and chains that are there, of those that were looked at.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Seen {
    /// Tables.
    pub tables: BTreeSet<(Family, &'static str)>,
    /// Rules by table and chain, in order. Rules of everybody's chains that can be none of ours are left out.
    pub chains: BTreeMap<(Family, &'static str, &'static str), Vec<Found>>,
    /// Tables that are switched off (`flags dormant`).
    pub asleep: BTreeSet<(Family, &'static str)>,
    /// Chains that do not hang in the kernel as they should, by table and name.
    pub odd: BTreeSet<(Family, &'static str, &'static str)>,
    /// The families whose FORWARD chain drops what no rule accepts.
    pub forward_drops: BTreeSet<Family>,
}

impl Seen {
    /// The rules of a chain; `None` if there is no such chain.
    pub fn chain(
        &self,
        family: Family,
        table: &'static str,
        chain: &'static str,
    ) -> Option<&[Found]> {
        self.chains.get(&(family, table, chain)).map(Vec::as_slice)
    }
}
