//! TLS between members: both sides show a certificate of one authority, and a member's must name the host that it was dialled at.

use std::path::{Path, PathBuf};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity, Server, ServerTlsConfig};

/// The PEM files of a member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// Its certificate, with those between it and the authority's after it.
    pub cert: PathBuf,
    /// The certificate's key.
    pub key: PathBuf,
    /// The authority whose certificates the other members show.
    pub trusted_ca: PathBuf,
}

impl TlsFiles {
    /// From `--peer-cert-file`, `--peer-key-file` and `--peer-trusted-ca-file`: all of them or none.
    ///
    /// # Errors
    /// When some are missing.
    pub fn from_flags(
        cert: Option<PathBuf>,
        key: Option<PathBuf>,
        trusted_ca: Option<PathBuf>,
    ) -> Result<Option<Self>, TlsError> {
        Self::from_three(PEER_FLAGS, cert, key, trusted_ca)
    }

    /// From three flags of these names: certificate, key, authority; all of them or none.
    ///
    /// # Errors
    /// When some are missing.
    pub fn from_three(
        flags: [&'static str; 3],
        cert: Option<PathBuf>,
        key: Option<PathBuf>,
        trusted_ca: Option<PathBuf>,
    ) -> Result<Option<Self>, TlsError> {
        let missing = match (cert, key, trusted_ca) {
            (None, None, None) => return Ok(None),
            (Some(cert), Some(key), Some(trusted_ca)) => return Ok(Some(Self { cert, key, trusted_ca })),
            (None, _, _) => flags[0],
            (_, None, _) => flags[1],
            (_, _, None) => flags[2],
        };
        Err(TlsError::Incomplete { missing, all: flags })
    }
}

/// The flags of a member's certificates for the other members.
const PEER_FLAGS: [&str; 3] = ["--peer-cert-file", "--peer-key-file", "--peer-trusted-ca-file"];

/// Why members cannot speak TLS as configured.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// One of the three files is not named.
    #[error("{missing} is missing: {} belong together; `minipod-store certs` makes all of them", all.join(", "))]
    Incomplete {
        /// The flag.
        missing: &'static str,
        /// All three flags.
        all: [&'static str; 3],
    },
    /// A file cannot be read.
    #[error("read {}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// What the files hold is no certificate with its key.
    #[error("{} and {} must be a PEM certificate and its PEM key, and {} a PEM certificate", files.cert.display(), files.key.display(), files.trusted_ca.display())]
    Content {
        /// The files.
        files: Box<TlsFiles>,
        /// What is wrong.
        #[source]
        source: tonic::transport::Error,
    },
    /// Certificates are given, or not, and an address says the opposite.
    #[error("peer address {url}: it must begin with {right}, because --peer-cert-file is {given}")]
    Scheme {
        /// The address.
        url: String,
        /// What would be right.
        right: &'static str,
        /// Whether certificates are there.
        given: &'static str,
    },
}

/// A member's certificate and authority, read and checked.
#[derive(Debug, Clone)]
pub struct PeerTls {
    client: ClientTlsConfig,
    server: ServerTlsConfig,
}

impl PeerTls {
    /// Reads the files.
    ///
    /// # Errors
    /// When a file cannot be read or holds something else.
    pub fn load(files: &TlsFiles) -> Result<Self, TlsError> {
        let read = |file: &Path| std::fs::read(file).map_err(|source| TlsError::Read { file: file.to_owned(), source });
        let identity = Identity::from_pem(read(&files.cert)?, read(&files.key)?);
        let trusted = Certificate::from_pem(read(&files.trusted_ca)?);
        let client = ClientTlsConfig::new().ca_certificate(trusted.clone()).identity(identity.clone());
        let server = ServerTlsConfig::new().identity(identity).client_ca_root(trusted);
        let content = |source| TlsError::Content { files: Box::new(files.clone()), source };
        // Used once here, so that a wrong file shows at the start and not with the first connection.
        Endpoint::from_static("https://member").tls_config(client.clone()).map_err(content)?;
        Server::builder().tls_config(server.clone()).map_err(content)?;
        Ok(Self { client, server })
    }

    /// An endpoint that shows this member's certificate and wants one of the authority.
    ///
    /// # Errors
    /// When the endpoint cannot be used with TLS.
    pub fn dial(&self, endpoint: Endpoint) -> Result<Endpoint, tonic::transport::Error> {
        endpoint.tls_config(self.client.clone())
    }

    pub(crate) fn serve(&self, server: Server) -> Result<Server, tonic::transport::Error> {
        server.tls_config(self.server.clone())
    }
}

/// Holds every peer address against the certificates: `https://` with them, `http://` without. Says of plain addresses beyond this
/// machine that whoever reaches them reads and writes everything.
///
/// # Errors
/// When an address has the wrong scheme.
pub fn check_urls<'a>(urls: impl IntoIterator<Item = &'a String>, has_tls: bool) -> Result<(), TlsError> {
    let (right, given) = if has_tls { ("https://", "given") } else { ("http://", "not given") };
    let mut exposed = Vec::new();
    for url in urls {
        let Some(rest) = url.strip_prefix(right) else {
            return Err(TlsError::Scheme { url: url.clone(), right, given });
        };
        if !has_tls && !is_loopback(rest) {
            exposed.push(url.as_str());
        }
    }
    if !exposed.is_empty() {
        tracing::warn!(
            addresses = exposed.join(","),
            "members speak without TLS: whoever reaches these addresses can read and write everything; `minipod-store certs` makes certificates"
        );
    }
    Ok(())
}

fn is_loopback(authority: &str) -> bool {
    let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host);
    host == "localhost"
        || host.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_come_together_or_not_at_all() {
        let some = || Some(PathBuf::from("f"));
        assert!(matches!(TlsFiles::from_flags(None, None, None), Ok(None)));
        assert!(matches!(TlsFiles::from_flags(some(), some(), some()), Ok(Some(_))));
        for (cert, key, ca, missing) in [
            (None, some(), some(), "--peer-cert-file is"),
            (some(), None, some(), "--peer-key-file is"),
            (some(), some(), None, "--peer-trusted-ca-file is"),
        ] {
            let said = TlsFiles::from_flags(cert, key, ca).expect_err("refused").to_string();
            assert!(said.starts_with(missing), "{said}");
        }
    }

    #[test]
    fn schemes_must_fit_the_certificates() {
        let urls = |text: &str| vec![text.to_owned()];
        assert!(check_urls(&urls("http://127.0.0.1:1"), false).is_ok());
        assert!(check_urls(&urls("https://a:1"), true).is_ok());
        let said = check_urls(&urls("https://a:1"), false).expect_err("refused").to_string();
        assert!(said.contains("https://a:1") && said.contains("must begin with http://"), "{said}");
        assert!(check_urls(&urls("http://a:1"), true).is_err());
        assert!(is_loopback("[::1]:5") && is_loopback("127.0.0.9:5") && !is_loopback("10.0.0.1:5"));
    }
}
