//! One HTTP/1.1 exchange without I/O: bytes to send come out, bytes received go in, [`HttpEvent`]s come out.
//!
//! ```text
//!   new ──> request bytes        consume ──> Head ──> Body* ──> done(reusable?)
//!                                   └── close ──> done, or "cut off"
//! ```

use ureq_proto::client::state::{RecvBody, RecvResponse};
use ureq_proto::client::{Call, RecvBodyResult, RecvResponseResult, SendRequestResult};
use ureq_proto::http::{self, Response};
use ureq_proto::{BodyMode, Error};

use super::{Endpoint, HeaderList, HttpEvent, Method, Request};

/// Longest head of an answer, in bytes.
const LONGEST_HEAD: usize = 32 * 1024;
/// Piece of a body that is handed on at once, in bytes.
const PIECE: usize = 16 * 1024;

/// An exchange whose request has been written out.
#[derive(Debug)]
pub(super) struct Exchange {
    state: State,
}

#[derive(Debug)]
enum State {
    Head(Call<RecvResponse>),
    Body(Call<RecvBody>),
    Done {
        reusable: bool,
    },
    /// While a state is being left.
    Moving,
}

impl Exchange {
    /// Starts an exchange. The request's bytes, all of them, are appended to `out`.
    ///
    /// # Errors
    /// The request cannot be one.
    pub(super) fn new(
        endpoint: &Endpoint,
        request: &Request,
        out: &mut Vec<u8>,
    ) -> Result<Self, String> {
        Self::send(endpoint, request, out).map(|call| Self { state: State::Head(call) })
    }

    fn send(
        endpoint: &Endpoint,
        request: &Request,
        out: &mut Vec<u8>,
    ) -> Result<Call<RecvResponse>, String> {
        let mut builder = http::Request::builder()
            .method(match request.method {
                Method::Get => http::Method::GET,
                Method::Put => http::Method::PUT,
                Method::Post => http::Method::POST,
                Method::Patch => http::Method::PATCH,
                Method::Delete => http::Method::DELETE,
            })
            .uri(format!("{endpoint}{}", request.path))
            .header("user-agent", concat!("flanneld/", env!("CARGO_PKG_VERSION")));
        for (name, value) in &request.headers {
            builder = builder.header(*name, value);
        }
        let has_body = matches!(request.method, Method::Put | Method::Post | Method::Patch);
        if has_body {
            builder = builder.header("content-length", request.body.len());
        }
        // not the error's own text, which may show a header's value
        let built =
            builder.body(()).map_err(|_| "the request has an invalid path or header".to_owned())?;
        let text = |error: Error| error.to_string();
        let mut call = Call::new(built).map_err(text)?.proceed();
        let mut head =
            vec![
                0;
                8 * 1024 + request.headers.iter().map(|(_, value)| value.len() + 64).sum::<usize>()
            ];
        while !call.can_proceed() {
            let made = call.write(&mut head).map_err(text)?;
            out.extend_from_slice(&head[..made]);
        }
        match call.proceed().map_err(text)? {
            Some(SendRequestResult::RecvResponse(call)) => Ok(call),
            Some(SendRequestResult::SendBody(mut call)) => {
                out.extend_from_slice(&request.body);
                call.consume_direct_write(request.body.len()).map_err(text)?;
                call.proceed().ok_or_else(|| "the request's body has the wrong length".to_owned())
            }
            _ => Err("the request cannot be sent in one piece".into()),
        }
    }

    /// Takes received bytes: all that were not consumed before, and new ones. Returns how many are used up.
    ///
    /// # Errors
    /// The answer is not HTTP, or its head is too long.
    pub(super) fn consume(
        &mut self,
        input: &[u8],
        sink: &mut dyn FnMut(HttpEvent<'_>),
    ) -> Result<usize, String> {
        let mut used = 0;
        loop {
            let rest = &input[used..];
            let before = used;
            match std::mem::replace(&mut self.state, State::Moving) {
                State::Head(call) => used += self.head(call, rest, sink)?,
                State::Body(call) => used += self.body(call, rest, sink)?,
                done => self.state = done,
            }
            let moved_on = match (&self.state, used == before) {
                (State::Done { .. }, _) => false,
                (_, false) => true,
                // a head that needs no more input leads to a body that may be complete already
                (State::Body(call), true) => call.body_mode() == BodyMode::NoBody,
                _ => false,
            };
            if !moved_on {
                return Ok(used);
            }
        }
    }

    fn head(
        &mut self,
        mut call: Call<RecvResponse>,
        input: &[u8],
        sink: &mut dyn FnMut(HttpEvent<'_>),
    ) -> Result<usize, String> {
        let (used, response) = call.try_response(input, false).map_err(|error| not_http(&error))?;
        let Some(response) = response else {
            if used == 0 && input.len() >= LONGEST_HEAD {
                return Err(format!("the head of the answer is longer than {LONGEST_HEAD} bytes"));
            }
            self.state = State::Head(call);
            return Ok(used);
        };
        sink(HttpEvent::Head {
            status: response.status().as_u16(),
            headers: &header_list(&response),
        });
        self.state = match call.proceed() {
            Some(RecvResponseResult::RecvBody(call)) => State::Body(call),
            Some(RecvResponseResult::Cleanup(call)) => {
                State::Done { reusable: !call.must_close_connection() }
            }
            // where to is nobody's business; what its body says is not needed
            Some(RecvResponseResult::Redirect(_)) | None => State::Done { reusable: false },
        };
        Ok(used)
    }

    fn body(
        &mut self,
        mut call: Call<RecvBody>,
        input: &[u8],
        sink: &mut dyn FnMut(HttpEvent<'_>),
    ) -> Result<usize, String> {
        let mut piece = [0; PIECE];
        let (used, made) = call.read(input, &mut piece).map_err(|error| not_http(&error))?;
        if made > 0 {
            sink(HttpEvent::Body(&piece[..made]));
        }
        // a body that ends with the connection is never complete before
        let complete = call.body_mode() != BodyMode::CloseDelimited && call.can_proceed();
        self.state = if complete { finish(call) } else { State::Body(call) };
        Ok(used)
    }

    /// The server has closed the connection.
    ///
    /// # Errors
    /// It was too early.
    pub(super) fn handle_close(&mut self) -> Result<(), String> {
        match std::mem::replace(&mut self.state, State::Moving) {
            State::Head(_) => Err("the server closed the connection without an answer".into()),
            State::Body(call)
                if call.body_mode() == BodyMode::CloseDelimited || call.is_ended_chunked() =>
            {
                self.state = State::Done { reusable: false };
                Ok(())
            }
            State::Body(_) => {
                Err("the server closed the connection in the middle of its answer".into())
            }
            done => {
                self.state = done;
                Ok(())
            }
        }
    }

    /// Is the answer complete, and if so, may the connection carry another exchange?
    pub(super) fn done(&self) -> Option<bool> {
        match self.state {
            State::Done { reusable } => Some(reusable),
            _ => None,
        }
    }
}

fn finish(call: Call<RecvBody>) -> State {
    match call.proceed() {
        Some(RecvBodyResult::Cleanup(call)) => {
            State::Done { reusable: !call.must_close_connection() }
        }
        Some(RecvBodyResult::Redirect(_)) | None => State::Done { reusable: false },
    }
}

fn not_http(error: &Error) -> String {
    format!("the answer is not HTTP: {error}")
}

fn header_list(response: &Response<()>) -> HeaderList {
    let text = |value: &http::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    HeaderList(
        response.headers().iter().map(|(name, value)| (name.to_string(), text(value))).collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(method: Method, body: &str) -> Request {
        Request {
            endpoint: 0,
            method,
            path: "/v3/kv/range?x=1".into(),
            headers: vec![("content-type", "application/json".into())],
            body: body.into(),
            deadline: None,
            silence: None,
        }
    }

    fn start(method: Method, body: &str) -> (Exchange, String) {
        let endpoint = "http://etcd:2379/base".parse().unwrap();
        let mut out = Vec::new();
        let exchange = Exchange::new(&endpoint, &request(method, body), &mut out).unwrap();
        (exchange, String::from_utf8(out).unwrap())
    }

    /// Feeds `answer` in pieces; returns status, body, and whether the connection may be used again.
    fn answer(
        answer: &str,
        piece: usize,
        close: bool,
    ) -> Result<(u16, String, Option<bool>), String> {
        let (mut exchange, _) = start(Method::Post, "{}");
        let (mut status, mut body, mut pending) = (0, Vec::new(), Vec::new());
        for bytes in answer.as_bytes().chunks(piece) {
            pending.extend_from_slice(bytes);
            let used = exchange.consume(&pending, &mut |event| match event {
                HttpEvent::Head { status: s, .. } => status = s,
                HttpEvent::Body(bytes) => body.extend_from_slice(bytes),
                _ => {}
            })?;
            pending.drain(..used);
        }
        if close {
            exchange.handle_close()?;
        }
        Ok((status, String::from_utf8(body).unwrap(), exchange.done()))
    }

    #[test]
    fn requests() {
        let (_, text) = start(Method::Post, "{\"a\":1}");
        assert!(text.starts_with("POST /base/v3/kv/range?x=1 HTTP/1.1\r\n"), "{text}");
        let lower = text.to_ascii_lowercase();
        assert!(
            lower.contains("host: etcd:2379\r\n") && lower.contains("content-length: 7\r\n"),
            "{text}"
        );
        assert!(text.ends_with("\r\n\r\n{\"a\":1}"));
        let (_, text) = start(Method::Get, "");
        assert!(
            text.ends_with("\r\n\r\n") && !text.to_ascii_lowercase().contains("content-length"),
            "{text}"
        );
        let (_, text) = start(Method::Delete, "");
        assert!(text.starts_with("DELETE ") && text.ends_with("\r\n\r\n"));
    }

    #[test]
    fn answers_in_pieces_of_any_length() {
        let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n";
        let sized = "HTTP/1.1 404 Not Found\r\nContent-Length: 7\r\n\r\nabcdefg";
        let closed = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nabcdefg";
        let kept = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 7\r\n\r\nabcdefg";
        let continued =
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nabcdefg";
        for piece in [1, 2, 7, 1000] {
            assert_eq!(
                answer(chunked, piece, false),
                Ok((200, "abcdefg".into(), Some(true))),
                "{piece}"
            );
            assert_eq!(answer(sized, piece, false), Ok((404, "abcdefg".into(), Some(true))));
            assert_eq!(answer(closed, piece, true), Ok((200, "abcdefg".into(), Some(false))));
            assert_eq!(answer(kept, piece, false), Ok((200, "abcdefg".into(), Some(false))));
            assert_eq!(answer(continued, piece, false), Ok((200, "abcdefg".into(), Some(true))));
            let empty = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
            assert_eq!(answer(empty, piece, false), Ok((200, String::new(), Some(true))));
            assert_eq!(
                answer("HTTP/1.1 204 No Content\r\n\r\n", piece, false),
                Ok((204, String::new(), Some(true)))
            );
            assert_eq!(
                answer(
                    "HTTP/1.1 307 Moved\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n",
                    piece,
                    false
                )
                .unwrap()
                .0,
                307
            );
        }
    }

    #[test]
    fn large_bodies_come_in_pieces() {
        let body = "x".repeat(100_000);
        let text = format!("HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n{body}");
        assert_eq!(answer(&text, text.len(), false), Ok((200, body, Some(true))));
    }

    #[test]
    fn early_ends_are_named() {
        for (text, says) in [
            ("", "without an answer"),
            ("HTTP/1.1 200 OK\r\nContent", "without an answer"),
            ("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", "in the middle"),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", "in the middle"),
        ] {
            let error = answer(text, 5, true).unwrap_err();
            assert!(error.contains(says), "{text:?}: {error}");
        }
    }

    #[test]
    fn garbage_is_refused() {
        for text in [
            "SSH-2.0-OpenSSH\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            "\u{0}\u{1}\u{2}\r\n\r\n",
        ] {
            assert!(answer(text, 1000, false).unwrap_err().contains("not HTTP"), "{text:?}");
        }
        let long = format!("HTTP/1.1 200 OK\r\nX: {}", "y".repeat(LONGEST_HEAD));
        assert!(answer(&long, long.len(), false).unwrap_err().contains("longer than"));
    }
}
