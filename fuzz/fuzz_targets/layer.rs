//! A layer: whatever its entries are called and point to, nothing is touched outside, and nothing stays of one that is refused.
#![no_main]

mod common;

use std::io::Write as _;

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use minipod_nodeagent::image::LoadKind;
use tar::{EntryType, Header};

/// Names that mean something, so that the engine need not find them.
const PARTS: [&str; 12] = ["a", "b", "..", ".", "", "/", ".wh.a", ".wh..wh..opq", ".wh.", "etc", "a/b", "../../witness"];

#[derive(Debug, Arbitrary)]
enum Name {
    Known(Vec<u8>),
    Free(Vec<u8>),
}

impl Name {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Known(parts) => {
                let parts: Vec<&str> = parts.iter().map(|part| PARTS[usize::from(*part) % PARTS.len()]).collect();
                parts.join("/").into_bytes()
            }
            Self::Free(bytes) => bytes.clone(),
        }
    }
}

/// What pax headers may say; the last is cut short.
const KEYS: [&str; 14] = [
    "path",
    "linkpath",
    "size",
    "uid",
    "gid",
    "mtime",
    "SCHILY.xattr.user.a",
    "SCHILY.xattr.security.capability",
    "SCHILY.xattr.trusted.overlay.opaque",
    "SCHILY.xattr.",
    "GNU.sparse.major",
    "comment",
    "hdrcharset",
    "",
];

#[derive(Debug, Arbitrary)]
enum Content {
    Free(Vec<u8>),
    /// Records in their form, which the engine would not find: each has its own length in it.
    Pax(Vec<(u8, Name)>),
}

impl Content {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Free(bytes) => bytes.clone(),
            Self::Pax(records) => records.iter().flat_map(|(key, value)| record(*key, &value.bytes())).collect(),
        }
    }
}

/// `<length> <key>=<value>\n`, where the length counts the record as a whole.
fn record(key: u8, value: &[u8]) -> Vec<u8> {
    let key = KEYS[usize::from(key) % KEYS.len()];
    let rest = key.len() + value.len() + 3;
    // The number's own digits may make it a digit longer.
    let digits = (1..).find(|digits| (rest + digits).to_string().len() == *digits).unwrap_or(1);
    let mut record = format!("{} {key}=", rest + digits).into_bytes();
    record.extend_from_slice(value);
    record.push(b'\n');
    record
}

#[derive(Debug, Arbitrary)]
struct Item {
    kind: u8,
    name: Name,
    link: Name,
    mode: u16,
    content: Content,
    /// As the header says it, where that is its flaw.
    size: u32,
    /// One in some: most items are to get as far as the unpacker.
    flaw: u8,
}

/// What is wrong with an item's header, by the flaw's number.
const WRONG_CHECKSUM: u8 = 255;
const WRONG_SIZE: [u8; 2] = [253, 254];

#[derive(Debug, Arbitrary)]
struct Layer {
    items: Vec<Item>,
    /// After the items.
    rest: Vec<u8>,
    cut: u16,
    zipped: bool,
}

impl Layer {
    fn bytes(&self) -> Vec<u8> {
        const KINDS: [EntryType; 10] = [
            EntryType::Regular,
            EntryType::Directory,
            EntryType::Symlink,
            EntryType::Link,
            EntryType::Char,
            EntryType::Fifo,
            EntryType::XHeader,
            EntryType::XGlobalHeader,
            EntryType::GNULongName,
            EntryType::GNULongLink,
        ];
        let mut out = Vec::new();
        for item in &self.items {
            let mut header = Header::new_gnu();
            header.set_entry_type(match item.kind {
                kind @ 0..200 => KINDS[usize::from(kind) % KINDS.len()],
                other => EntryType::new(other),
            });
            let old = header.as_old_mut();
            copy(&mut old.name, &item.name.bytes());
            copy(&mut old.linkname, &item.link.bytes());
            header.set_mode(u32::from(item.mode));
            header.set_uid(u64::from(item.mode));
            header.set_gid(0);
            header.set_mtime(u64::from(item.mode));
            let content = item.content.bytes();
            let size = if WRONG_SIZE.contains(&item.flaw) { u64::from(item.size) } else { content.len() as u64 };
            header.set_size(size);
            header.set_cksum();
            if item.flaw == WRONG_CHECKSUM {
                header.as_mut_bytes()[0] ^= 1;
            }
            out.extend_from_slice(header.as_bytes());
            out.extend_from_slice(&content);
            out.resize(out.len().next_multiple_of(512), 0);
        }
        out.extend_from_slice(&self.rest);
        out.resize(out.len() + 1024, 0);
        if self.zipped {
            let mut zipped = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            zipped.write_all(&out).expect("in memory");
            out = zipped.finish().expect("in memory");
        }
        // Half of them are whole.
        if let Some(cut) = self.cut.checked_sub(1 << 15) {
            out.truncate(usize::from(cut));
        }
        out
    }
}

fn copy(field: &mut [u8], text: &[u8]) {
    let length = text.len().min(field.len());
    field[..length].copy_from_slice(&text[..length]);
}

fuzz_target!(|layer: Layer| {
    let node = common::Node::new();
    for image in node.load(&layer.bytes(), LoadKind::Rootfs) {
        let _ = node.store.resolve_user(&image, "a:b");
        node.remove(&image);
    }
    node.is_clean();
});
