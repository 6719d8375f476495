//! The numbers of `linux/netfilter/nfnetlink.h` and `linux/netfilter/nf_tables.h`. Integers in attributes are big-endian;
//! what is loaded into registers is as in the packet, and the mark as in the host's memory.

use crate::family::Family;

const SUBSYSTEM: u16 = 10 << 8;
pub(super) const NEWTABLE: u16 = SUBSYSTEM;
pub(super) const GETTABLE: u16 = SUBSYSTEM | 1;
pub(super) const DELTABLE: u16 = SUBSYSTEM | 2;
pub(super) const NEWCHAIN: u16 = SUBSYSTEM | 3;
pub(super) const GETCHAIN: u16 = SUBSYSTEM | 4;
pub(super) const DELCHAIN: u16 = SUBSYSTEM | 5;
pub(super) const NEWRULE: u16 = SUBSYSTEM | 6;
pub(super) const GETRULE: u16 = SUBSYSTEM | 7;
pub(super) const DELRULE: u16 = SUBSYSTEM | 8;
/// Also the type of the notification that ends every transaction.
pub(crate) const NEWGEN: u16 = SUBSYSTEM | 15;
pub(super) const GETGEN: u16 = SUBSYSTEM | 16;
pub(super) const BATCH_BEGIN: u16 = 16;
pub(super) const BATCH_END: u16 = 17;
/// `NFNL_BATCH_GENID`.
pub(super) const BATCH_GENERATION: u16 = 1;

/// `NLM_F_APPEND` of a new rule; without it the rule goes to the head.
pub(super) const APPEND: u16 = 0x800;

pub(super) mod table {
    pub(in super::super) const NAME: u16 = 1;
    pub(in super::super) const FLAGS: u16 = 2;
    pub(in super::super) const USERDATA: u16 = 6;
}

pub(super) mod chain {
    pub(in super::super) const TABLE: u16 = 1;
    pub(in super::super) const NAME: u16 = 3;
    pub(in super::super) const HOOK: u16 = 4;
    pub(in super::super) const POLICY: u16 = 5;
    pub(in super::super) const TYPE: u16 = 7;
    pub(in super::super) const USERDATA: u16 = 12;
    pub(in super::super) const HOOK_NUMBER: u16 = 1;
    pub(in super::super) const HOOK_PRIORITY: u16 = 2;
}

pub(super) mod rule {
    pub(in super::super) const TABLE: u16 = 1;
    pub(in super::super) const CHAIN: u16 = 2;
    pub(in super::super) const HANDLE: u16 = 3;
    pub(in super::super) const EXPRESSIONS: u16 = 4;
    pub(in super::super) const COMPAT: u16 = 5;
    pub(in super::super) const USERDATA: u16 = 7;
}

pub(super) mod expression {
    /// Of the list, and of each expression in it: its name.
    pub(in super::super) const ELEMENT: u16 = 1;
    pub(in super::super) const DATA: u16 = 2;
}

pub(super) mod generation {
    pub(in super::super) const ID: u16 = 1;
    pub(in super::super) const PROCESS: u16 = 2;
    pub(in super::super) const PROCESS_NAME: u16 = 3;
}

/// Register numbers: the verdict, and the first one for data.
pub(super) const VERDICT: u32 = 0;
pub(super) const REGISTER: u32 = 1;
/// `NFT_META_MARK`.
pub(super) const META_MARK: u32 = 3;
/// `NFT_PAYLOAD_NETWORK_HEADER`.
pub(super) const NETWORK_HEADER: u32 = 1;
pub(super) const EQUAL: u32 = 0;
pub(super) const NOT_EQUAL: u32 = 1;
/// `NF_NAT_RANGE_PROTO_RANDOM_FULLY`.
pub(super) const FULLY_RANDOM: u32 = 0x10;
/// `NF_ACCEPT`, and the kernel's own verdicts as they are written.
pub(super) const ACCEPT: i32 = 1;
pub(super) const JUMP: i32 = -3;
pub(super) const RETURN: i32 = -5;

/// `NFPROTO_*`.
pub(super) fn protocol(family: Family) -> u8 {
    match family {
        Family::V4 => 2,
        Family::V6 => 10,
    }
}

/// Offsets of source and destination in the network header.
pub(super) fn layout(family: Family) -> (u32, u32) {
    match family {
        Family::V4 => (12, 16),
        Family::V6 => (8, 24),
    }
}

/// `struct nfgenmsg`.
pub(super) fn header(protocol: u8, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [protocol, 0, high, low]
}

/// A comment as `nft` keeps it in user data: type 0, length with the NUL, text, NUL.
pub(super) fn remark(text: &str) -> Vec<u8> {
    let len = u8::try_from(text.len() + 1).unwrap_or(u8::MAX);
    let mut data = vec![0, len];
    data.extend_from_slice(text.as_bytes());
    data.push(0);
    data
}
