//! `install-conf SRC DEST`: puts a CNI configuration in its place, whole or not at all (firewall-cni-packaging spec 6.5).
//! An image without a shell has no `cp`, and a container runtime that reads half a file takes the network for broken.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::ExitCode;

use flanneld::subnet_file;

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let [source, destination] = &args[..] else {
        let _ = writeln!(std::io::stderr(), "usage: install-conf <src> <dest>");
        return ExitCode::FAILURE;
    };
    let (source, destination) = (Path::new(source), Path::new(destination));
    let installed = install(source, destination);
    if let Err(error) = &installed {
        let _ = writeln!(std::io::stderr(), "error installing {source:?}: {error}");
    }
    installed.map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS)
}

fn install(source: &Path, destination: &Path) -> std::io::Result<()> {
    let content = fs::read(source)?;
    let mode = fs::metadata(source)?.permissions().mode() & 0o777;
    subnet_file::replace(destination, 0o755, mode, |file| file.write_all(&content))
}
