//! What was typed, checked for meaning: what the agent works with.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use super::flags::{GROUPS, Kind};
use super::options::Options;
use crate::firewall;
use crate::firewall::choose::Mode;
use crate::store::kube::Who;
use crate::store::kube::annotations::Prefix;

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

/// How to reach a Kubernetes API server, and what to find there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Kube {
    /// URLs that go before others, a scheme not needed; mostly none.
    pub api_urls: Vec<String>,
    /// A kubeconfig.
    pub kubeconfig: Option<PathBuf>,
    /// Prefix of annotations.
    pub prefix: Prefix,
    /// The file with the network config.
    pub config: PathBuf,
    /// Set the node's condition once the network works.
    pub set_condition: bool,
    /// Which node this is: `NODE_NAME`, or else `POD_NAMESPACE` and `POD_NAME`.
    pub who: Option<Who>,
    /// The API server's URL as pods are told it: `KUBERNETES_SERVICE_HOST` and `KUBERNETES_SERVICE_PORT`.
    pub service: Option<String>,
}

/// Where leases are kept.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Store {
    /// In etcd.
    Etcd(Etcd),
    /// With the nodes of a Kubernetes cluster.
    Kube(Kube),
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
    pub store: Store,
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
    pub(super) fn new(
        options: &Options,
        variable: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, String> {
        let mut warnings = options.notes.clone();
        let settings = Self {
            store: if options.bool("kube-subnet-mgr") {
                Store::Kube(kube(options, variable, &mut warnings)?)
            } else {
                Store::Etcd(etcd(options, &mut warnings)?)
            },
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

fn urls(options: &Options, name: &str) -> Vec<String> {
    let parts = options.text(name).split(',').map(|url| url.trim().to_owned());
    parts.filter(|url| !url.is_empty()).collect()
}

fn kube(
    options: &Options,
    variable: &dyn Fn(&str) -> Option<String>,
    warnings: &mut Vec<String>,
) -> Result<Kube, String> {
    let set = |name: &str| variable(name).filter(|value| !value.is_empty());
    for proxy in ["HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"] {
        if set(proxy).is_some() {
            warnings.push(format!("{proxy} has no effect: the API server is asked directly"));
        }
    }
    // they become parts of paths
    let name = |variable: &str| match set(variable) {
        None => Ok(None),
        Some(name) => {
            let fits =
                |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.');
            let fits = name.len() <= 253 && name.bytes().all(fits) && !name.starts_with('.');
            if fits {
                Ok(Some(name))
            } else {
                Err(format!("{variable} is {name:?}, which is no name in Kubernetes"))
            }
        }
    };
    let who = match (name("NODE_NAME")?, name("POD_NAMESPACE")?, name("POD_NAME")?) {
        (Some(node), ..) => Some(Who::Node(node)),
        (None, Some(namespace), Some(name)) => Some(Who::Pod { namespace, name }),
        (None, ..) => None,
    };
    let service = set("KUBERNETES_SERVICE_HOST").map(|host| {
        let host = if host.contains(':') { format!("[{host}]") } else { host };
        let port = set("KUBERNETES_SERVICE_PORT").unwrap_or_else(|| "443".into());
        format!("https://{host}:{port}")
    });
    let prefix = Prefix::parse(options.text("kube-annotation-prefix"))
        .map_err(|wrong| format!("-kube-annotation-prefix is {wrong}"))?;
    Ok(Kube {
        api_urls: urls(options, "kube-api-url"),
        kubeconfig: path(options, "kubeconfig-file"),
        prefix,
        config: path(options, "net-config-path").ok_or("-net-config-path is empty: name a file")?,
        set_condition: options.bool("set-node-network-unavailable"),
        who,
        service,
    })
}

fn etcd(options: &Options, warnings: &mut Vec<String>) -> Result<Etcd, String> {
    let endpoints = urls(options, "etcd-endpoints");
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
        with(&args, &|_| None)
    }

    fn with(
        args: &[String],
        variable: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Settings, String> {
        Settings::new(&Options::read(args, variable)?, variable)
    }

    fn etcd(settings: Settings) -> Etcd {
        match settings.store {
            Store::Etcd(etcd) => etcd,
            Store::Kube(_) => panic!(),
        }
    }

    fn kube(variables: &[(&str, &str)]) -> Result<Kube, String> {
        let variable = |name: &str| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.to_string())
        };
        match with(&["-kube-subnet-mgr".into()], &variable)?.store {
            Store::Kube(kube) => Ok(kube),
            Store::Etcd(_) => panic!(),
        }
    }

    #[test]
    fn which_node() {
        let pod = [("POD_NAME", "p"), ("POD_NAMESPACE", "ns")];
        let found = Some(Who::Pod { namespace: "ns".into(), name: "p".into() });
        assert_eq!(kube(&pod).unwrap().who, found);
        let node = [("NODE_NAME", "n1.example"), pod[0], pod[1]];
        assert_eq!(kube(&node).unwrap().who, Some(Who::Node("n1.example".into())));
        assert_eq!(kube(&pod[..1]).unwrap().who, None);
        assert!(
            kube(&[("NODE_NAME", "../pods")]).unwrap_err().contains("NODE_NAME is \"../pods\"")
        );
        let service = [("KUBERNETES_SERVICE_HOST", "fd00::1"), ("KUBERNETES_SERVICE_PORT", "6443")];
        assert_eq!(kube(&service).unwrap().service.as_deref(), Some("https://[fd00::1]:6443"));
        let usual = kube(&[]).unwrap();
        assert!(usual.set_condition && usual.service.is_none());
        assert_eq!(usual.config, std::path::Path::new("/etc/kube-flannel/net-conf.json"));
    }

    #[test]
    fn defaults() {
        let settings = settings(&[]).unwrap();
        assert_eq!(settings.renew_margin, Duration::from_secs(3600));
        assert_eq!(settings.health, None);
        assert_eq!(settings.notes.warnings, Vec::<String>::new());
        let etcd = etcd(settings);
        assert_eq!(etcd.endpoints, ["http://127.0.0.1:4001", "http://127.0.0.1:2379"]);
        assert_eq!(etcd.prefix, "/coreos.com/network");
        assert_eq!(etcd.api, EtcdApi::Auto);
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

        assert_eq!(settings.health, "[::1]:8081".parse().ok());
        assert_eq!(settings.interface.public_ip, Some(Ipv4Addr::new(1, 2, 3, 4)));
        let etcd = etcd(settings);
        assert_eq!(etcd.endpoints, ["https://a:2379", "https://b:2379/"]);
        assert_eq!(etcd.prefix, "/flannel/net");
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
            (&["-kube-subnet-mgr", "-kube-annotation-prefix=org"], "\"org\" must be a domain"),
            (&["-kube-subnet-mgr", "-net-config-path="], "name a file"),
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
