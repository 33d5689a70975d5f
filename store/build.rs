//! Makes the Rust types of the protocol between replicas.

fn main() -> std::io::Result<()> {
    println!("cargo:rerun-if-changed=proto/peer.proto");
    tonic_prost_build::configure().compile_protos(&["proto/peer.proto"], &["proto"])
}
