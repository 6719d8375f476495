//! The store goes away in every way there is, and comes back.

use std::fs;
use std::thread;
use std::time::Duration;

use super::world::{Agent, Etcd, Flow, Host, PATIENCE, World, until};

const VXLAN: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;

fn three(api: &str) -> (World, Etcd, Vec<Host>, Vec<Agent>) {
    let mut world = World::new();
    let etcd = world.etcd(&[]);
    etcd.put_config(api, VXLAN);
    let hosts = world.hosts(3);
    let agents: Vec<Agent> = hosts[..2].iter().map(|host| host.start(&[])).collect();
    agents.iter().for_each(Agent::wait_ready);
    hosts[..2].iter().for_each(Host::add_container);
    let ip = hosts[1].container_ip().unwrap();
    until("the first ping", PATIENCE, || hosts[0].ping(&ip).is_ok());
    (world, etcd, hosts, agents)
}

fn subnet(host: &Host) -> String {
    let gateway = host.env("FLANNEL_SUBNET").unwrap();
    format!("{}.0/24", gateway.rsplit_once('.').unwrap().0)
}

/// Refused, then silent; the data plane does not notice, the log stays short, and afterwards changes arrive within seconds.
fn away_and_back(api: &str) {
    let (_world, mut etcd, hosts, agents) = three(api);
    let flow = Flow::start(&hosts[0], &hosts[1].container_ip().unwrap());
    let lines = agents[0].log().lines().count();
    etcd.kill();
    thread::sleep(Duration::from_secs(4));
    etcd.restart(false);
    thread::sleep(Duration::from_secs(1));
    etcd.pause();
    thread::sleep(Duration::from_secs(4));
    etcd.go_on();
    let third = hosts[2].start(&[]);
    third.wait_ready();
    let joined = subnet(&hosts[2]);
    until("the newcomer's route", Duration::from_secs(10), || hosts[0].routes().contains(&joined));
    let said = agents[0].log().lines().count() - lines;
    assert!(said <= 8, "{}", agents[0].log());
    let (sent, lost) = flow.stop();
    assert_eq!(lost, 0, "of {sent}");
}

#[test]
fn away_and_back_v3() {
    away_and_back("v3");
}

#[test]
fn away_and_back_v2() {
    away_and_back("v2");
}

#[test]
fn compacted_while_away() {
    let (_world, mut etcd, hosts, agents) = three("v3");
    let third = hosts[2].start(&[]);
    third.wait_ready();
    let gone = subnet(&hosts[2]);
    until("the third route", PATIENCE, || hosts[0].routes().contains(&gone));
    third.kill();
    // the agent cannot hear what happens, and afterwards nobody remembers it
    agents[0].process.signal("STOP");
    etcd.delete_lease(&gone.replace('/', "-"));
    etcd.kill();
    etcd.restart(false);
    for number in 0..5 {
        etcd.ctl(&["put", "noise", &number.to_string()]);
    }
    etcd.ctl(&["compact", &etcd.revision().to_string()]);
    agents[0].process.signal("CONT");
    until("the route's end", PATIENCE, || !hosts[0].routes().contains(&gone));
    assert!(hosts[0].routes().contains(&subnet(&hosts[1])));
    agents[0].wait_for("listing again");
}

#[test]
fn v2_history_overrun() {
    let (_world, etcd, hosts, agents) = three("v2");
    agents[0].process.signal("STOP");
    let third = hosts[2].start(&[]);
    third.wait_ready();
    // the server remembers a thousand changes
    let script = "for i in $(seq 1100); do curl -s -o /dev/null -X PUT -d value=$i http://127.0.0.1:2379/v2/keys/noise; done";
    let net = hosts[0].dir.parent().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
    let mut command = std::process::Command::new("ip");
    assert!(
        command
            .args(["netns", "exec", &format!("{net}-net"), "sh", "-c", script])
            .status()
            .unwrap()
            .success()
    );
    agents[0].process.signal("CONT");
    let joined = subnet(&hosts[2]);
    until("the newcomer's route", PATIENCE, || hosts[0].routes().contains(&joined));
    drop(etcd);
}

/// A store that has lost everything gets the same leases again.
#[test]
fn wiped() {
    let (_world, mut etcd, hosts, agents) = three("v3");
    let before: Vec<String> = hosts[..2].iter().map(subnet).collect();
    let flow = Flow::start(&hosts[0], &hosts[1].container_ip().unwrap());
    etcd.kill();
    etcd.restart(true);
    etcd.put_config("v3", VXLAN);
    for agent in &agents {
        agent.wait_for("is gone from the store");
    }
    until("both leases", PATIENCE, || etcd.leases().len() == 4);
    assert_eq!(hosts[..2].iter().map(subnet).collect::<Vec<_>>(), before);
    until("both routes", PATIENCE, || {
        hosts[0].routes().contains(&before[1]) && hosts[1].routes().contains(&before[0])
    });
    let (sent, lost) = flow.stop();
    // a peer's lease is gone until its agent has written it again
    assert!(lost < 300, "{lost} of {sent}");
}

/// A host that boots while the store is away comes up as it was.
#[test]
fn reboot_without_the_store() {
    let (_world, mut etcd, hosts, mut agents) = three("v3");
    let ip = hosts[1].container_ip().unwrap();
    let before = (subnet(&hosts[0]), hosts[0].run("ip -br link show flannel.1"));
    agents.remove(0).stop();
    hosts[0].run("ip link del flannel.1");
    fs::remove_file(hosts[0].subnet_file()).unwrap();
    etcd.kill();
    let agent = hosts[0].start(&[]);
    agent.wait_ready();
    assert!(
        agent.log().contains("does not answer: coming up with the view of an earlier life"),
        "{}",
        agent.log()
    );
    assert_eq!(subnet(&hosts[0]), before.0);
    let mac = |line: &str| line.split_whitespace().nth(2).map(str::to_owned);
    assert_eq!(mac(&hosts[0].run("ip -br link show flannel.1")), mac(&before.1));
    until("ping", PATIENCE, || hosts[0].ping(&ip).is_ok());
    etcd.restart(false);
    agent.wait_for("is ours");
    assert_eq!(subnet(&hosts[0]), before.0);
    assert!(hosts[0].ping(&ip).is_ok());
}

#[test]
fn a_bad_config_is_said_once_and_read_again() {
    let mut world = World::new();
    let etcd = world.etcd(&[]);
    let host = world.host();
    let agent = host.start(&[]);
    agent.wait_for("there is no network config: put one into /coreos.com/network/config");
    etcd.put_config("v3", r#"{"Network":"10.5.0.0"}"#);
    agent.wait_for("the network config in /coreos.com/network/config is not valid");
    thread::sleep(Duration::from_millis(2500));
    assert_eq!(agent.log().matches("is not valid").count(), 1, "{}", agent.log());
    assert_eq!(agent.log().matches("there is no network config").count(), 1, "{}", agent.log());
    etcd.put_config("v3", VXLAN);
    agent.wait_ready();
}

#[test]
fn one_of_several_endpoints_is_enough() {
    let mut world = World::new();
    let etcd = world.etcd(&[]);
    etcd.put_config("v3", VXLAN);
    let host = world.host();
    let endpoints =
        "-etcd-endpoints=http://192.168.77.1:1,http://192.168.77.200:2379,http://192.168.77.1:2379";
    let agent = host.start_with(&[endpoints]);
    agent.wait_ready();
    assert!(!agent.log().contains("] W"), "{}", agent.log());
}

#[test]
fn user_and_password() {
    let mut world = World::new();
    let mut etcd = world.etcd(&[]);
    etcd.put_config("v3", VXLAN);
    for command in [
        &["user", "add", "root:secret-r"][..],
        &["user", "add", "flannel:secret-f"],
        &["user", "grant-role", "root", "root"],
        &["role", "add", "net"],
        &[
            "role",
            "grant-permission",
            "net",
            "readwrite",
            "/coreos.com/network/",
            "/coreos.com/network0",
        ],
        &["user", "grant-role", "flannel", "net"],
        &["auth", "enable"],
    ] {
        etcd.ctl(command);
    }
    etcd.access = vec!["--user=root:secret-r".into()];
    let hosts = world.hosts(2);
    let wrong = hosts[0].start(&["-etcd-username=flannel", "-etcd-password=wrong"]);
    wrong.wait_for("etcd refuses the user of --etcd-username");
    let nobody = hosts[1].start(&[]);
    nobody.wait_for("etcd refuses");
    drop((wrong, nobody));
    let agents: Vec<Agent> = hosts
        .iter()
        .map(|host| host.start(&["-etcd-username=flannel", "-etcd-password=secret-f", "-v=5"]))
        .collect();
    agents.iter().for_each(Agent::wait_ready);
    until("a route", PATIENCE, || hosts[0].routes().contains(&subnet(&hosts[1])));
    // tokens are forgotten by a server that restarts
    etcd.kill();
    etcd.restart(false);
    etcd.delete_lease(&subnet(&hosts[1]).replace('/', "-"));
    agents[1].wait_for("our lease is lost");
    until("the lease is back", PATIENCE, || etcd.leases().len() == 4);
    assert!(!hosts[0].log().contains("secret-f"));
}

#[test]
fn tls() {
    for client_certificates in [false, true] {
        let mut world = World::new();
        super::certificates::make(&world.dir, &["192.168.77.1"]);
        let file = |name: &str| world.dir.join(name).display().to_string();
        let mut server = vec![
            format!("--cert-file={}", file("server.pem")),
            format!("--key-file={}", file("server.key")),
        ];
        if client_certificates {
            server.push("--client-cert-auth".into());
            server.push(format!("--trusted-ca-file={}", file("ca.pem")));
        }
        let mut client = vec![
            "-etcd-endpoints=https://192.168.77.1:2379".into(),
            format!("-etcd-cafile={}", file("ca.pem")),
        ];
        let stranger: Vec<String> = client[..if client_certificates { 2 } else { 1 }].to_vec();
        if client_certificates {
            client.push(format!("-etcd-certfile={}", file("client.pem")));
            client.push(format!("-etcd-keyfile={}", file("client.key")));
        }
        let etcd = world.etcd(&server.iter().map(String::as_str).collect::<Vec<_>>());
        etcd.put_config("v3", VXLAN);
        let hosts = world.hosts(2);
        let client: Vec<&str> = client.iter().map(String::as_str).collect();
        let agents: Vec<Agent> = hosts.iter().map(|host| host.start_with(&client)).collect();
        agents.iter().for_each(Agent::wait_ready);
        until("a route", PATIENCE, || hosts[0].routes().contains(&subnet(&hosts[1])));
        drop(agents);
        let refused = hosts[0].start_with(&stranger.iter().map(String::as_str).collect::<Vec<_>>());
        until("a refusal", PATIENCE, || refused.log().to_lowercase().contains("certificate"));
    }
}
