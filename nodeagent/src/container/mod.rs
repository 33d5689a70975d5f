//! From a pod and an image to what podshim is told about one container.

pub mod env;
pub mod expand;
mod mounts;
pub mod process;
pub mod resources;
pub mod spec;

/// A container cannot be made as it is written (waiting reason `CreateContainerConfigError`).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A reference to a field that does not exist.
    #[error("env {variable} refers to unknown field {path}")]
    UnknownField {
        /// The variable.
        variable: String,
        /// What it refers to.
        path: String,
    },
    /// Neither manifest nor image says what to run.
    #[error("container {0}: neither the manifest nor the image has a command")]
    NoCommand(String),
    /// runAsNonRoot.
    #[error("container has runAsNonRoot and would run as root")]
    WouldBeRoot,
    /// A mount of a volume that the pod has not.
    #[error("volumeMounts refers to volume {0:?}, which the pod does not have")]
    UnknownVolume(String),
    /// A subPathExpr that names no place in the volume.
    #[error("volumeMounts.subPathExpr {expression:?}: {why}")]
    SubPathExpr {
        /// As in the manifest.
        expression: String,
        /// What is wrong with it.
        why: String,
    },
    /// An id that the pod's own users do not have.
    #[error("the container has {what} {id}; a pod with hostUsers: false has the ids 0 to {last}")]
    BeyondUsers {
        /// `user`, `group`, or `supplementary group`.
        what: &'static str,
        /// Which.
        id: u32,
        /// The pod's last.
        last: u32,
    },
    /// No filter for its system calls.
    #[error(transparent)]
    Seccomp(#[from] crate::seccomp::SeccompError),
    /// No AppArmor profile for it.
    #[error(transparent)]
    AppArmor(#[from] crate::apparmor::AppArmorError),
    /// Not a capability.
    #[error("unknown capability {0:?}")]
    UnknownCapability(String),
    /// A ConfigMap or Secret that is not there (yet).
    #[error("{kind} {name:?} not found")]
    SourceNotFound {
        /// `configmap` or `secret`.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// It is there and has no such key.
    #[error("couldn't find key {key} in {kind} {name:?}")]
    NoKey {
        /// `configmap` or `secret`.
        kind: &'static str,
        /// Its name.
        name: String,
        /// What is missing.
        key: String,
    },
    /// A value that no environment can hold.
    #[error("env {0}: the value is not text without NUL bytes")]
    NotText(String),
    /// A key that cannot be the name of a variable.
    #[error("envFrom: {0:?} cannot be the name of a variable: it is empty, or has `=` or unprintable characters")]
    BadName(String),
    /// A field that this agent does not carry out; nothing is ignored silently.
    #[error("{0} is not supported by this agent")]
    Unsupported(String),
}
