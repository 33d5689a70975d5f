//! What a container leaves to say: its termination log, or the end of its log.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

/// Most of a termination log that is read.
const MAX_MESSAGE_BYTES: u64 = 4096;
/// Most of a container's log that stands in for it, in bytes and lines.
const MAX_FALLBACK_BYTES: usize = 2048;
const MAX_FALLBACK_LINES: usize = 80;

/// The termination message; empty when there is none.
#[must_use]
pub fn message(termination_log: &Path, log: &Path, policy: &str, exit_code: i32) -> String {
    let own = read_end(termination_log, MAX_MESSAGE_BYTES).unwrap_or_default();
    if !own.is_empty() || policy != "FallbackToLogsOnError" || exit_code == 0 {
        return own;
    }
    // The CRI format adds some 45 bytes to each line.
    let raw = read_end(log, 4 * MAX_FALLBACK_BYTES as u64).unwrap_or_default();
    fallback(&raw)
}

/// The last lines of a log in CRI format, without their heads.
fn fallback(raw: &str) -> String {
    let mut text = String::new();
    let lines: Vec<&str> = raw.lines().collect();
    for line in &lines[lines.len().saturating_sub(MAX_FALLBACK_LINES)..] {
        let mut parts = line.splitn(4, ' ');
        if let (Some(_), Some(_), Some(tag), Some(content)) = (parts.next(), parts.next(), parts.next(), parts.next()) {
            text.push_str(content);
            if tag == "F" {
                text.push('\n');
            }
        }
    }
    let mut from = text.len().saturating_sub(MAX_FALLBACK_BYTES);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    text.split_off(from)
}

fn read_end(path: &Path, max_bytes: u64) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(max_bytes)))?;
    let mut bytes = Vec::new();
    file.take(max_bytes).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_wins_and_the_log_stands_in_after_failures_only() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (own, log) = (dir.path().join("own"), dir.path().join("log"));
        let line = |tag: &str, text: &str| format!("2026-01-01T00:00:00.000000000Z stderr {tag} {text}\n");
        std::fs::write(&log, line("F", "first") + &line("P", "sec") + &line("F", "ond")).expect("write");
        let fallback = "FallbackToLogsOnError";
        assert_eq!(message(&own, &log, fallback, 1), "first\nsecond\n");
        assert_eq!(message(&own, &log, fallback, 0), "");
        assert_eq!(message(&own, &log, "File", 1), "");
        std::fs::write(&own, "x".repeat(5000)).expect("write");
        assert_eq!(message(&own, &log, fallback, 1).len(), 4096);
    }

    #[test]
    fn the_fallback_is_bounded() {
        let lines: String = (0..200).map(|n| format!("t s F line {n}\n")).collect();
        let text = super::fallback(&lines);
        assert!(text.starts_with("line 120\n") && text.ends_with("line 199\n"), "{text}");
        let long: String = (0..80).map(|_| format!("t s F {}\n", "ü".repeat(100))).collect();
        assert!(super::fallback(&long).len() <= 2048);
    }
}
