//! Makes nodes and pods, with connections as many users would have them.

use std::sync::Arc;

use minipod_client::{Client, DeleteOptions};
use minipod_proto::v1::{CreateRequest, Object, Pod};
use prost::Message;
use tokio::task::JoinSet;
use tonic::transport::{Channel, Endpoint};

use super::board::Board;
use super::workload::{Shape, Workload, ZONE};
use crate::cluster::pod;
use crate::hollow::{self, HollowNode};
use crate::wire::{self, Unread};

/// Sessions on one connection: servers take 200 streams of one (hyper's default), and each node has one open for ever.
const SESSIONS: usize = 150;
/// Nodes that register at a time.
const JOINING: usize = 32;
/// Connections of those who create pods.
const CONNECTIONS: usize = 4;
/// Creates under way at a time on one connection.
const STREAMS: usize = 64;
/// Time between two rounds of the churn.
const CHURN: std::time::Duration = std::time::Duration::from_millis(200);

/// What a node of scheduler_perf has.
pub const ALLOCATABLE: [(&str, &str); 3] = [("cpu", "4"), ("memory", "32Gi"), ("pods", "110")];

/// The name of a node.
pub fn node_name(index: usize) -> String {
    format!("hollow-{index}")
}

/// Registers the workload's nodes and opens their sessions; what they are brought is noted on the boards.
///
/// # Errors
/// When the API server refuses one.
pub async fn join(server: &str, workload: &Workload, boards: &[Arc<Board>]) -> Result<Vec<HollowNode>, String> {
    let endpoint = Endpoint::from_shared(server.to_owned()).map_err(|error| format!("{server}: {error}"))?;
    let channels: Vec<Channel> = (0..workload.nodes.div_ceil(SESSIONS)).map(|_| endpoint.connect_lazy()).collect();
    let mut joining = JoinSet::new();
    let mut nodes = Vec::with_capacity(workload.nodes);
    for (index, channel) in (0..workload.nodes).map(|index| (index, channels[index / SESSIONS].clone())) {
        let zone = workload.zones[index % workload.zones.len()];
        let boards = boards.to_vec();
        joining.spawn(async move {
            let name = node_name(index);
            let shape = hollow::Shape { name: &name, allocatable: &ALLOCATABLE, labels: &[(ZONE, zone)] };
            let seen: hollow::Seen = Arc::new(move |pod| boards.iter().for_each(|board| board.seen(pod, index)));
            HollowNode::join_as(channel, shape, seen).await.map_err(|status| format!("{name}: {status}"))
        });
        if joining.len() >= JOINING
            && let Some(joined) = joining.join_next().await
        {
            nodes.push(joined.map_err(|error| error.to_string())??);
        }
    }
    while let Some(joined) = joining.join_next().await {
        nodes.push(joined.map_err(|error| error.to_string())??);
    }
    Ok(nodes)
}

/// Creates the pods of a board, as fast as they are taken.
///
/// # Errors
/// When the API server refuses one.
pub async fn create(server: &str, board: &Arc<Board>, shape: Shape, scheduler: &'static str) -> Result<(), String> {
    // The text is parsed before the clock starts; a pod of each colour is enough.
    let templates: Arc<Vec<CreateRequest>> =
        Arc::new((0..4).map(|index| request(pod(&shape.manifest("x", index, scheduler)))).collect());
    let endpoint = endpoint(server)?;
    let mut creators = JoinSet::new();
    let workers = CONNECTIONS * STREAMS;
    for connection in 0..CONNECTIONS {
        let channel = endpoint.connect_lazy();
        for stream in 0..STREAMS {
            let (channel, board, templates) = (channel.clone(), Arc::clone(board), Arc::clone(&templates));
            let first = connection * STREAMS + stream;
            creators.spawn(async move {
                // The colours that this one's pods have, in turn: its own copies, to write names into.
                let mut own: Vec<CreateRequest> = templates.to_vec();
                for index in (first..board.pods()).step_by(workers) {
                    let count = own.len();
                    let Some(request) = own.get_mut(index % count) else { continue };
                    let name = board.name(index);
                    if let Some(meta) = request.object.as_mut().and_then(Object::meta_mut) {
                        meta.name.clone_from(&name);
                    }
                    let request = request.encode_to_vec().into();
                    board.created(index);
                    let created = wire::unary::<Unread>(channel.clone(), "/minipod.v1.Objects/Create", request).await;
                    created.map_err(|status| format!("create {name}: {status}"))?;
                }
                Ok::<(), String>(())
            });
        }
    }
    while let Some(done) = creators.join_next().await {
        done.map_err(|error| error.to_string())??;
    }
    Ok(())
}

fn request(pod: Pod) -> CreateRequest {
    CreateRequest { object: Some(pod.into()), dry_run: false }
}

/// A server as clients dial it.
fn endpoint(server: &str) -> Result<Endpoint, String> {
    let endpoint = Endpoint::from_shared(server.to_owned()).map_err(|error| format!("{server}: {error}"))?;
    Ok(endpoint.tcp_nodelay(true).initial_stream_window_size(1 << 20).initial_connection_window_size(4 << 20))
}

/// Creates what a manifest has.
///
/// # Errors
/// When it is wrong or refused.
pub async fn apply(client: &Client, manifest: &str) -> Result<(), String> {
    let objects = minipod_proto::manifest::parse(manifest).map_err(|problems| problems.to_string())?;
    for object in objects {
        client.create_object(object, false).await.map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// A node and a pod that fits nowhere, made and removed again and again until it is dropped.
///
/// # Errors
/// When the API server refuses something.
pub async fn churn(client: Client, server: String) -> Result<(), String> {
    let endpoint = Endpoint::from_shared(server).map_err(|error| error.to_string())?;
    let channel = endpoint.connect_lazy();
    let now = DeleteOptions { grace_seconds: Some(0), ..DeleteOptions::default() };
    for round in 0_usize.. {
        let (node, waiting) = (format!("churn-{round}"), format!("churn-{round}"));
        // Too small for any measured pod, so that none is lost with it.
        let shape = hollow::Shape { name: &node, allocatable: &[("cpu", "50m"), ("pods", "1")], labels: &[] };
        let joined = HollowNode::join_as(channel.clone(), shape, Arc::new(|_| {})).await;
        let joined = joined.map_err(|status| format!("{node}: {status}"))?;
        let created = client.create(pod(&Shape::TooLarge.manifest(&waiting, round, "default-scheduler"))).await;
        created.map_err(|error| format!("create {waiting}: {error}"))?;
        tokio::time::sleep(CHURN).await;
        let deleted = client.delete::<Pod>("default", &waiting, &now).await;
        deleted.map_err(|error| format!("delete {waiting}: {error}"))?;
        drop(joined);
        let deleted = client.delete::<minipod_proto::v1::Node>("", &node, &now).await;
        deleted.map_err(|error| format!("delete {node}: {error}"))?;
    }
    Ok(())
}
