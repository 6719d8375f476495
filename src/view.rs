//! The last good view, kept on disk: a host that boots without its store comes up from it.
//!
//! One file, `view.jsonl`: a header line, then a line a lease. It holds nothing secret, but only root needs it.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::NetworkConfig;
use crate::lease::{Lease, LeaseAttrs, Subnets};
use crate::store::PublicAddresses;
use crate::subnet_file;

/// Version of the format; another one is not read.
const FORMAT: u32 = 1;
/// Longest line that is read, in bytes.
const LONGEST: u64 = 1 << 20;
/// Most leases that are read.
const MOST: usize = 1 << 20;

/// What one network looked like.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct View {
    /// The network config.
    pub config: NetworkConfig,
    /// This host's lease.
    pub own: Lease,
    /// The other hosts'.
    pub peers: Vec<Lease>,
    /// What the store's operator had set for this host.
    pub set: PublicAddresses,
}

#[derive(Serialize, Deserialize)]
struct Header<'a> {
    format: u32,
    store: String,
    config: String,
    #[serde(borrow)]
    own: Line<'a>,
    peers: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    set_ip: Option<std::net::Ipv4Addr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    set_ipv6: Option<std::net::Ipv6Addr>,
}

/// A lease on a line of its own.
#[derive(Serialize, Deserialize)]
struct Line<'a> {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    v4: Option<std::borrow::Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    v6: Option<std::borrow::Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ip: Option<std::net::Ipv4Addr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ipv6: Option<std::net::Ipv6Addr>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    kind: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    data: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    data6: Option<String>,
    created: u64,
}

impl Line<'_> {
    fn of(lease: &Lease) -> Self {
        let attrs = &lease.attrs;
        Self {
            v4: lease.subnets.v4.map(|net| net.to_string().into()),
            v6: lease.subnets.v6.map(|net| net.to_string().into()),
            ip: attrs.public_ip,
            ipv6: attrs.public_ipv6,
            kind: attrs.backend_type.to_string(),
            data: attrs.backend_data.as_deref().map(str::to_owned),
            data6: attrs.backend_v6_data.as_deref().map(str::to_owned),
            created: lease.created,
        }
    }

    fn lease(self) -> Option<Lease> {
        let v4 = self.v4.map(|text| text.parse()).transpose().ok()?;
        let v6 = self.v6.map(|text| text.parse()).transpose().ok()?;
        if v4.is_none() && v6.is_none() {
            return None;
        }
        Some(Lease {
            subnets: Subnets { v4, v6 },
            attrs: LeaseAttrs {
                public_ip: self.ip,
                public_ipv6: self.ipv6,
                backend_type: self.kind.into(),
                backend_data: self.data.map(Into::into),
                backend_v6_data: self.data6.map(Into::into),
            },
            created: self.created,
        })
    }
}

fn path(dir: &Path) -> PathBuf {
    dir.join("view.jsonl")
}

/// The file's content: a view of the store called `store`.
///
/// # Errors
/// None that is known of.
pub fn render<'a>(
    store: &str,
    config: &NetworkConfig,
    own: &Lease,
    set: PublicAddresses,
    peers: impl Iterator<Item = &'a Lease> + Clone,
) -> io::Result<Vec<u8>> {
    let header = Header {
        format: FORMAT,
        store: store.to_owned(),
        config: config.document.clone(),
        own: Line::of(own),
        peers: peers.clone().count(),
        set_ip: set.v4,
        set_ipv6: set.v6,
    };
    let mut content = Vec::new();
    serde_json::to_writer(&mut content, &header)?;
    content.push(b'\n');
    for lease in peers {
        serde_json::to_writer(&mut content, &Line::of(lease))?;
        content.push(b'\n');
    }
    Ok(content)
}

/// Puts the content on the disk.
///
/// # Errors
/// The text names the file.
pub fn write(dir: &Path, content: &[u8]) -> io::Result<()> {
    subnet_file::replace(&path(dir), 0o700, 0o600, |file| file.write_all(content))
}

/// Loads the view of the store called `store`. A file that cannot be used is moved aside, so that somebody can look at it.
///
/// # Errors
/// The text says what is wrong with the file and where it is now. The view of another store, or none at all, is `None`.
pub fn load(dir: &Path, store: &str) -> Result<Option<View>, String> {
    let path = path(dir);
    let file = match fs::File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => {
            return Err(format!("the saved view {} cannot be read: {error}", path.display()));
        }
    };
    read(BufReader::new(file), store).map_err(|wrong| {
        let aside = path.with_extension("jsonl.bad");
        let moved = match fs::rename(&path, &aside) {
            Ok(()) => format!("it was moved to {}", aside.display()),
            Err(error) => format!("it could not be moved aside: {error}"),
        };
        format!("the saved view {} is not used, {wrong}; {moved}", path.display())
    })
}

fn read(mut file: impl BufRead, store: &str) -> Result<Option<View>, String> {
    let mut line = String::new();
    let mut next = |line: &mut String, what: &str| {
        line.clear();
        let got = io::Read::take(&mut file, LONGEST)
            .read_line(line)
            .map_err(|error| format!("{what}: {error}"))?;
        if line.ends_with('\n') { Ok(got) } else { Err(format!("{what} is cut off")) }
    };
    next(&mut line, "its header")?;
    let header: Header<'_> =
        serde_json::from_str(&line).map_err(|error| format!("its header: {error}"))?;
    if header.format != FORMAT {
        return Err(format!("its format is {} and this version reads {FORMAT}", header.format));
    }
    if header.store != store {
        return Ok(None);
    }
    let config = NetworkConfig::parse(&header.config)
        .map_err(|error| format!("its network config: {error}"))?;
    let set = PublicAddresses { v4: header.set_ip, v6: header.set_ipv6 };
    let own = header.own.lease().ok_or("its own lease has no valid subnet")?;
    let count = header.peers.min(MOST);
    let mut peers = Vec::with_capacity(count.min(10_000));
    for number in 1..=count {
        let what = format!("lease {number} of {count}");
        next(&mut line, &what)?;
        let lease: Line<'_> =
            serde_json::from_str(&line).map_err(|error| format!("{what}: {error}"))?;
        peers.push(lease.lease().ok_or_else(|| format!("{what} has no valid subnet"))?);
    }
    Ok(Some(View { config, own, peers, set }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(third: u8) -> Lease {
        Lease {
            subnets: Subnets { v4: format!("10.3.{third}.0/24").parse().ok(), v6: None },
            attrs: LeaseAttrs {
                public_ip: Some([192, 168, 0, third].into()),
                backend_type: "vxlan".into(),
                backend_data: Some(r#"{"VNI":1,"VtepMAC":"aa:bb:cc:dd:ee:ff"}"#.into()),
                ..LeaseAttrs::default()
            },
            created: u64::from(third),
        }
    }

    fn view() -> View {
        let mut dual = lease(3);
        dual.subnets.v6 = "fd00:3::/64".parse().ok();
        dual.attrs.public_ipv6 = Some("fd77::3".parse().unwrap());
        dual.attrs.backend_v6_data = Some("null".into());
        let config =
            NetworkConfig::parse(r#"{"Network":"10.3.0.0/16","Backend":{"Type":"vxlan"}}"#)
                .unwrap();
        let set = PublicAddresses { v4: Some([1, 2, 3, 4].into()), v6: None };
        View { config, own: lease(1), peers: vec![lease(2), dual], set }
    }

    fn saved(dir: &Path) -> Vec<u8> {
        let view = view();
        let content =
            render("etcd /a", &view.config, &view.own, view.set, view.peers.iter()).unwrap();
        write(dir, &content).unwrap();
        fs::read(path(dir)).unwrap()
    }

    fn dir(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("flanneld-view-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        dir
    }

    #[test]
    fn what_is_saved_is_loaded() {
        let dir = dir("round");
        assert_eq!(load(&dir, "etcd /a"), Ok(None));
        saved(&dir);
        assert_eq!(load(&dir, "etcd /a"), Ok(Some(view())));
        assert_eq!(load(&dir, "etcd /b"), Ok(None), "another store's");
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_damaged_file_is_moved_aside() {
        let dir = dir("damaged");
        let whole = saved(&dir);
        fs::write(path(&dir), &whole[..whole.len() - 10]).unwrap();
        let error = load(&dir, "etcd /a").unwrap_err();
        assert!(
            error.contains("lease 2 of 2 is cut off") && error.contains("jsonl.bad"),
            "{error}"
        );
        assert_eq!(load(&dir, "etcd /a"), Ok(None));
        fs::write(
            path(&dir),
            String::from_utf8(whole).unwrap().replace("\"format\":1", "\"format\":2"),
        )
        .unwrap();
        assert!(load(&dir, "etcd /a").unwrap_err().contains("format is 2"));
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn mutated_files_never_panic() {
        let dir = dir("mutated");
        let whole = saved(&dir);
        let mut state = 9u32;
        for _ in 0..5000 {
            let mut bytes = whole.clone();
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let [high, low, value, _] = state.to_be_bytes();
            let at = usize::from(u16::from_be_bytes([high, low])) % bytes.len();
            bytes[at] = value;
            let _ = read(&bytes[..], "etcd /a");
            let _ = read(&bytes[..at], "etcd /a");
        }
        fs::remove_dir_all(dir).unwrap();
    }
}
