//! Manifests: YAML and JSON to objects and back, strictly.
//!
//! Text becomes a tree that remembers lines (`yaml`, `json`), the tree is held against the schema (`check`: all problems at once), and
//! only what has none becomes an object. Nothing here panics on any input, and every limit is in `tree`.

mod check;
mod json;
mod plain;
mod print;
mod tree;
mod yaml;

use serde_json::Value as Json;

pub(crate) use self::tree::{Node, Tree};
use self::{check::Checker, tree::Map};
pub use self::{
    print::{to_json, to_yaml, value_to_yaml},
    tree::{MAX_BYTES, MAX_DEPTH, MAX_DOCUMENTS},
};
pub use crate::problem::{Problem, Problems};
use crate::{
    Kind,
    problem::near,
    unsupported,
    v1::{Object, object},
};

/// Reads all objects of a YAML or JSON text: several documents, and lists (`kind: List`, `kind: PodList`).
///
/// A text without any object gives none; that is for the caller to mind.
///
/// # Errors
/// Everything that is wrong: what is no YAML or JSON (then only that), unknown kinds and fields, fields that minipod does not
/// support, wrong types, duplicate keys, and inputs over a limit.
pub fn parse(text: &str) -> Result<Vec<Object>, Problems> {
    if text.len() > MAX_BYTES {
        return Err(tree::too_large().into());
    }
    let documents = documents(text.strip_prefix('\u{feff}').unwrap_or(text))?;
    let mut checker = Checker::default();
    let mut objects = Vec::new();
    for document in &documents {
        one(&mut checker, document, None, &mut objects);
    }
    checker.problems.into_result()?;
    Ok(objects)
}

/// Reads one YAML or JSON document as it is, without a schema: for configuration files. An empty text is null; of duplicate
/// keys the last counts.
///
/// # Errors
/// As [`parse`], apart from what it says about objects.
pub fn parse_value(text: &str) -> Result<Json, Problems> {
    if text.len() > MAX_BYTES {
        return Err(tree::too_large().into());
    }
    match documents(text.strip_prefix('\u{feff}').unwrap_or(text))?.as_slice() {
        [] => Ok(Json::Null),
        [node] => Ok(node.to_value()),
        more => Err(Problem::new("", format!("found {} documents, want one", more.len())).into()),
    }
}

fn documents(text: &str) -> Result<Vec<Node>, Problem> {
    // What looks like JSON may still be YAML in its flow style; if it is neither, YAML's word counts.
    if text.trim_start().starts_with('{')
        && let Ok(node) = json::read(text)
    {
        return Ok(vec![node]);
    }
    yaml::read(text)
}

/// One document, or one item of a list. `item_kind` is the kind that the list gives its items.
fn one(checker: &mut Checker, node: &Node, item_kind: Option<Kind>, objects: &mut Vec<Object>) {
    let Tree::Map(map) = &node.tree else {
        let found = check::describe(&node.tree);
        return checker.problem(node.line, format!("found {found}, want an object with apiVersion and kind"));
    };
    let api_version = word(checker, map, "apiVersion");
    let kind = word(checker, map, "kind");
    if let (Some(item_kind), None, None) = (item_kind, &api_version, &kind) {
        return objects.extend(object(checker, item_kind, node));
    }
    let Some((kind, kind_line)) = kind else {
        return checker.problem(node.line, "kind is missing: want one of ".to_owned() + &kinds());
    };
    if let Some(kind) = Kind::from_name(&kind) {
        match api_version {
            Some((found, line)) if found != kind.api_version() => checker.within("apiVersion", |checker| {
                checker.problem(line, format!("found {found:?}, want {} for a {kind}", kind.api_version()));
            }),
            Some(_) => {}
            None => checker.problem(node.line, format!("apiVersion is missing: want {}", kind.api_version())),
        }
        return objects.extend(object(checker, kind, node));
    }
    let listed = kind.strip_suffix("List").filter(|_| !checker.is_nested());
    match listed.map(|listed| (listed.is_empty(), Kind::from_name(listed))) {
        Some((true, _)) => list(checker, map, None, objects),
        Some((false, Some(item_kind))) => list(checker, map, Some(item_kind), objects),
        _ => checker.within("kind", |checker| checker.problem(kind_line, unknown_kind(&kind))),
    }
}

fn list(checker: &mut Checker, map: &Map, item_kind: Option<Kind>, objects: &mut Vec<Object>) {
    checker.duplicates(map);
    for (key, value) in map {
        match (key.name.as_str(), &value.tree) {
            ("apiVersion" | "kind", _) | ("metadata", Tree::Map(_) | Tree::Null) | ("items", Tree::Null) => {}
            ("items", Tree::List(items)) => {
                for (index, item) in items.iter().enumerate() {
                    checker.within(&format!("items[{index}]"), |checker| one(checker, item, item_kind, objects));
                }
            }
            (name @ ("items" | "metadata"), found) => {
                let wanted = if name == "items" { "a list" } else { "a map" };
                let text = format!("found {}, want {wanted}", check::describe(found));
                checker.within(name, |checker| checker.problem(value.line, text));
            }
            (name, _) => {
                checker.within(name, |checker| checker.problem(key.line, "unknown field of a list".to_owned()))
            }
        }
    }
}

/// The text of apiVersion or kind, with its line.
fn word(checker: &mut Checker, map: &Map, name: &str) -> Option<(String, u32)> {
    let node = tree::get(map, name)?;
    match &node.tree {
        Tree::Text(text) => Some((text.clone(), node.line)),
        Tree::Null => None,
        other => {
            let text = format!("found {}, want text", check::describe(other));
            checker.within(name, |checker| checker.problem(node.line, text));
            None
        }
    }
}

fn kinds() -> String {
    Kind::ALL.map(Kind::name).join(", ")
}

fn unknown_kind(kind: &str) -> String {
    if let Some(why) = unsupported::foreign_kind(kind) {
        return format!("found {kind:?}, known to Kubernetes, not supported by minipod: {why}");
    }
    let found = crate::problem::quoted(kind);
    match near(kind, Kind::ALL.iter().map(|kind| kind.name())) {
        Some(meant) => format!("found {found}, did you mean {meant}?"),
        None => format!("found {found}, want one of {}", kinds()),
    }
}

fn object(checker: &mut Checker, kind: Kind, node: &Node) -> Option<Object> {
    let json = checker.object(kind, node);
    if !checker.problems.is_empty() {
        return None;
    }
    match typed(kind, json) {
        Ok(object) => Some(object),
        // The schema and the types come from the same descriptors; if they disagree it is told, not hidden.
        Err(error) => {
            checker.problem(node.line, format!("cannot be read as a {kind}: {error}"));
            None
        }
    }
}

fn typed(kind: Kind, json: Json) -> Result<Object, serde_json::Error> {
    use serde_json::from_value;
    let kind = match kind {
        Kind::Pod => object::Kind::Pod(from_value(json)?),
        Kind::Node => object::Kind::Node(from_value(json)?),
        Kind::Namespace => object::Kind::Namespace(from_value(json)?),
        Kind::Event => object::Kind::Event(from_value(json)?),
        Kind::ConfigMap => object::Kind::ConfigMap(from_value(json)?),
        Kind::Secret => object::Kind::Secret(from_value(json)?),
        Kind::PriorityClass => object::Kind::PriorityClass(from_value(json)?),
        Kind::PodDisruptionBudget => object::Kind::PodDisruptionBudget(from_value(json)?),
    };
    Ok(Object { kind: Some(kind) })
}

/// Applies a JSON merge patch (RFC 7386) to the JSON form of an object. The result is checked as strictly as a manifest.
///
/// # Errors
/// A patch that is no JSON object or over a limit, one that changes apiVersion or kind, or a result that is no valid form of the kind.
pub fn merge_patch(object: &Object, patch_json: &[u8]) -> Result<Object, Problems> {
    if patch_json.len() > MAX_BYTES {
        return Err(tree::too_large().into());
    }
    let Some(kind) = object.kind_of() else { return Err(Problem::new("kind", "the object has no known kind").into()) };
    let text = std::str::from_utf8(patch_json)
        .map_err(|error| Problem::new("", format!("the patch is not UTF-8 at byte {}", error.valid_up_to())))?;
    let patch = json::read(text)?;
    let Tree::Map(changes) = patch.tree else {
        let found = check::describe(&patch.tree);
        return Err(Problem::new("", format!("the patch is {found}, want a JSON object")).into());
    };
    let mut before = object.clone();
    before.set_type();
    let json = serde_json::to_value(&before).map_err(|error| Problem::new("", error.to_string()))?;
    let mut node = Node::from_value(json, 0)?;
    let mut checker = Checker::default();
    merge(&mut checker, &mut node, changes);
    for (name, is) in [("apiVersion", kind.api_version()), ("kind", kind.name())] {
        let found = if let Tree::Map(map) = &node.tree { tree::get(map, name) } else { None };
        if found.is_none_or(|found| found.tree != Tree::Text(is.to_owned())) {
            checker.within(name, |checker| checker.problem(0, format!("cannot be changed by a patch: want {is}")));
        }
    }
    let result = self::object(&mut checker, kind, &node);
    checker.problems.into_result()?;
    result.ok_or_else(|| Problem::new("", "the patch leaves no object").into())
}

/// RFC 7386: null removes, objects merge, everything else replaces.
fn merge(checker: &mut Checker, target: &mut Node, patch: Map) {
    checker.duplicates(&patch);
    if !matches!(target.tree, Tree::Map(_)) {
        target.tree = Tree::Map(Map::new());
    }
    let Tree::Map(map) = &mut target.tree else { return };
    for (key, value) in patch {
        let place = map.iter().position(|(known, _)| known.name == key.name);
        match (value.tree, place) {
            (Tree::Null, Some(place)) => drop(map.remove(place)),
            (Tree::Null, None) => {}
            (Tree::Map(changes), place) => {
                let place = place.unwrap_or_else(|| {
                    map.push((key.clone(), Node { line: value.line, tree: Tree::Map(Map::new()) }));
                    map.len() - 1
                });
                if let Some((_, child)) = map.get_mut(place) {
                    child.line = value.line;
                    checker.within(&key.name, |checker| merge(checker, child, changes));
                }
            }
            (tree, Some(place)) => {
                if let Some(pair) = map.get_mut(place) {
                    pair.1 = Node { line: value.line, tree };
                }
            }
            (tree, None) => map.push((key, Node { line: value.line, tree })),
        }
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
