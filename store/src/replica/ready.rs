//! The round of a replica: make durable what raft wants kept, send, apply what is committed, answer.
//!
//! The order is the whole point. A leader's messages leave before the sync, so that followers write at the same time; all other messages
//! promise something and leave after it. Nothing is applied that is not committed, and nothing answered that is not applied.

use super::core::{Core, KEEP_FOR_SNAPSHOT_BYTES, Outbox, ReplicaError, Reply, raft_snapshot};
use super::pending::Proposal;
use crate::machine::{Machine, ProposeError};
use crate::records::{ChangeRecord, Payload, ProposalId, Sessions, SnapshotMeta};
use crate::refused::Refused;
use crate::wal::Marker;
use prost::Message as _;
use raft::eraftpb::{ConfChangeV2, ConfState, Entry, EntryType};
use raft::{ProgressState, ReadState, Ready};
use raft_prost::Message as _;

/// What a cluster of one keeps of its applied entries in memory, bytes.
const KEEP_ALONE_BYTES: u64 = 1 << 20;

impl<M: Machine, W> Core<M, W> {
    /// Does all that there is to do. Returns when raft has nothing more.
    ///
    /// # Errors
    /// When the disk fails or the state is damaged; the replica must not be used any more then.
    pub fn advance(&mut self, out: &mut impl Outbox<W>) -> Result<(), ReplicaError> {
        self.give_to_raft();
        while self.node.has_ready() {
            let ready = self.node.ready();
            self.round(ready, out)?;
            self.give_to_raft();
        }
        self.answer_reads(out);
        Ok(())
    }

    fn round(&mut self, mut ready: Ready, out: &mut impl Outbox<W>) -> Result<(), ReplicaError> {
        let committed = ready.take_committed_entries();
        self.persist_commit_of_change(&committed)?;
        let messages = ready.take_messages();
        if !messages.is_empty() {
            out.send(messages);
        }
        self.confirm_reads(ready.take_read_states());
        let installed = self.persist(&mut ready)?;
        let promises = ready.take_persisted_messages();
        if !promises.is_empty() {
            out.send(promises);
        }
        if let Some(meta) = installed {
            self.install(&meta, out)?;
        }
        // Raft hears what is durable before anything is applied: a leader that applies its own removal has no progress to note it in.
        let mut light = self.node.advance_append(ready);
        if let Some(commit) = light.commit_index() {
            self.state.hard.commit = commit;
            let hard = self.state.hard.clone();
            self.node.mut_store().set_hard(&hard);
        }
        let committed_now = light.take_committed_entries();
        self.persist_commit_of_change(&committed_now)?;
        let messages = light.take_messages();
        if !messages.is_empty() {
            out.send(messages);
        }
        self.apply(committed, out)?;
        self.apply(committed_now, out)?;
        self.node.advance_apply();
        self.trim();
        Ok(())
    }

    /// That a change of the configuration is committed must survive here before anybody else hears of it: a member that is removed goes
    /// away once it knows, and this one would wait for its vote for ever if it had forgotten.
    fn persist_commit_of_change(&mut self, committed: &[Entry]) -> Result<(), ReplicaError> {
        let change = committed.iter().rev().find(|entry| entry.get_entry_type() != EntryType::EntryNormal);
        let Some(change) = change else { return Ok(()) };
        // Term, vote and entries may be newer in raft already; the record that follows brings them, and a commit index beyond its entry.
        let mut state = self.wal.state().clone();
        state.hard.commit = state.hard.commit.max(change.index);
        Ok(self.wal.append(&state, &[], &[])?)
    }

    /// Writes one record with all that must survive, and lets raft see it in the log.
    fn persist(&mut self, ready: &mut Ready) -> Result<Option<SnapshotMeta>, ReplicaError> {
        if let Some(hard) = ready.hs() {
            self.state.hard.clone_from(hard);
        }
        let snapshot = ready.snapshot().clone();
        let mut markers = Vec::new();
        let mut installed = None;
        if !snapshot.is_empty() {
            let (index, term) = (snapshot.get_metadata().index, snapshot.get_metadata().term);
            // Raft counts what a snapshot contains as committed, and says so in a later state only.
            self.state.hard.commit = self.state.hard.commit.max(index);
            installed = Some(self.snapshots.verify(index, term)?);
            markers.push(Marker { index, term, installed: true });
        }
        let entries = ready.take_entries();
        // A commit index alone is not worth a sync: it comes with the next record, and raft finds it again after a crash.
        if ready.must_sync() {
            self.write(&markers, &entries)?;
        }
        self.log_bytes += entries.iter().map(|entry| (entry.data.len() + entry.context.len()) as u64).sum::<u64>();
        let hard = self.state.hard.clone();
        let log = self.node.mut_store();
        if !snapshot.is_empty() {
            log.install(snapshot);
        }
        log.append(entries);
        log.set_hard(&hard);
        Ok(installed)
    }

    #[cfg(not(feature = "planted-bugs"))]
    fn write(&mut self, markers: &[Marker], entries: &[Entry]) -> Result<(), ReplicaError> {
        Ok(self.wal.append(&self.state, markers, entries)?)
    }

    #[cfg(feature = "planted-bugs")]
    fn write(&mut self, markers: &[Marker], entries: &[Entry]) -> Result<(), ReplicaError> {
        if self.settings.planted == Some(super::core::Planted::AckBeforeSync) {
            return Ok(self.wal.append_without_sync(&self.state, markers, entries)?);
        }
        Ok(self.wal.append(&self.state, markers, entries)?)
    }

    /// Takes over a snapshot that is durable and in the log.
    fn install(&mut self, meta: &SnapshotMeta, out: &mut impl Outbox<W>) -> Result<(), ReplicaError> {
        let mut reader = self.snapshots.open(meta.index, meta.term)?;
        self.machine.restore(&mut reader).map_err(|source| ReplicaError::Restore { index: meta.index, source })?;
        self.applied = meta.index;
        self.snapshot_index = meta.index;
        self.log_bytes = 0;
        self.conf = meta.conf.as_ref().map(ConfState::from).unwrap_or_default();
        self.members = super::members::Membership::new(
            meta.members.iter().cloned().map(crate::machine::Member::from),
            meta.removed.iter().copied(),
        );
        self.members_changed = true;
        self.sessions = Sessions::from_records(&meta.sessions);
        self.snapshots.remove_old(self.wal.snapshots())?;
        self.node.mut_store().offer(raft_snapshot(meta));
        tracing::info!(index = meta.index, term = meta.term, "took over a snapshot from the leader");
        // What the snapshot contains of this member's own proposals was applied, but its outcome is not known here.
        let (me, epoch) = (self.id(), self.state.epoch);
        let sessions = &self.sessions;
        for lost in self.proposals.settle_where(|number, _| sessions.was_admitted(me, epoch, number)) {
            out.answer(lost.waiter, Reply::Lost(ProposeError::LeaderChanged));
        }
        Ok(())
    }

    fn apply(&mut self, entries: Vec<Entry>, out: &mut impl Outbox<W>) -> Result<(), ReplicaError> {
        if entries.is_empty() {
            return Ok(());
        }
        let mut answers = Vec::new();
        for entry in &entries {
            if let Some(answer) = self.apply_entry(entry)? {
                answers.push(answer);
            }
            self.applied = entry.index;
        }
        self.machine.batch_applied();
        for (waiter, reply) in answers {
            out.answer(waiter, reply);
        }
        self.answer_reads(out);
        Ok(())
    }

    /// Applies one entry, and gives the answer for whoever waits for it here.
    fn apply_entry(&mut self, entry: &Entry) -> Result<Option<(W, Reply)>, ReplicaError> {
        let known = ProposalId::decode(&entry.context);
        let Some((payload, id)) = known else {
            // Raft's own: a new leader's first entry.
            if entry.get_entry_type() != EntryType::EntryNormal {
                self.switch_configuration(entry)?;
            }
            let _ = self.machine.apply(entry.index, &[]);
            return Ok(None);
        };
        let mine = id.member_id == self.id() && id.epoch == self.state.epoch;
        // The session of a member that is gone is forgotten, and what it had under way is void.
        if self.members.was_removed(id.member_id) || !self.sessions.admit(&id) {
            let _ = self.machine.apply(entry.index, &[]);
            return Ok(None);
        }
        let reply = match payload {
            Payload::Command => Reply::Outcome(self.machine.apply(entry.index, &entry.data)),
            Payload::Change => {
                let reply = self.apply_change(entry)?;
                let _ = self.machine.apply(entry.index, &[]);
                reply
            }
        };
        let pending = if mine { self.proposals.settle(id.number) } else { None };
        Ok(pending.map(|pending| (pending.waiter, reply)))
    }

    /// Makes a change of the membership, or refuses it: the same on every member.
    fn apply_change(&mut self, entry: &Entry) -> Result<Reply, ReplicaError> {
        let conf_change = entry.get_entry_type() == EntryType::EntryConfChangeV2;
        let bytes = if conf_change {
            ConfChangeV2::decode(entry.data.as_slice()).map(|change| change.context).unwrap_or_default()
        } else {
            entry.data.clone()
        };
        let Ok(change) = ChangeRecord::decode(bytes.as_slice()) else {
            return Ok(Reply::Change(Err(Refused::Corrupt.into())));
        };
        if let Err(refused) = self.members.check(&change) {
            return Ok(Reply::Change(Err(refused.into())));
        }
        if conf_change {
            self.switch_configuration(entry)?;
        }
        self.members.apply(&change);
        self.members_changed = true;
        let id = change.member.map(|member| member.id);
        if let Some(id) = id.filter(|id| self.members.was_removed(*id)) {
            self.sessions.forget(id);
        }
        Ok(Reply::Change(Ok((self.members.list(), id))))
    }

    fn switch_configuration(&mut self, entry: &Entry) -> Result<(), ReplicaError> {
        let change = ConfChangeV2::decode(entry.data.as_slice()).unwrap_or_default();
        self.conf = self.node.apply_conf_change(&change)?;
        tracing::info!(index = entry.index, voters = ?self.conf.voters, learners = ?self.conf.learners, "the configuration changed");
        Ok(())
    }

    fn confirm_reads(&mut self, states: Vec<ReadState>) {
        let (me, epoch) = (self.id(), self.state.epoch);
        for state in states {
            if let Some((_, id)) = ProposalId::decode(&state.request_ctx)
                && (id.member_id, id.epoch) == (me, epoch)
            {
                self.reads.confirm(id.number, state.index);
            }
        }
    }

    fn answer_reads(&mut self, out: &mut impl Outbox<W>) {
        for (waiter, index) in self.reads.applied(self.applied) {
            out.answer(waiter, Reply::Read(index));
        }
    }

    /// Forgets entries that nobody is likely to ask for.
    fn trim(&mut self) {
        let receiving = self
            .node
            .raft
            .prs()
            .iter()
            .filter(|(_, progress)| progress.state == ProgressState::Snapshot)
            .map(|(_, progress)| progress.pending_snapshot)
            .min();
        let alone = self.conf.voters == [self.id()] && self.conf.learners.is_empty();
        // Nobody will ask, so the memory is better spent elsewhere.
        let keep = if alone { self.settings.keep_bytes.min(KEEP_ALONE_BYTES) } else { self.settings.keep_bytes };
        let applied = self.applied;
        let log = self.node.mut_store();
        match receiving {
            // It goes on with the entries after its snapshot; beyond the bound it will need another one.
            Some(snapshot) => {
                log.trim(snapshot.min(applied), keep);
                log.trim(applied, KEEP_FOR_SNAPSHOT_BYTES.max(keep));
            }
            None => log.trim(applied, keep),
        }
    }

    /// Gives up everything that waits, because the replica ends.
    pub fn abandon(&mut self, out: &mut impl Outbox<W>) {
        for pending in self.proposals.settle_where(|_, _| true) {
            let change = matches!(pending.proposal, Proposal::Change(_));
            let lost = ProposeError::Stopped;
            out.answer(pending.waiter, if change { Reply::Change(Err(lost.into())) } else { Reply::Lost(lost) });
        }
        for waiter in self.reads.tick(0, 0) {
            out.answer(waiter, Reply::Lost(ProposeError::Stopped));
        }
    }
}
