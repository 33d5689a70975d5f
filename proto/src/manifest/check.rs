//! A tree held against the schema: all problems at once, and the JSON value that the types are made from.

use std::collections::HashMap;
use std::fmt::Write as _;

use serde_json::Value as Json;

use super::tree::{Key, Map, Node, Tree};
use crate::{
    Kind, base64,
    problem::{Problem, Problems, near, quoted},
    quantity::Quantity,
    schema::{Cardinality, Field, Message, Value},
    unsupported,
    v1::{MicroTime, Time},
};

/// Where a field that stands in the wrong place may belong.
const ELSEWHERE: [&str; 5] = ["PodSpec", "Container", "ObjectMeta", "PodSecurityContext", "SecurityContext"];

/// Collects problems on a walk through a tree.
#[derive(Default)]
pub(super) struct Checker {
    path: String,
    pub problems: Problems,
}

impl Checker {
    pub(super) fn problem(&mut self, line: u32, message: String) {
        self.problems.push(Problem { line, path: self.path.clone(), message });
    }

    /// Whether the walk is inside of something.
    pub(super) fn is_nested(&self) -> bool {
        !self.path.is_empty()
    }

    /// Runs with `suffix` behind the path.
    pub(super) fn within<T>(&mut self, suffix: &str, run: impl FnOnce(&mut Checker) -> T) -> T {
        let length = self.path.len();
        if !self.path.is_empty() && !suffix.starts_with('[') {
            self.path.push('.');
        }
        self.path.push_str(suffix);
        let result = run(self);
        self.path.truncate(length);
        result
    }

    /// The value of an object of that kind, as far as it is right.
    pub(super) fn object(&mut self, kind: Kind, node: &Node) -> Json {
        let message = crate::schema::message(kind.name());
        message.map_or(Json::Null, |message| self.message(message, node))
    }

    /// Finds duplicate keys, which a map must not have.
    pub(super) fn duplicates(&mut self, map: &Map) {
        let mut first: HashMap<&str, u32> = HashMap::with_capacity(map.len());
        for (key, _) in map {
            if let Some(line) = first.get(key.name.as_str()) {
                let also = if *line > 0 { format!(", first on line {line}") } else { String::new() };
                self.within(&segment(key), |checker| checker.problem(key.line, format!("duplicate key{also}")));
            } else {
                first.insert(&key.name, key.line);
            }
        }
    }

    fn message(&mut self, message: &'static Message, node: &Node) -> Json {
        let Tree::Map(map) = &node.tree else {
            self.wrong(node, "a map");
            return Json::Null;
        };
        self.duplicates(map);
        let mut json = serde_json::Map::with_capacity(map.len());
        for (key, value) in map {
            let Some(field) = message.field(&key.name) else {
                self.within(&segment(key), |checker| checker.unknown(message, key));
                continue;
            };
            // Nothing is as good as absent.
            if value.tree == Tree::Null {
                continue;
            }
            self.within(field.name, |checker| {
                if let Some(why) = unsupported::refused(message.name, field.name, value) {
                    checker.problem(value.line, format!("known to Kubernetes, not supported by minipod: {why}"));
                }
                let converted = checker.field(field, value);
                json.insert(field.name.to_owned(), converted);
            });
        }
        Json::Object(json)
    }

    fn unknown(&mut self, message: &Message, key: &Key) {
        let text = match unsupported::foreign(message.name, &key.name) {
            Some(why) => format!("known to Kubernetes, not supported by minipod: {why}"),
            None => match near(&key.name, message.fields.iter().map(|field| field.name)) {
                Some(meant) => format!("unknown field, did you mean {meant}?"),
                None => match ELSEWHERE
                    .into_iter()
                    .filter_map(crate::schema::message)
                    .find(|m| m.field(&key.name).is_some())
                {
                    Some(other) => format!("unknown field of {}, it belongs to {}", message.name, other.name),
                    None => format!("unknown field of {}", message.name),
                },
            },
        };
        self.problem(key.line, text);
    }

    fn field(&mut self, field: &Field, node: &Node) -> Json {
        match field.cardinality {
            Cardinality::One => self.one(field.value, node),
            Cardinality::List => {
                let Tree::List(items) = &node.tree else {
                    self.wrong(node, "a list");
                    return Json::Null;
                };
                let each = |(index, item): (usize, &Node)| {
                    self.within(&format!("[{index}]"), |checker| checker.one(field.value, item))
                };
                Json::Array(items.iter().enumerate().map(each).collect())
            }
            Cardinality::Map => {
                let Tree::Map(map) = &node.tree else {
                    self.wrong(node, "a map");
                    return Json::Null;
                };
                self.duplicates(map);
                let each = |(key, item): &(Key, Node)| {
                    let value = match (&item.tree, field.value) {
                        // As Kubernetes: a key without a value has the empty one.
                        (Tree::Null, Value::String | Value::Bytes) => Json::String(String::new()),
                        _ => self.within(&segment(key), |checker| checker.one(field.value, item)),
                    };
                    (key.name.clone(), value)
                };
                Json::Object(map.iter().map(each).collect())
            }
        }
    }

    fn one(&mut self, value: Value, node: &Node) -> Json {
        match value {
            Value::Message(message) => self.message(message, node),
            Value::String => self.text(node, "text"),
            Value::Bool => match &node.tree {
                Tree::Bool(value) => Json::Bool(*value),
                _ => self.wrong(node, "true or false"),
            },
            Value::Int32 => self.integer(node, i64::from(i32::MIN), i64::from(i32::MAX), "a 32 bit integer"),
            Value::Int64 => self.integer(node, i64::MIN, i64::MAX, "a 64 bit integer"),
            Value::IntOrString => match &node.tree {
                Tree::Text(text) => Json::String(text.clone()),
                _ => self.integer(node, i64::from(i32::MIN), i64::from(i32::MAX), "a 32 bit integer or text"),
            },
            Value::Bytes => self.parsed(node, "base64", |text| match base64::decode(text) {
                Some(_) => Ok(()),
                None => Err("want base64 with padding".to_owned()),
            }),
            Value::Time | Value::MicroTime => {
                let micro = matches!(value, Value::MicroTime);
                self.parsed(node, "a time such as 2026-01-31T12:00:00Z", |text| {
                    let good = if micro { text.parse::<MicroTime>().is_ok() } else { text.parse::<Time>().is_ok() };
                    if good { Ok(()) } else { Err("want a time such as 2026-01-31T12:00:00Z".to_owned()) }
                })
            }
            Value::Quantity => self.quantity(node),
        }
    }

    fn quantity(&mut self, node: &Node) -> Json {
        let text = match &node.tree {
            Tree::Text(text) | Tree::Number(text) => text,
            _ => return self.wrong(node, "a quantity such as 100m, 1.5 or 64Mi"),
        };
        if let Err(error) = text.parse::<Quantity>() {
            self.problem(node.line, error.to_string());
        }
        Json::String(text.clone())
    }

    fn text(&mut self, node: &Node, wanted: &str) -> Json {
        match &node.tree {
            Tree::Text(text) => Json::String(text.clone()),
            _ => self.wrong(node, wanted),
        }
    }

    fn parsed(&mut self, node: &Node, wanted: &str, check: impl FnOnce(&str) -> Result<(), String>) -> Json {
        if let Tree::Text(text) = &node.tree
            && let Err(why) = check(text)
        {
            self.problem(node.line, format!("found {}: {why}", quoted(text)));
            return Json::Null;
        }
        self.text(node, wanted)
    }

    fn integer(&mut self, node: &Node, least: i64, most: i64, wanted: &str) -> Json {
        let Tree::Number(text) = &node.tree else { return self.wrong(node, wanted) };
        match text.parse::<i64>() {
            Ok(number) if (least..=most).contains(&number) => Json::from(number),
            _ => self.wrong(node, wanted),
        }
    }

    fn wrong(&mut self, node: &Node, wanted: &str) -> Json {
        let mut text = format!("found {}, want {wanted}", describe(&node.tree));
        if wanted == "text"
            && let Tree::Bool(_) | Tree::Number(_) = &node.tree
        {
            text.push_str(": put it in quotes");
        }
        self.problem(node.line, text);
        Json::Null
    }
}

/// A key as a part of a path; one that is no plain name stands in brackets.
fn segment(key: &Key) -> String {
    let plain = !key.name.is_empty() && key.name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'));
    if plain {
        return key.name.clone();
    }
    let mut text = String::new();
    let _ = write!(text, "[{}]", quoted(&key.name));
    text
}

/// What a value is, for people.
pub(super) fn describe(tree: &Tree) -> String {
    match tree {
        Tree::Null => "nothing".to_owned(),
        Tree::Bool(value) => format!("the boolean {value}"),
        Tree::Number(text) => format!("the number {text}"),
        Tree::Text(text) => format!("the text {}", quoted(text)),
        Tree::List(_) => "a list".to_owned(),
        Tree::Map(_) => "a map".to_owned(),
    }
}
