//! What names may look like (RFC 1123, Kubernetes' label syntax). Each check answers with what would be right.

/// The answer of a check: `Err` says what would be right.
pub type Check = Result<(), &'static str>;

const DNS_LABEL: &str =
    "want at most 63 lower case letters, digits and '-', beginning and ending with a letter or digit";
const DNS_SUBDOMAIN: &str = "want at most 253 lower case letters, digits, '-' and '.', each part between dots beginning and ending with a letter or digit";
const LABEL_VALUE: &str =
    "want nothing or at most 63 of A-Z, a-z, 0-9, '-', '_' and '.', beginning and ending with a letter or digit";
const QUALIFIED: &str = "want an optional DNS prefix and '/', then 1 to 63 of A-Z, a-z, 0-9, '-', '_' and '.', beginning and ending with a \
     letter or digit, as in example.com/name";
const PORT_NAME: &str =
    "want 1 to 15 lower case letters, digits and '-', at least one letter, no '-' at an end and no two in a row";
const ENV_NAME: &str = "want printable ASCII without '='";
const CONFIG_KEY: &str = "want 1 to 253 of A-Z, a-z, 0-9, '-', '_' and '.', not \".\" and not beginning with \"..\"";

fn all(ok: bool, else_wanted: &'static str) -> Check {
    if ok { Ok(()) } else { Err(else_wanted) }
}

fn is_dns_label(text: &str) -> bool {
    let ends = |byte: Option<&u8>| byte.is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    let bytes = text.as_bytes();
    bytes.len() <= 63
        && ends(bytes.first())
        && ends(bytes.last())
        && bytes.iter().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || *byte == b'-')
}

fn is_label_part(text: &str) -> bool {
    let bytes = text.as_bytes();
    let ends = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    bytes.len() <= 63
        && ends(bytes.first())
        && ends(bytes.last())
        && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
}

/// A DNS label (RFC 1123): names of containers, volumes, namespaces.
pub fn dns_label(text: &str) -> Check {
    all(is_dns_label(text), DNS_LABEL)
}

/// A DNS subdomain (RFC 1123): names of pods and nodes. Never a path: it holds no '/' and no empty part.
pub fn dns_subdomain(text: &str) -> Check {
    // Kubernetes limits the whole to 253, not each part to 63.
    let part = |part: &str| {
        let ends = |byte: Option<&u8>| byte.is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
        let bytes = part.as_bytes();
        ends(bytes.first())
            && ends(bytes.last())
            && bytes.iter().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || *byte == b'-')
    };
    all(text.len() <= 253 && text.split('.').all(part), DNS_SUBDOMAIN)
}

/// A value of a label.
pub fn label_value(text: &str) -> Check {
    all(text.is_empty() || is_label_part(text), LABEL_VALUE)
}

/// A key of a label, an annotation, a taint or a condition: `name` or `prefix/name`.
pub fn qualified_name(text: &str) -> Check {
    let ok = match text.split_once('/') {
        Some((prefix, name)) => dns_subdomain(prefix).is_ok() && is_label_part(name),
        None => is_label_part(text),
    };
    all(ok, QUALIFIED)
}

/// The name of a port (RFC 6335).
pub fn port_name(text: &str) -> Check {
    let bytes = text.as_bytes();
    let ok = (1..=15).contains(&bytes.len())
        && bytes.iter().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || *byte == b'-')
        && bytes.iter().any(u8::is_ascii_lowercase)
        && !text.starts_with('-')
        && !text.ends_with('-')
        && !text.contains("--");
    all(ok, PORT_NAME)
}

/// The name of an environment variable.
pub fn env_name(text: &str) -> Check {
    all(!text.is_empty() && text.bytes().all(|byte| matches!(byte, b' '..=b'~') && byte != b'='), ENV_NAME)
}

/// A key in a ConfigMap or Secret: it becomes a file's name.
pub fn config_key(text: &str) -> Check {
    let ok = (1..=253).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
        && text != "."
        && !text.starts_with("..");
    all(ok, CONFIG_KEY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let long = "a".repeat(64);
        type Case<'a> = (fn(&str) -> Check, &'a [&'a str], &'a [&'a str]);
        let table: &[Case] = &[
            (dns_label, &["a", "a-b", "0", "0a9"], &["", "-a", "a-", "A", "a.b", "a_b", "a/b", "..", "ä", &long]),
            (
                dns_subdomain,
                &["a", "a.b", "a-b.0", &long],
                &["", ".", "..", "a..b", "a.", ".a", "../a", "a/b", "A", "-a", "a.-b", "a\n"],
            ),
            (label_value, &["", "A", "a_b.c-d", "1"], &["-", "a-", ".a", "a b", "a/b", &long]),
            (qualified_name, &["a", "A.b_c", "example.com/a"], &["", "/", "a/", "/a", "a/b/c", "Ex.com/a", "a b"]),
            (port_name, &["http", "a1", "1a-b"], &["", "1", "-a", "a-", "a--b", "A", "aaaaaaaaaaaaaaaa"]),
            (env_name, &["A", "a.b", "1", "a b"], &["", "A=B", "ä", "a\0", "a\n"]),
            (config_key, &["a", "A_b.c", "...a".get(2..).unwrap()], &["", ".", "..", "..a", "a/b", "a b"]),
        ];
        for (check, good, bad) in table {
            good.iter().for_each(|text| assert!(check(text).is_ok(), "{text}"));
            bad.iter().for_each(|text| assert!(check(text).is_err(), "{text}"));
        }
    }
}
