//! The UDP socket of the data plane, which does not block.
//!
//! Its options are the kernel's defaults, as the Go flanneld's are: datagrams longer than the path allows are fragmented
//! by this host's kernel, which learns the path's MTU.

use std::io;
use std::net::SocketAddrV4;

use mio::net::UdpSocket;

/// A bound UDP socket.
#[derive(Debug)]
pub struct UdpPort {
    socket: UdpSocket,
}

impl UdpPort {
    /// Binds to one address of this host, which is then the source of everything sent.
    ///
    /// # Errors
    /// The text names the address, and what to do when it is taken.
    pub fn bind(address: SocketAddrV4) -> io::Result<Self> {
        let socket = UdpSocket::bind(address.into()).map_err(|error| {
            let remedy = match error.kind() {
                io::ErrorKind::AddrInUse => {
                    "; another flanneld or VXLAN device has the port: set Backend.Port"
                }
                _ => "",
            };
            io::Error::new(error.kind(), format!("listen on UDP {address}: {error}{remedy}"))
        })?;
        Ok(Self { socket })
    }

    /// Reads one datagram into `buffer`, which holds the longest one that there is. `WouldBlock` when none waits.
    ///
    /// # Errors
    /// As `recvfrom(2)`.
    pub fn recv(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.socket.recv_from(buffer).map(|(len, _)| len)
    }

    /// Sends one datagram. `WouldBlock` when the socket's send buffer is full: it becomes writable.
    ///
    /// # Errors
    /// As `sendto(2)`.
    pub fn send(&self, datagram: &[u8], to: SocketAddrV4) -> io::Result<()> {
        self.socket.send_to(datagram, to.into()).map(drop)
    }
}

/// Does this error of [`UdpPort::send`] say that the datagram is longer than one can be?
pub fn is_too_long(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EMSGSIZE)
}

super::source::source_by_descriptor!(UdpPort, socket);
