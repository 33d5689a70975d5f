//! The delay before a container starts again: at once, then 10 s, doubling up to 300 s, forgotten after a long run.

use serde::{Deserialize, Serialize};

use super::model::{ContainerSeen, Ended, Image, Run, RunState};

/// Delay before the second restart.
pub const BASE_MS: u64 = 10_000;
/// The longest delay unless the node is configured otherwise (`--max-restart-backoff-ms`).
pub const DEFAULT_MAX_MS: u64 = 300_000;

/// The delay that follows `previous_ms` for a container that ran for `ran_ms`. A run of twice the longest delay forgets
/// the past (Kubernetes: 10 minutes).
#[must_use]
pub fn next_delay_ms(previous_ms: Option<u64>, ran_ms: u64, max_ms: u64) -> u64 {
    match previous_ms {
        None => 0,
        Some(_) if ran_ms >= max_ms.saturating_mul(2).max(1) => 0,
        Some(0) => BASE_MS.min(max_ms),
        Some(delay) => delay.saturating_mul(2).clamp(BASE_MS.min(max_ms), max_ms),
    }
}

/// Per container: how long it last had to wait. Outlives the agent, where Kubernetes starts afresh: an upgrade of a node is no reason to start
/// everything at once that fails on it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Backoff {
    last_delay_ms: Option<u64>,
}

impl Backoff {
    /// Of a container that has not ended yet.
    pub const NONE: Self = Self { last_delay_ms: None };

    /// Takes note of an end at `now_ms` after `ran_ms`; answers the delay before the next start.
    pub fn ended(&mut self, ran_ms: u64, max_ms: u64) -> u64 {
        let delay = next_delay_ms(self.last_delay_ms, ran_ms, max_ms);
        self.last_delay_ms = Some(delay);
        delay
    }
}

/// Notes in `seen` that the run `attempt` began. An older or known attempt changes nothing.
pub fn note_started(seen: &mut ContainerSeen, attempt: u32, sandbox: u32, started_wall_ms: u64) -> bool {
    if seen.run.as_ref().is_some_and(|run| run.attempt >= attempt) {
        return false;
    }
    if let Some(Run { state: RunState::Ended(ended), .. }) = seen.run.take() {
        seen.previous = Some(ended);
    }
    seen.run = Some(Run { attempt, sandbox, started_wall_ms, state: RunState::Running });
    seen.kill_at_ms = None;
    (seen.health, seen.pre_stopped, seen.condemned) = Default::default();
    true
}

/// Notes in `seen` that the run `attempt` ended (or could not start). Answers whether that was news.
pub fn note_ended(
    seen: &mut ContainerSeen,
    (attempt, sandbox): (u32, u32),
    ended: Ended,
    (now_ms, max_backoff_ms): (u64, u64),
) -> bool {
    match &seen.run {
        Some(run) if run.attempt > attempt => return false,
        Some(run) if run.attempt == attempt && !run.is_running() => return false,
        _ => {}
    }
    let known = seen.run.as_ref().is_some_and(|run| run.attempt == attempt);
    if !known {
        note_started(seen, attempt, sandbox, ended.started_wall_ms);
    }
    let began = if ended.started_wall_ms == 0 { ended.finished_wall_ms } else { ended.started_wall_ms };
    let delay = seen.backoff.ended(ended.finished_wall_ms.saturating_sub(began), max_backoff_ms);
    seen.backoff_ms = delay;
    seen.retry_ms = now_ms + delay;
    seen.image = Image::Unknown;
    seen.kill_at_ms = None;
    if let Some(run) = &mut seen.run {
        run.state = RunState::Ended(ended);
    }
    true
}

/// What is to start anew, or differently, waits for nothing that came before.
pub fn forget(seen: &mut ContainerSeen) {
    (seen.retry_ms, seen.backoff_ms, seen.backoff) = (0, 0, Backoff::NONE);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_are_those_of_kubernetes() {
        let mut backoff = Backoff::default();
        let delays: Vec<u64> = (0..8).map(|_| backoff.ended(1_000, DEFAULT_MAX_MS) / 1000).collect();
        assert_eq!(delays, [0, 10, 20, 40, 80, 160, 300, 300]);
        assert_eq!(backoff.ended(600_000, DEFAULT_MAX_MS), 0, "a run of ten minutes forgets the past");
        assert_eq!(backoff.ended(599_999, DEFAULT_MAX_MS), BASE_MS);
    }

    #[test]
    fn a_configured_maximum_bounds_every_delay() {
        let mut backoff = Backoff::default();
        let delays: Vec<u64> = (0..4).map(|_| backoff.ended(0, 1_000)).collect();
        assert_eq!(delays, [0, 1_000, 1_000, 1_000]);
    }

    #[test]
    fn an_old_or_repeated_end_changes_nothing() {
        let mut seen = ContainerSeen::default();
        assert!(note_started(&mut seen, 1, 1, 5));
        assert!(!note_started(&mut seen, 1, 1, 5));
        let ended = Ended { exit_code: 3, started_wall_ms: 5, finished_wall_ms: 9, ..Ended::default() };
        assert!(!note_ended(&mut seen, (0, 1), ended.clone(), (0, 1)));
        assert!(note_ended(&mut seen, (1, 1), ended.clone(), (0, 1)));
        assert!(!note_ended(&mut seen, (1, 1), ended.clone(), (0, 1)));
        assert!(note_started(&mut seen, 2, 1, 10));
        assert_eq!(seen.previous, Some(ended));
    }
}
