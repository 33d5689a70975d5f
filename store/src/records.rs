//! What the replica itself keeps in log entries and snapshots, as protobuf messages: members, sessions of proposals, a snapshot's head.

use crate::machine;
use prost::Message as _;
use raft::eraftpb::ConfState;
use std::collections::{BTreeMap, BTreeSet};

/// A member as it is stored.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MemberRecord {
    /// See [`machine::Member`].
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// See [`machine::Member`].
    #[prost(string, tag = "2")]
    pub name: String,
    /// See [`machine::Member`].
    #[prost(string, repeated, tag = "3")]
    pub peer_urls: Vec<String>,
    /// See [`machine::Member`].
    #[prost(string, repeated, tag = "4")]
    pub client_urls: Vec<String>,
    /// See [`machine::Member`].
    #[prost(bool, tag = "5")]
    pub is_learner: bool,
}

impl From<MemberRecord> for machine::Member {
    fn from(record: MemberRecord) -> Self {
        let MemberRecord { id, name, peer_urls, client_urls, is_learner } = record;
        Self { id, name, peer_urls, client_urls, is_learner }
    }
}

impl From<machine::Member> for MemberRecord {
    fn from(member: machine::Member) -> Self {
        let machine::Member { id, name, peer_urls, client_urls, is_learner } = member;
        Self { id, name, peer_urls, client_urls, is_learner }
    }
}

/// Raft's configuration as it is stored.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ConfRecord {
    /// Members with a vote.
    #[prost(uint64, repeated, tag = "1")]
    pub voters: Vec<u64>,
    /// Members without one.
    #[prost(uint64, repeated, tag = "2")]
    pub learners: Vec<u64>,
    /// Voters of the configuration that is being left.
    #[prost(uint64, repeated, tag = "3")]
    pub voters_outgoing: Vec<u64>,
    /// Voters that become learners when it has been left.
    #[prost(uint64, repeated, tag = "4")]
    pub learners_next: Vec<u64>,
    /// Whether it is left as soon as possible.
    #[prost(bool, tag = "5")]
    pub auto_leave: bool,
}

impl From<&ConfState> for ConfRecord {
    fn from(conf: &ConfState) -> Self {
        let ConfState { voters, learners, voters_outgoing, learners_next, auto_leave } = conf.clone();
        Self { voters, learners, voters_outgoing, learners_next, auto_leave }
    }
}

impl From<&ConfRecord> for ConfState {
    fn from(conf: &ConfRecord) -> Self {
        let ConfRecord { voters, learners, voters_outgoing, learners_next, auto_leave } = conf.clone();
        Self { voters, learners, voters_outgoing, learners_next, auto_leave }
    }
}

/// The proposals of one member that have been applied.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SessionRecord {
    /// The member.
    #[prost(uint64, tag = "1")]
    pub member_id: u64,
    /// Its start.
    #[prost(uint64, tag = "2")]
    pub epoch: u64,
    /// All proposals before this one are settled.
    #[prost(uint64, tag = "3")]
    pub floor: u64,
    /// Those applied of the later ones.
    #[prost(uint64, repeated, tag = "4")]
    pub applied: Vec<u64>,
}

/// The head of a snapshot.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SnapshotMeta {
    /// The cluster whose state it is.
    #[prost(uint64, tag = "1")]
    pub cluster_id: u64,
    /// The last entry that it contains.
    #[prost(uint64, tag = "2")]
    pub index: u64,
    /// That entry's term.
    #[prost(uint64, tag = "3")]
    pub term: u64,
    /// The configuration as of that entry.
    #[prost(message, optional, tag = "4")]
    pub conf: Option<ConfRecord>,
    /// The members as of that entry.
    #[prost(message, repeated, tag = "5")]
    pub members: Vec<MemberRecord>,
    /// Ids that were members once.
    #[prost(uint64, repeated, tag = "6")]
    pub removed: Vec<u64>,
    /// The applied proposals that may come again.
    #[prost(message, repeated, tag = "7")]
    pub sessions: Vec<SessionRecord>,
}

/// A change of the membership as it stands in the log.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ChangeRecord {
    /// Which of the kinds.
    #[prost(enumeration = "ChangeKind", tag = "1")]
    pub kind: i32,
    /// The member after the change; for a removal or a promotion only its id counts.
    #[prost(message, optional, tag = "2")]
    pub member: Option<MemberRecord>,
}

/// The kinds of [`ChangeRecord`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum ChangeKind {
    /// Not set; refused.
    Unset = 0,
    /// A new member.
    Add = 1,
    /// A member leaves.
    Remove = 2,
    /// Other peer addresses.
    Update = 3,
    /// A learner gets its vote.
    Promote = 4,
    /// A started member tells its name and where clients find it.
    Publish = 5,
}

/// Which proposal an entry is: stands in the entry's context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProposalId {
    /// Who proposed it.
    pub member_id: u64,
    /// In which of the member's lives.
    pub epoch: u64,
    /// The number in that life, from 1.
    pub number: u64,
    /// All proposals of that life before this one are settled: answered, or given up.
    pub floor: u64,
}

/// Whether an entry's data is a command of the machine or a [`ChangeRecord`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Payload {
    /// For the machine.
    Command,
    /// For the membership.
    Change,
}

const CONTEXT: usize = 33;

impl ProposalId {
    /// The bytes for an entry's context.
    #[must_use]
    pub fn encode(&self, payload: Payload) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(CONTEXT);
        bytes.push(match payload {
            Payload::Command => 1,
            Payload::Change => 2,
        });
        for number in [self.member_id, self.epoch, self.number, self.floor] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes
    }

    /// Reads an entry's context; `None` for raft's own entries.
    #[must_use]
    pub fn decode(context: &[u8]) -> Option<(Payload, Self)> {
        let (kind, numbers) = context.split_first()?;
        let payload = match kind {
            1 => Payload::Command,
            2 => Payload::Change,
            _ => return None,
        };
        let number = |at: usize| Some(u64::from_le_bytes(numbers.get(at * 8..at * 8 + 8)?.try_into().ok()?));
        let id = Self { member_id: number(0)?, epoch: number(1)?, number: number(2)?, floor: number(3)? };
        (context.len() == CONTEXT).then_some((payload, id))
    }
}

/// Which proposals have been applied, so that one that was proposed twice takes effect once. The same on every member.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sessions {
    by_member: BTreeMap<u64, Session>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Session {
    epoch: u64,
    floor: u64,
    /// Bounded by the proposals that a member has under way at once, because `floor` follows behind them.
    applied: BTreeSet<u64>,
}

impl Sessions {
    /// Notes that the proposal is applied; false when it must not be, because it was before or its member has given it up.
    pub fn admit(&mut self, id: &ProposalId) -> bool {
        let session = self.by_member.entry(id.member_id).or_default();
        if id.epoch < session.epoch {
            return false;
        }
        if id.epoch > session.epoch {
            *session = Session { epoch: id.epoch, ..Session::default() };
        }
        if id.number < session.floor || !session.applied.insert(id.number) {
            return false;
        }
        if id.floor > session.floor {
            session.floor = id.floor;
            session.applied = session.applied.split_off(&id.floor);
        }
        true
    }

    /// Whether the proposal was admitted, as far as that is still known.
    #[must_use]
    pub fn was_admitted(&self, member_id: u64, epoch: u64, number: u64) -> bool {
        self.by_member.get(&member_id).is_some_and(|session| {
            session.epoch == epoch && (number < session.floor || session.applied.contains(&number))
        })
    }

    /// A member is gone, and its id never comes back.
    pub fn forget(&mut self, member_id: u64) {
        self.by_member.remove(&member_id);
    }

    /// For a snapshot.
    #[must_use]
    pub fn records(&self) -> Vec<SessionRecord> {
        let record = |(member_id, session): (&u64, &Session)| SessionRecord {
            member_id: *member_id,
            epoch: session.epoch,
            floor: session.floor,
            applied: session.applied.iter().copied().collect(),
        };
        self.by_member.iter().map(record).collect()
    }

    /// From a snapshot.
    #[must_use]
    pub fn from_records(records: &[SessionRecord]) -> Self {
        let session = |record: &SessionRecord| {
            let applied = record.applied.iter().copied().collect();
            (record.member_id, Session { epoch: record.epoch, floor: record.floor, applied })
        };
        Self { by_member: records.iter().map(session).collect() }
    }
}

impl ChangeRecord {
    /// The bytes for an entry's data.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        self.encode_to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(epoch: u64, number: u64, floor: u64) -> ProposalId {
        ProposalId { member_id: 1, epoch, number, floor }
    }

    #[test]
    fn a_proposal_is_admitted_once() {
        let mut sessions = Sessions::default();
        let table = [
            (id(1, 1, 1), true, "the first"),
            (id(1, 1, 1), false, "the same again"),
            (id(1, 3, 1), true, "ahead of the second"),
            (id(1, 2, 1), true, "the second, late"),
            (id(1, 4, 3), true, "settles the first two"),
            (id(1, 2, 1), false, "the second again, behind the floor"),
            (id(1, 3, 1), false, "the third again, not behind the floor"),
            (id(1, 5, 9), true, "settles everything before the ninth"),
            (id(1, 8, 1), false, "was given up"),
            (id(2, 1, 1), true, "after a restart"),
            (id(1, 9, 1), false, "from before the restart"),
        ];
        for (id, admitted, what) in table {
            assert_eq!(sessions.admit(&id), admitted, "{what}");
            let copy = Sessions::from_records(&sessions.records());
            assert_eq!(copy, sessions, "{what}: through a snapshot");
        }
    }

    #[test]
    fn contexts_come_back_and_foreign_ones_are_none() {
        let id = id(3, 4, 2);
        for payload in [Payload::Command, Payload::Change] {
            let bytes = id.encode(payload);
            assert_eq!(ProposalId::decode(&bytes), Some((payload, id)));
            for len in 0..bytes.len() {
                assert_eq!(ProposalId::decode(&bytes[..len]), None);
            }
        }
        assert_eq!(ProposalId::decode(&[9; 33]), None);
    }
}
