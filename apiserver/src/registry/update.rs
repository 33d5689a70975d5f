//! Changes of spec and status, each apart from the other.

use minipod_proto::{
    Kind, defaults, manifest,
    v1::{Object, PatchRequest, UpdateRequest, object},
};

use super::{Registry, Verdict, Written, admission};
use crate::{error::ApiError, keys};

impl Registry {
    /// Replaces everything but the status; with a resourceVersion only if that is the newest.
    ///
    /// # Errors
    /// When the object is wrong, is not there, or has changed.
    pub async fn update(&self, request: UpdateRequest) -> Result<Object, ApiError> {
        let (kind, key, given) = target(request.object)?;
        self.change(kind, &key, request.dry_run, |old| replaced(old, given.clone())).await
    }

    /// Replaces the status alone.
    ///
    /// # Errors
    /// When the kind has none, or the object is not there or has changed.
    pub async fn update_status(&self, request: UpdateRequest) -> Result<Object, ApiError> {
        let (kind, key, given) = target(request.object)?;
        self.change(kind, &key, request.dry_run, |old| restated(old, given.clone())).await
    }

    /// Replaces a pod's debug containers alone: new ones are added, those that are there stay as they are.
    ///
    /// # Errors
    /// When it is no pod, has ended, or the new list is wrong.
    pub async fn update_ephemeral(&self, request: UpdateRequest) -> Result<Object, ApiError> {
        let (kind, key, given) = target(request.object)?;
        self.change(kind, &key, request.dry_run, |old| debugged(old, given.clone())).await
    }

    /// Changes by a JSON merge patch. A patch that names a resourceVersion is a compare-and-swap.
    ///
    /// # Errors
    /// When the patch or its result is wrong, or the object is not there.
    pub async fn patch(&self, request: PatchRequest) -> Result<Object, ApiError> {
        let kind = keys::kind(&request.kind)?;
        let key = keys::object_key(kind, &request.namespace, &request.name)?;
        self.change(kind, &key, false, |old| {
            let patched = manifest::merge_patch(old, &request.merge_patch);
            let new = patched.map_err(|problems| ApiError::Invalid(problems.to_string()))?;
            if new.kind_of() != Some(kind) || new.key() != key {
                return Err(ApiError::Invalid(format!(
                    "the patch makes {kind} {key} another object ({}); name, namespace and kind stay",
                    new.key()
                )));
            }
            if request.status { restated(old, new) } else { replaced(old, new) }
        })
        .await
    }

    async fn change(
        &self,
        kind: Kind,
        key: &str,
        dry_run: bool,
        decide: impl Fn(&Object) -> Result<Verdict, ApiError>,
    ) -> Result<Object, ApiError> {
        if dry_run {
            let old = self.read(kind, key).await?.ok_or(ApiError::NotFound { kind, key: key.to_owned() })?;
            return Ok(match decide(&old.object)? {
                Verdict::Put(new) => *new,
                Verdict::Keep | Verdict::Remove => old.object,
            });
        }
        let Written { object, .. } = self.modify(kind, key, decide).await?;
        Ok(object)
    }
}

fn target(object: Option<Object>) -> Result<(Kind, String, Object), ApiError> {
    let mut object = object.ok_or_else(|| ApiError::Invalid("object: missing".into()))?;
    let kind = object.kind_of().ok_or_else(|| ApiError::Invalid("object: of a kind that is not known here".into()))?;
    if kind.namespaced()
        && let Some(meta) = object.meta_mut()
        && meta.namespace.is_empty()
    {
        meta.namespace = "default".into();
    }
    let key = keys::object_key(kind, &object.meta().namespace, &object.meta().name)?;
    Ok((kind, key, object))
}

/// Whether what the request states of the object is so.
fn check_stated(old: &Object, given: &Object) -> Result<(), ApiError> {
    let (old, stated) = (old, given.meta());
    check_preconditions(old, &stated.uid, &stated.resource_version)
}

/// Checks a stated uid and resourceVersion; empty ones state nothing.
///
/// # Errors
/// When one of them is not the object's.
pub(super) fn check_preconditions(object: &Object, uid: &str, revision: &str) -> Result<(), ApiError> {
    let meta = object.meta();
    let kind = object.kind_of().unwrap_or(Kind::Pod);
    if !uid.is_empty() && uid != meta.uid {
        return Err(ApiError::Precondition(format!(
            "metadata.uid: {kind} {} has the uid {}, not {uid}: it is another object of the same name",
            object.key(),
            meta.uid
        )));
    }
    if !revision.is_empty() && revision != meta.resource_version {
        let detail = format!("it is at revision {}, not {revision}", meta.resource_version);
        return Err(ApiError::Stale { kind, key: object.key(), detail });
    }
    Ok(())
}

/// Everything but the status from `new`, the status from `old`.
fn replaced(old: &Object, mut new: Object) -> Result<Verdict, ApiError> {
    check_stated(old, &new)?;
    defaults::apply(&mut new);
    new.set_type();
    keep_metadata(old, &mut new);
    match (&old.kind, &mut new.kind) {
        (Some(object::Kind::Pod(old)), Some(object::Kind::Pod(new))) => {
            new.status = old.status.clone();
            let (was, spec) = (old.spec(), new.spec_mut());
            // What the server filled in need not be repeated by whoever sends a manifest again.
            if spec.node_name.is_empty() {
                spec.node_name.clone_from(&was.node_name);
            }
            if spec.ephemeral_containers.is_empty() {
                spec.ephemeral_containers.clone_from(&was.ephemeral_containers);
            }
            spec.priority = spec.priority.or(was.priority);
            if spec.priority_class_name.is_empty() {
                spec.priority_class_name.clone_from(&was.priority_class_name);
            }
            if spec.preemption_policy.is_empty() {
                spec.preemption_policy.clone_from(&was.preemption_policy);
            }
        }
        (Some(object::Kind::Node(old)), Some(object::Kind::Node(new))) => {
            new.status = old.status.clone();
            let was = old.spec();
            new.spec_mut().pod_cidr.clone_from(&was.pod_cidr);
            new.spec_mut().pod_cidrs.clone_from(&was.pod_cidrs);
        }
        (Some(object::Kind::Namespace(old)), Some(object::Kind::Namespace(new))) => new.status = old.status.clone(),
        (Some(object::Kind::PodDisruptionBudget(old)), Some(object::Kind::PodDisruptionBudget(new))) => {
            new.status = old.status.clone();
        }
        _ => {}
    }
    admission::validate_update(old, &new)?;
    check_immutable(old, &new)?;
    if content_differs(old, &new)
        && let Some(meta) = new.meta_mut()
    {
        meta.generation = old.meta().generation.saturating_add(1);
    }
    let freed = !old.meta().finalizers.is_empty() && new.meta().finalizers.is_empty();
    if freed && old.meta().deletion_timestamp.is_some() && !super::delete::waits_for_node(old) {
        return Ok(Verdict::Remove);
    }
    Ok(if *old == new { Verdict::Keep } else { Verdict::put(new) })
}

/// The debug containers from `new`, everything else from `old`.
fn debugged(old: &Object, mut given: Object) -> Result<Verdict, ApiError> {
    check_stated(old, &given)?;
    defaults::apply(&mut given);
    let (Some(object::Kind::Pod(was)), Some(object::Kind::Pod(given))) = (&old.kind, given.kind) else {
        let kind = old.kind_of().map_or("this kind", Kind::name);
        return Err(ApiError::Invalid(format!("a {kind} has no ephemeral containers")));
    };
    let phase = was.status().phase.as_str();
    if old.meta().deletion_timestamp.is_some() || matches!(phase, "Succeeded" | "Failed") {
        return Err(ApiError::Precondition(format!(
            "pod {} has ended or is ending: nothing is added to it",
            old.key()
        )));
    }
    let mut new = old.clone();
    if let Some(object::Kind::Pod(pod)) = &mut new.kind {
        pod.spec_mut().ephemeral_containers = given.spec.unwrap_or_default().ephemeral_containers;
    }
    admission::validate_ephemeral(old, &new)?;
    if *old == new {
        return Ok(Verdict::Keep);
    }
    if let Some(meta) = new.meta_mut() {
        meta.generation = old.meta().generation.saturating_add(1);
    }
    Ok(Verdict::put(new))
}

/// The status from `new`, everything else from `old`.
fn restated(old: &Object, new: Object) -> Result<Verdict, ApiError> {
    check_stated(old, &new)?;
    let mut object = old.clone();
    match (&mut object.kind, new.kind) {
        (Some(object::Kind::Pod(pod)), Some(object::Kind::Pod(new))) => {
            pod.status = Some(super::merge_status(pod, new.status.unwrap_or_default()));
        }
        (Some(object::Kind::Node(node)), Some(object::Kind::Node(new))) => node.status = new.status,
        _ => {
            let kind = old.kind_of().map_or("this kind", Kind::name);
            return Err(ApiError::Invalid(format!("a {kind} has no status that could be written")));
        }
    }
    Ok(if *old == object { Verdict::Keep } else { Verdict::put(object) })
}

/// Metadata that only the server changes.
fn keep_metadata(old: &Object, new: &mut Object) {
    let was = old.meta();
    if let Some(meta) = new.meta_mut() {
        meta.uid.clone_from(&was.uid);
        meta.resource_version.clone_from(&was.resource_version);
        meta.generate_name.clone_from(&was.generate_name);
        meta.creation_timestamp = was.creation_timestamp;
        meta.deletion_timestamp = was.deletion_timestamp;
        meta.deletion_grace_period_seconds = was.deletion_grace_period_seconds;
        meta.generation = was.generation;
    }
}

fn content_differs(old: &Object, new: &Object) -> bool {
    let mut new = new.clone();
    if let Some(meta) = new.meta_mut() {
        meta.clone_from(old.meta());
    }
    *old != new
}

fn check_immutable(old: &Object, new: &Object) -> Result<(), ApiError> {
    let frozen = match &old.kind {
        Some(object::Kind::ConfigMap(map)) => map.immutable == Some(true),
        Some(object::Kind::Secret(secret)) => secret.immutable == Some(true),
        _ => false,
    };
    if frozen && content_differs(old, new) {
        return Err(ApiError::Invalid(format!(
            "immutable: {} is immutable: its data cannot change; delete it and make a new one",
            old.key()
        )));
    }
    Ok(())
}
