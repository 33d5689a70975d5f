//! Fuzzing what strangers write, with cargo-fuzz (rust-fuzz.github.io/book). On the stable compiler, so without sanitizers: our code is
//! safe Rust, and what is looked for are panics, hangs, memory without end, and what the targets themselves assert.

use crate::run;
use std::process::Command;

/// The targets, each with a directory of good inputs to begin with, if the project has one.
const TARGETS: [(&str, Option<&str>); 4] = [
    ("manifest", Some("deploy/examples")),
    ("layer", None),
    ("image_config", Some("fuzz/seeds/image_config")),
    ("shim_protocol", None),
];

/// The version that the targets were written for.
const CARGO_FUZZ: &str = "0.13.2";

/// `NAME [--minutes N]`; ten minutes by default. Anything that is found lies in `fuzz/artifacts/NAME`.
pub fn run(name: &str, flags: &[&str]) -> Result<(), String> {
    let Some((_, seeds)) = TARGETS.iter().find(|(target, _)| *target == name) else {
        let names: Vec<&str> = TARGETS.iter().map(|(target, _)| *target).collect();
        return Err(format!("there is no fuzz target {name:?}; there are {}", names.join(", ")));
    };
    let minutes: u32 = match flags {
        [] => 10,
        ["--minutes", number] => number.parse().map_err(|_| format!("--minutes {number:?}: want a whole number"))?,
        other => return Err(format!("{}: want --minutes N", other.join(" "))),
    };
    let installed = Command::new("cargo").args(["fuzz", "--version"]).output().is_ok_and(|out| out.status.success());
    if !installed {
        run::cargo(&["install", "cargo-fuzz", "--version", CARGO_FUZZ, "--locked"])?;
    }
    let root = run::root();
    let corpus = root.join("fuzz/corpus").join(name);
    std::fs::create_dir_all(&corpus).map_err(|e| format!("make {}: {e}", corpus.display()))?;
    let mut fuzz = run::cargo_command();
    // From its own directory cargo-fuzz finds its own workspace.
    fuzz.current_dir(root.join("fuzz")).args(["fuzz", "run", "--sanitizer", "none", name]).arg(&corpus);
    fuzz.args(seeds.iter().map(|seeds| root.join(seeds)));
    fuzz.env("CARGO_TARGET_DIR", run::target().join("fuzz"));
    // Far more time and memory than any such input should take. Long inputs from the beginning: a short one has one file in its layer.
    fuzz.args(["--", "-timeout=20", "-rss_limit_mb=1024", "-print_final_stats=1", "-len_control=0"]);
    fuzz.arg(format!("-max_total_time={}", minutes * 60));
    run::command(&mut fuzz)
}

#[cfg(test)]
mod tests {
    use super::{TARGETS, run};

    #[test]
    fn every_target_is_there_and_others_are_refused() {
        let manifest = include_str!("../../fuzz/Cargo.toml");
        for (name, _) in TARGETS {
            assert!(manifest.contains(&format!("path = \"fuzz_targets/{name}.rs\"")), "{name}");
        }
        assert_eq!(manifest.matches("[[bin]]").count(), TARGETS.len());
        let told = run("nothing", &[]).expect_err("no target");
        assert!(told.contains("manifest, layer, image_config, shim_protocol"), "{told}");
        for flags in [&["--minutes", "x"][..], &["--seconds", "1"]] {
            assert!(run("manifest", flags).is_err());
        }
    }
}
