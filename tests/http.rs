//! The HTTP client against servers of all sorts: good ones, slow ones, broken ones, TLS ones. Loopback only.
#![allow(clippy::disallowed_methods)] // the tests read the clock
#![allow(clippy::unwrap_used)] // in the helpers of tests as well

#[path = "lab/certificates.rs"]
mod certificates;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use flanneld::http::client::Client;
use flanneld::http::{
    Access, Credentials, HttpEvent, Method, Pem, Plugin, Request, Source, TlsSettings,
};
use flanneld::store::Lane;
use mio::{Events, Poll, Token, Waker};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

const WAKER: Token = Token(0);
const FIRST: usize = 10;
const PATIENCE: Duration = Duration::from_secs(10);

/// A loop with nothing but the client in it.
struct Fixture {
    poll: Poll,
    client: Client,
}

/// How an exchange went.
#[derive(Debug, Default)]
struct Outcome {
    status: u16,
    body: Vec<u8>,
    pieces: usize,
    /// How often the loop woke up.
    wakes: usize,
    failed: Option<String>,
    took: Duration,
}

fn get(endpoint: usize) -> Request {
    Request {
        endpoint,
        method: Method::Get,
        path: "/x?y=1".into(),
        headers: Vec::new(),
        body: Vec::new(),
        deadline: Some(Duration::from_secs(5)),
        silence: None,
    }
}

fn access(urls: &[String], tls: &TlsSettings) -> Access {
    Access { endpoints: urls.to_vec(), tls: tls.clone(), ..Access::default() }
}

impl Fixture {
    fn new(urls: &[String], tls: &TlsSettings) -> Self {
        Self::with(access(urls, tls))
    }

    fn with(access: Access) -> Self {
        let poll = Poll::new().unwrap();
        let waker = Arc::new(Waker::new(poll.registry(), WAKER).unwrap());
        let client = Client::new(access, waker, FIRST).unwrap();
        Self { poll, client }
    }

    fn plain(address: SocketAddr) -> Self {
        Self::new(&[format!("http://{address}")], &TlsSettings::default())
    }

    fn run(&mut self, request: Request) -> Outcome {
        self.run_on(Lane::Unary, request)
    }

    fn run_on(&mut self, on: Lane, request: Request) -> Outcome {
        let start = Instant::now();
        let mut outcome = Outcome::default();
        self.client.start(on, request, self.poll.registry(), start);
        let mut events = Events::with_capacity(16);
        let mut over = false;
        while !over {
            assert!(start.elapsed() < PATIENCE, "{outcome:?}");
            let now = Instant::now();
            let timeout = self.client.poll_timeout().map(|at| at.saturating_duration_since(now));
            self.poll.poll(&mut events, Some(timeout.unwrap_or(PATIENCE).min(PATIENCE))).unwrap();
            let now = Instant::now();
            let registry = self.poll.registry();
            let mut sink = |lane: Lane, event: HttpEvent<'_>| {
                assert_eq!(lane, on);
                match event {
                    HttpEvent::Head { status, .. } => outcome.status = status,
                    HttpEvent::Body(bytes) => {
                        outcome.body.extend_from_slice(bytes);
                        outcome.pieces += 1;
                    }
                    HttpEvent::Done => over = true,
                    HttpEvent::Failed(reason) => {
                        outcome.failed = Some(reason.to_owned());
                        over = true;
                    }
                }
            };
            outcome.wakes += 1;
            for event in &events {
                match event.token() {
                    WAKER => self.client.handle_waker(registry, now),
                    token => self.client.ready(token, registry, now, &mut sink),
                }
            }
            if self.client.poll_timeout().is_some_and(|at| at <= now) {
                self.client.handle_timeout(registry, now, &mut sink);
            }
        }
        outcome.took = start.elapsed();
        outcome
    }

    fn fails(&mut self, request: Request) -> String {
        let outcome = self.run(request);
        outcome.failed.unwrap_or_else(|| panic!("{:?}", (outcome.status, outcome.body)))
    }
}

/// A server that handles each connection with `serve`, which is told the connection's number.
fn server(serve: impl Fn(TcpStream, usize) + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        let serve = Arc::new(serve);
        for (number, stream) in listener.incoming().enumerate() {
            let serve = Arc::clone(&serve);
            thread::spawn(move || serve(stream.unwrap(), number));
        }
    });
    address
}

/// Reads one request: its head and its body. `None` when the client has gone.
fn read_request(stream: &mut impl Read) -> Option<String> {
    let mut text = String::new();
    let mut byte = [0];
    while !text.ends_with("\r\n\r\n") {
        if stream.read(&mut byte).ok()? == 0 {
            return None;
        }
        text.push(char::from(byte[0]));
    }
    let length = text
        .to_ascii_lowercase()
        .split("content-length: ")
        .nth(1)
        .map_or(0, |rest| rest.split("\r\n").next().unwrap().parse::<usize>().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).ok()?;
    text.push_str(&String::from_utf8(body).unwrap());
    Some(text)
}

#[test]
fn exchanges_share_a_connection() {
    let connections = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&connections);
    let address = server(move |mut stream, _| {
        count.fetch_add(1, Ordering::SeqCst);
        while let Some(request) = read_request(&mut stream) {
            let body = format!("[{request}]");
            write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())
                .unwrap();
        }
    });
    let mut fixture = Fixture::plain(address);
    for number in 0..3 {
        let mut request = get(0);
        if number == 1 {
            request.method = Method::Post;
            request.headers = vec![("X-Test", "yes".into())];
            request.body = b"hello".to_vec();
        }
        let outcome = fixture.run(request);
        assert_eq!((outcome.status, outcome.failed), (200, None));
        let text = String::from_utf8(outcome.body).unwrap();
        if number == 1 {
            assert!(
                text.starts_with("[POST /x?y=1 HTTP/1.1\r\n") && text.ends_with("\r\n\r\nhello]"),
                "{text}"
            );
            assert!(text.to_ascii_lowercase().contains("x-test: yes"), "{text}");
        } else {
            assert!(text.starts_with("[GET /x?y=1 HTTP/1.1\r\n"), "{text}");
        }
        assert!(text.contains(&format!("{address}")), "{text}");
    }
    assert_eq!(connections.load(Ordering::SeqCst), 1);
}

#[test]
fn a_kept_connection_that_died_is_replaced() {
    let address = server(|mut stream, _| {
        // one answer each, then an end without notice
        if read_request(&mut stream).is_some() {
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").unwrap();
        }
    });
    let mut fixture = Fixture::plain(address);
    for _ in 0..3 {
        let outcome = fixture.run(get(0));
        assert_eq!((outcome.status, &outcome.body[..], outcome.failed), (200, &b"ok"[..], None));
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn chunks_arrive_as_they_come() {
    let address = server(|mut stream, _| {
        read_request(&mut stream);
        stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").unwrap();
        for piece in ["5\r\nhello\r\n", "1\r\n \r", "\n5\r\nwo", "rld\r\n0\r\n", "\r\n"] {
            stream.write_all(piece.as_bytes()).unwrap();
            thread::sleep(Duration::from_millis(20));
        }
    });
    let outcome = Fixture::plain(address).run(get(0));
    assert_eq!(String::from_utf8(outcome.body).unwrap(), "hello world");
    assert!(outcome.pieces >= 3, "{}", outcome.pieces);
}

#[test]
fn a_large_answer_is_whole() {
    let address = server(|mut stream, _| {
        read_request(&mut stream);
        let body = vec![b'x'; 5 << 20];
        write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len()).unwrap();
        stream.write_all(&body).unwrap();
    });
    let outcome = Fixture::plain(address).run(get(0));
    assert_eq!((outcome.body.len(), outcome.failed), (5 << 20, None));
}

#[test]
fn broken_servers_fail_with_a_reason() {
    for (answer, says) in [
        ("", "closed"),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
            "closed the connection in the middle",
        ),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhe",
            "closed the connection in the middle",
        ),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", ""),
        ("garbage\r\n\r\n", ""),
        ("HTTP/1.1 200 OK\r\nX: ", "closed"),
    ] {
        let address = server(move |mut stream, _| {
            read_request(&mut stream);
            stream.write_all(answer.as_bytes()).unwrap();
        });
        let reason = Fixture::plain(address).fails(get(0));
        assert!(
            reason.contains(says) && reason.contains(&format!("http://{address}")),
            "{answer:?}: {reason}"
        );
    }
    let endless = server(|mut stream, _| {
        read_request(&mut stream);
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n");
        while stream.write_all(b"X-Long: 0123456789012345678901234567890123456789\r\n").is_ok() {}
    });
    let outcome = Fixture::plain(endless).run(get(0));
    assert!(outcome.failed.is_some() && outcome.took < Duration::from_secs(4), "{outcome:?}");
}

#[test]
fn deadlines_and_silence() {
    let silent = server(|mut stream, _| {
        read_request(&mut stream);
        thread::sleep(Duration::from_secs(20));
    });
    let mut request = get(0);
    request.deadline = Some(Duration::from_millis(200));
    let outcome = Fixture::plain(silent).run(request);
    assert!(outcome.failed.unwrap().contains("no complete answer in time"));
    assert!(
        outcome.took >= Duration::from_millis(200) && outcome.took < Duration::from_secs(2),
        "{:?}",
        outcome.took
    );

    // a byte now and then keeps a watch alive, but not an exchange with a deadline
    let slow = server(|mut stream, _| {
        read_request(&mut stream);
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n").unwrap();
        while stream.write_all(b"x").is_ok() {
            thread::sleep(Duration::from_millis(50));
        }
    });
    let mut request = get(0);
    request.deadline = Some(Duration::from_millis(400));
    assert!(Fixture::plain(slow).fails(request).contains("in time"));
    let mut watch = get(0);
    (watch.deadline, watch.silence) = (None, Some(Duration::from_millis(300)));
    let outcome = Fixture::plain(slow).run(watch);
    assert_eq!((outcome.body.len(), outcome.failed), (100, None));
    let mut watch = get(0);
    (watch.deadline, watch.silence) = (None, Some(Duration::from_millis(200)));
    assert!(Fixture::plain(silent).fails(watch).contains("silent for too long"));
}

/// A watch with much to say is listened to at intervals: nothing is lost, whether it ends well, breaks off or goes on.
#[test]
fn a_busy_watch() {
    const PIECES: usize = 200;
    for ends in [true, false] {
        let address = server(move |mut stream, _| {
            while read_request(&mut stream).is_some() {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
                for _ in 0..PIECES {
                    thread::sleep(Duration::from_millis(1));
                    let _ = stream.write_all(b"5\r\nhello\r\n");
                }
                if !ends {
                    return;
                }
                let _ = stream.write_all(b"0\r\n\r\n");
            }
        });
        let mut fixture = Fixture::plain(address);
        // the same connection carries the next one
        for _ in 0..2 {
            let outcome = fixture.run_on(Lane::Watch, get(0));
            assert_eq!(outcome.body.len(), PIECES * 5);
            assert_eq!(outcome.failed.is_none(), ends, "{:?}", outcome.failed);
            assert!(outcome.wakes < PIECES / 2, "{}", outcome.wakes);
            assert!(outcome.took < Duration::from_secs(3));
        }
    }
}

#[test]
fn refused_and_unknown() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let reason = Fixture::plain(closed).fails(get(0));
    assert!(
        reason.to_lowercase().contains("connection refused")
            && reason.contains(&closed.to_string()),
        "{reason}"
    );
    let urls = ["http://no-such-host.invalid:1".to_owned()];
    let reason = Fixture::new(&urls, &TlsSettings::default()).fails(get(0));
    assert!(reason.contains("no-such-host.invalid"), "{reason}");
    for url in ["ftp://x", "http://", "http://x:99999", "nonsense://"] {
        let poll = Poll::new().unwrap();
        let waker = Arc::new(Waker::new(poll.registry(), WAKER).unwrap());
        assert!(
            Client::new(access(&[url.to_owned()], &TlsSettings::default()), waker, FIRST).is_err(),
            "{url}"
        );
    }
}

#[test]
fn names_are_resolved_beside_the_loop() {
    let address = server(|mut stream, _| {
        read_request(&mut stream);
        stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").unwrap();
    });
    let urls = [format!("http://localhost:{}", address.port())];
    let outcome = Fixture::new(&urls, &TlsSettings::default()).run(get(0));
    assert_eq!((outcome.status, outcome.failed), (204, None));
}

#[test]
fn a_cancelled_exchange_says_nothing_more() {
    let address = server(|mut stream, number| {
        read_request(&mut stream);
        if number == 0 {
            thread::sleep(Duration::from_millis(300));
        }
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nnew");
    });
    let mut fixture = Fixture::plain(address);
    fixture.client.start(Lane::Unary, get(0), fixture.poll.registry(), Instant::now());
    fixture.client.cancel(Lane::Unary, fixture.poll.registry());
    assert_eq!(fixture.run(get(0)).body, b"new");
}

/// A directory with an authority, a server's certificate and a client's.
struct Authority {
    dir: PathBuf,
}

impl Authority {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("flanneld-http-{}-{name}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        certificates::make(&dir, &["127.0.0.1", "localhost"]);
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn pem(&self, name: &str) -> Pem {
        Pem::File(self.path(name))
    }

    fn trust(&self) -> TlsSettings {
        TlsSettings { ca: Some(self.pem("ca.pem")), ..TlsSettings::default() }
    }

    fn trust_and_identity(&self) -> TlsSettings {
        TlsSettings {
            identity: Some((self.pem("client.pem"), self.pem("client.key"))),
            ..self.trust()
        }
    }

    /// An echoing HTTPS server.
    fn serve(&self, ask_for_certificate: bool) -> SocketAddr {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let chain = vec![CertificateDer::from_pem_file(self.path("server.pem")).unwrap()];
        let key = PrivateKeyDer::from_pem_file(self.path("server.key")).unwrap();
        let builder = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .unwrap();
        let builder = if ask_for_certificate {
            let mut roots = rustls::RootCertStore::empty();
            roots.add(CertificateDer::from_pem_file(self.path("ca.pem")).unwrap()).unwrap();
            let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(
                Arc::new(roots),
                provider,
            )
            .build()
            .unwrap();
            builder.with_client_cert_verifier(verifier)
        } else {
            builder.with_no_client_auth()
        };
        let config = Arc::new(builder.with_single_cert(chain, key).unwrap());
        server(move |stream, _| {
            let session = rustls::ServerConnection::new(Arc::clone(&config)).unwrap();
            let mut stream = rustls::StreamOwned::new(session, stream);
            while let Some(request) = read_request(&mut stream) {
                let body = request + &"y".repeat(100_000);
                if write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())
                    .is_err()
                {
                    return;
                }
                let flushed = stream.flush();
                assert!(
                    flushed.is_ok()
                        || flushed.is_err_and(|error| error.kind() != ErrorKind::InvalidData)
                );
            }
        })
    }
}

impl Drop for Authority {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

#[test]
fn tls_with_the_right_authority() {
    let authority = Authority::new("right");
    let address = authority.serve(false);
    for host in ["127.0.0.1", "localhost"] {
        let urls = [format!("https://{host}:{}", address.port())];
        let mut fixture = Fixture::new(&urls, &authority.trust());
        for _ in 0..2 {
            let outcome = fixture.run(get(0));
            assert_eq!((outcome.status, outcome.failed), (200, None));
            assert!(outcome.body.starts_with(b"GET /x?y=1") && outcome.body.len() > 100_000);
        }
    }
}

#[test]
fn tls_with_client_certificates() {
    let authority = Authority::new("client");
    let address = authority.serve(true);
    let urls = [format!("https://{address}")];
    let outcome = Fixture::new(&urls, &authority.trust_and_identity()).run(get(0));
    assert_eq!((outcome.status, outcome.failed), (200, None));
    let reason = Fixture::new(&urls, &authority.trust()).fails(get(0));
    assert!(reason.to_lowercase().contains("certificate"), "{reason}");
}

/// Certificates given as text, another name than the endpoint's, and no verification at all.
#[test]
fn tls_as_a_kubeconfig_has_it() {
    let (authority, other) = (Authority::new("text"), Authority::new("stranger"));
    let address = authority.serve(true);
    let urls = [format!("https://{address}")];
    let text = |name: &str| Pem::Text(fs::read(authority.path(name)).unwrap().into(), "test");
    let settings = TlsSettings {
        ca: Some(text("ca.pem")),
        identity: Some((text("client.pem"), text("client.key"))),
        server_name: Some("localhost".into()),
        ..TlsSettings::default()
    };
    assert_eq!(Fixture::new(&urls, &settings).run(get(0)).status, 200);
    let named = TlsSettings { server_name: Some("elsewhere".into()), ..settings.clone() };
    assert!(
        Fixture::new(&urls, &named)
            .fails(get(0))
            .contains("a name or address that the certificate holds")
    );
    let strange = TlsSettings { ca: Some(other.pem("ca.pem")), unverified: true, ..settings };
    assert_eq!(Fixture::new(&urls, &strange).run(get(0)).status, 200);
}

/// Files that are replaced are taken up with the next request; half-written ones are not.
#[test]
fn tls_files_are_rotated() {
    let (authority, new) = (Authority::new("before"), Authority::new("after"));
    let mut fixture = Fixture::new(
        &[format!("https://{}", authority.serve(true))],
        &authority.trust_and_identity(),
    );
    assert_eq!(fixture.run(get(0)).status, 200);
    fs::write(authority.path("client.pem"), "-----BEGIN").unwrap();
    assert_eq!(fixture.run(get(0)).status, 200);
    // now the client holds what the server does not know
    for name in ["client.pem", "client.key"] {
        fs::copy(new.path(name), authority.path(name)).unwrap();
    }
    let reason = fixture.fails(get(0));
    assert!(reason.contains("-etcd-certfile and -etcd-keyfile"), "{reason}");
}

/// Each request carries the token that the file holds then.
#[test]
fn a_token_file_is_rotated() {
    let authority = Authority::new("token");
    let address = server(|mut stream, _| {
        while let Some(request) = read_request(&mut stream) {
            let known = request.to_lowercase().contains("authorization: bearer two");
            let status = if known { "200 OK" } else { "401 Unauthorized" };
            let _ = write!(stream, "HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n");
        }
    });
    let token = authority.path("token");
    let source = Source::TokenFile(token.clone());
    let credentials = Credentials { source, fields: vec![("impersonate-user", "me".into())] };
    let endpoints = vec![format!("http://{address}")];
    let mut fixture = Fixture::with(Access { endpoints, credentials, ..Access::default() });
    assert!(fixture.fails(get(0)).contains("read the token in"));
    for (content, status) in [("one", 401), ("two\n", 200), ("three", 401)] {
        fs::write(&token, content).unwrap();
        assert_eq!(fixture.run(get(0)).status, status, "{content}");
    }
}

/// A plugin's token is used until it is refused; then the plugin is asked again.
#[test]
fn a_credential_plugin_is_asked_again() {
    let authority = Authority::new("plugin");
    let address = server(|mut stream, _| {
        while let Some(request) = read_request(&mut stream) {
            let known = request.to_lowercase().contains("authorization: bearer t2");
            let status = if known { "200 OK" } else { "401 Unauthorized" };
            let _ = write!(stream, "HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n");
        }
    });
    let count = authority.path("count");
    let script = format!(
        r#"echo x >> {0}; n=$(wc -l < {0}); echo "{{\"status\":{{\"token\":\"t$n\"}}}}""#,
        count.display()
    );
    let plugin = Plugin {
        command: "sh".into(),
        args: vec!["-c".into(), script],
        env: Vec::new(),
        install_hint: String::new(),
    };
    let credentials = Credentials { source: Source::Plugin(plugin), fields: Vec::new() };
    let endpoints = vec![format!("http://{address}")];
    let mut fixture = Fixture::with(Access { endpoints, credentials, ..Access::default() });
    for status in [401, 200, 200, 200] {
        assert_eq!(fixture.run(get(0)).status, status);
    }
    assert_eq!(fs::read_to_string(count).unwrap().lines().count(), 2);
}

#[test]
fn tls_with_the_wrong_ones() {
    let (authority, other) = (Authority::new("one"), Authority::new("other"));
    let address = authority.serve(false);
    let urls = [format!("https://{address}")];
    let reason = Fixture::new(&urls, &other.trust()).fails(get(0));
    assert!(reason.contains("certificate") && reason.contains(&urls[0]), "{reason}");
    // a server that does not speak TLS, and a client that does not
    let plain = server(|mut stream, _| {
        let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
        let _ = read_request(&mut stream);
    });
    let reason = Fixture::new(&[format!("https://{plain}")], &authority.trust()).fails(get(0));
    assert!(!reason.is_empty());
    let reason = Fixture::plain(address).fails(get(0));
    assert!(!reason.is_empty());
    // files that are none
    let missing =
        TlsSettings { ca: Some(Pem::File("/nowhere/ca.pem".into())), ..TlsSettings::default() };
    for (settings, says) in [
        (missing, "/nowhere/ca.pem"),
        (
            TlsSettings { ca: Some(authority.pem("server.key")), ..TlsSettings::default() },
            "server.key",
        ),
        (
            TlsSettings {
                identity: Some((authority.pem("client.pem"), authority.pem("ca.pem"))),
                ..TlsSettings::default()
            },
            "ca.pem",
        ),
    ] {
        let poll = Poll::new().unwrap();
        let waker = Arc::new(Waker::new(poll.registry(), WAKER).unwrap());
        let error = Client::new(access(&urls, &settings), waker, FIRST).map(drop).unwrap_err();
        assert!(error.contains(says), "{error}");
    }
}
