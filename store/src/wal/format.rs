//! How records lie in a segment. Pure: bytes in, bytes out.
//!
//! ```text
//! segment  header (64 bytes, alone in the first 512) · records from byte 512 · zeros
//! header   "MPODWAL\n" version:u32 zero:u32 cluster:u64 member:u64 sequence:u64 nonce:u64 zero:u64 zero:u32 crc:u32
//! record   "REC\x01" length:u32 crc:u32 zero:u32 payload, then zeros up to a multiple of 16
//! payload  term:u64 vote:u64 commit:u64 epoch:u64 markers:u32 entries:u32 marker* entry*
//! marker   index:u64 term:u64 installed:u8
//! entry    type:u8 term:u64 index:u64 context_len:u32 data_len:u32 context data
//! ```
//!
//! All numbers are little endian. A record's CRC covers the segment's nonce, the record's offset, the length and the payload: a record is
//! valid at its own place only, and bytes of a value that look like a record are none.

use raft::eraftpb::{Entry, HardState};

/// The version of the format that this code writes and reads.
pub const VERSION: u32 = 1;
/// Where the first record begins: the header has a sector for itself, which no later write touches.
pub const FIRST_RECORD: u64 = 512;
/// Records begin at multiples of this.
pub const ALIGNMENT: u64 = 16;
/// Bytes of a record before its payload.
pub const RECORD_HEADER: usize = 16;
/// Bytes of a header that are in use.
const HEADER: usize = 64;
const HEADER_MAGIC: [u8; 8] = *b"MPODWAL\n";
const RECORD_MAGIC: [u8; 4] = *b"REC\x01";

/// To which cluster and member a directory belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// The cluster.
    pub cluster_id: u64,
    /// The member.
    pub member_id: u64,
}

/// The first bytes of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Whose log it is.
    pub identity: Identity,
    /// The segment's place in the log, from 1.
    pub sequence: u64,
    /// Makes the checksums of this segment its own.
    pub nonce: u64,
}

/// What is wrong with a header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeaderProblem {
    /// It is not one of ours, or damaged.
    Damaged,
    /// It is intact, but of a version that this program does not know.
    Version(u32),
}

/// The state that every record repeats, so that the last record alone has it all.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct State {
    /// Term, vote and commit of raft.
    pub hard: HardState,
    /// How often this member has been started; the number of the sessions of its proposals.
    pub epoch: u64,
}

/// Says that a snapshot is durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Marker {
    /// The last entry that the snapshot contains.
    pub index: u64,
    /// That entry's term.
    pub term: u64,
    /// Whether the snapshot came from elsewhere and the log before it is no longer valid.
    pub installed: bool,
}

/// A decoded record.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Record {
    /// The state after it.
    pub state: State,
    /// The snapshots that it makes known.
    pub markers: Vec<Marker>,
    /// The entries that it appends.
    pub entries: Vec<Entry>,
}

impl Header {
    /// The header's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(&HEADER_MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.identity.cluster_id.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.identity.member_id.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.nonce.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..HEADER - 4]);
        bytes[HEADER - 4..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads the header at the beginning of a segment.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(segment: &[u8]) -> Result<Self, HeaderProblem> {
        let bytes = segment.get(..HEADER).ok_or(HeaderProblem::Damaged)?;
        let mut fields = Fields(bytes);
        let magic = fields.take(8);
        let version = fields.u32();
        let (_, cluster, member) = (fields.u32(), fields.u64(), fields.u64());
        let (sequence, nonce) = (fields.u64(), fields.u64());
        let _ = (fields.u64(), fields.u32());
        let crc = fields.u32();
        if magic != Some(&HEADER_MAGIC[..]) || crc != Some(crc32fast::hash(&bytes[..HEADER - 4])) {
            return Err(HeaderProblem::Damaged);
        }
        match (version, cluster, member, sequence, nonce) {
            (Some(VERSION), Some(cluster_id), Some(member_id), Some(sequence), Some(nonce)) => {
                Ok(Self { identity: Identity { cluster_id, member_id }, sequence, nonce })
            }
            (Some(version), ..) => Err(HeaderProblem::Version(version)),
            _ => Err(HeaderProblem::Damaged),
        }
    }
}

/// Bytes that a record with these parts takes in a segment.
#[must_use]
pub fn record_len(markers: usize, entries: &[Entry]) -> u64 {
    let entries: usize = entries.iter().map(|entry| 25 + entry.context.len() + entry.data.len()).sum();
    aligned((RECORD_HEADER + 40 + markers * 17 + entries) as u64)
}

/// The next multiple of [`ALIGNMENT`].
#[must_use]
pub const fn aligned(len: u64) -> u64 {
    len.next_multiple_of(ALIGNMENT)
}

/// Writes a record for `offset` of the segment with this nonce into `out`, which is emptied first.
pub fn encode_record(out: &mut Vec<u8>, nonce: u64, offset: u64, state: &State, content: (&[Marker], &[Entry])) {
    let (markers, entries) = content;
    out.clear();
    out.extend_from_slice(&[0; RECORD_HEADER]);
    for number in [state.hard.term, state.hard.vote, state.hard.commit, state.epoch] {
        out.extend_from_slice(&number.to_le_bytes());
    }
    out.extend_from_slice(&count(markers.len()).to_le_bytes());
    out.extend_from_slice(&count(entries.len()).to_le_bytes());
    for marker in markers {
        out.extend_from_slice(&marker.index.to_le_bytes());
        out.extend_from_slice(&marker.term.to_le_bytes());
        out.push(u8::from(marker.installed));
    }
    for entry in entries {
        out.push(u8::try_from(entry.entry_type).unwrap_or(u8::MAX));
        out.extend_from_slice(&entry.term.to_le_bytes());
        out.extend_from_slice(&entry.index.to_le_bytes());
        out.extend_from_slice(&count(entry.context.len()).to_le_bytes());
        out.extend_from_slice(&count(entry.data.len()).to_le_bytes());
        out.extend_from_slice(&entry.context);
        out.extend_from_slice(&entry.data);
    }
    let length = count(out.len() - RECORD_HEADER);
    let crc = record_crc(nonce, offset, length, &out[RECORD_HEADER..]);
    out[..4].copy_from_slice(&RECORD_MAGIC);
    out[4..8].copy_from_slice(&length.to_le_bytes());
    out[8..12].copy_from_slice(&crc.to_le_bytes());
    out.resize(usize::try_from(aligned(out.len() as u64)).unwrap_or(usize::MAX), 0);
}

/// Lengths are far below 4 GiB: a record is bounded by the batch that made it.
fn count(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

fn record_crc(nonce: u64, offset: u64, length: u32, payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&nonce.to_le_bytes());
    hasher.update(&offset.to_le_bytes());
    hasher.update(&length.to_le_bytes());
    hasher.update(payload);
    hasher.finalize()
}

/// The payload of the record at `offset` and the offset after it, if there is a valid one.
#[must_use]
pub fn record_at(segment: &[u8], nonce: u64, offset: u64) -> Option<(&[u8], u64)> {
    let start = usize::try_from(offset).ok()?;
    let header = segment.get(start..start.checked_add(RECORD_HEADER)?)?;
    let mut fields = Fields(header);
    if fields.take(4)? != RECORD_MAGIC {
        return None;
    }
    let (length, crc) = (fields.u32()?, fields.u32()?);
    let from = start + RECORD_HEADER;
    let payload = segment.get(from..from.checked_add(usize::try_from(length).ok()?)?)?;
    (record_crc(nonce, offset, length, payload) == crc)
        .then(|| (payload, offset + aligned((RECORD_HEADER + payload.len()) as u64)))
}

/// The offset of the first valid record after `offset`.
#[must_use]
pub fn next_valid_record(segment: &[u8], nonce: u64, offset: u64) -> Option<u64> {
    let end = segment.len() as u64;
    let mut at = offset + ALIGNMENT;
    while at < end {
        if record_at(segment, nonce, at).is_some() {
            return Some(at);
        }
        at += ALIGNMENT;
    }
    None
}

/// Decodes a payload whose checksum was right; `None` when it does not follow the format all the same.
#[must_use]
pub fn decode_record(payload: &[u8]) -> Option<Record> {
    let mut fields = Fields(payload);
    let (term, vote, commit, epoch) = (fields.u64()?, fields.u64()?, fields.u64()?, fields.u64()?);
    let (markers, entries) = (fields.u32()?, fields.u32()?);
    let mut record = Record { state: State { hard: HardState { term, vote, commit }, epoch }, ..Record::default() };
    for _ in 0..markers {
        let (index, term) = (fields.u64()?, fields.u64()?);
        record.markers.push(Marker { index, term, installed: fields.u8()? != 0 });
    }
    for _ in 0..entries {
        let entry_type = i32::from(fields.u8()?);
        let (term, index) = (fields.u64()?, fields.u64()?);
        let (context_len, data_len) = (fields.u32()?, fields.u32()?);
        let context = fields.take(usize::try_from(context_len).ok()?)?.to_vec();
        let data = fields.take(usize::try_from(data_len).ok()?)?.to_vec();
        record.entries.push(Entry { entry_type, term, index, data, context, ..Entry::default() });
    }
    fields.0.is_empty().then_some(record)
}

/// Reads numbers from the front.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Record {
        Record {
            state: State { hard: HardState { term: 7, vote: 2, commit: 40 }, epoch: 3 },
            markers: vec![Marker { index: 40, term: 6, installed: true }],
            entries: vec![
                Entry { term: 7, index: 41, data: vec![1; 100], context: vec![2; 33], ..Entry::default() },
                Entry { entry_type: 2, term: 7, index: 42, ..Entry::default() },
            ],
        }
    }

    fn encoded(record: &Record, nonce: u64, offset: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        encode_record(&mut bytes, nonce, offset, &record.state, (&record.markers, &record.entries));
        bytes
    }

    #[test]
    fn a_record_comes_back_at_its_place_and_nowhere_else() {
        let record = sample();
        let bytes = encoded(&record, 99, 512);
        assert_eq!(bytes.len() as u64, record_len(record.markers.len(), &record.entries));
        let mut segment = vec![0; 512];
        segment.extend_from_slice(&bytes);
        let (payload, next) = record_at(&segment, 99, 512).expect("valid at its place");
        assert_eq!(next, segment.len() as u64);
        assert_eq!(decode_record(payload), Some(record));
        assert!(record_at(&segment, 98, 512).is_none(), "another segment's nonce");
        let mut moved = vec![0; 528];
        moved.extend_from_slice(&bytes);
        assert!(record_at(&moved, 99, 528).is_none(), "another offset");
        assert_eq!(next_valid_record(&segment, 99, 0), Some(512));
    }

    #[test]
    fn no_flipped_bit_goes_unseen() {
        let record = Record {
            entries: vec![Entry { term: 1, index: 2, data: b"x".to_vec(), ..Entry::default() }],
            ..Record::default()
        };
        let bytes = encoded(&record, 5, 0);
        // The last bytes are padding, and the four before the payload are unused.
        let meaningful = RECORD_HEADER + 40 + 25 + 1;
        for bit in 0..meaningful * 8 {
            if (12 * 8..16 * 8).contains(&bit) {
                continue;
            }
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(record_at(&damaged, 5, 0).is_none(), "bit {bit}");
        }
    }

    #[test]
    fn headers_are_checked() {
        let header = Header { identity: Identity { cluster_id: 1, member_id: 2 }, sequence: 3, nonce: 4 };
        let good = header.encode();
        assert_eq!(Header::decode(&good), Ok(header));
        assert_eq!(Header::decode(&good[..63]), Err(HeaderProblem::Damaged));
        for byte in 0..good.len() {
            let mut damaged = good;
            damaged[byte] ^= 1;
            assert_eq!(Header::decode(&damaged), Err(HeaderProblem::Damaged), "byte {byte}");
        }
        let mut newer = good;
        newer[8] = 9;
        let crc = crc32fast::hash(&newer[..60]);
        newer[60..].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(Header::decode(&newer), Err(HeaderProblem::Version(9)));
    }

    #[test]
    fn nothing_that_is_cut_short_panics() {
        let bytes = encoded(&sample(), 5, 0);
        for len in 0..bytes.len() {
            let _ = record_at(&bytes[..len], 5, 0);
            let _ = decode_record(&bytes[..len]);
            let _ = Header::decode(&bytes[..len]);
        }
    }
}
