//! All pods of the node: which there shall be, and a worker for each.
//!
//! One worker per uid; a pod that takes over the name of one that is still ending waits for that end, so that two
//! instances of a name never live on the node at the same time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use minipod_proto::v1::{Pod, PodGone};
use tokio::sync::watch;

use crate::want::{Uid, key_of};

/// What the API server wants of a pod; replaced as a whole, newest wins.
#[derive(Debug, Clone, PartialEq)]
pub struct Desired {
    /// The pod as it was last seen.
    pub pod: Arc<Pod>,
    /// It is not in the store any more: end it.
    pub gone: bool,
    /// This node has to end it.
    pub evicted: Option<Evicted>,
}

/// Why a pod is ended by its node, and how fast.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Evicted {
    /// status.message.
    pub message: String,
    /// How long its containers may take.
    pub grace_ms: u64,
}

impl Desired {
    /// The pod shall be there, now and for the time to come.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        !self.gone && self.pod.metadata.as_ref().is_some_and(|meta| meta.deletion_timestamp.is_none())
    }
}

/// Starts the worker of a pod. Its end must be told by [`Pods::ended`].
pub trait Spawn: Send + Sync {
    /// Begins to work on the pod.
    fn spawn(&self, uid: Uid, desired: watch::Receiver<Desired>);
}

/// The set of pods.
pub struct Pods {
    spawn: Box<dyn Spawn>,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    live: HashMap<Uid, Live>,
    /// Pods that wait for the end of another one of their name.
    parked: HashMap<Uid, Arc<Pod>>,
}

struct Live {
    key: (String, String),
    desired: watch::Sender<Desired>,
}

impl std::fmt::Debug for Pods {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pods").field("live", &self.lock().live.len()).finish_non_exhaustive()
    }
}

impl Pods {
    /// No pods yet.
    #[must_use]
    pub fn new(spawn: Box<dyn Spawn>) -> Self {
        Self { spawn, inner: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Exactly these pods shall be: others are ended.
    pub fn snapshot(&self, pods: Vec<Pod>) {
        let mut inner = self.lock();
        let wanted: Vec<Uid> = pods.iter().filter_map(Uid::of).collect();
        inner.parked.retain(|uid, _| wanted.contains(uid));
        for (uid, live) in &inner.live {
            if !wanted.contains(uid) {
                live.desired.send_if_modified(|desired| !std::mem::replace(&mut desired.gone, true));
            }
        }
        for pod in pods {
            self.put(&mut inner, pod);
        }
    }

    /// A pod is new or has changed.
    pub fn upsert(&self, pod: Pod) {
        self.put(&mut self.lock(), pod);
    }

    /// A pod is not in the store any more.
    pub fn gone(&self, gone: &PodGone) {
        let Some(uid) = Uid::parse(&gone.uid) else { return };
        let mut inner = self.lock();
        inner.parked.remove(&uid);
        if let Some(live) = inner.live.get(&uid) {
            live.desired.send_if_modified(|desired| !std::mem::replace(&mut desired.gone, true));
        }
    }

    /// A pod that was found on this node at start; the next snapshot says whether it stays.
    pub fn adopt(&self, uid: Uid, desired: Desired) {
        let mut inner = self.lock();
        if !inner.live.contains_key(&uid) {
            self.begin(&mut inner, uid, desired);
        }
    }

    /// The worker of a pod is through: nothing of the pod is left. A pod that is wanted after all (its state on this
    /// node was of no use) begins anew.
    pub fn ended(&self, uid: &Uid) {
        let mut inner = self.lock();
        let Some(ended) = inner.live.remove(uid) else { return };
        let desired = ended.desired.borrow().clone();
        if desired.is_wanted() {
            self.begin(&mut inner, uid.clone(), desired);
            return;
        }
        let heir = inner.parked.iter().find(|(_, pod)| key_of(pod) == ended.key).map(|(uid, _)| uid.clone());
        if let Some(heir) = heir
            && let Some(pod) = inner.parked.remove(&heir)
        {
            self.begin(&mut inner, heir, Desired { pod, gone: false, evicted: None });
        }
    }

    /// The node cannot keep the pod: it fails, with this message.
    pub fn evict(&self, uid: &Uid, message: &str, grace_ms: u64) {
        if let Some(live) = self.lock().live.get(uid) {
            live.desired.send_if_modified(|desired| {
                let news = desired.evicted.is_none();
                desired.evicted.get_or_insert_with(|| Evicted { message: message.to_owned(), grace_ms });
                news
            });
        }
    }

    /// Pods that run on and whose end would free something.
    #[must_use]
    pub fn evictable(&self) -> Vec<(Uid, Arc<Pod>)> {
        let inner = self.lock();
        let all = inner.live.iter().map(|(uid, live)| (uid, live.desired.borrow().clone()));
        let stays = |desired: &Desired| desired.evicted.is_none() && desired.is_wanted() && !desired.pod.is_terminal();
        all.filter(|(_, desired)| stays(desired)).map(|(uid, desired)| (uid.clone(), desired.pod)).collect()
    }

    /// The pod as it was last seen, if it is on this node.
    #[must_use]
    pub fn get(&self, uid: &Uid) -> Option<Arc<Pod>> {
        self.lock().live.get(uid).map(|live| live.desired.borrow().pod.clone())
    }

    /// Uids of pods with a worker, and of those that wait for their name.
    #[must_use]
    pub fn uids(&self) -> Vec<Uid> {
        let inner = self.lock();
        inner.live.keys().chain(inner.parked.keys()).cloned().collect()
    }

    /// Pods with a worker.
    #[must_use]
    pub fn count(&self) -> usize {
        self.lock().live.len()
    }

    /// Whether the pod has a worker, or waits for its name.
    #[must_use]
    pub fn has(&self, uid: &Uid) -> bool {
        let inner = self.lock();
        inner.live.contains_key(uid) || inner.parked.contains_key(uid)
    }

    fn put(&self, inner: &mut Inner, pod: Pod) {
        let Some(uid) = Uid::of(&pod) else {
            tracing::error!(pod = ?key_of(&pod), "the API server sent a pod without a usable uid");
            return;
        };
        let pod = Arc::new(pod);
        if let Some(live) = inner.live.get(&uid) {
            live.desired.send_if_modified(|desired| {
                let newer = Desired { pod, gone: false, evicted: desired.evicted.clone() };
                let changed = *desired != newer;
                *desired = newer;
                changed
            });
            return;
        }
        let key = key_of(&pod);
        if inner.live.values().any(|live| live.key == key) {
            inner.parked.insert(uid, pod);
            return;
        }
        self.begin(inner, uid, Desired { pod, gone: false, evicted: None });
    }

    fn begin(&self, inner: &mut Inner, uid: Uid, desired: Desired) {
        let key = key_of(&desired.pod);
        let (sender, receiver) = watch::channel(desired);
        inner.live.insert(uid.clone(), Live { key, desired: sender });
        self.spawn.spawn(uid, receiver);
    }
}

#[cfg(test)]
mod tests {
    use minipod_proto::v1::ObjectMeta;

    use super::*;

    type Spawned = Arc<Mutex<Vec<(String, watch::Receiver<Desired>)>>>;

    struct Recorder(Spawned);

    impl Spawn for Recorder {
        fn spawn(&self, uid: Uid, desired: watch::Receiver<Desired>) {
            self.0.lock().expect("lock").push((uid.0, desired));
        }
    }

    fn pod(name: &str, uid: &str) -> Pod {
        let meta = ObjectMeta { name: name.into(), namespace: "d".into(), uid: uid.into(), ..ObjectMeta::default() };
        Pod { metadata: Some(meta), ..Pod::default() }
    }

    fn pods() -> (Pods, Spawned) {
        let spawned = Spawned::default();
        (Pods::new(Box::new(Recorder(spawned.clone()))), spawned)
    }

    fn uids(spawned: &Spawned) -> Vec<String> {
        spawned.lock().expect("lock").iter().map(|(uid, _)| uid.clone()).collect()
    }

    #[test]
    fn what_is_not_in_the_snapshot_is_ended() {
        let (pods, spawned) = pods();
        pods.snapshot(vec![pod("a", "1"), pod("b", "2")]);
        pods.snapshot(vec![pod("b", "2")]);
        let gone: Vec<bool> = spawned.lock().expect("lock").iter().map(|(_, desired)| desired.borrow().gone).collect();
        assert_eq!((uids(&spawned), gone), (vec!["1".into(), "2".into()], vec![true, false]));
    }

    #[test]
    fn a_name_waits_for_the_end_of_its_former_pod() {
        let (pods, spawned) = pods();
        pods.upsert(pod("a", "1"));
        pods.snapshot(vec![pod("a", "2")]);
        assert_eq!(uids(&spawned), ["1"]);
        assert!(spawned.lock().expect("lock")[0].1.borrow().gone);
        pods.ended(&Uid("1".into()));
        assert_eq!(uids(&spawned), ["1", "2"]);
        assert_eq!(pods.count(), 1);
    }

    #[test]
    fn a_waiting_pod_that_goes_is_never_begun() {
        let (pods, spawned) = pods();
        pods.upsert(pod("a", "1"));
        pods.upsert(pod("a", "2"));
        for uid in ["2", "1"] {
            pods.gone(&PodGone { uid: uid.into(), ..PodGone::default() });
        }
        pods.ended(&Uid("1".into()));
        assert_eq!(uids(&spawned), ["1"]);
    }

    #[test]
    fn a_pod_whose_remains_were_removed_begins_anew_when_it_is_wanted() {
        let (pods, spawned) = pods();
        pods.adopt(Uid("1".into()), Desired { pod: Arc::new(pod("1", "1")), gone: true, evicted: None });
        pods.snapshot(vec![pod("a", "1")]);
        pods.ended(&Uid("1".into()));
        assert_eq!(uids(&spawned), ["1", "1"]);
    }

    #[test]
    fn a_repeated_upsert_wakes_nobody() {
        let (pods, spawned) = pods();
        pods.upsert(pod("a", "1"));
        pods.upsert(pod("a", "1"));
        assert!(!spawned.lock().expect("lock")[0].1.has_changed().expect("sender lives"));
        pods.upsert(pod("../b", "not/a/uid"));
        assert_eq!(pods.count(), 1);
    }
}
