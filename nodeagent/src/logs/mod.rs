//! Reading containers' log files in the CRI format, `<RFC 3339 time> <stdout|stderr> <P|F> <text>`.
//!
//! `P` marks a piece of a line whose rest follows, `F` its last (or only) piece. The pieces of stdout and stderr may lie between
//! each other; the reader puts each line together again. A file is read in blocks and never as a whole, and
//! the last lines are found from its end.

mod file;
mod lines;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use file::LogFile;
use lines::Lines;

/// Chunks between the reading and a slow reader.
const CHUNK_QUEUE: usize = 4;
/// Largest chunk.
const CHUNK_BYTES: usize = 64 << 10;
/// How often a followed file is looked at although the kernel reported no change: covers file systems without reports.
const LOOK_EVERY: Duration = Duration::from_secs(1);

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
    let (sender, receiver) = mpsc::channel(CHUNK_QUEUE);
    tokio::spawn(async move {
        if let Err(error) = read(path, options, over, &sender).await {
            // A reader that is gone misses nothing.
            let _ = sender.send(Err(error)).await;
        }
    });
    ReceiverStream::new(receiver)
}

type Sender = mpsc::Sender<Result<Vec<u8>, LogError>>;

async fn read(
    path: PathBuf,
    options: LogOptions,
    over: impl Future<Output = ()> + Send + 'static,
    sender: &Sender,
) -> Result<(), LogError> {
    let follow = options.follow;
    // Before the first look at the file: no change after it is missed.
    let changes = if follow { Changes::of(&path) } else { None };
    let mut over = Box::pin(over);
    let mut ending = false;
    let mut reading = Reading::new(path, &options);
    loop {
        match reading.drain(sender).await? {
            Drained::Enough => return Ok(()),
            Drained::AtEnd if !follow || ending => return reading.finish(sender).await,
            Drained::AtEnd => {}
        }
        tokio::select! {
            // Cancel safe: what has changed is found by reading on, not by the report.
            () = changed(changes.as_ref()) => {}
            // Polled by reference: not started anew.
            () = &mut over => ending = true,
            () = sender.closed() => return Ok(()),
        }
    }
}

/// Returns when there may be more to read.
async fn changed(changes: Option<&Changes>) {
    let look = tokio::time::sleep(LOOK_EVERY);
    match changes {
        Some(changes) => tokio::select! { () = changes.wait() => {}, () = look => {} },
        None => look.await,
    }
}

/// Reports of the kernel about the log's directory.
struct Changes(AsyncFd<OwnedFd>);

impl Changes {
    /// `None` where there are none to be had, as when the directory does not exist yet: then time alone wakes the reader.
    fn of(path: &Path) -> Option<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).ok()?;
        let what = AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO;
        inotify.add_watch(path.parent()?, what).ok()?;
        // Deprecated for types that could lend out another descriptor than the one they own; OwnedFd cannot.
        #[allow(deprecated)]
        AsyncFd::new(OwnedFd::from(inotify)).ok().map(Self)
    }

    async fn wait(&self) {
        let Ok(mut ready) = self.0.readable().await else { return std::future::pending().await };
        // Reports only wake: they are read to make room for the next ones.
        let mut reports = [0; 4096];
        let _ = ready.try_io(|fd| Ok(nix::unistd::read(fd.get_ref(), &mut reports)?));
    }
}

enum Drained {
    /// There is nothing more to read now.
    AtEnd,
    /// The limit is reached, or the reader is gone.
    Enough,
}

/// Everything between file and stream. Reads the file on threads that may block.
struct Reading {
    inner: Option<Inner>,
}

struct Inner {
    file: LogFile,
    lines: Lines,
}

impl Reading {
    fn new(path: PathBuf, options: &LogOptions) -> Self {
        Self { inner: Some(Inner { file: LogFile::new(path, options.tail_lines), lines: Lines::new(options) }) }
    }

    /// Sends what there is.
    async fn drain(&mut self, sender: &Sender) -> Result<Drained, LogError> {
        loop {
            let Some(mut inner) = self.inner.take() else { return Ok(Drained::Enough) };
            let step = tokio::task::spawn_blocking(move || {
                let out = inner.fill();
                (inner, out)
            });
            // The runtime ends, and so does every reading.
            let Ok((inner, out)) = step.await else { return Ok(Drained::Enough) };
            let (chunk, at_end) = out?;
            let enough = inner.lines.is_enough();
            self.inner = Some(inner);
            if !chunk.is_empty() && sender.send(Ok(chunk)).await.is_err() || enough {
                return Ok(Drained::Enough);
            }
            if at_end {
                return Ok(Drained::AtEnd);
            }
        }
    }

    /// Sends the beginnings of lines whose end will not come.
    async fn finish(mut self, sender: &Sender) -> Result<(), LogError> {
        if let Some(mut inner) = self.inner.take() {
            let rest = inner.lines.finish();
            for chunk in rest.chunks(CHUNK_BYTES) {
                if sender.send(Ok(chunk.to_vec())).await.is_err() {
                    break;
                }
            }
        }
        Ok(())
    }
}

impl Inner {
    /// The next chunk, and whether the file ends there for now.
    fn fill(&mut self) -> Result<(Vec<u8>, bool), LogError> {
        let mut at_end = false;
        while !at_end && !self.lines.has_chunk() && !self.lines.is_enough() {
            at_end = !self.file.read(&mut |line| self.lines.add(line))?;
        }
        let chunk = self.lines.take_chunk();
        Ok((chunk, at_end && !self.lines.has_chunk()))
    }
}
