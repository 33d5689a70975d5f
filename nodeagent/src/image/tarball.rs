//! Reading tar streams: headers of the old, ustar, GNU and pax kinds, one entry after the other.
//!
//! The tar crate parses single headers for us. Its iterator is not used: it splits pax records at newlines, where their length
//! counts (a binary `security.capability` may hold a newline), and it reads headers of any size into memory.

use std::io::{self, ErrorKind, Read, Seek, SeekFrom};

use tar::{EntryType, Header};

use super::ImageError;

const BLOCK: usize = 512;
const XATTR: &[u8] = b"SCHILY.xattr.";

/// What the headers say of one entry.
#[derive(Debug)]
pub(super) struct Entry {
    /// As written.
    pub(super) path: Vec<u8>,
    /// Target of a symlink or hard link, as written.
    pub(super) link: Vec<u8>,
    pub(super) kind: EntryType,
    /// Bytes of content that follow.
    pub(super) size: u64,
    pub(super) mode: u32,
    pub(super) uid: u64,
    pub(super) gid: u64,
    /// Seconds and nanoseconds since the epoch.
    pub(super) mtime: (i64, u32),
    /// Name and value, in the archive's order.
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Where its content begins in the stream.
    pub(super) offset: u64,
}

/// A tar stream. Reading from it gives the content of the present entry.
#[derive(Debug)]
pub(super) struct Tar<R> {
    inner: R,
    skip: fn(&mut R, u64) -> io::Result<()>,
    position: u64,
    content_left: u64,
    padding: u64,
    max_header: u64,
    ended: bool,
}

impl<R: Read> Tar<R> {
    /// A stream that cannot seek. `max_header` bounds the headers of one entry, all of them together.
    pub(super) fn new(inner: R, max_header: u64) -> Self {
        Self { inner, skip: skip_reading, position: 0, content_left: 0, padding: 0, max_header, ended: false }
    }

    /// What it reads from, between entries.
    pub(super) fn inner_mut(&mut self) -> &mut R {
        &mut self.inner
    }

    /// Whether the end was marked as such, and not just the end of the data.
    pub(super) fn is_complete(&self) -> bool {
        self.ended
    }

    /// The next entry; what was not read of the present one is skipped.
    pub(super) fn next(&mut self) -> Result<Option<Entry>, ImageError> {
        let (mut extra, mut left) = (Extra::default(), self.max_header);
        loop {
            let Some(header) = self.header()? else {
                return if extra.is_empty() {
                    Ok(None)
                } else {
                    Err(malformed("a header announces a file that is not there"))
                };
            };
            let kind = header.entry_type();
            let size = if has_content(kind) { number_of(&header, header.entry_size(), |old| &old.size)? } else { 0 };
            if kind.is_pax_local_extensions() {
                let records = self.header_content(size, &mut left)?;
                extra.read_pax(&records)?;
            } else if kind.is_gnu_longname() {
                extra.path = Some(until_nul(self.header_content(size, &mut left)?));
            } else if kind.is_gnu_longlink() {
                extra.link = Some(until_nul(self.header_content(size, &mut left)?));
            } else if kind.is_pax_global_extensions() {
                // Comments of the archive as a whole, such as git's commit. Not read, but not endless either.
                self.take_header(size, &mut left)?;
            } else {
                return self.entry(&header, extra, size).map(Some);
            }
        }
    }

    fn entry(&mut self, header: &Header, extra: Extra, size: u64) -> Result<Entry, ImageError> {
        let mut kind = header.entry_type();
        if kind.is_gnu_sparse() || extra.is_sparse {
            return Err(ImageError::Unsupported("sparse files in an image archive".to_owned()));
        }
        let path = extra.path.unwrap_or_else(|| header.path_bytes().into_owned());
        if kind.is_file() && path.ends_with(b"/") {
            // How the oldest archives write a directory.
            kind = EntryType::Directory;
        }
        let size = if has_content(kind) { extra.size.unwrap_or(size) } else { 0 };
        let link = extra.link.or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned));
        let seconds = i64::try_from(number_of(header, header.mtime(), |old| &old.mtime)?).unwrap_or(0);
        let entry = Entry {
            path,
            link: link.unwrap_or_default(),
            kind,
            size,
            mode: number_of(header, header.mode(), |old| &old.mode)?,
            uid: extra.uid.map_or_else(|| number_of(header, header.uid(), |old| &old.uid), Ok)?,
            gid: extra.gid.map_or_else(|| number_of(header, header.gid(), |old| &old.gid), Ok)?,
            mtime: extra.mtime.unwrap_or((seconds, 0)),
            xattrs: extra.xattrs,
            offset: self.position,
        };
        self.begin(size)?;
        Ok(entry)
    }

    /// The next header block; `None` at the end.
    fn header(&mut self) -> Result<Option<Header>, ImageError> {
        if self.ended {
            return Ok(None);
        }
        let rest = self.content_left.saturating_add(self.padding);
        (self.skip)(&mut self.inner, rest).map_err(from_io)?;
        self.position = self.position.saturating_add(rest);
        (self.content_left, self.padding) = (0, 0);
        let mut block = [0; BLOCK];
        match read_full(&mut self.inner, &mut block).map_err(from_io)? {
            0 => return Ok(None),
            BLOCK => {}
            _ => return Err(cut_short()),
        }
        self.position += BLOCK as u64;
        if block.iter().all(|byte| *byte == 0) {
            self.ended = true;
            return Ok(None);
        }
        let header = Header::from_byte_slice(&block);
        if header.cksum().ok() != Some(checksum(&block)) {
            return Err(malformed("not a tar archive, or damaged: a header's checksum is wrong"));
        }
        Ok(Some(header.clone()))
    }

    fn begin(&mut self, size: u64) -> Result<(), ImageError> {
        self.padding = (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64;
        if self.position.checked_add(size).and_then(|end| end.checked_add(BLOCK as u64)).is_none() {
            return Err(malformed("an entry claims more bytes than can be"));
        }
        self.content_left = size;
        Ok(())
    }

    /// Begins a header beside the entry's own. They share one bound: what they say is kept until the entry comes, however many there are.
    fn take_header(&mut self, size: u64, left: &mut u64) -> Result<(), ImageError> {
        *left = left.checked_sub(size.saturating_add(BLOCK as u64)).ok_or_else(|| {
            let detail = "the headers of an entry".to_owned();
            ImageError::TooBig { limit: self.max_header, unit: "header bytes", detail }
        })?;
        self.begin(size)
    }

    /// The content of a header that describes the next entry.
    fn header_content(&mut self, size: u64, left: &mut u64) -> Result<Vec<u8>, ImageError> {
        self.take_header(size, left)?;
        let mut content = Vec::new();
        Read::take(&mut *self, size).read_to_end(&mut content).map_err(from_io)?;
        Ok(content)
    }
}

impl<R: Read + Seek> Tar<R> {
    /// A stream that can seek, for looking at the headers only.
    pub(super) fn seekable(inner: R, max_header: u64) -> Self {
        Self { skip: skip_seeking, ..Self::new(inner, max_header) }
    }
}

impl<R: Read> Read for Tar<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.content_left).unwrap_or(usize::MAX).min(buffer.len());
        if most == 0 {
            return Ok(0);
        }
        let got = self.inner.read(&mut buffer[..most])?;
        if got == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        self.content_left -= got as u64;
        self.position += got as u64;
        Ok(got)
    }
}

/// What pax and GNU headers say of the entry after them.
#[derive(Debug, Default)]
struct Extra {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    is_sparse: bool,
}

impl Extra {
    fn is_empty(&self) -> bool {
        self.path.is_none() && self.link.is_none() && self.size.is_none() && self.xattrs.is_empty()
    }

    /// Records are `<length> <key>=<value>\n`, where the length counts the record as a whole.
    fn read_pax(&mut self, mut records: &[u8]) -> Result<(), ImageError> {
        let bad = || malformed("a pax header is malformed");
        while !records.is_empty() {
            let space = records.iter().take(20).position(|b| *b == b' ').ok_or_else(bad)?;
            let length: usize = number(&records[..space]).ok_or_else(bad)?;
            let record = records.get(space + 1..length).ok_or_else(bad)?;
            let record = record.strip_suffix(b"\n").ok_or_else(bad)?;
            let equals = record.iter().position(|b| *b == b'=').ok_or_else(bad)?;
            self.set(&record[..equals], &record[equals + 1..]).ok_or_else(bad)?;
            records = &records[length..];
        }
        Ok(())
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        match key {
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => self.size = Some(number(value)?),
            b"uid" => self.uid = Some(number(value)?),
            b"gid" => self.gid = Some(number(value)?),
            b"mtime" => self.mtime = Some(time(value)?),
            _ if key.starts_with(b"GNU.sparse.") => self.is_sparse = true,
            _ if key.starts_with(XATTR) => self.xattrs.push((key[XATTR.len()..].to_vec(), value.to_vec())),
            _ => {}
        }
        Some(())
    }
}

fn number<T: std::str::FromStr>(text: &[u8]) -> Option<T> {
    std::str::from_utf8(text).ok().filter(|t| !t.starts_with('+'))?.parse().ok()
}

/// `[-]seconds[.fraction]`.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let nanos = fraction.bytes().chain(std::iter::repeat(b'0')).take(9).fold(0, |n, b| n * 10 + u32::from(b - b'0'));
    let whole: i64 = seconds.parse().ok()?;
    if text.starts_with('-') && nanos > 0 {
        return Some((whole.checked_sub(1)?, 1_000_000_000 - nanos));
    }
    Some((whole, nanos))
}

/// A number of a header as the tar crate reads it. Blank is zero, as everybody else's readers have it.
fn number_of<T: Default>(
    header: &Header,
    read: io::Result<T>,
    field: fn(&tar::OldHeader) -> &[u8],
) -> Result<T, ImageError> {
    let blank = || field(header.as_old()).iter().all(|byte| matches!(byte, 0 | b' '));
    read.or_else(|error| if blank() { Ok(T::default()) } else { Err(ImageError::Archive(error)) })
}

/// Links, directories, devices and pipes have none, whatever their header says.
fn has_content(kind: EntryType) -> bool {
    !(kind.is_hard_link()
        || kind.is_symlink()
        || kind.is_dir()
        || kind.is_character_special()
        || kind.is_block_special()
        || kind.is_fifo())
}

fn checksum(block: &[u8; BLOCK]) -> u32 {
    let sum = |bytes: &[u8]| bytes.iter().map(|b| u32::from(*b)).sum::<u32>();
    sum(&block[..148]) + 8 * u32::from(b' ') + sum(&block[156..])
}

fn until_nul(mut text: Vec<u8>) -> Vec<u8> {
    text.truncate(text.iter().position(|b| *b == 0).unwrap_or(text.len()));
    text
}

fn read_full(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match reader.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

fn skip_reading<R: Read>(reader: &mut R, bytes: u64) -> io::Result<()> {
    if io::copy(&mut reader.take(bytes), &mut io::sink())? < bytes {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    Ok(())
}

fn skip_seeking<R: Read + Seek>(reader: &mut R, bytes: u64) -> io::Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    // Seeking beyond the end is no error by itself: read the last byte.
    let step = i64::try_from(bytes - 1).map_err(io::Error::other)?;
    reader.seek(SeekFrom::Current(step))?;
    reader.read_exact(&mut [0])
}

/// The error of a reader, or of ours that came through one.
pub(super) fn from_io(error: io::Error) -> ImageError {
    match error.downcast::<ImageError>() {
        Ok(ours) => ours,
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => cut_short(),
        Err(error) => ImageError::Archive(error),
    }
}

fn cut_short() -> ImageError {
    ImageError::Malformed("the archive is cut short".to_owned())
}

fn malformed(text: &str) -> ImageError {
    ImageError::Malformed(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_times() {
        for (text, want) in [
            ("0", Some((0, 0))),
            ("1700000000", Some((1_700_000_000, 0))),
            ("1700000000.5", Some((1_700_000_000, 500_000_000))),
            ("1.000000001999", Some((1, 1))),
            ("-1", Some((-1, 0))),
            ("-1.25", Some((-2, 750_000_000))),
            ("-0.25", Some((-1, 750_000_000))),
            ("1.x", None),
            ("", None),
            ("-9223372036854775808.5", None),
            ("99999999999999999999", None),
        ] {
            assert_eq!(time(text.as_bytes()), want, "{text}");
        }
    }

    #[test]
    fn blank_numbers_of_a_header_are_zero() {
        // Found by fuzzing: the tar crate takes them for no numbers, GNU tar and Go for 0.
        for blank in [0, b' '] {
            let mut header = Header::new_gnu();
            header.as_old_mut().name[0] = b'a';
            let old = header.as_old_mut();
            for field in [&mut old.uid[..], &mut old.gid, &mut old.mode, &mut old.mtime, &mut old.size] {
                field.fill(blank);
            }
            header.set_cksum();
            let archive = [header.as_bytes().as_slice(), &[0; 2 * BLOCK]].concat();
            let mut tar = Tar::new(archive.as_slice(), 1 << 20);
            let entry = tar.next().expect("read").expect("an entry");
            let numbers = (entry.uid, entry.gid, entry.mode, entry.mtime, entry.size);
            assert_eq!((entry.path.as_slice(), numbers), (b"a".as_slice(), (0, 0, 0, (0, 0), 0)));
            assert!(tar.next().expect("read").is_none() && tar.is_complete());
            header.as_old_mut().uid.copy_from_slice(b"  12x\0  ");
            header.set_cksum();
            assert!(Tar::new(header.as_bytes().as_slice(), 1 << 20).next().is_err(), "what is no number is none");
        }
    }

    #[test]
    fn reads_pax_records_by_length() {
        let mut extra = Extra::default();
        let value = b"\x01\n\0=x";
        let mut records = b"0 path=a\nb\n".to_vec();
        records[0] = b'0' + u8::try_from(records.len()).expect("short") % 10;
        records.insert(0, b'1');
        // "12 path=a\nb\n" is 12 bytes.
        records[1] = b'2';
        let xattr = [b" SCHILY.xattr.security.capability=".as_slice(), value, b"\n"].concat();
        records.extend(format!("{}", xattr.len() + 2).into_bytes());
        records.extend(&xattr);
        extra.read_pax(&records).expect("good records");
        assert_eq!(extra.path.as_deref(), Some(b"a\nb".as_slice()));
        assert_eq!(extra.xattrs, [(b"security.capability".to_vec(), value.to_vec())]);
        for bad in ["5", "x a=b\n", "99 a=b\n", "6 a=bc", "3 a\n", "0 a=b\n", "12 size=-1\n\n", "+6 a=b\n"] {
            assert!(Extra::default().read_pax(bad.as_bytes()).is_err(), "{bad:?}");
        }
    }
}
