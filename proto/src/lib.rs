//! The contract of minipod: the objects of the API (Kubernetes v1 shapes) and its services.
//!
//! One set of types, [`v1`], is wire, store and manifest. prost makes it of `proto/minipod/v1/*.proto`; `build.rs` adds serde
//! attributes from the same descriptors, so that JSON and YAML have exactly the Kubernetes form.
//!
//! An object's way in: [`manifest`] (text to objects, strictly, with lines) → [`defaults`] → [`validate`] → stored. [`unsupported`] is the
//! table of what is refused by name. [`selector`], [`scheduling`] and [`rules`] are the pure matching that API server and scheduler share;
//! [`quantity`] and [`resources`] the arithmetic, [`resize`] what a change of resources in place means, [`disruption`] the arithmetic of
//! disruption budgets.
#![forbid(unsafe_code)]

pub mod apparmor;
pub mod base64;
pub mod defaults;
pub mod disruption;
mod json;
pub mod manifest;
pub mod names;
mod objects;
pub mod problem;
pub mod quantity;
pub mod references;
pub mod resize;
pub mod resources;
mod room;
pub mod rules;
pub mod scalar;
pub mod scheduling;
pub mod schema;
pub mod selector;
pub mod unsupported;
pub mod validate;

#[cfg(test)]
mod examples_tests;

pub use objects::{DEFAULT_GRACE_SECONDS, Kind, Phase, Resource, RestartPolicy};

/// The generated types: messages of core.proto and api.proto, and the services' clients and servers.
#[allow(missing_docs, clippy::all, clippy::pedantic, rustdoc::all)]
pub mod v1 {
    tonic::include_proto!("minipod.v1");
}

/// The encoded FileDescriptorSet of all .proto files, for the reflection service.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
