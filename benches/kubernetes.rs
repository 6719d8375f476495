//! What a node costs in a Kubernetes cluster of 10, 1,000, 5,000 and 15,000 nodes of realistic size, through a real
//! kube-apiserver; and what a thousand heart-beats a second cost, beside a watch of whole nodes as the Go flanneld has it. See
//! `make bench`.
//!
//! "fresh" finds an empty kernel and no saved view; "again" is a restart, which uses the saved view and lists a moment of chance
//! later. The nodes are written into the API server's etcd as copies of one that the API server has made, and so are the heart-beats:
//! the server itself could not take so many on a machine with two cores. What the agent reads is the server's own.
#![allow(clippy::print_stdout, clippy::unwrap_used, clippy::disallowed_methods)]

#[path = "../tests/kubernetes/api.rs"]
mod api;
#[path = "../tests/lab/certificates.rs"]
mod certificates;
#[path = "../tests/lab/world.rs"]
mod world;

use std::fs;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use api::{Cluster, PREFIX};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};
use world::{Agent, Host, Process, STORE, until};

const CONFIG: &str = r#"{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}"#;
/// Puts in one transaction; etcd takes requests of 1.5 MiB.
const TXN: usize = 64;
/// How long the storm blows.
const STORM: Duration = Duration::from_secs(10);
/// Heart-beats a second.
const RATE: usize = 1000;

fn main() {
    if api::server().is_none() {
        println!("skipped: there is no kube-apiserver; tests/tools/kube-apiserver.sh build");
        return;
    }
    let mut cluster = Cluster::new();
    let host = cluster.world.host();
    host.run("ip addr add 172.20.0.1/16 dev eth0");
    let observer = cluster.world.host();
    cluster.add_node("n1", &["10.200.1.0/24"]);
    let pattern = Pattern::new(&cluster);
    println!(
        "start of one node in a Kubernetes cluster, vxlan; a node is {:.1} kB in etcd, {:.1} kB in JSON\n",
        kilo(pattern.value.len()),
        kilo(pattern.json)
    );
    println!(
        "{:>6} {:6} {:>12} {:>14} {:>10} {:>12} {:>9} {:>10}",
        "nodes", "start", "subnet.env", "all programmed", "CPU", "not kernel's", "peak", "received"
    );
    let mut there = 0;
    // other numbers may be given as arguments, rising
    let given: Vec<usize> = std::env::args().filter_map(|arg| arg.parse().ok()).collect();
    let sizes = if given.is_empty() { vec![10, 1000, 5000, 15_000] } else { given };
    for nodes in sizes {
        pattern.seed(&cluster, there..nodes);
        there = nodes;
        until("the server knows them", Duration::from_secs(120), || {
            let last = format!("/api/v1/nodes/{}?resourceVersion=0", name(nodes - 1));
            cluster.try_request("GET", &last, None).is_ok_and(|(status, _)| status == 200)
        });
        for start in ["fresh", "again"] {
            if start == "fresh" {
                let _ = host.try_run("ip link del flannel.1");
                let _ = fs::remove_dir_all(host.dir.join("data"));
            }
            let (agent, figures) = measure(&cluster, &host, nodes);
            println!(
                "{nodes:>6} {start:6} {:>9.1} ms {:>11.1} ms {:>7.1} ms {:>9} ms {:>5.1} MiB {:>6.1} MB",
                figures.to_file.as_secs_f64() * 1e3,
                figures.to_programmed.as_secs_f64() * 1e3,
                figures.cpu.as_secs_f64() * 1e3,
                figures.user,
                kib_to_mib(figures.peak),
                kilo(figures.received) / 1e3,
            );
            // a thousand heart-beats a second are those of thousands of nodes
            if start == "again" && nodes >= 1000 {
                storm(&cluster, &pattern, &host, &observer, &agent, nodes);
            }
            agent.stop();
        }
    }
    println!(
        "\nnot measured here: the Go flanneld keeps whole nodes, 177 MiB at 5,000 as its users report, and hangs with more than that"
    );
}

fn kib_to_mib(kib: u64) -> f64 {
    f64::from(u32::try_from(kib).unwrap()) / 1024.0
}

fn kilo(bytes: usize) -> f64 {
    f64::from(u32::try_from(bytes).unwrap()) / 1000.0
}

fn name(number: usize) -> String {
    format!("node-{number:05}")
}

/// A node as it lies in etcd; what makes it this one and no other has a fixed length.
struct Pattern {
    value: Vec<u8>,
    uid: String,
    json: usize,
}

// of the length that all of them have: the object's bytes say how long each text is
const NAME: &str = "node-99999";
const SUBNET: &str = "10.255.255.0/24";
const IP: &str = "172.255.255.255";
const MAC: &str = "02:00:00:00:99:99";
const TIME: &str = "2026-11-21T12:00:00Z";
/// The same, in seconds since the epoch.
const SECONDS: u64 = 1_795_262_400;

impl Pattern {
    /// Has the API server make a node as a kubelet, the controller manager and a Go flanneld make it: 50 images, 5 conditions.
    fn new(cluster: &Cluster) -> Self {
        let digest = |number: usize| format!("{number:064x}");
        let images: Vec<Value> = (0..50)
            .map(|number| {
                let image = format!("123456789012.registry.eu-central-1.cloud.example.com/platform/component-{number:02}");
                json!({ "names": [format!("{image}@sha256:{}", digest(number)), format!("{image}:v1.{number}.0")], "sizeBytes": 50_000_000 + number })
            })
            .collect();
        let condition = |kind: &str, reason: &str| {
            json!({ "type": kind, "status": "False", "reason": reason, "message": format!("kubelet has {reason}"),
                "lastHeartbeatTime": TIME, "lastTransitionTime": "2026-11-20T12:00:00Z" })
        };
        let annotation = |key: &str| format!("{PREFIX}{key}");
        let capacity = json!({ "cpu": "32", "memory": "131072000Ki", "pods": "110", "ephemeral-storage": "1048576000Ki",
            "hugepages-1Gi": "0", "hugepages-2Mi": "0" });
        let node = json!({ "apiVersion": "v1", "kind": "Node",
            "metadata": { "name": NAME,
                "labels": { "beta.kubernetes.io/arch": "amd64", "beta.kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64",
                    "kubernetes.io/hostname": NAME, "kubernetes.io/os": "linux", "node.kubernetes.io/instance-type": "m5.8xlarge",
                    "topology.kubernetes.io/region": "eu-central-1", "topology.kubernetes.io/zone": "eu-central-1b" },
                "annotations": { "kubeadm.alpha.kubernetes.io/cri-socket": "/run/containerd/containerd.sock",
                    "node.alpha.kubernetes.io/ttl": "0", "volumes.kubernetes.io/controller-managed-attach-detach": "true",
                    annotation("backend-data"): format!(r#"{{"VNI":1,"VtepMAC":"{MAC}"}}"#),
                    annotation("backend-type"): "vxlan", annotation("kube-subnet-manager"): "true", annotation("public-ip"): IP } },
            "spec": { "podCIDR": SUBNET, "podCIDRs": [SUBNET], "providerID": "cloud:///eu-central-1b/i-0123456789abcdef0" },
            "status": { "capacity": capacity, "allocatable": capacity,
                "conditions": [condition("MemoryPressure", "KubeletHasSufficientMemory"), condition("DiskPressure", "KubeletHasNoDiskPressure"),
                    condition("PIDPressure", "KubeletHasSufficientPID"), condition("Ready", "KubeletReady"),
                    condition("NetworkUnavailable", "FlannelIsUp")],
                "addresses": [{ "type": "InternalIP", "address": IP }, { "type": "Hostname", "address": NAME }],
                "nodeInfo": { "architecture": "amd64", "bootID": "5a8b1c1e-6a0f-4a8e-9a57-0f4f5d8f3a10", "containerRuntimeVersion": "containerd://1.6.20",
                    "kernelVersion": "6.1.0-18-amd64", "kubeProxyVersion": "v1.20.2", "kubeletVersion": "v1.20.2", "machineID": digest(1)[..32],
                    "operatingSystem": "linux", "osImage": "Debian GNU/Linux 12 (bookworm)", "systemUUID": "5a8b1c1e-6a0f-4a8e-9a57-0f4f5d8f3a11" },
                "images": images } });
        let made = cluster.request("POST", "/api/v1/nodes", &node);
        let (json, uid) =
            (made.to_string().len(), made["metadata"]["uid"].as_str().unwrap().to_owned());
        let answer = cluster.world.run_in(
            "net",
            &format!(
                "curl -s -d {{\"key\":\"{}\"}} http://127.0.0.1:2379/v3/kv/range",
                BASE64.encode(format!("/registry/minions/{NAME}"))
            ),
        );
        let answer: Value = serde_json::from_str(&answer).unwrap();
        let value = BASE64.decode(answer["kvs"][0]["value"].as_str().unwrap()).unwrap();
        cluster.delete_node(NAME);
        Self { value, uid, json }
    }

    /// Node `number` at its `beat`th heart-beat.
    fn node(&self, number: usize, beat: u64) -> Vec<u8> {
        let mut value = self.value.clone();
        replace(&mut value, NAME.as_bytes(), name(number).as_bytes());
        let uid = format!("{number:08}{}", &self.uid[8..]);
        replace(&mut value, self.uid.as_bytes(), uid.as_bytes());
        replace(&mut value, SUBNET.as_bytes(), subnet(number).as_bytes());
        let ip = format!(
            "172.{}.{}.{}",
            100 + number / 10_000,
            100 + number / 100 % 100,
            100 + number % 100
        );
        replace(&mut value, IP.as_bytes(), ip.as_bytes());
        let mac = format!("02:00:00:00:{:02x}:{:02x}", number / 256, number % 256);
        replace(&mut value, MAC.as_bytes(), mac.as_bytes());
        replace(&mut value, &varint(SECONDS), &varint(SECONDS + beat));
        value
    }

    fn seed(&self, cluster: &Cluster, numbers: std::ops::Range<usize>) {
        let numbers: Vec<usize> = numbers.collect();
        for chunk in numbers.chunks(TXN) {
            self.write(cluster, chunk, 0);
        }
    }

    fn write(&self, cluster: &Cluster, numbers: &[usize], beat: u64) {
        let put = |number: &usize| {
            let key = format!("/registry/minions/{}", name(*number));
            json!({ "request_put": { "key": BASE64.encode(key), "value": BASE64.encode(self.node(*number, beat)) } })
        };
        let body = json!({ "success": numbers.iter().map(put).collect::<Vec<_>>() }).to_string();
        let file = cluster.dir.join("txn.json");
        fs::write(&file, body).unwrap();
        let url = "http://127.0.0.1:2379/v3/kv/txn";
        let answer = cluster.world.run_in("net", &format!("curl -s -d @{} {url}", file.display()));
        assert!(answer.contains("succeeded"), "{answer}");
    }
}

fn subnet(number: usize) -> String {
    format!("10.{}.{}.0/24", 100 + number / 150, 100 + number % 150)
}

/// Puts `new` in all places of `old`, which is as long.
fn replace(value: &mut [u8], old: &[u8], new: &[u8]) {
    assert_eq!(old.len(), new.len());
    let mut at = 0;
    while let Some(found) = value[at..].windows(old.len()).position(|window| window == old) {
        at += found;
        value[at..at + old.len()].copy_from_slice(new);
        at += old.len();
    }
    assert!(at > 0, "the node does not hold {old:?}");
}

fn varint(mut number: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number >= 0x80 {
        bytes.push(u8::try_from(number & 0x7f).unwrap() | 0x80);
        number >>= 7;
    }
    bytes.push(u8::try_from(number).unwrap());
    bytes
}

/// What one start cost.
struct Figures {
    to_file: Duration,
    to_programmed: Duration,
    cpu: Duration,
    /// Milliseconds of that outside of the kernel, in steps of ten.
    user: u64,
    peak: u64,
    received: usize,
}

fn measure(cluster: &Cluster, host: &Host, nodes: usize) -> (Agent, Figures) {
    let _ = fs::remove_file(host.subnet_file());
    let programmed = format!("all {nodes} peers programmed in ");
    let before = received(host);
    let start = Instant::now();
    let agent = cluster.start(host, "n1", CONFIG, &["-iface=172.20.0.1"]);
    let mut to_file = None;
    let to_programmed = loop {
        if to_file.is_none() && host.subnet_file().exists() {
            to_file = Some(start.elapsed());
        }
        if agent.log().contains(&programmed) && to_file.is_some() {
            break start.elapsed();
        }
        assert!(start.elapsed() < Duration::from_secs(120), "{}", agent.log());
        thread::sleep(Duration::from_micros(500));
    };
    let received = received(host) - before;
    // the first saving of the view belongs to the start
    thread::sleep(Duration::from_millis(5500));
    let (cpu, peak) = (agent.process.cpu(), agent.process.peak());
    let user = agent.process.user_ticks() * 10;
    let to_file = to_file.unwrap();
    (agent, Figures { to_file, to_programmed, cpu, user, peak, received })
}

/// Heart-beats, and what they cost the agent and somebody who watches whole nodes in JSON.
fn storm(
    cluster: &Cluster,
    pattern: &Pattern,
    host: &Host,
    observer: &Host,
    agent: &Agent,
    nodes: usize,
) {
    let list = cluster.request("GET", "/api/v1/nodes?limit=1", &Value::Null);
    let version = list["metadata"]["resourceVersion"].as_str().unwrap();
    let url = format!(
        "https://{STORE}:6443/api/v1/nodes?watch=true&allowWatchBookmarks=true&resourceVersion={version}"
    );
    let mut command = observer.command("curl");
    command.args(["-sNk", "-H", "Authorization: Bearer admin-token", &url]).stdout(Stdio::null());
    let watcher = Process::start("curl", &mut command);
    thread::sleep(Duration::from_secs(1));
    // with somebody beside us, for the bytes; and alone, for the rate
    let before = (received(host), received(observer));
    let beats = blow(cluster, pattern, nodes, STORM / 4);
    let (ours, whole) = (received(host) - before.0, received(observer) - before.1);
    drop(watcher);
    println!(
        "{:13} a heart-beat is {:.2} kB, and {:.2} kB in a watch of whole nodes in JSON: 1/{:.1}",
        "",
        kilo(ours / beats),
        kilo(whole / beats),
        kilo(whole) / kilo(ours)
    );
    let (before, start) = (agent.process.cpu(), Instant::now());
    let beats = f64::from(u32::try_from(blow(cluster, pattern, nodes, STORM)).unwrap());
    let (used, elapsed) = (agent.process.cpu() - before, start.elapsed());
    let each = used.as_secs_f64() * 1e6 / beats;
    println!(
        "{:13} {:.0} heart-beats/s take {:.2} % of a processor: {each:.1} us each, {:.1} % at 1,000/s",
        "",
        beats / elapsed.as_secs_f64(),
        100.0 * used.as_secs_f64() / elapsed.as_secs_f64(),
        each / 10.0,
    );
}

/// Heart-beats for so long; how many there were.
fn blow(cluster: &Cluster, pattern: &Pattern, nodes: usize, time: Duration) -> usize {
    let start = Instant::now();
    let mut beats = 0;
    while start.elapsed() < time {
        let due = usize::try_from(start.elapsed().as_millis()).unwrap() * RATE / 1000;
        if beats >= due {
            thread::sleep(Duration::from_millis(1));
            continue;
        }
        let numbers: Vec<usize> =
            (beats..beats + TXN.min(nodes)).map(|beat| beat % nodes).collect();
        pattern.write(cluster, &numbers, u64::try_from(start.elapsed().as_millis()).unwrap() + 1);
        beats += numbers.len();
    }
    thread::sleep(Duration::from_secs(1));
    beats
}

/// Bytes that have come to the host.
fn received(host: &Host) -> usize {
    host.run("cat /sys/class/net/eth0/statistics/rx_bytes").trim().parse().unwrap()
}
