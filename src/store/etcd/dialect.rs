//! What the machine asks of etcd, in neither of its two languages.

use std::time::Duration;

use crate::http::{HeaderList, Method};

/// Time to live of a lease, as every flanneld has it.
pub(super) const TTL: u64 = 86_400;
/// Longest single row of a list, in bytes: what etcd itself allows (1.5 MiB), as base64, with room to spare.
pub(super) const LONGEST_ROW: usize = 4 << 20;
/// Longest answer that is not a list, in bytes.
pub(super) const LONGEST_ANSWER: usize = 1 << 20;

/// One thing to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Op {
    /// Read the network config.
    Config,
    /// Read every lease.
    List,
    /// Read at least the leases that were created after `cursor`.
    Since { cursor: u64 },
    /// Read one lease, with its time to live.
    Read { key: String },
    /// Create a lease, if nobody has these subnets.
    Create { key: String, value: String },
    /// Rewrite a lease and start its time to live anew, if nobody has changed it since `revision`.
    Update { key: String, value: String, revision: u64, reserved: bool },
    /// Delete a lease, if nobody has changed it since `revision`.
    Delete { key: String, revision: u64 },
}

/// One lease as the store has it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Row {
    /// The last part of the key.
    pub(super) key: String,
    pub(super) value: String,
    /// Revision or index of its creation.
    pub(super) created: u64,
    /// Revision or index of its last change.
    pub(super) revision: u64,
    /// It never runs out.
    pub(super) reserved: bool,
    /// Time to live, where the answer tells.
    pub(super) ttl: Option<Duration>,
}

/// What came of an [`Op`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Answer {
    Config(Option<String>),
    /// The rows have been delivered; changes after `cursor` are the watch's.
    Listed {
        cursor: u64,
    },
    /// What the key holds, and the store's revision when it was read.
    Row(Option<Row>, u64),
    /// Created or rewritten: with this revision and time to live.
    Written {
        revision: u64,
        ttl: Option<Duration>,
    },
    Deleted,
    /// Somebody else was faster.
    Conflict,
}

/// Why nothing came of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Refusal {
    /// This server cannot at the moment: ask another.
    Away(String),
    /// It will not, and others will not either.
    No(String),
    /// It does not speak this language.
    Absent(String),
    /// The revision is too old.
    Compacted,
}

/// What to do after an exchange.
#[derive(Debug)]
pub(super) enum Step {
    Call(Call),
    Answer(Answer),
    Refused(Refusal),
}

/// An HTTP exchange, without its server.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) method: Method,
    pub(super) path: String,
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) body: Vec<u8>,
}

/// What a watch says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Notice {
    /// It is open.
    Open,
    Put(Row),
    Deleted {
        key: String,
        revision: u64,
    },
    /// Everything up to here has been said.
    Cursor(u64),
    Refused(Refusal),
}

/// A language of etcd. One operation and one watch at a time.
pub(super) trait Dialect: std::fmt::Debug {
    /// For the log: `v3`.
    fn name(&self) -> &'static str;
    /// Begins an operation; what was begun before is forgotten.
    fn begin(&mut self, op: Op) -> Call;
    fn head(&mut self, status: u16, headers: &HeaderList);
    fn body(&mut self, bytes: &[u8], rows: &mut dyn FnMut(Row));
    /// The exchange is complete.
    fn done(&mut self) -> Step;
    /// Begins to watch what comes after `cursor`.
    fn watch(&mut self, cursor: u64) -> Call;
    fn watch_head(&mut self, status: u16, headers: &HeaderList, out: &mut dyn FnMut(Notice));
    fn watch_body(&mut self, bytes: &[u8], out: &mut dyn FnMut(Notice));
    /// The answer has ended. Returns whether that is how this language's watches go on, with the next call.
    fn watch_done(&mut self, out: &mut dyn FnMut(Notice)) -> bool;
}
