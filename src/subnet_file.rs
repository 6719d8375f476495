//! The subnet file (control-plane spec 7): tells container runtimes and our own next life which subnet this host has.

use std::fmt::Write as _;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use ipnet::IpNet;

use crate::config::{NetworkConfig, prefix};
use crate::lease::Subnets;

/// The file's content. The families are those that the config enables.
pub fn render(config: &NetworkConfig, own: &Subnets, mtu: u32, ip_masq: bool) -> String {
    let mut text = String::new();
    if let (Some(v4), Some(subnet)) = (&config.v4, own.v4) {
        let first = u32::from(subnet.network()).wrapping_add(1);
        let _ = writeln!(text, "FLANNEL_NETWORK={}", v4.network);
        let _ = writeln!(
            text,
            "FLANNEL_SUBNET={}/{}",
            std::net::Ipv4Addr::from(first),
            subnet.prefix_len()
        );
    }
    if let (Some(v6), Some(subnet)) = (&config.v6, own.v6) {
        let first = u128::from(subnet.network()).wrapping_add(1);
        let _ = writeln!(text, "FLANNEL_IPV6_NETWORK={}", v6.network);
        let _ = writeln!(
            text,
            "FLANNEL_IPV6_SUBNET={}/{}",
            std::net::Ipv6Addr::from(first),
            subnet.prefix_len()
        );
    }
    let _ = writeln!(text, "FLANNEL_MTU={mtu}\nFLANNEL_IPMASQ={ip_masq}");
    text
}

/// Puts `content` in the file, whole or not at all, readable by everyone. Nothing is written when it is there already.
///
/// # Errors
/// The text names the path and what could not be done to it.
pub fn write(path: &Path, content: &str) -> io::Result<()> {
    let same_mode = fs::metadata(path).is_ok_and(|meta| meta.permissions().mode() & 0o777 == 0o644);
    if same_mode && fs::read(path).is_ok_and(|old| old == content.as_bytes()) {
        return Ok(());
    }
    replace(path, 0o755, 0o644, |file| file.write_all(content.as_bytes()))
}

/// Writes a file beside `path` and moves it there once it is on the disk. Missing directories are made with `dir_mode`.
///
/// # Errors
/// The text names the path and what could not be done to it.
pub fn replace(
    path: &Path,
    dir_mode: u32,
    mode: u32,
    fill: impl FnOnce(&mut io::BufWriter<&fs::File>) -> io::Result<()>,
) -> io::Result<()> {
    let name = path
        .file_name()
        .ok_or_else(|| io::Error::other(format!("{} names no file", path.display())))?;
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut fresh = std::ffi::OsString::from(".");
    fresh.push(name);
    // whoever reads the directory by endings of names must not take it for the file
    fresh.push(".tmp");

    let fresh = dir.join(fresh);
    let whole = || -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(dir_mode).create(dir)?;
        // a leftover of a crash, or somebody's trap
        match fs::remove_file(&fresh) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&fresh)?;
        let mut buffered = io::BufWriter::new(&file);
        fill(&mut buffered)?;
        buffered.flush()?;
        // whatever the umask says
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.sync_all()?;
        fs::rename(&fresh, path)
    };
    whole().map_err(|error| {
        let _ = fs::remove_file(&fresh);
        io::Error::new(error.kind(), format!("write {}: {error}", path.display()))
    })
}

/// What an earlier life wrote.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Previous {
    /// Its subnets.
    pub subnets: Subnets,
    /// The networks they were in.
    pub networks: Vec<IpNet>,
    /// What is wrong with the file, one line each.
    pub complaints: Vec<String>,
}

/// What an earlier life wrote. No file is nothing.
pub fn previous(path: &Path) -> Previous {
    match fs::read_to_string(path) {
        Ok(text) => parse(&text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Previous::default(),
        Err(error) => Previous { complaints: vec![error.to_string()], ..Previous::default() },
    }
}

/// Reads `KEY=VALUE` lines as a shell would. Of each key the one valid prefix is taken; several are none.
fn parse(text: &str) -> Previous {
    let mut complaints = Vec::new();
    let mut only = |key: &str, v4: bool| {
        let mut found = Vec::new();
        for part in value(text, key)?.split(',') {
            match prefix(part.trim()) {
                Some(net) if matches!(net, IpNet::V4(_)) == v4 => found.push(net.trunc()),
                _ => complaints.push(format!("{key}: {part:?} is not a prefix of its family")),
            }
        }
        if found.len() > 1 {
            complaints.push(format!("{key} has several prefixes: none is used"));
        }
        found.pop().filter(|_| found.is_empty())
    };
    let v4 = only("FLANNEL_SUBNET", true);
    let v6 = only("FLANNEL_IPV6_SUBNET", false);
    let networks = [only("FLANNEL_NETWORK", true), only("FLANNEL_IPV6_NETWORK", false)];
    let subnets = Subnets {
        v4: v4.and_then(|net| if let IpNet::V4(net) = net { Some(net) } else { None }),
        v6: v6.and_then(|net| if let IpNet::V6(net) = net { Some(net) } else { None }),
    };
    Previous { subnets, networks: networks.into_iter().flatten().collect(), complaints }
}

/// The last value of `key`.
fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    let mut values = lines.filter_map(|line| {
        let line = line.strip_prefix("export ").unwrap_or(line).trim_start();
        let (name, value) = line.split_once(['=', ':'])?;
        (name.trim_end() == key).then(|| unquote(value.trim()))
    });
    values.next_back()
}

fn unquote(value: &str) -> &str {
    for quote in ['"', '\''] {
        if let Some(inner) = value.strip_prefix(quote) {
            return inner.split(quote).next().unwrap_or(inner);
        }
    }
    // an unquoted value ends at a comment
    value.split(" #").next().unwrap_or(value).trim_end()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DUAL: &str =
        r#"{"Network":"10.1.0.0/16","EnableIPv6":true,"IPv6Network":"2001:cafe:42::/56"}"#;

    fn subnets(v4: &str, v6: &str) -> Subnets {
        Subnets { v4: v4.parse().ok(), v6: v6.parse().ok() }
    }

    /// Control-plane spec 7.1, to the byte.
    #[test]
    fn content() {
        let config = NetworkConfig::parse(r#"{"Network":"10.1.0.0/16"}"#).unwrap();
        assert_eq!(
            render(&config, &subnets("10.1.74.0/24", ""), 1472, false),
            "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.74.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
        );
        let config = NetworkConfig::parse(DUAL).unwrap();
        assert_eq!(
            render(&config, &subnets("10.1.74.0/24", "2001:cafe:42:5::/64"), 1430, true),
            "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.74.1/24\nFLANNEL_IPV6_NETWORK=2001:cafe:42::/56\n\
             FLANNEL_IPV6_SUBNET=2001:cafe:42:5::1/64\nFLANNEL_MTU=1430\nFLANNEL_IPMASQ=true\n"
        );
    }

    #[test]
    fn written_whole_and_only_when_it_differs() {
        let dir = std::env::temp_dir().join(format!("flanneld-subnet-file-{}", std::process::id()));
        let path = dir.join("deeper").join("subnet.env");
        write(&path, "A=1\n").unwrap();
        let inode = |path: &Path| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap());
        let before = inode(&path);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
        write(&path, "A=1\n").unwrap();
        assert_eq!(inode(&path), before, "the same content is not written again");
        write(&path, "A=2\n").unwrap();
        assert_ne!(inode(&path), before);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        write(&path, "A=2\n").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
        let error = write(&path.join("below-a-file"), "x").unwrap_err();
        assert!(error.to_string().contains("below-a-file"), "{error}");
        assert_eq!(
            fs::read_dir(path.parent().unwrap()).unwrap().count(),
            1,
            "nothing is left behind"
        );
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn reading_back() {
        let config = NetworkConfig::parse(DUAL).unwrap();
        let own = subnets("10.1.74.0/24", "2001:cafe:42:5::/64");
        let found = parse(&render(&config, &own, 1450, true));
        assert_eq!((found.subnets, found.complaints), (own, vec![]));
        let networks = ["10.1.0.0/16", "2001:cafe:42::/56"].map(|net| net.parse().unwrap());
        assert_eq!(found.networks, networks);
        for (text, v4, complaints) in [
            ("export FLANNEL_SUBNET = \"10.1.5.1/24\" # ours", "10.1.5.0/24", 0),
            ("FLANNEL_SUBNET: '10.1.5.1/24'", "10.1.5.0/24", 0),
            ("#FLANNEL_SUBNET=10.1.4.1/24\nFLANNEL_SUBNET=10.1.5.1/24 # x", "10.1.5.0/24", 0),
            ("FLANNEL_SUBNET=10.244.1.0/24,not-a-cidr", "10.244.1.0/24", 1),
            ("FLANNEL_SUBNET=10.244.1.0/24,not-a-cidr,10.244.2.0/24", "", 2),
            ("FLANNEL_SUBNET=not-a-cidr", "", 1),
            ("FLANNEL_SUBNET=fd00::/64", "", 1),
            ("FLANNEL_SUBNET=", "", 1),
            ("", "", 0),
            ("FLANNEL_SUBNETS=10.1.5.1/24", "", 0),
        ] {
            let found = parse(text);
            let said = found.complaints;
            assert_eq!(
                (found.subnets, said.len()),
                (subnets(v4, ""), complaints),
                "{text:?}: {said:?}"
            );
        }
    }

    #[test]
    fn missing_file_is_no_subnet() {
        assert_eq!(previous(Path::new("/nonexistent/subnet.env")), Default::default());
    }
}
