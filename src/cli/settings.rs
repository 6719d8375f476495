//! What was typed, checked for meaning: what the agent works with.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use super::flags::{GROUPS, Kind};
use super::options::Options;
use crate::firewall;
use crate::firewall::choose::Mode;

/// Which of etcd's two key spaces holds the leases.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EtcdApi {
    /// v3; v2 if only that holds a network config.
    Auto,
    /// The v3 key space, through the JSON gateway.
    V3,
    /// The v2 keys API.
    V2,
}

/// How to reach etcd.
#[derive(Clone, PartialEq, Eq)]
pub struct Etcd {
    /// URLs, in the order given.
    pub endpoints: Vec<String>,
    /// Root of the keys: a leading slash, no trailing one.
    pub prefix: String,
    /// Key space.
    pub api: EtcdApi,
    /// Authorities that may sign the server's certificate.
    pub ca: Option<PathBuf>,
    /// Client certificate and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// User name and password.
    pub user: Option<(String, String)>,
}

// the password must not reach a log
impl std::fmt::Debug for Etcd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "etcd at {} below {}", self.endpoints.join(","), self.prefix)
    }
}

/// Which interface and addresses the operator wants.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Interface {
    /// Names or addresses; the first that exists is taken.
    pub names: Vec<String>,
    /// Regular expressions on addresses, then on names.
    pub patterns: Vec<String>,
    /// An address that must be reached over the interface.
    pub can_reach: Option<IpAddr>,
    /// Advertised IPv4 address.
    pub public_ip: Option<Ipv4Addr>,
    /// Advertised IPv6 address.
    pub public_ipv6: Option<Ipv6Addr>,
}

/// The daemon's settings.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Settings {
    /// The store.
    pub etcd: Etcd,
    /// How long before its end the lease is renewed.
    pub renew_margin: Duration,
    /// Interface choice.
    pub interface: Interface,
    /// Where the subnet is told to others on this host.
    pub subnet_file: PathBuf,
    /// Where the last good view is kept.
    pub data_dir: PathBuf,
    /// Address of the health server, if there is to be one.
    pub health: Option<SocketAddr>,
    /// Traffic rules; `FLANNEL_IPMASQ` says whether they masquerade.
    pub firewall: firewall::Options,
    /// A blackhole route for this host's own subnet.
    pub blackhole: bool,
    /// `-v`.
    pub verbosity: i64,
    /// Lines for the log once it is up: every option in force, secrets left out, and what deserves a warning.
    pub notes: Notes,
}

/// What the start of the log says about the settings.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Notes {
    /// The options in force, in one line.
    pub options: String,
    /// One line each.
    pub warnings: Vec<String>,
}

impl Settings {
    /// # Errors
    /// One line: which flag, what is wrong, what would be right.
    pub(super) fn new(options: &Options) -> Result<Self, String> {
        let mut warnings = options.notes.clone();
        let settings = Self {
            etcd: etcd(options, &mut warnings)?,
            renew_margin: renew_margin(options)?,
            interface: Interface {
                names: options.list("iface"),
                patterns: options.list("iface-regex"),
                can_reach: address(options, "iface-can-reach")?,
                public_ip: address(options, "public-ip")?,
                public_ipv6: address(options, "public-ipv6")?,
            },
            subnet_file: path(options, "subnet-file")
                .ok_or("-subnet-file is empty: name a file")?,
            data_dir: path(options, "data-dir").ok_or("-data-dir is empty: name a directory")?,
            health: health(options)?,
            firewall: firewall(options)?,
            blackhole: options.bool("ip-blackhole-route"),
            verbosity: options.int("v"),
            notes: Notes::default(),
        };
        Ok(Self { notes: Notes { options: in_force(options), warnings }, ..settings })
    }
}

fn firewall(options: &Options) -> Result<firewall::Options, String> {
    let mode = match options.text("firewall") {
        "auto" => None,
        name => {
            let known = Mode::ALL.into_iter().find(|(_, known)| *known == name);
            let (mode, _) = known.ok_or_else(|| {
                format!(
                    "-firewall is {name:?}: it must be auto, nftables, iptables-nft or iptables-legacy"
                )
            })?;
            Some(mode)
        }
    };
    // upstream spins when it is told 0
    let resync = u64::try_from(options.int("iptables-resync")).unwrap_or(0);
    Ok(firewall::Options {
        masquerade: options.bool("ip-masq"),
        fully_random: !options.bool("ip-masq-fully-random-disable"),
        forward: options.bool("iptables-forward-rules"),
        resync: (resync > 0).then(|| Duration::from_secs(resync.min(24 * 3600))),
        mode,
    })
}

fn etcd(options: &Options, warnings: &mut Vec<String>) -> Result<Etcd, String> {
    let endpoints: Vec<String> = options
        .text("etcd-endpoints")
        .split(',')
        .map(|url| url.trim().to_owned())
        .filter(|url| !url.is_empty())
        .collect();
    if endpoints.is_empty() {
        return Err(
            "-etcd-endpoints is empty: give at least one URL, such as http://127.0.0.1:2379".into(),
        );
    }
    let identity = match (path(options, "etcd-certfile"), path(options, "etcd-keyfile")) {
        (Some(cert), Some(key)) => Some((cert, key)),
        (None, None) => None,
        (Some(_), None) => {
            return Err(
                "-etcd-certfile without -etcd-keyfile: a client certificate needs its key".into()
            );
        }
        (None, Some(_)) => {
            return Err(
                "-etcd-keyfile without -etcd-certfile: a key needs its client certificate".into()
            );
        }
    };
    let user = match (options.text("etcd-username"), options.text("etcd-password")) {
        ("", "") => None,
        (user, password) if !user.is_empty() && !password.is_empty() => {
            Some((user.to_owned(), password.to_owned()))
        }
        _ => {
            warnings.push(
                "-etcd-username and -etcd-password work together only: neither is used".into(),
            );
            None
        }
    };
    let parts: Vec<&str> =
        options.text("etcd-prefix").split('/').filter(|part| !part.is_empty()).collect();
    Ok(Etcd {
        endpoints,
        prefix: parts.iter().map(|part| format!("/{part}")).collect(),
        api: match options.text("etcd-api") {
            "auto" => EtcdApi::Auto,
            "v3" => EtcdApi::V3,
            "v2" => EtcdApi::V2,
            other => return Err(format!("-etcd-api is {other:?}: it must be auto, v3 or v2")),
        },
        ca: path(options, "etcd-cafile"),
        identity,
        user,
    })
}

fn renew_margin(options: &Options) -> Result<Duration, String> {
    match options.int("subnet-lease-renew-margin") {
        minutes @ 1..1440 => Ok(Duration::from_secs(60 * minutes.unsigned_abs())),
        other => Err(format!(
            "-subnet-lease-renew-margin is {other}: it must be between 1 and 1439 minutes"
        )),
    }
}

fn health(options: &Options) -> Result<Option<SocketAddr>, String> {
    match options.int("healthz-port") {
        ..=0 => Ok(None),
        port => {
            let port = u16::try_from(port)
                .map_err(|_| format!("-healthz-port is {port}: it must be 65535 or less"))?;
            let ip = address(options, "healthz-ip")?.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
            Ok(Some(SocketAddr::new(ip, port)))
        }
    }
}

fn path(options: &Options, name: &str) -> Option<PathBuf> {
    Some(options.text(name)).filter(|text| !text.is_empty()).map(PathBuf::from)
}

/// An address of the wanted family, or of either.
trait Family: std::str::FromStr {
    const CALLED: &'static str;
}

impl Family for IpAddr {
    const CALLED: &'static str = "an IP address";
}

impl Family for Ipv4Addr {
    const CALLED: &'static str = "an IPv4 address";
}

impl Family for Ipv6Addr {
    const CALLED: &'static str = "an IPv6 address";
}

fn address<A: Family>(options: &Options, name: &str) -> Result<Option<A>, String> {
    match options.text(name) {
        "" => Ok(None),
        text => text
            .parse()
            .map(Some)
            .map_err(|_| format!("-{name} is {text:?}: it must be {}", A::CALLED)),
    }
}

/// Every option in force, secrets left out.
fn in_force(options: &Options) -> String {
    let flags = GROUPS.iter().flat_map(|(_, flags)| *flags).filter(|flag| !flag.is_command());
    let shown = flags.map(|flag| {
        let value = match flag.kind {
            Kind::List => options.list(flag.name).join(","),
            _ if flag.secret && !options.text(flag.name).is_empty() => "(set)".into(),
            _ => options.text(flag.name).to_owned(),
        };
        format!("{}={value}", flag.name)
    });
    shown.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(args: &[&str]) -> Result<Settings, String> {
        let args: Vec<String> = args.iter().map(ToString::to_string).collect();
        Settings::new(&Options::read(&args, &|_| None)?)
    }

    #[test]
    fn defaults() {
        let settings = settings(&[]).unwrap();
        assert_eq!(settings.etcd.endpoints, ["http://127.0.0.1:4001", "http://127.0.0.1:2379"]);
        assert_eq!(settings.etcd.prefix, "/coreos.com/network");
        assert_eq!(settings.etcd.api, EtcdApi::Auto);
        assert_eq!(settings.renew_margin, Duration::from_secs(3600));
        assert_eq!(settings.health, None);
        assert_eq!(settings.notes.warnings, Vec::<String>::new());
    }

    #[test]
    fn values_are_made_regular() {
        let settings = settings(&[
            "-etcd-endpoints= https://a:2379 ,,https://b:2379/",
            "-etcd-prefix=flannel//net/",
            "-healthz-port=8081",
            "-healthz-ip=::1",
            "-public-ip=1.2.3.4",
        ])
        .unwrap();
        assert_eq!(settings.etcd.endpoints, ["https://a:2379", "https://b:2379/"]);
        assert_eq!(settings.etcd.prefix, "/flannel/net");
        assert_eq!(settings.health, "[::1]:8081".parse().ok());
        assert_eq!(settings.interface.public_ip, Some(Ipv4Addr::new(1, 2, 3, 4)));
    }

    #[test]
    fn wrong_values_say_what_would_be_right() {
        for (args, says) in [
            (&["-subnet-lease-renew-margin=0"][..], "between 1 and 1439"),
            (&["-subnet-lease-renew-margin=1440"], "between 1 and 1439"),
            (&["-etcd-certfile=/c"], "needs its key"),
            (&["-etcd-keyfile=/k"], "needs its client certificate"),
            (&["-etcd-api=v4"], "auto, v3 or v2"),
            (&["-etcd-endpoints=,"], "at least one URL"),
            (&["-public-ip=::1"], "-public-ip is \"::1\": it must be an IPv4 address"),
            (&["-public-ipv6=1.2.3.4"], "an IPv6 address"),
            (&["-iface-can-reach=gateway"], "an IP address"),
            (&["-healthz-port=70000"], "65535 or less"),
            (&["-healthz-port=1", "-healthz-ip=all"], "an IP address"),
            (&["-subnet-file="], "name a file"),
            (&["-firewall=ufw"], "iptables-nft"),
        ] {
            let error = settings(args).unwrap_err();
            assert!(error.contains(says), "{args:?}: {error}");
        }
    }

    #[test]
    fn secrets_stay_out_of_the_log() {
        let settings = settings(&["-etcd-username=root", "-etcd-password=hunter2"]).unwrap();
        assert!(settings.notes.options.contains("etcd-username=root etcd-password=(set)"));
        assert!(!format!("{settings:?}").contains("hunter2"));
    }

    #[test]
    fn what_has_no_effect_is_said() {
        let warnings = settings(&["-etcd-username=x"]).unwrap().notes.warnings;
        assert_eq!(warnings.len(), 1, "{warnings:?}");
    }

    #[test]
    fn traffic_rules() {
        let of = |args: &[&str]| settings(args).unwrap().firewall;
        let usual = of(&[]);
        assert!(!usual.masquerade && usual.fully_random && usual.forward);
        assert_eq!((usual.resync, usual.mode), (Some(Duration::from_secs(5)), None));
        let other = of(&["-ip-masq", "-ip-masq-fully-random-disable", "-firewall=iptables-nft"]);
        assert!(other.masquerade && !other.fully_random);
        assert_eq!(other.mode, Some(Mode::IptablesNft));
        for off in ["-iptables-resync=0", "-iptables-resync=-1"] {
            assert_eq!(of(&[off]).resync, None);
        }
        assert_eq!(of(&["-iptables-resync=9000000000"]).resync, Some(Duration::from_secs(86400)));
    }
}
