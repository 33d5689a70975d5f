//! The task that owns a connection to a supervisor: requests and acknowledgements out, answers and events in.

use std::collections::HashMap;

use minipod_podshim::protocol::{Ask, HEAD_BYTES, Request, Response, Say, put_frame, take_frame};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};

use super::{Call, ShimError, ShimEvent, event_of};

/// Starts the task. It ends when the supervisor ends the connection, or when nobody asks or listens any more; then the
/// channel of events closes.
pub(super) fn serve(
    stream: UnixStream,
    calls: mpsc::Receiver<Box<Call>>,
    acks: watch::Receiver<u64>,
    events: mpsc::Sender<Box<ShimEvent>>,
) {
    tokio::spawn(async move {
        let (reader, writer) = stream.into_split();
        let task = Task { writer, waiting: HashMap::new(), next_id: 1 };
        if let Err(error) = task.run(Frames::new(reader), calls, acks, events).await {
            tracing::debug!(error = crate::report::chain(&error), "connection to a supervisor ended");
        }
    });
}

struct Task {
    writer: tokio::net::unix::OwnedWriteHalf,
    waiting: HashMap<u64, oneshot::Sender<Say>>,
    next_id: u64,
}

impl Task {
    async fn run(
        mut self,
        mut frames: Frames<tokio::net::unix::OwnedReadHalf>,
        mut calls: mpsc::Receiver<Box<Call>>,
        mut acks: watch::Receiver<u64>,
        events: mpsc::Sender<Box<ShimEvent>>,
    ) -> Result<(), ShimError> {
        loop {
            tokio::select! {
                // Cancel safe: what was read stays in `frames`.
                response = frames.next() => match response? {
                    Some(response) => {
                        if let Some(event) = self.take(response)
                            && events.send(Box::new(event)).await.is_err()
                        {
                            return Ok(());
                        }
                    }
                    None => return Ok(()),
                },
                // Cancel safe: a call stays in its channel. `None`: the last handle is gone.
                call = calls.recv() => match call {
                    Some(call) => self.send(*call).await?,
                    None => return Ok(()),
                },
                // Cancel safe: the newest value stays.
                Ok(()) = acks.changed() => {
                    let sequence = *acks.borrow_and_update();
                    let id = self.next_id();
                    self.write(&Request { id, ask: Some(Ask::Acknowledge(sequence)) }).await?;
                }
            }
        }
    }

    fn next_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    async fn send(&mut self, call: Call) -> Result<(), ShimError> {
        let id = self.next_id();
        self.waiting.retain(|_, answer| !answer.is_closed());
        self.waiting.insert(id, call.answer);
        match self.write(&Request { id, ask: Some(call.ask) }).await {
            // Nothing was sent: only this one request is lost.
            Err(ShimError::Frame(error)) => {
                let refused = super::Refused {
                    step: "send the request".to_owned(),
                    detail: error.to_string(),
                    ..Default::default()
                };
                self.waiting.remove(&id).map(|answer| answer.send(Say::Refused(refused)));
                Ok(())
            }
            result => result,
        }
    }

    async fn write(&mut self, request: &Request) -> Result<(), ShimError> {
        let mut bytes = Vec::new();
        put_frame(request, &mut bytes)?;
        self.writer.write_all(&bytes).await.map_err(|error| ShimError::Gone(error.to_string()))
    }

    fn take(&mut self, response: Response) -> Option<ShimEvent> {
        match response.say? {
            Say::Event(event) => event_of(event),
            say => {
                // Nobody waits any more: it was given up.
                let _ = self.waiting.remove(&response.id)?.send(say);
                None
            }
        }
    }
}

/// Responses from a stream.
#[derive(Debug)]
pub(super) struct Frames<R> {
    reader: R,
    bytes: Vec<u8>,
}

impl<R: AsyncRead + Unpin> Frames<R> {
    pub(super) fn new(reader: R) -> Self {
        Self { reader, bytes: Vec::with_capacity(HEAD_BYTES) }
    }

    /// The next one; `None` at the end. Cancel safe.
    pub(super) async fn next(&mut self) -> Result<Option<Response>, ShimError> {
        loop {
            if let Some(response) = take_frame(&mut self.bytes)? {
                return Ok(Some(response));
            }
            let read = self.reader.read_buf(&mut self.bytes).await;
            if read.map_err(|error| ShimError::Gone(error.to_string()))? == 0 {
                return Ok(None);
            }
        }
    }
}
