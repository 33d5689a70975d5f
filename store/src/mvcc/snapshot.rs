//! The whole state as chunks, and back.
//!
//! A snapshot is the revision log with leases and alarms; the index is made anew from it. The chunks:
//!
//! ```text
//! first   magic "minipod-store-1\n", then applied, revision, compacted, last lease epoch (8 bytes each, big endian)
//! 'L'     leases: id, ttl, remaining, epoch (8 bytes each) …
//! 'A'     alarms: member (8 bytes), kind (4 bytes) …
//! 'V'     versions: main (8), sub (4), tombstone (1), length (4), encoded KeyValue …
//! 'E'     the end: how many versions there were (8)
//! ```

use super::{Log, Revision, Store, Version};
use crate::lease::Lease;
use bytes::Bytes;

/// No chunk is longer, unless a single version is.
pub const MAX_CHUNK_BYTES: usize = 1 << 20;

const MAGIC: &[u8] = b"minipod-store-1\n";
const LEASE_BYTES: usize = 32;

impl Store {
    /// Starts a snapshot of the state as it is now; the chunks are made as they are asked for.
    pub fn snapshot(&self) -> impl Iterator<Item = Bytes> + Send + 'static {
        let mut first = MAGIC.to_vec();
        first.extend(self.applied.to_be_bytes());
        first.extend(self.revision.to_be_bytes());
        first.extend(self.compacted.to_be_bytes());
        first.extend(self.leases.last_epoch().to_be_bytes());
        let mut head = vec![Bytes::from(first)];
        let leases = self.leases.iter();
        let leases: Vec<_> = leases.map(|(id, lease)| [id, lease.ttl, lease.remaining, lease.epoch as i64]).collect();
        for some in leases.chunks(MAX_CHUNK_BYTES / LEASE_BYTES - 1) {
            let numbers = some.iter().flatten().flat_map(|number| number.to_be_bytes());
            head.push(std::iter::once(b'L').chain(numbers).collect());
        }
        let alarms = self
            .alarms()
            .flat_map(|(member, kind)| member.to_be_bytes().into_iter().chain(kind.to_be_bytes()).collect::<Vec<u8>>());
        head.push(std::iter::once(b'A').chain(alarms).collect());
        head.into_iter().chain(Versions { log: self.log.clone(), next: Some(Revision { main: i64::MIN, sub: 0 }) })
    }
}

/// Makes the chunks of versions, and the last one.
struct Versions {
    log: Log,
    /// Where the next chunk begins.
    next: Option<Revision>,
}

impl Iterator for Versions {
    type Item = Bytes;

    fn next(&mut self) -> Option<Bytes> {
        let next = self.next.take()?;
        let mut chunk = vec![b'V'];
        for version in self.log.from(next.main).skip_while(|version| version.at < next) {
            if chunk.len() > 1 && chunk.len() + version.encoded().len() + 17 > MAX_CHUNK_BYTES {
                self.next = Some(version.at);
                return Some(chunk.into());
            }
            chunk.extend(version.at.main.to_be_bytes());
            chunk.extend(version.at.sub.to_be_bytes());
            chunk.push(u8::from(version.is_tombstone));
            chunk.extend((version.encoded().len() as u32).to_be_bytes());
            chunk.extend_from_slice(version.encoded());
            self.next = Some(Revision { main: version.at.main, sub: version.at.sub + 1 });
        }
        if chunk.len() > 1 {
            return Some(chunk.into());
        }
        self.next = None;
        Some(std::iter::once(b'E').chain((self.log.len() as u64).to_be_bytes()).collect())
    }
}

/// A state that is being put together from chunks.
#[derive(Debug, Default)]
pub struct Restore {
    store: Store,
    begun: bool,
    ended: bool,
}

impl Restore {
    /// Takes the next chunk.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn chunk(&mut self, chunk: &[u8]) -> Result<(), String> {
        if self.ended {
            return Err("there is a chunk after the end".to_owned());
        }
        if !self.begun {
            let rest = chunk
                .strip_prefix(MAGIC)
                .ok_or("it does not begin with \"minipod-store-1\": another format or version")?;
            let mut rest = Reader(rest);
            self.store.applied = rest.u64()?;
            self.store.revision = rest.u64()? as i64;
            self.store.compacted = rest.u64()? as i64;
            self.store.leases.restart(rest.u64()?);
            self.begun = true;
            return rest.end();
        }
        let (&kind, rest) = chunk.split_first().ok_or("it is empty")?;
        let mut rest = Reader(rest);
        match kind {
            b'L' => {
                while !rest.0.is_empty() {
                    let (id, ttl, remaining) = (rest.u64()? as i64, rest.u64()? as i64, rest.u64()? as i64);
                    let lease = Lease { ttl, remaining, epoch: rest.u64()?, ..Lease::default() };
                    self.store.leases.restore(id, lease);
                }
            }
            b'A' => {
                while !rest.0.is_empty() {
                    let (member, kind) = (rest.u64()?, rest.u32()? as i32);
                    self.store.set_alarm(member, kind, true);
                }
            }
            b'V' => {
                while !rest.0.is_empty() {
                    self.version(&mut rest)?;
                }
            }
            b'E' => {
                let (said, had) = (rest.u64()?, self.store.log.len() as u64);
                if said != had {
                    return Err(format!("it ends after {had} versions where {said} were written"));
                }
                self.ended = true;
            }
            other => return Err(format!("it is of unknown kind {other:#04x}")),
        }
        rest.end()
    }

    fn version(&mut self, rest: &mut Reader<'_>) -> Result<(), String> {
        let at = Revision { main: rest.u64()? as i64, sub: rest.u32()? };
        let is_tombstone = rest.take(1)? == [1];
        let len = rest.u32()? as usize;
        let version = Version::from_parts(at, is_tombstone, rest.take(len)?)
            .ok_or_else(|| format!("the version at {}.{} is not a key of that revision", at.main, at.sub))?;
        if self.store.log.last().is_some_and(|last| last.at >= at) || at.main > self.store.revision {
            return Err(format!("the version at {}.{} is out of order", at.main, at.sub));
        }
        let copy = version.clone();
        self.store.append(version, &copy.kv());
        Ok(())
    }

    /// The state, when all chunks have come.
    ///
    /// # Errors
    /// When the end is missing.
    pub fn finish(self) -> Result<Store, String> {
        if self.ended { Ok(self.store) } else { Err("the end is missing: the snapshot was cut off".to_owned()) }
    }
}

/// Big endian numbers and bytes.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], String> {
        let (head, tail) = self.0.split_at_checked(len).ok_or("it ends within an entry")?;
        self.0 = tail;
        Ok(head)
    }
    fn u64(&mut self) -> Result<u64, String> {
        Ok(self.take(8)?.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }
    fn u32(&mut self) -> Result<u32, String> {
        Ok(self.take(4)?.iter().fold(0, |value, byte| value << 8 | u32::from(*byte)))
    }
    fn end(&self) -> Result<(), String> {
        if self.0.is_empty() { Ok(()) } else { Err(format!("{} bytes are left over", self.0.len())) }
    }
}
