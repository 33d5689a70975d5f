//! Follows the store: one list, then its watch, for ever.

use std::{sync::Arc, time::Duration};

use minipod_daemon::{backoff::Backoff, shutdown::Shutdown};

use super::Cache;
use crate::storage::{PREFIX, Storage, StoreError};

/// How far before the present the first list is read, in revisions. What happened since comes as changes, so that watches which were
/// open before a restart of this server can be resumed.
const LOOK_BACK: i64 = 8_192;

/// How often watchers are told the revision when nothing happens.
const BOOKMARK: Duration = Duration::from_secs(10);

/// What to do next; a connection to the store is always in one of these states.
enum Step {
    /// Fill the cache by a list.
    List,
    /// Open the watch after the last revision known.
    Watch,
}

/// Keeps the cache equal to the store until the shutdown.
pub async fn follow(cache: Arc<Cache>, storage: Storage, shutdown: Shutdown) {
    let bookmarks = Arc::clone(&cache);
    let end = shutdown.clone();
    tokio::spawn(async move {
        let mut tick = tokio::time::interval(BOOKMARK);
        loop {
            // Both arms are cancel safe: a tick that is not taken comes again.
            tokio::select! {
                _ = tick.tick() => bookmarks.bookmark(),
                () = end.asked() => return,
            }
        }
    });
    // Cancel safe to drop anywhere: the cache changes in steps under its lock.
    tokio::select! {
        () = run(&cache, &storage) => {}
        () = shutdown.asked() => {}
    }
}

async fn run(cache: &Cache, storage: &Storage) {
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));
    let mut step = Step::List;
    loop {
        let done = match step {
            Step::List => list(cache, storage).await,
            Step::Watch => watch(cache, storage, &mut backoff).await,
        };
        match done {
            Ok(()) => {
                step = Step::Watch;
                backoff.reset();
            }
            Err(StoreError::Compacted { .. }) => {
                tracing::warn!(
                    revision = cache.revision(),
                    "the store has compacted what was not seen yet: listing again"
                );
                step = Step::List;
            }
            Err(error) => {
                if cache.trouble().is_none() {
                    tracing::warn!(%error, "the store's changes cannot be followed; trying again");
                }
                cache.set_trouble(Some(error.to_string()));
                tokio::time::sleep(backoff.next_wait()).await;
            }
        }
    }
}

async fn list(cache: &Cache, storage: &Storage) -> Result<(), StoreError> {
    let now = storage.revision().await?;
    // Only the first list looks back: later ones follow a gap that looking back would not close.
    let start = if cache.revision() == 0 { (now - LOOK_BACK).max(1) } else { now };
    let read = storage.all(PREFIX, start).await;
    let (items, revision) = match read {
        Err(StoreError::Compacted { .. }) => storage.all(PREFIX, now).await?,
        read => read?,
    };
    tracing::info!(items = items.len(), revision, "the store is listed");
    cache.replace(items, revision);
    Ok(())
}

async fn watch(cache: &Cache, storage: &Storage, backoff: &mut Backoff) -> Result<(), StoreError> {
    let mut feed = storage.feed(cache.revision() + 1).await?;
    loop {
        let trouble = cache.trouble().is_some();
        if trouble {
            // An idle watch says nothing; that the store answers is proof enough.
            storage.revision().await?;
            cache.set_trouble(None);
            tracing::info!(revision = cache.revision(), "the store's changes are followed");
        }
        let batch = feed.next().await?;
        backoff.reset();
        cache.apply(batch.events, batch.revision);
    }
}
