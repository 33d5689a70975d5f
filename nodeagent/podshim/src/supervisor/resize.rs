//! Other limits for a pod that runs.

use minipod_podshim::cgroup::{CgroupError, Group};
use minipod_podshim::protocol::{Fault, Limits, Refused, Resize, SandboxPhase};

use super::sandbox::{Tap as _, cgroup_refused};
use super::{Asker, Supervisor, refused};

impl Supervisor {
    pub(super) fn resize(&mut self, asker: Asker, wanted: &Resize) {
        match self.try_resize(wanted) {
            Ok(()) => self.done(asker),
            Err(refused) => self.refuse(asker, refused),
        }
    }

    /// The pod's group first where it gets more, last where it gets less: a container may never have more than its pod.
    fn try_resize(&mut self, wanted: &Resize) -> Result<(), Refused> {
        if self.stopping.is_some() || self.sandbox.phase != SandboxPhase::Up {
            return Err(refused("resize the pod", "", Fault::Request).tap("it has no sandbox"));
        }
        let runs = wanted.containers.iter().filter_map(|one| {
            let found = self.containers.get(&one.name)?;
            let lives = found.attempt() == one.attempt && found.lives();
            lives.then(|| (found.group().clone(), one.limits.clone().unwrap_or_default()))
        });
        let runs: Vec<(Group, Limits)> = runs.collect();
        for (what, group, limits) in wanted
            .pod
            .iter()
            .map(|limits| ("the pod", &self.pod_group, limits))
            .chain(runs.iter().map(|(group, limits)| ("the container", group, limits)))
        {
            check_memory(what, group, limits)?;
        }
        let set =
            |group: &Group, limits: &Limits| group.reset(limits).map_err(|error: CgroupError| cgroup_refused(&error));
        if let Some(limits) = &wanted.pod {
            set(&self.pod_group, &self.pod_group.at_least(limits))?;
        }
        for (group, limits) in &runs {
            set(group, limits)?;
        }
        if let Some(limits) = &wanted.pod {
            set(&self.pod_group, limits)?;
            if let Some(spec) = &mut self.sandbox.spec {
                spec.limits = Some(limits.clone());
            }
        }
        for one in &wanted.containers {
            if let Some(found) = self.containers.get_mut(&one.name).filter(|found| found.attempt() == one.attempt) {
                found.note_limits(one.limits.clone());
            }
        }
        Ok(())
    }
}

/// A limit below what is in use would have the kernel kill for it.
fn check_memory(what: &str, group: &Group, limits: &Limits) -> Result<(), Refused> {
    let Some(limit) = limits.memory_limit_bytes else { return Ok(()) };
    let used = group.working_set_bytes();
    if used <= limit || group.memory_limit_bytes().is_some_and(|present| present <= limit) {
        return Ok(());
    }
    let why =
        format!("attempting to set the memory limit of {what} ({limit} bytes) below its current usage ({used} bytes)");
    Err(refused("resize the pod", "", Fault::Container).tap(&why))
}
