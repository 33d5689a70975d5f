//! Messages that are put together from bytes which are encoded already.
//!
//! A watch event, a list and a session's pods carry objects as the cache holds them. Encoding them is copying; nothing is walked
//! again, however many watchers there are. The services of api.proto that send them are wrapped ([`Objects`], [`Nodes`]): their
//! few methods are served here, everything else by the generated code.

use std::{
    convert::Infallible,
    marker::PhantomData,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::{Buf, BufMut, Bytes};
use minipod_proto::{
    Kind,
    v1::{
        AgentMessage, CreateRequest, ListRequest, ServerMessage, WatchRequest, nodes_server::NodesServer,
        objects_server::ObjectsServer,
    },
};
use prost::{
    Message,
    encoding::{encode_varint, encoded_len_varint},
};
use tonic::{
    Request, Response, Status,
    body::Body,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    codegen::{BoxFuture, Service, http},
    server::{Grpc, NamedService, ServerStreamingService, StreamingService, UnaryService},
};

use crate::{
    cache::{Delivery, Entry},
    services::{nodes::NodesApi, objects::ObjectsApi},
};

/// Requests may be this large; larger ones are answered OUT_OF_RANGE by the transport before anything is decoded.
pub const REQUEST_LIMIT_BYTES: usize = 4 * 1024 * 1024;

/// Something that can be written as the bytes of one protobuf message.
pub trait Encoded: Send + 'static {
    /// Appends the message.
    fn put(&self, out: &mut impl BufMut);
}

/// A [`ListResponse`](minipod_proto::v1::ListResponse).
pub struct EncodedList {
    /// Of one kind.
    pub kind: Kind,
    /// Its items.
    pub items: Vec<Arc<Entry>>,
    /// Its revision.
    pub revision: i64,
    /// The token of the next page.
    pub next: String,
}

/// An [`Object`](minipod_proto::v1::Object).
pub struct EncodedObject {
    /// Its kind.
    pub kind: Kind,
    /// The encoded inner message.
    pub inner: Bytes,
}

/// A [`WatchEvent`](minipod_proto::v1::WatchEvent).
pub struct EncodedEvent {
    /// Of one kind.
    pub kind: Kind,
    /// What happened.
    pub delivery: Delivery,
}

/// A [`ServerMessage`].
pub enum EncodedMessage {
    /// All pods of a node.
    Snapshot(Vec<Arc<Entry>>),
    /// One pod.
    Upsert(Arc<Entry>),
    /// Anything else.
    Plain(Box<ServerMessage>),
}

/// Length of a field with a length-delimited value.
fn delimited(length: usize) -> usize {
    // The fields used here have numbers below 16: one byte of key.
    1 + encoded_len_varint(length as u64) + length
}

fn put_head(out: &mut impl BufMut, field: u8, length: usize) {
    out.put_u8(field << 3 | 2);
    encode_varint(length as u64, out);
}

fn put_number(out: &mut impl BufMut, field: u8, value: i64) {
    if value != 0 {
        out.put_u8(field << 3);
        // Two's complement, as protobuf has it for int64.
        encode_varint(value as u64, out);
    }
}

/// The field of `Object` that a kind is.
fn object_field(kind: Kind) -> u8 {
    match kind {
        Kind::Pod => 1,
        Kind::Node => 2,
        Kind::Namespace => 3,
        Kind::Event => 4,
        Kind::ConfigMap => 5,
        Kind::Secret => 6,
        Kind::PriorityClass => 7,
        Kind::PodDisruptionBudget => 8,
    }
}

/// Bytes that an item takes in a list.
pub fn listed_len(entry: &Entry) -> usize {
    delimited(delimited(entry.inner.len()))
}

/// An `Object` as field `field`.
fn put_object(out: &mut impl BufMut, field: u8, kind: Kind, entry: &Entry) {
    put_head(out, field, delimited(entry.inner.len()));
    put_head(out, object_field(kind), entry.inner.len());
    out.put_slice(&entry.inner);
}

impl Encoded for EncodedList {
    fn put(&self, out: &mut impl BufMut) {
        for entry in &self.items {
            put_object(out, 1, self.kind, entry);
        }
        put_number(out, 2, self.revision);
        if !self.next.is_empty() {
            put_head(out, 3, self.next.len());
            out.put_slice(self.next.as_bytes());
        }
    }
}

impl Encoded for EncodedObject {
    fn put(&self, out: &mut impl BufMut) {
        put_head(out, object_field(self.kind), self.inner.len());
        out.put_slice(&self.inner);
    }
}

impl Encoded for EncodedEvent {
    fn put(&self, out: &mut impl BufMut) {
        put_number(out, 1, i64::from(self.delivery.kind as i32));
        if let Some(entry) = &self.delivery.entry {
            put_object(out, 2, self.kind, entry);
        }
        put_number(out, 3, self.delivery.revision);
    }
}

impl Encoded for EncodedMessage {
    fn put(&self, out: &mut impl BufMut) {
        match self {
            EncodedMessage::Snapshot(entries) => {
                put_head(out, 1, entries.iter().map(|entry| delimited(entry.inner.len())).sum());
                for entry in entries {
                    put_head(out, 4, entry.inner.len());
                    out.put_slice(&entry.inner);
                }
            }
            EncodedMessage::Upsert(entry) => {
                put_head(out, 2, entry.inner.len());
                out.put_slice(&entry.inner);
            }
            EncodedMessage::Plain(message) => {
                // A buffer that grows cannot be too small.
                let _ = message.encode(out);
            }
        }
    }
}

/// Writes [`Encoded`]s, reads prost messages.
struct ReadyCodec<E, D>(PhantomData<fn() -> (E, D)>);

struct ReadyEncoder<E>(PhantomData<fn() -> E>);
struct ProstDecoder<D>(PhantomData<fn() -> D>);

impl<E: Encoded, D: Message + Default + Send + 'static> Codec for ReadyCodec<E, D> {
    type Encode = E;
    type Decode = D;
    type Encoder = ReadyEncoder<E>;
    type Decoder = ProstDecoder<D>;

    fn encoder(&mut self) -> ReadyEncoder<E> {
        ReadyEncoder(PhantomData)
    }

    fn decoder(&mut self) -> ProstDecoder<D> {
        ProstDecoder(PhantomData)
    }
}

impl<E: Encoded> Encoder for ReadyEncoder<E> {
    type Item = E;
    type Error = Status;

    fn encode(&mut self, item: E, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        item.put(out);
        Ok(())
    }
}

impl<D: Message + Default + Send + 'static> Decoder for ProstDecoder<D> {
    type Item = D;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<D>, Status> {
        if !buffer.has_remaining() {
            return Ok(Some(D::default()));
        }
        D::decode(buffer)
            .map(Some)
            .map_err(|error| Status::invalid_argument(format!("the message cannot be decoded: {error}")))
    }
}

fn grpc<E: Encoded, D: Message + Default + Send + 'static>() -> Grpc<ReadyCodec<E, D>> {
    Grpc::new(ReadyCodec(PhantomData)).apply_max_message_size_config(Some(REQUEST_LIMIT_BYTES), None)
}

/// The service Objects.
#[derive(Clone)]
pub struct Objects {
    api: Arc<ObjectsApi>,
    rest: ObjectsServer<ObjectsApi>,
}

impl Objects {
    /// The service over its implementation.
    pub fn new(api: Arc<ObjectsApi>) -> Objects {
        let rest = ObjectsServer::from_arc(Arc::clone(&api)).max_decoding_message_size(REQUEST_LIMIT_BYTES);
        Objects { api, rest }
    }
}

impl NamedService for Objects {
    const NAME: &'static str = <ObjectsServer<ObjectsApi> as NamedService>::NAME;
}

struct Watch(Arc<ObjectsApi>);

impl ServerStreamingService<WatchRequest> for Watch {
    type Response = EncodedEvent;
    type ResponseStream = crate::services::objects::EventStream;
    type Future = BoxFuture<Response<Self::ResponseStream>, Status>;

    fn call(&mut self, request: Request<WatchRequest>) -> Self::Future {
        let api = Arc::clone(&self.0);
        Box::pin(async move { Ok(Response::new(api.open_watch(request.into_inner()).await?)) })
    }
}

struct List(Arc<ObjectsApi>);

impl UnaryService<ListRequest> for List {
    type Response = EncodedList;
    type Future = BoxFuture<Response<EncodedList>, Status>;

    fn call(&mut self, request: Request<ListRequest>) -> Self::Future {
        let api = Arc::clone(&self.0);
        Box::pin(async move { Ok(Response::new(api.page(request.into_inner()).await?)) })
    }
}

struct Create(Arc<ObjectsApi>);

impl UnaryService<CreateRequest> for Create {
    type Response = EncodedObject;
    type Future = BoxFuture<Response<EncodedObject>, Status>;

    fn call(&mut self, request: Request<CreateRequest>) -> Self::Future {
        let api = Arc::clone(&self.0);
        Box::pin(async move { Ok(Response::new(api.create_encoded(request.into_inner()).await?)) })
    }
}

impl Service<http::Request<Body>> for Objects {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        match request.uri().path() {
            "/minipod.v1.Objects/Watch" => {
                let method = Watch(Arc::clone(&self.api));
                Box::pin(async move { Ok(grpc().server_streaming(method, request).await) })
            }
            "/minipod.v1.Objects/Create" => {
                let method = Create(Arc::clone(&self.api));
                Box::pin(async move { Ok(grpc().unary(method, request).await) })
            }
            "/minipod.v1.Objects/List" => {
                let method = List(Arc::clone(&self.api));
                Box::pin(async move { Ok(grpc().unary(method, request).await) })
            }
            _ => self.rest.call(request),
        }
    }
}

/// The service Nodes.
#[derive(Clone)]
pub struct Nodes {
    api: Arc<NodesApi>,
    rest: NodesServer<NodesApi>,
}

impl Nodes {
    /// The service over its implementation.
    pub fn new(api: Arc<NodesApi>) -> Nodes {
        let rest = NodesServer::from_arc(Arc::clone(&api)).max_decoding_message_size(REQUEST_LIMIT_BYTES);
        Nodes { api, rest }
    }
}

impl NamedService for Nodes {
    const NAME: &'static str = <NodesServer<NodesApi> as NamedService>::NAME;
}

struct Session(Arc<NodesApi>);

impl StreamingService<AgentMessage> for Session {
    type Response = EncodedMessage;
    type ResponseStream = crate::nodes::session::MessageStream;
    type Future = BoxFuture<Response<Self::ResponseStream>, Status>;

    fn call(&mut self, request: Request<tonic::Streaming<AgentMessage>>) -> Self::Future {
        let api = Arc::clone(&self.0);
        Box::pin(async move { Ok(Response::new(api.open_session(request.into_inner()).await?)) })
    }
}

impl Service<http::Request<Body>> for Nodes {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        if request.uri().path() == "/minipod.v1.Nodes/Session" {
            let method = Session(Arc::clone(&self.api));
            return Box::pin(async move { Ok(grpc().streaming(method, request).await) });
        }
        self.rest.call(request)
    }
}

/// Decodes what was just put together: for the generated traits, whose methods the wrappers above serve themselves.
pub fn decoded<M: Message + Default>(encoded: &impl Encoded) -> Result<M, Status> {
    let mut bytes = Vec::new();
    encoded.put(&mut bytes);
    M::decode(bytes.as_slice()).map_err(|error| Status::internal(format!("an encoded message cannot be read: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use minipod_proto::v1::{ListResponse, Object, Pod, WatchEvent, server_message, watch_event::Type};

    fn entry(name: &str) -> Arc<Entry> {
        let mut pod = Pod::default();
        pod.metadata.get_or_insert_default().name = name.into();
        pod.spec_mut().hostname = "h".repeat(200);
        Arc::new(Entry::decode(Kind::Pod, name, &pod.encode_to_vec(), 77).expect("decodes"))
    }

    #[test]
    fn what_is_put_together_is_what_prost_would_have_encoded() {
        let entries = vec![entry("a"), entry("b")];
        let want: Vec<Object> = entries.iter().map(|entry| entry.object.clone()).collect();
        assert_eq!(want[0].meta().resource_version, "77");
        let list = EncodedList { kind: Kind::Pod, items: entries.clone(), revision: 80, next: "token".into() };
        let got: ListResponse = decoded(&list).expect("reads");
        assert_eq!((got.items, got.revision, got.r#continue.as_str()), (want.clone(), 80, "token"));

        let delivery = Delivery { kind: Type::Deleted, entry: Some(Arc::clone(&entries[0])), revision: 79 };
        let got: WatchEvent = decoded(&EncodedEvent { kind: Kind::Pod, delivery }).expect("reads");
        assert_eq!((got.r#type(), got.object, got.revision), (Type::Deleted, Some(want[0].clone()), 79));

        let got: ServerMessage = decoded(&EncodedMessage::Snapshot(entries.clone())).expect("reads");
        let Some(server_message::Message::Snapshot(pods)) = got.message else { panic!("{got:?}") };
        assert_eq!(pods.items.into_iter().map(Object::from).collect::<Vec<_>>(), want);
        let got: ServerMessage = decoded(&EncodedMessage::Upsert(Arc::clone(&entries[1]))).expect("reads");
        let Some(server_message::Message::PodUpsert(pod)) = got.message else { panic!("{got:?}") };
        assert_eq!(Object::from(pod), want[1]);
    }

    #[test]
    fn every_kind_has_its_own_field() {
        for kind in Kind::ALL {
            let value = Object::empty(kind).encode_inner();
            let entry = Arc::new(Entry::decode(kind, "k", &value, 5).expect("decodes"));
            let delivery = Delivery { kind: Type::Added, entry: Some(Arc::clone(&entry)), revision: 5 };
            let got: WatchEvent = decoded(&EncodedEvent { kind, delivery }).expect("reads");
            assert_eq!(got.object.as_ref(), Some(&entry.object), "{kind}");
        }
    }
}
