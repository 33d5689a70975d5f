//! Waiting for a state.

use std::fmt::Display;
use std::time::{Duration, Instant};

/// Long enough for a busy CI machine; a test that works needs a fraction of it.
pub const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(50);

/// Tries until `attempt` works and returns what it gives.
///
/// # Panics
/// After [`PATIENCE`], with what was waited for and the last refusal.
pub async fn until<T, E: Display, F: Future<Output = Result<T, E>>>(what: &str, mut attempt: impl FnMut() -> F) -> T {
    let start = Instant::now();
    loop {
        match attempt().await {
            Ok(value) => return value,
            Err(last) => {
                assert!(start.elapsed() < PATIENCE, "waited {} s for {what}; last: {last}", PATIENCE.as_secs());
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// Watches for `span` that `check` stays true: for what must not happen.
///
/// # Panics
/// When `check` refuses, with its words.
pub async fn stays<E: Display, F: Future<Output = Result<(), E>>>(
    what: &str,
    span: Duration,
    mut check: impl FnMut() -> F,
) {
    let start = Instant::now();
    while start.elapsed() < span {
        if let Err(broken) = check().await {
            panic!("{what} did not last: {broken}");
        }
        tokio::time::sleep(PAUSE).await;
    }
}
