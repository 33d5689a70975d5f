//! The dependency floors of ARCHITECTURE.md ("The crates"), held against `cargo metadata`, `Cargo.lock` and the sources.
//!
//! Nothing depends sideways on its own floor or upwards, dev- and build-dependencies included.

use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Crates by floor. A helper binary of a crate (podshim, pause) lies just below it and is for it and the tests only.
const FLOORS: &[(&str, u32)] = &[
    ("minipod-proto", 0),
    ("minipod-daemon", 0),
    ("minipod-store", 1),
    ("minipod-transfer", 1),
    ("minipod-client", 2),
    ("minipod-podshim", 2),
    ("minipod-pause", 2),
    ("minipod-apiserver", 3),
    ("minipod-scheduler", 3),
    ("minipod-nodeagent", 3),
    ("minictl", 3),
    ("minipod-tests", 4),
    ("xtask", 4),
];

/// Dependencies that only the named crates may have, whatever their floors.
const RESERVED: &[(&str, &[&str])] = &[
    ("etcd-client", &["minipod-apiserver", "minipod-store"]),
    ("minipod-store", &["minipod-apiserver", "minictl", "minipod-tests"]),
    ("minipod-podshim", &["minipod-nodeagent", "minipod-tests"]),
    ("minipod-pause", &["minipod-nodeagent", "minipod-tests"]),
];

/// Crates that use the standard library only.
const STD_ONLY: &[&str] = &["xtask"];

/// Where `unsafe` may be written.
const UNSAFE_ALLOWED: &[&str] =
    &["nodeagent/podshim/", "nodeagent/pause/", "nodeagent/src/sys.rs", "nodeagent/src/sys/", "daemon/src/memory.rs"];

/// TLS is ring's: the others need a C toolchain and do not link statically without trouble.
const BANNED: &[&str] = &["openssl", "openssl-sys", "native-tls", "aws-lc-rs", "aws-lc-sys"];

#[test]
fn every_crate_depends_only_on_lower_floors() {
    let crates = workspace();
    let mut wrong = Vec::new();
    let unknown = crates.keys().filter(|name| floor(name).is_none());
    wrong.extend(unknown.map(|name| format!("{name} is in the workspace but not in FLOORS: say on which floor it is")));
    let gone = FLOORS.iter().filter(|(name, _)| !crates.contains_key(*name));
    wrong.extend(gone.map(|(name, _)| format!("{name} is in FLOORS but not in the workspace")));
    for (name, dependencies) in &crates {
        wrong.extend(dependencies.iter().filter_map(|dependency| offence(name, dependency)));
    }
    assert!(wrong.is_empty(), "dependencies against the floors:\n  {}", wrong.join("\n  "));
}

#[test]
fn the_rules_refuse_what_they_should() {
    for (name, dependency) in [
        ("minipod-scheduler", "minipod-apiserver"),
        ("minipod-daemon", "minipod-proto"),
        ("minipod-client", "minipod-nodeagent"),
        ("minictl", "minipod-podshim"),
        ("minipod-scheduler", "etcd-client"),
        ("minipod-tests", "etcd-client"),
        ("minipod-tests", "xtask"),
        ("xtask", "serde"),
    ] {
        assert!(offence(name, dependency).is_some(), "{name} -> {dependency} must be refused");
    }
    for (name, dependency) in
        [("minipod-client", "minipod-proto"), ("minipod-nodeagent", "minipod-podshim"), ("minipod-daemon", "tokio")]
    {
        assert_eq!(offence(name, dependency), None, "{name} -> {dependency}");
    }
}

#[test]
fn no_banned_crate_is_locked() {
    let lock = fs::read_to_string(root().join("Cargo.lock")).expect("Cargo.lock is committed");
    let locked = lock.lines().filter_map(|line| line.strip_prefix("name = \"")?.strip_suffix('"'));
    let found: Vec<&str> = locked.filter(|name| BANNED.contains(name)).collect();
    assert!(found.is_empty(), "Cargo.lock has {found:?}: find out who asks with `cargo tree -i NAME`");
}

#[test]
fn unsafe_is_written_only_where_it_may_be() {
    let mut files = Vec::new();
    rust_files(&root(), &mut files);
    assert!(files.len() > 20, "the scan found only {} files: it looks in the wrong place", files.len());
    let mut wrong = Vec::new();
    for file in files {
        let relative = file.strip_prefix(root()).expect("below the root").to_string_lossy().into_owned();
        if UNSAFE_ALLOWED.iter().any(|place| relative.starts_with(place)) {
            continue;
        }
        let text = fs::read_to_string(&file).expect("sources are readable");
        wrong.extend(unsafe_lines(&text).into_iter().map(|line| format!("{relative}:{line}")));
    }
    assert!(wrong.is_empty(), "`unsafe` outside {UNSAFE_ALLOWED:?}:\n  {}", wrong.join("\n  "));
}

#[test]
fn the_scan_sees_through_comments_and_strings() {
    let text = "#![forbid(unsafe_code)]\n// unsafe {}\n/* unsafe */ let s = \"unsafe \\\" unsafe\";\nlet c = '\"'; unsafe { x() }\nlet r = r#\"unsafe \" \"#;\nfn f<'a>() {} unsafe fn g() {}\n";
    assert_eq!(unsafe_lines(text), [4, 6]);
}

fn floor(name: &str) -> Option<u32> {
    FLOORS.iter().find(|(known, _)| *known == name).map(|(_, floor)| *floor)
}

/// Why `name` may not depend on `dependency`, if it may not.
fn offence(name: &str, dependency: &str) -> Option<String> {
    // A crate's tests may want it with other features.
    if name == dependency {
        return None;
    }
    let reserved = RESERVED.iter().find(|(thing, _)| *thing == dependency);
    if let Some((_, users)) = reserved
        && !users.contains(&name)
    {
        return Some(format!("{name} -> {dependency}: only {} may use it", users.join(", ")));
    }
    if STD_ONLY.contains(&name) {
        return Some(format!("{name} -> {dependency}: {name} uses the standard library only"));
    }
    match (floor(name), floor(dependency)) {
        (Some(own), Some(other)) if other >= own => {
            Some(format!("{name} (floor {own}) -> {dependency} (floor {other})"))
        }
        _ => None,
    }
}

/// Crates of the workspace with the names of everything they depend on, in whatever way.
fn workspace() -> BTreeMap<String, Vec<String>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["metadata", "--no-deps", "--format-version", "1", "--offline"]).current_dir(root());
    let output = command.output().expect("cargo can be started");
    assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    packages.iter().map(|package| (text(&package["name"]), dependencies(package))).collect()
}

fn dependencies(package: &Value) -> Vec<String> {
    package["dependencies"].as_array().into_iter().flatten().map(|dependency| text(&dependency["name"])).collect()
}

fn text(value: &Value) -> String {
    value.as_str().expect("a name is a string").to_owned()
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate is in the workspace").to_path_buf()
}

/// All Rust sources below `dir` apart from build output.
fn rust_files(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("directories are readable") {
        let path = entry.expect("entries are readable").path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() && !path.is_symlink() && name != "target" && !name.starts_with('.') {
            rust_files(&path, files);
        } else if name.ends_with(".rs") {
            files.push(path);
        }
    }
}

/// Numbers of the lines with the keyword `unsafe`, apart from comments and literals.
fn unsafe_lines(text: &str) -> Vec<usize> {
    let code = blank_out(text);
    let has = |line: &str| line.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == "unsafe");
    code.lines().enumerate().filter(|(_, line)| has(line)).map(|(index, _)| index + 1).collect()
}

/// The text with comments, strings and characters replaced by blanks; lines stay where they are.
fn blank_out(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let length = literal_length(rest);
        if length == 0 {
            out.push(first);
            rest = &rest[first.len_utf8()..];
            // The tail of an identifier is not the start of a literal: `for"` is no raw string.
            if first.is_alphanumeric() || first == '_' {
                let word = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
                if first != 'r' && first != 'b' {
                    out.push_str(&rest[..word]);
                    rest = &rest[word..];
                }
            }
        } else {
            out.extend(rest[..length].chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
            rest = &rest[length..];
        }
    }
    out
}

/// Length in bytes of the comment or literal that starts here; 0 if none does.
fn literal_length(text: &str) -> usize {
    if text.starts_with("//") {
        return text.find('\n').unwrap_or(text.len());
    }
    if text.starts_with("/*") {
        return text.find("*/").map_or(text.len(), |end| end + 2);
    }
    if let Some(raw) = text.strip_prefix('r') {
        let hashes = raw.len() - raw.trim_start_matches('#').len();
        if raw[hashes..].starts_with('"') {
            let end = format!("\"{}", "#".repeat(hashes));
            let body = 1 + hashes + 1;
            return text[body..].find(&end).map_or(text.len(), |at| body + at + end.len());
        }
    }
    if text.starts_with('"') {
        return quoted(text, '"');
    }
    // A character, not a lifetime: 'x' or '\…'.
    let mut chars = text.chars();
    if chars.next() == Some('\'') && (text[1..].starts_with('\\') || chars.nth(1) == Some('\'')) {
        return quoted(text, '\'');
    }
    0
}

fn quoted(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (index, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return index + c.len_utf8(),
            _ => {}
        }
    }
    text.len()
}
