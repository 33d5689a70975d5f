//! Reading containers' log files in the CRI format, `<RFC 3339 time> <stdout|stderr> <P|F> <text>`.

use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::time::SystemTime;

use tokio_stream::wrappers::ReceiverStream;

/// What of a log is wanted.
#[derive(Debug, Clone, Default)]
pub struct LogOptions {
    /// Go on until the container is over.
    pub follow: bool,
    /// Only the last so many lines of what is there now.
    pub tail_lines: Option<u64>,
    /// Only lines from then on.
    pub since: Option<SystemTime>,
    /// End after so many bytes, be it within a line.
    pub limit_bytes: Option<u64>,
    /// Each line begins with its time.
    pub timestamps: bool,
}

/// Why a log could not be read (further).
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The file.
    #[error("{operation} log {}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

/// The log as a stream of byte chunks (at most 64 KiB each). Drop the stream to end the reading.
///
/// Without `follow` it ends at the end of the file. With it, it ends when `over` has come true (the container's
/// state is final, nothing more will be written) and the file is drained; rotation (the file replaced under its name) and a file
/// that does not exist yet are followed. Pass `std::future::pending()` for a container without end.
///
/// Must be called within a tokio runtime.
pub fn read_log(
    path: PathBuf,
    options: LogOptions,
    over: impl Future<Output = ()> + Send + 'static,
) -> ReceiverStream<Result<Vec<u8>, LogError>> {
    let _ = (path, options, over);
    unimplemented!()
}
