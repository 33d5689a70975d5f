//! Jobs and clusters from files.

mod csv;
mod swf;

pub use csv::{Nodes, nodes, pods};
pub use swf::{Record, Swf, swf};

/// Problems that are told of at once; a file of another format has one in every line.
const TOLD: usize = 10;

/// A place in a file that is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {field}: {value:?}: want {want}")]
pub struct Problem {
    /// Number of the line, from 1.
    pub line: usize,
    /// The field, by name.
    pub field: String,
    /// What is there.
    pub value: String,
    /// What would be right.
    pub want: &'static str,
}

/// Everything that is wrong with a file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", list(.0))]
pub struct ReadError(pub Vec<Problem>);

fn list(problems: &[Problem]) -> String {
    let mut lines: Vec<String> = problems.iter().take(TOLD).map(Problem::to_string).collect();
    if problems.len() > TOLD {
        lines.push(format!("and {} more", problems.len() - TOLD));
    }
    lines.join("\n")
}

/// The value, or all problems.
fn unless<T>(problems: Vec<Problem>, value: T) -> Result<T, ReadError> {
    if problems.is_empty() { Ok(value) } else { Err(ReadError(problems)) }
}
