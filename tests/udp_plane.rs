//! The udp backend's data plane with real descriptors: a TUN device and sockets in a network namespace of the test's own.
//! The other host is a plain socket on another loopback address. Needs root.
#![allow(unsafe_code)] // an allocator that counts
#![allow(clippy::disallowed_methods)] // the tests read the clock
#![allow(clippy::unwrap_used)] // in the helpers of tests as well

mod model;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use flanneld::forward::{Family, Offload, Offloads, Plane, Reason, Settings, Side, Turn};
use flanneld::sys::netns;
use flanneld::sys::udp::{self, UdpPort};
use flanneld::wire::ipv4;
use mio::{Events, Poll, Token};

const LOCAL: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 1), 8285);
const REMOTE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 2), 8285);
const TUN: Token = Token(0);
const UDP: [Token; 2] = [Token(1), Token(2)];
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

/// Stands before the C library's functions of the same names, to let them fail as other kernels do.
mod calls {
    use std::cell::RefCell;
    use std::collections::BTreeMap;

    /// What this thread's calls of one function came to, and how the next ones shall fail.
    #[derive(Default)]
    struct Plan {
        count: u64,
        failures: u64,
        errno: i32,
        /// Only calls with this number among their arguments fail.
        only: Option<i64>,
    }

    thread_local! {
        static PLANS: RefCell<BTreeMap<&'static str, Plan>> = const { RefCell::new(BTreeMap::new()) };
    }

    pub(super) fn fail(name: &'static str, only: Option<i64>, failures: u64, errno: i32) {
        PLANS.with_borrow_mut(|plans| {
            let plan = plans.entry(name).or_default();
            (plan.failures, plan.errno, plan.only) = (failures, errno, only);
        });
    }

    pub(super) fn count(name: &'static str) -> u64 {
        PLANS.with_borrow_mut(|plans| std::mem::take(&mut plans.entry(name).or_default().count))
    }

    fn is_to_fail(name: &'static str, argument: i64) -> bool {
        PLANS.with_borrow_mut(|plans| {
            // a name that no test has asked for costs nothing
            let Some(plan) = plans.get_mut(name) else { return false };
            plan.count += 1;
            let fails = plan.failures > 0 && plan.only.is_none_or(|only| only == argument);
            if fails {
                plan.failures -= 1;
                // SAFETY: the place of errno is this thread's own.
                unsafe { *libc::__errno_location() = plan.errno };
            }
            fails
        })
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn sendmmsg(
        fd: i32,
        messages: *mut libc::mmsghdr,
        count: u32,
        flags: i32,
    ) -> i32 {
        // SAFETY: the caller's promises; a message with a control part is a run.
        let is_run = unsafe { (*messages).msg_hdr.msg_controllen } > 0;
        if is_to_fail("sendmmsg", is_run.into()) {
            return -1;
        }
        // SAFETY: the caller's promises are the kernel's.
        let sent = unsafe { libc::syscall(libc::SYS_sendmmsg, fd, messages, count, flags) };
        i32::try_from(sent).unwrap()
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn writev(fd: i32, parts: *const libc::iovec, count: i32) -> isize {
        if is_to_fail("writev", i64::from(count > 2)) {
            return -1;
        }
        // SAFETY: the caller's promises are the kernel's.
        let written = unsafe { libc::syscall(libc::SYS_writev, fd, parts, count) };
        isize::try_from(written).unwrap()
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn setsockopt(
        fd: i32,
        level: i32,
        name: i32,
        value: *const libc::c_void,
        len: u32,
    ) -> i32 {
        if level == libc::SOL_UDP && is_to_fail("setsockopt", name.into()) {
            return -1;
        }
        // SAFETY: the caller's promises are the kernel's.
        let result = unsafe { libc::syscall(libc::SYS_setsockopt, fd, level, name, value, len) };
        i32::try_from(result).unwrap()
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn ioctl(fd: i32, request: u64, argument: usize) -> i32 {
        const TUNSETIFF: u64 = libc::TUNSETIFF;
        let number = if request == TUNSETIFF {
            // SAFETY: the argument of TUNSETIFF is an ifreq; the flags of the device stand behind its name.
            unsafe { (*(argument as *const libc::ifreq)).ifr_ifru.ifru_flags }.into()
        } else {
            i64::try_from(argument).unwrap_or(0)
        };
        if is_to_fail(if request == TUNSETIFF { "TUNSETIFF" } else { "ioctl" }, number) {
            return -1;
        }
        // SAFETY: the caller's promises are the kernel's.
        let result = unsafe { libc::syscall(libc::SYS_ioctl, fd, request, argument) };
        i32::try_from(result).unwrap()
    }
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

    fn start_dual() -> Self {
        let v6 = Side {
            network: "fd00:5::".parse().unwrap(),
            prefix_len: 48,
            subnet_len: 64,
            local: "::1".parse().unwrap(),
        };
        Self::start_from(|| Settings { v6: Some(v6), ..settings(Offloads::ALL) })
    }

    fn start_with(offloads: Offloads) -> Self {
        Self::start_from(|| settings(offloads))
    }

    fn start_from(settings: impl FnOnce() -> Settings) -> Self {
        netns::unshare().expect("root, for a network namespace");
        // Router solicitations on the device would be counted between the packets of the tests.
        std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
        run("ip link set lo up");
        let mut plane = Plane::open("flannel%d", &settings()).unwrap();
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
                    token if token == UDP[0] => self.plane.udp_is_ready(Family::V4),
                    _ => self.plane.udp_is_ready(Family::V6),
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

/// Makes the way to the other host slow, and sends until the socket is full. How many packets that took.
fn fill_up(host: &mut Host, container: &UdpSocket) -> u64 {
    run("tc qdisc add dev lo root tbf rate 8kbit burst 1600 limit 100m");
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
    offered
}

/// The way to the other host is so slow that the socket fills up.
#[test]
fn a_full_socket_holds_the_packets_back_and_loses_none() {
    let mut host = Host::start();
    let container = container();
    let offered = fill_up(&mut host, &container);
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

/// Every way of moving packets: single ones, super-packets, refused ones, refused runs, and ones that are too long.
#[test]
fn no_allocation_for_a_packet() {
    for offloads in [Offloads::ALL, Offloads::NONE] {
        let mut host = Host::start_with(offloads);
        let mut container = gso_container();
        let mut far = UdpPort::bind("127.0.0.2:0".parse().unwrap()).unwrap();
        let (out, train) = (vec![0x5a; 10 * 1000], train(10, 1000));
        let single = packet(FAR, CONTAINER, 64, b"in");
        let nowhere: SocketAddrV4 = "10.5.9.9:9".parse().unwrap();
        let mut buffer = vec![0; udp::SLOT];
        let mut received = [udp::Received::NONE];
        let now = Instant::now();
        calls::fail("sendmmsg", Some(1), 0, libc::EINVAL);
        let mut counted = 0;
        for round in 0..200 {
            let send = |port: &mut UdpPort, to: SocketAddrV4, segment, bytes: &[u8]| {
                let mut burst = port.burst();
                assert!(burst.add(to.into(), segment, [bytes].into_iter()));
                burst.send()
            };
            send(&mut container, FAR, Some(1000), &out).unwrap();
            send(&mut container, FAR, None, b"out").unwrap();
            send(&mut far, LOCAL, Some(1028), &train).unwrap();
            send(&mut far, LOCAL, None, &single).unwrap();
            // refused with an error that this socket is told
            let _ = send(&mut container, nowhere, None, b"nowhere");
            if round % 50 == 7 {
                calls::fail("sendmmsg", Some(1), 1, libc::EINVAL);
            }
            host.plane.tun_is_ready();
            host.plane.udp_is_ready(Family::V4);
            let before = allocations();
            while host.plane.turn(now).unwrap() == Turn::More {}
            counted += allocations() - before;
            calls::fail("sendmmsg", Some(1), 0, libc::EINVAL);
            while host.remote.recv(&mut buffer).is_ok() {}
            while container.receive(&mut buffer, &mut received).is_ok() {}
        }
        let stats = host.plane.engine.stats;
        assert_eq!(counted, 0, "{offloads}");
        assert_eq!((stats.sent, stats.delivered), (200 * 11, 200 * 11), "{offloads}");
        assert_eq!(stats.drops.count(Reason::NoRoute), 200);
        assert!(host.plane.poll_demotion().is_none());
    }
    let probe = allocations();
    drop(Box::new([0u8; 64]));
    assert!(allocations() > probe, "the allocator counts");
}

/// What nobody carries is refused packet by packet, and takes no room: it must not keep the loop from anything else.
#[test]
fn a_flood_to_nowhere_takes_turns() {
    let mut host = Host::start();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let socket = UdpSocket::bind("10.5.1.0:0").unwrap();
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let _ = socket.send_to(b"nowhere", "10.5.9.9:9");
                }
            });
        }
        let deadline = Instant::now() + PATIENCE;
        while host.plane.engine.stats.drops.count(Reason::NoRoute) < 20_000 {
            assert!(Instant::now() < deadline);
            host.plane.tun_is_ready();
            let before = host.plane.engine.stats.drops.count(Reason::NoRoute);
            host.plane.turn(Instant::now()).unwrap();
            let refused = host.plane.engine.stats.drops.count(Reason::NoRoute) - before;
            assert!(refused <= 2048, "{refused} in one turn");
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

/// While one family's socket is full, the other's being writable is no event.
#[test]
fn a_full_socket_is_quiet() {
    let mut host = Host::start_dual();
    fill_up(&mut host, &container());
    let (mut events, mut wakes) = (Events::with_capacity(8), 0);
    let end = Instant::now() + Duration::from_millis(500);
    while Instant::now() < end {
        host.poll.poll(&mut events, Some(end - Instant::now())).unwrap();
        for event in &events {
            wakes += 1;
            match event.token() {
                TUN => host.plane.tun_is_ready(),
                token if token == UDP[0] => host.plane.udp_is_ready(Family::V4),
                _ => host.plane.udp_is_ready(Family::V6),
            }
        }
        while host.plane.turn(Instant::now()).unwrap() == Turn::More {}
    }
    // packets that wait here would keep the namespace, and what the kernel's own ICMP socket may send, for an hour
    run("tc qdisc del dev lo root");
    assert!(wakes < 50, "{wakes} events while nothing could be done");
}

/// Lets the container send `count` datagrams of `size` bytes as one super-packet, and returns what the other host gets.
fn run_out(host: &mut Host, container: &mut UdpPort, count: usize, size: usize) -> Vec<Vec<u8>> {
    let payload: Vec<u8> = (0..count * size).map(|at| at.to_le_bytes()[1]).collect();
    let mut burst = container.burst();
    assert!(burst.add(FAR.into(), Some(u16::try_from(size).unwrap()), [&payload[..]].into_iter()));
    burst.send().unwrap();
    (0..count).map(|_| host.at_remote()).collect()
}

/// Every datagram is one right packet of at most the MTU, and its payload is in order.
fn check(packets: &[Vec<u8>], size: usize) {
    for (index, bytes) in packets.iter().enumerate() {
        let packet = ipv4::Packet::new(&bytes[..]).unwrap();
        assert_eq!((packet.total_len(), packet.ttl()), (bytes.len(), 63));
        assert_eq!(bytes.len(), 28 + size);
        let mut sealed = bytes.clone();
        model::seal_ip(&mut sealed);
        model::seal_transport(&mut sealed, 20, 17);
        assert_eq!(sealed, *bytes, "checksums");
        let expected: Vec<u8> =
            (index * size..(index + 1) * size).map(|at| at.to_le_bytes()[1]).collect();
        assert_eq!(packet.payload()[8..], expected);
    }
}

/// Right packets that follow each other, as another host sends them.
fn train(count: usize, size: usize) -> Vec<u8> {
    (0..count)
        .flat_map(|index| {
            let mut bytes = packet(FAR, CONTAINER, 64, &vec![index.to_le_bytes()[0]; size]);
            bytes[4..6].copy_from_slice(&u16::try_from(index).unwrap().to_be_bytes());
            model::seal_ip(&mut bytes);
            model::seal_transport(&mut bytes, 20, 17);
            bytes
        })
        .collect()
}

/// A run of right packets, as another host sends it; the container must get every payload.
fn run_in(host: &mut Host, container: &mut UdpPort, count: usize, size: usize) {
    let packets = train(count, size);
    let mut far = UdpPort::bind("127.0.0.2:0".parse().unwrap()).unwrap();
    let mut burst = far.burst();
    let segment = u16::try_from(28 + size).unwrap();
    assert!(burst.add(LOCAL.into(), Some(segment), [&packets[..]].into_iter()));
    burst.send().unwrap();
    let mut buffer = vec![0; udp::SLOT];
    for index in 0..count {
        let mut received = [udp::Received::NONE];
        host.until(|_| container.receive(&mut buffer, &mut received).ok());
        assert_eq!(received[0].len, size, "datagram {index}");
        assert_eq!(buffer[..size], vec![index.to_le_bytes()[0]; size]);
    }
}

fn gso_container() -> UdpPort {
    UdpPort::bind(CONTAINER.into()).unwrap()
}

#[test]
fn super_packets_both_ways_are_few_calls() {
    let mut host = Host::start();
    assert_eq!(host.plane.offloads(), Offloads::ALL, "this kernel has them all");
    let mut container = gso_container();
    calls::count("sendmmsg");
    calls::count("writev");
    let packets = run_out(&mut host, &mut container, 40, 1000);
    check(&packets, 1000);
    let calls = calls::count("sendmmsg");
    assert_eq!(calls, 2, "the container's and ours");
    assert_eq!(host.plane.engine.stats.sent, 40);
    run_in(&mut host, &mut container, 40, 1000);
    assert_eq!((calls::count("writev"), host.plane.engine.stats.delivered), (1, 40));
}

#[test]
fn each_way_can_be_switched_off() {
    for (off, name) in Offload::ALL {
        let mut offloads = Offloads::ALL;
        offloads.set(off, false);
        let mut host = Host::start_with(offloads);
        assert_eq!(host.plane.offloads(), offloads, "{name}");
        let mut container = gso_container();
        check(&run_out(&mut host, &mut container, 40, 1000), 1000);
        run_in(&mut host, &mut container, 40, 1000);
        let stats = host.plane.engine.stats;
        assert_eq!(
            (stats.sent, stats.delivered, stats.drops),
            (40, 40, Default::default()),
            "{name}"
        );
    }
    let mut host = Host::start_with(Offloads::NONE);
    assert!(!host.plane.tun().has_vnet());
    let mut container = gso_container();
    check(&run_out(&mut host, &mut container, 40, 1000), 1000);
    run_in(&mut host, &mut container, 40, 1000);
}

/// What kernels without one or the other say.
#[test]
fn old_kernels() {
    let started = || Host::start().plane.offloads();
    let all = Offloads::ALL;
    calls::fail("setsockopt", Some(libc::UDP_SEGMENT.into()), 9, libc::ENOPROTOOPT);
    assert_eq!(started(), Offloads { gso: false, ..all }, "before 4.18");
    calls::fail("setsockopt", Some(libc::UDP_GRO.into()), 9, libc::ENOPROTOOPT);
    assert_eq!(started(), Offloads { gro: false, ..all }, "before 5.0");
    calls::fail("setsockopt", None, 0, 0);
    // with and without TCP
    calls::fail("ioctl", Some(0x6f), 9, libc::EINVAL);
    let old = Offloads { uso: false, ..all };
    let mut host = Host::start();
    assert_eq!(host.plane.offloads(), old, "before 6.2");
    calls::fail("ioctl", None, 0, 0);
    calls::fail("writev", None, 0, 0);
    let mut container = gso_container();
    run_in(&mut host, &mut container, 10, 100);
    assert_eq!(calls::count("writev"), 10, "what the kernel does not cut it does not take");
    let vnet = i64::from(libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR);
    calls::fail("TUNSETIFF", Some(vnet), 9, libc::EINVAL);
    let none = Offloads { gso: true, gro: true, batch: true, ..Offloads::NONE };
    assert_eq!(started(), none, "without virtio-net headers");
}

#[test]
fn a_refused_run_is_sent_singly_and_given_up_if_it_must_be() {
    for (errno, failures, given_up) in [
        (libc::EIO, 15, false), // one host's way has a transformation
        (libc::EIO, 16, true),  // the interface computes no checksums
        (libc::EINVAL, 16, true),
        // what the way, the memory or a rule says is not about runs
        (libc::EMSGSIZE, 20, false),
        (libc::ENOBUFS, 20, false),
        (libc::EPERM, 20, false),
    ] {
        let mut host = Host::start();
        let mut container = gso_container();
        for round in 1..=failures + 1 {
            let before = host.plane.engine.stats.sent;
            // the container's own run goes out before
            let payload = [0x5a; 4000];
            let mut burst = container.burst();
            assert!(burst.add(FAR.into(), Some(1000), [&payload[..]].into_iter()));
            burst.send().unwrap();
            calls::fail("sendmmsg", Some(1), u64::from(round <= failures), errno);
            (0..4).for_each(|_| assert_eq!(host.at_remote().len(), 1028));
            assert_eq!(host.plane.engine.stats.sent - before, 4);
        }
        calls::fail("sendmmsg", None, 0, 0);
        assert_eq!(host.plane.engine.stats.drops, Default::default());
        assert_eq!(host.plane.offloads().gso, !given_up, "{errno} {failures} times");
        let demotion = host.plane.poll_demotion();
        assert_eq!(demotion.is_some(), given_up);
        if let Some(demotion) = demotion {
            assert_eq!(demotion.offload, Offload::Gso);
            assert_eq!(demotion.error.raw_os_error(), Some(errno));
        }
    }
}

#[test]
fn a_refused_super_packet_is_delivered_singly() {
    for (errno, given_up) in [(libc::EINVAL, true), (libc::ENOMEM, false)] {
        let mut host = Host::start();
        let mut container = gso_container();
        calls::fail("writev", Some(1), 1, errno);
        run_in(&mut host, &mut container, 40, 1000);
        let stats = host.plane.engine.stats;
        assert_eq!((stats.delivered, stats.drops), (40, Default::default()));
        assert_eq!(host.plane.offloads().merge, !given_up);
        let demotion = host.plane.poll_demotion();
        assert_eq!(demotion.map(|demotion| demotion.offload), given_up.then_some(Offload::Merge));
        run_in(&mut host, &mut container, 40, 1000);
    }
}

/// The way to the other host carries less than the device: senders hear how much, and nothing that may be cut is lost.
#[test]
fn the_ways_mtu() {
    let mut host = Host::start();
    run("ip route replace local 127.0.0.2 dev lo mtu lock 1000");
    // a packet that must not be fragmented: the sender's kernel hears of it, and sends others
    let container = container();
    let long = [0x5a; 1200];
    container.send_to(&long, FAR).unwrap();
    host.until(|host| (host.plane.engine.stats.replies == 1).then_some(()));
    let said = run_for("ip route get 10.5.2.7");
    assert!(said.contains("mtu 972"), "{said}");
    assert_eq!(host.plane.engine.stats.drops.count(Reason::TooBig), 1);
    container.send_to(&long, FAR).unwrap();
    let fragments = [host.at_remote(), host.at_remote()];
    assert!(fragments.iter().all(|fragment| fragment.len() <= 972 && fragment[6] & 0x40 == 0));
    // one that may be: it goes in fragments, whole
    let other = SocketAddrV4::new([10, 5, 2, 8].into(), 9);
    let may_be_cut = packet(CONTAINER, other, 64, &long);
    assert_eq!(may_be_cut[6], 0);
    raw(&may_be_cut, *other.ip());
    assert_eq!(host.at_remote().len(), 1228);
}

fn run_for(command: &str) -> String {
    let mut words = command.split(' ');
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// Sends a packet as it is.
fn raw(bytes: &[u8], destination: Ipv4Addr) {
    // SAFETY: system calls on a descriptor of our own and on memory that outlives them.
    unsafe {
        let fd = libc::socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_RAW);
        assert!(fd >= 0);
        let mut to: libc::sockaddr_in = std::mem::zeroed();
        to.sin_family = u16::try_from(libc::AF_INET).unwrap();
        to.sin_addr.s_addr = u32::from_ne_bytes(destination.octets());
        let sent =
            libc::sendto(fd, bytes.as_ptr().cast(), bytes.len(), 0, (&raw const to).cast(), 16);
        assert_eq!(usize::try_from(sent), Ok(bytes.len()), "{}", std::io::Error::last_os_error());
        libc::close(fd);
    }
}

/// At boot an IPv6 address is new, and its host still looks for others who have it.
#[test]
fn a_new_ipv6_address_can_be_bound_to() {
    netns::unshare().expect("root, for a network namespace");
    run("ip link set lo up");
    run("ip tuntap add d0 mode tap");
    run("sysctl -q -w net.ipv6.conf.d0.dad_transmits=100");
    run("ip link set d0 up");
    run("ip -6 addr add fd77::1/64 dev d0");
    assert!(run_for("ip -6 addr show dev d0").contains("tentative"));
    assert!(UdpSocket::bind("[fd77::1]:8285").is_err());
    let port = UdpPort::bind("[fd77::1]:8285".parse().unwrap()).unwrap();
    assert_eq!(port.local().to_string(), "[fd77::1]:8285");
    let taken = UdpPort::bind("[fd77::1]:8285".parse().unwrap()).unwrap_err();
    assert!(taken.to_string().contains("set Backend.Port"), "{taken}");
}
