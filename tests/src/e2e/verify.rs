//! What must hold of every run, from the objects as the API server reads them from the store.

use std::collections::HashMap;

use minipod_client::{Client, Query};
use minipod_proto::Resource;
use minipod_proto::resources::{self, Resources};
use minipod_proto::v1::{Node, Pod};

use super::board::Board;
use super::load::node_name;

/// Every pod of the boards is bound, to the node whose session showed it and to no other one, and no node has more than it can.
///
/// # Errors
/// What does not hold.
pub async fn check(client: &Client, boards: &[&Board]) -> Result<(), String> {
    let pods = client.list::<Pod>(&Query::all()).await.map_err(|error| error.to_string())?.items;
    let nodes = client.list::<Node>(&Query::all()).await.map_err(|error| error.to_string())?.items;
    overcommit(&pods, &nodes)?;
    let bound: HashMap<&str, Option<&str>> = pods.iter().map(|pod| (pod.name(), pod.node_name())).collect();
    for board in boards {
        if board.moved() > 0 {
            return Err(format!("{} pods came to a second node", board.moved()));
        }
        for index in 0..board.pods() {
            let (name, seen) = (board.name(index), board.node(index).map(node_name));
            let stored = bound.get(name.as_str()).copied().flatten();
            if stored.is_none() || stored != seen.as_deref() {
                return Err(format!("pod {name} is bound to {stored:?} in the store, but was brought to {seen:?}"));
            }
        }
    }
    Ok(())
}

/// The first node on which the pods request more than it has.
///
/// # Errors
/// Its name, and what it lacks.
pub fn overcommit(pods: &[Pod], nodes: &[Node]) -> Result<(), String> {
    let mut used: HashMap<&str, Resources> = HashMap::new();
    for pod in pods.iter().filter(|pod| !pod.is_terminal()) {
        let Some(node) = pod.node_name() else { continue };
        let requests =
            minipod_proto::resize::bound_requests(pod).map_err(|error| format!("{}: {error}", pod.name()))?;
        let sum = used.entry(node).or_default();
        *sum = sum.checked_add(&requests).map_err(|error| format!("{node}: {error}"))?;
    }
    for node in nodes {
        let Some(used) = used.get(node.name()) else { continue };
        let allocatable = resources::node_allocatable(node).map_err(|error| format!("{}: {error}", node.name()))?;
        let short = used.shortfalls(&allocatable);
        if !short.is_empty() {
            return Err(format!("node {} is overcommitted: {short:?}", node.name()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::workload::Shape;
    use super::*;
    use crate::cluster::pod;
    use minipod_proto::v1::{NodeStatus, ObjectMeta};

    #[test]
    fn one_pod_too_many_is_found() {
        let bound = |index: usize| {
            let mut pod = pod(&Shape::High.manifest(&format!("p{index}"), index, "default-scheduler"));
            pod.spec_mut().node_name = "n".to_owned();
            pod
        };
        let allocatable = [("cpu", "6"), ("memory", "8Gi"), ("pods", "110")];
        let allocatable = allocatable.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let node = Node {
            metadata: Some(ObjectMeta { name: "n".to_owned(), ..ObjectMeta::default() }),
            status: Some(NodeStatus { allocatable: allocatable.into(), ..NodeStatus::default() }),
            ..Node::default()
        };
        let nodes = [node];
        assert_eq!(overcommit(&[bound(0), bound(1)], &nodes), Ok(()));
        let found = overcommit(&[bound(0), bound(1), bound(2)], &nodes).expect_err("9 CPUs on a node of 6");
        assert!(found.contains("node n") && found.contains("cpu"), "{found}");
    }
}
