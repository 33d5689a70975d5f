//! What a child tells the supervisor between its birth and its program: frames on a pipe that closes at exec.

use std::ffi::CString;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use minipod_podshim::protocol::{Fault, Refused, put_frame};
use nix::errno::Errno;
use prost::Message;

/// One message. The pipe's end without a failure means that the program runs.
#[derive(Clone, PartialEq, Message)]
pub struct ChildSays {
    /// Which step failed; the child is about to end.
    #[prost(message, optional, tag = "1")]
    pub failed: Option<Refused>,
    /// What the node could not give; the start goes on.
    #[prost(string, tag = "2")]
    pub warning: String,
    /// The infra container: the sandbox has its name and parameters.
    #[prost(bool, tag = "3")]
    pub named: bool,
}

/// A step of a start failed.
#[derive(Debug)]
pub struct Failure(pub Refused);

/// Result of a step.
pub type Step<T> = Result<T, Failure>;

impl Failure {
    /// A step that failed by the node's fault.
    pub fn node(step: &str, object: &str, errno: Errno) -> Self {
        Self::new(Fault::Node, step, object, errno)
    }

    /// A step that failed by the fault of spec or image.
    pub fn container(step: &str, object: &str, errno: Errno) -> Self {
        Self::new(Fault::Container, step, object, errno)
    }

    fn new(fault: Fault, step: &str, object: &str, errno: Errno) -> Self {
        Self(Refused {
            step: step.to_owned(),
            object: object.to_owned(),
            errno: errno as i32,
            detail: String::new(),
            fault: fault.into(),
        })
    }

    /// With more for people.
    pub fn because(mut self, detail: &str) -> Self {
        detail.clone_into(&mut self.0.detail);
        self
    }
}

/// Gives a system call's error its step.
pub trait Context<T> {
    /// The node's fault.
    fn node(self, step: &str, object: impl AsRef<Path>) -> Step<T>;
    /// The container's fault.
    fn container(self, step: &str, object: impl AsRef<Path>) -> Step<T>;
}

impl<T, E: Into<std::io::Error>> Context<T> for Result<T, E> {
    fn node(self, step: &str, object: impl AsRef<Path>) -> Step<T> {
        self.map_err(|error| Failure::node(step, &object.as_ref().to_string_lossy(), errno_of(&error.into())))
    }

    fn container(self, step: &str, object: impl AsRef<Path>) -> Step<T> {
        self.map_err(|error| Failure::container(step, &object.as_ref().to_string_lossy(), errno_of(&error.into())))
    }
}

/// The number of a system's error.
pub fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

/// A text of the spec for the kernel.
pub fn c_text(field: &str, text: &str) -> Step<CString> {
    let nul = |_| Failure::container("read", field, Errno::EINVAL).because("it has a NUL character");
    CString::new(text).map_err(nul)
}

/// The child's end of the pipe.
#[derive(Debug)]
pub struct Reporter(pub File);

impl Reporter {
    /// Says something; if nobody listens, nobody is there to start anything for.
    pub fn say(&mut self, says: &ChildSays) {
        let mut bytes = Vec::new();
        if put_frame(says, &mut bytes).is_ok() {
            let _ = self.0.write_all(&bytes);
        }
    }

    /// The start goes on without something.
    pub fn warn(&mut self, warning: String) {
        self.say(&ChildSays { warning, ..ChildSays::default() });
    }

    /// The start ends here.
    pub fn fail(&mut self, failure: Failure) {
        self.say(&ChildSays { failed: Some(failure.0), ..ChildSays::default() });
    }
}
