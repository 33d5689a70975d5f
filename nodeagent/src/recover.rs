//! At start: every pod that this node has anything of gets its worker back, before and without the API server; what
//! belongs to no pod is removed.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use minipod_proto::v1::{ObjectMeta, Pod};

use crate::agent::Agent;
use crate::pods::Desired;
use crate::want::Uid;
use crate::{record, volumes};

/// Starts a worker for every pod that is found. Answers how many.
pub fn adopt_pods(agent: &Arc<Agent>) -> usize {
    let mut found = 0;
    for uid in uids_in(&agent.paths.pods_run()) {
        let dir = agent.paths.pod(&uid).run;
        let desired = match record::load_spec(&dir) {
            Some(pod) if Uid::of(&pod).as_ref() == Some(&uid) => {
                Desired { pod: Arc::new(pod), gone: false, evicted: None }
            }
            // The agent died before the spec was kept, or the file is damaged. If the API server knows the pod it says
            // so in a moment and the pod begins anew; nothing of this one can be used.
            _ => Desired { pod: Arc::new(nameless(&uid)), gone: true, evicted: None },
        };
        agent.pods.adopt(uid, desired);
        found += 1;
    }
    found
}

/// A pod of which only the uid is known: enough to remove it.
fn nameless(uid: &Uid) -> Pod {
    let meta = ObjectMeta { uid: uid.0.clone(), name: uid.0.clone(), ..ObjectMeta::default() };
    Pod { metadata: Some(meta), ..Pod::default() }
}

/// Removes data, logs and network of pods that are neither known now nor wanted: called once the first snapshot of the
/// API server has said which pods there shall be. Blocks.
pub fn remove_strays(agent: &Agent) {
    for uid in uids_in(&agent.paths.pods_data()) {
        remove_if_stray(agent, &uid, &agent.paths.pod(&uid).data);
    }
    for entry in std::fs::read_dir(agent.paths.logs()).into_iter().flatten().flatten() {
        let name = entry.file_name();
        // namespace_name_uid; neither a namespace nor a name has an underscore.
        let uid = name.to_str().and_then(|name| name.rsplit('_').next()).and_then(Uid::parse);
        if let Some(uid) = uid {
            remove_if_stray(agent, &uid, &entry.path());
        }
    }
    match agent.reconcile_users() {
        Ok(freed) if freed.is_empty() => {}
        Ok(freed) => tracing::info!(?freed, "user ids of pods that are gone were freed"),
        Err(error) => tracing::warn!(error = crate::report::chain(&error), "user ids of pods that are gone stay taken"),
    }
    let Some(network) = agent.network_now() else { return };
    let live: HashSet<String> = agent.pods.uids().into_iter().map(|uid| uid.0).collect();
    match network.reconcile(&live) {
        Ok(freed) if freed.is_empty() => {}
        Ok(freed) => tracing::info!(?freed, "network of pods that are gone was freed"),
        Err(error) => tracing::warn!(error = crate::report::chain(&error), "the pod network could not be reconciled"),
    }
}

fn remove_if_stray(agent: &Agent, uid: &Uid, path: &Path) {
    if agent.pods.has(uid) {
        return;
    }
    tracing::info!(path = %path.display(), "removing what a pod left that is gone");
    if let Err(error) = volumes::remove_tree(path) {
        tracing::warn!(error = crate::report::chain(&error), "what a pod left stays");
    }
}

fn uids_in(dir: &Path) -> Vec<Uid> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| Uid::parse(entry.file_name().to_str()?)).collect()
}
