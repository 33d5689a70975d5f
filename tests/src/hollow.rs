//! A hollow node: registers and keeps a session like an agent, and runs nothing. What it says of itself is all there is of it,
//! so thousands of them fit on one machine; the control plane cannot tell. A pod that is to end has ended at once.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use minipod_proto::v1::agent_message::Message;
use minipod_proto::v1::nodes_client::NodesClient;
use minipod_proto::v1::{
    AgentHello, AgentMessage, Heartbeat, Node, NodeCondition, NodeStatus, ObjectMeta, PodStatusReport, RegisterRequest,
};
use prost::Message as _;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use crate::wire;

/// Messages to the server: hello and a heartbeat now and then.
const QUEUE: usize = 4;

/// Is told every pod that the node's session brings, as it comes.
pub type Seen = Arc<dyn Fn(&ObjectMeta) + Send + Sync>;

/// What a hollow node reads of a `ServerMessage`: pods, and of these who they are. It would run nothing of the rest.
#[derive(Clone, PartialEq, prost::Message)]
struct Brought {
    #[prost(message, optional, tag = "1")]
    snapshot: Option<Pods>,
    #[prost(message, optional, tag = "2")]
    upsert: Option<Brief>,
}

/// Of a `PodList`.
#[derive(Clone, PartialEq, prost::Message)]
struct Pods {
    #[prost(message, repeated, tag = "4")]
    items: Vec<Brief>,
}

/// Of a `Pod`.
#[derive(Clone, PartialEq, prost::Message)]
struct Brief {
    #[prost(message, optional, tag = "3")]
    metadata: Option<ObjectMeta>,
}

/// What a hollow node says of itself.
#[derive(Debug, Clone, Copy)]
pub struct Shape<'a> {
    /// Its name.
    pub name: &'a str,
    /// What pods may use, as quantities by resource.
    pub allocatable: &'a [(&'a str, &'a str)],
    /// Labels, beside that of the host name.
    pub labels: &'a [(&'a str, &'a str)],
}

/// A node that is there as long as this value.
#[derive(Debug)]
pub struct HollowNode {
    session: JoinHandle<()>,
}

impl HollowNode {
    /// Registers the node and opens its session.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub async fn join(channel: Channel, name: &str, allocatable: &[(&str, &str)]) -> Result<HollowNode, tonic::Status> {
        HollowNode::join_as(channel, Shape { name, allocatable, labels: &[] }, Arc::new(|_| {})).await
    }

    /// As [`HollowNode::join`], with labels, and telling the pods that come.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub async fn join_as(channel: Channel, shape: Shape<'_>, seen: Seen) -> Result<HollowNode, tonic::Status> {
        let mut client = NodesClient::new(channel.clone());
        let registered = client.register(RegisterRequest { node: Some(node(shape)) }).await?.into_inner();
        let (sender, receiver) = mpsc::channel(QUEUE);
        let hello =
            AgentHello { node: shape.name.to_owned(), boot_id: "hollow".to_owned(), agent_version: "0".to_owned() };
        // The channel was just made: it has room.
        let _ = sender.send(AgentMessage { message: Some(Message::Hello(hello)) }).await;
        let outgoing = ReceiverStream::new(receiver).map(|message: AgentMessage| Bytes::from(message.encode_to_vec()));
        let mut incoming = wire::streams::<Brought>(channel, "/minipod.v1.Nodes/Session", outgoing).await?;
        let every = Duration::from_millis(u64::try_from(registered.heartbeat_interval_ms).unwrap_or(1000).max(100));
        let session = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(every);
            let mut sequence = 0;
            loop {
                tokio::select! {
                    // Cancel safe: a partly read frame stays in the stream.
                    message = incoming.message() => {
                        let Ok(Some(message)) = message else { return };
                        for report in reports(message, &seen) {
                            if sender.send(report).await.is_err() { return }
                        }
                    }
                    // Cancel safe: a tick that is not taken comes again.
                    _ = ticks.tick() => {
                        sequence += 1;
                        let heartbeat = AgentMessage { message: Some(Message::Heartbeat(Heartbeat { sequence })) };
                        if sender.send(heartbeat).await.is_err() { return }
                    }
                }
            }
        });
        Ok(HollowNode { session })
    }
}

impl Drop for HollowNode {
    fn drop(&mut self) {
        self.session.abort();
    }
}

/// Tells the pods of a message; the ends of those that are to end.
fn reports(message: Brought, seen: &Seen) -> Vec<AgentMessage> {
    let listed = message.snapshot.into_iter().flat_map(|list| list.items);
    let pods: Vec<ObjectMeta> = listed.chain(message.upsert).filter_map(|pod| pod.metadata).collect();
    pods.iter().for_each(|pod| seen(pod));
    let ending = pods.into_iter().filter(|pod| pod.deletion_timestamp.is_some());
    let report = |pod: ObjectMeta| PodStatusReport {
        namespace: pod.namespace,
        name: pod.name,
        uid: pod.uid,
        status: None,
        sequence: 1,
        finished: true,
    };
    ending.map(|pod| AgentMessage { message: Some(Message::PodStatus(report(pod))) }).collect()
}

fn node(shape: Shape<'_>) -> Node {
    let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
    let resources: HashMap<_, _> = shape.allocatable.iter().map(owned).collect();
    let host = [("kubernetes.io/hostname".to_owned(), shape.name.to_owned())];
    let labels = host.into_iter().chain(shape.labels.iter().map(owned)).collect();
    let ready = NodeCondition { r#type: "Ready".to_owned(), status: "True".to_owned(), ..NodeCondition::default() };
    Node {
        metadata: Some(ObjectMeta { name: shape.name.to_owned(), labels, ..ObjectMeta::default() }),
        status: Some(NodeStatus {
            capacity: resources.clone().into_iter().collect(),
            allocatable: resources.into_iter().collect(),
            conditions: vec![ready],
            ..NodeStatus::default()
        }),
        ..Node::default()
    }
}
