//! Which pod has which ids of the node: pods with `hostUsers: false` have a range of their own each (KEP-127).
//!
//! [`choose`] decides. The book keeps: one small file per range below `<data-dir>/users`, named by the range's first id and holding the
//! pod's uid, written and linked like the address book of [`crate::net`], so that a range that was given is a range that is known,
//! whenever the agent dies. It is given back when nothing of the pod is left.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use minipod_podshim::protocol::IdRange;

/// How many ids a pod has, as in Kubernetes: those that 16 bits can name.
pub const IDS_PER_POD: u32 = 65_536;
const DRAFT: &str = ".draft-";

/// The node's ids that pods may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    first: u32,
    last: u32,
}

impl Span {
    /// How many pods find ids in it.
    fn pods(self) -> u32 {
        // One less than there are ids, so that all ids of a node do not overflow; a part of a range is none.
        let further = self.last - self.first;
        further / IDS_PER_POD + u32::from(further % IDS_PER_POD == IDS_PER_POD - 1)
    }

    fn range(self, number: u32) -> u32 {
        self.first + number * IDS_PER_POD
    }
}

impl Default for Span {
    /// What systemd's list of ids (UIDS-GIDS) calls unused: above its own containers and above what `useradd` writes to /etc/subuid.
    fn default() -> Self {
        Self { first: 0x7000_0000, last: 0x7ffd_ffff }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!("want FIRST-LAST of at least {IDS_PER_POD} ids from {IDS_PER_POD} on, such as {}", Self::default())
        };
        let (first, last) = text.split_once('-').ok_or_else(wrong)?;
        let number = |text: &str| text.parse::<u32>().map_err(|_| wrong());
        let (first, last) = (number(first)?, number(last)?);
        // The last one of all stands for "no id" in the kernel.
        let good = first >= IDS_PER_POD && last < u32::MAX && last.checked_sub(first) >= Some(IDS_PER_POD - 1);
        if good { Ok(Self { first, last }) } else { Err(wrong()) }
    }
}

/// The next free range from the cursor on, so that a freed one rests as long as possible. `held` are the first ids of ranges that
/// pods have, which another span of a former start may have placed anywhere.
fn choose(span: Span, held: &BTreeMap<u32, String>, cursor: u32) -> Option<u32> {
    let is_free = |first: u32| {
        let reach = IDS_PER_POD - 1;
        held.range(first.saturating_sub(reach)..=first.saturating_add(reach)).next().is_none()
    };
    let pods = span.pods();
    let from_cursor = (cursor.min(pods)..pods).chain(0..cursor.min(pods));
    from_cursor.map(|number| span.range(number)).find(|first| is_free(*first))
}

/// Ids could not be given or taken back.
#[derive(Debug, thiserror::Error)]
pub enum UsersError {
    /// All are given.
    #[error("hostUsers: false: all {pods} ranges of {IDS_PER_POD} ids in --pod-user-ids {span} are taken")]
    Exhausted {
        /// Where they are.
        span: Span,
        /// How many there are.
        pods: u32,
    },
    /// A file of the book.
    #[error("{operation} {}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> UsersError {
    let path = path.to_owned();
    move |source| UsersError::Io { operation, path, source }
}

/// The ranges that pods have.
#[derive(Debug)]
pub struct Book {
    dir: PathBuf,
    span: Span,
    /// Uids of pods by the first id.
    held: BTreeMap<u32, String>,
    cursor: u32,
}

impl Book {
    /// Reads the book in `dir` and throws out what a crash left.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn open(dir: PathBuf, span: Span) -> Result<Self, UsersError> {
        fs::create_dir_all(&dir).map_err(failed("create directory", &dir))?;
        let mut book = Self { held: BTreeMap::new(), cursor: 0, dir, span };
        let mut newest = None;
        for entry in fs::read_dir(&book.dir).map_err(failed("list", &book.dir))? {
            let entry = entry.map_err(failed("list", &book.dir))?;
            let path = entry.path();
            let first = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok());
            let uid = fs::read_to_string(&path).unwrap_or_default();
            let known = |uid: &String| book.held.values().any(|other| other == uid);
            let Some(first) = first.filter(|_| !uid.is_empty() && !known(&uid)) else {
                tracing::warn!(path = %path.display(), "remove a broken entry of the book of user ids");
                remove(&path)?;
                continue;
            };
            book.held.insert(first, uid);
            newest = newest.max(Some((entry.metadata().and_then(|meta| meta.modified()).ok(), first)));
        }
        let after = newest.and_then(|(_, first)| first.checked_sub(span.first));
        book.cursor = after.map_or(0, |offset| offset / IDS_PER_POD + 1);
        Ok(book)
    }

    /// The ids of a pod that has some.
    #[must_use]
    pub fn get(&self, uid: &str) -> Option<IdRange> {
        let first = self.held.iter().find(|(_, other)| *other == uid).map(|(first, _)| *first)?;
        Some(IdRange { first, count: IDS_PER_POD })
    }

    /// The ids of the pod: those that it has, or new ones.
    ///
    /// # Errors
    /// When there are none left, or the book cannot be written.
    pub fn hold(&mut self, uid: &str) -> Result<IdRange, UsersError> {
        if let Some(range) = self.get(uid) {
            return Ok(range);
        }
        let exhausted = UsersError::Exhausted { span: self.span, pods: self.span.pods() };
        let first = choose(self.span, &self.held, self.cursor).ok_or(exhausted)?;
        let (draft, place) = (self.dir.join(format!("{DRAFT}{uid}")), self.dir.join(first.to_string()));
        fs::write(&draft, uid).map_err(failed("write", &draft))?;
        // Refused if the file is there, which only a second agent on this directory could have made.
        fs::hard_link(&draft, &place).map_err(failed("create", &place))?;
        remove(&draft)?;
        self.held.insert(first, uid.to_owned());
        self.cursor = (first - self.span.first) / IDS_PER_POD + 1;
        Ok(IdRange { first, count: IDS_PER_POD })
    }

    /// Takes the pod's ids back; fine when it has none. Nothing of the pod may live.
    ///
    /// # Errors
    /// When the book cannot be written.
    pub fn release(&mut self, uid: &str) -> Result<(), UsersError> {
        let Some(IdRange { first, .. }) = self.get(uid) else { return Ok(()) };
        remove(&self.dir.join(first.to_string()))?;
        self.held.remove(&first);
        Ok(())
    }

    /// Takes back the ids of all pods that are not in `live`; answers those pods.
    ///
    /// # Errors
    /// When the book cannot be written.
    pub fn reconcile(&mut self, live: &HashSet<String>) -> Result<Vec<String>, UsersError> {
        let dead: Vec<String> = self.held.values().filter(|uid| !live.contains(*uid)).cloned().collect();
        dead.iter().try_for_each(|uid| self.release(uid))?;
        Ok(dead)
    }
}

fn remove(path: &Path) -> Result<(), UsersError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(text: &str) -> Span {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn spans_are_checked() {
        for (text, pods) in [
            ("65536-131071", 1),
            ("65536-196606", 1),
            ("65536-196607", 2),
            ("100000-4294967294", 65_534),
            (&Span::default().to_string(), 4_094),
        ] {
            assert_eq!(span(text).pods(), pods, "{text}");
        }
        for bad in ["", "1", "0-65535", "65536-131070", "65536-4294967295", "131072-65536", "a-b", "65536-131071-"] {
            let error = bad.parse::<Span>().expect_err(bad);
            assert!(error.starts_with("want FIRST-LAST"), "{error}");
        }
    }

    #[test]
    fn the_next_free_range_is_chosen() {
        let k = IDS_PER_POD;
        // span in ranges, ids that are held, cursor, choice
        for (pods, held, cursor, choice) in [
            (3, vec![], 0, Some(k)),
            (3, vec![k], 0, Some(2 * k)),
            (3, vec![k, 3 * k], 0, Some(2 * k)),
            (3, vec![], 2, Some(3 * k)),
            (3, vec![3 * k], 2, Some(k)),
            (3, vec![3 * k], 3, Some(k)),
            (3, vec![k], 99, Some(2 * k)),
            (3, vec![k, 2 * k, 3 * k], 1, None),
            // Of another span: it lies across two, or touches none.
            (3, vec![2 * k - 1], 0, Some(3 * k)),
            (2, vec![k + 1], 0, None),
            (2, vec![4 * k], 0, Some(k)),
            (1, vec![2 * k], 0, Some(k)),
        ] {
            let span = Span { first: k, last: k + pods * k - 1 };
            let held: BTreeMap<u32, String> = held.into_iter().map(|first| (first, "u".to_owned())).collect();
            assert_eq!(choose(span, &held, cursor), choice, "{pods} {held:?} {cursor}");
        }
    }

    #[test]
    fn a_pod_keeps_its_ids_and_a_dead_one_gives_them_back() {
        let dir = tempfile::tempdir().expect("tempdir");
        let open = || Book::open(dir.path().to_owned(), span("65536-262143")).expect("open");
        let mut book = open();
        let (a, b) = (book.hold("a").expect("hold").first, book.hold("b").expect("hold").first);
        assert_eq!((a, b), (65_536, 131_072));
        // What a death of the agent leaves, before the link and after it; a power cut's empty file; one pod twice; something else.
        for (name, text) in [(".draft-c", "c"), (".draft-a", "a"), ("196608", ""), ("999999", "b"), ("notes", "x")] {
            fs::write(dir.path().join(name), text).expect("write");
        }
        let mut book = open();
        assert_eq!(book.hold("a").expect("again").first, a);
        let b = book.get("b").expect("one of the two that it had").first;
        assert!(b == 131_072 || b == 999_999);
        book.release("a").expect("release");
        book.release("a").expect("release twice");
        assert_ne!(book.hold("c").expect("hold").first, a, "the freed one rests");
        let live = HashSet::from(["c".to_owned()]);
        assert_eq!(book.reconcile(&live).expect("reconcile"), ["b"]);
        let mut book = open();
        assert_eq!((book.get("a"), book.get("b")), (None, None));
        for uid in ["d", "e"] {
            book.hold(uid).expect("hold");
        }
        let error = book.hold("f").expect_err("there are three").to_string();
        assert_eq!(error, "hostUsers: false: all 3 ranges of 65536 ids in --pod-user-ids 65536-262143 are taken");
    }

    /// Pods come and go, the agent is started anew with this or another span: no two pods ever share an id.
    #[test]
    fn no_id_has_two_pods() {
        for seed in 0..40 {
            let mut random = fastrand::Rng::with_seed(seed);
            let dir = tempfile::tempdir().expect("tempdir");
            let mut book = Book::open(dir.path().to_owned(), span("65536-720895")).expect("open");
            let mut has: BTreeMap<String, IdRange> = BTreeMap::new();
            for step in 0..120 {
                let uid = format!("pod-{}", random.u32(0..14));
                match random.u32(0..10) {
                    0..=5 => match book.hold(&uid) {
                        Ok(range) => {
                            let before = has.insert(uid, range);
                            assert!(before.is_none_or(|before| before == range), "seed {seed}, step {step}");
                        }
                        Err(UsersError::Exhausted { .. }) => assert!(has.len() >= 5, "seed {seed}, step {step}"),
                        Err(error) => panic!("seed {seed}, step {step}: {error}"),
                    },
                    6..=8 => {
                        book.release(&uid).expect("release");
                        has.remove(&uid);
                    }
                    _ => {
                        let first = 65_536 + random.u32(0..65_536);
                        let other = Span { first, last: first + 10 * IDS_PER_POD };
                        book = Book::open(dir.path().to_owned(), other).expect("open");
                    }
                }
                let ranges: Vec<IdRange> = has.values().copied().collect();
                for (at, one) in ranges.iter().enumerate() {
                    let apart = |other: &IdRange| one.first.abs_diff(other.first) >= IDS_PER_POD;
                    assert!(ranges[at + 1..].iter().all(apart), "seed {seed}, step {step}: {ranges:?}");
                }
                for (uid, range) in &has {
                    assert_eq!(book.get(uid), Some(*range), "seed {seed}, step {step}");
                }
            }
        }
    }
}
