//! One life of an agent's traffic rules, against the kernel of the calling thread's network namespace.

#![allow(dead_code, unreachable_pub, missing_docs)] // each user needs a part of it
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use flanneld::family::Family;
use flanneld::firewall::choose::{Facts, Mode};
use flanneld::firewall::legacy::{self, Finished, Legacy, Tools, Variant};
use flanneld::firewall::nft::Native;
use flanneld::firewall::plan::Share;
use flanneld::firewall::{Event, Firewall, Options, Port};
use flanneld::sys::netns;

pub const PATIENCE: Duration = Duration::from_secs(10);
pub const NETWORKS: [&str; 2] = ["10.244.0.0/16", "2001:cafe:42::/56"];
pub const SUBNETS: [&str; 2] = ["10.244.1.0/24", "2001:cafe:42:1::/64"];

pub fn try_run(command: &str) -> Result<String, String> {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    if output.status.success() {
        Ok(text)
    } else {
        Err(format!("{command}: {text}{}", String::from_utf8_lossy(&output.stderr)))
    }
}

#[track_caller]
pub fn run(command: &str) -> String {
    try_run(command).unwrap_or_else(|error| panic!("{error}"))
}

pub fn host() {
    netns::unshare().unwrap();
    run("ip link set lo up");
}

pub fn tools() -> [Option<Tools>; 2] {
    let path = std::env::var_os("PATH").unwrap();
    Family::ALL.map(|family| legacy::find_tools(&path, family))
}

pub fn share(at: usize) -> Option<Share> {
    Some(Share { network: NETWORKS[at].parse().unwrap(), subnet: SUBNETS[at].parse().unwrap() })
}

pub fn both() -> [Option<Share>; 2] {
    [share(0), share(1)]
}

pub fn options(mode: Mode) -> Options {
    Options {
        masquerade: true,
        fully_random: true,
        forward: true,
        resync: Some(Duration::from_millis(200)),
        mode: Some(mode),
    }
}

/// One life of an agent's rules. Programs run one at a time, and count.
pub struct Life {
    pub firewall: Firewall,
    port: Port,
    pub events: Vec<Event>,
    pub commands: Vec<String>,
    pub lock: PathBuf,
}

impl Life {
    pub fn begin(options: Options) -> Self {
        // old tables that hold nothing do not count; those that do are all there are in this namespace
        let in_use = ["iptables", "ip6tables"].map(|program| {
            let saved = run(&format!("{program}-legacy-save"));
            saved.contains("\n-A ") || saved.contains("FLANNEL")
        });
        Self::begin_with(options, Facts { host: Some(Variant::Nft), ..Facts::default() }, in_use)
    }

    /// Without a look at what there is: either all of the old tables are in use, or none.
    pub fn begin_in_use(options: Options, in_use: bool) -> Self {
        Self::begin_with(options, Facts::default(), [in_use, false])
    }

    pub fn begin_with(options: Options, facts: Facts, in_use: [bool; 2]) -> Self {
        Self::begin_from(options, facts, Legacy::new(tools(), in_use, 7, Instant::now()))
    }

    /// On a host without programs for the old tables.
    pub fn without_programs(options: Options) -> Self {
        let legacy = Legacy::new([None, None], [false; 2], 7, Instant::now());
        Self::begin_from(options, Facts::default(), legacy)
    }

    fn begin_from(options: Options, facts: Facts, legacy: Legacy) -> Self {
        let native = Native::new(7, Instant::now());
        let facts = Facts { forced: options.mode, legacy_tools: true, ..facts };
        let id = format!("flanneld-lock-{}-{:?}", std::process::id(), thread::current().id());
        Self {
            firewall: Firewall::new(options, facts, native, legacy),
            port: Port::open().unwrap(),
            events: Vec::new(),
            commands: Vec::new(),
            lock: std::env::temp_dir().join(id),
        }
    }

    pub fn set(&mut self, shares: [Option<Share>; 2]) {
        self.firewall.set(shares, &[], false, Instant::now());
    }

    pub fn turn(&mut self) {
        let now = Instant::now();
        while self.port.turn(&mut self.firewall, now).unwrap() {}
        while let Some(command) = self.firewall.poll_command(now) {
            let name = command.program.file_name().unwrap().to_string_lossy().into_owned();
            self.commands.push(name);
            let finished = run_command(&command, &self.lock);
            self.firewall.handle_finished(&finished, now);
        }
        while let Some(event) = self.firewall.poll_event(now) {
            self.events.push(event);
        }
    }

    #[track_caller]
    pub fn run_until(
        &mut self,
        what: &str,
        mut reached: impl FnMut(&mut Self) -> bool,
    ) -> Duration {
        let start = Instant::now();
        loop {
            self.turn();
            if reached(self) {
                return start.elapsed();
            }
            assert!(start.elapsed() < PATIENCE, "{what}: {:?}", self.events);
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Everything is in place, and nothing more happens.
    #[track_caller]
    pub fn settle(&mut self) -> Duration {
        self.run_until("rules in place", |life| {
            life.firewall.is_in_place() && life.firewall.is_clean()
        })
    }

    /// Lets time pass.
    pub fn idle(&mut self, time: Duration) {
        let start = Instant::now();
        while start.elapsed() < time {
            self.turn();
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Runs a program to its end, with a lock of its own.
pub fn run_command(command: &legacy::Command, lock: &std::path::Path) -> Finished {
    let mut child = Command::new(&command.program)
        .args(&command.args)
        .env("XTABLES_LOCKFILE", lock)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(command.input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    Finished {
        status: output.status.code(),
        output: output.stdout,
        complaint: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.lock);
    }
}

/// Ten thousand rules and chains that a kube-proxy and others may have written, half of them where we look; and the command
/// that shows them.
pub fn many_rules_of_others(program: &str) -> String {
    let mut text = String::from("*nat\n");
    (0..5000).for_each(|n| text += &format!(":KUBE-SVC-{n} - [0:0]\n"));
    for n in 0..5000 {
        text += &format!("-A KUBE-SVC-{n} -d 10.96.{}.{}/32 -j RETURN\n", n / 256, n % 256);
    }
    for n in 0..2500 {
        text += &format!("-A POSTROUTING -s 172.16.{}.{}/32 -j ACCEPT\n", n / 256, n % 256);
        text += &format!("-A POSTROUTING -s 172.17.{}.{}/32 -o eth0 -j ACCEPT\n", n / 256, n % 256);
    }
    text += "COMMIT\n";
    let id = format!("flanneld-many-{}-{:?}", std::process::id(), thread::current().id());
    let path = std::env::temp_dir().join(id);
    fs::write(&path, text).unwrap();
    run(&format!("{program}-restore < '{}'", path.display()));
    fs::remove_file(path).unwrap();
    format!("{program}-save | grep -e KUBE -e 172.1")
}
