//! Namespaces: `default` exists; one that is deleted empties itself and goes.

use std::{sync::Arc, time::Duration};

use minipod_daemon::{backoff::Backoff, shutdown::Shutdown};
use minipod_proto::{
    Kind,
    v1::{CreateRequest, DeleteRequest, Namespace, Object},
};

use super::{Registry, Verdict, delete::DEFAULT_NAMESPACE};
use crate::{cache::Filter, error::ApiError};

/// How often a namespace that ends is looked at again: its pods go when their nodes have ended them.
const SWEEP: Duration = Duration::from_millis(500);

/// Makes sure of `default`, and empties namespaces that are deleted, until the shutdown.
pub async fn keep(registry: Arc<Registry>, shutdown: Shutdown) {
    // Cancel safe to drop anywhere: every write is a transaction of its own, and the next server goes on.
    tokio::select! {
        () = run(&registry) => {}
        () = shutdown.asked() => {}
    }
}

async fn run(registry: &Arc<Registry>) {
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));
    while let Err(error) = ensure_default(registry).await {
        tracing::debug!(%error, "namespace default is not there yet");
        tokio::time::sleep(backoff.next_wait()).await;
    }
    let Ok(filter) = Filter::everything(Kind::Namespace) else { return };
    loop {
        // A watch, so that nothing is polled while no namespace ends.
        let Ok(mut changes) = registry.cache.subscribe(Kind::Namespace, filter.clone(), 0) else { continue };
        loop {
            let ending: Vec<Arc<crate::cache::Entry>> = {
                let (all, _) = registry.cache.list(Kind::Namespace, &filter);
                all.into_iter().filter(|entry| entry.object.meta().deletion_timestamp.is_some()).collect()
            };
            for entry in &ending {
                if let Err(error) = empty(registry, &entry.key, entry.revision).await {
                    tracing::warn!(namespace = entry.key, %error, "a namespace that is deleted cannot be emptied yet");
                }
            }
            if ending.is_empty() {
                // Cancel safe: `next` is, and a cut watch is opened again.
                if changes.next().await.is_err() {
                    break;
                }
            } else {
                tokio::time::sleep(SWEEP).await;
            }
        }
    }
}

/// Makes `default` unless it is there.
pub(super) async fn ensure_default(registry: &Registry) -> Result<(), ApiError> {
    let mut namespace = Namespace::default();
    namespace.metadata.get_or_insert_default().name = DEFAULT_NAMESPACE.into();
    let request = CreateRequest { object: Some(Object::from(namespace)), dry_run: false };
    match registry.create(request).await {
        Ok(_) | Err(ApiError::Exists { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

async fn empty(registry: &Registry, namespace: &str, marked_at: i64) -> Result<(), ApiError> {
    // Every creation compares the namespace's revision: after the mark nothing new appears, so that a cache which has
    // reached the mark shows all there is.
    registry.cache.reach(marked_at).await?;
    for kind in Kind::ALL.into_iter().filter(|kind| kind.namespaced()) {
        let (entries, _) = registry.cache.list(kind, &Filter::parse(kind, namespace, "", "")?);
        for entry in entries {
            if entry.object.meta().deletion_timestamp.is_some() {
                continue;
            }
            let request = DeleteRequest {
                kind: kind.name().into(),
                namespace: namespace.into(),
                name: entry.object.meta().name.clone(),
                ..DeleteRequest::default()
            };
            match registry.delete(request).await {
                Ok(_) | Err(ApiError::NotFound { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }
    if registry.cache.namespace_in_use(namespace) {
        return Ok(());
    }
    let gone = registry
        .modify(Kind::Namespace, namespace, |object| {
            Ok(if object.meta().finalizers.is_empty() { Verdict::Remove } else { Verdict::Keep })
        })
        .await;
    match gone {
        Ok(_) | Err(ApiError::NotFound { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}
