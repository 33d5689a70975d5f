//! The queue between the hub and one client's stream.

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use tokio::sync::Notify;

/// Events wait up to this: what a client on a slow line can have outstanding before its watches fall back to replay.
const MAX_BYTES: usize = 8 << 20;
const MAX_FRAMES: usize = 1_024;
/// A client that asks for more and more without reading is no longer read from, at this many answers.
const MAX_FRAMES_BEFORE_READER_WAITS: usize = 4 * MAX_FRAMES;

/// One `WatchResponse`, without the header's ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Which watch; −1 for the whole stream.
    pub watch_id: i64,
    /// The header's revision.
    pub revision: i64,
    /// What it says.
    pub what: What,
}

/// What a frame says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// The watch exists, or does not for the reason given.
    Created {
        /// Why not.
        refused: Option<&'static str>,
    },
    /// The watch is over.
    Canceled {
        /// When it asked for what is compacted away: the oldest revision there is.
        compact_revision: i64,
    },
    /// Nothing is missing up to the frame's revision.
    Progress,
    /// Events, each encoded as a field of the response.
    Events {
        /// In order.
        events: Vec<Bytes>,
        /// More of the same revision follows.
        fragment: bool,
    },
}

impl Frame {
    fn bytes(&self) -> usize {
        match &self.what {
            What::Events { events, .. } => events.iter().map(|event| event.len() + size_of::<Bytes>()).sum(),
            _ => 0,
        }
    }
}

/// The queue between the hub and one client's stream: bounded for events, so that the slow do not fill the memory.
#[derive(Debug)]
pub struct Outbox {
    max_bytes: usize,
    max_frames: usize,
    queue: Mutex<Queue>,
    consumer: AtomicWaker,
    room: Notify,
}

#[derive(Debug, Default)]
struct Queue {
    frames: VecDeque<Frame>,
    bytes: usize,
    /// The hub wants to know when there is room.
    stalled: bool,
    closed: bool,
}

impl Default for Outbox {
    fn default() -> Self {
        Self::bounded(MAX_BYTES, MAX_FRAMES)
    }
}

impl Outbox {
    /// An outbox that is full of events at so many bytes or frames.
    pub fn bounded(max_bytes: usize, max_frames: usize) -> Self {
        let (queue, consumer, room) = Default::default();
        Self { max_bytes, max_frames, queue, consumer, room }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether events may be pushed; when not, [`pop`](Outbox::poll_pop) will tell that there is room again.
    pub fn has_room(&self) -> bool {
        let mut queue = self.lock();
        queue.stalled = queue.bytes >= self.max_bytes || queue.frames.len() >= self.max_frames;
        !queue.stalled
    }

    /// Adds a frame. Callers ask [`has_room`](Outbox::has_room) before events; answers to the client's own requests always go in.
    pub fn push(&self, frame: Frame) {
        let mut queue = self.lock();
        queue.bytes += frame.bytes();
        queue.frames.push_back(frame);
        drop(queue);
        self.consumer.wake();
    }

    /// Takes the next frame, and tells whether the hub waits for the room that this made; `None` after the end.
    pub fn poll_pop(&self, cx: &mut Context<'_>) -> Poll<Option<(Frame, bool)>> {
        self.consumer.register(cx.waker());
        let mut queue = self.lock();
        let Some(frame) = queue.frames.pop_front() else {
            return if queue.closed { Poll::Ready(None) } else { Poll::Pending };
        };
        queue.bytes -= frame.bytes();
        // Half empty: a hub that is woken for every frame would do nothing else.
        let wake_hub = queue.stalled && queue.bytes <= self.max_bytes / 2 && queue.frames.len() <= self.max_frames / 2;
        queue.stalled &= !wake_hub;
        let readable = queue.frames.len() < MAX_FRAMES_BEFORE_READER_WAITS;
        drop(queue);
        if readable {
            self.room.notify_waiters();
        }
        Poll::Ready(Some((frame, wake_hub)))
    }

    /// Resolves when the client has read enough to be read from again.
    pub async fn readable(&self) {
        loop {
            let notified = self.room.notified();
            if self.lock().frames.len() < MAX_FRAMES_BEFORE_READER_WAITS {
                return;
            }
            notified.await;
        }
    }

    /// Ends the stream once its frames are taken.
    pub fn close(&self) {
        self.lock().closed = true;
        self.consumer.wake();
    }
}
