//! What the store remembers of an image.

use serde::{Deserialize, Serialize};

/// A sha256 digest in the field's form, `sha256:<64 hex digits>`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

impl Digest {
    const PREFIX: &str = "sha256:";

    /// Takes a digest from text; `None` unless it is sha256 in lower case hex.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let hex = text.strip_prefix(Self::PREFIX)?;
        let good = hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        good.then(|| Self(text.to_owned()))
    }

    /// Of the finished hash.
    #[must_use]
    pub fn from_hash(hash: &[u8]) -> Self {
        use std::fmt::Write as _;
        let mut text = String::from(Self::PREFIX);
        for byte in hash {
            let _ = write!(text, "{byte:02x}");
        }
        Self(text)
    }

    /// The whole, with `sha256:`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The hex digits alone; safe as a file name.
    #[must_use]
    pub fn hex(&self) -> &str {
        &self.0[Self::PREFIX.len()..]
    }
}

impl TryFrom<String> for Digest {
    type Error = String;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::parse(&text).ok_or_else(|| format!("{text:?} is not a sha256 digest"))
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.0
    }
}

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// How the image wants to be run; the container's spec overrides it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ImageConfig {
    /// `ENTRYPOINT`.
    pub entrypoint: Vec<String>,
    /// `CMD`.
    pub cmd: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// Empty: `/`.
    pub working_dir: String,
    /// `name|uid[:group|gid]`, empty: root. See [`super::ImageStore::resolve_user`].
    pub user: String,
    /// `SIGTERM`, `15` …; empty: SIGTERM.
    pub stop_signal: String,
    /// Labels in the order of their names.
    pub labels: std::collections::BTreeMap<String, String>,
}

/// One image on this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ImageRecord {
    /// The digest of its config: what makes it the same image wherever it came from.
    pub id: Digest,
    /// Normalised references that stand for it now; empty when all have moved to newer images.
    pub names: Vec<String>,
    /// The digest of its manifest, when it came with one.
    pub manifest_digest: Option<Digest>,
    /// How to run it.
    pub config: ImageConfig,
    /// Diff ids, lowest layer first.
    pub layers: Vec<Digest>,
    /// Bytes of the unpacked layers, each counted once.
    pub size_bytes: u64,
    /// When it was loaded, milliseconds since the epoch.
    pub loaded_wall_ms: u64,
}
