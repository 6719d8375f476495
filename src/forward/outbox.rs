//! What waits to be sent: packets as the TUN device gave them, cut up, and gathered into runs of equal datagrams to one
//! host, each of which is one system call's message (`UDP_SEGMENT`).
//!
//! One arena holds everything: the packets as they were read, and behind each super-packet the headers of its segments.

use std::net::IpAddr;
use std::ops::Range;

use super::merge::Part;
use super::split::{self, Split};
use crate::wire::vnet::{self, Header, Kind};
use crate::wire::{Malformed, ipv4};

/// Datagrams in a run, at most. Kernels before 6.9 take 64 (`UDP_MAX_SEGMENTS`), those before 5.16 one less if all are of the
/// same length, for they counted a header in.
pub(super) const MAX_SEGMENTS: usize = 63;
/// Payload bytes of a run, at most: what fits into one UDP datagram over IPv4.
const MAX_RUN_LEN: usize = 65_507;
/// Room for one packet and what goes before it.
const READ: usize = vnet::LEN + ipv4::MAX_LEN;
/// Bytes that are gathered before they are sent: two super-packets, whose last segments then share a run. More would fall
/// out of the processor's cache meanwhile.
const ENOUGH: usize = 128 * 1024;
/// Parts of packets that are gathered before they are sent: as many small packets, which is about a tenth of a millisecond.
pub(super) const MANY: usize = 256;
/// Headers of the segments of one super-packet. A peer may make TCP send 24 bytes of payload at a time, with time stamps and
/// one block of selective acknowledgment; fewer are a hostile peer's, and its packets are dropped.
const HEADERS: usize = 256 * 1024;
/// Parts of datagrams, at most: each has headers and a payload.
const MAX_PARTS: usize = 6144;

/// Datagrams of equal length, but for the last, which may be shorter, to one host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    /// The host.
    pub to: IpAddr,
    /// Length of each datagram in bytes.
    pub segment: u16,
    /// How many.
    pub count: u16,
    /// Bytes of all.
    pub len: usize,
    /// Index of the first part.
    first: usize,
    /// Parts of all of them together.
    parts: usize,
    /// A shorter datagram has ended it.
    closed: bool,
}

/// The queue. Its memory is fixed.
#[derive(Debug)]
pub struct Outbox {
    arena: Box<[u8]>,
    used: usize,
    parts: Vec<Part>,
    runs: Vec<Run>,
    /// Runs that are done with.
    sent: usize,
    /// Datagrams that may be in one run.
    most: usize,
}

impl Outbox {
    /// Nothing waits. Runs have up to `most` datagrams.
    pub fn new(most: usize) -> Self {
        Self {
            arena: vec![0; ENOUGH + READ + HEADERS].into(),
            used: 0,
            parts: Vec::with_capacity(MAX_PARTS),
            runs: Vec::with_capacity(MAX_PARTS),
            sent: 0,
            most: most.clamp(1, MAX_SEGMENTS),
        }
    }

    /// Runs have up to `most` datagrams from now on.
    pub fn set_most(&mut self, most: usize) {
        self.most = most.clamp(1, MAX_SEGMENTS);
    }

    /// Where the next packet, with what goes before it, is to be read to. Only while [`Outbox::has_room`].
    #[inline]
    pub fn room(&mut self) -> &mut [u8] {
        &mut self.arena[self.used..self.used + READ]
    }

    /// Is it time to send?
    #[inline]
    pub fn has_room(&self) -> bool {
        self.used < ENOUGH && self.parts.len() < MANY
    }

    /// Takes the packet at `range` of [`Outbox::room`] in, for `to`, cutting it if it is a super-packet.
    ///
    /// # Errors
    /// It is not what `offload` says. Nothing was taken.
    pub fn push(
        &mut self,
        to: IpAddr,
        range: Range<usize>,
        offload: &Header,
    ) -> Result<(), Malformed> {
        let (start, end) = (self.used + range.start, self.used + range.end);
        if offload.kind == Kind::Single {
            if offload.needs_checksum {
                split::complete_checksum(&mut self.arena[start..end], offload)?;
            }
            self.used = end.next_multiple_of(8);
            self.parts.push(Part::from_range(&(start..end)));
            self.add(to, 1, end - start);
            return Ok(());
        }
        let split = Split::new(&self.arena[start..end], offload)?;
        let (count, header_len) = (split.count(), split.header_len());
        let room = self.arena.len() - end;
        if count * header_len > room || self.parts.len() + 2 * count > MAX_PARTS {
            return Err(Malformed);
        }
        for index in 0..count {
            let at = index * header_len;
            let (packets, headers) = self.arena.split_at_mut(end);
            let payload = split.segment(&packets[start..], index, &mut headers[at..]);
            let len = header_len + payload.len();
            self.parts.push(Part::from_range(&(end + at..end + at + header_len)));
            self.parts.push(Part::from_range(&(start + payload.start..start + payload.end)));
            self.add(to, 2, len);
        }
        self.used = (end + count * header_len).next_multiple_of(8);
        Ok(())
    }

    /// Adds a datagram, whose parts are the last ones, to the last run or to a new one.
    #[inline]
    fn add(&mut self, to: IpAddr, parts: usize, len: usize) {
        if let Some(run) = self.runs[self.sent..].last_mut()
            && run.to == to
            && !run.closed
            && len <= usize::from(run.segment)
            && usize::from(run.count) < self.most
            && run.len + len <= MAX_RUN_LEN
        {
            run.count += 1;
            run.len += len;
            run.parts += parts;
            run.closed = len < usize::from(run.segment);
            return;
        }
        self.runs.push(Run {
            to,
            segment: u16::try_from(len).unwrap_or(u16::MAX), // no IP packet is longer
            count: 1,
            len,
            first: self.parts.len() - parts,
            parts,
            closed: false,
        });
    }

    /// What waits, in the order in which it came.
    #[inline]
    pub fn waiting(&self) -> &[Run] {
        &self.runs[self.sent..]
    }

    /// Does nothing wait?
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.waiting().is_empty()
    }

    /// The parts of a run's datagrams, ranges of [`Outbox::bytes`].
    #[inline]
    pub fn parts(&self, run: &Run) -> &[Part] {
        &self.parts[run.first..run.first + run.parts]
    }

    /// What parts are ranges of.
    #[inline]
    pub fn bytes(&self) -> &[u8] {
        &self.arena
    }

    /// The first `count` runs that wait are done with.
    pub fn done(&mut self, count: usize) {
        self.sent += count;
        if self.sent == self.runs.len() {
            self.runs.clear();
            self.parts.clear();
            (self.used, self.sent) = (0, 0);
        }
    }

    /// The first datagram that waits, as a run of its own, for sending it alone.
    pub fn first_datagram(&self) -> Option<Run> {
        let run = self.waiting().first()?;
        let len = usize::from(run.segment).min(run.len);
        let mut parts = 0;
        let mut held = 0;
        for part in self.parts(run) {
            if held >= len {
                break;
            }
            held += part.len as usize;
            parts += 1;
        }
        Some(Run { count: 1, len, parts, ..*run })
    }

    /// The first datagram that waits is done with.
    pub fn done_datagram(&mut self) {
        let Some(first) = self.first_datagram() else { return };
        let run = &mut self.runs[self.sent];
        run.first += first.parts;
        run.parts -= first.parts;
        run.len -= first.len;
        run.count -= 1;
        if run.count == 0 {
            self.done(1);
        }
    }
}
