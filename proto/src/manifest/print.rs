//! Objects to JSON and YAML, in the order in which Kubernetes declares the fields.

use std::fmt::Write as _;

use serde_json::Value;

use super::{plain::resolve, tree::Tree};
use crate::v1::Object;

fn value(object: &Object) -> Value {
    let mut object = object.clone();
    object.set_type();
    // Serialising these types cannot fail: no map has keys other than text.
    serde_json::to_value(&object).unwrap_or(Value::Null)
}

/// The object as JSON, indented, with apiVersion and kind and a newline at the end.
pub fn to_json(object: &Object) -> String {
    format!("{:#}\n", value(object))
}

/// The object as one YAML document, with apiVersion and kind. [`super::parse`] reads it back to the same object.
pub fn to_yaml(object: &Object) -> String {
    value_to_yaml(value(object))
}

/// Any JSON value as one YAML document.
pub fn value_to_yaml(value: Value) -> String {
    let mut text = String::new();
    match value {
        Value::Object(map) if !map.is_empty() => pairs(&mut text, map, 0),
        other => {
            scalar(&mut text, &other, 0);
            text.push('\n');
        }
    }
    text
}

fn indent(out: &mut String, depth: usize) {
    (0..depth).for_each(|_| out.push_str("  "));
}

/// The lines of a map; the first one is not indented, it stands where the text already is.
fn pairs(out: &mut String, map: serde_json::Map<String, Value>, depth: usize) {
    for (index, (key, value)) in map.into_iter().enumerate() {
        if index > 0 {
            indent(out, depth);
        }
        out.push_str(&key_text(&key));
        out.push(':');
        match value {
            Value::Object(map) if !map.is_empty() => {
                out.push('\n');
                indent(out, depth + 1);
                pairs(out, map, depth + 1);
            }
            Value::Array(items) if !items.is_empty() => {
                out.push('\n');
                list(out, items, depth);
            }
            other => {
                out.push(' ');
                scalar(out, &other, depth + 1);
                out.push('\n');
            }
        }
    }
}

/// A list's dashes stand under the key's first letter, as kubectl prints them.
fn list(out: &mut String, items: Vec<Value>, depth: usize) {
    for item in items {
        indent(out, depth);
        out.push_str("- ");
        match item {
            Value::Object(map) if !map.is_empty() => pairs(out, map, depth + 1),
            Value::Array(items) if !items.is_empty() => {
                // No Kubernetes object has a list in a list; if one comes, the flow style says it.
                let _ = writeln!(out, "{}", Value::Array(items));
            }
            other => {
                scalar(out, &other, depth + 1);
                out.push('\n');
            }
        }
    }
}

/// A scalar or an empty collection, without the newline. `depth` is that of a block's content.
fn scalar(out: &mut String, value: &Value, depth: usize) {
    match value {
        Value::String(text) if is_plain(text) => out.push_str(text),
        Value::String(text) if is_literal(text) => literal(out, text, depth),
        Value::String(text) => out.push_str(&double_quoted(text)),
        // Numbers, booleans, null and empty collections are written as JSON writes them.
        other => {
            let _ = write!(out, "{other}");
        }
    }
}

fn key_text(key: &str) -> String {
    if is_plain(key) { key.to_owned() } else { double_quoted(key) }
}

/// Whether a text can stand without quotes: for this reader and for stricter and older ones.
fn is_plain(text: &str) -> bool {
    let begins = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '_');
    let inside = |c: char| {
        c.is_ascii_alphanumeric() || matches!(c, '/' | '_' | '.' | '-' | ' ' | ':' | '@' | '+' | '=' | '$' | '(' | ')')
    };
    // Dates, times, sexagesimals, exponents, octals: some reader takes them for numbers.
    let like_a_number = text.starts_with(|c: char| c.is_ascii_digit())
        && text.chars().all(|c| {
            c.is_ascii_hexdigit() || matches!(c, '_' | '.' | ':' | '+' | '-' | 'x' | 'X' | 'o' | 'O' | ' ' | 'T' | 'Z')
        });
    text.starts_with(begins)
        && text.chars().all(inside)
        && !text.ends_with([' ', ':'])
        && !text.contains(": ")
        && text.len() <= 200
        && !like_a_number
        && !matches!(text, "y" | "Y" | "n" | "N")
        && matches!(resolve(text), Some(Tree::Text(_)))
}

/// Whether a text of several lines can stand as a literal block and read back the same.
fn is_literal(text: &str) -> bool {
    let body = text.strip_suffix('\n').unwrap_or(text);
    let printable = |c: char| {
        matches!(c, '\n' | '\t' | ' '..='~')
            || (c > '\u{a0}' && !matches!(c, '\u{2028}' | '\u{2029}' | '\u{feff}' | '\u{fffe}' | '\u{ffff}'))
    };
    body.contains('\n')
        && !body.starts_with([' ', '\t', '\n'])
        && !body.ends_with(['\n', ' ', '\t'])
        && text.chars().all(printable)
        // A line of blanks alone could be taken for indentation.
        && !body.split('\n').any(|line| !line.is_empty() && line.trim_matches([' ', '\t']).is_empty())
}

fn literal(out: &mut String, text: &str, depth: usize) {
    let (head, body) = match text.strip_suffix('\n') {
        Some(body) => ("|", body),
        None => ("|-", text),
    };
    out.push_str(head);
    for line in body.split('\n') {
        out.push('\n');
        if !line.is_empty() {
            indent(out, depth);
            out.push_str(line);
        }
    }
}

/// Double quotes with YAML's escapes; everything that does not print is escaped.
fn double_quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            '\r' => out.push_str("\\r"),
            ' '..='~' => out.push(c),
            c if (c as u32) < 0x100 => {
                let _ = write!(out, "\\x{:02x}", c as u32);
            }
            '\u{2028}' | '\u{2029}' | '\u{feff}' | '\u{fffe}' | '\u{ffff}' => {
                let _ = write!(out, "\\u{:04x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}
