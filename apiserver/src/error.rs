//! What callers are told.

use minipod_proto::Kind;
use tonic::{Code, Status};

use crate::storage::StoreError;

/// Why a request was not done.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The object or a parameter is wrong; one problem a line.
    #[error("{0}")]
    Invalid(String),
    /// There is no such object.
    #[error("{kind} {key} does not exist")]
    NotFound {
        /// Its kind.
        kind: Kind,
        /// Namespace and name.
        key: String,
    },
    /// The name is taken.
    #[error("{kind} {key} exists already")]
    Exists {
        /// Its kind.
        kind: Kind,
        /// Namespace and name.
        key: String,
    },
    /// The state of the object, or a stated uid, forbids it.
    #[error("{0}")]
    Precondition(String),
    /// Disruption budgets forbid that a pod is evicted now.
    #[error("cannot evict pod {pod} as it would violate the pod's disruption budget: {detail}")]
    Budget {
        /// Namespace and name.
        pod: String,
        /// Which budgets, and how they stand.
        detail: String,
    },
    /// The stated resourceVersion is not the newest, or others kept writing.
    #[error("{kind} {key} has changed: {detail}; read it again and retry")]
    Stale {
        /// Its kind.
        kind: Kind,
        /// Namespace and name.
        key: String,
        /// Which revisions.
        detail: String,
    },
    /// A later one holds the place of whoever writes.
    #[error("{0}")]
    Overtaken(String),
    /// Another API server's answer.
    #[error("{}", .0.message())]
    Relayed(Box<Status>),
    /// The revision cannot be watched or read any more.
    #[error("{0}")]
    Expired(String),
    /// A watcher did not keep up and was ended; everything up to the revision was delivered.
    #[error("the watch was too slow and was ended; resume from revision {0}")]
    Stalled(i64),
    /// A resize that the pod's node has no room for.
    #[error("node {node} has no room: {short}")]
    NoRoom {
        /// The node.
        node: String,
        /// The exact shortfalls.
        short: String,
        /// The node would not have the room without any other pod either.
        never: bool,
    },
    /// A limit of size or number.
    #[error("{0}")]
    TooLarge(String),
    /// The store has no room for anything new.
    #[error("{0}")]
    StoreFull(String),
    /// Something that this needs cannot be reached now.
    #[error("{0}")]
    Unavailable(String),
    /// An object in the store cannot be read.
    #[error("{kind} {key} in the store cannot be decoded: {source}")]
    Corrupt {
        /// Its kind.
        kind: &'static str,
        /// Namespace and name.
        key: String,
        /// What the decoder says.
        source: prost::DecodeError,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl ApiError {
    fn code(&self) -> Code {
        match self {
            ApiError::Invalid(_) => Code::InvalidArgument,
            ApiError::NotFound { .. } => Code::NotFound,
            ApiError::Exists { .. } => Code::AlreadyExists,
            ApiError::Precondition(_) | ApiError::NoRoom { .. } => Code::FailedPrecondition,
            ApiError::Stale { .. } | ApiError::Stalled(_) | ApiError::Overtaken(_) => Code::Aborted,
            ApiError::Relayed(status) => status.code(),
            ApiError::Expired(_) | ApiError::Store(StoreError::Compacted { .. }) => Code::OutOfRange,
            ApiError::TooLarge(_)
            | ApiError::StoreFull(_)
            | ApiError::Store(StoreError::TooLarge { .. } | StoreError::Full { .. }) => Code::ResourceExhausted,
            // What HTTP calls 429.
            ApiError::Budget { .. } => Code::ResourceExhausted,
            ApiError::Unavailable(_)
            | ApiError::Store(StoreError::Unavailable { .. } | StoreError::Uncertain { .. }) => Code::Unavailable,
            ApiError::Corrupt { .. } => Code::DataLoss,
            ApiError::Store(StoreError::Refused { .. }) => Code::Internal,
        }
    }
}

impl From<ApiError> for Status {
    fn from(error: ApiError) -> Status {
        Status::new(error.code(), error.to_string())
    }
}
