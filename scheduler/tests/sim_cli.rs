//! `minipod-scheduler sim` as a user meets it: tables, files, and what it says to bad flags and bad files.

use std::path::Path;
use std::process::{Command, Output};

fn sim(arguments: &[&str]) -> Output {
    let binary = env!("CARGO_BIN_EXE_minipod-scheduler");
    Command::new(binary).arg("sim").args(arguments).output().expect("the scheduler's binary runs")
}

fn stdout(arguments: &[&str]) -> String {
    let output = sim(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn complaint(arguments: &[&str]) -> String {
    let output = sim(arguments);
    assert!(!output.status.success(), "{arguments:?} was accepted");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "", "{arguments:?}");
    String::from_utf8(output.stderr).unwrap()
}

/// Every tag that opens closes, in order.
fn is_balanced(svg: &str) -> bool {
    let mut open = Vec::new();
    for tag in svg.split('<').skip(1) {
        let (tag, _) = tag.split_once('>').unwrap_or((tag, ""));
        let name = tag.trim_start_matches('/').split_whitespace().next().unwrap_or("");
        match (tag.starts_with('/'), tag.ends_with('/')) {
            (true, _) if open.pop() != Some(name) => return false,
            (false, false) => open.push(name),
            _ => {}
        }
    }
    open.is_empty()
}

fn files(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort_unstable();
    names
}

#[test]
fn help_names_the_studies_and_every_strategy() {
    let help = stdout(&["--help"]);
    for word in ["rigid", "mix", "two-node", "packing", "swf", "trace", "hoard-oldest", "opt-seq-inc", "minipod "] {
        assert!(help.contains(word), "{word}: {help}");
    }
}

#[test]
fn a_study_prints_a_table_and_writes_figures_and_charts() {
    let directory = tempfile::tempdir().unwrap();
    let (json, plots) = (directory.path().join("out.json"), directory.path().join("new/plots"));
    let flags = [
        "rigid",
        "--nodes",
        "32",
        "--jobs",
        "60",
        "--json",
        json.to_str().unwrap(),
        "--plots",
        plots.to_str().unwrap(),
    ];
    let table = stdout(&flags);
    assert!(table.contains("STRATEGY") && table.lines().any(|line| line.starts_with("atomic-backfill ")), "{table}");
    assert_eq!(files(&plots), ["rigid-over-time.svg", "rigid-shares.svg", "rigid-wait.svg"]);
    for file in files(&plots) {
        let chart = std::fs::read_to_string(plots.join(&file)).unwrap();
        assert!(chart.starts_with("<svg ") && is_balanced(&chart) && !chart.contains("NaN"), "{file}");
    }
    let figures: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&json).unwrap()).unwrap();
    let results = figures["results"].as_array().unwrap();
    assert_eq!((results.len(), figures["parameters"]["seed"].as_u64()), (8, Some(1)));
    for one in results {
        let shares = ["useful", "held", "wasted", "free"].map(|part| one["shares"][part].as_f64().unwrap());
        assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-9, "{one}");
    }
    assert_eq!(table, stdout(&flags), "the same flags give the same figures");
}

#[test]
fn the_other_studies_run() {
    let directory = tempfile::tempdir().unwrap();
    let plots = directory.path().to_str().unwrap();
    let mix = ["mix", "--nodes", "10", "--jobs", "100", "--service-decisions", "0.1,10", "--scheduler-counts", "1,3"];
    for study in [&mix[..], &["two-node", "--runs", "10"], &["packing", "--nodes", "5", "--pods", "50", "--runs", "2"]]
    {
        let table = stdout(&[study, &["--plots", plots]].concat());
        assert!(table.lines().count() > 4, "{table}");
    }
    let names = files(directory.path());
    for name in [
        "mix-busyness",
        "mix-conflicts",
        "mix-schedulers",
        "mix-schedulers-wait",
        "packing-largest",
        "packing-quality",
        "two-node-stuck",
    ] {
        assert!(names.contains(&format!("{name}.svg")), "{names:?}");
    }
}

#[test]
fn traces_are_read_from_files() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let log = file(
        "log.swf",
        "; MaxProcs: 4\n1 0 -1 60 2 -1 -1 2 -1 -1 1 1 1 1 0 -1 -1 -1\n2 9 -1 5 4 -1 -1 4 -1 -1 1 1 1 1 0 -1 -1 -1\n",
    );
    let table = stdout(&["swf", &log, "--strategies", "minipod"]);
    assert!(table.starts_with("2 jobs of log.swf, 4 nodes"), "{table}");
    let nodes = file("nodes.csv", "sn,cpu_milli,memory_mib,gpu,model\na,4000,4096,2,P100\nb,4000,4096,0,\n");
    let pods = file(
        "pods.csv",
        "name,cpu_milli,memory_mib,num_gpu,gpu_milli,creation_time,deletion_time\np,1000,10,1,500,0,10\nq,1000,10,0,0,5,15\n",
    );
    let table =
        stdout(&["trace", "--node-list", &nodes, "--pod-list", &pods, "--strategies", "minipod", "--runs", "1"]);
    assert!(table.starts_with("2 pods of pods.csv, 2 nodes") && table.contains("minipod pack"), "{table}");

    let bad = file("bad.swf", "1 0 -1 sixty 2 -1 -1 2 -1 -1 1 1 1 1 0 -1 -1 -1\n");
    let told = complaint(&["swf", &bad]);
    assert!(told.contains("bad.swf:\nline 1: field 4 (run time): \"sixty\": want a number"), "{told}");
    let told = complaint(&["trace", "--node-list", &nodes, "--pod-list", &nodes]);
    assert!(told.contains("line 1: header:") && told.contains("num_gpu"), "{told}");
    let told = complaint(&["swf", "/no/such/file"]);
    assert!(told.contains("read /no/such/file: No such file"), "{told}");
    let empty = file("empty.swf", "; nothing\n");
    assert!(complaint(&["swf", &empty]).contains("no job is left"));
}

#[test]
fn bad_flags_are_answered_with_what_would_be_right() {
    let table: [(&[&str], &str); 7] = [
        (&["rigid", "--strategies", "mesos"], "no strategy is called \"mesos\": want one of hoard, "),
        (&["rigid", "--load", "0"], "want a share above 0"),
        (&["rigid", "--nodes", "3"], "3 is not in 8..=16384"),
        (&["rigid", "--schedulers", "33"], "33 is not in 1..=32"),
        (&["mix", "--service-decisions", "1,x"], "\"x\": want seconds from 0"),
        (&["two-node", "--profile", "tight"], "unknown profile \"tight\": want spread or pack"),
        (&["sideways"], "unrecognized subcommand 'sideways'"),
    ];
    for (flags, want) in table {
        let told = complaint(flags);
        assert!(told.contains(want), "{flags:?}: {told}");
    }
}
