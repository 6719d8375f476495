//! One agent and an API server that exists in memory only: nodes come, change and go, answers are lost, late or refused,
//! watches break, history is forgotten. Whatever happened, in the end the agent knows what the server holds. A clock that
//! only the test moves.

#![allow(clippy::disallowed_methods)] // one reading, to start the fake clock from

use std::collections::BTreeMap;
use std::time::SystemTime;

use serde_json::Value;

use super::wire::{self, Node, Status};
use super::*;
use crate::http::{HeaderList, Method};
use crate::lease::{Lease, LeaseEvent, Subnets};

const CONFIG: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
const PREFIX: &str = "flannel.alpha.coreos.com/";
const OWN: &str = "own";
const DATA: &str = r#"{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}"#;

/// What the server does instead of answering.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fault {
    /// The request never arrives.
    Lost,
    /// The answer never arrives.
    LateLost,
    /// The answer ends in the middle.
    Cut,
    Status(u16),
}

/// An API server with one sort of objects.
#[derive(Default)]
struct Server {
    version: u64,
    nodes: BTreeMap<String, Node>,
    history: Vec<(u64, &'static str, Node)>,
    /// Changes up to this one are forgotten.
    forgotten: u64,
    uids: u64,
    seconds: i64,
    requests: u64,
    patches: u64,
    whole_lists: u64,
    /// It does not keep what is written.
    drops: bool,
}

impl Server {
    fn put(&mut self, mut node: Node) {
        self.version += 1;
        let metadata = node.metadata.as_mut().unwrap();
        metadata.resource_version = self.version.to_string();
        let name = metadata.name.clone();
        let kind = if self.nodes.contains_key(&name) { "MODIFIED" } else { "ADDED" };
        self.history.push((self.version, kind, node.clone()));
        self.nodes.insert(name, node);
    }

    fn add(&mut self, name: &str, cidrs: &[&str], ip: &str) {
        self.uids += 1;
        self.seconds += 1;
        let data = format!(
            r#"{{"VNI":1,"VtepMAC":"02:00:00:00:{:02x}:{:02x}"}}"#,
            self.uids / 256 % 256,
            self.uids % 256
        );
        let keys = ["kube-subnet-manager", "backend-type", "backend-data", "public-ip"];
        let keys: Vec<String> = keys.iter().map(|key| format!("{PREFIX}{key}")).collect();
        let values = ["true", "vxlan", &*data, ip];
        let all: Vec<(&str, &str)> = keys.iter().map(|key| &**key).zip(values).collect();
        let annotations = if ip.is_empty() { &[][..] } else { &all };
        let node = wire::node(name, &format!("uid-{}", self.uids), cidrs, annotations);
        self.put(wire::created(node, self.seconds));
    }

    fn delete(&mut self, name: &str) {
        if let Some(mut node) = self.nodes.remove(name) {
            self.version += 1;
            node.metadata.as_mut().unwrap().resource_version = self.version.to_string();
            self.history.push((self.version, "DELETED", node));
        }
    }

    /// Sets annotations of ours, or with an empty value removes them.
    fn annotate(&mut self, name: &str, annotations: &[(&str, &str)]) {
        let Some(mut node) = self.nodes.get(name).cloned() else { return };
        for (key, value) in annotations {
            set(&mut node, &format!("{PREFIX}{key}"), value);
        }
        self.put(node);
    }

    fn heart_beat(&mut self, name: &str) {
        if let Some(node) = self.nodes.get(name).cloned() {
            self.put(node);
        }
    }

    fn forget(&mut self) {
        self.forgotten = self.version;
        self.history.clear();
    }

    /// Status and body.
    fn answer(&mut self, request: &Request) -> (u16, Vec<u8>) {
        self.requests += 1;
        let (path, query) = request.path.split_once('?').unwrap_or((&request.path, ""));
        let queries: BTreeMap<&str, &str> =
            query.split('&').filter_map(|part| part.split_once('=')).collect();
        if request.method == Method::Patch {
            let name =
                path.strip_prefix("/api/v1/nodes/").unwrap().strip_suffix("/status").unwrap();
            self.patches += 1;
            let patch: Value = serde_json::from_slice(&request.body).unwrap();
            let Some(mut node) = self.nodes.get(name).cloned() else {
                return self.no(404, "not found");
            };
            for (key, value) in patch["metadata"]["annotations"].as_object().into_iter().flatten() {
                if !self.drops {
                    set(&mut node, key, value.as_str().unwrap());
                }
            }
            self.put(node);
            return (200, wire::seal(&wire::metadata(&self.nodes[name])));
        }
        assert_eq!(path, "/api/v1/nodes");
        let since: Option<u64> = queries.get("resourceVersion").and_then(|text| text.parse().ok());
        if since.is_some_and(|since| since > self.version) {
            return self.no(504, "Timeout: Too large resource version");
        }
        let version = self.version.to_string();
        if let Some(selector) = queries.get("fieldSelector") {
            let name = selector.strip_prefix("metadata.name%3D").unwrap();
            let found: Vec<Node> = self.nodes.get(name).cloned().into_iter().collect();
            return (200, wire::list(&version, "", &found));
        }
        // pages, when they come from etcd
        let limit = if since.is_none() { 3 } else { usize::MAX };
        let after = match queries.get("continue") {
            None => String::new(),
            Some(token) => {
                let (after, version) = token.split_once('.').unwrap();
                if version.parse::<u64>().unwrap() < self.forgotten {
                    return self.no(410, "The provided continue parameter is too old");
                }
                after.to_owned()
            }
        };
        // not a true snapshot, but changes meanwhile come with the watch from the first page's version
        let rest: Vec<Node> = self
            .nodes
            .range(after..)
            .skip_while(|(name, _)| {
                queries.get("continue").is_some_and(|token| token.starts_with(&format!("{name}.")))
            })
            .map(|(_, node)| node.clone())
            .collect();
        let page: Vec<Node> = rest.iter().take(limit).cloned().collect();
        let last = page.last().map(|node| node.metadata.clone().unwrap().name).unwrap_or_default();
        let next = if rest.len() > limit { format!("{last}.{version}") } else { String::new() };
        if request.headers[0].1.contains("PartialObjectMetadataList") {
            let page: Vec<_> = page.iter().map(wire::metadata).collect();
            return (200, wire::list(&version, &next, &page));
        }
        self.whole_lists += 1;
        (200, wire::list(&version, &next, &page))
    }

    fn no(&self, code: u16, message: &str) -> (u16, Vec<u8>) {
        (code, wire::seal(&Status { message: message.into(), code: code.into() }))
    }
}

/// Sets an annotation, or with an empty value removes it.
fn set(node: &mut Node, key: &str, value: &str) {
    let all = &mut node.metadata.as_mut().unwrap().annotations;
    all.retain(|annotation| annotation.key != key.as_bytes());
    if !value.is_empty() {
        all.push(wire::Annotation { key: key.to_owned().into(), value: value.to_owned().into() });
    }
}

/// Status and body, or what became of them.
type Reply = Result<(u16, Vec<u8>), Fault>;

/// The agent, and what it was told.
struct Host {
    store: Kube,
    now: Now,
    /// A short exchange: when its answer arrives, and what it is.
    unary: Option<(Instant, Reply)>,
    /// The watch: what was sent of the history.
    watch: Option<u64>,
    watch_head: bool,
    leases: BTreeMap<Subnets, Lease>,
    own: Option<Subnets>,
    snapshots: usize,
    log: Vec<String>,
    random: u64,
    /// Which exchanges a fault is for, if not for all short ones; and how many had it.
    matches: Option<fn(&Request) -> bool>,
    refused: u64,
    /// What the watch is told instead.
    watch_fault: Option<Fault>,
}

impl Host {
    fn new(seed: u64) -> Self {
        Self::with(seed, CONFIG)
    }

    fn with(seed: u64, config: &str) -> Self {
        let setup = Setup {
            who: Who::Node(OWN.into()),
            prefix: Prefix::parse("flannel.alpha.coreos.com").unwrap(),
            config: NetworkConfig::parse(config).unwrap(),
            set_condition: false,
            endpoints: vec!["https://10.0.0.1".into()],
            credential: "a token".into(),
        };
        Self {
            store: Kube::new(setup, seed),
            now: Now { mono: Instant::now(), wall: SystemTime::UNIX_EPOCH },
            unary: None,
            watch: None,
            watch_head: false,
            leases: BTreeMap::new(),
            own: None,
            snapshots: 0,
            log: Vec::new(),
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            matches: None,
            refused: 0,
            watch_fault: None,
        }
    }

    fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % limit
    }

    fn attrs() -> LeaseAttrs {
        LeaseAttrs {
            public_ip: Some([192, 168, 0, 1].into()),
            backend_type: "vxlan".into(),
            backend_data: Some(DATA.into()),
            ..LeaseAttrs::default()
        }
    }

    /// Everything that is due now. `fault` says what becomes of a new exchange.
    fn turn(&mut self, server: &mut Server, fault: Option<Fault>, delay: Duration) {
        for rounds in 0.. {
            assert!(rounds < 200, "it spins: {:?}", self.store);
            let mut stirred = false;
            while let Some(request) = self.store.poll_request(self.now) {
                stirred = true;
                match request {
                    StoreRequest::Start(Lane::Unary, request) => {
                        assert!(self.unary.is_none());
                        let fault =
                            fault.filter(|_| self.matches.is_none_or(|matches| matches(&request)));
                        self.refused += u64::from(fault.is_some());
                        let answer = match fault {
                            Some(fault @ (Fault::Lost | Fault::Status(_))) => Err(fault),
                            Some(fault) => {
                                server.answer(&request);
                                Err(fault)
                            }
                            None => Ok(server.answer(&request)),
                        };
                        self.unary = Some((self.now.mono + delay, answer));
                    }
                    StoreRequest::Start(Lane::Watch, request) => {
                        assert!(self.watch.is_none());
                        server.requests += 1;
                        let version = request.path.split("resourceVersion=").nth(1).unwrap();
                        let version = version.split('&').next().unwrap().parse().unwrap();
                        self.watch = Some(version);
                        self.watch_head = false;
                        self.watch_fault =
                            fault.filter(|_| self.matches.is_some_and(|matches| matches(&request)));
                    }
                    StoreRequest::Cancel(lane) => {
                        assert_eq!(lane, Lane::Watch);
                        self.watch = None;
                    }
                }
            }
            stirred |= self.deliver(server);
            while let Some(event) = self.store.poll_event() {
                stirred = true;
                self.take(event);
            }
            if !stirred {
                return;
            }
        }
    }

    /// Hands over what has arrived.
    fn deliver(&mut self, server: &mut Server) -> bool {
        let mut stirred = false;
        if self.unary.as_ref().is_some_and(|(at, _)| *at <= self.now.mono)
            && let Some((_, answer)) = self.unary.take()
        {
            stirred = true;
            self.answer(answer);
        }
        let Some(version) = self.watch else { return stirred };
        let headers = HeaderList(vec![("Retry-After".into(), "0".into())]);
        let (store, now) = (&mut self.store, self.now);
        if let Some(fault) = self.watch_fault.take() {
            self.watch = None;
            self.refused += 1;
            let mut tell = |event| store.handle_http(Lane::Watch, event, now);
            match fault {
                Fault::Status(status) => {
                    tell(HttpEvent::Head { status, headers: &headers });
                    tell(HttpEvent::Body(b"no"));
                    tell(HttpEvent::Done);
                }
                Fault::Cut => {
                    tell(HttpEvent::Head { status: 200, headers: &headers });
                    tell(HttpEvent::Failed("connection reset"));
                }
                _ => tell(HttpEvent::Failed("connection refused")),
            }
            return true;
        }
        if !self.watch_head {
            self.watch_head = true;
            stirred = true;
            store.handle_http(Lane::Watch, HttpEvent::Head { status: 200, headers: &headers }, now);
            if version < server.forgotten {
                let status = Status { message: "too old resource version".into(), code: 410 };
                store.handle_http(
                    Lane::Watch,
                    HttpEvent::Body(&wire::frame("ERROR", &status)),
                    now,
                );
                return true;
            }
        }
        let new: Vec<_> = server.history.iter().filter(|(at, ..)| *at > version).cloned().collect();
        for (at, kind, node) in new {
            stirred = true;
            self.watch = Some(at);
            let frame = wire::frame(kind, &wire::metadata(&node));
            // in two pieces, as it may come
            let (one, two) = frame.split_at(frame.len() / 2);
            for piece in [one, two] {
                store.handle_http(Lane::Watch, HttpEvent::Body(piece), now);
            }
        }
        stirred
    }

    fn answer(&mut self, answer: Reply) {
        let headers = HeaderList(vec![("Retry-After".into(), "1".into())]);
        let (store, now) = (&mut self.store, self.now);
        let (status, body, end) = match answer {
            Ok((status, body)) => (status, body, HttpEvent::Done),
            Err(Fault::Status(status)) => (status, b"no".to_vec(), HttpEvent::Done),
            Err(Fault::Cut) => (200, b"k8s\0\x12\x7f".to_vec(), HttpEvent::Done),
            Err(Fault::Lost | Fault::LateLost) => {
                return store.handle_http(
                    Lane::Unary,
                    HttpEvent::Failed("connection refused"),
                    now,
                );
            }
        };
        store.handle_http(Lane::Unary, HttpEvent::Head { status, headers: &headers }, now);
        for piece in body.chunks(97) {
            store.handle_http(Lane::Unary, HttpEvent::Body(piece), now);
        }
        store.handle_http(Lane::Unary, end, now);
    }

    fn take(&mut self, event: StoreEvent) {
        match event {
            StoreEvent::Config(_) => self.store.identify(Identity::default(), self.now),
            StoreEvent::Found(_) => self.store.acquire(Self::attrs(), self.now),
            StoreEvent::Acquired(own) => self.own = Some(own.lease.subnets),
            StoreEvent::Lost(reason) => {
                self.own = None;
                self.log.push(format!("lost: {reason}"));
            }
            StoreEvent::Snapshot(leases) => {
                self.snapshots += 1;
                self.leases = leases.into_iter().map(|lease| (lease.subnets, lease)).collect();
            }
            StoreEvent::Event(LeaseEvent::Put(lease)) => {
                drop(self.leases.insert(lease.subnets, lease))
            }
            StoreEvent::Event(LeaseEvent::Removed(subnets)) => drop(self.leases.remove(&subnets)),
            StoreEvent::Trouble(text) => self.log.push(text),
            StoreEvent::Recovered => self.log.push("recovered".into()),
            StoreEvent::Renewed(_) => panic!("nothing is renewed here"),
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now.mono += time;
        self.now.wall += time;
    }

    /// Hears of a change, and asks for what it is: the answer takes 50 ms.
    fn begin_to_read(&mut self, server: &mut Server) {
        self.turn(server, None, Duration::from_millis(50));
        self.pass(Duration::from_millis(10));
        self.turn(server, None, Duration::from_millis(50));
    }

    fn cut_watch(&mut self) {
        if self.watch.take().is_some() {
            let event = HttpEvent::Failed("connection reset");
            self.store.handle_http(Lane::Watch, event, self.now);
        }
    }

    /// Nothing goes wrong any more, for so long.
    fn settle(&mut self, server: &mut Server, time: Duration) {
        let end = self.now.mono + time;
        while self.now.mono < end {
            self.turn(server, None, Duration::ZERO);
            let arrives = self.unary.as_ref().map(|(at, _)| *at);
            let next = arrives.into_iter().chain(self.store.poll_timeout()).min();
            let next = next.unwrap_or(end).clamp(self.now.mono, end);
            assert!(
                next > self.now.mono || self.now.mono == end,
                "it would spin: {:?}",
                self.store
            );
            self.pass(next - self.now.mono);
        }
        self.turn(server, None, Duration::ZERO);
    }

    /// What the agent knows is what the server holds.
    fn check(&self, server: &Server) {
        let mut expected: BTreeMap<Subnets, (u64, String)> = BTreeMap::new();
        let mut ips = BTreeMap::new();
        for node in server.nodes.values() {
            let metadata = node.metadata.as_ref().unwrap();
            let published = self.store.prefix.read(&metadata.annotations);
            let config = &self.store.config;
            let (Ok(subnets), Ok(attrs)) =
                (annotations::subnets(&node.pod_cidrs(), config), published.attrs(config))
            else {
                continue;
            };
            if metadata.name == OWN || !published.takes_part() || Some(subnets) == self.own {
                continue;
            }
            let age = (metadata.created(), metadata.name.clone());
            if expected.get(&subnets).is_none_or(|other| age < *other) {
                expected.insert(subnets, age);
                ips.insert(subnets, attrs);
            }
        }
        let known: BTreeMap<Subnets, LeaseAttrs> =
            self.leases.iter().map(|(subnets, lease)| (*subnets, lease.attrs.clone())).collect();
        assert_eq!(known, ips);
        let own = server.nodes.get(OWN);
        let cidr =
            own.and_then(|node| annotations::subnets(&node.pod_cidrs(), &self.store.config).ok());
        assert_eq!(self.own, cidr, "{:?}", self.log);
        if let Some(own) = own.filter(|_| cidr.is_some()) {
            let published = self.store.prefix.read(&own.metadata.as_ref().unwrap().annotations);
            assert!(published.takes_part());
            assert_eq!(published.attrs(&self.store.config), Ok(Self::attrs()));
        }
    }
}

fn cluster(nodes: u64) -> Server {
    let mut server = Server::default();
    server.add(OWN, &["10.244.0.0/24"], "");
    for number in 1..=nodes {
        server.add(
            &format!("n{number}"),
            &[&format!("10.244.{number}.0/24")],
            &format!("192.168.0.{number}"),
        );
    }
    server
}

#[test]
fn joins_and_follows() {
    let (mut server, mut host) = (cluster(5), Host::new(1));
    host.settle(&mut server, Duration::from_secs(1));
    host.check(&server);
    assert_eq!((server.patches, host.snapshots, server.whole_lists), (1, 1, 1));
    server.add("n6", &["10.244.6.0/24"], "192.168.0.6");
    server.annotate("n1", &[("public-ip", "192.168.0.111")]);
    server.delete("n2");
    host.settle(&mut server, Duration::from_secs(1));
    host.check(&server);
    assert_eq!(host.log, [""; 0]);
}

/// A heart-beat is no reason to ask for anything; nor is a node that does not take part.
#[test]
fn heart_beats_ask_for_nothing() {
    let (mut server, mut host) = (cluster(5), Host::new(1));
    host.settle(&mut server, Duration::from_secs(1));
    let before = server.requests;
    for _ in 0..100 {
        for name in ["n1", "n2", "n3", OWN] {
            server.heart_beat(name);
        }
        server.add("plain", &["10.244.77.0/24"], "");
        server.delete("plain");
        host.settle(&mut server, Duration::from_millis(100));
    }
    assert_eq!(server.requests, before);
    host.check(&server);
}

/// An admission plugin that takes our annotations away again is not written against in a circle.
#[test]
fn a_server_that_does_not_keep_what_we_write() {
    let (mut server, mut host) = (cluster(1), Host::new(1));
    server.drops = true;
    host.settle(&mut server, Duration::from_secs(600));
    assert!((3..60).contains(&server.patches), "{}", server.patches);
    assert!(host.log.len() == 1 && host.log[0].contains("does not keep"), "{:?}", host.log);
    server.drops = false;
    host.settle(&mut server, Duration::from_secs(60));
    host.check(&server);
}

/// What can only be put right by another event is not asked for; a podCIDR that comes late is seen with its event.
#[test]
fn ignored_nodes_cost_nothing() {
    let (mut server, mut host) = (cluster(1), Host::new(1));
    for number in 0..50 {
        server.add(&format!("bad{number}"), &[&format!("10.245.{number}.0/24")], "here");
    }
    server.add("early", &[], "192.168.0.50");
    host.settle(&mut server, Duration::from_secs(10));
    let requests = server.requests;
    host.settle(&mut server, Duration::from_secs(3600));
    assert!(server.requests - requests < 15, "{}", server.requests - requests);
    let mut node = wire::node("early", "late", &["10.244.50.0/24"], &[]);
    node.metadata = server.nodes["early"].metadata.clone();
    server.put(node);
    host.settle(&mut server, Duration::from_secs(1));
    host.check(&server);
    assert!(host.leases.len() == 2);
}

/// A node that could not be read and is gone is no trouble any more.
#[test]
fn a_trouble_goes_with_its_node() {
    let (mut server, mut host) = (cluster(2), Host::new(1));
    host.settle(&mut server, Duration::from_secs(1));
    server.annotate("n1", &[("public-ip", "192.168.0.99")]);
    let fetch = |request: &Request| request.path.contains("%3Dn1");
    host.with_fault(&mut server, Duration::from_secs(5), Fault::Status(500), fetch);
    assert_eq!(host.log.len(), 1, "{:?}", host.log);
    host.matches = Some(fetch);
    server.delete("n1");
    host.turn(&mut server, Some(Fault::Status(500)), Duration::ZERO);
    host.matches = None;
    host.settle(&mut server, Duration::from_secs(1));
    assert_eq!(host.log.last().map(String::as_str), Some("recovered"));
}

/// A node that changes while it is read, one that goes, and one that goes and comes back.
#[test]
fn changes_while_a_node_is_read() {
    for change in ["change", "delete", "make anew"] {
        let (mut server, mut host) = (cluster(3), Host::new(1));
        host.settle(&mut server, Duration::from_secs(1));
        server.annotate("n1", &[("public-ip", "192.168.0.101")]);
        // the answer is on its way
        host.begin_to_read(&mut server);
        assert!(host.unary.is_some());
        match change {
            "change" => server.annotate("n1", &[("public-ip", "192.168.0.102")]),
            "delete" => server.delete("n1"),
            _ => {
                server.delete("n1");
                server.add("n1", &["10.244.9.0/24"], "192.168.0.103");
            }
        }
        host.turn(&mut server, None, Duration::ZERO);
        host.pass(Duration::from_millis(60));
        host.settle(&mut server, Duration::from_secs(1));
        host.check(&server);
    }
}

/// Our own node changes while it is read.
#[test]
fn changes_while_our_node_is_read() {
    let (mut server, mut host) = (cluster(1), Host::new(1));
    host.settle(&mut server, Duration::from_secs(1));
    server.annotate(OWN, &[("note", "x"), ("backend-data", "")]);
    host.turn(&mut server, None, Duration::from_millis(50));
    assert!(host.unary.is_some());
    server.annotate(OWN, &[("kube-subnet-manager", "")]);
    server.delete(OWN);
    server.add(OWN, &["10.244.50.0/24"], "");
    host.turn(&mut server, None, Duration::ZERO);
    host.pass(Duration::from_millis(60));
    host.settle(&mut server, Duration::from_secs(5));
    host.check(&server);
}

/// The watch's past is forgotten: the metadata's list finds what has changed, without reading every node.
#[test]
fn a_forgotten_past() {
    let (mut server, mut host) = (cluster(9), Host::new(1));
    host.settle(&mut server, Duration::from_secs(1));
    host.cut_watch();
    server.delete("n1");
    server.annotate("n2", &[("public-ip", "192.168.0.102")]);
    server.add("n10", &["10.244.10.0/24"], "192.168.0.10");
    server.forget();
    let (lists, requests) = (server.whole_lists, server.requests);
    host.settle(&mut server, Duration::from_secs(20));
    host.check(&server);
    assert_eq!(server.whole_lists, lists);
    // our own node, the watch that fails, the list, two nodes, the watch
    assert!(server.requests - requests <= 7, "{}", server.requests - requests);
}

/// So many changes at once that reading all is cheaper.
#[test]
fn a_crowd() {
    let (mut server, mut host) = (cluster(0), Host::new(1));
    host.settle(&mut server, Duration::from_secs(1));
    let requests = server.requests;
    for number in 0..600 {
        let subnet = format!("10.244.{}.{}/26", 1 + number / 4, number % 4 * 64);
        server.add(
            &format!("n{number}"),
            &[&subnet],
            &format!("192.168.{}.{}", 1 + number / 250, 1 + number % 250),
        );
    }
    host.settle(&mut server, Duration::from_secs(20));
    host.check(&server);
    assert_eq!(host.leases.len(), 600);
    assert!(server.requests - requests < 50, "{}", server.requests - requests);
}

#[test]
fn set_back() {
    let (mut server, mut host) = (cluster(3), Host::new(1));
    host.settle(&mut server, Duration::from_secs(1));
    let backup = (server.version, server.nodes.clone());
    for number in 0..20 {
        server.annotate("n1", &[("public-ip", &format!("192.168.0.{}", 100 + number))]);
    }
    server.delete("n2");
    server.add("n4", &["10.244.4.0/24"], "192.168.0.4");
    host.settle(&mut server, Duration::from_secs(1));
    host.check(&server);
    (server.version, server.nodes) = backup;
    server.history.clear();
    host.cut_watch();
    host.settle(&mut server, Duration::from_secs(20));
    host.check(&server);
    server.add("n5", &["10.244.5.0/24"], "192.168.0.5");
    host.settle(&mut server, Duration::from_secs(1));
    host.check(&server);
}

/// What nothing but our node's object says, we wait for; what the operator must do is said once.
#[test]
fn waits_for_the_node() {
    let (mut server, mut host) = (Server::default(), Host::new(1));
    host.settle(&mut server, Duration::from_secs(60));
    assert!(host.log.len() == 1 && host.log[0].contains("no node called"), "{:?}", host.log);
    server.add(OWN, &[], "");
    host.settle(&mut server, Duration::from_secs(60));
    assert!(host.log.len() == 2 && host.log[1].contains("no podCIDR"), "{:?}", host.log);
    server.delete(OWN);
    server.add(OWN, &["10.244.1.0/24"], "");
    host.settle(&mut server, Duration::from_secs(60));
    host.check(&server);
    assert_eq!(host.log.last().map(String::as_str), Some("recovered"));
    assert!(server.requests < 60, "{}", server.requests);
}

/// A server that is away for an hour is asked some hundred times, and one line is said.
#[test]
fn away_for_an_hour() {
    let (mut server, mut host) = (cluster(3), Host::new(1));
    host.settle(&mut server, Duration::from_secs(1));
    host.cut_watch();
    let end = host.now.mono + Duration::from_secs(3600);
    let mut tries = 0;
    while host.now.mono < end {
        host.turn(&mut server, Some(Fault::Lost), Duration::ZERO);
        let next = host.store.poll_timeout().unwrap();
        assert!(next > host.now.mono);
        host.pass(next - host.now.mono);
        tries += 1;
    }
    assert!((300..2000).contains(&tries), "{tries}");
    assert_eq!(host.log, ["connection refused"]);
    server.delete("n1");
    host.settle(&mut server, Duration::from_secs(30));
    host.check(&server);
    assert_eq!(host.log, ["connection refused", "recovered"]);
}

/// `alloc` looks at its own node only.
#[test]
fn alone() {
    let config = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"alloc"}}"#;
    let mut host = Host::with(1, config);
    let (job, request) = {
        host.store.own.due = false;
        host.store.listing = Some(Listing::new(false, request::Freshness::Known));
        host.store.next_task(host.now).unwrap()
    };
    assert_eq!(job, Job::List);
    assert!(request.path.ends_with("&fieldSelector=metadata.name%3Down"), "{}", request.path);
    assert!(host.store.watch("7", 300).path.ends_with("&fieldSelector=metadata.name%3Down"));
}

/// Our subnet goes to another node, and we get another one.
#[test]
fn an_heir_of_our_subnet() {
    let (mut server, mut host) = (cluster(2), Host::new(1));
    host.settle(&mut server, Duration::from_secs(1));
    server.delete(OWN);
    server.add("x", &["10.244.0.0/24"], "192.168.0.77");
    host.settle(&mut server, Duration::from_secs(1));
    server.add(OWN, &["10.244.5.0/24"], "");
    host.settle(&mut server, Duration::from_secs(30));
    host.check(&server);
    // the agent's table cannot have taken it before it had another own subnet: it must be told again
    assert_eq!(host.snapshots, 2);
    assert!(host.leases.len() == 3);
}

/// One node's annotation that is no text must not make the others unreadable.
#[test]
fn what_is_no_text() {
    let (mut server, mut host) = (cluster(2), Host::new(1));
    let bytes = |node: &mut Node, key: &str| {
        let all = &mut node.metadata.as_mut().unwrap().annotations;
        all.push(wire::Annotation { key: key.to_owned().into(), value: b"caf\xe9"[..].into() });
    };
    for (name, key) in
        [("n1", "other.example/x"), ("n2", "flannel.alpha.coreos.com/public-ip-overwrite")]
    {
        let mut node = server.nodes[name].clone();
        bytes(&mut node, key);
        server.put(node);
    }
    host.settle(&mut server, Duration::from_secs(1));
    host.check(&server);
    let mut node = server.nodes["n2"].clone();
    bytes(&mut node, "another.example/y");
    server.put(node);
    server.annotate("n1", &[("public-ip", "192.168.0.200")]);
    host.settle(&mut server, Duration::from_secs(1));
    host.check(&server);
    assert_eq!(host.log, [""; 0]);
}

impl Host {
    /// For so long every exchange that `matches` has this answer.
    fn with_fault(
        &mut self,
        server: &mut Server,
        time: Duration,
        fault: Fault,
        matches: fn(&Request) -> bool,
    ) {
        self.matches = Some(matches);
        let end = self.now.mono + time;
        while self.now.mono < end {
            self.turn(server, Some(fault), Duration::ZERO);
            let next = self.store.poll_timeout().unwrap_or(end).clamp(self.now.mono, end);
            assert!(
                next > self.now.mono || self.now.mono == end,
                "it would spin: {:?}",
                self.store
            );
            self.pass(next - self.now.mono);
        }
        self.matches = None;
    }
}

/// A server that refuses one thing is asked seldom for that, and all else goes on.
#[test]
fn one_refusal_holds_up_nothing_else() {
    let (mut server, mut host) = (cluster(3), Host::new(1));
    host.settle(&mut server, Duration::from_secs(1));
    server.annotate(OWN, &[("public-ip-overwrite", "1.2.3.4")]);
    server.annotate("n1", &[("public-ip", "192.168.0.201")]);
    server.delete("n2");
    let requests = server.requests;
    let patch = |request: &Request| request.method == Method::Patch;
    host.with_fault(&mut server, Duration::from_secs(600), Fault::Status(500), patch);
    assert_eq!(host.leases.len(), 2);
    assert!(
        host.leases.values().any(|lease| lease.attrs.public_ip == Some([192, 168, 0, 201].into()))
    );
    assert!(
        host.refused < 60 && server.requests - requests < 10,
        "{} {}",
        host.refused,
        server.requests - requests
    );
    assert_eq!(host.log.len(), 1, "{:?}", host.log);
    host.settle(&mut server, Duration::from_secs(20));
    assert_eq!(host.log.last().map(String::as_str), Some("recovered"));
}

/// Answers that send us from one exchange to another and back.
#[test]
fn no_circles() {
    let watch = |request: &Request| request.path.contains("watch=true");
    let list = |request: &Request| {
        !request.path.contains("watch=true") && !request.path.contains("fieldSelector")
    };
    for (fault, matches, lists) in [
        (Fault::Status(410), watch as fn(&Request) -> bool, false),
        (Fault::Status(504), watch, false),
        (Fault::Status(429), watch, false),
        (Fault::Status(504), list, true),
        (Fault::Status(410), list, true),
        (Fault::Cut, watch, false),
        (Fault::Lost, watch, false),
    ] {
        let (mut server, mut host) = (cluster(3), Host::new(1));
        host.settle(&mut server, Duration::from_secs(1));
        host.cut_watch();
        if lists {
            server.forget();
            server.heart_beat("n1");
            server.forget();
        }
        let requests = server.requests;
        host.with_fault(&mut server, Duration::from_secs(600), fault, matches);
        let asked = server.requests - requests + host.refused;
        assert!(asked < 1200, "{fault:?}: {asked}");
        assert!(host.log.len() < 5, "{fault:?}: {:?}", host.log);
        server.add("n9", &["10.244.9.0/24"], "192.168.0.9");
        host.settle(&mut server, Duration::from_secs(60));
        host.check(&server);
    }
}

/// Heart-beats while our node is read are no sign that the store was set back.
#[test]
fn not_set_back() {
    let (mut server, mut host) = (cluster(3), Host::new(1));
    host.settle(&mut server, Duration::from_secs(1));
    server.annotate(OWN, &[("public-ip-overwrite", "1.2.3.4")]);
    host.turn(&mut server, None, Duration::from_millis(50));
    assert!(host.unary.is_some());
    for _ in 0..5 {
        server.heart_beat("n1");
    }
    host.turn(&mut server, None, Duration::ZERO);
    let requests = server.requests;
    host.pass(Duration::from_millis(60));
    host.settle(&mut server, Duration::from_secs(5));
    // the patch
    assert_eq!(server.requests - requests, 1);
}

/// A change, taken back before the answer with the change has arrived.
#[test]
fn a_change_that_is_taken_back() {
    let (mut server, mut host) = (cluster(1), Host::new(1));
    host.settle(&mut server, Duration::from_secs(1));
    for (name, key, new, old) in [
        ("n1", "public-ip", "192.168.0.99", "192.168.0.1"),
        (OWN, "public-ip-overwrite", "1.2.3.4", ""),
    ] {
        server.annotate(name, &[(key, new)]);
        host.begin_to_read(&mut server);
        assert!(host.unary.is_some());
        server.annotate(name, &[(key, old)]);
        host.turn(&mut server, None, Duration::ZERO);
        host.pass(Duration::from_millis(60));
        host.settle(&mut server, Duration::from_secs(5));
        host.check(&server);
    }
}

/// Somebody who takes our annotations away now and then is answered at once; somebody who does it again and again is not.
#[test]
fn a_fight_is_forgotten() {
    let (mut server, mut host) = (cluster(1), Host::new(1));
    host.settle(&mut server, Duration::from_secs(1));
    for _ in 0..5 {
        host.settle(&mut server, Duration::from_secs(3600));
        server.annotate(OWN, &[("backend-data", "")]);
        host.settle(&mut server, Duration::from_millis(100));
        host.check(&server);
    }
    assert_eq!(host.log, [""; 0]);
    let patches = server.patches;
    for _ in 0..600 {
        server.annotate(OWN, &[("backend-data", "")]);
        host.settle(&mut server, Duration::from_secs(1));
    }
    assert!((5..40).contains(&(server.patches - patches)), "{}", server.patches - patches);
    assert!(host.log.iter().any(|line| line.contains("another host have this NODE_NAME")));
}

/// Everything at once, many times.
#[test]
fn whatever_happens() {
    let seeds = std::env::var("SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(150);
    for seed in 1..=seeds {
        let (mut server, mut host) = (cluster(6), Host::new(seed));
        for _ in 0..120 {
            let number = host.below(9) + 1;
            let name = format!("n{number}");
            match host.below(24) {
                0 => server.delete(&name),
                1..=3 => {
                    // now and then somebody else's subnet
                    let subnet = if host.chance(6) { host.below(9) + 1 } else { number };
                    server.delete(&name);
                    server.add(
                        &name,
                        &[&format!("10.244.{subnet}.0/24")],
                        &format!("192.168.0.{number}"),
                    );
                }
                4 | 5 => {
                    let ip = format!("192.168.1.{}", host.below(250) + 1);
                    server.annotate(&name, &[("public-ip", &ip)]);
                }
                6 => server.annotate(&name, &[("kube-subnet-manager", "")]),
                7 => server.annotate(&name, &[("public-ip", "bad")]),
                8 => server.add("plain", &["10.244.99.0/24"], ""),
                9 => server.delete("plain"),
                10 => host.cut_watch(),
                11 => server.forget(),
                12 => {
                    server.delete(OWN);
                    let subnet = 100 + host.below(3);
                    server.add(OWN, &[&format!("10.244.{subnet}.0/24")], "");
                }
                13 => server.annotate(OWN, &[("backend-data", "")]),
                14 => server.delete(OWN),
                _ => server.heart_beat(&name),
            }
            let fault = match host.below(8) {
                0 => Some(Fault::Lost),
                1 => Some(Fault::LateLost),
                2 => Some(Fault::Cut),
                3 => Some(Fault::Status(
                    [401, 403, 404, 409, 410, 429, 500, 503, 504]
                        [usize::try_from(host.below(9)).unwrap()],
                )),
                _ => None,
            };
            let delay = Duration::from_millis(host.below(400));
            host.turn(&mut server, fault, delay);
            let time = Duration::from_millis(host.below(1500));
            host.pass(time);
        }
        if !server.nodes.contains_key(OWN) {
            server.add(OWN, &["10.244.100.0/24"], "");
        }
        // longer than any wait
        host.settle(&mut server, Duration::from_secs(1300));
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| host.check(&server)));
        assert!(result.is_ok(), "seed {seed}: {:?}", host.store);
    }
}
