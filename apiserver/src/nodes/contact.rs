//! Silence: a node that is not heard of for a while is marked, and so are its pods. Nothing is moved.
//!
//! Heartbeats never touch the store. Each server knows the last contact of its own nodes and writes one key with their names every
//! few seconds; the others count that as contact, by their own clocks.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use minipod_daemon::shutdown::Shutdown;
use minipod_proto::{
    Kind,
    v1::{DeleteRequest, Object},
};
use prost::Message;

use super::{Ending, Sessions, Way};
use crate::{
    cache::{Filter, ReplicaSummary},
    error::ApiError,
    keys,
    registry::{Registry, Verdict},
    storage::{Guard, Write},
};

/// A pod whose Node object is gone is removed after this time (Kubernetes' pod garbage collector waits as long).
const ORPHAN_GRACE: Duration = Duration::from_secs(40);

/// Summaries of servers that have not written for so many intervals are removed.
const FORGOTTEN: u32 = 20;

/// Watches over the nodes until the shutdown.
pub async fn watch(registry: Arc<Registry>, sessions: Arc<Sessions>, grace: Duration, shutdown: Shutdown) {
    let every = (grace / 8).clamp(Duration::from_millis(50), Duration::from_secs(1));
    let mut tick = tokio::time::interval(every);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let summary_every = (grace / 3).clamp(Duration::from_millis(100), Duration::from_secs(5));
    let (mut summarised, mut orphans) = (None::<Instant>, HashMap::new());
    // Since when the store cannot be followed.
    let mut blind = None::<Instant>;
    loop {
        let waiting = Instant::now();
        // Cancel safe: a tick that is not taken comes again.
        tokio::select! {
            _ = tick.tick() => {}
            () = shutdown.asked() => break,
        }
        // While the store cannot be followed nobody can be told of anything, and the silence may be our own.
        if registry.cache.trouble().is_some() {
            if blind.get_or_insert_with(Instant::now).elapsed() > grace / 2 {
                // Another server may reach it.
                sessions.end_all(Ending::NoStore);
            }
            continue;
        }
        // So may it be when this process did not run, and what it knows of other servers' nodes is as old.
        if blind.take().is_some() || waiting.elapsed() > every + grace / 2 {
            sessions.listen_anew();
        }
        if summarised.is_none_or(|at| at.elapsed() >= summary_every) {
            match summarise(&registry, &sessions, summary_every).await {
                Ok(()) => summarised = Some(Instant::now()),
                Err(error) => tracing::debug!(%error, "the summary of sessions is not written"),
            }
        }
        if let Err(error) = mark_silent(&registry, &sessions, grace).await {
            tracing::warn!(%error, "a silent node cannot be marked yet");
        }
        if let Err(error) = remove_orphans(&registry, &mut orphans).await {
            tracing::warn!(%error, "a pod of a node that is gone cannot be removed yet");
        }
    }
    // Whoever looks for a node is not sent to a server that has ended.
    let gone = Write::Delete(keys::replica(&sessions.identity.id));
    if let Err(error) = registry.storage.txn(Vec::new(), vec![gone]).await {
        tracing::debug!(%error, "the summary of sessions stays behind");
    }
}

async fn summarise(registry: &Registry, sessions: &Sessions, interval: Duration) -> Result<(), ApiError> {
    let (ours, nodes) = (&sessions.identity, sessions.nodes());
    let replicas = registry.cache.replicas();
    let mut writes = Vec::new();
    if !nodes.is_empty() || replicas.get(&ours.id).is_some_and(|seen| !seen.nodes.is_empty()) {
        let summary = ReplicaSummary { address: ours.address.clone(), nodes };
        writes.push(Write::Put(keys::replica(&ours.id), summary.encode_to_vec()));
    }
    let old = replicas.into_iter().filter(|(id, seen)| *id != ours.id && seen.at.elapsed() > interval * FORGOTTEN);
    writes.extend(old.map(|(id, _)| Write::Delete(keys::replica(&id))));
    if writes.is_empty() {
        return Ok(());
    }
    writes.truncate(registry.storage.max_ops());
    registry.storage.txn(Vec::new(), writes).await?;
    Ok(())
}

async fn mark_silent(registry: &Registry, sessions: &Sessions, grace: Duration) -> Result<(), ApiError> {
    let (nodes, _) = registry.cache.list(Kind::Node, &Filter::everything(Kind::Node)?);
    sessions.forget(|name| registry.cache.get(Kind::Node, name).is_some());
    forget_sessions(registry, sessions).await?;
    let now = Instant::now();
    for entry in nodes {
        // Nearly every node is heard of; only the others are looked at closely.
        if sessions.silence(&entry.key, now) < grace {
            continue;
        }
        // A session that begins meanwhile, anywhere, breaks the marks: its agent has spoken. So its begin is read before the silence.
        let begun = registry.cache.session_of(&entry.key).map_or(0, |seen| seen.revision);
        let unbroken = Guard::new(keys::session(&entry.key), begun);
        if sessions.silence(&entry.key, now) < grace {
            continue;
        }
        if entry.object.as_node().is_some_and(may_be_used) {
            mark_node(registry, sessions, &entry.key, grace, &unbroken).await?;
        }
        // Also when the node is marked already: whoever marked it may have ended before it came to the pods.
        mark_pods(registry, sessions, &entry.key, grace, &unbroken).await?;
    }
    Ok(())
}

/// What the store says of sessions of nodes whose object was deleted, once nobody holds them.
async fn forget_sessions(registry: &Registry, sessions: &Sessions) -> Result<(), ApiError> {
    let orphaned = registry.cache.orphaned_sessions();
    if orphaned.is_empty() {
        return Ok(());
    }
    let replicas = registry.cache.replicas();
    for (node, revision) in orphaned {
        if sessions.way(&node) == Way::Here || replicas.values().any(|seen| seen.nodes.contains(&node)) {
            continue;
        }
        let key = keys::session(&node);
        // Not one that has begun meanwhile.
        registry.storage.txn(vec![Guard::new(key.clone(), revision)], vec![Write::Delete(key)]).await?;
    }
    Ok(())
}

async fn mark_node(
    registry: &Registry,
    sessions: &Sessions,
    name: &str,
    grace: Duration,
    unbroken: &Guard,
) -> Result<(), ApiError> {
    let written = registry.modify_while(Kind::Node, name, Some(unbroken), |object| {
        Ok(match object.as_node() {
            // It may have spoken while we waited for the store.
            Some(node) if may_be_used(node) && sessions.silence(name, Instant::now()) >= grace => {
                let mut node = node.clone();
                let message = format!("the node has not been heard of for {} s", grace.as_secs_f64());
                node.status_mut().set_condition("Ready", "Unknown", "NodeSilent", &message, registry.now());
                Verdict::put(node)
            }
            _ => Verdict::Keep,
        })
    });
    match written.await {
        Ok(_) => tracing::warn!(node = name, "the node is silent: not ready"),
        Err(ApiError::NotFound { .. } | ApiError::Overtaken(_)) => {}
        Err(error) => return Err(error),
    }
    Ok(())
}

/// Whether nothing is known against the node.
fn may_be_used(node: &minipod_proto::v1::Node) -> bool {
    node.condition("Ready").is_none_or(|ready| ready.status == "True")
}

/// Nobody knows whether they are ready; where they are and what they are stays.
async fn mark_pods(
    registry: &Registry,
    sessions: &Sessions,
    node: &str,
    grace: Duration,
    unbroken: &Guard,
) -> Result<(), ApiError> {
    for entry in registry.cache.pods_of(node) {
        let unsure = |pod: &minipod_proto::v1::Pod| {
            !pod.is_terminal() && pod.condition("Ready").is_none_or(|ready| ready.status != "False")
        };
        if !entry.object.as_pod().is_some_and(unsure) {
            continue;
        }
        let marked = registry.modify_while(Kind::Pod, &entry.key, Some(unbroken), |object: &Object| {
            let Some(pod) = object.as_pod().filter(|pod| !pod.is_terminal()) else { return Ok(Verdict::Keep) };
            if sessions.silence(node, Instant::now()) < grace {
                return Ok(Verdict::Keep);
            }
            let mut pod = pod.clone();
            let message = format!("node {node} is silent");
            let changed = pod.status_mut().set_condition("Ready", "False", "NodeNotReady", &message, registry.now());
            Ok(if changed { Verdict::put(pod) } else { Verdict::Keep })
        });
        match marked.await {
            Ok(_) | Err(ApiError::NotFound { .. } | ApiError::Overtaken(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Pods of nodes whose object was deleted: no agent will ever report them gone.
async fn remove_orphans(registry: &Registry, since: &mut HashMap<String, Instant>) -> Result<(), ApiError> {
    let nodes = registry.cache.nodes_with_pods();
    let orphaned = |node: &String| registry.cache.get(Kind::Node, node).is_none();
    let orphaned: Vec<String> = nodes.into_iter().filter(orphaned).collect();
    since.retain(|node, _| orphaned.contains(node));
    for node in orphaned {
        if since.entry(node.clone()).or_insert_with(Instant::now).elapsed() < ORPHAN_GRACE {
            continue;
        }
        for entry in registry.cache.pods_of(&node) {
            let meta = entry.object.meta();
            let request = DeleteRequest {
                kind: Kind::Pod.name().into(),
                namespace: meta.namespace.clone(),
                name: meta.name.clone(),
                grace_period_seconds: Some(0),
                uid: meta.uid.clone(),
                ..DeleteRequest::default()
            };
            match registry.delete(request).await {
                Ok(_) | Err(ApiError::NotFound { .. } | ApiError::Precondition(_)) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}
