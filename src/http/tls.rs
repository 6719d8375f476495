//! TLS. The only file that names rustls, whose next version turns its interface around.

use std::fmt;
use std::io::{self, BufRead, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use log::{debug, warn};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{self, CryptoProvider};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore,
    SignatureScheme,
};

use super::access::{Called, Pem, TlsSettings};

/// Where distributions keep the authorities that everyone trusts.
const SYSTEM_BUNDLES: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// Ready to open sessions.
pub(super) struct Tls {
    settings: TlsSettings,
    config: Arc<ClientConfig>,
    /// What tells the files as they were read from others that may take their places.
    stamps: Vec<Option<Stamp>>,
    /// Why the files that are there now are not in use.
    complaint: Option<String>,
}

/// Modification time in nanoseconds, size, inode number.
type Stamp = (i64, i64, u64, u64);

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
    pub(super) fn load(settings: TlsSettings) -> Result<Self, String> {
        let stamps = stamps(&settings);
        let config = Arc::new(load(&settings)?);
        Ok(Self { settings, config, stamps, complaint: None })
    }

    /// Takes up files that have changed. Returns whether sessions opened before are out of date.
    pub(super) fn refresh(&mut self) -> bool {
        let stamps = stamps(&self.settings);
        if self.stamps == stamps {
            return false;
        }
        match load(&self.settings) {
            Ok(config) => {
                debug!("the TLS files have changed and are taken up");
                self.config = Arc::new(config);
                self.stamps = stamps;
                self.complaint = None;
                true
            }
            Err(reason) => {
                // it may be half written
                if self.complaint.as_ref() != Some(&reason) {
                    warn!(
                        "the TLS files have changed and are of no use, so the old ones stay: {reason}"
                    );
                    self.complaint = Some(reason);
                }
                false
            }
        }
    }

    /// From now on we are somebody else.
    ///
    /// # Errors
    /// Certificate and key are not what they should be.
    pub(super) fn set_identity(&mut self, identity: (Pem, Pem)) -> Result<(), String> {
        let settings = TlsSettings { identity: Some(identity), ..self.settings.clone() };
        let complaint = self.complaint.take();
        *self = Self { complaint, ..Self::load(settings)? };
        Ok(())
    }

    /// A session with the server called `host`: a name, or an address as text.
    ///
    /// # Errors
    /// `host` is neither.
    pub(super) fn session(&self, host: &str) -> Result<Transport, String> {
        let host = self.settings.server_name.as_deref().unwrap_or(host);
        let name =
            ServerName::try_from(host.to_owned()).map_err(|error| format!("{host}: {error}"))?;
        let session = ClientConnection::new(Arc::clone(&self.config), name)
            .map_err(|error| error.to_string())?;
        Ok(Transport::Tls(Box::new(session), self.settings.called))
    }
}

fn stamps(settings: &TlsSettings) -> Vec<Option<Stamp>> {
    let identity = settings.identity.iter().flat_map(|(chain, key)| [chain, key]);
    let files = settings.ca.iter().chain(identity).filter_map(|pem| match pem {
        Pem::File(path) => Some(path),
        Pem::Text(..) => None,
    });
    files
        .map(|path| {
            let data = std::fs::metadata(path).ok()?;
            Some((data.mtime(), data.mtime_nsec(), data.size(), data.ino()))
        })
        .collect()
}

fn load(settings: &TlsSettings) -> Result<ClientConfig, String> {
    let provider = Arc::new(crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    let builder = if settings.unverified {
        builder.dangerous().with_custom_certificate_verifier(Arc::new(Anyone(provider)))
    } else {
        builder.with_root_certificates(roots(settings)?)
    };
    match &settings.identity {
        None => Ok(builder.with_no_client_auth()),
        Some((chain, key)) => {
            let private = match key {
                Pem::File(path) => PrivateKeyDer::from_pem_file(path),
                Pem::Text(text, _) => PrivateKeyDer::from_pem_slice(text),
            };
            let private = private.map_err(|error| format!("{key}: {error}"))?;
            builder
                .with_client_auth_cert(certificates(chain)?, private)
                .map_err(|error| format!("{chain} and {key} do not go together: {error}"))
        }
    }
}

fn roots(settings: &TlsSettings) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    let bundle = match &settings.ca {
        Some(ca) => ca.clone(),
        None => {
            let found = SYSTEM_BUNDLES.iter().map(Path::new).find(|path| path.exists());
            Pem::File(found.map(Path::to_owned).ok_or_else(|| {
                format!(
                    "https needs to know whom to trust: give {}, this host has no bundle of authorities",
                    settings.called.ca
                )
            })?)
        }
    };
    // in the system's bundle, one odd certificate must not spoil the others
    for certificate in certificates(&bundle)? {
        let added = roots.add(certificate);
        if settings.ca.is_some() {
            added.map_err(|error| format!("{bundle}: {error}"))?;
        }
    }
    Ok(roots)
}

fn certificates(pem: &Pem) -> Result<Vec<CertificateDer<'static>>, String> {
    let explain = |error: rustls::pki_types::pem::Error| format!("{pem}: {error}");
    let found: Result<Vec<_>, _> = match pem {
        Pem::File(path) => CertificateDer::pem_file_iter(path).map_err(explain)?.collect(),
        Pem::Text(text, _) => CertificateDer::pem_slice_iter(text).collect(),
    };
    let found = found.map_err(explain)?;
    if found.is_empty() { Err(format!("{pem} holds no certificate")) } else { Ok(found) }
}

/// Believes any server that has the key of the certificate that it shows, as the operator wants it.
#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        crypto::verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        crypto::verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
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
    /// A TLS session, and what its settings are called.
    Tls(Box<ClientConnection>, Called),
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
                Self::Tls(session, called) => read_session(session, *called, socket, into),
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
            Self::Tls(session, _) => write_session(session, socket, out, sent),
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
    called: Called,
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
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, explain(&error, called)))?;
    }
}

/// Adds what to do to the errors that operators meet.
fn explain(error: &rustls::Error, called: Called) -> String {
    let Called { ca, identity } = called;
    let remedy = match error {
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            format!("; {ca} must name the authority that signed the server's certificate")
        }
        rustls::Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => "; the endpoint must be written with a name or address that the certificate holds".into(),
        rustls::Error::InvalidCertificate(CertificateError::Other(other))
            if other.to_string().contains("CaUsedAsEndEntity") =>
        {
            "; the server presents an authority's certificate as its own: give it one signed by that authority".into()
        }
        rustls::Error::AlertReceived(
                        rustls::AlertDescription::CertificateRequired
            | rustls::AlertDescription::BadCertificate
            | rustls::AlertDescription::CertificateExpired
            | rustls::AlertDescription::CertificateUnknown
            | rustls::AlertDescription::UnknownCA
            | rustls::AlertDescription::DecryptError,
        ) => format!("; the server wants a client certificate that it trusts: {identity}"),
        _ => String::new(),
    };
    format!("TLS: {error}{remedy}")
}
