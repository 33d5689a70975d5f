//! What a directory takes of its disk. It belongs to containers that change it meanwhile: no link is followed, no other file
//! system entered, and what vanishes is not counted.

use std::collections::HashSet;
use std::path::Path;

use nix::dir::{Dir, Type};
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::{Mode, SFlag, fstat, fstatat};

/// Directories within directories that are looked into. What lies deeper counts as nothing; a path of that depth is longer than
/// the 4,096 bytes that programs can name at once.
const MAX_DEPTH: usize = 256;

/// Bytes on the disk, and files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Blocks, in bytes.
    pub bytes: u64,
    /// Files, directories and links.
    pub inodes: u64,
}

impl Usage {
    /// Both together.
    #[must_use]
    pub fn and(self, other: Usage) -> Usage {
        Usage { bytes: self.bytes.saturating_add(other.bytes), inodes: self.inodes.saturating_add(other.inodes) }
    }
}

/// What `path` and all below it takes; nothing where there is none. Blocks on the disk.
#[must_use]
pub fn measure(path: &Path) -> Usage {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let Ok(root) = Dir::open(path, flags, Mode::empty()) else { return Usage::default() };
    let Ok(own) = fstat(&root) else { return Usage::default() };
    let mut walk = Walk { device: own.st_dev, linked: HashSet::new(), total: Usage::default() };
    walk.count(&own);
    walk.down(root, 0);
    walk.total
}

struct Walk {
    device: u64,
    /// Files with several names that were counted.
    linked: HashSet<u64>,
    total: Usage,
}

impl Walk {
    fn count(&mut self, stat: &nix::sys::stat::FileStat) {
        if stat.st_nlink > 1 && !is_dir(stat) && !self.linked.insert(stat.st_ino) {
            return;
        }
        let bytes = u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512);
        self.total = self.total.and(Usage { bytes, inodes: 1 });
    }

    fn down(&mut self, mut dir: Dir, depth: usize) {
        let names: Vec<(std::ffi::CString, Option<Type>)> = dir
            .iter()
            .flatten()
            .filter(|entry| !matches!(entry.file_name().to_bytes(), b"." | b".."))
            .map(|entry| (entry.file_name().to_owned(), entry.file_type()))
            .collect();
        for (name, _) in names {
            let Ok(stat) = fstatat(&dir, name.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW) else { continue };
            if stat.st_dev != self.device {
                continue;
            }
            self.count(&stat);
            if is_dir(&stat) && depth < MAX_DEPTH {
                let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                if let Ok(below) = Dir::openat(&dir, name.as_c_str(), flags, Mode::empty()) {
                    self.down(below, depth + 1);
                }
            }
        }
    }
}

fn is_dir(stat: &nix::sys::stat::FileStat) -> bool {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFDIR
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_in_a_directory_counts_once_and_what_does_not_lie_there_not_at_all() {
        let dir = tempfile::tempdir().expect("tempdir");
        let at = |name: &str| dir.path().join(name);
        let empty = measure(dir.path());
        assert_eq!(empty.inodes, 1);
        std::fs::create_dir_all(at("a/b")).expect("mkdir");
        std::fs::write(at("a/b/file"), vec![7; 300_000]).expect("write");
        std::fs::hard_link(at("a/b/file"), at("a/again")).expect("link");
        std::os::unix::fs::symlink("/usr", at("out")).expect("symlink");
        // A hole takes nothing.
        std::fs::File::create(at("hole")).and_then(|file| file.set_len(1 << 30)).expect("hole");
        let full = measure(dir.path());
        assert_eq!(full.inodes, 6, "the directory, a, b, file, out, hole");
        let grown = full.bytes - empty.bytes;
        assert!((300_000..400_000).contains(&grown), "{grown}");
        assert_eq!(measure(&at("nothing")), Usage::default());
        assert_eq!(measure(&at("out")), Usage::default(), "a link is not followed");
    }

    #[test]
    fn a_deep_tree_ends_the_walk_and_not_the_agent() {
        let dir = tempfile::tempdir().expect("tempdir");
        let deep = (0..1000).fold(dir.path().to_owned(), |path, _| path.join("d"));
        std::fs::create_dir_all(&deep).expect("mkdir");
        let inodes = measure(dir.path()).inodes;
        assert_eq!(inodes, 2 + MAX_DEPTH as u64);
    }
}
