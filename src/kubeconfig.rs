//! Where the API server is, whom to trust, and who we are there: from a kubeconfig, or from what a pod is given
//! (control-plane spec 6.1). Files are read at start; the ones that they name are read when they are used.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::json;
use yaml_rust2::{Yaml, YamlLoader};

use crate::cli::settings;
use crate::http::{Access, Called, Credentials, Pem, Plugin, Source, TlsSettings};

/// What every pod is given.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// Longest kubeconfig that is read, in bytes.
const LONGEST: usize = 1 << 20;

const IN_KUBECONFIG: Called = Called {
    ca: "certificate-authority in the kubeconfig",
    identity: "client-certificate and client-key in the kubeconfig",
};
const IN_POD: Called = Called {
    ca: "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt",
    identity: "a kubeconfig can hold one: -kubeconfig-file",
};

/// How to reach the API server.
#[derive(Debug, Default)]
pub struct Found {
    /// For the HTTP client.
    pub access: Access,
    /// One line each, for the log.
    pub warnings: Vec<String>,
}

impl Found {
    /// What the credentials are, for messages.
    pub fn credential(&self) -> String {
        match (&self.access.credentials.source, &self.access.tls.identity) {
            (Source::Nowhere, Some((certificate, _))) => {
                format!("the certificate in {certificate}")
            }
            (Source::Nowhere, None) => "nothing (no token and no certificate are set)".into(),
            (source, _) => source.to_string(),
        }
    }
}

/// Finds it out.
///
/// # Errors
/// What is missing or wrong, where, and what to do.
pub fn find(settings: &settings::Kube) -> Result<Found, String> {
    let mut found = match &settings.kubeconfig {
        Some(path) => {
            let text = fs::read_to_string(path)
                .map_err(|error| format!("read the kubeconfig {}: {error}", path.display()))?;
            let directory = path.parent().unwrap_or(Path::new("."));
            kubeconfig(&text, directory)
                .map_err(|wrong| format!("the kubeconfig {}: {wrong}", path.display()))?
        }
        None => in_pod(settings)?,
    };
    if !settings.api_urls.is_empty() {
        found.access.endpoints.clone_from(&settings.api_urls);
    }
    let secure = found.access.tls.ca.is_some() || found.access.tls.identity.is_some();
    for endpoint in &mut found.access.endpoints {
        if !endpoint.contains("://") {
            endpoint.insert_str(0, if secure { "https://" } else { "http://" });
        }
    }
    if found.access.endpoints.is_empty() {
        return Err(
            "where is the API server? The kubeconfig names none: give -kube-api-url, or a cluster with a server".into(),
        );
    }
    let bare = found.access.endpoints.iter().any(|endpoint| endpoint.starts_with("http://"));
    if bare && found.access.credentials.source != Source::Nowhere {
        found
            .warnings
            .push("credentials are sent over plain http: anybody on the way can read them".into());
    }
    Ok(found)
}

/// What a pod is given; with `-kube-api-url`, as far as it is there.
fn in_pod(settings: &settings::Kube) -> Result<Found, String> {
    let (token, ca) =
        (Path::new(SERVICE_ACCOUNT).join("token"), Path::new(SERVICE_ACCOUNT).join("ca.crt"));
    let mut access = Access {
        tls: TlsSettings { called: IN_POD, ..TlsSettings::default() },
        ..Access::default()
    };
    let only_plain = settings.api_urls.iter().all(|url| url.starts_with("http://"));
    if !settings.api_urls.is_empty() && (only_plain || !token.exists()) {
        return Ok(Found { access, ..Found::default() });
    }
    match &settings.service {
        Some(service) => access.endpoints.push(service.clone()),
        None if settings.api_urls.is_empty() => {
            return Err(
                "where is the API server? Outside of a pod give -kubeconfig-file or -kube-api-url \
                 (in a pod KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT would say)"
                    .into(),
            );
        }
        None => {}
    }
    if !token.exists() {
        return Err(format!(
            "there is no {}: the pod needs a service account with automountServiceAccountToken; outside of a pod give -kubeconfig-file",
            token.display()
        ));
    }
    access.credentials.source = Source::TokenFile(token);
    access.tls.ca = ca.exists().then_some(Pem::File(ca));
    Ok(Found { access, ..Found::default() })
}

/// The current context of a kubeconfig. Relative paths are relative to `directory`.
fn kubeconfig(text: &str, directory: &Path) -> Result<Found, String> {
    if text.len() > LONGEST {
        return Err(format!("it is longer than {LONGEST} bytes"));
    }
    let documents =
        YamlLoader::load_from_str(text).map_err(|error| format!("it is no YAML: {error}"))?;
    let root = documents.first().unwrap_or(&Yaml::BadValue);
    if root.as_hash().is_none() {
        return Err("it holds no mapping: is it a kubeconfig?".into());
    }
    let mut warnings = Vec::new();
    let context = match string(root, "current-context")? {
        None => &Yaml::BadValue,
        Some(name) => named(root, "contexts", "context", name)?,
    };
    let part = |list: &str, kind: &'static str| match string(context, kind)? {
        None => Ok(&Yaml::BadValue),
        Some(name) => named(root, list, kind, name),
    };
    let (cluster, user) = (part("clusters", "cluster")?, part("users", "user")?);
    if string(cluster, "proxy-url")?.is_some() {
        // its value may hold a password
        return Err(
            "proxy-url: proxies are not supported, give a direct way to the API server".into()
        );
    }
    if !user["auth-provider"].is_badvalue() {
        return Err(
            "auth-provider is not supported: Kubernetes has dropped it for exec plugins".into()
        );
    }
    let unverified = boolean(cluster, "insecure-skip-tls-verify")?;
    if unverified {
        warnings.push("insecure-skip-tls-verify: anybody can pass for the API server".into());
    }
    let certificate = pem(user, "client-certificate", directory)?;
    let key = pem(user, "client-key", directory)?;
    let identity = match (certificate, key) {
        (None, None) => None,
        (Some(certificate), Some(key)) => Some((certificate, key)),
        (Some(_), None) => {
            return Err(
                "client-certificate without client-key: the certificate needs its key".into()
            );
        }
        (None, Some(_)) => {
            return Err(
                "client-key without client-certificate: the key needs its certificate".into()
            );
        }
    };
    let tls = TlsSettings {
        ca: pem(cluster, "certificate-authority", directory)?.filter(|_| !unverified),
        identity,
        server_name: string(cluster, "tls-server-name")?.map(str::to_owned),
        unverified,
        called: IN_KUBECONFIG,
    };
    let endpoints: Vec<String> =
        string(cluster, "server")?.map(str::to_owned).into_iter().collect();
    let source = source(cluster, user, directory)?;
    let fields = impersonation(user)?;
    let access = Access { endpoints, tls, credentials: Credentials { source, fields } };
    Ok(Found { access, warnings })
}

fn source(cluster: &Yaml, user: &Yaml, directory: &Path) -> Result<Source, String> {
    if let Some(file) = string(user, "tokenFile")? {
        return Ok(Source::TokenFile(directory.join(file)));
    }
    if let Some(token) = string(user, "token")? {
        return Ok(Source::Token(token.to_owned()));
    }
    if let Some(name) = string(user, "username")? {
        let password = string(user, "password")?.unwrap_or_default();
        return Ok(Source::Basic(name.to_owned(), password.to_owned()));
    }
    let exec = &user["exec"];
    if exec.is_badvalue() || exec.is_null() {
        return Ok(Source::Nowhere);
    }
    let command = string(exec, "command")?.ok_or("exec names no command")?;
    let version = string(exec, "apiVersion")?.ok_or("exec names no apiVersion")?;
    if !version.starts_with("client.authentication.k8s.io/v1") {
        return Err(format!(
            "exec has apiVersion {version:?}: it must be client.authentication.k8s.io/v1 or v1beta1"
        ));
    }
    let mut spec = json!({ "interactive": false });
    if boolean(exec, "provideClusterInfo")? {
        let data = pem(cluster, "certificate-authority", directory)?.map(|ca| match ca {
            Pem::Text(text, _) => Ok(BASE64.encode(text)),
            Pem::File(path) => match fs::read(&path) {
                Ok(text) => Ok(BASE64.encode(text)),
                Err(error) => Err(format!("read {}: {error}", path.display())),
            },
        });
        spec["cluster"] = json!({
            "server": string(cluster, "server")?,
            "tls-server-name": string(cluster, "tls-server-name")?,
            "insecure-skip-tls-verify": boolean(cluster, "insecure-skip-tls-verify")?,
            "certificate-authority-data": data.transpose()?,
        });
    }
    let info = json!({ "kind": "ExecCredential", "apiVersion": version, "spec": spec });
    let mut env = vec![("KUBERNETES_EXEC_INFO".to_owned(), info.to_string())];
    for variable in exec["env"].as_vec().into_iter().flatten() {
        let name = string(variable, "name")?.ok_or("exec has an env without a name")?;
        env.push((name.to_owned(), string(variable, "value")?.unwrap_or_default().to_owned()));
    }
    let args = exec["args"].as_vec().into_iter().flatten();
    let args: Option<Vec<String>> = args.map(scalar).collect();
    // a name without a slash is looked for in PATH
    let command =
        if command.contains('/') { directory.join(command) } else { PathBuf::from(command) };
    Ok(Source::Plugin(Plugin {
        command,
        args: args.ok_or("exec has args that are not text")?,
        env,
        install_hint: string(exec, "installHint")?.unwrap_or_default().to_owned(),
    }))
}

fn impersonation(user: &Yaml) -> Result<Vec<(&'static str, String)>, String> {
    let mut fields = Vec::new();
    for (key, field) in [("as", "impersonate-user"), ("as-uid", "impersonate-uid")] {
        fields.extend(string(user, key)?.map(|value| (field, value.to_owned())));
    }
    for group in user["as-groups"].as_vec().into_iter().flatten() {
        let group = group.as_str().ok_or("as-groups holds something that is not text")?;
        fields.push(("impersonate-group", group.to_owned()));
    }
    Ok(fields)
}

/// The entry called `name` of a list such as `clusters`.
fn named<'a>(root: &'a Yaml, list: &str, kind: &str, name: &str) -> Result<&'a Yaml, String> {
    let entries = root[list].as_vec().into_iter().flatten();
    let mut entry = entries.filter(|entry| entry["name"].as_str() == Some(name));
    let found = entry.next().map(|entry| &entry[kind]);
    found.ok_or_else(|| {
        format!("it speaks of the {kind} {name:?} and has none of this name in {list}")
    })
}

/// A text, if it is there and not empty.
fn string<'a>(map: &'a Yaml, key: &str) -> Result<Option<&'a str>, String> {
    match &map[key] {
        Yaml::BadValue | Yaml::Null => Ok(None),
        Yaml::String(text) => Ok(Some(text.as_str()).filter(|text| !text.is_empty())),
        // a number that nobody has put in quotes; how it was written is what counts
        Yaml::Real(text) => Ok(Some(text)),
        _ => Err(format!("{key} must be text: put it in quotes")),
    }
}

fn scalar(value: &Yaml) -> Option<String> {
    match value {
        Yaml::String(text) | Yaml::Real(text) => Some(text.clone()),
        Yaml::Integer(number) => Some(number.to_string()),
        Yaml::Boolean(value) => Some(value.to_string()),
        _ => None,
    }
}

fn boolean(map: &Yaml, key: &str) -> Result<bool, String> {
    match &map[key] {
        Yaml::BadValue | Yaml::Null => Ok(false),
        Yaml::Boolean(value) => Ok(*value),
        _ => Err(format!("{key} must be true or false")),
    }
}

/// `key` names a file; `key-data`, which goes before it, holds its content in base64.
fn pem(map: &Yaml, key: &'static str, directory: &Path) -> Result<Option<Pem>, String> {
    let mut data = String::new();
    let _ = write!(data, "{key}-data");
    if let Some(text) = string(map, &data)? {
        let packed: String = text.split_whitespace().collect();
        let bytes =
            BASE64.decode(packed).map_err(|error| format!("{data} is no base64: {error}"))?;
        return Ok(Some(Pem::Text(bytes.into(), key)));
    }
    Ok(string(map, key)?.map(|file| Pem::File(directory.join(file))))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: &str = r#"
apiVersion: v1
kind: Config
current-context: b
contexts:
- {name: a, context: {cluster: other, user: other}}
- name: b
  context:
    cluster: here
    user: agent
clusters:
- name: here
  cluster:
    server: https://10.0.0.1:6443
    certificate-authority: ca.crt
    tls-server-name: kubernetes
users:
- name: agent
  user:
    client-certificate: /etc/agent.crt
    client-key-data: a2V5
    as: someone
    as-groups: [one, two]
"#;

    fn read(text: &str) -> Result<Found, String> {
        kubeconfig(text, Path::new("/etc/kubernetes"))
    }

    #[test]
    fn the_current_context() {
        let Found { access, warnings } = read(WHOLE).unwrap();
        assert_eq!(access.endpoints, ["https://10.0.0.1:6443"]);
        assert_eq!(access.tls.ca, Some(Pem::File("/etc/kubernetes/ca.crt".into())));
        let key = Pem::Text(b"key"[..].into(), "client-key");
        assert_eq!(access.tls.identity, Some((Pem::File("/etc/agent.crt".into()), key)));
        assert_eq!(access.tls.server_name.as_deref(), Some("kubernetes"));
        assert_eq!(
            access.credentials.fields,
            [
                ("impersonate-user", "someone".to_owned()),
                ("impersonate-group", "one".into()),
                ("impersonate-group", "two".into())
            ]
        );
        assert_eq!(warnings, [""; 0]);
    }

    fn with_user(user: &str) -> Result<Found, String> {
        let head = WHOLE.split("    client-certificate").next().unwrap();
        read(&format!("{head}    {}\n", user.replace('\n', "\n    ")))
    }

    #[test]
    fn credentials() {
        let source = |user: &str| with_user(user).unwrap().access.credentials.source;
        assert_eq!(source("token: abc"), Source::Token("abc".into()));
        assert_eq!(
            source("token: abc\ntokenFile: t"),
            Source::TokenFile("/etc/kubernetes/t".into())
        );
        assert_eq!(source("username: u\npassword: \"1\""), Source::Basic("u".into(), "1".into()));
        assert_eq!(source("exec: null"), Source::Nowhere);
        let exec = "exec:\n  apiVersion: client.authentication.k8s.io/v1beta1\n  command: ./login\n  args: [get, 7]\n  env:\n  - {name: A, value: b}\n  installHint: get it\n  provideClusterInfo: true";
        // the authority's file is not there
        assert!(with_user(exec).unwrap_err().contains("/etc/kubernetes/ca.crt"));
        let Source::Plugin(plugin) =
            source(&exec.replace("provideClusterInfo: true", "interactiveMode: Never"))
        else {
            panic!()
        };
        assert_eq!(plugin.command, Path::new("/etc/kubernetes/./login"));
        assert_eq!(plugin.args, ["get", "7"]);
        assert_eq!(plugin.env[1], ("A".into(), "b".into()));
        let info = &plugin.env[0].1;
        assert!(info.contains(r#""apiVersion":"client.authentication.k8s.io/v1beta1""#), "{info}");
    }

    #[test]
    fn json_is_yaml() {
        let text = r#"{"current-context":"c","contexts":[{"name":"c","context":{"cluster":"d","user":"u"}}],
            "clusters":[{"name":"d","cluster":{"server":"http://h","insecure-skip-tls-verify":true}}],
            "users":[{"name":"u","user":{"token":"t"}}]}"#;
        let Found { access, warnings } = read(text).unwrap();
        assert!(access.tls.unverified && warnings.len() == 1);
        assert_eq!(access.endpoints, ["http://h"]);
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, says) in [
            ("", "no mapping"),
            ("a: [", "no YAML"),
            ("current-context: x", "the context \"x\""),
            (&WHOLE.replace("cluster: here", "cluster: there"), "the cluster \"there\""),
            (&WHOLE.replace("client-key-data: a2V5", "x: y"), "needs its key"),
            (&WHOLE.replace("a2V5", "'%'"), "client-key-data is no base64"),
            (&WHOLE.replace("https://10.0.0.1:6443", "[1]"), "server must be text"),
            (
                &WHOLE.replace("tls-server-name: kubernetes", "proxy-url: http://p"),
                "proxies are not supported",
            ),
            (
                &WHOLE.replace("tls-server-name: kubernetes", "insecure-skip-tls-verify: 1"),
                "true or false",
            ),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
        let secret =
            WHOLE.replace("tls-server-name: kubernetes", "proxy-url: 'http://u:hunter2@p'");
        assert!(!read(&secret).unwrap_err().contains("hunter2"));
        for (user, says) in [
            ("exec: {command: x}", "no apiVersion"),
            ("exec: {apiVersion: client.authentication.k8s.io/v1}", "no command"),
            ("exec: {apiVersion: v2, command: x}", "must be client.authentication"),
            ("auth-provider: {name: gcp}", "auth-provider"),
        ] {
            let error = with_user(user).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn mutated_files_never_panic() {
        let mut state = 3u32;
        for _ in 0..3000 {
            let mut bytes = WHOLE.as_bytes().to_vec();
            for _ in 0..3 {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let [high, low, value, _] = state.to_be_bytes();
                let at = usize::from(u16::from_be_bytes([high, low])) % bytes.len();
                bytes[at] = value & 0x7f;
            }
            let _ = read(&String::from_utf8_lossy(&bytes));
        }
    }

    fn settings(api_urls: &[&str], service: Option<&str>) -> settings::Kube {
        settings::Kube {
            api_urls: api_urls.iter().map(ToString::to_string).collect(),
            kubeconfig: None,
            prefix: crate::store::kube::annotations::Prefix::parse("a.b").unwrap(),
            config: "/nowhere".into(),
            set_condition: true,
            who: None,
            service: service.map(str::to_owned),
        }
    }

    /// On a machine that is no pod.
    #[test]
    fn without_a_kubeconfig() {
        assert!(
            find(&settings(&[], None)).unwrap_err().contains("-kubeconfig-file or -kube-api-url")
        );
        assert!(
            find(&settings(&[], Some("https://10.0.0.1:443")))
                .unwrap_err()
                .contains("service account")
        );
        let found = find(&settings(&["127.0.0.1:8080", "http://b"], None)).unwrap();
        assert_eq!(found.access.endpoints, ["http://127.0.0.1:8080", "http://b"]);
        assert_eq!(found.access.credentials.source, Source::Nowhere);
    }
}
