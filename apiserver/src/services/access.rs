//! PodAccess and Images: what rides on tunnels.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::join_all;
use minipod_proto::{
    Kind,
    v1::{
        AttachStart, CopyFrame, CopyStart, ExecFrame, ExecStart, ImageChunk, ImageInfo, ImageListRequest,
        ImageListSummary, ImageLoadRequest, ImageLoadStart, ImageLoadSummary, ImagePruneRequest, ImageRemoveRequest,
        ImageSaveRequest, LogChunk, LogsRequest, Pod, PortFrame, PortStart, TunnelEnd, TunnelFrame, copy_frame,
        exec_frame, image_list_summary, image_load_request, image_load_summary, images_server,
        open_stream::Request as Ask, pod_access_server, port_frame, tunnel_frame::Frame,
    },
};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

use crate::{
    cache::Filter,
    error::ApiError,
    keys,
    registry::Registry,
    tunnels::{Tunnel, Tunnels, frame},
};

/// Messages on their way to a user; the rest waits in the transport, and at last in the node.
const READY: usize = 16;
/// A user's stream begins with its start within this time.
const FIRST_MESSAGE: Duration = Duration::from_secs(10);
/// After a complete image the node unpacks it; a large one on a slow disk takes its time.
const UNPACK: Duration = Duration::from_secs(300);
/// A node that takes no byte of an image for so long is given up.
const STALL: Duration = Duration::from_secs(60);
/// Input that an agent has not passed on yet. Below the 1 MiB that its stream takes unread, so that the end of the stream gets through
/// to an agent whose program reads nothing.
const INPUT_BYTES: usize = 256 << 10;
/// A node lists its images within this time.
const LISTING: Duration = Duration::from_secs(15);

/// The implementation of both services.
#[derive(Clone)]
pub struct AccessApi {
    registry: Arc<Registry>,
    tunnels: Arc<Tunnels>,
}

impl AccessApi {
    /// Over its parts.
    pub fn new(registry: Arc<Registry>, tunnels: Arc<Tunnels>) -> AccessApi {
        AccessApi { registry, tunnels }
    }

    /// The pod, its node, and the container that is meant.
    async fn find(&self, namespace: &str, name: &str, container: &str) -> Result<(Pod, String, String), ApiError> {
        let (pod, node) = self.find_pod(namespace, name).await?;
        let container = container_of(&pod, &keys::object_key(Kind::Pod, namespace, name)?, container)?;
        Ok((pod, node, container))
    }

    /// The pod and its node.
    async fn find_pod(&self, namespace: &str, name: &str) -> Result<(Pod, String), ApiError> {
        let key = keys::object_key(Kind::Pod, namespace, name)?;
        let entry = self.registry.read(Kind::Pod, &key).await?;
        let pod = entry
            .and_then(|entry| Pod::try_from(entry.object).ok())
            .ok_or(ApiError::NotFound { kind: Kind::Pod, key: key.clone() })?;
        let node = pod.node_name().map(str::to_owned);
        let node = node.ok_or_else(|| ApiError::Precondition(format!("pod {key} is not bound to a node yet")))?;
        Ok((pod, node))
    }

    fn ready_nodes(&self, wanted: &[String]) -> Result<Vec<String>, ApiError> {
        if !wanted.is_empty() {
            wanted.iter().try_for_each(|node| keys::check_name("nodes", node))?;
            for node in wanted {
                if self.registry.cache.get(Kind::Node, node).is_none() {
                    return Err(ApiError::NotFound { kind: Kind::Node, key: node.clone() });
                }
            }
            return Ok(wanted.to_vec());
        }
        let (nodes, _) = self.registry.cache.list(Kind::Node, &Filter::everything(Kind::Node)?);
        let ready = nodes.iter().filter(|entry| entry.object.as_node().is_some_and(|node| node.is_ready()));
        let ready: Vec<String> = ready.map(|entry| entry.key.clone()).collect();
        if ready.is_empty() {
            return Err(ApiError::Precondition("there is no ready node".into()));
        }
        Ok(ready)
    }
}

fn check_not_ended(pod: &Pod, namespace: &str, name: &str) -> Result<(), ApiError> {
    let phase = &pod.status().phase;
    if phase == "Running" || phase == "Pending" {
        return Ok(());
    }
    Err(ApiError::Precondition(format!("pod {namespace}/{name} has ended: {phase}")))
}

fn container_of(pod: &Pod, key: &str, wanted: &str) -> Result<String, ApiError> {
    let names = || pod.spec().all_containers().map(|container| container.name.as_str()).collect::<Vec<_>>().join(", ");
    match (wanted, pod.spec().containers.as_slice()) {
        ("", [only]) => Ok(only.name.clone()),
        ("", _) => Err(ApiError::Invalid(format!("container: pod {key} has several, say which one: {}", names()))),
        (wanted, _) if pod.spec().container(wanted).is_some() => Ok(wanted.to_owned()),
        (wanted, _) if pod.spec().ephemeral_container(wanted).is_some() => Ok(wanted.to_owned()),
        (wanted, _) => {
            let wanted: String = wanted.chars().take(64).collect();
            Err(ApiError::Invalid(format!("container: pod {key} has no {wanted:?}; it has {}", names())))
        }
    }
}

#[tonic::async_trait]
impl pod_access_server::PodAccess for AccessApi {
    type LogsStream = ReceiverStream<Result<LogChunk, Status>>;
    type ExecStream = ReceiverStream<Result<ExecFrame, Status>>;
    type AttachStream = ReceiverStream<Result<ExecFrame, Status>>;
    type CopyStream = ReceiverStream<Result<CopyFrame, Status>>;
    type PortForwardStream = ReceiverStream<Result<PortFrame, Status>>;

    async fn logs(&self, request: Request<LogsRequest>) -> Result<Response<Self::LogsStream>, Status> {
        let mut request = request.into_inner();
        let (pod, node, container) = self.find(&request.namespace, &request.pod, &request.container).await?;
        request.container = container;
        let uid = &pod.metadata.unwrap_or_default().uid;
        let tunnel = self.tunnels.open(&node, Ask::Logs(request), uid).await?;
        let (out, receiver) = mpsc::channel(READY);
        tokio::spawn(pump_data(tunnel, out, |data| LogChunk { data }));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn exec(&self, request: Request<Streaming<ExecFrame>>) -> Result<Response<Self::ExecStream>, Status> {
        let mut inbound = request.into_inner();
        let first = tokio::time::timeout(FIRST_MESSAGE, inbound.message()).await;
        let mut start: ExecStart = match first {
            Ok(Ok(Some(ExecFrame { frame: Some(exec_frame::Frame::Start(start)) }))) => start,
            _ => return Err(ApiError::Invalid("frame: an exec begins with start".into()).into()),
        };
        if start.command.is_empty() {
            return Err(ApiError::Invalid("start.command: empty; say what to run".into()).into());
        }
        let (pod, node, container) = self.find(&start.namespace, &start.pod, &start.container).await?;
        check_not_ended(&pod, &start.namespace, &start.pod)?;
        start.container = container;
        let uid = &pod.metadata.unwrap_or_default().uid;
        let tunnel = self.tunnels.open(&node, Ask::Exec(start), uid).await?;
        let (out, receiver) = mpsc::channel(READY);
        tokio::spawn(pump(tunnel, inbound, out));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn attach(&self, request: Request<Streaming<ExecFrame>>) -> Result<Response<Self::AttachStream>, Status> {
        let mut inbound = request.into_inner();
        let first = tokio::time::timeout(FIRST_MESSAGE, inbound.message()).await;
        let mut start: AttachStart = match first {
            Ok(Ok(Some(ExecFrame { frame: Some(exec_frame::Frame::Attach(start)) }))) => start,
            _ => return Err(ApiError::Invalid("frame: an attach begins with attach".into()).into()),
        };
        let (pod, node, container) = self.find(&start.namespace, &start.pod, &start.container).await?;
        check_not_ended(&pod, &start.namespace, &start.pod)?;
        start.container = container;
        let uid = &pod.metadata.unwrap_or_default().uid;
        let tunnel = self.tunnels.open(&node, Ask::Attach(start), uid).await?;
        let (out, receiver) = mpsc::channel(READY);
        tokio::spawn(pump(tunnel, inbound, out));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn copy(&self, request: Request<Streaming<CopyFrame>>) -> Result<Response<Self::CopyStream>, Status> {
        let mut inbound = request.into_inner();
        let first = tokio::time::timeout(FIRST_MESSAGE, inbound.message()).await;
        let mut start: CopyStart = match first {
            Ok(Ok(Some(CopyFrame { frame: Some(copy_frame::Frame::Start(start)) }))) => start,
            _ => return Err(ApiError::Invalid("frame: a copy begins with start".into()).into()),
        };
        if !start.path.starts_with(b"/") {
            let path = String::from_utf8_lossy(&start.path).into_owned();
            return Err(ApiError::Invalid(format!("start.path: found {path:?}, want an absolute path")).into());
        }
        let (pod, node, container) = self.find(&start.namespace, &start.pod, &start.container).await?;
        check_not_ended(&pod, &start.namespace, &start.pod)?;
        start.container = container;
        let uid = &pod.metadata.unwrap_or_default().uid;
        let tunnel = self.tunnels.open(&node, Ask::Copy(start), uid).await?;
        let (out, receiver) = mpsc::channel(READY);
        tokio::spawn(pump(tunnel, inbound, out));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn port_forward(
        &self,
        request: Request<Streaming<PortFrame>>,
    ) -> Result<Response<Self::PortForwardStream>, Status> {
        let mut inbound = request.into_inner();
        let first = tokio::time::timeout(FIRST_MESSAGE, inbound.message()).await;
        let start: PortStart = match first {
            Ok(Ok(Some(PortFrame { frame: Some(port_frame::Frame::Start(start)) }))) => start,
            _ => return Err(ApiError::Invalid("frame: a connection begins with start".into()).into()),
        };
        if !(1..=u32::from(u16::MAX)).contains(&start.port) {
            let port = start.port;
            return Err(ApiError::Invalid(format!("start.port: {port} is not between 1 and 65535")).into());
        }
        let (pod, node) = self.find_pod(&start.namespace, &start.pod).await?;
        check_not_ended(&pod, &start.namespace, &start.pod)?;
        let uid = &pod.metadata.unwrap_or_default().uid;
        let tunnel = self.tunnels.open(&node, Ask::Port(start), uid).await?;
        let (out, receiver) = mpsc::channel(READY);
        tokio::spawn(pump(tunnel, inbound, out));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

/// What flows both ways between a user and an agent.
trait TwoWay: Sized + Send + 'static {
    /// Of a tunnel's frame, if it is of this kind.
    fn from_agent(frame: Frame) -> Option<Self>;
    /// For the tunnel, if a user may send it.
    fn into_frame(self) -> Option<Frame>;
    /// Bytes of input in it.
    fn weight(&self) -> usize;
    /// Says that the user sends no more.
    fn closed() -> Frame;
}

impl TwoWay for ExecFrame {
    fn from_agent(frame: Frame) -> Option<Self> {
        if let Frame::Exec(exec) = frame { Some(exec) } else { None }
    }

    fn into_frame(self) -> Option<Frame> {
        use exec_frame::Frame::{Resize, Stdin, StdinClosed};
        matches!(self.frame, Some(Stdin(_) | StdinClosed(_) | Resize(_))).then_some(Frame::Exec(self))
    }

    fn weight(&self) -> usize {
        if let Some(exec_frame::Frame::Stdin(data)) = &self.frame { data.len() } else { 0 }
    }

    fn closed() -> Frame {
        Frame::Exec(ExecFrame { frame: Some(exec_frame::Frame::StdinClosed(true)) })
    }
}

impl TwoWay for PortFrame {
    fn from_agent(frame: Frame) -> Option<Self> {
        if let Frame::Port(port) = frame { Some(port) } else { None }
    }

    fn into_frame(self) -> Option<Frame> {
        use port_frame::Frame::{Closed, Data};
        matches!(self.frame, Some(Data(_) | Closed(_))).then_some(Frame::Port(self))
    }

    fn weight(&self) -> usize {
        if let Some(port_frame::Frame::Data(data)) = &self.frame { data.len() } else { 0 }
    }

    fn closed() -> Frame {
        Frame::Port(PortFrame { frame: Some(port_frame::Frame::Closed(true)) })
    }
}

impl TwoWay for CopyFrame {
    fn from_agent(frame: Frame) -> Option<Self> {
        if let Frame::Copy(copy) = frame { Some(copy) } else { None }
    }

    fn into_frame(self) -> Option<Frame> {
        use copy_frame::Frame::{Complete, Data, Entry, Left};
        matches!(self.frame, Some(Entry(_) | Data(_) | Left(_) | Complete(_))).then_some(Frame::Copy(self))
    }

    fn weight(&self) -> usize {
        prost::Message::encoded_len(self)
    }

    /// Not `complete`: a user who breaks off sends this too.
    fn closed() -> Frame {
        Frame::End(TunnelEnd::default())
    }
}

async fn pump_data<T>(mut tunnel: Tunnel, out: mpsc::Sender<Result<T, Status>>, chunk_of: fn(Bytes) -> T) {
    loop {
        // Both arms are cancel safe. A user who leaves ends the tunnel, and the agent sees that.
        let next = tokio::select! {
            next = tunnel.next() => next,
            () = out.closed() => return,
        };
        let chunk = match next {
            Ok(Some(Frame::Data(data))) => Ok(chunk_of(data)),
            Ok(Some(_)) => continue,
            Ok(None) => return,
            Err(status) => Err(status),
        };
        let last = chunk.is_err();
        if out.send(chunk).await.is_err() || last {
            return;
        }
    }
}

async fn pump<T: TwoWay>(mut tunnel: Tunnel, inbound: Streaming<T>, out: mpsc::Sender<Result<T, Status>>) {
    let to_agent = tunnel.outbound.clone();
    // Apart from the other direction: a process that does not read its input must not hold up its output.
    let credit = Arc::new(Semaphore::new(INPUT_BYTES));
    let input = tokio::spawn(pump_input(inbound, to_agent, Arc::clone(&credit)));
    loop {
        // Both arms are cancel safe.
        let next = tokio::select! {
            next = tunnel.next() => next,
            () = out.closed() => break,
        };
        let sent = match next {
            Ok(Some(Frame::Taken(bytes))) => {
                // Never more than at first, whatever an agent says.
                let missing = INPUT_BYTES.saturating_sub(credit.available_permits());
                credit.add_permits(usize::try_from(bytes).unwrap_or(usize::MAX).min(missing));
                Ok(())
            }
            Ok(Some(frame)) => match T::from_agent(frame) {
                Some(content) => out.send(Ok(content)).await,
                None => Ok(()),
            },
            Ok(None) => break,
            Err(status) => {
                // The user may be gone; then there is nobody to tell.
                let _ = out.send(Err(status)).await;
                break;
            }
        };
        if sent.is_err() {
            break;
        }
    }
    input.abort();
}

async fn pump_input<T: TwoWay>(
    mut inbound: Streaming<T>,
    to_agent: mpsc::Sender<Result<TunnelFrame, Status>>,
    credit: Arc<Semaphore>,
) {
    while let Ok(Some(content)) = inbound.message().await {
        let weight = u32::try_from(content.weight().min(INPUT_BYTES)).unwrap_or(0);
        // Closed by nobody: it waits until the agent takes more, or this task is ended.
        let Ok(permit) = credit.acquire_many(weight).await else { return };
        permit.forget();
        if let Some(content) = content.into_frame()
            && to_agent.send(frame(content)).await.is_err()
        {
            return;
        }
    }
    // The user sends no more, or has gone; a process that still runs sees the end of its input.
    let _ = to_agent.send(frame(T::closed())).await;
}

/// A piece of an image on its way to one node.
enum Piece {
    Data(Bytes),
    Complete,
}

#[tonic::async_trait]
impl images_server::Images for AccessApi {
    async fn load(&self, request: Request<Streaming<ImageLoadRequest>>) -> Result<Response<ImageLoadSummary>, Status> {
        let mut inbound = request.into_inner();
        let first = tokio::time::timeout(FIRST_MESSAGE, inbound.message()).await;
        let start: ImageLoadStart = match first {
            Ok(Ok(Some(ImageLoadRequest { message: Some(image_load_request::Message::Start(start)) }))) => start,
            _ => return Err(ApiError::Invalid("message: a load begins with start".into()).into()),
        };
        let nodes = self.ready_nodes(&start.nodes)?;
        let (mut senders, mut loads) = (Vec::new(), Vec::new());
        for node in &nodes {
            let (sender, pieces) = mpsc::channel(READY);
            senders.push(sender);
            let (tunnels, node, start) = (Arc::clone(&self.tunnels), node.clone(), start.clone());
            loads.push(tokio::spawn(async move { load_one(&tunnels, &node, start, pieces).await }));
        }
        let mut complete = false;
        while let Some(message) = inbound.message().await? {
            let data = match message.message {
                Some(image_load_request::Message::Data(data)) => data,
                Some(image_load_request::Message::Complete(_)) => {
                    complete = true;
                    break;
                }
                Some(image_load_request::Message::Start(_)) | None => continue,
            };
            for sender in &senders {
                // A node that has failed takes no more; its error is in its result.
                let _ = sender.send(Piece::Data(data.clone())).await;
            }
        }
        // A call that was broken off looks like one that ended: without the last message the nodes must not take the half for the whole.
        for sender in senders.into_iter().filter(|_| complete) {
            let _ = sender.send(Piece::Complete).await;
        }
        let mut summary = ImageLoadSummary::default();
        for (node, load) in nodes.into_iter().zip(loads) {
            let result =
                load.await.unwrap_or_else(|error| Err(Status::internal(format!("the load has ended early: {error}"))));
            let (images, error) = parts(result);
            summary.nodes.push(image_load_summary::PerNode { node, images, error });
        }
        Ok(Response::new(summary))
    }

    async fn list(&self, request: Request<ImageListRequest>) -> Result<Response<ImageListSummary>, Status> {
        let nodes = self.ready_nodes(&request.into_inner().nodes)?;
        Ok(Response::new(self.ask_all(nodes, &Ask::ImageList(ImageListRequest::default()), LISTING).await))
    }

    async fn prune(&self, request: Request<ImagePruneRequest>) -> Result<Response<ImageListSummary>, Status> {
        let request = request.into_inner();
        let nodes = self.ready_nodes(&request.nodes)?;
        let ask = Ask::ImagePrune(ImagePruneRequest { nodes: Vec::new(), all: request.all });
        Ok(Response::new(self.ask_all(nodes, &ask, UNPACK).await))
    }

    async fn remove(&self, request: Request<ImageRemoveRequest>) -> Result<Response<ImageListSummary>, Status> {
        let request = request.into_inner();
        if request.images.is_empty() {
            return Err(ApiError::Invalid("images: empty; say which to remove".into()).into());
        }
        let nodes = self.ready_nodes(&request.nodes)?;
        let ask = Ask::ImageRemove(ImageRemoveRequest { nodes: Vec::new(), images: request.images });
        Ok(Response::new(self.ask_all(nodes, &ask, UNPACK).await))
    }

    type SaveStream = ReceiverStream<Result<ImageChunk, Status>>;

    async fn save(&self, request: Request<ImageSaveRequest>) -> Result<Response<Self::SaveStream>, Status> {
        let request = request.into_inner();
        if request.image.is_empty() {
            return Err(ApiError::Invalid("image: empty; say which to save".into()).into());
        }
        let mut refused = Status::not_found(format!("no ready node has image {:?}", request.image));
        for node in self.ready_nodes(&request.nodes)? {
            match self.begin_save(&node, &request.image).await {
                Ok((tunnel, first)) => {
                    let (out, receiver) = mpsc::channel(READY);
                    // The channel was just made: it has room.
                    let _ = out.send(Ok(ImageChunk { data: first })).await;
                    tokio::spawn(pump_data(tunnel, out, |data| ImageChunk { data }));
                    return Ok(Response::new(ReceiverStream::new(receiver)));
                }
                // Another one may have it.
                Err(status) if status.code() == Code::NotFound => {}
                Err(status) => refused = Status::new(status.code(), format!("node {node}: {}", status.message())),
            }
        }
        Err(refused)
    }
}

impl AccessApi {
    /// A node's image once its first bytes are there: until then another node can be asked.
    async fn begin_save(&self, node: &str, image: &str) -> Result<(Tunnel, Bytes), Status> {
        let ask = Ask::ImageSave(ImageSaveRequest { nodes: Vec::new(), image: image.to_owned() });
        let mut tunnel = self.tunnels.open(node, ask, "").await?;
        let first = async {
            loop {
                match tunnel.next().await? {
                    Some(Frame::Data(data)) => return Ok(data),
                    Some(_) => {}
                    None => return Err(Status::unavailable("the stream has ended without an answer")),
                }
            }
        };
        // It reads all layers once before it writes any.
        let first = tokio::time::timeout(UNPACK, first).await;
        let late = |_| Status::deadline_exceeded(format!("nothing came within {} s", UNPACK.as_secs()));
        let first = first.map_err(late)??;
        Ok((tunnel, first))
    }

    /// Asks nodes for images, all at once.
    async fn ask_all(&self, nodes: Vec<String>, ask: &Ask, patience: Duration) -> ImageListSummary {
        let lists = nodes.into_iter().map(|node| async {
            let listed = tokio::time::timeout(patience, ask_one(&self.tunnels, &node, ask.clone())).await;
            let listed = listed.unwrap_or_else(|_| {
                Err(Status::deadline_exceeded(format!("no answer within {} s", patience.as_secs())))
            });
            let (images, error) = parts(listed);
            image_list_summary::PerNode { node, images, error }
        });
        ImageListSummary { nodes: join_all(lists).await }
    }
}

fn parts(result: Result<Vec<ImageInfo>, Status>) -> (Vec<ImageInfo>, String) {
    match result {
        Ok(images) => (images, String::new()),
        Err(status) => (Vec::new(), status.message().to_owned()),
    }
}

async fn load_one(
    tunnels: &Tunnels,
    node: &str,
    start: ImageLoadStart,
    mut pieces: mpsc::Receiver<Piece>,
) -> Result<Vec<ImageInfo>, Status> {
    let mut tunnel = tunnels.open(node, Ask::ImageLoad(start), "").await?;
    let outbound = tunnel.outbound.clone();
    let feed = async {
        while let Some(piece) = pieces.recv().await {
            let (sent, complete) = match piece {
                Piece::Data(data) => (Frame::Data(data), false),
                Piece::Complete => (Frame::End(TunnelEnd::default()), true),
            };
            match tokio::time::timeout(STALL, outbound.send(frame(sent))).await {
                Ok(Ok(())) if complete => return Ok(()),
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Err(Status::unavailable(format!("node {node} has closed the stream"))),
                Err(_) => {
                    return Err(Status::deadline_exceeded(format!(
                        "node {node} took nothing for {} s",
                        STALL.as_secs()
                    )));
                }
            }
        }
        Err(Status::aborted("the upload broke off"))
    };
    // Both arms are cancel safe. An answer before the end of the image is an error of the node's, and more to the point than ours.
    tokio::select! {
        biased;
        early = answer(&mut tunnel) => return early,
        fed = feed => fed?,
    }
    let unpacked = tokio::time::timeout(UNPACK, answer(&mut tunnel)).await;
    unpacked.unwrap_or_else(|_| {
        Err(Status::deadline_exceeded(format!("node {node} did not unpack it within {} s", UNPACK.as_secs())))
    })
}

async fn ask_one(tunnels: &Tunnels, node: &str, ask: Ask) -> Result<Vec<ImageInfo>, Status> {
    let mut tunnel = tunnels.open(node, ask, "").await?;
    answer(&mut tunnel).await
}

async fn answer(tunnel: &mut Tunnel) -> Result<Vec<ImageInfo>, Status> {
    loop {
        match tunnel.next().await? {
            Some(Frame::Images(list)) => return Ok(list.images),
            Some(Frame::ImageLoaded(loaded)) => return Ok(loaded.images),
            Some(_) => {}
            None => {
                return Err(Status::unavailable(format!(
                    "node {} has ended the stream without an answer",
                    tunnel.node
                )));
            }
        }
    }
}
