//! PodAccess and Images of the fake.

use std::pin::Pin;

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use minipod_proto::Kind;
use minipod_proto::v1::images_server::Images;
use minipod_proto::v1::pod_access_server::PodAccess;
use minipod_proto::v1::{
    CopyFrame, ExecFrame, ImageChunk, ImageInfo, ImageListRequest, ImageListSummary, ImageLoadRequest,
    ImageLoadSummary, ImagePruneRequest, ImageRemoveRequest, ImageSaveRequest, LogChunk, LogsRequest, PortFrame,
    copy_frame, exec_frame::Frame, image_list_summary, image_load_request, image_load_summary, port_frame,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::Shared;

/// Frames under way from a process of the fake to its user.
const EXEC_QUEUE: usize = 4;

#[tonic::async_trait]
impl PodAccess for Shared {
    type LogsStream = Pin<Box<dyn Stream<Item = Result<LogChunk, Status>> + Send>>;
    type ExecStream = Pin<Box<dyn Stream<Item = Result<ExecFrame, Status>> + Send>>;
    type AttachStream = Pin<Box<dyn Stream<Item = Result<ExecFrame, Status>> + Send>>;
    type CopyStream = Pin<Box<dyn Stream<Item = Result<CopyFrame, Status>> + Send>>;
    type PortForwardStream = Pin<Box<dyn Stream<Item = Result<PortFrame, Status>> + Send>>;

    /// The text that the test set, in pieces of seven bytes.
    async fn logs(&self, request: Request<LogsRequest>) -> Result<Response<Self::LogsStream>, Status> {
        let request = request.into_inner();
        let mut state = self.call("logs")?;
        let key = format!("{}/{}/{}", request.namespace, request.pod, request.container);
        let log = state.logs.get(&key).cloned();
        let follow = request.follow;
        state.log_requests.push(request);
        let log = log.ok_or_else(|| Status::not_found(format!("no log of {key}")))?;
        let pieces: Vec<_> = log.chunks(7).map(|piece| Ok(LogChunk { data: log.slice_ref(piece) })).collect();
        let pieces = stream::iter(pieces);
        Ok(Response::new(if follow { Box::pin(pieces.chain(stream::pending())) } else { Box::pin(pieces) }))
    }

    /// An echo on port 7; nothing listens on any other.
    async fn port_forward(
        &self,
        request: Request<Streaming<PortFrame>>,
    ) -> Result<Response<Self::PortForwardStream>, Status> {
        let mut input = request.into_inner();
        drop(self.call("port_forward")?);
        let Some(PortFrame { frame: Some(port_frame::Frame::Start(start)) }) = input.message().await? else {
            return Err(Status::invalid_argument("the first frame must be start"));
        };
        let (sender, receiver) = mpsc::channel(EXEC_QUEUE);
        tokio::spawn(async move {
            if start.port != 7 {
                let refused = Status::failed_precondition(format!("nothing listens on port {}", start.port));
                let _ = sender.send(Err(refused)).await;
                return;
            }
            while let Ok(Some(frame)) = input.message().await {
                let last = matches!(frame.frame, Some(port_frame::Frame::Closed(_)));
                if sender.send(Ok(frame)).await.is_err() || last {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    /// What is copied in is kept for the test; what is copied out is what the test put there, whatever the path.
    async fn copy(&self, request: Request<Streaming<CopyFrame>>) -> Result<Response<Self::CopyStream>, Status> {
        let mut input = request.into_inner();
        let out = self.call("copy")?.copy_out.clone();
        let Some(CopyFrame { frame: Some(copy_frame::Frame::Start(start)) }) = input.message().await? else {
            return Err(Status::invalid_argument("the first frame must be start"));
        };
        if !start.upload {
            let frames: Vec<_> = out.into_iter().map(|frame| Ok(CopyFrame { frame: Some(frame) })).collect();
            return Ok(Response::new(Box::pin(stream::iter(frames))));
        }
        // Answered before the files come, as a server does that only passes them on.
        let (sender, receiver) = mpsc::channel(EXEC_QUEUE);
        let shared = self.clone();
        tokio::spawn(async move {
            let mut frames = vec![copy_frame::Frame::Start(start)];
            while let Some(frame) = input.message().await.ok().flatten().and_then(|message| message.frame) {
                let last = matches!(frame, copy_frame::Frame::Complete(_));
                frames.push(frame);
                if last {
                    shared.lock().copied_in.push(frames);
                    let _ = sender.send(Ok(CopyFrame { frame: Some(copy_frame::Frame::Done(true)) })).await;
                    return;
                }
            }
            let _ = sender.send(Err(Status::aborted("the copy was broken off"))).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    /// Every container is a `cat` that ends with 5 at the end of its input.
    async fn attach(&self, request: Request<Streaming<ExecFrame>>) -> Result<Response<Self::AttachStream>, Status> {
        let mut input = request.into_inner();
        drop(self.call("attach")?);
        let Some(ExecFrame { frame: Some(Frame::Attach(start)) }) = input.message().await? else {
            return Err(Status::invalid_argument("the first frame must be attach"));
        };
        let (sender, receiver) = mpsc::channel(EXEC_QUEUE);
        tokio::spawn(async move {
            if !start.stdin {
                let _ = sender.send(Ok(frame(Frame::Stdout(Bytes::from_static(b"attached\n"))))).await;
                let _ = sender.send(Ok(frame(Frame::ExitCode(4)))).await;
                return;
            }
            cat(&mut input, &sender).await;
            let _ = sender.send(Ok(frame(Frame::ExitCode(5)))).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    /// Knows `cat`, `exit N`, `echo TEXT`, `err TEXT`; everything else cannot be started.
    async fn exec(&self, request: Request<Streaming<ExecFrame>>) -> Result<Response<Self::ExecStream>, Status> {
        let mut input = request.into_inner();
        drop(self.call("exec")?);
        let Some(ExecFrame { frame: Some(Frame::Start(start)) }) = input.message().await? else {
            return Err(Status::invalid_argument("the first frame must be start"));
        };
        let key = format!("{}/{}", start.namespace, start.pod);
        if !self.lock().objects.contains_key(&(Kind::Pod, key.clone())) {
            return Err(Status::not_found(format!("Pod {key:?} not found")));
        }
        let (sender, receiver) = mpsc::channel(EXEC_QUEUE);
        tokio::spawn(async move {
            let words: Vec<&str> = start.command.iter().map(String::as_str).collect();
            let text = |words: &[&str]| Bytes::from(words.join(" ") + "\n");
            let last = match words[..] {
                ["cat"] => cat(&mut input, &sender).await,
                ["exit", code] => Frame::ExitCode(code.parse().unwrap_or(1)),
                ["echo", ref words @ ..] => {
                    let _ = sender.send(Ok(frame(Frame::Stdout(text(words))))).await;
                    Frame::ExitCode(0)
                }
                ["err", ref words @ ..] => {
                    let _ = sender.send(Ok(frame(Frame::Stderr(text(words))))).await;
                    Frame::ExitCode(1)
                }
                _ => Frame::Error(format!("start {:?}: no such file", words.first().unwrap_or(&""))),
            };
            let _ = sender.send(Ok(frame(last))).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

async fn cat(input: &mut Streaming<ExecFrame>, sender: &mpsc::Sender<Result<ExecFrame, Status>>) -> Frame {
    loop {
        match input.message().await {
            Ok(Some(ExecFrame { frame: Some(Frame::Stdin(data)) })) => {
                if sender.send(Ok(frame(Frame::Stdout(data)))).await.is_err() {
                    return Frame::ExitCode(141);
                }
            }
            Ok(Some(ExecFrame { frame: Some(Frame::StdinClosed(_)) })) | Ok(None) => return Frame::ExitCode(0),
            Ok(Some(_)) => {}
            Err(_) => return Frame::ExitCode(129),
        }
    }
}

fn frame(frame: Frame) -> ExecFrame {
    ExecFrame { frame: Some(frame) }
}

#[tonic::async_trait]
impl Images for Shared {
    async fn load(&self, request: Request<Streaming<ImageLoadRequest>>) -> Result<Response<ImageLoadSummary>, Status> {
        let mut input = request.into_inner();
        drop(self.call("load")?);
        let Some(ImageLoadRequest { message: Some(image_load_request::Message::Start(start)) }) =
            input.message().await?
        else {
            return Err(Status::invalid_argument("the first message must be start"));
        };
        let (mut file, mut complete) = (Vec::new(), false);
        while let Some(message) = input.message().await? {
            match message.message {
                Some(image_load_request::Message::Data(data)) => file.extend_from_slice(&data),
                Some(image_load_request::Message::Complete(_)) => complete = true,
                Some(image_load_request::Message::Start(_)) | None => {}
            }
        }
        if !complete {
            return Err(Status::cancelled("the load was broken off"));
        }
        let name = if start.name.is_empty() { "fake:latest".to_owned() } else { start.name.clone() };
        let size_bytes = i64::try_from(file.len()).unwrap_or(i64::MAX);
        let image = ImageInfo { names: vec![name], digest: "sha256:fake".into(), size_bytes, layers: 1 };
        let mut state = self.lock();
        let nodes: Vec<String> = match start.nodes.is_empty() {
            true => state.objects.keys().filter(|(kind, _)| *kind == Kind::Node).map(|(_, key)| key.clone()).collect(),
            false => start.nodes.clone(),
        };
        state.images.push((start, file));
        let per_node = |node| image_load_summary::PerNode { node, images: vec![image.clone()], error: String::new() };
        Ok(Response::new(ImageLoadSummary { nodes: nodes.into_iter().map(per_node).collect() }))
    }

    async fn remove(&self, _: Request<ImageRemoveRequest>) -> Result<Response<ImageListSummary>, Status> {
        drop(self.call("remove_images")?);
        Ok(Response::new(ImageListSummary::default()))
    }

    type SaveStream = ReceiverStream<Result<ImageChunk, Status>>;

    async fn save(&self, _: Request<ImageSaveRequest>) -> Result<Response<Self::SaveStream>, Status> {
        drop(self.call("save_image")?);
        Err(Status::not_found("the fake keeps no image"))
    }

    async fn prune(&self, _: Request<ImagePruneRequest>) -> Result<Response<ImageListSummary>, Status> {
        drop(self.call("prune_images")?);
        Ok(Response::new(ImageListSummary::default()))
    }

    async fn list(&self, request: Request<ImageListRequest>) -> Result<Response<ImageListSummary>, Status> {
        let state = self.call("list_images")?;
        let wanted = request.into_inner().nodes;
        let nodes = state.objects.keys().filter(|(kind, _)| *kind == Kind::Node).map(|(_, key)| key.clone());
        let nodes = nodes.filter(|node| wanted.is_empty() || wanted.contains(node));
        let images: Vec<ImageInfo> = state
            .images
            .iter()
            .map(|(start, file)| ImageInfo {
                names: vec![start.name.clone()],
                digest: "sha256:fake".into(),
                size_bytes: i64::try_from(file.len()).unwrap_or(i64::MAX),
                layers: 1,
            })
            .collect();
        let per_node = |node| image_list_summary::PerNode { node, images: images.clone(), error: String::new() };
        Ok(Response::new(ImageListSummary { nodes: nodes.map(per_node).collect() }))
    }
}
