//! Volumes that are made of values: configMap, secret, downwardAPI, projected. [`files`] says what is in one (pure),
//! [`publish`] makes it so in one step that no reader sees half of.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::Permissions;
use std::io;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Component, Path};

use minipod_proto::references::Reference;
use minipod_proto::v1::{DownwardApiVolumeFile, KeyToPath, Pod, Volume};

use crate::container::env::{EnvFacts, field_ref};
use crate::container::resources::field_value;
use crate::sources::Known;
use crate::want::find_container;

const DEFAULT_MODE: i32 = 0o644;
/// What the visible names lead to.
const DATA: &str = "..data";
/// Its successor, until it is renamed.
const DATA_DRAFT: &str = "..data_tmp";

/// A file of such a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Its permissions.
    pub mode: u32,
}

/// Files by their relative paths.
pub type Files = BTreeMap<String, File>;

/// Such a volume cannot be made now.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProjectionError {
    /// The object is not there.
    #[error("{kind} {name:?} not found")]
    NotFound {
        /// `configmap` or `secret`.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// The object has no such key.
    #[error("{kind} {name:?} has no key {key:?}")]
    NoKey {
        /// `configmap` or `secret`.
        kind: &'static str,
        /// Its name.
        name: String,
        /// What is missing.
        key: String,
    },
    /// A field of the pod or a resource that does not exist.
    #[error("file {path:?} refers to unknown field {field:?}")]
    UnknownField {
        /// The file.
        path: String,
        /// What it refers to.
        field: String,
    },
    /// A path that leads out of the volume.
    #[error("file path {0:?} must be relative, without `..`")]
    BadPath(String),
}

/// Whether the volume is one of these.
#[must_use]
pub fn is_projection(volume: &Volume) -> bool {
    volume.config_map.is_some()
        || volume.secret.is_some()
        || volume.downward_api.is_some()
        || volume.projected.is_some()
}

/// What is in the volume.
///
/// # Errors
/// A value that is not there and not optional.
pub fn files(pod: &Pod, volume: &Volume, facts: &EnvFacts) -> Result<Files, ProjectionError> {
    let known = &facts.sources;
    let mut out = Files::new();
    if let Some(map) = &volume.config_map {
        let from = From::config_map(&map.name, &map.items, map.optional);
        from.add(known, map.default_mode.unwrap_or(DEFAULT_MODE), &mut out)?;
    }
    if let Some(secret) = &volume.secret {
        let from = From::secret(&secret.secret_name, &secret.items, secret.optional);
        from.add(known, secret.default_mode.unwrap_or(DEFAULT_MODE), &mut out)?;
    }
    if let Some(downward) = &volume.downward_api {
        downward_files(pod, &downward.items, downward.default_mode.unwrap_or(DEFAULT_MODE), facts, &mut out)?;
    }
    if let Some(projected) = &volume.projected {
        let mode = projected.default_mode.unwrap_or(DEFAULT_MODE);
        for source in &projected.sources {
            if let Some(map) = &source.config_map {
                From::config_map(&map.name, &map.items, map.optional).add(known, mode, &mut out)?;
            }
            if let Some(secret) = &source.secret {
                From::secret(&secret.name, &secret.items, secret.optional).add(known, mode, &mut out)?;
            }
            if let Some(downward) = &source.downward_api {
                downward_files(pod, &downward.items, mode, facts, &mut out)?;
            }
        }
    }
    // The API server refuses such paths; should one come through, nothing is written by it.
    match out.keys().find(|path| !stays_inside(path)) {
        Some(path) => Err(ProjectionError::BadPath(path.clone())),
        None => Ok(out),
    }
}

/// One object's part.
struct From<'a> {
    kind: &'static str,
    reference: Reference,
    name: &'a str,
    items: &'a [KeyToPath],
    optional: bool,
}

impl<'a> From<'a> {
    fn config_map(name: &'a str, items: &'a [KeyToPath], optional: Option<bool>) -> Self {
        let reference = Reference::ConfigMap(name.to_owned());
        Self { kind: "configmap", reference, name, items, optional: optional.unwrap_or(false) }
    }

    fn secret(name: &'a str, items: &'a [KeyToPath], optional: Option<bool>) -> Self {
        let reference = Reference::Secret(name.to_owned());
        Self { kind: "secret", reference, name, items, optional: optional.unwrap_or(false) }
    }

    fn add(&self, known: &Known, default_mode: i32, out: &mut Files) -> Result<(), ProjectionError> {
        let Some(content) = known.get(&self.reference) else {
            let missing = ProjectionError::NotFound { kind: self.kind, name: self.name.to_owned() };
            return if self.optional { Ok(()) } else { Err(missing) };
        };
        if self.items.is_empty() {
            for (key, bytes) in content.binary.iter().chain(&content.data) {
                out.insert(key.clone(), File { bytes: bytes.clone(), mode: mode(default_mode) });
            }
            return Ok(());
        }
        for item in self.items {
            match content.file(&item.key) {
                Some(bytes) => {
                    let file = File { bytes: bytes.clone(), mode: mode(item.mode.unwrap_or(default_mode)) };
                    out.insert(item.path.clone(), file);
                }
                None if self.optional => {}
                None => {
                    let (name, key) = (self.name.to_owned(), item.key.clone());
                    return Err(ProjectionError::NoKey { kind: self.kind, name, key });
                }
            }
        }
        Ok(())
    }
}

fn mode(mode: i32) -> u32 {
    u32::try_from(mode).unwrap_or(0) & 0o777
}

fn downward_files(
    pod: &Pod,
    items: &[DownwardApiVolumeFile],
    default_mode: i32,
    facts: &EnvFacts,
    out: &mut Files,
) -> Result<(), ProjectionError> {
    for item in items {
        let (field, value) = if let Some(field) = &item.field_ref {
            (&field.field_path, pod_field(pod, &field.field_path, facts))
        } else if let Some(resource) = &item.resource_field_ref {
            let container = find_container(pod, &resource.container_name);
            let value = container.and_then(|container| {
                let requirements = container.resources.as_ref();
                field_value(requirements, &resource.resource, &resource.divisor, &facts.allocatable)
            });
            (&resource.resource, value)
        } else {
            (&item.path, None)
        };
        let unknown = || ProjectionError::UnknownField { path: item.path.clone(), field: field.clone() };
        let bytes = value.ok_or_else(unknown)?.into_bytes();
        out.insert(item.path.clone(), File { bytes, mode: mode(item.mode.unwrap_or(default_mode)) });
    }
    Ok(())
}

/// All labels or annotations are one `key="value"` a line; everything else is as in variables.
fn pod_field(pod: &Pod, path: &str, facts: &EnvFacts) -> Option<String> {
    let meta = pod.metadata.as_ref()?;
    let map = match path {
        "metadata.labels" => &meta.labels,
        "metadata.annotations" => &meta.annotations,
        _ => return field_ref(pod, path, facts),
    };
    let mut lines: Vec<String> = map.iter().map(|(key, value)| format!("{key}={value:?}")).collect();
    lines.sort();
    Some(lines.join("\n"))
}

fn stays_inside(path: &str) -> bool {
    !path.is_empty()
        && !path.starts_with("..")
        && !path.contains('\0')
        && Path::new(path).components().all(|part| matches!(part, Component::Normal(_)))
}

/// Whom the files of a volume belong to, in ids of the node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Owner {
    /// `None`: the agent.
    pub user: Option<u32>,
    /// `None`: the agent's.
    pub group: Option<u32>,
    /// The group is the pod's (fsGroup): what is made in directories is the group's too.
    pub shared: bool,
}

/// Makes the directory show exactly these files. They lie in a fresh directory, which `..data` leads to from one moment to the next; the
/// visible names are links through it and change only when names come or go. Answers whether anything was to do.
///
/// # Errors
/// When a file cannot be written; what was there before is then still shown.
pub fn publish(dir: &Path, files: &Files, owner: Owner) -> io::Result<bool> {
    let data = dir.join(DATA);
    let current = std::fs::read_link(&data).ok();
    if let Some(current) = &current
        && read_all(&dir.join(current), Path::new(""))? == *files
    {
        show_names(dir, files)?;
        return Ok(false);
    }
    let fresh = fresh_dir(dir)?;
    let fresh_name = fresh.file_name().map(std::ffi::OsStr::to_owned).unwrap_or_default();
    let written = write_all(&fresh, files, owner).and_then(|()| {
        let draft = dir.join(DATA_DRAFT);
        remove_if_there(&draft)?;
        symlink(&fresh_name, &draft)?;
        std::fs::rename(&draft, &data)
    });
    if let Err(error) = written {
        let _ = std::fs::remove_dir_all(&fresh);
        return Err(error);
    }
    show_names(dir, files)?;
    // Directories that a killed agent left go too.
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let is_ours = name.to_str().is_some_and(|name| name.starts_with("..")) && entry.file_type()?.is_dir();
        if is_ours && name != fresh_name {
            std::fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(true)
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn fresh_dir(dir: &Path) -> io::Result<std::path::PathBuf> {
    let mut stamp = crate::clock::wall_ms();
    loop {
        let fresh = dir.join(format!("..{stamp}"));
        match std::fs::create_dir(&fresh) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => stamp += 1,
            Err(error) => return Err(error),
            Ok(()) => {
                return Ok(fresh);
            }
        }
    }
}

fn write_all(root: &Path, files: &Files, owner: Owner) -> io::Result<()> {
    // chown takes set-gid bits away, so modes come after it.
    let own = |path: &Path, mode: u32| {
        chown(path, owner.user, owner.group).and_then(|()| std::fs::set_permissions(path, Permissions::from_mode(mode)))
    };
    let dir_mode = if owner.shared { 0o2755 } else { 0o755 };
    own(root, dir_mode)?;
    for (path, file) in files {
        let at = root.join(path);
        let mut parent = root.to_owned();
        for part in Path::new(path).parent().into_iter().flat_map(Path::components) {
            parent.push(part);
            match std::fs::create_dir(&parent) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => own(&parent, dir_mode)?,
            }
        }
        std::fs::write(&at, &file.bytes)?;
        own(&at, file.mode)?;
    }
    Ok(())
}

/// What is shown now; empty when it is not there.
fn read_all(root: &Path, below: &Path) -> io::Result<Files> {
    let mut out = Files::new();
    let entries = match std::fs::read_dir(root.join(below)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(out),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let path = below.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            out.extend(read_all(root, &path)?);
        } else {
            let mode = entry.metadata()?.permissions().mode() & 0o777;
            let file = File { bytes: std::fs::read(entry.path())?, mode };
            out.insert(path.to_string_lossy().into_owned(), file);
        }
    }
    Ok(out)
}

/// The first parts of the paths, as links through `..data`.
fn show_names(dir: &Path, files: &Files) -> io::Result<()> {
    let wanted: BTreeSet<&str> = files.keys().filter_map(|path| path.split('/').next()).collect();
    for name in &wanted {
        match symlink(Path::new(DATA).join(name), dir.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let stale = name.to_str().is_none_or(|name| !name.starts_with("..") && !wanted.contains(name));
        if stale && entry.file_type()?.is_symlink() {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use minipod_proto::v1::ObjectMeta;

    use super::*;
    use crate::sources::Content;

    fn facts() -> EnvFacts {
        let map = Content {
            data: [("a".to_owned(), b"1".to_vec()), ("b".to_owned(), b"2".to_vec())].into(),
            binary: [("bin".to_owned(), vec![0xff])].into(),
        };
        let secret = Content { data: [("key".to_owned(), b"s".to_vec())].into(), ..Content::default() };
        let sources =
            [(Reference::ConfigMap("map".into()), Arc::new(map)), (Reference::Secret("sec".into()), Arc::new(secret))];
        EnvFacts { sources: sources.into(), ..EnvFacts::default() }
    }

    fn pod(volume: &str) -> Pod {
        let yaml = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: p}}\nspec:\n  containers: [{{name: c, image: x}}]\n  volumes:\n  - {volume}\n"
        );
        let objects = minipod_proto::manifest::parse(&yaml).unwrap_or_else(|problems| panic!("{problems:?}"));
        let mut pod = objects.first().and_then(|object| object.as_pod()).cloned().expect("a pod");
        let labels = [("b".to_owned(), "two \"2\"".to_owned()), ("a".to_owned(), "1".to_owned())].into();
        pod.metadata = Some(ObjectMeta { name: "p".into(), labels, ..ObjectMeta::default() });
        pod
    }

    fn shown(volume: &str) -> Result<Vec<String>, String> {
        let pod = pod(volume);
        let files = files(&pod, &pod.spec().volumes[0], &facts()).map_err(|error| error.to_string())?;
        let text = |file: &File| String::from_utf8_lossy(&file.bytes).into_owned();
        Ok(files.iter().map(|(path, file)| format!("{path} {:o} {}", file.mode, text(file))).collect())
    }

    #[test]
    fn what_is_in_a_volume() {
        let table: &[(&str, Result<&[&str], &str>)] = &[
            ("{name: v, configMap: {name: map}}", Ok(&["a 644 1", "b 644 2", "bin 644 \u{fffd}"])),
            (
                "{name: v, configMap: {name: map, defaultMode: 0400, items: [{key: a, path: d/x}, {key: b, path: y, mode: 0600}]}}",
                Ok(&["d/x 400 1", "y 600 2"]),
            ),
            ("{name: v, configMap: {name: none}}", Err("configmap \"none\" not found")),
            ("{name: v, configMap: {name: none, optional: true}}", Ok(&[])),
            (
                "{name: v, configMap: {name: map, items: [{key: z, path: z}]}}",
                Err("configmap \"map\" has no key \"z\""),
            ),
            ("{name: v, configMap: {name: map, optional: true, items: [{key: z, path: z}]}}", Ok(&[])),
            ("{name: v, secret: {secretName: sec, defaultMode: 0440}}", Ok(&["key 440 s"])),
            ("{name: v, secret: {secretName: map}}", Err("secret \"map\" not found")),
            (
                "{name: v, downwardAPI: {items: [{path: l, fieldRef: {fieldPath: metadata.labels}}, {path: n, fieldRef: {fieldPath: metadata.name}}]}}",
                Ok(&["l 644 a=\"1\"\nb=\"two \\\"2\\\"\"", "n 644 p"]),
            ),
            (
                "{name: v, projected: {defaultMode: 0444, sources: [{configMap: {name: map, items: [{key: a, path: m/a}]}}, {secret: {name: sec}}, {downwardAPI: {items: [{path: n, fieldRef: {fieldPath: metadata.name}}]}}]}}",
                Ok(&["key 444 s", "m/a 444 1", "n 444 p"]),
            ),
        ];
        for (volume, expected) in table {
            let found = shown(volume);
            match expected {
                Ok(lines) => assert_eq!(
                    found.as_deref(),
                    Ok(&lines.iter().map(|l| (*l).to_owned()).collect::<Vec<_>>()[..]),
                    "{volume}"
                ),
                Err(text) => assert_eq!(found, Err((*text).to_owned()), "{volume}"),
            }
        }
    }

    #[test]
    fn no_path_leaves_the_volume() {
        for bad in ["", "..", "/etc/passwd", "a/../../b", "..data/x", "a/..", "x\0"] {
            assert!(!stays_inside(bad), "{bad:?}");
        }
        assert!(stays_inside("a/b.c"));
    }

    fn some(pairs: &[(&str, &str, u32)]) -> Files {
        let file = |(path, text, mode): &(&str, &str, u32)| {
            ((*path).to_owned(), File { bytes: text.as_bytes().to_vec(), mode: *mode })
        };
        pairs.iter().map(file).collect()
    }

    #[test]
    fn all_files_change_at_once() {
        let temporary = tempfile::tempdir().expect("tempdir");
        let dir = temporary.path();
        assert!(publish(dir, &some(&[("a", "1", 0o644), ("d/e", "2", 0o600)]), Owner::default()).expect("publish"));
        let read = |name: &str| std::fs::read_to_string(dir.join(name)).ok();
        assert_eq!((read("a").as_deref(), read("d/e").as_deref()), (Some("1"), Some("2")));
        assert_eq!(std::fs::read_link(dir.join("a")).expect("link"), Path::new("..data/a"));
        let old = std::fs::read_link(dir.join(DATA)).expect("link");
        assert!(!publish(dir, &some(&[("a", "1", 0o644), ("d/e", "2", 0o600)]), Owner::default()).expect("again"));
        assert_eq!(std::fs::read_link(dir.join(DATA)).expect("link"), old, "what is the same is left alone");
        // A killed agent's leftovers.
        std::fs::create_dir(dir.join("..1")).expect("mkdir");
        symlink("nowhere", dir.join(DATA_DRAFT)).expect("symlink");
        assert!(publish(dir, &some(&[("a", "9", 0o400), ("z", "", 0o644)]), Owner::default()).expect("publish"));
        assert_eq!((read("a").as_deref(), read("z").as_deref(), read("d/e")), (Some("9"), Some(""), None));
        let names: BTreeSet<String> = std::fs::read_dir(dir)
            .expect("read")
            .map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned())
            .filter(|name| name == DATA || !name.starts_with("..") || name == "..1" || *name == old.to_string_lossy())
            .collect();
        assert_eq!(names, ["..data", "a", "z"].map(str::to_owned).into());
        assert!(publish(dir, &Files::new(), Owner::default()).expect("publish nothing"));
        assert_eq!(read("a"), None);
    }
}
