//! A program run in a container, on a connection of its own.

use std::path::Path;

use minipod_podshim::protocol::{
    self, Ask, Empty, ExecInput as WireInput, Input, MAX_DATA_BYTES, Output, Request, Say, Window, put_frame,
};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};

use super::ShimError;
use super::connection::Frames;

/// Input between the user's stream and the connection; each at most what one tunnel frame holds (64 KiB). A program that
/// does not read its stdin holds its user back.
const INPUT_QUEUE: usize = 4;

/// The streams of a program to be run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ExecStreams {
    /// Its input will be sent; else it has none.
    pub stdin: bool,
    /// A terminal of this size instead of pipes; its output all comes as stdout.
    pub terminal: Option<Window>,
}

/// What an exec'd process says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecOutput {
    /// Bytes of its stdout.
    Stdout(Vec<u8>),
    /// Bytes of its stderr.
    Stderr(Vec<u8>),
    /// It ended, all output came before; 128 + signal when killed.
    Exited(i32),
}

/// What an exec'd process is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecInput {
    /// Bytes for its stdin.
    Stdin(Vec<u8>),
    /// No more of them.
    StdinClosed,
    /// Kill it.
    Kill,
    /// Its terminal has another size now.
    Resize(Window),
}

/// An exec'd process. Dropping it kills the process.
#[derive(Debug)]
pub struct ExecProcess {
    outputs: ExecOutputs,
    inputs: ExecInputs,
}

/// What comes out of an exec'd process. Dropping it kills the process.
#[derive(Debug)]
pub struct ExecOutputs {
    frames: Frames<OwnedReadHalf>,
    /// Its end tells the feeding of input, which may wait for the process just now.
    _reader: oneshot::Sender<()>,
}

/// What goes into an exec'd process.
#[derive(Debug, Clone)]
pub struct ExecInputs {
    sender: mpsc::Sender<ExecInput>,
}

impl ExecProcess {
    /// `ask` is one that a connection then serves: an exec or an attach.
    pub(super) async fn begin(socket: &Path, ask: Ask) -> Result<Self, ShimError> {
        let gone = |error: std::io::Error| ShimError::Gone(error.to_string());
        let (reader, mut writer) = UnixStream::connect(socket).await.map_err(gone)?.into_split();
        let mut bytes = Vec::new();
        put_frame(&Request { id: 1, ask: Some(ask) }, &mut bytes)?;
        writer.write_all(&bytes).await.map_err(gone)?;
        let mut frames = Frames::new(reader);
        let answer = frames.next().await?.and_then(|response| response.say);
        match answer {
            Some(Say::ExecOutput(protocol::ExecOutput { output: Some(Output::Started(_)) })) => {
                let (sender, receiver) = mpsc::channel(INPUT_QUEUE);
                let (reader, reader_gone) = oneshot::channel();
                tokio::spawn(feed(writer, receiver, reader_gone));
                Ok(Self { outputs: ExecOutputs { frames, _reader: reader }, inputs: ExecInputs { sender } })
            }
            Some(Say::Refused(refused)) => Err(ShimError::Refused(refused)),
            Some(_) => Err(ShimError::Unexpected { operation: "exec" }),
            None => Err(ShimError::Gone(String::new())),
        }
    }

    /// What it says next; `None` when the supervisor ended. Cancel safe.
    pub async fn next(&mut self) -> Option<ExecOutput> {
        self.outputs.next().await
    }

    /// Tells it something; waits while it does not read. Whoever also reads its output in the same task must not wait here:
    /// see [`ExecInputs::reserve`].
    pub async fn send(&mut self, input: ExecInput) {
        self.inputs.send(input).await;
    }

    /// Both directions apart.
    #[must_use]
    pub fn split(self) -> (ExecOutputs, ExecInputs) {
        (self.outputs, self.inputs)
    }
}

impl ExecOutputs {
    /// What it says next; `None` when the supervisor ended. Cancel safe.
    pub async fn next(&mut self) -> Option<ExecOutput> {
        loop {
            let response = self.frames.next().await.ok().flatten()?;
            let Some(Say::ExecOutput(output)) = response.say else { continue };
            match output.output? {
                Output::Stdout(data) => return Some(ExecOutput::Stdout(data)),
                Output::Stderr(data) => return Some(ExecOutput::Stderr(data)),
                Output::Exited(code) => return Some(ExecOutput::Exited(code)),
                Output::Started(_) => {}
            }
        }
    }
}

impl ExecInputs {
    /// Tells it something; waits while it does not read. One that is gone is told nothing.
    pub async fn send(&self, input: ExecInput) {
        let _ = self.sender.send(input).await;
    }

    /// Waits until something can be sent without waiting; `None` when it is gone. Cancel safe.
    pub async fn reserve(&self) -> Option<mpsc::Permit<'_, ExecInput>> {
        self.sender.reserve().await.ok()
    }
}

/// Writes input until there is no more. It holds the connection's writing half: its end does not end the connection, the
/// reading half does.
async fn feed(
    mut writer: OwnedWriteHalf,
    mut inputs: mpsc::Receiver<ExecInput>,
    mut reader_gone: oneshot::Receiver<()>,
) {
    while let Some(input) = inputs.recv().await {
        let mut bytes = Vec::new();
        let mut put = |input| {
            let ask = Ask::ExecInput(WireInput { input: Some(input) });
            // Pieces are far below the limit of a frame.
            let _ = put_frame(&Request { id: 1, ask: Some(ask) }, &mut bytes);
        };
        match input {
            ExecInput::Stdin(data) => data.chunks(MAX_DATA_BYTES).for_each(|piece| put(Input::Stdin(piece.to_vec()))),
            ExecInput::StdinClosed => put(Input::StdinClosed(Empty {})),
            ExecInput::Resize(window) => put(Input::Resize(window)),
            ExecInput::Kill => put(Input::Signal(libc::SIGKILL)),
        }
        tokio::select! {
            // Not cancel safe, and need not be: after the other arm nothing more is written.
            written = writer.write_all(&bytes) => if written.is_err() {
                return;
            },
            // Cancel safe. A process that reads nothing holds the writing up, and with this half the connection: it is closed, and
            // the supervisor kills the process.
            _ = &mut reader_gone => return,
        }
    }
    // Dropping it would shut the socket's writing side down, which the supervisor takes for the agent's going away.
    writer.forget();
}
