//! Nodes come, change and go, in every way there is; and what is wrong with one harms nobody else.

use std::time::Duration;

use serde_json::{Value, json};

use super::api::{Cluster, VXLAN, go_annotations};
use super::joining::join;
use super::world::{Flow, Host, PATIENCE, http_get, until};

fn fdb(host: &Host) -> String {
    host.run("bridge fdb show dev flannel.1")
}

fn mac(number: usize) -> String {
    format!("02:00:00:00:00:{number:02x}")
}

/// Deleted, re-created with another podCIDR, changed, and no longer taking part.
#[test]
fn peers_come_and_go() {
    let mut cluster = Cluster::new();
    let (hosts, _agents) = join(&mut cluster, 1, VXLAN);
    let host = &hosts[0];
    let has = |what: &str| host.routes().contains(what);
    cluster.add_go_node("go", "10.244.7.0/24", "192.168.77.207", &mac(7));
    until("the peer", PATIENCE, || has("10.244.7.0/24"));
    // another address, another MAC
    cluster.annotate("go", &[("public-ip", json!("192.168.77.208"))]);
    until("its new address", PATIENCE, || {
        fdb(host).contains("02:00:00:00:00:07 dst 192.168.77.208")
    });
    // gone
    cluster.delete_node("go");
    until("its end", PATIENCE, || !has("10.244.7.0/24"));
    // the same name with another podCIDR
    cluster.add_go_node("go", "10.244.9.0/24", "192.168.77.207", &mac(7));
    until("the new subnet", PATIENCE, || has("10.244.9.0/24") && !has("10.244.7.0/24"));
    // no longer a part
    cluster.annotate("go", &[("kube-subnet-manager", Value::Null)]);
    until("that it has left", PATIENCE, || !has("10.244.9.0/24"));
    cluster.annotate("go", &[("kube-subnet-manager", json!("true"))]);
    until("that it is back", PATIENCE, || has("10.244.9.0/24"));
    // re-created while nobody looks
    let agent = &_agents[0];
    agent.process.signal("STOP");
    cluster.delete_node("go");
    cluster.add_go_node("go", "10.244.10.0/24", "192.168.77.207", &mac(7));
    agent.process.signal("CONT");
    until("the third subnet", PATIENCE, || has("10.244.10.0/24") && !has("10.244.9.0/24"));
}

/// A peer's bad data harms that peer only, and is shown.
#[test]
fn bad_peers() {
    let mut cluster = Cluster::new();
    let (hosts, agents) = join(&mut cluster, 2, VXLAN);
    let flow = Flow::start(&hosts[0], &hosts[1].container_ip().unwrap());
    let data = |number| format!(r#"{{"VNI":1,"VtepMAC":"{}"}}"#, mac(number));
    let bad = [
        ("no-address", "10.244.20.0/24", go_annotations("vxlan", &data(20), "")),
        ("no-ip", "10.244.21.0/24", go_annotations("vxlan", &data(21), "here")),
        ("multicast", "10.244.22.0/24", go_annotations("vxlan", &data(22), "224.0.0.1")),
        ("garbage", "10.244.23.0/24", go_annotations("vxlan", "{", "192.168.77.223")),
        ("other-kind", "10.244.24.0/24", go_annotations("host-gw", "null", "192.168.77.224")),
        ("outside", "10.245.1.0/24", go_annotations("vxlan", &data(25), "192.168.77.225")),
        ("everything", "0.0.0.0/0", go_annotations("vxlan", &data(26), "192.168.77.226")),
        ("ours", "10.244.1.0/24", go_annotations("vxlan", &data(27), "192.168.77.227")),
        ("inside-ours", "10.244.1.128/25", go_annotations("vxlan", &data(28), "192.168.77.228")),
        ("wrong-family", "fd00::/64", go_annotations("vxlan", &data(29), "192.168.77.229")),
        ("same-as-n2", "10.244.2.0/24", go_annotations("vxlan", &data(30), "192.168.77.230")),
        ("late", "", go_annotations("vxlan", &data(31), "192.168.77.231")),
    ];
    // node objects have times of whole seconds, and the older one is right
    std::thread::sleep(Duration::from_millis(1100));
    for (name, cidr, annotations) in &bad {
        let cidrs = if cidr.is_empty() { vec![] } else { vec![*cidr] };
        cluster.add_node_with(name, &cidrs, annotations);
    }
    cluster.add_go_node("good", "10.244.40.0/24", "192.168.77.240", &mac(40));
    until("the good one", PATIENCE, || hosts[0].routes().contains("10.244.40.0/24"));
    let status = || http_get(&hosts[0], "http://127.0.0.1:8081/status");
    for name in ["no-ip", "wrong-family", "same-as-n2", "late", "ours"] {
        let says = format!("node_ignored {name} ");
        until(&format!("{name} is shown"), PATIENCE, || status().contains(&says));
    }
    // the others are refused as leases
    until("all were read", PATIENCE, || status().contains("leases_refused 7\n"));
    let routes = hosts[0].routes();
    assert_eq!(routes.lines().count(), 2, "{routes}");
    assert!(routes.contains("10.244.2.0/24"), "{routes}");
    let (sent, lost) = flow.stop();
    assert_eq!(lost, 0, "of {sent}");
    // a podCIDR that comes late is noticed, though nothing in the metadata shows it
    cluster.give("late", &["10.244.31.0/24"]);
    until("the late one", PATIENCE, || hosts[0].routes().contains("10.244.31.0/24"));
    // who had the same subnet gets it when the older one is gone
    drop(agents);
    let agent = cluster.start(&hosts[0], "n1", VXLAN, &[]);
    agent.wait_ready();
    cluster.delete_node("n2");
    until("the heir", PATIENCE, || fdb(&hosts[0]).contains("02:00:00:00:00:1e dst 192.168.77.230"));
}

/// Our own node: not there, without podCIDR, with a wrong one, deleted, made anew, and annotated by others.
#[test]
fn our_own_node() {
    let mut cluster = Cluster::new();
    let hosts = cluster.world.hosts(2);
    cluster.add_go_node("peer", "10.244.7.0/24", "192.168.77.207", &mac(7));
    let agent = cluster.start(&hosts[0], "n1", VXLAN, &[]);
    agent.wait_for("there is no node called \"n1\"");
    cluster.add_node("n1", &[]);
    agent.wait_for("has no podCIDR yet");
    assert!(http_get(&hosts[0], "http://127.0.0.1:8081/readyz").ends_with(":503"));
    cluster.give("n1", &["10.244.1.0/24"]);
    agent.wait_ready();
    until("readiness", PATIENCE, || {
        http_get(&hosts[0], "http://127.0.0.1:8081/readyz").ends_with(":200")
    });

    // somebody takes our annotations away
    cluster.annotate("n1", &[("backend-data", Value::Null), ("kube-subnet-manager", Value::Null)]);
    until("our annotations", PATIENCE, || {
        cluster.annotation("n1", "kube-subnet-manager").as_deref() == Some("true")
            && cluster.annotation("n1", "backend-data").is_some()
    });

    // the node is deleted: the data plane stays as it is
    until("the condition", PATIENCE, || cluster.condition("n1", "NetworkUnavailable").is_some());
    cluster.delete_node("n1");
    agent.wait_for("our lease is lost: the node object is gone");
    assert!(hosts[0].routes().contains("10.244.7.0/24"));
    until("that it is not ready", PATIENCE, || {
        http_get(&hosts[0], "http://127.0.0.1:8081/readyz").ends_with(":503")
    });
    // the same podCIDR again
    cluster.add_node("n1", &["10.244.1.0/24"]);
    until("our annotations on the new node", PATIENCE, || {
        cluster.annotation("n1", "backend-data").is_some()
    });
    until("its condition", PATIENCE, || cluster.condition("n1", "NetworkUnavailable").is_some());
    assert_eq!(hosts[0].env("FLANNEL_SUBNET").as_deref(), Some("10.244.1.1/24"));
    // and another one
    cluster.delete_node("n1");
    cluster.add_node("n1", &["10.244.5.0/24"]);
    agent.wait_for("this host's subnet was 10.244.1.0/24 and is 10.244.5.0/24 now");
    until("the new subnet", PATIENCE, || {
        hosts[0].env("FLANNEL_SUBNET").as_deref() == Some("10.244.5.1/24")
    });
    // wrong ones are said, and what was stays
    for (cidr, says) in [
        ("10.245.1.0/24", "is not a part of the network 10.244.0.0/16"),
        ("fd00::/64", "is not IPv4"),
    ] {
        cluster.delete_node("n1");
        cluster.add_node("n1", &[cidr]);
        agent.wait_for(says);
    }
    assert_eq!(hosts[0].env("FLANNEL_SUBNET").as_deref(), Some("10.244.5.1/24"));
}

/// Two hosts with one name fight slowly, and it is said.
#[test]
fn two_hosts_with_one_name() {
    let mut cluster = Cluster::new();
    let hosts = cluster.world.hosts(2);
    cluster.add_node("n1", &["10.244.1.0/24"]);
    let one = cluster.start(&hosts[0], "n1", VXLAN, &[]);
    one.wait_ready();
    let other = cluster.start(&hosts[1], "n1", VXLAN, &[]);
    until("that one of them says so", Duration::from_secs(30), || {
        let says = "does another host have this NODE_NAME?";
        one.log().contains(says) || other.log().contains(says)
    });
    let version = |cluster: &Cluster| {
        let node = cluster.node("n1");
        node["metadata"]["resourceVersion"].as_str().unwrap().parse::<u64>().unwrap()
    };
    let before = version(&cluster);
    std::thread::sleep(Duration::from_secs(5));
    let writes = version(&cluster) - before;
    assert!(writes < 12, "{writes}");
}
