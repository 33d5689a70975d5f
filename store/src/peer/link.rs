//! The way to one member: connect, stream what is queued, and begin anew when it breaks.

use super::proto::{Frames, Piece};
use super::tls::PeerTls;
use super::{MAX_FRAME, client, connect, mark, said};
use crate::replica::inbox::{Inbox, Input};
use crate::replica::run::with_causes;
use crate::snapshot::Snapshots;
use crate::wal::Identity;
use minipod_daemon::backoff::Backoff;
use raft::eraftpb::{Message, MessageType};
use raft_prost::Message as _;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Request;
use tonic::transport::Channel;

/// Messages that wait go into one frame up to this many bytes.
const FRAME: usize = 1 << 20;
/// Pieces of a snapshot.
const PIECE: usize = 512 << 10;
/// A snapshot that has not arrived after so long is given up; raft tries again with a newer one.
const SNAPSHOT_PATIENCE: Duration = Duration::from_secs(600);

/// Sends to one member.
pub(super) struct Sender {
    pub(super) identity: Identity,
    pub(super) tls: Option<PeerTls>,
    pub(super) to: u64,
    pub(super) urls: Vec<String>,
    pub(super) inbox: Arc<Inbox>,
    pub(super) snapshots: Snapshots,
}

impl Sender {
    /// Runs until the link is dropped.
    pub(super) async fn run(self, mut messages: mpsc::Receiver<Message>) {
        let mut backoff = Backoff::new(Duration::from_millis(20), Duration::from_millis(500));
        // Why an address could not be reached when that was last told.
        let mut told: HashMap<&String, String> = HashMap::new();
        loop {
            for url in &self.urls {
                match connect(url, self.tls.as_ref()).await {
                    Ok(channel) => {
                        if told.remove(url).is_some() {
                            tracing::info!(member = format!("{:x}", self.to), %url, "the member can be reached again");
                        }
                        backoff = Backoff::new(Duration::from_millis(20), Duration::from_millis(500));
                        if let Err(reason) = self.talk(channel, &mut messages).await {
                            tracing::info!(member = format!("{:x}", self.to), %url, %reason, "the link to a member broke");
                        }
                        if messages.is_closed() {
                            return;
                        }
                    }
                    Err(error) => {
                        let reason = with_causes(&error);
                        if told.get(url) != Some(&reason) {
                            tracing::warn!(member = format!("{:x}", self.to), %url, %reason, "a member cannot be reached; trying on");
                            told.insert(url, reason);
                        }
                    }
                }
            }
            // What was queued for a broken link is old; raft sends again what is needed.
            while let Ok(message) = messages.try_recv() {
                self.lost(&message);
            }
            tokio::time::sleep(backoff.next_wait()).await;
        }
    }

    fn lost(&self, message: &Message) {
        self.inbox.tell(if message.get_msg_type() == MessageType::MsgSnapshot {
            Input::SnapshotSent(self.to, false)
        } else {
            Input::Unreachable(self.to)
        });
    }

    /// Streams messages until the stream breaks; says why.
    async fn talk(&self, channel: Channel, messages: &mut mpsc::Receiver<Message>) -> Result<(), String> {
        // Two frames: one on its way into HTTP/2's window, one behind it; the rest waits where it can still be gathered.
        let (frames, stream) = mpsc::channel(2);
        let mut request = Request::new(ReceiverStream::new(stream));
        mark(request.metadata_mut(), self.identity, self.to);
        let mut peer = client(channel.clone());
        let mut call = Box::pin(async move { peer.talk(request).await });
        loop {
            // `recv` is cancel safe, and the call goes on where it was.
            let first = tokio::select! {
                ended = &mut call => return Err(ended.map_or_else(|status| said(&status), |_| "the other side ended it".to_owned())),
                message = messages.recv() => message,
            };
            let Some(first) = first else { return Ok(()) };
            let frame = self.gather(first, messages, &channel);
            if frame.messages.is_empty() {
                continue;
            }
            // `send` may be cancelled here: the frame is lost then, as is the link.
            tokio::select! {
                ended = &mut call => return Err(ended.map_or_else(|status| said(&status), |_| "the other side ended it".to_owned())),
                sent = frames.send(frame) => if sent.is_err() { return Err("the stream ended".to_owned()) },
            }
        }
    }

    /// Puts what waits into one frame; snapshots go their own way.
    fn gather(&self, first: Message, messages: &mut mpsc::Receiver<Message>, channel: &Channel) -> Frames {
        let mut frame = Frames::default();
        let mut bytes = 0;
        let mut next = Some(first);
        while let Some(message) = next {
            if message.get_msg_type() == MessageType::MsgSnapshot {
                self.send_snapshot(message, channel.clone());
            } else {
                let encoded = message.encode_to_vec();
                bytes += encoded.len();
                frame.messages.push(encoded);
            }
            next = if bytes < FRAME { messages.try_recv().ok() } else { None };
        }
        frame
    }

    /// Sends a snapshot's file and its message in a task of its own, and tells the replica what came of it.
    fn send_snapshot(&self, message: Message, channel: Channel) {
        let (identity, to, inbox, snapshots) =
            (self.identity, self.to, Arc::clone(&self.inbox), self.snapshots.clone());
        tokio::spawn(async move {
            let sending = tokio::time::timeout(SNAPSHOT_PATIENCE, send_snapshot(identity, message, channel, snapshots));
            let result = sending.await.unwrap_or_else(|_| Err("it took too long".to_owned()));
            match &result {
                Ok(bytes) => tracing::info!(member = format!("{to:x}"), bytes, "a snapshot has reached a member"),
                Err(reason) => tracing::warn!(member = format!("{to:x}"), %reason, "a snapshot did not reach a member"),
            }
            inbox.tell(Input::SnapshotSent(to, result.is_ok()));
        });
    }
}

async fn send_snapshot(
    identity: Identity,
    message: Message,
    channel: Channel,
    snapshots: Snapshots,
) -> Result<u64, String> {
    let metadata = message.get_snapshot().get_metadata();
    let (index, term, to) = (metadata.index, metadata.term, message.to);
    // Four pieces of half a MiB: enough to keep the disk reading while the network sends.
    let (pieces, stream) = mpsc::channel(4);
    let reading = tokio::task::spawn_blocking(move || {
        let (file, len) = snapshots.raw(index, term).map_err(|error| error.to_string())?;
        let first = Piece { message: message.encode_to_vec(), data: Vec::new() };
        if pieces.blocking_send(first).is_err() {
            return Ok(0);
        }
        let mut offset = 0;
        while offset < len {
            let mut data = vec![0; PIECE.min(usize::try_from(len - offset).unwrap_or(PIECE))];
            let read = file.read_at(offset, &mut data).map_err(|error| error.to_string())?;
            if read == 0 {
                return Err(format!("the snapshot's file ends at {offset} of {len} bytes"));
            }
            data.truncate(read);
            offset += read as u64;
            if pieces.blocking_send(Piece { data, message: Vec::new() }).is_err() {
                break;
            }
        }
        Ok(len)
    });
    let mut request = Request::new(ReceiverStream::new(stream));
    mark(request.metadata_mut(), identity, to);
    let answer = client(channel).snapshot(request).await;
    let read = reading.await.map_err(|error| error.to_string())?;
    answer.map_err(|status| status.message().to_owned())?;
    read
}

const _: () = assert!(FRAME + (16 << 20) < MAX_FRAME, "a frame and one command more fit the limit");
