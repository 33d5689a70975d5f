//! Calls of the API whose requests the caller has encoded and of whose answers it reads what it needs: for load that is not to be what is
//! measured. On the wire they are what the generated client sends.

use std::marker::PhantomData;

use bytes::{Buf, BufMut, Bytes};
use prost::Message;
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic::{Request, Status, Streaming};

/// Answers may be this large: snapshots of a full node are larger than tonic's default.
const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// What is read of an answer.
pub trait Answer: Send + Sync + 'static {
    /// Reads it.
    ///
    /// # Errors
    /// When it is no such message.
    fn read(bytes: &mut DecodeBuf<'_>) -> Result<Self, Status>
    where
        Self: Sized;
}

/// An answer that nobody looks into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unread;

impl Answer for Unread {
    fn read(bytes: &mut DecodeBuf<'_>) -> Result<Unread, Status> {
        bytes.advance(bytes.remaining());
        Ok(Unread)
    }
}

impl<M: Message + Default + Sync + 'static> Answer for M {
    fn read(bytes: &mut DecodeBuf<'_>) -> Result<M, Status> {
        M::decode(bytes).map_err(|error| Status::internal(format!("the server's message cannot be decoded: {error}")))
    }
}

/// Sends bytes as they are, reads `A`s.
struct Raw<A>(PhantomData<fn() -> A>);

impl<A: Answer> Codec for Raw<A> {
    type Encode = Bytes;
    type Decode = A;
    type Encoder = Raw<A>;
    type Decoder = Raw<A>;

    fn encoder(&mut self) -> Raw<A> {
        Raw(PhantomData)
    }

    fn decoder(&mut self) -> Raw<A> {
        Raw(PhantomData)
    }
}

impl<A> Encoder for Raw<A> {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, message: Bytes, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.put(message);
        Ok(())
    }
}

impl<A: Answer> Decoder for Raw<A> {
    type Item = A;
    type Error = Status;

    fn decode(&mut self, bytes: &mut DecodeBuf<'_>) -> Result<Option<A>, Status> {
        A::read(bytes).map(Some)
    }
}

async fn ready(channel: Channel) -> Result<Grpc<Channel>, Status> {
    let mut grpc = Grpc::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
    grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    Ok(grpc)
}

/// One request, one answer. `path` is `/package.Service/Method`.
///
/// # Errors
/// What the server or the connection says.
pub async fn unary<A: Answer>(channel: Channel, path: &'static str, request: Bytes) -> Result<A, Status> {
    let mut grpc = ready(channel).await?;
    let answer = grpc.unary(Request::new(request), PathAndQuery::from_static(path), Raw(PhantomData)).await?;
    Ok(answer.into_inner())
}

/// Requests and answers as they come.
///
/// # Errors
/// As [`unary`].
pub async fn streams<A: Answer>(
    channel: Channel,
    path: &'static str,
    requests: impl tokio_stream::Stream<Item = Bytes> + Send + 'static,
) -> Result<Streaming<A>, Status> {
    let mut grpc = ready(channel).await?;
    let answers = grpc.streaming(Request::new(requests), PathAndQuery::from_static(path), Raw(PhantomData)).await?;
    Ok(answers.into_inner())
}
