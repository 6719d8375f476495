//! A world in a box: hosts as network namespaces on one bridge, containers behind them, a real etcd.
//!
//! ```text
//!   container 10.5.x.2 -- eth0 | c0 10.5.x.1 -- host -- eth0 192.168.77.11, fd77::11 --+
//!   container 10.5.y.2 -- eth0 | c0 10.5.y.1 -- host -- eth0 192.168.77.12, fd77::12 --+-- bridge -- etcd 192.168.77.1, fd77::1
//! ```
//!
//! Every world has names of its own, so worlds run side by side. A janitor process cleans up when the world is dropped, and
//! when the test process dies in whatever way.

#![allow(dead_code, unreachable_pub, missing_docs)] // each user needs a part of it
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::cell::Cell;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Bound of every wait that has no bound of its own.
pub const PATIENCE: Duration = Duration::from_secs(20);
const CLIENT_PORT: u16 = 2379;
/// The bridge's address, where etcd listens.
pub const STORE: &str = "192.168.77.1";

static WORLDS: AtomicU32 = AtomicU32::new(0);

/// The program under test, unless the environment names another.
pub fn binary() -> PathBuf {
    let built = option_env!("CARGO_BIN_EXE_flanneld").unwrap_or("target/release/flanneld");
    std::env::var_os("FLANNELD_UNDER_TEST").map_or_else(|| built.into(), PathBuf::from)
}

/// Waits until `condition` holds; gives up loudly.
#[track_caller]
pub fn until(what: &str, patience: Duration, mut condition: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    loop {
        if condition() {
            return start.elapsed();
        }
        assert!(start.elapsed() < patience, "waited {patience:?} in vain: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Runs a command line; its output if it succeeded.
pub fn try_run(command: &str) -> Result<String, String> {
    let mut words = command.split_whitespace();
    let output =
        Command::new(words.next().unwrap()).args(words).stdin(Stdio::null()).output().unwrap();
    finish(command, &output)
}

fn finish(command: &str, output: &Output) -> Result<String, String> {
    let (stdout, stderr) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.success() {
        Ok(stdout.into_owned())
    } else {
        Err(format!("{command}: {} {stdout}{stderr}", output.status))
    }
}

#[track_caller]
pub fn run(command: &str) -> String {
    try_run(command).unwrap_or_else(|error| panic!("{error}"))
}

/// A child process that ends with its owner.
#[derive(Debug)]
pub struct Process {
    child: Child,
    what: String,
}

impl Process {
    pub fn start(what: &str, command: &mut Command) -> Self {
        let child = command
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("start {what}: {error}"));
        Self { child, what: what.to_owned() }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, name: &str) {
        run(&format!("kill -{name} {}", self.pid()));
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        until(&format!("the end of {}", self.what), PATIENCE, || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    /// Page faults of children that have ended: not zero as soon as there was one.
    pub fn child_faults(&self) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        fields[8].parse().unwrap()
    }

    /// Processor time used so far, in ticks of 10 ms.
    pub fn ticks(&self) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }

    /// Time on a processor so far, all threads.
    pub fn cpu(&self) -> Duration {
        let mut nanos = 0;
        for task in fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap() {
            let text = fs::read_to_string(task.unwrap().path().join("schedstat")).unwrap();
            nanos += text.split(' ').next().unwrap().parse::<u64>().unwrap();
        }
        Duration::from_nanos(nanos)
    }

    /// The part of [`Process::ticks`] that was not in the kernel.
    pub fn user_ticks(&self) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        fields[11].parse().unwrap()
    }

    /// Peak resident memory in KiB.
    pub fn peak(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Namespaces and files that go away with it.
pub struct World {
    /// Prefix of every name.
    pub id: String,
    pub dir: PathBuf,
    janitor: Child,
    hosts: Cell<usize>,
}

/// Reads names of namespaces and the directory from its input; at its end removes them. It outlives signals to the group.
const JANITOR: &str = r#"
trap '' INT TERM HUP QUIT
names=; dir=
while read -r kind name; do
    case $kind in ns) names="$names $name";; dir) dir=$name;; esac
done
for name in $names; do
    ip netns pids "$name" 2>/dev/null | while read -r pid; do kill -9 "$pid" 2>/dev/null; done
done
for name in $names; do ip netns del "$name" 2>/dev/null; done
rm -rf "$dir"
"#;

impl World {
    /// The bridge, without hosts.
    pub fn new() -> Self {
        let number = WORLDS.fetch_add(1, Ordering::Relaxed);
        let id = format!("fl{}-{number}", std::process::id());
        let dir = std::env::temp_dir().join(&id);
        fs::create_dir_all(&dir).unwrap();
        let mut janitor = Command::new("setsid")
            .args(["sh", "-c", JANITOR])
            .stdin(Stdio::piped())
            .spawn()
            .expect("setsid and sh");
        writeln!(janitor.stdin.as_mut().unwrap(), "dir {}", dir.display()).unwrap();
        let mut world = Self { id, dir, janitor, hosts: Cell::new(0) };
        world.namespace("net");
        for command in [
            "ip link add br0 type bridge",
            "ip link set br0 up",
            "ip addr add 192.168.77.1/24 dev br0",
            "ip -6 addr add fd77::1/64 dev br0 nodad",
        ] {
            world.run_in("net", command);
        }
        world
    }

    fn namespace(&mut self, part: &str) {
        let name = self.ns(part);
        // the janitor must know before it exists
        writeln!(self.janitor.stdin.as_mut().unwrap(), "ns {name}").unwrap();
        run(&format!("ip netns add {name}"));
        self.run_in(part, "ip link set lo up");
    }

    fn ns(&self, part: &str) -> String {
        format!("{}-{part}", self.id)
    }

    /// A command in one of the namespaces.
    pub fn command(&self, part: &str, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.ns(part)]).arg(program);
        command
    }

    pub fn try_in(&self, part: &str, command: &str) -> Result<String, String> {
        try_run(&format!("ip netns exec {} {command}", self.ns(part)))
    }

    #[track_caller]
    pub fn run_in(&self, part: &str, command: &str) -> String {
        self.try_in(part, command).unwrap_or_else(|error| panic!("{error}"))
    }

    /// A thread in the namespace of the bridge, where the outside is.
    pub fn thread<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> thread::JoinHandle<T> {
        spawn_in(self.ns("net"), work)
    }

    /// One more host on the bridge.
    pub fn host(&mut self) -> Host {
        let number = self.hosts.get() + 1;
        self.hosts.set(number);
        let name = format!("h{number}");
        self.namespace(&name);
        self.namespace(&format!("c{number}"));
        let host =
            Host { world: self.ns(""), name, number, dir: self.dir.join(format!("h{number}")) };
        fs::create_dir_all(&host.dir).unwrap();
        host.plug_in();
        for setting in ["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"] {
            host.run(&format!("sysctl -q -w {setting}"));
        }
        host
    }

    pub fn hosts(&mut self, count: usize) -> Vec<Host> {
        (0..count).map(|_| self.host()).collect()
    }

    /// Starts etcd in the bridge's namespace, with both of its key spaces and what was stored before.
    pub fn etcd(&self, extra: &[&str]) -> Etcd {
        Etcd::start(self, extra)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if thread::panicking() {
            for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
                let log = entry.path().join("log");
                if let Ok(text) = fs::read_to_string(&log) {
                    let tail: Vec<&str> = text.lines().rev().take(25).collect();
                    eprintln!("--- {}", log.display());
                    tail.iter().rev().for_each(|line| eprintln!("{line}"));
                }
            }
        }
        drop(self.janitor.stdin.take());
        let _ = self.janitor.wait();
    }
}

/// A host: its namespace, its container's namespace, its files.
#[derive(Clone, Debug)]
pub struct Host {
    world: String,
    pub name: String,
    pub number: usize,
    pub dir: PathBuf,
}

impl Host {
    /// Connects `eth0` to the bridge.
    pub fn plug_in(&self) {
        let Self { world, name, number, .. } = self;
        for command in [
            format!(
                "ip -n {world}net link add {name} type veth peer name eth0 netns {world}{name}"
            ),
            format!("ip -n {world}net link set {name} master br0 up"),
            format!("ip -n {world}{name} addr add {}/24 dev eth0", self.ip()),
            format!("ip -n {world}{name} -6 addr add {}/64 dev eth0 nodad", self.ip6()),
            format!("ip -n {world}{name} link set eth0 up"),
            format!("ip -n {world}{name} route add default via 192.168.77.1"),
            format!("ip -n {world}{name} -6 route add default via fd77::1"),
        ] {
            run(&command);
        }
        let _ = number;
    }

    pub fn ip(&self) -> String {
        format!("192.168.77.{}", 10 + self.number)
    }

    pub fn ip6(&self) -> String {
        format!("fd77::{}", 10 + self.number)
    }

    #[track_caller]
    pub fn run(&self, command: &str) -> String {
        self.try_run(command).unwrap_or_else(|error| panic!("{error}"))
    }

    pub fn try_run(&self, command: &str) -> Result<String, String> {
        try_run(&format!("ip netns exec {}{} {command}", self.world, self.name))
    }

    pub fn try_in_container(&self, command: &str) -> Result<String, String> {
        try_run(&format!("ip netns exec {}c{} {command}", self.world, self.number))
    }

    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &format!("{}{}", self.world, self.name)]).arg(program);
        command
    }

    pub fn container_command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &format!("{}c{}", self.world, self.number)]).arg(program);
        command
    }

    /// A command line for a shell in the host's network namespace.
    #[track_caller]
    pub fn shell(&self, script: &str) -> String {
        let output = self.command("sh").args(["-c", script]).stdin(Stdio::null()).output().unwrap();
        finish(script, &output).unwrap_or_else(|error| panic!("{error}"))
    }

    /// A thread in the host's network namespace.
    pub fn thread<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> thread::JoinHandle<T> {
        spawn_in(format!("{}{}", self.world, self.name), work)
    }

    /// A thread in the container's network namespace.
    pub fn container_thread<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> thread::JoinHandle<T> {
        spawn_in(format!("{}c{}", self.world, self.number), work)
    }

    pub fn subnet_file(&self) -> PathBuf {
        self.dir.join("subnet.env")
    }

    /// A value of the subnet file.
    pub fn env(&self, name: &str) -> Option<String> {
        let text = fs::read_to_string(self.subnet_file()).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name}=")))?;
        Some(line.to_owned())
    }

    /// Starts the agent. The log goes on in one file through all of its lives.
    pub fn start(&self, args: &[&str]) -> Agent {
        let endpoint = format!("-etcd-endpoints=http://{STORE}:{CLIENT_PORT}");
        self.start_with(&[&[endpoint.as_str()], args].concat())
    }

    /// As [`Host::start`], without any endpoint.
    pub fn start_with(&self, args: &[&str]) -> Agent {
        self.start_from(&binary(), args)
    }

    pub fn start_from(&self, program: &Path, args: &[&str]) -> Agent {
        let mut command = self.command(program);
        command.arg(format!("-subnet-file={}", self.subnet_file().display()));
        command.arg(format!("-data-dir={}", self.dir.join("data").display()));
        command.args(args);
        self.start_command(command)
    }

    /// Starts an agent by this command, which is whole.
    pub fn start_command(&self, mut command: Command) -> Agent {
        let log = File::options().create(true).append(true).open(self.dir.join("log")).unwrap();
        command.stderr(log).stdout(Stdio::null());
        Agent {
            process: Process::start("flanneld", &mut command),
            host: self.clone(),
            from: self.log().len(),
        }
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// Connects the container as a runtime would, by the subnet file.
    pub fn add_container(&self) {
        let Self { world, name, number, .. } = self;
        let mtu = self.env("FLANNEL_MTU").expect("the subnet file");
        run(&format!(
            "ip -n {world}{name} link add c0 mtu {mtu} type veth peer name eth0 mtu {mtu} netns {world}c{number}"
        ));
        run(&format!("ip -n {world}{name} link set c0 up"));
        run(&format!("ip -n {world}c{number} link set eth0 up"));
        if let Some(gateway) = self.env("FLANNEL_SUBNET") {
            let ip = self.container_ip().unwrap();
            run(&format!("ip -n {world}{name} addr add {gateway} dev c0"));
            run(&format!("ip -n {world}c{number} addr add {ip}/24 dev eth0"));
            run(&format!(
                "ip -n {world}c{number} route add default via {}",
                gateway.split('/').next().unwrap()
            ));
        }
        if let Some(gateway) = self.env("FLANNEL_IPV6_SUBNET") {
            let ip = self.container_ip6().unwrap();
            run(&format!("ip -n {world}{name} -6 addr add {gateway} dev c0 nodad"));
            run(&format!("ip -n {world}c{number} -6 addr add {ip}/64 dev eth0 nodad"));
            run(&format!(
                "ip -n {world}c{number} -6 route add default via {}",
                gateway.split('/').next().unwrap()
            ));
        }
    }

    /// `10.5.x.2`.
    pub fn container_ip(&self) -> Option<String> {
        let gateway = self.env("FLANNEL_SUBNET")?;
        Some(format!("{}.2", gateway.rsplit_once('.')?.0))
    }

    pub fn container_ip6(&self) -> Option<String> {
        let gateway = self.env("FLANNEL_IPV6_SUBNET")?;
        Some(format!("{}:2", gateway.rsplit_once(':')?.0))
    }

    /// Pings from our container, with packets of the full MTU that must not be fragmented.
    pub fn ping(&self, ip: &str) -> Result<String, String> {
        let mtu: usize = self.env("FLANNEL_MTU").unwrap().parse().unwrap();
        let size = mtu - if ip.contains(':') { 48 } else { 28 };
        self.try_in_container(&format!("ping -n -c 1 -W 0.3 -M do -s {size} {ip}"))
    }

    /// Routes of the overlay, one a line.
    pub fn routes(&self) -> String {
        let v6 = self.run("ip -6 route show proto 241");
        self.run("ip -4 route show proto 241") + &v6
    }
}

fn spawn_in<T: Send + 'static>(
    namespace: String,
    work: impl FnOnce() -> T + Send + 'static,
) -> thread::JoinHandle<T> {
    thread::spawn(move || {
        flanneld::sys::netns::enter(&namespace).unwrap();
        work()
    })
}

/// One life of an agent.
#[derive(Debug)]
pub struct Agent {
    pub process: Process,
    pub host: Host,
    /// Where in the log this life begins.
    from: usize,
}

impl Agent {
    /// What this life has logged.
    pub fn log(&self) -> String {
        self.host.log().split_off(self.from)
    }

    #[track_caller]
    pub fn wait_for(&self, text: &str) -> Duration {
        until(&format!("{text:?} in the log of {}", self.host.name), PATIENCE, || {
            self.log().contains(text)
        })
    }

    #[track_caller]
    pub fn wait_ready(&self) {
        self.wait_for("] ready");
    }

    /// SIGTERM, and the exit status.
    #[track_caller]
    pub fn stop(mut self) -> ExitStatus {
        self.process.signal("TERM");
        self.process.wait()
    }

    pub fn kill(mut self) {
        self.process.signal("KILL");
        self.process.wait();
    }
}

/// A running etcd.
pub struct Etcd {
    process: Process,
    ns: String,
    dir: PathBuf,
    extra: Vec<String>,
    scheme: &'static str,
    /// Arguments that etcdctl needs to be let in.
    pub access: Vec<String>,
}

impl Etcd {
    fn start(world: &World, extra: &[&str]) -> Self {
        let (ns, dir) = (world.ns("net"), world.dir.join("etcd"));
        let extra: Vec<String> = extra.iter().map(ToString::to_string).collect();
        let scheme =
            if extra.iter().any(|arg| arg.starts_with("--cert-file")) { "https" } else { "http" };
        let process = Self::spawn(&ns, &dir, &extra, scheme);
        let etcd = Self { process, ns, dir, extra, scheme, access: Vec::new() };
        etcd.wait_up();
        etcd
    }

    fn spawn(ns: &str, dir: &Path, extra: &[String], scheme: &str) -> Process {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", ns, "etcd", "--enable-v2", "--data-dir"]).arg(dir);
        command.arg(format!(
            "--listen-client-urls={scheme}://{STORE}:{CLIENT_PORT},http://127.0.0.1:{CLIENT_PORT}"
        ));
        command.arg(format!("--advertise-client-urls={scheme}://{STORE}:{CLIENT_PORT}"));
        // test data need not survive a power cut
        command.args([
            "--unsafe-no-fsync",
            "--log-level=error",
            "--listen-peer-urls=http://127.0.0.1:2380",
        ]);
        command.args(extra).stdout(Stdio::null()).stderr(Stdio::null());
        Process::start("etcd", &mut command)
    }

    /// Waits until it answers.
    pub fn wait_up(&self) {
        until("etcd answers", PATIENCE, || {
            let health = "curl -s -m 1 http://127.0.0.1:2379/health";
            try_run(&format!("ip netns exec {} {health}", self.ns))
                .is_ok_and(|text| text.contains("true"))
        });
    }

    pub fn ctl(&self, args: &[&str]) -> String {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.ns, "etcdctl", "--endpoints=http://127.0.0.1:2379"]);
        let output =
            command.args(&self.access).args(args).env("ETCDCTL_API", "3").output().unwrap();
        finish(&format!("etcdctl {args:?}"), &output).unwrap_or_else(|error| panic!("{error}"))
    }

    /// A request to the v2 keys API.
    pub fn v2(&self, method: &str, key: &str, data: &[&str]) -> String {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.ns, "curl", "-s", "-m", "5", "-X", method]);
        for datum in data {
            command.args(["--data-urlencode", datum]);
        }
        command.arg(format!("http://127.0.0.1:2379/v2/keys{key}"));
        finish("curl", &command.output().unwrap()).unwrap()
    }

    pub fn put_config(&self, api: &str, config: &str) {
        match api {
            "v2" => {
                drop(self.v2("PUT", "/coreos.com/network/config", &[&format!("value={config}")]))
            }
            _ => drop(self.ctl(&["put", "/coreos.com/network/config", config])),
        }
    }

    /// Key and value of every lease in the v3 space, in turns.
    pub fn leases(&self) -> Vec<String> {
        let text = self.ctl(&["get", "--prefix", "/coreos.com/network/subnets/"]);
        text.lines().map(str::to_owned).collect()
    }

    pub fn put_lease(&self, key: &str, value: &str) {
        self.ctl(&["put", &format!("/coreos.com/network/subnets/{key}"), value]);
    }

    pub fn delete_lease(&self, key: &str) {
        self.ctl(&["del", &format!("/coreos.com/network/subnets/{key}")]);
    }

    pub fn pause(&self) {
        self.process.signal("STOP");
    }

    pub fn go_on(&self) {
        self.process.signal("CONT");
    }

    pub fn kill(&mut self) {
        self.process.signal("KILL");
        self.process.wait();
    }

    /// After [`Etcd::kill`]: with its data, or without.
    pub fn restart(&mut self, wiped: bool) {
        if wiped {
            fs::remove_dir_all(&self.dir).unwrap();
        }
        self.process = Self::spawn(&self.ns, &self.dir, &self.extra, self.scheme);
        self.wait_up();
    }

    /// Goes on from a snapshot that `etcdctl snapshot save` has made.
    pub fn restore(&mut self, snapshot: &Path) {
        self.kill();
        fs::remove_dir_all(&self.dir).unwrap();
        let mut command = Command::new("etcdctl");
        command.args(["snapshot", "restore"]).arg(snapshot).arg("--data-dir").arg(&self.dir);
        let output = command.env("ETCDCTL_API", "3").output().unwrap();
        finish("etcdctl snapshot restore", &output).unwrap_or_else(|error| panic!("{error}"));
        self.process = Self::spawn(&self.ns, &self.dir, &self.extra, self.scheme);
        self.wait_up();
    }

    /// Current revision of the v3 space.
    pub fn revision(&self) -> u64 {
        let text = self.ctl(&["get", "nothing", "-w", "json"]);
        let rest = text.split("\"revision\":").nth(1).unwrap();
        rest.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
    }

    /// Requests served so far.
    pub fn requests(&self) -> u64 {
        let metrics = "curl -s http://127.0.0.1:2379/metrics";
        let text = try_run(&format!("ip netns exec {} {metrics}", self.ns)).unwrap();
        let lines = text.lines().filter(|line| line.starts_with("grpc_server_started_total{"));
        lines.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
    }
}

/// Long-lived traffic between two containers that counts what is lost.
pub struct Flow {
    child: Child,
}

impl Flow {
    /// A ping every 10 ms.
    pub fn start(from: &Host, ip: &str) -> Self {
        let mut command = from.container_command("ping");
        let child =
            command.args(["-n", "-q", "-i", "0.01", ip]).stdout(Stdio::piped()).spawn().unwrap();
        Self { child }
    }

    /// Ends it: packets sent and lost.
    pub fn stop(mut self) -> (u64, u64) {
        thread::sleep(Duration::from_millis(200));
        run(&format!("kill -INT {}", self.child.id()));
        let mut text = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        let _ = self.child.wait();
        let line = text
            .lines()
            .find(|line| line.contains("packets transmitted"))
            .unwrap_or_else(|| panic!("{text}"));
        let numbers: Vec<u64> =
            line.split([' ', ',']).filter_map(|word| word.parse().ok()).collect();
        (numbers[0], numbers[0] - numbers[1])
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An HTTP answer's status line and body, asked for in the namespace of `host`.
pub fn http_get(host: &Host, url: &str) -> String {
    host.try_run(&format!("curl -s -m 2 -w :%{{http_code}} {url}")).unwrap_or_default()
}

/// Is somebody listening there? For waits.
pub fn listens(address: &str) -> bool {
    TcpStream::connect(address).is_ok()
}
