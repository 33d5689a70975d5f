//! The seam between consensus and the state: what a replica drives, and what the etcd face asks of a replica.

use crate::refused::Refused;
use bytes::Bytes;
use std::future::Future;

/// A deterministic state machine. The replica's apply thread owns it; readers have their own view of the state.
///
/// The same commands at the same indexes give the same state on every member; no clock, randomness or thread has a say.
pub trait Machine: Send + 'static {
    /// The index of the last command that is part of the state; 0 for a fresh one.
    fn applied(&self) -> u64;

    /// Applies the committed entry at `index`, which is greater than [`applied`](Machine::applied).
    ///
    /// An empty command changes nothing but `applied` (raft's own entries: a new leader's first, membership). A
    /// command that this version cannot read is answered with [`Refused::Corrupt`], the same on every member.
    fn apply(&mut self, index: u64, command: &[u8]) -> Outcome;

    /// Called once after each run of `apply` calls, before their outcomes are handed out: wakes watchers once a batch.
    fn batch_applied(&mut self) {}

    /// The whole state at `applied`, cheap to start: the chunks (each at most 1 MiB) are made while the apply thread goes on.
    fn snapshot(&self) -> Box<dyn Iterator<Item = Bytes> + Send>;

    /// Replaces the state with a snapshot's; the state is unchanged unless all chunks were good.
    ///
    /// # Errors
    /// When a chunk cannot be read or does not continue what came before.
    fn restore(&mut self, chunks: &mut dyn Iterator<Item = std::io::Result<Bytes>>) -> Result<(), RestoreError>;
}

/// What applying a command came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The store's revision after the command.
    pub revision: i64,
    /// The encoded response message without its header, for the proposer if it waits on this member.
    pub result: Result<Bytes, Refused>,
}

/// Why a snapshot could not become the state.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The chunks could not be had.
    #[error("read chunk {chunk} of the snapshot")]
    Read {
        /// Counted from 0.
        chunk: u64,
        /// What the source said.
        source: std::io::Error,
    },
    /// The chunks are not a snapshot of this format.
    #[error("snapshot chunk {chunk}: {problem}")]
    Malformed {
        /// Counted from 0.
        chunk: u64,
        /// What is wrong, and what would be right.
        problem: String,
    },
}

/// What the etcd face needs from consensus. Clones share one replica.
pub trait Replicator: Clone + Send + Sync + 'static {
    /// Has `command` committed and applied on this member, and answers what came of it. A follower forwards it to the leader.
    fn propose(&self, command: Bytes) -> impl Future<Output = Result<Outcome, ProposeError>> + Send;

    /// Resolves when this member has applied everything that was committed when the call was made; gives that index.
    fn read_index(&self) -> impl Future<Output = Result<u64, ProposeError>> + Send;

    /// A glance at the replica.
    fn status(&self) -> ReplicaStatus;

    /// The members as of the last applied change, in order of their ids.
    fn members(&self) -> Vec<Member>;

    /// Has a change of the membership committed and applied; gives the members after it and, for an addition, the new one's id.
    fn change_members(
        &self,
        change: MemberChange,
    ) -> impl Future<Output = Result<(Vec<Member>, Option<u64>), MemberError>> + Send;

    /// Asks the leader (this member) to hand over to `target`.
    fn transfer_leadership(&self, target: u64) -> impl Future<Output = Result<(), MemberError>> + Send;
}

/// A glance at a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ReplicaStatus {
    /// The cluster.
    pub cluster_id: u64,
    /// This member.
    pub member_id: u64,
    /// The leader as far as this member knows; 0 for none.
    pub leader_id: u64,
    /// Raft's term.
    pub term: u64,
    /// The last index that this member knows to be committed.
    pub commit_index: u64,
    /// The last index that this member has applied.
    pub applied_index: u64,
    /// Whether this member has no vote.
    pub is_learner: bool,
    /// What the log takes on disk, in bytes.
    pub wal_bytes: u64,
    /// What the log and the snapshots take on disk, in bytes.
    pub disk_bytes: u64,
}

/// One member of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Member {
    /// Never used again after the member is gone.
    pub id: u64,
    /// Its own name; empty until it has started.
    pub name: String,
    /// Where the other members find it.
    pub peer_urls: Vec<String>,
    /// Where clients find it; empty until it has started.
    pub client_urls: Vec<String>,
    /// Whether it has no vote.
    pub is_learner: bool,
}

/// A change of the membership.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemberChange {
    /// A new member, which will be given an id.
    Add {
        /// Where the others will find it.
        peer_urls: Vec<String>,
        /// Without a vote at first.
        is_learner: bool,
    },
    /// The member leaves; its id is never used again.
    Remove {
        /// Who.
        id: u64,
    },
    /// Other addresses.
    Update {
        /// Whose.
        id: u64,
        /// All of them.
        peer_urls: Vec<String>,
    },
    /// The learner gets its vote.
    Promote {
        /// Who.
        id: u64,
    },
}

/// Why a proposal or a read brought no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// Nobody leads; nothing was proposed.
    #[error("no leader")]
    NoLeader,
    /// Leadership moved; the proposal may or may not take effect.
    #[error("leader changed")]
    LeaderChanged,
    /// Too many proposals wait already; nothing was proposed.
    #[error("too many proposals wait")]
    Busy,
    /// Longer than the log takes; nothing was proposed.
    #[error("command is too large for the log")]
    TooLarge,
    /// No answer in time; the proposal may or may not take effect.
    #[error("timed out")]
    Timeout,
    /// The replica is going down; the proposal may or may not take effect.
    #[error("replica stopped")]
    Stopped,
}

impl From<ProposeError> for Refused {
    fn from(error: ProposeError) -> Refused {
        match error {
            ProposeError::NoLeader => Refused::NoLeader,
            ProposeError::LeaderChanged => Refused::LeaderChanged,
            ProposeError::Busy => Refused::TooManyRequests,
            ProposeError::TooLarge => Refused::RequestTooLarge,
            ProposeError::Timeout => Refused::Timeout,
            ProposeError::Stopped => Refused::Stopped,
        }
    }
}

/// Why a change of the membership, or a transfer of leadership, did not come about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MemberError {
    /// It is not allowed as things are; the reason in etcd's words.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// It could not be proposed or was not answered.
    #[error("change the membership")]
    Propose(#[from] ProposeError),
}
