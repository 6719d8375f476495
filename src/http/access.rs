//! What a client is told: which servers there are, whom to trust, and who we are to them.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

/// All of it. Files are named here and read when they are needed, so that a rotated one is taken up.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Access {
    /// URLs of servers that are each as good as the other.
    pub endpoints: Vec<String>,
    /// Certificates.
    pub tls: TlsSettings,
    /// What is sent with each request.
    pub credentials: Credentials,
}

/// Certificates and keys in PEM.
#[derive(Clone, PartialEq, Eq)]
pub enum Pem {
    /// In a file, read again when it has changed.
    File(PathBuf),
    /// Given as it is; the text says where, for messages.
    Text(Arc<[u8]>, &'static str),
}

// it may be a private key
impl fmt::Debug for Pem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Display for Pem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Text(_, whence) => f.write_str(whence),
        }
    }
}

/// What the operator says about TLS.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct TlsSettings {
    /// Authorities that may sign a server's certificate; the system's when absent.
    pub ca: Option<Pem>,
    /// Our certificate chain and its key.
    pub identity: Option<(Pem, Pem)>,
    /// The name that the server's certificate must hold, if not the endpoint's.
    pub server_name: Option<String>,
    /// Any certificate is good enough.
    pub unverified: bool,
    /// What the settings are called, for messages.
    pub called: Called,
}

/// Names of settings, for messages that say what to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Called {
    /// The authorities'.
    pub ca: &'static str,
    /// Our certificate's and its key's.
    pub identity: &'static str,
}

impl Default for Called {
    fn default() -> Self {
        Self { ca: "-etcd-cafile", identity: "-etcd-certfile and -etcd-keyfile" }
    }
}

/// What is sent with each request.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Credentials {
    /// Where the `Authorization` field comes from.
    pub source: Source,
    /// Further fields, always the same.
    pub fields: Vec<(&'static str, String)>,
}

/// Where the `Authorization` field comes from.
#[derive(Clone, PartialEq, Eq, Default)]
pub enum Source {
    /// There is none.
    #[default]
    Nowhere,
    /// A bearer token.
    Token(String),
    /// A bearer token in a file, which is read for each request: whoever renews it need not tell us.
    TokenFile(PathBuf),
    /// User name and password.
    Basic(String, String),
    /// A program that prints a token, or a certificate, or both.
    Plugin(Plugin),
}

/// An exec credential plugin (`client.authentication.k8s.io`).
#[derive(Clone, PartialEq, Eq)]
pub struct Plugin {
    /// The program: a path, or a name that is looked for in `PATH`.
    pub command: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Added to our own environment.
    pub env: Vec<(String, String)>,
    /// Said when the program is not there.
    pub install_hint: String,
}

// none of them may reach a log

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nowhere => f.write_str("no credential"),
            Self::Token(_) => f.write_str("the token in the kubeconfig"),
            Self::TokenFile(path) => write!(f, "the token in {}", path.display()),
            Self::Basic(user, _) => write!(f, "the password of {user}"),
            Self::Plugin(plugin) => write!(f, "what {} says", plugin.command.display()),
        }
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Debug for Plugin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.command.display())
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.source)
    }
}
