//! The ConfigMaps and Secrets that a session has to tell: those that the node's pods refer to, before the pod and on change.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use futures_util::future::select_all;
use minipod_proto::{
    Kind, Resource,
    references::{Reference, references},
    v1::{Pod, ServerMessage, SourceGone, object, server_message, watch_event::Type},
};

use crate::{
    cache::{Cache, Cut, Delivery, Entry, Filter, Subscription},
    error::ApiError,
    wire::EncodedMessage,
};

/// One object: its kind and `namespace/name`.
type Source = (Kind, String);

/// What one session has told, and what it watches: only the kinds and namespaces that its pods have references in.
pub struct Sources {
    cache: Arc<Cache>,
    wanted: HashMap<String, BTreeSet<Source>>,
    /// With the revision that was told.
    told: BTreeMap<Source, i64>,
    watched: BTreeMap<(Kind, String), Subscription>,
}

impl Sources {
    /// Nothing is told yet.
    pub fn new(cache: Arc<Cache>) -> Sources {
        Sources { cache, wanted: HashMap::new(), told: BTreeMap::new(), watched: BTreeMap::new() }
    }

    /// A pod is about to be told: what has to be told before it.
    ///
    /// # Errors
    /// When the changes to come cannot be followed.
    pub fn before(&mut self, pod: &Pod) -> Result<Vec<EncodedMessage>, ApiError> {
        let meta = pod.meta();
        let source = |reference| match reference {
            Reference::ConfigMap(name) => (Kind::ConfigMap, format!("{}/{name}", meta.namespace)),
            Reference::Secret(name) => (Kind::Secret, format!("{}/{name}", meta.namespace)),
        };
        let wanted: BTreeSet<Source> = references(pod).into_iter().map(source).collect();
        let mut messages = Vec::new();
        for (kind, key) in &wanted {
            let place = (*kind, meta.namespace.clone());
            if !self.watched.contains_key(&place) {
                // Watched first and read afterwards: what changes in between is told, at worst twice.
                let filter = Filter::parse(*kind, &meta.namespace, "", "")?;
                let changes = self.cache.subscribe(*kind, filter, self.cache.revision())?;
                self.watched.insert(place, changes);
            }
            if let Some(entry) = self.cache.get(*kind, key) {
                messages.extend(self.tell(*kind, &entry));
            }
        }
        if wanted.is_empty() {
            self.wanted.remove(&meta.uid);
        } else {
            self.wanted.insert(meta.uid.clone(), wanted);
        }
        Ok(messages)
    }

    /// A pod is gone; [`Sources::unneeded`] then says what goes with it.
    pub fn pod_gone(&mut self, uid: &str) {
        self.wanted.remove(uid);
    }

    /// What was told and is needed by no pod any more.
    pub fn unneeded(&mut self) -> Vec<EncodedMessage> {
        if self.told.is_empty() && self.watched.is_empty() {
            return Vec::new();
        }
        let wanted: BTreeSet<&Source> = self.wanted.values().flatten().collect();
        let gone: Vec<Source> = self.told.keys().filter(|source| !wanted.contains(source)).cloned().collect();
        self.watched.retain(|(kind, namespace), _| {
            wanted.iter().any(|(other, key)| other == kind && namespace_of(key) == namespace)
        });
        self.told.retain(|source, _| !gone.contains(source));
        gone.into_iter().map(|(kind, key)| gone_message(kind, &key)).collect()
    }

    /// The next changes of objects that are needed. Cancel safe, as [`Subscription::next`] is.
    pub async fn changed(&mut self) -> Result<Vec<EncodedMessage>, Cut> {
        if self.watched.is_empty() {
            return std::future::pending().await;
        }
        let (kind, deliveries) = {
            let waiting = self.watched.iter_mut().map(|((kind, _), changes)| {
                let kind = *kind;
                Box::pin(async move { changes.next().await.map(|deliveries| (kind, deliveries)) })
            });
            select_all(waiting).await.0?
        };
        Ok(deliveries.into_iter().filter_map(|delivery| self.change(kind, delivery)).collect())
    }

    fn change(&mut self, kind: Kind, delivery: Delivery) -> Option<EncodedMessage> {
        let entry = delivery.entry?;
        let source = (kind, entry.key.clone());
        if !self.wanted.values().any(|wanted| wanted.contains(&source)) {
            return None;
        }
        if delivery.kind == Type::Deleted {
            // Older than what was told: it was made again meanwhile.
            if self.told.get(&source).is_some_and(|told| *told > entry.revision) {
                return None;
            }
            return self.told.remove(&source).map(|_| gone_message(kind, &source.1));
        }
        self.tell(kind, &entry)
    }

    fn tell(&mut self, kind: Kind, entry: &Entry) -> Option<EncodedMessage> {
        let source = (kind, entry.key.clone());
        if self.told.get(&source).is_some_and(|told| *told >= entry.revision) {
            return None;
        }
        self.told.insert(source, entry.revision);
        let message = match &entry.object.kind {
            Some(object::Kind::ConfigMap(map)) => server_message::Message::ConfigMap(map.clone()),
            Some(object::Kind::Secret(secret)) => server_message::Message::Secret(secret.clone()),
            _ => return None,
        };
        Some(plain(message))
    }
}

fn namespace_of(key: &str) -> &str {
    key.split_once('/').map_or("", |(namespace, _)| namespace)
}

fn gone_message(kind: Kind, key: &str) -> EncodedMessage {
    let (namespace, name) = key.split_once('/').unwrap_or(("", key));
    let gone = SourceGone { kind: kind.name().to_owned(), namespace: namespace.to_owned(), name: name.to_owned() };
    plain(server_message::Message::SourceGone(gone))
}

fn plain(message: server_message::Message) -> EncodedMessage {
    EncodedMessage::Plain(Box::new(ServerMessage { message: Some(message) }))
}
