//! UDP header (RFC 768): where its fields are.

use std::ops::Range;

/// Protocol number of UDP.
pub const PROTOCOL: u8 = 17;
/// Length in bytes of the header.
pub const HEADER_LEN: usize = 8;

/// Length of header and payload.
pub const LENGTH: Range<usize> = 4..6;
/// Checksum over pseudo-header, header and payload; 0 when there is none (IPv4).
pub const CHECKSUM: Range<usize> = 6..8;
