//! What `/metrics` shows of a store. Gauges are read when they are asked for; what has to be timed is counted where it happens.

use crate::machine::Replicator;
use crate::replica::run::Replica;
use crate::service::Store;
use crate::space::NO_SPACE;
use crate::state::Shared;
use crate::watch::Watches;
use minipod_daemon::metrics::{Counter, Gauge, Histogram, Registry};
use std::sync::Arc;

/// Counted while the store works.
#[derive(Debug, Clone, Default)]
pub struct Timed {
    /// How long the log's syncs took.
    pub wal_sync: Arc<Histogram>,
    /// How long snapshots took, from their start until they were durable.
    pub snapshot: Arc<Histogram>,
    /// Snapshots that could not be written.
    pub snapshot_failures: Arc<Counter>,
}

impl Timed {
    /// Those of a registry.
    #[must_use]
    pub fn of(registry: &Registry) -> Self {
        Self {
            wal_sync: registry.histogram(
                "minipod_store_wal_sync_seconds",
                &[],
                "How long it took to make a batch of the log durable (fdatasync).",
            ),
            snapshot: registry.histogram(
                "minipod_store_snapshot_seconds",
                &[],
                "How long it took to write a snapshot of the state, durably.",
            ),
            snapshot_failures: registry.counter(
                "minipod_store_snapshot_failures_total",
                &[],
                "Snapshots that could not be written.",
            ),
        }
    }
}

/// A gauge and what it shows.
type Shown = (&'static str, &'static str, Read);
/// What a gauge shows of what was seen.
type Read = fn(&Seen) -> i64;

/// All that the gauges read, taken at one moment.
struct Seen {
    status: crate::machine::ReplicaStatus,
    members: usize,
    bytes: u64,
    quota_bytes: u64,
    keys: usize,
    versions: usize,
    revision: i64,
    compacted: i64,
    leases: usize,
    no_space: usize,
    corrupt: usize,
    watchers: usize,
    slow_watchers: usize,
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

const GAUGES: &[Shown] = &[
    ("minipod_store_raft_term", "Raft's term.", |seen| signed(seen.status.term)),
    ("minipod_store_has_leader", "1 while this member knows a leader.", |seen| i64::from(seen.status.leader_id != 0)),
    ("minipod_store_is_leader", "1 while this member leads.", |seen| {
        i64::from(seen.status.leader_id != 0 && seen.status.leader_id == seen.status.member_id)
    }),
    ("minipod_store_is_learner", "1 while this member has no vote.", |seen| i64::from(seen.status.is_learner)),
    ("minipod_store_members", "Members of the cluster, with learners.", |seen| count(seen.members)),
    ("minipod_store_committed_index", "The last entry that this member knows to be committed.", |seen| {
        signed(seen.status.commit_index)
    }),
    ("minipod_store_applied_index", "The last entry that this member has applied.", |seen| {
        signed(seen.status.applied_index)
    }),
    ("minipod_store_wal_bytes", "What the log takes on disk.", |seen| signed(seen.status.wal_bytes)),
    ("minipod_store_disk_bytes", "What the log and the newest snapshot take on disk.", |seen| {
        signed(seen.status.disk_bytes)
    }),
    ("minipod_store_db_bytes", "The size of the state: keys, values, their history.", |seen| signed(seen.bytes)),
    ("minipod_store_quota_bytes", "How large the state may be; 0 for no limit.", |seen| signed(seen.quota_bytes)),
    ("minipod_store_keys", "Keys that are there now.", |seen| count(seen.keys)),
    ("minipod_store_versions", "Versions of keys that are kept, the present ones with them.", |seen| {
        count(seen.versions)
    }),
    ("minipod_store_revision", "The revision of the last change.", |seen| seen.revision),
    ("minipod_store_compacted_revision", "The oldest revision that can be read; -1 when all can.", |seen| {
        seen.compacted
    }),
    ("minipod_store_leases", "Leases that run.", |seen| count(seen.leases)),
    ("minipod_store_watchers", "Watches of all clients.", |seen| count(seen.watchers)),
    ("minipod_store_slow_watchers", "Watches that lag behind and are replayed from the log.", |seen| {
        count(seen.slow_watchers)
    }),
    ("minipod_store_alarms_no_space", "Members that have used up the quota: above 0 nothing is added.", |seen| {
        count(seen.no_space)
    }),
    ("minipod_store_alarms_corrupt", "Members whose state is wrong.", |seen| count(seen.corrupt)),
];

fn look(replica: &Replica, shared: &Shared, watches: &Watches, quota_bytes: u64) -> Seen {
    // The hub before the state, as its own thread takes them.
    let (watchers, slow_watchers) = watches.watchers();
    let members = replica.members().len();
    let status = replica.status();
    let store = shared.read();
    let raised = |kind: i32| store.alarms().filter(|(_, raised)| *raised == kind).count();
    let no_space = raised(NO_SPACE);
    Seen {
        status,
        members,
        bytes: store.bytes(),
        quota_bytes,
        keys: store.keys(),
        versions: store.versions(),
        revision: store.revision(),
        compacted: store.compacted(),
        leases: store.leases().len(),
        no_space,
        corrupt: store.alarms().count() - no_space,
        watchers,
        slow_watchers,
    }
}

/// Shows the store's gauges in a registry, read whenever it is rendered.
pub(crate) fn show(store: &Store, registry: &Registry, quota_bytes: u64) {
    let gauges: Vec<(Arc<Gauge>, Read)> =
        GAUGES.iter().map(|(name, help, read)| (registry.gauge(name, &[], help), *read)).collect();
    let (replica, shared, watches) = (store.replica().clone(), Arc::clone(store.shared()), store.watches());
    registry.before_render(move || {
        let seen = look(&replica, &shared, &watches, quota_bytes);
        for (gauge, read) in &gauges {
            gauge.set(read(&seen));
        }
    });
}
