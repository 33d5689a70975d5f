//! Trees that are packed and unpacked on a real file system, and streams of hostile senders.

use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use minipod_proto::v1::copy_entry::Kind;
use minipod_proto::v1::copy_frame::Frame;
use minipod_proto::v1::{CopyEntry, CopyLeft};
use minipod_transfer::{Base, Policy, TransferError, Unpack, pack};

const ALL: Policy = Policy { owners: true, special_bits: true, links_out: true };
const CAREFUL: Policy = Policy { owners: false, special_bits: false, links_out: false };

fn bytes(path: &Path) -> &[u8] {
    path.as_os_str().as_bytes()
}

fn packed(path: &Path) -> Result<Vec<Frame>, TransferError> {
    let mut frames = Vec::new();
    pack(&Base::Process, bytes(path), &mut |frame| {
        frames.push(frame);
        true
    })?;
    Ok(frames)
}

fn unpacked(
    (to, name): (&Path, &str),
    policy: Policy,
    frames: impl IntoIterator<Item = Frame>,
) -> Result<Vec<String>, TransferError> {
    let mut unpack = Unpack::begin(&Base::Process, bytes(to), name.as_bytes(), policy)?;
    let mut left = Vec::new();
    for frame in frames {
        left.extend(unpack.take(frame)?.map(|left| String::from_utf8_lossy(&left.path).into_owned()));
    }
    unpack.finish()?;
    Ok(left)
}

fn entry(path: &str, kind: Kind, link: &str) -> Frame {
    let (path, link) = (path.as_bytes().to_vec().into(), link.as_bytes().to_vec().into());
    Frame::Entry(CopyEntry { path, kind: kind.into(), mode: 0o755, link, ..CopyEntry::default() })
}

fn data(text: &str) -> Frame {
    Frame::Data(text.as_bytes().to_vec().into())
}

#[test]
fn a_tree_comes_over_with_all_that_it_has() {
    let dir = tempfile::tempdir().expect("tempdir");
    let from = dir.path().join("from");
    fs::create_dir_all(from.join("deep/er/and/er")).expect("make");
    let big: Vec<u8> = (0..3_000_000_u32).map(|number| (number % 251) as u8).collect();
    fs::write(from.join("deep/big"), &big).expect("write");
    fs::write(from.join("empty"), "").expect("write");
    fs::write(from.join(std::ffi::OsStr::from_bytes(b"\xff odd \n name")), "odd").expect("write");
    fs::hard_link(from.join("deep/big"), from.join("deep/er/same")).expect("link");
    symlink("../empty", from.join("deep/link")).expect("link");
    symlink("/nowhere", from.join("absolute")).expect("link");
    nix::unistd::mkfifo(&from.join("pipe"), nix::sys::stat::Mode::S_IRWXU).expect("pipe");
    let _socket = std::os::unix::net::UnixListener::bind(from.join("socket")).expect("socket");
    for (name, mode) in [("empty", 0o600), ("deep/big", 0o4751), ("deep/er/and", 0o500), ("deep/er", 0o1777)] {
        fs::set_permissions(from.join(name), fs::Permissions::from_mode(mode)).expect("mode");
    }
    std::os::unix::fs::chown(from.join("empty"), Some(1234), Some(2345)).expect("owner (needs root)");
    let long_ago = fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(86_400));
    fs::File::open(from.join("empty")).expect("open").set_times(long_ago).expect("time");

    let to = dir.path().join("to");
    fs::create_dir(&to).expect("make");
    let mut left = unpacked((&to, "from"), ALL, packed(&from).expect("packed")).expect("unpacked");
    left.sort();
    assert_eq!(left, ["pipe", "socket"]);
    let to = to.join("from");
    assert!(fs::read(to.join("deep/big")).expect("read") == big);
    assert_eq!(fs::read(to.join(std::ffi::OsStr::from_bytes(b"\xff odd \n name"))).expect("read"), b"odd");
    assert_eq!(fs::read_link(to.join("deep/link")).expect("link"), Path::new("../empty"));
    assert_eq!(fs::read_link(to.join("absolute")).expect("link"), Path::new("/nowhere"));
    let about = |name: &str| fs::symlink_metadata(to.join(name)).expect(name);
    assert_eq!(about("deep/big").ino(), about("deep/er/same").ino());
    for (name, mode) in [("empty", 0o600), ("deep/big", 0o4751), ("deep/er/and", 0o500), ("deep/er", 0o1777)] {
        assert_eq!(about(name).mode() & 0o7777, mode, "{name}");
    }
    assert_eq!((about("empty").uid(), about("empty").gid(), about("empty").mtime()), (1234, 2345, 86_400));

    // Again, over what is there: it is replaced, and what is more there stays.
    fs::write(to.join("more"), "more").expect("write");
    fs::write(to.join("empty"), "no more").expect("write");
    unpacked((dir.path().join("to").as_path(), "from"), ALL, packed(&from).expect("packed")).expect("unpacked");
    assert_eq!(
        (fs::read(to.join("more")).expect("read"), fs::read(to.join("empty")).expect("read")),
        (b"more".to_vec(), vec![])
    );

    // To one who is careful.
    let mut left = unpacked((dir.path(), "careful"), CAREFUL, packed(&from).expect("packed")).expect("unpacked");
    left.sort();
    assert_eq!(left, ["absolute", "pipe", "socket"]);
    let about = |name: &str| fs::symlink_metadata(dir.path().join("careful").join(name)).expect(name);
    assert_eq!((about("deep/big").mode() & 0o7777, about("empty").uid()), (0o751, 0));
    assert!(dir.path().join("careful/deep/link").is_symlink());
}

#[test]
fn names_are_those_of_cp() {
    let dir = tempfile::tempdir().expect("tempdir");
    let at = |name: &str| dir.path().join(name);
    fs::write(at("file"), "content").expect("write");
    fs::create_dir_all(at("tree/sub")).expect("make");
    fs::create_dir(at("there")).expect("make");
    let copy = |from: &str, to: &str, name: &str| unpacked((&at(to), name), ALL, packed(&at(from)).expect("packed"));
    copy("file", "new", "file").expect("a new name");
    copy("file", "there", "file").expect("into a directory");
    copy("file", "there/", "file").expect("the same");
    copy("tree", "fresh", "tree").expect("a tree under a new name");
    copy("tree", "there", "tree").expect("a tree into a directory");
    copy("tree", "there", "").expect("its content into a directory");
    for name in ["new", "there/file", "fresh/sub", "there/tree/sub", "there/sub"] {
        assert!(at(name).exists(), "{name}");
    }
    for (from, to, name, part) in [
        ("file", "none/x", "file", "open"),
        ("file", "new/", "file", "no directory"),
        ("tree", "new", "tree", "no directory"),
        ("file", "there", "", "content"),
        ("file", "there", "a/b", "no name"),
        ("file", "there", "..", "no name"),
    ] {
        let error = copy(from, to, name).expect_err(to).to_string();
        assert!(error.contains(part), "{from} to {to}: {error}");
    }
    // A file does not replace a directory.
    assert!(copy("file", "there", "tree").expect_err("in the way").to_string().contains("directory"));
    assert!(matches!(packed(Path::new("/proc/1")), Err(TransferError::Pseudo { .. })));
    assert!(matches!(packed(Path::new("/dev/null")), Err(TransferError::Kind { .. })));
    assert!(matches!(unpacked((Path::new("/proc/self"), "x"), ALL, []), Err(TransferError::Pseudo { .. })));
}

#[test]
fn a_hostile_stream_makes_nothing_outside() {
    let outside = tempfile::tempdir().expect("tempdir");
    fs::write(outside.path().join("file"), "untouched").expect("write");
    let out = outside.path().to_str().expect("UTF-8").to_owned();
    let root = || entry("", Kind::Directory, "");
    let link_then =
        |then: Frame| vec![root(), entry("l", Kind::Symlink, &out), then, data("evil"), Frame::Complete(true)];
    let cases: Vec<(&str, Vec<Frame>)> = vec![
        ("up", vec![root(), entry("../x", Kind::File, ""), data("evil"), Frame::Complete(true)]),
        ("up within", vec![root(), entry("a/../../x", Kind::File, ""), data("evil"), Frame::Complete(true)]),
        ("absolute", vec![root(), entry(&format!("{out}/x"), Kind::File, ""), data("evil"), Frame::Complete(true)]),
        ("NUL", vec![root(), entry("a\0b", Kind::File, ""), Frame::Complete(true)]),
        ("through a link", link_then(entry("l/x", Kind::File, ""))),
        ("a directory through a link", link_then(entry("l/d", Kind::Directory, ""))),
        (
            "a directory over a link",
            vec![root(), entry("l", Kind::Symlink, &out), entry("l", Kind::Directory, ""), Frame::Complete(true)],
        ),
        ("a hard link through a link", link_then(entry("h", Kind::HardLink, "l/file"))),
        ("a hard link up", vec![root(), entry("h", Kind::HardLink, "../file"), Frame::Complete(true)]),
        (
            "an absolute hard link",
            vec![root(), entry("h", Kind::HardLink, &format!("{out}/file")), Frame::Complete(true)],
        ),
        (
            "a hard link to a link",
            vec![root(), entry("l", Kind::Symlink, "x"), entry("h", Kind::HardLink, "l"), Frame::Complete(true)],
        ),
        ("no root", vec![entry("x", Kind::File, ""), Frame::Complete(true)]),
        ("two roots", vec![root(), root(), Frame::Complete(true)]),
        ("a link as root", vec![entry("", Kind::Symlink, &out), Frame::Complete(true)]),
        ("content of nothing", vec![data("evil"), Frame::Complete(true)]),
        ("after the end", vec![root(), Frame::Complete(true), entry("x", Kind::File, "")]),
        ("broken off", vec![root(), entry("x", Kind::File, ""), data("half")]),
        ("nothing", vec![]),
        (
            "an unknown kind",
            vec![
                root(),
                Frame::Entry(CopyEntry { path: "x".into(), kind: 99, ..CopyEntry::default() }),
                Frame::Complete(true),
            ],
        ),
        ("a missing directory", vec![root(), entry("a/b", Kind::File, ""), Frame::Complete(true)]),
    ];
    for (what, frames) in cases {
        let dir = tempfile::tempdir().expect("tempdir");
        let error = unpacked((dir.path(), "tree"), ALL, frames).expect_err(what);
        assert!(matches!(error, TransferError::Refused { .. } | TransferError::InTheWay { .. }), "{what}: {error:?}");
        let names: Vec<_> =
            fs::read_dir(outside.path()).expect("list").flatten().map(|found| found.file_name()).collect();
        assert_eq!(names, ["file"], "{what}");
        assert_eq!(fs::read(outside.path().join("file")).expect("read"), b"untouched", "{what}");
        assert!(!dir.path().join("x").exists(), "{what}");
    }
    // A file over a link replaces the link.
    let dir = tempfile::tempdir().expect("tempdir");
    let over = vec![
        root(),
        entry("l", Kind::Symlink, &format!("{out}/file")),
        entry("l", Kind::File, ""),
        data("new"),
        Frame::Complete(true),
    ];
    unpacked((dir.path(), "tree"), ALL, over).expect("unpacked");
    assert_eq!(fs::read(dir.path().join("tree/l")).expect("read"), b"new");
    assert_eq!(fs::read(outside.path().join("file")).expect("read"), b"untouched");
    // And to one who is careful, links out are not made at all; those that could only seem to stay are none the less.
    let dir = tempfile::tempdir().expect("tempdir");
    let links = vec![
        root(),
        entry("d", Kind::Symlink, "."),
        entry("l", Kind::Symlink, "d/.."),
        entry("m", Kind::Symlink, &out),
        entry("fine", Kind::Symlink, "d/x"),
        Frame::Left(CopyLeft { path: "other".into(), why: "told".into() }),
        Frame::Complete(true),
    ];
    assert_eq!(unpacked((dir.path(), "tree"), CAREFUL, links).expect("unpacked"), ["l", "m", "other"]);
}

#[test]
fn what_is_exchanged_while_it_is_read_leads_nowhere_else() {
    let dir = tempfile::tempdir().expect("tempdir");
    let secret = dir.path().join("secret");
    fs::create_dir(&secret).expect("make");
    fs::write(secret.join("file"), "secret").expect("write");
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("part")).expect("make");
    fs::write(tree.join("part/file"), "open").expect("write");
    symlink(&secret, tree.join("link")).expect("link");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // As a program in the container would do it.
        scope.spawn(|| {
            let (part, link) = (tree.join("part"), tree.join("link"));
            while !done.load(Ordering::Relaxed) {
                let flags = nix::fcntl::RenameFlags::RENAME_EXCHANGE;
                let _ = nix::fcntl::renameat2(nix::fcntl::AT_FDCWD, &part, nix::fcntl::AT_FDCWD, &link, flags);
            }
        });
        let mut seen = 0;
        for round in 0..3_000 {
            let frames = packed(&tree).expect("packed");
            seen += frames.iter().filter(|frame| **frame == data("open")).count();
            assert!(!frames.contains(&data("secret")), "in round {round}");
        }
        done.store(true, Ordering::Relaxed);
        assert!(seen > 0, "the directory was never there");
    });
}

#[test]
fn links_of_a_container_lead_about_in_it() {
    let dir = tempfile::tempdir().expect("tempdir");
    let root = dir.path().join("root");
    fs::create_dir_all(root.join("etc")).expect("make");
    fs::write(root.join("etc/passwd"), "the container's").expect("write");
    symlink("/etc/passwd", root.join("to-file")).expect("link");
    symlink("/etc", root.join("to-dir")).expect("link");
    symlink("../../../../../..", root.join("up")).expect("link");
    let base = || Base::Root(fs::File::open(&root).expect("open").into());
    let read = |path: &str| {
        let mut text = Vec::new();
        pack(&base(), path.as_bytes(), &mut |frame| {
            if let Frame::Data(data) = frame {
                text.extend_from_slice(&data);
            }
            true
        })?;
        Ok::<_, TransferError>(String::from_utf8(text).expect("UTF-8"))
    };
    for path in ["/etc/passwd", "/to-file", "/to-dir/passwd", "/up/etc/passwd", "/../../etc/passwd"] {
        assert_eq!(read(path).expect(path), "the container's", "{path}");
    }
    assert!(read("/root").is_err(), "that is a name of the node's alone");
    let mut unpack = Unpack::begin(&base(), b"/to-dir", b"new", ALL).expect("begin");
    for frame in [entry("", Kind::File, ""), data("written"), Frame::Complete(true)] {
        unpack.take(frame).expect("taken");
    }
    unpack.finish().expect("finished");
    assert_eq!(fs::read(root.join("etc/new")).expect("read"), b"written");
    // Nobody takes the frames: it ends.
    assert!(matches!(pack(&base(), b"/", &mut |_| false), Err(TransferError::Gone)));
}
