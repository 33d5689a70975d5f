//! What the agent keeps of a pod across its own restarts: `spec` (the pod as last seen, prost) and `record` (what was done
//! and seen, JSON), both in the pod's directory below the run directory, which a reboot clears.
//!
//! Both are replaced as a whole, without fsync: an agent's death loses nothing that was written, and a machine's death
//! clears the directory anyway.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use minipod_proto::v1::Pod;
use prost::Message;
use serde::{Deserialize, Serialize};

use crate::execute::Begun;
use crate::plan::backoff::Backoff;
use crate::plan::model::{ContainerSeen, Ended, Health, Resources, Run, RunState, Seen, Terminal};

/// A file of the record could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("{operation} {}", path.display())]
pub struct RecordError {
    operation: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// What outlives the agent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Record {
    /// When this node took the pod on.
    pub start_wall_ms: u64,
    /// The newest sandbox.
    pub sandbox_attempt: u32,
    /// The sandbox that has a network.
    pub network_attempt: u32,
    /// The pod's address, empty before it has one.
    pub pod_ip: String,
    /// The sandbox that has its /etc files.
    pub etc_attempt: u32,
    /// The volumes are there.
    pub volumes: bool,
    /// Volumes and root file systems were removed; only logs are left.
    pub data_removed: bool,
    /// The phase that is not left again.
    pub terminal: Option<Terminal>,
    /// CPU and memory of the pod's cgroup.
    pub pod_applied: Option<Resources>,
    /// Ids of the images that volumes show, by volume.
    pub volume_images: BTreeMap<String, String>,
    /// Runs by container.
    pub containers: BTreeMap<String, Box<ContainerRecord>>,
}

/// A container's runs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ContainerRecord {
    /// The newest.
    pub run: Option<Run>,
    /// The end of the one before.
    pub previous: Option<Ended>,
    /// The image it was started from.
    pub image_id: String,
    /// What the newest run began with; unknown for one that an older agent started.
    pub begun: Option<Box<Begun>>,
    /// What hooks and probes found of the newest run.
    pub health: Health,
    /// CPU and memory of the newest run.
    pub applied: Option<Resources>,
    /// The image's reference that it was started with.
    pub started_from: String,
    /// When it may start again, on the boot clock.
    pub retry_ms: u64,
    /// The wait that this was made of.
    pub backoff_ms: u64,
    /// What the next wait follows.
    pub backoff: Backoff,
}

const SPEC: &str = "spec";
const RECORD: &str = "record";

impl Record {
    /// Reads the record; an absent or unreadable one is empty (what it knew is then taken from supervisor and API).
    #[must_use]
    pub fn load(dir: &Path) -> Self {
        let Ok(bytes) = std::fs::read(dir.join(RECORD)) else { return Self::default() };
        serde_json::from_slice(&bytes).unwrap_or_else(|error| {
            tracing::warn!(dir = %dir.display(), %error, "a pod's record is unreadable and is begun anew");
            Self::default()
        })
    }

    /// Keeps the record.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, dir: &Path) -> Result<(), RecordError> {
        self.save_if_changed(dir, &mut Box::default())
    }

    /// The same, unless it is what `kept` says; that is what is kept then.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save_if_changed(&self, dir: &Path, kept: &mut Box<[u8]>) -> Result<(), RecordError> {
        let bytes = serde_json::to_vec(self).unwrap_or_default();
        if bytes[..] != **kept {
            replace(dir, RECORD, &bytes)?;
            *kept = bytes.into_boxed_slice();
        }
        Ok(())
    }

    /// Puts what was recorded into `seen`; `now_ms` is the boot clock's.
    pub fn restore(&self, seen: &mut Seen, now_ms: u64) {
        seen.sandbox_attempt = self.sandbox_attempt;
        seen.network_attempt = self.network_attempt;
        seen.etc_attempt = self.etc_attempt;
        seen.volumes = self.volumes;
        seen.terminal.clone_from(&self.terminal);
        seen.pod_applied = self.pod_applied;
        for (name, container) in &self.containers {
            let seen = seen.containers.entry(name.clone()).or_default();
            seen.run.clone_from(&container.run);
            seen.previous.clone_from(&container.previous);
            seen.health = container.health;
            seen.applied = container.applied;
            seen.started_from.clone_from(&container.started_from);
            seen.backoff = container.backoff;
            seen.backoff_ms = container.backoff_ms;
            // Of a clock that another boot has begun anew it says nothing: nobody waits longer than there was to wait.
            seen.retry_ms = container.retry_ms.min(now_ms + container.backoff_ms);
        }
    }

    /// Takes what is to be kept from `seen`.
    pub fn note(&mut self, seen: &Seen) {
        self.sandbox_attempt = seen.sandbox_attempt;
        self.network_attempt = seen.network_attempt;
        self.etc_attempt = seen.etc_attempt;
        self.volumes = seen.volumes;
        self.data_removed = seen.dir && !seen.data;
        self.terminal.clone_from(&seen.terminal);
        self.pod_applied = seen.pod_applied;
        for (name, container) in &seen.containers {
            let record = self.containers.entry(name.clone()).or_default();
            record.run.clone_from(&container.run);
            record.previous.clone_from(&container.previous);
            record.health = container.health;
            record.applied = container.applied;
            record.started_from.clone_from(&container.started_from);
            (record.retry_ms, record.backoff_ms, record.backoff) =
                (container.retry_ms, container.backoff_ms, container.backoff);
        }
    }
}

/// Keeps the pod as it was last seen.
///
/// # Errors
/// When the file cannot be written.
pub fn save_spec(dir: &Path, pod: &Pod) -> Result<(), RecordError> {
    replace(dir, SPEC, &pod.encode_to_vec())
}

/// The pod as it was last seen, if it can be read.
#[must_use]
pub fn load_spec(dir: &Path) -> Option<Pod> {
    let bytes = std::fs::read(dir.join(SPEC)).ok()?;
    Pod::decode(bytes.as_slice())
        .inspect_err(|error| tracing::error!(dir = %dir.display(), %error, "a pod's spec is unreadable"))
        .ok()
}

/// The same, of a directory that may hold none yet.
#[must_use]
pub fn load_spec_if_any(dir: &Path) -> Option<Pod> {
    dir.join(SPEC).exists().then(|| load_spec(dir)).flatten()
}

fn replace(dir: &Path, name: &str, bytes: &[u8]) -> Result<(), RecordError> {
    let place = dir.join(name);
    let replaced = minipod_podshim::replace::replace(&place, &dir.join(format!("{name}.spare")), bytes);
    replaced.map_err(|source| RecordError { operation: "replace", path: place, source })
}

/// For a pod that the API knows as begun and this node knows nothing about: the node was rebooted, or its state was
/// lost. What ran is over; what had ended stays so.
pub fn adopt_from_api(pod: &Pod, seen: &mut Seen, (now_ms, now_wall_ms): (u64, u64)) {
    let Some(status) = &pod.status else { return };
    if matches!(status.phase.as_str(), "Succeeded" | "Failed") {
        seen.terminal = Some(Terminal {
            succeeded: status.phase == "Succeeded",
            reason: status.reason.clone(),
            message: status.message.clone(),
            since_ms: now_ms,
            grace_ms: None,
        });
    }
    let debug = &status.ephemeral_container_statuses;
    for container in status.init_container_statuses.iter().chain(&status.container_statuses).chain(debug) {
        let state = container.state.clone().unwrap_or_default();
        let last = container.last_state.clone().unwrap_or_default();
        let ms = |time: Option<minipod_proto::v1::Time>| time.map_or(0, |t| u64::try_from(t.unix_ms()).unwrap_or(0));
        let ended_of = |ended: &minipod_proto::v1::ContainerStateTerminated| Ended {
            exit_code: ended.exit_code,
            signal: ended.signal,
            reason: ended.reason.clone(),
            message: ended.message.clone(),
            started_wall_ms: ms(ended.started_at),
            finished_wall_ms: ms(ended.finished_at),
            restart: false,
        };
        let ended = match (&state.running, &state.terminated, &last.terminated) {
            (Some(running), _, _) => Ended {
                exit_code: 137,
                signal: 0,
                reason: "ContainerStatusUnknown".to_owned(),
                message: "the container's end was not seen: the node was restarted".to_owned(),
                started_wall_ms: ms(running.started_at),
                finished_wall_ms: now_wall_ms,
                restart: false,
            },
            (None, Some(terminated), _) | (None, None, Some(terminated)) => ended_of(terminated),
            (None, None, None) => continue,
        };
        let attempt = u32::try_from(container.restart_count).unwrap_or(0);
        // Any sandbox before the first one of now.
        seen.sandbox_attempt = 1;
        let entry: &mut ContainerSeen = seen.containers.entry(container.name.clone()).or_default();
        entry.run =
            Some(Run { attempt, sandbox: 1, started_wall_ms: ended.started_wall_ms, state: RunState::Ended(ended) });
    }
}

#[cfg(test)]
mod tests {
    use minipod_proto::v1::{ContainerState, ContainerStateRunning, ContainerStatus, PodStatus};

    use super::*;

    #[test]
    fn a_record_comes_back_as_it_was() {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut seen = Seen { dir: true, data: true, sandbox_attempt: 2, network_attempt: 2, ..Seen::default() };
        let run = Run { attempt: 3, sandbox: 2, started_wall_ms: 7, state: RunState::Running };
        let mut backoff = Backoff::default();
        assert_eq!([backoff.ended(1, 300_000), backoff.ended(1, 300_000)], [0, 10_000]);
        let of_x = ContainerSeen {
            run: Some(run),
            started_from: "a:1".into(),
            retry_ms: 15_000,
            backoff_ms: 10_000,
            backoff,
            ..ContainerSeen::default()
        };
        seen.containers.insert("x".into(), Box::new(of_x));
        let mut record = Record { start_wall_ms: 5, ..Record::default() };
        record.note(&seen);
        record.save(dir.path()).expect("save");
        let loaded = Record::load(dir.path());
        assert_eq!(loaded, record);
        let mut restored = Seen { dir: true, data: true, ..Seen::default() };
        loaded.restore(&mut restored, 6_000);
        assert_eq!(restored, seen);
        assert_eq!({ restored.container("x").backoff }.ended(1, 300_000), 20_000, "it goes on where it was");
        let mut later = Seen::default();
        loaded.restore(&mut later, 100);
        assert_eq!(later.container("x").retry_ms, 10_100, "a clock that began anew");
        std::fs::write(dir.path().join(RECORD), b"{ broken").expect("write");
        assert_eq!(Record::load(dir.path()), Record::default());
    }

    #[test]
    fn after_a_reboot_what_ran_is_over_and_counts_go_on() {
        let running = ContainerState { running: Some(ContainerStateRunning::default()), ..ContainerState::default() };
        let status =
            ContainerStatus { name: "x".into(), restart_count: 4, state: Some(running), ..ContainerStatus::default() };
        let pod = Pod {
            status: Some(PodStatus { container_statuses: vec![status], ..PodStatus::default() }),
            ..Pod::default()
        };
        let mut seen = Seen::default();
        adopt_from_api(&pod, &mut seen, (10, 20));
        let run = seen.container("x").run.as_ref().expect("run");
        assert_eq!((run.attempt, run.ended().expect("ended").exit_code), (4, 137));
    }
}
