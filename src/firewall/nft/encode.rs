//! Tables, chains and rules as `nf_tables` requests, to the byte as `nft` and `iptables-nft` write them (firewall spec
//! 1.16 and 2.6), so that both show them as their own.

use ipnet::IpNet;

use super::wire::{self, chain, expression, rule, table};
use crate::family::Family;
use crate::firewall::change::Change;
use crate::firewall::rule::{Rule, Term, Verdict};
use crate::firewall::site::{Site, Style};
use crate::netlink::{Writer, flag};

/// What the kernel has for rules in iptables style.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Dialect {
    /// Comments as the `comment` match of x_tables; otherwise as user data, which `iptables` shows in the same way.
    pub(super) comment_match: bool,
    /// A 32-bit x86 kernel's alignment: the IPv4 target's data has 20 bytes there, and 24 everywhere else.
    pub(super) short_target: bool,
}

/// A request about something with a name.
pub(super) fn get_table(out: &mut Writer, sequence: u32, family: Family, name: &str) {
    begin(out, wire::GETTABLE, 0, sequence, family);
    out.text(table::NAME, name);
    out.end();
}

pub(super) fn get_chain(out: &mut Writer, sequence: u32, family: Family, of: &str, name: &str) {
    begin(out, wire::GETCHAIN, 0, sequence, family);
    out.text(chain::TABLE, of);
    out.text(chain::NAME, name);
    out.end();
}

/// All rules of a chain. Old kernels ignore the names and send those of other chains, too.
pub(super) fn list_rules(out: &mut Writer, sequence: u32, family: Family, of: &str, name: &str) {
    begin(out, wire::GETRULE, flag::DUMP, sequence, family);
    out.text(rule::TABLE, of);
    out.text(rule::CHAIN, name);
    out.end();
}

pub(super) fn get_generation(out: &mut Writer, sequence: u32) {
    out.begin(wire::GETGEN, 0, sequence);
    out.fixed(&wire::header(0, 0));
    out.end();
}

/// Begins a transaction that holds only if nothing was changed since `generation`.
pub(super) fn begin_batch(out: &mut Writer, sequence: u32, generation: u32) {
    out.begin(wire::BATCH_BEGIN, 0, sequence);
    out.fixed(&wire::header(0, 10));
    out.attribute(wire::BATCH_GENERATION, &generation.to_be_bytes());
    out.end();
}

pub(super) fn end_batch(out: &mut Writer, sequence: u32) {
    out.begin(wire::BATCH_END, 0, sequence);
    out.fixed(&wire::header(0, 10));
    out.end();
}

fn begin(out: &mut Writer, kind: u16, flags: u16, sequence: u32, family: Family) {
    out.begin(kind, flags, sequence);
    out.fixed(&wire::header(wire::protocol(family), 0));
}

/// One step of a transaction. All of its messages have one sequence number; the last one is the current one, for
/// [`Writer::add_flags`].
pub(super) fn change(
    out: &mut Writer,
    sequence: u32,
    site: Site,
    change: &Change,
    dialect: Dialect,
) {
    let of = site.table();
    match change {
        Change::MakeTable => {
            begin(out, wire::NEWTABLE, flag::CREATE, sequence, site.family);
            out.text(table::NAME, of);
            out.attribute(table::FLAGS, &[0; 4]);
            if let Some(text) = site.table_comment() {
                out.attribute(table::USERDATA, &wire::remark(text));
            }
            out.end();
        }
        Change::MakeHook => make_chain(out, sequence, site, site.hook().unwrap_or_default(), true),
        Change::MakeChain => {
            make_chain(out, sequence, site, site.chain(), site.hook().is_none());
        }
        Change::RemakeChain => {
            flush(out, sequence, site, site.chain());
            delete_chain(out, sequence, site, site.chain());
            make_chain(out, sequence, site, site.chain(), site.hook().is_none());
        }
        Change::Flush(name) => flush(out, sequence, site, name),
        Change::Delete { chain, handle } => {
            begin(out, wire::DELRULE, 0, sequence, site.family);
            out.text(rule::TABLE, of);
            out.text(rule::CHAIN, chain);
            out.attribute(rule::HANDLE, &handle.to_be_bytes());
            out.end();
        }
        Change::Insert(new) => new_rule(out, sequence, site, site.chain(), new, 0, dialect),
        Change::Append { chain, rule } => {
            new_rule(out, sequence, site, chain, rule, wire::APPEND, dialect);
        }
        Change::RemoveChain(name) => {
            // old kernels remove empty ones only
            flush(out, sequence, site, name);
            delete_chain(out, sequence, site, name);
        }
        Change::RemoveTable => {
            begin(out, wire::DELTABLE, 0, sequence, site.family);
            out.text(table::NAME, of);
            out.end();
        }
    }
}

fn delete_chain(out: &mut Writer, sequence: u32, site: Site, name: &str) {
    begin(out, wire::DELCHAIN, 0, sequence, site.family);
    out.text(chain::TABLE, site.table());
    out.text(chain::NAME, name);
    out.end();
}

/// Deletes all rules of a chain.
fn flush(out: &mut Writer, sequence: u32, site: Site, name: &str) {
    begin(out, wire::DELRULE, 0, sequence, site.family);
    out.text(rule::TABLE, site.table());
    out.text(rule::CHAIN, name);
    out.end();
}

fn make_chain(out: &mut Writer, sequence: u32, site: Site, name: &str, is_base: bool) {
    // one that is there after all must not be changed: its policy is somebody's
    begin(out, wire::NEWCHAIN, flag::CREATE | flag::EXCL, sequence, site.family);
    out.text(chain::TABLE, site.table());
    out.text(chain::NAME, name);
    if is_base {
        let base = site.base();
        out.text(chain::TYPE, base.kind);
        out.nest(chain::HOOK, |hook| {
            hook.attribute(chain::HOOK_NUMBER, &base.hook.to_be_bytes());
            hook.attribute(chain::HOOK_PRIORITY, &base.priority.to_be_bytes());
        });
        out.attribute(chain::POLICY, &wire::ACCEPT.to_be_bytes());
    }
    if let Some(text) = site.chain_comment() {
        out.attribute(chain::USERDATA, &wire::remark(text));
    }
    out.end();
}

fn new_rule(
    out: &mut Writer,
    sequence: u32,
    site: Site,
    in_chain: &str,
    new: &Rule,
    flags: u16,
    dialect: Dialect,
) {
    begin(out, wire::NEWRULE, flag::CREATE | flags, sequence, site.family);
    out.text(rule::TABLE, site.table());
    out.text(rule::CHAIN, in_chain);
    out.nest(rule::EXPRESSIONS, |out| expressions(out, site, new, dialect));
    if site.style == Style::Iptables {
        // protocol and flags: 0
        out.nest(rule::COMPAT, |compat| {
            compat.attribute(1, &[0; 4]);
            compat.attribute(2, &[0; 4]);
        });
    }
    if !new.comment.is_empty() && !dialect.comment_match {
        out.attribute(rule::USERDATA, &wire::remark(&new.comment));
    }
    out.end();
}

fn expressions(out: &mut Writer, site: Site, rule: &Rule, dialect: Dialect) {
    if let Some(mark) = rule.mark {
        expression(out, "meta", |data| {
            be32(data, 2, wire::META_MARK);
            be32(data, 1, wire::REGISTER);
        });
        bitwise(out, &mark.mask.to_ne_bytes());
        compare(out, wire::EQUAL, &mark.value.to_ne_bytes());
    }
    let (source, destination) = wire::layout(site.family);
    for (offset, term) in [(source, rule.source), (destination, rule.destination)] {
        if let Some(term) = term {
            address(out, offset, term);
        }
    }
    if site.style == Style::Iptables {
        if !rule.comment.is_empty() && dialect.comment_match {
            extension(out, "match", "comment", &padded(rule.comment.as_bytes(), 256));
        }
        expression(out, "counter", |data| {
            data.attribute(1, &[0; 8]);
            data.attribute(2, &[0; 8]);
        });
    }
    match &rule.verdict {
        Verdict::Accept => verdict(out, wire::ACCEPT, None),
        Verdict::Return => verdict(out, wire::RETURN, None),
        Verdict::Jump(chain) => verdict(out, wire::JUMP, Some(chain)),
        Verdict::Masquerade { fully_random } => {
            masquerade(out, site, if *fully_random { wire::FULLY_RANDOM } else { 0 }, dialect);
        }
    }
}

/// The native expression inside `ip nat` makes the whole table unreadable for `iptables` (firewall spec 1.16), so there it
/// is the target of x_tables.
fn masquerade(out: &mut Writer, site: Site, flags: u32, dialect: Dialect) {
    match (site.style, site.family) {
        (Style::Nftables, _) => expression(out, "masq", |data| {
            if flags != 0 {
                be32(data, 1, flags);
            }
        }),
        // struct nf_nat_ipv4_multi_range_compat
        (Style::Iptables, Family::V4) => {
            let info = [1u32.to_ne_bytes(), flags.to_ne_bytes()].concat();
            let len = if dialect.short_target { 20 } else { 24 };
            extension(out, "target", "MASQUERADE", &padded(&info, len));
        }
        // struct nf_nat_range
        (Style::Iptables, Family::V6) => {
            extension(out, "target", "MASQUERADE", &padded(&flags.to_ne_bytes(), 40));
        }
    }
}

/// Whole bytes are compared as such, other prefixes with a mask: that is what both programs read as a prefix.
fn address(out: &mut Writer, offset: u32, term: Term) {
    let (bytes, mask) = match term.net {
        IpNet::V4(net) => (net.addr().octets().to_vec(), net.netmask().octets().to_vec()),
        IpNet::V6(net) => (net.addr().octets().to_vec(), net.netmask().octets().to_vec()),
    };
    let whole = term.net.prefix_len().is_multiple_of(8);
    let len = if whole { usize::from(term.net.prefix_len() / 8) } else { bytes.len() };
    expression(out, "payload", |data| {
        be32(data, 1, wire::REGISTER);
        be32(data, 2, wire::NETWORK_HEADER);
        be32(data, 3, offset);
        be32(data, 4, u32::try_from(len).unwrap_or(0));
    });
    if !whole {
        bitwise(out, &mask);
    }
    compare(out, if term.not { wire::NOT_EQUAL } else { wire::EQUAL }, &bytes[..len]);
}

fn expression(out: &mut Writer, name: &str, fill: impl FnOnce(&mut Writer)) {
    out.nest(expression::ELEMENT, |out| {
        out.text(expression::ELEMENT, name);
        out.nest(expression::DATA, fill);
    });
}

fn extension(out: &mut Writer, kind: &str, name: &str, info: &[u8]) {
    expression(out, kind, |data| {
        data.text(1, name);
        be32(data, 2, 0);
        data.attribute(3, info);
    });
}

fn bitwise(out: &mut Writer, mask: &[u8]) {
    expression(out, "bitwise", |data| {
        be32(data, 1, wire::REGISTER);
        be32(data, 2, wire::REGISTER);
        be32(data, 3, u32::try_from(mask.len()).unwrap_or(0));
        data.nest(4, |value| value.attribute(1, mask));
        data.nest(5, |value| value.attribute(1, &vec![0; mask.len()]));
    });
}

fn compare(out: &mut Writer, operator: u32, value: &[u8]) {
    expression(out, "cmp", |data| {
        be32(data, 1, wire::REGISTER);
        be32(data, 2, operator);
        data.nest(3, |data| data.attribute(1, value));
    });
}

fn verdict(out: &mut Writer, code: i32, chain: Option<&str>) {
    expression(out, "immediate", |data| {
        be32(data, 1, wire::VERDICT);
        data.nest(2, |value| {
            value.nest(2, |verdict| {
                verdict.attribute(1, &code.to_be_bytes());
                if let Some(chain) = chain {
                    verdict.text(2, chain);
                }
            });
        });
    });
}

fn be32(out: &mut Writer, kind: u16, value: u32) {
    out.attribute(kind, &value.to_be_bytes());
}

fn padded(bytes: &[u8], len: usize) -> Vec<u8> {
    let mut padded = bytes.to_vec();
    padded.resize(len, 0);
    padded
}
