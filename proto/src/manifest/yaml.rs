//! YAML to trees: events of the parser on a stack, aliases copied within a budget.

use std::{borrow::Cow, collections::HashMap};

use saphyr_parser::{Event, Parser, ScalarStyle, Tag};

use super::{
    plain::resolve,
    tree::{Key, MAX_COPIED_BYTES, MAX_DEPTH, MAX_DOCUMENTS, MAX_NODES, Map, Node, Tree, at, too_deep, too_many},
};
use crate::problem::Problem;

/// Reads all documents; empty ones are left out.
///
/// # Errors
/// The first place that is no YAML, or a limit.
pub(super) fn read(text: &str) -> Result<Vec<Node>, Problem> {
    let mut reader = Reader::default();
    let mut parser = Parser::new_from_str(text);
    while let Some(event) = parser.next_event() {
        let (event, span) = event.map_err(|error| {
            let marker = error.marker();
            // The scanner looks ahead and meets its own limit (of 255 flow collections) before ours is counted.
            if error.info().contains("recursion limit") {
                return too_deep(marker.line());
            }
            at(marker.line(), format!("not YAML: {} (column {})", error.info(), marker.col() + 1))
        })?;
        reader.event(event, span.start.line())?;
    }
    Ok(reader.documents)
}

#[derive(Default)]
struct Reader {
    documents: Vec<Node>,
    count: usize,
    stack: Vec<Open>,
    anchors: HashMap<usize, Anchored>,
    nodes: usize,
    copied_bytes: usize,
}

/// A collection that is not complete yet.
struct Open {
    line: usize,
    anchor: usize,
    content: Content,
}

enum Content {
    List(Vec<Node>),
    Map {
        pairs: Map,
        /// The key whose value comes next.
        key: Option<MapKey>,
        /// Maps under `<<`.
        merges: Vec<Map>,
    },
}

enum MapKey {
    Name(Key),
    Merge,
}

struct Anchored {
    node: Node,
    nodes: usize,
    bytes: usize,
    height: usize,
}

impl Reader {
    fn event(&mut self, event: Event, line: usize) -> Result<(), Problem> {
        match event {
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => Ok(()),
            Event::DocumentStart(_) => {
                self.count += 1;
                self.anchors.clear();
                if self.count > MAX_DOCUMENTS {
                    return Err(at(line, format!("more than {MAX_DOCUMENTS} documents")));
                }
                Ok(())
            }
            Event::SequenceStart(anchor, tag) => {
                known_tag(tag.as_deref(), &["seq"], line)?;
                self.open(line, anchor, Content::List(Vec::new()))
            }
            Event::MappingStart(anchor, tag) => {
                known_tag(tag.as_deref(), &["map"], line)?;
                self.open(line, anchor, Content::Map { pairs: Vec::new(), key: None, merges: Vec::new() })
            }
            Event::SequenceEnd | Event::MappingEnd => self.close(),
            Event::Alias(id) => self.alias(id, line),
            Event::Scalar(text, style, anchor, tag) => self.scalar(text, style, anchor, tag.as_deref(), line),
        }
    }

    fn open(&mut self, line: usize, anchor: usize, content: Content) -> Result<(), Problem> {
        if self.stack.len() >= MAX_DEPTH {
            return Err(too_deep(line));
        }
        if self.key_is_next() {
            return Err(at(line, "a key must be text, found a collection"));
        }
        self.stack.push(Open { line, anchor, content });
        Ok(())
    }

    fn key_is_next(&self) -> bool {
        matches!(self.stack.last(), Some(Open { content: Content::Map { key: None, .. }, .. }))
    }

    fn close(&mut self) -> Result<(), Problem> {
        let Some(open) = self.stack.pop() else { return Err(at(0, "not YAML: an end without a beginning")) };
        let tree = match open.content {
            Content::List(items) => Tree::List(items),
            Content::Map { mut pairs, merges, .. } => {
                merge(&mut pairs, merges);
                Tree::Map(pairs)
            }
        };
        self.add(Node { line: u32::try_from(open.line).unwrap_or(u32::MAX), tree }, open.anchor)
    }

    fn alias(&mut self, id: usize, line: usize) -> Result<(), Problem> {
        if self.key_is_next() {
            return Err(at(line, "a key must be text, found an alias"));
        }
        let Some(anchored) = self.anchors.get(&id) else {
            return Err(at(line, "an alias of something that contains it"));
        };
        let (nodes, bytes) = (anchored.nodes, anchored.bytes);
        if self.stack.len() + anchored.height > MAX_DEPTH {
            return Err(too_deep(line));
        }
        self.charge(nodes, bytes, line)?;
        let Some(node) = self.anchors.get(&id).map(|anchored| anchored.node.clone()) else { return Ok(()) };
        self.place(node);
        Ok(())
    }

    /// Counts what a copy costs before it is made.
    fn charge(&mut self, nodes: usize, bytes: usize, line: usize) -> Result<(), Problem> {
        self.nodes = self.nodes.saturating_add(nodes);
        self.copied_bytes = self.copied_bytes.saturating_add(bytes);
        if self.nodes > MAX_NODES || self.copied_bytes > MAX_COPIED_BYTES {
            return Err(too_many(line));
        }
        Ok(())
    }

    fn scalar(
        &mut self,
        text: Cow<str>,
        style: ScalarStyle,
        anchor: usize,
        tag: Option<&Tag>,
        line: usize,
    ) -> Result<(), Problem> {
        let tag = known_tag(tag, &["str", "int", "float", "bool", "null"], line)?;
        let plain = style == ScalarStyle::Plain;
        let tree = match tag {
            Some("str" | "!") => Tree::Text(text.clone().into_owned()),
            None if !plain => Tree::Text(text.clone().into_owned()),
            _ => resolve(&text).ok_or_else(|| at(line, format!("found {text}: JSON has no such number")))?,
        };
        let agrees = match tag {
            Some("int" | "float") => matches!(tree, Tree::Number(_)),
            Some("bool") => matches!(tree, Tree::Bool(_)),
            Some("null") => tree == Tree::Null,
            _ => true,
        };
        if !agrees {
            return Err(at(line, format!("found {text:?}, which is not what its tag says")));
        }
        let number = u32::try_from(line).unwrap_or(u32::MAX);
        if let Some(Open { content: Content::Map { key: key @ None, .. }, .. }) = self.stack.last_mut() {
            *key = Some(match tree {
                Tree::Text(name) if name == "<<" && plain => MapKey::Merge,
                Tree::Text(name) => MapKey::Name(Key { line: number, name }),
                Tree::Number(name) if name == text => MapKey::Name(Key { line: number, name }),
                _ => {
                    return Err(at(
                        line,
                        format!("found the key {text}, which YAML reads as no text: put it in quotes"),
                    ));
                }
            });
            return Ok(());
        }
        self.add(Node { line: number, tree }, anchor)
    }

    /// A value is complete.
    fn add(&mut self, node: Node, anchor: usize) -> Result<(), Problem> {
        let line = node.line as usize;
        self.charge(1, 0, line)?;
        if anchor > 0 {
            let (nodes, bytes) = node.size();
            // The copy that aliases are made from is one too.
            self.charge(nodes, bytes, line)?;
            let height = node.height();
            self.anchors.insert(anchor, Anchored { node: node.clone(), nodes, bytes, height });
        }
        if let Some(Open { content: Content::Map { key: Some(MapKey::Merge), .. }, .. }) = self.stack.last()
            && !is_mergeable(&node)
        {
            return Err(at(line, "<< wants a map or a list of maps"));
        }
        self.place(node);
        Ok(())
    }

    fn place(&mut self, node: Node) {
        match self.stack.last_mut().map(|open| &mut open.content) {
            None if node.tree == Tree::Null => {}
            None => self.documents.push(node),
            Some(Content::List(items)) => items.push(node),
            Some(Content::Map { pairs, key, merges }) => match key.take() {
                Some(MapKey::Name(key)) => pairs.push((key, node)),
                Some(MapKey::Merge) => merges.extend(maps(node)),
                // Keys never come here: scalar() keeps them.
                None => {}
            },
        }
    }
}

fn is_mergeable(node: &Node) -> bool {
    match &node.tree {
        Tree::Map(_) => true,
        Tree::List(items) => items.iter().all(|item| matches!(item.tree, Tree::Map(_))),
        _ => false,
    }
}

fn maps(node: Node) -> Vec<Map> {
    match node.tree {
        Tree::Map(map) => vec![map],
        Tree::List(items) => items.into_iter().flat_map(maps).collect(),
        _ => Vec::new(),
    }
}

/// What is written in the map wins, then the earlier of the merged ones.
fn merge(pairs: &mut Map, merges: Vec<Map>) {
    if merges.is_empty() {
        return;
    }
    let mut known: std::collections::HashSet<String> = pairs.iter().map(|(key, _)| key.name.clone()).collect();
    for (key, node) in merges.into_iter().flatten() {
        if known.insert(key.name.clone()) {
            pairs.push((key, node));
        }
    }
}

/// The short name of a tag of YAML's core schema.
fn known_tag<'a>(tag: Option<&'a Tag>, allowed: &[&str], line: usize) -> Result<Option<&'a str>, Problem> {
    let Some(tag) = tag else { return Ok(None) };
    if tag.handle.is_empty() && tag.suffix == "!" || tag.handle == "!" && tag.suffix.is_empty() {
        return Ok(Some("!"));
    }
    if tag.is_yaml_core_schema() && allowed.contains(&tag.suffix.as_str()) {
        return Ok(Some(tag.suffix.as_str()));
    }
    Err(at(line, format!("found the tag {tag}, which means nothing in a manifest")))
}
