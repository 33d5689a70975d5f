//! The node's share of a pod's start: from the session's message to the report that all containers run.
//!
//! `cargo bench -p minipod-nodeagent --bench podstart -- [PODS]`. Pods of pause, one init and two app containers, one after the other,
//! with a real agent, supervisor and kernel. Prints the distribution, and what the steps of a pod take, by the agent's metrics.

#[path = "../tests/support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

use support::*;

fn main() {
    let pods = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(50_usize);
    on_a_node(move || measure(pods));
}

async fn measure(pods: usize) {
    let mut node = Node::new().await;
    node.flags.push("--metrics-listen=127.0.0.1:9109".to_owned());
    node.quiet = true;
    node.start(&[]);
    let session = || (node.api.sessions() >= 1).then_some(());
    node.api.wait_for("a session", session, || node.agent_log()).await;
    let (mut starts, mut ends) = (Vec::new(), Vec::new());
    for number in 0..pods {
        let uid = format!("uid-bench-{number}");
        let pod = scripts(
            &uid,
            "Always",
            0,
            &[("i:init", "true"), ("a:one", "exec sleep 1000"), ("a:two", "exec sleep 1000")],
        );
        let began = Instant::now();
        node.api.put(pod).await;
        node.wait_running(&uid).await;
        starts.push(began.elapsed());
        let began = Instant::now();
        node.api.delete(&uid, 0).await;
        node.wait_finished(&uid).await;
        ends.push(began.elapsed());
    }
    // The first pods pay for what is made once: page cache, cgroup hierarchies.
    print_distribution("start_ms", &mut starts[pods.min(3) - 1..]);
    print_distribution("end_ms", &mut ends[pods.min(3) - 1..]);
    print_steps();
}

fn print_distribution(name: &str, times: &mut [Duration]) {
    times.sort();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
    println!(
        "{name}: min {:.1}, p50 {:.1}, p90 {:.1}, p99 {:.1}, max {:.1} ({} pods)",
        at(0.0),
        at(0.5),
        at(0.9),
        at(0.99),
        at(1.0),
        times.len()
    );
}

fn print_steps() {
    let mut connection = std::net::TcpStream::connect("127.0.0.1:9109").expect("the agent's metrics");
    connection.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").expect("ask");
    let mut text = String::new();
    connection.read_to_string(&mut text).expect("read");
    let mut steps: BTreeMap<String, (f64, f64)> = BTreeMap::new();
    for line in text.lines() {
        let Some((name, value)) = line.rsplit_once(' ') else { continue };
        let value: f64 = value.parse().unwrap_or(0.0);
        if let Some(step) = name.strip_prefix("minipod_node_step_seconds_sum") {
            steps.entry(step.to_owned()).or_default().0 = value;
        } else if let Some(step) = name.strip_prefix("minipod_node_step_seconds_count") {
            steps.entry(step.to_owned()).or_default().1 = value;
        } else if name.starts_with("minipod_node_pod_start_seconds_sum")
            || name.starts_with("minipod_node_pod_start_seconds_count")
        {
            println!("{line}");
        }
    }
    for (step, (sum, count)) in steps {
        println!("{step}: {:.2} ms on average, {count} times", sum / count * 1e3);
    }
}
