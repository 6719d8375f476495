//! Bad leases and keys among good ones harm nobody but themselves.

use super::world::{Agent, Host, PATIENCE, World, until};

const MAC: &str = r#""BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:66"}"#;

/// Keys and values that a broken or evil host could write.
fn table(own: &str) -> Vec<(String, String)> {
    let good = format!(r#"{{"PublicIP":"192.168.77.66","BackendType":"vxlan",{MAC}}}"#);
    let mut rows: Vec<(String, String)> = Vec::new();
    for key in [
        "0.0.0.0-0",
        "0.0.0.0-1",
        "10.5.0.0-16",
        "10.4.0.0-15",
        "127.0.0.0-24",
        "224.0.0.0-24",
        "255.255.255.0-24",
        "169.254.0.0-24",
        "192.168.77.0-24",
        "10.6.1.0-24",
        "10.5.240.0-33",
        "10.5.240.0-024",
        "10.5.240.7-24",
        "10.5.240-24",
        "garbage",
        "../../../config",
        "10.5.240.0-24&fd00::-64&x",
        "10.5.240.0-24\nEVIL=1",
    ] {
        rows.push((key.into(), good.clone()));
    }
    // inside and around our own subnet
    rows.push((own.replace(".0-24", ".128-25"), good.clone()));
    rows.push((own.replace("-24", "-23"), good.clone()));
    for (number, value) in [
        "",
        "null",
        "{",
        "[]",
        "rubbish",
        r#"{"PublicIP":7}"#,
        r#"{"PublicIP":"300.1.1.1"}"#,
        r#"{"PublicIP":"0.0.0.0","BackendType":"vxlan"}"#,
        r#"{"PublicIP":"127.0.0.1","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:61"}}"#,
        r#"{"PublicIP":"224.0.0.1","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:62"}}"#,
        r#"{"PublicIP":"255.255.255.255","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:63"}}"#,
        r#"{"PublicIP":"192.168.77.67","BackendType":"host-gw"}"#,
        r#"{"PublicIP":"192.168.77.67","BackendType":"vxlan"}"#,
        r#"{"PublicIP":"192.168.77.67","BackendType":"vxlan","BackendData":"x"}"#,
        r#"{"PublicIP":"192.168.77.67","BackendType":"vxlan","BackendData":{"VtepMAC":"ff:ff:ff:ff:ff:ff"}}"#,
        r#"{"PublicIP":"192.168.77.67","BackendType":"vxlan","BackendData":{"VtepMAC":"00:00:00:00:00:00"}}"#,
        r#"{"PublicIP":"192.168.77.67","BackendType":"vxlan","BackendData":{"VtepMAC":"zz"}}"#,
        r#"{"PublicIP":"192.168.77.11","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:64"},"x":1}"#,
    ]
    .into_iter()
    .enumerate()
    {
        rows.push((format!("10.5.{}.0-24", 200 + number), value.into()));
    }
    let deep = "[".repeat(50_000);
    rows.push(("10.5.230.0-24".into(), deep));
    rows.push((
        "10.5.231.0-24".into(),
        format!(r#"{{"PublicIP":"192.168.77.67","BackendType":"{}"}}"#, "x".repeat(100_000)),
    ));
    rows
}

#[test]
fn bad_leases_harm_nobody_else() {
    let mut world = World::new();
    let etcd = world.etcd(&[]);
    etcd.put_config(
        "v3",
        r#"{"Network":"10.5.0.0/16","SubnetMax":"10.5.100.0","Backend":{"Type":"vxlan"}}"#,
    );
    let hosts = world.hosts(3);
    let first = hosts[0].start(&[]);
    first.wait_ready();
    let own =
        format!("{}.0-24", hosts[0].env("FLANNEL_SUBNET").unwrap().rsplit_once('.').unwrap().0);
    let rows = table(&own);
    assert!(rows.len() >= 25);
    // as events for the first host, as a list for the second
    for (key, value) in &rows {
        etcd.put_lease(key, value);
    }
    let second = hosts[1].start(&[]);
    second.wait_ready();
    let third = hosts[2].start(&[]);
    third.wait_ready();
    hosts.iter().for_each(Host::add_container);
    for from in &hosts {
        for to in hosts.iter().filter(|to| to.number != from.number) {
            let ip = to.container_ip().unwrap();
            until(&format!("{} pings {ip}", from.name), PATIENCE, || from.ping(&ip).is_ok());
        }
        let routes = from.routes();
        // a second lease with the first host's address is strange, but only the first host knows that it is wrong
        let believed =
            routes.lines().filter(|line| from.number == 1 || !line.contains("10.5.217.0")).count();
        assert_eq!(believed, 2, "{routes}");
        let everything = from.run("ip route show table all");
        for alien in ["192.168.77.66", "192.168.77.67", "224.0.0.0/24", "127.0.0.0/24 "] {
            assert!(!everything.contains(alien), "{alien} in {everything}");
        }
    }
    for agent in [first, second, third] {
        let log = agent.log();
        assert!(log.contains("is refused") || log.contains("is ignored"), "{log}");
        assert!(log.lines().count() < 100, "{log}");
        assert!(!log.lines().any(|line| line.starts_with("EVIL")), "{log}");
        assert_eq!(agent.stop().code(), Some(0));
    }
}

/// A second host that publishes the same VTEP address gets nothing of the first one's.
#[test]
fn two_hosts_with_one_mac() {
    let mut world = World::new();
    let etcd = world.etcd(&[]);
    etcd.put_config(
        "v3",
        r#"{"Network":"10.5.0.0/16","SubnetMax":"10.5.100.0","Backend":{"Type":"vxlan"}}"#,
    );
    let host = world.host();
    let agent: Agent = host.start(&[]);
    agent.wait_ready();
    for (number, ip) in [(200, "192.168.77.66"), (201, "192.168.77.67")] {
        etcd.put_lease(
            &format!("10.5.{number}.0-24"),
            &format!(r#"{{"PublicIP":"{ip}","BackendType":"vxlan",{MAC}}}"#),
        );
    }
    agent.wait_for("which peer 10.5.200.0/24 has otherwise");
    let fdb = host.run("bridge fdb show dev flannel.1");
    assert!(fdb.contains("192.168.77.66") && !fdb.contains("192.168.77.67"), "{fdb}");
    etcd.delete_lease("10.5.200.0-24");
    until("the second one follows", PATIENCE, || {
        host.run("bridge fdb show dev flannel.1").contains("192.168.77.67")
    });
}
