//! A layer: whatever its entries are called and point to, nothing is touched outside, and nothing stays of one that is refused.
#![no_main]

mod common;

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

#[derive(Debug, Arbitrary)]
struct Item {
    kind: u8,
    name: Name,
    link: Name,
    mode: u16,
    /// As the header says it, if not the content's own.
    size: Option<u32>,
    content: Vec<u8>,
    /// A checksum that is wrong.
    damaged: bool,
}

#[derive(Debug, Arbitrary)]
struct Layer {
    items: Vec<Item>,
    /// After the items.
    rest: Vec<u8>,
    cut: Option<u16>,
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
            header.set_entry_type(KINDS.get(usize::from(item.kind)).copied().unwrap_or(EntryType::new(item.kind)));
            let old = header.as_old_mut();
            copy(&mut old.name, &item.name.bytes());
            copy(&mut old.linkname, &item.link.bytes());
            header.set_mode(u32::from(item.mode));
            header.set_size(item.size.map_or(item.content.len() as u64, u64::from));
            header.set_cksum();
            if item.damaged {
                header.as_mut_bytes()[0] ^= 1;
            }
            out.extend_from_slice(header.as_bytes());
            out.extend_from_slice(&item.content);
            out.resize(out.len().next_multiple_of(512), 0);
        }
        out.extend_from_slice(&self.rest);
        out.resize(out.len() + 1024, 0);
        if let Some(cut) = self.cut {
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
