//! The program as its operators and its service manager see it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Output};
use std::time::Duration;

use super::world::{PATIENCE, World, binary, http_get, until};

const VXLAN: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;

fn flanneld(args: &[&str]) -> Output {
    Command::new(binary()).args(args).output().unwrap()
}

#[test]
fn help_version_and_mistakes() {
    let version = flanneld(&["--version"]);
    assert_eq!((version.status.code(), version.stdout.is_empty()), (Some(0), false));
    let help = flanneld(&["-help"]);
    assert!(
        help.status.success() && String::from_utf8_lossy(&help.stdout).contains("-etcd-endpoints")
    );
    for (args, says) in [
        (&["-etcd-endpoint=x"][..], "did you mean -etcd-endpoints?"),
        (&["-healthz-port=many"], "-healthz-port: \"many\" is not an integer"),
        (&["-subnet-lease-renew-margin=1440"], "between 1 and 1439"),
        (&["-watch-networks"], "-watch-networks is not supported by this version"),
        (
            &["-kube-subnet-mgr", "-kube-annotation-prefix=org"],
            "-kube-annotation-prefix is \"org\"",
        ),
    ] {
        let output = flanneld(args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), stderr.lines().count()), (Some(2), 1), "{stderr}");
        assert!(stderr.contains(says), "{stderr}");
    }
}

/// What a node of Kubernetes needs before it can begin.
#[test]
fn what_kubernetes_needs_is_named() {
    let world = World::new();
    let config = world.dir.join("net-conf.json");
    let start = |args: &[&str], node: Option<&str>| {
        let mut command = Command::new(binary());
        command.arg("-kube-subnet-mgr").args(args);
        for variable in ["NODE_NAME", "POD_NAME", "POD_NAMESPACE", "KUBERNETES_SERVICE_HOST"] {
            command.env_remove(variable);
        }
        let output = command.envs(node.map(|name| ("NODE_NAME", name))).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        let errors: Vec<&str> = stderr.lines().filter(|line| line.starts_with('E')).collect();
        assert_eq!(errors.len(), 1, "{stderr}");
        errors[0].to_owned()
    };
    let path = format!("-net-config-path={}", config.display());
    let says = |error: String, what: &str| assert!(error.contains(what), "{error}");
    says(start(&[&path], Some("n1")), "-net-config-path names the file");
    fs::write(&config, "{}").unwrap();
    says(start(&[&path], Some("n1")), "is not valid");
    fs::write(&config, VXLAN).unwrap();
    says(start(&[&path], None), "Set NODE_NAME");
    says(start(&[&path], Some("n1")), "give -kubeconfig-file or -kube-api-url");
    says(start(&[&path, "-kubeconfig-file=/nowhere"], Some("n1")), "read the kubeconfig /nowhere");
    let kubeconfig = world.dir.join("kubeconfig");
    fs::write(&kubeconfig, "current-context: c").unwrap();
    let kubeconfig = format!("-kubeconfig-file={}", kubeconfig.display());
    says(start(&[&path, &kubeconfig], Some("n1")), "the context \"c\"");
}

#[test]
fn what_cannot_work_on_this_host_ends_with_one_error() {
    let mut world = World::new();
    let etcd = world.etcd(&[]);
    let host = world.host();
    for (config, args, says) in [
        (
            VXLAN,
            &["-iface=nope"][..],
            "no interface fits. --iface=nope: there is no such interface",
        ),
        (
            r#"{"Network":"10.5.0.0/16","Backend":{"Type":"wireguard"}}"#,
            &[],
            "is not in this build",
        ),
        (
            r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","VNI":0}}"#,
            &[],
            "Backend.VNI must be",
        ),
        (
            r#"{"Network":"10.5.0.0/16","Backend":{"Type":"host-gw"}}"#,
            &["-public-ip=203.0.113.1"],
            "203.0.113.1",
        ),
    ] {
        etcd.put_config("v3", config);
        let mut agent = host.start(args);
        assert_eq!(agent.process.wait().code(), Some(1), "{}", agent.log());
        let errors: Vec<String> =
            agent.log().lines().filter(|line| line.starts_with('E')).map(str::to_owned).collect();
        assert!(matches!(&errors[..], [one] if one.contains(says)), "{errors:?}");
    }
    let mut agent = host.start_with(&["-etcd-endpoints=ftp://x"]);
    assert_eq!(agent.process.wait().code(), Some(1));
}

#[test]
fn the_environment_stands_in_for_flags() {
    let mut world = World::new();
    let etcd = world.etcd(&[]);
    etcd.ctl(&["put", "/elsewhere/config", VXLAN]);
    let host = world.host();
    let mut command = host.command(binary());
    command
        .env("FLANNELD_ETCD_ENDPOINTS", "http://192.168.77.1:2379")
        .env("FLANNELD_ETCD_PREFIX", "/wrong");
    command
        .env("FLANNELD_SUBNET_FILE", host.subnet_file())
        .env("FLANNELD_DATA_DIR", host.dir.join("data"));
    let command = command.arg("--etcd-prefix=/elsewhere/").stderr(std::process::Stdio::null());
    let _agent = super::world::Process::start("flanneld", command);
    until("the subnet file", PATIENCE, || host.subnet_file().exists());
    let mode = fs::metadata(host.subnet_file()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o644);
    let text = fs::read_to_string(host.subnet_file()).unwrap();
    let subnet = host.env("FLANNEL_SUBNET").unwrap();
    assert_eq!(
        text,
        format!(
            "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET={subnet}\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"
        )
    );
}

#[test]
fn readiness_is_true() {
    let mut world = World::new();
    let etcd = world.etcd(&[]);
    let host = world.host();
    let socket = host.dir.join("notify");
    let manager = UnixDatagram::bind(&socket).unwrap();
    manager.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let mut command = host.command(binary());
    command.env("NOTIFY_SOCKET", &socket);
    command.args([
        "-etcd-endpoints=http://192.168.77.1:2379",
        "-healthz-ip=127.0.0.1",
        "-healthz-port=8081",
    ]);
    command.arg(format!("-subnet-file={}", host.subnet_file().display()));
    command
        .arg(format!("-data-dir={}", host.dir.join("data").display()))
        .stderr(std::process::Stdio::null());
    let agent = super::world::Process::start("flanneld", &mut command);
    until("healthz", PATIENCE, || {
        http_get(&host, "http://127.0.0.1:8081/healthz") == "flanneld is running:200"
    });
    let readyz = || http_get(&host, "http://127.0.0.1:8081/readyz");
    assert!(readyz().ends_with(":503"), "{}", readyz());
    let mut buffer = [0; 32];
    assert!(manager.recv(&mut buffer).is_err(), "not ready yet");
    etcd.put_config("v3", VXLAN);
    until("readyz", PATIENCE, || readyz() == "flanneld is ready:200");
    let len = manager.recv(&mut buffer).unwrap();
    assert_eq!(&buffer[..len], b"READY=1");
    // without its underlay the device cannot be
    host.run("ip link del eth0");
    until("not ready", PATIENCE, || readyz().ends_with(":503"));
    host.plug_in();
    until("ready again", PATIENCE, || readyz() == "flanneld is ready:200");
    assert!(manager.recv(&mut buffer).is_err(), "said once");
    drop(agent);
}

/// `install-conf` puts a file in its place, whole, with its mode, and says what it cannot do.
#[test]
fn install_conf() {
    let world = World::new();
    let (source, target) =
        (world.dir.join("cni-conf.json"), world.dir.join("net.d/10-flannel.conflist"));
    let install = |args: &[&std::path::Path]| {
        let output = Command::new(env!("CARGO_BIN_EXE_install-conf")).args(args).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    fs::create_dir_all(target.parent().unwrap()).unwrap();
    fs::write(&source, "one").unwrap();
    fs::set_permissions(&source, fs::Permissions::from_mode(0o640)).unwrap();
    for content in ["one", "two"] {
        fs::write(&source, content).unwrap();
        assert_eq!(install(&[&source, &target]), (Some(0), String::new()));
        assert_eq!(fs::read_to_string(&target).unwrap(), content);
        assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, 0o640);
    }
    assert_eq!(fs::read_dir(target.parent().unwrap()).unwrap().count(), 1);
    let (status, says) = install(&[std::path::Path::new("/nowhere"), &target]);
    assert!(status == Some(1) && says.starts_with("error installing \"/nowhere\""), "{says}");
    let (status, says) = install(&[&source]);
    assert!(status == Some(1) && says.contains("usage"), "{says}");
}

#[test]
fn a_second_signal_is_not_needed() {
    let mut world = World::new();
    let _etcd = world.etcd(&[]);
    let host = world.host();
    for signal in ["TERM", "INT"] {
        let mut agent = host.start(&[]);
        agent.wait_for("leases are kept in");
        agent.process.signal(signal);
        assert_eq!(agent.process.wait().code(), Some(0));
    }
}
