//! The links that the kernel has, and whether one of them is the device that we want.

use std::collections::{BTreeMap, HashMap};

use super::object::{IfName, Link, LinkKind};
use super::seen::SeenLink;

/// Every link of this network namespace.
#[derive(Debug, Default)]
pub(super) struct Links {
    by_index: BTreeMap<u32, SeenLink>,
    by_name: HashMap<IfName, u32>,
}

impl Links {
    pub(super) fn get(&self, name: IfName) -> Option<&SeenLink> {
        self.by_index.get(self.by_name.get(&name)?)
    }

    pub(super) fn index(&self, name: IfName) -> Option<u32> {
        self.by_name.get(&name).copied()
    }

    pub(super) fn at(&self, index: u32) -> Option<&SeenLink> {
        self.by_index.get(&index)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &SeenLink> {
        self.by_index.values()
    }

    /// Notes a link; returns what was known of it. A link that was renamed is no longer known by its old name.
    pub(super) fn put(&mut self, link: SeenLink) -> Option<SeenLink> {
        let (index, name) = (link.index, link.name);
        let old = self.by_index.insert(index, link);
        if let Some(old) = old.as_ref().filter(|old| old.name != name) {
            self.by_name.remove(&old.name);
        }
        self.by_name.insert(name, index);
        old
    }

    pub(super) fn remove(&mut self, index: u32) -> Option<SeenLink> {
        let old = self.by_index.remove(&index)?;
        if self.by_name.get(&old.name) == Some(&index) {
            self.by_name.remove(&old.name);
        }
        Some(old)
    }
}

/// What must happen to a link that exists so that it becomes the one we want.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Verdict {
    /// Nothing.
    Same,
    /// It is changed in place: MTU, MAC, up.
    Change,
    /// It must be made anew, for this reason.
    Incompatible(String),
}

/// Compares (backends spec 6.2). `default_port` is the kernel's VXLAN port, `lower` the index of the underlay link.
pub(super) fn judge(
    link: &Link,
    seen: &SeenLink,
    lower: Option<u32>,
    default_port: u16,
) -> Verdict {
    let change = |same: bool| {
        if same && seen.up && seen.mtu == link.mtu { Verdict::Same } else { Verdict::Change }
    };
    let LinkKind::Vxlan(want) = &link.kind else { return change(true) };
    let Some(have) = &seen.vxlan else {
        return Verdict::Incompatible(format!(
            "it is of kind {:?}",
            if seen.kind.is_empty() { "physical" } else { &seen.kind }
        ));
    };
    let differs = |what: &str, have: &dyn std::fmt::Display, want: &dyn std::fmt::Display| {
        Verdict::Incompatible(format!("its {what} is {have} and must be {want}"))
    };
    let port = want.port.unwrap_or(default_port);
    if have.vni != want.vni {
        return differs("VNI", &have.vni, &want.vni);
    }
    if have.port != port {
        return differs("UDP port", &have.port, &port);
    }
    if lower.is_some_and(|lower| have.lower != lower) {
        return Verdict::Incompatible(format!("it is not bound to {}", want.lower));
    }
    if have.local != Some(want.local) {
        let local = have.local.map_or("not set".into(), |local| local.to_string());
        return differs("local address", &local, &want.local);
    }
    for (what, have, want) in [
        ("learning", have.learning, want.learning),
        ("GBP", have.gbp, want.gbp),
        ("L2MISS notification", have.l2miss, false),
    ] {
        if have != want {
            return differs(what, &have, &want);
        }
    }
    change(seen.mac == Some(want.mac))
}

#[cfg(test)]
mod tests {
    use super::super::object::{Mac, Vxlan};
    use super::super::seen::SeenVxlan;
    use super::*;

    fn want() -> Link {
        Link {
            name: IfName::new("flannel.1").unwrap(),
            kind: LinkKind::Vxlan(Box::new(Vxlan {
                vni: 1,
                port: None,
                lower: IfName::new("eth0").unwrap(),
                local: [192, 0, 2, 1].into(),
                mac: Mac([2, 0, 0, 0, 0, 1]),
                learning: false,
                gbp: false,
            })),
            mtu: 1450,
        }
    }

    fn have() -> SeenLink {
        SeenLink {
            index: 7,
            name: IfName::new("flannel.1").unwrap(),
            up: true,
            loopback: false,
            mtu: 1450,
            mac: Some(Mac([2, 0, 0, 0, 0, 1])),
            kind: "vxlan".into(),
            vxlan: Some(Box::new(SeenVxlan {
                vni: 1,
                port: 8472,
                lower: 2,
                local: Some([192, 0, 2, 1].into()),
                learning: false,
                l2miss: false,
                gbp: false,
            })),
        }
    }

    fn judged(alter: impl Fn(&mut SeenLink)) -> Verdict {
        let mut have = have();
        alter(&mut have);
        judge(&want(), &have, Some(2), 8472)
    }

    #[test]
    fn what_can_be_changed_in_place_is() {
        assert_eq!(judged(|_| {}), Verdict::Same);
        assert_eq!(judged(|link| link.up = false), Verdict::Change);
        assert_eq!(judged(|link| link.mtu = 1500), Verdict::Change);
        assert_eq!(judged(|link| link.mac = Some(Mac([2, 0, 0, 0, 0, 9]))), Verdict::Change);
        assert_eq!(
            judge(&want(), &have(), None, 8472),
            Verdict::Same,
            "the underlay is away for a moment"
        );
    }

    #[test]
    fn what_cannot_is_a_reason_to_make_the_device_anew() {
        let alterations: [fn(&mut SeenVxlan); 7] = [
            |vxlan| vxlan.vni = 2,
            |vxlan| vxlan.port = 4789,
            |vxlan| vxlan.lower = 3,
            |vxlan| vxlan.local = None,
            |vxlan| vxlan.learning = true,
            |vxlan| vxlan.gbp = true,
            |vxlan| vxlan.l2miss = true,
        ];
        for (number, alter) in alterations.into_iter().enumerate() {
            let verdict = judged(|link| alter(link.vxlan.as_mut().unwrap()));
            assert!(matches!(verdict, Verdict::Incompatible(_)), "alteration {number}");
        }
        assert_eq!(
            judged(|link| {
                link.kind = "dummy".into();
                link.vxlan = None;
            }),
            Verdict::Incompatible("it is of kind \"dummy\"".into())
        );
    }

    #[test]
    fn a_renamed_link_is_known_by_its_new_name_only() {
        let mut links = Links::default();
        links.put(have());
        links.put(SeenLink { name: IfName::new("other").unwrap(), ..have() });
        assert_eq!(links.index(have().name), None);
        assert_eq!(links.get(IfName::new("other").unwrap()).unwrap().index, 7);
        links.remove(7);
        assert_eq!(links.iter().count(), 0);
    }
}
