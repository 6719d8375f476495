//! Which of the programs called `iptables` are on this host, and which of its two kinds they are. Files are looked at,
//! nothing is run.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::family::Family;

/// The two kinds of `iptables`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Variant {
    /// Writes into `nf_tables`.
    Nft,
    /// Writes into `x_tables`.
    Legacy,
}

/// The programs of the legacy kind for one family.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tools {
    /// `iptables-legacy-save`.
    pub save: PathBuf,
    /// `iptables-legacy-restore`.
    pub restore: PathBuf,
}

/// Looks in the directories of `path` (as `PATH`), and in those where administration programs are.
pub fn find(path: &OsStr, family: Family) -> Option<Tools> {
    let base = if family == Family::V4 { "iptables" } else { "ip6tables" };
    let legacy = |action: &str| {
        look_up(path, &format!("{base}-legacy-{action}")).or_else(|| {
            look_up(path, &format!("{base}-{action}"))
                .filter(|found| kind(found) == Variant::Legacy)
        })
    };
    Some(Tools { save: legacy("save")?, restore: legacy("restore")? })
}

/// The kind of the `iptables` that a shell on this host finds.
pub fn host_variant(path: &OsStr) -> Option<Variant> {
    look_up(path, "iptables").map(|found| kind(&found))
}

fn look_up(path: &OsStr, name: &str) -> Option<PathBuf> {
    let usual = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(path)
        .filter(|dir| dir.is_absolute())
        .chain(usual)
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

/// The programs are one with many names: `xtables-nft-multi`, `xtables-legacy-multi`, or before 1.8 `xtables-multi`.
fn kind(program: &Path) -> Variant {
    let real = fs::canonicalize(program).unwrap_or_else(|_| program.to_owned());
    let name = real.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let old = name == "xtables-multi" || name == "iptables-multi";
    if old || name.contains("legacy") { Variant::Legacy } else { Variant::Nft }
}

/// Tables of the old kind that are in the kernel for this network namespace.
pub fn tables_in_use(family: Family) -> bool {
    let names = match family {
        Family::V4 => "/proc/net/ip_tables_names",
        Family::V6 => "/proc/net/ip6_tables_names",
    };
    match fs::read_to_string(names) {
        Ok(text) => !text.trim().is_empty(),
        // who may not look cannot say that there is nothing
        Err(error) => error.kind() == io::ErrorKind::PermissionDenied,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn kinds_are_told_by_what_the_names_lead_to() {
        let dir = std::env::temp_dir().join(format!("flanneld-tools-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        for program in ["xtables-nft-multi", "xtables-legacy-multi", "xtables-multi"] {
            fs::write(dir.join(program), "").unwrap();
        }
        let link = |name: &str, to: &str| {
            let _ = fs::remove_file(dir.join(name));
            symlink(to, dir.join(name)).unwrap();
        };
        link("alternative", "xtables-nft-multi");
        link("iptables", "alternative");
        assert_eq!(host_variant(dir.as_os_str()), Some(Variant::Nft));
        link("alternative", "xtables-legacy-multi");
        assert_eq!(host_variant(dir.as_os_str()), Some(Variant::Legacy));
        for name in ["ip6tables-save", "ip6tables-restore"] {
            link(name, "xtables-multi");
        }
        let found = find(dir.as_os_str(), Family::V6).unwrap();
        // a system's own ip6tables-legacy-save comes first, where there is one
        assert!(found.save.ends_with("ip6tables-legacy-save") || found.save.starts_with(&dir));
        fs::remove_dir_all(dir).unwrap();
    }
}
