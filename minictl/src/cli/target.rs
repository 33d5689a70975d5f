//! `pods`, `pod a b`, `pod/a node/b`, `pods,nodes`: what a command is about.

use minipod_proto::Kind;

use super::error::CliError;

/// One kind, and the names of it that are meant; none: all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The kind.
    pub kind: Kind,
    /// The objects' names.
    pub names: Vec<String>,
}

/// Reads the words.
pub fn parse(words: &[String]) -> Result<Vec<Target>, CliError> {
    let hint = "such as: get pods; get pod NAME; get pod/NAME node/NAME";
    let Some(first) = words.first() else { return Err(CliError::usage("a kind is missing", hint)) };
    if words.iter().any(|word| word.contains('/')) {
        let mut targets: Vec<Target> = Vec::new();
        for word in words {
            let Some((kind, name)) = word.split_once('/').filter(|(_, name)| !name.is_empty()) else {
                return Err(CliError::usage(format!("{word:?} has no KIND/NAME beside others that have"), hint));
            };
            let (kind, name) = (kind_of(kind)?, name.to_owned());
            match targets.last_mut() {
                Some(last) if last.kind == kind => last.names.push(name),
                _ => targets.push(Target { kind, names: vec![name] }),
            }
        }
        return Ok(targets);
    }
    let kinds = first.split(',').map(kind_of).collect::<Result<Vec<Kind>, CliError>>()?;
    let names: Vec<String> = words.iter().skip(1).cloned().collect();
    if kinds.len() > 1 && !names.is_empty() {
        return Err(CliError::usage("several kinds and names do not go together", hint));
    }
    Ok(kinds.into_iter().map(|kind| Target { kind, names: names.clone() }).collect())
}

fn kind_of(word: &str) -> Result<Kind, CliError> {
    Kind::parse(word).ok_or_else(|| {
        let kinds: Vec<&str> = Kind::ALL.iter().map(|kind| kind.plural()).collect();
        CliError::usage(format!("there is no kind {word:?}"), format!("the kinds are: {}", kinds.join(", ")))
    })
}

/// The pod's name of a word that may be `pod/NAME`.
pub fn pod_name(word: &str) -> Result<&str, CliError> {
    match word.split_once('/') {
        None => Ok(word),
        Some((kind, name)) if Kind::parse(kind) == Some(Kind::Pod) => Ok(name),
        Some(_) => Err(CliError::usage(format!("{word:?} is not a pod"), "want NAME or pod/NAME")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_targets() {
        for (words, expected) in [
            ("pods", "Pod[]"),
            ("po a b", "Pod[a b]"),
            ("pod/a pod/b no/n", "Pod[a b] Node[n]"),
            ("pods,nodes", "Pod[] Node[]"),
            ("ConfigMap x", "ConfigMap[x]"),
            ("", "error"),
            ("potatoes", "error"),
            ("pod/", "error"),
            ("pod/a b", "error"),
            ("pods,nodes a", "error"),
        ] {
            let split: Vec<String> = words.split_whitespace().map(str::to_owned).collect();
            let found = match parse(&split) {
                Ok(targets) => {
                    let shown: Vec<String> =
                        targets.iter().map(|target| format!("{}[{}]", target.kind, target.names.join(" "))).collect();
                    shown.join(" ")
                }
                Err(_) => "error".to_owned(),
            };
            assert_eq!(found, expected, "{words}");
        }
        assert_eq!(pod_name("pod/a").unwrap(), "a");
        assert!(pod_name("node/a").is_err());
    }
}
