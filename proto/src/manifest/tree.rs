//! A manifest as a tree that remembers lines, and the limits of every input.

use serde_json::Value;

use crate::problem::Problem;

/// Most bytes of one input: what an API server takes in one message.
pub const MAX_BYTES: usize = 3 << 20;
/// Deepest nesting. The deepest field of a pod lies at about 15.
pub const MAX_DEPTH: usize = 64;
/// Most documents of one input.
pub const MAX_DOCUMENTS: usize = 1000;
/// Most values of one input, with all copies that aliases make: about 40 MB of memory.
pub(super) const MAX_NODES: usize = 500_000;
/// Most bytes of text that aliases may copy.
pub(super) const MAX_COPIED_BYTES: usize = 8 << 20;

/// A value with its place.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Node {
    /// From 1; 0 where there is no text.
    pub line: u32,
    pub tree: Tree,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Tree {
    Null,
    Bool(bool),
    /// As JSON writes it.
    Number(String),
    Text(String),
    List(Vec<Node>),
    Map(Map),
}

/// In the order of the text; duplicate keys are still there.
pub(crate) type Map = Vec<(Key, Node)>;

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Key {
    pub line: u32,
    pub name: String,
}

/// The value of a key; the first one where there are several.
pub(crate) fn get<'a>(map: &'a Map, name: &str) -> Option<&'a Node> {
    map.iter().find(|(key, _)| key.name == name).map(|(_, node)| node)
}

impl Node {
    /// A tree without lines.
    ///
    /// # Errors
    /// When it is nested too deeply.
    pub(crate) fn from_value(value: Value, depth: usize) -> Result<Node, Problem> {
        if depth > MAX_DEPTH {
            return Err(too_deep(0));
        }
        let tree = match value {
            Value::Null => Tree::Null,
            Value::Bool(value) => Tree::Bool(value),
            Value::Number(number) => Tree::Number(number.to_string()),
            Value::String(text) => Tree::Text(text),
            Value::Array(items) => {
                let nodes = items.into_iter().map(|item| Node::from_value(item, depth + 1));
                Tree::List(nodes.collect::<Result<_, _>>()?)
            }
            Value::Object(map) => {
                let node = |(name, value)| Ok((Key { line: 0, name }, Node::from_value(value, depth + 1)?));
                Tree::Map(map.into_iter().map(node).collect::<Result<_, Problem>>()?)
            }
        };
        Ok(Node { line: 0, tree })
    }

    /// Without the lines.
    pub(super) fn to_value(&self) -> Value {
        match &self.tree {
            Tree::Null => Value::Null,
            Tree::Bool(value) => Value::Bool(*value),
            Tree::Number(text) => serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.clone())),
            Tree::Text(text) => Value::String(text.clone()),
            Tree::List(items) => items.iter().map(Node::to_value).collect(),
            Tree::Map(map) => map.iter().map(|(key, node)| (key.name.clone(), node.to_value())).collect(),
        }
    }

    /// How deeply it is nested: 1 for a scalar.
    pub(super) fn height(&self) -> usize {
        1 + match &self.tree {
            Tree::List(items) => items.iter().map(Node::height).max().unwrap_or(0),
            Tree::Map(map) => map.iter().map(|(_, node)| node.height()).max().unwrap_or(0),
            _ => 0,
        }
    }

    /// How many values it has, and how many bytes of text.
    pub(super) fn size(&self) -> (usize, usize) {
        let sum = |sizes: &mut dyn Iterator<Item = (usize, usize)>| {
            sizes.fold((1, 0), |sum, size| (sum.0 + size.0, sum.1 + size.1))
        };
        match &self.tree {
            Tree::Text(text) | Tree::Number(text) => (1, text.len()),
            Tree::List(items) => sum(&mut items.iter().map(Node::size)),
            Tree::Map(map) => sum(&mut map.iter().map(|(key, node)| {
                let (nodes, bytes) = node.size();
                (nodes, bytes + key.name.len())
            })),
            Tree::Null | Tree::Bool(_) => (1, 0),
        }
    }
}

pub(super) fn at(line: usize, message: impl Into<String>) -> Problem {
    Problem { line: u32::try_from(line).unwrap_or(u32::MAX), path: String::new(), message: message.into() }
}

pub(super) fn too_deep(line: usize) -> Problem {
    at(line, format!("nested more than {MAX_DEPTH} deep"))
}

pub(super) fn too_large() -> Problem {
    at(0, format!("larger than {} MiB, the most that one input may have", MAX_BYTES >> 20))
}

pub(super) fn too_many(line: usize) -> Problem {
    at(line, format!("more than {MAX_NODES} values (aliases counted as what they stand for)"))
}
