//! What the API server says, in protobuf: the fields that matter here, by the numbers that `generated.proto` of
//! `k8s.io/api/core/v1` and `k8s.io/apimachinery/pkg/apis/meta/v1` give them. All others are skipped unread, a node's status
//! and its managed fields above all.
//!
//! An object travels in an envelope: four bytes, then `runtime.Unknown` with the object in field 2. A watch is a row of
//! frames, each a length of four bytes and a `WatchEvent` whose object has an envelope of its own.

use prost::Message;
use prost::bytes::{Buf, Bytes};

/// Begins every object.
pub(super) const MAGIC: &[u8; 4] = b"k8s\0";

/// `runtime.Unknown`.
#[derive(Clone, PartialEq, Message)]
struct Unknown {
    #[prost(bytes = "bytes", tag = "2")]
    raw: Bytes,
}

/// `meta/v1.ListMeta`.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct ListMeta {
    #[prost(string, tag = "2")]
    pub(super) resource_version: String,
    #[prost(string, tag = "3")]
    pub(super) next: String,
}

/// `meta/v1.Time`.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(super) struct Time {
    #[prost(int64, tag = "1")]
    seconds: i64,
}

/// `meta/v1.ObjectMeta`.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct ObjectMeta {
    #[prost(string, tag = "1")]
    pub(super) name: String,
    #[prost(string, tag = "5")]
    pub(super) uid: String,
    #[prost(string, tag = "6")]
    pub(super) resource_version: String,
    #[prost(message, optional, tag = "8")]
    created: Option<Time>,
    #[prost(message, repeated, tag = "12")]
    pub(super) annotations: Vec<Annotation>,
}

/// An entry of `annotations`. Anybody may have written it, and the server does not mind what is no UTF-8: that must not make
/// the whole object unreadable.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Annotation {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) key: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) value: Bytes,
}

impl ObjectMeta {
    /// When the object was created, in seconds since the epoch.
    pub(super) fn created(&self) -> u64 {
        self.created.and_then(|time| u64::try_from(time.seconds).ok()).unwrap_or(0)
    }
}

/// `meta/v1.PartialObjectMetadata`: any object, without what makes it one.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Metadata {
    #[prost(message, optional, tag = "1")]
    pub(super) metadata: Option<ObjectMeta>,
}

/// `core/v1.Node`.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Node {
    #[prost(message, optional, tag = "1")]
    pub(super) metadata: Option<ObjectMeta>,
    #[prost(message, optional, tag = "2")]
    spec: Option<NodeSpec>,
}

/// `core/v1.NodeSpec`.
#[derive(Clone, PartialEq, Eq, Message)]
struct NodeSpec {
    #[prost(string, tag = "1")]
    pod_cidr: String,
    #[prost(string, repeated, tag = "7")]
    pod_cidrs: Vec<String>,
}

impl Node {
    /// The node's prefixes for pods, as text; none if it has none yet.
    pub(super) fn pod_cidrs(&self) -> Vec<&str> {
        let Some(spec) = &self.spec else { return Vec::new() };
        if spec.pod_cidrs.is_empty() {
            Some(&*spec.pod_cidr).into_iter().filter(|cidr| !cidr.is_empty()).collect()
        } else {
            spec.pod_cidrs.iter().map(|cidr| &**cidr).collect()
        }
    }
}

/// `core/v1.Node`, as far as its conditions.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct NodeConditions {
    #[prost(message, optional, tag = "3")]
    status: Option<NodeStatus>,
}

/// `core/v1.NodeStatus`.
#[derive(Clone, PartialEq, Eq, Message)]
struct NodeStatus {
    #[prost(message, repeated, tag = "4")]
    conditions: Vec<NodeCondition>,
}

/// `core/v1.NodeCondition`.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct NodeCondition {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) kind: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) status: Vec<u8>,
    #[prost(bytes = "vec", tag = "5")]
    pub(super) reason: Vec<u8>,
}

impl NodeConditions {
    /// The condition called `kind`.
    pub(super) fn get(&self, kind: &str) -> Option<&NodeCondition> {
        self.status.as_ref()?.conditions.iter().find(|condition| condition.kind == kind.as_bytes())
    }
}

/// `core/v1.Pod`.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Pod {
    #[prost(message, optional, tag = "2")]
    spec: Option<PodSpec>,
}

/// `core/v1.PodSpec`.
#[derive(Clone, PartialEq, Eq, Message)]
struct PodSpec {
    #[prost(string, tag = "10")]
    node_name: String,
}

impl Pod {
    /// The node that it runs on.
    pub(super) fn node(self) -> Option<String> {
        self.spec.map(|spec| spec.node_name).filter(|name| !name.is_empty())
    }
}

/// `meta/v1.Status`.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Status {
    #[prost(string, tag = "3")]
    pub(super) message: String,
    #[prost(int32, tag = "6")]
    pub(super) code: i32,
}

/// `meta/v1.WatchEvent`.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct WatchEvent {
    #[prost(string, tag = "1")]
    pub(super) kind: String,
    #[prost(message, optional, tag = "2")]
    object: Option<RawExtension>,
}

/// `runtime.RawExtension`.
#[derive(Clone, PartialEq, Eq, Message)]
struct RawExtension {
    #[prost(bytes = "bytes", tag = "1")]
    raw: Bytes,
}

impl WatchEvent {
    /// What it is about.
    ///
    /// # Errors
    /// It is no such object.
    pub(super) fn object<M: Message + Default>(&self) -> Result<M, String> {
        open(self.object.as_ref().map(|object| object.raw.clone()).unwrap_or_default())
    }
}

/// Takes an object out of its envelope. What is given as [`Bytes`] is not copied.
///
/// # Errors
/// It has none, or is another object.
pub(super) fn open<M: Message + Default>(mut bytes: impl Buf) -> Result<M, String> {
    let mut magic = [0; MAGIC.len()];
    if bytes.try_copy_to_slice(&mut magic).is_err() || magic != *MAGIC {
        return Err("the answer is not a Kubernetes object in protobuf".into());
    }
    decode(Unknown::decode(bytes).map_err(wrong)?.raw)
}

/// Reads a message.
///
/// # Errors
/// It is none.
pub(super) fn decode<M: Message + Default>(bytes: impl Buf) -> Result<M, String> {
    M::decode(bytes).map_err(wrong)
}

#[allow(clippy::needless_pass_by_value)] // for map_err
fn wrong(error: prost::DecodeError) -> String {
    format!("the answer is not what was asked for: {error}")
}

/// For tests: an object in its envelope.
#[cfg(test)]
pub(super) fn seal(message: &impl Message) -> Vec<u8> {
    let unknown = Unknown { raw: message.encode_to_vec().into() };
    [&MAGIC[..], &unknown.encode_to_vec()].concat()
}

/// For tests: a frame of a watch.
#[cfg(test)]
pub(super) fn frame(kind: &str, object: &impl Message) -> Vec<u8> {
    let object = Some(RawExtension { raw: seal(object).into() });
    let event = WatchEvent { kind: kind.into(), object }.encode_to_vec();
    [&u32::try_from(event.len()).unwrap().to_be_bytes()[..], &event].concat()
}

/// For tests: a page of a list of nodes, or of their metadata.
#[cfg(test)]
pub(super) fn list(version: &str, next: &str, nodes: &[impl Message]) -> Vec<u8> {
    #[derive(Clone, PartialEq, Message)]
    struct List {
        #[prost(message, optional, tag = "1")]
        metadata: Option<ListMeta>,
        #[prost(bytes = "vec", repeated, tag = "2")]
        items: Vec<Vec<u8>>,
    }
    let metadata = Some(ListMeta { resource_version: version.into(), next: next.into() });
    seal(&List { metadata, items: nodes.iter().map(Message::encode_to_vec).collect() })
}

/// For tests: a node.
#[cfg(test)]
pub(super) fn node(name: &str, uid: &str, cidrs: &[&str], annotations: &[(&str, &str)]) -> Node {
    let annotations = annotations.iter().map(|(key, value)| Annotation {
        key: Bytes::copy_from_slice(key.as_bytes()),
        value: Bytes::copy_from_slice(value.as_bytes()),
    });
    Node {
        metadata: Some(ObjectMeta {
            name: name.into(),
            uid: uid.into(),
            resource_version: "1".into(),
            created: Some(Time { seconds: 1 }),
            annotations: annotations.collect(),
        }),
        spec: Some(NodeSpec {
            pod_cidr: cidrs.first().map(ToString::to_string).unwrap_or_default(),
            pod_cidrs: cidrs.iter().map(ToString::to_string).collect(),
        }),
    }
}

/// For tests: the node's metadata alone.
#[cfg(test)]
pub(super) fn metadata(node: &Node) -> Metadata {
    Metadata { metadata: node.metadata.clone() }
}

/// For tests: the node, made at this second.
#[cfg(test)]
pub(super) fn created(mut node: Node, seconds: i64) -> Node {
    if let Some(metadata) = &mut node.metadata {
        metadata.created = Some(Time { seconds });
    }
    node
}
