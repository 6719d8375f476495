//! The udp backend's data plane with real descriptors: a TUN device and sockets in a network namespace of the test's own.
//! The other host is a plain socket on another loopback address. Needs root.
#![allow(unsafe_code)] // an allocator that counts
#![allow(clippy::disallowed_methods)] // the tests read the clock
#![allow(clippy::unwrap_used)] // in the helpers of tests as well

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use flanneld::forward::{Offloads, Plane, Reason, Settings, Side, Turn};
use flanneld::sys::netns;
use flanneld::wire::ipv4;
use mio::{Events, Poll, Token};

const LOCAL: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 1), 8285);
const REMOTE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 2), 8285);
const TUN: Token = Token(0);
const UDP: Token = Token(1);
const PATIENCE: Duration = Duration::from_secs(10);

/// Counts the allocations of each thread.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every request is passed on to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promises are the ones that System asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above; the pointer came from System.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations() -> u64 {
    ALLOCATIONS.with(Cell::get)
}

/// One host: the namespace of the calling thread, a plane in it, and the socket that stands for the other host, which
/// carries 10.5.2.0/24.
struct Host {
    plane: Plane,
    poll: Poll,
    remote: UdpSocket,
}

impl Host {
    fn start() -> Self {
        Self::start_with(Offloads::ALL)
    }

    fn start_with(offloads: Offloads) -> Self {
        netns::unshare().expect("root, for a network namespace");
        // Router solicitations on the device would be counted between the packets of the tests.
        std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
        run("ip link set lo up");
        let mut plane = Plane::open("flannel%d", &settings(offloads)).unwrap();
        assert!(plane.set_route("10.5.2.0/24".parse().unwrap(), (*REMOTE.ip()).into()));
        set_up(&plane);
        let poll = Poll::new().unwrap();
        plane.register(poll.registry(), TUN, UDP).unwrap();
        let remote = UdpSocket::bind(REMOTE).unwrap();
        remote.set_nonblocking(true).unwrap();
        Self { plane, poll, remote }
    }

    /// Does as the agent does, until `done` gives something.
    fn until<T>(&mut self, mut done: impl FnMut(&mut Self) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        let mut events = Events::with_capacity(8);
        let mut wait = Duration::ZERO;
        loop {
            if let Some(found) = done(self) {
                return found;
            }
            assert!(Instant::now() < deadline, "nothing came: {:?}", self.plane.engine.stats);
            self.poll.poll(&mut events, Some(wait)).unwrap();
            for event in &events {
                match event.token() {
                    TUN => self.plane.tun_is_ready(),
                    _ => self.plane.udp_is_ready(),
                }
            }
            wait = match self.plane.turn(Instant::now()).unwrap() {
                Turn::More => Duration::ZERO,
                Turn::Idle => Duration::from_millis(20),
            };
        }
    }

    /// The next packet that the other host gets.
    fn at_remote(&mut self) -> Vec<u8> {
        self.until(|host| received(&host.remote))
    }
}

fn settings(offloads: Offloads) -> Settings {
    Settings {
        port: 8285,
        mtu: 1472,
        offloads,
        check_source: false,
        v4: Some(Side {
            network: [10, 5, 0, 0].into(),
            prefix_len: 16,
            subnet_len: 24,
            local: *LOCAL.ip(),
        }),
        v6: None,
    }
}

fn set_up(plane: &Plane) {
    let name = plane.tun().name();
    run(&format!("ip address add 10.5.1.0/32 dev {name}"));
    run(&format!("ip link set {name} mtu 1472 up"));
    run(&format!("ip route add 10.5.0.0/16 dev {name}"));
}

fn run(command: &str) {
    let mut words = command.split(' ');
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

fn received(socket: &UdpSocket) -> Option<Vec<u8>> {
    let mut buffer = [0; 2048];
    socket.recv(&mut buffer).ok().map(|len| buffer[..len].to_vec())
}

/// A UDP datagram in an IPv4 packet, as the other host's containers would send it.
fn packet(source: SocketAddrV4, destination: SocketAddrV4, ttl: u8, payload: &[u8]) -> Vec<u8> {
    let udp_len = u16::try_from(8 + payload.len()).unwrap();
    let header = ipv4::Header {
        total_len: 20 + udp_len,
        ttl,
        protocol: 17,
        source: *source.ip(),
        destination: *destination.ip(),
    };
    let udp = [source.port(), destination.port(), udp_len, 0].map(u16::to_be_bytes).concat();
    [&header.to_bytes()[..], &udp, payload].concat()
}

/// A socket of a container on this host.
fn container() -> UdpSocket {
    let socket = UdpSocket::bind("10.5.1.0:7").unwrap();
    socket.set_nonblocking(true).unwrap();
    socket
}

const CONTAINER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 5, 1, 0), 7);
const FAR: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 5, 2, 7), 9);

#[test]
fn packets_go_both_ways_bare() {
    let mut host = Host::start();
    let container = container();
    container.send_to(b"hello", FAR).unwrap();
    let bytes = host.at_remote();
    let packet_out = ipv4::Packet::new(&bytes[..]).unwrap();
    assert_eq!((packet_out.source(), packet_out.destination()), (*CONTAINER.ip(), *FAR.ip()));
    assert_eq!((packet_out.ttl(), packet_out.total_len()), (63, bytes.len()));
    assert_eq!(packet_out.payload()[8..], *b"hello");

    host.remote.send_to(&packet(FAR, CONTAINER, 64, b"world"), LOCAL).unwrap();
    assert_eq!(host.until(|_| received(&container)), b"world");
    let stats = host.plane.engine.stats;
    assert_eq!((stats.sent, stats.delivered), (1, 1));
}

#[test]
fn full_size_packets_pass() {
    let mut host = Host::start();
    let container = container();
    let payload = [0x5a; 1472 - 28];
    container.send_to(&payload, FAR).unwrap();
    assert_eq!(host.at_remote().len(), 1472);
    // longer than the device: its host has an underlay with a greater MTU (B20)
    host.remote.send_to(&packet(FAR, CONTAINER, 64, &[0x5a; 4000]), LOCAL).unwrap();
    host.remote.send_to(&packet(FAR, CONTAINER, 64, b"after"), LOCAL).unwrap();
    let mut buffer = [0; 8192];
    let len = host.until(|_| container.recv(&mut buffer).ok());
    assert_eq!(len, 4000, "the kernel takes it whole");
    assert_eq!(host.until(|_| received(&container)), b"after");
}

#[test]
fn hostile_datagrams_are_counted_and_nothing_else() {
    let mut host = Host::start();
    let container = container();
    let spent = packet(FAR, CONTAINER, 1, b"spent");
    let mut long = packet(FAR, CONTAINER, 64, b"long");
    long[3] += 1;
    for datagram in [&b""[..], b"x", &[0x50; 60], &[0x45; 19], &spent, &long] {
        host.remote.send_to(datagram, LOCAL).unwrap();
    }
    host.remote.send_to(&packet(FAR, CONTAINER, 64, b"good"), LOCAL).unwrap();
    assert_eq!(host.until(|_| received(&container)), b"good");
    let drops = host.plane.engine.stats.drops;
    let counts =
        [Reason::NotIp, Reason::Malformed, Reason::HopsUsedUp].map(|reason| drops.count(reason));
    assert_eq!(counts, [3, 2, 1]);
}

/// Pings in the calling thread's namespace, with the plane running, and returns what ping said.
fn ping(host: &mut Host, arguments: &str) -> String {
    let mut child: Child = Command::new("ping")
        .args(arguments.split(' '))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    host.until(|_| child.try_wait().unwrap());
    let output = child.wait_with_output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn the_kernel_hears_why_a_packet_was_refused() {
    let mut host = Host::start();
    let said = ping(&mut host, "-n -c1 -W2 10.5.9.7");
    assert!(
        said.contains("From 10.5.9.7") && said.contains("Destination Net Unreachable"),
        "{said}"
    );
    let said = ping(&mut host, "-n -c1 -W2 -t1 10.5.2.7");
    assert!(said.contains("Time to live exceeded"), "{said}");
    assert_eq!(host.plane.engine.stats.replies, 2);
}

#[test]
fn a_deleted_device_is_reported_and_replaced() {
    let mut host = Host::start();
    let name = host.plane.tun().name();
    run(&format!("ip link delete {name}"));
    let mut events = Events::with_capacity(8);
    let deadline = Instant::now() + PATIENCE;
    loop {
        host.poll.poll(&mut events, Some(PATIENCE)).unwrap();
        assert!(Instant::now() < deadline, "no event told about the deletion");
        host.plane.tun_is_ready();
        if host.plane.turn(Instant::now()).is_err() {
            break;
        }
    }
    host.plane.reopen_tun().unwrap();
    set_up(&host.plane);
    assert_eq!(host.plane.tun().name(), name);
    container().send_to(b"again", FAR).unwrap();
    assert_eq!(host.at_remote()[28..], *b"again");
}

#[test]
fn a_device_that_is_down_costs_packets_not_the_plane() {
    let mut host = Host::start();
    let name = host.plane.tun().name();
    run(&format!("ip link set {name} down"));
    host.remote.send_to(&packet(FAR, CONTAINER, 64, b"lost"), LOCAL).unwrap();
    host.until(|host| {
        (host.plane.engine.stats.drops.count(Reason::DeliverFailed) == 1).then_some(())
    });
    run(&format!("ip link set {name} up"));
    run(&format!("ip route replace 10.5.0.0/16 dev {name}"));
    container().send_to(b"back", FAR).unwrap();
    assert_eq!(host.at_remote()[28..], *b"back");
}

#[test]
fn a_flood_takes_turns() {
    for offloads in [Offloads::ALL, Offloads::NONE] {
        let mut host = Host::start_with(offloads);
        for _ in 0..1000 {
            host.remote.send_to(&packet(FAR, CONTAINER, 64, b"flood"), LOCAL).unwrap();
        }
        assert_eq!(host.plane.turn(Instant::now()).unwrap(), Turn::More);
        let after_one_turn = host.plane.engine.stats.delivered;
        assert!((1..1000).contains(&after_one_turn), "{after_one_turn}");
        let mut turns = 1;
        while host.plane.turn(Instant::now()).unwrap() == Turn::More {
            turns += 1;
        }
        assert!(turns < 100, "{turns}");
        assert_eq!(host.plane.engine.stats.delivered, 1000);
    }
}

/// The way to the other host is so slow that the socket fills up.
#[test]
fn a_full_socket_holds_the_packets_back_and_loses_none() {
    let mut host = Host::start();
    run("tc qdisc add dev lo root tbf rate 8kbit burst 1600 limit 100m");
    let container = container();
    let mut offered = 0;
    while host.plane.engine.stats.sent == offered {
        assert!(offered < 20_000, "the socket never filled up");
        for _ in 0..100 {
            container.send_to(&[0x5a; 1400], FAR).unwrap();
        }
        offered += 100;
        host.plane.tun_is_ready();
        let mut turns = 0;
        while host.plane.turn(Instant::now()).unwrap() == Turn::More {
            turns += 1;
            assert!(turns < 100, "a full socket must not be tried over and over");
        }
    }
    let sent = host.plane.engine.stats.sent;
    host.plane.tun_is_ready();
    assert_eq!(host.plane.turn(Instant::now()).unwrap(), Turn::Idle);
    assert_eq!(host.plane.engine.stats.sent, sent);
    // the other direction goes on
    run("tc qdisc replace dev lo root tbf rate 800mbit burst 160000 limit 100m");
    host.remote.send_to(&packet(FAR, CONTAINER, 64, b"meanwhile"), LOCAL).unwrap();
    assert_eq!(host.until(|_| received(&container)), b"meanwhile");
    host.until(|host| (host.plane.engine.stats.sent == offered).then_some(()));
    assert_eq!(host.plane.engine.stats.drops, Default::default());
}

#[test]
fn routes_change_while_it_runs() {
    let mut host = Host::start();
    let container = container();
    let subnet = "10.5.2.0/24".parse().unwrap();
    let other = UdpSocket::bind("127.0.0.3:8285").unwrap();
    other.set_nonblocking(true).unwrap();
    assert!(host.plane.set_route(subnet, "127.0.0.3".parse().unwrap()));
    container.send_to(b"moved", FAR).unwrap();
    host.until(|_| received(&other));
    host.plane.del_route(subnet);
    container.send_to(b"gone", FAR).unwrap();
    host.until(|host| (host.plane.engine.stats.drops.count(Reason::NoRoute) == 1).then_some(()));
    assert!(received(&host.remote).is_none());
    let v6 = "::1".parse().unwrap();
    assert!(!host.plane.set_route("fd00::/64".parse().unwrap(), v6), "no IPv6 here");
}

/// Every way of moving packets, super-packets and refused ones among them.
#[test]
fn no_allocation_for_a_packet() {
    for offloads in [Offloads::ALL, Offloads::NONE] {
        let mut host = Host::start_with(offloads);
        let container = container();
        let inbound = packet(FAR, CONTAINER, 64, b"in");
        let nowhere: SocketAddrV4 = "10.5.9.9:9".parse().unwrap();
        let mut buffer = [0; 2048];
        let now = Instant::now();
        let before = allocations();
        for _ in 0..1000 {
            for _ in 0..3 {
                container.send_to(b"out", FAR).unwrap();
                host.remote.send_to(&inbound, LOCAL).unwrap();
            }
            // refused with an error that this socket is told
            let _ = container.send_to(b"nowhere", nowhere);
            host.plane.tun_is_ready();
            host.plane.udp_is_ready();
            while host.plane.turn(now).unwrap() == Turn::More {}
            while host.remote.recv(&mut buffer).is_ok() || container.recv(&mut buffer).is_ok() {}
        }
        let stats = host.plane.engine.stats;
        assert_eq!(allocations() - before, 0, "{offloads}");
        assert_eq!((stats.sent, stats.delivered), (3000, 3000), "{offloads}");
        assert_eq!(stats.drops.count(Reason::NoRoute), 1000);
    }
    let probe = allocations();
    drop(Box::new([0u8; 64]));
    assert!(allocations() > probe, "the allocator counts");
}
