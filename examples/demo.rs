//! Three hosts join an overlay and reach each other, drawn in the terminal. See `make demo`.
#![allow(clippy::print_stdout, clippy::unwrap_used, clippy::disallowed_methods)]

#[path = "../tests/lab/world.rs"]
mod world;

use std::process::Stdio;
use std::time::Duration;

use world::{Agent, Host, PATIENCE, Process, World, until};

const CONFIG: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;

fn main() {
    println!("\n  three hosts, as network namespaces on one bridge, with a real etcd\n");
    let mut world = World::new();
    let etcd = world.etcd(&[]);
    etcd.put_config("v3", CONFIG);
    println!("  $ etcdctl put /coreos.com/network/config '{CONFIG}'");
    let hosts = world.hosts(3);
    println!("  $ flanneld --etcd-endpoints=http://192.168.77.1:2379      (on each host)\n");
    let agents: Vec<Agent> = hosts.iter().map(|host| host.start(&[])).collect();
    agents.iter().for_each(Agent::wait_ready);
    for host in &hosts {
        until("all routes", PATIENCE, || host.routes().lines().count() == hosts.len() - 1);
    }
    hosts.iter().for_each(Host::add_container);

    picture(&hosts);
    println!("  leases in etcd");
    for pair in etcd.leases().chunks(2) {
        println!("    {}  {}", pair[0].rsplit('/').next().unwrap(), pair[1]);
    }
    println!("\n  routes of {}", hosts[0].name);
    hosts[0].routes().lines().for_each(|line| println!("    {}", line.trim_end()));
    println!("\n  pings between containers, 1450 bytes, not to be fragmented (ms)");
    pings(&hosts);
    println!("\n  TCP from container to container: {}", throughput(&hosts[0], &hosts[1]));
    println!("\n  kill -9 of an agent under traffic, and its restart");
    let mut agents = agents;
    let flow = world::Flow::start(&hosts[0], &hosts[1].container_ip().unwrap());
    agents.remove(0).kill();
    std::thread::sleep(Duration::from_millis(300));
    let again = hosts[0].start(&[]);
    again.wait_ready();
    let (sent, lost) = flow.stop();
    let written = again.log().contains(", 0 kernel writes");
    println!(
        "    {lost} of {sent} pings lost, {}",
        if written {
            "nothing had to be written to the kernel"
        } else {
            "the kernel was written to"
        }
    );
    let peaks: Vec<String> =
        agents.iter().map(|agent| format!("{} KiB", agent.process.peak())).collect();
    println!("\n  peak memory of the agents: {}", peaks.join(", "));
    println!("\n  everything is removed again\n");
}

fn picture(hosts: &[Host]) {
    let cells: Vec<[String; 5]> = hosts
        .iter()
        .map(|host| {
            let subnet = host.env("FLANNEL_SUBNET").unwrap();
            [
                format!("container {}", host.container_ip().unwrap()),
                "│".into(),
                format!("{subnet}  c0"),
                "flannel.1 (vxlan)".into(),
                format!("eth0 {}", host.ip()),
            ]
        })
        .collect();
    let row = |number: usize| {
        cells.iter().map(|cell| format!("│{:^24}│", cell[number])).collect::<Vec<_>>().join("  ")
    };
    let rule = |left: char, fill: &str, right: char| {
        hosts
            .iter()
            .map(|_| format!("{left}{}{right}", fill.repeat(24)))
            .collect::<Vec<_>>()
            .join("  ")
    };
    let names =
        hosts.iter().map(|host| format!("{:^26}", host.name)).collect::<Vec<_>>().join("  ");
    println!("  {}", names.trim_end());
    println!("  {}", rule('┌', "─", '┐'));
    for number in 0..5 {
        println!("  {}", row(number));
    }
    println!(
        "  {}",
        hosts
            .iter()
            .map(|_| format!("└{}┬{}┘", "─".repeat(12), "─".repeat(11)))
            .collect::<Vec<_>>()
            .join("  ")
    );
    let width = 28 * (hosts.len() - 1);
    let mut line = String::from("└");
    for position in 1..width {
        line.push(if position % 28 == 0 { '┴' } else { '─' });
    }
    line.push('┘');
    println!("  {}{line}", " ".repeat(13));
    println!("  {}bridge, etcd 192.168.77.1\n", " ".repeat(30));
}

fn pings(hosts: &[Host]) {
    print!("    {:8}", "");
    hosts.iter().for_each(|host| print!("{:>10}", host.name));
    println!();
    for from in hosts {
        print!("    {:8}", from.name);
        for to in hosts {
            if to.number == from.number {
                print!("{:>10}", "-");
                continue;
            }
            let mut text = String::new();
            until("a ping", PATIENCE, || match from.ping(&to.container_ip().unwrap()) {
                Ok(output) => {
                    text = output;
                    true
                }
                Err(_) => false,
            });
            let time = text
                .split("time=")
                .nth(1)
                .and_then(|rest| rest.split(' ').next())
                .unwrap_or("?")
                .to_owned();
            print!("{time:>10}");
        }
        println!();
    }
}

fn throughput(from: &Host, to: &Host) -> String {
    let mut server = to.container_command("iperf3");
    let _server = Process::start("iperf3", server.args(["-s", "-1"]).stdout(Stdio::null()));
    let client = format!("iperf3 -c {} -t 2 --connect-timeout 1000", to.container_ip().unwrap());
    let mut text = String::new();
    until("the transfer", PATIENCE, || match from.try_in_container(&client) {
        Ok(output) => {
            text = output;
            true
        }
        Err(_) => false,
    });
    let line = text.lines().find(|line| line.contains("receiver")).unwrap_or_default();
    let words: Vec<&str> = line.split_whitespace().collect();
    let unit = words.iter().position(|word| word.ends_with("bits/sec")).unwrap();
    format!("{} {}", words[unit - 1], words[unit])
}
