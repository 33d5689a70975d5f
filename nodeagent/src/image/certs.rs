//! Whom the node's operator trusts to be a registry: a directory per registry, as docker and podman have them.
//!
//! In `DIR/HOST[:PORT]/`, `*.crt` are authorities that are trusted beside the system's own, and `NAME.cert` with `NAME.key` is
//! what the node shows of itself. They are read for each pull, so that what has changed counts for the next one.

use std::io;
use std::path::{Path, PathBuf};

use reqwest::{Certificate, Identity};

/// What a directory says.
#[derive(Debug)]
pub struct Certs {
    /// Trusted beside the system's.
    pub authorities: Vec<Certificate>,
    /// Shown to the registry.
    pub identity: Option<Identity>,
}

/// A directory of certificates cannot be used. The pull fails: with less trust than was asked for nothing is to be gained, and with
/// more neither.
#[derive(Debug, thiserror::Error)]
pub enum CertsError {
    /// A file or directory cannot be read.
    #[error("read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A file is not what its name says.
    #[error("{}: want {wanted} as PEM", path.display())]
    Pem {
        /// Which.
        path: PathBuf,
        /// What should be in it.
        wanted: &'static str,
    },
}

/// What the operator says of the registry `host[:port]`; `None` without a directory for it.
///
/// # Errors
/// See [`CertsError`].
pub fn read(dir: &Path, host: &str) -> Result<Option<Certs>, CertsError> {
    // Names come from manifests and from registries: one that is no single name of a directory has none.
    if matches!(host, "" | "." | "..") || host.contains(['/', '\0']) {
        return Ok(None);
    }
    let dir = dir.join(host);
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| CertsError::Read { path, source }
    };
    let entries = match std::fs::read_dir(&dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        entries => entries.map_err(failed(&dir))?,
    };
    let paths = entries.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<Vec<_>>>();
    let mut paths = paths.map_err(failed(&dir))?;
    paths.sort();
    let mut certs = Certs { authorities: Vec::new(), identity: None };
    for path in paths {
        let content = |path: &Path| std::fs::read(path).map_err(failed(path));
        match path.extension().and_then(|ending| ending.to_str()) {
            Some("crt") => {
                let found = Certificate::from_pem_bundle(&content(&path)?).ok().filter(|found| !found.is_empty());
                certs.authorities.extend(found.ok_or(CertsError::Pem { path, wanted: "certificates" })?);
            }
            Some("cert") => {
                let (key, mut both) = (path.with_extension("key"), content(&path)?);
                both.push(b'\n');
                both.extend(content(&key)?);
                let wanted = "a certificate, and its key in the .key beside it,";
                certs.identity = Some(Identity::from_pem(&both).map_err(|_| CertsError::Pem { path, wanted })?);
            }
            _ => {}
        }
    }
    Ok(Some(certs))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_a_registrys_or_nobodys() {
        let dir = tempfile::tempdir().expect("a directory");
        for (host, files) in [
            ("empty.example", &[][..]),
            ("odd.example:5000", &[("README", "x"), ("old.crt.bak", "x")]),
            ("bad.example", &[("ca.crt", "nonsense")]),
            ("keyless.example", &[("client.cert", "x")]),
            ("wrong.example", &[("client.cert", "x"), ("client.key", "y")]),
        ] {
            std::fs::create_dir(dir.path().join(host)).expect("made");
            for (name, content) in files {
                std::fs::write(dir.path().join(host).join(name), content).expect("written");
            }
        }
        std::fs::write(dir.path().join("file.example"), "").expect("written");
        for (host, wanted) in [
            ("empty.example", "0 authorities"),
            ("odd.example:5000", "0 authorities"),
            ("odd.example", "none"),
            ("..", "none"),
            (".", "none"),
            ("", "none"),
            ("../empty.example", "none"),
            ("bad.example", "bad.example/ca.crt: want certificates as PEM"),
            ("keyless.example", "read DIR/keyless.example/client.key: No such file"),
            ("wrong.example", "wrong.example/client.cert: want a certificate, and its key"),
            ("file.example", "read DIR/file.example: Not a directory"),
        ] {
            let said = match read(dir.path(), host) {
                Ok(Some(certs)) => format!("{} authorities", certs.authorities.len()),
                Ok(None) => "none".to_owned(),
                Err(error) => crate::report::chain(&error).replace(&*dir.path().to_string_lossy(), "DIR"),
            };
            assert!(said.contains(wanted), "{host}: {said}");
        }
    }
}
