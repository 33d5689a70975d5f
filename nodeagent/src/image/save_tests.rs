//! Archives that a store writes, read again by the store and by others. Needs root (owners, whiteouts), and skopeo.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::Path;
use std::process::Command;

use super::tests::{DIR, FILE, LINK, SYMLINK, gzip, load, oci, store, tarball};
use tar::EntryType;

use super::*;

/// Everything of a directory as text: kind, mode, owner, time, size or link target, attributes, content; and which names are one file.
fn everything(top: &Path) -> BTreeMap<String, String> {
    let (mut all, mut open) = (BTreeMap::new(), vec![top.to_owned()]);
    let mut first_names: BTreeMap<u64, String> = BTreeMap::new();
    let mut paths = Vec::new();
    while let Some(path) = open.pop() {
        if path.symlink_metadata().expect("metadata").is_dir() {
            open.extend(fs::read_dir(&path).expect("read").map(|entry| entry.expect("entry").path()));
        }
        paths.push(path);
    }
    paths.sort();
    for path in paths {
        let meta = path.symlink_metadata().expect("metadata");
        let name = path.strip_prefix(top).expect("below").display().to_string();
        let content = match meta.file_type() {
            kind if kind.is_file() => String::from_utf8_lossy(&fs::read(&path).expect("read")).into_owned(),
            kind if kind.is_symlink() => fs::read_link(&path).expect("link").display().to_string(),
            _ => String::new(),
        };
        let attributes = |name: &str| xattr::get(&path, name).unwrap_or_default();
        let marks = [attributes("trusted.overlay.opaque"), attributes("user.note")];
        let one_with = first_names.entry(meta.ino()).or_insert_with(|| name.clone()).clone();
        let facts = (meta.mode(), meta.uid(), meta.gid(), meta.mtime(), meta.rdev());
        all.insert(name, format!("{facts:?} {marks:?} {one_with} {content}"));
    }
    all
}

#[test]
fn what_is_saved_is_what_was_loaded_for_us_and_for_others() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (first, second) = (dir.path().join("first"), dir.path().join("second"));
    let long = format!("{}/{}", "d".repeat(90), "f".repeat(90));
    let lower = tarball(&[
        (DIR, "etc/", ""),
        (FILE, "etc/gone", "x"),
        (FILE, "etc/kept", "one"),
        (LINK, "etc/same", "etc/kept"),
        (SYMLINK, "etc/points", "/etc/kept"),
        (DIR, "old/", ""),
        (FILE, "old/below", "x"),
        (EntryType::Fifo, "pipe", ""),
    ]);
    let upper = tarball(&[
        (FILE, "etc/.wh.gone", ""),
        (DIR, "old/", ""),
        (FILE, "old/.wh..wh..opq", ""),
        (FILE, "old/new", "two"),
    ]);
    let here = store(&first);
    let loaded = load(&here, dir.path(), &oci(&[lower, gzip(&upper)], |_, _| {}), "").expect("load").remove(0);
    // What tar has no room for in a header, and what it has only in records.
    let layer = here.lower_dirs(&loaded).pop().expect("the lowest");
    fs::create_dir_all(layer.join(&long).parent().expect("a parent")).expect("make");
    fs::write(layer.join(&long), "far").expect("write");
    xattr::set(layer.join("etc/kept"), "user.note", b"a=b\nc").expect("attribute");
    symlink("t".repeat(300), layer.join("etc/far")).expect("link");
    std::os::unix::fs::lchown(layer.join(&long), Some(3_000_000), Some(9)).expect("owner");

    let file = dir.path().join("saved.tar");
    let save = |store: &ImageStore, name: &str| {
        let mut bytes = Vec::new();
        store.save(name, &mut bytes).expect("save");
        bytes
    };
    let bytes = save(&here, "minipod.local/x:1");
    let there = store(&second);
    let again = load(&there, dir.path(), &bytes, "").expect("load what was saved").remove(0);
    assert_eq!((&again.config, &again.names), (&loaded.config, &loaded.names));
    let layers = |store: &ImageStore, record: &ImageRecord| -> Vec<_> {
        store.lower_dirs(record).iter().map(|layer| everything(layer)).collect()
    };
    let (before, after) = (layers(&here, &loaded), layers(&there, &again));
    assert!(before[1].len() > 10 && before[0].values().any(|facts| facts.contains("Some([121])")), "{before:#?}");
    assert_eq!(before, after);
    assert!(save(&there, "minipod.local/x:1") == bytes, "saved again it is the same");

    fs::write(&file, &bytes).expect("write");
    for (number, kind) in ["oci-archive", "docker-archive"].iter().enumerate() {
        let to = dir.path().join(format!("copy-{number}"));
        let mut skopeo = Command::new("skopeo");
        skopeo
            .args(["--insecure-policy", "copy"])
            .arg(format!("{kind}:{}", file.display()))
            .arg(format!("dir:{}", to.display()));
        let output = skopeo.output().expect("skopeo (apt-get install skopeo)");
        assert!(output.status.success(), "{kind}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(to.join("manifest.json").is_file());
    }
    assert!(matches!(here.save("minipod.local/none", &mut Vec::new()), Err(ImageError::NotFound(_))));
}
