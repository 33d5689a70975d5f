//! The etcd face: the gRPC services over a replica and its state.
//!
//! KV and Watch, where the traffic is, read and write the wire form themselves (`kv`, `watch`, over `codec`). Lease,
//! Cluster and Maintenance implement the traits that etcd-client generates (`services`). Auth, Lock and Election are not
//! there: tonic answers UNIMPLEMENTED.
//!
//! A task per store ([`Face::keep_leases`]) proposes what is due of leases while this member leads.

pub mod check;
mod codec;
mod kv;
mod services;
mod watch;

use crate::lease::{Clock, Due};
use crate::machine::{ReplicaStatus, Replicator};
use crate::refused::Refused;
use crate::state::{Kind, Shared, number_command};
use crate::watch::{WatchConfig, Watches};
use crate::wire;
use codec::Reply;
use etcd_client::proto::{PbClusterServer, PbLeaseServer, PbMaintenanceServer, PbResponseHeader};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tonic::Status;
use tonic::metadata::MetadataMap;
use tonic::service::Routes;

/// What Status says: the etcd whose behaviour this is, so that clients which look for features by version find them.
pub const VERSION: &str = "3.5.13+minipod";

/// How often leases are looked at: they run out at most this much late.
const LEASE_TICK: Duration = Duration::from_millis(250);

/// Room for what surrounds the largest request, as in etcd.
const REQUEST_OVERHEAD_BYTES: usize = 512 << 10;

/// The limits of the face.
#[derive(Debug, Clone, Copy)]
pub struct FaceConfig {
    /// The largest request that goes into the log (etcd: 1.5 MiB).
    pub max_request_bytes: usize,
    /// Operations in a transaction (etcd: 128).
    pub max_txn_ops: usize,
    /// When the state is larger, an alarm is raised and nothing is added; 0 for no limit.
    pub quota_bytes: u64,
    /// How watches are treated.
    pub watch: WatchConfig,
}

impl Default for FaceConfig {
    fn default() -> Self {
        let max_request_bytes = 3 << 19;
        let watch =
            WatchConfig { max_fragment_bytes: max_request_bytes + REQUEST_OVERHEAD_BYTES, ..WatchConfig::default() };
        Self { max_request_bytes, max_txn_ops: 128, quota_bytes: 2 << 30, watch }
    }
}

/// The services' common ground.
#[derive(Debug)]
pub struct Face<R> {
    replicator: R,
    shared: Arc<Shared>,
    watches: Arc<Watches>,
    clock: Mutex<Clock>,
    config: FaceConfig,
    /// Turns true when long calls must end.
    stopping: tokio::sync::watch::Sender<bool>,
}

impl<R: Replicator> Face<R> {
    /// A face over a replica whose state machine has this state; starts the thread of the watches.
    ///
    /// # Errors
    /// When that thread cannot be started.
    pub fn new(replicator: R, shared: Arc<Shared>, config: FaceConfig) -> std::io::Result<Arc<Self>> {
        let watches = Arc::new(Watches::start(Arc::clone(&shared), config.watch)?);
        let stopping = tokio::sync::watch::Sender::new(false);
        Ok(Arc::new(Self { replicator, shared, watches, clock: Mutex::default(), config, stopping }))
    }

    /// The services, for a tonic server or an in-memory channel.
    pub fn routes(self: &Arc<Self>) -> Routes {
        let limit = self.config.max_request_bytes + REQUEST_OVERHEAD_BYTES;
        Routes::new(kv::KvService(Arc::clone(self)))
            .add_service(watch::WatchService(Arc::clone(self)))
            .add_service(PbLeaseServer::new(services::LeaseService(Arc::clone(self))).max_decoding_message_size(limit))
            .add_service(PbClusterServer::from_arc(Arc::clone(self)).max_decoding_message_size(limit))
            .add_service(PbMaintenanceServer::from_arc(Arc::clone(self)).max_decoding_message_size(limit))
            .add_service(kv::HealthService(Arc::clone(self)))
    }

    /// Ends watches and other calls that do not end by themselves, with "server stopped": a server that waits for its calls
    /// would wait for ever. New ones end at once.
    pub fn end_streams(&self) {
        self.stopping.send_replace(true);
    }

    fn is_stopping(&self) -> bool {
        *self.stopping.borrow()
    }

    /// Resolves when long calls must end.
    fn stopping(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut stopping = self.stopping.subscribe();
        async move {
            // An error means that the face is gone, which is an end too.
            let _ = stopping.wait_for(|stopping| *stopping).await;
        }
    }

    /// All watches.
    pub fn watches(&self) -> &Arc<Watches> {
        &self.watches
    }

    /// Proposes what is due of leases while this member leads; runs until the replica stops.
    pub async fn keep_leases(self: Arc<Self>) {
        let mut tick = tokio::time::interval(LEASE_TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let status = self.replicator.status();
            let due = self.due_leases(&status);
            let proposals = [
                (
                    Kind::LeaseExpire,
                    due.expired.iter().flat_map(|(id, epoch)| [*id, *epoch as i64]).collect::<Vec<_>>(),
                ),
                (Kind::LeaseCheckpoint, due.checkpoints.iter().flat_map(|(id, left)| [*id, *left]).collect()),
            ];
            for (kind, numbers) in proposals {
                if numbers.is_empty() {
                    continue;
                }
                match self.replicator.propose(number_command(kind, numbers)).await {
                    Ok(_) => {}
                    Err(crate::machine::ProposeError::Stopped) => return,
                    // The next tick proposes it again; a second one does nothing.
                    Err(error) => tracing::debug!(?kind, %error, "propose what is due of leases"),
                }
            }
        }
    }

    fn due_leases(&self, status: &ReplicaStatus) -> Due {
        let mut clock = self.clock();
        let store = self.shared.read();
        let now = Instant::now();
        if status.leader_id != 0 && status.leader_id == status.member_id {
            clock.due(&store.leases, status.term, now)
        } else {
            clock.step_down();
            clock.observe(&store.leases, now);
            Due::default()
        }
    }

    fn clock(&self) -> MutexGuard<'_, Clock> {
        self.clock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the countdown of a lease that was just granted or renewed, instead of at the next tick.
    fn observe_lease(&self, id: i64) {
        let mut clock = self.clock();
        if let Some(lease) = self.shared.read().leases().get(id) {
            clock.observe_one(id, lease, Instant::now());
        }
    }

    fn header(&self, revision: i64) -> PbResponseHeader {
        let ReplicaStatus { cluster_id, member_id, term: raft_term, .. } = self.replicator.status();
        PbResponseHeader { cluster_id, member_id, revision, raft_term }
    }

    fn reply(&self, revision: i64, body: impl Into<bytes::Bytes>) -> Reply {
        Reply { head: self.encoded_header(revision), body: body.into(), shared: Vec::new() }
    }

    fn encoded_header(&self, revision: i64) -> Vec<u8> {
        let status = self.replicator.status();
        let mut head = Vec::with_capacity(48);
        wire::put_nested(&mut head, 1, |out| {
            wire::put_int(out, 1, status.cluster_id as i64);
            wire::put_int(out, 2, status.member_id as i64);
            wire::put_int(out, 3, revision);
            wire::put_int(out, 4, status.term as i64);
        });
        head
    }

    /// Refuses what this member cannot serve as things are.
    fn admit(&self, metadata: &MetadataMap) -> Result<(), Status> {
        let status = self.replicator.status();
        if status.is_learner {
            return Err(Refused::NotSupportedForLearner.into());
        }
        let wants_leader = metadata.get("hasleader").is_some_and(|value| value.as_bytes() == b"true");
        if wants_leader && status.leader_id == 0 {
            return Err(Refused::NoLeader.into());
        }
        Ok(())
    }

    /// Refuses what is too large for the log.
    fn check_size(&self, bytes: usize) -> Result<(), Status> {
        if bytes > self.config.max_request_bytes { Err(Refused::RequestTooLarge.into()) } else { Ok(()) }
    }

    /// Raises the alarm when so much more would not fit the quota.
    async fn check_quota(&self, more_bytes: usize) -> Result<(), Status> {
        let quota = self.config.quota_bytes;
        if quota == 0 || self.shared.bytes() + more_bytes as u64 <= quota {
            return Ok(());
        }
        let member = self.replicator.status().member_id;
        let is_raised = self.shared.read().alarms().any(|alarm| alarm == (member, 1));
        if !is_raised {
            tracing::warn!(
                quota_bytes = quota,
                "the state has reached its quota: nothing more is added until space is made and the alarm cleared"
            );
            let raise = number_command(Kind::Alarm, [1, member as i64, 1]);
            self.replicator.propose(raise).await.map_err(Refused::from)?;
        }
        Err(Refused::NoSpace.into())
    }
}
