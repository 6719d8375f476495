//! Many hosts on one etcd that exists in memory only: every exchange can be lost before or after it took effect, hosts
//! sleep, leases run out, history is forgotten. A clock that only the test moves.

#![allow(clippy::disallowed_methods)] // one reading, to start the fake clock from

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use super::*;
use crate::cli::settings::Etcd as Settings;
use crate::http::{HeaderList, Method};
use crate::lease::Lease;

const CONFIG: &str = r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.1.0","SubnetMax":"10.5.6.0"}"#;
const MARGIN: Duration = Duration::from_secs(3600);

#[derive(Clone)]
struct Kv {
    value: String,
    created: u64,
    modified: u64,
    lease: u64,
}

/// An etcd in memory, with the gateway's view of it.
#[derive(Default)]
struct Server {
    revision: u64,
    kvs: BTreeMap<String, Kv>,
    leases: BTreeMap<u64, Instant>,
    next_lease: u64,
    history: Vec<(u64, Value)>,
    compacted: u64,
    writes: u64,
    requests: u64,
    /// The disk is full, or we may only read.
    read_only: bool,
}

fn number(value: &Value) -> u64 {
    value.as_str().map_or(0, |text| text.parse().unwrap())
}

fn text(value: &Value) -> String {
    String::from_utf8(BASE64.decode(value.as_str().unwrap_or_default()).unwrap()).unwrap()
}

impl Server {
    fn put(&mut self, key: &str, value: &str, lease: u64) {
        self.revision += 1;
        self.writes += 1;
        let created = self.kvs.get(key).map_or(self.revision, |kv| kv.created);
        let kv = Kv { value: value.into(), created, modified: self.revision, lease };
        self.history.push((self.revision, json!({"kv": Self::json(key, &kv)})));
        self.kvs.insert(key.into(), kv);
    }

    fn delete(&mut self, key: &str) {
        if self.kvs.remove(key).is_some() {
            self.revision += 1;
            let kv = json!({"key": BASE64.encode(key), "mod_revision": self.revision.to_string()});
            self.history.push((self.revision, json!({"type": "DELETE", "kv": kv})));
        }
    }

    fn compact(&mut self) {
        self.compacted = self.revision;
        self.history.clear();
    }

    fn expire(&mut self, now: Instant) {
        let over: Vec<u64> =
            self.leases.iter().filter(|(_, end)| **end <= now).map(|(id, _)| *id).collect();
        for id in over {
            self.leases.remove(&id);
            let keys: Vec<String> = self
                .kvs
                .iter()
                .filter(|(_, kv)| kv.lease == id)
                .map(|(key, _)| key.clone())
                .collect();
            keys.iter().for_each(|key| self.delete(key));
        }
    }

    fn json(key: &str, kv: &Kv) -> Value {
        json!({
            "key": BASE64.encode(key),
            "value": BASE64.encode(&kv.value),
            "create_revision": kv.created.to_string(),
            "mod_revision": kv.modified.to_string(),
            "lease": kv.lease.to_string(),
        })
    }

    fn header(&self) -> Value {
        json!({"revision": self.revision.to_string()})
    }

    fn in_range<'a>(
        &'a self,
        body: &Value,
    ) -> impl Iterator<Item = (&'a String, &'a Kv)> + use<'a> {
        let (from, end) =
            (text(&body["key"]), body["range_end"].as_str().map(|_| text(&body["range_end"])));
        self.kvs.range(from.clone()..).take_while(move |(key, _)| match &end {
            Some(end) => *key < end,
            None => **key == from,
        })
    }

    fn answer(&mut self, path: &str, body: &[u8], now: Instant) -> (u16, Value) {
        let body: Value = serde_json::from_slice(body).unwrap();
        let header = self.header();
        self.requests += 1;
        if self.read_only && path == "/v3/kv/txn" {
            return (
                429,
                json!({"code": 8, "message": "etcdserver: mvcc: database space exceeded"}),
            );
        }
        let reply = match path {
            "/v3/kv/range" => {
                let newest = number(&body["min_create_revision"]);
                let kvs: Vec<Value> = self
                    .in_range(&body)
                    .filter(|(_, kv)| kv.created >= newest)
                    .map(|(key, kv)| Self::json(key, kv))
                    .collect();
                json!({"header": header, "kvs": kvs})
            }
            "/v3/lease/grant" => {
                self.next_lease += 1;
                let ttl = number(&body["TTL"]);
                self.leases.insert(self.next_lease, now + Duration::from_secs(ttl));
                json!({"header": header, "ID": self.next_lease.to_string(), "TTL": ttl.to_string()})
            }
            "/v3/lease/revoke" => {
                self.leases.remove(&number(&body["ID"]));
                json!({"header": header})
            }
            "/v3/lease/timetolive" => {
                let end = self.leases.get(&number(&body["ID"]));
                let ttl = end.map_or("-1".into(), |end| {
                    end.saturating_duration_since(now).as_secs().to_string()
                });
                json!({"header": header, "TTL": ttl})
            }
            "/v3/kv/txn" => {
                let holds =
                    body["compare"].as_array().unwrap().iter().all(
                        |compare| match compare["target"].as_str() {
                            Some("VERSION") => self.in_range(compare).next().is_none(),
                            _ => self
                                .in_range(compare)
                                .any(|(_, kv)| kv.modified == number(&compare["mod_revision"])),
                        },
                    );
                if !holds {
                    return (200, json!({"header": header}));
                }
                let put = &body["success"][0]["request_put"];
                if put.is_null() {
                    self.delete(&text(&body["success"][0]["request_delete_range"]["key"]));
                } else {
                    let lease = number(&put["lease"]);
                    if lease != 0 && !self.leases.contains_key(&lease) {
                        return (404, json!({"code": 5, "message": "requested lease not found"}));
                    }
                    self.put(&text(&put["key"]), &text(&put["value"]), lease);
                }
                json!({"header": self.header(), "succeeded": true})
            }
            other => panic!("{other}"),
        };
        (200, reply)
    }
}

/// One host's machine, and how far its exchanges are.
struct Host {
    store: Etcd,
    ip: String,
    unary: Option<(u16, Value)>,
    /// The next revision that the open watch shows.
    watching: Option<u64>,
    acquired: Vec<String>,
    holds: Option<String>,
    view: BTreeMap<Subnets, Lease>,
    events: Vec<String>,
    asleep: bool,
}

struct World {
    server: Server,
    now: Now,
    hosts: Vec<Host>,
    seed: u64,
    /// Of a thousand exchanges so many are lost.
    loss: u64,
    away: bool,
    /// Of a thousand answers so many have a wrong byte in them.
    noise: u64,
}

impl World {
    fn new(hosts: u8, loss: u64, seed: u64) -> Self {
        let mut server = Server { revision: 1, ..Server::default() };
        server.put("/coreos.com/network/config", CONFIG, 0);
        let now = Now { mono: Instant::now(), wall: SystemTime::now() };
        let hosts = (0..hosts).map(|number| Host::new(number, seed)).collect();
        Self { server, now, hosts, seed: seed | 1, loss, away: false, noise: 0 }
    }

    fn random(&mut self, below: u64) -> u64 {
        self.seed = self
            .seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.seed >> 33) % below
    }

    fn pass(&mut self, time: Duration) {
        self.now = Now { mono: self.now.mono + time, wall: self.now.wall + time };
        self.server.expire(self.now.mono);
    }

    /// Each host that is awake does one thing.
    fn step(&mut self) {
        for number in 0..self.hosts.len() {
            if !self.hosts[number].asleep {
                self.step_host(number);
            }
        }
        self.check();
    }

    fn step_host(&mut self, number: usize) {
        let (lost, late) = (self.away || self.random(1000) < self.loss, self.random(2) == 0);
        let manner = self.random(4);
        let noise =
            (self.random(1000) < self.noise).then(|| (self.random(1 << 20), self.random(256)));
        let now = self.now;
        let host = &mut self.hosts[number];
        if let Some((status, reply)) = host.unary.take() {
            let headers = HeaderList::default();
            if lost {
                match manner {
                    0 => {
                        host.store.handle_http(
                            Lane::Unary,
                            HttpEvent::Head { status: 500, headers: &headers },
                            now,
                        );
                        host.store.handle_http(Lane::Unary, HttpEvent::Body(b"<h1>oops</h1>"), now);
                        host.store.handle_http(Lane::Unary, HttpEvent::Done, now);
                    }
                    1 => {
                        host.store.handle_http(
                            Lane::Unary,
                            HttpEvent::Head { status, headers: &headers },
                            now,
                        );
                        let half = reply.to_string().into_bytes();
                        host.store.handle_http(
                            Lane::Unary,
                            HttpEvent::Body(&half[..half.len() / 2]),
                            now,
                        );
                        // an answer of unknown length just ends
                        host.store.handle_http(Lane::Unary, HttpEvent::Done, now);
                    }
                    _ => host.store.handle_http(
                        Lane::Unary,
                        HttpEvent::Failed("the answer was lost"),
                        now,
                    ),
                }
            } else {
                host.store.handle_http(
                    Lane::Unary,
                    HttpEvent::Head { status, headers: &headers },
                    now,
                );
                let bytes = spoilt(reply.to_string().into_bytes(), noise);
                let (first, second) = bytes.split_at(bytes.len() / 2);
                host.store.handle_http(Lane::Unary, HttpEvent::Body(first), now);
                host.store.handle_http(Lane::Unary, HttpEvent::Body(second), now);
                host.store.handle_http(Lane::Unary, HttpEvent::Done, now);
            }
        }
        if let Some(next) = host.watching {
            if lost {
                host.watching = None;
                if manner == 0 {
                    host.store.handle_http(
                        Lane::Watch,
                        HttpEvent::Body(br#"{"result":{"events":[{"kv":{"#),
                        now,
                    );
                }
                host.store.handle_http(Lane::Watch, HttpEvent::Failed("the connection broke"), now);
            } else if next <= self.server.compacted {
                host.watching = None;
                let compacted = self.server.compacted.to_string();
                let line = json!({"result": {"canceled": true, "compact_revision": compacted}})
                    .to_string();
                host.store.handle_http(Lane::Watch, HttpEvent::Body(line.as_bytes()), now);
            } else if self.server.revision >= next {
                let events: Vec<&Value> = self
                    .server
                    .history
                    .iter()
                    .filter(|(revision, _)| *revision >= next)
                    .map(|(_, event)| event)
                    .collect();
                let line = json!({"result": {"header": self.server.header(), "events": events}});
                let line = spoilt(line.to_string().into_bytes(), noise);
                host.watching = Some(self.server.revision + 1);
                host.store.handle_http(Lane::Watch, HttpEvent::Body(&line), now);
            }
        }
        host.drain_events(now);
        while let Some(request) = host.store.poll_request(now) {
            match request {
                StoreRequest::Cancel(Lane::Watch) => host.watching = None,
                StoreRequest::Cancel(Lane::Unary) => host.unary = None,
                StoreRequest::Start(Lane::Watch, request) => {
                    let body: Value = serde_json::from_slice(&request.body).unwrap();
                    let start = number_of(&body);
                    let headers = HeaderList::default();
                    host.store.handle_http(
                        Lane::Watch,
                        HttpEvent::Head { status: 200, headers: &headers },
                        now,
                    );
                    let mut open = json!({"header": self.server.header(), "created": true});
                    let forgotten = start <= self.server.compacted;
                    if forgotten {
                        open["compact_revision"] = self.server.compacted.to_string().into();
                        open["canceled"] = true.into();
                    }
                    host.watching = (!forgotten).then_some(start);
                    let line = json!({"result": open}).to_string();
                    host.store.handle_http(Lane::Watch, HttpEvent::Body(line.as_bytes()), now);
                }
                StoreRequest::Start(Lane::Unary, request) => {
                    assert_eq!(request.method, Method::Post);
                    if lost && late {
                        host.store.handle_http(
                            Lane::Unary,
                            HttpEvent::Failed("connection refused"),
                            now,
                        );
                    } else {
                        host.unary =
                            Some(self.server.answer(&request.path, &request.body, now.mono));
                    }
                }
            }
            host.drain_events(now);
        }
    }

    /// No two hosts hold the same subnet, as far as the store and the hosts that it can tell know.
    fn check(&self) {
        let mut owners: BTreeMap<&str, &str> = BTreeMap::new();
        for (key, kv) in &self.server.kvs {
            if let Some(key) = key.strip_prefix("/coreos.com/network/subnets/") {
                assert!(owners.insert(key, &kv.value).is_none());
            }
        }
        for host in self.hosts.iter().filter(|host| !host.asleep) {
            let Some(holds) = &host.holds else { continue };
            let Some(value) = owners.get(holds.as_str()) else { continue };
            let told = host.watching.is_some_and(|next| next > self.server.revision);
            assert!(
                !told || value.contains(&host.ip),
                "{} believes to hold {holds}, which has {value}",
                host.ip
            );
        }
    }

    fn run(&mut self, steps: usize) {
        for _ in 0..steps {
            self.step();
            let millis = self.random(300);
            self.pass(Duration::from_millis(millis));
        }
    }

    /// Everybody has a subnet of their own, sees all others, and says nothing more.
    fn assert_settled(&mut self) {
        self.loss = 0;
        self.run(400);
        let held: BTreeSet<&String> =
            self.hosts.iter().filter_map(|host| host.holds.as_ref()).collect();
        assert_eq!(held.len(), self.hosts.len());
        for host in &self.hosts {
            let others: BTreeSet<String> = host
                .view
                .keys()
                .map(key::format)
                .filter(|key| Some(key) != host.holds.as_ref())
                .collect();
            let expected: BTreeSet<String> = held
                .iter()
                .filter(|key| host.holds.as_ref() != Some(**key))
                .map(|key| (*key).clone())
                .collect();
            let stored: Vec<&String> = self.server.kvs.keys().collect();
            assert_eq!(
                others, expected,
                "as {} sees it, with {stored:?}: {:?}",
                host.ip, host.events
            );
        }
        let writes = self.server.writes;
        self.run(400);
        assert_eq!(self.server.writes, writes, "nothing changes");
    }
}

/// Overwrites one byte.
fn spoilt(mut bytes: Vec<u8>, noise: Option<(u64, u64)>) -> Vec<u8> {
    if let Some((at, value)) = noise {
        let at = usize::try_from(at).unwrap() % bytes.len();
        bytes[at] = u8::try_from(value).unwrap();
    }
    bytes
}

fn number_of(body: &Value) -> u64 {
    number(&body["create_request"]["start_revision"])
}

impl Host {
    fn new(number: u8, seed: u64) -> Self {
        let settings = Settings {
            endpoints: vec!["http://a".into(), "http://b".into()],
            prefix: "/coreos.com/network".into(),
            api: EtcdApi::V3,
            ca: None,
            identity: None,
            user: None,
        };
        Self {
            store: Etcd::new(&settings, MARGIN, seed.wrapping_mul(u64::from(number) + 1)),
            ip: format!("\"192.0.2.{number}\""),
            unary: None,
            watching: None,
            acquired: Vec::new(),
            holds: None,
            view: BTreeMap::new(),
            events: Vec::new(),
            asleep: false,
        }
    }

    fn attrs(&self) -> LeaseAttrs {
        LeaseAttrs { public_ip: self.ip.trim_matches('"').parse().ok(), ..LeaseAttrs::default() }
    }

    fn drain_events(&mut self, now: Now) {
        while let Some(event) = self.store.poll_event() {
            self.events.push(format!("{event:?}").chars().take(90).collect());
            match event {
                StoreEvent::Config(_) => {
                    let public_ip = self.attrs().public_ip;
                    self.store.identify(Identity { public_ip, ..Identity::default() }, now);
                }
                StoreEvent::Found(_) => self.store.acquire(self.attrs(), now),
                StoreEvent::Acquired(own) => {
                    let key = key::format(&own.lease.subnets);
                    self.acquired.push(key.clone());
                    self.holds = Some(key);
                }
                StoreEvent::Lost(_) => self.holds = None,
                StoreEvent::Snapshot(leases) => {
                    self.view = leases.into_iter().map(|lease| (lease.subnets, lease)).collect();
                }
                StoreEvent::Event(LeaseEvent::Put(lease)) => {
                    drop(self.view.insert(lease.subnets, lease))
                }
                StoreEvent::Event(LeaseEvent::Removed(subnets)) => drop(self.view.remove(&subnets)),
                StoreEvent::Renewed(_) | StoreEvent::Trouble(_) | StoreEvent::Recovered => {}
            }
        }
    }

    fn count(&self, what: &str) -> usize {
        self.events.iter().filter(|event| event.starts_with(what)).count()
    }
}

#[test]
fn hosts_that_start_together_settle() {
    let mut world = World::new(4, 0, 7);
    world.run(60);
    world.assert_settled();
    for host in &world.hosts {
        assert_eq!(
            (host.acquired.len(), host.count("Trouble"), host.count("Lost")),
            (1, 0, 0),
            "{:?}",
            host.events
        );
    }
}

/// Promise 6, at random: whatever is lost, late, asleep or forgotten, no two hosts own one subnet, and all is well afterwards.
#[test]
fn no_two_hosts_own_one_subnet_whatever_happens() {
    for seed in 0..100 {
        let mut world = World::new(4, 100, seed * 7919 + 13);
        for _ in 0..12 {
            world.run(30);
            match world.random(6) {
                0 => world.server.compact(),
                1 => {
                    let number = usize::try_from(world.random(4)).unwrap();
                    world.hosts[number].asleep ^= true;
                }
                2 => {
                    let keys: Vec<String> = world
                        .server
                        .kvs
                        .keys()
                        .filter(|key| key.contains("/subnets/"))
                        .cloned()
                        .collect();
                    if !keys.is_empty() {
                        let at = usize::try_from(world.random(u64::try_from(keys.len()).unwrap()))
                            .unwrap();
                        world.server.delete(&keys[at]);
                    }
                }
                3 => world.pass(Duration::from_secs(25 * 3600)),
                4 => world.away ^= true,
                _ => world.pass(Duration::from_secs(3600)),
            }
        }
        world.away = false;
        world.hosts.iter_mut().for_each(|host| host.asleep = false);
        world.loss = 0;
        world.run(200);
        world.assert_settled();
    }
}

#[test]
fn a_lease_is_renewed_in_time_and_only_then() {
    let mut world = World::new(1, 0, 3);
    world.run(40);
    let writes = world.server.writes;
    let margin = MARGIN.as_secs();
    let due = world.hosts[0]
        .store
        .poll_timeout()
        .unwrap()
        .saturating_duration_since(world.now.mono)
        .as_secs();
    assert!((86_400 - margin - 30..=86_400 - margin).contains(&due), "{due}");
    world.pass(Duration::from_secs(due - 10));
    world.run(10);
    assert_eq!(world.server.writes, writes);
    world.pass(Duration::from_secs(20));
    world.run(10);
    assert_eq!((world.server.writes, world.hosts[0].count("Renewed")), (writes + 1, 1));
    // the store is away when the next renewal is due, and back before the end
    world.pass(Duration::from_secs(86_400 - margin + 10));
    world.away = true;
    world.run(50);
    world.away = false;
    world.run(50);
    assert_eq!(
        (world.server.writes, world.hosts[0].acquired.len()),
        (writes + 2, 1),
        "{:?}",
        world.hosts[0].events
    );
    assert_eq!((world.hosts[0].count("Lost"), world.hosts[0].count("Recovered")), (0, 1));
}

#[test]
fn an_outage_is_told_once_and_costs_little() {
    let mut world = World::new(1, 0, 5);
    world.run(40);
    let before = world.hosts[0].events.len();
    world.away = true;
    for _ in 0..5000 {
        world.step();
        let wait = world.hosts[0]
            .store
            .poll_timeout()
            .map(|at| at.saturating_duration_since(world.now.mono));
        world.pass(wait.unwrap_or_default() + Duration::from_millis(1));
    }
    let said = &world.hosts[0].events[before..];
    assert!(said.len() <= 5, "{said:?}");
    world.away = false;
    world.run(60);
    world.assert_settled();
}

#[test]
fn two_hosts_with_one_address_do_not_write_for_ever() {
    let mut world = World::new(2, 0, 9);
    world.hosts[1].ip = world.hosts[0].ip.clone();
    world.hosts[1].asleep = true;
    world.run(60);
    world.hosts[1].asleep = false;
    world.run(60);
    // the second one publishes something else under the same address
    let attrs = LeaseAttrs { backend_type: "other".into(), ..world.hosts[1].attrs() };
    let now = world.now;
    world.hosts[1].store.acquire(attrs, now);
    let writes = world.server.writes;
    world.run(2000); // five minutes
    assert!(world.server.writes - writes < 60, "{} writes", world.server.writes - writes);
    let told = |host: &Host| {
        host.events.iter().any(|event| event.contains("something else writes our lease"))
    };
    assert!(
        world.hosts.iter().any(told),
        "{:?}",
        world.hosts.iter().map(|host| &host.events).collect::<Vec<_>>()
    );
}

#[test]
fn an_older_lease_that_overlaps_is_yielded_to() {
    let mut world = World::new(1, 0, 11);
    // step by step until our lease is created and not yet confirmed
    let ours = loop {
        world.step();
        if let Some((key, kv)) = world.server.kvs.iter().find(|(key, _)| key.contains("/subnets/"))
        {
            break Lease {
                subnets: key::parse(key.rsplit('/').next().unwrap()).unwrap(),
                attrs: LeaseAttrs::default(),
                created: kv.created,
            };
        }
    };
    // a lease of half the length, created just before ours, by a host with another config
    let half = key::format(&ours.subnets).replace("-24", "-25");
    let kv = Kv {
        value: r#"{"PublicIP":"192.0.2.99"}"#.into(),
        created: ours.created - 1,
        modified: ours.created - 1,
        lease: 0,
    };
    world.hosts[0].store.cursor = Some(ours.created - 2);
    world.server.kvs.insert(format!("/coreos.com/network/subnets/{half}"), kv);
    world.run(100);
    let host = &world.hosts[0];
    assert_eq!((host.acquired.len(), host.count("Lost")), (1, 0), "{:?}", host.events);
    assert_ne!(host.acquired[0], key::format(&ours.subnets));
}

/// A wrong byte in an answer can mean anything, so nothing is promised but that the machine goes on.
#[test]
fn answers_with_wrong_bytes_are_survived() {
    for seed in 0..40 {
        let mut world = World::new(3, 20, seed * 31 + 5);
        world.noise = 300;
        for _ in 0..300 {
            for number in 0..world.hosts.len() {
                world.step_host(number);
            }
            world.pass(Duration::from_millis(150));
        }
        world.noise = 0;
        world.loss = 0;
        for _ in 0..300 {
            for number in 0..world.hosts.len() {
                world.step_host(number);
            }
            world.pass(Duration::from_millis(150));
        }
        for host in &world.hosts {
            assert!(
                host.store.watch_open && host.store.own.is_some(),
                "seed {seed}, {}: {:?}",
                host.ip,
                host.events
            );
        }
    }
}

#[test]
fn a_store_that_can_only_be_read_is_told_once_and_not_hammered() {
    let mut world = World::new(1, 0, 17);
    world.server.read_only = true;
    world.run(2000); // five minutes
    let host = &world.hosts[0];
    assert_eq!((host.count("Trouble"), host.count("Recovered")), (1, 0), "{:?}", host.events);
    assert!(world.server.requests < 600, "{} requests", world.server.requests);
    assert_eq!(world.server.leases.len(), 0, "what was granted in vain is given back");
    world.server.read_only = false;
    world.run(100);
    world.assert_settled();
}

/// A key that begins like one of a subnet does not keep us from the subnet, and does not make us try for ever.
#[test]
fn keys_that_look_like_a_subnet_block_nothing() {
    let mut world = World::new(1, 0, 19);
    for number in 1..=6 {
        world.server.put(&format!("/coreos.com/network/subnets/10.5.{number}.0-24.bak"), "{}", 0);
        world.server.put(&format!("/coreos.com/network/subnets/10.5.{number}.0-24/x"), "{}", 0);
    }
    world.server.put("/coreos.com/network/subnets/10.5.6.0-24&rubbish", "{}", 0);
    world.run(60);
    assert!(
        world.hosts[0].holds.as_ref().is_some_and(|key| key != "10.5.6.0-24"),
        "{:?}",
        world.hosts[0].events
    );
}
