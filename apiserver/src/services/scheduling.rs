//! Scheduling: bindings, and why pods wait.

use std::sync::Arc;

use futures_util::{StreamExt, stream};
use minipod_proto::{
    Kind,
    v1::{
        BindBatchRequest, BindBatchResponse, Pod, PreemptRequest, PreemptResponse, ReportUnschedulableRequest,
        ReportUnschedulableResponse, preempt_request::Victim, preempt_response::Failure,
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
/// Victims of one call that are written at a time.
const VICTIMS_AT_ONCE: usize = 16;
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
        let known = cached.as_ref().and_then(|entry| entry.object.as_pod());
        let same = |pod: &Pod| {
            let told = pod.condition("PodScheduled");
            told.is_some_and(|told| told.status == "False" && told.reason == reason && told.message == message)
                && !is_outdated(pod, item)
        };
        if known.is_some_and(same) {
            return Ok(());
        }
        let now = self.registry.now();
        let mut news = false;
        let written = self.registry.modify(Kind::Pod, &key, |object| {
            news = false;
            let Some(pod) = object.as_pod() else { return Ok(Verdict::Keep) };
            // Bound, ended or another pod by now: the report is late and no longer true.
            if object.meta().uid != item.uid || pod.node_name().is_some() || pod.is_terminal() {
                return Ok(Verdict::Keep);
            }
            let mut pod = pod.clone();
            let outdated = is_outdated(&pod, item);
            let status = pod.status_mut();
            if outdated {
                status.nominated_node_name.clear();
            }
            news = status.set_condition("PodScheduled", "False", reason, &message, now);
            Ok(if news || outdated { Verdict::put(pod) } else { Verdict::Keep })
        });
        match written.await {
            Ok(_) if news => {
                self.recorder.unschedulable(&item.namespace, &item.pod, &item.uid, scheduler, &message);
                Ok(())
            }
            Ok(_) | Err(ApiError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Whether the pod's nomination is the one that the scheduler takes back.
fn is_outdated(pod: &Pod, item: &Item) -> bool {
    !item.outdated_nomination.is_empty() && pod.status().nominated_node_name == item.outdated_nomination
}

#[tonic::async_trait]
impl scheduling_server::Scheduling for SchedulingApi {
    async fn bind_batch(&self, request: Request<BindBatchRequest>) -> Result<Response<BindBatchResponse>, Status> {
        let results = self.binder.bind(request.into_inner()).await?;
        Ok(Response::new(BindBatchResponse { results }))
    }

    async fn preempt(&self, request: Request<PreemptRequest>) -> Result<Response<PreemptResponse>, Status> {
        let PreemptRequest { victims, nominees, preemptor, scheduler } = request.into_inner();
        for (field, count) in [("victims", victims.len()), ("nominees", nominees.len())] {
            if count > ITEMS_LIMIT {
                return Err(ApiError::TooLarge(format!("{field}: {count}, but one call may have {ITEMS_LIMIT}")).into());
            }
        }
        for nominee in nominees {
            if let Err(error) = self.registry.nominate(&nominee).await {
                let failures = vec![Failure { uid: nominee.uid, message: error.to_string() }];
                return Ok(Response::new(PreemptResponse { failures }));
            }
        }
        let message = format!("{scheduler}: ended to make room for {preemptor}, which is more important");
        let message: String = message.chars().take(MESSAGE_LIMIT).collect();
        let (registry, recorder, scheduler, message) = (&self.registry, &self.recorder, &scheduler, &message);
        let end = |victim: Victim| async move {
            let (namespace, pod, uid) = (&victim.namespace, &victim.pod, &victim.uid);
            match registry.preempt(namespace, pod, uid, message).await {
                Ok(true) => recorder.preempted(namespace, pod, uid, scheduler, message),
                Ok(false) => {}
                Err(error) => return Some(Failure { uid: victim.uid, message: error.to_string() }),
            }
            None
        };
        let ends = stream::iter(victims).map(end).buffer_unordered(VICTIMS_AT_ONCE);
        let failures = ends.filter_map(std::future::ready).collect().await;
        Ok(Response::new(PreemptResponse { failures }))
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
