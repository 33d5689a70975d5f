//! An authority and the certificates of members, as files.

use crate::members::{Members, host_and_port};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

const DAY: Duration = Duration::from_secs(86_400);
/// The authority's name; with its key it is all that is needed to issue again.
const AUTHORITY: &str = "minipod store members";
/// The authority outlives every certificate that is made with it.
const AUTHORITY_DAYS: u32 = 36_500;

/// Why certificates were not made.
#[derive(Debug, thiserror::Error)]
pub enum CertsError {
    /// A file cannot be read or written. A member's file that is there is not replaced.
    #[error("{operation} {}", file.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// The file.
        file: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A key or name is not one.
    #[error("make a certificate for {whom}")]
    Make {
        /// The member, or the authority.
        whom: String,
        /// Why not.
        #[source]
        source: rcgen::Error,
    },
    /// A member's name is no name of a file.
    #[error(
        "member {name:?}: its files are named after it, so it must be letters, digits, '-', '_' and '.', and not \"ca\""
    )]
    Name {
        /// The name.
        name: String,
    },
}

/// Makes `ca.pem`, `ca-key.pem` and for every member `NAME.pem` and `NAME-key.pem` in `dir`, valid for the hosts of its addresses
/// and for `days`. An authority that is there issues the new ones, so that members can be added later.
///
/// # Errors
/// When a file is there already or cannot be written, or a name cannot be used.
pub fn make(dir: &Path, members: &Members, days: u32) -> Result<(), CertsError> {
    for name in members.keys() {
        let is_plain = name.chars().all(|letter| letter.is_ascii_alphanumeric() || "-_.".contains(letter));
        if !is_plain || name.starts_with('.') || name == "ca" || name == "ca-key" {
            return Err(CertsError::Name { name: name.clone() });
        }
    }
    std::fs::create_dir_all(dir).map_err(|source| file_error("make", dir, source))?;
    let issuer = authority(dir)?;
    for (name, urls) in members {
        let failed = |source| CertsError::Make { whom: format!("member {name}"), source };
        let hosts: Vec<String> =
            urls.iter().filter_map(|url| host_and_port(url)).map(|(host, _)| host.to_owned()).collect();
        let mut params = CertificateParams::new(hosts).map_err(failed)?;
        params.distinguished_name = named(name);
        // A member is a server to those that dial it and a client to those that it dials.
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        limit(&mut params, days);
        let key = KeyPair::generate().map_err(failed)?;
        let certificate = params.signed_by(&key, &issuer).map_err(failed)?;
        write(&dir.join(format!("{name}-key.pem")), &key.serialize_pem(), 0o600)?;
        write(&dir.join(format!("{name}.pem")), &certificate.pem(), 0o644)?;
    }
    Ok(())
}

/// The authority of a directory; made when it is not there.
fn authority(dir: &Path) -> Result<Issuer<'static, KeyPair>, CertsError> {
    let failed = |source| CertsError::Make { whom: "the authority".to_owned(), source };
    let mut params = CertificateParams::default();
    params.distinguished_name = named(AUTHORITY);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    limit(&mut params, AUTHORITY_DAYS);
    let key_file = dir.join("ca-key.pem");
    match std::fs::read_to_string(&key_file) {
        Ok(pem) => Ok(Issuer::new(params, KeyPair::from_pem(&pem).map_err(failed)?)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let key = KeyPair::generate().map_err(failed)?;
            let certificate = params.self_signed(&key).map_err(failed)?;
            // The certificate first: a key alone would be taken for an authority that is complete.
            write(&dir.join("ca.pem"), &certificate.pem(), 0o644)?;
            write(&key_file, &key.serialize_pem(), 0o600)?;
            Ok(Issuer::new(params, key))
        }
        Err(source) => Err(file_error("read", &key_file, source)),
    }
}

fn named(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

/// Valid from two days ago, for clocks that differ, to `days` from now. 0 days have ended yesterday.
fn limit(params: &mut CertificateParams, days: u32) {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + now.saturating_sub(DAY * 2);
    params.not_after = if days == 0 { epoch + now.saturating_sub(DAY) } else { epoch + now + DAY * days };
}

fn write(file: &Path, text: &str, mode: u32) -> Result<(), CertsError> {
    let write = || {
        let mut opened = OpenOptions::new().write(true).create_new(true).mode(mode).open(file)?;
        opened.write_all(text.as_bytes())?;
        opened.sync_all()
    };
    write().map_err(|source| file_error("write", file, source))
}

fn file_error(operation: &'static str, file: &Path, source: std::io::Error) -> CertsError {
    CertsError::File { operation, file: file.to_owned(), source }
}
