//! The API server goes away in every way there is, and comes back.

use std::fs;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use super::api::{Cluster, VXLAN};
use super::joining::join;
use super::world::{Flow, PATIENCE, http_get, until};

/// Killed for a minute under traffic: nothing is lost, the log stays short, and afterwards all is made up for.
#[test]
fn killed_for_a_minute() {
    let mut cluster = Cluster::new();
    let (hosts, agents) = join(&mut cluster, 2, VXLAN);
    cluster.add_go_node("gone", "10.244.7.0/24", "192.168.77.207", "02:00:00:00:00:07");
    until("the third", PATIENCE, || hosts[0].routes().contains("10.244.7.0/24"));
    let flow = Flow::start(&hosts[0], &hosts[1].container_ip().unwrap());
    let lines = agents[0].log().lines().count();
    let ticks = agents[0].process.ticks();
    cluster.kill();
    thread::sleep(Duration::from_secs(60));
    cluster.restart();
    cluster.delete_node("gone");
    cluster.add_go_node("new", "10.244.8.0/24", "192.168.77.208", "02:00:00:00:00:08");
    until("what has changed", Duration::from_secs(30), || {
        let routes = hosts[0].routes();
        !routes.contains("10.244.7.0/24") && routes.contains("10.244.8.0/24")
    });
    let (sent, lost) = flow.stop();
    assert_eq!(lost, 0, "of {sent}");
    let said = agents[0].log().lines().count() - lines;
    assert!(said <= 8, "{}", agents[0].log());
    // less than 5 % of a processor, and most of it is the start of others on this machine
    let used = agents[0].process.ticks() - ticks;
    assert!(used < 60 * 5, "{used}");
}

/// Its history is cut while it does not answer us: the metadata's list says what has changed.
#[test]
fn changes_are_missed() {
    let mut cluster = Cluster::new();
    let (hosts, agents) = join(&mut cluster, 1, VXLAN);
    for number in 7..10 {
        let subnet = format!("10.244.{number}.0/24");
        cluster.add_go_node(
            &format!("go{number}"),
            &subnet,
            &format!("192.168.77.20{number}"),
            &format!("02:00:00:00:00:0{number}"),
        );
        until("a peer", PATIENCE, || hosts[0].routes().contains(&subnet));
    }
    agents[0].process.signal("STOP");
    cluster.kill();
    cluster.restart();
    cluster.delete_node("go7");
    cluster.annotate("go8", &[("public-ip", json!("192.168.77.218"))]);
    cluster.add_go_node("go10", "10.244.10.0/24", "192.168.77.210", "02:00:00:00:00:10");
    // a server that starts knows no changes of before
    cluster.etcd.ctl(&["compact", &cluster.etcd.revision().to_string()]);
    cluster.kill();
    cluster.restart();
    agents[0].process.signal("CONT");
    agents[0].wait_for("listing again");
    let fdb = || hosts[0].run("bridge fdb show dev flannel.1");
    until("all changes", PATIENCE, || {
        let routes = hosts[0].routes();
        !routes.contains("10.244.7.0/24")
            && routes.contains("10.244.9.0/24")
            && routes.contains("10.244.10.0/24")
            && fdb().contains("02:00:00:00:00:08 dst 192.168.77.218")
    });
}

/// The store behind the server is set back to an older state, as from a backup. There are more nodes than the server puts on a
/// page: what is on the second one must not be taken for gone.
#[test]
fn set_back() {
    let mut cluster = Cluster::new();
    let (hosts, agents) = join(&mut cluster, 1, VXLAN);
    cluster.add_go_node("go", "10.244.7.0/24", "192.168.77.207", "02:00:00:00:00:07");
    until("the peer", PATIENCE, || hosts[0].routes().contains("10.244.7.0/24"));
    cluster.add_plain_nodes(520);
    let count = |nodes: usize| {
        let says = format!("\nnodes {nodes}\n");
        until(&says, PATIENCE, || {
            http_get(&hosts[0], "http://127.0.0.1:8081/status").contains(&says)
        });
    };
    count(521);
    let backup = cluster.dir.join("backup");
    cluster.etcd.ctl(&["snapshot", "save", &backup.display().to_string()]);
    cluster.add_go_node("later", "10.244.8.0/24", "192.168.77.208", "02:00:00:00:00:08");
    until("the later one", PATIENCE, || hosts[0].routes().contains("10.244.8.0/24"));
    for number in 0..50 {
        cluster.annotate("go", &[("note", json!(number.to_string()))]);
    }
    cluster.kill();
    cluster.etcd.restore(&backup);
    cluster.restart();
    until("the state of before", Duration::from_secs(40), || {
        let routes = hosts[0].routes();
        routes.contains("10.244.7.0/24") && !routes.contains("10.244.8.0/24")
    });
    count(521);
    cluster.add_go_node("newest", "10.244.9.0/24", "192.168.77.209", "02:00:00:00:00:09");
    until("a change after that", PATIENCE, || hosts[0].routes().contains("10.244.9.0/24"));
    drop(agents);
}

/// A reboot without the API server: the overlay comes up as it was; when the server is back, what is wrong is put right.
#[test]
fn a_reboot_without_it() {
    let mut cluster = Cluster::new();
    let (hosts, mut agents) = join(&mut cluster, 2, VXLAN);
    cluster.add_go_node("gone", "10.244.7.0/24", "192.168.77.207", "02:00:00:00:00:07");
    until("the third", PATIENCE, || hosts[0].routes().contains("10.244.7.0/24"));
    until("the view is saved", PATIENCE, || {
        fs::read_to_string(hosts[0].dir.join("data/view.jsonl"))
            .is_ok_and(|view| view.contains("10.244.7.0/24"))
    });
    agents.remove(0).kill();
    cluster.kill();
    // what a reboot takes away
    hosts[0].run("ip link del flannel.1");
    fs::remove_file(hosts[0].subnet_file()).unwrap();
    let again = cluster.start(&hosts[0], "n1", VXLAN, &[]);
    again.wait_for("coming up with the view of an earlier life");
    until("the subnet file", PATIENCE, || hosts[0].subnet_file().exists());
    let ip = hosts[1].container_ip().unwrap();
    until("the first ping", PATIENCE, || hosts[0].ping(&ip).is_ok());
    cluster.restart();
    cluster.delete_node("gone");
    until("that the departed is gone", Duration::from_secs(30), || {
        !hosts[0].routes().contains("10.244.7.0/24")
    });
    assert!(hosts[0].ping(&ip).is_ok());
    let annotation = || cluster.annotation("n1", "backend-data");
    let link = hosts[0].run("cat /sys/class/net/flannel.1/address");
    assert!(annotation().unwrap().contains(link.trim()), "the MAC is the one that peers know");
}

/// Answers that a real server does not give: each is said, and the agent goes on when they end.
#[test]
fn strange_answers() {
    let mut cluster = Cluster::new();
    cluster.add_node("n1", &["10.244.1.0/24"]);
    cluster.add_go_node("go", "10.244.7.0/24", "192.168.77.207", "02:00:00:00:00:07");
    let host = cluster.world.host();
    let proxy = super::proxy::Proxy::start(&cluster);
    let url = format!("-kube-api-url={}", proxy.url());
    let kubeconfig = format!("-kubeconfig-file={}", cluster.kubeconfig().display());
    let agent = cluster.start_with(&host, "n1", VXLAN, &[&url, &kubeconfig]);
    agent.wait_ready();
    until("the peer", PATIENCE, || host.routes().contains("10.244.7.0/24"));
    for (number, (fault, says)) in [
        ("HTTP/1.1 500 Internal Server Error\r\nContent-Length: 4\r\n\r\noops", "says 500: oops"),
        (
            "HTTP/1.1 429 Too Many Requests\r\nRetry-After: 2\r\nContent-Length: 0\r\n\r\n",
            "says 429",
        ),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{\"a\":\"b\"}",
            "not a Kubernetes list in protobuf",
        ),
        ("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nk8s\0\x12", "in the middle of its answer"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nk8s\0\x12\x05", "the answer was cut off"),
        ("SSH-2.0-OpenSSH\r\n", "not HTTP"),
        ("", "closed the connection without an answer"),
    ]
    .into_iter()
    .enumerate()
    {
        proxy.answer_with(Some(fault));
        agent.wait_for(says);
        proxy.answer_with(None);
        // it hears of changes again
        let ip = format!("192.168.77.22{number}");
        cluster.annotate("go", &[("public-ip", json!(ip))]);
        until(&format!("a change after {says:?}"), PATIENCE, || {
            host.run("bridge fdb show dev flannel.1").contains(&ip)
        });
        assert!(host.routes().contains("10.244.7.0/24"));
    }
    assert_eq!(cluster.node("n1")["spec"]["podCIDR"], Value::from("10.244.1.0/24"));
}
