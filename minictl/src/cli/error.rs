//! What the user is told when something does not work: one sentence, and what to type next.

use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use minipod_client::ClientError;
use minipod_proto::manifest::Problems;
use minipod_store::remote::RemoteError;
use minipod_store::tool::ToolError;

use crate::local::LocalError;
use crate::view::text;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// A call failed.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A data directory of the store, or a saved snapshot.
    #[error(transparent)]
    StoreFiles(#[from] ToolError),
    /// A member of the store.
    #[error(transparent)]
    StoreMember(#[from] RemoteError),
    /// A store's files and a running member have different contents.
    #[error(
        "the hash at revision {revision} is {here} here and {there} at {endpoint}: one of them has lost or changed something"
    )]
    Differs {
        /// The member.
        endpoint: String,
        /// The revision of both.
        revision: i64,
        /// The files' hash.
        here: u32,
        /// The member's hash.
        there: u32,
    },
    /// The cluster on this machine.
    #[error(transparent)]
    Local(#[from] LocalError),
    /// A manifest is wrong.
    #[error("{source_name}: {problems}")]
    Manifest {
        /// The file, or `standard input`.
        source_name: String,
        /// Everything that is wrong with it.
        problems: Problems,
    },
    /// A file or stream.
    #[error("{operation} {}", path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Standard output.
    #[error("write to standard output")]
    Output(#[source] io::Error),
    /// The command line makes no sense, in a way that clap cannot see.
    #[error("{message}")]
    Usage {
        /// What is wrong.
        message: String,
        /// What to type instead.
        hint: String,
    },
    /// Some of several things failed; each was told already.
    #[error("{failed} of {all} failed")]
    Some {
        /// How many.
        failed: usize,
        /// Of how many.
        all: usize,
    },
    /// Files here, or a stream of them that is not to be trusted.
    #[error(transparent)]
    Transfer(#[from] minipod_transfer::TransferError),
    /// A copy is there, but for this many entries; each was told already.
    #[error("{0} of the entries were left out")]
    LeftOut(usize),
    /// What was waited for did not happen.
    #[error("{what} did not happen within {seconds} s; last seen: {last}")]
    Waited {
        /// What.
        what: String,
        /// How long was waited.
        seconds: u64,
        /// What there was instead.
        last: String,
    },
    /// A command in a container ended with this code, which becomes ours.
    #[error("the command ended with exit code {0}")]
    Exit(i32),
    /// The reader of standard output has gone.
    #[error("standard output was closed")]
    Closed,
}

impl CliError {
    /// A mistake on the command line.
    pub fn usage(message: impl Into<String>, hint: impl Into<String>) -> CliError {
        CliError::Usage { message: message.into(), hint: hint.into() }
    }

    /// Writing to standard output failed.
    #[must_use]
    pub fn output(error: io::Error) -> CliError {
        if error.kind() == io::ErrorKind::BrokenPipe { CliError::Closed } else { CliError::Output(error) }
    }

    /// Curried for `map_err`.
    pub fn file(operation: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> CliError {
        let path = path.into();
        move |source| CliError::File { operation, path, source }
    }

    /// Prints it on standard error, unless there is nothing to say.
    pub fn report(&self) {
        if matches!(self, CliError::Exit(_) | CliError::Closed) {
            return;
        }
        note!("error: {}", text::block(&self.sentence()));
        if let Some(hint) = self.hint() {
            note!("hint: {}", text::line(&hint));
        }
    }

    /// The error and its causes.
    #[must_use]
    pub fn sentence(&self) -> String {
        let mut sentence = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            let words = error.to_string();
            if !sentence.contains(&words) {
                sentence = format!("{sentence}: {words}");
            }
            cause = error.source();
        }
        sentence
    }

    /// What to type next.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            CliError::Client(error @ ClientError::NotFound { operation, .. }) => {
                let kind = operation.object().split_whitespace().next().unwrap_or("Pod");
                let kind = minipod_proto::Kind::from_name(kind);
                let hint = kind.map(|kind| {
                    let all = if kind.namespaced() { " -A" } else { "" };
                    format!("see what there is: minictl get {}{all}", kind.plural())
                });
                hint.or_else(|| error.hint().map(str::to_owned))
            }
            CliError::Client(error) => error.hint().map(str::to_owned),
            CliError::Manifest { .. } => Some("nothing was sent; correct the file and try again".to_owned()),
            CliError::Usage { hint, .. } => Some(hint.clone()),
            CliError::StoreMember(RemoteError::Connect { .. }) => Some(
                "the API server serves its store where --store-listen says; `minictl store status` without --endpoints asks the API".to_owned(),
            ),
            CliError::StoreFiles(error) => store_hint(error).map(str::to_owned),
            _ => None,
        }
    }

    /// 1, or the code of the command that was run.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            // 0 would be no error; what does not fit a byte is cut to one, as a shell does.
            CliError::Exit(code) => ExitCode::from(u8::try_from(code & 0xff).unwrap_or(1).max(1)),
            CliError::Closed => ExitCode::SUCCESS,
            CliError::Usage { .. } => ExitCode::from(2),
            _ => ExitCode::FAILURE,
        }
    }
}

/// What to do about a directory or a file that cannot be used, where the error itself does not say it.
const fn store_hint(error: &ToolError) -> Option<&'static str> {
    match error {
        ToolError::Saved { .. } | ToolError::Restore { .. } => {
            Some("use an older snapshot, or save one from a running server: minictl store snapshot FILE")
        }
        ToolError::NotEmpty { .. } => {
            Some("a restore never replaces a store: move the directory away first, or name another one")
        }
        ToolError::Empty { .. } => {
            Some("name the directory that the API server has as --data-dir, or a saved snapshot")
        }
        _ => None,
    }
}
