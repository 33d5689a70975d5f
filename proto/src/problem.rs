//! What is wrong with an object or a manifest, for all problems at once.

use std::fmt;

/// One thing that is wrong: where, and what would be right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Line of the manifest, from 1; 0 where there is no text.
    pub line: u32,
    /// Path of the field, such as `spec.containers[0].image`; empty for the whole.
    pub path: String,
    /// What was found and what would be right.
    pub message: String,
}

impl Problem {
    /// A problem without a line.
    pub fn new(path: impl Into<String>, message: impl Into<String>) -> Problem {
        Problem { line: 0, path: path.into(), message: message.into() }
    }

    /// A value that is wrong, with what would be right. Long values are cut.
    pub fn found(path: impl Into<String>, value: impl AsRef<str>, wanted: impl fmt::Display) -> Problem {
        Problem::new(path, format!("found {}: {wanted}", quoted(value.as_ref())))
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line > 0 {
            write!(f, "line {}: ", self.line)?;
        }
        if !self.path.is_empty() {
            printable(f, &self.path)?;
            f.write_str(": ")?;
        }
        printable(f, &self.message)
    }
}

/// Names of the input stand in paths and messages: they must not break the line or speak to a terminal.
fn printable(f: &mut fmt::Formatter<'_>, text: &str) -> fmt::Result {
    for piece in text.split_inclusive(char::is_control) {
        match piece.char_indices().next_back() {
            Some((place, last)) if last.is_control() => {
                write!(f, "{}{}", piece.get(..place).unwrap_or_default(), last.escape_default())?;
            }
            _ => f.write_str(piece)?,
        }
    }
    Ok(())
}

/// Most problems that one input is told about: nobody reads more, and an answer must fit a gRPC status.
pub const MAX_PROBLEMS: usize = 50;

/// All that is wrong, at most [`MAX_PROBLEMS`]; its Display is one problem a line.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Problems {
    /// In the order of the text.
    pub list: Vec<Problem>,
    /// How many more there were.
    pub more: usize,
}

impl Problems {
    /// Adds one, or counts it when there are many already.
    pub fn push(&mut self, problem: Problem) {
        if self.list.len() < MAX_PROBLEMS {
            self.list.push(problem);
        } else {
            self.more += 1;
        }
    }

    /// Whether nothing is wrong.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// `Ok` when nothing is wrong.
    ///
    /// # Errors
    /// Itself, when something is.
    pub fn into_result(self) -> Result<(), Problems> {
        if self.is_empty() { Ok(()) } else { Err(self) }
    }
}

impl From<Problem> for Problems {
    fn from(problem: Problem) -> Problems {
        Problems { list: vec![problem], more: 0 }
    }
}

impl From<Vec<Problem>> for Problems {
    fn from(list: Vec<Problem>) -> Problems {
        let mut problems = Problems::default();
        list.into_iter().for_each(|problem| problems.push(problem));
        problems
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.list.iter().enumerate() {
            write!(f, "{}{problem}", if index > 0 { "\n" } else { "" })?;
        }
        if self.more > 0 {
            write!(f, "\nand {} more", self.more)?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// A text in quotes, cut when it is long.
pub(crate) fn quoted(text: &str) -> String {
    const MOST: usize = 60;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{:?}…", text.get(..end).unwrap_or_default()),
        None => format!("{text:?}"),
    }
}

/// The candidate that was probably meant: equal but for case, or a few letters away.
pub(crate) fn near<'a>(text: &str, candidates: impl Iterator<Item = &'a str> + Clone) -> Option<&'a str> {
    // No name is that long, and the distance costs the product of the lengths.
    if text.len() > 64 {
        return None;
    }
    if let Some(same) = candidates.clone().find(|candidate| candidate.eq_ignore_ascii_case(text)) {
        return Some(same);
    }
    let allowed = match text.len() {
        0..=2 => 0,
        3..=5 => 1,
        6..=9 => 2,
        _ => 3,
    };
    let distances = candidates.map(|candidate| (distance(text, candidate), candidate));
    distances.filter(|(distance, _)| *distance <= allowed).min_by_key(|(distance, _)| *distance).map(|(_, best)| best)
}

/// Insertions, deletions, replacements and swaps of neighbours between two texts (optimal string alignment).
fn distance(one: &str, other: &str) -> usize {
    let (one, other): (Vec<char>, Vec<char>) = (one.chars().collect(), other.chars().collect());
    let (mut before, mut last): (Vec<usize>, Vec<usize>) = (Vec::new(), (0..=other.len()).collect());
    for (i, a) in one.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, b) in other.iter().enumerate() {
            let cost = usize::from(!a.eq_ignore_ascii_case(b));
            let mut best = (last[j] + cost).min(last[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && *a == other[j - 1] && one[i - 1] == *b {
                best = best.min(before[j - 1] + 1);
            }
            row.push(best);
        }
        before = std::mem::replace(&mut last, row);
    }
    last.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_names() {
        let names = ["image", "imagePullPolicy", "name", "env", "envFrom", "tty"];
        for (text, expected) in [
            ("imagePulPolicy", Some("imagePullPolicy")),
            ("imagepullpolicy", Some("imagePullPolicy")),
            ("iamge", Some("image")),
            ("Name", Some("name")),
            ("evn", Some("env")),
            ("xyz", None),
            ("replicas", None),
            ("", None),
        ] {
            assert_eq!(near(text, names.into_iter()), expected, "{text}");
        }
        assert_eq!(distance("abcd", "acbd"), 1);
        assert_eq!(distance("", "abc"), 3);
    }

    #[test]
    fn one_problem_is_one_line() {
        let problem = Problem::found("a.x\ny", "v\n", "want a\u{1b}[31m b\r");
        assert_eq!(problem.to_string(), r#"a.x\ny: found "v\n": want a\u{1b}[31m b\r"#);
    }

    #[test]
    fn many_problems_are_counted() {
        let mut problems = Problems::default();
        (0..MAX_PROBLEMS + 2).for_each(|n| problems.push(Problem::found(format!("a[{n}]"), "x", "want y")));
        assert!(problems.to_string().starts_with("a[0]: found \"x\": want y\na[1]: "));
        assert!(problems.to_string().ends_with("\nand 2 more"));
    }
}
