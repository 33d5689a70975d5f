//! An etcd v3 server on raft: minipod's embedded store.
//!
//! Two halves meet in [`machine`]: consensus drives a [`machine::Machine`] from its one apply thread, and the etcd face
//! proposes commands through a [`machine::Replicator`].
//!
//! ```text
//! service     the whole: open a directory, serve clients and members, a client within this process, shut down
//! etcdapi     KV, Watch, Lease, Cluster, Maintenance        mvcc, lease, watch, state   what a command does and who sees it
//! replica     core: raft's round without threads · run: the one thread and its handle · inbox: its queue, the group of the group commit
//! peer        links to other members, and the server that their links reach
//! wal         the log: one record and one sync a batch      snapshot    the state in checked chunks with raft's configuration
//! disk        file operations behind a trait                overlay     the same, writing to memory, for looking
//! members     a list of members as flags have it    certs       an authority and certificates for them
//! tool        verify, dump, restore                         compactor   automatic compaction
//! remote      asking a running member                       space       the alarm of the quota goes when there is room
//! metrics     what /metrics shows of a store
//! ```
//!
//! Threads: `store-replica` owns raft, log and machine and takes everything from the inbox; `store-snapshot` writes one snapshot at a time;
//! `wal-spare` prepares the next segment; the watch hub has its own. Everything else is tasks: one per link, stream and call.
//!
//! What always holds: nothing is acknowledged before it is durable on a quorum and applied here; a proposal takes effect once, however
//! often it is proposed; after an error of the disk under the log the replica writes nothing more and ends.

pub mod certs;
pub mod compactor;
pub mod direct;
pub mod disk;
pub mod etcdapi;
pub mod lease;
pub mod machine;
pub mod members;
pub mod metrics;
pub mod mvcc;
pub mod overlay;
pub mod peer;
#[cfg(feature = "planted-bugs")]
pub mod planted;
pub mod records;
pub mod refused;
pub mod remote;
pub mod replica;
pub mod service;
pub mod snapshot;
pub mod space;
pub mod state;
pub mod tool;
pub mod wal;
pub mod watch;
pub mod wire;
