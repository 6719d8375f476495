//! TCP header (RFC 9293): where its fields are. Segments are cut and joined in `forward`, on raw bytes.

use std::ops::Range;

/// Protocol number of TCP.
pub const PROTOCOL: u8 = 6;
/// Length in bytes of a header without options.
pub const MIN_HEADER_LEN: usize = 20;
/// Length in bytes of the longest header.
pub const MAX_HEADER_LEN: usize = 60;

/// Sequence number of the first payload byte.
pub const SEQUENCE: Range<usize> = 4..8;
/// Header length in its upper four bits.
pub const DATA_OFFSET: usize = 12;
/// Control bits CWR ECE URG ACK PSH RST SYN FIN.
pub const FLAGS: usize = 13;
/// Checksum over pseudo-header, header and payload.
pub const CHECKSUM: Range<usize> = 16..18;

/// The sender has no more data.
pub const FIN: u8 = 0x01;
/// Hand the data to the application at once.
pub const PSH: u8 = 0x08;
/// The acknowledgment field counts.
pub const ACK: u8 = 0x10;
/// The congestion window was reduced (RFC 3168).
pub const CWR: u8 = 0x80;
/// A congestion mark was received (RFC 3168).
pub const ECE: u8 = 0x40;

/// Header length in bytes, options included, of the segment that starts here; `None` when it is cut short.
#[inline]
pub fn header_len(segment: &[u8]) -> Option<usize> {
    let len = usize::from(segment.get(DATA_OFFSET)? >> 4) * 4;
    (MIN_HEADER_LEN..=segment.len()).contains(&len).then_some(len)
}
