//! The KV service, and health.

use super::codec::{RawCodec, Reply};
use super::{Face, REQUEST_OVERHEAD_BYTES, check};
use crate::machine::Replicator;
use crate::refused::Refused;
use crate::state::{Kind, request_command};
use crate::wire::{Compaction, DeleteRange, Malformed, Put, Range, Txn};
use bytes::Bytes;
use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tonic::codegen::{Body, BoxFuture, Service, StdError, http};
use tonic::metadata::MetadataMap;
use tonic::server::{Grpc, NamedService, UnaryService};
use tonic::{Request, Response, Status};

/// A compaction that asks for the space to be free waits at most this long for it.
const PHYSICAL_COMPACTION_WAIT: Duration = Duration::from_secs(10);

/// `etcdserverpb.KV`.
#[derive(Debug)]
pub struct KvService<R>(pub Arc<Face<R>>);

/// `grpc.health.v1.Health`.
#[derive(Debug)]
pub struct HealthService<R>(pub Arc<Face<R>>);

#[derive(Debug, Clone, Copy)]
enum Method {
    Range,
    Put,
    DeleteRange,
    Txn,
    Compact,
    Health,
}

struct Call<R>(Arc<Face<R>>, Method);

impl<R: Replicator> UnaryService<Bytes> for Call<R> {
    type Response = Reply;
    type Future = BoxFuture<Response<Reply>, Status>;

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        let (face, method) = (Arc::clone(&self.0), self.1);
        Box::pin(async move {
            let (metadata, _, body) = request.into_parts();
            let reply = match method {
                Method::Range => face.range(&metadata, &body).await,
                Method::Put => face.put(&metadata, &body).await,
                Method::DeleteRange => face.delete_range(&metadata, &body).await,
                Method::Txn => face.txn(&metadata, &body).await,
                Method::Compact => face.compact(&metadata, &body).await,
                Method::Health => Ok(face.health()),
            };
            reply.map(Response::new)
        })
    }
}

fn unary<R: Replicator, B>(
    face: &Arc<Face<R>>,
    method: Option<Method>,
    request: http::Request<B>,
) -> BoxFuture<http::Response<tonic::body::Body>, Infallible>
where
    B: Body + Send + 'static,
    B::Error: Into<StdError> + Send + 'static,
{
    let Some(method) = method else { return Box::pin(async { Ok(Status::unimplemented("").into_http()) }) };
    let call = Call(Arc::clone(face), method);
    let limit = face.config.max_request_bytes + REQUEST_OVERHEAD_BYTES;
    Box::pin(async move {
        let mut grpc = Grpc::new(RawCodec).max_decoding_message_size(limit);
        Ok(grpc.unary(call, request).await)
    })
}

macro_rules! service {
    ($service:ident, $name:literal, $($path:literal => $method:ident),* $(,)?) => {
        impl<R> Clone for $service<R> {
            fn clone(&self) -> Self {
                Self(Arc::clone(&self.0))
            }
        }
        impl<R> NamedService for $service<R> {
            const NAME: &'static str = $name;
        }
        impl<R: Replicator, B> Service<http::Request<B>> for $service<R>
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
                let method = match request.uri().path() {
                    $($path => Some(Method::$method),)*
                    _ => None,
                };
                unary(&self.0, method, request)
            }
        }
    };
}

service!(KvService, "etcdserverpb.KV",
    "/etcdserverpb.KV/Range" => Range,
    "/etcdserverpb.KV/Put" => Put,
    "/etcdserverpb.KV/DeleteRange" => DeleteRange,
    "/etcdserverpb.KV/Txn" => Txn,
    "/etcdserverpb.KV/Compact" => Compact,
);
service!(HealthService, "grpc.health.v1.Health", "/grpc.health.v1.Health/Check" => Health);

/// What etcd's gRPC library says of bytes that are no message.
pub(super) fn malformed(malformed: Malformed) -> Status {
    Status::internal(format!("grpc: error unmarshalling request: {malformed}"))
}

impl<R: Replicator> Face<R> {
    async fn range(&self, metadata: &MetadataMap, body: &Bytes) -> Result<Reply, Status> {
        let range = Range::decode(body).map_err(malformed)?;
        if range.serializable {
            // A learner's own state will do for these, as in etcd.
            check::key(range.key)?;
        } else {
            self.admit(metadata)?;
            check::key(range.key)?;
            self.replicator.read_index().await.map_err(Refused::from)?;
        }
        let result = self.shared.range(&range)?;
        let mut out = Vec::new();
        result.encode(&mut out);
        Ok(self.reply(result.revision, out))
    }

    async fn put(&self, metadata: &MetadataMap, body: &Bytes) -> Result<Reply, Status> {
        self.admit(metadata)?;
        check::put(&Put::decode(body).map_err(malformed)?)?;
        self.check_quota(body.len()).await?;
        self.change(Kind::Put, body).await
    }

    async fn delete_range(&self, metadata: &MetadataMap, body: &Bytes) -> Result<Reply, Status> {
        self.admit(metadata)?;
        check::key(DeleteRange::decode(body).map_err(malformed)?.key)?;
        self.change(Kind::DeleteRange, body).await
    }

    async fn txn(&self, metadata: &MetadataMap, body: &Bytes) -> Result<Reply, Status> {
        self.admit(metadata)?;
        let (revision, answer) = self.transaction(body).await?;
        Ok(self.reply(revision, answer))
    }

    /// A `TxnRequest` of this process itself; the revision that the answer's header would have, and the answer without it.
    pub(crate) async fn transact(&self, body: &Bytes) -> Result<(i64, Bytes), Status> {
        self.admit(&MetadataMap::new())?;
        self.transaction(body).await
    }

    async fn transaction(&self, body: &Bytes) -> Result<(i64, Bytes), Status> {
        let (reads, serializable, puts) = {
            let txn = Txn::decode(body).map_err(malformed)?;
            check::txn(&txn, self.config.max_txn_ops)?;
            (txn.is_read_only(), txn.is_serializable(), txn.puts())
        };
        if !reads {
            if puts {
                self.check_quota(body.len()).await?;
            }
            return self.changed(Kind::Txn, body).await;
        }
        if !serializable {
            self.replicator.read_index().await.map_err(Refused::from)?;
        }
        let txn = Txn::decode(body).map_err(malformed)?;
        let mut out = Vec::new();
        let store = self.shared.read();
        store.read_txn(&txn, &mut out)?;
        Ok((store.revision(), out.into()))
    }

    async fn compact(&self, metadata: &MetadataMap, body: &Bytes) -> Result<Reply, Status> {
        self.admit(metadata)?;
        let physical = Compaction::decode(body).map_err(malformed)?.physical;
        let reply = self.change(Kind::Compact, body).await?;
        if physical {
            let swept = async {
                while self.shared.read().has_garbage() {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            };
            tokio::time::timeout(PHYSICAL_COMPACTION_WAIT, swept).await.map_err(|_| Refused::Timeout)?;
        }
        Ok(reply)
    }

    async fn change(&self, kind: Kind, body: &Bytes) -> Result<Reply, Status> {
        let (revision, answer) = self.changed(kind, body).await?;
        Ok(self.reply(revision, answer))
    }

    async fn changed(&self, kind: Kind, body: &Bytes) -> Result<(i64, Bytes), Status> {
        self.check_size(body.len())?;
        let outcome = self.replicator.propose(request_command(kind, body)).await.map_err(Refused::from)?;
        Ok((outcome.revision, outcome.result?))
    }

    /// SERVING (1) while there is a leader, NOT_SERVING (2) otherwise.
    fn health(&self) -> Reply {
        let serving = self.replicator.status().leader_id != 0;
        Reply { head: vec![1 << 3, if serving { 1 } else { 2 }], ..Reply::default() }
    }
}
