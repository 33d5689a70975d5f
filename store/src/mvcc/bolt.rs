//! etcd's snapshot file: what `etcdctl snapshot save` writes is a bbolt database, and so is what we send.
//!
//! An etcd can be restored from our snapshots, and we from an etcd's. The database is written once and in order: two meta
//! pages, an empty freelist, the leaves of the bucket `key` (one entry per version), the branches above them, the small
//! buckets, and the root, which lists the buckets. Format: bbolt's `page.go`, `bucket.go`, `db.go`; buckets: etcd's
//! `mvcc/kvstore.go`, `lease/lessor.go`.

use super::{Log, Revision, Store, Version};
use crate::lease::Lease;
use crate::wire::{self, KeyValue};
use bytes::Bytes;
use sha2::{Digest, Sha256};
use std::cell::Cell;

const PAGE: usize = 4_096;
const MAGIC: u32 = 0xED0C_DAED;
const VERSION: u32 = 2;
const BRANCH: u16 = 0x01;
const LEAF: u16 = 0x02;
const META: u16 = 0x04;
const FREELIST: u16 = 0x10;
const HEADER_BYTES: usize = 16;
const ELEMENT_BYTES: usize = 16;
/// The element of a leaf holds a bucket.
const IS_BUCKET: u32 = 1;
/// Trees of more than this many levels are not trees: 2^64 pages fit in far fewer.
const MAX_DEPTH: usize = 32;
/// Leaves are handed out in pieces of about this size.
const PIECE_BYTES: usize = 256 << 10;

/// One page, with the pages that it overflows into.
fn page(id: u64, flags: u16, count: usize, body: &[u8]) -> Vec<u8> {
    let pages = (HEADER_BYTES + body.len()).div_ceil(PAGE);
    let mut out = Vec::with_capacity(pages * PAGE);
    out.extend(id.to_le_bytes());
    out.extend(flags.to_le_bytes());
    out.extend((count as u16).to_le_bytes());
    out.extend((pages as u32 - 1).to_le_bytes());
    out.extend_from_slice(body);
    out.resize(pages * PAGE, 0);
    out
}

fn leaf(id: u64, entries: &[(u32, Vec<u8>, Vec<u8>)]) -> Vec<u8> {
    let (mut body, mut data) = (Vec::new(), Vec::new());
    for (index, (flags, key, value)) in entries.iter().enumerate() {
        let at = (entries.len() - index) * ELEMENT_BYTES + data.len();
        for number in [*flags, at as u32, key.len() as u32, value.len() as u32] {
            body.extend(number.to_le_bytes());
        }
        data.extend_from_slice(key);
        data.extend_from_slice(value);
    }
    body.append(&mut data);
    page(id, LEAF, entries.len(), &body)
}

fn meta(id: u64, root: u64, pages: u64, txid: u64) -> Vec<u8> {
    let mut body = Vec::new();
    for number in [MAGIC, VERSION, PAGE as u32, 0] {
        body.extend(number.to_le_bytes());
    }
    // The root bucket and its sequence, the freelist's page, the end of the file in pages, the transaction.
    for number in [root, 0, 2, pages, txid] {
        body.extend(number.to_le_bytes());
    }
    let sum = fnv(&body);
    body.extend(sum.to_le_bytes());
    page(id, META, 0, &body)
}

/// FNV-1a, which bbolt sums its meta pages with.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

/// etcd's key of a version: revision, `_`, order within it, and `t` for a tombstone.
fn revision_key(at: Revision, is_tombstone: bool) -> Vec<u8> {
    let mut key = at.main.to_be_bytes().to_vec();
    key.push(b'_');
    key.extend(i64::from(at.sub).to_be_bytes());
    if is_tombstone {
        key.push(b't');
    }
    key
}

fn entry(version: &Version) -> (u32, Vec<u8>, Vec<u8>) {
    let key = revision_key(version.at, version.is_tombstone);
    let mut value = Vec::new();
    if version.is_tombstone {
        KeyValue { key: version.key(), ..KeyValue::default() }.encode(&mut value);
    } else {
        value.extend_from_slice(version.encoded());
    }
    (0, key, value)
}

fn entry_len(version: &Version) -> usize {
    let (key, value) = if version.is_tombstone {
        (18, 1 + wire::varint_len(version.key().len() as u64) + version.key().len())
    } else {
        (17, version.encoded().len())
    };
    ELEMENT_BYTES + key + value
}

/// One leaf of the bucket `key`.
struct Leaf {
    first: Revision,
    is_tombstone: bool,
    count: usize,
    page: u64,
}

/// The file in pieces.
pub struct Export {
    log: Log,
    leaves: std::vec::IntoIter<Leaf>,
    head: Option<Vec<u8>>,
    tail: Option<Vec<u8>>,
    bytes: u64,
}

impl Store {
    /// What an etcd snapshot file of the state as it is now needs; cheap, so that the store is not held for long.
    pub fn exporting(&self) -> Exporting {
        let leases = self.leases.iter().map(|(id, lease)| {
            let mut value = Vec::new();
            wire::put_int(&mut value, 1, id);
            wire::put_int(&mut value, 2, lease.ttl);
            wire::put_int(&mut value, 3, lease.remaining);
            (0, id.to_be_bytes().to_vec(), value)
        });
        let alarms = self.alarms().map(|(member, kind)| {
            let mut key = Vec::new();
            wire::put_int(&mut key, 1, member as i64);
            wire::put_int(&mut key, 2, kind.into());
            (0, key, Vec::new())
        });
        let (mut leases, mut alarms): (Vec<_>, Vec<_>) = (leases.collect(), alarms.collect());
        leases.sort();
        alarms.sort();
        Exporting { log: self.log.clone(), leases, alarms, applied: self.applied, compacted: self.compacted }
    }

    /// An etcd snapshot file of the state as it is now, in pieces.
    pub fn export(&self) -> Export {
        self.exporting().start()
    }
}

/// An etcd snapshot file that is still to be laid out.
pub struct Exporting {
    log: Log,
    leases: Vec<(u32, Vec<u8>, Vec<u8>)>,
    alarms: Vec<(u32, Vec<u8>, Vec<u8>)>,
    applied: u64,
    compacted: i64,
}

impl Exporting {
    /// Lays the file out; its pieces are made as they are asked for.
    pub fn start(self) -> Export {
        let mut next_page = 3;
        let leaves = plan(&self.log, &mut next_page);
        let (tail, root) = self.tail(&leaves, &mut next_page);
        let mut head = [meta(0, root, next_page, 0), meta(1, root, next_page, 1)].concat();
        head.append(&mut page(2, FREELIST, 0, &[]));
        let bytes = next_page * PAGE as u64;
        Export { log: self.log, leaves: leaves.into_iter(), head: Some(head), tail: Some(tail), bytes }
    }

    /// Everything after the leaves of `key`; and the page of the root.
    fn tail(&self, leaves: &[Leaf], next_page: &mut u64) -> (Vec<u8>, u64) {
        let mut tail = Vec::new();
        let mut nodes: Vec<(Vec<u8>, u64)> =
            leaves.iter().map(|leaf| (revision_key(leaf.first, leaf.is_tombstone), leaf.page)).collect();
        while nodes.len() > 1 {
            nodes = branches(&nodes, next_page, &mut tail);
        }
        let mut meta = vec![(0, b"consistent_index".to_vec(), self.applied.to_be_bytes().to_vec())];
        if self.compacted > 0 {
            let compacted = revision_key(Revision { main: self.compacted, sub: 0 }, false);
            meta.push((0, b"finishedCompactRev".to_vec(), compacted.clone()));
            meta.push((0, b"scheduledCompactRev".to_vec(), compacted));
        }
        let mut buckets = Vec::new();
        for (name, entries) in [
            ("alarm", self.alarms.clone()),
            ("auth", Vec::new()),
            ("authRoles", Vec::new()),
            ("authUsers", Vec::new()),
            ("cluster", Vec::new()),
            ("key", Vec::new()),
            ("lease", self.leases.clone()),
            ("members", Vec::new()),
            ("members_removed", Vec::new()),
            ("meta", meta),
        ] {
            let root = match (name, nodes.first()) {
                ("key", Some((_, root))) => Some(*root),
                _ => bucket(&entries, next_page, &mut tail),
            };
            let mut value = root.unwrap_or(0).to_le_bytes().to_vec();
            value.extend(0u64.to_le_bytes());
            if root.is_none() {
                // An empty bucket lives in its entry: the header of a leaf without elements.
                value.extend([0, 0, 0, 0, 0, 0, 0, 0, LEAF as u8, 0, 0, 0, 0, 0, 0, 0]);
            }
            buckets.push((IS_BUCKET, name.as_bytes().to_vec(), value));
        }
        let root = *next_page;
        let mut leaf = leaf(root, &buckets);
        *next_page += (leaf.len() / PAGE) as u64;
        tail.append(&mut leaf);
        (tail, root)
    }
}

/// Lays out the leaves of the bucket `key`.
fn plan(log: &Log, next_page: &mut u64) -> Vec<Leaf> {
    let mut leaves: Vec<Leaf> = Vec::new();
    let mut len = 0;
    for version in log.from(i64::MIN) {
        let more = entry_len(version);
        match leaves.last_mut() {
            Some(leaf) if len + more <= PAGE => {
                leaf.count += 1;
                len += more;
            }
            _ => {
                *next_page += len.div_ceil(PAGE) as u64;
                len = HEADER_BYTES + more;
                leaves.push(Leaf { first: version.at, is_tombstone: version.is_tombstone, count: 1, page: *next_page });
            }
        }
    }
    *next_page += len.div_ceil(PAGE) as u64;
    leaves
}

/// One level of branches over nodes; gives the nodes of that level.
fn branches(nodes: &[(Vec<u8>, u64)], next_page: &mut u64, out: &mut Vec<u8>) -> Vec<(Vec<u8>, u64)> {
    // Keys have 17 or 18 bytes here.
    let per_page = (PAGE - HEADER_BYTES) / (ELEMENT_BYTES + 18);
    let mut level = Vec::new();
    for some in nodes.chunks(per_page) {
        let (mut body, mut keys) = (Vec::new(), Vec::new());
        for (index, (key, child)) in some.iter().enumerate() {
            let at = (some.len() - index) * ELEMENT_BYTES + keys.len();
            body.extend((at as u32).to_le_bytes());
            body.extend((key.len() as u32).to_le_bytes());
            body.extend(child.to_le_bytes());
            keys.extend_from_slice(key);
        }
        let count = some.len();
        body.append(&mut keys);
        out.append(&mut page(*next_page, BRANCH, count, &body));
        if let Some((key, _)) = some.first() {
            level.push((key.clone(), *next_page));
        }
        *next_page += 1;
    }
    level
}

/// A small bucket; its root, or `None` when it is empty.
fn bucket(entries: &[(u32, Vec<u8>, Vec<u8>)], next_page: &mut u64, out: &mut Vec<u8>) -> Option<u64> {
    // 64 entries of these (ids with three numbers) fit a page.
    let mut nodes = Vec::new();
    for some in entries.chunks(64) {
        let mut leaf = leaf(*next_page, some);
        nodes.push((some.first()?.1.clone(), *next_page));
        *next_page += (leaf.len() / PAGE) as u64;
        out.append(&mut leaf);
    }
    while nodes.len() > 1 {
        nodes = branches(&nodes, next_page, out);
    }
    nodes.first().map(|(_, root)| *root)
}

impl Export {
    /// The length of the file in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Iterator for Export {
    type Item = Bytes;

    fn next(&mut self) -> Option<Bytes> {
        if let Some(head) = self.head.take() {
            return Some(head.into());
        }
        let Some(first) = self.leaves.as_slice().first().map(|leaf| leaf.first) else {
            return self.tail.take().map(Bytes::from);
        };
        let mut versions = self.log.from(first.main).skip_while(|version| version.at < first);
        let mut piece = Vec::new();
        while piece.len() < PIECE_BYTES
            && let Some(next) = self.leaves.next()
        {
            let entries: Vec<_> = versions.by_ref().take(next.count).map(entry).collect();
            piece.append(&mut leaf(next.page, &entries));
        }
        Some(piece.into())
    }
}

/// Why a file could not be read as an etcd snapshot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("etcd snapshot: {0}")]
pub struct ImportError(String);

fn wrong<T>(what: impl Into<String>) -> Result<T, ImportError> {
    Err(ImportError(what.into()))
}

struct File<'a> {
    bytes: &'a [u8],
    page: usize,
    /// A tree meets every page once; one that does not is a ring.
    pages_left: Cell<usize>,
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], ImportError> {
    let found = bytes.get(at..).and_then(|rest| rest.first_chunk::<N>());
    found.copied().ok_or_else(|| ImportError(format!("a page ends at byte {at} where {N} more are needed")))
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, ImportError> {
    number(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Result<u64, ImportError> {
    number(bytes, at).map(u64::from_le_bytes)
}

/// The transaction and the root of a meta page that is whole.
fn read_meta(page: &[u8]) -> Result<(u64, u64, usize), ImportError> {
    let body =
        page.get(HEADER_BYTES..HEADER_BYTES + 64).ok_or(ImportError("it is too short for a meta page".into()))?;
    if u32_at(body, 0)? != MAGIC || u32_at(body, 4)? != VERSION {
        return wrong("it does not begin as a bbolt database of version 2");
    }
    if fnv(body.get(..56).unwrap_or_default()) != u64_at(body, 56)? {
        return wrong("the checksum of a meta page is wrong");
    }
    Ok((u64_at(body, 48)?, u64_at(body, 16)?, u32_at(body, 8)? as usize))
}

impl<'a> File<'a> {
    fn open(bytes: &'a [u8]) -> Result<(Self, u64), ImportError> {
        let first = read_meta(bytes);
        let size = first.as_ref().map_or(PAGE, |(_, _, size)| *size);
        let second = bytes.get(size..).map_or_else(|| wrong("it has one page"), read_meta);
        let (_, root, page) = match (first, second) {
            (Ok(a), Ok(b)) => a.max(b),
            (Ok(meta), Err(_)) | (Err(_), Ok(meta)) => meta,
            (Err(error), Err(_)) => return Err(error),
        };
        if !page.is_power_of_two() || !(512..=1 << 20).contains(&page) {
            return wrong(format!("its pages have {page} bytes"));
        }
        Ok((Self { bytes, page, pages_left: Cell::new(bytes.len() / page) }, root))
    }

    /// Where a page begins in the file.
    fn offset(&self, id: u64) -> u64 {
        id.saturating_mul(self.page as u64)
    }

    /// Calls `with` for every element below a page, in order.
    fn walk(
        &self,
        id: u64,
        depth: usize,
        with: &mut dyn FnMut(&'a [u8], &'a [u8]) -> Result<(), ImportError>,
    ) -> Result<(), ImportError> {
        match self.pages_left.get().checked_sub(1) {
            Some(left) => self.pages_left.set(left),
            None => return wrong("its pages form a ring"),
        }
        let start = usize::try_from(id).ok().and_then(|id| id.checked_mul(self.page));
        match start.and_then(|start| self.bytes.get(start..)) {
            Some(page) if depth < MAX_DEPTH => self.walk_page(page, id, depth, with),
            Some(_) => wrong("its pages are nested too deep"),
            None => wrong(format!("page {id}, at offset {}, is missing: the file was cut off", self.offset(id))),
        }
    }

    fn walk_page(
        &self,
        page: &'a [u8],
        id: u64,
        depth: usize,
        with: &mut dyn FnMut(&'a [u8], &'a [u8]) -> Result<(), ImportError>,
    ) -> Result<(), ImportError> {
        let (flags, count) = (u16::from_le_bytes(number(page, 8)?), u16::from_le_bytes(number(page, 10)?));
        for index in 0..usize::from(count) {
            let at = HEADER_BYTES + index * ELEMENT_BYTES;
            let slice = |from: usize, len: usize| {
                let end = from.checked_add(len);
                let found = end.and_then(|end| page.get(from..end));
                found.ok_or_else(|| {
                    let offset = self.offset(id);
                    ImportError(format!("element {index} of page {id}, at offset {offset}, lies outside the file"))
                })
            };
            if flags & LEAF != 0 {
                let (pos, key, value) = (u32_at(page, at + 4)?, u32_at(page, at + 8)? as usize, u32_at(page, at + 12)?);
                let from = at + pos as usize;
                with(slice(from, key)?, slice(from.saturating_add(key), value as usize)?)?;
            } else if flags & BRANCH != 0 {
                self.walk(u64_at(page, at + 8)?, depth + 1, with)?;
            } else {
                return wrong(format!("page {id}, at offset {}, is neither leaf nor branch", self.offset(id)));
            }
        }
        Ok(())
    }

    /// Calls `with` for every entry of a bucket, whose description is `value`.
    fn bucket(
        &self,
        value: &'a [u8],
        with: &mut dyn FnMut(&'a [u8], &'a [u8]) -> Result<(), ImportError>,
    ) -> Result<(), ImportError> {
        match u64_at(value, 0)? {
            0 => self.walk_page(value.get(16..).unwrap_or_default(), 0, 0, with),
            root => self.walk(root, 0, with),
        }
    }
}

/// Whether an etcd snapshot file ends with the SHA-256 of the rest. The pages are multiples of 512 bytes; what `etcdctl snapshot save`
/// writes has the digest behind them, a copy of a database has not.
#[must_use]
pub const fn has_digest(file: &[u8]) -> bool {
    file.len() % 512 == 32
}

/// Reads an etcd snapshot file, with or without the digest at its end, into a state that has applied nothing yet.
///
/// # Errors
/// What is wrong with the file.
pub fn import(file: &[u8]) -> Result<Store, ImportError> {
    let content = match file.split_last_chunk::<32>() {
        Some((content, digest)) if has_digest(file) => {
            if Sha256::digest(content).as_slice() != digest {
                return wrong(format!(
                    "the digest at offset {} does not fit the {0} bytes before it: they were damaged or the file was cut off",
                    content.len()
                ));
            }
            content
        }
        _ => file,
    };
    let (file, root) = File::open(content)?;
    let mut buckets = Vec::new();
    file.walk(root, 0, &mut |name, value| {
        buckets.push((name, value));
        Ok(())
    })?;
    let mut store = Store::default();
    let find = |wanted: &[u8]| buckets.iter().find(|(name, _)| *name == wanted).map(|(_, value)| *value);
    if let Some(bucket) = find(b"meta") {
        file.bucket(bucket, &mut |key, value| {
            if key == b"finishedCompactRev" {
                store.compacted = i64::from_be_bytes(number(value, 0)?);
            }
            Ok(())
        })?;
    }
    if let Some(bucket) = find(b"lease") {
        file.bucket(bucket, &mut |_, value| {
            let (id, ttl, remaining) = wire::lease(value).map_err(|error| ImportError(error.to_string()))?;
            store.leases.insert(id, Lease { ttl, remaining, ..Lease::default() });
            Ok(())
        })?;
    }
    let Some(bucket) = find(b"key") else { return wrong("it has no bucket \"key\": it is not an etcd's") };
    file.bucket(bucket, &mut |key, value| import_version(&mut store, key, value))?;
    // The last revisions may all be compacted away.
    store.revision = store.revision.max(store.compacted);
    Ok(store)
}

fn import_version(store: &mut Store, key: &[u8], value: &[u8]) -> Result<(), ImportError> {
    let main = i64::from_be_bytes(number(key, 0)?);
    let sub = i64::from_be_bytes(number(key, 9)?);
    let is_tombstone = key.get(17) == Some(&b't');
    let at = Revision { main, sub: u32::try_from(sub).unwrap_or(u32::MAX) };
    let kv = KeyValue::decode(value).map_err(|error| ImportError(format!("the version at {main}.{sub}: {error}")))?;
    if main < 1 || kv.key.is_empty() || store.log.last().is_some_and(|last| last.at >= at) {
        return wrong(format!("the version at {main}.{sub} has no key or is out of order"));
    }
    // etcd's tombstones do not repeat the revision.
    let kv = KeyValue { mod_revision: main, ..kv };
    let version = Version::new(at, is_tombstone, &kv, &mut store.scratch);
    store.append(version, &kv);
    store.revision = store.revision.max(main);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> Store {
        let mut store = Store::default();
        let put = |store: &mut Store, key: &str, len: usize, lease: i64| {
            let value = vec![b'v'; len];
            let put = wire::Put { key: key.as_bytes(), value: &value, lease, ..wire::Put::default() };
            store.apply_put(&put, &mut Vec::new()).unwrap();
        };
        for id in 1..200 {
            store.leases.insert(id, Lease { ttl: 100 + id, remaining: id % 3, ..Lease::default() });
        }
        for i in 0..3_000 {
            put(&mut store, &format!("key-{}", i % 700), i % 1_000, (i % 5) as i64);
        }
        put(&mut store, "large", 100_000, 0);
        let delete = wire::DeleteRange { key: b"key-3", range_end: b"key-4", prev_kv: false };
        store.apply_delete(&delete, &mut Vec::new()).unwrap();
        store.compact(1_000).unwrap();
        store.set_alarm(5, 1, true);
        store
    }

    fn file(store: &Store) -> Vec<u8> {
        let export = store.export();
        let bytes = export.bytes();
        let file: Vec<u8> = export.flat_map(|piece| piece.to_vec()).collect();
        assert_eq!(file.len() as u64, bytes);
        file
    }

    #[test]
    fn what_is_exported_is_imported() {
        let mut original = store();
        let mut copy = import(&file(&original)).unwrap();
        for store in [&mut original, &mut copy] {
            while store.sweep(1_000) {}
        }
        assert_eq!(copy.hash(0), original.hash(0));
        assert_eq!((copy.compacted(), copy.revision()), (1_000, original.revision()));
        let leases = |store: &Store| {
            let of = store.leases.iter().map(|(id, lease)| (id, lease.ttl, lease.remaining, lease.keys.clone()));
            of.collect::<Vec<_>>()
        };
        assert_eq!(leases(&copy), leases(&original));
        assert_eq!(file(&Store::default()).len() % PAGE, 0);
        assert_eq!(import(&file(&Store::default())).unwrap().revision(), 1);
    }

    #[test]
    fn a_damaged_file_is_refused_or_read_but_never_panics() {
        let mut whole = file(&store());
        let digest = Sha256::digest(&whole);
        whole.extend_from_slice(&digest);
        assert!(import(&whole).is_ok());
        let mut with_flip = whole.clone();
        with_flip[70_000] ^= 1;
        assert!(import(&with_flip).unwrap_err().to_string().contains("digest"));
        let bare = &whole[..whole.len() - 32];
        let mut seed = 7u64;
        for _ in 0..300 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let mut damaged = bare.to_vec();
            let at = (seed >> 20) as usize % damaged.len();
            damaged[at / PAGE * PAGE + at % 64] = seed as u8;
            let _ = import(&damaged);
            damaged.truncate(at);
            let _ = import(&damaged);
        }
        assert!(import(b"").is_err() && import(&[0; 9_000]).is_err());
    }
}
