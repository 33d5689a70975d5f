//! Makes nodes and pods, with connections as many users would have them.

use std::ops::Range;
use std::sync::Arc;

use minipod_client::{Client, DeleteOptions};
use minipod_proto::v1::{CreateManyRequest, CreateManyResponse, CreateRequest, Object, Pod};
use prost::Message;
use tokio::task::JoinSet;
use tonic::Status;
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
/// Pods whose creates are under way at a time on one connection.
const STREAMS: usize = 64;
/// Colours that pods have in turn, see [`Shape`].
const COLOURS: usize = 4;
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

/// Creates the pods of a board, as fast as they are taken; `together` of them in a call.
///
/// # Errors
/// When the API server refuses one.
pub async fn create(
    server: &str,
    board: &Arc<Board>,
    shape: Shape,
    scheduler: &'static str,
    together: usize,
) -> Result<(), String> {
    // The text is parsed before the clock starts; a pod of each colour is enough.
    let colours: Vec<Object> = (0..COLOURS).map(|index| pod(&shape.manifest("x", index, scheduler)).into()).collect();
    let endpoint = endpoint(server)?;
    let mut creators = JoinSet::new();
    let streams = (STREAMS / together).max(1);
    let workers = CONNECTIONS * streams;
    for connection in 0..CONNECTIONS {
        let channel = endpoint.connect_lazy();
        for stream in 0..streams {
            let (channel, board) = (channel.clone(), Arc::clone(board));
            let first = (connection * streams + stream) * together;
            // Its own copies, to write names into.
            let mut own: Vec<Object> = colours.iter().cycle().take(together.max(COLOURS)).cloned().collect();
            creators.spawn(async move {
                for from in (first..board.pods()).step_by(workers * together) {
                    let pods = from..board.pods().min(from + together);
                    let called = if together == 1 {
                        create_one(&channel, &board, &mut own, from).await
                    } else {
                        create_many(&channel, &board, &mut own, pods.clone()).await
                    };
                    called.map_err(|status| format!("create {pods:?}: {status}"))?;
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

/// An object with the name of a pod of the board.
fn named(object: &mut Object, board: &Board, index: usize) -> Object {
    if let Some(meta) = object.meta_mut() {
        meta.name = board.name(index);
    }
    std::mem::take(object)
}

async fn create_one(channel: &Channel, board: &Board, own: &mut [Object], index: usize) -> Result<(), Status> {
    let Some(colour) = own.get_mut(index % COLOURS) else { return Ok(()) };
    let request = CreateRequest { object: Some(named(colour, board, index)), dry_run: false };
    let bytes = request.encode_to_vec();
    *colour = request.object.unwrap_or_default();
    board.created(index);
    wire::unary::<Unread>(channel.clone(), "/minipod.v1.Objects/Create", bytes.into()).await.map(drop)
}

async fn create_many(channel: &Channel, board: &Board, own: &mut [Object], pods: Range<usize>) -> Result<(), Status> {
    let objects = pods.clone().zip(own.iter_mut()).map(|(index, object)| named(object, board, index)).collect();
    let request = CreateManyRequest { objects, dry_run: false };
    let bytes = request.encode_to_vec();
    request.objects.into_iter().zip(own).for_each(|(object, place)| *place = object);
    pods.clone().for_each(|index| board.created(index));
    let answer =
        wire::unary::<CreateManyResponse>(channel.clone(), "/minipod.v1.Objects/CreateMany", bytes.into()).await?;
    match answer.results.iter().find(|result| result.code != 0) {
        Some(refused) => Err(Status::new(refused.code.into(), refused.message.clone())),
        None if answer.results.len() == pods.len() => Ok(()),
        None => Err(Status::internal(format!("{} answers for {} pods", answer.results.len(), pods.len()))),
    }
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
