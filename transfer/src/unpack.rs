//! From frames to files.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use minipod_proto::v1::copy_entry::Kind;
use minipod_proto::v1::copy_frame::Frame;
use minipod_proto::v1::{CopyEntry, CopyLeft};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, fchmod, fstat, fstatat, futimens, mkdirat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, fchownat, linkat, symlinkat, unlinkat};

use crate::base::{Base, is_pseudo, open_below};
use crate::path::{join, leads_out, names, split};
use crate::{MAX_DIRECTORIES, TransferError};

/// What is taken over from the other side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Owners, as far as this thread may give files away.
    pub owners: bool,
    /// Set-uid, set-gid and sticky bits.
    pub special_bits: bool,
    /// Links that lead out of the tree; else they are left out.
    pub links_out: bool,
}

impl Policy {
    /// For what a container says of its files: it must give nobody rights here, and its links must not lead the next command astray.
    /// Owners are kept where the user could set them.
    #[must_use]
    pub fn out_of_container() -> Self {
        Self { owners: nix::unistd::geteuid().is_root(), special_bits: false, links_out: false }
    }

    /// As a container's own tar would do it, if it had one.
    #[must_use]
    pub fn into_container() -> Self {
        Self { owners: true, special_bits: true, links_out: true }
    }
}

/// Makes what is sent, below one directory and nowhere else.
#[derive(Debug)]
pub struct Unpack {
    dir: OwnedFd,
    /// What the tree's root is called there; empty: it is the directory itself.
    name: Vec<u8>,
    policy: Policy,
    file: Option<(File, CopyEntry)>,
    /// The directory of the last entry.
    parent: Option<(Vec<u8>, OwnedFd)>,
    /// Directories that were made; they get their permissions and times at the end.
    made: Vec<CopyEntry>,
    has_root: bool,
    complete: bool,
}

impl Unpack {
    /// To `path`: into it under `name` if it is a directory that exists, else as it. With an empty `name` a directory that exists
    /// gets the tree's content.
    ///
    /// # Errors
    /// When there is no directory that could take it.
    pub fn begin(base: &Base, path: &[u8], name: &[u8], policy: Policy) -> Result<Self, TransferError> {
        let failed = |path: &[u8], error: io::Error| TransferError::io("open", path, error);
        let bad_name = || TransferError::Refused { path: lossy(name), why: "it is no name of a file" };
        if !name.is_empty() && names(name).is_none_or(|names| names.len() != 1) {
            return Err(bad_name());
        }
        let (dir, name) = match base.open(path) {
            Ok(place) if is_dir(&place) => (place, name.to_vec()),
            Ok(_) if name.is_empty() || path.ends_with(b"/") => {
                return Err(TransferError::InTheWay { path: lossy(path), why: "it is no directory" });
            }
            Err(error) if error.raw_os_error() == Some(Errno::ENOTDIR as i32) => {
                return Err(TransferError::InTheWay { path: lossy(path), why: "it is no directory" });
            }
            Err(error) if error.raw_os_error() != Some(Errno::ENOENT as i32) => return Err(failed(path, error)),
            // A file to be replaced, or a new name in a directory that exists.
            _ => {
                let (dir, name) = split(path);
                if name.is_empty() {
                    return Err(failed(path, Errno::ENOENT.into()));
                }
                (base.open(dir).map_err(|error| failed(dir, error))?, name.to_vec())
            }
        };
        if is_pseudo(&dir).map_err(|error| failed(path, error))? {
            return Err(TransferError::Pseudo { path: lossy(path) });
        }
        let (file, parent, made) = (None, None, Vec::new());
        Ok(Self { dir, name, policy, file, parent, made, has_root: false, complete: false })
    }

    /// Takes the next frame; answers what of it was left out.
    ///
    /// # Errors
    /// When it is refused or cannot be made; then the rest is of no use.
    pub fn take(&mut self, frame: Frame) -> Result<Option<CopyLeft>, TransferError> {
        if self.complete {
            return Err(refused(b"", "it comes after the end"));
        }
        match frame {
            Frame::Data(data) => match &mut self.file {
                Some((file, entry)) => {
                    file.write_all(&data).map_err(|error| TransferError::io("write", shown(&entry.path), error))?;
                }
                None => return Err(refused(b"", "content without a file")),
            },
            Frame::Entry(entry) => {
                self.finish_file()?;
                return self.make(entry);
            }
            Frame::Complete(_) => {
                self.finish_file()?;
                self.complete = true;
            }
            // Said by the other side, for the user.
            Frame::Left(left) => return Ok(Some(left)),
            Frame::Start(_) | Frame::Done(_) => return Err(refused(b"", "it is no part of a tree")),
        }
        Ok(None)
    }

    /// Whether the other side has said that this was all.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// Gives directories what they are to have at the end.
    ///
    /// # Errors
    /// When the stream was broken off, or a directory cannot be changed.
    pub fn finish(mut self) -> Result<(), TransferError> {
        if !self.complete || !self.has_root {
            return Err(refused(b"", "the stream was broken off"));
        }
        self.parent = None;
        // The inner ones first: an outer one may become one that cannot be entered.
        for entry in std::mem::take(&mut self.made).into_iter().rev() {
            let failed = |error: io::Error| TransferError::io("set permissions of", shown(&entry.path), error);
            let whole = join(&self.name, &entry.path);
            // Not one that somebody else has put something in the place of.
            let Ok(dir) = open_below(self.dir.as_fd(), &whole, OFlag::O_RDONLY | OFlag::O_DIRECTORY) else { continue };
            self.give_meta(&File::from(dir), &entry).map_err(failed)?;
        }
        Ok(())
    }

    fn make(&mut self, entry: CopyEntry) -> Result<Option<CopyLeft>, TransferError> {
        let kind = Kind::try_from(entry.kind).map_err(|_| refused(&entry.path, "its kind is not known here"))?;
        if entry.path.is_empty() {
            if self.has_root || !matches!(kind, Kind::File | Kind::Directory) {
                return Err(refused(&entry.path, "it has no path"));
            }
            self.has_root = true;
            if self.name.is_empty() {
                // The directory is there and stays as it is.
                let why = "a file cannot become a directory's content";
                return if kind == Kind::Directory { Ok(None) } else { Err(refused(&entry.path, why)) };
            }
        } else if !self.has_root {
            return Err(refused(&entry.path, "it comes before the tree that it is in"));
        }
        let whole = join(&self.name, &entry.path);
        let mut parts = names(&whole).ok_or_else(|| refused(&entry.path, "the path leads out of the tree"))?;
        let name = parts.pop().unwrap_or_default().to_vec();
        let dir = self.parent_of(&parts.join(&b'/'), &entry.path)?;
        match kind {
            Kind::Directory => self.make_dir(dir, &name, entry).map(|()| None),
            Kind::File => self.make_file(dir, &name, entry).map(|()| None),
            Kind::Symlink => self.make_symlink(dir, &name, &entry),
            Kind::HardLink => self.make_hard_link(dir, &name, &entry).map(|()| None),
        }
    }

    fn parent_of(&mut self, path: &[u8], entry: &[u8]) -> Result<OwnedFd, TransferError> {
        let again = |dir: &OwnedFd| dir.try_clone().map_err(|error| TransferError::io("open", shown(entry), error));
        if let Some((known, dir)) = &self.parent
            && known == path
        {
            return again(dir);
        }
        let dir = self.open_dir(path, entry)?;
        let copy = again(&dir)?;
        self.parent = Some((path.to_vec(), dir));
        Ok(copy)
    }

    fn open_dir(&self, path: &[u8], entry: &[u8]) -> Result<OwnedFd, TransferError> {
        let dir = match open_below(self.dir.as_fd(), path, OFlag::O_PATH | OFlag::O_DIRECTORY) {
            Ok(dir) => dir,
            Err(error) => {
                return Err(match error.raw_os_error().map(Errno::from_raw) {
                    Some(Errno::ELOOP) => refused(entry, "a link lies on its way"),
                    Some(Errno::ENOTDIR) => refused(entry, "something else than a directory lies on its way"),
                    Some(Errno::ENOENT) => refused(entry, "its directory is not there"),
                    _ => TransferError::io("open the directory of", shown(entry), error),
                });
            }
        };
        if is_pseudo(&dir).map_err(|error| TransferError::io("look at the directory of", shown(entry), error))? {
            return Err(TransferError::Pseudo { path: shown(entry) });
        }
        Ok(dir)
    }

    fn make_dir(&mut self, dir: OwnedFd, name: &[u8], entry: CopyEntry) -> Result<(), TransferError> {
        match mkdirat(&dir, name, Mode::S_IRWXU) {
            Ok(()) if self.made.len() >= MAX_DIRECTORIES => Err(TransferError::TooMany),
            Ok(()) => {
                self.made.push(entry);
                Ok(())
            }
            // One that is there keeps what it has, and gets more.
            Err(Errno::EEXIST) => match kind_at(dir.as_fd(), name) {
                Some(SFlag::S_IFDIR) => Ok(()),
                _ => Err(TransferError::InTheWay { path: shown(&entry.path), why: "it is there and no directory" }),
            },
            Err(errno) => Err(TransferError::io("make directory", shown(&entry.path), errno)),
        }
    }

    fn make_file(&mut self, dir: OwnedFd, name: &[u8], entry: CopyEntry) -> Result<(), TransferError> {
        let failed = |errno: Errno| TransferError::io("make", shown(&entry.path), errno);
        let flags = OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let file = if make_room(dir.as_fd(), name, &entry)? {
            openat(&dir, name, flags | OFlag::O_CREAT | OFlag::O_EXCL, Mode::S_IRUSR | Mode::S_IWUSR)
        } else {
            // A mount, such as /etc/hosts of a container: it is written in place, and only if it is a file.
            match kind_at(dir.as_fd(), name) {
                Some(SFlag::S_IFREG) => openat(&dir, name, flags | OFlag::O_TRUNC, Mode::empty()),
                _ => Err(Errno::EBUSY),
            }
        };
        self.file = Some((File::from(file.map_err(failed)?), entry));
        Ok(())
    }

    fn finish_file(&mut self) -> Result<(), TransferError> {
        let Some((file, entry)) = self.file.take() else { return Ok(()) };
        let failed = |error: io::Error| TransferError::io("set permissions of", shown(&entry.path), error);
        self.give_meta(&file, &entry).map_err(failed)
    }

    /// Owner before permissions: a change of owner clears set-uid.
    fn give_meta(&self, file: &File, entry: &CopyEntry) -> io::Result<()> {
        if self.policy.owners {
            tolerate(fchown(file.as_fd(), Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid))))?;
        }
        let mask = if self.policy.special_bits { 0o7777 } else { 0o777 };
        tolerate(fchmod(file, Mode::from_bits_truncate(entry.mode & mask)))?;
        tolerate(futimens(file, &time(entry), &time(entry)))
    }

    fn make_symlink(&self, dir: OwnedFd, name: &[u8], entry: &CopyEntry) -> Result<Option<CopyLeft>, TransferError> {
        if entry.link.is_empty() || entry.link.contains(&0) {
            return Err(refused(&entry.path, "the link has no usable text"));
        }
        if !self.policy.links_out && leads_out(&entry.path, &entry.link) {
            let why = format!("it is a link out of what is copied, to {:?}", lossy(&entry.link));
            return Ok(Some(CopyLeft { path: entry.path.clone(), why }));
        }
        let failed = |errno: Errno| TransferError::io("make link", shown(&entry.path), errno);
        if !make_room(dir.as_fd(), name, entry)? {
            return Err(failed(Errno::EBUSY));
        }
        symlinkat(&entry.link[..], &dir, name).map_err(failed)?;
        let meta = || -> io::Result<()> {
            if self.policy.owners {
                let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
                tolerate(fchownat(&dir, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW))?;
            }
            tolerate(utimensat(&dir, name, &time(entry), &time(entry), UtimensatFlags::NoFollowSymlink))
        };
        meta().map_err(|error| TransferError::io("set the owner of", shown(&entry.path), error))?;
        Ok(None)
    }

    fn make_hard_link(&self, dir: OwnedFd, name: &[u8], entry: &CopyEntry) -> Result<(), TransferError> {
        let out = || refused(&entry.path, "the hard link leads out of the tree");
        let whole = join(&self.name, &entry.link);
        let mut parts = names(&whole).filter(|_| !entry.link.is_empty()).ok_or_else(out)?;
        let old = parts.pop().unwrap_or_default();
        let from = self.open_dir(&parts.join(&b'/'), &entry.path)?;
        if kind_at(from.as_fd(), old) != Some(SFlag::S_IFREG) {
            return Err(refused(&entry.path, "the hard link leads to no file of the tree"));
        }
        let failed = |errno: Errno| TransferError::io("link", shown(&entry.path), errno);
        if !make_room(dir.as_fd(), name, entry)? {
            return Err(failed(Errno::EBUSY));
        }
        linkat(&from, old, &dir, name, AtFlags::empty()).map_err(failed)
    }
}

/// Removes what is under a name, but no directory; false when it is a mount and stays.
fn make_room(dir: BorrowedFd<'_>, name: &[u8], entry: &CopyEntry) -> Result<bool, TransferError> {
    match unlinkat(dir, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => Ok(true),
        Err(Errno::EBUSY) => Ok(false),
        Err(Errno::EISDIR | Errno::EPERM) if kind_at(dir, name) == Some(SFlag::S_IFDIR) => {
            Err(TransferError::InTheWay { path: shown(&entry.path), why: "it is there and a directory" })
        }
        Err(errno) => Err(TransferError::io("replace", shown(&entry.path), errno)),
    }
}

fn kind_at(dir: BorrowedFd<'_>, name: &[u8]) -> Option<SFlag> {
    let about = fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW).ok()?;
    Some(SFlag::from_bits_truncate(about.st_mode) & SFlag::S_IFMT)
}

fn is_dir(place: &OwnedFd) -> bool {
    fstat(place).is_ok_and(|about| SFlag::from_bits_truncate(about.st_mode) & SFlag::S_IFMT == SFlag::S_IFDIR)
}

/// Who may not give files away keeps them.
fn tolerate(done: nix::Result<()>) -> io::Result<()> {
    match done {
        Err(Errno::EPERM) => Ok(()),
        done => Ok(done?),
    }
}

fn time(entry: &CopyEntry) -> TimeSpec {
    TimeSpec::new(entry.mtime, i64::from(entry.mtime_nanos.min(999_999_999)))
}

fn refused(path: &[u8], why: &'static str) -> TransferError {
    TransferError::Refused { path: lossy(path), why }
}

/// An entry's path for people; the root's is empty.
fn shown(path: &[u8]) -> String {
    if path.is_empty() { ".".to_owned() } else { lossy(path) }
}

fn lossy(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}
