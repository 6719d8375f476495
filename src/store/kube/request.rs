//! What is asked of the API server, and what its refusals mean.

use std::time::Duration;

use super::wire::{self, Status};
use super::{Job, Kube, Who};
use crate::http::{HeaderList, Method, Request, escape};
use crate::quote::shorten;

/// Time limit of a short request. The server may let it queue for a while before it is served.
const DEADLINE: Duration = Duration::from_secs(20);
/// A long list may take longer, if bytes keep coming.
const LIST_DEADLINE: Duration = Duration::from_secs(300);
const LIST_SILENCE: Duration = Duration::from_secs(45);
/// Nodes on a page.
const PAGE: usize = 500;
/// Longest answer that is not split, and longest refusal, in bytes.
const LONGEST: usize = 4 << 20;
/// Longest wait that a server may ask for.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

const OBJECTS: &str = "application/vnd.kubernetes.protobuf";
/// A server that cannot leave out the rest sends it, and it is not looked at.
const METADATA: &str = "application/vnd.kubernetes.protobuf;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/vnd.kubernetes.protobuf";
const METADATA_LIST: &str = "application/vnd.kubernetes.protobuf;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/vnd.kubernetes.protobuf";
const PATCH: &str = "application/strategic-merge-patch+json";

/// From where a list is answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Freshness {
    /// From the server's cache, not older than what we know: 5,000 agents that start together do not read 5,000 lists from
    /// etcd, and a server whose cache lags behind does not make us forget anybody.
    Known,
    /// From etcd.
    Now,
}

/// An answer under way.
#[derive(Debug, Default)]
pub(super) struct Answer {
    pub(super) status: u16,
    retry_after: Option<Duration>,
    pub(super) body: Vec<u8>,
}

/// What the server says instead of an answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Refusal {
    /// HTTP status, or that of a watch's error.
    pub(super) status: u16,
    /// The server's words.
    pub(super) message: String,
    /// How long it wants to be left alone.
    pub(super) retry_after: Option<Duration>,
}

impl Answer {
    pub(super) fn head(status: u16, headers: &HeaderList) -> Self {
        let seconds = headers.get("retry-after").and_then(|text| text.trim().parse().ok());
        let retry_after = seconds.map(|seconds| Duration::from_secs(seconds).min(LONGEST_WAIT));
        Self { status, retry_after, body: Vec::new() }
    }

    pub(super) fn body(&mut self, bytes: &[u8]) {
        let room = LONGEST.saturating_sub(self.body.len());
        self.body.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }

    pub(super) fn is_ok(&self) -> bool {
        (200..300).contains(&self.status)
    }

    pub(super) fn refusal(&self) -> Refusal {
        let said = match wire::open::<Status>(&*self.body) {
            Ok(status) => status.message,
            Err(_) => serde_json::from_slice::<serde_json::Value>(&self.body)
                .ok()
                .and_then(|status| Some(status.get("message")?.as_str()?.to_owned()))
                .unwrap_or_else(|| String::from_utf8_lossy(&self.body).trim().to_owned()),
        };
        Refusal { status: self.status, message: shorten(&said), retry_after: self.retry_after }
    }
}

impl Refusal {
    /// Is what we go on from too old for the server, or newer than all that it knows?
    pub(super) fn is_expired(&self) -> bool {
        self.status == 410
            || self.status == 504 && self.message.contains("Too large resource version")
    }
}

impl Kube {
    pub(super) fn get(&self, path: String, accept: &'static str) -> Request {
        Request {
            endpoint: self.endpoint,
            method: Method::Get,
            path,
            headers: vec![("accept", accept.into())],
            body: Vec::new(),
            deadline: Some(DEADLINE),
            silence: None,
        }
    }

    /// The pod that we are.
    pub(super) fn get_pod(&self, namespace: &str, name: &str) -> Request {
        self.get(format!("/api/v1/namespaces/{namespace}/pods/{name}"), OBJECTS)
    }

    /// One node, as a list: that needs no right to `get`, which old manifests do not give, and a node that is not there is no
    /// error. Not older than `version`; straight from etcd if that is empty.
    pub(super) fn get_node(&self, name: &str, version: &str) -> Request {
        let since =
            if version.is_empty() { String::new() } else { format!("&resourceVersion={version}") };
        self.get(format!("/api/v1/nodes?fieldSelector=metadata.name%3D{name}{since}"), OBJECTS)
    }

    /// A page of the list of nodes, whole or their metadata only.
    pub(super) fn list(&self, metadata_only: bool, freshness: Freshness, next: &str) -> Request {
        let selector = self.selector();
        let page = match freshness {
            _ if !next.is_empty() => format!("limit={PAGE}&continue={}", escape(next, b"")),
            Freshness::Known => {
                let own = self.own.node.as_ref().map(|node| &*node.version);
                let known = self.cursor.as_deref().or(own).unwrap_or("0");
                format!("resourceVersion={known}&resourceVersionMatch=NotOlderThan")
            }
            Freshness::Now => format!("limit={PAGE}"),
        };
        let accept = if metadata_only { METADATA_LIST } else { OBJECTS };
        let request = self.get(format!("/api/v1/nodes?{page}{selector}"), accept);
        Request { deadline: Some(LIST_DEADLINE), silence: Some(LIST_SILENCE), ..request }
    }

    /// Changes of nodes' metadata since `cursor`, for so many seconds.
    pub(super) fn watch(&self, cursor: &str, seconds: u64) -> Request {
        let selector = self.selector();
        let path = format!(
            "/api/v1/nodes?watch=true&allowWatchBookmarks=true&resourceVersion={cursor}&timeoutSeconds={seconds}{selector}"
        );
        let silence = Some(Duration::from_secs(seconds + 30));
        Request { deadline: None, silence, ..self.get(path, METADATA) }
    }

    /// A change of our own node.
    pub(super) fn patch(&self, body: Vec<u8>) -> Request {
        let request = self.get(format!("/api/v1/nodes/{}/status", self.node_name()), METADATA);
        let headers = vec![("accept", METADATA.into()), ("content-type", PATCH.into())];
        Request { method: Method::Patch, headers, body, ..request }
    }

    /// A host that follows nobody looks at its own node only.
    fn selector(&self) -> String {
        if self.alone {
            format!("&fieldSelector=metadata.name%3D{}", self.node_name())
        } else {
            String::new()
        }
    }

    /// What a job does, for messages.
    pub(super) fn called(&self, job: Job) -> String {
        let node = self.node_name();
        match job {
            Job::Name => match &self.who {
                Who::Pod { namespace, name } => format!("read pod {namespace}/{name}"),
                Who::Node(_) => "read our pod".into(),
            },
            Job::Own => format!("read node {node:?}"),
            Job::Publish => format!("publish our lease as annotations of node {node:?}"),
            Job::Condition => format!("set the condition NetworkUnavailable of node {node:?}"),
            Job::List => "list the nodes".into(),
            Job::Fetch => "read a node that has changed".into(),
        }
    }

    /// A refusal of a job, for the operator.
    pub(super) fn explain_job(&self, job: Job, refusal: &Refusal) -> String {
        let right = match job {
            Job::Name => "get pods",
            Job::Publish | Job::Condition => "patch nodes/status",
            Job::Own | Job::List | Job::Fetch => "list nodes",
        };
        self.explain(&self.called(job), right, refusal)
    }

    /// A refusal, for the operator: what was refused, why, and what to do. `right` is what it takes.
    pub(super) fn explain(&self, what: &str, right: &str, refusal: &Refusal) -> String {
        let Refusal { status, message, .. } = refusal;
        let said = if message.is_empty() { String::new() } else { format!(": {message}") };
        let remedy = match status {
            401 => format!(
                "; the API server does not know us: {} is no credential of this cluster, or has run out",
                self.credential
            ),
            403 => format!("; the ClusterRole of this agent must allow it to {right}"),
            _ => String::new(),
        };
        format!("{what}: the API server says {status}{said}{remedy}")
    }
}
