//! A gRPC client that does nothing but what the measurement needs, so that it is not what is measured: requests are bytes, answers are
//! scanned in place, all on one thread.

use super::Error;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use h2::client::{ResponseFuture, SendRequest};
use h2::{RecvStream, SendStream};
use std::net::SocketAddr;
use tokio::net::TcpStream;

/// A connection; clones share it.
#[derive(Clone)]
pub struct Connection {
    send: SendRequest<Bytes>,
    address: SocketAddr,
}

impl Connection {
    /// Connects; the connection lives on a task of its own.
    pub async fn open(address: SocketAddr) -> Result<Self, Error> {
        let socket = TcpStream::connect(address).await?;
        socket.set_nodelay(true)?;
        let mut settings = h2::client::Builder::new();
        settings.initial_window_size(4 << 20).initial_connection_window_size(64 << 20);
        let (send, connection) = settings.handshake(socket).await?;
        // It ends with the server, and every call on it then has the error.
        tokio::spawn(async move { drop(connection.await) });
        Ok(Self { send, address })
    }

    /// A method, to be called again and again.
    pub fn method(&self, path: &str) -> Result<Method, Error> {
        let request = http::Request::post(format!("http://{}{path}", self.address))
            .header("content-type", "application/grpc")
            .header("te", "trailers");
        Ok(Method { send: self.send.clone(), request: request.body(())? })
    }
}

/// A method on a connection.
#[derive(Clone)]
pub struct Method {
    send: SendRequest<Bytes>,
    request: http::Request<()>,
}

impl Method {
    async fn send(&mut self) -> Result<(ResponseFuture, SendStream<Bytes>), Error> {
        // A full connection is waited for.
        std::future::poll_fn(|cx| self.send.poll_ready(cx)).await?;
        Ok(self.send.send_request(self.request.clone(), false)?)
    }

    /// One request, one answer.
    pub async fn call(&mut self, message: &[u8]) -> Result<Bytes, Error> {
        let mut stream = self.stream(message).await?;
        let answer = stream.message().await?.ok_or("the server ended a call without an answer")?;
        // What is not read to the end is reset, and a server that is reset often takes that for an attack.
        while stream.message().await?.is_some() {}
        Ok(answer)
    }

    /// Begins a call with one request. Dropping the stream ends it.
    pub async fn stream(&mut self, message: &[u8]) -> Result<Stream, Error> {
        let (response, mut send) = self.send().await?;
        let is_watch = self.request.uri().path().ends_with("/Watch");
        send.send_data(framed(message)?, !is_watch)?;
        let response = response.await?;
        status(response.headers())?;
        Ok(Stream { _send: send, receive: response.into_body(), buffer: BytesMut::new() })
    }
}

fn framed(message: &[u8]) -> Result<Bytes, Error> {
    let mut frame = BytesMut::with_capacity(message.len() + 5);
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.len())?);
    frame.put_slice(message);
    Ok(frame.freeze())
}

fn status(headers: &http::HeaderMap) -> Result<(), Error> {
    match headers.get("grpc-status") {
        Some(status) if status.as_bytes() != b"0" => {
            let message = headers.get("grpc-message").map(|message| String::from_utf8_lossy(message.as_bytes()));
            Err(format!("the server answers status {status:?}: {}", message.unwrap_or_default()).into())
        }
        _ => Ok(()),
    }
}

/// The answers of a call.
pub struct Stream {
    /// Dropping it ends the call.
    _send: SendStream<Bytes>,
    receive: RecvStream,
    buffer: BytesMut,
}

impl Stream {
    /// The next answer; `None` when the call has ended well.
    pub async fn message(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            if let Some(head) = self.buffer.first_chunk::<5>() {
                let len = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
                if self.buffer.len() >= 5 + len {
                    self.buffer.advance(5);
                    return Ok(Some(self.buffer.split_to(len).freeze()));
                }
            }
            let Some(data) = self.receive.data().await else {
                let trailers = self.receive.trailers().await?;
                return trailers.map_or(Ok(()), |trailers| status(&trailers)).map(|()| None);
            };
            let data = data?;
            self.receive.flow_control().release_capacity(data.len())?;
            self.buffer.extend_from_slice(&data);
        }
    }
}

/// The fields of a message: number, and the value or the bytes.
pub struct Fields<'a>(pub &'a [u8]);

/// A field's value.
pub enum Value<'a> {
    /// A number.
    Number(u64),
    /// Bytes, or a message.
    Bytes(&'a [u8]),
}

impl Fields<'_> {
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    /// The first number of field `number`, or 0.
    pub fn number(self, number: u64) -> u64 {
        self.filter(|(field, _)| *field == number).find_map(|(_, value)| as_number(&value)).unwrap_or(0)
    }
}

fn as_number(value: &Value<'_>) -> Option<u64> {
    if let Value::Number(number) = value { Some(*number) } else { None }
}

impl<'a> Iterator for Fields<'a> {
    type Item = (u64, Value<'a>);

    /// Ends with the message, and where it is none.
    fn next(&mut self) -> Option<Self::Item> {
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Value::Number(self.varint()?),
            2 => {
                let len = usize::try_from(self.varint()?).ok()?;
                let (bytes, rest) = self.0.split_at_checked(len)?;
                self.0 = rest;
                Value::Bytes(bytes)
            }
            _ => return None,
        };
        Some((tag >> 3, value))
    }
}

/// A number in the answer's header: 2 the member, 3 the revision.
pub fn header(answer: &[u8], number: u64) -> u64 {
    match Fields(answer).next() {
        Some((1, Value::Bytes(header))) => Fields(header).number(number),
        _ => 0,
    }
}
