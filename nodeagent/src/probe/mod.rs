//! Probes: when each is due and what its results amount to (pure), and how one is performed (`perform`).

pub mod perform;

use minipod_proto::v1::{Container, Probe};

/// What a probe is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Passes once; the others wait for it.
    Startup,
    /// Its failure ends the run.
    Liveness,
    /// Says whether the container serves.
    Readiness,
}

impl Kind {
    /// As events name it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Startup => "Startup",
            Self::Liveness => "Liveness",
            Self::Readiness => "Readiness",
        }
    }

    /// The container's probe of this kind.
    #[must_use]
    pub fn of(self, container: &Container) -> Option<&Probe> {
        match self {
            Self::Startup => container.startup_probe.as_deref(),
            Self::Liveness => container.liveness_probe.as_deref(),
            Self::Readiness => container.readiness_probe.as_deref(),
        }
    }
}

/// What one probe found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It is well; a text is a warning.
    Success(String),
    /// It is not.
    Failure(String),
    /// Nothing was found out: no action.
    Unknown(String),
}

/// What results amount to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The startup probe passed.
    Started,
    /// The readiness probe changed its mind, or said so again.
    Ready(bool),
    /// The run is to end within this grace, the pod's if none.
    Kill {
        /// The probe's terminationGracePeriodSeconds, milliseconds.
        grace_ms: Option<u64>,
    },
}

/// A probe of one run of a container.
#[derive(Debug, Clone)]
struct Watch {
    kind: Kind,
    period_ms: u64,
    thresholds: (u32, u32),
    grace_ms: Option<u64>,
    next_ms: u64,
    in_flight: bool,
    /// The newest result and how often in a row.
    streak: Option<(bool, u32)>,
    /// How often in a row nothing was found out.
    unknown: u32,
    /// It has said its last word on this run.
    over: bool,
}

/// The probes of one run of a container.
#[derive(Debug, Clone)]
pub struct Probes {
    /// The run.
    pub attempt: u32,
    watches: Vec<Watch>,
    startup_passed: bool,
}

/// Whether probes may run now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gate {
    /// The postStart hook, if any, is done.
    pub post_started: bool,
    /// The pod ends, or the run is condemned: readiness alone goes on.
    pub ending: bool,
}

const KINDS: [Kind; 3] = [Kind::Startup, Kind::Liveness, Kind::Readiness];

impl Probes {
    /// The probes of a run that began at `started_ms`; `None` when it has none. `startup_passed` is what was known of the run
    /// before this agent began.
    #[must_use]
    pub fn of(container: &Container, attempt: u32, started_ms: u64, startup_passed: bool) -> Option<Self> {
        let watches: Vec<Watch> = KINDS
            .into_iter()
            .filter_map(|kind| kind.of(container).map(|probe| Watch::new(kind, probe, started_ms)))
            .collect();
        let startup_passed = startup_passed || container.startup_probe.is_none();
        (!watches.is_empty()).then_some(Self { attempt, watches, startup_passed })
    }

    /// The probes to perform now; they are in flight until their outcome is taken.
    pub fn due(&mut self, gate: Gate, now_ms: u64) -> Vec<Kind> {
        let startup_passed = self.startup_passed;
        let mut due = Vec::new();
        for watch in &mut self.watches {
            if watch.may_run(startup_passed, gate) && watch.next_ms <= now_ms {
                watch.in_flight = true;
                watch.next_ms = now_ms + watch.period_ms;
                due.push(watch.kind);
            }
        }
        due
    }

    /// When the next probe is due.
    #[must_use]
    pub fn wake_at_ms(&self, gate: Gate) -> Option<u64> {
        let waiting = self.watches.iter().filter(|watch| watch.may_run(self.startup_passed, gate));
        waiting.map(|watch| watch.next_ms).min()
    }

    /// Takes what a probe found; answers what it amounts to, and how often in a row it was found.
    pub fn take(&mut self, kind: Kind, outcome: &Outcome) -> (Option<Verdict>, u32) {
        let Some(watch) = self.watches.iter_mut().find(|watch| watch.kind == kind) else { return (None, 0) };
        watch.in_flight = false;
        let good = match outcome {
            Outcome::Success(_) => true,
            Outcome::Failure(_) => false,
            Outcome::Unknown(_) => {
                watch.unknown = watch.unknown.saturating_add(1);
                return (None, watch.unknown);
            }
        };
        watch.unknown = 0;
        let count = match watch.streak {
            Some((same, count)) if same == good => count.saturating_add(1),
            _ => 1,
        };
        watch.streak = Some((good, count));
        let threshold = if good { watch.thresholds.0 } else { watch.thresholds.1 };
        if count < threshold || watch.over {
            return (None, count);
        }
        let verdict = match (kind, good) {
            (Kind::Readiness, ready) => Verdict::Ready(ready),
            (Kind::Liveness, true) => return (None, count),
            (Kind::Startup, true) => {
                (watch.over, self.startup_passed) = (true, true);
                Verdict::Started
            }
            (Kind::Startup | Kind::Liveness, false) => {
                watch.over = true;
                Verdict::Kill { grace_ms: watch.grace_ms }
            }
        };
        (Some(verdict), count)
    }
}

impl Watch {
    fn new(kind: Kind, probe: &Probe, started_ms: u64) -> Self {
        let or = |value: i32, default: u32| u32::try_from(value).ok().filter(|value| *value > 0).unwrap_or(default);
        let delay_ms = u64::from(or(probe.initial_delay_seconds, 0)) * 1000;
        Self {
            kind,
            period_ms: u64::from(or(probe.period_seconds, 10)) * 1000,
            thresholds: (or(probe.success_threshold, 1), or(probe.failure_threshold, 3)),
            grace_ms: probe.termination_grace_period_seconds.map(crate::want::grace_ms),
            next_ms: started_ms + delay_ms,
            in_flight: false,
            streak: None,
            unknown: 0,
            over: false,
        }
    }

    fn may_run(&self, startup_passed: bool, gate: Gate) -> bool {
        let its_turn = match self.kind {
            Kind::Startup => !startup_passed && !gate.ending,
            Kind::Liveness => startup_passed && !gate.ending,
            Kind::Readiness => startup_passed,
        };
        its_turn && gate.post_started && !self.in_flight && !self.over
    }
}

#[cfg(test)]
mod tests;
