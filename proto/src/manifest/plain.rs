//! What an unquoted YAML scalar is, by the rules of the YAML that Kubernetes reads (YAML 1.1 as go-yaml has it),
//! but for the single letters y and n, which are text: too many things are called n.

use super::tree::Tree;

/// Bool, null, number or text. `None` for a number that JSON does not have (`.inf`, `.nan`).
pub(super) fn resolve(text: &str) -> Option<Tree> {
    let plain = match text {
        "" | "~" | "null" | "Null" | "NULL" => Tree::Null,
        "yes" | "Yes" | "YES" | "true" | "True" | "TRUE" | "on" | "On" | "ON" => Tree::Bool(true),
        "no" | "No" | "NO" | "false" | "False" | "FALSE" | "off" | "Off" | "OFF" => Tree::Bool(false),
        ".nan" | ".NaN" | ".NAN" | ".inf" | ".Inf" | ".INF" | "+.inf" | "+.Inf" | "+.INF" | "-.inf" | "-.Inf"
        | "-.INF" => return None,
        _ => number(text).map_or_else(|| Tree::Text(text.to_owned()), Tree::Number),
    };
    Some(plain)
}

/// The number in JSON's form.
fn number(text: &str) -> Option<String> {
    if !text.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '+' | '-' | '.')) {
        return None;
    }
    let clean = text.replace('_', "");
    integer(&clean).map(|number| number.to_string()).or_else(|| float(&clean))
}

/// Decimal, 0x, 0o, 0b, and octal with a leading 0.
fn integer(text: &str) -> Option<i128> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let lower = digits.to_ascii_lowercase();
    let (radix, digits) = match lower.get(..2) {
        Some("0x") => (16, lower.get(2..)?),
        Some("0o") => (8, lower.get(2..)?),
        Some("0b") => (2, lower.get(2..)?),
        _ if lower.len() > 1 && lower.starts_with('0') => (8, lower.get(1..)?),
        _ => (10, lower.as_str()),
    };
    // from_str_radix would take a second sign.
    if !digits.starts_with(|c: char| c.is_ascii_hexdigit()) {
        return None;
    }
    // 64 bits are the most that any field has; what is longer is read as a float.
    let value = i128::from(u64::from_str_radix(digits, radix).ok()?);
    let value = if negative { -value } else { value };
    (value >= i128::from(i64::MIN)).then_some(value)
}

fn float(text: &str) -> Option<String> {
    let fit = |c: char| c.is_ascii_digit() || matches!(c, '+' | '-' | '.' | 'e' | 'E');
    if !text.chars().all(fit) || !text.contains(|c: char| c.is_ascii_digit()) {
        return None;
    }
    let value: f64 = text.parse().ok()?;
    serde_json::Number::from_f64(value).map(|number| number.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_scalars() {
        let show = |text: &str| match resolve(text) {
            None => "none".to_owned(),
            Some(Tree::Null) => "null".to_owned(),
            Some(Tree::Bool(value)) => value.to_string(),
            Some(Tree::Number(number)) => format!("#{number}"),
            Some(tree) => format!("{tree:?}"),
        };
        for (text, expected) in [
            ("", "null"),
            ("~", "null"),
            ("yes", "true"),
            ("off", "false"),
            ("0", "#0"),
            ("-0", "#0"),
            ("+12", "#12"),
            ("-12", "#-12"),
            ("0644", "#420"),
            ("0o644", "#420"),
            ("0x1F", "#31"),
            ("0b11", "#3"),
            ("1_000", "#1000"),
            ("0900", "#900.0"),
            ("1.5", "#1.5"),
            (".5", "#0.5"),
            ("5.", "#5.0"),
            ("1e3", "#1000.0"),
            ("-1E-2", "#-0.01"),
            ("18446744073709551615", "#18446744073709551615"),
            ("9223372036854775808", "#9223372036854775808"),
            (".inf", "none"),
        ] {
            assert_eq!(show(text), expected, "{text}");
        }
        for text in [
            "100m",
            "1.5Gi",
            "1.2.3",
            "12:30",
            "-",
            "--1",
            "+-1",
            "0x",
            "0x-1",
            "e3",
            ".",
            "1e",
            "nulls",
            "2001-01-01",
            "-x",
            "0b2",
        ] {
            assert_eq!(resolve(text), Some(Tree::Text(text.to_owned())), "{text}");
        }
        assert_eq!(resolve(&"9".repeat(400)), Some(Tree::Text("9".repeat(400))), "no double holds it");
    }
}
