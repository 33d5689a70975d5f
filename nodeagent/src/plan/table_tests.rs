//! The planner's decisions as text: `testdata/plan/*.txt`. A case is a title, the pod, what was seen, `----`, and what comes
//! out. `UPDATE_TESTDATA=1 cargo test -p minipod-nodeagent` writes the outcomes anew; read the difference before you keep it.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use super::model::*;
use super::view::{ContainerView, StateView};
use super::{Plan, plan};

/// The pod of a `pod` line: `pod Always init:a sidecar:s app:x grace=30 delete=5s/30s deadline=60s hostnet`.
fn parse_pod(words: &[&str]) -> PodWant {
    let restart = match words[0] {
        "Always" => RestartPolicy::Always,
        "OnFailure" => RestartPolicy::OnFailure,
        "Never" => RestartPolicy::Never,
        other => panic!("unknown policy {other}"),
    };
    let mut want = PodWant {
        display_name: "default/p".into(),
        containers: Vec::new(),
        restart,
        grace_ms: 30_000,
        deletion: None,
        deadline_ms: None,
        evicted: None,
        refused: None,
        host_network: false,
        resources: Resources::default(),
    };
    for word in &words[1..] {
        if let Some((kind, name)) = word.split_once(':') {
            let (name, options) = name.split_once('+').unwrap_or((name, ""));
            let (kind, restart) = match (kind, restart) {
                ("init", RestartPolicy::Never) => (Kind::Init, RestartPolicy::Never),
                ("init", _) => (Kind::Init, RestartPolicy::OnFailure),
                ("sidecar", _) => (Kind::Sidecar, RestartPolicy::Always),
                ("app", restart) => (Kind::App, restart),
                ("debug", _) => (Kind::Debug, RestartPolicy::Never),
                other => panic!("unknown kind {other:?}"),
            };
            want.containers.push(ContainerWant {
                name: name.into(),
                kind,
                image: String::new(),
                restart,
                rules: rules(options),
                gates: gates(options),
                resources: resources(options),
                resize: ResizePolicy {
                    cpu_restarts: options.contains("cpu-restarts"),
                    memory_restarts: options.contains("memory-restarts"),
                },
            });
            continue;
        }
        match word.split_once('=').unwrap_or((word, "")) {
            ("delete", times) => {
                let (since, grace) = times.split_once('/').expect("delete=SINCE/GRACE");
                want.deletion = Some(Deletion { since_ms: millis(since), grace_ms: millis(grace) });
            }
            ("deadline", at) => want.deadline_ms = Some(millis(at)),
            ("evicted", grace) => {
                want.evicted = Some(Evicted { message: "the node is full".into(), grace_ms: millis(grace) });
            }
            ("refused", reason) => {
                let reason = match reason {
                    "" => "AppArmor",
                    "pressure" => super::EVICTED,
                    other => panic!("unknown reason {other}"),
                };
                want.refused = Some(Refused { reason, message: "the node has not what it needs".into() });
            }
            ("hostnet", _) => want.host_network = true,
            ("all", options) => want.resources = resources(options),
            other => panic!("unknown word {other:?}"),
        }
    }
    want
}

/// `app:x+post,pre,startup,ready`
fn gates(options: &str) -> Gates {
    let has = |option| options.split(',').any(|word| word == option);
    Gates { post_start: has("post"), pre_stop: has("pre"), startup: has("startup"), readiness: has("ready") }
}

/// `app:x+in42,in43` and `app:x+notin0`: restartPolicyRules.
fn rules(options: &str) -> Vec<RestartRule> {
    let rule = |word: &str| {
        let (within, code) = word
            .strip_prefix("notin")
            .map(|code| (false, code))
            .or(word.strip_prefix("in").map(|code| (true, code)))?;
        Some(RestartRule { within, codes: vec![code.parse().ok()?] })
    };
    options.split(',').filter_map(rule).collect()
}

/// `app:x+cpu500,memory64`: request in thousandths, limit in MiB.
fn resources(options: &str) -> Resources {
    let number = |name: &str| options.split(',').find_map(|word| word.strip_prefix(name)?.parse::<u64>().ok());
    Resources {
        cpu_request_milli: number("cpu"),
        memory_limit_bytes: number("memory").map(|mebibytes| mebibytes << 20),
        ..Resources::default()
    }
}

fn millis(text: &str) -> u64 {
    text.trim_end_matches('s').parse::<u64>().unwrap_or_else(|error| panic!("{text}: {error}")) * 1000
}

/// `seen ready` is a pod whose sandbox 1 stands with everything a start needs; other words change that.
fn parse_seen(seen: &mut Seen, want: &PodWant, words: &[&str]) {
    for word in words {
        match word.split_once('=').unwrap_or((word, "")) {
            ("ready", _) => {
                *seen = Seen {
                    dir: true,
                    data: true,
                    shim: Shim::Up,
                    sandbox_attempt: 1,
                    sandbox: SandboxState::Up,
                    network_attempt: 1,
                    network_held: true,
                    volumes: true,
                    etc_attempt: 1,
                    ..Seen::default()
                };
                for container in &want.containers {
                    let ready = ContainerSeen { image: Image::Ready, ..ContainerSeen::default() };
                    seen.containers.insert(container.name.clone(), Box::new(ready));
                }
            }
            ("dir", _) => (seen.dir, seen.data) = (true, true),
            ("dirless", _) => (seen.dir, seen.data) = (false, false),
            ("dataless", _) => seen.data = false,
            ("logs", _) => seen.logs = true,
            ("shim", "up") => seen.shim = Shim::Up,
            ("shim", "dead") => seen.shim = Shim::Dead,
            ("shim", "absent") => (seen.shim, seen.sandbox) = (Shim::Absent, SandboxState::None),
            ("sandbox", "ended") => seen.sandbox = SandboxState::Ended,
            ("sandbox", "none") => seen.sandbox = SandboxState::None,
            ("sandbox", attempt) => {
                seen.sandbox = SandboxState::Up;
                seen.sandbox_attempt = attempt.parse().expect("sandbox attempt");
            }
            ("net", "none") => (seen.network_attempt, seen.network_held) = (0, false),
            ("net", attempt) => {
                seen.network_attempt = attempt.parse().expect("network attempt");
                seen.network_held = true;
            }
            ("etc", attempt) => seen.etc_attempt = attempt.parse().expect("etc attempt"),
            ("volumes", on) => seen.volumes = on == "yes",
            ("all", options) => seen.pod_applied = Some(resources(options)),
            ("resize-error", text) => seen.resize_error = text.to_owned(),
            ("succeeded", at) => seen.terminal = Some(terminal(true, at)),
            ("evicted", times) => {
                let (at, grace) = times.split_once('/').expect("evicted=SINCE/GRACE");
                let reason = super::EVICTED.to_owned();
                seen.terminal = Some(Terminal { reason, grace_ms: Some(millis(grace)), ..terminal(false, at) });
            }
            ("failed", at) => seen.terminal = Some(terminal(false, at)),
            ("starting", run) => {
                let (name, attempt) = run.split_once('/').expect("NAME/ATTEMPT");
                let attempt = attempt.parse().expect("attempt");
                seen.in_flight.insert(Step::StartContainer { name: name.into(), attempt });
            }
            ("prestopping", name) => {
                seen.in_flight.insert(Step::PreStop { name: name.into(), attempt: 0 });
            }
            ("spawning", _) => drop(seen.in_flight.insert(Step::SpawnShim)),
            ("blocked-sandbox", at) => {
                let attempt = seen.sandbox_attempt + 1;
                seen.blocked.insert(Step::CreateSandbox { attempt }, millis(at));
            }
            other => panic!("unknown word {other:?}"),
        }
    }
}

fn terminal(succeeded: bool, at: &str) -> Terminal {
    let (reason, message) = Default::default();
    Terminal { succeeded, reason, message, since_ms: millis(at), grace_ms: None }
}

/// `run NAME running|exit:CODE|starterror [attempt=N] [sandbox=N] [retry=S] [kill=S] [previous=CODE]`
fn parse_run(seen: &mut Seen, words: &[&str]) {
    let sandbox = seen.sandbox_attempt;
    let container = seen.containers.entry(words[0].to_owned()).or_default();
    let ended = |code: i32| Ended {
        exit_code: code,
        reason: if code == 0 { "Completed" } else { "Error" }.into(),
        started_wall_ms: 1,
        finished_wall_ms: 2,
        ..Ended::default()
    };
    let mut run = Run { attempt: 0, sandbox, started_wall_ms: 1, state: RunState::Running };
    for word in &words[1..] {
        match word.split_once(['=', ':']).unwrap_or((word, "")) {
            ("running", _) => {}
            ("exit", code) => run.state = RunState::Ended(ended(code.parse().expect("exit code"))),
            ("starterror", _) => {
                let (reason, message) = ("StartError".into(), "exec: no such file".into());
                run.state = RunState::Ended(Ended { reason, message, ..ended(128) });
            }
            ("attempt", attempt) => run.attempt = attempt.parse().expect("attempt"),
            ("sandbox", sandbox) => run.sandbox = sandbox.parse().expect("sandbox"),
            ("retry", at) => (container.retry_ms, container.backoff_ms) = (millis(at), 10_000),
            ("applied", options) => container.applied = Some(resources(options)),
            ("restart", _) => {
                if let RunState::Ended(ended) = &mut run.state {
                    ended.restart = true;
                }
            }
            ("posted", _) => container.health.post_started = true,
            ("passed", _) => container.health.startup_passed = true,
            ("isready", _) => container.health.ready = true,
            ("prestopped", _) => container.pre_stopped = true,
            ("condemned", at) => {
                container.condemned = Some(Condemned { why: "it failed".into(), deadline_ms: millis(at) });
            }
            ("kill", at) => container.kill_at_ms = Some(millis(at)),
            ("previous", code) => container.previous = Some(ended(code.parse().expect("exit code"))),
            other => panic!("unknown word {other:?}"),
        }
    }
    container.run = Some(run);
}

fn run_case(input: &str) -> String {
    let mut want = None;
    let mut seen = Seen::default();
    let mut now_ms = 1_000_000;
    for line in input.lines().skip(1) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[0] {
            "pod" => want = Some(parse_pod(&words[1..])),
            "seen" => parse_seen(&mut seen, want.as_ref().expect("pod line first"), &words[1..]),
            "run" => parse_run(&mut seen, &words[1..]),
            "image" => {
                let image = Image::Failed {
                    reason: words[2].into(),
                    message: "load it with minictl image load".into(),
                    retry_ms: millis(words[3]),
                };
                seen.containers.entry(words[1].into()).or_default().image = image;
            }
            "now" => now_ms = millis(words[1]),
            other => panic!("unknown line {other}"),
        }
    }
    render(&plan(&want.expect("a pod line"), &seen, now_ms))
}

fn render(plan: &Plan) -> String {
    let mut out = String::new();
    for planned in &plan.steps {
        let _ = writeln!(out, "{} because {}", step_text(&planned.step), planned.why);
    }
    if let Some(at_ms) = plan.wake_at_ms {
        let _ = writeln!(out, "wake at {}s", at_ms / 1000);
    }
    if let Some(terminal) = &plan.terminal {
        let _ = writeln!(out, "terminal succeeded={} {}", terminal.succeeded, terminal.reason);
    }
    if plan.finished {
        out.push_str("finished\n");
    }
    let flags: Vec<String> = plan
        .view
        .conditions
        .iter()
        .map(|condition| format!("{}{}", if condition.status { '+' } else { '-' }, condition.kind))
        .collect();
    let _ = writeln!(out, "phase {} {}", plan.view.phase.as_str(), flags.join(" "));
    for container in &plan.view.containers {
        let _ = writeln!(out, "{}", container_text(container));
    }
    out.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

fn step_text(step: &Step) -> String {
    match step {
        Step::StartContainer { name, attempt } => format!("StartContainer {name}/{attempt}"),
        Step::KillContainer { name, grace_ms } => format!("KillContainer {name} grace={}s", grace_ms / 1000),
        Step::PostStart { name, attempt } => format!("PostStart {name}/{attempt}"),
        Step::PreStop { name, attempt } => format!("PreStop {name}/{attempt}"),
        Step::PrepareImage { name } => format!("PrepareImage {name}"),
        Step::CreateSandbox { attempt } => format!("CreateSandbox {attempt}"),
        Step::AttachNetwork { attempt } => format!("AttachNetwork {attempt}"),
        Step::WriteEtcFiles { attempt } => format!("WriteEtcFiles {attempt}"),
        Step::Resize { runs } => {
            let runs: Vec<String> = runs.iter().map(|(name, attempt)| format!("{name}/{attempt}")).collect();
            format!("Resize {}", runs.join(" "))
        }
        other => format!("{other:?}"),
    }
}

fn container_text(container: &ContainerView) -> String {
    let state = match &container.state {
        StateView::Waiting { reason, message } => format!("Waiting {reason} {message}"),
        StateView::Running { .. } => "Running".to_owned(),
        StateView::Terminated(ended) => format!("Terminated {} {}", ended.reason, ended.exit_code),
    };
    let ready = if container.ready { " ready" } else { "" };
    let last = container.last.as_ref().map_or(String::new(), |ended| format!(" last={}", ended.exit_code));
    format!("  {}: {} restarts={}{last}{ready}", container.name, state.trim_end(), container.restarts)
}

#[test]
fn decisions_are_those_of_the_tables() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/plan");
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(&dir).expect("testdata/plan").map(|entry| entry.expect("entry").path()).collect();
    files.sort();
    assert!(!files.is_empty());
    let update = std::env::var_os("UPDATE_TESTDATA").is_some();
    let mut failures = String::new();
    for file in files {
        let text = std::fs::read_to_string(&file).expect("read");
        let mut rewritten = Vec::new();
        for case in text.trim_end().split("\n\n") {
            let (input, expected) = case.split_once("\n----").unwrap_or((case, ""));
            let got = run_case(input);
            if got.trim_end() != expected.trim() && !update {
                let title = input.lines().next().unwrap_or("");
                let _ = writeln!(failures, "{}: {title}\nexpected:\n{}\ngot:\n{got}", file.display(), expected.trim());
            }
            rewritten.push(format!("{input}\n----\n{}", got.trim_end()));
        }
        if update {
            std::fs::write(&file, rewritten.join("\n\n") + "\n").expect("write");
        }
    }
    assert!(failures.is_empty(), "{failures}");
}
