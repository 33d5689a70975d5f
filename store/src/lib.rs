//! An etcd v3 server on raft: minipod's embedded store.
//!
//! Two halves meet in [`machine`]: consensus drives a [`machine::Machine`] from its one apply thread, and the etcd face
//! proposes commands through a [`machine::Replicator`].

pub mod compactor;
pub mod disk;
pub mod etcdapi;
pub mod lease;
pub mod machine;
pub mod mvcc;
pub mod overlay;
pub mod peer;
pub mod records;
pub mod refused;
pub mod replica;
pub mod service;
pub mod snapshot;
pub mod state;
pub mod tool;
pub mod wal;
pub mod watch;
pub mod wire;
