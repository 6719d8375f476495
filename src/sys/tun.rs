//! TUN devices: IP packets between the kernel and this process (kernel `Documentation/networking/tuntap.rst`).
//!
//! One `read` gives one whole packet and one `write` takes one. On a device with `IFF_VNET_HDR` a `virtio_net_hdr` goes
//! before each, which lets a packet stand for many ([`crate::wire::vnet`]). The descriptor does not block. The device
//! vanishes with the descriptor.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use crate::kernel::IfName;

const CLONE_DEVICE: &str = "/dev/net/tun";

/// An open TUN device.
#[derive(Debug)]
pub struct Tun {
    file: File,
    name: IfName,
    has_vnet: bool,
}

/// `TUN_F_*` of `linux/if_tun.h`: what may be left to whoever reads the packets.
const F_CSUM: libc::c_uint = 0x01;
const F_TCP: libc::c_uint = 0x02 | 0x04 | 0x08; // TSO4, TSO6, TSO_ECN
const F_UDP: libc::c_uint = 0x20 | 0x40; // USO4, USO6

impl Tun {
    /// Makes a device. A `%d` in the name becomes the first number that is free, as in `flannel%d`. With `vnet` packets
    /// have a header in front of them, if the kernel can do that.
    ///
    /// # Errors
    /// The text says what failed and what to do.
    pub fn open(template: &str, vnet: bool) -> io::Result<Self> {
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
        let wanted = wanted.map_err(explain)?;
        if vnet && let Ok(name) = attach(&file, wanted, libc::IFF_VNET_HDR) {
            return Ok(Self { file, name, has_vnet: true });
        }
        let name = attach(&file, wanted, 0).map_err(explain)?;
        Ok(Self { file, name, has_vnet: false })
    }

    /// The device's name.
    pub fn name(&self) -> IfName {
        self.name
    }

    /// Do packets have a `virtio_net_hdr` in front of them?
    pub fn has_vnet(&self) -> bool {
        self.has_vnet
    }

    /// Has the kernel leave TCP or UDP segmentation to us from now on, and the checksums with it.
    ///
    /// # Errors
    /// `EINVAL` when the kernel does not know how (UDP: before 6.2).
    pub fn offer(&self, tcp: bool, udp: bool) -> io::Result<()> {
        let mut flags = 0;
        if tcp || udp {
            flags |= F_CSUM;
        }
        if tcp {
            flags |= F_TCP;
        }
        if udp {
            flags |= F_UDP;
        }
        // SAFETY: TUNSETOFFLOAD takes a number and no pointer.
        let result = unsafe {
            libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags))
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Reads one packet into `buffer`; what does not fit is lost. `WouldBlock` when none waits.
    ///
    /// # Errors
    /// As `read(2)`.
    #[inline]
    pub fn recv(&self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(buffer)
    }

    /// Hands one packet, which these parts make up, to the kernel. `EIO` when the device is down, `EINVAL` when it is no
    /// packet that the kernel knows.
    ///
    /// # Errors
    /// As `writev(2)`.
    #[inline]
    pub fn send(&self, packet: &[IoSlice<'_>]) -> io::Result<()> {
        // A TUN device takes a packet whole or not at all.
        (&self.file).write_vectored(packet).map(drop)
    }
}

/// Does this error of [`Tun::recv`] or [`Tun::send`] say that somebody deleted the device?
pub fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBADFD)
}

/// Does this error of [`Tun::send`] say that the device is down?
pub fn is_down(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EIO)
}

/// Does this error of [`Tun::send`] say that the kernel does not know such a packet?
pub fn is_unknown(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EINVAL)
}

/// Binds the descriptor to a new device and returns the name that the kernel gave it.
fn attach(file: &File, template: IfName, flags: libc::c_int) -> io::Result<IfName> {
    // SAFETY: ifreq consists of integers and byte arrays, for which all zeroes is a value. The kernel copies the whole
    // structure in and out, so no byte of it may be left uninitialised (nor may it be shorter).
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let (name_field, template) = (&mut request.ifr_name, template.as_str());
    for (to, from) in name_field.iter_mut().zip(template.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_TUN | libc::IFF_NO_PI | flags)
        .map_err(io::Error::other)?;
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
