//! Where the rules go: a pure function of what the operator says and what is found on the host.

use super::legacy::Variant;

/// Where the rules go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Into tables of our own, over `nf_tables` netlink.
    Nftables,
    /// Where `iptables-nft` shows them, over `nf_tables` netlink.
    IptablesNft,
    /// Into the tables of the old `iptables`, through `iptables-legacy-restore`.
    IptablesLegacy,
}

impl Mode {
    /// All, with the names that operators use.
    pub const ALL: [(Self, &'static str); 3] = [
        (Self::Nftables, "nftables"),
        (Self::IptablesNft, "iptables-nft"),
        (Self::IptablesLegacy, "iptables-legacy"),
    ];

    /// The name that operators use.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(mode, _)| *mode == self).map_or("?", |(_, name)| name)
    }
}

/// What the choice depends on.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Facts {
    /// `-firewall`, unless it is `auto`.
    pub forced: Option<Mode>,
    /// `EnableNFTables` in the network config.
    pub config: bool,
    /// Why the kernel has no `nf_tables`, if it has none.
    pub no_nf_tables: Option<String>,
    /// kubelet has left its chains in `nf_tables`.
    pub nft_hint: bool,
    /// There are tables that `iptables-nft` makes.
    pub nft_tables: bool,
    /// kubelet has left its chains in the old tables.
    pub legacy_hint: bool,
    /// Rules of others in the old tables.
    pub legacy_rules: usize,
    /// The old tables are in the kernel, for this network namespace.
    pub legacy_tables: bool,
    /// `iptables-legacy-save` and `-restore` are on this host.
    pub legacy_tools: bool,
    /// The kind of the host's `iptables`.
    pub host: Option<Variant>,
}

/// What was chosen, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Choice {
    /// `None` when there is nowhere to put rules.
    pub mode: Option<Mode>,
    /// In words.
    pub why: String,
    /// What an operator should know and perhaps change.
    pub warning: Option<String>,
}

/// Chooses.
pub fn choose(facts: &Facts) -> Choice {
    let (mode, why) = wish(facts);
    let Some(reason) = &facts.no_nf_tables else {
        return without_tools(facts, mode, why);
    };
    if mode == Mode::IptablesLegacy {
        return without_tools(facts, mode, why);
    }
    let lacks = format!("nf_tables cannot be used here ({reason})");
    if facts.forced.is_none() && facts.legacy_tools {
        let warning = facts.config.then(|| {
            format!("EnableNFTables is set, but {lacks}: the rules go to iptables-legacy instead")
        });
        return Choice { mode: Some(Mode::IptablesLegacy), why: lacks, warning };
    }
    let way_out = if facts.legacy_tools {
        "choose -firewall=iptables-legacy"
    } else {
        "CONFIG_NF_TABLES is needed, or iptables-legacy-restore on this host"
    };
    Choice { mode: None, why: format!("{lacks}: {way_out}"), warning: None }
}

fn wish(facts: &Facts) -> (Mode, String) {
    if let Some(forced) = facts.forced {
        return (forced, "-firewall says so".into());
    }
    if facts.config {
        return (Mode::Nftables, "EnableNFTables is set in the network config".into());
    }
    let (mode, why) = match facts.host {
        _ if facts.nft_hint => (Mode::IptablesNft, "kubelet uses it"),
        _ if facts.legacy_hint => (Mode::IptablesLegacy, "kubelet uses it"),
        Some(Variant::Legacy) => (Mode::IptablesLegacy, "the host's iptables is of this kind"),
        Some(Variant::Nft) => (Mode::IptablesNft, "the host's iptables is of this kind"),
        None if facts.legacy_rules > 0 && !facts.nft_tables => {
            (Mode::IptablesLegacy, "there are legacy rules and no others")
        }
        None => (Mode::IptablesNft, "there is no iptables here that says otherwise"),
    };
    (mode, why.into())
}

fn without_tools(facts: &Facts, mode: Mode, why: String) -> Choice {
    if mode == Mode::IptablesLegacy && !facts.legacy_tools {
        let lacks = "there is no iptables-legacy-restore on this host";
        return if facts.forced.is_some() || facts.no_nf_tables.is_some() {
            Choice {
                mode: None,
                why: format!("{lacks}: install it, or choose another -firewall"),
                warning: None,
            }
        } else {
            let warning = format!(
                "iptables-legacy is in use ({why}), but {lacks}: the rules go to iptables-nft; a legacy FORWARD chain that \
                 drops still drops"
            );
            Choice { mode: Some(Mode::IptablesNft), why: lacks.into(), warning: Some(warning) }
        };
    }
    let unseen = mode != Mode::IptablesLegacy && facts.legacy_tables && !facts.legacy_tools;
    let mixed = mode != Mode::IptablesLegacy && facts.legacy_rules > 0;
    let warning = if mixed {
        Some(format!(
            "there are {} legacy rules on this host, too: a legacy FORWARD chain that drops still drops; \
             -firewall=iptables-legacy puts the rules there",
            facts.legacy_rules
        ))
    } else {
        unseen.then(|| {
            "the tables of the old iptables are in use, and without iptables-legacy-save nobody can look what is in them"
                .to_owned()
        })
    };
    Choice { mode: Some(mode), why, warning }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usual() -> Facts {
        Facts { legacy_tools: true, host: Some(Variant::Nft), ..Facts::default() }
    }

    #[test]
    fn what_is_chosen() {
        let no_nf_tables = Some("Invalid argument".to_owned());
        let forced = |mode| Facts { forced: Some(mode), ..usual() };
        for (facts, mode, warned) in [
            (usual(), Some(Mode::IptablesNft), false),
            (Facts::default(), Some(Mode::IptablesNft), false),
            (Facts { config: true, ..usual() }, Some(Mode::Nftables), false),
            (Facts { host: Some(Variant::Legacy), ..usual() }, Some(Mode::IptablesLegacy), false),
            // kubelet's word counts more than the name of a file
            (
                Facts { host: Some(Variant::Legacy), nft_hint: true, ..usual() },
                Some(Mode::IptablesNft),
                false,
            ),
            (Facts { legacy_hint: true, ..usual() }, Some(Mode::IptablesLegacy), false),
            (
                Facts { legacy_hint: true, nft_hint: true, ..usual() },
                Some(Mode::IptablesNft),
                false,
            ),
            (Facts { host: None, legacy_rules: 3, ..usual() }, Some(Mode::IptablesLegacy), false),
            (
                Facts { host: None, legacy_rules: 3, nft_tables: true, ..usual() },
                Some(Mode::IptablesNft),
                true,
            ),
            (Facts { legacy_rules: 3, ..usual() }, Some(Mode::IptablesNft), true),
            (
                Facts { legacy_tools: false, legacy_tables: true, ..usual() },
                Some(Mode::IptablesNft),
                true,
            ),
            (
                Facts { legacy_tools: false, host: Some(Variant::Legacy), ..usual() },
                Some(Mode::IptablesNft),
                true,
            ),
            (forced(Mode::Nftables), Some(Mode::Nftables), false),
            (forced(Mode::IptablesLegacy), Some(Mode::IptablesLegacy), false),
            (Facts { legacy_tools: false, ..forced(Mode::IptablesLegacy) }, None, false),
            (
                Facts { no_nf_tables: no_nf_tables.clone(), ..usual() },
                Some(Mode::IptablesLegacy),
                false,
            ),
            (
                Facts { no_nf_tables: no_nf_tables.clone(), config: true, ..usual() },
                Some(Mode::IptablesLegacy),
                true,
            ),
            (
                Facts { no_nf_tables: no_nf_tables.clone(), legacy_tools: false, ..usual() },
                None,
                false,
            ),
            (Facts { no_nf_tables, ..forced(Mode::Nftables) }, None, false),
        ] {
            let choice = choose(&facts);
            assert_eq!(
                (choice.mode, choice.warning.is_some()),
                (mode, warned),
                "{facts:?} {choice:?}"
            );
            assert!(!choice.why.is_empty());
        }
    }
}
