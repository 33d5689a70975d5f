//! Removing what containers and images have made: trees as deep and as wide as they like.
//!
//! std's `remove_dir_all` goes down by recursion and keeps a descriptor for every level. Directories in directories cost a container nothing, and
//! a tree of some thousand levels would end the agent that removes it, by its stack or by its descriptors, and every agent after it.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, RenameFlags, ResolveFlag, open, openat2, renameat2};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

/// Levels that are gone down; what lies deeper is moved up to the top first. Each takes a descriptor and one call.
const MAX_DEPTH: usize = 32;

/// Removes a directory with everything in it. Follows no link and enters nothing that is mounted.
///
/// # Errors
/// When the directory is not there, something is mounted in it, or the file system refuses; then a part of it is gone.
pub fn tree(path: &Path) -> io::Result<()> {
    let top = open(path, directory() | OFlag::O_NOFOLLOW, Mode::empty())?;
    content(&top)?;
    std::fs::remove_dir(path)
}

/// Removes everything in a directory, as [`tree`] does.
///
/// # Errors
/// As [`tree`].
pub fn content(top: &OwnedFd) -> io::Result<()> {
    let mut remover = Remover { top: top.as_fd(), moved: 0 };
    // What was moved up behind the reader's back is found by the next look.
    while remover.empty(top, 0)? {}
    Ok(())
}

fn directory() -> OFlag {
    OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC
}

/// A description of its own, whose position is at the beginning.
fn dup(dir: impl AsFd) -> io::Result<OwnedFd> {
    below(dir.as_fd(), c".")
}

fn below(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<OwnedFd> {
    let only = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV;
    loop {
        match openat2(dir, name, OpenHow::new().flags(directory() | OFlag::O_NOFOLLOW).resolve(only)) {
            // The kernel lost a race against a rename elsewhere.
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            result => return Ok(result?),
        }
    }
}

struct Remover<'a> {
    top: BorrowedFd<'a>,
    /// Directories that were moved up: names them.
    moved: u64,
}

impl Remover<'_> {
    /// Removes what a look into the directory finds; answers whether that was anything.
    fn empty(&mut self, dir: &OwnedFd, depth: usize) -> io::Result<bool> {
        let mut found = false;
        for entry in Dir::from_fd(dup(dir)?)?.iter() {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            found = true;
            match unlinkat(dir, name, UnlinkatFlags::NoRemoveDir) {
                Ok(()) | Err(Errno::ENOENT) => {}
                Err(Errno::EISDIR) => self.remove_dir(dir, name, depth)?,
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(found)
    }

    fn remove_dir(&mut self, parent: &OwnedFd, name: &CStr, depth: usize) -> io::Result<()> {
        loop {
            match unlinkat(parent, name, UnlinkatFlags::RemoveDir) {
                Err(Errno::ENOTEMPTY | Errno::EEXIST) if depth < MAX_DEPTH => {
                    self.empty(&below(parent.as_fd(), name)?, depth + 1)?;
                }
                Err(Errno::ENOTEMPTY | Errno::EEXIST) => return self.move_up(parent, name),
                Ok(()) | Err(Errno::ENOENT) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn move_up(&mut self, parent: &OwnedFd, name: &CStr) -> io::Result<()> {
        loop {
            self.moved += 1;
            let new = format!(".moved-up-{}", self.moved);
            match renameat2(parent, name, self.top, new.as_str(), RenameFlags::RENAME_NOREPLACE) {
                Err(Errno::EEXIST) => {}
                done => return Ok(done?),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use nix::fcntl::openat;
    use nix::sys::stat::mkdirat;

    use super::*;

    /// Directories in directories, each made from the one above it: no path leads to the last.
    fn deep(at: &Path, levels: usize) {
        let mut dir = open(at, directory(), Mode::empty()).expect("open");
        for _ in 0..levels {
            mkdirat(&dir, "d", Mode::S_IRWXU).expect("make");
            dir = openat(&dir, "d", directory(), Mode::empty()).expect("open");
            drop(openat(&dir, "f", OFlag::O_CREAT | OFlag::O_WRONLY, Mode::S_IRUSR).expect("make"));
        }
    }

    #[test]
    fn a_tree_that_no_path_reaches_goes_with_a_small_stack_and_few_descriptors() {
        let dir = tempfile::tempdir().expect("tempdir");
        let top = dir.path().join("top");
        std::fs::create_dir(&top).expect("make");
        for at in ["a", ".moved-up-1", "b"] {
            std::fs::create_dir(top.join(at)).expect("make");
            deep(&top.join(at), 3000);
        }
        let small = std::thread::Builder::new().stack_size(256 << 10);
        let removed = small.spawn(move || (tree(&top), top)).expect("a thread");
        let (removed, top) = removed.join().expect("it does not die of it");
        removed.expect("removed");
        assert!(!top.exists());
    }

    #[test]
    fn links_are_removed_and_not_followed() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (top, outside) = (dir.path().join("top"), dir.path().join("outside"));
        std::fs::create_dir_all(top.join("a/b")).expect("make");
        std::fs::create_dir(&outside).expect("make");
        std::fs::write(outside.join("kept"), "x").expect("write");
        std::fs::write(top.join("a/file"), "x").expect("write");
        symlink(&outside, top.join("a/dir-link")).expect("link");
        symlink(outside.join("kept"), top.join("a/b/file-link")).expect("link");
        symlink(&top, top.join("loop")).expect("link");
        let link = dir.path().join("link");
        symlink(&outside, &link).expect("link");
        assert!(tree(&link).is_err(), "a link is no tree");
        tree(&top).expect("removed");
        assert!(!top.exists() && outside.join("kept").exists());
        assert_eq!(tree(&top).expect_err("gone").kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn what_is_mounted_is_not_entered() {
        use nix::mount::{MntFlags, MsFlags, mount, umount2};
        let dir = tempfile::tempdir().expect("tempdir");
        let inside = dir.path().join("top/mounted");
        std::fs::create_dir_all(&inside).expect("make");
        mount(Some("tmpfs"), &inside, Some("tmpfs"), MsFlags::empty(), None::<&str>).expect("mount (needs root)");
        std::fs::write(inside.join("kept"), "x").expect("write");
        let refused = tree(&dir.path().join("top"));
        let kept = inside.join("kept").exists();
        umount2(&inside, MntFlags::MNT_DETACH).expect("unmount");
        assert!(refused.is_err() && kept, "{refused:?}");
        tree(&dir.path().join("top")).expect("removed");
    }
}
