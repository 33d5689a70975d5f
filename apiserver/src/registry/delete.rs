//! Deletion with grace (pod-semantics: termination).

use minipod_proto::{
    Kind,
    v1::{DeleteRequest, DeleteResponse, Object, Time, object},
};

use super::{ATTEMPTS, Registry, Verdict, Written, update::check_preconditions};
use crate::{error::ApiError, keys};

/// The namespace that is always there.
pub const DEFAULT_NAMESPACE: &str = "default";

impl Registry {
    /// Removes an object, or marks it and leaves the rest to its node.
    ///
    /// # Errors
    /// When it is not there, or is not the one that was meant.
    pub async fn delete(&self, request: DeleteRequest) -> Result<DeleteResponse, ApiError> {
        let kind = keys::kind(&request.kind)?;
        let key = keys::object_key(kind, &request.namespace, &request.name)?;
        let now = self.now();
        let decided = |object: &Object, is_orphan: bool| {
            check_preconditions(object, &request.uid, &request.resource_version)?;
            decide(object, if is_orphan { Some(0) } else { request.grace_period_seconds }, now)
        };
        let written = self.end(kind, &key, decided).await?;
        Ok(DeleteResponse { object: Some(written.object), gone: written.gone })
    }

    /// As [`Registry::modify`], for what ends an object: `decide` is also told whether it is an orphan, a pod whose node is gone, which
    /// nobody will end. That a cache does not know of a node proves nothing, for it may be behind: the store is asked.
    ///
    /// # Errors
    /// As [`Registry::modify`].
    pub(super) async fn end<F>(&self, kind: Kind, key: &str, mut decide: F) -> Result<Written, ApiError>
    where
        F: FnMut(&Object, bool) -> Result<Verdict, ApiError>,
    {
        let mut gone = None;
        for _ in 0..ATTEMPTS {
            let mut doubt = None;
            let written = self.modify(kind, key, |object| {
                let node = self.unknown_node(object);
                doubt = node.clone().filter(|_| node != gone);
                match &doubt {
                    Some(node) => Err(ApiError::Unavailable(format!("whether node {node} is gone is not known"))),
                    None => decide(object, node.is_some()),
                }
            });
            let written = written.await;
            let Some(node) = doubt else { return written };
            match self.read(Kind::Node, &node).await? {
                Some(entry) => self.cache.reach(entry.revision).await?,
                None => gone = Some(node),
            }
        }
        let detail = format!("its node came and went {ATTEMPTS} times meanwhile");
        Err(ApiError::Stale { kind, key: key.to_owned(), detail })
    }

    /// The node that a pod is bound to, if the cache does not know it.
    pub(super) fn unknown_node(&self, object: &Object) -> Option<String> {
        let node = object.as_pod().and_then(|pod| pod.node_name());
        node.filter(|node| self.cache.get(Kind::Node, node).is_none()).map(str::to_owned)
    }
}

/// Whether only the node can tell that nothing of a pod is left.
pub(super) fn waits_for_node(object: &Object) -> bool {
    object.as_pod().is_some_and(|pod| pod.node_name().is_some() && !pod.is_terminal())
}

/// What a deletion does; `grace` in seconds, as it was asked for.
pub(super) fn decide(object: &Object, grace: Option<i64>, now: Time) -> Result<Verdict, ApiError> {
    match &object.kind {
        Some(object::Kind::Pod(pod)) => {
            let wanted = grace.unwrap_or_else(|| pod.spec().grace_seconds());
            let wanted = if wanted < 0 { 1 } else { wanted };
            let grace = if waits_for_node(object) { wanted } else { 0 };
            if grace == 0 && object.meta().finalizers.is_empty() {
                return Ok(Verdict::Remove);
            }
            Ok(mark(object, grace, now))
        }
        Some(object::Kind::Namespace(namespace)) => {
            if object.meta().name == DEFAULT_NAMESPACE {
                return Err(ApiError::Precondition("namespace default cannot be deleted".into()));
            }
            if object.meta().deletion_timestamp.is_some() {
                return Ok(Verdict::Keep);
            }
            let mut namespace = namespace.clone();
            namespace.status.get_or_insert_default().phase = "Terminating".into();
            Ok(mark(&namespace.into(), 0, now))
        }
        _ if object.meta().finalizers.is_empty() => Ok(Verdict::Remove),
        _ => Ok(mark(object, 0, now)),
    }
}

/// Marks for deletion; a mark that is there can only become earlier.
fn mark(object: &Object, grace: i64, now: Time) -> Verdict {
    let at = now.plus_seconds(grace);
    let marked = object.meta().deletion_timestamp;
    if marked.is_some_and(|marked| marked.unix_ms() <= at.unix_ms()) {
        return Verdict::Keep;
    }
    let mut object = object.clone();
    if let Some(meta) = object.meta_mut() {
        meta.deletion_timestamp = Some(at);
        meta.deletion_grace_period_seconds = Some(grace);
        meta.generation = meta.generation.saturating_add(1);
    }
    Verdict::put(object)
}

#[cfg(test)]
mod tests {
    use super::*;
    use minipod_proto::v1::Pod;

    fn pod(node: &str, phase: &str, marked_s: Option<i64>) -> Object {
        let mut pod = Pod::default();
        pod.spec_mut().node_name = node.into();
        pod.status_mut().phase = phase.into();
        let mut object = Object::from(pod);
        let meta = object.meta_mut().expect("a pod");
        meta.name = "p".into();
        meta.generation = 1;
        meta.deletion_timestamp = marked_s.map(|s| Time::from_unix(s, 0));
        object
    }

    #[test]
    fn grace() {
        let now = Time::from_unix(1_000, 0);
        for (object, grace, want) in [
            (pod("", "Pending", None), None, "remove"),
            (pod("", "Pending", None), Some(60), "remove"),
            (pod("n", "Running", None), None, "at 1030 grace 30"),
            (pod("n", "Running", None), Some(5), "at 1005 grace 5"),
            (pod("n", "Running", None), Some(-7), "at 1001 grace 1"),
            (pod("n", "Running", None), Some(0), "remove"),
            (pod("n", "Succeeded", None), None, "remove"),
            (pod("n", "Failed", None), Some(30), "remove"),
            (pod("n", "Running", Some(1_010)), None, "keep"),
            (pod("n", "Running", Some(1_010)), Some(3), "at 1003 grace 3"),
            (pod("n", "Running", Some(1_010)), Some(0), "remove"),
        ] {
            let shown = match decide(&object, grace, now).expect("allowed") {
                Verdict::Keep => "keep".to_owned(),
                Verdict::Remove => "remove".to_owned(),
                Verdict::Put(object) => {
                    let meta = object.meta();
                    assert_eq!(meta.generation, 2);
                    format!(
                        "at {} grace {}",
                        meta.deletion_timestamp.map_or(0, |t| t.seconds),
                        meta.deletion_grace_period_seconds.unwrap_or(-1)
                    )
                }
            };
            assert_eq!(shown, want, "{:?} grace {grace:?}", object.as_pod().map(|pod| pod.phase()));
        }
    }
}
