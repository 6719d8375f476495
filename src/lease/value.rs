//! A lease's value in etcd: compact JSON, to the byte as Go nodes write it (control-plane spec 4.3).

use std::fmt::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};

use super::LeaseAttrs;
use crate::json::Fields;

/// Longest value that is read, in bytes. Real ones have some hundred.
pub const LONGEST: usize = 16 << 10;

/// Writes the value.
pub fn format(attrs: &LeaseAttrs) -> String {
    let ip = attrs.public_ip.unwrap_or(Ipv4Addr::UNSPECIFIED);
    let mut text = format!(r#"{{"PublicIP":"{ip}","PublicIPv6":"#);
    let _ = match attrs.public_ipv6 {
        Some(ip) => write!(text, r#""{ip}""#),
        None => write!(text, "null"),
    };
    if !attrs.backend_type.is_empty() {
        let _ = write!(text, r#","BackendType":{}"#, serde_json::Value::from(&*attrs.backend_type));
    }
    for (name, data) in
        [("BackendData", &attrs.backend_data), ("BackendV6Data", &attrs.backend_v6_data)]
    {
        if let Some(data) = data {
            let _ = write!(text, r#","{name}":{data}"#);
        }
    }
    text.push('}');
    text
}

/// Reads a value, however it is spaced and ordered.
///
/// # Errors
/// What is wrong with which field.
pub fn parse(text: &str) -> Result<LeaseAttrs, String> {
    if text.len() > LONGEST {
        return Err(format!("the lease is {} bytes long, more than {LONGEST}", text.len()));
    }
    if text.trim() == "null" {
        return Err("the lease is null".into());
    }
    let fields = Fields::parse("the lease", text)?;
    // a missing PublicIP is no address, any other kind of value is an error
    let public_ip = match fields.raw("PublicIP") {
        None => None,
        Some(raw) => {
            let ip = serde_json::from_str::<Ipv4Addr>(raw);
            let ip =
                ip.map_err(|_| fields.wrong("PublicIP", "a string with an IPv4 address", raw))?;
            Some(ip).filter(|ip| !ip.is_unspecified())
        }
    };
    let public_ipv6 = match fields.raw("PublicIPv6") {
        None | Some("null") => None,
        Some(raw) => {
            let ip = serde_json::from_str::<Ipv6Addr>(raw);
            Some(ip.map_err(|_| fields.wrong("PublicIPv6", "a string with an IPv6 address", raw))?)
        }
    };
    Ok(LeaseAttrs {
        public_ip,
        public_ipv6,
        backend_type: fields.text("BackendType")?.unwrap_or_default().into(),
        backend_data: fields.raw("BackendData").map(Into::into),
        backend_v6_data: fields.raw("BackendV6Data").map(Into::into),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attrs() -> LeaseAttrs {
        LeaseAttrs {
            public_ip: Some([192, 168, 64, 3].into()),
            backend_type: "vxlan".into(),
            backend_data: Some(r#"{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}"#.into()),
            ..LeaseAttrs::default()
        }
    }

    #[test]
    fn what_go_writes() {
        for (attrs, text) in [
            (
                LeaseAttrs { public_ip: Some([1, 2, 3, 4].into()), ..LeaseAttrs::default() },
                r#"{"PublicIP":"1.2.3.4","PublicIPv6":null}"#,
            ),
            (
                attrs(),
                r#"{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}"#,
            ),
            (
                LeaseAttrs {
                    public_ipv6: "fd01::1".parse().ok(),
                    backend_type: "host-gw".into(),
                    backend_v6_data: Some("7".into()),
                    ..LeaseAttrs::default()
                },
                r#"{"PublicIP":"0.0.0.0","PublicIPv6":"fd01::1","BackendType":"host-gw","BackendV6Data":7}"#,
            ),
        ] {
            assert_eq!(format(&attrs), text);
            assert_eq!(parse(text), Ok(attrs));
        }
    }

    #[test]
    fn what_others_write() {
        let lease = parse(
            r#" { "backendtype" : "vxlan", "Extra": [1], "PUBLICIP": "192.168.64.3",
            "BackendData": {"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"} } "#,
        );
        assert_eq!(lease, Ok(attrs()));
        assert_eq!(parse("{}"), Ok(LeaseAttrs::default()));
        assert_eq!(
            parse(r#"{"PublicIP":"1.2.3.4"}"#).unwrap().public_ip,
            Some([1, 2, 3, 4].into())
        );
    }

    #[test]
    fn what_is_no_lease() {
        for text in [
            "",
            "null",
            "[]",
            "7",
            "{",
            r#"{"PublicIP":null}"#,
            r#"{"PublicIP":7}"#,
            r#"{"PublicIP":"::1"}"#,
            r#"{"PublicIP":"1.2.3"}"#,
            r#"{"PublicIPv6":"1.2.3.4"}"#,
            r#"{"BackendType":7}"#,
            r#"{"PublicIP":"1.2.3.4"}x"#,
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
        assert!(parse(&format!(r#"{{"BackendType":"{}"}}"#, "x".repeat(LONGEST))).is_err());
    }
}
