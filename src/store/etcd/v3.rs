//! etcd v3 through its JSON gateway (control-plane spec 5): one POST a call, bytes as base64, 64-bit integers as text, zero
//! values left out.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};

use super::dialect::{
    Answer, Call, Dialect, LONGEST_ANSWER, LONGEST_ROW, Notice, Op, Refusal, Row, Step, TTL,
};
use crate::http::elements::{Elements, Item};
use crate::http::{HeaderList, Method};
use crate::quote::shorten;

/// Leases of one page of a list.
const PAGE: u64 = 1000;

/// gRPC status codes that mean something here.
mod code {
    pub(super) const INVALID_ARGUMENT: i64 = 3;
    pub(super) const PERMISSION_DENIED: i64 = 7;
    pub(super) const FAILED_PRECONDITION: i64 = 9;
    pub(super) const OUT_OF_RANGE: i64 = 11;
    pub(super) const UNAUTHENTICATED: i64 = 16;
}

/// The dialect.
#[derive(Debug)]
pub(super) struct V3 {
    /// Path of the gateway: it was renamed once.
    base: &'static str,
    prefix: String,
    user: Option<(String, String)>,
    token: Option<String>,
    /// The server wants no user.
    open: bool,
    work: Option<Work>,
    watch: Watch,
}

/// An operation under way.
#[derive(Debug)]
struct Work {
    op: Op,
    stage: Stage,
    status: u16,
    /// The answer of an error, or of anything that is no list.
    text: Vec<u8>,
    elements: Elements,
    broken: Option<String>,
    /// The first row of this exchange, and the key of the last one.
    row: Option<Row>,
    last: Option<Vec<u8>>,
    /// Revision at which the list is read.
    revision: u64,
    granted: Option<Granted>,
    /// What the server said to the transaction, while its lease is given back.
    refusal: Option<Refusal>,
    /// A new token was asked for already.
    renewed_token: bool,
    renamed: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Token,
    Range,
    TimeToLive,
    Grant,
    Txn,
    Revoke,
}

#[derive(Clone, Copy, Debug)]
struct Granted {
    id: i64,
    ttl: u64,
}

#[derive(Debug)]
struct Watch {
    status: u16,
    /// Revision of the last event in the document under way.
    last: Option<u64>,
    elements: Elements,
    error: Vec<u8>,
    is_open: bool,
}

impl Watch {
    fn new() -> Self {
        let elements = Elements::new(&["result", "events"], LONGEST_ROW);
        Self { status: 0, last: None, elements, error: Vec::new(), is_open: false }
    }
}

/// 64-bit integers are text in the gateway's JSON; numbers are fine, too.
fn integer<'de, D: Deserializer<'de>>(from: D) -> Result<i64, D::Error> {
    let value = Value::deserialize(from)?;
    let number = value.as_i64().or_else(|| value.as_str()?.parse().ok());
    number.ok_or_else(|| serde::de::Error::custom("not an integer"))
}

fn bytes<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
    let text = std::borrow::Cow::<'de, str>::deserialize(from)?;
    BASE64.decode(text.as_bytes()).map_err(serde::de::Error::custom)
}

/// Every field of every answer that is of interest.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Reply {
    header: Header,
    succeeded: bool,
    more: bool,
    #[serde(rename = "ID", deserialize_with = "integer")]
    id: i64,
    #[serde(rename = "TTL", deserialize_with = "integer")]
    ttl: i64,
    token: String,
    code: i64,
    message: String,
    error: Value,
    result: WatchReply,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Header {
    #[serde(deserialize_with = "integer")]
    revision: i64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct WatchReply {
    header: Header,
    created: bool,
    canceled: bool,
    #[serde(deserialize_with = "integer")]
    compact_revision: i64,
    cancel_reason: String,
}

#[derive(Debug, Deserialize)]
struct Kv {
    #[serde(deserialize_with = "bytes")]
    key: Vec<u8>,
    #[serde(default, deserialize_with = "bytes")]
    value: Vec<u8>,
    #[serde(default, deserialize_with = "integer")]
    create_revision: i64,
    #[serde(default, deserialize_with = "integer")]
    mod_revision: i64,
    #[serde(default, deserialize_with = "integer")]
    lease: i64,
}

#[derive(Debug, Deserialize)]
struct Event {
    #[serde(default, rename = "type")]
    kind: String,
    kv: Kv,
}

impl Kv {
    /// The row, if the key lies below `prefix`. A value that is no UTF-8 is garbage in any case.
    fn row(&self, prefix: &str) -> Option<Row> {
        let key = std::str::from_utf8(&self.key).ok()?.strip_prefix(prefix)?;
        Some(Row {
            key: key.to_owned(),
            value: String::from_utf8_lossy(&self.value).into_owned(),
            created: self.create_revision.unsigned_abs(),
            revision: self.mod_revision.unsigned_abs(),
            reserved: self.lease == 0,
            ttl: None,
        })
    }
}

impl V3 {
    pub(super) fn new(prefix: &str, user: Option<(String, String)>) -> Self {
        let prefix = prefix.to_owned();
        Self {
            base: "/v3",
            prefix,
            user,
            token: None,
            open: false,
            work: None,
            watch: Watch::new(),
        }
    }

    fn subnets(&self) -> String {
        format!("{}/subnets/", self.prefix)
    }

    /// The key that follows every lease's: `/` plus one.
    fn subnets_end(&self) -> String {
        format!("{}/subnets0", self.prefix)
    }

    fn call(&self, path: &str, body: &Value) -> Call {
        let mut headers = vec![("Content-Type", "application/json".to_owned())];
        headers.extend(self.token.clone().map(|token| ("Authorization", token)));
        let path = format!("{}{path}", self.base);
        Call { method: Method::Post, path, headers, body: body.to_string().into_bytes() }
    }

    /// The call of a stage.
    fn enter(&mut self, stage: Stage) -> Call {
        let elements = Elements::new(&["kvs"], LONGEST_ROW);
        let Some(work) = &mut self.work else { return self.call("/", &Value::Null) };
        (work.stage, work.status, work.elements, work.broken) = (stage, 0, elements, None);
        work.text.clear();
        let (path, body) = match (stage, &self.user) {
            (Stage::Token, Some((name, password))) => {
                ("/auth/authenticate", json!({"name": name, "password": password}))
            }
            (Stage::Token, None) => ("/auth/authenticate", Value::Null),
            (Stage::Range, _) => ("/kv/range", self.range()),
            (Stage::TimeToLive, _) => {
                ("/lease/timetolive", json!({"ID": self.granted_id().to_string()}))
            }
            (Stage::Grant, _) => ("/lease/grant", json!({"TTL": TTL.to_string()})),
            (Stage::Revoke, _) => ("/lease/revoke", json!({"ID": self.granted_id().to_string()})),
            (Stage::Txn, _) => ("/kv/txn", self.txn()),
        };
        let mut call = self.call(path, &body);
        if stage == Stage::Token {
            call.headers.truncate(1);
        }
        call
    }

    fn granted_id(&self) -> i64 {
        self.work.as_ref().and_then(|work| work.granted).map_or(0, |granted| granted.id)
    }

    fn range(&self) -> Value {
        let Some(work) = &self.work else { return Value::Null };
        match &work.op {
            Op::Config => json!({"key": BASE64.encode(format!("{}/config", self.prefix))}),
            Op::Read { key } => json!({"key": BASE64.encode(self.subnets() + key)}),
            _ => {
                let mut from = self.subnets().into_bytes();
                if let Some(last) = &work.last {
                    from.clone_from(last);
                    from.push(0);
                }
                let created_after = if let Op::Since { cursor } = work.op { cursor + 1 } else { 0 };
                json!({
                    "key": BASE64.encode(from),
                    "range_end": BASE64.encode(self.subnets_end()),
                    "limit": PAGE.to_string(),
                    "revision": work.revision.to_string(),
                    "min_create_revision": created_after.to_string(),
                })
            }
        }
    }

    fn txn(&self) -> Value {
        let Some(work) = &self.work else { return Value::Null };
        let full = |key: &str| BASE64.encode(self.subnets() + key);
        let unchanged = |key: &str, revision: u64| json!([{"key": full(key), "target": "MOD", "result": "EQUAL", "mod_revision": revision.to_string()}]);
        let put = |key: &str, value: &str| {
            let lease = self.granted_id().to_string();
            json!([{"request_put": {"key": full(key), "value": BASE64.encode(value), "lease": lease}}])
        };
        match &work.op {
            Op::Create { key, value } => {
                let none = |from: &str, end: Option<String>| {
                    let mut compare = json!({"key": full(from), "target": "VERSION", "result": "EQUAL", "version": "0"});
                    if let Some(end) = end {
                        compare["range_end"] = full(&end).into();
                    }
                    compare
                };
                // no key with this IPv4 subnet may exist, whatever its IPv6 one is
                let v4 = key.split('&').next().unwrap_or(key);
                let compare = if v4.starts_with("0.0.0.0-") {
                    json!([none(key, None)])
                } else {
                    const AFTER_AMPERSAND: char = '\'';
                    json!([
                        none(v4, None),
                        none(&format!("{v4}&"), Some(format!("{v4}{AFTER_AMPERSAND}")))
                    ])
                };
                json!({"compare": compare, "success": put(key, value)})
            }
            Op::Update { key, value, revision, .. } => {
                json!({"compare": unchanged(key, *revision), "success": put(key, value)})
            }
            Op::Delete { key, revision } => json!({
                "compare": unchanged(key, *revision),
                "success": [{"request_delete_range": {"key": full(key)}}],
            }),
            _ => Value::Null,
        }
    }

    fn first_stage(op: &Op) -> Stage {
        match op {
            Op::Config | Op::List | Op::Since { .. } | Op::Read { .. } => Stage::Range,
            Op::Create { .. } | Op::Update { reserved: false, .. } => Stage::Grant,
            Op::Update { .. } | Op::Delete { .. } => Stage::Txn,
        }
    }

    fn needs_token(&self) -> bool {
        self.user.is_some() && self.token.is_none() && !self.open
    }

    /// What an answer other than 200 means.
    fn refused(&mut self) -> Step {
        let Some(work) = &mut self.work else {
            return Step::Refused(Refusal::Away("no operation".into()));
        };
        let (status, stage) = (work.status, work.stage);
        let reply: Option<Reply> = serde_json::from_slice(&work.text).ok();
        let Some(reply) = reply else {
            if status == 404 && !work.renamed {
                work.renamed = true;
                self.base = if self.base == "/v3" { "/v3beta" } else { "/v3" };
                return self.restart();
            }
            if status == 404 {
                return Step::Refused(Refusal::Absent(
                    "the server has no v3 JSON gateway (--enable-grpc-gateway=false, or older than 3.3)".into(),
                ));
            }
            let text = shorten(&String::from_utf8_lossy(&work.text));
            return Step::Refused(Refusal::Away(format!("the server answers {status}: {text}")));
        };
        let message = if reply.message.is_empty() {
            reply.error.as_str().unwrap_or("").into()
        } else {
            reply.message
        };
        let message = shorten(&message);
        match (reply.code, stage) {
            (code::FAILED_PRECONDITION, Stage::Token) => {
                self.open = true;
                self.restart()
            }
            // the second one: authentication was switched on, or the user's role was changed
            (code::UNAUTHENTICATED | code::INVALID_ARGUMENT, _)
                if self.user.is_some() && !work.renewed_token && stage != Stage::Token =>
            {
                work.renewed_token = true;
                self.token = None;
                self.open = false;
                self.restart()
            }
            (
                code::INVALID_ARGUMENT | code::UNAUTHENTICATED | code::PERMISSION_DENIED,
                Stage::Token,
            ) => Step::Refused(Refusal::No(format!(
                "etcd refuses the user of --etcd-username: {message}"
            ))),
            // nothing of value is lost: it runs out by itself
            (_, Stage::Revoke) => self.revoked(),
            (code::OUT_OF_RANGE, _) => Step::Refused(Refusal::Compacted),
            (code::INVALID_ARGUMENT | code::UNAUTHENTICATED | code::PERMISSION_DENIED, _) => {
                Step::Refused(Refusal::No(format!(
                    "etcd refuses: {message}; check --etcd-username, its role on {} and the client certificate",
                    self.prefix
                )))
            }
            (code, _) => Step::Refused(Refusal::Away(format!(
                "the server answers {status}, code {code}: {message}"
            ))),
        }
    }

    /// The lease that was granted in vain is given back.
    fn revoked(&mut self) -> Step {
        match self.work.as_mut().and_then(|work| work.refusal.take()) {
            Some(refusal) => Step::Refused(refusal),
            None => Step::Answer(Answer::Conflict),
        }
    }

    /// The operation from its beginning.
    fn restart(&mut self) -> Step {
        let Some(work) = &mut self.work else {
            return Step::Refused(Refusal::Away("no operation".into()));
        };
        let first = Self::first_stage(&work.op);
        let stage = if self.needs_token() { Stage::Token } else { first };
        Step::Call(self.enter(stage))
    }

    /// What an answer of 200 means.
    fn proceed(&mut self, reply: Reply) -> Step {
        let Some(work) = &mut self.work else {
            return Step::Refused(Refusal::Away("no operation".into()));
        };
        let revision = reply.header.revision.unsigned_abs();
        match (work.stage, &work.op) {
            (Stage::Token, _) => {
                self.token = Some(reply.token);
                self.restart()
            }
            (Stage::Range, Op::Config) => {
                Step::Answer(Answer::Config(work.row.take().map(|row| row.value)))
            }
            (Stage::Range, Op::Read { .. }) => match (&work.row, work.granted) {
                (Some(_), Some(_)) => {
                    work.revision = revision;
                    Step::Call(self.enter(Stage::TimeToLive))
                }
                _ => Step::Answer(Answer::Row(work.row.take(), revision)),
            },
            (Stage::Range, _) => {
                if work.revision == 0 {
                    work.revision = revision;
                }
                if reply.more && work.last.is_some() {
                    return Step::Call(self.enter(Stage::Range));
                }
                Step::Answer(Answer::Listed { cursor: work.revision })
            }
            (Stage::TimeToLive, _) => {
                let ttl = u64::try_from(reply.ttl).unwrap_or(0);
                let row =
                    work.row.take().map(|row| Row { ttl: Some(Duration::from_secs(ttl)), ..row });
                Step::Answer(Answer::Row(row, work.revision))
            }
            (Stage::Grant, _) => {
                work.granted = Some(Granted { id: reply.id, ttl: reply.ttl.unsigned_abs() });
                Step::Call(self.enter(Stage::Txn))
            }
            (Stage::Txn, Op::Delete { .. }) => {
                Step::Answer(if reply.succeeded { Answer::Deleted } else { Answer::Conflict })
            }
            (Stage::Txn, _) if reply.succeeded => {
                let ttl = work.granted.map(|granted| Duration::from_secs(granted.ttl));
                Step::Answer(Answer::Written { revision, ttl })
            }
            (Stage::Txn, _) if work.granted.is_some() => Step::Call(self.enter(Stage::Revoke)),
            (Stage::Txn, _) => Step::Answer(Answer::Conflict),
            (Stage::Revoke, _) => self.revoked(),
        }
    }
}

impl Dialect for V3 {
    fn name(&self) -> &'static str {
        "v3"
    }

    fn begin(&mut self, op: Op) -> Call {
        let stage = if self.needs_token() { Stage::Token } else { Self::first_stage(&op) };
        self.work = Some(Work {
            op,
            stage,
            status: 0,
            text: Vec::new(),
            elements: Elements::new(&["kvs"], LONGEST_ROW),
            broken: None,
            row: None,
            last: None,
            revision: 0,
            granted: None,
            refusal: None,
            renewed_token: false,
            renamed: false,
        });
        self.enter(stage)
    }

    fn head(&mut self, status: u16, _headers: &HeaderList) {
        if let Some(work) = &mut self.work {
            work.status = status;
        }
    }

    fn body(&mut self, bytes: &[u8], rows: &mut dyn FnMut(Row)) {
        let prefix = self.subnets();
        let Some(work) = &mut self.work else { return };
        if work.broken.is_some() {
            return;
        }
        if work.status != 200 {
            if work.text.len() < LONGEST_ANSWER {
                work.text.extend_from_slice(bytes);
            }
            return;
        }
        let Work { op, text, elements, row, last, granted, .. } = work;
        let mut wrong = None;
        let pushed = elements.push(bytes, &mut |item| match item {
            Item::Element(element) => match serde_json::from_slice::<Kv>(element) {
                Ok(kv) => match op {
                    Op::List | Op::Since { .. } => {
                        if let Some(row) = kv.row(&prefix) {
                            rows(row);
                        }
                        *last = Some(kv.key);
                    }
                    Op::Read { .. } => {
                        *row = kv.row(&prefix);
                        *granted = (kv.lease != 0).then_some(Granted { id: kv.lease, ttl: 0 });
                    }
                    // the config's key is not a lease's
                    _ => *row = kv.row(""),
                },
                Err(error) => wrong = Some(format!("a row of the answer makes no sense: {error}")),
            },
            Item::Document(document) => *text = document.to_vec(),
        });
        work.broken = wrong.or_else(|| pushed.err().map(|error| error.to_string()));
    }

    fn done(&mut self) -> Step {
        let Some(work) = &mut self.work else {
            return Step::Refused(Refusal::Away("no operation".into()));
        };
        if work.status != 200 {
            let granted = work.stage == Stage::Txn && work.granted.is_some();
            return match self.refused() {
                Step::Refused(refusal) if granted => {
                    if let Some(work) = &mut self.work {
                        work.refusal = Some(refusal);
                    }
                    Step::Call(self.enter(Stage::Revoke))
                }
                step => step,
            };
        }
        if let Some(broken) = work.broken.take() {
            return Step::Refused(Refusal::Away(broken));
        }
        if let Err(error) = work.elements.finish() {
            return Step::Refused(Refusal::Away(error.to_string()));
        }
        match serde_json::from_slice(&work.text) {
            Ok(reply) => self.proceed(reply),
            Err(error) => {
                Step::Refused(Refusal::Away(format!("the answer makes no sense: {error}")))
            }
        }
    }

    fn watch(&mut self, cursor: u64) -> Call {
        self.watch = Watch::new();
        let mut call = self.call(
            "/watch",
            &json!({"create_request": {
                "key": BASE64.encode(self.subnets()),
                "range_end": BASE64.encode(self.subnets_end()),
                "start_revision": (cursor + 1).to_string(),
                "progress_notify": true,
            }}),
        );
        // a member that has lost its cluster says so instead of staying silent
        call.headers.push(("Grpc-Metadata-hasleader", "true".into()));
        call
    }

    fn watch_head(&mut self, status: u16, _headers: &HeaderList, _out: &mut dyn FnMut(Notice)) {
        self.watch.status = status;
    }

    fn watch_body(&mut self, bytes: &[u8], out: &mut dyn FnMut(Notice)) {
        let prefix = self.subnets();
        let Watch { status, last, elements, error, is_open } = &mut self.watch;
        if *status != 200 {
            if error.len() < LONGEST_ANSWER {
                error.extend_from_slice(bytes);
            }
            return;
        }
        let mut drop_token = false;
        let pushed = elements.push(bytes, &mut |item| match item {
            Item::Element(element) => match serde_json::from_slice::<Event>(element) {
                Ok(Event { kind, kv }) => {
                    *last = Some(kv.mod_revision.unsigned_abs());
                    let Some(row) = kv.row(&prefix) else { return };
                    out(if kind == "DELETE" {
                        Notice::Deleted { key: row.key, revision: row.revision }
                    } else {
                        Notice::Put(row)
                    });
                }
                Err(error) => {
                    out(Notice::Refused(Refusal::Away(format!(
                        "an event of the watch makes no sense: {error}"
                    ))));
                }
            },
            Item::Document(document) => match serde_json::from_slice::<Reply>(document) {
                Ok(Reply { result, error, .. }) => {
                    if result.compact_revision > 0 {
                        out(Notice::Refused(Refusal::Compacted));
                    } else if result.canceled || !error.is_null() {
                        let reason = if result.cancel_reason.is_empty() {
                            error.to_string()
                        } else {
                            result.cancel_reason
                        };
                        drop_token = ["token", "permission", "user name", "auth"]
                            .iter()
                            .any(|word| reason.contains(word));
                        let reason = shorten(&reason);
                        out(Notice::Refused(Refusal::Away(format!(
                            "the server ended the watch: {reason}"
                        ))));
                    } else {
                        if result.created && !std::mem::replace(is_open, true) {
                            out(Notice::Open);
                        }
                        // The answer that opens a watch names the store's revision, up to which events are still to come;
                        // so does each part of a long history. Only an answer without events says that all is told.
                        let told = result.header.revision.unsigned_abs();
                        match last.take() {
                            Some(revision) => out(Notice::Cursor(revision)),
                            None if !result.created && told > 0 => out(Notice::Cursor(told)),
                            None => {}
                        }
                    }
                }
                Err(error) => {
                    out(Notice::Refused(Refusal::Away(format!(
                        "an answer of the watch makes no sense: {error}"
                    ))));
                }
            },
        });
        if let Err(error) = pushed {
            out(Notice::Refused(Refusal::Away(format!("watch: {error}"))));
        }
        if drop_token {
            self.token = None;
        }
    }

    fn watch_done(&mut self, out: &mut dyn FnMut(Notice)) -> bool {
        let Watch { status, error, .. } = &self.watch;
        let reason = match *status {
            200 => "the server ended the watch".to_owned(),
            401 => {
                self.token = None;
                "the token is not valid any more".to_owned()
            }
            status => format!(
                "the server answers the watch with {status}: {}",
                shorten(&String::from_utf8_lossy(error))
            ),
        };
        out(Notice::Refused(Refusal::Away(reason)));
        false
    }
}
