//! What every object must hold to.

use super::walk::Walk;
use crate::{
    Kind,
    names::{Check, dns_label, dns_subdomain, label_value, qualified_name},
    v1::{LabelSelector, Object},
};

/// All annotations together, keys and values.
const MAX_ANNOTATION_BYTES: usize = 256 << 10;
/// Kubernetes cuts what generateName is longer than, to leave room for what it adds.
const MAX_GENERATE_BYTES: usize = 248;

pub(super) fn object(walk: &mut Walk, object: &Object, kind: Kind) {
    let meta = object.meta();
    let name: fn(&str) -> Check = if kind == Kind::Namespace { dns_label } else { dns_subdomain };
    walk.within("metadata", |walk| {
        if !meta.generate_name.is_empty() {
            let stem = meta.generate_name.trim_end_matches('-');
            if name(stem).is_err() || meta.generate_name.len() > MAX_GENERATE_BYTES {
                walk.bad("generateName", &meta.generate_name, "want the beginning of a name, as in web-");
            }
        }
        match (meta.name.is_empty(), meta.generate_name.is_empty()) {
            (true, true) => walk.missing("name", "want a name or a generateName"),
            (true, false) => {}
            (false, _) => walk.form("name", &meta.name, name),
        }
        match (kind.namespaced(), meta.namespace.is_empty()) {
            (true, true) => walk.missing("namespace", "want the name of a namespace"),
            (true, false) => walk.form("namespace", &meta.namespace, dns_label),
            (false, true) => {}
            (false, false) => walk.bad("namespace", &meta.namespace, format!("want none, a {kind} is in no namespace")),
        }
        labels(walk, "labels", &meta.labels);
        let mut bytes = 0;
        for (key, value) in &meta.annotations {
            bytes += key.len() + value.len();
            // Kubernetes lets annotations have upper case in the prefix.
            if let Err(wanted) = qualified_name(&key.to_ascii_lowercase()) {
                walk.bad("annotations", key, wanted);
            }
        }
        if bytes > MAX_ANNOTATION_BYTES {
            walk.wrong("annotations", format!("have {bytes} bytes, want at most {MAX_ANNOTATION_BYTES}"));
        }
        walk.each("finalizers", &meta.finalizers, |walk, name| walk.form("", name, qualified_name));
        walk.each("ownerReferences", &meta.owner_references, |walk, owner| {
            let fields =
                [("apiVersion", &owner.api_version), ("kind", &owner.kind), ("name", &owner.name), ("uid", &owner.uid)];
            for (field, value) in fields {
                if value.is_empty() {
                    walk.missing(field, "an owner is named by apiVersion, kind, name and uid");
                }
            }
        });
        if meta.owner_references.iter().filter(|owner| owner.controller == Some(true)).count() > 1 {
            walk.wrong("ownerReferences", "more than one has controller: true, want at most one");
        }
    });
}

pub(super) fn labels(walk: &mut Walk, field: &str, labels: &std::collections::BTreeMap<String, String>) {
    for (key, value) in labels {
        if let Err(wanted) = qualified_name(key) {
            walk.bad(field, key, wanted);
        }
        if let Err(wanted) = label_value(value) {
            walk.bad(&format!("{field}[{key:?}]"), value, wanted);
        }
    }
}

pub(super) fn label_selector(walk: &mut Walk, field: &str, selector: Option<&LabelSelector>) {
    let Some(selector) = selector else { return };
    walk.within(field, |walk| {
        labels(walk, "matchLabels", &selector.match_labels);
        walk.each("matchExpressions", &selector.match_expressions, |walk, one| {
            walk.form("key", &one.key, qualified_name);
            match crate::selector::Operator::parse(&one.operator) {
                Some(operator) if !matches!(one.operator.as_str(), "Gt" | "Lt") => {
                    if let Err(wanted) = operator.check_values(&one.values) {
                        walk.bad("values", one.values.join(","), format!("{} {wanted}", one.operator));
                    }
                }
                _ => walk.bad("operator", &one.operator, "want In, NotIn, Exists or DoesNotExist"),
            }
            walk.each("values", &one.values, |walk, value| walk.form("", value, label_value));
        });
    });
}
