//! Files out of a running container and into it.
//!
//! The work is done on a thread of its own, which touches files as the container's user with the container's capabilities, below the
//! root directory of the container's first process: mounts are seen as it sees them, and links lead about in it and never out.

use std::os::fd::OwnedFd;

use minipod_podshim::protocol::{IdRange, User};
use minipod_proto::v1::copy_frame::Frame as Part;
use minipod_proto::v1::tunnel_frame::Frame;
use minipod_proto::v1::{CopyFrame, CopyStart};
use minipod_transfer::{Base, Policy, TransferError, Unpack, pack};
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use prost::Message as _;
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use super::{FRAME_QUEUE, Tunnel, frame};
use crate::shim::{Shim, ShimError};
use crate::sys::Identity;

pub(super) async fn copy(
    tunnel: &mut Tunnel,
    (shim, container, attempt): (&Shim, &str, u32),
    users: Option<IdRange>,
    start: CopyStart,
) -> Result<(), Status> {
    if !start.path.starts_with(b"/") {
        let path = String::from_utf8_lossy(&start.path).into_owned();
        return Err(Status::invalid_argument(format!("path: found {path:?}, want an absolute path")));
    }
    let not_running = || Status::failed_precondition(format!("container {container:?} is not running"));
    let (root, identity) = place(shim, container, attempt).await?.ok_or_else(not_running)?;
    let identity = as_node(users, identity)?;
    if start.upload {
        upload(tunnel, (root, identity, users), start).await
    } else {
        download(tunnel, (root, identity, users), start).await
    }
}

/// The container's root directory, and who works there.
async fn place(shim: &Shim, container: &str, attempt: u32) -> Result<Option<(OwnedFd, Identity)>, Status> {
    let failed = |error: ShimError| Status::unavailable(crate::report::chain(&error));
    let find = async || {
        let processes = shim.state().await.map_err(failed)?.processes;
        Ok::<_, Status>(processes.into_iter().find(|one| one.name == container && one.attempt == attempt))
    };
    let Some(process) = find().await? else { return Ok(None) };
    let path = format!("/proc/{}/root", process.pid);
    let root = open(path.as_str(), OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty());
    // The supervisor reaps its processes: as long as it names this one, no other has had its number.
    if find().await?.is_none_or(|now| now.pid != process.pid) {
        return Ok(None);
    }
    let root = root.map_err(|errno| Status::internal(format!("open the container's root: {}", errno.desc())))?;
    let old = "the pod's supervisor is of a version that does not know cp: delete the pod and create it again";
    let User { uid, gid, groups } = process.user.ok_or_else(|| Status::failed_precondition(old))?;
    Ok(Some((root, Identity { uid, gid, groups, root: uid == 0, capabilities: process.capabilities })))
}

/// Shown for an owner that a pod's own users do not have, as the kernel does it.
const NOBODY: u32 = 65_534;

/// The container's user as the node knows it. The thread stays in the node's user namespace, which a process with more threads cannot leave.
fn as_node(users: Option<IdRange>, identity: Identity) -> Result<Identity, Status> {
    let Some(users) = users else { return Ok(identity) };
    let id = |id: u32| {
        users.outside(id).ok_or_else(|| Status::internal(format!("the pod's own users do not have the id {id}")))
    };
    let groups = identity.groups.iter().map(|group| id(*group)).collect::<Result<_, _>>()?;
    Ok(Identity { uid: id(identity.uid)?, gid: id(identity.gid)?, groups, ..identity })
}

/// Owners as the container sees them.
fn seen_inside(users: Option<IdRange>, part: Part) -> Part {
    match (users, part) {
        (Some(users), Part::Entry(mut entry)) => {
            let inside = |id: u32| users.inside(id).unwrap_or(NOBODY);
            (entry.uid, entry.gid) = (inside(entry.uid), inside(entry.gid));
            Part::Entry(entry)
        }
        (_, part) => part,
    }
}

/// The other way. An owner that the pod's users do not have becomes nobody.
fn seen_outside(users: Option<IdRange>, part: Part) -> Part {
    match (users, part) {
        (Some(users), Part::Entry(mut entry)) => {
            let outside = |id: u32| users.outside(id).unwrap_or(users.first.saturating_add(NOBODY));
            (entry.uid, entry.gid) = (outside(entry.uid), outside(entry.gid));
            Part::Entry(entry)
        }
        (_, part) => part,
    }
}

/// Runs the work on a thread of its own, as somebody else.
fn as_user<T: Send + 'static>(
    identity: Identity,
    work: impl FnOnce() -> Result<T, TransferError> + Send + 'static,
) -> Result<oneshot::Receiver<Result<T, Status>>, Status> {
    let (sender, receiver) = oneshot::channel();
    let thread = std::thread::Builder::new().name("copy".to_owned()).spawn(move || {
        let become_user = |error: std::io::Error| Status::internal(format!("become the container's user: {error}"));
        let outcome = identity.assume().map_err(become_user).and_then(|()| work().map_err(|error| status(&error)));
        // Whoever waited may be gone.
        let _ = sender.send(outcome);
    });
    thread.map_err(|error| Status::resource_exhausted(format!("no thread to copy with: {error}")))?;
    Ok(receiver)
}

fn status(error: &TransferError) -> Status {
    let text = crate::report::chain(error);
    match error {
        TransferError::Io { source, .. } => match source.kind() {
            std::io::ErrorKind::NotFound => Status::not_found(text),
            std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem => {
                Status::permission_denied(text)
            }
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Status::resource_exhausted(text),
            _ => Status::failed_precondition(text),
        },
        TransferError::Kind { .. } | TransferError::InTheWay { .. } | TransferError::Pseudo { .. } => {
            Status::failed_precondition(text)
        }
        TransferError::Refused { .. } => Status::invalid_argument(text),
        TransferError::TooMany => Status::resource_exhausted(text),
        TransferError::Gone => Status::cancelled(text),
    }
}

fn lost<E>(_: E) -> Status {
    Status::internal("the copying ended without a word")
}

fn part(part: Part) -> Frame {
    Frame::Copy(CopyFrame { frame: Some(part) })
}

async fn download(
    tunnel: &mut Tunnel,
    (root, identity, users): (OwnedFd, Identity, Option<IdRange>),
    start: CopyStart,
) -> Result<(), Status> {
    // A reader that is slow fills the queue, and the thread waits.
    let (sender, mut parts) = mpsc::channel::<Part>(FRAME_QUEUE);
    let outcome = as_user(identity, move || {
        pack(&Base::Root(root), &start.path, &mut |part| sender.blocking_send(seen_inside(users, part)).is_ok())
    })?;
    loop {
        tokio::select! {
            // Cancel safe: a part stays in its channel.
            next = parts.recv() => match next {
                Some(next) => {
                    let sent = tunnel.sender.send(frame(part(next))).await;
                    sent.map_err(|_| Status::cancelled("the user is gone"))?;
                }
                None => return outcome.await.map_err(lost)?,
            },
            // Cancel safe: a level. Dropping the queue ends the thread.
            () = tunnel.sender.closed() => return Err(Status::cancelled("the user is gone")),
        }
    }
}

async fn upload(
    tunnel: &mut Tunnel,
    (root, identity, users): (OwnedFd, Identity, Option<IdRange>),
    start: CopyStart,
) -> Result<(), Status> {
    let (sender, mut parts) = mpsc::channel::<Part>(FRAME_QUEUE);
    let mut outcome = as_user(identity, move || {
        let mut unpack = Unpack::begin(&Base::Root(root), &start.path, &start.name, Policy::into_container())?;
        while let Some(part) = parts.blocking_recv() {
            // What was left out is known where it was.
            unpack.take(seen_outside(users, part))?;
        }
        unpack.finish()
    })?;
    loop {
        tokio::select! {
            // Cancel safe: a oneshot. An end before that of the stream is an error, and more to the point than what comes.
            ended = &mut outcome => return ended.map_err(lost)?.and(Err(lost(()))),
            // Cancel safe: `message` keeps a partly read frame.
            message = tunnel.incoming.message() => {
                let gone = || Status::cancelled("the copy was broken off");
                let Some(Frame::Copy(copy)) = message.ok().flatten().ok_or_else(gone)?.frame else { return Err(gone()) };
                let bytes = copy.encoded_len();
                let Some(part) = copy.frame else { continue };
                let complete = matches!(part, Part::Complete(_));
                // Refused by a thread that has ended: its outcome says why.
                let sent = sender.send(part).await;
                if complete || sent.is_err() {
                    break;
                }
                tunnel.taken(bytes).await?;
            }
        }
    }
    drop(sender);
    outcome.await.map_err(lost)??;
    tunnel.send(part(Part::Done(true))).await
}
