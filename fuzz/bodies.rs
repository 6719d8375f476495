//! What is fuzzed: each function takes any bytes and panics if a promise is broken. `fuzz_targets` feed them with new bytes,
//! `tests/corpus.rs` with those of `corpus`.

#![allow(dead_code, unreachable_pub)] // each target runs one
#![allow(clippy::unwrap_used, clippy::disallowed_methods)] // a clock to start from

use std::time::{Duration, Instant, SystemTime};

use flanneld::config::NetworkConfig;
use flanneld::forward::{Joined, Kinds, Merger, Split, complete_checksum};
use flanneld::http::{HeaderList, HttpEvent};
use flanneld::lease::LeaseAttrs;
use flanneld::store::kube::annotations::Prefix;
use flanneld::store::kube::{Kube, Setup, Who};
use flanneld::store::{Identity, Now, Store, StoreEvent, StoreRequest};
use flanneld::wire::vnet::{Header, Kind};
use flanneld::wire::{icmp, icmpv6, ip, ipv4, ipv6, tcp};

use crate::model;

/// Every header: whatever the bytes are, lengths stay within them.
pub fn headers(data: &[u8]) {
    if let Ok(packet) = ip::Packet::new(data) {
        assert!(packet.total_len() <= data.len());
        let _ = (packet.source(), packet.destination());
    }
    if let Ok(packet) = ipv4::Packet::front(data) {
        assert!(packet.header_len() <= packet.bytes().len());
        let _ = (packet.payload(), packet.is_later_fragment());
    }
    if let Ok(packet) = ipv6::Packet::front(data) {
        assert!(packet.upper_layer().is_none_or(|(_, rest)| rest.len() <= data.len()));
    }
    let mut copy = data.to_vec();
    if let Ok(mut packet) = ip::Packet::new(&mut copy[..]) {
        let hop_taken = packet.take_hop();
        assert_eq!(hop_taken, copy != data);
    }
    if let Some(len) = tcp::header_len(data) {
        assert!((20..=60).contains(&len) && len <= data.len());
    }
    if let Some(Ok(header)) = data.first_chunk().map(Header::parse) {
        assert_eq!(Header::parse(&header.to_bytes()), Ok(header));
    }
}

/// A super-packet behind its header: cut as the model cuts it, or refused.
pub fn split(data: &[u8]) {
    let Some((header, packet)) = data.split_first_chunk() else { return };
    let Ok(header) = Header::parse(header) else { return };
    let mut completed = packet.to_vec();
    let _ = complete_checksum(&mut completed, &header);
    let Ok(split) = Split::new(packet, &header) else { return };
    let count = split.count();
    assert!(count >= 1 && count <= packet.len());
    let mut out = vec![0; split.header_len()];
    let payload: usize = (0..count).map(|index| split.segment(packet, index, &mut out).len()).sum();
    assert_eq!(payload + split.header_len(), packet.len());
    // what extension headers do to the pseudo-header is known to the kernel alone
    let is_plain = packet[0] >> 4 == 4 || header.checksum_start == 40;
    if is_plain && count < 100 {
        let expected = model::expand(&Header { kind: header.kind, ..header }, packet);
        assert_eq!(expected.len(), count);
        for (index, expected) in expected.iter().enumerate() {
            let payload = split.segment(packet, index, &mut out);
            assert_eq!([&out[..], &packet[payload]].concat(), *expected);
        }
    }
}

/// Packets one after the other, each behind its length in two bytes: joined and cut by the model they are what they were.
pub fn merge(data: &[u8]) {
    let (mut buffer, mut ranges) = (Vec::new(), Vec::new());
    let mut rest = data;
    while let Some((len, tail)) = rest.split_first_chunk() {
        let (packet, tail) = tail.split_at(usize::from(u16::from_be_bytes(*len)).min(tail.len()));
        rest = tail;
        if let Ok(packet) = ip::Packet::new(packet) {
            let start = buffer.len();
            let bytes = match packet {
                ip::Packet::V4(packet) => packet.bytes().to_vec(),
                ip::Packet::V6(packet) => packet.bytes().to_vec(),
            };
            buffer.extend(bytes);
            ranges.push(start..buffer.len());
        }
    }
    let mut merger = Merger::new(Kinds { tcp: true, udp: true });
    let mut delivered = Vec::new();
    let mut out = |joined: Joined<'_>| {
        let mut bytes = joined.headers.to_vec();
        joined.parts.iter().for_each(|part| bytes.extend(part.of(&buffer)));
        assert!(joined.offload.kind == Kind::Single || joined.parts.len() > 1);
        delivered.extend(model::expand(&joined.offload, &bytes));
    };
    for range in &ranges {
        merger.push(&buffer, range.clone(), &mut out);
    }
    merger.flush(&mut out);
    let comparable = |packets: Vec<Vec<u8>>| {
        let mut keyed: Vec<_> = packets
            .into_iter()
            .map(|packet| (model::flow(&packet), model::without_id(&packet)))
            .collect();
        keyed.sort_by(|(one, _), (other, _)| one.cmp(other)); // stable: order within a flow stays
        keyed
    };
    let came = ranges.into_iter().map(|range| buffer[range].to_vec()).collect();
    assert_eq!(comparable(delivered), comparable(came));
}

/// The front of a packet that cannot be forwarded: an answer is a right packet, and never as long as to be dropped itself.
pub fn refuse(data: &[u8]) {
    for error in
        [icmp::Error::NetUnreachable, icmp::Error::TooBig { mtu: 1400 }, icmp::Error::TimeExceeded]
    {
        match ip::Packet::front(data) {
            Ok(ip::Packet::V4(packet)) => {
                let mut reply = [0; icmp::MAX_ERROR_LEN];
                if let Some(len) = error.reply(&packet, packet.destination(), &mut reply) {
                    let answer = ipv4::Packet::new(&reply[..len]).expect("an answer is a packet");
                    assert_eq!(answer.total_len(), len);
                    assert_eq!(answer.destination(), packet.source());
                    assert_eq!(model::ones_sum(&reply[..20], 0), 0xffff);
                    assert_eq!(model::ones_sum(&reply[20..len], 0), 0xffff);
                    assert!(
                        error
                            .reply(&answer, packet.source(), &mut [0; icmp::MAX_ERROR_LEN])
                            .is_none()
                    );
                }
            }
            Ok(ip::Packet::V6(packet)) => {
                let mut reply = [0; icmpv6::MAX_ERROR_LEN];
                let from = packet.destination();
                if let Some(len) = icmpv6::reply(error, &packet, from, &mut reply) {
                    let answer = ipv6::Packet::new(&reply[..len]).expect("an answer is a packet");
                    assert_eq!(answer.total_len(), len);
                    let mut sealed = reply[..len].to_vec();
                    model::seal_icmpv6(&mut sealed);
                    assert_eq!(sealed, reply[..len]);
                    let mut again = [0; icmpv6::MAX_ERROR_LEN];
                    assert!(icmpv6::reply(error, &answer, from, &mut again).is_none());
                }
            }
            Err(_) => {}
        }
    }
}

/// What an API server says, one answer after the other, separated by the byte 0xfe: whatever it is, the store goes on, and does
/// not ask in circles.
pub fn kubernetes(data: &[u8]) {
    let config = r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"Type":"vxlan"}}"#;
    let setup = Setup {
        who: Who::Node("own".into()),
        prefix: Prefix::parse("flannel.alpha.coreos.com").unwrap(),
        config: NetworkConfig::parse(config).unwrap(),
        set_condition: true,
        endpoints: vec!["https://10.0.0.1".into()],
        credential: String::new(),
    };
    let mut store = Kube::new(setup, 1);
    let mut now = Now { mono: Instant::now(), wall: SystemTime::UNIX_EPOCH };
    let headers = HeaderList::default();
    let mut answers = data.split(|byte| *byte == 0xfe);
    for _ in 0..32 {
        let mut asked = 0;
        while let Some(request) = store.poll_request(now) {
            asked += 1;
            assert!(asked < 8, "it asks in circles");
            let StoreRequest::Start(lane, _) = request else { continue };
            let Some(answer) = answers.next() else { return };
            store.handle_http(lane, HttpEvent::Head { status: 200, headers: &headers }, now);
            for piece in answer.chunks(50) {
                store.handle_http(lane, HttpEvent::Body(piece), now);
            }
            store.handle_http(lane, HttpEvent::Done, now);
        }
        while let Some(event) = store.poll_event() {
            match event {
                StoreEvent::Config(_) => store.identify(Identity::default(), now),
                StoreEvent::Found(_) => store.acquire(LeaseAttrs::default(), now),
                _ => {}
            }
        }
        store.set_ready();
        now.mono += Duration::from_secs(60);
    }
}
