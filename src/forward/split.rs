//! Cuts a super-packet from the TUN device into the packets that it stands for (TSO, USO), as the kernel's own
//! segmentation would (kernel `net/ipv4/tcp_offload.c`, `udp_offload.c`), and completes checksums that the kernel left.
//!
//! The payload stays where it is: a segment is a header of its own and a range of the super-packet.

use std::ops::Range;

use crate::wire::vnet::{Header, Kind};
use crate::wire::{Malformed, checksum, ip, ipv4, ipv6, tcp, udp};

/// Length in bytes of the longest headers that a segment may have, IP and transport together.
pub const MAX_HEADER_LEN: usize = 256;

const IPV4_LENGTH: Range<usize> = 2..4;
const IPV4_ID: Range<usize> = 4..6;
const IPV4_CHECKSUM: Range<usize> = 10..12;
const IPV6_LENGTH: Range<usize> = 4..6;

/// How a super-packet is cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Split {
    is_v4: bool,
    is_tcp: bool,
    /// Where the transport header starts.
    transport: usize,
    /// Where the payload starts: the length of every segment's headers.
    header_len: usize,
    /// Payload bytes of a segment, but for the last.
    size: usize,
    /// Bytes of the whole.
    len: usize,
    /// Sum over the IPv4 header without its length, id and checksum.
    ip_sum: u16,
    first_id: u16,
    /// Sum over pseudo-header and transport header without what differs between segments.
    transport_sum: u16,
    first_sequence: u32,
    flags: u8,
}

impl Split {
    /// Looks at a super-packet, which `packet` holds exactly.
    ///
    /// # Errors
    /// It is not what `offload` says, or it is a single packet.
    pub fn new(packet: &[u8], offload: &Header) -> Result<Self, Malformed> {
        let is_v4 = ip::version(packet) == 4;
        let is_tcp = match offload.kind {
            Kind::Single => return Err(Malformed),
            Kind::TcpV4 if is_v4 => true,
            Kind::TcpV6 if !is_v4 => true,
            Kind::Udp => false,
            _ => return Err(Malformed),
        };
        let whole = ip::Packet::new(packet)?;
        let ip_len = match &whole {
            ip::Packet::V4(packet) => packet.header_len(),
            ip::Packet::V6(_) => ipv6::HEADER_LEN,
        };
        if whole.total_len() != packet.len() || packet.len() > ipv4::MAX_LEN {
            return Err(Malformed);
        }
        let transport = usize::from(offload.checksum_start);
        // extension headers may stand between; IPv4 options are part of the header
        if transport < ip_len || (is_v4 && transport != ip_len) {
            return Err(Malformed);
        }
        let segment = packet.get(transport..).ok_or(Malformed)?;
        let transport_len =
            if is_tcp { tcp::header_len(segment).ok_or(Malformed)? } else { udp::HEADER_LEN };
        let header_len = transport + transport_len;
        let size = usize::from(offload.segment);
        if header_len > MAX_HEADER_LEN || header_len > packet.len() || size == 0 {
            return Err(Malformed);
        }
        let word = |at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]);
        let expected = if is_tcp { tcp::PROTOCOL } else { udp::PROTOCOL };
        let has_extensions = transport != ip_len;
        if !has_extensions && packet[if is_v4 { 9 } else { 6 }] != expected {
            return Err(Malformed);
        }
        let mut split = Self {
            is_v4,
            is_tcp,
            transport,
            header_len,
            size,
            len: packet.len(),
            ip_sum: 0,
            first_id: if is_v4 { word(IPV4_ID.start) } else { 0 },
            transport_sum: 0,
            first_sequence: 0,
            flags: 0,
        };
        if is_v4 {
            let sum = checksum::sum(&packet[..transport]);
            split.ip_sum = [IPV4_LENGTH, IPV4_ID, IPV4_CHECKSUM]
                .into_iter()
                .fold(sum, |sum, field| subtract(sum, word(field.start)));
        }
        let mut sum = checksum::sum(&packet[transport..header_len]);
        if has_extensions {
            // A routing header changes the address that counts (RFC 8200, 8.1), so the pseudo-header is taken from where the
            // kernel has left its sum, the length in it aside.
            let field = transport + offload.kind.checksum_offset();
            #[allow(clippy::cast_possible_truncation)] // no packet is longer
            let len = (packet.len() - transport) as u16;
            sum = checksum::add(sum, subtract(word(field), len));
        } else {
            let addresses = if is_v4 { 12..20 } else { 8..40 };
            sum = checksum::add(sum, checksum::sum(&packet[addresses]));
            sum = checksum::add(sum, u16::from(expected));
        }
        if is_tcp {
            split.first_sequence =
                u32::from_be_bytes([segment[4], segment[5], segment[6], segment[7]]);
            split.flags = segment[tcp::FLAGS];
            for at in [
                tcp::SEQUENCE.start,
                tcp::SEQUENCE.start + 2,
                tcp::DATA_OFFSET,
                tcp::CHECKSUM.start,
            ] {
                sum = subtract(sum, word(transport + at));
            }
            sum = checksum::add(sum, u16::from(segment[tcp::DATA_OFFSET]) << 8);
        } else {
            for at in [udp::LENGTH.start, udp::CHECKSUM.start] {
                sum = subtract(sum, word(transport + at));
            }
        }
        split.transport_sum = sum;
        Ok(split)
    }

    /// How many packets it stands for: at least one.
    pub fn count(&self) -> usize {
        (self.len - self.header_len).div_ceil(self.size).max(1)
    }

    /// Length in bytes of the headers of each.
    pub fn header_len(&self) -> usize {
        self.header_len
    }

    /// Writes the headers of segment `index`, below [`Split::count`], to the start of `out`, which holds
    /// [`Split::header_len`] bytes. Returns where in `packet`, the super-packet, its payload is.
    #[inline]
    pub fn segment(&self, packet: &[u8], index: usize, out: &mut [u8]) -> Range<usize> {
        let start = self.header_len + index * self.size;
        let end = (start + self.size).min(self.len);
        let header = &mut out[..self.header_len];
        header.copy_from_slice(&packet[..self.header_len]);
        let payload = &packet[start..end];
        let len = self.header_len + payload.len();
        #[allow(clippy::cast_possible_truncation)]
        // a segment is no longer than the packet that it was cut from
        let [total_len, transport_len, index, offset] =
            [len, len - self.transport, index, start - self.header_len].map(|value| value as u32);
        #[allow(clippy::cast_possible_truncation)]
        let (total_len, transport_len, index) =
            (total_len as u16, transport_len as u16, index as u16);
        if self.is_v4 {
            let id = self.first_id.wrapping_add(index);
            let sum = checksum::add(checksum::add(self.ip_sum, total_len), id);
            put(header, IPV4_LENGTH, total_len);
            put(header, IPV4_ID, id);
            put(header, IPV4_CHECKSUM, !sum);
        } else {
            put(header, IPV6_LENGTH, total_len - 40);
        }
        let mut sum = checksum::add(self.transport_sum, checksum::sum(payload));
        sum = checksum::add(sum, transport_len);
        let transport = &mut header[self.transport..];
        if self.is_tcp {
            let sequence = self.first_sequence.wrapping_add(offset);
            let mut flags = self.flags;
            if end != self.len {
                flags &= !(tcp::FIN | tcp::PSH);
            }
            if index != 0 {
                flags &= !tcp::CWR;
            }
            transport[tcp::SEQUENCE].copy_from_slice(&sequence.to_be_bytes());
            transport[tcp::FLAGS] = flags;
            #[allow(clippy::cast_possible_truncation)] // its two halves
            let halves = ((sequence >> 16) as u16, sequence as u16);
            sum = checksum::add(checksum::add(sum, halves.0), halves.1);
            sum = checksum::add(sum, u16::from(flags));
            put(transport, tcp::CHECKSUM, !sum);
        } else {
            // the length stands in the pseudo-header and in the header
            sum = checksum::add(sum, transport_len);
            put(transport, udp::LENGTH, transport_len);
            put(transport, udp::CHECKSUM, udp_checksum(!sum));
        }
        start..end
    }
}

/// Completes the checksum of a single packet, whose field holds the pseudo-header's sum.
///
/// # Errors
/// The field is not within the packet.
pub fn complete_checksum(packet: &mut [u8], offload: &Header) -> Result<(), Malformed> {
    let start = usize::from(offload.checksum_start);
    let field = usize::from(offload.checksum_offset);
    let covered =
        packet.get_mut(start..).filter(|covered| covered.len() >= field + 2).ok_or(Malformed)?;
    let checksum = checksum::of(covered);
    let checksum = if field == udp::CHECKSUM.start { udp_checksum(checksum) } else { checksum };
    put(covered, field..field + 2, checksum);
    Ok(())
}

/// In UDP a zero says that there is no checksum; all ones mean the same number (RFC 768).
#[inline]
fn udp_checksum(checksum: u16) -> u16 {
    if checksum == 0 { 0xffff } else { checksum }
}

#[inline]
fn subtract(sum: u16, word: u16) -> u16 {
    checksum::add(sum, !word)
}

#[inline]
fn put(bytes: &mut [u8], field: Range<usize>, value: u16) {
    bytes[field].copy_from_slice(&value.to_be_bytes());
}
