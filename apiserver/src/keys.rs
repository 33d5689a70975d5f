//! Keys of the store. No name gets into a key before it was checked.

use minipod_proto::Kind;

use crate::{error::ApiError, storage::PREFIX};

/// A name may be this long (Kubernetes: a DNS subdomain).
const NAME_LIMIT: usize = 253;
/// A namespace may be this long (Kubernetes: a DNS label).
const LABEL_LIMIT: usize = 63;

/// What a key stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parsed<'a> {
    /// An object; `namespace/name` or `name`.
    Object(Kind, &'a str),
    /// The ledger of a node.
    Ledger(&'a str),
    /// What one API server says of itself.
    Replica(&'a str),
    /// Who holds a node's session.
    Session(&'a str),
    /// A range of pod addresses.
    PodCidr(&'a str),
    /// Whom rules between pods speak of.
    Announced,
    /// A turn that bindings take of which a rule speaks; its number.
    Turn(&'a str),
    /// Nothing that this build knows.
    Unknown,
}

/// Prefix of all objects of a kind.
pub fn kind_prefix(kind: Kind) -> String {
    format!("{PREFIX}{}/", kind.plural())
}

/// Prefix of a kind's objects in a namespace; empty: in all.
pub fn range_prefix(kind: Kind, namespace: &str) -> String {
    if namespace.is_empty() { kind_prefix(kind) } else { format!("{PREFIX}{}/{namespace}/", kind.plural()) }
}

/// Key of an object; `key` is `namespace/name` or `name` of checked names.
pub fn object(kind: Kind, key: &str) -> Vec<u8> {
    format!("{PREFIX}{}/{key}", kind.plural()).into_bytes()
}

/// Key of a node's ledger.
pub fn ledger(node: &str) -> Vec<u8> {
    format!("{PREFIX}ledger/{node}").into_bytes()
}

/// Key of a replica's summary.
pub fn replica(id: &str) -> Vec<u8> {
    format!("{PREFIX}replicas/{id}").into_bytes()
}

/// Key of the server that holds a node's session.
pub fn session(node: &str) -> Vec<u8> {
    format!("{PREFIX}sessions/{node}").into_bytes()
}

/// Prefix of the ranges of pod addresses.
pub fn pod_cidr_prefix() -> String {
    format!("{PREFIX}podcidrs/")
}

/// Key of a range of pod addresses; padded, so that the order of the keys is that of the numbers.
pub fn pod_cidr(index: u32) -> Vec<u8> {
    format!("{PREFIX}podcidrs/{index:05}").into_bytes()
}

/// Key of the announcements of rules between pods.
pub fn announced() -> Vec<u8> {
    format!("{PREFIX}rules/announced").into_bytes()
}

/// Key of a turn of the bindings that rules speak of.
pub fn turn(number: usize) -> Vec<u8> {
    format!("{PREFIX}turns/{number:02}").into_bytes()
}

/// What a key of the store stands for.
pub fn parse(key: &[u8]) -> Parsed<'_> {
    let text = std::str::from_utf8(key).ok().and_then(|text| text.strip_prefix(PREFIX));
    let Some((group, rest)) = text.and_then(|text| text.split_once('/')) else { return Parsed::Unknown };
    match group {
        "ledger" => Parsed::Ledger(rest),
        "replicas" => Parsed::Replica(rest),
        "sessions" => Parsed::Session(rest),
        "podcidrs" => Parsed::PodCidr(rest),
        "rules" if rest == "announced" => Parsed::Announced,
        "turns" => Parsed::Turn(rest),
        _ => {
            let kind = Kind::ALL.into_iter().find(|kind| kind.plural() == group);
            kind.map_or(Parsed::Unknown, |kind| Parsed::Object(kind, rest))
        }
    }
}

/// The kind of a request.
///
/// # Errors
/// When there is no such kind.
pub fn kind(name: &str) -> Result<Kind, ApiError> {
    Kind::from_name(name).ok_or_else(|| {
        let known: Vec<&str> = Kind::ALL.iter().map(|kind| kind.name()).collect();
        ApiError::Invalid(format!("kind: {name:?} is not known; it is one of {}", known.join(", ")))
    })
}

/// `namespace/name` or `name` of a request; the names are checked, so that they cannot leave their place in the tree of keys.
///
/// # Errors
/// When a name is missing, superfluous or no name.
pub fn object_key(kind: Kind, namespace: &str, name: &str) -> Result<String, ApiError> {
    check_name("name", name)?;
    match (kind.namespaced(), namespace) {
        (true, "") => {
            Err(ApiError::Invalid(format!("namespace: empty, but a {kind} lives in one, such as \"default\"")))
        }
        (true, _) => {
            check_namespace(namespace)?;
            Ok(format!("{namespace}/{name}"))
        }
        (false, "") => Ok(name.to_owned()),
        (false, _) => {
            Err(ApiError::Invalid(format!("namespace: {namespace:?}, but a {kind} lives in none; leave it empty")))
        }
    }
}

/// Checks the namespace of a list or watch; empty stands for all.
///
/// # Errors
/// When it is none.
pub fn check_range(kind: Kind, namespace: &str) -> Result<(), ApiError> {
    if namespace.is_empty() {
        return Ok(());
    }
    if !kind.namespaced() {
        return Err(ApiError::Invalid(format!("namespace: {namespace:?}, but a {kind} lives in none; leave it empty")));
    }
    check_namespace(namespace)
}

fn check_namespace(namespace: &str) -> Result<(), ApiError> {
    check_name("namespace", namespace)?;
    if namespace.len() > LABEL_LIMIT || namespace.contains('.') {
        return Err(ApiError::Invalid(format!(
            "namespace: {namespace:?} is no DNS label: at most {LABEL_LIMIT} characters, and no dots"
        )));
    }
    Ok(())
}

/// Checks one name (an RFC 1123 subdomain).
///
/// # Errors
/// When it is none.
pub fn check_name(field: &str, name: &str) -> Result<(), ApiError> {
    let alphanumeric = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let label = |part: &str| part.starts_with(alphanumeric) && part.ends_with(alphanumeric);
    let good = name.len() <= NAME_LIMIT
        && name.chars().all(|c| alphanumeric(c) || c == '-' || c == '.')
        && name.split('.').all(label);
    if good {
        return Ok(());
    }
    let shown: String = name.chars().take(64).collect();
    Err(ApiError::Invalid(format!(
        "{field}: {shown:?} is no name: it has 1 to {NAME_LIMIT} lower case letters, digits, '-' or '.', and begins and ends \
         with a letter or digit"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_there_and_back() {
        let key = object(Kind::Pod, "default/a");
        assert_eq!(parse(&key), Parsed::Object(Kind::Pod, "default/a"));
        assert_eq!(parse(&object(Kind::Node, "n")), Parsed::Object(Kind::Node, "n"));
        assert_eq!(parse(&ledger("n")), Parsed::Ledger("n"));
        assert_eq!(parse(&session("n")), Parsed::Session("n"));
        assert_eq!(parse(&announced()), Parsed::Announced);
        assert_eq!(parse(&turn(7)), Parsed::Turn("07"));
        assert_eq!(parse(b"/minipod/rules/else"), Parsed::Unknown);
        assert_eq!(parse(b"/minipod/widgets/a"), Parsed::Unknown);
        assert_eq!(parse(b"/minipod/"), Parsed::Unknown);
        assert_eq!(parse(&[0xff, 0xfe]), Parsed::Unknown);
    }

    #[test]
    fn names_cannot_walk() {
        for bad in
            ["", ".", "..", "../x", "a/b", "a/../b", "A", "-a", "a-", "a..b", ".a", "a\0", "ä", "a b", &"a".repeat(254)]
        {
            let error = object_key(Kind::Pod, "default", bad).expect_err(bad).to_string();
            assert!(error.starts_with("name: "), "{error}");
            let error = object_key(Kind::Pod, bad, "a").expect_err(bad).to_string();
            assert!(error.starts_with("namespace: "), "{error}");
        }
        assert!(object_key(Kind::Pod, &"a".repeat(64), "a").is_err());
        assert!(object_key(Kind::Node, "default", "a").is_err());
        assert_eq!(object_key(Kind::Pod, "default", "a.b-c").expect("good"), "default/a.b-c");
        assert_eq!(object_key(Kind::Node, "", "a").expect("good"), "a");
    }
}
