//! `evict` and `drain`: ends of pods that disruption budgets have a say in.

use std::time::Duration;

use minipod_client::{ClientError, EvictOptions, Query};
use minipod_proto::Resource;
use minipod_proto::v1::Pod;
use tokio::time::{Instant, sleep};

use super::args::{DrainArgs, EvictArgs};
use super::error::CliError;
use super::session::Session;
use super::{node, print, target};
use crate::view::text;

/// How often a budget that forbids an eviction is asked again.
const AGAIN: Duration = Duration::from_secs(1);
/// How often it is looked whether a pod is gone.
const PAUSE: Duration = Duration::from_millis(100);

/// Evicts pods, one after the other, and waits for nothing.
pub async fn evict(session: &Session, options: &EvictArgs) -> Result<(), CliError> {
    for word in &options.pods {
        let name = target::pod_name(word)?;
        let wanted =
            EvictOptions { grace_seconds: options.grace_period, dry_run: options.dry_run, ..EvictOptions::default() };
        session.client.evict(&session.namespace, name, &wanted).await?;
        let how = if options.dry_run { " (dry run)" } else { "" };
        print(&format!("pod {:?} evicted{how}\n", text::line(name)))?;
    }
    Ok(())
}

/// Cordons nodes, evicts their pods as the budgets allow it, and waits until they are gone.
pub async fn drain(session: &Session, options: &DrainArgs) -> Result<(), CliError> {
    let names: Vec<&str> = options.nodes.iter().map(|name| name.strip_prefix("node/").unwrap_or(name)).collect();
    let mut pods = Vec::new();
    for name in &names {
        // A name that is no node's is told before anything is cordoned.
        session.client.get::<minipod_proto::v1::Node>("", name).await?;
        let query = Query::all().with_fields(format!("spec.nodeName={name}")).with_labels(&options.selector);
        pods.extend(session.client.list::<Pod>(&query).await?.items);
    }
    check(&pods, options)?;
    if options.dry_run {
        for pod in &pods {
            print(&format!("pod {:?} would be evicted\n", text::line(&pod.key())))?;
        }
        return Ok(());
    }
    node::cordon(session, &options.nodes, true).await?;
    let start = Instant::now();
    // All at once: a budget that forbids one of them holds up no other.
    let mut waiting: Vec<(Pod, bool)> = pods.into_iter().map(|pod| (pod, false)).collect();
    let mut told = String::new();
    while !waiting.is_empty() {
        let mut last = String::new();
        let mut left = Vec::new();
        for (pod, evicted) in waiting {
            match step(session, options, &pod, evicted).await? {
                Step::Gone => print(&format!("pod {:?} gone\n", text::line(&pod.key())))?,
                Step::Evicted => {
                    print(&format!("pod {:?} evicted\n", text::line(&pod.key())))?;
                    left.push((pod, true));
                }
                Step::Waits(why) => {
                    last = why;
                    left.push((pod, evicted));
                }
            }
        }
        waiting = left;
        if waiting.is_empty() {
            break;
        }
        let held = waiting.iter().any(|(_, evicted)| !evicted);
        if held && told != last && !last.is_empty() {
            note!("{}", text::line(&last));
            told.clone_from(&last);
        }
        if let Some(timeout) = options.timeout
            && start.elapsed() >= timeout
        {
            let what = format!("the end of {} pods", waiting.len());
            return Err(CliError::Waited { what, seconds: timeout.as_secs(), last });
        }
        sleep(if held { AGAIN } else { PAUSE }).await;
    }
    for name in names {
        print(&format!("node/{} drained\n", text::line(name)))?;
    }
    Ok(())
}

/// Pods whose end costs data that is nowhere else are not evicted unless the user says so.
fn check(pods: &[Pod], options: &DrainArgs) -> Result<(), CliError> {
    if options.delete_emptydir_data {
        return Ok(());
    }
    let has_data = |pod: &&Pod| !pod.is_terminal() && pod.spec().volumes.iter().any(|one| one.empty_dir.is_some());
    let keys: Vec<String> = pods.iter().filter(has_data).map(Resource::key).collect();
    if keys.is_empty() {
        return Ok(());
    }
    let message = format!("pods with data in emptyDir volumes, which would be lost: {}", keys.join(", "));
    Err(CliError::usage(message, "say --delete-emptydir-data to lose it; nothing was changed"))
}

enum Step {
    Gone,
    Evicted,
    /// Why.
    Waits(String),
}

async fn step(session: &Session, options: &DrainArgs, pod: &Pod, evicted: bool) -> Result<Step, CliError> {
    let (namespace, name) = (pod.namespace(), pod.name());
    if evicted {
        return Ok(match session.client.get::<Pod>(namespace, name).await {
            Err(error) if error.is_not_found() => Step::Gone,
            Ok(now) if now.uid() != pod.uid() => Step::Gone,
            Ok(now) => Step::Waits(format!("pod {} is {}", now.key(), crate::view::pod_status::summary(&now).status)),
            Err(error) if error.is_transient() => Step::Waits(error.to_string()),
            Err(error) => return Err(error.into()),
        });
    }
    let wanted =
        EvictOptions { grace_seconds: options.grace_period, uid: pod.uid().to_owned(), ..EvictOptions::default() };
    Ok(match session.client.evict(namespace, name, &wanted).await {
        Ok((_, true)) => Step::Gone,
        Ok((_, false)) => Step::Evicted,
        // Gone, or another pod has the name: that one is not on this node by our doing.
        Err(ClientError::NotFound { .. } | ClientError::Refused { .. }) => Step::Gone,
        Err(error @ (ClientError::Budget { .. } | ClientError::Conflict { .. })) => Step::Waits(error.to_string()),
        Err(error) if error.is_transient() => Step::Waits(error.to_string()),
        Err(error) => return Err(error.into()),
    })
}
