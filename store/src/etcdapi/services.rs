//! Lease, Cluster and Maintenance, on the traits that etcd-client generates.

use super::{Face, VERSION};
use crate::machine::{Member, MemberChange, MemberError, Replicator};
use crate::refused::Refused;
use crate::state::{Kind, number_command};
use etcd_client::proto::*;
use futures_util::{Stream, StreamExt};
use prost::Message;
use sha2::{Digest, Sha256};
use std::hash::{BuildHasher, RandomState};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;
use tonic::{Request, Response, Status, Streaming};

type Answer<T> = Result<Response<T>, Status>;
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The body of a lease's answer: id and time to live.
fn lease_numbers(body: &[u8]) -> (i64, i64) {
    // LeaseGrantResponse and LeaseKeepAliveResponse agree on these two fields.
    PbLeaseGrantResponse::decode(body).map(|answer| (answer.id, answer.ttl)).unwrap_or_default()
}

impl<R: Replicator> Face<R> {
    async fn numbers(&self, kind: Kind, numbers: impl IntoIterator<Item = i64>) -> Result<(i64, bytes::Bytes), Status> {
        let outcome = self.replicator.propose(number_command(kind, numbers)).await.map_err(Refused::from)?;
        Ok((outcome.revision, outcome.result?))
    }

    async fn renew(&self, id: i64) -> Result<PbLeaseKeepAliveResponse, Status> {
        let (revision, body) = self.numbers(Kind::LeaseRenew, [id]).await?;
        self.observe_lease(id);
        let (_, ttl) = lease_numbers(&body);
        Ok(PbLeaseKeepAliveResponse { header: Some(self.header(revision)), id, ttl })
    }

    fn revision(&self) -> i64 {
        self.shared.read().revision()
    }
}

/// A lease id that nobody guesses: positive, never 0.
fn random_id() -> i64 {
    // The standard library seeds every RandomState from the system's randomness; etcd's ids are as good as that.
    (RandomState::new().hash_one(Instant::now()) & i64::MAX as u64).max(1) as i64
}

/// `etcdserverpb.Lease`; its streams outlive the call that began them.
#[derive(Debug)]
pub struct LeaseService<R>(pub Arc<Face<R>>);

#[tonic::async_trait]
impl<R: Replicator> PbLeaseService for LeaseService<R> {
    async fn lease_grant(&self, request: Request<PbLeaseGrantRequest>) -> Answer<PbLeaseGrantResponse> {
        self.0.admit(request.metadata())?;
        self.0.check_quota(0).await?;
        let PbLeaseGrantRequest { ttl, id } = request.into_inner();
        let id = if id == 0 { random_id() } else { id };
        let (revision, body) = self.0.numbers(Kind::LeaseGrant, [id, ttl]).await?;
        self.0.observe_lease(id);
        let (id, ttl) = lease_numbers(&body);
        Ok(Response::new(PbLeaseGrantResponse { header: Some(self.0.header(revision)), id, ttl, error: String::new() }))
    }

    async fn lease_revoke(&self, request: Request<PbLeaseRevokeRequest>) -> Answer<PbLeaseRevokeResponse> {
        self.0.admit(request.metadata())?;
        let (revision, _) = self.0.numbers(Kind::LeaseRevoke, [request.into_inner().id]).await?;
        Ok(Response::new(PbLeaseRevokeResponse { header: Some(self.0.header(revision)) }))
    }

    type LeaseKeepAliveStream = Answers<PbLeaseKeepAliveResponse>;

    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<PbLeaseKeepAliveRequest>>,
    ) -> Answer<Self::LeaseKeepAliveStream> {
        self.0.admit(request.metadata())?;
        let face = Arc::clone(&self.0);
        // One renewal after the other: the client's answers are in the order of its requests.
        let answers = request.into_inner().then(move |request| {
            let face = Arc::clone(&face);
            async move { face.renew(request?.id).await }
        });
        // Only the end of the server is an error: a client that has sent its last request is answered and done.
        let (face, stopping) = (Arc::clone(&self.0), self.0.stopping());
        let last = futures_util::stream::once(std::future::ready(()))
            .filter_map(move |()| std::future::ready(face.is_stopping().then(|| Err(Refused::Stopped.into()))));
        Ok(Response::new(Box::pin(answers.take_until(stopping).chain(last))))
    }

    async fn lease_time_to_live(
        &self,
        request: Request<PbLeaseTimeToLiveRequest>,
    ) -> Answer<PbLeaseTimeToLiveResponse> {
        self.0.admit(request.metadata())?;
        let PbLeaseTimeToLiveRequest { id, keys } = request.into_inner();
        self.0.replicator.read_index().await.map_err(Refused::from)?;
        self.0.observe_lease(id);
        let clock = self.0.clock();
        let store = self.0.shared.read();
        let header = Some(self.0.header(store.revision()));
        let Some(lease) = store.leases.get(id) else {
            return Ok(Response::new(PbLeaseTimeToLiveResponse { header, id, ttl: -1, ..Default::default() }));
        };
        let ttl = clock.remaining_s(id, lease, Instant::now()).unwrap_or(lease.ttl);
        let keys = if keys { lease.keys.iter().map(|key| key.to_vec()).collect() } else { Vec::new() };
        Ok(Response::new(PbLeaseTimeToLiveResponse { header, id, ttl, granted_ttl: lease.ttl, keys }))
    }

    async fn lease_leases(&self, request: Request<PbLeaseLeasesRequest>) -> Answer<PbLeaseLeasesResponse> {
        self.0.admit(request.metadata())?;
        self.0.replicator.read_index().await.map_err(Refused::from)?;
        let store = self.0.shared.read();
        let leases = store.leases.iter().map(|(id, _)| PbLeaseStatus { id }).collect();
        Ok(Response::new(PbLeaseLeasesResponse { header: Some(self.0.header(store.revision())), leases }))
    }
}

fn pb_members(members: Vec<Member>) -> Vec<PbMember> {
    members.into_iter().map(pb_member).collect()
}

fn pb_member(member: Member) -> PbMember {
    let Member { id, name, peer_urls, client_urls, is_learner } = member;
    PbMember { id, name, peer_ur_ls: peer_urls, client_ur_ls: client_urls, is_learner }
}

fn member_status(error: MemberError) -> Status {
    match error {
        MemberError::Refused(refused) => refused.into(),
        MemberError::Propose(error) => Refused::from(error).into(),
    }
}

/// Whether these can be a member's addresses: `http` or `https`, a host, a port, no path.
fn check_urls(urls: &[String]) -> Result<(), Status> {
    let is_good = |url: &String| {
        let rest = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"));
        let address = rest.and_then(|rest| rest.strip_suffix('/').unwrap_or(rest).rsplit_once(':'));
        address.is_some_and(|(host, port)| !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok())
    };
    if !urls.is_empty() && urls.iter().all(is_good) { Ok(()) } else { Err(Refused::MemberBadUrls.into()) }
}

impl<R: Replicator> Face<R> {
    async fn change_members(
        &self,
        change: MemberChange,
    ) -> Result<(PbResponseHeader, Vec<PbMember>, Option<u64>), Status> {
        let (members, added) = self.replicator.change_members(change).await.map_err(member_status)?;
        Ok((self.header(self.revision()), pb_members(members), added))
    }
}

#[tonic::async_trait]
impl<R: Replicator> PbClusterService for Face<R> {
    async fn member_add(&self, request: Request<PbMemberAddRequest>) -> Answer<PbMemberAddResponse> {
        self.admit(request.metadata())?;
        let PbMemberAddRequest { peer_ur_ls: peer_urls, is_learner } = request.into_inner();
        check_urls(&peer_urls)?;
        let (header, members, added) = self.change_members(MemberChange::Add { peer_urls, is_learner }).await?;
        let member = members.iter().find(|member| Some(member.id) == added).cloned();
        Ok(Response::new(PbMemberAddResponse { header: Some(header), member, members }))
    }

    async fn member_remove(&self, request: Request<PbMemberRemoveRequest>) -> Answer<PbMemberRemoveResponse> {
        self.admit(request.metadata())?;
        let change = MemberChange::Remove { id: request.into_inner().id };
        let (header, members, _) = self.change_members(change).await?;
        Ok(Response::new(PbMemberRemoveResponse { header: Some(header), members }))
    }

    async fn member_update(&self, request: Request<PbMemberUpdateRequest>) -> Answer<PbMemberUpdateResponse> {
        self.admit(request.metadata())?;
        let PbMemberUpdateRequest { id, peer_ur_ls: peer_urls } = request.into_inner();
        check_urls(&peer_urls)?;
        let (header, members, _) = self.change_members(MemberChange::Update { id, peer_urls }).await?;
        Ok(Response::new(PbMemberUpdateResponse { header: Some(header), members }))
    }

    async fn member_list(&self, request: Request<PbMemberListRequest>) -> Answer<PbMemberListResponse> {
        if request.get_ref().linearizable {
            self.admit(request.metadata())?;
            self.replicator.read_index().await.map_err(Refused::from)?;
        }
        let members = pb_members(self.replicator.members());
        Ok(Response::new(PbMemberListResponse { header: Some(self.header(self.revision())), members }))
    }

    async fn member_promote(&self, request: Request<PbMemberPromoteRequest>) -> Answer<PbMemberPromoteResponse> {
        self.admit(request.metadata())?;
        let change = MemberChange::Promote { id: request.into_inner().id };
        let (header, members, _) = self.change_members(change).await?;
        Ok(Response::new(PbMemberPromoteResponse { header: Some(header), members }))
    }
}

/// Does what takes long where it holds no client up.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Status> {
    // It fails only when the runtime is going down.
    tokio::task::spawn_blocking(work).await.map_err(|_| Refused::Stopped.into())
}

#[tonic::async_trait]
impl<R: Replicator> PbMaintenanceService for Face<R> {
    async fn alarm(&self, request: Request<PbAlarmRequest>) -> Answer<PbAlarmResponse> {
        self.admit(request.metadata())?;
        let PbAlarmRequest { action, member_id, alarm } = request.into_inner();
        if !(0..=2).contains(&action) || !(0..=2).contains(&alarm) {
            return Err(Status::invalid_argument(format!("alarm action {action}, alarm {alarm}: both are 0, 1 or 2")));
        }
        if action == 0 {
            let store = self.shared.read();
            let all = store.alarms().filter(|(_, kind)| alarm == 0 || *kind == alarm);
            let alarms = all.map(|(member_id, alarm)| PbAlarmMember { member_id, alarm }).collect();
            return Ok(Response::new(PbAlarmResponse { header: Some(self.header(store.revision())), alarms }));
        }
        let numbers = [i64::from(action == 1), member_id as i64, i64::from(alarm)];
        let (revision, body) = self.numbers(Kind::Alarm, numbers).await?;
        let mut answer = PbAlarmResponse::decode(body).unwrap_or_default();
        answer.header = Some(self.header(revision));
        Ok(Response::new(answer))
    }

    async fn status(&self, _: Request<PbStatusRequest>) -> Answer<PbStatusResponse> {
        let status = self.replicator.status();
        let (bytes, revision, alarms) = {
            let store = self.shared.read();
            let name = |(member, kind): (u64, i32)| {
                format!("memberID:{member} alarm:{} ", if kind == 1 { "NOSPACE" } else { "CORRUPT" })
            };
            (store.bytes() as i64, store.revision(), store.alarms().map(name).collect::<Vec<_>>())
        };
        let mut errors = alarms;
        if status.leader_id == 0 {
            errors.push(Refused::NoLeader.to_string());
        }
        Ok(Response::new(PbStatusResponse {
            header: Some(self.header(revision)),
            version: VERSION.to_owned(),
            db_size: bytes.max(status.disk_bytes as i64),
            leader: status.leader_id,
            raft_index: status.commit_index,
            raft_term: status.term,
            raft_applied_index: status.applied_index,
            errors,
            db_size_in_use: bytes,
            is_learner: status.is_learner,
            db_size_quota: self.config.quota_bytes as i64,
            ..Default::default()
        }))
    }

    /// Space is freed as it is compacted; there is nothing to do.
    async fn defragment(&self, _: Request<PbDefragmentRequest>) -> Answer<PbDefragmentResponse> {
        Ok(Response::new(PbDefragmentResponse { header: Some(self.header(self.revision())) }))
    }

    async fn hash(&self, _: Request<PbHashRequest>) -> Answer<PbHashResponse> {
        let hashing = self.shared.read().hashing(0)?;
        let (hash, revision) = aside(move || hashing.finish()).await?;
        Ok(Response::new(PbHashResponse { header: Some(self.header(revision)), hash }))
    }

    async fn hash_kv(&self, request: Request<PbHashKvRequest>) -> Answer<PbHashKvResponse> {
        let (hashing, compact_revision, revision) = {
            let store = self.shared.read();
            (store.hashing(request.into_inner().revision)?, store.compacted(), store.revision())
        };
        let (hash, hash_revision) = aside(move || hashing.finish()).await?;
        Ok(Response::new(PbHashKvResponse {
            header: Some(self.header(revision)),
            hash,
            compact_revision,
            hash_revision,
        }))
    }

    type SnapshotStream = Answers<PbSnapshotResponse>;

    async fn snapshot(&self, _: Request<PbSnapshotRequest>) -> Answer<Self::SnapshotStream> {
        let (exporting, revision) = {
            let store = self.shared.read();
            (store.exporting(), store.revision())
        };
        let pieces = aside(move || exporting.start()).await?;
        let header = self.header(revision);
        let (mut hasher, mut remaining_bytes) = (Sha256::new(), pieces.bytes());
        // The digest of all comes last, as etcd's clients expect.
        let answers = pieces.map(Some).chain([None]).map(move |piece| {
            let blob = match piece {
                Some(piece) => {
                    hasher.update(&piece);
                    remaining_bytes = remaining_bytes.saturating_sub(piece.len() as u64);
                    piece.into()
                }
                None => std::mem::take(&mut hasher).finalize().to_vec(),
            };
            Ok(PbSnapshotResponse { header: Some(header), remaining_bytes, blob, version: VERSION.to_owned() })
        });
        Ok(Response::new(Box::pin(tokio_stream::iter(answers))))
    }

    async fn move_leader(&self, request: Request<PbMoveLeaderRequest>) -> Answer<PbMoveLeaderResponse> {
        self.admit(request.metadata())?;
        let status = self.replicator.status();
        if status.leader_id != status.member_id {
            return Err(Refused::NotLeader.into());
        }
        let target = request.into_inner().target_id;
        self.replicator.transfer_leadership(target).await.map_err(member_status)?;
        Ok(Response::new(PbMoveLeaderResponse { header: Some(self.header(self.revision())) }))
    }

    async fn downgrade(&self, _: Request<PbDowngradeRequest>) -> Answer<PbDowngradeResponse> {
        Err(Status::unimplemented("there is no older version to go back to"))
    }
}
