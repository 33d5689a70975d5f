//! `cp`: files into a container and out of it. The image needs nothing for it.

use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;

use minipod_proto::v1::copy_frame::Frame;
use minipod_proto::v1::{CopyLeft, CopyStart};
use minipod_transfer::{Base, Policy, TransferError, Unpack, name_of, pack};
use tokio::sync::mpsc;

use super::args::CopyArgs;
use super::error::CliError;
use super::session::Session;
use super::{access, target};
use crate::view::text;

/// Frames between the connection and the files: one is written while the next is read.
const FRAMES: usize = 4;

/// One side of a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Side {
    /// A path on this machine.
    Here(PathBuf),
    /// A path in a container.
    There {
        /// Empty: the command's.
        namespace: String,
        /// The pod.
        pod: String,
        /// Absolute.
        path: String,
    },
}

impl Side {
    /// `[NAMESPACE/]POD:PATH`, or a path here. One here that has a colon begins with `./` or `/`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(words: &str) -> Result<Self, String> {
        let there = words.split_once(':').filter(|_| !words.starts_with(['.', '/']));
        let Some((pod, path)) = there else {
            return if words.is_empty() { Err("the path is empty".to_owned()) } else { Ok(Self::Here(words.into())) };
        };
        let (namespace, pod) = pod.split_once('/').unwrap_or(("", pod));
        if pod.is_empty() || pod.contains('/') {
            return Err(format!("{words:?} is no [NAMESPACE/]POD:PATH; a file here with a colon is written ./FILE"));
        }
        if !path.starts_with('/') {
            return Err(format!("{path:?} is not absolute: write {pod}:/PATH"));
        }
        Ok(Self::There { namespace: namespace.to_owned(), pod: pod.to_owned(), path: path.to_owned() })
    }
}

/// Copies in the one direction or in the other.
pub async fn copy(session: &Session, options: &CopyArgs) -> Result<(), CliError> {
    match (&options.from, &options.to) {
        (Side::Here(from), Side::There { namespace, pod, path }) => {
            let mut start = start(session, (namespace, pod, path), &options.container).await?;
            (start.upload, start.name) = (true, name_of(from.as_os_str().as_bytes()).to_vec().into());
            upload(session, from.clone(), start).await
        }
        (Side::There { namespace, pod, path }, Side::Here(to)) => {
            let start = start(session, (namespace, pod, path), &options.container).await?;
            download(session, start, to.clone()).await
        }
        _ => Err(CliError::usage(
            "one side of a copy is a container's, and the other is here",
            "minictl cp POD:/PATH FILE, or minictl cp FILE POD:/PATH",
        )),
    }
}

async fn start(
    session: &Session,
    (namespace, pod, path): (&str, &str, &str),
    named: &str,
) -> Result<CopyStart, CliError> {
    let namespace = if namespace.is_empty() { &session.namespace } else { namespace };
    let pod = target::pod_name(pod)?;
    let container = access::container(session, namespace, pod, named).await?;
    Ok(CopyStart {
        namespace: namespace.to_owned(),
        pod: pod.to_owned(),
        container,
        path: path.as_bytes().to_vec().into(),
        ..CopyStart::default()
    })
}

async fn upload(session: &Session, from: PathBuf, start: CopyStart) -> Result<(), CliError> {
    let mut copy = session.client.copy(start).await?;
    let Some(sender) = copy.take_sender() else { return Ok(()) };
    let (left_sender, mut left) = mpsc::unbounded_channel();
    let reading = tokio::task::spawn_blocking(move || {
        pack(&Base::Process, from.as_os_str().as_bytes(), &mut |frame| match frame {
            // The container's side has no use for it; who copies wants to know.
            Frame::Left(entry) => left_sender.send(entry).is_ok(),
            frame => sender.blocking_send(frame),
        })
    });
    let mut told = Told::default();
    // Both at once: the other side may end it at any time.
    let (read, done) = tokio::join!(reading, async {
        loop {
            match copy.next().await {
                Ok(Some(Frame::Done(_))) => return Ok(true),
                Ok(Some(Frame::Left(entry))) => told.say(&entry),
                Ok(Some(_)) => {}
                Ok(None) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
    });
    while let Ok(entry) = left.try_recv() {
        told.say(&entry);
    }
    match (read.map_err(|error| CliError::usage(error.to_string(), "try again"))?, done) {
        // Why the other side takes no more is the cause of this.
        (Err(TransferError::Gone) | Ok(()), Err(error)) => Err(error.into()),
        (Err(error), _) => Err(error.into()),
        (Ok(()), Ok(true)) => told.end(),
        (Ok(()), Ok(false)) => Err(TransferError::Gone.into()),
    }
}

async fn download(session: &Session, start: CopyStart, to: PathBuf) -> Result<(), CliError> {
    let policy = Policy::out_of_container();
    let name = name_of(&start.path).to_vec();
    let mut copy = session.client.copy(start).await?;
    let (sender, mut frames) = mpsc::channel::<Frame>(FRAMES);
    let writing = tokio::task::spawn_blocking(move || {
        let mut told = Told::default();
        // Nothing is made here before it is known that there is something to copy.
        let Some(first) = frames.blocking_recv() else { return Err(TransferError::Gone) };
        let mut unpack = Unpack::begin(&Base::Process, to.as_os_str().as_bytes(), &name, policy)?;
        let mut next = Some(first);
        while let Some(frame) = next {
            if let Some(entry) = unpack.take(frame)? {
                told.say(&entry);
            }
            next = if unpack.is_complete() { None } else { frames.blocking_recv() };
        }
        unpack.finish().map(|()| told)
    });
    let mut broke = None;
    loop {
        match copy.next().await {
            // A writer that takes no more has failed, and says why.
            Ok(Some(frame)) => {
                if sender.send(frame).await.is_err() {
                    break;
                }
            }
            Ok(None) => break,
            Err(error) => {
                broke = Some(error);
                break;
            }
        }
    }
    drop((sender, copy));
    let written = writing.await.map_err(|error| CliError::usage(error.to_string(), "try again"))?;
    match (broke, written) {
        (Some(error), _) => Err(error.into()),
        (None, Err(error)) => Err(error.into()),
        (None, Ok(told)) => told.end(),
    }
}

/// What was left out: said at once, and counted.
#[derive(Debug, Default)]
struct Told(usize);

impl Told {
    fn say(&mut self, entry: &CopyLeft) {
        self.0 += 1;
        let path = String::from_utf8_lossy(&entry.path).into_owned();
        note!("left out: {}: {}", text::line(&path), text::line(&entry.why));
    }

    fn end(self) -> Result<(), CliError> {
        if self.0 == 0 { Ok(()) } else { Err(CliError::LeftOut(self.0)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_are_read() {
        let there = |namespace: &str, pod: &str, path: &str| Side::There {
            namespace: namespace.into(),
            pod: pod.into(),
            path: path.into(),
        };
        assert_eq!(Side::parse("web:/a/b"), Ok(there("", "web", "/a/b")));
        assert_eq!(Side::parse("ns/web:/a:b"), Ok(there("ns", "web", "/a:b")));
        for here in ["a", "/a", "./a:b", "../a:b", "/a:b", "."] {
            assert_eq!(Side::parse(here), Ok(Side::Here(here.into())), "{here}");
        }
        for (wrong, part) in
            [("", "empty"), (":/a", "no [NAMESPACE/]POD"), ("web:a", "not absolute"), ("a/b/c:/d", "no [NAME")]
        {
            assert!(Side::parse(wrong).is_err_and(|error| error.contains(part)), "{wrong}");
        }
    }
}
