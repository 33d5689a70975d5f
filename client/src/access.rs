//! Logs of containers, processes and files in them, images on nodes.

use std::future::ready;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use minipod_proto::v1::images_client::ImagesClient;
use minipod_proto::v1::pod_access_client::PodAccessClient;
use minipod_proto::v1::{
    AttachStart, CopyFrame, CopyStart, ExecFrame, ExecStart, ImageChunk, ImageListRequest, ImageListSummary,
    ImageLoadRequest, ImageLoadStart, ImageLoadSummary, ImagePruneRequest, ImageRemoveRequest, ImageSaveRequest,
    LogChunk, LogsRequest, PortFrame, PortStart, TerminalSize, copy_frame, exec_frame, image_load_request, port_frame,
};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Response, Status, Streaming};

use crate::client::Client;
use crate::error::{ClientError, Operation};
use crate::servers::Retry;

/// Frames of stdin under way between [`Exec`]'s user and the connection: a little to keep both busy, since a frame is up to
/// some ten KiB; the sender waits when the process does not read.
const STDIN_FRAMES: usize = 8;

/// A log on its way. Dropping it ends the reading.
#[derive(Debug)]
pub struct Logs {
    stream: Streaming<LogChunk>,
    operation: Operation,
}

impl Logs {
    /// The next bytes; `None` at the end. Cancel safe.
    ///
    /// # Errors
    /// When the log's node goes away, the log cannot be read or the connection breaks.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        match self.stream.message().await {
            Ok(chunk) => Ok(chunk.map(|chunk| chunk.data)),
            Err(status) => Err(ClientError::from_status(self.operation.clone(), &status)),
        }
    }
}

/// An image's archive on its way. Dropping it ends the reading.
#[derive(Debug)]
pub struct ImageArchive {
    stream: Streaming<ImageChunk>,
    operation: Operation,
}

impl ImageArchive {
    /// The next bytes; `None` when the archive is complete. Cancel safe.
    ///
    /// # Errors
    /// When the image's node goes away, the image cannot be read or the connection breaks: what came is of no use then.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        match self.stream.message().await {
            Ok(chunk) => Ok(chunk.map(|chunk| chunk.data)),
            Err(status) => Err(ClientError::from_status(self.operation.clone(), &status)),
        }
    }
}

/// What a process says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecOutput {
    /// On its standard output.
    Stdout(Bytes),
    /// On its standard error.
    Stderr(Bytes),
    /// It ended: its exit code, 128 + signal when it was killed. Nothing follows.
    Exit(i32),
}

/// A process in a container. Dropping it closes the stream; the process loses its standard streams.
#[derive(Debug)]
pub struct Exec {
    frames: Streaming<ExecFrame>,
    stdin: Option<mpsc::Sender<ExecFrame>>,
    terminal: Option<mpsc::Sender<ExecFrame>>,
    _held: Option<mpsc::Sender<ExecFrame>>,
    operation: Operation,
}

/// The standard input of a process in a container. Dropping it closes that input.
#[derive(Debug)]
pub struct ExecStdin {
    frames: mpsc::Sender<ExecFrame>,
}

impl ExecStdin {
    /// Sends bytes; waits while the process does not read. `false`: the process is gone and reads nothing more.
    pub async fn write(&self, data: Bytes) -> bool {
        self.frames.send(frame(exec_frame::Frame::Stdin(data))).await.is_ok()
    }

    /// Says that there is no more input.
    pub async fn close(self) {
        // When the process is gone there is nobody to tell.
        let _ = self.frames.send(frame(exec_frame::Frame::StdinClosed(true))).await;
    }
}

/// The terminal of a process in a container. While it exists the process' input is not at its end.
#[derive(Debug)]
pub struct ExecTerminal {
    frames: mpsc::Sender<ExecFrame>,
}

impl ExecTerminal {
    /// Tells the terminal's size; waits while the process takes nothing. `false`: the process is gone.
    pub async fn resize(&self, size: TerminalSize) -> bool {
        self.frames.send(frame(exec_frame::Frame::Resize(size))).await.is_ok()
    }
}

impl Exec {
    /// The process' terminal; `None` if it was started without, or the terminal was taken before.
    pub fn take_terminal(&mut self) -> Option<ExecTerminal> {
        self.terminal.take().map(|frames| ExecTerminal { frames })
    }

    /// The process' standard input; `None` if it was started without, or the input was taken before.
    pub fn take_stdin(&mut self) -> Option<ExecStdin> {
        self.stdin.take().map(|frames| ExecStdin { frames })
    }

    /// What the process says next. After [`ExecOutput::Exit`] do not ask again. Cancel safe.
    ///
    /// # Errors
    /// `Refused` with the reason when it could not be started; else the connection broke.
    pub async fn next(&mut self) -> Result<ExecOutput, ClientError> {
        loop {
            let operation = || self.operation.clone();
            match self.frames.message().await {
                Ok(Some(ExecFrame { frame: Some(frame) })) => match frame {
                    exec_frame::Frame::Stdout(data) => return Ok(ExecOutput::Stdout(data)),
                    exec_frame::Frame::Stderr(data) => return Ok(ExecOutput::Stderr(data)),
                    exec_frame::Frame::ExitCode(code) => return Ok(ExecOutput::Exit(code)),
                    exec_frame::Frame::Error(message) => {
                        return Err(ClientError::Refused { operation: operation(), message });
                    }
                    // Only clients send these.
                    exec_frame::Frame::Start(_)
                    | exec_frame::Frame::Attach(_)
                    | exec_frame::Frame::Stdin(_)
                    | exec_frame::Frame::StdinClosed(_)
                    | exec_frame::Frame::Resize(_) => {}
                },
                // A frame of a kind that this build does not know.
                Ok(Some(ExecFrame { frame: None })) => {}
                Ok(None) => {
                    let message = "the stream ended before the process did".to_owned();
                    return Err(ClientError::Answer { operation: operation(), message });
                }
                Err(status) => return Err(ClientError::from_status(operation(), &status)),
            }
        }
    }
}

/// What comes from a program in a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PortEvent {
    /// Bytes.
    Data(Bytes),
    /// It sends no more. It may still read.
    Closed,
}

/// From a program in a pod. Dropping it closes the connection.
#[derive(Debug)]
pub struct PortReader {
    frames: Streaming<PortFrame>,
    operation: Operation,
}

impl PortReader {
    /// What comes next; `None` when both directions have ended. Cancel safe.
    ///
    /// # Errors
    /// When nothing listens there, or the connection broke.
    pub async fn next(&mut self) -> Result<Option<PortEvent>, ClientError> {
        loop {
            match self.frames.message().await {
                Ok(Some(PortFrame { frame: Some(port_frame::Frame::Data(data)) })) => {
                    return Ok(Some(PortEvent::Data(data)));
                }
                Ok(Some(PortFrame { frame: Some(port_frame::Frame::Closed(_)) })) => {
                    return Ok(Some(PortEvent::Closed));
                }
                // Only clients send a start; what this build does not know is passed over.
                Ok(Some(PortFrame { frame: Some(port_frame::Frame::Start(_)) | None })) => {}
                Ok(None) => return Ok(None),
                Err(status) => return Err(ClientError::from_status(self.operation.clone(), &status)),
            }
        }
    }
}

/// To a program in a pod. Dropping it ends this direction.
#[derive(Debug)]
pub struct PortWriter {
    frames: mpsc::Sender<PortFrame>,
}

impl PortWriter {
    /// Sends bytes; waits while the program does not read. `false`: the connection is over.
    pub async fn send(&self, data: Bytes) -> bool {
        self.frames.send(port_frame(port_frame::Frame::Data(data))).await.is_ok()
    }

    /// Says that no more will be sent.
    pub async fn close(self) {
        // When the connection is over there is nobody to tell.
        let _ = self.frames.send(port_frame(port_frame::Frame::Closed(true))).await;
    }
}

/// Files on their way out of a container or into it. Dropping it breaks the copy off.
#[derive(Debug)]
pub struct Copy {
    frames: Streaming<CopyFrame>,
    sender: Option<mpsc::Sender<CopyFrame>>,
    operation: Operation,
}

/// The way into a container. Dropping it without `complete` breaks the copy off.
#[derive(Debug)]
pub struct CopySender {
    frames: mpsc::Sender<CopyFrame>,
}

impl CopySender {
    /// Sends a part of the tree; waits while the node takes nothing. `false`: the copy has ended, [`Copy::next`] says how.
    pub async fn send(&self, frame: copy_frame::Frame) -> bool {
        self.frames.send(CopyFrame { frame: Some(frame) }).await.is_ok()
    }

    /// The same from a thread of its own.
    pub fn blocking_send(&self, frame: copy_frame::Frame) -> bool {
        self.frames.blocking_send(CopyFrame { frame: Some(frame) }).is_ok()
    }
}

impl Copy {
    /// The way in; `None` if it was taken before.
    pub fn take_sender(&mut self) -> Option<CopySender> {
        self.sender.take().map(|frames| CopySender { frames })
    }

    /// What comes next; `None` at the end. Cancel safe.
    ///
    /// # Errors
    /// When the copy failed, or the connection broke.
    pub async fn next(&mut self) -> Result<Option<copy_frame::Frame>, ClientError> {
        loop {
            match self.frames.message().await {
                Ok(Some(CopyFrame { frame: Some(frame) })) => return Ok(Some(frame)),
                // Of a kind that this build does not know.
                Ok(Some(CopyFrame { frame: None })) => {}
                Ok(None) => return Ok(None),
                Err(status) => return Err(ClientError::from_status(self.operation.clone(), &status)),
            }
        }
    }
}

impl Client {
    /// Begins a call in which both sides send frames, with the first of this side. A server that was not reached has taken nothing, so the
    /// next one gets the same first frame.
    async fn converse<F, A, Fut>(
        &self,
        operation: &Operation,
        first: F,
        begin: impl Fn(PodAccessClient<Channel>, ReceiverStream<F>) -> Fut,
    ) -> Result<(Streaming<A>, mpsc::Sender<F>), ClientError>
    where
        F: Clone,
        Fut: Future<Output = Result<Response<Streaming<A>>, Status>>,
    {
        let call = |channel| {
            let (sender, receiver) = mpsc::channel(STDIN_FRAMES);
            // The channel is new and empty: there is room for the first frame.
            let _ = sender.try_send(first.clone());
            let begun = begin(PodAccessClient::new(channel), ReceiverStream::new(receiver));
            async move { Ok(begun.await?.map(|frames| (frames, sender))) }
        };
        self.call(operation.clone(), Retry::NeverSent, call).await
    }

    /// Copies files out of a running container or into it.
    ///
    /// # Errors
    /// `NotFound` for the pod or container, `Invalid` when a container must be named, and what any call can meet.
    pub async fn copy(&self, start: CopyStart) -> Result<Copy, ClientError> {
        let what = format!("Pod {}/{}", start.namespace, start.pod);
        let operation = Operation::new(if start.upload { "copy to" } else { "copy from" }, what);
        let first = CopyFrame { frame: Some(copy_frame::Frame::Start(start)) };
        let (frames, sender) =
            self.converse(&operation, first, |mut access, frames| async move { access.copy(frames).await }).await?;
        Ok(Copy { frames, sender: Some(sender), operation })
    }

    /// Connects to a port of a pod's loopback interface. That nothing listens there is told by the first [`PortReader::next`].
    ///
    /// # Errors
    /// `NotFound` for the pod, and what any call can meet.
    pub async fn port_forward(&self, start: PortStart) -> Result<(PortReader, PortWriter), ClientError> {
        let what = format!("Pod {}/{}", start.namespace, start.pod);
        let operation = Operation::new("connect to a port of", what);
        let first = port_frame(port_frame::Frame::Start(start));
        let (frames, sender) = self
            .converse(&operation, first, |mut access, frames| async move { access.port_forward(frames).await })
            .await?;
        Ok((PortReader { frames, operation }, PortWriter { frames: sender }))
    }

    /// Reads a container's log.
    ///
    /// # Errors
    /// `NotFound` for the pod or container, `Invalid` when a container must be named, and what any call can meet.
    pub async fn logs(&self, request: LogsRequest) -> Result<Logs, ClientError> {
        let operation = Operation::new("read the logs of", format!("Pod {}/{}", request.namespace, request.pod));
        let call = |channel| {
            let request = request.clone();
            async move { PodAccessClient::new(channel).logs(request).await }
        };
        let stream = self.call(operation.clone(), Retry::Always, call).await?;
        Ok(Logs { stream, operation })
    }

    /// Starts a process in a container. With `start.stdin` its input comes from [`Exec::take_stdin`].
    ///
    /// # Errors
    /// `NotFound` for the pod or container, `Invalid` when a container must be named, and what any call can meet.
    pub async fn exec(&self, start: ExecStart) -> Result<Exec, ClientError> {
        let operation = Operation::new("run a command in", format!("Pod {}/{}", start.namespace, start.pod));
        let (with_stdin, with_terminal) = (start.stdin, start.tty);
        let first = frame(exec_frame::Frame::Start(start));
        let (frames, stdin) =
            self.converse(&operation, first, |mut access, frames| async move { access.exec(frames).await }).await?;
        let terminal = with_terminal.then(|| stdin.clone());
        Ok(Exec { frames, stdin: with_stdin.then_some(stdin), terminal, _held: None, operation })
    }

    /// Takes part in the streams of a container's own process, from now on. What comes is as of [`Client::exec`]; dropping it leaves
    /// the process alone. `tty`: the container has a terminal, whose size [`Exec::take_terminal`] can change.
    ///
    /// # Errors
    /// `NotFound` for the pod or container, `Invalid` when a container must be named, and what any call can meet.
    pub async fn attach(&self, start: AttachStart, tty: bool) -> Result<Exec, ClientError> {
        let operation = Operation::new("attach to", format!("Pod {}/{}", start.namespace, start.pod));
        let with_stdin = start.stdin;
        let first = frame(exec_frame::Frame::Attach(start));
        let (frames, sender) =
            self.converse(&operation, first, |mut access, frames| async move { access.attach(frames).await }).await?;
        let terminal = tty.then(|| sender.clone());
        // Held while the streams are used: the end of this side would be the end of the input.
        let (stdin, held) = if with_stdin { (Some(sender), None) } else { (None, Some(sender)) };
        Ok(Exec { frames, stdin, terminal, _held: held, operation })
    }

    /// Loads an image archive into nodes. `data` is the file's bytes in pieces of at most a few hundred KiB; when it yields an
    /// error the load is broken off and nothing is stored.
    ///
    /// # Errors
    /// `Input` when `data` fails, and what any call can meet. What went wrong on a node is in the summary.
    pub async fn load_image(
        &self,
        start: ImageLoadStart,
        data: impl Stream<Item = io::Result<Bytes>> + Send + 'static,
    ) -> Result<ImageLoadSummary, ClientError> {
        let operation = Operation::new("load", "image");
        self.choose().await;
        let (failed, failure) = oneshot::channel();
        let mut failed = Some(failed);
        let message = |message| ImageLoadRequest { message: Some(message) };
        let first = message(image_load_request::Message::Start(start));
        let pieces = data.flat_map(move |piece| match piece {
            Ok(data) => stream::once(ready(message(image_load_request::Message::Data(data)))).left_stream(),
            Err(error) => {
                if let Some(failed) = failed.take() {
                    let _ = failed.send(error);
                }
                // The request of a broken file must not end well: it stays open until the failure below drops it.
                stream::pending().right_stream()
            }
        });
        // A broken-off request looks to a tonic server like one that ended: only this says that the file is whole.
        let last = message(image_load_request::Message::Complete(true));
        let pieces = stream::once(ready(first)).chain(pieces).chain(stream::once(ready(last)));
        let mut api = ImagesClient::new(self.channel());
        let call = api.load(pieces);
        tokio::select! {
            // Cancel safe: a oneshot keeps its value. An error means that the file was read to its end.
            Ok(source) = failure => Err(ClientError::Input { operation, source: Arc::new(source) }),
            // Not polled again after the other arm wins: dropping it resets the stream, and the server discards what came.
            answer = call => match answer {
                Ok(answer) => Ok(answer.into_inner()),
                Err(status) => Err(self.failure(operation, status)),
            },
        }
    }

    /// The images in the nodes' stores; empty `nodes`: of every ready node.
    ///
    /// # Errors
    /// What any call can meet. What went wrong on a node is in the summary.
    pub async fn list_images(&self, nodes: Vec<String>) -> Result<ImageListSummary, ClientError> {
        let call = |channel| {
            let request = ImageListRequest { nodes: nodes.clone() };
            async move { ImagesClient::new(channel).list(request).await }
        };
        self.call(Operation::new("list", "images"), Retry::Always, call).await
    }

    /// Removes images that no pod of their node uses, with `all` also those that have a name; empty `nodes`: on every ready node.
    ///
    /// # Errors
    /// What any call can meet. What went, and what went wrong on a node, is in the summary.
    pub async fn prune_images(&self, nodes: Vec<String>, all: bool) -> Result<ImageListSummary, ClientError> {
        let call = |channel| {
            let request = ImagePruneRequest { nodes: nodes.clone(), all };
            async move { ImagesClient::new(channel).prune(request).await }
        };
        self.call(Operation::new("prune", "images"), Retry::Always, call).await
    }

    /// Takes names from images, and with its last name an image; empty `nodes`: on every ready node.
    ///
    /// # Errors
    /// What any call can meet. What went, and what went wrong on a node (a pod uses the image), is in the summary.
    pub async fn remove_images(
        &self,
        nodes: Vec<String>,
        images: Vec<String>,
    ) -> Result<ImageListSummary, ClientError> {
        let operation = Operation::new("remove", format!("images {}", images.join(", ")));
        let call = |channel| {
            let request = ImageRemoveRequest { nodes: nodes.clone(), images: images.clone() };
            async move { ImagesClient::new(channel).remove(request).await }
        };
        // A second call would find nothing, and say so.
        self.call(operation, Retry::NeverSent, call).await
    }

    /// Reads an image of the first of `nodes` that has it (empty: of all ready ones) as one tar file.
    ///
    /// # Errors
    /// `NotFound` when none has it, and what any call can meet.
    pub async fn save_image(&self, nodes: Vec<String>, image: &str) -> Result<ImageArchive, ClientError> {
        let operation = Operation::new("save", format!("image {image}"));
        let call = |channel| {
            let request = ImageSaveRequest { nodes: nodes.clone(), image: image.to_owned() };
            async move { ImagesClient::new(channel).save(request).await }
        };
        let stream = self.call(operation.clone(), Retry::Always, call).await?;
        Ok(ImageArchive { stream, operation })
    }
}

fn port_frame(frame: port_frame::Frame) -> PortFrame {
    PortFrame { frame: Some(frame) }
}

fn frame(frame: exec_frame::Frame) -> ExecFrame {
    ExecFrame { frame: Some(frame) }
}
