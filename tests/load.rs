//! The udp backend under load: what it carries stays whole while everything around it changes, and on the wire there is one
//! packet a datagram, as the Go flanneld sends and takes them. Needs root, and the machine to itself: the lab's other tests
//! count lost packets.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)] // helpers of tests; the tests wait

mod model;
#[path = "lab/world.rs"]
mod world;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use flanneld::sys::tun::Tun;

use world::{Agent, Host, PATIENCE, STORE, World, binary, http_get, run, until};

const CONFIG: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"udp"}}"#;
/// What the long transfer moves, unless the environment says otherwise.
const BYTES: u64 = 2 << 30;
/// Bytes that are compared at once.
const BLOCK: usize = 1 << 16;

/// Block `number` of the stream, which has 64 different ones.
fn block(number: u64) -> Vec<u8> {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = vec![0; BLOCK];
    for word in bytes.as_chunks_mut::<8>().0 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *word = state.to_le_bytes();
    }
    bytes
}

/// A transfer between containers whose every byte is compared with what was sent.
struct Transfer {
    sender: thread::JoinHandle<()>,
    receiver: thread::JoinHandle<()>,
    moved: Arc<AtomicU64>,
}

impl Transfer {
    fn start(from: &Host, to: &Host, ip: IpAddr, bytes: u64) -> Self {
        let moved = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&moved);
        let receiver = to.container_thread(move || serve(ip, bytes, &counter));
        let sender = from.container_thread(move || ask(ip, bytes));
        Self { sender, receiver, moved }
    }

    fn moved(&self) -> u64 {
        self.moved.load(Ordering::Relaxed)
    }

    fn finish(self) {
        self.receiver.join().unwrap();
        self.sender.join().unwrap();
    }
}

/// The longest time without a packet, of a flow with one every millisecond.
struct Gap {
    stop: Arc<AtomicBool>,
    sender: thread::JoinHandle<()>,
    receiver: thread::JoinHandle<Duration>,
}

impl Gap {
    fn start(from: &Host, to: &Host, ip: &str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let address: SocketAddr = format!("{ip}:4001").parse().unwrap();
        let (done, end) = (Arc::clone(&stop), Arc::clone(&stop));
        let receiver = to.container_thread(move || {
            let socket = UdpSocket::bind(address).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
            let (mut longest, mut last) = (Duration::ZERO, None);
            while !done.load(Ordering::Relaxed) {
                if socket.recv(&mut [0; 16]).is_ok() {
                    let now = Instant::now();
                    if let Some(last) = last.replace(now) {
                        longest = longest.max(now - last);
                    }
                }
            }
            longest
        });
        let sender = from.container_thread(move || {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            while !end.load(Ordering::Relaxed) {
                let _ = socket.send_to(b"tick", address); // there may be no route meanwhile
                thread::sleep(Duration::from_millis(1));
            }
        });
        Self { stop, sender, receiver }
    }

    fn stop(self) -> Duration {
        self.stop.store(true, Ordering::Relaxed);
        self.sender.join().unwrap();
        self.receiver.join().unwrap()
    }
}

/// A line of the status page, which may take a moment under load.
fn status(host: &Host, name: &str) -> String {
    let mut value = None;
    until(name, PATIENCE, || {
        let page = http_get(host, "http://127.0.0.1:8090/status");
        value =
            page.lines().find_map(|line| line.strip_prefix(&format!("{name} "))).map(str::to_owned);
        value.is_some()
    });
    value.unwrap()
}

/// Stands before the C library: while a file is there, runs are refused as an interface does that computes no checksums.
const REFUSE_RUNS: &str = r#"
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>
int sendmmsg(int fd, struct mmsghdr *messages, unsigned count, int flags) {
    if (messages[0].msg_hdr.msg_controllen && access(getenv("REFUSE_RUNS"), F_OK) == 0) {
        errno = EIO;
        return -1;
    }
    return syscall(SYS_sendmmsg, fd, messages, count, flags);
}
"#;

/// A program that starts the agent behind [`REFUSE_RUNS`], and the file. The agent must be linked dynamically.
fn with_refused_runs(world: &World) -> (PathBuf, PathBuf) {
    let path = |name: &str| world.dir.join(name);
    let (source, library, script, switch) =
        (path("refuse.c"), path("refuse.so"), path("flanneld.sh"), path("refuse"));
    fs::write(&source, REFUSE_RUNS).unwrap();
    run(&format!("gcc -shared -fPIC -o {} {}", library.display(), source.display()));
    let text = format!(
        "#!/bin/sh\nexport REFUSE_RUNS={} LD_PRELOAD={}\nexec {} \"$@\"\n",
        switch.display(),
        library.display(),
        fs::canonicalize(binary()).unwrap().display()
    );
    fs::write(&script, text).unwrap();
    run(&format!("chmod +x {}", script.display()));
    (script, switch)
}

/// Gigabytes by TCP, compared byte for byte, while leases come and go, the underlay's MTU changes so that runs are refused and
/// given up, and the agent is killed and started again.
#[test]
fn a_long_transfer_stays_whole_whatever_happens() {
    let bytes = std::env::var("FLANNELD_TEST_BYTES").map_or(BYTES, |text| text.parse().unwrap());
    let mut world = World::new();
    let etcd = world.etcd(&[]);
    etcd.put_config("v3", CONFIG);
    let hosts = world.hosts(2);
    let (program, switch) = with_refused_runs(&world);
    let start = |host: &Host| {
        let endpoint = format!("-etcd-endpoints=http://{STORE}:2379");
        host.start_from(&program, &[&endpoint, "-healthz-port=8090", "-healthz-ip=127.0.0.1"])
    };
    let mut agents: Vec<Agent> = hosts.iter().map(start).collect();
    agents.iter().for_each(Agent::wait_ready);
    hosts.iter().for_each(Host::add_container);
    assert_eq!(status(&hosts[0], "offloads"), "TSO USO Merge GSO GRO Batch");
    let target: IpAddr = hosts[1].container_ip().unwrap().parse().unwrap();
    let transfer = Transfer::start(&hosts[0], &hosts[1], target, bytes);
    let progress = |part: u64| {
        let goal = bytes * part / 10;
        until(&format!("{part} tenths"), Duration::from_secs(120), || {
            assert!(!transfer.receiver.is_finished() || transfer.moved() >= bytes, "it broke off");
            transfer.moved() >= goal
        });
    };

    progress(1);
    // timers, the store and netlink get their turns
    for number in 0..10 {
        let key = format!("10.5.{}.0-24", 240 + number);
        let before = status(&hosts[0], "peers");
        etcd.put_lease(&key, &format!(r#"{{"PublicIP":"192.168.77.{}"}}"#, 100 + number));
        let seen =
            until("the peer", Duration::from_secs(5), || status(&hosts[0], "peers") != before);
        assert!(seen < Duration::from_secs(1), "a lease took {seen:?}");
        etcd.delete_lease(&key);
        until("its end", Duration::from_secs(5), || status(&hosts[0], "peers") == before);
    }
    hosts[0].run("ip route del 10.5.0.0/16 dev flannel0");
    let healed = until("the route", PATIENCE, || hosts[0].run("ip route").contains("10.5.0.0/16"));
    assert!(healed < Duration::from_secs(1), "the route took {healed:?}");

    progress(2);
    // the underlay carries less from now on: senders are told, and it goes on
    hosts[0].run("ip link set eth0 mtu 1300");
    progress(4);
    let [refused, told]: [u64; 2] =
        ["dropped_too_big", "icmp_replies"].map(|name| status(&hosts[0], name).parse().unwrap());
    assert!(refused > 0 && told > 0, "{refused} refused, {told} told");
    assert_eq!(status(&hosts[0], "offloads"), "TSO USO Merge GSO GRO Batch", "that is the way's");
    hosts[0].run("ip link set eth0 mtu 1500");

    // the interface takes no runs any more: they go singly, and then are given up
    fs::write(&switch, "").unwrap();
    agents[0].wait_for("offload GSO does not work here");
    assert_eq!(status(&hosts[0], "offloads"), "TSO USO Merge GRO Batch");
    progress(5);
    fs::remove_file(&switch).unwrap();

    progress(6);
    let gap = Gap::start(&hosts[0], &hosts[1], &target.to_string());
    thread::sleep(Duration::from_millis(300));
    agents.remove(0).kill();
    let again = start(&hosts[0]);
    again.wait_ready();
    thread::sleep(Duration::from_millis(300));
    let gap = gap.stop();
    eprintln!("kill -9 and start again: {gap:?} without a packet");
    assert!(gap < Duration::from_secs(2), "{gap:?}");
    assert_eq!(status(&hosts[0], "offloads"), "TSO USO Merge GSO GRO Batch");
    progress(10);
    transfer.finish();
}

/// The other host is what the Go flanneld's proxy is: one `read` and one `sendto` a packet, no offload, no look at anything but
/// the address. It sees one right packet in every datagram, and what it sends is taken.
#[test]
fn a_host_without_offloads_is_a_peer() {
    const PEER: Ipv4Addr = Ipv4Addr::new(10, 5, 240, 0);
    let mut world = World::new();
    let etcd = world.etcd(&[]);
    etcd.put_config("v3", CONFIG);
    let (host, peer) = (world.host(), world.host());
    let agent = host.start(&["-healthz-port=8090", "-healthz-ip=127.0.0.1"]);
    agent.wait_ready();
    host.add_container();
    etcd.put_lease("10.5.240.0-24", &format!(r#"{{"PublicIP":"{}"}}"#, peer.ip()));
    let stop = Arc::new(AtomicBool::new(false));
    let proxy = {
        let (stop, local, to) = (Arc::clone(&stop), peer.ip(), format!("{}:8285", host.ip()));
        peer.thread(move || go_proxy(&local, &to, &stop))
    };
    until("its device", PATIENCE, || peer.try_run("ip link show flannel0").is_ok());
    for command in [
        format!("ip addr add {PEER}/32 dev flannel0"),
        "ip link set flannel0 mtu 1472 up".to_owned(),
        "ip route add 10.5.0.0/16 dev flannel0".to_owned(),
    ] {
        peer.run(&command);
    }
    // both ways at once, long and short packets
    let total = 64 << 20;
    let container: IpAddr = host.container_ip().unwrap().parse().unwrap();
    let ends = [
        peer.thread(move || serve(PEER.into(), total, &AtomicU64::new(0))),
        host.container_thread(move || serve(container, total, &AtomicU64::new(0))),
        host.container_thread(move || ask(PEER.into(), total)),
        peer.thread(move || ask(container, total)),
    ];
    ends.into_iter().for_each(|end| end.join().unwrap());
    assert!(host.try_in_container(&format!("ping -n -c 3 -i 0.1 -W 1 {PEER}")).is_ok());
    let offloads = status(&host, "offloads");
    assert_eq!(offloads, "TSO USO Merge GSO GRO Batch");
    stop.store(true, Ordering::Relaxed);
    let (seen, longest) = proxy.join().unwrap();
    assert!(seen > 1000, "{seen}");
    assert_eq!(longest, 1472, "full packets were among them");
}

/// Takes `total` bytes, counts them, and says that they were right.
fn serve(ip: IpAddr, total: u64, moved: &AtomicU64) {
    let listener = TcpListener::bind((ip, 4000)).unwrap();
    let (mut socket, _) = listener.accept().unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut bytes = vec![0; BLOCK];
    let blocks: Vec<Vec<u8>> = (0..64).map(block).collect();
    for number in 0..usize::try_from(total).unwrap() / BLOCK {
        socket.read_exact(&mut bytes).unwrap();
        assert!(bytes == blocks[number % 64], "block {number} is damaged");
        moved.fetch_add(BLOCK as u64, Ordering::Relaxed);
    }
    socket.write_all(b"whole").unwrap();
}

fn ask(ip: IpAddr, total: u64) {
    let start = Instant::now();
    let mut socket = loop {
        match TcpStream::connect_timeout(&(ip, 4000).into(), Duration::from_secs(1)) {
            Ok(socket) => break socket,
            Err(error) => assert!(start.elapsed() < PATIENCE, "{error}"),
        }
        thread::sleep(Duration::from_millis(20));
    };
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let blocks: Vec<Vec<u8>> = (0..64).map(block).collect();
    for number in 0..usize::try_from(total).unwrap() / BLOCK {
        socket.write_all(&blocks[number % 64]).unwrap();
    }
    let mut answer = [0; 5];
    socket.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"whole");
}

/// Moves packets one at a time and checks each that comes. Returns how many came and the length of the longest.
fn go_proxy(local: &str, to: &str, stop: &AtomicBool) -> (u64, usize) {
    let socket = UdpSocket::bind(format!("{local}:8285")).unwrap();
    socket.set_nonblocking(true).unwrap();
    let tun = Tun::open("flannel%d", false).unwrap();
    let (mut seen, mut longest) = (0, 0);
    let mut buffer = vec![0; 65_536];
    while !stop.load(Ordering::Relaxed) {
        let mut idle = true;
        match tun.recv(&mut buffer) {
            Ok(len) if buffer[0] >> 4 == 4 => {
                idle = false;
                model::take_hop(&mut buffer[..len]);
                let _ = socket.send_to(&buffer[..len], to);
            }
            Ok(_) => idle = false,
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}"),
        }
        if let Ok((len, from)) = socket.recv_from(&mut buffer) {
            idle = false;
            assert_eq!(from.to_string(), to);
            let datagram = &mut buffer[..len];
            check(datagram);
            (seen, longest) = (seen + 1, longest.max(len));
            model::take_hop(datagram);
            let _ = tun.send(&[std::io::IoSlice::new(datagram)]);
        }
        if idle {
            thread::sleep(Duration::from_micros(50));
        }
    }
    (seen, longest)
}

/// One right packet, and nothing else.
fn check(datagram: &[u8]) {
    assert!(datagram.len() <= 1472 && datagram[0] == 0x45, "{datagram:02x?}");
    let mut sealed = datagram.to_vec();
    model::seal_ip(&mut sealed);
    if matches!(datagram[9], 6 | 17) {
        model::seal_transport(&mut sealed, 20, datagram[9]);
    }
    assert_eq!(sealed, datagram, "lengths and checksums");
}
