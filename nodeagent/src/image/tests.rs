//! Loading for real: archives are made here, byte by byte where they are malicious. Needs root (owners, whiteouts).

use std::collections::HashSet;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flate2::Compression;
use flate2::write::GzEncoder;
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

use super::*;

pub(super) fn store(dir: &Path) -> Arc<ImageStore> {
    open(dir, Limits::default()).expect("a store")
}

pub(super) fn open(dir: &Path, limits: Limits) -> Result<Arc<ImageStore>, ImageError> {
    ImageStore::open(dir, StoreOptions { limits, durable: false })
}

/// Type, path, content or link target.
pub(super) type Item<'a> = (EntryType, &'a str, &'a str);

pub(super) fn header(kind: EntryType, path: &str, content: &str) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    // Not by set_path: it refuses what we want to see refused.
    header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
    let is_link = kind.is_symlink() || kind.is_hard_link();
    if is_link {
        header.as_old_mut().linkname[..content.len()].copy_from_slice(content.as_bytes());
    }
    header.set_size(if is_link { 0 } else { content.len() as u64 });
    header.set_mode(if kind.is_dir() { 0o755 } else { 0o4750 });
    header.set_uid(7);
    header.set_gid(8);
    header.set_mtime(1_000_000);
    header.set_cksum();
    header
}

pub(super) fn tarball(items: &[Item<'_>]) -> Vec<u8> {
    let mut tar = Builder::new(Vec::new());
    for (kind, path, content) in items {
        let body = if kind.is_file() { content.as_bytes() } else { &[] };
        tar.append(&header(*kind, path, content), body).expect("append");
    }
    tar.into_inner().expect("a tar")
}

pub(super) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = GzEncoder::new(Vec::new(), Compression::best());
    out.write_all(bytes).expect("compress");
    out.finish().expect("compress")
}

pub(super) fn sha(bytes: &[u8]) -> Digest {
    Digest::from_hash(&Sha256::digest(bytes))
}

pub(super) const FILE: EntryType = EntryType::Regular;
pub(super) const DIR: EntryType = EntryType::Directory;
pub(super) const SYMLINK: EntryType = EntryType::Symlink;
pub(super) const LINK: EntryType = EntryType::Link;

pub(super) fn load(store: &ImageStore, dir: &Path, archive: &[u8], name: &str) -> Result<Vec<ImageRecord>, ImageError> {
    let file = dir.join("archive.tar");
    fs::write(&file, archive).expect("write");
    let name = (!name.is_empty()).then(|| name.to_owned());
    store.load(&file, &LoadOptions { name, ..LoadOptions::default() })
}

/// An oci-layout with one image of these layers; `change` may spoil a file of it.
pub(super) fn oci(layers: &[Vec<u8>], change: impl Fn(&str, &mut Vec<u8>)) -> Vec<u8> {
    let plain: Vec<Digest> = layers
        .iter()
        .map(|layer| match layer.starts_with(&[0x1f, 0x8b]) {
            true => {
                let mut out = Vec::new();
                std::io::copy(&mut flate2::read::GzDecoder::new(layer.as_slice()), &mut out).expect("inflate");
                sha(&out)
            }
            false => sha(layer),
        })
        .collect();
    let config = serde_json::json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }, "os": "linux",
        "config": { "Env": ["A=1"], "Cmd": ["sh"], "User": "web", "Entrypoint": null },
        "rootfs": { "type": "layers", "diff_ids": plain.iter().map(Digest::as_str).collect::<Vec<_>>() },
    });
    let config = config.to_string().into_bytes();
    let descriptor = |bytes: &[u8]| serde_json::json!({ "digest": sha(bytes).as_str(), "size": bytes.len() });
    let manifest = serde_json::json!({
        "config": descriptor(&config), "layers": layers.iter().map(|layer| descriptor(layer)).collect::<Vec<_>>(),
    });
    let manifest = manifest.to_string().into_bytes();
    let mut entry = descriptor(&manifest);
    entry["annotations"] = serde_json::json!({ "org.opencontainers.image.ref.name": "minipod.local/x:1" });
    let index = serde_json::json!({ "manifests": [entry] }).to_string().into_bytes();
    let mut files: Vec<(String, Vec<u8>)> =
        vec![("oci-layout".into(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()), ("index.json".into(), index)];
    for blob in [&config, &manifest].into_iter().chain(layers) {
        files.push((format!("blobs/sha256/{}", sha(blob).hex()), blob.clone()));
    }
    let mut tar = Builder::new(Vec::new());
    for (name, mut bytes) in files {
        change(&name, &mut bytes);
        let mut header = self::header(FILE, "", "");
        header.set_size(bytes.len() as u64);
        tar.append_data(&mut header, format!("./{name}"), bytes.as_slice()).expect("append");
    }
    tar.into_inner().expect("a tar")
}

pub(super) fn keep(_: &str, _: &mut Vec<u8>) {}

/// What lies in a directory, temporary things too.
pub(super) fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .expect("list")
        .map(|entry| entry.expect("list").file_name().to_string_lossy().into_owned())
        .filter(|name| name != ".lock")
        .collect();
    names.sort();
    names
}

#[test]
fn an_image_of_two_layers_is_kept_and_found() {
    let dir = tempfile::tempdir().expect("tempdir");
    let base = tarball(&[
        (DIR, "./", ""),
        (DIR, "./etc/", ""),
        (FILE, "./etc/passwd", "web:x:33:34::/srv:/bin/sh\n"),
        (FILE, "./gone", "old"),
        (DIR, "./dir", ""),
        (FILE, "./dir/below", "old"),
        (SYMLINK, "./sym", "/absolute/../is/fine"),
        (LINK, "./hard", "etc/passwd"),
        (EntryType::Fifo, "./pipe", ""),
    ]);
    let top = tarball(&[
        (FILE, "./.wh.gone", ""),
        (FILE, "./dir/.wh..wh..opq", ""),
        (FILE, "./dir/new", "new"),
        (FILE, "./etc/group", "log:x:50:web\n"),
    ]);
    let archive = oci(&[base, gzip(&top)], keep);
    {
        let store = store(dir.path());
        let loaded = load(&store, dir.path(), &archive, "").expect("load");
        assert_eq!(loaded[0].names, ["minipod.local/x:1"]);
        assert!(matches!(open(dir.path(), Limits::default()), Err(ImageError::Locked(_))), "one store at a time");
    }
    let store = store(dir.path());
    let image = store.get("minipod.local/x:1").expect("found after a new start");
    let manifest = image.manifest_digest.as_ref().expect("digest").as_str();
    for reference in
        [image.id.as_str(), &format!("minipod.local/x@{manifest}"), &format!("minipod.local/x:9@{manifest}")]
    {
        assert_eq!(store.get(reference).map(|found| found.id), Some(image.id.clone()), "{reference}");
    }
    for reference in ["minipod.local/x", "other.local/x:1", &format!("other.local/x@{manifest}"), "BAD", ""] {
        assert_eq!(store.get(reference), None, "{reference}");
    }
    assert_eq!((image.config.cmd.clone(), image.config.entrypoint.len()), (vec!["sh".to_owned()], 0));
    let lowers = store.lower_dirs(&image);
    let (top, base) = (&lowers[0], &lowers[1]);
    let passwd = fs::symlink_metadata(base.join("etc/passwd")).expect("passwd");
    assert_eq!((passwd.uid(), passwd.gid(), passwd.mode() & 0o7777, passwd.mtime()), (7, 8, 0o4750, 1_000_000));
    assert_eq!(passwd.ino(), fs::metadata(base.join("hard")).expect("hard").ino());
    assert_eq!(fs::metadata(base.join("dir")).expect("dir").mtime(), 1_000_000, "not the time of its entries");
    assert_eq!(fs::read_link(base.join("sym")).expect("sym"), Path::new("/absolute/../is/fine"));
    let gone = fs::symlink_metadata(top.join("gone")).expect("whiteout");
    assert!(gone.file_type().is_char_device() && gone.rdev() == 0);
    assert_eq!(xattr::get(top.join("dir"), "trusted.overlay.opaque").expect("xattr").as_deref(), Some(b"y".as_slice()));
    assert!(!top.join(".wh.gone").exists());
    let user = store.resolve_user(&image, &image.config.user).expect("user");
    assert_eq!((user.uid, user.gid, user.groups, user.home.as_str()), (33, 34, vec![50], "/srv"));
    // The same again changes nothing; under another name it has both.
    load(&store, dir.path(), &archive, "minipod.local/y").expect("load");
    assert_eq!(store.list().len(), 1);
    assert_eq!(store.get("minipod.local/y").expect("found").names, ["minipod.local/x:1", "minipod.local/y:latest"]);
}

#[test]
fn a_name_goes_to_the_newer_image_and_removal_keeps_shared_layers() {
    let dir = tempfile::tempdir().expect("tempdir");
    let store = store(dir.path());
    let shared = tarball(&[(FILE, "a", "a")]);
    let first = load(&store, dir.path(), &oci(std::slice::from_ref(&shared), keep), "").expect("load").remove(0);
    let top = tarball(&[(FILE, "b", "b")]);
    let second = load(&store, dir.path(), &oci(&[shared, top], keep), "").expect("load").remove(0);
    assert_eq!(store.get("minipod.local/x:1").map(|image| image.id), Some(second.id.clone()));
    assert_eq!(store.get(first.id.as_str()).expect("still here").names, [""; 0]);
    let in_use = HashSet::from([first.id.clone(), second.id.clone()]);
    assert!(store.prune(&in_use).expect("prune").is_empty());
    assert!(matches!(store.remove("minipod.local/x:1", &in_use), Err(ImageError::InUse(_))));
    store.remove("minipod.local/x:1", &HashSet::new()).expect("remove");
    assert_eq!(names(&dir.path().join("layers")), [first.layers[0].hex()]);
    assert_eq!(store.prune(&HashSet::new()).expect("prune"), [first.id]);
    assert_eq!((names(&dir.path().join("layers")).len(), names(&dir.path().join("images")).len()), (0, 0));
    assert!(matches!(store.remove("minipod.local/x:1", &HashSet::new()), Err(ImageError::NotFound(_))));
}

#[test]
fn a_root_file_system_needs_a_name() {
    let dir = tempfile::tempdir().expect("tempdir");
    let store = store(dir.path());
    let rootfs = tarball(&[(DIR, "bin", ""), (FILE, "bin/sh", "x")]);
    assert!(matches!(load(&store, dir.path(), &rootfs, ""), Err(ImageError::NeedsName)));
    assert!(matches!(load(&store, dir.path(), &rootfs, "Bad Name"), Err(ImageError::BadReference { .. })));
    let plain = load(&store, dir.path(), &rootfs, "plain").expect("load").remove(0);
    let packed = load(&store, dir.path(), &gzip(&rootfs), "packed").expect("load").remove(0);
    assert_eq!(plain.id, packed.id, "the same content is the same image");
    assert_eq!(store.get("docker.io/library/plain:latest").expect("found").size_bytes, 1);
    assert!(plain.config.env[0].starts_with("PATH=/"));
}

#[test]
fn a_docker_archive_is_read_too() {
    let dir = tempfile::tempdir().expect("tempdir");
    let store = store(dir.path());
    let layer = tarball(&[(FILE, "a", "a")]);
    let config = format!(r#"{{"rootfs":{{"diff_ids":["{}"]}}}}"#, sha(&layer));
    let manifest = r#"[{"Config":"c.json","RepoTags":["app:1"],"Layers":["l/layer.tar"]}]"#;
    let mut tar = Builder::new(Vec::new());
    for (name, bytes) in
        [("c.json", config.as_bytes()), ("l/layer.tar", &layer), ("manifest.json", manifest.as_bytes())]
    {
        let mut header = self::header(FILE, "", "");
        header.set_size(bytes.len() as u64);
        tar.append_data(&mut header, name, bytes).expect("append");
    }
    let archive = tar.into_inner().expect("a tar");
    let image = load(&store, dir.path(), &archive, "").expect("load").remove(0);
    assert_eq!((image.id, image.names), (sha(config.as_bytes()), vec!["docker.io/library/app:1".to_owned()]));
}

#[test]
fn dangerous_entries_are_refused_and_nothing_stays() {
    let dir = tempfile::tempdir().expect("tempdir");
    let store = store(dir.path());
    let outside = dir.path().join("outside");
    fs::create_dir(&outside).expect("create");
    let target = outside.to_str().expect("UTF-8");
    let table: [(&[Item<'_>], &str); 12] = [
        (&[(FILE, "../escape", "x")], "leads out"),
        (&[(FILE, "a/../../escape", "x")], "leads out"),
        (&[(SYMLINK, "a", target), (FILE, "a/b", "x")], "symlink lies on its way"),
        (&[(SYMLINK, "a", ".."), (FILE, "a/b", "x")], "symlink lies on its way"),
        (&[(SYMLINK, "a", "/etc"), (LINK, "b", "a/passwd")], "symlink lies on its way"),
        (&[(LINK, "a", "/etc/passwd")], "absolute"),
        (&[(LINK, "a", "../../../etc/passwd")], "leads out"),
        (&[(LINK, "a", "nothing")], "not in this layer"),
        (&[(EntryType::Char, "dev", "")], "devices"),
        (&[(EntryType::Block, "dev", "")], "devices"),
        (&[(FILE, ".wh...", "")], "names no file"),
        (&[(FILE, "a", "x"), (FILE, "a/b", "x")], "symlink lies on its way"),
    ];
    for (items, part) in table {
        let error = load(&store, dir.path(), &tarball(items), "x").expect_err(part);
        assert!(matches!(error, ImageError::Refused { .. }), "{items:?}: {error}");
        assert!(error.to_string().contains(part), "{items:?}: {error}");
    }
    assert_eq!(names(&outside), [""; 0]);
    assert_eq!((names(&dir.path().join("layers")), store.list()), (vec![], vec![]));
    // An absolute path lands in the layer; a symlink's place can be taken by a file without following it.
    let items = [(SYMLINK, "a", target), (FILE, "/a", "x")];
    let image = load(&store, dir.path(), &tarball(&items), "x").expect("load").remove(0);
    assert_eq!(fs::read(store.lower_dirs(&image)[0].join("a")).expect("a file"), b"x");
}

#[test]
fn what_is_not_what_it_says_is_refused() {
    let dir = tempfile::tempdir().expect("tempdir");
    let store = store(dir.path());
    let layer = tarball(&[(FILE, "a", "content")]);
    let spoil = |what: &'static str, with: fn(&mut Vec<u8>)| {
        let layer_name = format!("blobs/sha256/{}", sha(&layer).hex());
        let change = move |name: &str, bytes: &mut Vec<u8>| {
            let is_layer = name == layer_name;
            let is_it = match what {
                "layer" => is_layer,
                "blob" => name.starts_with("blobs/") && !is_layer,
                other => name == other,
            };
            if is_it {
                with(bytes);
            }
        };
        let archive = oci(std::slice::from_ref(&layer), change);
        load(&store, dir.path(), &archive, "").expect_err(what)
    };
    assert!(matches!(spoil("layer", |bytes| bytes[512] ^= 1), ImageError::DigestMismatch { .. }));
    assert!(matches!(spoil("layer", |bytes| bytes.truncate(700)), ImageError::Malformed(_)));
    assert!(matches!(spoil("blob", |bytes| bytes.push(b' ')), ImageError::DigestMismatch { .. }));
    assert!(matches!(spoil("index.json", |bytes| bytes.truncate(10)), ImageError::Malformed(_)));
    assert!(matches!(spoil("index.json", |bytes| *bytes = b"{}".to_vec()), ImageError::Malformed(_)));
    for garbage in [&b"not a tar"[..], &[7; 2048], &gzip(b"nor this")] {
        let error = load(&store, dir.path(), garbage, "x").expect_err("garbage");
        assert!(matches!(error, ImageError::Malformed(_)), "{error}");
    }
    assert_eq!((names(&dir.path().join("layers")), store.list()), (vec![], vec![]));
}

#[test]
fn bombs_are_stopped_by_what_they_unpack() {
    let dir = tempfile::tempdir().expect("tempdir");
    let limits = Limits { unpacked_bytes: 3 << 20, entries: 20, archive_bytes: 1 << 20, ..Limits::default() };
    let store = open(dir.path(), limits).expect("a store");
    let big = "0".repeat(4 << 20);
    let items: Vec<Item<'_>> = (0..21).map(|_| (FILE, "a", "")).collect();
    let unit = |archive: &[u8]| match load(&store, dir.path(), archive, "x") {
        Err(ImageError::TooBig { unit, .. }) => unit,
        other => panic!("{other:?}"),
    };
    assert_eq!(unit(&gzip(&tarball(&[(FILE, "a", &big)]))), "bytes");
    assert_eq!(unit(&oci(&[gzip(&tarball(&[(FILE, "a", &big)]))], keep)), "bytes");
    assert_eq!(unit(&tarball(&items)), "entries");
    drop(store);
    let store = open(dir.path(), Limits { ratio: 10, ..Limits::default() }).expect("a store");
    let zeros = vec![0; 40 << 20];
    let error = load(&store, dir.path(), &gzip(&zeros), "x").expect_err("a bomb");
    assert!(error.to_string().contains("per compressed byte"), "{error}");
}

#[test]
fn what_a_crash_left_is_gone_at_the_next_start() {
    let dir = tempfile::tempdir().expect("tempdir");
    let layer = tarball(&[(FILE, "a", "a")]);
    let image = load(&store(dir.path()), dir.path(), &oci(&[layer], keep), "").expect("load").remove(0);
    let layers = dir.path().join("layers");
    let half: [PathBuf; 3] =
        [layers.join(".work-0/layer-1/fs"), layers.join("0".repeat(64)).join("fs"), layers.join("junk")];
    half.iter().for_each(|path| fs::create_dir_all(path).expect("create"));
    fs::write(dir.path().join("images/x.new"), b"half").expect("write");
    fs::write(dir.path().join(format!("images/{}.json", "1".repeat(64))), b"{ half").expect("write");
    let store = store(dir.path());
    assert_eq!(names(&layers), [image.layers[0].hex()]);
    assert_eq!(store.list().len(), 1);
    drop(store);
    fs::remove_dir_all(layers.join(image.layers[0].hex())).expect("remove");
    assert_eq!(super::tests::store(dir.path()).list(), [], "an image without its layer is none");
}

#[tokio::test]
async fn an_upload_is_kept_only_when_it_is_whole() {
    let dir = tempfile::tempdir().expect("tempdir");
    let store = open(dir.path(), Limits { archive_bytes: 1 << 20, ..Limits::default() }).expect("a store");
    let archive = oci(&[tarball(&[(FILE, "a", "a")])], keep);
    let chunks = |bytes: &[u8]| -> Vec<std::io::Result<Vec<u8>>> {
        bytes.chunks(1000).map(|chunk| Ok(chunk.to_vec())).collect()
    };
    let upload = |chunks: Vec<std::io::Result<Vec<u8>>>| {
        store.load_stream(futures_util::stream::iter(chunks), LoadOptions::default())
    };
    let mut broken = chunks(&archive[..3000]);
    broken.push(Err(std::io::ErrorKind::BrokenPipe.into()));
    assert!(matches!(upload(broken).await, Err(ImageError::Archive(_))));
    assert!(matches!(upload(chunks(&vec![0; 2 << 20])).await, Err(ImageError::TooBig { .. })));
    assert_eq!(names(&dir.path().join("layers")), [""; 0]);
    assert_eq!(upload(chunks(&archive)).await.expect("load").len(), 1);
    assert_eq!(names(&dir.path().join("layers")).len(), 1);
}
