//! From files to frames.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};

use minipod_proto::v1::copy_entry::Kind;
use minipod_proto::v1::copy_frame::Frame;
use minipod_proto::v1::{CopyEntry, CopyLeft};
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat};

use crate::base::{Base, is_pseudo, open_below};
use crate::path::join;
use crate::{MAX_DATA_BYTES, MAX_DIRECTORIES, TransferError};

/// Files with several names that are remembered; further ones are sent as files of their own.
const MAX_LINKED: usize = 100_000;

/// Sends what the path leads to, a directory with all that is below it, and `complete` at the end. `emit` answers false when nobody
/// takes any more.
///
/// What cannot be read, and what is no file, directory or link, is left out with a [`CopyLeft`].
///
/// # Errors
/// When what the path leads to cannot be read itself, or nobody takes the frames.
pub fn pack(base: &Base, path: &[u8], emit: &mut dyn FnMut(Frame) -> bool) -> Result<(), TransferError> {
    let place = base.open(path).map_err(|error| TransferError::io("open", path, error))?;
    let about = fstat(&place).map_err(|error| TransferError::io("look at", path, error))?;
    let shown = || String::from_utf8_lossy(path).into_owned();
    if is_pseudo(&place).map_err(|error| TransferError::io("look at", path, error))? {
        return Err(TransferError::Pseudo { path: shown() });
    }
    let mut packer = Packer { emit, linked: HashMap::new(), buffer: vec![0; MAX_DATA_BYTES] };
    match kind(&about) {
        SFlag::S_IFREG => {
            let file = reopen(&place, OFlag::O_RDONLY).map_err(|error| TransferError::io("open", path, error))?;
            packer.entry(b"", &about, Kind::File, Vec::new())?;
            packer.content(b"", file)?;
        }
        SFlag::S_IFDIR => {
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
            let top = reopen(&place, flags).map_err(|error| TransferError::io("open", path, error))?;
            packer.tree(top.as_fd())?;
        }
        _ => return Err(TransferError::Kind { path: shown() }),
    }
    packer.send(Frame::Complete(true))
}

/// The same file, opened in another way. The descriptor is one of ours: there is no path to be exchanged.
fn reopen(place: &OwnedFd, flags: OFlag) -> nix::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", place.as_raw_fd());
    open(path.as_str(), flags | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC, Mode::empty())
}

fn kind(about: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(about.st_mode) & SFlag::S_IFMT
}

struct Packer<'a> {
    emit: &'a mut dyn FnMut(Frame) -> bool,
    /// The first path of files that have several.
    linked: HashMap<(u64, u64), Vec<u8>>,
    buffer: Vec<u8>,
}

impl Packer<'_> {
    fn send(&mut self, frame: Frame) -> Result<(), TransferError> {
        if (self.emit)(frame) { Ok(()) } else { Err(TransferError::Gone) }
    }

    fn leave(&mut self, path: &[u8], why: impl Into<String>) -> Result<(), TransferError> {
        self.send(Frame::Left(CopyLeft { path: path.to_vec().into(), why: why.into() }))
    }

    fn entry(&mut self, path: &[u8], about: &FileStat, kind: Kind, link: Vec<u8>) -> Result<(), TransferError> {
        self.send(Frame::Entry(CopyEntry {
            path: path.to_vec().into(),
            kind: kind.into(),
            mode: about.st_mode & 0o7777,
            uid: about.st_uid,
            gid: about.st_gid,
            mtime: about.st_mtime,
            mtime_nanos: u32::try_from(about.st_mtime_nsec).unwrap_or(0),
            link: link.into(),
        }))
    }

    fn tree(&mut self, top: BorrowedFd<'_>) -> Result<(), TransferError> {
        let mut waiting = vec![Vec::new()];
        let mut count = 0;
        while let Some(path) = waiting.pop() {
            count += 1;
            if count > MAX_DIRECTORIES || waiting.len() > MAX_DIRECTORIES {
                return Err(TransferError::TooMany);
            }
            let dir = match open_below(top, &path, OFlag::O_RDONLY | OFlag::O_DIRECTORY) {
                Ok(dir) => dir,
                Err(error) => {
                    self.leave(&path, error.to_string())?;
                    continue;
                }
            };
            match (fstat(&dir), is_pseudo(&dir)) {
                (Ok(about), Ok(false)) => self.entry(&path, &about, Kind::Directory, Vec::new())?,
                (Ok(_), Ok(true)) => {
                    self.leave(&path, "it lies on a file system of the kernel's")?;
                    continue;
                }
                (Err(errno), _) => {
                    self.leave(&path, errno.desc())?;
                    continue;
                }
                (_, Err(error)) => {
                    self.leave(&path, error.to_string())?;
                    continue;
                }
            }
            self.directory(&path, dir, &mut waiting)?;
        }
        Ok(())
    }

    fn directory(&mut self, path: &[u8], dir: OwnedFd, waiting: &mut Vec<Vec<u8>>) -> Result<(), TransferError> {
        let mut listing = match dir.try_clone().map_err(|_| Errno::EMFILE).and_then(Dir::from_fd) {
            Ok(listing) => listing,
            Err(errno) => return self.leave(path, errno.desc()),
        };
        for found in listing.iter() {
            let name = match &found {
                Ok(found) => found.file_name().to_bytes(),
                Err(errno) => return self.leave(path, errno.desc()),
            };
            if matches!(name, b"." | b"..") {
                continue;
            }
            let whole = join(path, name);
            match fstatat(&dir, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
                Ok(about) if kind(&about) == SFlag::S_IFDIR => waiting.push(whole),
                Ok(about) => self.leaf(dir.as_fd(), (name, &whole), &about)?,
                // Removed in between.
                Err(Errno::ENOENT) => {}
                Err(errno) => self.leave(&whole, errno.desc())?,
            }
        }
        Ok(())
    }

    fn leaf(
        &mut self,
        dir: BorrowedFd<'_>,
        (name, path): (&[u8], &[u8]),
        about: &FileStat,
    ) -> Result<(), TransferError> {
        match kind(about) {
            SFlag::S_IFLNK => match readlinkat(dir, name) {
                Ok(text) => self.entry(path, about, Kind::Symlink, text.into_encoded_bytes()),
                Err(errno) => self.leave(path, errno.desc()),
            },
            SFlag::S_IFREG => {
                if about.st_nlink > 1 {
                    if let Some(first) = self.linked.get(&(about.st_dev, about.st_ino)).cloned() {
                        return self.entry(path, about, Kind::HardLink, first);
                    }
                    if self.linked.len() < MAX_LINKED {
                        self.linked.insert((about.st_dev, about.st_ino), path.to_vec());
                    }
                }
                let opened = open_below(dir, name, OFlag::O_RDONLY | OFlag::O_NONBLOCK);
                match opened.and_then(|file| Ok((fstat(&file)?, is_pseudo(&file)?, file))) {
                    // Exchanged for something else since it was looked at.
                    Ok((now, _, _)) if kind(&now) != SFlag::S_IFREG => {
                        self.leave(path, "it changes while it is copied")
                    }
                    Ok((_, true, _)) => self.leave(path, "it lies on a file system of the kernel's"),
                    Ok((now, false, file)) => {
                        self.entry(path, &now, Kind::File, Vec::new())?;
                        self.content(path, file)
                    }
                    Err(error) => {
                        self.linked.remove(&(about.st_dev, about.st_ino));
                        self.leave(path, error.to_string())
                    }
                }
            }
            SFlag::S_IFIFO => self.leave(path, "it is a pipe"),
            SFlag::S_IFSOCK => self.leave(path, "it is a socket"),
            _ => self.leave(path, "it is a device"),
        }
    }

    fn content(&mut self, path: &[u8], file: OwnedFd) -> Result<(), TransferError> {
        let mut file = File::from(file);
        loop {
            match file.read(&mut self.buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => {
                    let data = self.buffer.get(..count).unwrap_or_default().to_vec();
                    self.send(Frame::Data(data.into()))?;
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                // What came of it is there; a file that is cut short must not pass for whole.
                Err(error) => return Err(TransferError::io("read", path, error)),
            }
        }
    }
}
