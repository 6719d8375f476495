//! TUN devices: IP packets between the kernel and this process (kernel `Documentation/networking/tuntap.rst`).
//!
//! One `read` gives one whole packet and one `write` takes one, without any header in front. The descriptor does not
//! block. The device vanishes with the descriptor.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use crate::kernel::IfName;

const CLONE_DEVICE: &str = "/dev/net/tun";

/// An open TUN device.
#[derive(Debug)]
pub struct Tun {
    file: File,
    name: IfName,
}

impl Tun {
    /// Makes a device. A `%d` in the name becomes the first number that is free, as in `flannel%d`.
    ///
    /// # Errors
    /// The text says what failed and what to do.
    pub fn open(template: &str) -> io::Result<Self> {
        let explain = |error: io::Error| {
            let remedy = match error.kind() {
                io::ErrorKind::NotFound => {
                    "; load the kernel module tun, and give a container the device"
                }
                io::ErrorKind::PermissionDenied => {
                    "; it takes the capability NET_ADMIN and access to the device"
                }
                _ => "",
            };
            io::Error::new(
                error.kind(),
                format!("open {CLONE_DEVICE} for {template}: {error}{remedy}"),
            )
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK) // O_CLOEXEC is std's own habit
            .open(CLONE_DEVICE)
            .map_err(explain)?;
        let wanted = IfName::new(template).ok_or_else(|| io::ErrorKind::InvalidInput.into());
        let name = wanted.and_then(|wanted| attach(&file, wanted)).map_err(explain)?;
        Ok(Self { file, name })
    }

    /// The device's name.
    pub fn name(&self) -> IfName {
        self.name
    }

    /// Reads one packet into `buffer`; what does not fit is lost. `WouldBlock` when none waits.
    ///
    /// # Errors
    /// As `read(2)`.
    pub fn recv(&self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(buffer)
    }

    /// Hands one packet to the kernel. `EIO` when the device is down, `EINVAL` when it is no IP packet.
    ///
    /// # Errors
    /// As `write(2)`.
    pub fn send(&self, packet: &[u8]) -> io::Result<()> {
        // A TUN device takes a packet whole or not at all.
        (&self.file).write(packet).map(drop)
    }
}

/// Does this error of [`Tun::recv`] or [`Tun::send`] say that somebody deleted the device?
pub fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBADFD)
}

/// Binds the descriptor to a new device and returns the name that the kernel gave it.
fn attach(file: &File, template: IfName) -> io::Result<IfName> {
    // SAFETY: ifreq consists of integers and byte arrays, for which all zeroes is a value. The kernel copies the whole
    // structure in and out, so no byte of it may be left uninitialised (nor may it be shorter).
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let (name_field, template) = (&mut request.ifr_name, template.as_str());
    for (to, from) in name_field.iter_mut().zip(template.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_flags =
        libc::c_short::try_from(libc::IFF_TUN | libc::IFF_NO_PI).map_err(io::Error::other)?;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which lives until the call returns.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let name = request.ifr_name.map(|c| c.to_ne_bytes()[0]);
    let len = name.iter().position(|b| *b == 0).unwrap_or(name.len());
    std::str::from_utf8(&name[..len])
        .ok()
        .and_then(IfName::new)
        .ok_or_else(|| io::Error::other("the kernel gave the device an unusable name"))
}

super::source::source_by_descriptor!(Tun, file);
