//! The address book: which pod has which address, one small file per address below `<data-dir>/ipam/<range>/`.
//!
//! A file is named by the address and holds the pod's uid. It is written under another name and then linked to its own, which fails
//! when the address is taken: a file is there whole or not at all, whoever else works in the directory. Nothing is flushed
//! to disk: after a power cut no pod of this node lives, and a file that is empty or unreadable is a free address.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io::{self, ErrorKind, Write};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use super::{Cidr, NetError};

/// Longest uid that is taken; Kubernetes' have 36 bytes.
const MAX_UID_BYTES: usize = 128;
const DRAFT: &str = ".draft-";

/// The addresses of this node's range.
#[derive(Debug)]
pub(super) struct Ipam {
    dir: PathBuf,
    cidr: Cidr,
    by_uid: BTreeMap<String, Ipv4Addr>,
    taken: HashSet<Ipv4Addr>,
    /// Where to look next, so that a freed address rests as long as possible.
    cursor: u32,
}

impl Ipam {
    /// Reads the book below `data_dir` and throws out what a crash left.
    pub(super) fn open(data_dir: &Path, cidr: Cidr) -> Result<Self, NetError> {
        let dir = data_dir.join("ipam").join(format!("{}_{}", cidr.base, cidr.prefix));
        fs::create_dir_all(&dir).map_err(|e| failed("create directory", &dir, e))?;
        let mut book = Self { dir, cidr, by_uid: BTreeMap::new(), taken: HashSet::new(), cursor: 0 };
        book.read()?;
        Ok(book)
    }

    /// The address of a pod that has one.
    pub(super) fn get(&self, uid: &str) -> Option<Ipv4Addr> {
        self.by_uid.get(uid).copied()
    }

    /// The address of the pod: the one it has, or a new one.
    pub(super) fn reserve(&mut self, uid: &str) -> Result<Ipv4Addr, NetError> {
        check_uid(uid)?;
        if let Some(ip) = self.get(uid) {
            return Ok(ip);
        }
        let size = self.cidr.pod_addresses();
        let draft = self.dir.join(format!("{DRAFT}{uid}"));
        for step in 0..size {
            let number = (u64::from(self.cursor) + u64::from(step)) % u64::from(size);
            let number = u32::try_from(number).unwrap_or(0);
            let ip = self.cidr.pod_address(number);
            if !self.taken.contains(&ip) && self.claim(ip, uid, &draft)? {
                self.cursor = number + 1;
                return Ok(ip);
            }
        }
        Err(NetError::Exhausted { cidr: self.cidr.to_string(), size })
    }

    /// Frees the pod's address; fine when it has none.
    pub(super) fn release(&mut self, uid: &str) -> Result<(), NetError> {
        let Some(ip) = self.get(uid) else { return Ok(()) };
        remove(&self.dir.join(ip.to_string()))?;
        self.by_uid.remove(uid);
        self.taken.remove(&ip);
        Ok(())
    }

    /// Frees the addresses of all pods that are not in `live`; returns those pods.
    pub(super) fn reconcile(&mut self, live: &HashSet<String>) -> Result<Vec<String>, NetError> {
        let dead: Vec<String> = self.by_uid.keys().filter(|uid| !live.contains(*uid)).cloned().collect();
        for uid in &dead {
            self.release(uid)?;
        }
        Ok(dead)
    }

    /// Writes the file of the address; `false` when someone else has it.
    fn claim(&mut self, ip: Ipv4Addr, uid: &str, draft: &Path) -> Result<bool, NetError> {
        let file = self.dir.join(ip.to_string());
        fs::File::create(draft).and_then(|mut f| f.write_all(uid.as_bytes())).map_err(|e| failed("write", draft, e))?;
        let linked = match fs::hard_link(draft, &file) {
            Ok(()) => true,
            Err(error) if error.kind() == ErrorKind::AlreadyExists => false,
            Err(error) => return Err(failed("create", &file, error)),
        };
        remove(draft)?;
        self.taken.insert(ip);
        if linked {
            self.by_uid.insert(uid.to_owned(), ip);
        }
        Ok(linked)
    }

    fn read(&mut self) -> Result<(), NetError> {
        let mut newest = None;
        for entry in fs::read_dir(&self.dir).map_err(|e| failed("list", &self.dir, e))? {
            let entry = entry.map_err(|e| failed("list", &self.dir, e))?;
            let path = entry.path();
            let number =
                entry.file_name().to_str().and_then(|n| n.parse().ok()).and_then(|ip| self.cidr.pod_number(ip));
            let uid = fs::read_to_string(&path).unwrap_or_default();
            let Some(number) = number.filter(|_| check_uid(&uid).is_ok() && !self.by_uid.contains_key(&uid)) else {
                tracing::warn!(path = %path.display(), "remove a broken entry of the address book");
                remove(&path)?;
                continue;
            };
            let ip = self.cidr.pod_address(number);
            self.by_uid.insert(uid, ip);
            self.taken.insert(ip);
            let written = entry.metadata().and_then(|m| m.modified()).ok();
            newest = newest.max(Some((written, number)));
        }
        self.cursor = newest.map_or(0, |(_, number)| number + 1);
        Ok(())
    }
}

/// Whether a uid can be part of a file name and of a link's alias.
pub(super) fn check_uid(uid: &str) -> Result<(), NetError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let good = !uid.is_empty() && uid.len() <= MAX_UID_BYTES && uid.bytes().all(plain);
    good.then_some(()).ok_or_else(|| NetError::BadUid(uid.to_owned()))
}

fn remove(path: &Path) -> Result<(), NetError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(failed("remove", path, error)),
        _ => Ok(()),
    }
}

fn failed(operation: &'static str, path: &Path, source: io::Error) -> NetError {
    NetError::Io { operation, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    fn cidr(text: &str) -> Cidr {
        text.parse().expect("a range")
    }

    fn files(book: &Ipam) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(&book.dir)
            .expect("the book's directory")
            .map(|entry| entry.expect("an entry").file_name().into_string().expect("text"))
            .collect();
        names.sort();
        names
    }

    #[test]
    fn same_uid_same_address_also_after_restart() {
        let dir = tempfile::tempdir().expect("a directory");
        let range = cidr("10.9.0.0/24");
        let mut book = Ipam::open(dir.path(), range).expect("open");
        let a = book.reserve("a").expect("reserve");
        let b = book.reserve("b").expect("reserve");
        assert_eq!((a.to_string(), b.to_string()), ("10.9.0.2".into(), "10.9.0.3".into()));
        assert_eq!(book.reserve("a").expect("again"), a);
        let mut book = Ipam::open(dir.path(), range).expect("reopen");
        assert_eq!(book.reserve("b").expect("again"), b);
        assert_eq!(book.get("a"), Some(a));
        assert_eq!(files(&book), ["10.9.0.2", "10.9.0.3"]);
    }

    #[test]
    fn freed_addresses_rest() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut book = Ipam::open(dir.path(), cidr("10.9.0.0/29")).expect("open");
        let first = book.reserve("a").expect("reserve");
        book.release("a").expect("release");
        book.release("a").expect("release twice");
        book.release("never").expect("release of an unknown pod");
        for uid in ["b", "c", "d", "e"] {
            assert_ne!(book.reserve(uid).expect("reserve"), first, "{uid} got the address that was just freed");
        }
        assert_eq!(book.reserve("f").expect("the last one"), first);
    }

    #[test]
    fn exhausted_says_so_and_recovers() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut book = Ipam::open(dir.path(), cidr("10.9.0.0/30")).expect("open");
        let only = book.reserve("a").expect("reserve");
        let error = book.reserve("b").expect_err("there is one address");
        assert_eq!(error.to_string(), "no free address in 10.9.0.0/30: all 1 are taken");
        book.release("a").expect("release");
        assert_eq!(book.reserve("b").expect("reserve"), only);
        let mut none = Ipam::open(dir.path(), cidr("10.9.0.0/32")).expect("open");
        assert!(matches!(none.reserve("a"), Err(NetError::Exhausted { size: 0, .. })));
    }

    #[test]
    fn a_crash_leaves_nothing_that_counts() {
        let dir = tempfile::tempdir().expect("a directory");
        let range = cidr("10.9.0.0/24");
        let mut book = Ipam::open(dir.path(), range).expect("open");
        let a = book.reserve("a").expect("reserve");
        // Between the link and the removal of the draft; before the link; a power cut's empty file; one pod
        // twice; an address outside; something else.
        for (name, text) in [
            (".draft-a", "a"),
            (".draft-b", "b"),
            ("10.9.0.77", ""),
            ("10.9.0.78", "a"),
            ("10.9.0.1", "gateway"),
            ("notes", "x"),
        ] {
            fs::write(book.dir.join(name), text).expect("write");
        }
        let mut book = Ipam::open(dir.path(), range).expect("reopen");
        let now = book.get("a").expect("still there");
        assert_eq!(files(&book), [now.to_string()]);
        assert!(now == a || now.to_string() == "10.9.0.78", "one of the two that it had");
        assert_ne!(book.reserve("b").expect("reserve"), now);
    }

    #[test]
    fn another_process_is_respected() {
        let dir = tempfile::tempdir().expect("a directory");
        let range = cidr("10.9.0.0/24");
        let mut one = Ipam::open(dir.path(), range).expect("open");
        let mut two = Ipam::open(dir.path(), range).expect("open");
        let a = one.reserve("a").expect("reserve");
        let b = two.reserve("b").expect("reserve");
        assert_ne!(a, b);
    }

    #[test]
    fn reconcile_frees_the_dead() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut book = Ipam::open(dir.path(), cidr("10.9.0.0/24")).expect("open");
        for uid in ["a", "b", "c"] {
            book.reserve(uid).expect("reserve");
        }
        let live = HashSet::from(["b".to_owned(), "unknown".to_owned()]);
        assert_eq!(book.reconcile(&live).expect("reconcile"), ["a", "c"]);
        assert_eq!(book.reconcile(&live).expect("reconcile"), [""; 0]);
        assert_eq!(files(&book), ["10.9.0.3"]);
    }

    #[test]
    fn refuses_uids_that_walk() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut book = Ipam::open(dir.path(), cidr("10.9.0.0/24")).expect("open");
        for uid in ["", "../x", "a/b", "a b", "a\n", "ü", &"x".repeat(129)] {
            assert!(matches!(book.reserve(uid), Err(NetError::BadUid(_))), "{uid:?}");
        }
        assert!(files(&book).is_empty());
    }

    #[test]
    fn many_at_once() {
        let dir = tempfile::tempdir().expect("a directory");
        let book = Mutex::new(Ipam::open(dir.path(), cidr("10.9.0.0/24")).expect("open"));
        let all: Vec<Ipv4Addr> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|t| {
                    let book = &book;
                    scope.spawn(move || -> Vec<Ipv4Addr> {
                        (0..30)
                            .map(|n| book.lock().expect("lock").reserve(&format!("{t}-{n}")).expect("reserve"))
                            .collect()
                    })
                })
                .collect();
            threads.into_iter().flat_map(|t| t.join().expect("join")).collect()
        });
        let distinct: HashSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), 240);
    }
}
