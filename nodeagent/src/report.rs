//! Errors as one line.

use std::error::Error;

/// Most bytes of an error's text. It goes into status, events and gRPC's trailers (three bytes for one of ours, 16 KiB at most in all), and what it names
/// can be an image's or a registry's own text, of some megabytes: that would be refused there, again and again.
const MAX_BYTES: usize = 2048;

/// An error and its sources, `: ` between them; a source that its parent has said already is left out, and what is too long is cut.
#[must_use]
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    if text.len() > MAX_BYTES {
        let more = format!("… ({} bytes in all)", text.len());
        text.truncate(text.floor_char_boundary(MAX_BYTES - more.len()));
        text.push_str(&more);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("read {0}")]
    struct Named(String, #[source] std::io::Error);

    #[test]
    fn causes_are_told_and_no_text_is_endless() {
        let error = |name: &str| Named(name.to_owned(), std::io::Error::other("broken"));
        assert_eq!(chain(&error("x")), "read x: broken");
        let text = chain(&error(&"ä".repeat(3 << 20)));
        assert!(text.len() <= MAX_BYTES && text.starts_with("read ä"), "{} bytes", text.len());
        assert!(text.ends_with("… (6291469 bytes in all)"));
    }
}
