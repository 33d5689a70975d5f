//! JSON to a tree, with lines and with duplicate keys kept for the check. Literals are serde_json's to read.

use super::tree::{Key, MAX_DEPTH, MAX_NODES, Node, Tree, at, too_deep, too_many};
use crate::problem::Problem;

/// Reads one value that fills the text.
///
/// # Errors
/// The first place that is no JSON, or a limit.
pub(super) fn read(text: &str) -> Result<Node, Problem> {
    let mut reader = Reader { text, at: 0, line: 1, nodes: 0 };
    let node = reader.value(0)?;
    match reader.peek() {
        None => Ok(node),
        Some(_) => Err(reader.error("the end")),
    }
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
    line: usize,
    nodes: usize,
}

impl<'a> Reader<'a> {
    /// The next byte after white space.
    fn peek(&mut self) -> Option<u8> {
        let bytes = self.text.as_bytes();
        while let Some(byte @ (b' ' | b'\t' | b'\r' | b'\n')) = bytes.get(self.at) {
            self.line += usize::from(*byte == b'\n');
            self.at += 1;
        }
        bytes.get(self.at).copied()
    }

    fn eat(&mut self, byte: u8) -> bool {
        let there = self.peek() == Some(byte);
        self.at += usize::from(there);
        there
    }

    fn error(&self, wanted: &str) -> Problem {
        let rest = self.text.get(self.at..).unwrap_or_default();
        let found = rest.chars().next().map_or_else(|| "the end".to_owned(), |c| format!("{c:?}"));
        at(self.line, format!("not JSON: found {found}, want {wanted}"))
    }

    fn value(&mut self, depth: usize) -> Result<Node, Problem> {
        self.nodes += 1;
        if self.nodes > MAX_NODES {
            return Err(too_many(self.line));
        }
        let next = self.peek();
        let line = u32::try_from(self.line).unwrap_or(u32::MAX);
        let tree = match next {
            Some(b'{' | b'[') if depth >= MAX_DEPTH => return Err(too_deep(self.line)),
            Some(b'{') => self.map(depth)?,
            Some(b'[') => self.list(depth)?,
            Some(b'"') => Tree::Text(self.string()?),
            Some(b'-' | b'0'..=b'9') => self.number()?,
            Some(b't') => self.word("true", Tree::Bool(true))?,
            Some(b'f') => self.word("false", Tree::Bool(false))?,
            Some(b'n') => self.word("null", Tree::Null)?,
            _ => return Err(self.error("a value")),
        };
        Ok(Node { line, tree })
    }

    fn map(&mut self, depth: usize) -> Result<Tree, Problem> {
        self.at += 1;
        let mut map = Vec::new();
        if self.eat(b'}') {
            return Ok(Tree::Map(map));
        }
        loop {
            if self.peek() != Some(b'"') {
                return Err(self.error("a key in double quotes"));
            }
            let line = u32::try_from(self.line).unwrap_or(u32::MAX);
            let name = self.string()?;
            if !self.eat(b':') {
                return Err(self.error("':'"));
            }
            map.push((Key { line, name }, self.value(depth + 1)?));
            if self.eat(b'}') {
                return Ok(Tree::Map(map));
            }
            if !self.eat(b',') {
                return Err(self.error("',' or '}'"));
            }
        }
    }

    fn list(&mut self, depth: usize) -> Result<Tree, Problem> {
        self.at += 1;
        let mut items = Vec::new();
        if self.eat(b']') {
            return Ok(Tree::List(items));
        }
        loop {
            items.push(self.value(depth + 1)?);
            if self.eat(b']') {
                return Ok(Tree::List(items));
            }
            if !self.eat(b',') {
                return Err(self.error("',' or ']'"));
            }
        }
    }

    fn string(&mut self) -> Result<String, Problem> {
        let rest = self.text.get(self.at..).unwrap_or_default();
        let mut escaped = false;
        let end = rest.bytes().skip(1).position(|byte| {
            let ends = byte == b'"' && !escaped;
            escaped = byte == b'\\' && !escaped;
            ends
        });
        let Some(literal) = end.and_then(|end| rest.get(..end + 2)) else {
            return Err(at(self.line, "not JSON: a text without its closing quote"));
        };
        self.at += literal.len();
        serde_json::from_str(literal).map_err(|error| at(self.line, format!("not JSON: a text with {error}")))
    }

    fn number(&mut self) -> Result<Tree, Problem> {
        let rest = self.text.get(self.at..).unwrap_or_default();
        let end = rest.find(|c: char| !matches!(c, '0'..='9' | '+' | '-' | '.' | 'e' | 'E')).unwrap_or(rest.len());
        let literal = rest.get(..end).unwrap_or_default();
        let number: serde_json::Number = serde_json::from_str(literal)
            .map_err(|_| at(self.line, format!("not JSON: found {literal}, which is no number")))?;
        self.at += end;
        Ok(Tree::Number(number.to_string()))
    }

    fn word(&mut self, word: &str, tree: Tree) -> Result<Tree, Problem> {
        if !self.text.get(self.at..).is_some_and(|rest: &'a str| rest.starts_with(word)) {
            return Err(self.error("true, false or null"));
        }
        self.at += word.len();
        Ok(tree)
    }
}
