//! The benchmark `access`: programs run in containers, and how fast a container may write its log.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use minipod_client::ExecOutput;
use minipod_podshim::protocol::{Ask, Exec, ExecOutput as Said, Output, Request, Response, Say, put_frame, take_frame};
use minipod_proto::Resource;
use minipod_proto::v1::{ExecStart, Time};

use crate::cluster::{Cluster, pod};
use crate::wait;

/// Programs that are run and not counted.
const WARM_UP: usize = 20;
/// Programs that are counted; one in a hundred is slower than the 99th percentile.
const ROUNDS: usize = 500;
/// Lines of the text that a container writes, of 100 bytes each with their end.
const LINES: u64 = 300_000;
/// How often it writes that.
const TIMES: u64 = 32;

const POD: &str = "apiVersion: v1
kind: Pod
metadata: {name: hands}
spec:
  terminationGracePeriodSeconds: 0
  restartPolicy: Never
  containers:
  - {name: app, image: minipod.local/busybox, imagePullPolicy: IfNotPresent, command: [sleep, infinity]}
";

/// A text of numbered lines is made in memory; the one who writes it costs next to nothing.
const WRITER: &str = "apiVersion: v1
kind: Pod
metadata: {name: writer}
spec:
  terminationGracePeriodSeconds: 0
  restartPolicy: Never
  volumes: [{name: v, emptyDir: {medium: Memory}}]
  initContainers:
  - name: text
    image: minipod.local/busybox
    imagePullPolicy: IfNotPresent
    command: [sh, -c, 'seq 1 LINES | awk \"{ printf \\\"%07d %091d\\\\n\\\", \\$1, 0 }\" >/v/text']
    volumeMounts: [{name: v, mountPath: /v}]
  containers:
  - name: app
    image: minipod.local/busybox
    imagePullPolicy: IfNotPresent
    command: [sh, -c, 'n=0; while [ $n -lt TIMES ]; do cat /v/text; n=$((n+1)); done']
    volumeMounts: [{name: v, mountPath: /v}]
";

/// Runs it on a cluster of one node; answers keys and values.
///
/// # Errors
/// What went wrong, lost lines among it.
///
/// # Panics
/// When the cluster does not do what every test wants of it.
pub async fn run(cluster: &Cluster) -> Result<Vec<(&'static str, f64)>, String> {
    let mut figures = Vec::new();
    cluster.create(pod(POD)).await;
    cluster.until_phase("hands", "Running").await;
    let slot = cluster.local.names().map_err(|error| error.to_string())?;
    let uid = cluster.pod("hands").await?.uid().to_owned();
    let socket = slot.node_run_dir(0).join("pods").join(&uid).join("shim.sock");
    let mut at_node = Vec::new();
    for round in 0..WARM_UP + ROUNDS {
        let began = Instant::now();
        exec_at_node(&socket).map_err(|error| format!("run true by {}: {error}", socket.display()))?;
        if round >= WARM_UP {
            at_node.push(ms(began.elapsed()));
        }
    }
    let mut whole = Vec::new();
    for round in 0..WARM_UP + ROUNDS / 5 {
        let began = Instant::now();
        exec_end_to_end(cluster).await?;
        if round >= WARM_UP {
            whole.push(ms(began.elapsed()));
        }
    }
    for (p50, p99, mut sample) in
        [("exec_true_p50_ms", "exec_true_p99_ms", at_node), ("exec_true_e2e_p50_ms", "exec_true_e2e_p99_ms", whole)]
    {
        sample.sort_by(f64::total_cmp);
        figures.push((p50, crate::e2e::board::percentile(&sample, 50)));
        figures.push((p99, crate::e2e::board::percentile(&sample, 99)));
    }
    figures.push(("log_mb_per_s", log(cluster).await?));
    Ok(figures)
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// As the agent does it: a connection of its own to the pod's supervisor.
fn exec_at_node(socket: &Path) -> Result<(), String> {
    let failed = |error: std::io::Error| error.to_string();
    let mut stream = UnixStream::connect(socket).map_err(failed)?;
    stream.set_read_timeout(Some(Duration::from_secs(30))).map_err(failed)?;
    let exec = Exec { name: "app".into(), argv: vec!["true".into()], ..Exec::default() };
    let mut bytes = Vec::new();
    put_frame(&Request { id: 1, ask: Some(Ask::Exec(exec)) }, &mut bytes).map_err(|error| error.to_string())?;
    stream.write_all(&bytes).map_err(failed)?;
    bytes.clear();
    let mut buffer = [0; 4096];
    loop {
        while let Some(response) = take_frame::<Response>(&mut bytes).map_err(|error| error.to_string())? {
            match response.say {
                Some(Say::ExecOutput(Said { output: Some(Output::Exited(0)) })) => return Ok(()),
                Some(Say::ExecOutput(Said { output: Some(Output::Started(_)) })) => {}
                other => return Err(format!("{other:?}")),
            }
        }
        let count = stream.read(&mut buffer).map_err(failed)?;
        if count == 0 {
            return Err("the supervisor closed the connection".to_owned());
        }
        bytes.extend_from_slice(buffer.get(..count).unwrap_or_default());
    }
}

async fn exec_end_to_end(cluster: &Cluster) -> Result<(), String> {
    let (namespace, name, container) = ("default".to_owned(), "hands".to_owned(), "app".to_owned());
    let command = vec!["true".to_owned()];
    let start = ExecStart { namespace, pod: name, container, command, ..ExecStart::default() };
    let mut exec = cluster.client().exec(start).await.map_err(|error| error.to_string())?;
    match exec.next().await.map_err(|error| error.to_string())? {
        ExecOutput::Exit(0) => Ok(()),
        other => Err(format!("{other:?}")),
    }
}

/// Megabytes a second that a container writes, from its start until its log is complete; the kept files are looked through for gaps.
async fn log(cluster: &Cluster) -> Result<f64, String> {
    cluster.create(pod(&WRITER.replace("LINES", &LINES.to_string()).replace("TIMES", &TIMES.to_string()))).await;
    wait::until("the writer's end", || async {
        let phase = cluster.pod("writer").await?.status().phase.clone();
        if phase == "Succeeded" { Ok(()) } else { Err(phase) }
    })
    .await;
    let pod = cluster.pod("writer").await?;
    let state = pod.status().container_statuses.first().and_then(|status| status.state.clone()).unwrap_or_default();
    let ended = state.terminated.ok_or("the writer has not ended")?;
    let seconds = |time: Option<Time>| time.map_or(0.0, |time| time.seconds as f64 + f64::from(time.nanos) / 1e9);
    let took = seconds(ended.finished_at) - seconds(ended.started_at);
    let slot = cluster.local.names().map_err(|error| error.to_string())?;
    let uid = pod.uid().to_owned();
    check_log(&slot.node_data_dir(0).join("logs").join(format!("default_writer_{uid}")).join("app"))?;
    Ok((LINES * TIMES * 100) as f64 / 1e6 / took)
}

/// Every line follows the one before it, through all files that are kept, and the last one is the last that was written.
fn check_log(dir: &Path) -> Result<(), String> {
    let mut before: Option<u64> = None;
    let mut files = 0;
    for number in (0..100).rev() {
        let path = dir.join(if number == 0 { "0.log".to_owned() } else { format!("0.log.{number}") });
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        files += 1;
        for line in text.lines() {
            let number = line.split(' ').nth(3).and_then(|number| number.parse().ok());
            let number: u64 = number.ok_or_else(|| format!("{}: {line:?}", path.display()))?;
            if before.is_some_and(|before| before % LINES + 1 != number) {
                return Err(format!("{}: {number} comes after {before:?}", path.display()));
            }
            before = Some(number);
        }
    }
    if before != Some(LINES) || files == 0 {
        return Err(format!("{}: {files} files, the last line is {before:?} and not {LINES}", dir.display()));
    }
    Ok(())
}
