//! The test programs that cargo makes, to be run elsewhere or otherwise than by `cargo test`.

use crate::run;
use std::path::{Path, PathBuf};
use std::process::Stdio;

/// One of them.
pub struct Program {
    /// The directory of its package: where its tests expect to be run.
    pub dir: PathBuf,
    /// The name of its file in `tests/`; empty for a library's own tests.
    pub name: String,
    /// What to run.
    pub executable: PathBuf,
}

/// Builds the tests of the whole workspace, as `cargo test --workspace` does, and lists them.
///
/// Always all: with `--package` cargo would choose other features, and build the dependencies again.
///
/// # Errors
/// When they do not compile.
pub fn build() -> Result<Vec<Program>, String> {
    let mut build = run::cargo_command();
    build.args(["test", "--workspace", "--no-run", "--message-format", "json-render-diagnostics"]);
    let built = build.stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let built = built.map_err(|e| format!("start cargo test --no-run: {e}"))?;
    if !built.status.success() {
        return Err(format!("building the tests failed: {}", built.status));
    }
    let programs: Vec<Program> = String::from_utf8_lossy(&built.stdout).lines().filter_map(program).collect();
    if programs.is_empty() { Err("cargo test --no-run names no test program".to_owned()) } else { Ok(programs) }
}

/// A line of cargo's report, where it speaks of a test program of `tests/` or of a library
/// (doc.rust-lang.org/cargo/reference/external-tools.html).
fn program(line: &str) -> Option<Program> {
    let profile = line.split_once(r#""profile":{"#)?.1.split('}').next()?;
    if !line.contains(r#""reason":"compiler-artifact""#) || !profile.contains(r#""test":true"#) {
        return None;
    }
    let target = &line[line.find(r#""target":{"#)?..];
    let name = match text(target, r#""kind":[""#)? {
        "test" => text(target, r#""name":""#)?,
        "lib" => "",
        _ => return None,
    };
    let dir = Path::new(text(line, r#""manifest_path":""#)?).parent()?.to_path_buf();
    Some(Program { dir, name: name.to_owned(), executable: text(line, r#""executable":""#)?.into() })
}

/// What stands between `before` and the next quotation mark.
fn text<'a>(line: &'a str, before: &str) -> Option<&'a str> {
    line.split_once(before)?.1.split('"').next()
}

#[cfg(test)]
mod tests {
    use super::program;

    #[test]
    fn test_programs_are_found_in_cargos_report() {
        let line = |kind: &str, test: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","package_id":"path+file:///w/store#minipod-store@0.1.0","manifest_path":"/w/store/Cargo.toml","target":{{"kind":["{kind}"],"crate_types":["bin"],"name":"crash","src_path":"/w/store/tests/crash.rs","test":true}},"profile":{{"opt_level":"0","test":{test}}},"features":[],"filenames":["/t/crash-1"],"executable":"/t/crash-1","fresh":true}}"#
            )
        };
        let found = program(&line("test", "true")).map(|found| (found.dir, found.name, found.executable));
        assert_eq!(found, Some(("/w/store".into(), "crash".to_owned(), "/t/crash-1".into())));
        assert_eq!(program(&line("lib", "true")).map(|found| found.name).as_deref(), Some(""));
        for (kind, test) in [("bin", "true"), ("test", "false")] {
            assert!(program(&line(kind, test)).is_none(), "{kind} {test}");
        }
        assert!(program(r#"{"reason":"build-finished","success":true}"#).is_none());
    }
}
