//! Stores: what the store behind this server says of itself.

use std::sync::Arc;

use minipod_proto::v1::{StoreStatus, StoreStatusRequest, stores_server::Stores};
use minipod_store::replica::run::with_causes;
use tonic::{Request, Response, Status};

use crate::{
    error::ApiError,
    registry::Registry,
    space::{Members, report},
};

/// The implementation.
pub struct StoresApi {
    registry: Arc<Registry>,
    members: Members,
}

impl StoresApi {
    /// Over the members that this server reaches.
    pub fn new(registry: Arc<Registry>, members: Members) -> StoresApi {
        StoresApi { registry, members }
    }
}

#[tonic::async_trait]
impl Stores for StoresApi {
    async fn status(&self, _: Request<StoreStatusRequest>) -> Result<Response<StoreStatus>, Status> {
        let (known, said) = tokio::join!(self.members.list(), self.members.statuses());
        let known = known.map_err(|error| ApiError::Unavailable(with_causes(&error)))?;
        let is_own = self.members.is_own();
        let others = is_own && known.len() > 1;
        let mut told = report(if is_own { "embedded" } else { "etcd" }, known, said);
        if others {
            told.servers = self.registry.cache.replicas().into_values().map(|replica| replica.address).collect();
            told.servers.sort_unstable();
            told.servers.dedup();
        }
        Ok(Response::new(told))
    }
}
