//! etcd v2 through its keys API (control-plane spec 4.4): one node a lease, long polls for watches.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;

use super::dialect::{
    Answer, Call, Dialect, LONGEST_ANSWER, LONGEST_ROW, Notice, Op, Refusal, Row, Step, TTL,
};
use crate::http::elements::{Elements, Item};
use crate::http::escape;
use crate::http::{HeaderList, Method};
use crate::quote::shorten;

/// Error codes of the keys API.
mod code {
    pub(super) const NOT_FOUND: i64 = 100;
    pub(super) const COMPARE_FAILED: i64 = 101;
    pub(super) const NODE_EXISTS: i64 = 105;
    pub(super) const UNAUTHORIZED: i64 = 110;
    pub(super) const EVENT_INDEX_CLEARED: i64 = 401;
}

/// The dialect.
#[derive(Debug)]
pub(super) struct V2 {
    prefix: String,
    /// Value of the Authorization field.
    basic: Option<String>,
    work: Option<Work>,
    watch: Watch,
}

#[derive(Debug)]
struct Work {
    op: Op,
    status: u16,
    index: u64,
    text: Vec<u8>,
    elements: Elements,
    broken: Option<String>,
}

#[derive(Debug, Default)]
struct Watch {
    status: u16,
    text: Vec<u8>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Reply {
    action: String,
    node: Option<Node>,
    error_code: i64,
    message: String,
    cause: String,
    index: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Node {
    key: String,
    dir: bool,
    value: String,
    created_index: u64,
    modified_index: u64,
    expiration: Option<String>,
    ttl: Option<i64>,
}

impl Node {
    fn row(self, prefix: &str) -> Option<Row> {
        let key = self.key.strip_prefix(prefix)?.to_owned();
        Some(Row {
            key,
            value: self.value,
            created: self.created_index,
            revision: self.modified_index,
            reserved: self.expiration.is_none(),
            ttl: self.ttl.map(|ttl| Duration::from_secs(u64::try_from(ttl).unwrap_or(0))),
        })
    }
}

impl V2 {
    pub(super) fn new(prefix: &str, user: Option<&(String, String)>) -> Self {
        let basic = user.map(|(name, password)| {
            format!("Basic {}", BASE64.encode(format!("{name}:{password}")))
        });
        Self { prefix: prefix.to_owned(), basic, work: None, watch: Watch::default() }
    }

    fn subnets(&self) -> String {
        format!("{}/subnets/", self.prefix)
    }

    fn call(&self, method: Method, key: &str, query: &str, form: Option<String>) -> Call {
        let mut headers = Vec::new();
        if form.is_some() {
            headers.push(("Content-Type", "application/x-www-form-urlencoded".to_owned()));
        }
        headers.extend(self.basic.clone().map(|basic| ("Authorization", basic)));
        let path = format!("/v2/keys{}{}?{query}", self.prefix, escape(key, b"/&"));
        Call { method, path, headers, body: form.unwrap_or_default().into_bytes() }
    }

    /// What the server's error means for the operation.
    fn refused(op: &Op, status: u16, index: u64, text: &[u8]) -> Step {
        let Ok(reply) = serde_json::from_slice::<Reply>(text) else {
            let text = shorten(&String::from_utf8_lossy(text));
            return Step::Refused(if status == 404 {
                Refusal::Absent(
                    "the server has no v2 keys API (it is off unless etcd runs with --enable-v2)"
                        .into(),
                )
            } else {
                Refusal::Away(format!("the server answers {status}: {text}"))
            });
        };
        match (reply.error_code, op) {
            (code::NOT_FOUND, Op::Config) => Step::Answer(Answer::Config(None)),
            (code::NOT_FOUND, Op::List | Op::Since { .. }) => {
                Step::Answer(Answer::Listed { cursor: reply.index.max(index) })
            }
            (code::NOT_FOUND, Op::Read { .. }) => {
                Step::Answer(Answer::Row(None, reply.index.max(index)))
            }
            (code::NOT_FOUND | code::COMPARE_FAILED | code::NODE_EXISTS, _) => {
                Step::Answer(Answer::Conflict)
            }
            (code::UNAUTHORIZED, _) => Step::Refused(Refusal::No(
                "etcd refuses the user: check --etcd-username and its role".into(),
            )),
            (code, _) => Step::Refused(Refusal::Away(format!(
                "the server answers {status}, code {code}: {}",
                shorten(&format!("{} {}", reply.message, reply.cause))
            ))),
        }
    }
}

impl Dialect for V2 {
    fn name(&self) -> &'static str {
        "v2"
    }

    fn begin(&mut self, op: Op) -> Call {
        let get = |key: &str, recursive: bool| {
            self.call(
                Method::Get,
                key,
                &format!("quorum=true&recursive={recursive}&sorted=false"),
                None,
            )
        };
        let key_of = |key: &str| format!("/subnets/{key}");
        let form = |value: &str, reserved: bool| {
            let ttl = if reserved { String::new() } else { format!("ttl={TTL}&") };
            Some(format!("{ttl}value={}", escape(value, b"")))
        };
        let call = match &op {
            Op::Config => get("/config", false),
            Op::List | Op::Since { .. } => get("/subnets", true),
            Op::Read { key } => get(&key_of(key), false),
            Op::Create { key, value } => {
                self.call(Method::Put, &key_of(key), "prevExist=false", form(value, false))
            }
            Op::Update { key, value, revision, reserved } => self.call(
                Method::Put,
                &key_of(key),
                &format!("prevIndex={revision}"),
                form(value, *reserved),
            ),
            Op::Delete { key, revision } => {
                self.call(Method::Delete, &key_of(key), &format!("prevIndex={revision}"), None)
            }
        };
        let elements = Elements::new(&["node", "nodes"], LONGEST_ROW);
        self.work =
            Some(Work { op, status: 0, index: 0, text: Vec::new(), elements, broken: None });
        call
    }

    fn head(&mut self, status: u16, headers: &HeaderList) {
        if let Some(work) = &mut self.work {
            work.status = status;
            work.index =
                headers.get("X-Etcd-Index").and_then(|text| text.parse().ok()).unwrap_or(0);
        }
    }

    fn body(&mut self, bytes: &[u8], rows: &mut dyn FnMut(Row)) {
        let prefix = self.subnets();
        let Some(work) = &mut self.work else { return };
        if !is_list(&work.op) || work.status != 200 {
            if work.text.len() < LONGEST_ANSWER {
                work.text.extend_from_slice(bytes);
            }
            return;
        }
        let mut wrong = None;
        let text = &mut work.text;
        let pushed = work.elements.push(bytes, &mut |item| match item {
            Item::Element(element) => match serde_json::from_slice::<Node>(element) {
                Ok(node) if node.dir => {}
                Ok(node) => node.row(&prefix).into_iter().for_each(&mut *rows),
                Err(error) => wrong = Some(format!("a node of the answer makes no sense: {error}")),
            },
            Item::Document(document) => *text = document.to_vec(),
        });
        if work.broken.is_none() {
            work.broken = wrong.or_else(|| pushed.err().map(|error| error.to_string()));
        }
    }

    fn done(&mut self) -> Step {
        let prefix = self.subnets();
        let Some(work) = self.work.take() else {
            return Step::Refused(Refusal::Away("no operation".into()));
        };
        if !matches!(work.status, 200 | 201) {
            return Self::refused(&work.op, work.status, work.index, &work.text);
        }
        if is_list(&work.op) {
            let broken =
                work.broken.or_else(|| work.elements.finish().err().map(|error| error.to_string()));
            return match broken {
                Some(broken) => Step::Refused(Refusal::Away(broken)),
                None => Step::Answer(Answer::Listed { cursor: work.index }),
            };
        }
        let reply = match serde_json::from_slice::<Reply>(&work.text) {
            Ok(reply) => reply,
            Err(error) => {
                return Step::Refused(Refusal::Away(format!("the answer makes no sense: {error}")));
            }
        };
        let node = reply.node.unwrap_or_default();
        Step::Answer(match work.op {
            Op::Config => Answer::Config(Some(node.value)),
            Op::Read { .. } => Answer::Row(node.row(&prefix), work.index),
            Op::Delete { .. } => Answer::Deleted,
            _ => {
                let revision = node.modified_index;
                Answer::Written { revision, ttl: node.row(&prefix).and_then(|row| row.ttl) }
            }
        })
    }

    fn watch(&mut self, cursor: u64) -> Call {
        // a watch goes on through many exchanges
        self.watch.text.clear();
        self.call(
            Method::Get,
            "/subnets",
            &format!("recursive=true&wait=true&waitIndex={}", cursor + 1),
            None,
        )
    }

    fn watch_head(&mut self, status: u16, _headers: &HeaderList, out: &mut dyn FnMut(Notice)) {
        self.watch.status = status;
        if status == 200 {
            // the head comes at once, the body with the next change
            out(Notice::Open);
        }
    }

    fn watch_body(&mut self, bytes: &[u8], _out: &mut dyn FnMut(Notice)) {
        if self.watch.text.len() < LONGEST_ROW {
            self.watch.text.extend_from_slice(bytes);
        }
    }

    fn watch_done(&mut self, out: &mut dyn FnMut(Notice)) -> bool {
        let text = std::mem::take(&mut self.watch.text);
        // the server's own time limit
        if self.watch.status == 200 && text.is_empty() {
            return true;
        }
        let reply = match serde_json::from_slice::<Reply>(&text) {
            Ok(reply) => reply,
            Err(error) => {
                let reason =
                    format!("the watch's answer ({}) makes no sense: {error}", self.watch.status);
                out(Notice::Refused(Refusal::Away(reason)));
                return false;
            }
        };
        if reply.error_code == code::EVENT_INDEX_CLEARED {
            out(Notice::Refused(Refusal::Compacted));
            return false;
        }
        let Some(node) = reply.node.filter(|_| self.watch.status == 200) else {
            let reason = shorten(&format!("{} {}", reply.message, reply.cause));
            out(Notice::Refused(Refusal::Away(format!(
                "the server answers the watch with {}: {reason}",
                self.watch.status
            ))));
            return false;
        };
        let revision = node.modified_index;
        let is_directory = node.dir;
        if is_directory && matches!(reply.action.as_str(), "delete" | "expire") {
            // every lease has gone with its directory
            out(Notice::Refused(Refusal::Compacted));
            return false;
        }
        if let Some(row) = node.row(&self.subnets()).filter(|_| !is_directory) {
            out(match reply.action.as_str() {
                "delete" | "expire" | "compareAndDelete" => {
                    Notice::Deleted { key: row.key, revision }
                }
                _ => Notice::Put(row),
            });
        }
        out(Notice::Cursor(revision));
        true
    }
}

fn is_list(op: &Op) -> bool {
    matches!(op, Op::List | Op::Since { .. })
}
