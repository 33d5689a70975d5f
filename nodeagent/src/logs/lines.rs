//! From the file's entries to what the user reads.

use std::time::UNIX_EPOCH;

use minipod_proto::v1::MicroTime;

use super::{CHUNK_BYTES, LogOptions};

/// A line is held back until its last piece is there, but not for longer than this: then it goes out in parts.
const MAX_HELD_BYTES: usize = 1 << 20;

/// The parts of `<time> <stream> <tag> <text>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry<'a> {
    pub(super) time: &'a [u8],
    pub(super) is_stderr: bool,
    /// The line ends with it.
    pub(super) is_last: bool,
    pub(super) text: &'a [u8],
}

impl<'a> Entry<'a> {
    /// `None` for what is not in the format.
    pub(super) fn parse(line: &'a [u8]) -> Option<Self> {
        let mut parts = line.splitn(4, |byte| *byte == b' ');
        let (time, stream, tag) = (parts.next()?, parts.next()?, parts.next()?);
        let is_stderr = match stream {
            b"stdout" => false,
            b"stderr" => true,
            _ => return None,
        };
        // Tags are separated by colons, and the first says whether the line is whole.
        let is_last = match tag.split(|byte| *byte == b':').next()? {
            b"F" => true,
            b"P" => false,
            _ => return None,
        };
        Some(Self { time, is_stderr, is_last, text: parts.next().unwrap_or_default() })
    }
}

/// Puts lines together and chooses which are wanted.
pub(super) struct Lines {
    since: Option<String>,
    timestamps: bool,
    left_bytes: Option<u64>,
    /// Of stdout and stderr: the pieces of the line that is not at its end.
    held: [Vec<u8>; 2],
    out: Vec<u8>,
}

impl Lines {
    pub(super) fn new(options: &LogOptions) -> Self {
        let since = options.since.map(|since| {
            let nanos = since.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
            let seconds = i64::try_from(nanos / 1_000_000_000).unwrap_or(i64::MAX);
            let nanos = i32::try_from(nanos % 1_000_000_000).unwrap_or(0);
            // Digits compare like the times that they write: the year has four of them, and Z is left out.
            MicroTime { seconds, nanos }.to_string().trim_end_matches('Z').to_owned()
        });
        Self {
            since,
            timestamps: options.timestamps,
            left_bytes: options.limit_bytes,
            held: [Vec::new(), Vec::new()],
            out: Vec::new(),
        }
    }

    /// Takes a line of the file, without its end.
    pub(super) fn add(&mut self, line: &[u8]) {
        let Some(entry) = Entry::parse(line) else {
            // Not of the supervisor; better shown than hidden.
            self.put(line);
            self.put(b"\n");
            return;
        };
        if self.since.as_ref().is_some_and(|since| entry.time < since.as_bytes()) {
            return;
        }
        let mut held = std::mem::take(&mut self.held[usize::from(entry.is_stderr)]);
        if self.timestamps && held.is_empty() {
            held.extend_from_slice(entry.time);
            held.push(b' ');
        }
        held.extend_from_slice(entry.text);
        if entry.is_last {
            held.push(b'\n');
        }
        if entry.is_last || held.len() > MAX_HELD_BYTES {
            self.put(&held);
            held.clear();
        }
        self.held[usize::from(entry.is_stderr)] = held;
    }

    fn put(&mut self, bytes: &[u8]) {
        let bytes = match &mut self.left_bytes {
            None => bytes,
            Some(left) => {
                let most = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                *left -= most as u64;
                &bytes[..most]
            }
        };
        self.out.extend_from_slice(bytes);
    }

    /// Whether a full chunk waits.
    pub(super) fn has_chunk(&self) -> bool {
        self.out.len() >= CHUNK_BYTES
    }

    /// What waits, at most a chunk of it.
    pub(super) fn take_chunk(&mut self) -> Vec<u8> {
        let rest = self.out.split_off(self.out.len().min(CHUNK_BYTES));
        std::mem::replace(&mut self.out, rest)
    }

    /// Whether the limit was reached and everything was taken.
    pub(super) fn is_enough(&self) -> bool {
        self.left_bytes == Some(0) && self.out.is_empty()
    }

    /// The beginnings of lines whose end will not come, and what else waits.
    pub(super) fn finish(&mut self) -> Vec<u8> {
        for held in std::mem::take(&mut self.held) {
            self.put(&held);
        }
        std::mem::take(&mut self.out)
    }
}
