//! Ending a pod: containers by their order and grace, then the sandbox, the network, the data.

use super::model::{ContainerWant, Kind, SandboxState, Shim, Step};
use super::{MINIMUM_GRACE_MS, Planner};

impl Planner<'_> {
    /// Ends the pod. `remove` also takes away the logs and the record, so that nothing is left.
    pub(super) fn end_pod(&mut self, deadline_ms: u64, remove: bool) {
        // A start that is under way ends one way or the other within milliseconds; what it makes is ended then.
        let starting = self.seen.in_flight.iter().any(Step::makes_something);
        if self.seen.shim == Shim::Dead {
            self.clean_up("the pod ends and its supervisor died");
            return;
        }
        if self.seen.shim == Shim::Up && self.seen.sandbox == SandboxState::Up {
            self.end_containers(deadline_ms);
        }
        if starting || self.anything_live() {
            return;
        }
        if self.seen.shim == Shim::Up {
            self.emit(Step::StopSandbox, "no container is left in it");
            return;
        }
        if self.seen.network_held {
            self.emit(Step::DetachNetwork, "the sandbox is gone");
            return;
        }
        match (remove, self.seen.dir || self.seen.data || self.seen.logs, self.seen.data) {
            (true, true, _) => self.emit(Step::RemovePodDir, "the pod is removed"),
            (true, false, _) => self.out.finished = self.seen.in_flight.is_empty(),
            (false, _, true) => self.emit(Step::RemovePodData, "the pod is done"),
            (false, _, false) => {}
        }
    }

    /// Apps and init containers together at once; then sidecars one by one in reverse order, or all when time is up.
    fn end_containers(&mut self, deadline_ms: u64) {
        let (sidecars, others): (Vec<&ContainerWant>, Vec<&ContainerWant>) =
            self.want.containers.iter().partition(|container| container.kind == Kind::Sidecar);
        let mut others_live = false;
        for container in others {
            others_live |= self.seen.is_live(&container.name);
            self.kill(container, deadline_ms, "the pod ends");
        }
        if self.now_ms >= deadline_ms {
            for sidecar in sidecars {
                self.kill(sidecar, deadline_ms, "the pod's grace period is over");
            }
            return;
        }
        // The hooks of all at once, the signals one by one.
        for sidecar in &sidecars {
            self.pre_stop_first(sidecar, deadline_ms);
        }
        if let Some(last) = sidecars.iter().rfind(|sidecar| self.seen.is_live(&sidecar.name)) {
            self.wake_at(deadline_ms);
            if !others_live {
                self.kill(last, deadline_ms, "everything that was started after it has ended");
            }
        }
    }

    /// Whether the signal still waits for the preStop hook, which is asked for here. A hook that is not done when the
    /// grace is over is waited for no longer; without any grace none is run.
    fn pre_stop_first(&mut self, container: &ContainerWant, deadline_ms: u64) -> bool {
        let seen = self.seen.container(&container.name);
        let Some(run) = seen.run.as_ref().filter(|run| run.is_running()) else { return false };
        if !container.gates.pre_stop || seen.pre_stopped || seen.kill_at_ms.is_some() || deadline_ms <= self.now_ms {
            return false;
        }
        let step = Step::PreStop { name: container.name.clone(), attempt: run.attempt };
        self.emit(step, "its end is due");
        self.wake_at(deadline_ms);
        true
    }

    /// Tells the container to end, unless it was told so with a deadline that is no later.
    pub(super) fn kill(&mut self, container: &ContainerWant, deadline_ms: u64, why: &'static str) {
        let seen = self.seen.container(&container.name);
        if !seen.run.as_ref().is_some_and(super::model::Run::is_running) {
            return;
        }
        if self.pre_stop_first(container, deadline_ms) {
            return;
        }
        let grace_ms = deadline_ms.saturating_sub(self.now_ms).max(MINIMUM_GRACE_MS);
        if seen.kill_at_ms.is_some_and(|at_ms| at_ms <= self.now_ms + grace_ms) {
            return;
        }
        let name = &container.name;
        let killing = |step: &Step| matches!(step, Step::KillContainer { name: other, .. } if other == name);
        if self.seen.in_flight.iter().any(killing) {
            return;
        }
        self.emit(Step::KillContainer { name: name.clone(), grace_ms }, why);
    }
}
