//! A hollow node: registers and keeps a session like an agent, and runs nothing. What it says of itself is all there is of it,
//! so a thousand of them fit on one machine; the control plane cannot tell.

use std::time::Duration;

use minipod_proto::v1::agent_message::Message;
use minipod_proto::v1::nodes_client::NodesClient;
use minipod_proto::v1::{
    AgentHello, AgentMessage, Heartbeat, Node, NodeCondition, NodeStatus, ObjectMeta, RegisterRequest,
};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

/// Messages to the server: hello and a heartbeat now and then.
const QUEUE: usize = 4;
/// Snapshots of a full node are larger than tonic's default.
const MAX_MESSAGE_BYTES: usize = 64 << 20;

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
        let mut client = NodesClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let registered = client.register(RegisterRequest { node: Some(node(name, allocatable)) }).await?.into_inner();
        let (sender, receiver) = mpsc::channel(QUEUE);
        let hello = AgentHello { node: name.to_owned(), boot_id: "hollow".to_owned(), agent_version: "0".to_owned() };
        // The channel was just made: it has room.
        let _ = sender.send(AgentMessage { message: Some(Message::Hello(hello)) }).await;
        let mut incoming = client.session(ReceiverStream::new(receiver)).await?.into_inner();
        let every = Duration::from_millis(u64::try_from(registered.heartbeat_interval_ms).unwrap_or(1000).max(100));
        let session = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(every);
            let mut sequence = 0;
            loop {
                tokio::select! {
                    // Cancel safe: a partly read frame stays in the stream.
                    message = incoming.message() => if !matches!(message, Ok(Some(_))) { return },
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

fn node(name: &str, allocatable: &[(&str, &str)]) -> Node {
    let resources = allocatable.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    let labels = [("kubernetes.io/hostname".to_owned(), name.to_owned())].into();
    let ready = NodeCondition { r#type: "Ready".to_owned(), status: "True".to_owned(), ..NodeCondition::default() };
    Node {
        metadata: Some(ObjectMeta { name: name.to_owned(), labels, ..ObjectMeta::default() }),
        status: Some(NodeStatus {
            capacity: resources.clone().collect(),
            allocatable: resources.collect(),
            conditions: vec![ready],
            ..NodeStatus::default()
        }),
        ..Node::default()
    }
}
