//! A replica without threads, clock or network: what comes in changes raft's state, [`Core::advance`] makes it durable, applies it, and
//! hands out messages and answers. The thread in [`super::run`] drives it, and so does the simulation.

use super::log::Log;
use super::members::{self, Membership};
use super::pending::{Proposal, Proposals, Reads};
use crate::disk::{Disk, DiskError};
use crate::machine::{Machine, Member, MemberError, Outcome, ProposeError, RestoreError};
use crate::metrics::Timed;
use crate::records::{ChangeRecord, MemberRecord, Payload, ProposalId, Sessions, SnapshotMeta};
use crate::snapshot::{SnapshotError, Snapshots};
use crate::wal::{self, Identity, Marker, Recovered, State, Wal, WalError};
use bytes::Bytes;
use raft::eraftpb::{ConfState, Entry, Message, MessageType, Snapshot, SnapshotMetadata};
use raft::{Config, ProgressState, RawNode, ReadOnlyOption, SnapshotStatus, StateRole};
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Why a replica stops. Nothing of it is retried.
#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    /// The log failed.
    #[error(transparent)]
    Wal(#[from] WalError),
    /// A snapshot that is needed cannot be read.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// A directory cannot be read.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The machine does not take a snapshot.
    #[error("restore the snapshot at index {index}")]
    Restore {
        /// The snapshot's.
        index: u64,
        /// What the machine says.
        #[source]
        source: RestoreError,
    },
    /// No snapshot is left that fits the log.
    #[error("no usable snapshot in {}: the log begins after index {start}, and {newest}; restore a backup, or remove this member, empty its \
             data directory and join it again", dir.display())]
    NoSnapshot {
        /// The snapshots' directory.
        dir: PathBuf,
        /// Where the log begins.
        start: u64,
        /// What is wrong with the newest one.
        newest: String,
    },
    /// The data directory is another's.
    #[error("{} belongs to member {:x} of cluster {:x}, and this is member {:x} of cluster {:x}: name the right directory or the right cluster",
            dir.display(), found.member_id, found.cluster_id, expected.member_id, expected.cluster_id)]
    Identity {
        /// The directory.
        dir: PathBuf,
        /// Whose it is.
        found: Identity,
        /// Who asked.
        expected: Identity,
    },
    /// The log contradicts itself.
    #[error("the log in {} ends with entry {last}, but says that entry {commit} was committed; restore a backup or join the member again",
            dir.display())]
    Commit {
        /// Its directory.
        dir: PathBuf,
        /// Its last entry.
        last: u64,
        /// The commit index in its state.
        commit: u64,
    },
    /// Raft refuses its settings or a step.
    #[error("raft: {0}")]
    Raft(#[from] raft::Error),
}

/// How a replica behaves.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Whose replica it is.
    pub identity: Identity,
    /// Ticks without a word from the leader after which a member stands for election; twice as many at most.
    pub election_ticks: usize,
    /// Draws the wait before an election from a range; off in a simulation, whose clocks differ already.
    pub random_elections: bool,
    /// A snapshot is due after so many entries.
    pub snapshot_entries: u64,
    /// Applied entries are kept in memory for slow followers up to this many bytes.
    pub keep_bytes: u64,
    /// A proposal or read is given up after so many ticks.
    pub patience_ticks: u32,
    /// How the log is written.
    pub wal: wal::Options,
    /// Where the time of snapshots is counted.
    pub timed: Timed,
    /// A bug on purpose, for the tests that must find it.
    #[cfg(feature = "planted-bugs")]
    pub planted: Option<Planted>,
}

/// Bugs that tests plant and must find.
#[cfg(feature = "planted-bugs")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Planted {
    /// A restart forgets which proposals were applied.
    DoubleApply,
    /// Snapshots say nothing of the configuration.
    NoConfState,
    /// Entries are acknowledged before they are durable.
    AckBeforeSync,
    /// A read is answered without asking the others whether this is still the leader.
    StaleRead,
}

impl Settings {
    /// The usual ones: heartbeats every tick of 100 ms, elections after 1 to 2 s.
    #[must_use]
    pub fn new(identity: Identity) -> Self {
        Self {
            identity,
            election_ticks: 10,
            random_elections: true,
            snapshot_entries: 100_000,
            keep_bytes: 64 << 20,
            // Seven seconds, as etcd: five, and two elections.
            patience_ticks: 70,
            wal: wal::Options::default(),
            timed: Timed::default(),
            #[cfg(feature = "planted-bugs")]
            planted: None,
        }
    }
}

/// With whom a replica begins when its directory is empty.
#[derive(Debug, Clone)]
pub enum Boot {
    /// All members of a new cluster, the same list on each of them.
    Members(Vec<Member>),
    /// None: another member has added this one and will send what it needs.
    Join,
}

/// What came of a proposal, a change or a read.
#[derive(Debug)]
pub enum Reply {
    /// The command was applied.
    Outcome(Outcome),
    /// The change was made, or refused.
    Change(Result<(Vec<Member>, Option<u64>), MemberError>),
    /// All that was committed when the read came is applied; the index.
    Read(u64),
    /// No answer.
    Lost(ProposeError),
}

/// Where messages and answers go.
pub trait Outbox<W> {
    /// Sends messages to other members; each may be lost.
    fn send(&mut self, messages: Vec<Message>);
    /// Answers a waiter.
    fn answer(&mut self, waiter: W, reply: Reply);
}

/// A snapshot to write, aside from the replica.
pub struct SnapshotJob {
    snapshots: Snapshots,
    meta: SnapshotMeta,
    chunks: Box<dyn Iterator<Item = Bytes> + Send>,
}

/// A snapshot that was written.
#[derive(Debug)]
pub struct SnapshotDone {
    meta: SnapshotMeta,
    /// The size of its file.
    pub bytes: u64,
}

impl SnapshotJob {
    /// Writes it, durably.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn run(mut self) -> Result<SnapshotDone, SnapshotError> {
        let bytes = self.snapshots.write(&self.meta, &mut self.chunks)?;
        Ok(SnapshotDone { meta: self.meta, bytes })
    }
}

/// A replica. `W` is whoever waits for an answer.
pub struct Core<M, W> {
    pub(super) node: RawNode<Log>,
    pub(super) settings: Settings,
    pub(super) machine: M,
    pub(super) wal: Wal,
    pub(super) snapshots: Snapshots,
    /// What the next record says.
    pub(super) state: State,
    pub(super) members: Membership,
    pub(super) sessions: Sessions,
    pub(super) conf: ConfState,
    pub(super) applied: u64,
    pub(super) proposals: Proposals<W>,
    pub(super) reads: Reads<W>,
    /// The index of the newest snapshot on disk.
    pub(super) snapshot_index: u64,
    snapshot_running: bool,
    snapshot_bytes: u64,
    /// Bytes of entries since the newest snapshot.
    pub(super) log_bytes: u64,
    /// The leader and term that proposals were given to last.
    leader_seen: (u64, u64),
    /// Whether the members may differ from when it was asked last.
    pub(super) members_changed: bool,
}

/// Raft takes batches of proposals of at most this many bytes in one message.
const BATCH_BYTES: usize = 4 << 20;
/// A round of reads that got no answer for so many ticks begins anew.
const READ_PATIENCE_TICKS: u32 = 3;
/// A proposal that was forwarded, or a change that raft may have dropped, is proposed again after so many ticks.
const PROPOSAL_PATIENCE_TICKS: u32 = 10;
/// While a follower receives a snapshot, the entries after it are kept up to this many bytes.
pub(super) const KEEP_FOR_SNAPSHOT_BYTES: u64 = 512 << 20;
/// Large entries make a snapshot due before their number does. However it becomes due, none is written before the log has half the bytes of
/// the last snapshot: a large state is not written over and over.
const SNAPSHOT_LOG_BYTES: u64 = 128 << 20;

/// Where the log is in a data directory.
#[must_use]
pub fn wal_dir(data_dir: &Path) -> PathBuf {
    data_dir.join("wal")
}

/// Where the snapshots are in a data directory.
#[must_use]
pub fn snapshot_dir(data_dir: &Path) -> PathBuf {
    data_dir.join("snap")
}

impl<M: Machine, W> Core<M, W> {
    /// Opens the replica in `data_dir`, or begins it there as `boot` says.
    ///
    /// # Errors
    /// When the disk fails or the directory is damaged or another's.
    pub fn open(
        disk: &Arc<dyn Disk>,
        data_dir: &Path,
        settings: Settings,
        boot: &Boot,
        mut machine: M,
    ) -> Result<Self, ReplicaError> {
        let identity = settings.identity;
        let snapshots = Snapshots::new(Arc::clone(disk), &snapshot_dir(data_dir), identity.cluster_id)?;
        let wal_dir = wal_dir(data_dir);
        if !Wal::begun(&**disk, &wal_dir)? {
            begin(disk, data_dir, &settings, boot, &machine)?;
        }
        let (mut wal, mut found) = Wal::open(Arc::clone(disk), &wal_dir, settings.wal.clone())?;
        if wal.identity() != identity {
            return Err(ReplicaError::Identity { dir: data_dir.to_owned(), found: wal.identity(), expected: identity });
        }
        if let Some(repair) = &found.repair {
            tracing::warn!(file = %repair.file.display(), offset = repair.offset,
                "removed the torn end of the log that a crash had left; nothing acknowledged was in it");
        }
        snapshots.remove_temporary()?;
        let meta = restore(&snapshots, &found, &mut machine, data_dir)?;
        let snapshot_bytes = match snapshots.raw(meta.index, meta.term) {
            Ok((_, len)) => len,
            // A member that joins has none yet.
            Err(_) => 0,
        };
        let mut state = found.state.clone();
        state.epoch += 1;
        state.hard.commit = state.hard.commit.max(meta.index);
        let log = log_after(std::mem::take(&mut found.entries), &meta, &state);
        if state.hard.commit > log.last() {
            return Err(ReplicaError::Commit { dir: wal_dir, last: log.last(), commit: state.hard.commit });
        }
        // The new epoch is durable before anything is proposed in it.
        wal.append(&state, &[], &[])?;
        snapshots.remove_old(wal.snapshots())?;
        let mut core = Self::with(settings, machine, (wal, snapshots), (state, meta, log))?;
        core.snapshot_bytes = snapshot_bytes;
        Ok(core)
    }

    fn with(
        settings: Settings,
        machine: M,
        (wal, snapshots): (Wal, Snapshots),
        (state, meta, log): (State, SnapshotMeta, Log),
    ) -> Result<Self, ReplicaError> {
        let conf = meta.conf.as_ref().map(ConfState::from).unwrap_or_default();
        let config = raft_config(&settings, meta.index);
        config.validate()?;
        let mut node = RawNode::new(&config, log, &super::raft_logger())?;
        let me = settings.identity.member_id;
        if conf.voters == [me] {
            // Nobody else can be asked: waiting for an election timeout would only delay the start.
            node.campaign()?;
        }
        #[cfg(feature = "planted-bugs")]
        let forget = settings.planted == Some(Planted::DoubleApply);
        #[cfg(not(feature = "planted-bugs"))]
        let forget = false;
        let sessions = if forget { Sessions::default() } else { Sessions::from_records(&meta.sessions) };
        Ok(Self {
            node,
            settings,
            machine,
            wal,
            snapshots,
            state,
            members: Membership::new(meta.members.into_iter().map(Member::from), meta.removed),
            sessions,
            conf,
            applied: meta.index,
            proposals: Proposals::default(),
            reads: Reads::default(),
            snapshot_index: meta.index,
            snapshot_running: false,
            snapshot_bytes: 0,
            log_bytes: 0,
            leader_seen: (0, 0),
            members_changed: true,
        })
    }

    /// This member's id.
    #[must_use]
    pub const fn id(&self) -> u64 {
        self.settings.identity.member_id
    }

    /// Raft, for looking at.
    #[must_use]
    pub const fn raft(&self) -> &raft::Raft<Log> {
        &self.node.raft
    }

    /// The machine, for looking at.
    #[must_use]
    pub const fn machine(&self) -> &M {
        &self.machine
    }

    /// The members as of the last applied change.
    #[must_use]
    pub const fn members(&self) -> &Membership {
        &self.members
    }

    /// Whether the members may have changed since this was asked last.
    pub fn members_changed(&mut self) -> bool {
        std::mem::take(&mut self.members_changed)
    }

    /// The indexes of the snapshots that a start may begin with, oldest first.
    #[must_use]
    pub fn snapshot_starts(&self) -> Vec<u64> {
        self.wal.snapshots().iter().map(|marker| marker.index).collect()
    }

    /// What the log takes on disk, bytes.
    #[must_use]
    pub fn wal_bytes(&self) -> u64 {
        self.wal.disk_bytes()
    }

    /// What the log and the newest snapshot take on disk, bytes.
    #[must_use]
    pub fn disk_bytes(&self) -> u64 {
        self.wal.disk_bytes() + self.snapshot_bytes
    }

    /// The configuration as of the last applied change.
    #[must_use]
    pub const fn conf_state(&self) -> &ConfState {
        &self.conf
    }

    /// The last applied entry.
    #[must_use]
    pub const fn applied(&self) -> u64 {
        self.applied
    }

    /// The snapshots on disk.
    #[must_use]
    pub const fn snapshots(&self) -> &Snapshots {
        &self.snapshots
    }

    /// Whether this member leads.
    #[must_use]
    pub fn is_leader(&self) -> bool {
        self.node.raft.state == StateRole::Leader
    }

    /// Whether this member leads a cluster with no other voter and has applied its log: that is then all there is, and a read need ask
    /// nobody.
    #[must_use]
    pub fn leads_alone(&self) -> bool {
        // After a start it leads at once, and everything that was acknowledged before waits to be applied up to its first entry.
        let has_caught_up = self.node.raft.apply_to_current_term();
        self.is_leader() && has_caught_up && self.conf.voters == [self.id()] && self.conf.voters_outgoing.is_empty()
    }

    /// Whether this member was removed. It goes on for a while, because a removed leader still has to tell the others.
    #[must_use]
    pub fn is_removed(&self) -> bool {
        self.members.was_removed(self.id())
    }

    /// Time passes.
    pub fn tick(&mut self, out: &mut impl Outbox<W>) {
        self.node.tick();
        let limit = self.settings.patience_ticks;
        for late in self.reads.tick(READ_PATIENCE_TICKS, limit) {
            out.answer(late, Reply::Lost(ProposeError::Timeout));
        }
        let me = self.id();
        for (_, pending) in self.proposals.iter_mut() {
            pending.age_ticks += 1;
            pending.given_ticks += 1;
            // What this member itself has appended as leader is in the log; a change may have been dropped there all the same.
            let certain = matches!(pending.proposal, Proposal::Command(_))
                && pending.given.is_some_and(|(_, leader)| leader == me);
            if pending.given_ticks >= PROPOSAL_PATIENCE_TICKS && !certain {
                pending.given = None;
            }
        }
        for late in self.proposals.settle_where(|_, pending| pending.age_ticks >= limit) {
            let nobody = late.given.is_none() && self.node.raft.leader_id == 0;
            out.answer(late.waiter, Reply::Lost(if nobody { ProposeError::NoLeader } else { ProposeError::Timeout }));
        }
    }

    /// A message from another member. One that raft does not want is dropped, as the network might have done.
    pub fn step(&mut self, message: Message) {
        // A leader that was removed has no progress of its own to compare answers with; its heartbeats alone tell the others. A follower
        // that was removed goes on voting: a restarted member may not know yet that it does without this vote.
        if self.members.was_removed(message.from) || (self.is_removed() && self.is_leader()) {
            return;
        }
        if message.get_msg_type() == MessageType::MsgSnapshot {
            let metadata = message.get_snapshot().get_metadata();
            if let Err(error) = self.snapshots.open(metadata.index, metadata.term) {
                tracing::warn!(%error, "a snapshot was announced that is not here");
                return;
            }
        }
        if let Err(error) = self.node.step(message) {
            tracing::debug!(%error, "raft dropped a message");
        }
    }

    /// Proposes a command.
    pub fn propose(&mut self, command: Bytes, waiter: W) {
        self.proposals.push(waiter, Proposal::Command(command));
    }

    /// Proposes a change of the membership, unless it is refused as things are.
    pub fn change(&mut self, change: ChangeRecord, waiter: W, out: &mut impl Outbox<W>) {
        match self.members.check(&change) {
            Ok(()) => drop(self.proposals.push(waiter, Proposal::Change(change))),
            Err(refused) => out.answer(waiter, Reply::Change(Err(refused.into()))),
        }
    }

    /// Asks for a moment after which everything committed before now is applied here.
    pub fn read(&mut self, waiter: W) {
        self.reads.push(waiter);
    }

    /// A peer cannot be reached at the moment.
    pub fn unreachable(&mut self, id: u64) {
        self.node.report_unreachable(id);
    }

    /// Whether a snapshot has reached its receiver.
    pub fn snapshot_sent(&mut self, id: u64, arrived: bool) {
        self.node.report_snapshot(id, if arrived { SnapshotStatus::Finish } else { SnapshotStatus::Failure });
    }

    /// Hands leadership to a voter.
    pub fn transfer_to(&mut self, id: u64) {
        self.node.transfer_leader(id);
    }

    /// The voter, other than this member, that has most of the log and was heard from lately.
    #[must_use]
    pub fn best_successor(&self) -> Option<u64> {
        let followers = self
            .node
            .raft
            .prs()
            .iter()
            .filter(|(id, progress)| **id != self.id() && self.conf.voters.contains(id) && progress.recent_active);
        followers.max_by_key(|(id, progress)| (progress.matched, **id)).map(|(id, _)| *id)
    }

    /// Whether a learner has nearly all of the log, which only the leader knows.
    #[must_use]
    pub fn learner_is_ready(&self, id: u64) -> bool {
        let ready = |progress: &raft::Progress| {
            progress.recent_active
                && progress.state == ProgressState::Replicate
                && progress.matched.saturating_mul(10) >= self.applied.saturating_mul(9)
        };
        self.node.raft.prs().get(id).is_some_and(ready)
    }

    /// Gives raft what waits: proposals that it has not, or whose leader has changed, and a round of reads.
    pub(super) fn give_to_raft(&mut self) {
        let leader = self.node.raft.leader_id;
        let given = (self.node.raft.term, leader);
        if given != self.leader_seen {
            self.leader_seen = given;
            self.reads.give_up_round();
        }
        if leader == 0 || self.is_removed() {
            return;
        }
        self.give_proposals(given);
        if let Some(round) = self.reads.begin_round() {
            #[cfg(feature = "planted-bugs")]
            if self.settings.planted == Some(Planted::StaleRead) {
                return self.reads.confirm(round, self.applied);
            }
            let id = ProposalId { member_id: self.id(), epoch: self.state.epoch, number: round, floor: 0 };
            self.node.read_index(id.encode(Payload::Command));
        }
    }

    fn give_proposals(&mut self, given: (u64, u64)) {
        let (member_id, epoch, floor) = (self.id(), self.state.epoch, self.proposals.floor());
        let mut batch = Vec::new();
        let mut bytes = 0;
        for (number, pending) in self.proposals.iter_mut() {
            if pending.given.is_some_and(|before| before == given) {
                continue;
            }
            let id = ProposalId { member_id, epoch, number, floor };
            match &pending.proposal {
                Proposal::Command(command) => {
                    if bytes > BATCH_BYTES {
                        break;
                    }
                    bytes += command.len();
                    let context = id.encode(Payload::Command);
                    batch.push(Entry { data: command.to_vec(), context, ..Entry::default() });
                }
                Proposal::Change(change) => {
                    let context = id.encode(Payload::Change);
                    let taken = match members::conf_change(change) {
                        Some(conf_change) => self.node.propose_conf_change(context, conf_change),
                        None => self.node.propose(context, change.to_bytes()),
                    };
                    if taken.is_err() {
                        continue;
                    }
                }
            }
            (pending.given, pending.given_ticks) = (Some(given), 0);
        }
        if batch.is_empty() {
            return;
        }
        let mut message = Message { from: member_id, entries: batch, ..Message::default() };
        message.set_msg_type(MessageType::MsgPropose);
        if self.node.step(message).is_err() {
            // Too much is uncommitted, or leadership moves: they are given again in the next round.
            for (_, pending) in self.proposals.iter_mut() {
                if matches!(pending.proposal, Proposal::Command(_))
                    && pending.given == Some(given)
                    && pending.given_ticks == 0
                {
                    pending.given = None;
                }
            }
        }
    }

    /// A snapshot to write now, if one is due. To be followed by [`Self::snapshot_done`] before there is another one.
    pub fn snapshot_job(&mut self) -> Option<SnapshotJob> {
        let wanted = self.node.store().snapshot_wanted();
        let many = self.applied >= self.snapshot_index + self.settings.snapshot_entries
            || self.log_bytes >= SNAPSHOT_LOG_BYTES;
        let due = many && self.log_bytes >= self.snapshot_bytes / 2;
        if self.snapshot_running || !(wanted || due) {
            return None;
        }
        let term = self.node.store().term_of(self.applied)?;
        self.snapshot_running = true;
        self.log_bytes = 0;
        let meta = self.meta(term);
        Some(SnapshotJob { snapshots: self.snapshots.clone(), meta, chunks: self.machine.snapshot() })
    }

    fn meta(&self, term: u64) -> SnapshotMeta {
        let (members, removed) = self.members.records();
        #[cfg(feature = "planted-bugs")]
        let without_conf = self.settings.planted == Some(Planted::NoConfState);
        #[cfg(not(feature = "planted-bugs"))]
        let without_conf = false;
        let conf = (!without_conf).then(|| (&self.conf).into());
        SnapshotMeta {
            cluster_id: self.settings.identity.cluster_id,
            index: self.applied,
            term,
            conf,
            members,
            removed,
            sessions: self.sessions.records(),
        }
    }

    /// A snapshot job has ended.
    ///
    /// # Errors
    /// When the log cannot take note of it. That the snapshot could not be written is no error of the replica: there will be another.
    pub fn snapshot_done(&mut self, done: Result<SnapshotDone, SnapshotError>) -> Result<(), ReplicaError> {
        self.snapshot_running = false;
        let SnapshotDone { meta, bytes } = match done {
            Ok(done) => done,
            Err(error) => {
                tracing::warn!(%error, "a snapshot could not be written; the log stays longer instead");
                return Ok(());
            }
        };
        self.snapshot_bytes = bytes;
        if meta.index <= self.snapshot_index && self.snapshot_index > 1 {
            // One that came from the leader in the meantime is newer, or this is the same.
            if meta.index < self.snapshot_index {
                return Ok(());
            }
        } else {
            self.wal.mark_snapshot(Marker { index: meta.index, term: meta.term, installed: false })?;
            self.snapshot_index = meta.index;
        }
        self.snapshots.remove_old(self.wal.snapshots())?;
        self.node.mut_store().offer(raft_snapshot(&meta));
        Ok(())
    }
}

/// Raft's form of a snapshot: where it stands; the state itself stays in its file.
pub(super) fn raft_snapshot(meta: &SnapshotMeta) -> Snapshot {
    let conf_state = meta.conf.as_ref().map(ConfState::from);
    Snapshot {
        metadata: Some(SnapshotMetadata { conf_state, index: meta.index, term: meta.term }),
        ..Snapshot::default()
    }
}

/// Begins a replica in an empty directory: with a snapshot of the members and whatever is in the machine, so that every start, the first
/// too, begins with a snapshot.
///
/// # Errors
/// When the disk fails.
pub fn begin<M: Machine>(
    disk: &Arc<dyn Disk>,
    data_dir: &Path,
    settings: &Settings,
    boot: &Boot,
    machine: &M,
) -> Result<(), ReplicaError> {
    let snapshots = Snapshots::new(Arc::clone(disk), &snapshot_dir(data_dir), settings.identity.cluster_id)?;
    let mut state = State::default();
    let mut markers = Vec::new();
    if let Boot::Members(members) = boot {
        let voters: Vec<u64> = members.iter().map(|member| member.id).collect();
        let meta = SnapshotMeta {
            cluster_id: settings.identity.cluster_id,
            // A restored machine has applied entries of another log, and only greater indexes may follow.
            index: machine.applied().max(1),
            term: 1,
            conf: Some((&ConfState::from((voters, vec![]))).into()),
            members: members.iter().cloned().map(MemberRecord::from).collect(),
            ..SnapshotMeta::default()
        };
        snapshots.write(&meta, &mut machine.snapshot())?;
        (state.hard.term, state.hard.commit) = (1, meta.index);
        markers.push(Marker { index: meta.index, term: 1, installed: true });
    }
    let mut wal = Wal::create(Arc::clone(disk), &wal_dir(data_dir), settings.identity, settings.wal.clone())?;
    wal.append(&state, &markers, &[])?;
    Ok(())
}

/// Restores the newest snapshot that is whole and that the log continues; the empty head when the log has none yet.
fn restore<M: Machine>(
    snapshots: &Snapshots,
    found: &Recovered,
    machine: &mut M,
    data_dir: &Path,
) -> Result<SnapshotMeta, ReplicaError> {
    let mut newest = String::new();
    for marker in found.markers.iter().rev().filter(|marker| marker.index >= found.start) {
        // The head and all chunks are read before the machine is touched: it has to be fresh for the next one.
        let whole = snapshots.verify(marker.index, marker.term).and_then(|_| snapshots.open(marker.index, marker.term));
        let mut reader = match whole {
            Ok(reader) => reader,
            Err(error @ (SnapshotError::Version { .. } | SnapshotError::Cluster { .. })) => return Err(error.into()),
            Err(error) => {
                tracing::warn!(%error, "a snapshot cannot be used; trying the one before it");
                if newest.is_empty() {
                    newest = error.to_string();
                }
                continue;
            }
        };
        let meta = reader.meta().clone();
        machine.restore(&mut reader).map_err(|source| ReplicaError::Restore { index: meta.index, source })?;
        return Ok(meta);
    }
    if found.markers.is_empty() && found.entries.is_empty() {
        return Ok(SnapshotMeta::default());
    }
    Err(ReplicaError::NoSnapshot { dir: snapshot_dir(data_dir), start: found.start, newest })
}

/// The entries after the snapshot.
fn log_after(entries: VecDeque<Entry>, meta: &SnapshotMeta, state: &State) -> Log {
    let conf = meta.conf.as_ref().map(ConfState::from).unwrap_or_default();
    let entries = entries.into_iter().filter(|entry| entry.index > meta.index).collect();
    Log::new((meta.index, meta.term), state.hard.clone(), conf, entries)
}

fn raft_config(settings: &Settings, applied: u64) -> Config {
    let ticks = settings.election_ticks;
    Config {
        id: settings.identity.member_id,
        election_tick: ticks,
        heartbeat_tick: 1,
        min_election_tick: ticks,
        max_election_tick: if settings.random_elections { 2 * ticks } else { ticks + 1 },
        applied,
        // Large enough that a follower's log is written in large records.
        max_size_per_msg: 1 << 20,
        // 256 messages of 1 MiB bound what a follower that does not answer can make the leader send.
        max_inflight_msgs: 256,
        max_uncommitted_size: 64 << 20,
        max_committed_size_per_ready: 16 << 20,
        check_quorum: true,
        pre_vote: true,
        // raft-rs 0.7.0 may put entries into a message that was empty and stands for a later index; the follower then acknowledges
        // entries that it does not have. The simulation finds it. A batch is one message here anyway.
        batch_append: false,
        read_only_option: ReadOnlyOption::Safe,
        ..Config::default()
    }
}
