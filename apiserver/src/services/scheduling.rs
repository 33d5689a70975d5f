//! Scheduling: bindings, and why pods wait.

use std::sync::Arc;

use minipod_proto::{
    Kind,
    v1::{
        BindBatchRequest, BindBatchResponse, ReportUnschedulableRequest, ReportUnschedulableResponse,
        report_unschedulable_request::Item, scheduling_server,
    },
};
use tonic::{Request, Response, Status};

use crate::{
    binding::Binder,
    error::ApiError,
    events::Recorder,
    keys,
    registry::{Registry, Verdict},
};

/// Items in one report.
const ITEMS_LIMIT: usize = 4_096;
/// Longer messages are cut, in characters; a reason per node of a large cluster says nothing that its beginning does not.
const MESSAGE_LIMIT: usize = 1_024;

/// The implementation.
pub struct SchedulingApi {
    registry: Arc<Registry>,
    binder: Binder,
    recorder: Recorder,
}

impl SchedulingApi {
    /// Over a registry and a binder.
    pub fn new(registry: Arc<Registry>, binder: Binder, recorder: Recorder) -> SchedulingApi {
        SchedulingApi { registry, binder, recorder }
    }

    async fn report(&self, item: &Item, scheduler: &str) -> Result<(), ApiError> {
        let key = keys::object_key(Kind::Pod, &item.namespace, &item.pod)?;
        let reason = if item.reason.is_empty() { "Unschedulable" } else { &item.reason };
        let message: String = item.message.chars().take(MESSAGE_LIMIT).collect();
        // A repeated report is the common case; the cache is good enough to see that it is one.
        let cached = self.registry.cache.get(Kind::Pod, &key);
        let known = cached.as_ref().and_then(|entry| entry.object.as_pod()?.condition("PodScheduled"));
        if known.is_some_and(|known| known.status == "False" && known.reason == reason && known.message == message) {
            return Ok(());
        }
        let now = self.registry.now();
        let mut changed = false;
        let written = self.registry.modify(Kind::Pod, &key, |object| {
            changed = false;
            let Some(pod) = object.as_pod() else { return Ok(Verdict::Keep) };
            // Bound, ended or another pod by now: the report is late and no longer true.
            if object.meta().uid != item.uid || pod.node_name().is_some() || pod.is_terminal() {
                return Ok(Verdict::Keep);
            }
            let mut pod = pod.clone();
            changed = pod.status_mut().set_condition("PodScheduled", "False", reason, &message, now);
            Ok(if changed { Verdict::put(pod) } else { Verdict::Keep })
        });
        match written.await {
            Ok(_) if changed => {
                self.recorder.unschedulable(&item.namespace, &item.pod, &item.uid, scheduler, &message);
                Ok(())
            }
            Ok(_) | Err(ApiError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

#[tonic::async_trait]
impl scheduling_server::Scheduling for SchedulingApi {
    async fn bind_batch(&self, request: Request<BindBatchRequest>) -> Result<Response<BindBatchResponse>, Status> {
        let results = self.binder.bind(request.into_inner()).await?;
        Ok(Response::new(BindBatchResponse { results }))
    }

    async fn report_unschedulable(
        &self,
        request: Request<ReportUnschedulableRequest>,
    ) -> Result<Response<ReportUnschedulableResponse>, Status> {
        let request = request.into_inner();
        if request.items.len() > ITEMS_LIMIT {
            let count = request.items.len();
            return Err(ApiError::TooLarge(format!("items: {count}, but one call may have {ITEMS_LIMIT}")).into());
        }
        for item in &request.items {
            self.report(item, &request.scheduler).await?;
        }
        Ok(Response::new(ReportUnschedulableResponse {}))
    }
}
