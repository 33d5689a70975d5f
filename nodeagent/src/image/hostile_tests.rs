//! Layers that mean harm: to what lies outside of them, to memory, to the disk, to whoever removes them. Needs root.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use tar::{Builder, EntryType};

use super::tests::{DIR, FILE, Item, LINK, SYMLINK, gzip, header, keep, load, names, oci, open, store, tarball};
use super::unpack::{Budget, unpack};
use super::*;

/// The same bytes again and again, as if a file of that size lay there.
struct Repeat {
    bytes: Vec<u8>,
    left: u64,
    at: usize,
    read: u64,
}

impl Repeat {
    fn new(bytes: Vec<u8>, times: u64) -> Self {
        Self { left: bytes.len() as u64 * times, bytes, at: 0, read: 0 }
    }
}

impl Read for Repeat {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let rest = &self.bytes[self.at..];
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(rest.len()).min(buffer.len());
        buffer[..most].copy_from_slice(&rest[..most]);
        self.at = (self.at + most) % self.bytes.len();
        self.left -= most as u64;
        self.read += most as u64;
        Ok(most)
    }
}

/// What stops a layer: the limit that it is over, and how many of its bytes were read until then.
fn stopped(mut blob: Repeat, limits: &Limits) -> (&'static str, u64) {
    let dir = tempfile::tempdir().expect("tempdir");
    match unpack(&mut blob, "x", dir.path(), &mut Budget::new(limits)) {
        Err(ImageError::TooBig { unit, .. }) => (unit, blob.read),
        other => panic!("{other:?}"),
    }
}

/// A tar of one file under a path of any length.
fn far(path: &str) -> Vec<u8> {
    let mut tar = Builder::new(Vec::new());
    tar.append_data(&mut header(FILE, "", ""), path, std::io::empty()).expect("append");
    tar.into_inner().expect("a tar")
}

#[test]
fn ten_gigabytes_and_a_million_entries_are_read_as_far_as_the_limits_go() {
    let began = Instant::now();
    // gzip allows members one after the other: ten of a gigabyte are ten times the same.
    let zeros = gzip(&vec![0; 64 << 20]);
    let (unit, read) = stopped(Repeat::new(zeros.clone(), 160), &Limits::default());
    assert_eq!(unit, "bytes per compressed byte");
    assert!(read < 1 << 20, "{read} bytes were read");
    let patient = Limits { ratio: u64::MAX, unpacked_bytes: 100 << 20, ..Limits::default() };
    // A header that promises ten gigabytes, and the zeros to keep the promise.
    let mut big = header(FILE, "big", "");
    big.set_size(10 << 30);
    big.set_cksum();
    let start = gzip(big.as_bytes());
    let mut blob = start.as_slice().chain(Repeat::new(zeros, 160));
    let dir = tempfile::tempdir().expect("tempdir");
    let stopped_at = unpack(&mut blob, "x", dir.path(), &mut Budget::new(&patient)).expect_err("ten gigabytes");
    assert!(matches!(stopped_at, ImageError::TooBig { unit: "bytes", .. }), "{stopped_at}");
    let kept = fs::metadata(dir.path().join("big")).expect("its beginning").len();
    assert!(kept <= 100 << 20, "{kept} bytes on the disk");

    let entry = header(FILE, "a", "").as_bytes().to_vec();
    let few = Limits { entries: 2_000, ..Limits::default() };
    let (unit, read) = stopped(Repeat::new(entry, 1_000_000), &few);
    assert_eq!(unit, "entries");
    assert!(read < 4 << 20, "{read} bytes were read");
    assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
}

#[test]
fn directories_that_a_path_implies_count_as_entries() {
    let dir = tempfile::tempdir().expect("tempdir");
    let limits = Limits { entries: 1_000, ..Limits::default() };
    let store = open(dir.path(), limits).expect("a store");
    let path = |top: &str| format!("{top}/{}file", "d/".repeat(600));
    let one = far(&path("a"));
    load(&store, dir.path(), &one, "x").expect("some hundred are fine");
    // The end of the first archive is cut off, so that the second goes on with it.
    let two = [&one[..one.len() - 1024], &far(&path("b"))[..]].concat();
    match load(&store, dir.path(), &two, "x") {
        Err(ImageError::TooBig { unit: "entries", .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn headers_without_an_entry_and_directories_without_an_end_take_bounded_memory() {
    let dir = tempfile::tempdir().expect("tempdir");
    let limits = Limits { metadata_bytes: 1 << 20, directory_bytes: 64 << 10, ..Limits::default() };
    let store = open(dir.path(), limits).expect("a store");
    // Each is small enough for itself: attributes in a pax header, and headers of the archive as a whole.
    let record = |number: usize| {
        let text = format!(" SCHILY.xattr.user.{number}={}\n", "x".repeat(60_000));
        format!("{}{text}", text.len() + 5)
    };
    for kind in [EntryType::XHeader, EntryType::XGlobalHeader, EntryType::GNULongName] {
        let mut tar = Builder::new(Vec::new());
        for number in 0..40 {
            let text = record(number);
            assert_eq!(text.len(), text.split(' ').next().and_then(|n| n.parse::<usize>().ok()).expect("its length"));
            let mut header = header(kind, "h", "");
            header.set_size(text.len() as u64);
            header.set_cksum();
            tar.append(&header, text.as_bytes()).expect("append");
        }
        tar.append(&header(FILE, "file", ""), std::io::empty()).expect("append");
        let tar = tar.into_inner().expect("a tar");
        for archive in [tar.clone(), oci(&[tar], keep)] {
            match load(&store, dir.path(), &archive, "x") {
                Err(ImageError::TooBig { unit: "header bytes", .. }) => {}
                other => panic!("{kind:?}: {other:?}"),
            }
        }
    }
    // Their times are kept until the layer's end.
    let name = "n".repeat(90);
    let items: Vec<Item<'_>> = (0..1000).map(|_| (DIR, name.as_str(), "")).collect();
    match load(&store, dir.path(), &tarball(&items), "x") {
        Err(ImageError::TooBig { unit, .. }) => assert!(unit.contains("directories"), "{unit}"),
        other => panic!("{other:?}"),
    }
    assert_eq!((names(&dir.path().join("layers")), store.list()), (vec![], vec![]));
}

#[test]
fn a_layer_as_deep_as_paths_go_can_be_refused_and_removed() {
    let dir = tempfile::tempdir().expect("tempdir");
    let deepest = format!("{}file", "d/".repeat(2_000));
    let good = far(&deepest);
    let device = tarball(&[(EntryType::Char, "dev", "")]);
    let bad = [&good[..good.len() - 1024], &device[..]].concat();
    // Whoever removes them has a thread's stack and no more descriptors than a service gets.
    let small = std::thread::Builder::new().stack_size(512 << 10);
    let path = dir.path().to_owned();
    let work = move || {
        let store = store(&path);
        assert!(matches!(load(&store, &path, &bad, "x"), Err(ImageError::Refused { .. })));
        assert_eq!(names(&path.join("layers")), [""; 0]);
        // What was a tree is replaced by a file.
        let replaced = [&good[..good.len() - 1024], &tarball(&[(FILE, "d", "x")])[..]].concat();
        load(&store, &path, &replaced, "y").expect("loaded");
        load(&store, &path, &good, "x").expect("loaded");
        for name in ["x", "y"] {
            store.remove(&format!("docker.io/library/{name}:latest"), &Default::default()).expect("removed");
        }
        assert_eq!(names(&path.join("layers")), [""; 0]);
        // And what a crash left.
        fs::create_dir(path.join("layers/.work-9")).expect("make");
        unpack(&good[..], "x", &path.join("layers/.work-9"), &mut Budget::new(&Limits::default())).expect("unpacked");
        drop(store);
        let _store = super::tests::store(&path);
        assert_eq!(names(&path.join("layers")), [""; 0]);
    };
    small.spawn(work).expect("a thread").join().expect("it does not die of it");
}

#[test]
fn whiteouts_reach_nothing_but_their_own_layer() {
    let dir = tempfile::tempdir().expect("tempdir");
    let store = store(dir.path());
    let outside = dir.path().join("outside");
    fs::create_dir(&outside).expect("create");
    fs::write(outside.join("kept"), "x").expect("write");
    let target = outside.to_str().expect("UTF-8");
    // Through a link of its own layer.
    let table: [(&[Item<'_>], &str); 6] = [
        (&[(SYMLINK, "a", target), (FILE, "a/.wh.kept", "")], "symlink lies on its way"),
        (&[(SYMLINK, "a", target), (FILE, "a/.wh..wh..opq", "")], "symlink lies on its way"),
        (&[(SYMLINK, "a", ".."), (FILE, "a/.wh.layers", "")], "symlink lies on its way"),
        (&[(DIR, "a", ""), (FILE, "a/../.wh.b", "")], "leads out"),
        (&[(FILE, ".wh.", "")], "names no file"),
        (&[(FILE, ".wh..", "")], "names no file"),
    ];
    for (items, part) in table {
        let error = load(&store, dir.path(), &tarball(items), "x").expect_err(part);
        assert!(error.to_string().contains(part), "{items:?}: {error}");
    }
    // Of a parent, of a link that the layer below has, and by a link: the mark is in the upper layer, and that is all.
    let below = tarball(&[(SYMLINK, "l", target), (DIR, "d", ""), (FILE, "d/file", "x"), (SYMLINK, "m", target)]);
    let above = tarball(&[
        (FILE, ".wh.l", ""),
        (FILE, "m/.wh.kept", ""),
        (FILE, "d/file", "y"),
        (FILE, ".wh.d", ""),
        (SYMLINK, ".wh.s", target),
        (LINK, ".wh.h", "d/file"),
        (FILE, ".wh..wh..opq", ""),
        (DIR, ".wh..wh.plnk", ""),
    ]);
    let image = load(&store, dir.path(), &oci(&[below, above], keep), "").expect("load").remove(0);
    let lowers = store.lower_dirs(&image);
    let is_whiteout = |path: &Path| {
        use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
        fs::symlink_metadata(path).is_ok_and(|about| about.file_type().is_char_device() && about.rdev() == 0)
    };
    for gone in ["l", "m/kept", "s", "h"] {
        assert!(is_whiteout(&lowers[0].join(gone)), "{gone}");
    }
    // The layer's own directory stays, and shows nothing of the one below.
    assert_eq!(fs::read(lowers[0].join("d/file")).expect("its own"), b"y");
    assert_eq!(names(&lowers[0]), ["d", "h", "l", "m", "s"]);
    for opaque in ["", "d"] {
        let mark = xattr::get(lowers[0].join(opaque), "trusted.overlay.opaque").expect("xattr");
        assert_eq!(mark.as_deref(), Some(b"y".as_slice()), "{opaque:?}");
    }
    assert_eq!(fs::read_link(lowers[1].join("l")).expect("untouched").to_str(), Some(target));
    assert_eq!(
        (names(&outside), fs::read(outside.join("kept")).expect("kept")),
        (vec!["kept".to_owned()], b"x".to_vec())
    );
    assert_eq!(xattr::get(&outside, "trusted.overlay.opaque").expect("xattr"), None);
}

#[test]
fn marks_of_overlayfs_and_labels_of_the_host_are_not_taken_from_a_layer() {
    let dir = tempfile::tempdir().expect("tempdir");
    let store = store(dir.path());
    let mut tar = Builder::new(Vec::new());
    let names = ["trusted.overlay.opaque", "trusted.overlay.redirect", "security.selinux", "system.posix_acl_access"];
    let records = names.map(|name| (format!("SCHILY.xattr.{name}"), b"y".to_vec()));
    let own = ("SCHILY.xattr.user.own".to_owned(), b"z".to_vec());
    let records: Vec<_> = records.into_iter().chain([own]).collect();
    tar.append_pax_extensions(records.iter().map(|(key, value)| (key.as_str(), value.as_slice()))).expect("append");
    tar.append(&header(DIR, "d", ""), std::io::empty()).expect("append");
    let image = load(&store, dir.path(), &tar.into_inner().expect("a tar"), "x").expect("load").remove(0);
    let place = store.lower_dirs(&image)[0].join("d");
    let kept: Vec<_> = xattr::list(&place).expect("list").filter(|name| name != "security.selinux").collect();
    assert_eq!(kept, ["user.own"]);
}

#[test]
fn a_config_is_bounded_and_its_texts_are_not_repeated_at_length() {
    let dir = tempfile::tempdir().expect("tempdir");
    let store = store(dir.path());
    let huge = "u".repeat(3 << 20);
    let spoil = |with: &'static str, text: String| {
        let layer = tarball(&[(FILE, "a", "a")]);
        oci(&[layer], move |name, bytes| {
            if name.starts_with("blobs/") && bytes.starts_with(b"{\"architecture") {
                *bytes = String::from_utf8_lossy(bytes).replace(with, &text).into_bytes();
            }
        })
    };
    // Its digest is the manifest's matter: these are told before any of it is read as a config.
    let bigger = load(&store, dir.path(), &spoil("A=1", "x".repeat(5 << 20)), "").expect_err("5 MiB");
    assert!(matches!(bigger, ImageError::TooBig { unit: "bytes", .. }), "{bigger}");
    let other = load(&store, dir.path(), &spoil("web", huge.clone()), "").expect_err("not what was promised");
    assert!(matches!(other, ImageError::DigestMismatch { .. }), "{other}");
    let error = user::resolve(&huge, "", "").expect_err("nobody is called that");
    let text = crate::report::chain(&error);
    assert!(text.len() < 4096 && text.starts_with("user \"uuu"), "{} bytes", text.len());
}
