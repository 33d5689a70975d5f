//! The thread that owns a replica, and the handle through which everyone else talks to it.

use super::core::{Core, Outbox, ReplicaError, Reply};
use super::inbox::{Inbox, Input, Waiter};
use crate::machine::{Machine, Member, MemberChange, MemberError, Outcome, ProposeError, ReplicaStatus, Replicator};
use crate::records::{ChangeKind, ChangeRecord, MemberRecord};
use crate::refused::Refused;
use crate::wal::Identity;
use bytes::Bytes;
use raft::eraftpb::Message;
use sha2::{Digest, Sha256};
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};
use tokio::sync::{oneshot, watch};

/// How the other members are reached. No call waits.
pub trait Transport: Send + Sync + 'static {
    /// Sends messages; each may be lost. A snapshot's fate is told to the inbox.
    fn send(&self, messages: Vec<Message>);
    /// The members have changed.
    fn members(&self, members: Vec<Member>);
    /// Has the leader make a change of the membership.
    fn change_at_leader(&self, leader: &Member, change: ChangeRecord) -> ChangeAtLeader;
}

/// The answer of [`Transport::change_at_leader`].
pub type ChangeAtLeader = Pin<Box<dyn Future<Output = Result<(), MemberError>> + Send>>;

/// What others see of a replica without asking its thread.
#[derive(Debug, Default)]
struct Published {
    leader_id: AtomicU64,
    term: AtomicU64,
    commit: AtomicU64,
    applied: AtomicU64,
    wal_bytes: AtomicU64,
    disk_bytes: AtomicU64,
    is_learner: AtomicBool,
    leads_alone: AtomicBool,
    /// A learner that has the log, for a promotion; 0 for none.
    ready_learner: AtomicU64,
    members: RwLock<Vec<Member>>,
}

/// How a replica ended.
#[derive(Debug, Clone)]
pub enum Ended {
    /// It was asked to.
    Stopped,
    /// This member was removed from the cluster.
    Removed,
    /// Its disk or its state failed. The text says how, with all causes.
    Failed(Arc<str>),
}

/// A running replica. Clones talk to the same one.
#[derive(Clone)]
pub struct Replica {
    inner: Arc<Inner>,
}

struct Inner {
    identity: Identity,
    inbox: Arc<Inbox>,
    published: Arc<Published>,
    transport: OnceLock<Arc<dyn Transport>>,
    ended: watch::Receiver<Option<Ended>>,
    patience: Duration,
    max_command_bytes: usize,
}

impl std::fmt::Debug for Replica {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Replica").field("identity", &self.inner.identity).finish_non_exhaustive()
    }
}

/// How the thread runs.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// The time between two ticks.
    pub tick: Duration,
    /// Ticks of an election timeout.
    pub election_ticks: usize,
}

impl Default for Pace {
    fn default() -> Self {
        Self { tick: Duration::from_millis(100), election_ticks: 10 }
    }
}

/// A command is at most as large as a request of the etcd face can be with its overhead, and far below a batch.
const MAX_COMMAND_BYTES: usize = 16 << 20;

impl Replica {
    /// Starts the thread. `transport` is asked for when the handle is there, because it delivers to it.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start<M: Machine>(
        core: Core<M, Waiter>,
        pace: Pace,
        transport: impl FnOnce(&Self) -> Arc<dyn Transport>,
    ) -> std::io::Result<Self> {
        let (ended_sender, ended) = watch::channel(None);
        let published = Arc::new(Published::default());
        let patience = pace.tick * (core.settings.patience_ticks + 10);
        let replica = Self {
            inner: Arc::new(Inner {
                identity: core.settings.identity,
                inbox: Arc::default(),
                published: Arc::clone(&published),
                transport: OnceLock::new(),
                ended,
                patience,
                max_command_bytes: MAX_COMMAND_BYTES,
            }),
        };
        let transport = transport(&replica);
        let _ = replica.inner.transport.set(Arc::clone(&transport));
        let mut runner = Runner {
            core,
            pace,
            inbox: Arc::clone(&replica.inner.inbox),
            published,
            transport,
            members_sent: Vec::new(),
            stopping: None,
        };
        runner.publish();
        std::thread::Builder::new().name("store-replica".to_owned()).spawn(move || {
            let ended = runner.run();
            runner.end(&ended);
            ended_sender.send_replace(Some(ended));
        })?;
        Ok(replica)
    }

    /// The queue of the replica's thread, for the transport.
    #[must_use]
    pub fn inbox(&self) -> &Arc<Inbox> {
        &self.inner.inbox
    }

    /// Whose replica it is.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.inner.identity
    }

    /// Asks the replica to end: a leader hands over first.
    pub fn stop(&self) {
        self.inner.inbox.tell(Input::Stop);
    }

    /// Returns when the replica has ended.
    pub async fn ended(&self) -> Ended {
        let mut ended = self.inner.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(ended) => ended.clone().unwrap_or(Ended::Stopped),
            Err(_) => Ended::Failed("the replica's thread is gone".into()),
        }
    }

    /// Returns when this member follows a leader or leads, and has applied what was committed then; false when the replica ended.
    pub async fn ready(&self) -> bool {
        loop {
            match self.read_index().await {
                Ok(_) => return true,
                Err(ProposeError::Stopped) => return false,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    async fn ask(&self, make: impl FnOnce(Waiter) -> Input) -> Result<Reply, ProposeError> {
        let (waiter, answer) = oneshot::channel();
        self.inner.inbox.ask(make(waiter))?;
        answer.await.map_err(|_| ProposeError::Stopped)
    }

    /// Tells the cluster this member's name and client addresses; again and again until it is known.
    pub async fn publish(&self, name: &str, client_urls: Vec<String>) {
        let id = self.inner.identity.member_id;
        loop {
            let known = self.members().into_iter().find(|member| member.id == id);
            if known.as_ref().is_some_and(|member| member.name == name && member.client_urls == client_urls) {
                return;
            }
            if known.is_some() {
                let member = MemberRecord {
                    id,
                    name: name.to_owned(),
                    client_urls: client_urls.clone(),
                    ..MemberRecord::default()
                };
                let change = ChangeRecord { kind: ChangeKind::Publish.into(), member: Some(member) };
                if let Err(ProposeError::Stopped) = self.ask(|waiter| Input::Change(change, waiter)).await {
                    return;
                }
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Makes a change of the membership: here on the leader, or through it.
    ///
    /// # Errors
    /// When it is refused or cannot be proposed.
    pub async fn change(&self, change: ChangeRecord) -> Result<Vec<Member>, MemberError> {
        let status = self.status();
        if status.leader_id == 0 {
            return Err(ProposeError::NoLeader.into());
        }
        if status.leader_id == status.member_id {
            return self.change_here(change).await;
        }
        // Whether a learner is ready, only the leader knows.
        let leader = self.members().into_iter().find(|member| member.id == status.leader_id);
        let (Some(leader), Some(transport)) = (leader, self.inner.transport.get()) else {
            return Err(ProposeError::NoLeader.into());
        };
        transport.change_at_leader(&leader, change).await?;
        // The answer counts from here on, so this member shows it from here on.
        self.read_index().await?;
        Ok(self.members())
    }

    /// Makes a change of the membership on the leader.
    ///
    /// # Errors
    /// When it is refused or cannot be proposed.
    pub async fn change_here(&self, change: ChangeRecord) -> Result<Vec<Member>, MemberError> {
        let promoted = (change.kind == i32::from(ChangeKind::Promote)).then_some(change.member.as_ref()).flatten();
        if let Some(promoted) = promoted {
            let known = self.members().into_iter().find(|member| member.id == promoted.id);
            let ready = self.inner.published.ready_learner.load(Ordering::Acquire) == promoted.id;
            if known.is_some_and(|member| member.is_learner) && !ready {
                return Err(Refused::LearnerNotReady.into());
            }
        }
        match self.ask(|waiter| Input::Change(change, waiter)).await? {
            Reply::Change(result) => result.map(|(members, _)| members),
            Reply::Lost(error) => Err(error.into()),
            Reply::Outcome(_) | Reply::Read(_) => Err(ProposeError::Stopped.into()),
        }
    }

    /// An id for a new member: never used before, and not the same on two members that add one at the same time.
    fn new_id(&self, peer_urls: &[String]) -> u64 {
        let mut hasher = Sha256::new();
        for url in peer_urls {
            hasher.update(url.as_bytes());
            hasher.update([0]);
        }
        for number in [
            self.inner.identity.cluster_id,
            self.inner.identity.member_id,
            self.inner.published.commit.load(Ordering::Acquire),
            self.inner.published.term.load(Ordering::Acquire),
        ] {
            hasher.update(number.to_le_bytes());
        }
        id_from(&hasher.finalize())
    }
}

/// An id from a digest; never 0, which raft reserves.
pub(crate) fn id_from(digest: &[u8]) -> u64 {
    let bytes = digest.get(..8).and_then(|bytes| bytes.try_into().ok()).unwrap_or([1; 8]);
    u64::from_le_bytes(bytes).max(1)
}

impl Replicator for Replica {
    async fn propose(&self, command: Bytes) -> Result<Outcome, ProposeError> {
        if command.len() > self.inner.max_command_bytes {
            return Err(ProposeError::TooLarge);
        }
        match self.ask(|waiter| Input::Propose(command, waiter)).await? {
            Reply::Outcome(outcome) => Ok(outcome),
            Reply::Lost(error) => Err(error),
            Reply::Change(_) | Reply::Read(_) => Err(ProposeError::Stopped),
        }
    }

    async fn read_index(&self) -> Result<u64, ProposeError> {
        let published = &self.inner.published;
        // The only voter's applied state is all that was ever acknowledged, because it acknowledges after applying.
        if published.leads_alone.load(Ordering::Acquire) {
            return Ok(published.applied.load(Ordering::Acquire));
        }
        match tokio::time::timeout(self.inner.patience, self.ask(Input::Read)).await {
            Ok(Ok(Reply::Read(index))) => Ok(index),
            Ok(Ok(Reply::Lost(error)) | Err(error)) => Err(error),
            Ok(Ok(Reply::Outcome(_) | Reply::Change(_))) => Err(ProposeError::Stopped),
            Err(_) => Err(ProposeError::Timeout),
        }
    }

    fn status(&self) -> ReplicaStatus {
        let published = &self.inner.published;
        ReplicaStatus {
            cluster_id: self.inner.identity.cluster_id,
            member_id: self.inner.identity.member_id,
            leader_id: published.leader_id.load(Ordering::Acquire),
            term: published.term.load(Ordering::Acquire),
            commit_index: published.commit.load(Ordering::Acquire),
            applied_index: published.applied.load(Ordering::Acquire),
            is_learner: published.is_learner.load(Ordering::Acquire),
            wal_bytes: published.wal_bytes.load(Ordering::Relaxed),
            disk_bytes: published.disk_bytes.load(Ordering::Relaxed),
        }
    }

    fn members(&self) -> Vec<Member> {
        self.inner.published.members.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn change_members(&self, change: MemberChange) -> Result<(Vec<Member>, Option<u64>), MemberError> {
        let of = |id: u64| MemberRecord { id, ..MemberRecord::default() };
        let (kind, member) = match change {
            MemberChange::Add { peer_urls, is_learner } => {
                let id = self.new_id(&peer_urls);
                (ChangeKind::Add, MemberRecord { peer_urls, is_learner, ..of(id) })
            }
            MemberChange::Remove { id } => (ChangeKind::Remove, of(id)),
            MemberChange::Update { id, peer_urls } => (ChangeKind::Update, MemberRecord { peer_urls, ..of(id) }),
            MemberChange::Promote { id } => (ChangeKind::Promote, of(id)),
        };
        let added = (kind == ChangeKind::Add).then_some(member.id);
        let members = self.change(ChangeRecord { kind: kind.into(), member: Some(member) }).await?;
        Ok((members, added))
    }

    async fn transfer_leadership(&self, target: u64) -> Result<(), MemberError> {
        let status = self.status();
        if status.leader_id != status.member_id {
            return Err(Refused::NotLeader.into());
        }
        if !self.members().iter().any(|member| member.id == target && !member.is_learner) {
            return Err(Refused::BadLeaderTransferee.into());
        }
        if target == status.member_id {
            return Ok(());
        }
        self.inner.inbox.tell(Input::Transfer(target));
        let deadline = Instant::now() + self.inner.patience;
        while Instant::now() < deadline {
            if self.status().leader_id == target {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Err(ProposeError::Timeout.into())
    }
}

/// The thread's own.
struct Runner<M: Machine> {
    core: Core<M, Waiter>,
    pace: Pace,
    inbox: Arc<Inbox>,
    published: Arc<Published>,
    transport: Arc<dyn Transport>,
    members_sent: Vec<Member>,
    /// Until when a leader that is asked to end may hand over.
    stopping: Option<Instant>,
}

struct Out<'a>(&'a dyn Transport);

impl Outbox<Waiter> for Out<'_> {
    fn send(&mut self, messages: Vec<Message>) {
        self.0.send(messages);
    }

    fn answer(&mut self, waiter: Waiter, reply: Reply) {
        // Whoever does not wait any more needs no answer.
        let _ = waiter.send(reply);
    }
}

impl<M: Machine> Runner<M> {
    fn run(&mut self) -> Ended {
        match self.rounds() {
            Ok(ended) => ended,
            Err(error) => {
                let text = with_causes(&error);
                tracing::error!(error = %text, "the store stops: after this nothing of its state can be relied on in memory");
                Ended::Failed(text.into())
            }
        }
    }

    fn rounds(&mut self) -> Result<Ended, ReplicaError> {
        let mut inputs = Vec::new();
        let mut next_tick = Instant::now() + self.pace.tick;
        let mut removed_at = None;
        loop {
            self.inbox.take(&mut inputs, next_tick);
            let now = Instant::now();
            let transport = Arc::clone(&self.transport);
            let mut out = Out(&*transport);
            if now >= next_tick {
                // Ticks that a stall has swallowed are not made up: the others' heartbeats may be waiting in the queue.
                self.core.tick(&mut out);
                next_tick = now + self.pace.tick;
            }
            for input in inputs.drain(..) {
                self.input(input, &mut out)?;
            }
            self.core.advance(&mut out)?;
            self.start_snapshot();
            self.publish();
            if self.core.is_removed() {
                let since = *removed_at.get_or_insert(now);
                // Long enough for the others to hear of it and, should one restart, to need this vote once more.
                if now > since + self.pace.tick * u32::try_from(5 * self.pace.election_ticks).unwrap_or(50) {
                    return Ok(Ended::Removed);
                }
            }
            if let Some(deadline) = self.stopping
                && (now >= deadline || !self.core.is_leader() || self.core.best_successor().is_none())
            {
                return Ok(Ended::Stopped);
            }
        }
    }

    fn input(&mut self, input: Input, out: &mut Out<'_>) -> Result<(), ReplicaError> {
        match input {
            Input::Propose(command, waiter) => match self.stopping {
                None => self.core.propose(command, waiter),
                Some(_) => out.answer(waiter, Reply::Lost(ProposeError::Stopped)),
            },
            Input::Change(change, waiter) => self.core.change(change, waiter, out),
            Input::Read(waiter) => self.core.read(waiter),
            Input::Message(message) => self.core.step(message),
            Input::Unreachable(id) => self.core.unreachable(id),
            Input::SnapshotSent(id, arrived) => self.core.snapshot_sent(id, arrived),
            Input::SnapshotDone(done) => self.core.snapshot_done(done)?,
            Input::Transfer(id) => self.core.transfer_to(id),
            Input::Stop => {
                let wait = self.pace.tick * u32::try_from(self.pace.election_ticks).unwrap_or(10);
                self.stopping = Some(Instant::now() + wait);
                if self.core.is_leader()
                    && let Some(successor) = self.core.best_successor()
                {
                    self.core.transfer_to(successor);
                }
            }
        }
        Ok(())
    }

    fn start_snapshot(&mut self) {
        let Some(job) = self.core.snapshot_job() else { return };
        let (inbox, timed) = (Arc::clone(&self.inbox), self.core.settings.timed.clone());
        let started = std::thread::Builder::new().name("store-snapshot".to_owned()).spawn(move || {
            let begun = Instant::now();
            let done = job.run();
            match &done {
                Ok(done) => {
                    timed.snapshot.observe(begun.elapsed());
                    tracing::info!(bytes = done.bytes, took_ms = begun.elapsed().as_millis(), "wrote a snapshot");
                }
                Err(_) => timed.snapshot_failures.increment(),
            }
            inbox.tell(Input::SnapshotDone(done));
        });
        if let Err(error) = started {
            tracing::error!(%error, "start the thread that writes a snapshot");
        }
    }

    fn publish(&mut self) {
        let raft = self.core.raft();
        let published = &*self.published;
        published.leads_alone.store(self.core.leads_alone(), Ordering::Release);
        published.leader_id.store(raft.leader_id, Ordering::Release);
        published.term.store(raft.term, Ordering::Release);
        published.commit.store(raft.raft_log.committed, Ordering::Release);
        published.applied.store(self.core.applied(), Ordering::Release);
        published.wal_bytes.store(self.core.wal_bytes(), Ordering::Relaxed);
        published.disk_bytes.store(self.core.disk_bytes(), Ordering::Relaxed);
        let conf = self.core.conf_state();
        published.is_learner.store(!conf.voters.contains(&self.core.id()), Ordering::Release);
        let ready = conf.learners.iter().copied().find(|id| self.core.is_leader() && self.core.learner_is_ready(*id));
        published.ready_learner.store(ready.unwrap_or(0), Ordering::Release);
        if self.core.members_changed() {
            let members = self.core.members().list();
            if members != self.members_sent {
                published.members.write().unwrap_or_else(PoisonError::into_inner).clone_from(&members);
                self.transport.members(members.clone());
                self.members_sent = members;
            }
        }
    }

    fn end(&mut self, ended: &Ended) {
        tracing::info!(?ended, "the replica has ended");
        let transport = Arc::clone(&self.transport);
        let mut out = Out(&*transport);
        self.published.leads_alone.store(false, Ordering::Release);
        for input in self.inbox.close() {
            if let Input::Propose(_, waiter) | Input::Read(waiter) | Input::Change(_, waiter) = input {
                out.answer(waiter, Reply::Lost(ProposeError::Stopped));
            }
        }
        self.core.abandon(&mut out);
    }
}

/// An error and its causes in one line.
#[must_use]
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        // A transparent error repeats its cause.
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}
