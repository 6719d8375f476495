//! The vxlan backend's options, checked.

use crate::json::Fields;

/// What the `Backend` object of the network config asks for.
#[derive(Debug)]
pub(super) struct Settings {
    /// VXLAN network identifier.
    pub(super) vni: u32,
    /// UDP port; `None` is the kernel's default.
    pub(super) port: Option<u16>,
    /// The underlay's MTU in bytes, when it is not the interface's.
    pub(super) mtu: Option<u32>,
    /// Source-address learning.
    pub(super) learning: bool,
    /// Group-based policy extension.
    pub(super) gbp: bool,
    /// Peers that are on-link are reached without VXLAN.
    pub(super) direct_routing: bool,
}

impl Settings {
    /// Parses and checks the `Backend` object. The error names the option.
    pub(super) fn parse(backend: &str) -> Result<Self, String> {
        let options = Fields::parse("Backend", backend)?;
        let vni = options.integer("VNI")?.unwrap_or(1);
        let port = options.integer("Port")?.unwrap_or(0);
        let mtu =
            match options.integer("MTU")? {
                None => None,
                Some(mtu) => {
                    let checked = u32::try_from(mtu).ok().filter(|mtu| (1..=65_535).contains(mtu));
                    Some(checked.ok_or_else(|| {
                        options.wrong("MTU", "1 to 65535, the underlay's MTU", mtu)
                    })?)
                }
            };
        Ok(Self {
            vni: u32::try_from(vni)
                .ok()
                .filter(|vni| (1..1 << 24).contains(vni))
                .ok_or_else(|| options.wrong("VNI", "1 to 16777215", vni))?,
            // Zero and less have always meant the kernel's default.
            port: u16::try_from(port.max(0))
                .map(|port| (port != 0).then_some(port))
                .map_err(|_| options.wrong("Port", "0 (the kernel's default) to 65535", port))?,
            mtu,
            learning: options.flag("Learning")?.unwrap_or_default(),
            gbp: options.flag("GBP")?.unwrap_or_default(),
            direct_routing: options.flag("DirectRouting")?.unwrap_or_default(),
        })
    }
}
