//! Splits what the API server sends as it arrives: a list into its items, a watch into its events. Only lengths are
//! understood here. A list of thousands of nodes never exists as a whole, and of a node no more than its bytes.

use prost::encoding::decode_varint;

use super::wire::MAGIC;

/// Longest item or event that is read, in bytes: etcd takes objects of 1.5 MiB.
const LONGEST: usize = 4 << 20;
/// Bytes of a field's number and length, at most.
const LONGEST_HEAD: usize = 20;

/// What a list is made of.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Part<'a> {
    /// Its `ListMeta`.
    Meta(&'a [u8]),
    /// One of its items.
    Item(&'a [u8]),
}

/// Where in the list we are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    /// Before the four bytes.
    Start,
    /// Between fields of the envelope.
    Envelope,
    /// Between fields of the list, which goes on for so many bytes.
    Inside(usize),
    /// In a field that is not wanted, with so many bytes to come; then on there.
    Skipping(usize, usize),
}

/// Splits a list.
#[derive(Debug)]
pub(super) struct Items {
    place: Place,
    pending: Vec<u8>,
    /// There was a list.
    found: bool,
}

impl Items {
    pub(super) fn new() -> Self {
        Self { place: Place::Start, pending: Vec::new(), found: false }
    }

    /// Takes the next bytes, of any number.
    ///
    /// # Errors
    /// They are no list; nothing more comes of it.
    pub(super) fn push(
        &mut self,
        bytes: &[u8],
        out: &mut dyn FnMut(Part<'_>) -> Result<(), String>,
    ) -> Result<(), String> {
        self.pending.extend_from_slice(bytes);
        let pending = std::mem::take(&mut self.pending);
        let mut rest = &*pending;
        while self.step(&mut rest, out)? {}
        let used = pending.len() - rest.len();
        self.pending = pending;
        self.pending.drain(..used);
        Ok(())
    }

    /// Takes one field. Returns whether there was enough for it.
    fn step(
        &mut self,
        rest: &mut &[u8],
        out: &mut dyn FnMut(Part<'_>) -> Result<(), String>,
    ) -> Result<bool, String> {
        match self.place {
            Place::Start => {
                let Some((magic, tail)) = rest.split_at_checked(MAGIC.len()) else {
                    return Ok(false);
                };
                if magic != MAGIC {
                    return Err("the answer is not a Kubernetes list in protobuf".into());
                }
                *rest = tail;
                self.place = Place::Envelope;
            }
            Place::Envelope => {
                let Some((field, length, tail)) = head(rest)? else { return Ok(false) };
                if field == 2 {
                    *rest = tail;
                    self.place = Place::Inside(length);
                } else {
                    let Some(tail) = tail.get(length..) else { return too_long(length) };
                    *rest = tail;
                }
            }
            Place::Inside(0) => {
                self.found = true;
                self.place = Place::Envelope;
            }
            Place::Inside(left) => {
                let Some((field, length, tail)) = head(rest)? else { return Ok(false) };
                let used = rest.len() - tail.len() + length;
                let left =
                    left.checked_sub(used).ok_or("the answer's lengths do not fit together")?;
                if field != 1 && field != 2 {
                    *rest = tail;
                    self.place = Place::Skipping(length, left);
                    return Ok(true);
                }
                let Some((content, tail)) = tail.split_at_checked(length) else {
                    return too_long(length);
                };
                out(if field == 1 { Part::Meta(content) } else { Part::Item(content) })?;
                *rest = tail;
                self.place = Place::Inside(left);
            }
            Place::Skipping(0, left) => self.place = Place::Inside(left),
            Place::Skipping(length, left) => {
                let skipped = length.min(rest.len());
                if skipped == 0 {
                    return Ok(false);
                }
                *rest = &rest[skipped..];
                self.place = Place::Skipping(length - skipped, left);
            }
        }
        Ok(true)
    }

    /// Did the answer end where a list ends?
    ///
    /// # Errors
    /// It did not.
    pub(super) fn finish(&self) -> Result<(), String> {
        let whole = self.found && self.place == Place::Envelope && self.pending.is_empty();
        if whole { Ok(()) } else { Err("the answer was cut off".into()) }
    }
}

/// More bytes are needed, unless they are too many.
fn too_long(length: usize) -> Result<bool, String> {
    if length > LONGEST {
        Err(format!("the answer has a part of {length} bytes"))
    } else {
        Ok(false)
    }
}

/// Number and length of a field, and what follows.
type Head<'a> = (u64, usize, &'a [u8]);

/// The head of a field that has a length; `None` if there is not enough yet.
fn head(bytes: &[u8]) -> Result<Option<Head<'_>>, String> {
    let mut rest = bytes;
    let wrong = || "the answer is no list".to_owned();
    let (Ok(key), Ok(length)) = (decode_varint(&mut rest), decode_varint(&mut rest)) else {
        return if bytes.len() < LONGEST_HEAD { Ok(None) } else { Err(wrong()) };
    };
    // every field of the envelope and of a list has a length
    if key & 7 != 2 {
        return Err(wrong());
    }
    Ok(Some((key >> 3, usize::try_from(length).map_err(|_| wrong())?, rest)))
}

/// Splits a watch.
#[derive(Debug, Default)]
pub(super) struct Frames {
    pending: Vec<u8>,
}

impl Frames {
    /// Takes the next bytes, of any number.
    ///
    /// # Errors
    /// They are no frames; nothing more comes of it.
    pub(super) fn push(
        &mut self,
        bytes: &[u8],
        out: &mut dyn FnMut(&[u8]) -> Result<(), String>,
    ) -> Result<(), String> {
        // most frames come alone and whole
        if self.pending.is_empty() {
            let used = split(bytes, out)?;
            self.pending.extend_from_slice(&bytes[used..]);
        } else {
            self.pending.extend_from_slice(bytes);
            let used = split(&self.pending, out)?;
            self.pending.drain(..used);
        }
        Ok(())
    }
}

/// Gives out the whole frames of `bytes`; returns how many bytes those are.
fn split(bytes: &[u8], out: &mut dyn FnMut(&[u8]) -> Result<(), String>) -> Result<usize, String> {
    let mut rest = bytes;
    while let Some((length, tail)) = rest.split_first_chunk() {
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        let Some((frame, tail)) = tail.split_at_checked(length) else {
            too_long(length)?;
            break;
        };
        out(frame)?;
        rest = tail;
    }
    Ok(bytes.len() - rest.len())
}

#[cfg(test)]
mod tests {
    use super::super::wire::{self, Node, Status};
    use super::*;

    fn nodes(count: usize) -> Vec<Node> {
        let of =
            |number: usize| wire::node(&format!("node-{number}"), "uid", &["10.244.1.0/24"], &[]);
        (0..count).map(of).collect()
    }

    /// Names and next page, however the bytes are cut.
    fn split_list(bytes: &[u8], piece: usize) -> Result<(Vec<String>, String), String> {
        let (mut items, mut names, mut next) = (Items::new(), Vec::new(), String::new());
        for chunk in bytes.chunks(piece) {
            items.push(chunk, &mut |part| {
                match part {
                    Part::Meta(bytes) => next = wire::decode::<wire::ListMeta>(bytes)?.next,
                    Part::Item(bytes) => {
                        names.push(wire::decode::<Node>(bytes)?.metadata.unwrap_or_default().name);
                    }
                }
                Ok(())
            })?;
        }
        items.finish()?;
        Ok((names, next))
    }

    #[test]
    fn lists_in_pieces() {
        let names: Vec<String> = (0..30).map(|number| format!("node-{number}")).collect();
        let bytes = wire::list("7", "more", &nodes(30));
        for piece in [1, 2, 3, 7, 64, 1000, bytes.len()] {
            assert_eq!(split_list(&bytes, piece), Ok((names.clone(), "more".into())), "{piece}");
        }
        assert_eq!(split_list(&wire::list("7", "", &nodes(0)), 1), Ok((Vec::new(), String::new())));
    }

    #[test]
    fn unknown_fields_are_skipped() {
        // a field 9 of 3 bytes in the list, and one of 2 in the envelope
        let bytes = [&b"k8s\0"[..], &[0x12, 5, 0x4a, 3, 1, 2, 3, 0x1a, 2, b'x', b'y']].concat();
        for piece in [1, 2, 100] {
            assert_eq!(split_list(&bytes, piece), Ok((Vec::new(), String::new())));
        }
    }

    #[test]
    fn what_is_no_list() {
        let whole = wire::list("7", "", &nodes(3));
        for cut in [0, 3, 4, 5, 20, whole.len() - 1] {
            assert!(split_list(&whole[..cut], 8).is_err(), "{cut}");
        }
        for bytes in [
            &b"{\"kind\":\"NodeList\"}"[..],
            b"k8s\0\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
            b"k8s\0\x10\x05",
            b"k8s\0\x12\x04\x12\xff\xff\x7f",
        ] {
            assert!(split_list(bytes, 3).is_err(), "{bytes:?}");
        }
    }

    #[test]
    fn mutated_lists_never_panic() {
        let whole = wire::list("7", "more", &nodes(5));
        let mut state = 5u32;
        for _ in 0..20_000 {
            let mut bytes = whole.clone();
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let [high, low, value, piece] = state.to_be_bytes();
            let at = usize::from(u16::from_be_bytes([high, low])) % bytes.len();
            bytes[at] = value;
            let _ = split_list(&bytes, usize::from(piece) + 1);
            let _ = split_list(&bytes[..at], 16);
        }
    }

    #[test]
    fn watches_in_pieces() {
        let of = |code| wire::frame("ERROR", &Status { message: "gone".into(), code });
        let bytes: Vec<u8> = (0..20).flat_map(of).collect();
        for piece in [1, 3, 50, bytes.len()] {
            let (mut frames, mut codes) = (Frames::default(), Vec::new());
            for chunk in bytes.chunks(piece) {
                let mut take = |frame: &[u8]| {
                    let event: wire::WatchEvent = wire::decode(frame)?;
                    assert_eq!(event.kind, "ERROR");
                    codes.push(event.object::<Status>()?.code);
                    Ok(())
                };
                frames.push(chunk, &mut take).unwrap();
            }
            assert_eq!(codes, (0..20).collect::<Vec<_>>());
        }
        let mut frames = Frames::default();
        assert!(frames.push(b"{\"type\":\"ADDED\"}", &mut |_| Ok(())).is_err());
    }
}
