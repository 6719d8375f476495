//! Certificates as an operator would make them: an authority, a server's, a client's.

use std::fs;
use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
};

/// Writes `ca.pem`, `server.pem`, `server.key`, `client.pem` and `client.key`; `names` are the server's.
pub(crate) fn make(dir: &Path, names: &[&str]) {
    let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    fs::write(dir.join("ca.pem"), ca.pem()).unwrap();
    for (name, usages) in [
        // etcd's gateway is a client of etcd itself
        ("server", vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth]),
        ("client", vec![ExtendedKeyUsagePurpose::ClientAuth]),
    ] {
        let mut params =
            CertificateParams::new(names.iter().map(ToString::to_string).collect::<Vec<_>>())
                .unwrap();
        params.extended_key_usages = usages;
        let key = KeyPair::generate().unwrap();
        fs::write(dir.join(format!("{name}.pem")), params.signed_by(&key, &ca).unwrap().pem())
            .unwrap();
        fs::write(dir.join(format!("{name}.key")), key.serialize_pem()).unwrap();
    }
}
