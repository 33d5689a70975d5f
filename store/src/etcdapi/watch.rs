//! The Watch service.

use super::Face;
use super::codec::{RawCodec, Reply};
use super::kv::malformed;
use crate::machine::Replicator;
use crate::refused::Refused;
use crate::watch::WatchStream;
use crate::watch::outbox::{Frame, What};
use crate::wire::{self, WatchRequest};
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::oneshot;
use tonic::codegen::{Body, BoxFuture, Service, StdError, http};
use tonic::server::{Grpc, NamedService, StreamingService};
use tonic::{Request, Response, Status, Streaming};

/// How often a stream that asked for a leader looks for one; it ends after two looks in vain.
const LEADER_CHECK: Duration = Duration::from_secs(2);

/// `etcdserverpb.Watch`.
#[derive(Debug)]
pub struct WatchService<R>(pub Arc<Face<R>>);

impl<R> Clone for WatchService<R> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<R> NamedService for WatchService<R> {
    const NAME: &'static str = "etcdserverpb.Watch";
}

impl<R: Replicator, B> Service<http::Request<B>> for WatchService<R>
where
    B: Body + Send + 'static,
    B::Error: Into<StdError> + Send + 'static,
{
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let call = Call(Arc::clone(&self.0));
        Box::pin(async move {
            if request.uri().path() != "/etcdserverpb.Watch/Watch" {
                return Ok(Status::unimplemented("").into_http());
            }
            Ok(Grpc::new(RawCodec).streaming(call, request).await)
        })
    }
}

struct Call<R>(Arc<Face<R>>);

type Replies = Pin<Box<dyn Stream<Item = Result<Reply, Status>> + Send>>;

impl<R: Replicator> StreamingService<Bytes> for Call<R> {
    type Response = Reply;
    type ResponseStream = Replies;
    type Future = BoxFuture<Response<Replies>, Status>;

    fn call(&mut self, request: Request<Streaming<Bytes>>) -> Self::Future {
        let face = Arc::clone(&self.0);
        Box::pin(async move { face.watch(request).map(Response::new) })
    }
}

impl<R: Replicator> Face<R> {
    fn watch(self: &Arc<Self>, request: Request<Streaming<Bytes>>) -> Result<Replies, Status> {
        self.admit(request.metadata())?;
        let wants_leader = request.metadata().get("hasleader").is_some_and(|value| value.as_bytes() == b"true");
        let stream = self.watches.open();
        let face = Arc::clone(self);
        let frames = stream.frames().map(move |frame| Ok(face.frame(frame)));
        let (end, ended) = oneshot::channel();
        // The task ends with the client's half of the stream, and the stream's watches with the task; when the answers
        // are dropped, `closed` tells it.
        let reader = Reader { face: Arc::clone(self), stream, requests: request.into_inner(), end };
        tokio::spawn(reader.run(wants_leader));
        // The reason for which the reader ended the stream comes after the last frame.
        let last = futures_util::stream::once(ended).filter_map(async |end| end.ok().map(Err));
        Ok(Box::pin(frames.chain(last)))
    }

    fn frame(&self, frame: Frame) -> Reply {
        let mut head = self.encoded_header(frame.revision);
        wire::put_int(&mut head, 2, frame.watch_id);
        let mut shared = Vec::new();
        match frame.what {
            What::Created { refused } => {
                wire::put_flag(&mut head, 3, true);
                wire::put_flag(&mut head, 4, refused.is_some());
                wire::put_bytes(&mut head, 6, refused.unwrap_or_default().as_bytes());
            }
            What::Canceled { compact_revision } => {
                wire::put_flag(&mut head, 4, true);
                wire::put_int(&mut head, 5, compact_revision);
            }
            What::Progress => {}
            What::Events { events, fragment } => {
                wire::put_flag(&mut head, 7, fragment);
                shared = events;
            }
        }
        Reply { head, body: Bytes::new(), shared }
    }
}

/// Reads what the client wants.
struct Reader<R> {
    face: Arc<Face<R>>,
    stream: WatchStream,
    requests: Streaming<Bytes>,
    /// Why the stream ends, unless the client ended it.
    end: oneshot::Sender<Status>,
}

impl<R: Replicator> Reader<R> {
    async fn run(mut self, wants_leader: bool) {
        let mut leader_check = tokio::time::interval(LEADER_CHECK);
        let mut checks_in_vain = 0;
        let mut stopping = std::pin::pin!(self.face.stopping());
        let reason = loop {
            self.stream.readable().await;
            // Cancel safe: a message that was not taken stays in the stream, a tick is only postponed, and
            // `closed` and `stopping` change nothing.
            tokio::select! {
                () = self.end.closed() => return,
                () = &mut stopping => break Refused::Stopped.into(),
                _ = leader_check.tick(), if wants_leader => {
                    let leads = self.face.replicator.status().leader_id != 0;
                    checks_in_vain = if leads { 0 } else { checks_in_vain + 1 };
                    if checks_in_vain >= 2 {
                        break Refused::NoLeader.into();
                    }
                }
                message = self.requests.message() => match message {
                    Ok(Some(request)) => if let Err(reason) = self.request(&request) {
                        break reason;
                    },
                    // The client has nothing more to ask: as in etcd, its watches end.
                    Ok(None) | Err(_) => return,
                },
            }
        };
        // When the client is gone there is nobody to tell.
        let _ = self.end.send(reason);
    }

    fn request(&self, request: &Bytes) -> Result<(), Status> {
        match WatchRequest::decode(request).map_err(malformed)? {
            WatchRequest::Create(create) => self.stream.create(&create),
            WatchRequest::Cancel(id) => self.stream.cancel(id),
            WatchRequest::Progress => self.stream.request_progress(),
            WatchRequest::None => {}
        }
        Ok(())
    }
}
