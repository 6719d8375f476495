//! Hosts join and leave, race for subnets, come back, lose their lease.

use std::collections::BTreeSet;
use std::thread;
use std::time::Duration;

use super::world::{Agent, Etcd, Host, PATIENCE, World, until};

const VXLAN: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;
const SECOND: Duration = Duration::from_secs(1);

fn world(config: &str) -> (World, Etcd) {
    let world = World::new();
    let etcd = world.etcd(&[]);
    etcd.put_config("v3", config);
    (world, etcd)
}

/// `10.5.x.0-24`.
fn key(host: &Host) -> String {
    let gateway = host.env("FLANNEL_SUBNET").unwrap();
    format!("{}.0-24", gateway.rsplit_once('.').unwrap().0)
}

fn prefix(host: &Host) -> String {
    key(host).replace('-', "/")
}

#[test]
fn a_third_host_joins_and_leaves_within_a_second() {
    let (mut world, etcd) = world(VXLAN);
    let hosts = world.hosts(3);
    let _old: Vec<Agent> = hosts[..2]
        .iter()
        .map(|host| {
            let agent = host.start(&[]);
            agent.wait_ready();
            agent
        })
        .collect();
    let third = hosts[2].start(&[]);
    third.wait_ready();
    let subnet = prefix(&hosts[2]);
    for host in &hosts[..2] {
        until("the third host's route", SECOND, || host.routes().contains(&subnet));
    }
    third.kill();
    thread::sleep(Duration::from_millis(300));
    assert!(hosts[0].routes().contains(&subnet), "a dead agent's host stays reachable");
    etcd.delete_lease(&key(&hosts[2]));
    for host in &hosts[..2] {
        until("the route's end", SECOND, || !host.routes().contains(&subnet));
        assert!(!host.run("bridge fdb show dev flannel.1").contains(&hosts[2].ip()));
    }
}

#[test]
fn hosts_that_start_together_get_different_subnets() {
    // four subnets for four hosts, two of them half as long: overlap is as bad as equality
    let (mut world, etcd) = world(
        r#"{"Network":"10.5.0.0/21","SubnetMin":"10.5.1.0","SubnetMax":"10.5.4.0","Backend":{"Type":"host-gw"}}"#,
    );
    let hosts = world.hosts(4);
    let agents: Vec<Agent> = hosts.iter().map(|host| host.start(&[])).collect();
    agents.iter().for_each(Agent::wait_ready);
    let keys: BTreeSet<String> = hosts.iter().map(key).collect();
    assert_eq!(keys.len(), 4, "{keys:?}");
    assert_eq!(etcd.leases().len(), 8);
    for host in &hosts {
        until("three routes", PATIENCE, || host.routes().lines().count() == 3);
    }
    let fifth = world.host();
    let agent = fifth.start(&[]);
    agent.wait_for("every IPv4 subnet of length 24 in 10.5.0.0/21 is taken");
    etcd.delete_lease(&key(&hosts[3]));
    // whoever is faster: the host that lost its lease, or the one that waits
    until("the free subnet's owner", PATIENCE, || etcd.leases().len() == 8);
}

#[test]
fn a_host_gets_its_subnet_back() {
    let (mut world, etcd) = world(VXLAN);
    let host = world.host();
    let agent = host.start(&[]);
    agent.wait_ready();
    let first = key(&host);
    let mac = etcd.leases()[1].clone();
    agent.stop();
    // by its public address, though the file is gone
    std::fs::remove_file(host.subnet_file()).unwrap();
    let agent = host.start(&[]);
    agent.wait_ready();
    assert_eq!((key(&host), etcd.leases()[1].clone()), (first.clone(), mac.clone()));
    agent.stop();
    // by the file, though the lease is gone, and by the device's MAC
    etcd.delete_lease(&first);
    let agent = host.start(&[]);
    agent.wait_ready();
    assert_eq!((key(&host), etcd.leases()[1].clone()), (first.clone(), mac.clone()));
    agent.stop();
    // by the saved view, MAC and all, after a reboot, though store and file know nothing
    etcd.delete_lease(&first);
    std::fs::remove_file(host.subnet_file()).unwrap();
    host.run("ip link del flannel.1");
    let agent = host.start(&[]);
    agent.wait_ready();
    assert_eq!((key(&host), etcd.leases()[1].clone()), (first, mac));
}

#[test]
fn a_reservation_is_used_and_stays_one() {
    let (mut world, etcd) = world(VXLAN);
    let host = world.host();
    etcd.put_lease("10.5.99.0-24", &format!(r#"{{"PublicIP":"{}"}}"#, host.ip()));
    let agent = host.start(&[]);
    agent.wait_ready();
    assert_eq!(key(&host), "10.5.99.0-24");
    agent.wait_for("10.5.99.0/24 is ours, for ever");
    let json = etcd.ctl(&["get", "/coreos.com/network/subnets/10.5.99.0-24", "-w", "json"]);
    assert!(!json.contains("\"lease\""), "{json}");
    assert!(etcd.leases()[1].contains("VtepMAC"));
}

#[test]
fn a_deleted_lease_is_taken_again_and_a_stolen_one_is_left() {
    let (mut world, etcd) = world(VXLAN);
    let hosts = world.hosts(2);
    let agents: Vec<Agent> = hosts.iter().map(|host| host.start(&[])).collect();
    agents.iter().for_each(Agent::wait_ready);
    let mine = key(&hosts[0]);
    etcd.delete_lease(&mine);
    agents[0].wait_for("our lease is lost: it is gone from the store");
    until("the same subnet", PATIENCE, || {
        etcd.leases().contains(&format!("/coreos.com/network/subnets/{mine}"))
    });
    assert_eq!(key(&hosts[0]), mine);
    // another host writes its name over our lease
    etcd.put_lease(&mine, r#"{"PublicIP":"192.168.77.99","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:99"}}"#);
    agents[0].wait_for("it belongs to 192.168.77.99 now");
    until("another subnet", PATIENCE, || key(&hosts[0]) != mine);
    agents[0].wait_for("containers with old addresses must be restarted");
    let now = prefix(&hosts[0]);
    until("both routes", PATIENCE, || {
        hosts[1].routes().contains(&now) && hosts[1].routes().contains(&mine.replace('-', "/"))
    });
    let addresses = hosts[0].run("ip -4 -br addr show flannel.1");
    assert!(
        addresses.contains(&now.replace("/24", "/32"))
            && !addresses.contains(&mine.replace("-24", "/32")),
        "{addresses}"
    );
}

#[test]
fn rubbish_written_over_our_lease_is_repaired() {
    let (mut world, etcd) = world(VXLAN);
    let host = world.host();
    let agent = host.start(&[]);
    agent.wait_ready();
    let good = etcd.leases()[1].clone();
    etcd.put_lease(&key(&host), "rubbish");
    until("the value is back", PATIENCE, || etcd.leases()[1] == good);
    let json =
        etcd.ctl(&["get", &format!("/coreos.com/network/subnets/{}", key(&host)), "-w", "json"]);
    assert!(json.contains("\"lease\""), "{json}");
}

/// An agent that slept through the end of its lease does not fight the new owner.
#[test]
fn a_paused_agent_yields_to_the_new_owner() {
    let (mut world, etcd) = world(
        r#"{"Network":"10.5.0.0/22","SubnetMin":"10.5.1.0","SubnetMax":"10.5.2.0","Backend":{"Type":"host-gw"}}"#,
    );
    let hosts = world.hosts(2);
    let first = hosts[0].start(&[]);
    first.wait_ready();
    let mine = key(&hosts[0]);
    first.process.signal("STOP");
    etcd.delete_lease(&mine);
    let other = if mine == "10.5.1.0-24" { "10.5.2.0-24" } else { "10.5.1.0-24" };
    etcd.put_lease(other, r#"{"PublicIP":"192.168.77.99","BackendType":"host-gw"}"#);
    let second = hosts[1].start(&[]);
    second.wait_ready();
    assert_eq!(key(&hosts[1]), mine);
    first.process.signal("CONT");
    first.wait_for("our lease is lost");
    first.wait_for("is taken");
    etcd.delete_lease(other);
    until("the other subnet", PATIENCE, || key(&hosts[0]) == other);
    assert_eq!(key(&hosts[1]), mine);
}

/// The v2 key space: a reservation stays one, a deleted lease is taken again, a stolen one is left, a reused one keeps its key.
#[test]
fn leases_live_in_v2_as_they_do_in_v3() {
    let mut world = World::new();
    let etcd = world.etcd(&[]);
    etcd.put_config("v2", VXLAN);
    let hosts = world.hosts(2);
    let path = |key: &str| format!("/coreos.com/network/subnets/{key}");
    let value = format!(r#"value={{"PublicIP":"{}"}}"#, hosts[0].ip());
    etcd.v2("PUT", &path("10.5.99.0-24"), &[&value]);
    let agents: Vec<Agent> = hosts.iter().map(|host| host.start(&[])).collect();
    agents.iter().for_each(Agent::wait_ready);
    assert_eq!(key(&hosts[0]), "10.5.99.0-24");
    agents[0].wait_for("10.5.99.0/24 is ours, for ever");
    let node = etcd.v2("GET", &path("10.5.99.0-24"), &[]);
    assert!(node.contains("VtepMAC") && !node.contains("expiration"), "{node}");
    let mine = key(&hosts[1]);
    assert!(etcd.v2("GET", &path(&mine), &[]).contains("\"ttl\":86"));
    etcd.v2("DELETE", &path(&mine), &[]);
    agents[1].wait_for("our lease is lost: it is gone from the store");
    until("the same subnet", PATIENCE, || etcd.v2("GET", &path(&mine), &[]).contains("\"ttl\":86"));
    assert_eq!(key(&hosts[1]), mine);
    let thief = r#"value={"PublicIP":"192.168.77.99","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:99"}}"#;
    etcd.v2("PUT", &path(&mine), &[thief]);
    agents[1].wait_for("it belongs to 192.168.77.99 now");
    until("another subnet", PATIENCE, || key(&hosts[1]) != mine);
    assert!(
        etcd.v2("GET", &path(&mine), &[]).contains("192.168.77.99"),
        "the thief's lease is left alone"
    );
}

/// With the longest margin a lease is renewed after a minute, against the real store in both of its languages.
#[test]
fn leases_are_renewed() {
    let running: Vec<_> = ["v3", "v2"]
        .into_iter()
        .map(|api| {
            let mut world = World::new();
            let etcd = world.etcd(&[]);
            etcd.put_config(api, VXLAN);
            let host = world.host();
            let agent = host.start(&["-subnet-lease-renew-margin=1439"]);
            agent.wait_ready();
            (agent, host, etcd, world)
        })
        .collect();
    for (agent, host, _etcd, _world) in &running {
        let subnet = prefix(host);
        // the store counts in seconds, so it may be a full day
        let renewed =
            ["23 h 59 min", "24 h 0 min"].map(|left| format!("lease {subnet} renewed for {left}"));
        until("the renewal", Duration::from_secs(90), || {
            renewed.iter().any(|line| agent.log().contains(line))
        });
        assert!(!agent.log().contains("] W") && !agent.log().contains("lost"), "{}", agent.log());
    }
}
