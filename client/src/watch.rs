//! A watch as the server sends it: one stream, from one revision, until it breaks. [`crate::cache`] resumes it.

use std::marker::PhantomData;

use minipod_proto::v1::{Object, WatchEvent, WatchRequest, watch_event};
use minipod_proto::{Kind, Resource};
use tonic::Streaming;

use crate::calls::{Query, typed};
use crate::client::{Client, objects_client};
use crate::error::{ClientError, Operation};
use crate::servers::Retry;

/// What happened to an object.
#[derive(Debug, Clone, PartialEq)]
pub enum ChangeKind<T> {
    /// It is new, or new to the selector.
    Added(T),
    /// It is different.
    Modified(T),
    /// It is gone, or does not match the selector any more; this was its last state.
    Deleted(T),
    /// Nothing: everything up to the revision has been sent.
    Bookmark,
}

/// One event of a watch.
#[derive(Debug, Clone, PartialEq)]
pub struct Change<T> {
    /// What happened.
    pub kind: ChangeKind<T>,
    /// The store's revision of it: resume from here.
    pub revision: i64,
}

/// An event about an object of a kind that is known at run time.
pub type ObjectChange = Change<Object>;

/// A running watch. Dropping it ends it.
#[derive(Debug)]
pub struct Watch<T> {
    stream: Streaming<WatchEvent>,
    operation: Operation,
    convert: fn(Object, &Operation) -> Result<T, ClientError>,
    kind: PhantomData<fn() -> T>,
}

impl<T> Watch<T> {
    /// The next event; `None` when the server ended the stream. Cancel safe: an event is not lost when the caller stops waiting.
    ///
    /// # Errors
    /// `Expired` when the revision was compacted away; anything else says that the stream broke.
    pub async fn next(&mut self) -> Result<Option<Change<T>>, ClientError> {
        match self.stream.message().await {
            Ok(Some(event)) => self.change(event).map(Some),
            Ok(None) => Ok(None),
            Err(status) => Err(ClientError::from_status(self.operation.clone(), &status)),
        }
    }

    fn change(&self, event: WatchEvent) -> Result<Change<T>, ClientError> {
        let wrong = |message: &str| ClientError::Answer { operation: self.operation.clone(), message: message.into() };
        let kind = watch_event::Type::try_from(event.r#type).unwrap_or(watch_event::Type::Unknown);
        if kind == watch_event::Type::Bookmark {
            return Ok(Change { kind: ChangeKind::Bookmark, revision: event.revision });
        }
        let object = event.object.ok_or_else(|| wrong("an event without object"))?;
        let object = (self.convert)(object, &self.operation)?;
        let kind = match kind {
            watch_event::Type::Added => ChangeKind::Added(object),
            watch_event::Type::Modified => ChangeKind::Modified(object),
            watch_event::Type::Deleted => ChangeKind::Deleted(object),
            watch_event::Type::Unknown | watch_event::Type::Bookmark => return Err(wrong("an event of unknown type")),
        };
        Ok(Change { kind, revision: event.revision })
    }
}

impl Client {
    /// Watches objects: events after `revision`; 0: the present objects as `Added`, a `Bookmark`, then changes.
    ///
    /// # Errors
    /// `Expired` when the revision was compacted away, `Invalid` for a bad selector, and what any call can meet.
    pub async fn watch<K: Resource>(&self, query: &Query, revision: i64) -> Result<Watch<K>, ClientError> {
        self.open_watch(K::KIND, query, revision, |object, operation| typed(object, || operation.clone())).await
    }

    /// As [`Client::watch`], for a kind that is known at run time.
    ///
    /// # Errors
    /// As [`Client::watch`].
    pub async fn watch_objects(&self, kind: Kind, query: &Query, revision: i64) -> Result<Watch<Object>, ClientError> {
        self.open_watch(kind, query, revision, |object, _| Ok(object)).await
    }

    async fn open_watch<T>(
        &self,
        kind: Kind,
        query: &Query,
        revision: i64,
        convert: fn(Object, &Operation) -> Result<T, ClientError>,
    ) -> Result<Watch<T>, ClientError> {
        let operation = Operation::new("watch", kind.plural());
        let request = WatchRequest {
            kind: kind.name().to_owned(),
            namespace: query.namespace.clone(),
            label_selector: query.labels.clone(),
            field_selector: query.fields.clone(),
            revision,
        };
        let call = |channel| {
            let request = request.clone();
            async move { objects_client(channel).watch(request).await }
        };
        let stream = self.call(operation.clone(), Retry::Always, call).await?;
        Ok(Watch { stream, operation, convert, kind: PhantomData })
    }
}
