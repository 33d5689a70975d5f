//! What the supervisor writes about itself: events before they are announced, the state after every change.
//!
//! Neither is synced: the death of the supervisor loses nothing that was written, and the death of the machine ends the pod
//! anyway.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use minipod_podshim::protocol::{Event, Happened, State, files, put_frame};
use minipod_podshim::replace::replace;
use prost::Message as _;

/// Unacknowledged events, two for each run. While an agent that does not acknowledge has so many, nothing is started.
const MAX_PENDING: usize = 1024;

/// A file that has grown to this begins anew once nothing in it is needed.
const MAX_FILE_BYTES: u64 = 64 << 10;

/// Events that were not acknowledged yet.
#[derive(Debug)]
pub struct Journal {
    dir: PathBuf,
    file: File,
    file_bytes: u64,
    pending: VecDeque<Event>,
    last: u64,
    acknowledged: u64,
}

impl Journal {
    /// Begins an empty one.
    pub fn begin(dir: &Path) -> io::Result<Self> {
        let file = fresh_file(dir)?;
        Ok(Self { dir: dir.to_owned(), file, file_bytes: 0, pending: VecDeque::new(), last: 0, acknowledged: 0 })
    }

    /// Writes an event down. When that fails it is announced all the same: a lost record matters only if this process
    /// dies before the agent has it.
    pub fn append(&mut self, happened: Happened) {
        self.last += 1;
        let event = Event { sequence: self.last, happened: Some(happened) };
        let mut bytes = Vec::new();
        let framed = put_frame(&event, &mut bytes).is_ok();
        self.file_bytes += bytes.len() as u64;
        if framed && let Err(error) = self.file.write_all(&bytes) {
            eprintln!("write event {} to {}: {error}", self.last, self.dir.join(files::EVENTS).display());
        }
        self.pending.push_back(event);
    }

    /// Forgets events up to this one.
    pub fn acknowledge(&mut self, sequence: u64) {
        self.acknowledged = self.acknowledged.max(sequence.min(self.last));
        while self.pending.front().is_some_and(|event| event.sequence <= self.acknowledged) {
            self.pending.pop_front();
        }
        if self.pending.is_empty() && self.file_bytes > MAX_FILE_BYTES {
            match fresh_file(&self.dir) {
                Ok(file) => (self.file, self.file_bytes) = (file, 0),
                Err(error) => eprintln!("begin {} anew: {error}", self.dir.join(files::EVENTS).display()),
            }
        }
    }

    /// The first event after this one.
    pub fn after(&self, sequence: u64) -> Option<&Event> {
        self.pending.iter().find(|event| event.sequence > sequence)
    }

    /// Whether there is room for the events of another run.
    pub fn has_room(&self) -> bool {
        self.pending.len() < MAX_PENDING
    }

    /// The newest event and the newest acknowledged one.
    pub fn positions(&self) -> (u64, u64) {
        (self.last, self.acknowledged)
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn fresh_file(dir: &Path) -> io::Result<File> {
    let path = dir.join(files::EVENTS);
    remove(&path)?;
    OpenOptions::new().create(true).append(true).open(path)
}

/// Replaces the state file.
pub fn write_state(dir: &Path, state: &State) {
    let path = dir.join(files::STATE);
    if let Err(error) = replace(&path, &dir.join(files::NEW_STATE), &state.encode_to_vec()) {
        eprintln!("write {}: {error}", path.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use minipod_podshim::cleanup::{kept_events, kept_state};
    use minipod_podshim::protocol::SandboxEnded;

    #[test]
    fn events_are_kept_until_they_are_acknowledged() {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut journal = Journal::begin(dir.path()).expect("begin");
        for sandbox in 1..=3 {
            journal.append(Happened::SandboxEnded(SandboxEnded { sandbox, message: String::new() }));
        }
        assert_eq!(kept_events(dir.path()).len(), 3);
        journal.acknowledge(2);
        assert_eq!(journal.after(0).map(|event| event.sequence), Some(3));
        assert_eq!(journal.after(3), None);
        journal.acknowledge(99);
        assert_eq!(journal.positions(), (3, 3), "what did not happen cannot be acknowledged");
        write_state(dir.path(), &State { acknowledged: 3, ..State::default() });
        assert!(kept_events(dir.path()).is_empty());
        journal.append(Happened::SandboxEnded(SandboxEnded { sandbox: 4, message: String::new() }));
        assert_eq!(journal.after(3).map(|event| event.sequence), Some(4));
        assert_eq!(kept_events(dir.path()).len(), 1);
    }

    #[test]
    fn the_file_is_bounded_and_the_state_never_missing() {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut journal = Journal::begin(dir.path()).expect("begin");
        for sequence in 1..=2000 {
            let message = "x".repeat(100);
            journal.append(Happened::SandboxEnded(SandboxEnded { sandbox: 1, message }));
            journal.acknowledge(sequence);
            let size = std::fs::metadata(dir.path().join(files::EVENTS)).expect("events").len();
            assert!(size <= MAX_FILE_BYTES + 200, "{size}");
        }
        for sandbox in 1..=2 {
            write_state(dir.path(), &State { sandbox, ..State::default() });
            assert_eq!(kept_state(dir.path()).map(|state| state.sandbox), Some(sandbox));
        }
        // As if it had died between the two last steps.
        std::fs::rename(dir.path().join(files::STATE), dir.path().join(files::NEW_STATE)).expect("rename");
        assert_eq!(kept_state(dir.path()).map(|state| state.sandbox), Some(2));
    }
}
