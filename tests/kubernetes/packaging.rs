//! What we ship for Kubernetes, as the real tools render it and the real server takes it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use flanneld::cli;
use flanneld::config::NetworkConfig;
use serde_json::{Value, json};

use super::api::{Cluster, manifest, objects};
use super::world::try_run;

fn shipped() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/kubernetes")
}

/// Where `tests/tools/helm.sh` has put the tools.
fn tools() -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tools/helm.sh");
    let found = try_run(&format!("{} find", script.display()));
    found.expect("no helm: run make test-kubernetes").trim().into()
}

fn output(mut command: Command) -> Result<String, String> {
    let output = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

/// The chart with these values, rendered.
fn chart(values: &[&str]) -> Result<String, String> {
    let mut command = Command::new(tools().join("bin/helm"));
    command
        .args(["template", "flannel", "-n", "kube-flannel"])
        .arg(shipped().join("chart/kube-flannel"));
    for value in values {
        command.args(["--set", value]);
    }
    output(command)
}

/// The objects by kind, and the documents in the ConfigMap as what they are.
fn regular(mut all: Vec<Value>) -> Vec<Value> {
    all.retain(|object| object["kind"] != "Namespace");
    all.sort_by_key(|object| object["kind"].to_string());
    for object in &mut all {
        for (_, text) in object["data"].as_object_mut().into_iter().flatten() {
            *text = serde_json::from_str(text.as_str().unwrap()).unwrap();
        }
    }
    all
}

fn net_conf(all: &[Value]) -> Value {
    let map = all.iter().find(|object| object["kind"] == "ConfigMap").unwrap();
    map["data"]["net-conf.json"].clone()
}

fn daemon_set(all: &[Value]) -> Value {
    all.iter().find(|object| object["kind"] == "DaemonSet").unwrap()["spec"]["template"]["spec"]
        .clone()
}

/// Chart, kustomization and manifest are the same thing.
#[test]
fn three_ways_to_one_thing() {
    let expected = regular(manifest());
    assert_eq!(regular(objects(&chart(&[]).unwrap())), expected);
    let mut kustomize = Command::new(tools().join("kubectl"));
    kustomize.arg("kustomize").arg(shipped());
    assert_eq!(regular(objects(&output(kustomize).unwrap())), expected);
    let mut lint = Command::new(tools().join("bin/helm"));
    lint.args(["lint", "--strict"]).arg(shipped().join("chart/kube-flannel"));
    output(lint).unwrap();
}

/// The agent understands what the manifest gives it.
#[test]
fn the_agent_takes_it() {
    let all = regular(manifest());
    NetworkConfig::parse(&net_conf(&all).to_string()).unwrap();
    let container = &daemon_set(&all)["containers"][0];
    let args: Vec<String> = container["args"]
        .as_array()
        .unwrap()
        .iter()
        .map(|arg| arg.as_str().unwrap().to_owned())
        .collect();
    let variable = |name: &str| (name == "NODE_NAME").then(|| "n1".to_owned());
    let Ok(cli::Command::Run(settings)) = cli::parse(&args, &variable) else { panic!("{args:?}") };
    assert_eq!(settings.notes.warnings, [""; 0]);
    assert_eq!(container["env"][0]["name"], "NODE_NAME");
    // the files that it writes and reads are mounted
    let mounts = container["volumeMounts"].as_array().unwrap();
    for file in
        [&settings.subnet_file, &settings.data_dir, Path::new("/etc/kube-flannel/net-conf.json")]
    {
        let below = |mount: &Value| file.starts_with(mount["mountPath"].as_str().unwrap());
        assert!(mounts.iter().any(below), "{}", file.display());
    }
    let least = json!({ "privileged": false, "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
        "capabilities": { "drop": ["ALL"], "add": ["NET_ADMIN"] } });
    assert_eq!(container["securityContext"], least);
}

/// The chart's values do what they say, and wrong ones are refused.
#[test]
fn values() {
    for (values, expected) in [
        (
            &["podCidrv6=fd00::/48"][..],
            json!({ "Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00::/48",
            "EnableNFTables": false, "Backend": { "Type": "vxlan" } }),
        ),
        (
            &["podCidr=", "podCidrv6=fd00::/48", "flannel.enableNFTables=true"],
            json!({ "EnableIPv4": false, "EnableIPv6": true,
            "IPv6Network": "fd00::/48", "EnableNFTables": true, "Backend": { "Type": "vxlan" } }),
        ),
        (
            &[
                "flannel.vni=0",
                "flannel.GBP=false",
                "flannel.mtu=1400",
                "flannel.directRouting=true",
                "flannel.backendPort=4789",
            ],
            json!({ "Network": "10.244.0.0/16", "EnableNFTables": false, "Backend": { "Type": "vxlan", "VNI": 0, "GBP": false,
            "MTU": 1400, "DirectRouting": true, "Port": 4789 } }),
        ),
        (
            &["flannel.backend=udp", "flannel.backendPort=8285"],
            json!({ "Network": "10.244.0.0/16", "EnableNFTables": false, "Backend": { "Type": "udp", "Port": 8285 } }),
        ),
    ] {
        let all = regular(objects(&chart(values).unwrap()));
        assert_eq!(net_conf(&all), expected, "{values:?}");
        NetworkConfig::parse(&expected.to_string()).unwrap();
    }
    let pod = daemon_set(&regular(objects(
        &chart(&["flannel.healthz.port=0", "flannel.skipCNIConfigInstallation=true"]).unwrap(),
    )));
    assert_eq!(pod["initContainers"].as_array().unwrap().len(), 1);
    let container = &pod["containers"][0];
    assert_eq!(container["args"], json!(["--ip-masq", "--kube-subnet-mgr"]));
    assert!(container["livenessProbe"].is_null() && container["ports"].is_null());
    for (value, says) in [
        ("podCidr=", "podCidr, podCidrv6 or both"),
        ("flannel.nonsense=1", "nonsense"),
        ("flannel.backend=wireguard", "flannel.backend"),
        ("netpol.enabled=true", "netpol.image.repository"),
    ] {
        let error = chart(&[value]).unwrap_err();
        assert!(error.contains(says), "{error}");
    }
}

/// The Go flannel's installation, as far as it matters for being taken over.
fn go_installation() -> String {
    let all = manifest();
    let mut set = all.iter().find(|object| object["kind"] == "DaemonSet").unwrap().clone();
    let pod = &mut set["spec"]["template"]["spec"];
    pod["initContainers"][1]["image"] = json!("flannel/flannel:v0.28.9");
    let container = &mut pod["containers"][0];
    container["image"] = json!("flannel/flannel:v0.28.9");
    let field = |path: &str| json!({ "fieldRef": { "fieldPath": path } });
    container["env"] = json!([
        { "name": "POD_NAME", "valueFrom": field("metadata.name") },
        { "name": "POD_NAMESPACE", "valueFrom": field("metadata.namespace") },
        { "name": "EVENT_QUEUE_DEPTH", "value": "5000" },
    ]);
    container["securityContext"] =
        json!({ "privileged": false, "capabilities": { "add": ["NET_ADMIN", "NET_RAW"] } });
    container["volumeMounts"] = json!([
        { "name": "run", "mountPath": "/run/flannel" },
        { "name": "flannel-cfg", "mountPath": "/etc/kube-flannel/" },
        { "name": "xtables-lock", "mountPath": "/run/xtables.lock" },
    ]);
    let volumes = pod["volumes"].as_array_mut().unwrap();
    volumes.retain(|volume| volume["name"] != "data");
    volumes.push(json!({ "name": "xtables-lock", "hostPath": { "path": "/run/xtables.lock", "type": "FileOrCreate" } }));
    let config = json!({ "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": { "name": "kube-flannel-cfg", "namespace": "kube-flannel", "labels": { "app": "flannel" } },
        "data": { "cni-conf.json": "{}", "net-conf.json": "{\"Network\":\"10.9.0.0/16\"}" } });
    json!({ "apiVersion": "v1", "kind": "List", "items": [set, config] }).to_string()
}

/// The server takes the manifest, the base and the chart; the manifest takes over what is there, and a config that is somebody's
/// own stays.
#[test]
fn the_server_takes_it() {
    let cluster = Cluster::new();
    let kubeconfig = cluster.kubeconfig_for("admin", "token: admin-token");
    let kubectl = |args: &[&str]| {
        let mut command = cluster.world.command("net", tools().join("kubectl"));
        command
            .arg(format!("--kubeconfig={}", kubeconfig.display()))
            .args(args)
            .env("HOME", &cluster.dir);
        output(command)
    };
    let manifest = shipped().join("kube-flannel.yml").display().to_string();
    kubectl(&["apply", "--dry-run=server", "-f", &manifest]).unwrap();
    kubectl(&["apply", "--dry-run=server", "-k", &shipped().display().to_string()]).unwrap();
    for values in [&[][..], &["podCidrv6=fd00::/48"], &["flannel.backend=udp"]] {
        let rendered = cluster.dir.join("chart.yml");
        fs::write(&rendered, chart(values).unwrap()).unwrap();
        kubectl(&["apply", "--dry-run=server", "-f", &rendered.display().to_string()]).unwrap();
    }
    let before = cluster.dir.join("before.yml");
    fs::write(&before, go_installation()).unwrap();
    kubectl(&["apply", "-f", &before.display().to_string()]).unwrap();
    kubectl(&["apply", "-l", "app.kubernetes.io/component!=config", "-f", &manifest]).unwrap();
    let get = |kind: &str, name: &str, path: &str| {
        kubectl(&["-n", "kube-flannel", "get", kind, name, "-o", &format!("jsonpath={path}")])
            .unwrap()
    };
    assert_eq!(
        get("configmap", "kube-flannel-cfg", "{.data.net-conf\\.json}"),
        "{\"Network\":\"10.9.0.0/16\"}"
    );
    let container = "{.spec.template.spec.containers[0]";
    let set = |path: &str| get("daemonset", "kube-flannel-ds", &format!("{container}{path}}}"));
    assert_eq!(set(".image"), "flanneld:v0.1.0");
    assert_eq!(set(".env[*].name"), "NODE_NAME");
    assert_eq!(set(".securityContext.capabilities.add[*]"), "NET_ADMIN");
    // and back
    kubectl(&["apply", "-f", &before.display().to_string()]).unwrap();
}
