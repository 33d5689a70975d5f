//! PodAccess and Images: what rides on tunnels.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::join_all;
use minipod_proto::{
    Kind,
    v1::{
        ExecFrame, ExecStart, ImageInfo, ImageListRequest, ImageListSummary, ImageLoadRequest, ImageLoadStart,
        ImageLoadSummary, LogChunk, LogsRequest, Pod, TunnelEnd, exec_frame, image_list_summary, image_load_request,
        image_load_summary, images_server, open_stream::Request as Ask, pod_access_server, tunnel_frame::Frame,
    },
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

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
        let key = keys::object_key(Kind::Pod, namespace, name)?;
        let entry = self.registry.read(Kind::Pod, &key).await?;
        let pod = entry
            .and_then(|entry| Pod::try_from(entry.object).ok())
            .ok_or(ApiError::NotFound { kind: Kind::Pod, key: key.clone() })?;
        let node = pod.node_name().map(str::to_owned);
        let node = node.ok_or_else(|| ApiError::Precondition(format!("pod {key} is not bound to a node yet")))?;
        let container = container_of(&pod, &key, container)?;
        Ok((pod, node, container))
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

fn container_of(pod: &Pod, key: &str, wanted: &str) -> Result<String, ApiError> {
    let names = || pod.spec().all_containers().map(|container| container.name.as_str()).collect::<Vec<_>>().join(", ");
    match (wanted, pod.spec().containers.as_slice()) {
        ("", [only]) => Ok(only.name.clone()),
        ("", _) => Err(ApiError::Invalid(format!("container: pod {key} has several, say which one: {}", names()))),
        (wanted, _) if pod.spec().container(wanted).is_some() => Ok(wanted.to_owned()),
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

    async fn logs(&self, request: Request<LogsRequest>) -> Result<Response<Self::LogsStream>, Status> {
        let mut request = request.into_inner();
        let (pod, node, container) = self.find(&request.namespace, &request.pod, &request.container).await?;
        request.container = container;
        let uid = &pod.metadata.unwrap_or_default().uid;
        let tunnel = self.tunnels.open(&node, Ask::Logs(request), uid).await?;
        let (out, receiver) = mpsc::channel(READY);
        tokio::spawn(pump_logs(tunnel, out));
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
        if pod.status().phase != "Running" && pod.status().phase != "Pending" {
            let phase = &pod.status().phase;
            return Err(
                ApiError::Precondition(format!("pod {}/{} has ended: {phase}", start.namespace, start.pod)).into()
            );
        }
        start.container = container;
        let uid = &pod.metadata.unwrap_or_default().uid;
        let tunnel = self.tunnels.open(&node, Ask::Exec(start), uid).await?;
        let (out, receiver) = mpsc::channel(READY);
        tokio::spawn(pump_exec(tunnel, inbound, out));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

async fn pump_logs(mut tunnel: Tunnel, out: mpsc::Sender<Result<LogChunk, Status>>) {
    loop {
        // Both arms are cancel safe. A user who leaves ends the tunnel, and the agent sees that.
        let next = tokio::select! {
            next = tunnel.next() => next,
            () = out.closed() => return,
        };
        let chunk = match next {
            Ok(Some(Frame::Data(data))) => Ok(LogChunk { data }),
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

async fn pump_exec(mut tunnel: Tunnel, inbound: Streaming<ExecFrame>, out: mpsc::Sender<Result<ExecFrame, Status>>) {
    let to_agent = tunnel.outbound.clone();
    // Apart from the other direction: a process that does not read its input must not hold up its output.
    let input = tokio::spawn(pump_input(inbound, to_agent));
    loop {
        // Both arms are cancel safe.
        let next = tokio::select! {
            next = tunnel.next() => next,
            () = out.closed() => break,
        };
        let sent = match next {
            Ok(Some(Frame::Exec(exec))) => out.send(Ok(exec)).await,
            Ok(Some(_)) => Ok(()),
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

async fn pump_input(
    mut inbound: Streaming<ExecFrame>,
    to_agent: mpsc::Sender<Result<minipod_proto::v1::TunnelFrame, Status>>,
) {
    while let Ok(Some(exec)) = inbound.message().await {
        if matches!(
            exec.frame,
            Some(exec_frame::Frame::Stdin(_) | exec_frame::Frame::StdinClosed(_) | exec_frame::Frame::Resize(_))
        ) && to_agent.send(frame(Frame::Exec(exec))).await.is_err()
        {
            return;
        }
    }
    // The user sends no more, or has gone; a process that still runs sees the end of its input.
    let closed = ExecFrame { frame: Some(exec_frame::Frame::StdinClosed(true)) };
    let _ = to_agent.send(frame(Frame::Exec(closed))).await;
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
        let lists = nodes.into_iter().map(|node| async {
            let listed = tokio::time::timeout(LISTING, list_one(&self.tunnels, &node)).await;
            let listed = listed.unwrap_or_else(|_| {
                Err(Status::deadline_exceeded(format!("no answer within {} s", LISTING.as_secs())))
            });
            let (images, error) = parts(listed);
            image_list_summary::PerNode { node, images, error }
        });
        Ok(Response::new(ImageListSummary { nodes: join_all(lists).await }))
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

async fn list_one(tunnels: &Tunnels, node: &str) -> Result<Vec<ImageInfo>, Status> {
    let mut tunnel = tunnels.open(node, Ask::ImageList(ImageListRequest::default()), "").await?;
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
