//! Image references as the field writes and reads them (`distribution/reference`, `docker.io` and `library` implied).

use std::fmt;

use super::{Digest, ImageError};

const DEFAULT_DOMAIN: &str = "docker.io";
const DEFAULT_TAG: &str = "latest";
/// Of a repository, domain included.
const MAX_NAME_BYTES: usize = 255;

/// A normalised reference: `domain/path[:tag][@digest]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// `docker.io/library/busybox`: with domain, without tag and digest.
    pub repository: String,
    /// `latest` when the text had neither tag nor digest.
    pub tag: Option<String>,
    /// When pinned.
    pub digest: Option<Digest>,
}

impl Reference {
    /// Reads `busybox`, `minipod.local/app:1`, `host:5000/a/b@sha256:…` and so on.
    ///
    /// # Errors
    /// [`ImageError::BadReference`].
    pub fn parse(text: &str) -> Result<Self, ImageError> {
        let bad = |reason| ImageError::BadReference { reference: text.to_owned(), reason };
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => {
                (rest, Some(Digest::parse(digest).ok_or_else(|| bad("the digest is not sha256:<64 hex digits>"))?))
            }
            None => (text, None),
        };
        let (domain, rest) = match rest.split_once('/') {
            Some((first, rest)) if is_domain(first) => (first, rest),
            _ => (DEFAULT_DOMAIN, rest),
        };
        let (path, tag) = match rest.rsplit_once(':') {
            Some((path, tag)) => (path, Some(tag)),
            None => (rest, None),
        };
        if !domain_is_good(domain) {
            return Err(bad("the registry's name is not a host name with an optional port"));
        }
        if !path.split('/').all(component_is_good) {
            let upper = path.bytes().any(|b| b.is_ascii_uppercase());
            return Err(bad(if upper { "the name must be lower case" } else { "the name is malformed" }));
        }
        if !tag.is_none_or(tag_is_good) {
            return Err(bad("the tag is malformed"));
        }
        let domain = if domain == "index.docker.io" { DEFAULT_DOMAIN } else { domain };
        let official = domain == DEFAULT_DOMAIN && !path.contains('/');
        let repository = format!("{domain}/{}{path}", if official { "library/" } else { "" });
        if repository.len() > MAX_NAME_BYTES {
            return Err(bad("the name is longer than 255 bytes"));
        }
        let tag = tag.or(digest.is_none().then_some(DEFAULT_TAG)).map(str::to_owned);
        Ok(Self { repository, tag, digest })
    }

    /// `repository:tag`, when it has a tag: what an image is known by in the store.
    #[must_use]
    pub fn name(&self) -> Option<String> {
        self.tag.as_ref().map(|tag| format!("{}:{tag}", self.repository))
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

/// Whether the part before the first slash is a registry and not the beginning of a path.
fn is_domain(first: &str) -> bool {
    first == "localhost" || first.contains(['.', ':']) || first.bytes().any(|b| b.is_ascii_uppercase())
}

fn domain_is_good(domain: &str) -> bool {
    let (host, port) = match domain.split_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (domain, None),
    };
    let label_is_good = |label: &str| {
        let bytes = label.as_bytes();
        bytes.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'-')
            && bytes.first().is_some_and(|b| *b != b'-')
            && bytes.last().is_some_and(|b| *b != b'-')
    };
    let port_is_good = port.is_none_or(|port| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()));
    host.split('.').all(label_is_good) && port_is_good
}

/// `[a-z0-9]+`, joined by `.`, `_`, `__` or any number of `-`.
fn component_is_good(component: &str) -> bool {
    let word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    let ends = bytes.first().is_some_and(|b| word(*b)) && bytes.last().is_some_and(|b| word(*b));
    let separators = bytes.split(|b| word(*b)).all(|between| match between {
        [] | b"." | b"_" | b"__" => true,
        dashes => dashes.iter().all(|b| *b == b'-'),
    });
    ends && separators
}

fn tag_is_good(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let bytes = tag.as_bytes();
    bytes.len() <= 128
        && bytes.first().is_some_and(|b| word(*b))
        && bytes.iter().all(|b| word(*b) || matches!(b, b'.' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normalises() {
        let hex = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
        let table = [
            ("busybox".to_owned(), "docker.io/library/busybox:latest".to_owned()),
            ("busybox:1.36".into(), "docker.io/library/busybox:1.36".into()),
            ("library/busybox".into(), "docker.io/library/busybox:latest".into()),
            ("index.docker.io/library/busybox".into(), "docker.io/library/busybox:latest".into()),
            ("index.docker.io/busybox".into(), "docker.io/library/busybox:latest".into()),
            ("docker.io/busybox".into(), "docker.io/library/busybox:latest".into()),
            ("me/app".into(), "docker.io/me/app:latest".into()),
            ("minipod.local/busybox".into(), "minipod.local/busybox:latest".into()),
            ("minipod.local/busybox:latest".into(), "minipod.local/busybox:latest".into()),
            ("localhost/app".into(), "localhost/app:latest".into()),
            ("localhost:5000/a/b:v1".into(), "localhost:5000/a/b:v1".into()),
            ("HOST/app".into(), "HOST/app:latest".into()),
            ("a__b/c-d.e_f:T.1-x".into(), "docker.io/a__b/c-d.e_f:T.1-x".into()),
            (format!("busybox@sha256:{hex}"), format!("docker.io/library/busybox@sha256:{hex}")),
            (format!("r.io/b:1@sha256:{hex}"), format!("r.io/b:1@sha256:{hex}")),
        ];
        for (text, want) in table {
            let reference = Reference::parse(&text).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(reference.to_string(), want, "{text}");
            let again = Reference::parse(&want).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(again, reference, "normalising {want} again");
        }
    }

    #[test]
    fn refuses() {
        let long = format!("r.io/{}", "a".repeat(260));
        for (text, part) in [
            ("", "malformed"),
            ("Busybox", "lower case"),
            ("r.io/A", "lower case"),
            ("a//b", "malformed"),
            ("/a", "malformed"),
            ("a/", "malformed"),
            ("../../etc/passwd", "host name"),
            ("r.io/../a", "malformed"),
            ("a b", "malformed"),
            ("a___b", "malformed"),
            ("a._b", "malformed"),
            ("-a", "malformed"),
            ("a:", "tag"),
            ("a:b:c", "malformed"),
            ("a:-b", "tag"),
            ("a@sha256:abc", "digest"),
            ("a@md5:abc", "digest"),
            ("r.io:port/a", "host name"),
            ("-r.io/a", "host name"),
            ("a\n", "malformed"),
            (&long, "255"),
        ] {
            let error = Reference::parse(text).expect_err(text).to_string();
            assert!(error.contains(part), "{text:?}: {error}");
        }
    }
}
