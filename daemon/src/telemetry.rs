//! Logging to stderr; `RUST_LOG` chooses what, `MINIPOD_LOG_FORMAT` how.

use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// `RUST_LOG` cannot be read.
    #[error("RUST_LOG {value:?}: {source}; write it like info or warn,minipod_apiserver=debug")]
    Filter {
        /// As it was given.
        value: String,
        /// What is wrong with it.
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    /// `MINIPOD_LOG_FORMAT` has an unknown value.
    #[error("MINIPOD_LOG_FORMAT {0:?}: only text and json are known")]
    Format(String),
    /// A subscriber is there already.
    #[error("logging was set up twice")]
    Twice,
}

/// Sends the process's log to stderr: level info unless `RUST_LOG` says otherwise, as text or, with
/// `MINIPOD_LOG_FORMAT=json`, as one JSON object a line.
///
/// # Errors
/// When one of the variables is not understood, or logging is set up already.
pub fn init() -> Result<(), TelemetryError> {
    let value = std::env::var("RUST_LOG").unwrap_or_default();
    let wanted = if value.is_empty() { "info" } else { &value };
    let filter =
        EnvFilter::try_new(wanted).map_err(|source| TelemetryError::Filter { value: value.clone(), source })?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let format = std::env::var("MINIPOD_LOG_FORMAT").unwrap_or_default();
    let done = match format.as_str() {
        "" | "text" => builder.with_ansi(std::io::stderr().is_terminal()).try_init(),
        "json" => builder.json().try_init(),
        _ => return Err(TelemetryError::Format(format)),
    };
    done.map_err(|_| TelemetryError::Twice)
}
