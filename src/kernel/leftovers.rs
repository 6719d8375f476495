//! What flannel daemons have left in the kernel, removed at once and for good: routes that carry our protocol number, VXLAN
//! devices that bear flannel's names. For a host that is to be without flannel.

use std::io;

use super::compare::{PROTOCOL, is_blackhole};
use super::encode::{self, Dump};
use super::inventory::Reader;
use super::object::{Object, Route};
use super::seen::{MAIN, ONLINK, Seen, SeenLink, UNICAST};

const ESRCH: i32 = 3;
const ENODEV: i32 = 19;

/// Removes them, and tells each.
///
/// # Errors
/// What the kernel refuses, after all else has been tried.
pub fn remove(tell: &mut dyn FnMut(&str)) -> io::Result<()> {
    let mut reader = Reader::open()?;
    let mut failed = None;
    for v4 in [true, false] {
        for seen in
            reader.ask(|out, sequence| encode::dump(out, sequence, Dump::Routes { v4 }, 0))?
        {
            let Seen::Route(route) = seen else { continue };
            if route.table != MAIN || route.protocol != PROTOCOL {
                continue;
            }
            let object = if is_blackhole(&route) {
                Object::Blackhole(route.dst)
            } else if route.kind == UNICAST {
                let onlink = route.flags & ONLINK != 0;
                Object::Route(Route { dst: route.dst, via: route.via, link: None, onlink })
            } else {
                continue;
            };
            let index = Some(route.oif).filter(|oif| *oif != 0);
            let result = reader.order(|out, sequence| match &object {
                Object::Route(route) => encode::delete_route(out, sequence, route, index),
                _ => encode::blackhole(out, sequence, route.dst, PROTOCOL, true),
            });
            note(result, &format!("{object}"), tell, &mut failed);
        }
    }
    for seen in reader.ask(|out, sequence| encode::dump(out, sequence, Dump::Links, 0))? {
        if let Seen::Link(link) = seen
            && is_flannels(&link)
        {
            let result =
                reader.order(|out, sequence| encode::delete_link(out, sequence, link.index));
            note(result, &format!("device {}", link.name), tell, &mut failed);
        }
    }
    failed.map_or(Ok(()), Err)
}

/// `flannel.<VNI>` and `flannel-v6.<VNI>` that are VXLAN devices. The udp backend's TUN device goes with its process.
fn is_flannels(link: &SeenLink) -> bool {
    let name = link.name.as_str();
    let number = name.strip_prefix("flannel.").or_else(|| name.strip_prefix("flannel-v6."));
    &*link.kind == "vxlan" && number.is_some_and(|vni| vni.parse::<u32>().is_ok())
}

fn note(
    result: io::Result<()>,
    what: &str,
    tell: &mut dyn FnMut(&str),
    failed: &mut Option<io::Error>,
) {
    match result {
        Ok(()) => tell(what),
        // it went with another
        Err(error) if matches!(error.raw_os_error(), Some(ESRCH | ENODEV)) => {}
        Err(error) => {
            *failed = Some(io::Error::new(error.kind(), format!("remove {what}: {error}")))
        }
    }
}
