//! After the death of a supervisor: nothing of its pod may go on.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use prost::Message;

use crate::cgroup::{CgroupError, Cgroups};
use crate::process::{boot_id, same_process};
use crate::protocol::{Ended, Event, State, files, take_frame};

/// How long a killed supervisor may take to let its lock go.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// Something of a pod is still there.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    /// A cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// A file of the supervisor.
    #[error("{operation} {}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// It was killed and does not end.
    #[error("the supervisor that holds {} does not end", .0.display())]
    StillThere(PathBuf),
}

/// Whether a supervisor lives on this directory.
///
/// # Errors
/// When its lock cannot be looked at.
pub fn look(dir: &Path) -> io::Result<Presence> {
    match File::open(dir.join(files::LOCK)) {
        Ok(file) => match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(_) => Ok(Presence::Dead),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(Presence::Live),
            Err((_, errno)) => Err(errno.into()),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Presence::Never),
        Err(error) => Err(error),
    }
}

/// What became of a supervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// It holds its lock.
    Live,
    /// Its lock is there and nobody holds it: it died.
    Dead,
    /// There was none, or it ended in order.
    Never,
}

/// What the supervisor last wrote about itself.
#[must_use]
pub fn kept_state(dir: &Path) -> Option<State> {
    let read = |name: &str| State::decode(std::fs::read(dir.join(name)).ok()?.as_slice()).ok();
    read(files::STATE).or_else(|| read(files::NEW_STATE))
}

/// Events that the supervisor wrote and that were never acknowledged. A last one that was cut off by its death is left out.
#[must_use]
pub fn kept_events(dir: &Path) -> Vec<Event> {
    let mut bytes = std::fs::read(dir.join(files::EVENTS)).unwrap_or_default();
    let acknowledged = kept_state(dir).map_or(0, |state| state.acknowledged);
    let all = std::iter::from_fn(|| take_frame::<Event>(&mut bytes).ok().flatten());
    all.filter(|event| event.sequence > acknowledged).collect()
}

/// Ends that the supervisor saw and whose output was not written down in full when it died: they are no events yet.
#[must_use]
pub fn kept_ends(dir: &Path) -> Vec<Ended> {
    kept_state(dir).into_iter().flat_map(|state| state.runs).filter_map(|run| run.leaving).collect()
}

/// Kills what runs of the pod, the supervisor too if it hangs, and removes its cgroups and its files in `dir`. Blocks for
/// as long as processes take to die.
///
/// # Errors
/// When something stays; everything may be asked for again.
pub fn clean_up(dir: &Path, cgroup_root: &str, uid: &str) -> Result<(), CleanupError> {
    if let Some(state) = kept_state(dir).filter(|state| state.boot_id == boot_id()) {
        // The supervisor first, so that it starts nothing more. Containers by number only as a second means: what is in
        // the pod's cgroups dies below in any case.
        let shim = std::iter::once((state.shim_pid, state.shim_start_ticks));
        let pause = std::iter::once((state.pause_pid, state.pause_start_ticks));
        let runs = state.runs.iter().filter(|run| run.ended.is_none());
        let runs = runs.filter_map(|run| Some((run.started.as_ref()?.pid, run.start_ticks)));
        for process in shim.chain(pause).chain(runs).filter_map(|(pid, ticks)| same_process(pid, ticks)) {
            let _ = process.signal(libc::SIGKILL);
        }
    }
    let _lock = lock_of_dead(dir)?;
    let pod = Cgroups::detect()?.pod(cgroup_root, uid);
    pod.kill_until_empty()?;
    pod.remove_patiently()?;
    remove_files(dir)
}

/// Removes the pod's cgroups, if any are left.
///
/// # Errors
/// When a process is in them.
pub fn remove_cgroups(cgroup_root: &str, uid: &str) -> Result<(), CleanupError> {
    Ok(Cgroups::detect()?.pod(cgroup_root, uid).remove_patiently()?)
}

/// Removes the supervisor's files, the lock last: while it is there, the pod is known to have had a supervisor.
///
/// # Errors
/// When one cannot be removed.
pub fn remove_files(dir: &Path) -> Result<(), CleanupError> {
    for name in [files::SOCKET, files::STATE, files::NEW_STATE, files::EVENTS, files::LOCK] {
        let path = dir.join(name);
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(CleanupError::Io { operation: "remove", path, source });
            }
            _ => {}
        }
    }
    Ok(())
}

fn lock_of_dead(dir: &Path) -> Result<Option<Flock<File>>, CleanupError> {
    let path = dir.join(files::LOCK);
    let began = Instant::now();
    loop {
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(CleanupError::Io { operation: "open", path, source }),
        };
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(Some(lock)),
            Err(_) if began.elapsed() > LOCK_PATIENCE => return Err(CleanupError::StillThere(path)),
            Err(_) => sleep(Duration::from_millis(2)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Happened, Run, put_frame};

    #[test]
    fn a_lock_tells_the_living_from_the_dead() {
        let dir = tempfile::tempdir().expect("tempdir");
        assert_eq!(look(dir.path()).expect("look"), Presence::Never);
        let file = File::create(dir.path().join(files::LOCK)).expect("create");
        assert_eq!(look(dir.path()).expect("look"), Presence::Dead);
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).expect("lock");
        assert_eq!(look(dir.path()).expect("look"), Presence::Live);
        drop(lock);
        assert_eq!(look(dir.path()).expect("look"), Presence::Dead);
        remove_files(dir.path()).expect("remove");
        assert_eq!(look(dir.path()).expect("look"), Presence::Never);
    }

    #[test]
    fn last_words_are_read_but_for_a_torn_end() {
        let dir = tempfile::tempdir().expect("tempdir");
        assert!(kept_events(dir.path()).is_empty());
        let mut bytes = Vec::new();
        for sequence in 1..=3 {
            let ended = Ended { name: "x".into(), ..Ended::default() };
            put_frame(&Event { sequence, happened: Some(Happened::Ended(ended)) }, &mut bytes).expect("short");
        }
        std::fs::write(dir.path().join(files::EVENTS), &bytes[..bytes.len() - 1]).expect("write");
        let leaving = Ended { name: "y".into(), exit_code: 7, ..Ended::default() };
        let runs = vec![Run::default(), Run { leaving: Some(leaving.clone()), ..Run::default() }];
        let state = State { acknowledged: 1, runs, ..State::default() };
        std::fs::write(dir.path().join(files::STATE), state.encode_to_vec()).expect("write");
        assert_eq!(kept_events(dir.path()).iter().map(|event| event.sequence).collect::<Vec<_>>(), [2]);
        assert_eq!(kept_ends(dir.path()), [leaving]);
    }
}
