//! Small files that are replaced as a whole, often.

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

/// Gives the file `path` another content: at every moment it has the old one or the new one, whole. `spare` is a name beside it for nothing
/// else; the content before stays there. Nothing is synced: the death of the writer loses nothing, the machine's may.
///
/// Two files change places instead of one being made and one removed each time. Where the directory is not in memory, that spares the file system
/// the search for a free inode; and ext4 and its kin write a file out at once when it is emptied or renamed over another one, which takes
/// tens of milliseconds on a busy disk.
///
/// # Errors
/// When the directory is gone or its file system full; `path` is as it was.
pub fn replace(path: &Path, spare: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().create(true).truncate(false).write(true).open(spare)?;
    file.write_all(bytes)?;
    file.set_len(bytes.len() as u64)?;
    match renameat2(AT_FDCWD, spare, AT_FDCWD, path, RenameFlags::RENAME_EXCHANGE) {
        // The first time, or a file system that cannot exchange.
        Err(Errno::ENOENT | Errno::EINVAL) => std::fs::rename(spare, path),
        result => Ok(result?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_content_is_there_alone() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (path, spare) = (dir.path().join("state"), dir.path().join("state.spare"));
        for content in ["first", "a longer second", "3", ""] {
            replace(&path, &spare, content.as_bytes()).expect("replace");
            assert_eq!(std::fs::read_to_string(&path).expect("read"), content);
        }
        // Killed while it wrote.
        std::fs::write(&spare, b"half of").expect("write");
        assert_eq!(std::fs::read(&path).expect("read"), b"");
        replace(&path, &spare, b"x").expect("replace");
        assert_eq!(std::fs::read(&path).expect("read"), b"x");
        std::fs::remove_dir_all(dir.path()).expect("remove");
        assert!(replace(&path, &spare, b"x").is_err());
    }
}
