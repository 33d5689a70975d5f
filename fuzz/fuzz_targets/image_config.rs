//! The config of an image: whatever is in it, the image is taken or refused, and a refused one leaves nothing.
#![no_main]

mod common;

use libfuzzer_sys::fuzz_target;
use sha2::{Digest as _, Sha256};

fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

fuzz_target!(|input: (&[u8], &str)| {
    let (config, user) = input;
    // One empty layer, so that a config that names it is taken.
    let layer = [0_u8; 1024];
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest(config), "size": config.len() },
        "layers": [{ "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest(&layer), "size": layer.len() }],
    });
    let manifest = manifest.to_string();
    let index = serde_json::json!({
        "schemaVersion": 2,
        "manifests": [{ "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest(manifest.as_bytes()),
            "size": manifest.len(), "annotations": { "org.opencontainers.image.ref.name": "fuzz.example/image:1" } }],
    });
    let index = index.to_string();
    let mut archive = tar::Builder::new(Vec::new());
    let blob = |content: &[u8]| format!("blobs/sha256/{}", &digest(content)["sha256:".len()..]);
    let files = [
        ("oci-layout".to_owned(), &br#"{"imageLayoutVersion":"1.0.0"}"#[..]),
        ("index.json".to_owned(), index.as_bytes()),
        (blob(manifest.as_bytes()), manifest.as_bytes()),
        (blob(config), config),
        (blob(&layer), &layer[..]),
    ];
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, content).expect("in memory");
    }
    let node = common::Node::new();
    let archive = archive.into_inner().expect("in memory");
    for image in node.load(&archive, minipod_nodeagent::image::LoadKind::Auto) {
        let _ = node.store.resolve_user(&image, &image.config.user);
        let _ = node.store.resolve_user(&image, user);
        node.remove(&image);
    }
    node.is_clean();
});
