//! What a pod costs on this machine: `cargo bench -p minipod-podshim`. Prints `key=value` lines.

#[path = "../tests/support/mod.rs"]
mod support;

use std::fs;
use std::time::{Duration, Instant};

use minipod_podshim::protocol::{LogSpec, Mount};
use support::Pod;

const ROUNDS: usize = 30;

fn main() {
    support::rootfs();
    let mut samples: Vec<[f64; 6]> = Vec::new();
    let mut pss_kb = Vec::new();
    for round in 0..ROUNDS {
        let at_rest = round % 10 == 0;
        let (sample, pss) = one_pod(at_rest);
        samples.push(sample);
        if at_rest {
            pss_kb.push(pss);
        }
        // An idle node's first pod pays for a grace period of the kernel; so shall each of these.
        std::thread::sleep(Duration::from_millis(30));
    }
    let names = ["spawn", "sandbox", "init", "two_containers", "start", "stop"];
    for (at, name) in names.iter().enumerate() {
        let mut values: Vec<f64> = samples.iter().map(|sample| sample[at]).collect();
        values.sort_by(f64::total_cmp);
        println!("{name}_p50_ms={:.2}", values[values.len() / 2]);
        println!("{name}_p90_ms={:.2}", values[values.len() * 9 / 10]);
    }
    pss_kb.sort_unstable();
    println!("shim_and_pause_pss_kb={}", pss_kb[pss_kb.len() / 2]);
    exec_and_logs();
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

fn pss_kb(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("smaps_rollup");
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).expect("Pss");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// Processor time that a process has used.
fn cpu_s(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat");
    let fields: Vec<&str> = stat.rsplit_once(')').expect("a name").1.split_whitespace().collect();
    let ticks: f64 = fields[11..13].iter().map(|ticks| ticks.parse::<f64>().expect("a number")).sum();
    ticks / 100.0
}

/// Supervisor, sandbox, an init container to its end, two containers.
fn one_pod(at_rest: bool) -> ([f64; 6], u64) {
    let began = Instant::now();
    let mut pod = Pod::spawn();
    let spawn = ms(began);
    let at = Instant::now();
    pod.create_sandbox(minipod_podshim::protocol::SandboxSpec {
        attempt: 1,
        hostname: "bench".into(),
        ..Default::default()
    });
    let sandbox = ms(at);
    let at = Instant::now();
    pod.start(pod.spec_of("init", 0, &["true"]));
    assert_eq!(pod.agent.ended("init").exit_code, 0);
    let init = ms(at);
    let at = Instant::now();
    for name in ["a", "b"] {
        pod.start(pod.spec_of(name, 0, &["sleep", "1000"]));
    }
    let two = ms(at);
    let start = ms(began);
    let pause = pod.agent.state().pause_pid;
    let pss = if at_rest {
        std::thread::sleep(Duration::from_millis(1500));
        pss_kb(pod.shim.id()) + pss_kb(pause)
    } else {
        0
    };
    let at = Instant::now();
    pod.stop();
    ([spawn, sandbox, init, two, start, ms(at)], pss)
}

fn exec_and_logs() {
    let mut pod = Pod::new();
    pod.start(pod.spec_of("a", 0, &["sleep", "1000"]));
    let mut times: Vec<f64> = (0..50)
        .map(|_| {
            let at = Instant::now();
            assert_eq!(pod.exec("a", &["true"], false).expect("runs").finish().2, 0);
            ms(at)
        })
        .collect();
    times.sort_by(f64::total_cmp);
    println!("exec_true_p50_ms={:.2}", times[times.len() / 2]);

    // The writer costs next to nothing: it copies a file from memory into its pipe.
    for (key, line, rounds) in [("log_100_byte_lines_mb_s", 100, 8_usize), ("log_1000_byte_lines_mb_s", 1000, 8)] {
        let text = format!("{}\n", "x".repeat(line - 1)).repeat(32_000_000 / line);
        let volume = pod.data.path().join("text");
        fs::write(&volume, &text).expect("write");
        let name = format!("log{line}");
        let mut spec = pod.spec(&name, &format!("cat {}", "/text ".repeat(rounds)));
        let source = volume.to_string_lossy().into_owned();
        spec.mounts.push(Mount { source, target: "/text".into(), readonly: true, ..Mount::default() });
        let path = pod.data.path().join("bench.log").to_string_lossy().into_owned();
        // Rotated as an agent would have it: three files.
        spec.log = Some(LogSpec { path, max_bytes: 64 << 20, max_files: 3 });
        let (at, cpu) = (Instant::now(), cpu_s(pod.shim.id()));
        pod.start(spec);
        assert_eq!(pod.agent.ended(&name).exit_code, 0);
        let megabytes = (text.len() * rounds) as f64 / 1e6;
        println!("{key}={:.0}", megabytes / at.elapsed().as_secs_f64());
        // What it could do with a processor of its own: independent of what else the machine does.
        println!("{key}_of_cpu={:.0}", megabytes / (cpu_s(pod.shim.id()) - cpu));
    }
    let shim = pod.shim.id();
    std::thread::sleep(Duration::from_millis(2500));
    println!("shim_pss_after_logs_kb={}", pss_kb(shim));
    pod.stop();
}
