//! How long a host takes to join, and what it costs, with 10, 1,000 and 5,000 leases in a real etcd. See `make bench`.
//!
//! The last rows of each pair are `ip -batch` and `bridge -batch` writing the same objects into another namespace: nearly all
//! of that is the kernel's own time. (It keeps the next hops of one device in one hash chain, so 5,000 routes cost it 12
//! million comparisons, whoever writes them.) "fresh" finds an empty kernel, "again" is a restart that finds everything in place. Figures of the Go flanneld 0.20 on a
//! two-core machine stand beside ours (design, section 9).
#![allow(clippy::print_stdout, clippy::unwrap_used, clippy::disallowed_methods)]

#[path = "../tests/lab/world.rs"]
mod world;

use std::fmt::Write as _;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};
use world::{Agent, Host, World};

/// Operations of one transaction that etcd takes.
const TXN: usize = 128;

/// What one start cost.
struct Figures {
    to_file: Duration,
    to_programmed: Duration,
    /// After the list had arrived, as the log says.
    programming: Duration,
    cpu: Duration,
    peak: u64,
}

fn main() {
    println!("start of one host, with the leases of others in etcd\n");
    println!(
        "{:>6} {:8} {:6} {:>12} {:>14} {:>12} {:>9} {:>9}",
        "leases", "backend", "start", "subnet.env", "all programmed", "after list", "CPU", "peak"
    );
    for leases in [10, 1000, 5000] {
        for backend in ["vxlan", "host-gw"] {
            let mut world = World::new();
            let etcd = world.etcd(&[]);
            let host = world.host();
            host.run("ip addr add 172.20.0.1/16 dev eth0");
            etcd.put_config("v3", &format!(r#"{{"Network":"10.0.0.0/8","SubnetMin":"10.200.1.0","Backend":{{"Type":"{backend}"}}}}"#));
            seed(&world, leases, backend);
            let floor = floor(&mut world, leases, backend);
            for start in ["fresh", "again"] {
                let figures = measure(&host, leases);
                println!(
                    "{leases:>6} {backend:8} {start:6} {:>9.1} ms {:>11.1} ms {:>9.1} ms {:>6.1} ms {:>5.1} MiB",
                    figures.to_file.as_secs_f64() * 1e3,
                    figures.to_programmed.as_secs_f64() * 1e3,
                    figures.programming.as_secs_f64() * 1e3,
                    figures.cpu.as_secs_f64() * 1e3,
                    kib_to_mib(figures.peak),
                );
            }
            println!("{leases:>6} {backend:8} batch  {:>32.1} ms", floor.as_secs_f64() * 1e3);
        }
    }
    println!(
        "\nGo flanneld 0.20: 10 leases 61 ms to subnet.env, 39 MB; 5000 leases vxlan 3.5 s, 2.0 s CPU, 49 MB;"
    );
    println!("                  5000 leases host-gw 30 s, 33 s CPU, 65 MB");
}

fn kib_to_mib(kib: u64) -> f64 {
    f64::from(u32::try_from(kib).unwrap()) / 1024.0
}

/// Writes the leases of other hosts into etcd, as Go nodes write them.
fn seed(world: &World, leases: usize, backend: &str) {
    let rows: Vec<Value> = (0..leases)
        .map(|number| {
            let key = format!(
                "/coreos.com/network/subnets/10.{}.{}.0-24",
                number / 250 + 1,
                number % 250
            );
            let ip = format!("172.20.{}.{}", number / 250 + 1, number % 250 + 1);
            let data = match backend {
                "vxlan" => {
                    format!(
                        r#","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:00:{:02x}:{:02x}"}}"#,
                        number / 256,
                        number % 256
                    )
                }
                _ => String::new(),
            };
            let value = format!(
                r#"{{"PublicIP":"{ip}","PublicIPv6":null,"BackendType":"{backend}"{data}}}"#
            );
            json!({"request_put": {"key": BASE64.encode(key), "value": BASE64.encode(value)}})
        })
        .collect();
    for chunk in rows.chunks(TXN) {
        let file = world.dir.join("txn.json");
        fs::write(&file, json!({"success": chunk}).to_string()).unwrap();
        let url = "http://127.0.0.1:2379/v3/kv/txn";
        let answer = world.run_in("net", &format!("curl -s -d @{} {url}", file.display()));
        assert!(answer.contains("succeeded"), "{answer}");
    }
}

/// What iproute2 needs for the same objects.
fn floor(world: &mut World, leases: usize, backend: &str) -> Duration {
    let host = world.host();
    host.run("ip addr add 172.20.0.2/16 dev eth0");
    if backend == "vxlan" {
        host.run("ip link add flannel.1 type vxlan id 1 dev eth0 local 172.20.0.2 dstport 8472 nolearning");
        host.run("ip addr add 10.200.1.0/32 dev flannel.1");
        host.run("ip link set flannel.1 up");
    }
    let (mut ip, mut bridge) = (String::new(), String::new());
    for number in 0..leases {
        let subnet = format!("10.{}.{}.0", number / 250 + 1, number % 250);
        let via = format!("172.20.{}.{}", number / 250 + 1, number % 250 + 1);
        let mac = format!("02:00:00:00:{:02x}:{:02x}", number / 256, number % 256);
        if backend == "vxlan" {
            let _ = writeln!(ip, "neigh replace {subnet} lladdr {mac} dev flannel.1 nud permanent");
            let _ = writeln!(ip, "route replace {subnet}/24 via {subnet} dev flannel.1 onlink");
            let _ = writeln!(bridge, "fdb replace {mac} dev flannel.1 dst {via} self permanent");
        } else {
            let _ = writeln!(ip, "route replace {subnet}/24 via {via} dev eth0");
        }
    }
    let (ip_file, bridge_file) = (world.dir.join("ip"), world.dir.join("bridge"));
    fs::write(&ip_file, ip).unwrap();
    fs::write(&bridge_file, bridge).unwrap();
    let start = Instant::now();
    host.run(&format!("bridge -batch {}", bridge_file.display()));
    host.run(&format!("ip -batch {}", ip_file.display()));
    start.elapsed()
}

fn measure(host: &Host, leases: usize) -> Figures {
    let _ = fs::remove_file(host.subnet_file());
    let programmed = format!("all {leases} peers programmed in ");
    let start = Instant::now();
    let agent = host.start(&["-iface=172.20.0.1"]);
    let mut to_file = None;
    let to_programmed = loop {
        if to_file.is_none() && host.subnet_file().exists() {
            to_file = Some(start.elapsed());
        }
        if agent.log().contains(&programmed) && to_file.is_some() {
            break start.elapsed();
        }
        assert!(start.elapsed() < Duration::from_secs(60), "{}", agent.log());
        thread::sleep(Duration::from_micros(500));
    };
    let log = agent.log();
    let programming = time_of(&log, &programmed) - time_of(&log, "peers known");
    // the first saving of the view belongs to the start
    thread::sleep(Duration::from_millis(5500));
    let figures = Figures {
        to_file: to_file.unwrap(),
        to_programmed,
        programming,
        cpu: agent.process.cpu(),
        peak: agent.process.peak(),
    };
    idle(&agent);
    agent.kill();
    figures
}

/// The time of day in front of the first line with this text: `I1121 09:57:15.436254 …`.
fn time_of(log: &str, text: &str) -> Duration {
    let line = log.lines().find(|line| line.contains(text)).unwrap();
    let time = line.split_whitespace().nth(1).unwrap();
    let fields: Vec<f64> = time.split(':').map(|field| field.parse().unwrap()).collect();
    Duration::from_secs_f64(fields[0] * 3600.0 + fields[1] * 60.0 + fields[2])
}

/// What a host that has nothing to do costs; more than nothing is worth a line.
fn idle(agent: &Agent) {
    let before = agent.process.cpu();
    thread::sleep(Duration::from_secs(2));
    let used = agent.process.cpu() - before;
    if used > Duration::from_millis(1) {
        println!("  (idle: {:.1} ms CPU in 2 s)", used.as_secs_f64() * 1e3);
    }
}
