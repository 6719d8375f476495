//! Traffic rules on whole hosts: who sees which address, what others do to the rules under traffic, and the end of it all.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use super::world::{Agent, Etcd, Flow, Host, PATIENCE, Process, STORE, World, binary, until};

const DUAL: &str = r#""Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48""#;
const MODES: [&str; 3] = ["iptables-nft", "nftables", "iptables-legacy"];
const PORT: u16 = 7777;

struct Pair {
    hosts: Vec<Host>,
    agents: Vec<Agent>,
    etcd: Etcd,
    // last: the janitor comes when all else is gone
    world: World,
}

/// Two hosts with containers; `prepare` sees the hosts before their agents.
fn pair(args: &[&str], prepare: impl Fn(&Host)) -> Pair {
    let mut world = World::new();
    let etcd = world.etcd(&[]);
    etcd.put_config("v3", &format!(r#"{{{DUAL},"Backend":{{"Type":"vxlan"}}}}"#));
    let hosts = world.hosts(2);
    hosts.iter().for_each(prepare);
    let agents: Vec<Agent> = hosts.iter().map(|host| host.start(args)).collect();
    agents.iter().for_each(Agent::wait_ready);
    hosts.iter().for_each(Host::add_container);
    let ip = hosts[1].container_ip().unwrap();
    until("the first ping", PATIENCE, || hosts[0].ping(&ip).is_ok());
    Pair { hosts, agents, etcd, world }
}

/// Answers each connection with the address that it comes from, until one says `end`.
fn tell_addresses(listener: &TcpListener) {
    for stream in listener.incoming() {
        let mut stream = stream.unwrap();
        let _ = stream.set_read_timeout(Some(PATIENCE));
        let mut word = [0; 3];
        if stream.read_exact(&mut word).is_ok() && &word == b"end" {
            return;
        }
        let answer = stream.peer_addr().unwrap().ip().to_string();
        let _ = stream.write_all(answer.as_bytes());
    }
}

/// The address that the other end sees.
fn ask(to: IpAddr) -> std::io::Result<String> {
    let mut stream =
        TcpStream::connect_timeout(&SocketAddr::new(to, PORT), Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    stream.write_all(b"who")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn end(to: IpAddr) {
    let _ = TcpStream::connect((to, PORT)).map(|mut stream| stream.write_all(b"end"));
}

fn sees(what: &str, expected: &str, ask: impl Fn() -> std::io::Result<String>) {
    let mut last = String::new();
    until(&format!("{what}: {expected}"), PATIENCE, || match ask() {
        Ok(seen) => {
            assert_eq!(seen, expected, "{what}");
            true
        }
        Err(error) => {
            last = error.to_string();
            thread::sleep(Duration::from_millis(50));
            false
        }
    });
    let _ = last;
}

/// Containers see each other's own addresses, the outside sees the host's, and a host's other addresses become one that
/// finds the way back; Docker's policy of FORWARD drops, where rules of ours can help against it.
fn addresses(mode: &'static str) {
    let flag = format!("-firewall={mode}");
    let pair = pair(&["-ip-masq", &flag], |host| match mode {
        "nftables" => {}
        mode => {
            let variant = mode.trim_start_matches("iptables-");
            host.shell(&format!(
                "iptables-{variant} -P FORWARD DROP; ip6tables-{variant} -P FORWARD DROP"
            ));
        }
    });
    let (near, far) = (&pair.hosts[0], &pair.hosts[1]);
    for v6 in [false, true] {
        let own = |host: &Host| if v6 { host.ip6() } else { host.ip() };
        let pod =
            |host: &Host| if v6 { host.container_ip6() } else { host.container_ip() }.unwrap();
        let remote: IpAddr = pod(far).parse().unwrap();
        let outside: IpAddr = if v6 { "fd77::1" } else { STORE }.parse().unwrap();
        let listen = move |at: IpAddr| tell_addresses(&TcpListener::bind((at, PORT)).unwrap());
        let servers = [
            far.container_thread(move || listen(remote)),
            pair.world.thread(move || listen(outside)),
        ];
        for (what, expected, to) in [
            ("a container sees another host's container", pod(near), remote),
            ("the outside sees a container", own(near), outside),
        ] {
            let asked = near.clone();
            sees(what, &expected, || asked.container_thread(move || ask(to)).join().unwrap());
        }
        // a process of the host that uses the address of its interface, which is the source of this route
        let route = if v6 { "ip -6 route" } else { "ip route" };
        near.run(&format!("{route} replace {remote} {} src {}", via(far, v6), own(near)));
        let seen = near.thread(move || ask(remote)).join().unwrap().unwrap();
        let network = if v6 { "fd00:5:0:" } else { "10.5." };
        assert!(seen.starts_with(network), "a host's own address was not masqueraded: {seen}");
        near.run(&format!("{route} del {remote}"));
        // the outside comes to the host that has the container, by a route to it: it is seen as it is
        let back = if v6 { "ip -6 route" } else { "ip route" };
        pair.world.run_in("net", &format!("{back} add {remote} via {}", own(far)));
        sees("a container sees the outside", &outside.to_string(), || {
            pair.world.thread(move || ask(remote)).join().unwrap()
        });
        near.container_thread(move || end(remote)).join().unwrap();
        near.thread(move || end(outside)).join().unwrap();
        servers.into_iter().for_each(|server| server.join().unwrap());
    }
    for agent in &pair.agents {
        assert!(!agent.log().contains("] E"), "{}", agent.log());
        assert!(agent.log().contains(&format!("traffic rules go to {mode}")), "{}", agent.log());
    }
    drop(pair.etcd);
}

/// The way to a host's containers, as the agent has set it.
fn via(host: &Host, v6: bool) -> String {
    let ip = if v6 { host.container_ip6() } else { host.container_ip() }.unwrap();
    let network = if v6 {
        format!("{}:", ip.rsplit_once(':').unwrap().0)
    } else {
        format!("{}.0", ip.rsplit_once('.').unwrap().0)
    };
    format!("via {network} dev {} onlink", if v6 { "flannel-v6.1" } else { "flannel.1" })
}

#[test]
fn addresses_with_iptables_nft() {
    addresses("iptables-nft");
}

#[test]
fn addresses_with_nftables() {
    addresses("nftables");
}

#[test]
fn addresses_with_iptables_legacy() {
    addresses("iptables-legacy");
}

/// A connection that stays open: each word that goes out comes back.
struct Echo {
    stream: TcpStream,
}

impl Echo {
    fn start(pair: &Pair) -> Self {
        let outside: IpAddr = STORE.parse().unwrap();
        let listener = pair.world.thread(move || TcpListener::bind((outside, PORT)).unwrap());
        let listener = listener.join().unwrap();
        thread::spawn(move || {
            let (mut stream, peer) = listener.accept().unwrap();
            let mut word = [0; 64];
            let _ = stream.write_all(format!("{}\n", peer.ip()).as_bytes());
            while let Ok(len @ 1..) = stream.read(&mut word) {
                let _ = stream.write_all(&word[..len]);
            }
        });
        let connect = move || TcpStream::connect((outside, PORT)).unwrap();
        let mut stream = pair.hosts[0].container_thread(connect).join().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut hello = [0; 64];
        let len = stream.read(&mut hello).unwrap();
        assert_eq!(String::from_utf8_lossy(&hello[..len]).trim(), pair.hosts[0].ip());
        Self { stream }
    }

    #[track_caller]
    fn check(&mut self, when: &str) {
        self.stream.write_all(b"hello").unwrap();
        let mut back = [0; 5];
        self.stream.read_exact(&mut back).unwrap_or_else(|error| panic!("{when}: {error}"));
        assert_eq!(&back, b"hello");
    }
}

/// Docker's way: what is new is dropped, what is known passes.
fn like_docker(host: &Host, variant: &str) {
    for program in ["iptables", "ip6tables"] {
        host.shell(&format!(
            "{program}-{variant} -P FORWARD DROP; \
             {program}-{variant} -A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
        ));
    }
}

/// Flushed, deleted, swapped, doubled, reloaded: repaired within a second, and nobody's packet is lost.
#[test]
fn damage_under_traffic_loses_nothing() {
    let pair = pair(&["-ip-masq", "-firewall=iptables-nft"], |host| like_docker(host, "nft"));
    let (near, ip) = (&pair.hosts[0], pair.hosts[1].container_ip().unwrap());
    let right = near.shell(
        "iptables-nft-save -t nat | grep FLANNEL; iptables-nft-save -t filter | grep FLANNEL",
    );
    let mut echo = Echo::start(&pair);
    let flow = Flow::start(near, &ip);
    for damage in [
        "iptables -t nat -F",
        "iptables -F FLANNEL-FWD",
        "iptables -D FORWARD -m comment --comment 'flanneld forward' -j FLANNEL-FWD",
        "iptables -t nat -D FLANNEL-POSTRTG 2",
        "iptables -t nat -A FLANNEL-POSTRTG -s 10.5.0.0/16 -m comment --comment 'flanneld masq' -j MASQUERADE",
        "nft flush ruleset",
        // a firewall that loads its own rule set
        "printf 'flush ruleset\\ntable inet firewalld {\\n chain f { type filter hook forward priority 10; policy accept; }\\n}\\n' | nft -f -",
    ] {
        // without any NAT chain the kernel translates nothing, not even what it knows: no acknowledgement may be on its way
        thread::sleep(Duration::from_millis(100));
        near.shell(damage);
        until(damage, Duration::from_secs(1), || {
            near.shell("iptables-nft-save -t nat | grep FLANNEL; iptables-nft-save -t filter | grep FLANNEL; true") == right
        });
        echo.check(damage);
    }
    assert!(
        near.run("nft list ruleset").contains("table inet firewalld"),
        "the reload's own rules stay"
    );
    let log = pair.agents[0].log();
    assert!(
        log.contains("iptables (process") || log.contains("xtables-nft-mult (process"),
        "{log}"
    );
    assert!(log.contains("nft (process") && log.contains("put back"), "{log}");
    let (sent, lost) = flow.stop();
    assert!(sent > 50, "{sent}");
    assert_eq!(lost, 0, "of {sent}");
}

/// The modes one after the other, back and forth, and restarts between them: no packet is lost, connections go on, and
/// nothing of the old mode is left.
#[test]
fn switching_modes_under_traffic_loses_nothing() {
    let mut pair = pair(&["-ip-masq"], |host| like_docker(host, "nft"));
    let near = pair.hosts[0].clone();
    let flow = Flow::start(&near, &pair.hosts[1].container_ip().unwrap());
    let mut echo = Echo::start(&pair);
    for mode in [
        "nftables",
        "iptables-legacy",
        "iptables-nft",
        "iptables-legacy",
        "nftables",
        "iptables-nft",
    ] {
        let agent = pair.agents.remove(0);
        assert_eq!(agent.stop().code(), Some(0));
        let agent = near.start(&["-ip-masq", &format!("-firewall={mode}")]);
        agent.wait_ready();
        pair.agents.insert(0, agent);
        echo.check(mode);
        let shown = [
            ("nftables", "nft list ruleset | grep -c flannel-ipv4"),
            ("iptables-nft", "iptables-nft-save | grep -c FLANNEL-POSTRTG"),
            ("iptables-legacy", "iptables-legacy-save | grep -c FLANNEL-POSTRTG"),
        ];
        until(mode, PATIENCE, || {
            shown.iter().all(|(name, count)| {
                let there = near.shell(&format!("{count} || true")).trim() != "0";
                there == (*name == mode)
            })
        });
    }
    let (sent, lost) = flow.stop();
    assert_eq!(lost, 0, "of {sent}");
}

/// A restart in each mode writes nothing; rules of a Go flanneld stay as they are.
#[test]
fn restarts_write_nothing() {
    for mode in MODES {
        let flag = format!("-firewall={mode}");
        let args = ["-ip-masq", &flag, "-healthz-port=9101", "-healthz-ip=127.0.0.1"];
        let mut pair = pair(&args, |_| {});
        let near = pair.hosts[0].clone();
        let rules = || {
            near.shell(
                "nft -s -a list ruleset 2>/dev/null; iptables-legacy-save | grep -v '^[#:]'; true",
            )
        };
        let before = rules();
        pair.agents.remove(0).kill();
        let agent = near.start(&args);
        agent.wait_ready();
        assert_eq!(before, rules(), "handles tell");
        let status = super::world::http_get(&near, "http://127.0.0.1:9101/status");
        assert!(status.contains(&format!("firewall {mode}\n")), "{status}");
        assert!(status.contains("firewall_rules in place\nfirewall_writes 0\n"), "{status}");
    }
}

/// With `/run` read-only the usual way works; the legacy way says what it needs.
#[test]
fn read_only_run() {
    let mut world = World::new();
    let etcd = world.etcd(&[]);
    etcd.put_config("v3", r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#);
    let host = world.host();
    let locked = |args: &str| {
        let script = format!(
            "mount -t tmpfs -o ro none /run && exec {} -etcd-endpoints=http://{STORE}:2379 \
             -subnet-file={} -data-dir={} -ip-masq {args} 2>> {}",
            binary().display(),
            host.subnet_file().display(),
            host.dir.join("data").display(),
            host.dir.join("log").display(),
        );
        let mut command = host.command("unshare");
        Process::start("flanneld", command.args(["-m", "sh", "-c", &script]))
    };
    let agent = locked("");
    until("ready", PATIENCE, || host.log().contains("] ready"));
    drop(agent);
    let _agent = locked("-firewall=iptables-legacy");
    until("the reason", PATIENCE, || {
        host.log().contains("mount the host's /run/xtables.lock, writable")
    });
    assert!(
        host.run("iptables-nft -t nat -S").contains("FLANNEL"),
        "the old rules stay until the new ones are there"
    );
}

/// A route that catches what no container has; a bridge's own route comes first.
#[test]
fn blackhole_route() {
    let mut world = World::new();
    let etcd = world.etcd(&[]);
    etcd.put_config("v3", &format!(r#"{{{DUAL},"Backend":{{"Type":"vxlan"}}}}"#));
    let host = world.host();
    let agent = host.start(&["-ip-blackhole-route"]);
    agent.wait_ready();
    let found = |host: &Host| {
        let v4 = host.run("ip -4 route show type blackhole");
        let v6 = host.run("ip -6 route show type blackhole");
        (v4.lines().count(), v6.lines().count())
    };
    assert_eq!(found(&host), (1, 1));
    let subnet = host.env("FLANNEL_SUBNET").unwrap();
    let ip = host.container_ip().unwrap();
    assert!(host.try_run(&format!("ip route get {ip}")).is_err());
    host.run("ip route flush type blackhole");
    until("it is back", Duration::from_secs(1), || found(&host) == (1, 1));
    host.run("ip link add cni0 type bridge");
    host.run(&format!("ip addr add {subnet} dev cni0"));
    host.run("ip link set cni0 up");
    let route = host.run(&format!("ip route get {ip}"));
    assert!(route.contains("dev cni0"), "{route}");
    agent.stop();
    let agent = host.start(&[]);
    agent.wait_ready();
    until("it is gone", PATIENCE, || found(&host) == (0, 0));
    drop(etcd);
}

/// `flanneld -cleanup`: not beside a running agent; then all that is flannel's goes, and nothing else.
#[test]
fn cleaning_up() {
    for mode in MODES {
        let flag = format!("-firewall={mode}");
        let mut pair = pair(&["-ip-masq", "-ip-blackhole-route", &flag], |host| {
            host.run("iptables-nft -t nat -A POSTROUTING -s 172.17.0.0/16 -j MASQUERADE");
            host.run("ip link add mine type vxlan id 77 dstport 4000");
            host.run("ip route add 10.99.0.0/16 via 192.168.77.1 proto static");
        });
        let near = pair.hosts[0].clone();
        let clean_up = || {
            let file = format!("-subnet-file={}", near.subnet_file().display());
            let output = near.command(binary()).args(["-cleanup", &file]).output().unwrap();
            (output.status.code(), String::from_utf8(output.stderr).unwrap())
        };
        let (status, text) = clean_up();
        assert_eq!(status, Some(1), "{text}");
        assert!(text.contains(&"stop it first".to_owned()), "{text}");
        pair.agents.remove(0).kill();
        let (status, text) = clean_up();
        assert_eq!(status, Some(0), "{text}");
        let left = near.shell(
            "nft list ruleset 2>/dev/null; iptables-legacy-save; ip6tables-legacy-save; ip link; ip route; ip -6 route; \
             ip route show type blackhole",
        );
        assert!(!left.to_ascii_lowercase().contains("flannel") && !left.contains("241"), "{left}");
        for kept in ["172.17.0.0/16", "mine", "10.99.0.0/16", "eth0"] {
            assert!(left.contains(kept), "{kept}: {left}");
        }
        // and a second time there is nothing to do
        assert_eq!(clean_up().0, Some(0));
    }
}

/// The network config chooses for all hosts, and a flag for one.
#[test]
fn the_network_config_chooses_nftables() {
    let mut world = World::new();
    let etcd = world.etcd(&[]);
    etcd.put_config(
        "v3",
        &format!(r#"{{{DUAL},"EnableNFTables":true,"Backend":{{"Type":"vxlan"}}}}"#),
    );
    let host = world.host();
    let agent = host.start(&["-ip-masq"]);
    agent.wait_ready();
    assert!(agent.log().contains("EnableNFTables is set in the network config"), "{}", agent.log());
    let shown = host.run("nft list ruleset");
    assert!(shown.contains("table ip flannel-ipv4") && shown.contains("table ip6 flannel-ipv6"));
    assert!(!shown.contains("FLANNEL-"), "{shown}");
    agent.stop();
    let agent = host.start(&["-ip-masq", "-firewall=iptables-nft"]);
    agent.wait_ready();
    let flannels = || host.run("nft list ruleset").contains("table ip flannel-ipv4");
    until("the tables of our own are gone", PATIENCE, || !flannels());
    assert!(host.run("iptables-nft -t nat -S").contains("FLANNEL-POSTRTG"));
}
