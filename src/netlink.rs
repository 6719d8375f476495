//! Netlink messages as bytes (`netlink(7)`, `linux/netlink.h`): written into one growing datagram, read from hostile ones.
//! Integers are in the host's order unless an attribute's definition says otherwise.

/// Bytes of `struct nlmsghdr`.
const HEADER: usize = 16;
/// `NLA_TYPE_MASK`: without the "nested" and "network byte order" bits.
const TYPE_MASK: u16 = 0x3fff;
const NLA_F_NESTED: u16 = 0x8000;

/// `NLM_F_*`.
pub(crate) mod flag {
    pub(crate) const REQUEST: u16 = 1;
    pub(crate) const ACK: u16 = 4;
    pub(crate) const DUMP_INTR: u16 = 0x10;
    pub(crate) const DUMP: u16 = 0x300;
    pub(crate) const REPLACE: u16 = 0x100;
    pub(crate) const EXCL: u16 = 0x200;
    pub(crate) const CREATE: u16 = 0x400;
    pub(crate) const CAPPED: u16 = 0x100;
    pub(crate) const ACK_TLVS: u16 = 0x200;
}

/// `NLMSG_ERROR`.
pub(crate) const ERROR: u16 = 2;
/// `NLMSG_DONE`.
pub(crate) const DONE: u16 = 3;

/// A datagram being written.
#[derive(Debug, Default)]
pub(crate) struct Writer {
    bytes: Vec<u8>,
    message_at: usize,
}

impl Writer {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(crate) fn clear(&mut self) {
        self.bytes.clear();
    }

    /// Begins a message; [`Writer::end`] ends it.
    pub(crate) fn begin(&mut self, kind: u16, flags: u16, sequence: u32) {
        self.message_at = self.bytes.len();
        self.bytes.extend_from_slice(&0u32.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&(flags | flag::REQUEST).to_ne_bytes());
        self.bytes.extend_from_slice(&sequence.to_ne_bytes());
        self.bytes.extend_from_slice(&0u32.to_ne_bytes());
    }

    /// The family's fixed header, whose length is a multiple of 4.
    pub(crate) fn fixed(&mut self, header: &[u8]) {
        self.bytes.extend_from_slice(header);
    }

    pub(crate) fn attribute(&mut self, kind: u16, value: &[u8]) {
        let at = self.open(kind);
        self.bytes.extend_from_slice(value);
        self.close(at);
    }

    pub(crate) fn u32(&mut self, kind: u16, value: u32) {
        self.attribute(kind, &value.to_ne_bytes());
    }

    /// Text with its terminating NUL.
    pub(crate) fn text(&mut self, kind: u16, value: &str) {
        let at = self.open(kind);
        self.bytes.extend_from_slice(value.as_bytes());
        self.bytes.push(0);
        self.close(at);
    }

    pub(crate) fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        let at = self.open(kind | NLA_F_NESTED);
        fill(self);
        self.close(at);
    }

    fn open(&mut self, kind: u16) -> usize {
        let at = self.bytes.len();
        self.bytes.extend_from_slice(&0u16.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        at
    }

    fn close(&mut self, at: usize) {
        // attributes of ours are a few hundred bytes
        let len = u16::try_from(self.bytes.len() - at).unwrap_or(u16::MAX);
        self.bytes[at..at + 2].copy_from_slice(&len.to_ne_bytes());
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// Ends the message that was begun last.
    pub(crate) fn end(&mut self) {
        let len = u32::try_from(self.bytes.len() - self.message_at).unwrap_or(u32::MAX);
        self.bytes[self.message_at..self.message_at + 4].copy_from_slice(&len.to_ne_bytes());
    }

    /// Adds flags to the message that was begun last.
    pub(crate) fn add_flags(&mut self, flags: u16) {
        let at = self.message_at + 6;
        if let Some(old) = u16_at(&self.bytes, at) {
            self.bytes[at..at + 2].copy_from_slice(&(old | flags).to_ne_bytes());
        }
    }
}

/// One received message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Message<'a> {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
    /// The socket that caused it, where the kernel tells.
    pub(crate) port: u32,
    pub(crate) payload: &'a [u8],
}

/// The messages of a datagram. What is cut off or malformed ends the iteration.
pub(crate) fn messages(mut datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let len = usize::try_from(u32_at(datagram, 0)?).ok()?;
        let message = datagram.get(..len).filter(|_| len >= HEADER)?;
        datagram = datagram.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some(Message {
            kind: u16_at(message, 4)?,
            flags: u16_at(message, 6)?,
            sequence: u32_at(message, 8)?,
            port: u32_at(message, 12)?,
            payload: &message[HEADER..],
        })
    })
}

/// The attributes in `bytes`: type without its flag bits, and value.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & TYPE_MASK;
        let value = bytes.get(4..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// What an `NLMSG_ERROR` message says: the error number (0 is an acknowledgement) and the kernel's own explanation.
pub(crate) fn outcome<'a>(message: &Message<'a>) -> Option<(i32, Option<&'a str>)> {
    let code = i32::from_ne_bytes(message.payload.get(..4)?.try_into().ok()?).checked_neg()?;
    if message.flags & flag::ACK_TLVS == 0 {
        return Some((code, None));
    }
    // the request comes back before the attributes: whole, or its header only
    let echoed = if message.flags & flag::CAPPED != 0 {
        HEADER
    } else {
        usize::try_from(u32_at(message.payload, 4)?).ok()?.next_multiple_of(4)
    };
    const NLMSGERR_ATTR_MSG: u16 = 1;
    let tail = message.payload.get(4 + echoed..).unwrap_or_default();
    let text = attributes(tail).find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG);
    Some((
        code,
        text.and_then(|(_, value)| std::str::from_utf8(value).ok())
            .map(|text| text.trim_end_matches('\0')),
    ))
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let mut writer = Writer::default();
        writer.begin(24, flag::ACK, 7);
        writer.fixed(&[1, 2, 3, 4]);
        writer.attribute(1, &[9, 9, 9]);
        writer.nest(18, |writer| writer.text(1, "vxlan"));
        writer.end();
        writer.begin(25, 0, 8);
        writer.fixed(&[5, 6, 7, 8]);
        writer.end();
        writer.add_flags(flag::ACK);
        let found: Vec<_> = messages(writer.bytes()).collect();
        assert_eq!(found.len(), 2);
        assert_eq!((found[0].kind, found[0].flags, found[0].sequence), (24, 5, 7));
        assert_eq!((found[1].kind, found[1].flags, found[1].payload), (25, 5, &[5, 6, 7, 8][..]));
        let inner: Vec<_> = attributes(&found[0].payload[4..]).collect();
        assert_eq!(inner[0], (1, &[9, 9, 9][..]));
        assert_eq!(attributes(inner[1].1).next(), Some((1, &b"vxlan\0"[..])));
    }

    #[test]
    fn errors_with_and_without_the_request() {
        for capped in [false, true] {
            let mut payload = (-22i32).to_ne_bytes().to_vec();
            let mut request = Writer::default();
            request.begin(24, 0, 1);
            request.fixed(&[0; 12]);
            request.end();
            payload.extend_from_slice(if capped {
                &request.bytes()[..16]
            } else {
                request.bytes()
            });
            let mut tail = Writer::default();
            tail.text(1, "Nexthop has invalid gateway");
            payload.extend_from_slice(tail.bytes());
            let flags = flag::ACK_TLVS | if capped { flag::CAPPED } else { 0 };
            let message = Message { kind: ERROR, flags, sequence: 1, port: 0, payload: &payload };
            assert_eq!(outcome(&message), Some((22, Some("Nexthop has invalid gateway"))));
        }
    }

    #[test]
    fn mutated_datagrams_never_panic() {
        let mut writer = Writer::default();
        writer.begin(ERROR, flag::ACK_TLVS, 1);
        writer.fixed(&(-1i32).to_ne_bytes());
        writer.fixed(&[0; 16]);
        writer.text(1, "text");
        writer.end();
        let mut state = 7u32;
        for _ in 0..20_000 {
            let mut bytes = writer.bytes().to_vec();
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let [at, value, cut, _] = state.to_be_bytes();
            let len = bytes.len();
            bytes[usize::from(at) % len] = value;
            bytes.truncate(usize::from(cut) % (len + 1));
            for message in messages(&bytes) {
                let _ = outcome(&message);
                let _ = attributes(message.payload).count();
            }
        }
    }
}
