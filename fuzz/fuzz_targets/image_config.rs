//! The config of an image, and the users that it names: whatever is in them, the image is taken or refused, and a refused one leaves nothing.
//!
//! An input is texts with NUL bytes between them: the config, a user, and the image's /etc/passwd and /etc/group. So the seeds are files
//! that people can read.
#![no_main]

mod common;

use common::digest;
use libfuzzer_sys::fuzz_target;

/// In a config: the digest of the layer, which the engine cannot guess.
const LAYER: &str = "sha256:LAYER";

/// An archive of these files.
fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        archive.append_data(&mut header, name, *content).expect("in memory");
    }
    archive.into_inner().expect("in memory")
}

fuzz_target!(|input: &[u8]| {
    let mut texts = input.splitn(4, |byte| *byte == 0);
    let mut next = || texts.next().unwrap_or_default();
    let (config, user, passwd, group) = (next(), next(), next(), next());
    let layer = tar(&[("etc/passwd", passwd), ("etc/group", group)]);
    let config = match std::str::from_utf8(config) {
        Ok(text) => text.replace(LAYER, &digest(&layer)).into_bytes(),
        Err(_) => config.to_vec(),
    };
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest(&config), "size": config.len() },
        "layers": [{ "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest(&layer), "size": layer.len() }],
    });
    let manifest = manifest.to_string();
    let index = serde_json::json!({
        "schemaVersion": 2,
        "manifests": [{ "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest(manifest.as_bytes()),
            "size": manifest.len(), "annotations": { "org.opencontainers.image.ref.name": "fuzz.example/image:1" } }],
    });
    let index = index.to_string();
    let blob = |content: &[u8]| format!("blobs/sha256/{}", &digest(content)["sha256:".len()..]);
    let archive = tar(&[
        ("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#),
        ("index.json", index.as_bytes()),
        (&blob(manifest.as_bytes()), manifest.as_bytes()),
        (&blob(&config), &config),
        (&blob(&layer), &layer),
    ]);
    let node = common::Node::new();
    for image in node.load(&archive, minipod_nodeagent::image::LoadKind::Auto) {
        let _ = node.store.resolve_user(&image, &image.config.user);
        if let Ok(user) = std::str::from_utf8(user) {
            let _ = node.store.resolve_user(&image, user);
        }
        node.remove(&image);
    }
    node.is_clean();
});
