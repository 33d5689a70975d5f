//! One watch: what it wants to see, the queue in front of it, and how it ends.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use minipod_proto::{
    Kind,
    selector::{FieldSelector, LabelSelector},
    v1::watch_event::Type,
};
use tokio::sync::mpsc;

use super::{Cache, Entry, state::Change};
use crate::error::ApiError;

/// Which objects are meant.
#[derive(Debug, Clone)]
pub struct Filter {
    /// Empty: all.
    pub namespace: String,
    /// By labels.
    pub labels: LabelSelector,
    /// By fields.
    pub fields: FieldSelector,
}

impl Filter {
    /// From the texts of a request.
    ///
    /// # Errors
    /// When a selector is wrong.
    pub fn parse(kind: Kind, namespace: &str, labels: &str, fields: &str) -> Result<Filter, ApiError> {
        crate::keys::check_range(kind, namespace)?;
        let labels = LabelSelector::parse(labels).map_err(|e| ApiError::Invalid(format!("labelSelector: {e}")))?;
        let fields =
            FieldSelector::parse(kind, fields).map_err(|e| ApiError::Invalid(format!("fieldSelector: {e}")))?;
        Ok(Filter { namespace: namespace.to_owned(), labels, fields })
    }

    /// Everything of a kind.
    ///
    /// # Errors
    /// Never; the selectors are empty.
    pub fn everything(kind: Kind) -> Result<Filter, ApiError> {
        Filter::parse(kind, "", "", "")
    }

    /// Whether an object is meant.
    pub fn matches(&self, entry: &Entry) -> bool {
        (self.namespace.is_empty() || self.namespace == entry.namespace())
            && (self.labels.is_everything() || self.labels.matches(&entry.object.meta().labels))
            && (self.fields.is_everything() || self.fields.matches(&entry.object))
    }

    /// The one node whose pods are meant, if it is so.
    pub(super) fn node(&self) -> Option<&str> {
        self.fields.exact("spec.nodeName").filter(|node| !node.is_empty())
    }
}

/// One event as a watcher gets it.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// As this watcher sees it: an object that begins to match is ADDED to it.
    pub kind: Type,
    /// The object; `None` for a bookmark.
    pub entry: Option<Arc<Entry>>,
    /// Where to resume after this event. Of the events of one transaction only the last one tells the transaction's revision, the
    /// others the one before: a stream that breaks among them is resumed before all of them. 0 before the first bookmark.
    pub revision: i64,
}

/// Why a watch was ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cut {
    /// It did not keep up; everything up to this revision was delivered.
    Slow {
        /// Resume from here.
        resume: i64,
    },
    /// The changes are not known without a gap.
    Relisted {
        /// The oldest revision that can be resumed from.
        oldest: i64,
    },
}

impl From<Cut> for ApiError {
    fn from(cut: Cut) -> ApiError {
        match cut {
            Cut::Slow { resume } => ApiError::Stalled(resume),
            Cut::Relisted { oldest } => expired(oldest),
        }
    }
}

pub(super) fn expired(oldest: i64) -> ApiError {
    ApiError::Expired(format!("the changes are no longer kept; list again (the oldest resumable revision is {oldest})"))
}

/// The event that a change is to a watcher; `None` when it does not concern it.
pub(super) fn seen(filter: &Filter, change: &Change) -> Option<(Type, Arc<Entry>)> {
    let before = change.before.as_ref().filter(|entry| filter.matches(entry));
    let after = change.after.as_ref().filter(|entry| filter.matches(entry));
    match (before, after) {
        (None, None) => None,
        (None, Some(after)) => Some((Type::Added, Arc::clone(after))),
        (Some(_), Some(after)) => Some((Type::Modified, Arc::clone(after))),
        // It ceased to match: what is told is its state now, or its last one if it is gone.
        (Some(_), None) => Some((Type::Deleted, Arc::clone(change.last()))),
    }
}

/// Makes the deliveries of one transaction resumable, see [`Delivery::revision`].
pub(super) fn seal(deliveries: &mut [Delivery], revision: i64) {
    let count = deliveries.len();
    for (position, delivery) in deliveries.iter_mut().enumerate() {
        delivery.revision = if position + 1 == count { revision } else { revision - 1 };
    }
}

/// The dispatcher's side.
pub(super) struct Watcher {
    pub filter: Filter,
    /// Changes up to here are not for it.
    pub from: i64,
    /// The last revision that was queued completely.
    pub delivered: i64,
    pub queue: mpsc::Sender<Vec<Delivery>>,
    pub end: Arc<Mutex<Option<Cut>>>,
}

impl Watcher {
    /// Queues the deliveries of one transaction; false: the watcher is to be removed.
    pub fn offer(&mut self, deliveries: Vec<Delivery>, revision: i64) -> bool {
        match self.queue.try_send(deliveries) {
            Ok(()) => {
                self.delivered = revision;
                true
            }
            Err(mpsc::error::TrySendError::Full(_)) => {
                self.cut(Cut::Slow { resume: self.delivered });
                false
            }
            // Nobody listens any more; its subscription is just being dropped.
            Err(mpsc::error::TrySendError::Closed(_)) => false,
        }
    }

    pub fn cut(&self, cut: Cut) {
        *self.end.lock().unwrap_or_else(PoisonError::into_inner) = Some(cut);
    }
}

/// The reader's side. Dropping it ends the watch.
pub struct Subscription {
    pub(super) cache: Arc<Cache>,
    pub(super) kind: Kind,
    pub(super) id: u64,
    pub(super) backlog: VecDeque<Vec<Delivery>>,
    pub(super) queue: mpsc::Receiver<Vec<Delivery>>,
    pub(super) end: Arc<Mutex<Option<Cut>>>,
    /// The revision of the cache when the watch began: with revision 0, that of the present objects.
    pub revision: i64,
}

impl Subscription {
    /// The next events, those of one transaction together. Cancel safe.
    ///
    /// # Errors
    /// When the watch was cut; everything that was queued before has been delivered.
    pub async fn next(&mut self) -> Result<Vec<Delivery>, Cut> {
        if let Some(deliveries) = self.backlog.pop_front() {
            return Ok(deliveries);
        }
        match self.queue.recv().await {
            Some(deliveries) => Ok(deliveries),
            None => {
                let cut = self.end.lock().unwrap_or_else(PoisonError::into_inner).clone();
                Err(cut.unwrap_or(Cut::Slow { resume: self.revision }))
            }
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.cache.unsubscribe(self.kind, self.id);
    }
}
