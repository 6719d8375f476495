//! Nothing changes, so nothing happens: no write to the kernel, no request to the store, no line in the log, no processor time.

use std::io::Read;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use super::world::{Agent, Process, World};

#[test]
fn a_quiet_minute() {
    let mut world = World::new();
    let etcd = world.etcd(&[]);
    etcd.put_config(
        "v3",
        r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","DirectRouting":true}}"#,
    );
    let hosts = world.hosts(2);
    let agents: Vec<Agent> =
        hosts.iter().map(|host| host.start(&["-v=2", "-ip-masq", "-ip-blackhole-route"])).collect();
    agents.iter().for_each(Agent::wait_ready);
    // the view is saved five seconds after the last change
    thread::sleep(Duration::from_secs(7));
    let mut monitor = hosts[0].command("ip");
    let log = std::fs::File::create(hosts[0].dir.join("monitor")).unwrap();
    let monitor = Process::start(
        "ip monitor",
        monitor.args(["monitor", "link", "address", "route"]).stdout(Stdio::from(log)),
    );
    let log = std::fs::File::create(hosts[0].dir.join("ruleset")).unwrap();
    let mut nft = hosts[0].command("nft");
    let nft = Process::start("nft monitor", nft.args(["monitor"]).stdout(Stdio::from(log)));
    let before = (etcd.revision(), etcd.requests(), agents[0].log(), agents[0].process.ticks());
    // an audit falls into it
    thread::sleep(Duration::from_secs(68));
    drop((monitor, nft));
    for monitor in ["monitor", "ruleset"] {
        let mut seen = String::new();
        std::fs::File::open(hosts[0].dir.join(monitor)).unwrap().read_to_string(&mut seen).unwrap();
        assert_eq!(seen, "", "{monitor}");
    }
    // on the usual way nothing else is ever run, so nothing takes the lock of iptables either
    assert_eq!(agents[0].process.child_faults(), 0);
    assert_eq!(etcd.revision(), before.0);
    // the two looks at the revision are requests as well
    assert!(etcd.requests() <= before.1 + 2, "{} requests", etcd.requests() - before.1);
    assert_eq!(agents[0].log(), before.2);
    let ticks = agents[0].process.ticks() - before.3;
    assert!(ticks <= 2, "{ticks} ticks of 10 ms");
}
