//! Exponential back-off with jitter, so that a thousand nodes do not come back in the same millisecond.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

/// Waiting times that grow from `first` by doubling to `limit`, each shortened by up to a half at random.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    limit: Duration,
    failures: u32,
}

impl Backoff {
    /// A back-off that has seen no failure.
    #[must_use]
    pub const fn new(first: Duration, limit: Duration) -> Self {
        Self { first, limit, failures: 0 }
    }

    /// How long to wait after one more failure.
    pub fn next_wait(&mut self) -> Duration {
        let full = self.ceiling();
        self.failures = self.failures.saturating_add(1);
        // A fresh RandomState is random per call; a generator crate would bring nothing more for this use.
        let random = RandomState::new().hash_one(self.failures) % 1000;
        full / 2 + (full / 2).mul_f64(f64::from(u32::try_from(random).unwrap_or(0)) / 1000.0)
    }

    /// The longest wait after the failures so far.
    fn ceiling(&self) -> Duration {
        let factor = 1_u32.checked_shl(self.failures.min(31)).unwrap_or(u32::MAX);
        self.first.checked_mul(factor).unwrap_or(self.limit).min(self.limit)
    }

    /// A success: the next failure waits `first` again.
    pub const fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_limit_and_keep_their_jitter_in_bounds() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(2));
        for full in [100, 200, 400, 800, 1600, 2000, 2000, 2000] {
            let wait = backoff.next_wait();
            let full = Duration::from_millis(full);
            assert!(wait >= full / 2 && wait <= full, "{wait:?} for {full:?}");
        }
        backoff.reset();
        assert!(backoff.next_wait() <= Duration::from_millis(100));
    }

    #[test]
    fn no_number_of_failures_overflows() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(300));
        for _ in 0..100 {
            assert!(backoff.next_wait() <= Duration::from_secs(300));
        }
    }
}
