//! Selectors: by labels (text and message) and by fields.

use std::{borrow::Cow, collections::BTreeMap, fmt};

use crate::{
    Kind, names,
    v1::{self, Object, object},
};

/// A selector that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SelectorError {
    /// The text does not follow the grammar.
    #[error("selector {text:?}: found {found} at byte {at}, want {wanted}")]
    Syntax {
        /// The whole selector.
        text: String,
        /// Byte offset.
        at: usize,
        /// What is there.
        found: String,
        /// What could be.
        wanted: &'static str,
    },
    /// A key or value of a label is none.
    #[error("selector: {what} {value:?}: {wanted}")]
    Label {
        /// `key` or `value`.
        what: &'static str,
        /// The text.
        value: String,
        /// What would be right.
        wanted: &'static str,
    },
    /// An operator that does not exist.
    #[error("selector: operator {operator:?} of key {key:?}: want In, NotIn, Exists or DoesNotExist")]
    Operator {
        /// The label.
        key: String,
        /// The operator.
        operator: String,
    },
    /// An operator with values that it cannot have.
    #[error("selector: key {key:?}: {operator} {wanted}, found {count} values")]
    Values {
        /// The label.
        key: String,
        /// The operator.
        operator: String,
        /// How many there are.
        count: usize,
        /// What would be right.
        wanted: &'static str,
    },
    /// A field that objects of this kind cannot be selected by.
    #[error("field selector: {kind} has no selectable field {field:?}; it has {known}")]
    UnknownField {
        /// The kind.
        kind: Kind,
        /// The field.
        field: String,
        /// All selectable fields.
        known: String,
    },
}

/// How a requirement looks at a label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operator {
    /// The label is there and has one of the values.
    In,
    /// The label is absent or has none of the values.
    NotIn,
    /// The label is there.
    Exists,
    /// The label is absent.
    DoesNotExist,
    /// The label is there and is a larger integer than the value.
    Gt,
    /// The label is there and is a smaller integer than the value.
    Lt,
}

impl Operator {
    /// The operator of that name.
    pub fn parse(name: &str) -> Option<Operator> {
        Some(match name {
            "In" => Operator::In,
            "NotIn" => Operator::NotIn,
            "Exists" => Operator::Exists,
            "DoesNotExist" => Operator::DoesNotExist,
            "Gt" => Operator::Gt,
            "Lt" => Operator::Lt,
            _ => return None,
        })
    }

    /// As in a manifest.
    pub fn as_str(self) -> &'static str {
        match self {
            Operator::In => "In",
            Operator::NotIn => "NotIn",
            Operator::Exists => "Exists",
            Operator::DoesNotExist => "DoesNotExist",
            Operator::Gt => "Gt",
            Operator::Lt => "Lt",
        }
    }

    /// What is wrong with having `values`, if anything is.
    pub fn check_values(self, values: &[String]) -> names::Check {
        match self {
            Operator::In | Operator::NotIn if values.is_empty() => Err("needs at least one value"),
            Operator::Exists | Operator::DoesNotExist if !values.is_empty() => Err("takes no values"),
            Operator::Gt | Operator::Lt => match values {
                [value] if value.parse::<i64>().is_ok() => Ok(()),
                _ => Err("needs exactly one value, an integer"),
            },
            _ => Ok(()),
        }
    }

    /// Whether a label with that value (`None`: absent) meets the operator. Wrong values for the operator are met by nothing.
    pub fn met(self, actual: Option<&str>, values: &[String]) -> bool {
        let listed = |actual: &str| values.iter().any(|value| value == actual);
        let compare = |larger: bool| match (actual.map(str::parse::<i64>), values) {
            (Some(Ok(actual)), [value]) => {
                value.parse::<i64>().is_ok_and(|value| if larger { actual > value } else { actual < value })
            }
            _ => false,
        };
        match self {
            Operator::In => actual.is_some_and(listed),
            Operator::NotIn => !values.is_empty() && !actual.is_some_and(listed),
            Operator::Exists => actual.is_some() && values.is_empty(),
            Operator::DoesNotExist => actual.is_none() && values.is_empty(),
            Operator::Gt => compare(true),
            Operator::Lt => compare(false),
        }
    }
}

fn not_a_label(what: &'static str, value: &str, wanted: &'static str) -> SelectorError {
    SelectorError::Label { what, value: value.to_owned(), wanted }
}

/// One condition of a [`LabelSelector`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Requirement {
    /// The label.
    pub key: String,
    /// How it is looked at.
    pub operator: Operator,
    /// Sorted, every value once.
    pub values: Vec<String>,
}

impl Requirement {
    fn new(key: &str, operator: Operator, mut values: Vec<String>) -> Result<Requirement, SelectorError> {
        names::qualified_name(key).map_err(|wanted| not_a_label("key", key, wanted))?;
        operator.check_values(&values).map_err(|wanted| SelectorError::Values {
            key: key.to_owned(),
            operator: operator.as_str().to_owned(),
            count: values.len(),
            wanted,
        })?;
        for value in &values {
            names::label_value(value).map_err(|wanted| not_a_label("value", value, wanted))?;
        }
        values.sort_unstable();
        values.dedup();
        Ok(Requirement { key: key.to_owned(), operator, values })
    }

    /// Whether these labels meet it.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.operator.met(labels.get(&self.key).map(String::as_str), &self.values)
    }
}

impl fmt::Display for Requirement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (key, values) = (&self.key, self.values.join(","));
        match (self.operator, self.values.len()) {
            (Operator::In, 1) => write!(f, "{key}={values}"),
            (Operator::NotIn, 1) => write!(f, "{key}!={values}"),
            (Operator::In, _) => write!(f, "{key} in ({values})"),
            (Operator::NotIn, _) => write!(f, "{key} notin ({values})"),
            (Operator::Exists, _) => f.write_str(key),
            (Operator::DoesNotExist, _) => write!(f, "!{key}"),
            (Operator::Gt, _) => write!(f, "{key}>{values}"),
            (Operator::Lt, _) => write!(f, "{key}<{values}"),
        }
    }
}

/// A selector by labels: all requirements must be met; without any it selects everything. Its Display is its text form.
#[derive(Debug, Clone, PartialEq, Eq, Default, Hash, PartialOrd, Ord)]
pub struct LabelSelector {
    /// Sorted, so that equal selectors are equal values.
    requirements: Vec<Requirement>,
}

impl LabelSelector {
    /// From text: `a=b,c!=d,e in (x,y),f notin (z),g,!h,i>1,j<2`. Empty text selects everything.
    ///
    /// # Errors
    /// Where the text leaves the grammar, or a key or value that no label can have.
    pub fn parse(text: &str) -> Result<LabelSelector, SelectorError> {
        let mut parser = Parser { text, at: 0 };
        let mut requirements = Vec::new();
        if parser.peek() != Token::End {
            loop {
                requirements.push(parser.requirement()?);
                match parser.next() {
                    (_, Token::End) => break,
                    (_, Token::Mark(",")) => {}
                    found => return Err(parser.error(found, "',' or the end")),
                }
            }
        }
        Ok(LabelSelector::sorted(requirements))
    }

    /// From the message in affinity terms and spread constraints. An absent message (which selects nothing) is the caller's to tell
    /// from an empty one (which selects everything).
    ///
    /// # Errors
    /// An unknown operator, the wrong number of values, or a key or value that no label can have.
    pub fn from_message(message: &v1::LabelSelector) -> Result<LabelSelector, SelectorError> {
        let mut requirements = Vec::with_capacity(message.match_labels.len() + message.match_expressions.len());
        for (key, value) in &message.match_labels {
            requirements.push(Requirement::new(key, Operator::In, vec![value.clone()])?);
        }
        for expression in &message.match_expressions {
            let (key, name) = (&expression.key, &expression.operator);
            let operator = Operator::parse(name).filter(|operator| !matches!(operator, Operator::Gt | Operator::Lt));
            let operator =
                operator.ok_or_else(|| SelectorError::Operator { key: key.clone(), operator: name.clone() })?;
            requirements.push(Requirement::new(key, operator, expression.values.clone())?);
        }
        Ok(LabelSelector::sorted(requirements))
    }

    fn sorted(mut requirements: Vec<Requirement>) -> LabelSelector {
        requirements.sort_unstable();
        requirements.dedup();
        LabelSelector { requirements }
    }

    /// Adds `key in (value)` or, with `negate`, `key notin (value)`: matchLabelKeys and mismatchLabelKeys.
    ///
    /// # Errors
    /// A key or value that no label can have.
    pub fn and(mut self, key: &str, value: &str, negate: bool) -> Result<LabelSelector, SelectorError> {
        let operator = if negate { Operator::NotIn } else { Operator::In };
        self.requirements.push(Requirement::new(key, operator, vec![value.to_owned()])?);
        Ok(LabelSelector::sorted(self.requirements))
    }

    /// The requirements, sorted by key.
    pub fn requirements(&self) -> &[Requirement] {
        &self.requirements
    }

    /// Whether it selects everything.
    pub fn is_everything(&self) -> bool {
        self.requirements.is_empty()
    }

    /// Whether an object with these labels is selected.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.requirements.iter().all(|requirement| requirement.matches(labels))
    }
}

impl fmt::Display for LabelSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, requirement) in self.requirements.iter().enumerate() {
            write!(f, "{}{requirement}", if index > 0 { "," } else { "" })?;
        }
        Ok(())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token<'a> {
    Word(&'a str),
    Mark(&'static str),
    End,
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Parser<'a> {
    /// The next token with its place.
    fn next(&mut self) -> (usize, Token<'a>) {
        let rest = self.text.get(self.at..).unwrap_or_default();
        let start = self.at + (rest.len() - rest.trim_start().len());
        let rest = rest.trim_start();
        const MARKS: [&str; 9] = ["==", "!=", "=", "!", ">", "<", "(", ")", ","];
        if let Some(mark) = MARKS.into_iter().find(|mark| rest.starts_with(mark)) {
            self.at = start + mark.len();
            return (start, Token::Mark(mark));
        }
        let end = rest.find(|c: char| c.is_whitespace() || "=!<>(),".contains(c)).unwrap_or(rest.len());
        self.at = start + end;
        (start, rest.get(..end).filter(|word| !word.is_empty()).map_or(Token::End, Token::Word))
    }

    fn peek(&mut self) -> Token<'a> {
        let at = self.at;
        let (_, token) = self.next();
        self.at = at;
        token
    }

    fn error(&self, found: (usize, Token), wanted: &'static str) -> SelectorError {
        let (at, token) = found;
        let found = match token {
            Token::Word(word) => format!("{word:?}"),
            Token::Mark(mark) => format!("'{mark}'"),
            Token::End => "the end".to_owned(),
        };
        SelectorError::Syntax { text: self.text.to_owned(), at, found, wanted }
    }

    fn requirement(&mut self) -> Result<Requirement, SelectorError> {
        let absent = self.peek() == Token::Mark("!");
        if absent {
            self.next();
        }
        let key = match self.next() {
            (_, Token::Word(word)) => word,
            found => return Err(self.error(found, "a label's key")),
        };
        if absent {
            return Requirement::new(key, Operator::DoesNotExist, Vec::new());
        }
        if matches!(self.peek(), Token::End | Token::Mark(",")) {
            return Requirement::new(key, Operator::Exists, Vec::new());
        }
        let (operator, values) = match self.next() {
            (_, Token::Mark("=" | "==")) => (Operator::In, vec![self.value()?]),
            (_, Token::Mark("!=")) => (Operator::NotIn, vec![self.value()?]),
            (_, Token::Mark(">")) => (Operator::Gt, vec![self.value()?]),
            (_, Token::Mark("<")) => (Operator::Lt, vec![self.value()?]),
            (_, Token::Word("in")) => (Operator::In, self.values()?),
            (_, Token::Word("notin")) => (Operator::NotIn, self.values()?),
            found => return Err(self.error(found, "=, ==, !=, in, notin, > or <")),
        };
        Requirement::new(key, operator, values)
    }

    /// One value; nothing before a comma or the end is the empty one.
    fn value(&mut self) -> Result<String, SelectorError> {
        match self.peek() {
            Token::End | Token::Mark(",") => Ok(String::new()),
            Token::Word(word) => {
                self.next();
                Ok(word.to_owned())
            }
            Token::Mark(_) => {
                let found = self.next();
                Err(self.error(found, "a label's value"))
            }
        }
    }

    /// `(a, b)`; an empty place is the empty value, so `()` has one.
    fn values(&mut self) -> Result<Vec<String>, SelectorError> {
        match self.next() {
            (_, Token::Mark("(")) => {}
            found => return Err(self.error(found, "'('")),
        }
        let mut values = vec![String::new()];
        loop {
            match self.next() {
                (_, Token::Mark(")")) => return Ok(values),
                (_, Token::Mark(",")) => values.push(String::new()),
                (at, Token::Word(word)) => match values.last_mut() {
                    Some(last) if last.is_empty() => word.clone_into(last),
                    _ => return Err(self.error((at, Token::Word(word)), "',' or ')'")),
                },
                found => return Err(self.error(found, "',' or ')'")),
            }
        }
    }
}

/// A selector by fields of one kind of object: all comparisons must hold. Its Display is its text form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldSelector {
    kind: Kind,
    /// Field, value, whether it must be equal (or must not).
    terms: Vec<(&'static str, String, bool)>,
}

/// How a field of an object is read for selection.
type Read = fn(&Object) -> Cow<'_, str>;

/// The selectable fields of a kind.
fn fields(kind: Kind) -> Vec<(&'static str, Read)> {
    let mut fields: Vec<(&'static str, Read)> = vec![("metadata.name", |object| object.meta().name.as_str().into())];
    if kind.namespaced() {
        fields.push(("metadata.namespace", |object| object.meta().namespace.as_str().into()));
    }
    macro_rules! read {
        ($variant:ident, $name:ident => $value:expr) => {
            |object| match &object.kind {
                Some(object::Kind::$variant($name)) => Cow::from($value),
                _ => Cow::from(""),
            }
        };
    }
    macro_rules! involved {
        ($field:ident) => {
            read!(Event, event => event.involved_object.as_ref().map_or("", |object| object.$field.as_str()))
        };
    }
    let more: &[(&'static str, Read)] = match kind {
        Kind::Pod => &[
            ("spec.nodeName", read!(Pod, pod => pod.spec().node_name.as_str())),
            ("spec.restartPolicy", read!(Pod, pod => pod.spec().restart_policy.as_str())),
            ("spec.schedulerName", read!(Pod, pod => pod.spec().scheduler_name.as_str())),
            ("spec.serviceAccountName", read!(Pod, pod => pod.spec().service_account_name.as_str())),
            ("spec.hostNetwork", read!(Pod, pod => truth(pod.spec().host_network))),
            ("status.phase", read!(Pod, pod => pod.phase().as_str())),
            ("status.podIP", read!(Pod, pod => pod.status().pod_ip.as_str())),
            ("status.nominatedNodeName", read!(Pod, pod => pod.status().nominated_node_name.as_str())),
        ],
        Kind::Node => &[("spec.unschedulable", read!(Node, node => truth(node.spec().unschedulable)))],
        Kind::Namespace => &[(
            "status.phase",
            read!(Namespace, namespace => namespace.status.as_ref().map_or("", |status| status.phase.as_str())),
        )],
        Kind::Event => &[
            ("involvedObject.kind", involved!(kind)),
            ("involvedObject.namespace", involved!(namespace)),
            ("involvedObject.name", involved!(name)),
            ("involvedObject.uid", involved!(uid)),
            ("involvedObject.apiVersion", involved!(api_version)),
            ("involvedObject.resourceVersion", involved!(resource_version)),
            ("involvedObject.fieldPath", involved!(field_path)),
            ("reason", read!(Event, event => event.reason.as_str())),
            ("reportingComponent", read!(Event, event => event.reporting_component.as_str())),
            ("source", read!(Event, event => event_source(event))),
            ("type", read!(Event, event => event.r#type.as_str())),
        ],
        Kind::Secret => &[("type", read!(Secret, secret => secret.r#type.as_str()))],
        Kind::ConfigMap | Kind::PriorityClass | Kind::PodDisruptionBudget => &[],
    };
    fields.extend_from_slice(more);
    fields
}

fn truth(value: bool) -> &'static str {
    if value { "true" } else { "false" }
}

/// As Kubernetes: the source's component, or where there is none the reporting component.
fn event_source(event: &v1::Event) -> &str {
    let component = event.source.as_ref().map_or("", |source| source.component.as_str());
    if component.is_empty() { &event.reporting_component } else { component }
}

impl FieldSelector {
    /// From text: `spec.nodeName=node-a,status.phase!=Running`. A backslash makes the next ',', '=' or '\' part of a value.
    /// Empty text selects everything.
    ///
    /// # Errors
    /// Where the text leaves the grammar, or a field that the kind cannot be selected by.
    pub fn parse(kind: Kind, text: &str) -> Result<FieldSelector, SelectorError> {
        let known = fields(kind);
        let mut terms = Vec::new();
        let mut at = 0;
        for term in split_terms(text) {
            let start = at;
            at += term.len() + 1;
            if term.trim().is_empty() {
                if text.trim().is_empty() {
                    break;
                }
                return Err(syntax(text, start, "nothing", "field=value"));
            }
            let Some((place, mark)) = operator(term) else {
                return Err(syntax(text, start, &format!("{term:?}"), "field=value, field==value or field!=value"));
            };
            let field = term.get(..place).unwrap_or_default().trim();
            let value = term.get(place + mark.len()..).unwrap_or_default().trim();
            let value = unescape(value).ok_or_else(|| {
                syntax(text, start, &format!("{value:?}"), "a value with '\\', ',' and '=' escaped by '\\'")
            })?;
            let Some((name, _)) = known.iter().find(|(name, _)| *name == field) else {
                let known = known.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
                return Err(SelectorError::UnknownField { kind, field: field.to_owned(), known });
            };
            terms.push((*name, value, mark != "!="));
        }
        Ok(FieldSelector { kind, terms })
    }

    /// Whether it selects everything.
    pub fn is_everything(&self) -> bool {
        self.terms.is_empty()
    }

    /// The value that this field must have, if the selector names exactly one; for indexes.
    pub fn exact(&self, field: &str) -> Option<&str> {
        self.terms.iter().find(|(name, _, equal)| *name == field && *equal).map(|(_, value, _)| value.as_str())
    }

    /// Whether an object is selected; one of another kind never is.
    pub fn matches(&self, object: &Object) -> bool {
        if object.kind_of() != Some(self.kind) {
            return false;
        }
        if self.terms.is_empty() {
            return true;
        }
        let known = fields(self.kind);
        self.terms.iter().all(|(field, value, equal)| {
            let read = known.iter().find(|(name, _)| name == field).map(|(_, read)| read);
            read.is_some_and(|read| (read(object) == value.as_str()) == *equal)
        })
    }
}

impl fmt::Display for FieldSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (field, value, equal)) in self.terms.iter().enumerate() {
            let value = value.replace('\\', "\\\\").replace(',', "\\,").replace('=', "\\=");
            write!(f, "{}{field}{}{value}", if index > 0 { "," } else { "" }, if *equal { "=" } else { "!=" })?;
        }
        Ok(())
    }
}

fn syntax(text: &str, at: usize, found: &str, wanted: &'static str) -> SelectorError {
    SelectorError::Syntax { text: text.to_owned(), at, found: found.to_owned(), wanted }
}

/// Splits at commas that no backslash stands before.
fn split_terms(text: &str) -> Vec<&str> {
    let mut escaped = false;
    text.split(|c| {
        let splits = c == ',' && !escaped;
        escaped = c == '\\' && !escaped;
        splits
    })
    .collect()
}

/// The first operator with its place.
fn operator(term: &str) -> Option<(usize, &'static str)> {
    let mut escaped = false;
    for (place, c) in term.char_indices() {
        let rest = term.get(place..).unwrap_or_default();
        if !escaped && let Some(mark) = ["!=", "==", "="].into_iter().find(|mark| rest.starts_with(mark)) {
            return Some((place, mark));
        }
        escaped = c == '\\' && !escaped;
    }
    None
}

fn unescape(value: &str) -> Option<String> {
    let mut out = String::with_capacity(value.len());
    let mut chars = value.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => out.push(chars.next().filter(|next| matches!(next, '\\' | ',' | '='))?),
            ',' | '=' => return None,
            c => out.push(c),
        }
    }
    Some(out)
}

#[cfg(test)]
#[path = "selector_tests.rs"]
mod tests;
