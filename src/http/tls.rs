//! TLS. The only file that names rustls, whose next version turns its interface around.

use std::fmt;
use std::io::{self, BufRead, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{CertificateError, ClientConfig, ClientConnection, RootCertStore, crypto};

/// Where distributions keep the authorities that everyone trusts.
const SYSTEM_BUNDLES: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// What the operator says about TLS.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct TlsSettings {
    /// Authorities that may sign a server's certificate; the system's when absent.
    pub ca: Option<PathBuf>,
    /// Our certificate chain and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// Ready to open sessions.
#[derive(Clone)]
pub(super) struct Tls(Arc<ClientConfig>);

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls")
    }
}

impl Tls {
    /// Loads the files.
    ///
    /// # Errors
    /// The text names the file and what is wrong with it.
    pub(super) fn load(settings: &TlsSettings) -> Result<Self, String> {
        let mut roots = RootCertStore::empty();
        let bundle = match &settings.ca {
            Some(ca) => ca.as_path(),
            None => SYSTEM_BUNDLES.iter().map(Path::new).find(|path| path.exists()).ok_or(
                "https needs to know whom to trust: give -etcd-cafile, this host has no bundle of authorities",
            )?,
        };
        // in the system's bundle, one odd certificate must not spoil the others
        for certificate in certificates(bundle)? {
            let added = roots.add(certificate);
            if settings.ca.is_some() {
                added.map_err(|error| format!("{}: {error}", bundle.display()))?;
            }
        }
        let provider = Arc::new(crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_root_certificates(roots);
        let config = match &settings.identity {
            None => builder.with_no_client_auth(),
            Some((chain, key)) => {
                let private = PrivateKeyDer::from_pem_file(key)
                    .map_err(|error| format!("{}: {error}", key.display()))?;
                builder.with_client_auth_cert(certificates(chain)?, private).map_err(|error| {
                    format!("{} and {} do not go together: {error}", chain.display(), key.display())
                })?
            }
        };
        Ok(Self(Arc::new(config)))
    }

    /// A session with the server called `host`: a name, or an address as text.
    ///
    /// # Errors
    /// `host` is neither.
    pub(super) fn session(&self, host: &str) -> Result<Transport, String> {
        let name =
            ServerName::try_from(host.to_owned()).map_err(|error| format!("{host}: {error}"))?;
        let session =
            ClientConnection::new(Arc::clone(&self.0), name).map_err(|error| error.to_string())?;
        Ok(Transport::Tls(Box::new(session)))
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let explain = |error: rustls::pki_types::pem::Error| format!("{}: {error}", path.display());
    let found: Vec<_> = CertificateDer::pem_file_iter(path)
        .map_err(explain)?
        .collect::<Result<_, _>>()
        .map_err(explain)?;
    if found.is_empty() {
        Err(format!("{} holds no certificate", path.display()))
    } else {
        Ok(found)
    }
}

/// How reading from the socket ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Fill {
    /// The socket has no more for now.
    Drained,
    /// The limit was reached first.
    More,
    /// The other side has closed.
    Closed,
}

/// What lies between the exchange's bytes and the socket's.
pub(super) enum Transport {
    /// Nothing.
    Plain,
    /// A TLS session.
    Tls(Box<ClientConnection>),
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if matches!(self, Self::Plain) { "Plain" } else { "Tls" })
    }
}

impl Transport {
    /// Reads from the socket into `into` until it has no more, or about `limit` bytes were added.
    ///
    /// # Errors
    /// The socket's, or those of TLS.
    pub(super) fn fill(
        &mut self,
        socket: &mut impl Read,
        into: &mut Vec<u8>,
        limit: usize,
    ) -> io::Result<Fill> {
        let start = into.len();
        while into.len() - start < limit {
            let got = match self {
                Self::Plain => {
                    let at = into.len();
                    into.resize(at + 16 * 1024, 0);
                    let got = socket.read(&mut into[at..]);
                    into.truncate(at + got.as_ref().copied().unwrap_or(0));
                    got
                }
                Self::Tls(session) => read_session(session, socket, into),
            };
            match got {
                Ok(0) => return Ok(Fill::Closed),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Fill::Drained);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Fill::More)
    }

    /// Writes what it can of `out[*sent..]`, and what the session itself has to say.
    ///
    /// # Errors
    /// The socket's.
    pub(super) fn flush(
        &mut self,
        socket: &mut impl Write,
        out: &[u8],
        sent: &mut usize,
    ) -> io::Result<()> {
        let outcome = match self {
            Self::Plain => write_plain(socket, out, sent),
            Self::Tls(session) => write_session(session, socket, out, sent),
        };
        match outcome {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }
}

fn write_plain(socket: &mut impl Write, out: &[u8], sent: &mut usize) -> io::Result<()> {
    while *sent < out.len() {
        match socket.write(&out[*sent..]) {
            Ok(count) => *sent += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn write_session(
    session: &mut ClientConnection,
    socket: &mut impl Write,
    out: &[u8],
    sent: &mut usize,
) -> io::Result<()> {
    loop {
        // takes as much as its own buffer holds, also before the handshake is over
        let taken = if *sent < out.len() { session.writer().write(&out[*sent..])? } else { 0 };
        *sent += taken;
        if taken == 0 && !session.wants_write() {
            return Ok(());
        }
        while session.wants_write() {
            session.write_tls(socket)?;
        }
    }
}

/// One step: drains what is decrypted, else reads from the socket. The session's buffer must be drained first.
fn read_session(
    session: &mut ClientConnection,
    socket: &mut impl Read,
    into: &mut Vec<u8>,
) -> io::Result<usize> {
    loop {
        match session.reader().fill_buf() {
            Ok([]) => return Ok(0),
            Ok(plain) => {
                let count = plain.len();
                into.extend_from_slice(plain);
                session.reader().consume(count);
                return Ok(count);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // closed without saying so, as many servers do; whether it was too early is for HTTP to say
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
            Err(error) => return Err(error),
        }
        session.read_tls(socket)?;
        session
            .process_new_packets()
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, explain(&error)))?;
    }
}

/// Adds what to do to the errors that operators meet.
fn explain(error: &rustls::Error) -> String {
    let remedy = match error {
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "; -etcd-cafile must name the authority that signed the server's certificate"
        }
        rustls::Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => "; the endpoint must be written with a name or address that the certificate holds",
        rustls::Error::InvalidCertificate(CertificateError::Other(other))
            if other.to_string().contains("CaUsedAsEndEntity") =>
        {
            "; the server presents an authority's certificate as its own: give it one signed by that authority"
        }
        rustls::Error::AlertReceived(
            rustls::AlertDescription::CertificateRequired
            | rustls::AlertDescription::BadCertificate,
        ) => {
            "; the server wants a client certificate that it trusts: -etcd-certfile and -etcd-keyfile"
        }
        _ => "",
    };
    format!("TLS: {error}{remedy}")
}
