//! What waits for the replica's thread: it takes all of it at once, and that is the group of the group commit.

use super::core::{Reply, SnapshotDone};
use crate::machine::ProposeError;
use crate::records::ChangeRecord;
use crate::snapshot::SnapshotError;
use bytes::Bytes;
use raft::eraftpb::Message;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// Whoever waits for an answer.
pub type Waiter = oneshot::Sender<Reply>;

/// Something for the replica to do.
#[derive(Debug)]
pub enum Input {
    /// A command to propose.
    Propose(Bytes, Waiter),
    /// A change of the membership to propose.
    Change(ChangeRecord, Waiter),
    /// A read to confirm.
    Read(Waiter),
    /// A message from another member.
    Message(Message),
    /// A member cannot be reached.
    Unreachable(u64),
    /// A snapshot has reached a member, or has not.
    SnapshotSent(u64, bool),
    /// A snapshot was written, or could not be.
    SnapshotDone(Result<SnapshotDone, SnapshotError>),
    /// Leadership is to go to a member.
    Transfer(u64),
    /// The end is asked for.
    Stop,
}

/// Proposals and reads that may wait or be under way at once; more are refused, as in etcd, which takes 5,000.
const MAX_WAITING: usize = 8_192;
/// Bytes of commands that may wait.
const MAX_WAITING_BYTES: usize = 64 << 20;
/// Messages from other members that may wait, and bytes of entries in them; more are dropped, which raft makes good.
const MAX_MESSAGES: usize = 4_096;
const MAX_MESSAGE_BYTES: usize = 256 << 20;

#[derive(Debug, Default)]
struct Waiting {
    inputs: Vec<Input>,
    proposals: usize,
    bytes: usize,
    messages: usize,
    message_bytes: usize,
    closed: bool,
}

/// The queue.
#[derive(Debug, Default)]
pub struct Inbox {
    waiting: Mutex<Waiting>,
    arrived: Condvar,
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds something that was admitted. The thread is woken for the first only: it takes the others with it.
    fn push(&self, mut waiting: MutexGuard<'_, Waiting>, input: Input) {
        let was_empty = waiting.inputs.is_empty();
        waiting.inputs.push(input);
        drop(waiting);
        if was_empty {
            self.arrived.notify_one();
        }
    }

    /// Adds a proposal or a read.
    ///
    /// # Errors
    /// When too much waits already, or the replica has ended.
    pub fn ask(&self, input: Input) -> Result<(), ProposeError> {
        let bytes = if let Input::Propose(command, _) = &input { command.len() } else { 0 };
        let mut waiting = self.lock();
        if waiting.closed {
            return Err(ProposeError::Stopped);
        }
        if waiting.proposals >= MAX_WAITING || waiting.bytes + bytes > MAX_WAITING_BYTES {
            return Err(ProposeError::Busy);
        }
        waiting.proposals += 1;
        waiting.bytes += bytes;
        self.push(waiting, input);
        Ok(())
    }

    /// Adds a message from another member, or drops it.
    pub fn deliver(&self, message: Message) {
        let bytes: usize = message.entries.iter().map(|entry| entry.data.len()).sum();
        let mut waiting = self.lock();
        if waiting.closed || waiting.messages >= MAX_MESSAGES || waiting.message_bytes + bytes > MAX_MESSAGE_BYTES {
            return;
        }
        waiting.messages += 1;
        waiting.message_bytes += bytes;
        self.push(waiting, Input::Message(message));
    }

    /// Adds something rare that must not be lost.
    pub fn tell(&self, input: Input) {
        let waiting = self.lock();
        if !waiting.closed {
            self.push(waiting, input);
        }
    }

    /// Takes all that waits into `inputs`; waits for something until `until`.
    pub fn take(&self, inputs: &mut Vec<Input>, until: Instant) {
        let mut waiting = self.lock();
        while waiting.inputs.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                break;
            }
            waiting = self.arrived.wait_timeout(waiting, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        std::mem::swap(&mut waiting.inputs, inputs);
        (waiting.proposals, waiting.bytes) = (0, 0);
        (waiting.messages, waiting.message_bytes) = (0, 0);
    }

    /// Takes nothing more, and gives what still waits.
    pub fn close(&self) -> Vec<Input> {
        let mut waiting = self.lock();
        waiting.closed = true;
        std::mem::take(&mut waiting.inputs)
    }
}
