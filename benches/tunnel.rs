//! What the udp backend carries, beside the underlay itself and the backends whose packets the kernel carries: TCP, UDP,
//! latency and processor time between two hosts in network namespaces. See `make bench`.
//!
//! One row is one way; all rows come from one run on one machine, and the ratios are what counts. Sender, receiver and both
//! agents share the machine's processors. "CPU" is the time of all processors, whoever used it, over one TCP stream.
//! Every figure is the median of `ROUNDS` (3) rounds through all ways, so that what else the machine does falls on all of
//! them alike. `ONLY="vxlan|udp, all"` measures these only.
#![allow(clippy::print_stdout, clippy::unwrap_used, clippy::disallowed_methods)]

#[path = "../tests/lab/world.rs"]
mod world;

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use flanneld::sys::udp::{Received, SLOT, UdpPort};
use serde_json::Value;
use world::{Agent, Host, PATIENCE, Process, World, until};

/// Length of one measurement in seconds.
const SECONDS: u32 = 3;
/// Requests whose answer is waited for.
const REQUESTS: usize = 20_000;
/// Bytes of one request, and of its answer.
const REQUEST: usize = 64;

/// One row's measurements.
#[derive(Clone, Copy, Default)]
struct Row {
    /// Gbit/s of one stream and of four.
    tcp: [f64; 2],
    /// Processor milliseconds per gigabit.
    cpu: f64,
    /// Packets a second that arrive, and percent that do not: of 64 bytes in all, of the full MTU.
    udp: [(f64, f64); 2],
    /// Microseconds, half of the requests and 99 of 100.
    latency: [f64; 2],
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [_, "answer", address] => return answer(address),
        [_, "ask", address] => return ask(address),
        [_, "sink", address] => return sink(address),
        [_, "flood", from, to, size] => return flood(from, to, size.parse().unwrap()),
        _ => {}
    }
    let only = std::env::var("ONLY").unwrap_or_default();
    let mut ways = vec![
        ("underlay".to_owned(), None),
        ("host-gw".to_owned(), Some(r#"{"Type":"host-gw"}"#.to_owned())),
        ("vxlan".to_owned(), Some(r#"{"Type":"vxlan"}"#.to_owned())),
        ("udp, all".to_owned(), Some(r#"{"Type":"udp"}"#.to_owned())),
        ("udp, none".to_owned(), Some(udp(&["TSO", "USO", "Merge", "GSO", "GRO", "Batch"]))),
    ];
    for name in ["TSO", "USO", "Merge", "GSO", "GRO", "Batch"] {
        ways.push((format!("udp, no {name}"), Some(udp(&[name]))));
    }
    ways.retain(|(name, _)| only.is_empty() || only.split('|').any(|part| name == part));
    println!(
        "{:14} {:>8} {:>8} {:>10} {:>10} {:>6} {:>10} {:>6} {:>8} {:>8}",
        "", "TCP x1", "TCP x4", "CPU", "UDP 64 B", "lost", "UDP full", "lost", "p50", "p99"
    );
    println!(
        "{:14} {:>8} {:>8} {:>10} {:>10} {:>6} {:>10} {:>6} {:>8} {:>8}",
        "", "Gbit/s", "Gbit/s", "ms/Gbit", "packets/s", "%", "packets/s", "%", "us", "us"
    );
    let rounds: usize = std::env::var("ROUNDS").map_or(3, |text| text.parse().unwrap());
    let mut rows: Vec<Vec<Row>> = vec![Vec::new(); ways.len()];
    for _ in 0..rounds {
        for ((_, backend), rows) in ways.iter().zip(&mut rows) {
            rows.push(measure(backend.as_deref()));
        }
    }
    for ((name, _), rows) in ways.iter().zip(&rows) {
        let median = |figure: &dyn Fn(&Row) -> f64| {
            let mut figures: Vec<f64> = rows.iter().map(figure).collect();
            figures.sort_by(f64::total_cmp);
            figures[figures.len() / 2]
        };
        println!(
            "{name:14} {:>8.2} {:>8.2} {:>10.0} {:>10.0} {:>6.1} {:>10.0} {:>6.1} {:>8.1} {:>8.1}",
            median(&|row| row.tcp[0]),
            median(&|row| row.tcp[1]),
            median(&|row| row.cpu),
            median(&|row| row.udp[0].0),
            median(&|row| row.udp[0].1),
            median(&|row| row.udp[1].0),
            median(&|row| row.udp[1].1),
            median(&|row| row.latency[0]),
            median(&|row| row.latency[1])
        );
    }
}

/// The backend's config without some offloads.
fn udp(off: &[&str]) -> String {
    let off: Vec<String> = off.iter().map(|name| format!("{name:?}:false")).collect();
    format!(r#"{{"Type":"udp","Offloads":{{{}}}}}"#, off.join(","))
}

/// Two hosts, joined in this way or not at all, and everything between them.
fn measure(backend: Option<&str>) -> Row {
    let mut world = World::new();
    let hosts = world.hosts(2);
    let mut agents: Vec<Agent> = Vec::new();
    let (etcd, target, mtu);
    if let Some(backend) = backend {
        etcd = world.etcd(&[]);
        etcd.put_config("v3", &format!(r#"{{"Network":"10.5.0.0/16","Backend":{backend}}}"#));
        agents.extend(hosts.iter().map(|host| host.start(&[])));
        agents.iter().for_each(Agent::wait_ready);
        for host in &hosts {
            host.run("ip link add c0 type bridge");
            host.run(&format!("ip addr add {} dev c0", host.env("FLANNEL_SUBNET").unwrap()));
            host.run("ip link set c0 up");
        }
        target = hosts[1].env("FLANNEL_SUBNET").unwrap().split('/').next().unwrap().to_owned();
        mtu = hosts[1].env("FLANNEL_MTU").unwrap().parse().unwrap();
    } else {
        target = hosts[1].ip();
        mtu = 1500;
    }
    until("the way", PATIENCE, || hosts[0].try_run(&format!("ping -c1 -W1 {target}")).is_ok());
    let mut row = Row::default();
    let (before, start) = (busy(), Instant::now());
    row.tcp[0] =
        iperf(&hosts, &target, "-P 1")["sum_received"]["bits_per_second"].as_f64().unwrap() / 1e9;
    let took = start.elapsed().as_secs_f64().min(f64::from(SECONDS));
    row.cpu = (busy() - before).as_secs_f64() * 1e3 / (row.tcp[0] * took);
    row.tcp[1] =
        iperf(&hosts, &target, "-P 4")["sum_received"]["bits_per_second"].as_f64().unwrap() / 1e9;
    if std::env::var_os("TCP_ONLY").is_some() {
        return row;
    }
    for (index, size) in [64 - 28, mtu - 28].into_iter().enumerate() {
        row.udp[index] = datagrams(&hosts, &target, size);
    }
    row.latency = latency(&hosts, &target);
    row
}

/// Runs iperf3 and returns the end of its report.
fn iperf(hosts: &[Host], target: &str, args: &str) -> Value {
    let mut server = hosts[1].command("iperf3");
    let _server = Process::start("iperf3", server.args(["-s", "-1"]).stdout(Stdio::null()));
    let listens = || hosts[1].run("ss -Hltn sport = 5201").contains("5201");
    until("the server", PATIENCE, listens);
    let mut report = String::new();
    until("the transfer", PATIENCE, || {
        let command = format!("iperf3 -J -c {target} -t {SECONDS} --connect-timeout 1000 {args}");
        hosts[0].try_run(&command).is_ok_and(|text| {
            report = text;
            !report.contains("\"error\"")
        })
    });
    if std::env::var_os("TCP_ONLY").is_some() {
        eprintln!(
            "retrans {}",
            serde_json::from_str::<Value>(&report).unwrap()["end"]["sum_sent"]["retransmits"]
        );
    }
    serde_json::from_str::<Value>(&report).unwrap()["end"].clone()
}

/// Time that all processors were busy since the machine started.
fn busy() -> Duration {
    let stat = fs::read_to_string("/proc/stat").unwrap();
    let fields: Vec<u64> =
        stat.lines().next().unwrap().split_whitespace().skip(1).flat_map(str::parse).collect();
    // user, nice, system, idle, iowait, irq, softirq
    Duration::from_millis(10 * (fields[0] + fields[1] + fields[2] + fields[5] + fields[6]))
}

/// Datagrams with `size` bytes of payload, as many as one thread can send: how many arrive a second, and percent lost.
fn datagrams(hosts: &[Host], target: &str, size: usize) -> (f64, f64) {
    let exe = std::env::current_exe().unwrap();
    let to = format!("{target}:7778");
    let mut server = hosts[1].command(&exe);
    let output = hosts[1].dir.join("sink");
    let file = fs::File::create(&output).unwrap();
    let mut server = Process::start("sink", server.args(["sink", &to]).stdout(file));
    until("the sink", PATIENCE, || hosts[1].run("ss -Hlun sport = 7778").contains("7778"));
    let command = format!("{} flood 0.0.0.0:0 {to} {size}", exe.display());
    let sent: f64 = hosts[0].try_run(&command).unwrap().trim().parse().unwrap();
    server.wait();
    let arrived: f64 = fs::read_to_string(&output).unwrap().trim().parse().unwrap();
    (arrived / f64::from(SECONDS), 100.0 * (sent - arrived) / sent)
}

fn flood(from: &str, to: &str, size: usize) {
    let mut port = UdpPort::bind(from.parse().unwrap()).unwrap();
    let (to, payload): (SocketAddr, _) = (to.parse().unwrap(), vec![0x5a; size]);
    let (start, mut sent) = (Instant::now(), 0);
    while start.elapsed() < Duration::from_secs(SECONDS.into()) {
        let mut burst = port.burst();
        while burst.add(to, None, [&payload[..]].into_iter()) {}
        match burst.send() {
            Ok(count) => sent += count,
            Err(_) => thread::yield_now(), // the buffer is full
        }
    }
    println!("{sent}");
}

fn sink(address: &str) {
    let mut port = UdpPort::bind(address.parse().unwrap()).unwrap();
    let mut buffer = vec![0; 32 * SLOT];
    let mut received = [Received::NONE; 32];
    let (mut count, mut last) = (0, None);
    while last.is_none_or(|last: Instant| last.elapsed() < Duration::from_secs(1)) {
        match port.receive(&mut buffer, &mut received) {
            Ok(more) => {
                count += more;
                last = Some(Instant::now());
            }
            Err(_) => thread::sleep(Duration::from_micros(100)),
        }
    }
    println!("{count}");
}

/// Requests over TCP, one after the other.
fn latency(hosts: &[Host], target: &str) -> [f64; 2] {
    let exe = std::env::current_exe().unwrap();
    let address = format!("{target}:7777");
    let mut server = hosts[1].command(&exe);
    let _server = Process::start("server", server.args(["answer", &address]));
    thread::sleep(Duration::from_millis(100));
    let command = format!("{} ask {address}", exe.display());
    let text = hosts[0].try_run(&command).unwrap();
    let numbers: Vec<f64> = text.split_whitespace().map(|number| number.parse().unwrap()).collect();
    [numbers[0], numbers[1]]
}

fn answer(address: &str) {
    let (mut socket, _) = TcpListener::bind(address).unwrap().accept().unwrap();
    socket.set_nodelay(true).unwrap();
    let mut buffer = [0; REQUEST];
    while socket.read_exact(&mut buffer).is_ok() && socket.write_all(&buffer).is_ok() {}
}

fn ask(address: &str) {
    let mut socket = TcpStream::connect(address).unwrap();
    socket.set_nodelay(true).unwrap();
    let mut buffer = [0; REQUEST];
    let mut times: Vec<Duration> = (0..REQUESTS)
        .map(|_| {
            let start = Instant::now();
            socket.write_all(&buffer).unwrap();
            socket.read_exact(&mut buffer).unwrap();
            start.elapsed()
        })
        .collect();
    times.sort_unstable();
    let micros = |at: usize| times[at].as_secs_f64() * 1e6;
    println!("{} {}", micros(REQUESTS / 2), micros(REQUESTS * 99 / 100));
}
