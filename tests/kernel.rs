//! The reconciler against the real kernel, each test in a network namespace of its own. Needs root.
#![allow(clippy::disallowed_methods)] // the tests read the clock
#![allow(clippy::unwrap_used)] // in the helpers of tests as well

use std::process::Command;
use std::time::{Duration, Instant};

use flanneld::cli::settings;
use flanneld::kernel::{
    Address, Fdb, IfName, Inventory, KernelEvent, Link, LinkKind, Mac, Neighbour, Object, Owner,
    Port, Progress, Reconciler, Route, Scope, Sysctl, Vxlan,
};
use flanneld::lease::Subnets;
use flanneld::sys::netns;
use flanneld::underlay::{Families, choose};

const PATIENCE: Duration = Duration::from_secs(10);

/// One life of an agent's reconciler.
struct Life {
    kernel: Reconciler,
    port: Port,
    events: Vec<KernelEvent>,
}

fn name(name: &str) -> IfName {
    IfName::new(name).unwrap()
}

fn run(command: &str) -> String {
    let words: Vec<&str> = command.split_whitespace().collect();
    let output = Command::new(words[0]).args(&words[1..]).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A namespace with an underlay interface `eth0`.
fn host() {
    netns::unshare().unwrap();
    for command in [
        "ip link set lo up",
        "ip link add eth0 type veth peer name far0",
        "ip addr add 192.0.2.1/24 dev eth0",
        "ip -6 addr add 2001:db8::1/64 dev eth0 nodad",
        "ip link set eth0 up",
        "ip link set far0 up",
    ] {
        run(command);
    }
}

impl Life {
    fn begin() -> Self {
        let port = Port::open().unwrap();
        let scope = Scope {
            networks: vec!["10.5.0.0/16".parse().unwrap(), "fd00:5::/48".parse().unwrap()],
            devices: vec![name("flannel.1")],
            vxlan_port: 8472,
            port: port.number(),
            seed: 1,
        };
        Self { kernel: Reconciler::new(scope, Instant::now()), port, events: Vec::new() }
    }

    /// Turns for as long as something happens or a deadline is near, until `done` holds.
    fn until(&mut self, what: &str, mut done: impl FnMut(&Reconciler) -> bool) {
        let start = Instant::now();
        loop {
            let now = Instant::now();
            self.kernel.handle_timeout(now);
            let more = self.port.turn(&mut self.kernel, now).unwrap();
            while let Some(event) = self.kernel.poll_event() {
                self.events.push(event);
            }
            if !more && done(&self.kernel) {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "{what}: {:?}", self.events);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn settle(&mut self) {
        self.until("settle", Reconciler::is_settled);
    }

    /// Declares this host and `peers` peers.
    fn declare(&mut self, peers: u8) {
        self.kernel.declare(Owner::Host, own());
        for number in 0..peers {
            self.kernel.declare(owner(number), peer(number));
        }
    }

    fn healed(&self) -> usize {
        self.events.iter().filter(|event| matches!(event, KernelEvent::Healed { .. })).count()
    }
}

fn own() -> Vec<Object> {
    let link = name("flannel.1");
    let vxlan = Vxlan {
        vni: 1,
        port: None,
        lower: name("eth0"),
        local: [192, 0, 2, 1].into(),
        mac: Mac([2, 0, 0, 0, 0, 1]),
        learning: false,
        gbp: false,
    };
    vec![
        Object::Link(Link { name: link, kind: LinkKind::Vxlan(Box::new(vxlan)), mtu: 1450 }),
        Object::Sysctl(Sysctl {
            link,
            path: "net/ipv6/conf/flannel.1/accept_ra".into(),
            value: "0".into(),
        }),
        Object::Address(Address {
            link,
            addr: "10.5.1.0/32".parse().unwrap(),
            exclusive: "10.5.0.0/16".parse().unwrap(),
        }),
    ]
}

fn owner(number: u8) -> Owner {
    Owner::Peer(Subnets { v4: format!("10.5.{}.0/24", number + 2).parse().ok(), v6: None })
}

fn peer(number: u8) -> Vec<Object> {
    let (link, mac) = (name("flannel.1"), Mac([2, 0, 0, 0, 1, number]));
    let ip = format!("10.5.{}.0", number + 2);
    let via = format!("192.0.2.{}", number + 2);
    vec![
        Object::Neighbour(Neighbour { link, ip: ip.parse().unwrap(), mac }),
        Object::Fdb(Fdb { link, mac, dst: via.parse().unwrap() }),
        Object::Route(Route {
            dst: format!("{ip}/24").parse().unwrap(),
            via: ip.parse().ok(),
            link: Some(link),
            onlink: true,
        }),
        Object::Route(Route {
            dst: format!("fd00:5:0:{}::/64", number + 2).parse().unwrap(),
            via: format!("2001:db8::{}", number + 2).parse().ok(),
            link: Some(name("eth0")),
            onlink: false,
        }),
    ]
}

/// Everything that the kernel has for three peers, in the words of iproute2.
fn state() -> [Vec<String>; 5] {
    let lines = |command: &str| {
        let mut lines: Vec<String> =
            run(command).lines().map(|line| line.trim().to_owned()).collect();
        lines.sort();
        lines
    };
    [
        lines("ip -4 route show proto 241"),
        lines("ip -6 route show proto 241"),
        lines("ip neigh show dev flannel.1 nud permanent"),
        lines("bridge fdb show dev flannel.1"),
        lines("ip -br -4 addr show dev flannel.1"),
    ]
}

fn programmed(peers: u8) -> Life {
    host();
    let mut life = Life::begin();
    life.declare(peers);
    life.kernel.sweep();
    life.settle();
    assert_eq!(life.kernel.progress(Owner::Host), Some(Progress::Programmed), "{:?}", life.events);
    assert_eq!((life.kernel.missing(), life.events.len()), (0, 0), "{:?}", life.events);
    life
}

#[test]
fn an_empty_host_gets_everything() {
    programmed(3);
    let [v4, v6, neighbours, fdb, addresses] = state();
    assert_eq!(v4[0], "10.5.2.0/24 via 10.5.2.0 dev flannel.1 onlink");
    assert_eq!(v6[0], "fd00:5:0:2::/64 via 2001:db8::2 dev eth0 metric 1024 pref medium");
    assert_eq!(neighbours[0], "10.5.2.0 lladdr 02:00:00:00:01:00 PERMANENT");
    assert_eq!(fdb[0], "02:00:00:00:01:00 dst 192.0.2.2 self permanent");
    assert_eq!([v4.len(), v6.len(), neighbours.len(), fdb.len(), addresses.len()], [3, 3, 3, 3, 1]);
    let link = run("ip -d link show flannel.1");
    for part in [
        "mtu 1450",
        "vxlan id 1",
        "local 192.0.2.1",
        "dev eth0",
        "dstport 8472",
        "nolearning",
        "02:00:00:00:00:01",
    ] {
        assert!(link.contains(part), "{part} in {link}");
    }
    assert_eq!(run("cat /proc/sys/net/ipv6/conf/flannel.1/accept_ra"), "0\n");
}

#[test]
fn a_restart_writes_nothing() {
    drop(programmed(50));
    let before = state();
    let mut life = Life::begin();
    life.kernel.declare(Owner::Host, own());
    life.settle();
    for number in 0..50 {
        life.kernel.declare(owner(number), peer(number));
    }
    life.kernel.sweep();
    life.settle();
    assert_eq!(
        (life.kernel.writes(), life.kernel.missing(), life.events.len()),
        (0, 0, 0),
        "{:?}",
        life.events
    );
    assert_eq!(state(), before);
}

#[test]
fn departed_peers_are_swept_only_when_everybody_was_heard() {
    drop(programmed(3));
    let before = state();
    let mut life = Life::begin();
    life.declare(1);
    life.settle();
    assert_eq!((life.kernel.writes(), state()), (0, before));
    life.kernel.sweep();
    life.settle();
    assert_eq!(state().map(|lines| lines.len()), [1; 5]);
    assert_eq!(life.events.len(), 8, "{:?}", life.events);
}

#[test]
fn what_others_own_is_left_alone() {
    drop(programmed(1));
    run("ip route add 10.5.77.0/24 via 192.0.2.77 dev eth0 proto static");
    run("ip route add 172.16.0.0/16 via 192.0.2.77 dev eth0 proto 241");
    run("ip route add 10.5.78.0/24 via 192.0.2.78 dev eth0");
    let mut life = Life::begin();
    life.declare(1);
    life.kernel.sweep();
    life.settle();
    let routes = run("ip route");
    for dst in ["10.5.77.0/24", "172.16.0.0/16", "10.5.78.0/24"] {
        assert!(routes.contains(dst), "{dst} in {routes}");
    }
    let [KernelEvent::Leftover(text)] = &life.events[..] else { panic!("{:?}", life.events) };
    assert!(text.contains("10.5.78.0/24"));
}

#[test]
fn what_a_go_flanneld_left_is_adopted_without_a_gap() {
    host();
    for command in [
        "ip link add flannel.1 address 02:00:00:00:00:01 mtu 1450 type vxlan id 1 dev eth0 local 192.0.2.1 dstport 8472 nolearning",
        "ip addr add 10.5.1.0/32 dev flannel.1",
        "ip link set flannel.1 up",
        "ip neigh add 10.5.2.0 lladdr 02:00:00:00:01:00 dev flannel.1 nud permanent",
        "bridge fdb add 02:00:00:00:01:00 dev flannel.1 dst 192.0.2.2 self permanent",
        "ip route add 10.5.2.0/24 via 10.5.2.0 dev flannel.1 onlink",
        "ip route add 10.5.9.0/24 via 10.5.9.0 dev flannel.1 onlink",
    ] {
        run(command);
    }
    let device = run("ip -o link show flannel.1");
    let mut life = Life::begin();
    life.declare(1);
    life.kernel.sweep();
    life.settle();
    assert_eq!(run("ip -o link show flannel.1"), device, "the device is the same");
    // both routes of the peer are written, the departed peer's is removed
    assert_eq!(life.kernel.writes(), 3, "{:?}", life.events);
    assert_eq!(state().map(|lines| lines.len()), [1; 5]);
}

#[test]
fn every_kind_of_damage_is_repaired() {
    let mut life = programmed(3);
    let good = state();
    for damage in [
        "ip route del 10.5.2.0/24",
        "ip route replace 10.5.2.0/24 via 192.0.2.99 dev eth0",
        "ip route flush proto 241",
        "ip route prepend 10.5.3.0/24 via 192.0.2.99 dev eth0",
        "ip -6 route del fd00:5:0:2::/64",
        "ip -6 route replace fd00:5:0:2::/64 via 2001:db8::99 dev eth0 proto static",
        "ip neigh del 10.5.2.0 dev flannel.1",
        "ip neigh replace 10.5.2.0 lladdr 02:00:00:00:09:09 dev flannel.1 nud permanent",
        "ip neigh flush dev flannel.1 nud permanent",
        "bridge fdb del 02:00:00:00:01:00 dev flannel.1 dst 192.0.2.2 self",
        "bridge fdb replace 02:00:00:00:01:00 dev flannel.1 dst 192.0.2.99 self permanent",
        "ip addr del 10.5.1.0/32 dev flannel.1",
        "ip addr flush dev flannel.1",
        "ip addr add 10.5.200.1/24 dev flannel.1",
        "ip link set flannel.1 mtu 1400",
        "ip link set flannel.1 address 02:00:00:00:77:77",
        "ip link set flannel.1 down",
        "ip link del flannel.1",
        "ip link set eth0 down",
    ] {
        run(damage);
        if damage == "ip link set eth0 down" {
            life.until("see it", |kernel| kernel.missing() > 0);
            run("ip link set eth0 up");
            run("ip -6 addr replace 2001:db8::1/64 dev eth0 nodad");
        }
        life.until(damage, |kernel| {
            kernel.missing() == 0 && kernel.is_settled() && state() == good
        });
        let link = run("ip link show flannel.1");
        for part in ["mtu 1450", "02:00:00:00:00:01", ",UP"] {
            assert!(link.contains(part), "{damage}: {part} in {link}");
        }
    }
    assert!(!run("ip route").contains("192.0.2.99"));
    assert!(life.healed() > 15, "{:?}", life.events);
}

#[test]
fn the_underlay_may_be_made_anew() {
    let mut life = programmed(3);
    let good = state();
    run("ip link del eth0");
    life.until("see it", |kernel| kernel.progress(Owner::Host) != Some(Progress::Programmed));
    for command in [
        "ip link add eth0 type veth peer name far0",
        "ip addr add 192.0.2.1/24 dev eth0",
        "ip -6 addr add 2001:db8::1/64 dev eth0 nodad",
        "ip link set eth0 up",
        "ip link set far0 up",
    ] {
        run(command);
    }
    life.until("heal", |kernel| kernel.missing() == 0 && kernel.is_settled());
    assert_eq!(state(), good);
}

#[test]
fn nothing_is_written_when_nothing_happens() {
    let mut life = programmed(20);
    let writes = life.kernel.writes();
    let start = Instant::now();
    let mut turns = 0;
    while start.elapsed() < Duration::from_millis(300) {
        life.kernel.handle_timeout(Instant::now() + Duration::from_secs(70));
        life.settle();
        turns += 1;
    }
    assert!(turns > 3);
    assert_eq!((life.kernel.writes(), life.events.len()), (writes, 0), "{:?}", life.events);
}

#[test]
fn an_incompatible_device_is_made_anew_once_and_a_foreign_one_is_named() {
    host();
    run("ip link add flannel.1 type vxlan id 1 dev eth0 local 192.0.2.1 dstport 4789");
    let mut life = Life::begin();
    life.declare(1);
    life.settle();
    assert_eq!(life.kernel.missing(), 0);
    let [KernelEvent::Remade { reason, .. }] = &life.events[..] else {
        panic!("{:?}", life.events)
    };
    assert_eq!(reason, "its UDP port is 4789 and must be 8472");
    drop(life);
    run("ip link set flannel.1 name cilium_vxlan");
    let mut life = Life::begin();
    life.declare(1);
    life.settle();
    let Some(Progress::Failed(reason)) = life.kernel.progress(Owner::Host) else { panic!() };
    assert!(reason.contains("device cilium_vxlan already uses VNI 1"), "{reason}");
    run("ip link del cilium_vxlan");
    life.until("take the VNI", |kernel| kernel.missing() == 0);
}

#[test]
fn a_device_of_another_kind_is_replaced() {
    host();
    run("ip link add flannel.1 type bridge");
    let mut life = Life::begin();
    life.declare(2);
    life.settle();
    assert_eq!(life.kernel.missing(), 0, "{:?}", life.events);
    assert!(
        matches!(&life.events[..], [KernelEvent::Remade { reason, .. }] if reason.contains("bridge")),
        "{:?}",
        life.events
    );
    assert!(run("ip -d link show flannel.1").contains("vxlan id 1"));
}

#[test]
fn a_refused_route_harms_nobody_and_works_when_it_can() {
    let mut life = programmed(1);
    let dst = "10.5.9.0/24".parse().unwrap();
    let route =
        Route { dst, via: "198.51.100.1".parse().ok(), link: Some(name("eth0")), onlink: false };
    life.kernel.declare(owner(7), vec![Object::Route(route)]);
    life.kernel.declare(owner(1), peer(1));
    life.settle();
    assert_eq!(life.kernel.progress(owner(1)), Some(Progress::Programmed));
    let [KernelEvent::Failed { reason, .. }] = &life.events[..] else {
        panic!("{:?}", life.events)
    };
    assert!(reason.contains("Nexthop has invalid gateway"), "{reason}");
    run("ip addr add 198.51.100.2/24 dev eth0");
    let start = Instant::now();
    life.until("retry", |kernel| kernel.missing() == 0);
    assert!(start.elapsed() < Duration::from_millis(900), "the address is reason enough");
}

#[test]
fn withdrawn_objects_go_and_others_stay() {
    let mut life = programmed(3);
    life.kernel.withdraw(owner(1));
    life.settle();
    let [v4, v6, neighbours, fdb, _] = state();
    assert_eq!([v4.len(), v6.len(), neighbours.len(), fdb.len()], [2; 4]);
    assert!(!v4.concat().contains("10.5.3.0"));
}

#[test]
fn paths_are_told_and_followed() {
    let mut life = programmed(0);
    let (near, far) = ([192, 0, 2, 9].into(), [198, 51, 100, 9].into());
    life.kernel.watch_path(near);
    life.kernel.watch_path(far);
    life.until("answers", |kernel| kernel.direct(near).is_some() && kernel.direct(far).is_some());
    assert_eq!((life.kernel.direct(near), life.kernel.direct(far)), (Some(true), Some(false)));
    let near6 = "2001:db8::9".parse().unwrap();
    life.kernel.watch_path(near6);
    life.until("an IPv6 answer", |kernel| kernel.direct(near6) == Some(true));
    run("ip route add 198.51.100.0/24 dev eth0");
    life.until("news", |kernel| kernel.direct(far) == Some(true));
    assert_eq!(life.events.len(), 4, "{:?}", life.events);
}

#[test]
fn lost_notices_are_made_up_for() {
    let mut life = programmed(3);
    let good = state();
    run("ip route del 10.5.2.0/24");
    // the notice is read by nobody
    let mut deaf = Port::open().unwrap();
    std::mem::swap(&mut deaf, &mut life.port);
    drop(deaf);
    life.kernel.handle_lost_notices(Instant::now());
    life.until("audit", |kernel| kernel.is_settled() && state() == good);
}

/// The vectors of control-plane spec 10.4, asked of the kernel.
#[test]
fn interfaces_as_the_kernel_has_them() {
    host();
    run("ip link add dummy0 type bridge");
    for address in
        ["1.10.100.1", "192.168.200.128", "172.16.30.18", "172.16.31.200", "172.16.32.100"]
    {
        run(&format!("ip addr add {address}/32 dev dummy0"));
    }
    run("ip -6 addr add 2001:db8:9::1/64 dev dummy0 nodad");
    run("ip link set dummy0 up");
    run("ip route add 172.16.32.254 dev dummy0 src 172.16.32.100");
    run("ip route add default via 192.0.2.254 dev eth0 metric 5");
    run("ip route add default dev dummy0 metric 50");
    run("ip -6 route add default via 2001:db8::fe dev eth0");
    let any = settings::Interface::default;
    let named = |name: &str| settings::Interface { names: vec![name.into()], ..any() };
    let matching = |pattern: &str| settings::Interface { patterns: vec![pattern.into()], ..any() };
    let (v4, dual) = (Families { v4: true, v6: false }, Families { v4: true, v6: true });
    for (wanted, families, link, local_v4, local_v6) in [
        (any(), v4, "eth0", "192.0.2.1", ""),
        (any(), dual, "eth0", "192.0.2.1", "2001:db8::1"),
        (named("dummy0"), v4, "dummy0", "1.10.100.1", ""),
        (named("172.16.30.18"), dual, "dummy0", "172.16.30.18", "2001:db8:9::1"),
        (matching(r"192\.168\.200\.\d+"), v4, "dummy0", "192.168.200.128", ""),
        (matching(r"dummy\d+"), v4, "dummy0", "1.10.100.1", ""),
        (
            settings::Interface { can_reach: "172.16.32.254".parse().ok(), ..any() },
            v4,
            "dummy0",
            "172.16.32.100",
            "",
        ),
        (
            settings::Interface { public_ip: "172.16.31.200".parse().ok(), ..any() },
            v4,
            "dummy0",
            "172.16.31.200",
            "",
        ),
        (
            settings::Interface { can_reach: "2001:db8::77".parse().ok(), ..any() },
            dual,
            "eth0",
            "192.0.2.1",
            "2001:db8::1",
        ),
    ] {
        let inventory = Inventory::read(wanted.can_reach).unwrap();
        let underlay = choose(&wanted, families, &inventory).unwrap().underlay;
        assert_eq!(underlay.name.as_str(), link, "{wanted:?}");
        assert_eq!(
            (underlay.local_v4, underlay.local_v6),
            (local_v4.parse().ok(), local_v6.parse().ok()),
            "{wanted:?}"
        );
        assert_eq!(underlay.mtu, 1500);
    }
    run("ip route add unreachable 203.0.113.0/24");
    let target = "203.0.113.1".parse().ok();
    let inventory = Inventory::read(target).unwrap();
    let error =
        choose(&settings::Interface { can_reach: target, ..any() }, v4, &inventory).unwrap_err();
    assert!(error.contains("there is no route to 203.0.113.1"), "{error}");
}
