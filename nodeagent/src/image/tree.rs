//! Making files below one directory and never anywhere else: every path is resolved from the directory's descriptor by the kernel
//! with `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS`, the last part is never followed.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, OpenHow, ResolveFlag, open, openat, openat2};
use nix::sys::stat::{FileStat, Mode, SFlag, UtimensatFlags, fchmod, fstatat, futimens, mkdirat, mknodat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, fchownat, linkat, symlinkat, unlinkat};

/// Owner, permissions, time and attributes of a file.
#[derive(Debug)]
pub(super) struct Meta<'a> {
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Permission bits, with setuid, setgid and sticky.
    pub(super) mode: u32,
    pub(super) mtime: TimeSpec,
    pub(super) xattrs: Vec<(&'a OsStr, &'a [u8])>,
}

/// A directory of the tree, open.
#[derive(Debug)]
pub(super) struct Dir(OwnedFd);

/// What there is under a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    Nothing,
    Dir,
    /// Overlay's mark that the layers below have this name no more.
    Whiteout,
    Other,
}

impl Dir {
    /// The top of a tree.
    pub(super) fn top(path: &Path) -> io::Result<Self> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        Ok(Self(open(path, flags, Mode::empty())?))
    }

    /// A directory below this one by its relative path, which may be empty. Fails with `ELOOP` at a symlink.
    pub(super) fn open(&self, path: &[u8]) -> io::Result<Self> {
        let how = OpenHow::new()
            .flags(OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
        let path = if path.is_empty() { b"." } else { path };
        loop {
            match openat2(&self.0, path, how) {
                // The kernel lost a race against a rename elsewhere.
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                result => return Ok(Self(result?)),
            }
        }
    }

    /// The same, and makes (0755, root) what is missing; also says how many directories that were.
    pub(super) fn open_or_make(&self, path: &[u8]) -> io::Result<(Self, u64)> {
        match self.open(path) {
            Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => {}
            result => return Ok((result?, 0)),
        }
        let (mut dir, mut made) = (self.open(b"")?, 0);
        for name in path.split(|b| *b == b'/') {
            if dir.find(name)? == Found::Nothing {
                dir.make_dir(name)?;
                made += 1;
            }
            dir = dir.open(name)?;
        }
        Ok((dir, made))
    }

    /// What the name stands for here.
    pub(super) fn find(&self, name: &[u8]) -> io::Result<Found> {
        Ok(match self.stat(name)? {
            None => Found::Nothing,
            Some(stat) => match SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT {
                SFlag::S_IFDIR => Found::Dir,
                SFlag::S_IFCHR if stat.st_rdev == 0 => Found::Whiteout,
                _ => Found::Other,
            },
        })
    }

    /// `lstat`; `None` when there is nothing.
    pub(super) fn stat(&self, name: &[u8]) -> io::Result<Option<FileStat>> {
        match fstatat(&self.0, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::ENOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// An empty directory, 0755.
    pub(super) fn make_dir(&self, name: &[u8]) -> io::Result<Self> {
        mkdirat(&self.0, name, Mode::from_bits_truncate(0o755))?;
        let dir = self.open(name)?;
        // The umask has its say in mkdir.
        fchmod(&dir.0, Mode::from_bits_truncate(0o755))?;
        Ok(dir)
    }

    /// A new file, open for writing.
    pub(super) fn make_file(&self, name: &[u8]) -> io::Result<File> {
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        Ok(File::from(openat(&self.0, name, flags, Mode::from_bits_truncate(0o600))?))
    }

    /// A regular file, for reading.
    pub(super) fn open_file(&self, name: &[u8]) -> io::Result<File> {
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        Ok(File::from(openat(&self.0, name, flags, Mode::empty())?))
    }

    /// Whether nothing of the layers below shows in this directory.
    pub(super) fn is_opaque(&self) -> bool {
        use xattr::FileExt as _;
        let mark = self.0.try_clone().and_then(|fd| File::from(fd).get_xattr("trusted.overlay.opaque"));
        mark.is_ok_and(|mark| mark.is_some())
    }

    /// A symlink; its text is not looked at.
    pub(super) fn make_symlink(&self, name: &[u8], text: &[u8]) -> io::Result<()> {
        Ok(symlinkat(text, &self.0, name)?)
    }

    /// Another name for what `from/old` is; a symlink is not followed.
    pub(super) fn make_link(&self, name: &[u8], from: &Self, old: &[u8]) -> io::Result<()> {
        Ok(linkat(&from.0, old, &self.0, name, AtFlags::empty())?)
    }

    /// A named pipe.
    pub(super) fn make_fifo(&self, name: &[u8]) -> io::Result<()> {
        Ok(mknodat(&self.0, name, SFlag::S_IFIFO, Mode::from_bits_truncate(0o600), 0)?)
    }

    /// Overlay's mark that the name is gone.
    pub(super) fn make_whiteout(&self, name: &[u8]) -> io::Result<()> {
        Ok(mknodat(&self.0, name, SFlag::S_IFCHR, Mode::empty(), 0)?)
    }

    /// Overlay's mark that nothing of the layers below shows in this directory.
    pub(super) fn make_opaque(&self) -> io::Result<()> {
        use xattr::FileExt as _;
        File::from(self.0.try_clone()?).set_xattr("trusted.overlay.opaque", b"y")
    }

    /// Removes whatever the name stands for, a directory with all that is in it.
    pub(super) fn remove(&self, name: &[u8]) -> io::Result<()> {
        match unlinkat(&self.0, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(Errno::EISDIR) => {
                crate::remove::content(&self.open(name)?.0)?;
                Ok(unlinkat(&self.0, name, UnlinkatFlags::RemoveDir)?)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Owner and permissions of this directory, attributes too. Not the time: its entries would change it again.
    pub(super) fn set_meta(&self, meta: &Meta<'_>) -> io::Result<()> {
        set_meta(&File::from(self.0.try_clone()?), meta)
    }

    /// The time of this directory.
    pub(super) fn set_mtime(&self, mtime: TimeSpec) -> io::Result<()> {
        Ok(futimens(&self.0, &mtime, &mtime)?)
    }

    /// Owner and time of a symlink or pipe; permissions too where they exist.
    pub(super) fn set_meta_of(&self, name: &[u8], meta: &Meta<'_>, has_mode: bool) -> io::Result<()> {
        let (uid, gid) = (Some(Uid::from_raw(meta.uid)), Some(Gid::from_raw(meta.gid)));
        fchownat(&self.0, name, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        if has_mode {
            // A pipe opened like this (without reading or writing) does not block, and cannot be a symlink.
            let pipe = openat(&self.0, name, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())?;
            let path = format!("/proc/self/fd/{}", pipe.as_raw_fd());
            let mode = Mode::from_bits_truncate(meta.mode);
            nix::sys::stat::fchmodat(AT_FDCWD, path.as_str(), mode, nix::sys::stat::FchmodatFlags::FollowSymlink)?;
        }
        Ok(utimensat(&self.0, name, &meta.mtime, &meta.mtime, UtimensatFlags::NoFollowSymlink)?)
    }
}

/// All of a file's metadata. The order matters: a change of owner clears setuid and capabilities.
pub(super) fn set_file_meta(file: &File, meta: &Meta<'_>) -> io::Result<()> {
    set_meta(file, meta)?;
    Ok(futimens(file, &meta.mtime, &meta.mtime)?)
}

fn set_meta(file: &File, meta: &Meta<'_>) -> io::Result<()> {
    use xattr::FileExt as _;
    fchown(file.as_fd(), Some(Uid::from_raw(meta.uid)), Some(Gid::from_raw(meta.gid)))?;
    fchmod(file, Mode::from_bits_truncate(meta.mode))?;
    for (name, value) in &meta.xattrs {
        file.set_xattr(name, value)?;
    }
    Ok(())
}
