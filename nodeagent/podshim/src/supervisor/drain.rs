//! When to stop waiting for the output of what has ended. Pure: what is seen and the time go in.
//!
//! Output that flows is waited for however long it takes: a slow disk or processor is no reason to lose the end of a log. Only what
//! stands still is given up, and what somebody else goes on writing into a pipe that it was lent.

/// How long to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// Without a single byte more.
    pub idle_ms: u64,
    /// In all, where the pipe is still held open by another process.
    pub held_ms: u64,
}

/// What is seen of an output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    /// Bytes that were passed on so far.
    pub bytes: u64,
    /// Whether anybody could still write.
    pub held_open: bool,
}

/// The wait for an output, from the end of its program on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drain {
    patience: Patience,
    began_ms: u64,
    moved_ms: u64,
    seen: Flow,
}

impl Drain {
    /// The program has ended.
    pub fn begin(patience: Patience, seen: Flow, now_ms: u64) -> Self {
        Self { patience, began_ms: now_ms, moved_ms: now_ms, seen }
    }

    /// Whether the rest is given up.
    pub fn is_given_up(&mut self, flow: Flow, now_ms: u64) -> bool {
        if flow.bytes != self.seen.bytes {
            self.moved_ms = now_ms;
        }
        self.seen = flow;
        self.deadline_ms() <= now_ms
    }

    /// Its reader takes nothing for now: that is no standing still of the output.
    pub fn wait_for_reader(&mut self, now_ms: u64) {
        self.moved_ms = now_ms;
    }

    /// When to look again at the latest.
    pub fn deadline_ms(&self) -> u64 {
        let idle_ms = self.moved_ms.saturating_add(self.patience.idle_ms);
        let held_ms = self.began_ms.saturating_add(self.patience.held_ms);
        if self.seen.held_open { idle_ms.min(held_ms) } else { idle_ms }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks at the given times; answers at which of them it was given up.
    fn given_up(looks: &[(u64, u64, bool)]) -> Option<u64> {
        let patience = Patience { idle_ms: 100, held_ms: 1_000 };
        let mut drain = Drain::begin(patience, Flow { bytes: 7, held_open: true }, 50);
        looks
            .iter()
            .find(|(now_ms, bytes, open)| drain.is_given_up(Flow { bytes: *bytes, held_open: *open }, *now_ms))
            .map(|look| look.0)
    }

    #[test]
    fn what_flows_is_waited_for() {
        for (what, looks, expected) in [
            ("nothing comes", &[(149, 7, false), (150, 7, false)][..], Some(150)),
            ("a byte now and then", &[(140, 8, false), (230, 9, false), (320, 10, false), (419, 10, false)], None),
            ("it stops", &[(140, 8, false), (239, 8, false), (240, 8, false)], Some(240)),
            (
                "it is seen to flow only when time is up",
                &[(150, 8, false), (249, 8, false), (250, 8, false)],
                Some(250),
            ),
            (
                "it flows for long and nobody else holds it",
                &[(140, 8, false), (5_000, 9, false), (9_000, 10, false)],
                None,
            ),
            (
                "another process goes on writing",
                &[(140, 8, true), (600, 9, true), (1_049, 10, true), (1_050, 11, true)],
                Some(1_050),
            ),
            ("and lets go before", &[(600, 9, true), (1_050, 11, false), (1_060, 12, false)], None),
        ] {
            assert_eq!(given_up(looks), expected, "{what}");
        }
    }

    #[test]
    fn a_slow_reader_costs_no_output() {
        let patience = Patience { idle_ms: 100, held_ms: u64::MAX };
        let flow = Flow { bytes: 0, held_open: false };
        let mut drain = Drain::begin(patience, flow, 0);
        for now_ms in (0..10_000).step_by(90) {
            drain.wait_for_reader(now_ms);
        }
        assert!(!drain.is_given_up(flow, 10_000));
        assert!(drain.is_given_up(flow, 10_090));
    }
}
