//! Whether a run's CPU and memory are what they shall be, and what brings them there.

use super::Planner;
use super::model::{ContainerSeen, ContainerWant, PodWant, Resources, Run, SandboxState, Seen, Step};

/// What a run needs to have the resources that it shall have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// It has them.
    None,
    /// Other limits while it runs.
    InPlace,
    /// To be started again.
    Restart,
}

/// What the newest run of a container needs; one of which is unknown what it has is left as it is.
#[must_use]
pub fn change(container: &ContainerWant, seen: &ContainerSeen) -> Change {
    let Some(has) = seen.applied else { return Change::None };
    let wants = container.resources;
    let cpu = |all: Resources| (all.cpu_request_milli, all.cpu_limit_milli);
    let memory = |all: Resources| (all.memory_request_bytes, all.memory_limit_bytes);
    let (cpu_differs, memory_differs) = (cpu(has) != cpu(wants), memory(has) != memory(wants));
    let policy = container.resize;
    if (cpu_differs && policy.cpu_restarts) || (memory_differs && policy.memory_restarts) {
        Change::Restart
    } else if cpu_differs || memory_differs {
        Change::InPlace
    } else {
        Change::None
    }
}

/// Whether the pod's own cgroup has not the limits that it shall have.
#[must_use]
pub fn pod_differs(want: &PodWant, seen: &Seen) -> bool {
    seen.sandbox == SandboxState::Up && seen.pod_applied.is_some_and(|has| has != want.resources)
}

/// Whether anything of a change is still to do.
#[must_use]
pub fn is_in_progress(want: &PodWant, seen: &Seen) -> bool {
    let running =
        |container: &&ContainerWant| seen.container(&container.name).run.as_ref().is_some_and(Run::is_running);
    let mut running = want.containers.iter().filter(running);
    pod_differs(want, seen)
        || running.any(|container| change(container, seen.container(&container.name)) != Change::None)
}

impl Planner<'_> {
    /// Asks for the limits that runs and pod lack. One change at a time: each takes all that differs.
    pub(super) fn resize(&mut self) {
        if self.seen.in_flight.iter().any(|step| matches!(step, Step::Resize { .. })) {
            return;
        }
        let runs: Vec<(String, u32)> = self
            .want
            .containers
            .iter()
            .filter_map(|container| {
                let seen = self.seen.container(&container.name);
                let run = seen.run.as_ref().filter(|run| run.is_running())?;
                (change(container, seen) == Change::InPlace).then(|| (container.name.clone(), run.attempt))
            })
            .collect();
        if !runs.is_empty() || pod_differs(self.want, self.seen) {
            self.emit(Step::Resize { runs }, "its resources have changed");
        }
    }
}
