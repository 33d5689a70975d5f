//! Consensus: the replica that owns raft, the log and the machine.
//!
//! [`core`] is the replica without threads; `ready` its round; `pending`, `members` and `log` are what it keeps. [`run`] is the thread
//! that drives it from its [`inbox`], and the handle that implements [`Replicator`](crate::machine::Replicator).

pub mod core;
pub mod inbox;
pub mod log;
pub mod members;
pub mod pending;
mod ready;
pub mod run;

/// Raft says what it does through slog; it goes where everything else goes.
fn raft_logger() -> slog::Logger {
    slog::Logger::root(ToTracing, slog::o!())
}

struct ToTracing;

impl slog::Drain for ToTracing {
    type Ok = ();
    type Err = slog::Never;

    fn log(&self, record: &slog::Record<'_>, _values: &slog::OwnedKVList) -> Result<(), slog::Never> {
        // Raft's warnings are ordinary events of an election; what a person should see the replica says itself.
        match record.level() {
            slog::Level::Critical | slog::Level::Error => tracing::error!(target: "raft", "{}", record.msg()),
            slog::Level::Warning | slog::Level::Info => tracing::debug!(target: "raft", "{}", record.msg()),
            slog::Level::Debug | slog::Level::Trace => tracing::trace!(target: "raft", "{}", record.msg()),
        }
        Ok(())
    }
}
