//! One log file: where to begin, the next lines, and the file that replaces it.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::LogError;
use super::lines::Entry;

/// Read at a time.
const BLOCK_BYTES: usize = 64 << 10;
/// The time, the stream and the tag of a line fit.
const HEAD_BYTES: usize = 64;
/// A line of the supervisor has at most 16 KiB of text; what is longer than this has no line ends and is cut.
const MAX_LINE_BYTES: usize = 1 << 20;

/// A log under its name, across rotation.
pub(super) struct LogFile {
    path: PathBuf,
    file: Option<File>,
    /// Read up to here.
    position: u64,
    /// A line's beginning.
    pending: Vec<u8>,
    /// Only for the file that is found first.
    tail_lines: Option<u64>,
    buffer: Vec<u8>,
}

impl LogFile {
    pub(super) fn new(path: PathBuf, tail_lines: Option<u64>) -> Self {
        Self { path, file: None, position: 0, pending: Vec::new(), tail_lines, buffer: vec![0; BLOCK_BYTES] }
    }

    fn error(&self, operation: &'static str) -> impl FnOnce(io::Error) -> LogError {
        let path = self.path.clone();
        move |source| LogError::Io { operation, path, source }
    }

    /// Reads one block and hands over its whole lines. False when there is nothing more now.
    pub(super) fn read(&mut self, each: &mut impl FnMut(&[u8])) -> Result<bool, LogError> {
        if self.file.is_none() && !self.open()? {
            return Ok(false);
        }
        let Some(file) = &self.file else { return Ok(false) };
        let got = match file.read_at(&mut self.buffer, self.position) {
            Err(error) if error.kind() == ErrorKind::Interrupted => return Ok(true),
            got => got.map_err(self.error("read"))?,
        };
        if got == 0 {
            return self.next_file();
        }
        self.position += got as u64;
        let mut rest = &self.buffer[..got];
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let (line, after) = rest.split_at(end);
            if self.pending.is_empty() {
                each(line);
            } else {
                self.pending.extend_from_slice(line);
                each(&self.pending);
                self.pending.clear();
            }
            rest = after.get(1..).unwrap_or_default();
        }
        self.pending.extend_from_slice(rest);
        if self.pending.len() > MAX_LINE_BYTES {
            each(&self.pending);
            self.pending.clear();
        }
        Ok(true)
    }

    /// The file to begin with: the oldest one that is left, or the one in which the last lines begin.
    fn open(&mut self) -> Result<bool, LogError> {
        let mut first: Option<(File, u64)> = None;
        let mut wanted = self.tail_lines;
        let mut last = None;
        // From the newest: a rotation meanwhile shows a file twice, and the other way round would hide one.
        for number in 0..=MAX_ROTATED {
            let file = match File::open(rotated(&self.path, number)) {
                // Between the two renames of a rotation the newest is missing.
                Err(error) if error.kind() == ErrorKind::NotFound && number == 0 => continue,
                Err(error) if error.kind() == ErrorKind::NotFound => break,
                file => file.map_err(self.error("open"))?,
            };
            let about = file.metadata().map_err(self.error("look at"))?;
            if last.replace((about.dev(), about.ino())) == Some((about.dev(), about.ino())) {
                continue;
            }
            let Some(lines) = &mut wanted else {
                first = Some((file, 0));
                continue;
            };
            let (start, found) = start_of_tail(&file, *lines).map_err(self.error("read"))?;
            *lines -= found;
            first = Some((file, start));
            if *lines == 0 {
                break;
            }
        }
        let Some((file, position)) = first else { return Ok(false) };
        (self.file, self.position, self.tail_lines) = (Some(file), position, None);
        Ok(true)
    }

    /// At the end of a file: whether another one has its name, or it was emptied.
    fn next_file(&mut self) -> Result<bool, LogError> {
        let Some(file) = &self.file else { return Ok(false) };
        let ours = file.metadata().map_err(self.error("look at"))?;
        if ours.len() < self.position {
            self.position = 0;
            self.pending.clear();
            return Ok(true);
        }
        match std::fs::metadata(&self.path) {
            Ok(named) if (named.dev(), named.ino()) == (ours.dev(), ours.ino()) => return Ok(false),
            // Between the two renames of a rotation.
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(self.error("look at")(error)),
            Ok(_) => {}
        }
        // The last lines before the rename may have come after our last read.
        if ours.len() > self.position {
            return Ok(true);
        }
        // More than one rotation behind: the older ones of the newer files come first.
        self.file = self.successor(&ours).map_err(self.error("open the successor of"))?;
        self.position = 0;
        Ok(self.file.is_some())
    }

    /// The file that was begun after the one with this metadata: `path.N` are older, the smaller the number the newer.
    fn successor(&self, ours: &std::fs::Metadata) -> io::Result<Option<File>> {
        let mut newer = File::open(&self.path)?;
        for number in 1..=MAX_ROTATED {
            let older = match File::open(rotated(&self.path, number)) {
                Err(error) if error.kind() == ErrorKind::NotFound => break,
                older => older?,
            };
            let meta = older.metadata()?;
            if (meta.dev(), meta.ino()) == (ours.dev(), ours.ino()) {
                return Ok(Some(newer));
            }
            newer = older;
        }
        // Ours is gone from the disk: go on with the current one; what lies between would be repeated or was removed too.
        File::open(&self.path).map(Some)
    }
}

/// Rotated files that are looked through: the supervisor keeps at most so many.
const MAX_ROTATED: u32 = 100;

/// The name of a log that was rotated so many times.
fn rotated(path: &Path, number: u32) -> PathBuf {
    if number == 0 {
        return path.to_owned();
    }
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    name.into()
}

/// Where the last `lines` lines begin, found from the end block by block; and how many of them there are.
fn start_of_tail(file: &File, lines: u64) -> io::Result<(u64, u64)> {
    let length = file.metadata()?.len();
    if lines == 0 {
        return Ok((length, 0));
    }
    let mut buffer = vec![0; BLOCK_BYTES + HEAD_BYTES];
    let (mut found, mut end, mut start) = (0, length, length);
    while end > 0 {
        let begin = end.saturating_sub(BLOCK_BYTES as u64);
        let size = usize::try_from(end - begin).unwrap_or(BLOCK_BYTES);
        // Heads of lines that begin in this block may reach into the next.
        let got = read_full_at(file, &mut buffer[..size + HEAD_BYTES], begin)?;
        for at in (0..size.min(got)).rev() {
            let absolute = begin + at as u64;
            let begins_line = absolute == 0 || (at > 0 && buffer[at - 1] == b'\n');
            let begins_line = begins_line || (at == 0 && byte_at(file, absolute - 1)? == Some(b'\n'));
            if !begins_line {
                continue;
            }
            let head = &buffer[at..got.min(at + HEAD_BYTES)];
            // A piece belongs to the line that ends after it; an unfinished line at the very end is one too.
            if Entry::parse(head).is_none_or(|entry| entry.is_last) || start == length {
                if found == lines {
                    return Ok((start, lines));
                }
                found += 1;
            }
            start = absolute;
        }
        end = begin;
    }
    Ok((start, found))
}

fn byte_at(file: &File, at: u64) -> io::Result<Option<u8>> {
    let mut byte = [0];
    Ok((read_full_at(file, &mut byte, at)? == 1).then_some(byte[0]))
}

fn read_full_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(got) => filled += got,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
