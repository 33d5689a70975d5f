//! What the agent says.

use prost::Message;

use super::{ContainerSpec, Limits, SandboxSpec, Window};

/// From the agent.
#[derive(Clone, PartialEq, Message)]
pub struct Request {
    /// Not 0, unique on its connection.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// What is asked.
    #[prost(oneof = "Ask", tags = "2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12")]
    pub ask: Option<Ask>,
}

/// What the agent can ask.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Ask {
    /// Send me events, first all that are not acknowledged. Answered by the state, which the events follow.
    #[prost(message, tag = "2")]
    Subscribe(Empty),
    /// Answered by the state.
    #[prost(message, tag = "3")]
    State(Empty),
    /// Answered by `SandboxStarted` as soon as its namespaces exist.
    #[prost(message, tag = "4")]
    CreateSandbox(SandboxSpec),
    /// Answered by `Started` when the program runs, or `Refused`. A repetition is answered like the first.
    #[prost(message, tag = "5")]
    Start(Box<ContainerSpec>),
    /// Answered at once; the end comes as an event.
    #[prost(message, tag = "6")]
    Kill(Kill),
    /// Kill all, remove the pod's cgroups, answer, end.
    #[prost(message, tag = "7")]
    Stop(Empty),
    /// Events up to this are written down and may be forgotten. Not answered.
    #[prost(uint64, tag = "8")]
    Acknowledge(u64),
    /// Run a program in a container. The connection serves this process from then on, and nothing else.
    #[prost(message, tag = "9")]
    Exec(Exec),
    /// For the process of this connection. Not answered.
    #[prost(message, tag = "10")]
    ExecInput(ExecInput),
    /// Take part in the streams of a container's first process, from now on. The connection then serves this and nothing else: it is
    /// answered like `Exec`, and its end leaves the process alone.
    #[prost(message, tag = "11")]
    Attach(Attach),
    /// Other limits for what runs. All of them or, where memory is in use above its new limit, none.
    #[prost(message, tag = "12")]
    Resize(Resize),
}

/// Limits for a pod and for runs of its containers, in place of those that they have.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Resize {
    /// Of the pod as a whole; a later sandbox has them too.
    #[prost(message, optional, tag = "1")]
    pub pod: Option<Limits>,
    /// Runs that are over are left out.
    #[prost(message, repeated, tag = "2")]
    pub containers: Vec<ResizeContainer>,
}

/// Limits for a run.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ResizeContainer {
    /// The container.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its run; another run is left alone.
    #[prost(uint32, tag = "2")]
    pub attempt: u32,
    /// What it shall have; a CPU quota or a memory limit that is absent is taken away.
    #[prost(message, optional, tag = "3")]
    pub limits: Option<Limits>,
}

/// Nothing to say.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Empty {}

/// End a run: the signal now, KILL to the whole container after the grace.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Kill {
    /// The container.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its run; another run is left alone.
    #[prost(uint32, tag = "2")]
    pub attempt: u32,
    /// Sent to the container's first process, by the first request only: its handler runs once.
    #[prost(int32, tag = "3")]
    pub signal: i32,
    /// Time between the two; 0: KILL at once. A later request can only shorten it.
    #[prost(uint64, tag = "4")]
    pub grace_ms: u64,
}

/// A program to run in a container, as the container's user with its limits.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Exec {
    /// The container.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its run.
    #[prost(uint32, tag = "2")]
    pub attempt: u32,
    /// The program and its arguments.
    #[prost(string, repeated, tag = "3")]
    pub argv: Vec<String>,
    /// Whether `ExecInput` will be sent; else its stdin is the null device.
    #[prost(bool, tag = "4")]
    pub stdin: bool,
    /// Added to the container's environment.
    #[prost(string, repeated, tag = "5")]
    pub env: Vec<String>,
    /// A terminal of this size instead of pipes; what it shows comes as stdout.
    #[prost(message, optional, tag = "6")]
    pub terminal: Option<Window>,
}

/// A running container's streams to take part in. Output that its reader does not keep up with is lost to this reader.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Attach {
    /// The container.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its run.
    #[prost(uint32, tag = "2")]
    pub attempt: u32,
    /// Whether `ExecInput` will be sent. A container without open stdin gets none of it.
    #[prost(bool, tag = "3")]
    pub stdin: bool,
    /// The size of its terminal, if it has one.
    #[prost(message, optional, tag = "4")]
    pub window: Option<Window>,
}

/// To an exec'd process.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ExecInput {
    /// What.
    #[prost(oneof = "Input", tags = "1, 2, 3, 4")]
    pub input: Option<Input>,
}

/// What can be sent to an exec'd process.
#[derive(Clone, PartialEq, Eq, prost::Oneof)]
pub enum Input {
    /// At most [`super::MAX_DATA_BYTES`].
    #[prost(bytes = "vec", tag = "1")]
    Stdin(Vec<u8>),
    /// No more of it.
    #[prost(message, tag = "2")]
    StdinClosed(Empty),
    /// A signal by number.
    #[prost(int32, tag = "3")]
    Signal(i32),
    /// Its terminal has another size now. Ignored by one without a terminal.
    #[prost(message, tag = "4")]
    Resize(Window),
}
