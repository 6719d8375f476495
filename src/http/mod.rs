//! Non-blocking HTTP/1.1: what is asked for and what comes back. The types here are all that stores see of HTTP.

mod access;
pub mod client;
mod conn;
mod credentials;
pub mod elements;
mod endpoint;
mod exchange;
mod resolve;
mod tls;

pub use self::access::{Access, Called, Credentials, Pem, Plugin, Source, TlsSettings};
pub use self::endpoint::{BadEndpoint, Endpoint};

use std::fmt::{self, Write as _};
use std::time::Duration;

/// Request method.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Method {
    /// GET
    Get,
    /// PUT
    Put,
    /// POST
    Post,
    /// PATCH
    Patch,
    /// DELETE
    Delete,
}

/// One exchange to perform.
#[derive(Clone, PartialEq, Eq)]
pub struct Request {
    /// Index into the client's list of endpoints.
    pub endpoint: usize,
    /// Method.
    pub method: Method,
    /// Absolute path and query, already percent-encoded; joined to the endpoint's own path if it has one.
    pub path: String,
    /// Header fields besides Host, Content-Length and User-Agent.
    pub headers: Vec<(&'static str, String)>,
    /// Body; none if empty and the method is GET or DELETE.
    pub body: Vec<u8>,
    /// From start to the last byte of the answer: connecting, TLS and resolving included. `None` for a watch.
    pub deadline: Option<Duration>,
    /// Longest time without a single byte from the server. For a watch.
    pub silence: Option<Duration>,
}

/// Header values and bodies may hold credentials, so they are never shown.
impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} {} on endpoint {} ({} bytes)",
            self.method,
            self.path,
            self.endpoint,
            self.body.len()
        )
    }
}

/// How an exchange is going.
#[derive(Debug, PartialEq, Eq)]
pub enum HttpEvent<'a> {
    /// The answer's head has arrived.
    Head {
        /// Status code.
        status: u16,
        /// The answer's header fields.
        headers: &'a HeaderList,
    },
    /// The next piece of the body, dechunked, of any length.
    Body(&'a [u8]),
    /// The answer is complete.
    Done,
    /// The exchange failed; nothing more comes of it. The text names the endpoint and the cause, never a secret.
    Failed(&'a str),
}

/// Header fields of an answer; names are compared without regard to case.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct HeaderList(pub Vec<(String, String)>);

impl HeaderList {
    /// The first value of the field `name`.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }
}

/// Percent-encoding of all but unreserved characters and those in `keep`.
pub fn escape(text: &str, keep: &[u8]) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || keep.contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            let _ = write!(escaped, "%{byte:02X}");
        }
    }
    escaped
}
