//! The conversation between the agent and a pod's supervisor on `shim.sock`.
//!
//! Each side sends frames: 8 bytes of head (`"mp"`, version as u16, length as u32, both little endian), then a protobuf
//! message of that length. The agent sends [`Request`]s and the supervisor [`Response`]s; a response carries the id of its
//! request, events carry 0. Requests of one connection may be answered out of order: a start takes as long as it takes.
//!
//! A supervisor outlives upgrades of the agent. Fields are only ever added, a reader ignores what it does not know, and a
//! frame whose version is higher than the reader's [`VERSION`] ends the connection. The version is raised when an old reader
//! would do harm by ignoring something.

mod frame;
mod request;
mod response;
mod spec;

pub use frame::*;
pub use request::*;
pub use response::*;
pub use spec::*;

/// The version that this build speaks, and the highest it reads.
pub const VERSION: u16 = 1;
/// What this build carries out, as it tells in [`State::version`]: grows with every field of a spec that an older supervisor
/// would do harm by ignoring. 2: [`Mount::sub_path`]. 3: [`Exec::terminal`]. 4: [`ContainerSpec::terminal`],
/// [`ContainerSpec::stdin_once`], [`ContainerSpec::pid_of`], [`Ask::Attach`], [`Run::user`]. 5: [`Ask::Resize`].
/// 6: [`SandboxSpec::users`]. 7: [`ContainerSpec::apparmor_profile`], [`SandboxSpec::shared_memory`], [`MountKind::SharedMemory`].
pub const ABILITIES: u32 = 7;
/// Largest message: a container's spec with the manifest's largest environment fits several times.
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;
/// Most bytes of output or input in one exec frame.
pub const MAX_DATA_BYTES: usize = 64 << 10;
/// Bytes before each message.
pub const HEAD_BYTES: usize = 8;

/// Names of the files in the pod's run directory.
pub mod files {
    /// The supervisor's socket.
    pub const SOCKET: &str = "shim.sock";
    /// Held locked (flock) as long as the supervisor lives; removed when it ends in order.
    pub const LOCK: &str = "shim.lock";
    /// A [`super::State`]; replaced by way of [`NEW_STATE`], see [`crate::replace`].
    pub const STATE: &str = "shim.state";
    /// The state where [`STATE`] is missing, as it may be of supervisors before ability 7.
    pub const NEW_STATE: &str = "shim.state.new";
    /// [`super::Event`]s as frames, appended before they are announced; begun anew when it has grown and all are acknowledged.
    pub const EVENTS: &str = "shim.events";
}
