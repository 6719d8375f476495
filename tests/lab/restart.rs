//! Restarts and repairs under traffic.

use std::thread;
use std::time::Duration;

use super::world::{Agent, Flow, Host, PATIENCE, World, until};

struct Pair {
    hosts: Vec<Host>,
    agents: Vec<Agent>,
    etcd: super::world::Etcd,
    // last: the janitor comes when all else is gone
    _world: World,
}

fn pair(backend: &str) -> Pair {
    let mut world = World::new();
    let etcd = world.etcd(&[]);
    etcd.put_config(
        "v3",
        &format!(r#"{{"Network":"10.5.0.0/16","Backend":{{"Type":"{backend}"}}}}"#),
    );
    let hosts = world.hosts(2);
    let agents: Vec<Agent> = hosts.iter().map(|host| host.start(&[])).collect();
    agents.iter().for_each(Agent::wait_ready);
    hosts.iter().for_each(Host::add_container);
    let ip = hosts[1].container_ip().unwrap();
    until("the first ping", PATIENCE, || hosts[0].ping(&ip).is_ok());
    Pair { hosts, agents, etcd, _world: world }
}

/// SIGTERM and `kill -9`, on both sides, again and again: no packet is lost and nothing is written.
fn restarts_lose_nothing(backend: &str) {
    let mut pair = pair(backend);
    let flow = Flow::start(&pair.hosts[0], &pair.hosts[1].container_ip().unwrap());
    for round in 0..6 {
        let agent = pair.agents.remove(0);
        let host = agent.host.clone();
        if round % 3 == 0 {
            agent.kill();
        } else {
            assert_eq!(agent.stop().code(), Some(0));
        }
        thread::sleep(Duration::from_millis(100));
        let agent = host.start(&[]);
        agent.wait_ready();
        agent.wait_for("all 1 peers programmed");
        assert!(agent.log().contains(", 0 kernel writes"), "{}", agent.log());
        pair.agents.push(agent);
    }
    let (sent, lost) = flow.stop();
    assert!(sent > 40, "{sent}");
    assert_eq!(lost, 0, "of {sent}");
}

#[test]
fn vxlan_restarts_lose_nothing() {
    restarts_lose_nothing("vxlan");
}

#[test]
fn host_gw_restarts_lose_nothing() {
    restarts_lose_nothing("host-gw");
}

/// What the Go flanneld leaves is taken over while packets flow.
#[test]
fn state_of_a_go_flanneld_is_taken_over_without_loss() {
    let mut pair = pair("vxlan");
    let (near, far) = (pair.hosts[0].clone(), pair.hosts[1].clone());
    let agent = pair.agents.remove(0);
    agent.stop();
    // its routes carry no number of their own
    let subnet = format!("{}.0", far.container_ip().unwrap().rsplit_once('.').unwrap().0);
    near.run(&format!("ip route replace {subnet}/24 via {subnet} dev flannel.1 onlink proto boot"));
    near.run("ip route add 10.5.250.0/24 via 10.5.250.0 dev flannel.1 onlink");
    let flow = Flow::start(&near, &far.container_ip().unwrap());
    thread::sleep(Duration::from_millis(200));
    let agent = near.start(&[]);
    agent.wait_ready();
    until("the departed peer's route is gone", PATIENCE, || {
        !near.run("ip route").contains("10.5.250.0")
    });
    assert!(near.routes().contains(&subnet));
    let (sent, lost) = flow.stop();
    assert_eq!(lost, 0, "of {sent}");
}

/// `ip … flush` goes on until nothing is left, and gives up when the agent is faster than it.
fn inflict(host: &Host, damage: &str) {
    if let Err(error) = host.try_run(damage) {
        assert!(error.contains("Flush remains incomplete"), "{error}");
    }
}

/// Everything that somebody can do to the state of a vxlan host is repaired within a second.
#[test]
fn damage_is_repaired_within_a_second() {
    let pair = pair("vxlan");
    let (near, ip) = (&pair.hosts[0], pair.hosts[1].container_ip().unwrap());
    for damage in [
        "ip route flush proto 241",
        "ip neigh flush dev flannel.1 nud permanent",
        "ip link set flannel.1 address 02:00:00:00:77:77",
        "ip addr flush dev flannel.1",
        "ip link set flannel.1 down",
        "ip link del flannel.1",
    ] {
        inflict(near, damage);
        until(damage, Duration::from_secs(1), || near.ping(&ip).is_ok());
    }
    near.run("ip link set eth0 down");
    thread::sleep(Duration::from_millis(300));
    near.run("ip link set eth0 up");
    until("eth0 is up again", PATIENCE, || near.ping(&ip).is_ok());
    near.run("ip link del eth0");
    thread::sleep(Duration::from_millis(300));
    near.plug_in();
    until("eth0 is another one", PATIENCE, || near.ping(&ip).is_ok());
    let log = pair.agents[0].log();
    assert!(log.contains("was deleted by something else on this host: put back"), "{log}");
    drop(pair.etcd);
}

#[test]
fn host_gw_damage_is_repaired() {
    let pair = pair("host-gw");
    let (near, ip) = (&pair.hosts[0], pair.hosts[1].container_ip().unwrap());
    for damage in ["ip route flush proto 241", "ip link set eth0 down"] {
        inflict(near, damage);
        if damage.ends_with("down") {
            thread::sleep(Duration::from_millis(200));
            near.run("ip link set eth0 up");
        }
        until(damage, Duration::from_secs(3), || near.ping(&ip).is_ok());
    }
    near.run("ip link del eth0");
    near.plug_in();
    until("eth0 is another one", PATIENCE, || near.ping(&ip).is_ok());
}

#[test]
fn the_tun_device_of_udp_comes_back() {
    let pair = pair("udp");
    let (near, ip) = (&pair.hosts[0], pair.hosts[1].container_ip().unwrap());
    for damage in [
        "ip route flush proto 241",
        "ip link set flannel0 down",
        "ip addr flush dev flannel0",
        "ip link del flannel0",
    ] {
        inflict(near, damage);
        until(damage, Duration::from_secs(3), || near.ping(&ip).is_ok());
    }
}
