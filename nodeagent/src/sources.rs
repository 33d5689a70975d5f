//! The ConfigMaps and Secrets that the node's pods refer to: as the API server last told them, in memory and below the run
//! directory, so that a restarted agent needs no API server.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use minipod_proto::references::Reference;
use minipod_proto::v1::{ConfigMap, Secret, SourceGone};
use prost::Message;

/// What one object holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Content {
    /// Values that variables and files may take.
    pub data: BTreeMap<String, Vec<u8>>,
    /// Values that only files may take (a ConfigMap's binaryData).
    pub binary: BTreeMap<String, Vec<u8>>,
}

impl Content {
    /// The bytes for a file.
    #[must_use]
    pub fn file(&self, key: &str) -> Option<&Vec<u8>> {
        self.data.get(key).or_else(|| self.binary.get(key))
    }
}

/// What is known in one namespace.
pub type Known = BTreeMap<Reference, Arc<Content>>;

type Key = (String, Reference);

#[derive(Debug, Default)]
struct Inner {
    objects: BTreeMap<Key, Arc<Content>>,
    /// What this session has told so far; `None` once its snapshot has come.
    told: Option<BTreeSet<Key>>,
}

/// All of them.
#[derive(Debug)]
pub struct Sources {
    dir: PathBuf,
    inner: Mutex<Inner>,
    /// Held while files of volumes are written, so that no volume is written by two at a time.
    pub writing: Mutex<()>,
}

impl Sources {
    /// Those that a former start has kept in `dir`.
    #[must_use]
    pub fn load(dir: PathBuf) -> Self {
        let mut objects = BTreeMap::new();
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            match read(&entry.path()) {
                Ok(Some((key, content))) => drop(objects.insert(key, Arc::new(content))),
                Ok(None) => {}
                Err(error) => tracing::warn!(path = %entry.path().display(), %error, "a kept object is unreadable"),
            }
        }
        Self { dir, inner: Mutex::new(Inner { objects, told: None }), writing: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A session begins: what it does not tell before its snapshot is not there any more.
    pub fn begin(&self) {
        self.lock().told = Some(BTreeSet::new());
    }

    /// The session's snapshot has come.
    pub fn settle(&self) {
        let mut inner = self.lock();
        let Some(told) = inner.told.take() else { return };
        let gone: Vec<Key> = inner.objects.keys().filter(|key| !told.contains(key)).cloned().collect();
        for key in gone {
            inner.objects.remove(&key);
            self.forget(&key);
        }
    }

    /// Whether the session's snapshot has come.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.lock().told.is_none()
    }

    /// A ConfigMap is new or has changed.
    pub fn config_map(&self, map: &ConfigMap) {
        let meta = map.metadata.clone().unwrap_or_default();
        let key = (meta.namespace, Reference::ConfigMap(meta.name));
        self.put(key, map_content(map), &map.encode_to_vec());
    }

    /// A Secret is new or has changed.
    pub fn secret(&self, secret: &Secret) {
        let meta = secret.metadata.clone().unwrap_or_default();
        let key = (meta.namespace, Reference::Secret(meta.name));
        self.put(key, secret_content(secret), &secret.encode_to_vec());
    }

    /// One is gone, or no pod refers to it.
    pub fn gone(&self, gone: &SourceGone) {
        let reference =
            if gone.kind == "Secret" { Reference::Secret as fn(String) -> Reference } else { Reference::ConfigMap };
        let key = (gone.namespace.clone(), reference(gone.name.clone()));
        self.lock().objects.remove(&key);
        self.forget(&key);
    }

    /// What is known in a namespace.
    #[must_use]
    pub fn known(&self, namespace: &str) -> Known {
        let inner = self.lock();
        let ours = inner.objects.iter().filter(|((other, _), _)| other == namespace);
        ours.map(|((_, reference), content)| (reference.clone(), content.clone())).collect()
    }

    fn put(&self, key: Key, content: Content, bytes: &[u8]) {
        let Some(path) = self.path(&key) else {
            tracing::error!(?key, "the API server sent an object with an impossible name");
            return;
        };
        let mut inner = self.lock();
        if let Some(told) = &mut inner.told {
            told.insert(key.clone());
        }
        inner.objects.insert(key, Arc::new(content));
        // Under the lock, so that the newest is what stays on disk.
        if let Err(error) = keep(&self.dir, &path, bytes) {
            tracing::warn!(path = %path.display(), %error, "an object is not kept for the next start");
        }
    }

    fn forget(&self, key: &Key) {
        let Some(path) = self.path(key) else { return };
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %path.display(), %error, "a kept object stays");
            }
            _ => {}
        }
    }

    /// Neither a namespace nor a name has an underscore or a slash; anything else is no object.
    fn path(&self, (namespace, reference): &Key) -> Option<PathBuf> {
        let (kind, name) = match reference {
            Reference::ConfigMap(name) => ("configmap", name),
            Reference::Secret(name) => ("secret", name),
        };
        let plain = |text: &str| !text.is_empty() && !text.contains(['/', '_', '\0']);
        (plain(namespace) && plain(name)).then(|| self.dir.join(format!("{kind}_{namespace}_{name}")))
    }
}

fn map_content(map: &ConfigMap) -> Content {
    let data = map.data.iter().map(|(key, text)| (key.clone(), text.clone().into_bytes())).collect();
    let binary = map.binary_data.iter().map(|(key, bytes)| (key.clone(), bytes.to_vec())).collect();
    Content { data, binary }
}

fn secret_content(secret: &Secret) -> Content {
    let data = secret.data.iter().map(|(key, bytes)| (key.clone(), bytes.to_vec())).collect();
    Content { data, binary: BTreeMap::new() }
}

/// For root alone: these are secrets.
fn keep(dir: &std::path::Path, path: &std::path::Path, bytes: &[u8]) -> io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let draft = path.with_file_name(".draft");
    let mut file = std::fs::OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&draft)?;
    file.write_all(bytes)?;
    std::fs::rename(&draft, path)
}

fn read(path: &std::path::Path) -> io::Result<Option<(Key, Content)>> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
    let mut parts = name.splitn(3, '_');
    let (Some(kind), Some(namespace), Some(name)) = (parts.next(), parts.next(), parts.next()) else {
        return Ok(None);
    };
    let bytes = std::fs::read(path)?;
    let (reference, content) = match kind {
        "configmap" => (Reference::ConfigMap(name.to_owned()), map_content(&ConfigMap::decode(bytes.as_slice())?)),
        "secret" => (Reference::Secret(name.to_owned()), secret_content(&Secret::decode(bytes.as_slice())?)),
        _ => return Ok(None),
    };
    Ok(Some(((namespace.to_owned(), reference), content)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use minipod_proto::v1::ObjectMeta;

    use super::*;

    fn secret(namespace: &str, name: &str, value: &str) -> Secret {
        let meta = ObjectMeta { name: name.into(), namespace: namespace.into(), ..ObjectMeta::default() };
        let data = [("k".to_owned(), value.as_bytes().to_vec().into())].into();
        Secret { metadata: Some(meta), data, ..Secret::default() }
    }

    #[test]
    fn what_was_told_is_there_after_a_restart_and_goes_when_a_session_does_not_tell_it() {
        let dir = tempfile::tempdir().expect("tempdir");
        let at = dir.path().join("sources");
        let sources = Sources::load(at.clone());
        sources.secret(&secret("ns", "a", "1"));
        sources.secret(&secret("ns", "a", "2"));
        sources.secret(&secret("ns", "b", "x"));
        sources.secret(&secret("other", "c", "y"));
        sources.secret(&secret("..", "../../x", "evil"));
        let mode = at.join("secret_ns_a").metadata().expect("kept").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let again = Sources::load(at.clone());
        let known = again.known("ns");
        assert_eq!(known.len(), 2);
        assert_eq!(known[&Reference::Secret("a".into())].file("k").map(Vec::as_slice), Some(&b"2"[..]));
        again.begin();
        again.secret(&secret("ns", "b", "z"));
        assert_eq!(again.known("ns").len(), 2, "until the snapshot nothing is dropped");
        again.settle();
        assert_eq!((again.known("ns").len(), again.known("other").len()), (1, 0));
        let gone = SourceGone { kind: "Secret".into(), namespace: "ns".into(), name: "b".into() };
        again.gone(&gone);
        assert!(Sources::load(at).known("ns").is_empty());
    }
}
