//! Nodes: registration, sessions, and the agents' ends of tunnels.

use std::{pin::Pin, sync::Arc};

use minipod_proto::v1::{AgentMessage, RegisterRequest, RegisterResponse, ServerMessage, TunnelFrame, nodes_server};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    error::ApiError,
    nodes::{
        register::Registrar,
        session::{self, MessageStream, Shared},
    },
    tunnels::Tunnels,
    wire,
};

/// The implementation.
pub struct NodesApi {
    registrar: Registrar,
    shared: Arc<Shared>,
    tunnels: Arc<Tunnels>,
}

impl NodesApi {
    /// Over its parts.
    pub fn new(registrar: Registrar, shared: Arc<Shared>, tunnels: Arc<Tunnels>) -> NodesApi {
        NodesApi { registrar, shared, tunnels }
    }

    /// Begins a session.
    ///
    /// # Errors
    /// See [`session::open`].
    pub async fn open_session(&self, inbound: Streaming<AgentMessage>) -> Result<MessageStream, ApiError> {
        session::open(Arc::clone(&self.shared), inbound).await
    }
}

#[tonic::async_trait]
impl nodes_server::Nodes for NodesApi {
    type SessionStream = Pin<Box<dyn Stream<Item = Result<ServerMessage, Status>> + Send>>;
    type TunnelStream = ReceiverStream<Result<TunnelFrame, Status>>;

    async fn register(&self, request: Request<RegisterRequest>) -> Result<Response<RegisterResponse>, Status> {
        Ok(Response::new(self.registrar.register(request.into_inner().node).await?))
    }

    async fn session(
        &self,
        request: Request<Streaming<AgentMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let messages = self.open_session(request.into_inner()).await?;
        Ok(Response::new(Box::pin(messages.map(|message| wire::decoded(&message?)))))
    }

    async fn tunnel(&self, request: Request<Streaming<TunnelFrame>>) -> Result<Response<Self::TunnelStream>, Status> {
        Ok(Response::new(self.tunnels.arrive(request.into_inner()).await?))
    }
}
