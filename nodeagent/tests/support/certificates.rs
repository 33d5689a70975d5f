//! Certificates for servers and clients of tests.

use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};

/// Authorities `ca.pem` and `other.pem`; of the first one `server.pem` for 127.0.0.1, and `client.pem`. Keys are `NAME-key.pem`.
///
/// # Panics
/// When they cannot be made or written.
pub fn certificates() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    let write = |name: &str, text: String| std::fs::write(dir.path().join(name), text).expect("written");
    let authority = |name: &str| {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, format!("authority {name}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        write(&format!("{name}.pem"), params.self_signed(&key).expect("signed").pem());
        Issuer::new(params, key)
    };
    let issuer = authority("ca");
    authority("other");
    for (name, usage) in
        [("server", ExtendedKeyUsagePurpose::ServerAuth), ("client", ExtendedKeyUsagePurpose::ClientAuth)]
    {
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).expect("an address");
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate().expect("a key");
        write(&format!("{name}.pem"), params.signed_by(&key, &issuer).expect("signed").pem());
        write(&format!("{name}-key.pem"), key.serialize_pem());
    }
    dir
}
