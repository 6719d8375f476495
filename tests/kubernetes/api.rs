//! A cluster in a box: a world with etcd, a kube-apiserver, and the objects of our manifest.
//!
//! The agents run as the manifest's service account, with a token that the API server has made, as in a pod.

#![allow(dead_code, unreachable_pub)] // the benchmark needs a part of it

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use yaml_rust2::{Yaml, YamlLoader};

use super::certificates;
use super::world::{Agent, Etcd, Host, Process, STORE, World, try_run, until};

/// The prefix of annotations, as the Go flanneld has it.
pub const PREFIX: &str = "flannel.alpha.coreos.com/";
const PORT: u16 = 6443;
const ADMIN: &str = "admin-token";
/// It takes 7 seconds on an idle machine.
const START: Duration = Duration::from_secs(120);

pub const VXLAN: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;

/// Where the server is, as `tests/tools/kube-apiserver.sh` or the environment says.
pub fn server() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("KUBE_APISERVER") {
        return Some(path.into());
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tools/kube-apiserver.sh");
    let found = try_run(&format!("{} find", script.display()));
    found.ok().map(|path| path.trim().into())
}

/// A cluster without hosts.
pub struct Cluster {
    pub process: Process,
    pub etcd: Etcd,
    pub world: World,
    pub dir: PathBuf,
}

impl Cluster {
    pub fn new() -> Self {
        Self::with(&[])
    }

    /// A server with further arguments.
    pub fn with(extra: &[&str]) -> Self {
        let world = World::new();
        // the benchmark has many nodes
        let etcd = world.etcd(&["--quota-backend-bytes=8589934592"]);
        let dir = world.dir.join("api");
        fs::create_dir_all(&dir).unwrap();
        certificates::make(&dir, &[STORE, "10.96.0.1", "127.0.0.1", "fd77::1"]);
        fs::write(dir.join("tokens.csv"), format!("{ADMIN},admin,1,\"system:masters\"\n")).unwrap();
        // the server signs tokens with RSA, which the test's authority does not make
        let key = dir.join("accounts.key");
        super::world::run(&format!("openssl genrsa -out {} 2048", key.display()));
        let process = spawn(&world, &dir, extra);
        let mut cluster = Self { process, etcd, world, dir };
        cluster.wait_up();
        cluster.install();
        cluster
    }

    /// Waits until it answers.
    pub fn wait_up(&mut self) {
        until("kube-apiserver is ready", START, || {
            assert!(self.process.is_running(), "kube-apiserver has ended");
            self.try_request("GET", "/readyz", None).is_ok_and(|(status, _)| status == 200)
        });
    }

    /// Namespace, service account and rights of our manifest.
    fn install(&self) {
        for object in manifest() {
            let path = match object["kind"].as_str().unwrap() {
                "Namespace" => "/api/v1/namespaces",
                "ServiceAccount" => "/api/v1/namespaces/kube-flannel/serviceaccounts",
                "ClusterRole" => "/apis/rbac.authorization.k8s.io/v1/clusterroles",
                "ClusterRoleBinding" => "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
                _ => continue,
            };
            self.request("POST", path, &object);
        }
        fs::write(self.dir.join("token"), self.token()).unwrap();
    }

    /// A new token of our service account.
    pub fn token(&self) -> String {
        let path = "/api/v1/namespaces/kube-flannel/serviceaccounts/flannel/token";
        let request = json!({ "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
            "spec": { "expirationSeconds": 3600 } });
        self.request("POST", path, &request)["status"]["token"].as_str().unwrap().to_owned()
    }

    /// A request of the administrator; status and body.
    pub fn try_request(
        &self,
        method: &str,
        path: &str,
        body: Option<(&str, &[u8])>,
    ) -> Result<(u16, String), String> {
        let url = format!("https://{STORE}:{PORT}{path}");
        let mut command = self.world.command("net", "curl");
        command.args(["-sk", "-m", "30", "-X", method, "-w", "\n%{http_code}", &url]);
        command.args(["-H", &format!("Authorization: Bearer {ADMIN}")]);
        if let Some((kind, body)) = body {
            let file = self.dir.join(format!("body-{:?}", std::thread::current().id()));
            fs::write(&file, body).unwrap();
            command.args(["-H", &format!("Content-Type: {kind}")]);
            command.arg("--data-binary").arg(format!("@{}", file.display()));
        }
        let output = command.stdin(Stdio::null()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let (body, status) = text.rsplit_once('\n').ok_or("no answer")?;
        match status.parse() {
            Ok(0) | Err(_) => Err(format!("{method} {path}: no answer")),
            Ok(status) => Ok((status, body.to_owned())),
        }
    }

    /// A request of the administrator that succeeds.
    #[track_caller]
    pub fn request(&self, method: &str, path: &str, body: &Value) -> Value {
        let kind = match method {
            "PATCH" => "application/merge-patch+json",
            _ => "application/json",
        };
        let text = body.to_string();
        let body = (!body.is_null()).then_some((kind, text.as_bytes()));
        let (status, answer) = self.try_request(method, path, body).unwrap();
        assert!((200..300).contains(&status), "{method} {path}: {status} {answer}");
        serde_json::from_str(&answer).unwrap()
    }

    /// A node as the kubelet and the controller manager make it.
    #[track_caller]
    pub fn add_node(&self, name: &str, cidrs: &[&str]) {
        self.add_node_with(name, cidrs, &json!({}));
    }

    #[track_caller]
    pub fn add_node_with(&self, name: &str, cidrs: &[&str], annotations: &Value) {
        let mut node = json!({ "apiVersion": "v1", "kind": "Node", "spec": {},
            "metadata": { "name": name, "annotations": annotations, "labels": { "kubernetes.io/hostname": name } } });
        if let Some(first) = cidrs.first() {
            node["spec"] = json!({ "podCIDR": first, "podCIDRs": cidrs });
        }
        self.request("POST", "/api/v1/nodes", &node);
    }

    /// A node of the Go flanneld: annotations as the spec has them.
    #[track_caller]
    pub fn add_go_node(&self, name: &str, cidr: &str, ip: &str, mac: &str) {
        let data = format!(r#"{{"VNI":1,"VtepMAC":"{mac}"}}"#);
        self.add_node_with(name, &[cidr], &go_annotations("vxlan", &data, ip));
    }

    /// Nodes without any network, many of them: more than fit on a page of a list.
    pub fn add_plain_nodes(&self, count: usize) {
        let one = |number: usize| {
            let body = json!({ "metadata": { "name": format!("plain-{number:04}") } }).to_string();
            format!(
                "url = https://{STORE}:{PORT}/api/v1/nodes\ninsecure\nfail\noutput = /dev/null\n\
                 header = \"Authorization: Bearer {ADMIN}\"\nheader = \"Content-Type: application/json\"\n\
                 data = {body:?}\n"
            )
        };
        let file = self.dir.join("plain");
        fs::write(&file, (0..count).map(one).collect::<Vec<_>>().join("next\n")).unwrap();
        self.world.run_in("net", &format!("curl -s -K {}", file.display()));
    }

    pub fn delete_node(&self, name: &str) {
        self.request("DELETE", &format!("/api/v1/nodes/{name}"), &Value::Null);
    }

    pub fn node(&self, name: &str) -> Value {
        self.request("GET", &format!("/api/v1/nodes/{name}"), &Value::Null)
    }

    /// Adds, changes and, with null, removes annotations of ours.
    pub fn annotate(&self, name: &str, annotations: &[(&str, Value)]) {
        let of = |(key, value): &(&str, Value)| (format!("{PREFIX}{key}"), value.clone());
        let annotations: serde_json::Map<String, Value> = annotations.iter().map(of).collect();
        let patch = json!({ "metadata": { "annotations": annotations } });
        self.request("PATCH", &format!("/api/v1/nodes/{name}"), &patch);
    }

    /// Gives a node its podCIDRs.
    pub fn give(&self, name: &str, cidrs: &[&str]) {
        let patch = json!({ "spec": { "podCIDR": cidrs[0], "podCIDRs": cidrs } });
        self.request("PATCH", &format!("/api/v1/nodes/{name}"), &patch);
    }

    /// An annotation of ours.
    pub fn annotation(&self, node: &str, key: &str) -> Option<String> {
        let node = self.node(node);
        node["metadata"]["annotations"][format!("{PREFIX}{key}")].as_str().map(str::to_owned)
    }

    /// One of the node's conditions.
    pub fn condition(&self, node: &str, kind: &str) -> Option<Value> {
        let node = self.node(node);
        let conditions = node["status"]["conditions"].as_array()?.clone();
        conditions.into_iter().find(|condition| condition["type"] == kind)
    }

    /// Puts the rules in place of those of our ClusterRole.
    pub fn set_rules(&self, rules: &Value) {
        let path = "/apis/rbac.authorization.k8s.io/v1/clusterroles/flannel";
        let mut role = self.request("GET", path, &Value::Null);
        role["rules"] = rules.clone();
        self.request("PUT", path, &role);
    }

    /// A kubeconfig with the service account's token.
    pub fn kubeconfig(&self) -> PathBuf {
        self.kubeconfig_for("token", &format!("tokenFile: {}", self.dir.join("token").display()))
    }

    /// A kubeconfig with this user.
    pub fn kubeconfig_for(&self, name: &str, user: &str) -> PathBuf {
        let path = self.dir.join(format!("kubeconfig-{name}"));
        let ca = self.dir.join("ca.pem");
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\n\
             contexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n\
             clusters: [{{name: c, cluster: {{server: 'https://{STORE}:{PORT}', certificate-authority: {}}}}}]\n\
             users:\n- name: u\n  user: {{{user}}}\n",
            ca.display()
        );
        fs::write(&path, text).unwrap();
        path
    }

    /// Starts the agent as node `name`, with this network config.
    pub fn start(&self, host: &Host, name: &str, config: &str, args: &[&str]) -> Agent {
        let kubeconfig = format!("-kubeconfig-file={}", self.kubeconfig().display());
        self.start_with(host, name, config, &[&[kubeconfig.as_str()], args].concat())
    }

    /// As [`Cluster::start`], without any access.
    pub fn start_with(&self, host: &Host, name: &str, config: &str, args: &[&str]) -> Agent {
        let mut command = self.command(host, config);
        command.env("NODE_NAME", name).args(args);
        host.start_command(command)
    }

    /// The agent's command, without access and without a node.
    pub fn command(&self, host: &Host, config: &str) -> Command {
        let path = host.dir.join("net-conf.json");
        fs::write(&path, config).unwrap();
        let mut command = host.command(super::world::binary());
        command.args(["-kube-subnet-mgr", "-healthz-port=8081"]);
        command.arg(format!("-net-config-path={}", path.display()));
        command.arg(format!("-subnet-file={}", host.subnet_file().display()));
        command.arg(format!("-data-dir={}", host.dir.join("data").display()));
        for variable in ["NODE_NAME", "POD_NAME", "POD_NAMESPACE", "KUBERNETES_SERVICE_HOST"] {
            command.env_remove(variable);
        }
        command
    }

    pub fn kill(&mut self) {
        self.process.signal("KILL");
        self.process.wait();
    }

    /// After [`Cluster::kill`].
    pub fn restart(&mut self) {
        self.process = spawn(&self.world, &self.dir, &[]);
        self.wait_up();
    }
}

fn spawn(world: &World, dir: &Path, extra: &[&str]) -> Process {
    let log = File::options().create(true).append(true).open(dir.join("log")).unwrap();
    let mut command =
        world.command("net", server().expect("no kube-apiserver: run make test-kubernetes"));
    let file = |name: &str| dir.join(name).display().to_string();
    command.args([
        "--etcd-servers=http://127.0.0.1:2379",
        "--insecure-port=0",
        &format!("--secure-port={PORT}"),
        &format!("--bind-address={STORE}"),
        &format!("--advertise-address={STORE}"),
        &format!("--tls-cert-file={}", file("server.pem")),
        &format!("--tls-private-key-file={}", file("server.key")),
        &format!("--client-ca-file={}", file("ca.pem")),
        &format!("--token-auth-file={}", file("tokens.csv")),
        &format!("--service-account-key-file={}", file("accounts.key")),
        &format!("--service-account-signing-key-file={}", file("accounts.key")),
        "--service-account-issuer=https://kubernetes.default.svc",
        "--service-cluster-ip-range=10.96.0.0/16",
        "--authorization-mode=RBAC",
        "--allow-privileged=true",
        // pods of the tests have no service account
        "--disable-admission-plugins=ServiceAccount",
    ]);
    command.args(extra).stdout(Stdio::null()).stderr(log);
    Process::start("kube-apiserver", &mut command)
}

/// The annotations that a Go node has.
pub fn go_annotations(kind: &str, data: &str, ip: &str) -> Value {
    let mut annotations = json!({});
    for (key, value) in [
        ("backend-data", data),
        ("backend-type", kind),
        ("kube-subnet-manager", "true"),
        ("public-ip", ip),
    ] {
        annotations[format!("{PREFIX}{key}")] = value.into();
    }
    annotations
}

/// The objects of the manifest that we ship.
pub fn manifest() -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/kubernetes/kube-flannel.yml");
    objects(&fs::read_to_string(path).unwrap())
}

/// The objects in a text in YAML.
pub fn objects(text: &str) -> Vec<Value> {
    let documents = YamlLoader::load_from_str(text).unwrap();
    documents.iter().filter(|document| document.as_hash().is_some()).map(to_json).collect()
}

fn to_json(yaml: &Yaml) -> Value {
    match yaml {
        Yaml::Real(text) => serde_json::from_str(text).unwrap(),
        Yaml::Integer(number) => (*number).into(),
        Yaml::String(text) => text.clone().into(),
        Yaml::Boolean(value) => (*value).into(),
        Yaml::Array(items) => items.iter().map(to_json).collect(),
        Yaml::Hash(map) => Value::Object(
            map.iter()
                .map(|(key, value)| (key.as_str().unwrap().to_owned(), to_json(value)))
                .collect(),
        ),
        Yaml::Null => Value::Null,
        other => panic!("{other:?}"),
    }
}
