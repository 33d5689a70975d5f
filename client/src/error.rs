//! What can go wrong with a call, sorted by what a caller does about it.

use std::error::Error;
use std::fmt;
use std::sync::Arc;

use tonic::{Code, ConnectError, Status};

/// What was being done to what, for messages: `get Pod default/web`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operation {
    verb: &'static str,
    object: String,
}

impl Operation {
    /// `verb` in the words of a user, `object` as kind and name.
    pub fn new(verb: &'static str, object: impl Into<String>) -> Operation {
        Operation { verb, object: object.into() }
    }

    /// Kind and name.
    #[must_use]
    pub fn object(&self) -> &str {
        &self.object
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.verb, self.object)
    }
}

/// Why a call failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ClientError {
    /// There is no such object.
    #[error("{operation}: {message}")]
    NotFound {
        /// What was being done.
        operation: Operation,
        /// The server's words.
        message: String,
    },
    /// The name is taken.
    #[error("{operation}: {message}")]
    AlreadyExists {
        /// What was being done.
        operation: Operation,
        /// The server's words.
        message: String,
    },
    /// The object was changed by somebody else in between: read it again and retry.
    #[error("{operation}: {message}")]
    Conflict {
        /// What was being done.
        operation: Operation,
        /// The server's words.
        message: String,
    },
    /// The object's state or a stated uid forbids it.
    #[error("{operation}: {message}")]
    Refused {
        /// What was being done.
        operation: Operation,
        /// The server's words.
        message: String,
    },
    /// The object or a parameter is wrong.
    #[error("{operation}: {}", problems.join("\n  "))]
    Invalid {
        /// What was being done.
        operation: Operation,
        /// Every problem, with path, value and what would be right.
        problems: Vec<String>,
    },
    /// The revision was compacted away: list again.
    #[error("{operation}: {message}")]
    Expired {
        /// What was being done.
        operation: Operation,
        /// The server's words; they name the oldest revision that can be resumed from.
        message: String,
    },
    /// A size limit, which the message names.
    #[error("{operation}: {message}")]
    TooLarge {
        /// What was being done.
        operation: Operation,
        /// The server's words.
        message: String,
    },
    /// Disruption budgets forbid it now; later they may not.
    #[error("{operation}: {message}")]
    Budget {
        /// What was being done.
        operation: Operation,
        /// The server's words.
        message: String,
    },
    /// Not allowed.
    #[error("{operation}: {message}")]
    Denied {
        /// What was being done.
        operation: Operation,
        /// The server's words.
        message: String,
    },
    /// No API server could be reached: nothing was sent.
    #[error("{operation}: no API server answers at {servers}: {reason}")]
    Unreachable {
        /// What was being done.
        operation: Operation,
        /// The addresses that were tried.
        servers: String,
        /// Why the last of them did not answer.
        reason: String,
    },
    /// The server or its store is not there now. A write may or may not have happened.
    #[error("{operation}: {message}")]
    Unavailable {
        /// What was being done.
        operation: Operation,
        /// The server's words.
        message: String,
    },
    /// No answer in time. A write may or may not have happened.
    #[error("{operation}: no answer within {seconds} s")]
    Timeout {
        /// What was being done.
        operation: Operation,
        /// How long the answer was waited for.
        seconds: u64,
    },
    /// The server does not know the call.
    #[error("{operation}: the server does not support this: {message}")]
    Unsupported {
        /// What was being done.
        operation: Operation,
        /// The server's words.
        message: String,
    },
    /// Anything else the server or the transport says.
    #[error("{operation}: {message}")]
    Server {
        /// What was being done.
        operation: Operation,
        /// The gRPC code.
        code: Code,
        /// The words that came with it.
        message: String,
    },
    /// The answer is not what the contract says.
    #[error("{operation}: the server's answer makes no sense: {message}")]
    Answer {
        /// What was being done.
        operation: Operation,
        /// What is wrong with it.
        message: String,
    },
    /// Data that was to be sent could not be read.
    #[error("{operation}: read the data to send")]
    Input {
        /// What was being done.
        operation: Operation,
        /// The reason.
        #[source]
        source: Arc<std::io::Error>,
    },
    /// An API server's address cannot be used.
    #[error("server address {address:?}: {message}: want http://HOST:PORT, several separated by commas")]
    Address {
        /// As it was given.
        address: String,
        /// What is wrong with it.
        message: String,
    },
}

impl ClientError {
    /// Sorts a gRPC status.
    #[must_use]
    pub fn from_status(operation: Operation, status: &Status) -> ClientError {
        if connection_broke(status) {
            return ClientError::Unavailable {
                operation,
                message: format!("the connection broke: {}", causes(status)),
            };
        }
        let message = match status.message() {
            "" => status.code().description().to_owned(),
            text => text.to_owned(),
        };
        match status.code() {
            Code::NotFound => ClientError::NotFound { operation, message },
            Code::AlreadyExists => ClientError::AlreadyExists { operation, message },
            Code::Aborted => ClientError::Conflict { operation, message },
            Code::FailedPrecondition => ClientError::Refused { operation, message },
            Code::InvalidArgument => {
                let problems = message.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned);
                ClientError::Invalid { operation, problems: problems.collect() }
            }
            Code::OutOfRange => ClientError::Expired { operation, message },
            Code::ResourceExhausted => ClientError::TooLarge { operation, message },
            Code::PermissionDenied | Code::Unauthenticated => ClientError::Denied { operation, message },
            Code::Unavailable => ClientError::Unavailable { operation, message },
            Code::Unimplemented => ClientError::Unsupported { operation, message },
            code => ClientError::Server { operation, code, message },
        }
    }

    /// There is no such object.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, ClientError::NotFound { .. })
    }

    /// Somebody else was faster: read again and retry.
    #[must_use]
    pub fn is_conflict(&self) -> bool {
        matches!(self, ClientError::Conflict { .. })
    }

    /// The name is taken.
    #[must_use]
    pub fn is_already_exists(&self) -> bool {
        matches!(self, ClientError::AlreadyExists { .. })
    }

    /// The revision was compacted away.
    #[must_use]
    pub fn is_expired(&self) -> bool {
        matches!(self, ClientError::Expired { .. })
    }

    /// The same call may work a little later, without anybody changing anything.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self, ClientError::Unreachable { .. } | ClientError::Unavailable { .. } | ClientError::Timeout { .. })
    }

    /// What to do about it, for a person at a terminal.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            ClientError::Unreachable { .. } => Some(
                "is the API server running? its address comes from --server, MINIPOD_SERVER or `minictl config view`",
            ),
            ClientError::Unavailable { .. } | ClientError::Timeout { .. } => {
                Some("try again in a moment; after a write look first whether it happened: `minictl get`")
            }
            ClientError::Budget { .. } => Some(
                "try again when more of its pods are ready: `minictl get pdb`; `minictl delete pod` asks no budget",
            ),
            ClientError::Conflict { .. } => Some("somebody else changed it meanwhile: read it again and retry"),
            ClientError::Expired { .. } => Some("start again with a fresh list"),
            ClientError::Unsupported { .. } => Some("compare the versions: `minictl version`"),
            _ => None,
        }
    }
}

/// Whether the request never left this machine, so that trying elsewhere cannot do anything twice.
pub(crate) fn never_sent(status: &Status) -> bool {
    sources(status).any(|error| error.is::<ConnectError>())
}

/// What the system says of a connection that did not come to be: the end of the chain of causes.
pub(crate) fn reason(status: &Status) -> String {
    sources(status).last().map_or_else(|| status.message().to_owned(), ToString::to_string)
}

/// Whether it was the transport that failed, and not the server that answered.
pub(crate) fn connection_broke(status: &Status) -> bool {
    sources(status).any(|error| error.is::<tonic::transport::Error>())
}

fn sources(status: &Status) -> impl Iterator<Item = &(dyn Error + 'static)> {
    std::iter::successors(status.source(), |error: &&(dyn Error + 'static)| Error::source(*error))
}

/// The chain of causes in words, without those that repeat the one before.
fn causes(status: &Status) -> String {
    let mut words: Vec<String> = sources(status).map(ToString::to_string).collect();
    words.dedup();
    words.join(": ")
}
