//! Hosts join, as nodes of one cluster.

use std::fs;
use std::time::Duration;

use serde_json::{Value, json};

use super::api::{Cluster, PREFIX, VXLAN};
use super::world::{Agent, Host, PATIENCE, http_get, until};

/// Hosts 1 to `count` are nodes `n1` to …, with podCIDRs 10.244.1.0/24 to ….
pub(super) fn join(cluster: &mut Cluster, count: usize, config: &str) -> (Vec<Host>, Vec<Agent>) {
    let hosts = cluster.world.hosts(count);
    let mut agents = Vec::new();
    for host in &hosts {
        let name = format!("n{}", host.number);
        cluster.add_node(&name, &[&format!("10.244.{}.0/24", host.number)]);
        agents.push(cluster.start(host, &name, config, &[]));
    }
    agents.iter().for_each(Agent::wait_ready);
    hosts.iter().for_each(Host::add_container);
    for from in &hosts {
        for to in hosts.iter().filter(|to| to.number != from.number) {
            let ip = to.container_ip().unwrap();
            until(&format!("{} pings {ip}", from.name), PATIENCE, || from.ping(&ip).is_ok());
        }
    }
    (hosts, agents)
}

/// Three nodes: pings, and every annotation and condition as the specification has it.
#[test]
fn three_nodes() {
    let mut cluster = Cluster::new();
    let (hosts, agents) = join(&mut cluster, 3, VXLAN);
    for (host, agent) in hosts.iter().zip(&agents) {
        let name = format!("n{}", host.number);
        let node = cluster.node(&name);
        let link = host.run("ip -o link show flannel.1");
        let mac = link.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap().to_owned();
        let mut expected = json!({});
        for (key, value) in [
            ("backend-data", format!(r#"{{"VNI":1,"VtepMAC":"{mac}"}}"#)),
            ("backend-type", "vxlan".into()),
            ("kube-subnet-manager", "true".into()),
            ("public-ip", host.ip()),
        ] {
            expected[format!("{PREFIX}{key}")] = value.into();
        }
        assert_eq!(node["metadata"]["annotations"], expected);
        assert_eq!(host.env("FLANNEL_SUBNET"), Some(format!("10.244.{}.1/24", host.number)));
        assert_eq!(host.env("FLANNEL_NETWORK").as_deref(), Some("10.244.0.0/16"));

        until("the condition", PATIENCE, || {
            cluster.condition(&name, "NetworkUnavailable").is_some()
        });
        let mut condition = cluster.condition(&name, "NetworkUnavailable").unwrap();
        for time in ["lastHeartbeatTime", "lastTransitionTime"] {
            let text = condition[time].take();
            let text = text.as_str().unwrap();
            assert!(text.len() == 20 && text.ends_with('Z'), "{text}");
        }
        assert_eq!(
            condition,
            json!({ "type": "NetworkUnavailable", "status": "False", "reason": "FlannelIsUp",
                "message": "Flannel is running on this node", "lastHeartbeatTime": null, "lastTransitionTime": null })
        );
        let status = http_get(host, "http://127.0.0.1:8081/status");
        assert!(status.contains("\nnodes 2\n") && status.contains("nodes_ignored 0\n"), "{status}");
        let log = agent.log();
        assert!(!log.lines().any(|line| line.starts_with(['W', 'E'])), "{log}");
    }
}

/// A restart finds everything in place: nothing is written, neither in the kernel nor in the store.
#[test]
fn a_restart_writes_nothing() {
    let mut cluster = Cluster::new();
    let (hosts, mut agents) = join(&mut cluster, 2, VXLAN);
    until("the condition", PATIENCE, || cluster.condition("n1", "NetworkUnavailable").is_some());
    std::thread::sleep(Duration::from_secs(1));
    let before = cluster.node("n1");
    let routes = hosts[0].routes();
    agents.remove(0).kill();
    let again = cluster.start(&hosts[0], "n1", VXLAN, &[]);
    again.wait_ready();
    std::thread::sleep(Duration::from_secs(2));
    // not the whole of it, which would fill a page
    let version = |node: &Value| node["metadata"]["resourceVersion"].clone();
    assert_eq!(version(&cluster.node("n1")), version(&before));
    assert_eq!(hosts[0].routes(), routes);
    let status = http_get(&hosts[0], "http://127.0.0.1:8081/status");
    assert!(status.contains("kernel_writes 0\n"), "{status}");
    assert!(hosts[0].ping(&hosts[1].container_ip().unwrap()).is_ok());
}

/// Go nodes are peers, whatever backend data they have; a host that a Go flanneld ran on keeps its MAC.
#[test]
fn go_nodes() {
    let mut cluster = Cluster::new();
    let mac = "12:c6:65:89:b4:e3";
    cluster.add_go_node("n1", "10.244.1.0/24", "192.168.77.11", mac);
    cluster.add_go_node("go", "10.244.7.0/24", "192.168.77.200", "02:00:00:00:00:07");
    cluster.add_node("not-yet", &["10.244.8.0/24"]);
    cluster.annotate("n1", &[("public-ip-overwrite", json!("172.18.0.2"))]);
    let host = cluster.world.host();
    let agent = cluster.start(&host, "n1", VXLAN, &[]);
    agent.wait_ready();
    let link = host.run("ip -o link show flannel.1");
    assert!(link.contains(mac), "{link}");
    let fdb = host.run("bridge fdb show dev flannel.1");
    assert!(fdb.contains("02:00:00:00:00:07 dst 192.168.77.200"), "{fdb}");
    assert!(host.routes().contains("10.244.7.0/24") && !host.routes().contains("10.244.8.0/24"));
    // the operator's address goes before ours, at once and later
    assert_eq!(cluster.annotation("n1", "public-ip").as_deref(), Some("172.18.0.2"));
    cluster.annotate("n1", &[("public-ip-overwrite", json!("172.18.0.3"))]);
    until("the new address", PATIENCE, || {
        cluster.annotation("n1", "public-ip").as_deref() == Some("172.18.0.3")
    });
    cluster.annotate("n1", &[("public-ip-overwrite", Value::Null)]);
    until("our address", PATIENCE, || {
        cluster.annotation("n1", "public-ip").as_deref() == Some("192.168.77.11")
    });
    // a Go node joins: annotations come after the node
    cluster.annotate(
        "not-yet",
        &[
            ("backend-data", json!(r#"{"VNI":1,"VtepMAC":"02:00:00:00:00:08"}"#)),
            ("backend-type", json!("vxlan")),
            ("kube-subnet-manager", json!("true")),
            ("public-ip", json!("192.168.77.201")),
        ],
    );
    until("the newcomer", PATIENCE, || host.routes().contains("10.244.8.0/24"));
}

/// What a pod is given is enough: a token and an authority in a directory, the address in the environment, the pod's name.
#[test]
fn in_a_pod() {
    let mut cluster = Cluster::new();
    cluster.add_node("n1", &["10.244.1.0/24"]);
    let pod = json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "kube-flannel-ds-x" },
        "spec": { "nodeName": "n1", "hostNetwork": true, "containers": [{ "name": "c", "image": "none" }] } });
    cluster.request("POST", "/api/v1/namespaces/kube-flannel/pods", &pod);
    let host = cluster.world.host();
    host.run("ip route add 10.96.0.1 via 192.168.77.1");
    cluster.world.run_in("net", "ip addr add 10.96.0.1/32 dev lo");
    let account = host.dir.join("account");
    fs::create_dir_all(&account).unwrap();
    let pass_on = "iptables-nft -t nat -A PREROUTING -d 10.96.0.1 -p tcp --dport 443 -j DNAT --to-destination 192.168.77.1:6443";
    cluster.world.run_in("net", pass_on);
    fs::copy(cluster.dir.join("ca.pem"), account.join("ca.crt")).unwrap();
    fs::copy(cluster.dir.join("token"), account.join("token")).unwrap();
    let start = |name: &str| {
        // a directory as in a pod, in a mount namespace of its own
        let inner = cluster.command(&host, VXLAN);
        let script = format!(
            "mount -o bind,ro /proc/sys /proc/sys && mount -t tmpfs none /run && mkdir -p /run/secrets/kubernetes.io && ln -s {} /run/secrets/kubernetes.io/serviceaccount && exec \"$@\"",
            account.display()
        );
        let mut command = host.command("unshare");
        // the capability of the manifest's container, and no other
        command.args(["-m", "sh", "-c", &script, "sh"]);
        command.args(["setpriv", "--bounding-set=-all,+net_admin"]);
        // without `ip netns exec` and the namespace
        command.args(inner.get_args().skip(3));
        command.envs([
            ("KUBERNETES_SERVICE_HOST", "10.96.0.1"),
            ("KUBERNETES_SERVICE_PORT", "443"),
            ("POD_NAMESPACE", "kube-flannel"),
            ("POD_NAME", name),
        ]);
        command.env_remove("NODE_NAME");
        host.start_command(command)
    };
    let agent = start("kube-flannel-ds-x");
    // our own manifest says the node's name; for others' the role must let pods be read
    agent.wait_for("must allow it to get pods");
    let rules = json!([
        { "apiGroups": [""], "resources": ["pods"], "verbs": ["get"] },
        { "apiGroups": [""], "resources": ["nodes"], "verbs": ["list", "watch"] },
        { "apiGroups": [""], "resources": ["nodes/status"], "verbs": ["patch"] },
    ]);
    cluster.set_rules(&rules);
    agent.wait_for("this is node n1");
    agent.wait_ready();
    assert!(!agent.log().contains("sysctl"), "{}", agent.log());
    // a reboot without the API server, as another pod of the same kind
    until("the view is saved", PATIENCE, || host.dir.join("data/view.jsonl").exists());
    agent.kill();
    cluster.process.signal("KILL");
    host.run("ip link del flannel.1");
    let again = start("kube-flannel-ds-y");
    again.wait_for("coming up with the view of an earlier life");
    again.wait_ready();
}

/// Both families, of our own nodes and of a Go node; a node with one family is a peer for that.
#[test]
fn dual_stack() {
    let config = r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:244::/48","Backend":{"Type":"vxlan"}}"#;
    let mut cluster = Cluster::with(&["--feature-gates=IPv6DualStack=true"]);
    let hosts = cluster.world.hosts(2);
    cluster.add_go_node("old", "10.244.9.0/24", "192.168.77.209", "02:00:00:00:00:09");
    let agents: Vec<Agent> = hosts
        .iter()
        .map(|host| {
            let name = format!("n{}", host.number);
            let (v4, v6) = (
                format!("10.244.{}.0/24", host.number),
                format!("fd00:244:0:{}::/64", host.number),
            );
            cluster.add_node(&name, &[&v4, &v6]);
            cluster.start(host, &name, config, &[])
        })
        .collect();
    agents.iter().for_each(Agent::wait_ready);
    hosts.iter().for_each(Host::add_container);
    for (from, to) in [(&hosts[0], &hosts[1]), (&hosts[1], &hosts[0])] {
        for ip in [to.container_ip().unwrap(), to.container_ip6().unwrap()] {
            until(&format!("{} pings {ip}", from.name), PATIENCE, || from.ping(&ip).is_ok());
        }
        assert!(from.routes().contains("10.244.9.0/24"));
    }
    let annotations = &cluster.node("n1")["metadata"]["annotations"];
    let of = |key: &str| annotations[format!("{PREFIX}{key}")].as_str().unwrap().to_owned();
    assert_eq!(of("public-ipv6"), hosts[0].ip6());
    let mac = hosts[0].run("cat /sys/class/net/flannel-v6.1/address");
    assert_eq!(of("backend-v6-data"), format!(r#"{{"VNI":1,"VtepMAC":"{}"}}"#, mac.trim()));
    assert_eq!(annotations.as_object().unwrap().len(), 6);
    // one family of a peer changes
    let data = r#"{"VNI":1,"VtepMAC":"02:00:00:00:00:66"}"#;
    cluster.request("DELETE", "/api/v1/nodes/n2", &Value::Null);
    drop(agents);
    let mut dual = super::api::go_annotations("vxlan", data, "192.168.77.12");
    dual[format!("{PREFIX}public-ipv6")] = "fd77::12".into();
    dual[format!("{PREFIX}backend-v6-data")] = data.into();
    cluster.add_node_with("n2", &["10.244.2.0/24", "fd00:244:0:2::/64"], &dual);
    let agent = cluster.start(&hosts[0], "n1", config, &[]);
    agent.wait_ready();
    let fdb = || hosts[0].run("bridge fdb show dev flannel-v6.1");
    until("the Go node", PATIENCE, || fdb().contains("02:00:00:00:00:66 dst fd77::12"));
    cluster.annotate("n2", &[("backend-v6-data", json!(data.replace("66", "67")))]);
    until("its change", PATIENCE, || fdb().contains("02:00:00:00:00:67 dst fd77::12"));
}

/// The other backends: `null` where there is no data, nothing where the specification has nothing.
#[test]
fn other_backends() {
    let mut cluster = Cluster::new();
    let host = cluster.world.host();
    cluster.add_node("n1", &["10.244.1.0/24"]);
    for (kind, published) in [("host-gw", "host-gw"), ("udp", ""), ("alloc", "")] {
        let config = format!(r#"{{"Network":"10.244.0.0/16","Backend":{{"Type":"{kind}"}}}}"#);
        let agent = cluster.start(&host, "n1", &config, &["-kube-annotation-prefix=example.com/x"]);
        agent.wait_ready();
        let annotations = cluster.node("n1")["metadata"]["annotations"].clone();
        let expected = json!({
            "example.com/x-backend-data": "null",
            "example.com/x-backend-type": published,
            "example.com/x-kube-subnet-manager": "true",
            "example.com/x-public-ip": host.ip(),
        });
        assert_eq!(annotations, expected, "{kind}");
        agent.stop();
    }
}

/// The operator's address goes before ours, also when the API server was away at the start; and the second of two servers will do.
#[test]
fn an_address_that_the_operator_sets() {
    let mut cluster = Cluster::new();
    cluster.add_node("n1", &["10.244.1.0/24"]);
    cluster.add_go_node("go", "10.244.7.0/24", "192.168.77.207", "02:00:00:00:00:07");
    cluster.annotate("n1", &[("node-public-ip", json!("172.18.0.9"))]);
    let host = cluster.world.host();
    let urls = "-kube-api-url=https://192.168.77.1:1,https://192.168.77.1:6443";
    let agent = cluster.start(&host, "n1", VXLAN, &[urls]);
    agent.wait_ready();
    assert!(!agent.log().lines().any(|line| line.starts_with(['W', 'E'])), "{}", agent.log());
    assert_eq!(cluster.annotation("n1", "public-ip").as_deref(), Some("172.18.0.9"));
    until("the view is saved", PATIENCE, || {
        fs::read_to_string(host.dir.join("data/view.jsonl"))
            .is_ok_and(|view| view.contains("10.244.7.0/24"))
    });
    agent.kill();
    cluster.kill();
    let again = cluster.start(&host, "n1", VXLAN, &[urls]);
    again.wait_for("coming up with the view of an earlier life");
    cluster.restart();
    again.wait_for("lease 10.244.1.0/24 is ours");
    assert!(
        !again.log().contains("starting over") && !again.log().contains("has changed"),
        "{}",
        again.log()
    );
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(cluster.annotation("n1", "public-ip").as_deref(), Some("172.18.0.9"));
    assert!(host.routes().contains("10.244.7.0/24"));
}

/// A cluster without IPv4 for its pods.
#[test]
fn ipv6_only() {
    let config = r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:244::/48","Backend":{"Type":"vxlan"}}"#;
    let mut cluster = Cluster::new();
    let hosts = cluster.world.hosts(2);
    let agents: Vec<Agent> = hosts
        .iter()
        .map(|host| {
            let name = format!("n{}", host.number);
            cluster.add_node(&name, &[&format!("fd00:244:0:{}::/64", host.number)]);
            cluster.start(host, &name, config, &[])
        })
        .collect();
    agents.iter().for_each(Agent::wait_ready);
    hosts.iter().for_each(Host::add_container);
    let ip = hosts[1].container_ip6().unwrap();
    until("the first ping", PATIENCE, || hosts[0].ping(&ip).is_ok());
    let mac = hosts[0].run("cat /sys/class/net/flannel-v6.1/address");
    let mut expected = json!({});
    for (key, value) in [
        ("backend-v6-data", format!(r#"{{"VNI":1,"VtepMAC":"{}"}}"#, mac.trim())),
        ("backend-type", "vxlan".into()),
        ("kube-subnet-manager", "true".into()),
        ("public-ipv6", hosts[0].ip6()),
    ] {
        expected[format!("{PREFIX}{key}")] = value.into();
    }
    assert_eq!(cluster.node("n1")["metadata"]["annotations"], expected);
}
