//! The fields that say who we are, fresh for each request: a token from a file as it is now, or what a credential plugin
//! says, asked again when that has run out or was refused.
//!
//! A plugin is somebody else's program and may take its time, so it runs on a thread; the waker tells when it is done.

use std::io;
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use mio::Waker;
use serde::Deserialize;

use super::access::{Credentials, Pem, Plugin, Source};
use crate::quote::shorten;
use crate::sys;

/// How long a plugin may run.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longest token that is read, in bytes.
const LONGEST: u64 = 64 << 10;
/// What a plugin's answer is good for if it does not say.
const UNLIMITED: Duration = Duration::from_secs(24 * 3600);

/// Fields for one request.
#[derive(Debug)]
pub(super) enum Fields {
    /// Here they are.
    Ready(Vec<(&'static str, String)>),
    /// The plugin is running: ask again when the waker has fired.
    Later,
}

/// What a plugin has said.
struct Issued {
    token: Option<String>,
    identity: Option<(Pem, Pem)>,
    lifetime: Duration,
}

type Answer = Result<Issued, String>;

/// Keeps the credentials of one client.
pub(super) struct Keeper {
    credentials: Credentials,
    waker: Arc<Waker>,
    answers: (Sender<Answer>, Receiver<Answer>),
    running: bool,
    /// The plugin's token, and how long it is good for.
    issued: Option<(Option<String>, Instant)>,
    /// Why the plugin has not said anything, to be told once.
    failed: Option<String>,
}

// tokens must not reach a log
impl std::fmt::Debug for Keeper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.credentials.fmt(f)
    }
}

impl Keeper {
    /// `waker` is woken when a plugin has answered.
    pub(super) fn new(credentials: Credentials, waker: Arc<Waker>) -> Self {
        let answers = mpsc::channel();
        Self { credentials, waker, answers, running: false, issued: None, failed: None }
    }

    /// The fields for a request that is sent now.
    ///
    /// # Errors
    /// The text says which file or program did not give what.
    pub(super) fn fields(&mut self, now: Instant) -> Result<Fields, String> {
        let bearer = |token: &str| format!("Bearer {token}");
        let authorization = match &self.credentials.source {
            Source::Nowhere => None,
            Source::Token(token) => Some(bearer(token)),
            Source::TokenFile(path) => {
                let explain = |what: &dyn std::fmt::Display| {
                    format!("read the token in {}: {what}", path.display())
                };
                let text = read_limited(path).map_err(|error| explain(&error))?;
                match text.trim() {
                    "" => return Err(explain(&"it is empty")),
                    token => Some(bearer(token)),
                }
            }
            Source::Basic(user, password) => {
                Some(format!("Basic {}", BASE64.encode(format!("{user}:{password}"))))
            }
            Source::Plugin(plugin) => {
                if let Some(reason) = self.failed.take() {
                    return Err(reason);
                }
                match self.issued.as_ref().filter(|(_, until)| *until > now) {
                    Some((token, _)) => token.as_deref().map(bearer),
                    None => {
                        if !self.running {
                            start(plugin, self.answers.0.clone(), Arc::clone(&self.waker))?;
                            self.running = true;
                        }
                        return Ok(Fields::Later);
                    }
                }
            }
        };
        let mut fields = self.credentials.fields.clone();
        fields.extend(authorization.map(|value| ("authorization", value)));
        Ok(Fields::Ready(fields))
    }

    /// The server does not know us: what a plugin has said is of no more use.
    pub(super) fn refused(&mut self) {
        self.issued = None;
    }

    /// The waker has fired. Whether the plugin has answered, and the certificate and key that it gave.
    pub(super) fn handle_answer(&mut self, now: Instant) -> (bool, Option<(Pem, Pem)>) {
        let Ok(answer) = self.answers.1.try_recv() else { return (false, None) };
        self.running = false;
        match answer {
            Ok(Issued { token, identity, lifetime }) => {
                self.issued = Some((token, now + lifetime.max(Duration::from_secs(1))));
                (true, identity)
            }
            Err(reason) => {
                self.failed = Some(reason);
                (true, None)
            }
        }
    }
}

fn read_limited(path: &std::path::Path) -> io::Result<String> {
    let mut text = String::new();
    io::Read::read_to_string(&mut io::Read::take(std::fs::File::open(path)?, LONGEST), &mut text)?;
    Ok(text)
}

fn start(plugin: &Plugin, answers: Sender<Answer>, waker: Arc<Waker>) -> Result<(), String> {
    let plugin = plugin.clone();
    let work = move || {
        let _ = answers.send(ask(&plugin));
        let _ = waker.wake();
    };
    let started = thread::Builder::new().name("credentials".into()).stack_size(128 << 10);
    let thread = started.spawn(work);
    thread.map(drop).map_err(|error| format!("start the credential plugin: {error}"))
}

/// Runs the plugin.
fn ask(plugin: &Plugin) -> Result<Issued, String> {
    let called = plugin.command.display();
    let mut command = Command::new(&plugin.command);
    command.args(&plugin.args).envs(plugin.env.iter().map(|(name, value)| (name, value)));
    let finished = sys::child::run(command, PATIENCE).map_err(|error| {
        let missing = error.kind() == io::ErrorKind::NotFound && !plugin.install_hint.is_empty();
        let hint = if missing { format!(": {}", plugin.install_hint) } else { String::new() };
        format!("run the credential plugin {called}: {error}{hint}")
    })?;
    if finished.status != Some(0) {
        let complaint = String::from_utf8_lossy(&finished.complaint);
        let status = finished
            .status
            .map_or("it took too long".into(), |status| format!("exit status {status}"));
        return Err(format!(
            "the credential plugin {called} failed: {status}: {}",
            shorten(&complaint)
        ));
    }
    parse(&finished.output, wall())
        .map_err(|reason| format!("the credential plugin {called} printed no credential: {reason}"))
}

#[allow(clippy::disallowed_methods)] // a thread of its own, and a date of the world outside
fn wall() -> SystemTime {
    SystemTime::now()
}

#[derive(Deserialize)]
struct ExecCredential {
    status: Option<ExecStatus>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ExecStatus {
    token: Option<String>,
    client_certificate_data: Option<String>,
    client_key_data: Option<String>,
    expiration_timestamp: Option<String>,
}

fn parse(output: &[u8], wall: SystemTime) -> Result<Issued, String> {
    // not the error's own text, which may show a part of the token
    let credential: ExecCredential = serde_json::from_slice(output).map_err(|error| {
        format!("no ExecCredential, line {} column {}", error.line(), error.column())
    })?;
    let status = credential.status.ok_or("it has no status")?;
    let pem = |text: String| Pem::Text(text.into_bytes().into(), "what the credential plugin gave");
    let identity = match (status.client_certificate_data, status.client_key_data) {
        (None, None) => None,
        (Some(certificate), Some(key)) => Some((pem(certificate), pem(key))),
        _ => return Err("a certificate and its key come together".into()),
    };
    let token = status.token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
    if token.is_none() && identity.is_none() {
        return Err("it has neither token nor certificate".into());
    }
    let lifetime = match status.expiration_timestamp {
        None => UNLIMITED,
        Some(text) => humantime::parse_rfc3339(&text)
            .map_err(|error| format!("expirationTimestamp {:?}: {error}", shorten(&text)))?
            .duration_since(wall)
            .unwrap_or_default(),
    };
    Ok(Issued { token, identity, lifetime: lifetime.min(UNLIMITED) })
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    #[test]
    fn what_plugins_print() {
        let wall = UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let ok = |text: &str| parse(text.as_bytes(), wall).ok().unwrap();
        let issued = ok(
            r#"{"kind":"ExecCredential","apiVersion":"client.authentication.k8s.io/v1","status":{"token":"abc\n","expirationTimestamp":"2023-11-14T22:14:20Z"}}"#,
        );
        assert_eq!(
            (issued.token.as_deref(), issued.lifetime),
            (Some("abc"), Duration::from_secs(60))
        );
        assert_eq!(ok(r#"{"status":{"token":"abc"}}"#).lifetime, UNLIMITED);
        let issued = ok(r#"{"status":{"clientCertificateData":"c","clientKeyData":"k"}}"#);
        assert!(issued.token.is_none() && issued.identity.is_some());
        for (text, says) in [
            ("", "no ExecCredential"),
            ("{}", "no status"),
            (r#"{"status":{}}"#, "neither token nor certificate"),
            (r#"{"status":{"token":" "}}"#, "neither token nor certificate"),
            (r#"{"status":{"token":"a","clientKeyData":"k"}}"#, "come together"),
            (r#"{"status":{"token":"a","expirationTimestamp":"soon"}}"#, "expirationTimestamp"),
        ] {
            let error = parse(text.as_bytes(), wall).err().unwrap();
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    fn keeper(source: Source) -> Keeper {
        let poll = mio::Poll::new().unwrap();
        let waker = Waker::new(poll.registry(), mio::Token(0)).unwrap();
        Keeper::new(Credentials { source, fields: Vec::new() }, Arc::new(waker))
    }

    fn ready(keeper: &mut Keeper, now: Instant) -> Result<Option<String>, String> {
        match keeper.fields(now)? {
            Fields::Ready(fields) => Ok(fields.into_iter().next().map(|(_, value)| value)),
            Fields::Later => Ok(None),
        }
    }

    #[test]
    #[allow(clippy::disallowed_methods)]
    fn a_token_file_is_read_each_time() {
        let path = std::env::temp_dir().join(format!("flanneld-token-{}", std::process::id()));
        let mut keeper = keeper(Source::TokenFile(path.clone()));
        let now = Instant::now();
        assert!(ready(&mut keeper, now).unwrap_err().contains("read the token in"));
        for token in ["one", "two"] {
            std::fs::write(&path, format!("{token}\n")).unwrap();
            assert_eq!(ready(&mut keeper, now), Ok(Some(format!("Bearer {token}"))));
        }
        std::fs::write(&path, "\n").unwrap();
        assert!(ready(&mut keeper, now).unwrap_err().contains("it is empty"));
        std::fs::remove_file(path).unwrap();
    }

    /// The program runs once, and again when its answer has run out or was refused; what it says against it is told.
    #[test]
    #[allow(clippy::disallowed_methods)]
    fn a_plugin_is_asked_when_need_be() {
        let script = |text: &str| Plugin {
            command: "sh".into(),
            args: vec!["-c".into(), text.into()],
            env: vec![("TOKEN".into(), "t".into())],
            install_hint: "install it".into(),
        };
        let answered = |keeper: &mut Keeper, now| {
            for _ in 0..500 {
                if keeper.handle_answer(now).0 {
                    return;
                }
                thread::sleep(Duration::from_millis(10));
            }
            panic!("no answer");
        };
        let now = Instant::now();
        let print = r#"echo "{\"status\":{\"token\":\"$TOKEN\"}}""#;
        let mut good = keeper(Source::Plugin(script(print)));
        assert_eq!(ready(&mut good, now), Ok(None));
        answered(&mut good, now);
        assert_eq!(ready(&mut good, now), Ok(Some("Bearer t".into())));
        assert_eq!(ready(&mut good, now + UNLIMITED), Ok(None));
        answered(&mut good, now);
        good.refused();
        assert_eq!(ready(&mut good, now), Ok(None));

        let mut bad = keeper(Source::Plugin(script("echo no >&2; exit 3")));
        assert_eq!(ready(&mut bad, now), Ok(None));
        answered(&mut bad, now);
        let error = ready(&mut bad, now).unwrap_err();
        assert!(error.contains("exit status 3: no"), "{error}");

        let mut missing =
            keeper(Source::Plugin(Plugin { command: "/nowhere/plugin".into(), ..script("") }));
        assert_eq!(ready(&mut missing, now), Ok(None));
        answered(&mut missing, now);
        let error = ready(&mut missing, now).unwrap_err();
        assert!(error.contains("/nowhere/plugin") && error.contains("install it"), "{error}");
    }
}
