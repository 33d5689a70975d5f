//! Watching: events from the revision log to clients' streams.
//!
//! One thread runs the hub ([`hub`], which decides) and is woken after every applied batch. It reads what is new from
//! the log, hands each event, encoded once, to the outboxes ([`outbox`]) of the streams that watch its key, replays the log
//! for those who lag, and frees what compaction has declared dead once nobody here needs it.

pub mod hub;
pub mod outbox;

use crate::state::Shared;
use crate::wire::WatchCreate;
use hub::Hub;
use outbox::{Frame, Outbox};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

/// Versions that are freed at one go: well under a millisecond during which nothing is written.
const SWEEP_VERSIONS: usize = 256;
/// So many bytes are freed before they are given back to the kernel, which holds others up for some milliseconds. Less is soon used
/// again.
const GIVE_BACK_BYTES: u64 = 128 << 20;

/// What sweeps have freed and the allocator keeps.
#[derive(Debug, Default)]
struct Freed(u64);

impl Freed {
    /// A sweep has freed so much; whether there is more to sweep. Whether now is the time to give it back.
    fn note(&mut self, bytes: u64, more: bool) -> bool {
        self.0 = self.0.saturating_add(bytes);
        let enough = !more && self.0 >= GIVE_BACK_BYTES;
        if enough {
            self.0 = 0;
        }
        enough
    }
}

/// How the hub treats its watchers.
#[derive(Debug, Clone, Copy)]
pub struct WatchConfig {
    /// How often quiet watches that asked for it get a sign of life (etcd: 10 minutes).
    pub progress_interval: Duration,
    /// A frame of a watch that allows fragments is cut at this many bytes.
    pub max_fragment_bytes: usize,
}

impl Default for WatchConfig {
    fn default() -> Self {
        Self { progress_interval: Duration::from_secs(600), max_fragment_bytes: 3 << 19 }
    }
}

/// All watches of one store; the thread ends with the last handle.
#[derive(Debug)]
pub struct Watches {
    shared: Arc<Shared>,
    hub: Arc<Mutex<Hub>>,
    stop: Arc<AtomicBool>,
}

impl Watches {
    /// Starts the hub's thread. One per [`Shared`].
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(shared: Arc<Shared>, config: WatchConfig) -> std::io::Result<Self> {
        let hub = Hub::new(shared.read().revision(), shared.restores(), config.max_fragment_bytes);
        let hub = Arc::new(Mutex::new(hub));
        let stop = Arc::new(AtomicBool::new(false));
        let run = Run { shared: Arc::clone(&shared), hub: Arc::clone(&hub), stop: Arc::clone(&stop) };
        let thread = std::thread::Builder::new().name("watch-hub".to_owned()).spawn(move || run.run(config))?;
        shared.wake_with(thread.thread().clone());
        Ok(Self { shared, hub, stop })
    }

    fn hub(&self) -> MutexGuard<'_, Hub> {
        lock(&self.hub)
    }

    /// A new client stream.
    pub fn open(self: &Arc<Self>) -> WatchStream {
        let outbox = Arc::new(Outbox::default());
        let handle = self.hub().open(Arc::clone(&outbox));
        WatchStream { watches: Arc::clone(self), outbox, handle }
    }

    /// How many watches there are, and how many of them lag.
    pub fn watchers(&self) -> (usize, usize) {
        self.hub().watchers()
    }
}

impl Drop for Watches {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.shared.wake();
    }
}

fn lock(hub: &Mutex<Hub>) -> MutexGuard<'_, Hub> {
    hub.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One client's stream; its watches end with it.
#[derive(Debug)]
pub struct WatchStream {
    watches: Arc<Watches>,
    outbox: Arc<Outbox>,
    handle: u64,
}

impl WatchStream {
    /// Asks for a watch.
    pub fn create(&self, create: &WatchCreate<'_>) {
        let mut hub = self.watches.hub();
        // Read while the hub is held: no event comes between the revision of the answer and the watch.
        let revision = self.watches.shared.read().revision();
        hub.create(self.handle, create, revision);
        drop(hub);
        self.watches.shared.wake();
    }

    /// Ends a watch.
    pub fn cancel(&self, id: i64) {
        let mut hub = self.watches.hub();
        let revision = self.watches.shared.read().revision();
        hub.cancel(self.handle, id, revision);
    }

    /// Asks how far the stream is.
    pub fn request_progress(&self) {
        self.watches.hub().request_progress(self.handle);
        self.watches.shared.wake();
    }

    /// Resolves when the client has read enough to be read from again.
    pub async fn readable(&self) {
        self.outbox.readable().await;
    }

    /// The stream's frames.
    pub fn frames(&self) -> Frames {
        Frames { shared: Arc::clone(&self.watches.shared), outbox: Arc::clone(&self.outbox) }
    }
}

impl Drop for WatchStream {
    fn drop(&mut self) {
        self.watches.hub().close(self.handle);
    }
}

/// The frames of a stream; ends with it.
#[derive(Debug)]
pub struct Frames {
    shared: Arc<Shared>,
    outbox: Arc<Outbox>,
}

impl futures_util::Stream for Frames {
    type Item = Frame;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Frame>> {
        self.outbox.poll_pop(cx).map(|popped| {
            popped.map(|(frame, wake_hub)| {
                if wake_hub {
                    self.shared.wake();
                }
                frame
            })
        })
    }
}

/// The hub's thread.
struct Run {
    shared: Arc<Shared>,
    hub: Arc<Mutex<Hub>>,
    stop: Arc<AtomicBool>,
}

impl Run {
    fn run(&self, config: WatchConfig) {
        let (mut next_progress, mut freed) = (Instant::now() + config.progress_interval, Freed::default());
        while !self.stop.load(Ordering::Acquire) {
            let mut busy = self.turn();
            busy |= self.sweep(&mut freed);
            let now = Instant::now();
            if now >= next_progress {
                lock(&self.hub).notify_progress();
                next_progress = now + config.progress_interval;
            }
            if !busy {
                // A wake-up that came since the turn began is not lost: it makes this return at once.
                std::thread::park_timeout(next_progress - now);
            }
        }
    }

    /// Hands out what is new and one batch to those who lag; whether there may be more.
    fn turn(&self) -> bool {
        // Let go of the hub between batches: clients come and go there.
        while self.deliver() {}
        let mut hub = lock(&self.hub);
        let batch = hub.next_replay(&self.shared.read());
        let lagged = batch.is_some();
        if let Some(batch) = batch {
            hub.replay(batch);
        }
        hub.answer_progress();
        lagged
    }

    fn deliver(&self) -> bool {
        let mut hub = lock(&self.hub);
        let batch = {
            let store = self.shared.read();
            hub.next_batch(&store, self.shared.restores())
        };
        batch.map(|batch| hub.deliver(batch)).is_some()
    }

    /// Frees some of what is compacted away; whether there is more.
    fn sweep(&self, freed: &mut Freed) -> bool {
        if !self.shared.read().has_garbage() {
            return false;
        }
        let before = self.shared.bytes();
        let more = self.sweep_some();
        if freed.note(before.saturating_sub(self.shared.bytes()), more) {
            minipod_daemon::memory::give_back();
        }
        more
    }

    fn sweep_some(&self) -> bool {
        let hub = lock(&self.hub);
        let mut store = self.shared.write();
        // What the hub has not handed out yet must stay, even if it is compacted away for everyone else.
        if store.compacted() > hub.position() + 1 {
            return true;
        }
        let more = store.sweep(SWEEP_VERSIONS);
        self.shared.note_bytes(&store);
        more
    }
}

#[cfg(test)]
mod tests {
    use super::{Freed, GIVE_BACK_BYTES};

    #[test]
    fn memory_goes_back_when_a_sweep_of_much_is_over() {
        let mut freed = Freed::default();
        let half = GIVE_BACK_BYTES / 2;
        // Bytes, whether there is more, whether it is time.
        let sweeps =
            [(half, false, false), (half, true, false), (0, false, true), (half, false, false), (half, false, true)];
        for (at, (bytes, more, want)) in sweeps.into_iter().enumerate() {
            assert_eq!(freed.note(bytes, more), want, "sweep {at}");
        }
    }
}
