//! The rights of our manifest are enough, and none is too much: without it, an error says which.

use std::fs;

use serde_json::{Value, json};

use super::api::{Cluster, VXLAN, manifest};
use super::world::{PATIENCE, run, until};

fn rules() -> Vec<Value> {
    let role = manifest().into_iter().find(|object| object["kind"] == "ClusterRole").unwrap();
    role["rules"].as_array().unwrap().clone()
}

/// The rules without one verb of one resource.
fn without(resource: &str, verb: &str) -> Value {
    let mut all = rules();
    let mut found = false;
    for rule in &mut all {
        assert_eq!(rule["apiGroups"], json!([""]));
        if rule["resources"] == json!([resource]) {
            let verbs = rule["verbs"].as_array_mut().unwrap();
            let before = verbs.len();
            verbs.retain(|have| have != verb);
            found |= verbs.len() < before;
        }
    }
    assert!(found, "the manifest does not allow {verb} on {resource}");
    all.retain(|rule| rule["verbs"] != json!([]));
    all.into()
}

/// Each right is named when it is missing, and used as soon as it is there; all of them together are enough, which every other
/// test shows.
#[test]
fn each_right_is_needed() {
    let count: usize = rules().iter().map(|rule| rule["verbs"].as_array().unwrap().len()).sum();
    assert_eq!(count, 3, "what is new here must be tested here");
    let mut cluster = Cluster::new();
    let hosts = cluster.world.hosts(3);
    cluster.add_go_node("go", "10.244.7.0/24", "192.168.77.207", "02:00:00:00:00:07");
    for (host, (resource, verb)) in
        hosts.iter().zip([("nodes", "list"), ("nodes", "watch"), ("nodes/status", "patch")])
    {
        let name = format!("n{}", host.number);
        cluster.add_node(&name, &[&format!("10.244.{}.0/24", host.number)]);
        cluster.set_rules(&without(resource, verb));
        let agent = cluster.start(host, &name, VXLAN, &[]);
        agent
            .wait_for(&format!("the ClusterRole of this agent must allow it to {verb} {resource}"));
        agent.wait_for("says 403");
        cluster.set_rules(&rules().into());
        agent.wait_ready();
        agent.wait_for("works again");
        cluster.annotate("go", &[("public-ip", json!(format!("192.168.77.22{}", host.number)))]);
        until("the peer's change", PATIENCE, || {
            let fdb = host.run("bridge fdb show dev flannel.1");
            fdb.contains(&format!("192.168.77.22{}", host.number))
        });
        agent.stop();
    }
}

/// The token's file gets a new content; the old token is of no use any more. And a plugin that gives a token.
#[test]
fn credentials_are_rotated() {
    let mut cluster = Cluster::new();
    let hosts = cluster.world.hosts(1);
    cluster.add_node("n1", &["10.244.1.0/24"]);
    let agent = cluster.start(&hosts[0], "n1", VXLAN, &[]);
    agent.wait_ready();
    // an account made anew does not know its old tokens
    let account = "/api/v1/namespaces/kube-flannel/serviceaccounts/flannel";
    cluster.request("DELETE", account, &Value::Null);
    let object = manifest().into_iter().find(|object| object["kind"] == "ServiceAccount").unwrap();
    cluster.request("POST", "/api/v1/namespaces/kube-flannel/serviceaccounts", &object);
    // the server believes a token for ten seconds
    std::thread::sleep(std::time::Duration::from_secs(12));
    // our annotations must be written again, for which the agent must be let in
    cluster.annotate("n1", &[("backend-data", Value::Null)]);
    agent.wait_for("says 401");
    agent.wait_for("is no credential of this cluster, or has run out");
    fs::write(cluster.dir.join("new"), cluster.token()).unwrap();
    fs::rename(cluster.dir.join("new"), cluster.dir.join("token")).unwrap();
    agent.wait_for("works again");
    until("our annotations", PATIENCE, || cluster.annotation("n1", "backend-data").is_some());
    agent.stop();

    // a plugin that gives a token, in the API of Kubernetes
    let token = cluster.dir.join("token");
    let plugin = cluster.dir.join("plugin");
    fs::write(
        &plugin,
        format!(
            "#!/bin/sh\ncase $KUBERNETES_EXEC_INFO in *'\"kind\":\"ExecCredential\"'*) ;; *) exit 1;; esac\n\
             printf '{{\"apiVersion\":\"client.authentication.k8s.io/v1beta1\",\"kind\":\"ExecCredential\",\"status\":{{\"token\":\"%s\"}}}}' \"$(cat {})\"\n",
            token.display()
        ),
    )
    .unwrap();
    run(&format!("chmod +x {}", plugin.display()));
    let user = "exec: {apiVersion: client.authentication.k8s.io/v1beta1, command: ./plugin}";
    let kubeconfig =
        format!("-kubeconfig-file={}", cluster.kubeconfig_for("plugin", user).display());
    let agent = cluster.start_with(&hosts[0], "n1", VXLAN, &[&kubeconfig]);
    agent.wait_ready();
    agent.stop();
}
