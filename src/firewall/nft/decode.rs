//! What the kernel says it has, as rules. Whoever wrote them (`nft`, any `iptables-nft`, a Go flanneld, we), the same
//! meaning is the same [`Rule`]; what has any other meaning is none.

use std::borrow::Cow;
use std::net::IpAddr;

use ipnet::IpNet;

use super::wire::{self, expression, rule};
use crate::family::Family;
use crate::firewall::rule::{Mark, Rule, Term, Verdict};
use crate::firewall::seen::Found;
use crate::netlink::{attributes, u32_at};

/// A rule of a list, with the names of its table and chain.
pub(super) struct Listed<'a> {
    pub(super) table: &'a str,
    pub(super) chain: &'a str,
    pub(super) found: Found,
}

/// Decodes the attributes of a `NEWRULE` message.
pub(super) fn listed(family: Family, payload: &[u8]) -> Option<Listed<'_>> {
    let (mut table, mut chain, mut handle) = ("", "", 0);
    let (mut list, mut remark): (&[u8], _) = (&[], None);
    for (kind, value) in attributes(payload.get(4..)?) {
        match kind {
            rule::TABLE => table = text(value)?,
            rule::CHAIN => chain = text(value)?,
            rule::HANDLE => handle = u64::from_be_bytes(value.try_into().ok()?),
            rule::EXPRESSIONS => list = value,
            rule::USERDATA => remark = comment(value),
            _ => {}
        }
    }
    let mut reader = Reader::new(family);
    let whole = attributes(list).try_for_each(|(_, element)| reader.read(element)).is_some();
    let jump = attributes(list).find_map(|(_, element)| jump(element)).map(Into::into);
    let rule = whole.then(|| reader.finish(remark)).flatten();
    Some(Listed { table, chain, found: Found { handle, rule, jump } })
}

/// What the register holds.
#[derive(Clone, Copy)]
enum Loaded<'a> {
    Mark { mask: u32 },
    Source { mask: Option<&'a [u8]> },
    Destination { mask: Option<&'a [u8]> },
}

struct Reader<'a> {
    family: Family,
    loaded: Option<(u32, Loaded<'a>)>,
    mark: Option<Mark>,
    source: Option<Term>,
    destination: Option<Term>,
    comment: Option<&'a str>,
    verdict: Option<Verdict>,
}

impl<'a> Reader<'a> {
    fn new(family: Family) -> Self {
        Self {
            family,
            loaded: None,
            mark: None,
            source: None,
            destination: None,
            comment: None,
            verdict: None,
        }
    }

    fn finish(self, remark: Option<&str>) -> Option<Rule> {
        // something was loaded and not compared: not one of ours
        if self.loaded.is_some() {
            return None;
        }
        Some(Rule {
            mark: self.mark,
            source: self.source,
            destination: self.destination,
            comment: Cow::Owned(self.comment.or(remark).unwrap_or_default().to_owned()),
            verdict: self.verdict?,
        })
    }

    /// One expression. `None` when it says something that a [`Rule`] cannot say.
    fn read(&mut self, element: &'a [u8]) -> Option<()> {
        let name = text(attribute(element, expression::ELEMENT)?)?;
        let data = attribute(element, expression::DATA).unwrap_or_default();
        if self.verdict.is_some() {
            return None;
        }
        match name {
            "counter" => Some(()),
            "meta" => {
                let load = number(data, 2)? == wire::META_MARK && self.loaded.is_none();
                self.loaded = Some((number(data, 1)?, Loaded::Mark { mask: u32::MAX }));
                load.then_some(())
            }
            "payload" => self.payload(data),
            "bitwise" => self.bitwise(data),
            "cmp" => self.compare(data),
            "immediate" => self.immediate(data),
            "masq" => {
                let flags = number(data, 1).unwrap_or(0);
                self.masquerade(flags, attributes(data).count() <= usize::from(flags != 0))
            }
            "match" => self.extension_match(data),
            "target" => self.target(data),
            _ => None,
        }
    }

    fn payload(&mut self, data: &[u8]) -> Option<()> {
        let (source, destination) = wire::layout(self.family);
        let offset = number(data, 3)?;
        let loaded = match offset {
            _ if number(data, 2)? != wire::NETWORK_HEADER || self.loaded.is_some() => return None,
            _ if offset == source => Loaded::Source { mask: None },
            _ if offset == destination => Loaded::Destination { mask: None },
            _ => return None,
        };
        self.loaded = Some((number(data, 1)?, loaded));
        Some(())
    }

    fn bitwise(&mut self, data: &'a [u8]) -> Option<()> {
        let (register, loaded) = self.loaded.take()?;
        let value = |kind| attribute(attribute(data, kind)?, 1);
        let (mask, xor) = (value(4)?, value(5)?);
        if register != number(data, 1)? || xor.iter().any(|byte| *byte != 0) {
            return None;
        }
        let loaded = match loaded {
            Loaded::Mark { .. } => Loaded::Mark { mask: u32_at(mask, 0)? },
            Loaded::Source { mask: None } => Loaded::Source { mask: Some(mask) },
            Loaded::Destination { mask: None } => Loaded::Destination { mask: Some(mask) },
            _ => return None,
        };
        self.loaded = Some((number(data, 2)?, loaded));
        Some(())
    }

    fn compare(&mut self, data: &[u8]) -> Option<()> {
        let (register, loaded) = self.loaded.take()?;
        let value = attribute(attribute(data, 3)?, 1)?;
        let not = match number(data, 2)? {
            wire::EQUAL => false,
            wire::NOT_EQUAL => true,
            _ => return None,
        };
        if register != number(data, 1)? {
            return None;
        }
        match loaded {
            Loaded::Mark { mask } if !not && self.mark.is_none() => {
                self.mark = Some(Mark { value: u32_at(value, 0)?, mask });
            }
            Loaded::Source { mask } if self.source.is_none() => {
                self.source = Some(Term { net: prefix(self.family, value, mask)?, not });
            }
            Loaded::Destination { mask } if self.destination.is_none() => {
                self.destination = Some(Term { net: prefix(self.family, value, mask)?, not });
            }
            _ => return None,
        }
        Some(())
    }

    fn immediate(&mut self, data: &[u8]) -> Option<()> {
        let verdict = attribute(attribute(data, 2)?, 2)?;
        let code = i32::from_be_bytes(attribute(verdict, 1)?.try_into().ok()?);
        self.verdict = Some(match code {
            wire::ACCEPT => Verdict::Accept,
            wire::RETURN => Verdict::Return,
            wire::JUMP => Verdict::Jump(Cow::Owned(text(attribute(verdict, 2)?)?.to_owned())),
            _ => return None,
        });
        (number(data, 1)? == wire::VERDICT).then_some(())
    }

    fn masquerade(&mut self, flags: u32, nothing_else: bool) -> Option<()> {
        let fully_random = flags == wire::FULLY_RANDOM;
        self.verdict = Some(Verdict::Masquerade { fully_random });
        ((fully_random || flags == 0) && nothing_else).then_some(())
    }

    fn extension_match(&mut self, data: &'a [u8]) -> Option<()> {
        let info = attribute(data, 3)?;
        match text(attribute(data, 1)?)? {
            "comment" if self.comment.is_none() => self.comment = Some(text(info)?),
            // struct xt_mark_mtinfo1: mark, mask, invert
            "mark" if self.mark.is_none() && info.get(8) == Some(&0) => {
                self.mark = Some(Mark { value: u32_at(info, 0)?, mask: u32_at(info, 4)? });
            }
            _ => return None,
        }
        Some(())
    }

    fn target(&mut self, data: &[u8]) -> Option<()> {
        let info = attribute(data, 3)?;
        if text(attribute(data, 1)?)? != "MASQUERADE" {
            return None;
        }
        let (flags, rest) = match self.family {
            Family::V4 if u32_at(info, 0)? == 1 => (u32_at(info, 4)?, &info[8..]),
            Family::V4 => return None,
            Family::V6 => (u32_at(info, 0)?, &info[4..]),
        };
        self.masquerade(flags, rest.iter().all(|byte| *byte == 0))
    }
}

/// The chain that an expression leads to (`jump` and `goto`).
fn jump(element: &[u8]) -> Option<&str> {
    let name = text(attribute(element, expression::ELEMENT)?)?;
    let data = attribute(element, expression::DATA)?;
    let verdict = attribute(attribute(data, 2).filter(|_| name == "immediate")?, 2)?;
    text(attribute(verdict, 2)?)
}

/// The leading bytes of an address, and the mask they were taken with, as a prefix.
fn prefix(family: Family, value: &[u8], mask: Option<&[u8]>) -> Option<IpNet> {
    let mut bytes = [0; 16];
    bytes.get_mut(..value.len())?.copy_from_slice(value);
    let len = match mask {
        None => 8 * value.len(),
        Some(mask) if mask.len() == value.len() => {
            let ones: u32 = mask.iter().map(|byte| byte.count_ones()).sum();
            let mut leading = mask.iter().skip_while(|byte| **byte == u8::MAX);
            let edge = leading.next().copied().unwrap_or(0);
            let contiguous = edge.leading_ones() == edge.count_ones();
            if !contiguous || leading.any(|byte| *byte != 0) {
                return None;
            }
            usize::try_from(ones).ok()?
        }
        Some(_) => return None,
    };
    let address: IpAddr = match family {
        Family::V4 if value.len() <= 4 => [bytes[0], bytes[1], bytes[2], bytes[3]].into(),
        Family::V4 => return None,
        Family::V6 => bytes.into(),
    };
    let net = IpNet::new(address, u8::try_from(len).ok()?).ok()?;
    (net == net.trunc()).then_some(net)
}

/// The comment in a rule's user data, which is a row of type, length, value.
fn comment(mut data: &[u8]) -> Option<&str> {
    while let [kind, len, rest @ ..] = data {
        let value = rest.get(..usize::from(*len))?;
        if *kind == 0 {
            return text(value);
        }
        data = &rest[usize::from(*len)..];
    }
    None
}

fn attribute(data: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(data).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

pub(super) fn number(data: &[u8], wanted: u16) -> Option<u32> {
    Some(u32::from_be_bytes(attribute(data, wanted)?.try_into().ok()?))
}

pub(super) fn text(value: &[u8]) -> Option<&str> {
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    std::str::from_utf8(&value[..end]).ok()
}

/// How a chain hangs in the kernel, from the attributes of a `NEWCHAIN` message: type, hook and priority. `None` for one that
/// is only jumped to.
pub(super) fn base(data: &[u8]) -> Option<(&str, u32, i32)> {
    let hook = attribute(data, wire::chain::HOOK)?;
    let kind = attribute(data, wire::chain::TYPE).and_then(text).unwrap_or_default();
    let priority = number(hook, wire::chain::HOOK_PRIORITY)?;
    Some((kind, number(hook, wire::chain::HOOK_NUMBER)?, priority.cast_signed()))
}
