//! What the chapters of the demo do with the cluster, and say.

use std::path::PathBuf;
use std::time::Duration;

use minipod_client::{Client, DeleteOptions, ExecOutput, Query};
use minipod_proto::v1::{ContainerStatus, Event, ExecStart, LogsRequest, Node, Object, Pod};
use minipod_proto::{Kind, Resource, manifest};
use tokio::time::{Instant, sleep};

use crate::cli::error::CliError;
use crate::cli::{now, sources};
use crate::view::columns::{self, Columns};
use crate::view::pod_status::summary;
use crate::view::text;
use crate::view::why::why;

/// How long anything may take: generous, because this may be a small machine that has just compiled everything.
const PATIENCE: Duration = Duration::from_secs(90);
const PAUSE: Duration = Duration::from_millis(50);
/// For reading.
const REST: Duration = Duration::from_secs(2);
const NAMESPACE: &str = "default";

/// The cluster, and the audience.
#[derive(Debug)]
pub struct Stage {
    client: Client,
    examples: PathBuf,
    fast: bool,
}

impl Stage {
    pub fn new(client: Client, examples: PathBuf, fast: bool) -> Stage {
        Stage { client, examples, fast }
    }

    /// A chapter begins.
    pub async fn chapter(&self, title: &str, claim: &str) {
        self.rest().await;
        tell!("\n==> {title}");
        for line in claim.lines() {
            tell!("    {}", line.trim());
        }
    }

    pub fn say(&self, line: &str) {
        tell!("    {}", text::line(line));
    }

    /// A block of somebody else's text.
    pub fn quote(&self, block: &str) {
        for line in block.lines() {
            tell!("      | {}", text::line(line));
        }
    }

    pub async fn rest(&self) {
        if !self.fast {
            sleep(REST).await;
        }
    }

    /// Says that something is proven, or fails with it.
    pub fn prove(&self, claim: &str, holds: bool, otherwise: &str) -> Result<(), CliError> {
        if holds {
            self.say(&format!("proven: {claim}"));
            return Ok(());
        }
        let hint = "this should not happen: please report it, with the output of the demo";
        Err(CliError::usage(format!("not so: {claim}; found: {otherwise}"), hint))
    }

    pub async fn show_nodes(&self) -> Result<(), CliError> {
        let nodes = self.client.list::<Node>(&Query::all()).await?.items;
        let columns = Columns { wide: true, ..Columns::default() };
        let mut table = columns::table(Kind::Node, columns);
        nodes.into_iter().for_each(|node| table.row(columns::row(&node.into(), columns, now())));
        tell!("\n==> minictl get nodes -o wide");
        self.quote(&table.render(true));
        Ok(())
    }

    /// Applies an example; returns the pod as created.
    pub async fn apply(&self, file: &str) -> Result<Pod, CliError> {
        let path = self.examples.join(file).display().to_string();
        self.say(&format!("minictl apply -f {path}"));
        let objects = sources::read(&[path], NAMESPACE, false)?;
        self.create_all(objects).await
    }

    /// Creates the pod of a manifest.
    pub async fn create(&self, yaml: &str) -> Result<Pod, CliError> {
        let objects = manifest::parse(yaml)
            .map_err(|problems| CliError::Manifest { source_name: "the demo".to_owned(), problems })?;
        self.create_all(objects).await
    }

    async fn create_all(&self, objects: Vec<Object>) -> Result<Pod, CliError> {
        let mut pod = None;
        for object in objects {
            pod = self.client.create_object(object, false).await?.as_pod().cloned().or(pod);
        }
        pod.ok_or_else(|| CliError::usage("the example has no pod", "want one pod per example"))
    }

    /// The pod as it is now.
    pub async fn pod(&self, name: &str) -> Result<Pod, CliError> {
        Ok(self.client.get(NAMESPACE, name).await?)
    }

    /// Waits until `wanted` says yes; prints each STATUS on the way. What it gives back is the pod then.
    pub async fn until(&self, name: &str, what: &str, wanted: impl Fn(&Pod) -> bool) -> Result<Pod, CliError> {
        let start = Instant::now();
        let mut shown = String::new();
        loop {
            let pod = self.pod(name).await?;
            let summary = summary(&pod);
            let line = format!(
                "{name}   {}/{}   {}   restarts {}",
                summary.ready, summary.total, summary.status, summary.restarts
            );
            if line != shown {
                self.say(&line);
                shown = line;
            }
            if wanted(&pod) {
                return Ok(pod);
            }
            if start.elapsed() > PATIENCE {
                let last = why(&pod, None, &self.events(&pod).await.unwrap_or_default(), now());
                return Err(CliError::Waited { what: what.to_owned(), seconds: PATIENCE.as_secs(), last });
            }
            sleep(PAUSE).await;
        }
    }

    /// Waits until the pod runs and is ready.
    pub async fn until_ready(&self, name: &str) -> Result<Pod, CliError> {
        self.until(name, &format!("{name} runs and is ready"), |pod| pod.condition_true("Ready")).await
    }

    /// Waits until `look` finds something.
    pub async fn until_some<T>(
        &self,
        what: &str,
        mut look: impl AsyncFnMut() -> Result<Result<T, String>, CliError>,
    ) -> Result<T, CliError> {
        let start = Instant::now();
        loop {
            let last = match look().await? {
                Ok(found) => return Ok(found),
                Err(last) => last,
            };
            if start.elapsed() > PATIENCE {
                return Err(CliError::Waited { what: what.to_owned(), seconds: PATIENCE.as_secs(), last });
            }
            sleep(PAUSE).await;
        }
    }

    /// Deletes the pod and waits until it is gone.
    pub async fn delete(&self, name: &str) -> Result<(), CliError> {
        self.say(&format!("minictl delete pod {name}"));
        self.client.delete::<Pod>(NAMESPACE, name, &DeleteOptions::default()).await?;
        self.until_some(&format!("{name} is gone"), async || match self.pod(name).await {
            Err(CliError::Client(error)) if error.is_not_found() => Ok(Ok(())),
            Err(error) => Err(error),
            Ok(pod) => Ok(Err(summary(&pod).status)),
        })
        .await
    }

    /// What the pod's events say.
    pub async fn events(&self, pod: &Pod) -> Result<Vec<Event>, CliError> {
        let query = Query::namespace(NAMESPACE).with_fields(format!("involvedObject.uid={}", pod.uid()));
        Ok(self.client.list(&query).await?.items)
    }

    /// What a container has logged.
    pub async fn logs(&self, pod: &str, container: &str) -> Result<String, CliError> {
        let request = LogsRequest {
            namespace: NAMESPACE.to_owned(),
            pod: pod.to_owned(),
            container: container.to_owned(),
            ..LogsRequest::default()
        };
        let mut logs = self.client.logs(request).await?;
        let mut bytes = Vec::new();
        while let Some(piece) = logs.next().await? {
            bytes.extend_from_slice(&piece);
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Waits until a container's log has all of these.
    pub async fn until_logged(&self, pod: &str, container: &str, parts: &[&str]) -> Result<String, CliError> {
        let what = format!("the log of {container} has {parts:?}");
        self.until_some(&what, async || {
            let log = self.logs(pod, container).await?;
            Ok(if parts.iter().all(|part| log.contains(part)) { Ok(log) } else { Err(log) })
        })
        .await
    }

    /// Runs a command in a container: its exit code and everything it says.
    pub async fn exec(&self, pod: &str, container: &str, command: &[&str]) -> Result<(i32, String), CliError> {
        let start = ExecStart {
            namespace: NAMESPACE.to_owned(),
            pod: pod.to_owned(),
            container: container.to_owned(),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            stdin: false,
            ..ExecStart::default()
        };
        let mut exec = self.client.exec(start).await?;
        let mut said = Vec::new();
        loop {
            match exec.next().await? {
                ExecOutput::Stdout(data) | ExecOutput::Stderr(data) => said.extend_from_slice(&data),
                ExecOutput::Exit(code) => return Ok((code, String::from_utf8_lossy(&said).trim_end().to_owned())),
            }
        }
    }
}

/// The status of a container.
pub fn status<'a>(pod: &'a Pod, container: &str) -> Option<&'a ContainerStatus> {
    let status = pod.status();
    let mut all = status.init_container_statuses.iter().chain(&status.container_statuses);
    all.find(|status| status.name == container)
}
