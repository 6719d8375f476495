//! The table of flags: name, kind, default and help, written once. Parsing, environment, `--help` and the log all read it.

/// What a flag's value is, in the terms of Go's `flag` package.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// Any text.
    Text,
    /// `true` or `false`; given without a value it is true.
    Bool,
    /// An integer.
    Int,
    /// Any text; may be given several times.
    List,
}

/// What becomes of a flag.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Fate {
    /// It works.
    Works,
    /// Taken so that old command lines start, and without effect.
    Ignored,
    /// The function arrives with a later version; the flag is refused so that nobody relies on it.
    Later,
}

/// One flag.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flag {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    pub(super) default: &'static str,
    pub(super) fate: Fate,
    pub(super) secret: bool,
    pub(super) help: &'static str,
}

impl Flag {
    /// Does it say what to do, rather than how? Such a flag is meant for one call, and not taken from the environment.
    pub(super) fn is_command(&self) -> bool {
        ["version", "help", "cleanup"].contains(&self.name)
    }

    /// The environment variable that stands in for the flag.
    pub(super) fn variable(&self) -> String {
        format!("FLANNELD_{}", self.name.to_ascii_uppercase().replace('-', "_"))
    }
}

const fn flag(name: &'static str, kind: Kind, default: &'static str, help: &'static str) -> Flag {
    Flag { name, kind, default, fate: Fate::Works, secret: false, help }
}

const fn secret(name: &'static str, help: &'static str) -> Flag {
    Flag { name, kind: Text, default: "", fate: Fate::Works, secret: true, help }
}

const fn ignored(name: &'static str, kind: Kind) -> Flag {
    Flag { name, kind, default: "", fate: Fate::Ignored, secret: false, help: "" }
}

const fn later(name: &'static str, kind: Kind) -> Flag {
    Flag { name, kind, default: "", fate: Fate::Later, secret: false, help: "" }
}

/// A heading in `--help`, and the flags below it.
pub(super) type Group = (&'static str, &'static [Flag]);

use Kind::{Bool, Int, List, Text};

/// Every flag that works, grouped for a reader.
pub(super) const GROUPS: &[Group] = &[
    (
        "Where leases are kept (etcd)",
        &[
            flag(
                "etcd-endpoints",
                Text,
                "http://127.0.0.1:4001,http://127.0.0.1:2379",
                "comma-separated URLs; the next one is tried when one fails",
            ),
            flag("etcd-prefix", Text, "/coreos.com/network", "root of the keys"),
            flag(
                "etcd-api",
                Text,
                "auto",
                "v3, v2, or auto: v3, and v2 if only v2 holds a network config",
            ),
            flag(
                "etcd-cafile",
                Text,
                "",
                "PEM file with the authorities that may sign etcd's certificate",
            ),
            flag("etcd-certfile", Text, "", "PEM file with our client certificate"),
            flag("etcd-keyfile", Text, "", "PEM file with its key"),
            flag("etcd-username", Text, "", "user name; used with a password only"),
            secret("etcd-password", "password"),
            flag(
                "subnet-lease-renew-margin",
                Int,
                "60",
                "minutes before its end at which the lease is renewed, 1 to 1439",
            ),
        ],
    ),
    (
        "Where leases are kept (Kubernetes)",
        &[
            flag(
                "kube-subnet-mgr",
                Bool,
                "false",
                "keep them with the nodes of a Kubernetes cluster; NODE_NAME says which is this one",
            ),
            flag(
                "kube-api-url",
                Text,
                "",
                "comma-separated URLs of the API server, instead of the kubeconfig's or the pod's",
            ),
            flag("kubeconfig-file", Text, "", "kubeconfig; without it, what a pod is given"),
            flag(
                "kube-annotation-prefix",
                Text,
                "flannel.alpha.coreos.com",
                "what the names of our annotations begin with",
            ),
            flag(
                "net-config-path",
                Text,
                "/etc/kube-flannel/net-conf.json",
                "file with the network config",
            ),
            flag(
                "set-node-network-unavailable",
                Bool,
                "true",
                "set the node's condition NetworkUnavailable to False once the network works",
            ),
        ],
    ),
    (
        "Which interface and addresses",
        &[
            flag(
                "iface",
                List,
                "",
                "interface by name or address; repeated, the first that exists is taken",
            ),
            flag(
                "iface-regex",
                List,
                "",
                "the same by a regular expression on addresses, then on names",
            ),
            flag("iface-can-reach", Text, "", "the interface over which this address is reached"),
            flag(
                "public-ip",
                Text,
                "",
                "IPv4 address that other hosts are told, such as the outside of a NAT",
            ),
            flag("public-ipv6", Text, "", "IPv6 address that other hosts are told"),
        ],
    ),
    (
        "Files",
        &[
            flag("subnet-file", Text, "/run/flannel/subnet.env", "written once the subnet works"),
            flag(
                "data-dir",
                Text,
                "/var/lib/flannel",
                "keeps the last good view, for a start without the store",
            ),
        ],
    ),
    (
        "Health",
        &[
            flag("healthz-ip", Text, "0.0.0.0", "address of /healthz and /readyz"),
            flag("healthz-port", Int, "0", "their port; 0 turns them off"),
        ],
    ),
    (
        "Traffic rules",
        &[
            flag("ip-masq", Bool, "false", "masquerade what leaves the overlay; FLANNEL_IPMASQ"),
            flag(
                "ip-masq-fully-random-disable",
                Bool,
                "false",
                "no fully random ports in masquerading",
            ),
            flag(
                "iptables-forward-rules",
                Bool,
                "true",
                "let the overlay through the FORWARD chain",
            ),
            flag(
                "iptables-resync",
                Int,
                "5",
                "seconds between checks of iptables-legacy rules, 0 for none; others are watched",
            ),
            flag(
                "firewall",
                Text,
                "auto",
                "where rules go: nftables, iptables-nft, iptables-legacy, or auto: as this host does",
            ),
            flag("ip-blackhole-route", Bool, "false", "blackhole route for this host's own subnet"),
            flag(
                "cleanup",
                Bool,
                "false",
                "remove flannel's rules, routes and VXLAN devices from this host, and exit",
            ),
        ],
    ),
    (
        "Other",
        &[
            flag("v", Int, "0", "how much is logged: 0 facts, 1 to 3 steps, 4 and more everything"),
            flag("version", Bool, "false", "print the version and exit"),
            flag("help", Bool, "false", "print this and exit"),
        ],
    ),
];

/// Flags without effect, and flags of functions that this version does not have.
pub(super) const OTHERS: &[Flag] = &[
    ignored("vmodule", Text),
    ignored("log_backtrace_at", Text),
    ignored("logtostderr", Bool),
    ignored("alsologtostderr", Bool),
    ignored("stderrthreshold", Text),
    ignored("log_dir", Text),
    ignored("use-multi-cluster-cidr", Bool),
    later("listen", Text),
    later("remote", Text),
    later("remote-keyfile", Text),
    later("remote-certfile", Text),
    later("remote-cafile", Text),
    later("networks", Text),
    later("watch-networks", Bool),
    later("subnet-dir", Text),
];

/// All flags.
pub(super) fn all() -> impl Iterator<Item = &'static Flag> {
    GROUPS.iter().flat_map(|(_, flags)| *flags).chain(OTHERS)
}

/// The flag called `name`.
pub(super) fn find(name: &str) -> Option<&'static Flag> {
    all().find(|flag| flag.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        let mut names: Vec<_> = all().map(|flag| flag.name).collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn variables() {
        assert_eq!(find("etcd-endpoints").unwrap().variable(), "FLANNELD_ETCD_ENDPOINTS");
        assert_eq!(find("v").unwrap().variable(), "FLANNELD_V");
        assert_eq!(find("log_backtrace_at").unwrap().variable(), "FLANNELD_LOG_BACKTRACE_AT");
    }
}
