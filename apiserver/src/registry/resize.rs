//! Change of CPU and memory in place: the wish is written in any case, and granted in one transaction with the node's ledger where
//! the node has the room. A wish that waits is granted by the node's session when room has come.

use minipod_proto::{
    Kind, resize,
    v1::{Object, Pod, ResizeRequest, Time},
    validate,
};

use super::{Registry, Verdict, Written, admission, update::check_preconditions};
use crate::{error::ApiError, keys};

impl Registry {
    /// Resizes a pod's containers.
    ///
    /// # Errors
    /// When the wish is wrong, or the pod is not there or has changed. No room is no error but a condition of the pod.
    pub async fn resize(&self, request: ResizeRequest) -> Result<Object, ApiError> {
        let key = keys::object_key(Kind::Pod, &request.namespace, &request.name)?;
        if request.dry_run {
            let old = self.read(Kind::Pod, &key).await?.ok_or(ApiError::NotFound { kind: Kind::Pod, key })?;
            return Ok(match granted(&old.object, &request)? {
                Verdict::Put(new) => *new,
                Verdict::Keep | Verdict::Remove => old.object,
            });
        }
        let first = self.modify(Kind::Pod, &key, |old| granted(old, &request)).await;
        let second = match first {
            // The ledger was perhaps the cache's, and room has come since.
            Err(ApiError::NoRoom { .. }) => {
                let now = self.storage.revision().await?;
                self.cache.reach(now).await?;
                self.modify(Kind::Pod, &key, |old| granted(old, &request)).await
            }
            done => done,
        };
        let written = match second {
            Err(ApiError::NoRoom { node, short, never }) => {
                let (reason, message) = if never {
                    (resize::INFEASIBLE, format!("node {node} is too small: {short}"))
                } else {
                    (resize::DEFERRED, format!("node {node} has no room now: {short}"))
                };
                let now = self.now();
                self.modify(Kind::Pod, &key, |old| wished(old, &request, (reason, &message), now)).await
            }
            done => done,
        };
        written.map(|Written { object, .. }| object)
    }

    /// Grants a wish that waits, if there is room by now. Tells whether it waits no more.
    ///
    /// # Errors
    /// When the store cannot be asked.
    pub(crate) async fn grant_resize(&self, key: &str) -> Result<bool, ApiError> {
        let granted = self.modify(Kind::Pod, key, |old| {
            let Some(pod) = old.as_pod().filter(|pod| resize::is_deferred(pod) && !pod.is_terminal()) else {
                return Ok(Verdict::Keep);
            };
            let mut pod = pod.clone();
            allocate(&mut pod);
            Ok(Verdict::put(pod))
        });
        match granted.await {
            Ok(_) | Err(ApiError::NotFound { .. }) => Ok(true),
            Err(ApiError::NoRoom { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// The pod as it is wished, checked.
fn changed(old: &Object, request: &ResizeRequest) -> Result<Option<Pod>, ApiError> {
    check_preconditions(old, &request.uid, &request.resource_version)?;
    let Some(pod) = old.as_pod() else { return Ok(None) };
    let mut new = pod.clone();
    let spec = new.spec_mut();
    for container in spec.init_containers.iter_mut().chain(&mut spec.containers) {
        let change = request.containers.iter().find(|one| one.name == container.name);
        if let Some(resources) = change.and_then(|one| one.resources.as_ref()) {
            resize::merge(container, resources);
        }
    }
    let mut object = Object::from(new);
    // A limit without a request is one, and quantities have one form.
    minipod_proto::defaults::apply(&mut object);
    let Some(new) = object.as_pod() else { return Ok(None) };
    admission::problems(&validate::resize(pod, new, request))?;
    let mut new = new.clone();
    if new.spec != pod.spec
        && let Some(meta) = &mut new.metadata
    {
        meta.generation = meta.generation.saturating_add(1);
    }
    Ok(Some(new))
}

/// Grants what the pod's spec says.
fn allocate(pod: &mut Pod) {
    let granted = pod.clone();
    let status = pod.status_mut();
    status.conditions.retain(|condition| condition.r#type != resize::PENDING);
    resize::set_allocated(status, &granted);
}

fn granted(old: &Object, request: &ResizeRequest) -> Result<Verdict, ApiError> {
    let Some(mut new) = changed(old, request)? else { return Ok(Verdict::Keep) };
    // Before the binding nothing is allocated; afterwards what was in force is remembered until the node says otherwise.
    if let Some(was) = old.as_pod().filter(|pod| pod.node_name().is_some()) {
        let status = new.status_mut();
        if resize::pending(was).is_none() {
            resize::set_allocated(status, was);
        }
        allocate(&mut new);
    }
    let new = Object::from(new);
    Ok(if new == *old { Verdict::Keep } else { Verdict::put(new) })
}

fn wished(
    old: &Object,
    request: &ResizeRequest,
    (reason, message): (&str, &str),
    now: Time,
) -> Result<Verdict, ApiError> {
    let Some(mut new) = changed(old, request)? else { return Ok(Verdict::Keep) };
    let Some(was) = old.as_pod() else { return Ok(Verdict::Keep) };
    let generation = new.metadata.as_ref().map_or(0, |meta| meta.generation);
    let status = new.status_mut();
    if resize::pending(was).is_none() {
        resize::set_allocated(status, was);
    }
    status.set_condition(resize::PENDING, "True", reason, message, now);
    if let Some(condition) = status.conditions.iter_mut().find(|one| one.r#type == resize::PENDING) {
        condition.observed_generation = generation;
    }
    let new = Object::from(new);
    Ok(if new == *old { Verdict::Keep } else { Verdict::put(new) })
}
