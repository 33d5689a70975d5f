//! Logs, exec, attach, files, ports and images: the API server asks on the session, the agent dials a tunnel and serves the request on it.

mod copy;
mod ports;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use minipod_podshim::protocol::Window;
use minipod_proto::v1::nodes_client::NodesClient;
use minipod_proto::v1::open_stream::Request;
use minipod_proto::v1::tunnel_frame::Frame;
use minipod_proto::v1::{
    AttachStart, ExecFrame, ExecStart, ImageInfo, ImageListResponse, ImageLoadResponse, ImageLoadStart, LogsRequest,
    OpenStream, TerminalSize, Time, TunnelEnd, TunnelFrame, exec_frame,
};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use crate::agent::Agent;
use crate::image::{ImageError, ImageRecord, LoadOptions, gc};
use crate::logs::{LogOptions, read_log};
use crate::session::{SessionError, endpoint};
use crate::shim::{ExecInput, ExecInputs, ExecOutput, ExecProcess, ExecStreams, Shim, ShimError};
use crate::want::{Uid, any_container};
use crate::worker::PodView;

/// Frames between a request and its connection; each holds at most 64 KiB, so a slow reader costs 1 MiB and no more.
const FRAME_QUEUE: usize = 16;
/// Bytes of an archive in one frame.
const PIECE_BYTES: usize = 64 << 10;
/// Requests served at a time on one node.
pub const MAX_STREAMS: usize = 64;
/// How long a tunnel may take to come up: as long as the API server waits for it. To give up sooner would be to fail for a user who still waits.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the last frames may take to a reader that is slow.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(300);

/// Answers an OpenStream in a task of its own, at the API server whose session asked for it: nobody else waits for it.
pub fn open(agent: &Arc<Agent>, server: &str, open: OpenStream) {
    let (agent, server) = (agent.clone(), server.to_owned());
    tokio::spawn(async move {
        let id = open.stream_id.clone();
        if let Err(status) = serve(&agent, &server, open).await {
            tracing::warn!(stream = id, error = status.message(), "a tunnel broke");
        }
    });
}

/// Both directions of a tunnel.
struct Tunnel {
    sender: mpsc::Sender<TunnelFrame>,
    incoming: Streaming<TunnelFrame>,
}

impl Tunnel {
    /// On a connection of its own: what a slow user leaves unread fills a connection's window, and on the session's one it would
    /// hold up the node's heartbeats.
    async fn dial(server: &str, id: String) -> Result<Self, Status> {
        let failed = |error: SessionError| Status::unavailable(crate::report::chain(&error));
        let connected = endpoint(server).map_err(failed)?.connect().await;
        let mut client = NodesClient::new(connected.map_err(SessionError::Connect).map_err(failed)?);
        let (sender, receiver) = mpsc::channel(FRAME_QUEUE);
        // The channel was just made: it has room.
        let _ = sender.send(frame(Frame::Open(id))).await;
        let response = client.tunnel(ReceiverStream::new(receiver)).await?;
        Ok(Self { sender, incoming: response.into_inner() })
    }

    /// So much input was passed on.
    async fn taken(&self, bytes: usize) -> Result<(), Status> {
        if bytes == 0 { Ok(()) } else { self.send(Frame::Taken(bytes as u64)).await }
    }

    async fn send(&self, content: Frame) -> Result<(), Status> {
        self.sender.send(frame(content)).await.map_err(|_| Status::cancelled("the other side is gone"))
    }
}

impl Tunnel {
    /// Waits until the API server has taken all frames and ends its side. Dropping the incoming side earlier would cancel the
    /// stream, and with it what still waits to be sent.
    async fn close(self) {
        let Self { sender, mut incoming } = self;
        drop(sender);
        let ended = async { while let Ok(Some(_)) = incoming.message().await {} };
        if tokio::time::timeout(CLOSE_TIMEOUT, ended).await.is_err() {
            tracing::warn!("the API server does not end a tunnel: its last frames may be lost");
        }
    }
}

fn frame(content: Frame) -> TunnelFrame {
    TunnelFrame { frame: Some(content) }
}

async fn serve(agent: &Arc<Agent>, server: &str, open: OpenStream) -> Result<(), Status> {
    let dial = tokio::time::timeout(OPEN_TIMEOUT, Tunnel::dial(server, open.stream_id)).await;
    let mut tunnel = dial.map_err(|_| Status::deadline_exceeded("the API server did not take the tunnel"))??;
    let outcome = match limit(&agent.streams) {
        Ok(_permit) => match open.request {
            Some(Request::Logs(request)) => logs(agent, &mut tunnel, &open.pod_uid, &request).await,
            Some(Request::Exec(start)) => exec(agent, &mut tunnel, &open.pod_uid, start).await,
            Some(Request::Attach(start)) => attach(agent, &mut tunnel, &open.pod_uid, start).await,
            Some(Request::Copy(start)) => match running(agent, &open.pod_uid, &start.container).await {
                Ok((shim, container, attempt)) => {
                    let users = Uid::parse(&open.pod_uid).and_then(|uid| agent.users_of(&uid));
                    copy::copy(&mut tunnel, (&shim, &container, attempt), users, start).await
                }
                Err(status) => Err(status),
            },
            Some(Request::Port(start)) => match find_pod(agent, &open.pod_uid).await {
                Ok((_, view)) => ports::forward(&mut tunnel, &view, &start).await,
                Err(status) => Err(status),
            },
            Some(Request::ImageLoad(start)) => image_load(agent, &mut tunnel, start).await,
            Some(Request::ImageList(_)) => image_list(agent, &tunnel).await,
            Some(Request::ImagePrune(request)) => image_prune(agent, &tunnel, request.all).await,
            Some(Request::ImageRemove(request)) => image_remove(agent, &tunnel, request.images).await,
            Some(Request::ImageSave(request)) => image_save(agent, &mut tunnel, request.image).await,
            None => {
                Err(Status::unimplemented("this agent does not know the request: is it older than the API server?"))
            }
        },
        Err(status) => Err(status),
    };
    let (code, message) = match outcome {
        Ok(()) => (Code::Ok, String::new()),
        Err(status) => (status.code(), status.message().to_owned()),
    };
    tunnel.send(Frame::End(TunnelEnd { code: code as i32, message })).await?;
    tunnel.close().await;
    Ok(())
}

fn limit(streams: &Arc<Semaphore>) -> Result<tokio::sync::OwnedSemaphorePermit, Status> {
    let busy = |_| Status::resource_exhausted(format!("the node serves {MAX_STREAMS} streams already: end some first"));
    streams.clone().try_acquire_owned().map_err(busy)
}

/// The pod with its runs and supervisor.
async fn find_pod(agent: &Agent, uid: &str) -> Result<(Uid, PodView), Status> {
    let gone = || Status::not_found("the pod is not on its node (any more)");
    let uid = Uid::parse(uid).ok_or_else(gone)?;
    let view = agent.view_once_met(&uid).await.ok_or_else(gone)?;
    if !view.is_met {
        return Err(Status::unavailable(
            "the node's agent has just started, and the pod's supervisor does not answer it",
        ));
    }
    Ok((uid, view))
}

/// The same, and the container that is meant.
async fn find(agent: &Agent, uid: &str, container: &str) -> Result<(Uid, PodView, String), Status> {
    let (uid, view) = find_pod(agent, uid).await?;
    if !container.is_empty() {
        let known = any_container(&view.pod, container).is_some();
        let unknown = || Status::invalid_argument(format!("the pod has no container {container:?}"));
        return if known { Ok((uid, view, container.to_owned())) } else { Err(unknown()) };
    }
    let apps: Vec<String> =
        view.pod.spec.iter().flat_map(|spec| &spec.containers).map(|container| container.name.clone()).collect();
    match apps.as_slice() {
        [only] => Ok((uid, view, only.clone())),
        several => Err(Status::invalid_argument(format!("name one of the containers: {}", several.join(", ")))),
    }
}

// ------------------------------------------------------------------------------------------------------------ logs

async fn logs(agent: &Agent, tunnel: &mut Tunnel, uid: &str, request: &LogsRequest) -> Result<(), Status> {
    let (uid, view, container) = find(agent, uid, &request.container).await?;
    let run = view.runs.get(&container);
    let waiting = || Status::failed_precondition(format!("container {container:?} has not started yet"));
    let run = run.ok_or_else(waiting)?;
    let attempt = if request.previous {
        let first = || Status::failed_precondition(format!("container {container:?} has no previous run"));
        run.previous.ok_or_else(first)?
    } else {
        run.attempt
    };
    let path = agent.paths.log_file(&view.pod, &uid, &container, attempt);
    if !path.exists() && !request.follow {
        return Err(Status::not_found(format!(
            "the log of run {attempt} of container {container:?} is not kept any more"
        )));
    }
    let unsigned = |value: Option<i64>| value.map(|value| u64::try_from(value).unwrap_or(0));
    let ago = unsigned(request.since_seconds).and_then(|s| SystemTime::now().checked_sub(Duration::from_secs(s)));
    let since = request.since_time.map_or(ago, |time| Some(moment(time)));
    let options = LogOptions {
        follow: request.follow,
        tail_lines: unsigned(request.tail_lines),
        since,
        limit_bytes: unsigned(request.limit_bytes),
        timestamps: request.timestamps,
    };
    let over = agent.run_over(&uid, &container, attempt);
    let mut chunks = read_log(path, options, over);
    loop {
        tokio::select! {
            // Cancel safe: a stream's item stays in its channel.
            chunk = chunks.next() => match chunk {
                Some(Ok(data)) => tunnel.send(Frame::Data(data.into())).await?,
                Some(Err(error)) => return Err(Status::internal(crate::report::chain(&error))),
                None => return Ok(()),
            },
            // Cancel safe: nothing more is expected of the reader but its going away.
            message = tunnel.incoming.message() => if !matches!(message, Ok(Some(_))) {
                return Err(Status::cancelled("the reader is gone"));
            },
        }
    }
}

/// Before 1970 there are no logs.
fn moment(time: Time) -> SystemTime {
    let seconds = u64::try_from(time.seconds).unwrap_or(0);
    let nanos = u32::try_from(time.nanos).unwrap_or(0).min(999_999_999);
    SystemTime::UNIX_EPOCH.checked_add(Duration::new(seconds, nanos)).unwrap_or_else(SystemTime::now)
}

// ------------------------------------------------------------------------------------------------------------ exec

/// The supervisor and the run of a container that runs.
async fn running(agent: &Agent, uid: &str, container: &str) -> Result<(Shim, String, u32), Status> {
    let (_, view, container) = find(agent, uid, container).await?;
    let run = view.runs.get(&container).filter(|run| run.running);
    let not_running = || Status::failed_precondition(format!("container {container:?} is not running"));
    let attempt = run.ok_or_else(not_running)?.attempt;
    let shim = view.shim.clone().ok_or_else(not_running)?;
    Ok((shim, container, attempt))
}

async fn exec(agent: &Agent, tunnel: &mut Tunnel, uid: &str, start: ExecStart) -> Result<(), Status> {
    let (shim, container, attempt) = running(agent, uid, &start.container).await?;
    if start.command.is_empty() {
        return Err(Status::invalid_argument("no command"));
    }
    carry(tunnel, shim.exec(&container, attempt, &start.command, exec_streams(&start)).await).await
}

async fn attach(agent: &Agent, tunnel: &mut Tunnel, uid: &str, start: AttachStart) -> Result<(), Status> {
    let (shim, container, attempt) = running(agent, uid, &start.container).await?;
    let streams = ExecStreams { stdin: start.stdin, terminal: start.size.map(window) };
    carry(tunnel, shim.attach(&container, attempt, streams).await).await
}

/// Carries a process' streams until it ends or its user goes.
async fn carry(tunnel: &mut Tunnel, began: Result<ExecProcess, ShimError>) -> Result<(), Status> {
    let process = match began {
        Ok(process) => process,
        Err(error @ ShimError::Refused { .. }) => {
            let text = crate::report::chain(&error);
            return tunnel.send(exec_frame(exec_frame::Frame::Error(text))).await;
        }
        Err(error @ ShimError::TooOld { .. }) => {
            return Err(Status::failed_precondition(crate::report::chain(&error)));
        }
        Err(error) => return Err(Status::unavailable(crate::report::chain(&error))),
    };
    let (mut outputs, inputs) = process.split();
    loop {
        tokio::select! {
            // Cancel safe: output waits in its channel.
            output = outputs.next() => match output {
                Some(ExecOutput::Stdout(data)) => {
                    tunnel.send(exec_frame(exec_frame::Frame::Stdout(data.into()))).await?;
                }
                Some(ExecOutput::Stderr(data)) => {
                    tunnel.send(exec_frame(exec_frame::Frame::Stderr(data.into()))).await?;
                }
                Some(ExecOutput::Exited(code)) => {
                    return tunnel.send(exec_frame(exec_frame::Frame::ExitCode(code))).await;
                }
                None => return Err(Status::unavailable("the pod's supervisor ended")),
            },
            // Cancel safe: input is only taken once there is room for it, and `message` keeps a partly read frame.
            input = next_input(&inputs, &mut tunnel.incoming) => match input {
                Some((permit, input)) => {
                    let bytes = if let ExecInput::Stdin(data) = &input { data.len() } else { 0 };
                    permit.send(input);
                    tunnel.taken(bytes).await?;
                }
                // Dropping its outputs kills an exec'd process.
                None => return Err(Status::cancelled("the user is gone")),
            },
            // Cancel safe: a level. Seen also while a process that reads nothing holds the input back.
            () = tunnel.sender.closed() => return Err(Status::cancelled("the user is gone")),
        }
    }
}

fn exec_streams(start: &ExecStart) -> ExecStreams {
    let terminal = start.tty.then(|| window(start.size.unwrap_or_default()));
    ExecStreams { stdin: start.stdin, terminal }
}

fn window(size: TerminalSize) -> Window {
    Window { rows: size.rows, columns: size.columns }
}

/// Room for input and what the user sends. `None` when the user is gone, and with the user the reason for the process.
async fn next_input<'a>(
    inputs: &'a ExecInputs,
    incoming: &mut Streaming<TunnelFrame>,
) -> Option<(mpsc::Permit<'a, ExecInput>, ExecInput)> {
    // A process that takes no input any more still has output: only the user's going away counts then.
    let permit = match inputs.reserve().await {
        Some(permit) => permit,
        None => loop {
            incoming.message().await.ok().flatten()?;
        },
    };
    loop {
        let input = match incoming.message().await.ok().flatten()?.frame {
            Some(Frame::Exec(ExecFrame { frame: Some(exec_frame::Frame::Stdin(data)) })) => {
                ExecInput::Stdin(data.into())
            }
            Some(Frame::Exec(ExecFrame { frame: Some(exec_frame::Frame::StdinClosed(_)) }) | Frame::End(_)) => {
                ExecInput::StdinClosed
            }
            Some(Frame::Exec(ExecFrame { frame: Some(exec_frame::Frame::Resize(size)) })) => {
                ExecInput::Resize(window(size))
            }
            _ => continue,
        };
        return Some((permit, input));
    }
}

fn exec_frame(content: exec_frame::Frame) -> Frame {
    Frame::Exec(ExecFrame { frame: Some(content) })
}

// ---------------------------------------------------------------------------------------------------------- images

async fn image_load(agent: &Agent, tunnel: &mut Tunnel, start: ImageLoadStart) -> Result<(), Status> {
    let (sender, receiver) = mpsc::channel::<std::io::Result<Vec<u8>>>(FRAME_QUEUE);
    let options = LoadOptions {
        name: (!start.name.is_empty()).then_some(start.name),
        entrypoint: start.entrypoint,
        ..LoadOptions::default()
    };
    let images = agent.images.clone();
    let load = tokio::spawn(async move { images.load_stream(ReceiverStream::new(receiver), options).await });
    let mut complete = false;
    while let Ok(Some(message)) = tunnel.incoming.message().await {
        match message.frame {
            Some(Frame::Data(data)) => {
                // A load that failed early says why below.
                let taken = sender.send(Ok(data.to_vec())).await;
                if taken.is_err() {
                    break;
                }
            }
            Some(Frame::End(end)) => {
                complete = end.code == Code::Ok as i32;
                break;
            }
            _ => {}
        }
    }
    if !complete && !sender.is_closed() {
        let cut = std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "the upload was cut off");
        let _ = sender.send(Err(cut)).await;
    }
    drop(sender);
    let loaded =
        load.await.map_err(|error| Status::internal(error.to_string()))?.map_err(|error| load_status(&error))?;
    agent.images_were_loaded();
    tunnel.send(Frame::ImageLoaded(ImageLoadResponse { images: loaded.iter().map(info).collect() })).await
}

fn load_status(error: &ImageError) -> Status {
    let text = crate::report::chain(error);
    match error {
        ImageError::Io { .. } | ImageError::Locked(_) => Status::internal(text),
        ImageError::TooBig { .. } => Status::resource_exhausted(text),
        ImageError::NotFound(_) => Status::not_found(text),
        ImageError::InUse(_) => Status::failed_precondition(text),
        _ => Status::invalid_argument(text),
    }
}

async fn image_list(agent: &Agent, tunnel: &Tunnel) -> Result<(), Status> {
    let images = agent.images.list().iter().map(info).collect();
    tunnel.send(Frame::Images(ImageListResponse { images })).await
}

async fn image_prune(agent: &Arc<Agent>, tunnel: &Tunnel, all: bool) -> Result<(), Status> {
    let here = agent.clone();
    let pruned = tokio::task::spawn_blocking(move || here.remove_images(|images| gc::prune(images, all))).await;
    let gone = pruned.map_err(|error| Status::internal(error.to_string()))?.map_err(|error| load_status(&error))?;
    tunnel.send(Frame::Images(ImageListResponse { images: gone.iter().map(info).collect() })).await
}

async fn image_remove(agent: &Arc<Agent>, tunnel: &Tunnel, images: Vec<String>) -> Result<(), Status> {
    let here = agent.clone();
    let removed = tokio::task::spawn_blocking(move || {
        let gone: Result<Vec<_>, _> = images.iter().map(|image| here.remove_image(image)).collect();
        gone.map(|gone| gone.into_iter().flatten().collect::<Vec<_>>())
    });
    let gone =
        removed.await.map_err(|error| Status::internal(error.to_string()))?.map_err(|error| load_status(&error))?;
    tunnel.send(Frame::Images(ImageListResponse { images: gone.iter().map(info).collect() })).await
}

/// Where an archive is written to: frames of a tunnel, as fast as they are taken.
struct Pieces(mpsc::Sender<Vec<u8>>);

impl std::io::Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let gone = |_| std::io::Error::from(std::io::ErrorKind::BrokenPipe);
        self.0.blocking_send(bytes.to_vec()).map_err(gone)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

async fn image_save(agent: &Agent, tunnel: &mut Tunnel, image: String) -> Result<(), Status> {
    let (sender, mut pieces) = mpsc::channel(FRAME_QUEUE);
    let images = agent.images.clone();
    let save = tokio::task::spawn_blocking(move || {
        images.save(&image, &mut std::io::BufWriter::with_capacity(PIECE_BYTES, Pieces(sender)))
    });
    loop {
        tokio::select! {
            // Cancel safe: a piece stays in its channel.
            piece = pieces.recv() => match piece {
                Some(piece) => tunnel.send(Frame::Data(piece.into())).await?,
                None => break,
            },
            // Cancel safe: nothing more is expected of the reader but its going away.
            message = tunnel.incoming.message() => if !matches!(message, Ok(Some(_))) {
                return Err(Status::cancelled("the reader is gone"));
            },
        }
    }
    save.await.map_err(|error| Status::internal(error.to_string()))?.map_err(|error| load_status(&error))
}

fn info(image: &ImageRecord) -> ImageInfo {
    ImageInfo {
        names: image.names.clone(),
        digest: image.id.as_str().to_owned(),
        size_bytes: i64::try_from(image.size_bytes).unwrap_or(i64::MAX),
        layers: i64::try_from(image.layers.len()).unwrap_or(i64::MAX),
    }
}
