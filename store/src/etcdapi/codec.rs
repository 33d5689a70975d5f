//! gRPC without messages: requests come in as bytes, answers go out as bytes that are encoded already.

use bytes::{Buf, BufMut, Bytes};
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

/// An encoded message, in pieces.
#[derive(Debug, Default)]
pub struct Reply {
    /// What differs from answer to answer: the header.
    pub head: Vec<u8>,
    /// The rest.
    pub body: Bytes,
    /// Fields that are shared with other answers: events.
    pub shared: Vec<Bytes>,
}

/// The codec of requests as bytes and answers as [`Reply`].
#[derive(Debug, Clone, Copy, Default)]
pub struct RawCodec;

impl Codec for RawCodec {
    type Encode = Reply;
    type Decode = Bytes;
    type Encoder = RawCodec;
    type Decoder = RawCodec;

    fn encoder(&mut self) -> RawCodec {
        RawCodec
    }
    fn decoder(&mut self) -> RawCodec {
        RawCodec
    }
}

impl Encoder for RawCodec {
    type Item = Reply;
    type Error = Status;

    fn encode(&mut self, reply: Reply, dst: &mut EncodeBuf<'_>) -> Result<(), Status> {
        let shared: usize = reply.shared.iter().map(Bytes::len).sum();
        dst.reserve(reply.head.len() + reply.body.len() + shared);
        dst.put_slice(&reply.head);
        dst.put_slice(&reply.body);
        for part in &reply.shared {
            dst.put_slice(part);
        }
        Ok(())
    }
}

impl Decoder for RawCodec {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, src: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(src.copy_to_bytes(src.remaining())))
    }
}
