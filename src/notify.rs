//! Tells the service manager that start-up is over (`sd_notify(3)`).

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Sends `READY=1` to `socket`, the value of `NOTIFY_SOCKET`: a path, or an abstract name after `@`.
///
/// # Errors
/// The socket is not there or does not take it.
pub fn ready(socket: &OsStr) -> io::Result<()> {
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        path => SocketAddr::from_pathname(OsStr::from_bytes(path))?,
    };
    let sender = UnixDatagram::unbound()?;
    // a manager that does not read must not stop the loop
    sender.set_nonblocking(true)?;
    sender.send_to_addr(b"READY=1", &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_name() {
        let abstract_name = format!("flanneld-notify-{}", std::process::id());
        let path = std::env::temp_dir().join(&abstract_name);
        let _ = std::fs::remove_file(&path);
        for (name, address) in [
            (format!("@{abstract_name}"), SocketAddr::from_abstract_name(&abstract_name).unwrap()),
            (path.to_str().unwrap().to_owned(), SocketAddr::from_pathname(&path).unwrap()),
        ] {
            let manager = UnixDatagram::bind_addr(&address).unwrap();
            ready(OsStr::new(&name)).unwrap();
            let mut buffer = [0; 64];
            let got = manager.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..got], b"READY=1");
        }
        std::fs::remove_file(&path).unwrap();
        assert!(ready(path.as_os_str()).is_err());
    }
}
