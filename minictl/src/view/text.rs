//! Text of others on the user's terminal: names, messages and logs must not move the cursor, set the title or answer
//! for the user.

use std::borrow::Cow;

/// A text for a cell of a table or a line: every control character is shown, not obeyed.
#[must_use]
pub fn line(text: &str) -> Cow<'_, str> {
    clean(text, false)
}

/// A text of several lines: as [`line()`], but line breaks and tabs stay.
#[must_use]
pub fn block(text: &str) -> Cow<'_, str> {
    clean(text, true)
}

fn clean(text: &str, lines: bool) -> Cow<'_, str> {
    let stays = |c: char| (lines && matches!(c, '\n' | '\t')) || !is_dangerous(c);
    if text.chars().all(stays) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if stays(c) {
            out.push(c);
        } else {
            out.extend(c.escape_default());
        }
    }
    Cow::Owned(out)
}

/// Control characters (C0, DEL, C1) and those that turn the direction of writing (Unicode's bidirectional controls).
fn is_dangerous(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200e}' | '\u{200f}' | '\u{061c}')
}

/// Longest parameter text of a colour sequence; anything longer is none.
const MAX_PARAMETERS: usize = 32;

/// A log on its way to a terminal: colours (SGR, `ESC [ … m`) pass, and so do line breaks, tabs and carriage returns; every
/// other control character is shown. Works on pieces of any size; text that is no UTF-8 passes as it is, but for C0.
#[derive(Debug, Default)]
pub struct LogFilter {
    /// The start of a sequence whose rest has not come yet.
    pending: Vec<u8>,
}

impl LogFilter {
    /// Filters the next piece.
    #[must_use]
    pub fn push(&mut self, piece: &[u8]) -> Vec<u8> {
        let mut input = std::mem::take(&mut self.pending);
        input.extend_from_slice(piece);
        let mut out = Vec::with_capacity(input.len());
        let mut rest = input.as_slice();
        while let Some((&byte, after)) = rest.split_first() {
            match (byte, after) {
                (0x1b, _) => match colour(rest) {
                    Colour::Whole(length) => {
                        out.extend(rest.iter().take(length));
                        rest = rest.get(length..).unwrap_or_default();
                        continue;
                    }
                    Colour::Open => {
                        self.pending = rest.to_vec();
                        return out;
                    }
                    Colour::No => out.extend(b"^["),
                },
                // C1 controls in UTF-8: 0xc2 0x80 to 0xc2 0x9f; terminals obey them like ESC sequences.
                (0xc2, []) => {
                    self.pending = rest.to_vec();
                    return out;
                }
                (0xc2, [second @ 0x80..=0x9f, ..]) => {
                    out.extend(format!("\\u{{{second:x}}}").bytes());
                    rest = after.get(1..).unwrap_or_default();
                    continue;
                }
                (b'\n' | b'\t' | b'\r', _) => out.push(byte),
                (0..0x20, _) => out.extend([b'^', byte + 0x40]),
                (0x7f, _) => out.extend(b"^?"),
                _ => out.push(byte),
            }
            rest = after;
        }
        out
    }

    /// What was held back, at the end.
    #[must_use]
    pub fn finish(&mut self) -> Vec<u8> {
        let pending = std::mem::take(&mut self.pending);
        match pending.split_first() {
            Some((0x1b, rest)) => b"^[".iter().chain(rest).copied().collect(),
            _ => pending,
        }
    }
}

enum Colour {
    /// A colour sequence of that many bytes.
    Whole(usize),
    /// It may become one.
    Open,
    No,
}

fn colour(text: &[u8]) -> Colour {
    match text.get(1) {
        None => return Colour::Open,
        Some(b'[') => {}
        Some(_) => return Colour::No,
    }
    for (index, byte) in text.iter().enumerate().skip(2) {
        match byte {
            b'm' => return Colour::Whole(index + 1),
            b'0'..=b'9' | b';' | b':' if index < MAX_PARAMETERS => {}
            _ => return Colour::No,
        }
    }
    Colour::Open
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controls_are_shown() {
        assert_eq!(line("plain ü 日本"), "plain ü 日本");
        assert_eq!(line("a\u{1b}[2Jb"), "a\\u{1b}[2Jb");
        assert_eq!(line("two\nlines\t"), "two\\nlines\\t");
        assert_eq!(block("two\nlines\t\r"), "two\nlines\t\\r");
        assert_eq!(line("x\u{9b}31m\u{202e}"), "x\\u{9b}31m\\u{202e}");
    }

    fn filtered(pieces: &[&[u8]]) -> String {
        let mut filter = LogFilter::default();
        let mut out: Vec<u8> = pieces.iter().flat_map(|piece| filter.push(piece)).collect();
        out.extend(filter.finish());
        String::from_utf8(out).expect("tests use UTF-8")
    }

    #[test]
    fn logs_keep_their_colours_and_nothing_else() {
        for (log, shown) in [
            ("plain\r\n\tü\n", "plain\r\n\tü\n"),
            ("\x1b[1;31mred\x1b[0m", "\x1b[1;31mred\x1b[0m"),
            ("\x1b[2J\x1b]0;title\x07", "^[[2J^[]0;title^G"),
            ("\x1b[38:5:1mx", "\x1b[38:5:1mx"),
            ("a\u{9b}2Jb\x7f\x08", "a\\u{9b}2Jb^?^H"),
            ("\x1b", "^["),
            ("\x1b[31", "^[[31"),
        ] {
            assert_eq!(filtered(&[log.as_bytes()]), shown, "{log:?}");
            let bytes: Vec<&[u8]> = log.as_bytes().chunks(1).collect();
            assert_eq!(filtered(&bytes), shown, "{log:?} byte by byte");
        }
        let long = format!("\x1b[{}m", "1;".repeat(1000));
        assert!(filtered(&[long.as_bytes()]).starts_with("^[[1;"));
    }
}
