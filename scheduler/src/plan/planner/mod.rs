//! Which pod is next, what is proposed for it, and what becomes of pods that wait. Pure: time comes as a number.
//!
//! ```text
//!            observe                       plan                       resolve
//!  new pod ───────────▶ ready ──decide──▶ in flight ──bound──▶ (the watch confirms)
//!                        ▲  │                 │
//!                        │  └─no node──▶ waiting (by class)     │
//!                        │                 │                    │
//!                        └──it may fit now─┘◀──delayed◀─conflict┘
//! ```
//!
//! Pods wait by class: when something changes, one pod of each class is tried and, if it fails, answers for the others.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

mod claims;
mod gang;
mod patience;
mod questions;

use self::claims::{Claim, Cleared, PREEMPT_MS};
use self::gang::{Gang, GangKey};
use super::core::{Core, Event};
use super::needs::PodInfo;
use super::{PodId, Profile};

pub use claims::{Eviction, Nominee, Victim};
pub use questions::{Inquiry, Progress, Standing};

/// Bindings in one request: with a pod and a ledger key each they stay well within what a store commits at once, and one round
/// trip is spread over many pods.
pub const BATCH: usize = 256;
/// Pods whose message is reported in one call of `plan`.
const REPORTS: usize = 256;
/// First and longest delay after a conflict, milliseconds.
const DELAY_MS: (i64, i64) = (10, 5_000);
/// A binding that nothing has confirmed after this long is tried again, milliseconds: the transaction makes that harmless.
const CONFIRM_MS: i64 = 30_000;
/// An explanation is renewed at the most this often while a pod waits, milliseconds.
const EXPLAIN_MS: i64 = 5_000;

/// Nodes that are looked at for explanations in one call of `plan`, some milliseconds' worth; one class is explained whatever it takes.
const EXPLAIN_NODES: usize = 10_000;

/// How a scheduler differs from others.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Pods with this `schedulerName` are its own.
    pub name: String,
    /// Of its own pods only those of this shard (index, number of shards): by group, so that one scheduler has all of a gang, else
    /// by uid.
    pub shard: (u32, u32),
    /// Which nodes are preferred.
    pub profile: Profile,
    /// Whoever has waited this long gets nodes held for it, milliseconds.
    pub hold_after_ms: i64,
}

/// A proposal: this pod to that node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// metadata.namespace.
    pub namespace: String,
    /// metadata.name.
    pub pod: Arc<str>,
    /// metadata.uid.
    pub uid: Arc<str>,
    /// The revision that the decision was made on.
    pub revision: i64,
    /// Name of the node.
    pub node: String,
}

/// Why a pod waits, for its condition and an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// metadata.namespace.
    pub namespace: String,
    /// metadata.name.
    pub pod: Arc<str>,
    /// metadata.uid.
    pub uid: Arc<str>,
    /// Reason of the condition.
    pub reason: &'static str,
    /// In words.
    pub message: String,
    /// The nomination (status.nominatedNodeName) that is no longer true; empty: there is none to take back.
    pub outdated: String,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Bind these, each for itself.
    Bind(Vec<Binding>),
    /// Bind all of these, or none.
    BindAll(Vec<Binding>),
    /// End these, so that another fits.
    Evict(Eviction),
    /// Tell why these wait.
    Report(Vec<Report>),
}

/// What became of a proposal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The pod is bound where it was proposed.
    Bound,
    /// The pod is bound elsewhere, gone or changed: the watch tells, or has told.
    Overtaken,
    /// The node would not take it; the snapshot was old.
    Refused,
    /// Nothing is known.
    Unknown,
}

/// Order of pods: priority, then age.
type Turn = (Reverse<i32>, i64, Arc<str>);

#[derive(Debug)]
struct Waiting {
    turns: BTreeSet<Turn>,
    /// When its explanation may be made anew.
    explain_at_ms: i64,
    /// A pod has joined since the last explanation.
    joined: bool,
    message: Arc<str>,
    /// Preemption is not tried before.
    preempt_at_ms: i64,
}

#[derive(Debug, Clone, Copy)]
struct Delayed {
    until_ms: i64,
    failures: u32,
}

/// Decides what this scheduler does.
pub struct Planner {
    settings: Settings,
    core: Core,
    ready: BTreeSet<Turn>,
    waiting: BTreeMap<u32, Waiting>,
    /// Proposed and not confirmed, with the time at which that becomes doubtful.
    in_flight: HashMap<Arc<str>, i64>,
    /// None of those becomes doubtful before: thousands are in flight, and they are looked through when that has come.
    doubt_ms: i64,
    delayed: HashMap<Arc<str>, Delayed>,
    /// What was last reported of a pod.
    reported: HashMap<Arc<str>, Arc<str>>,
    /// What is to be reported beside the explanations of classes.
    untold: BTreeMap<Arc<str>, Arc<str>>,
    /// Since when a pod has found no place.
    waits_since: HashMap<Arc<str>, i64>,
    /// Pods that wait for their victims to leave.
    claims: HashMap<Arc<str>, Claim>,
    /// Pods whose nomination may not be true any more: what it was when that was looked at; `None`: they had a claim that has ended.
    outdated: HashMap<Arc<str>, Option<Arc<str>>>,
    gangs: HashMap<GangKey, Gang>,
    hold_check_ms: i64,
    hold_until_ms: i64,
    /// How far the held nodes were free at the best, and since when.
    hold_progress: i64,
    hold_moved_ms: i64,
    /// Something has happened since the waiting classes were last tried.
    changed: bool,
    /// The core's generation that the numbers of classes are from.
    generation: u64,
}

impl Planner {
    /// A planner that knows nothing yet.
    pub fn new(settings: Settings) -> Planner {
        let core = Core::new(settings.profile);
        Planner {
            settings,
            core,
            ready: BTreeSet::new(),
            waiting: BTreeMap::new(),
            in_flight: HashMap::new(),
            doubt_ms: 0,
            delayed: HashMap::new(),
            reported: HashMap::new(),
            untold: BTreeMap::new(),
            waits_since: HashMap::new(),
            claims: HashMap::new(),
            outdated: HashMap::new(),
            gangs: HashMap::new(),
            hold_check_ms: 0,
            hold_until_ms: 0,
            hold_progress: 0,
            hold_moved_ms: 0,
            changed: false,
            generation: 0,
        }
    }

    /// The cluster as it is known.
    pub fn core(&self) -> &Core {
        &self.core
    }

    /// Pods that are ready, that wait, and that are in flight.
    pub fn counts(&self) -> (usize, usize, usize) {
        let waiting = self.waiting.values().map(|waiting| waiting.turns.len()).sum();
        (self.ready.len() + self.delayed.len(), waiting, self.in_flight.len())
    }

    /// Takes over what has happened.
    pub fn observe(&mut self, event: Event) {
        self.changed = true;
        match event {
            Event::Pod(info) => self.observe_pod(info),
            Event::PodGone(uid) => {
                self.drop_pod(&uid);
                if let Some(info) = self.core.pod_id(&uid).and_then(|pod| self.core.pod(pod)).cloned() {
                    self.discharge(&info);
                }
                self.core.apply(Event::PodGone(Arc::clone(&uid)));
                self.victim_gone(&uid);
            }
            other => self.core.apply(other),
        }
        self.refile();
    }

    /// When the core has numbered its classes anew, waiting pods are filed anew.
    fn refile(&mut self) {
        if self.generation == self.core.generation() {
            return;
        }
        self.generation = self.core.generation();
        for (_, old) in std::mem::take(&mut self.waiting) {
            for turn in old.turns {
                if let Some(pod) = self.core.pod_id(&turn.2) {
                    self.park(pod, old.explain_at_ms);
                }
            }
        }
    }

    fn observe_pod(&mut self, info: PodInfo) {
        let uid = Arc::clone(&info.uid);
        let mine = self.is_mine(&info) && info.node.is_none() && !info.terminal && !info.terminating;
        if !mine {
            self.drop_pod(&uid);
            match (info.terminal, info.node.is_some()) {
                (false, true) => self.enlist(&info, true),
                _ => self.discharge(&info),
            }
            let terminal = info.terminal;
            self.core.apply(Event::Pod(info));
            if terminal {
                self.victim_gone(&uid);
            }
            self.heed_nomination(&uid);
            return;
        }
        let before = self.core.pod_id(&uid).and_then(|pod| self.core.pod(pod));
        let same = before.is_some_and(|before| {
            (&before.needs, &before.gates, &before.group) == (&info.needs, &info.gates, &info.group)
        });
        let before = before.filter(|_| !same).cloned();
        let placed = self.core.pod_id(&uid).is_some_and(|pod| self.core.place_of(pod).is_some());
        if !same {
            self.unqueue(&uid);
        }
        if let Some(before) = before {
            self.discharge(&before);
        }
        let gated = !info.gates.is_empty();
        let turn = turn(&info);
        self.core.apply(Event::Pod(info));
        // Its own condition comes back by the watch: that is no reason to try again.
        if !same && !placed && !gated {
            self.delayed.remove(&uid);
            if let Some(info) = self.core.pod_id(&uid).and_then(|pod| self.core.pod(pod)).cloned() {
                self.enlist(&info, false);
            }
            self.ready.insert(turn);
        }
    }

    /// A pod that is not this scheduler's and waits for its place to be cleared counts there.
    fn heed_nomination(&mut self, uid: &str) {
        let Some(pod) = self.core.pod_id(uid) else { return };
        let Some(info) = self.core.pod(pod) else { return };
        let waits = info.node.is_none() && !info.terminating;
        let wanted = info.nominated.as_ref().filter(|_| waits).and_then(|name| self.core.node_id(name));
        let has = self.core.place_of(pod).filter(|_| self.core.is_promised(pod));
        if has == wanted {
            return;
        }
        if has.is_some() {
            self.core.forget(pod);
        }
        if let Some(node) = wanted {
            self.core.promise(pod, node);
        }
    }

    fn is_mine(&self, info: &PodInfo) -> bool {
        let (index, shards) = self.settings.shard;
        *info.scheduler == *self.settings.name && (shards <= 1 || shard_of(info, shards) == index)
    }

    /// Forgets everything about a pod but what the core knows.
    fn drop_pod(&mut self, uid: &str) {
        self.unqueue(uid);
        self.in_flight.remove(uid);
        self.claims.remove(uid);
        self.outdated.remove(uid);
        self.reported.remove(uid);
        self.untold.remove(uid);
        self.waits_since.remove(uid);
    }

    fn unqueue(&mut self, uid: &str) {
        self.delayed.remove(uid);
        let Some(pod) = self.core.pod_id(uid) else { return };
        let (Some(info), Some(class)) = (self.core.pod(pod), self.core.class_of(pod)) else { return };
        let turn = turn(info);
        self.ready.remove(&turn);
        if let Some(waiting) = self.waiting.get_mut(&class) {
            waiting.turns.remove(&turn);
            if waiting.turns.is_empty() {
                self.waiting.remove(&class);
            }
        }
    }

    /// What to do now, with at most `room` bindings. Nothing of it is repeated by the next call.
    pub fn plan(&mut self, now_ms: i64, room: usize) -> Vec<Step> {
        self.expire(now_ms);
        self.expire_claims(now_ms);
        self.manage_hold(now_ms);
        self.wake(now_ms);
        let (mut bindings, mut steps) = (Vec::new(), Vec::new());
        // Pods that find no place count too, so that events are looked at in between.
        for _ in 0..room {
            let Some((_, _, uid)) = self.ready.pop_first() else { break };
            let Some(pod) = self.core.pod_id(&uid) else { continue };
            if let Some(gang) = self.core.pod(pod).and_then(gang::key) {
                steps.extend(self.place_gang(&gang, now_ms, &mut bindings));
                continue;
            }
            self.redeem(&uid);
            match self.find_place(pod) {
                Some(node) => bindings.extend(self.propose(pod, node, now_ms)),
                None => match self.try_preempt(pod, now_ms) {
                    Cleared::Evict(step) => steps.push(step),
                    Cleared::Waits => {}
                    Cleared::No => self.park(pod, now_ms),
                },
            }
        }
        steps.extend(bindings.chunks(BATCH).map(|chunk| Step::Bind(chunk.to_vec())));
        let reports = self.reports(now_ms);
        if !reports.is_empty() {
            steps.push(Step::Report(reports));
        }
        steps
    }

    /// When `plan` has something to do without an event: now, or when a delay or a doubt ends; `None`: never.
    pub fn due_ms(&self, now_ms: i64) -> Option<i64> {
        if !self.ready.is_empty() {
            return Some(now_ms);
        }
        let delays = self.delayed.values().map(|delayed| delayed.until_ms);
        let doubts = (!self.in_flight.is_empty()).then_some(self.doubt_ms);
        let reports = self.waiting.values().map(|waiting| waiting.explain_at_ms);
        let claims = self.claims.values().map(|claim| claim.until_ms);
        let gangs = self.gangs.values().filter_map(Gang::due_ms);
        delays.chain(doubts).chain(reports).chain(claims).chain(gangs).min()
    }

    fn propose(&mut self, pod: PodId, node: u32, now_ms: i64) -> Option<Binding> {
        self.core.assume(pod, node);
        let info = self.core.pod(pod)?;
        let binding = Binding {
            namespace: info.namespace().to_owned(),
            pod: Arc::clone(&info.name),
            uid: Arc::clone(&info.uid),
            revision: info.revision,
            node: self.core.node_name(node).to_owned(),
        };
        if info.group.is_some() {
            let info = info.clone();
            self.enlist(&info, true);
        }
        self.doubt_from(Arc::clone(&binding.uid), now_ms + CONFIRM_MS);
        self.waits_since.remove(&binding.uid);
        self.untold.remove(&binding.uid);
        // It has gone well for this one: the next of its class may fit as well.
        if let Some(class) = self.core.class_of(pod) {
            self.wake_one(class, now_ms);
        }
        Some(binding)
    }

    /// Notes a proposal that becomes doubtful then.
    fn doubt_from(&mut self, uid: Arc<str>, at_ms: i64) {
        self.doubt_ms = if self.in_flight.is_empty() { at_ms } else { self.doubt_ms.min(at_ms) };
        self.in_flight.insert(uid, at_ms);
    }

    fn park(&mut self, pod: PodId, now_ms: i64) {
        let (Some(info), Some(class)) = (self.core.pod(pod), self.core.class_of(pod)) else { return };
        let turn = turn(info);
        let waiting = self.waiting.entry(class).or_insert_with(|| Waiting {
            turns: BTreeSet::new(),
            explain_at_ms: now_ms,
            joined: false,
            message: "".into(),
            preempt_at_ms: 0,
        });
        waiting.joined |= !self.reported.contains_key(&turn.2);
        waiting.preempt_at_ms = now_ms + PREEMPT_MS;
        self.waits_since.entry(Arc::clone(&turn.2)).or_insert(now_ms);
        waiting.turns.insert(turn);
    }

    /// Tries one pod of each waiting class if anything has happened.
    fn wake(&mut self, now_ms: i64) {
        let changed = std::mem::take(&mut self.changed);
        self.wake_gangs(changed, now_ms);
        if !changed {
            return;
        }
        let classes: Vec<u32> = self.waiting.keys().copied().collect();
        for class in classes {
            self.wake_one(class, now_ms);
        }
    }

    /// Moves the first pod of a waiting class to the ready ones, if it would find a place now or may preempt.
    fn wake_one(&mut self, class: u32, now_ms: i64) {
        let Some(waiting) = self.waiting.get_mut(&class) else { return };
        let Some((_, _, uid)) = waiting.turns.first() else { return };
        let Some(pod) = self.core.pod_id(uid) else { return };
        let may_preempt = waiting.preempt_at_ms <= now_ms && self.core.may_preempt(pod);
        if !may_preempt && self.core.decide(pod).is_none() {
            return;
        }
        if let Some(turn) = waiting.turns.pop_first() {
            self.ready.insert(turn);
        }
        if waiting.turns.is_empty() {
            self.waiting.remove(&class);
        }
    }

    /// What has become of a proposal.
    pub fn resolve(&mut self, uid: &str, outcome: Outcome, now_ms: i64) {
        if !self.in_flight.contains_key(uid) {
            return;
        }
        match outcome {
            // The doubt stays: should the event that confirms it never come, it is tried again.
            Outcome::Bound => {
                self.delayed.remove(uid);
            }
            Outcome::Unknown => {
                self.doubt_from(uid.into(), now_ms + DELAY_MS.1);
            }
            Outcome::Overtaken | Outcome::Refused => self.give_back(uid, now_ms),
        }
    }

    /// Has a pod told why the API server would not have it where it was proposed.
    pub fn tell_refusal(&mut self, uid: &str, why: &str) {
        let waits = self.core.pod_id(uid).filter(|pod| self.core.place_of(*pod).is_none());
        if let Some(info) = waits.and_then(|pod| self.core.pod(pod)) {
            let message = format!("pods that were bound meanwhile stand against the decision, it is made anew: {why}");
            self.tell_later(Arc::clone(&info.uid), &message.into());
        }
    }

    /// Takes an assumption back and has the pod tried again after a delay that grows with each failure.
    fn give_back(&mut self, uid: &str, now_ms: i64) {
        self.in_flight.remove(uid);
        let Some(pod) = self.core.pod_id(uid) else { return };
        self.core.forget(pod);
        self.changed = true;
        if self.core.place_of(pod).is_some() {
            return;
        }
        if let Some(info) = self.core.pod(pod).filter(|info| info.group.is_some()).cloned() {
            self.enlist(&info, false);
        }
        let failures = self.delayed.get(uid).map_or(0, |delayed| delayed.failures);
        let delay = DELAY_MS.0.checked_shl(failures.min(20)).unwrap_or(DELAY_MS.1).min(DELAY_MS.1);
        self.delayed.insert(uid.into(), Delayed { until_ms: now_ms + delay, failures: failures + 1 });
    }

    fn expire(&mut self, now_ms: i64) {
        if self.doubt_ms <= now_ms {
            let doubtful = self.in_flight.iter().filter(|(_, until)| **until <= now_ms);
            let doubtful: Vec<Arc<str>> = doubtful.map(|(uid, _)| Arc::clone(uid)).collect();
            for uid in doubtful {
                self.give_back(&uid, now_ms);
            }
            self.doubt_ms = self.in_flight.values().copied().min().unwrap_or(i64::MAX);
        }
        // The entry stays for its count of failures until the pod is bound; only its time is taken away.
        for (uid, delayed) in &mut self.delayed {
            if delayed.until_ms <= now_ms {
                delayed.until_ms = i64::MAX;
                let pod = self.core.pod_id(uid).filter(|pod| self.core.place_of(*pod).is_none());
                if let Some(info) = pod.and_then(|pod| self.core.pod(pod)) {
                    self.ready.insert(turn(info));
                }
            }
        }
    }

    /// Has a pod told something when there is room, unless it was told that last.
    fn tell_later(&mut self, uid: Arc<str>, message: &Arc<str>) {
        if self.reported.get(&uid) != Some(message) {
            self.untold.insert(uid, Arc::clone(message));
        }
    }

    fn make_report(&mut self, uid: &Arc<str>, message: &Arc<str>) -> Option<Report> {
        let outdated = self.outdated_nomination(uid);
        let info = self.core.pod_id(uid).and_then(|pod| self.core.pod(pod))?;
        self.reported.insert(Arc::clone(uid), Arc::clone(message));
        Some(Report {
            namespace: info.namespace().to_owned(),
            pod: Arc::clone(&info.name),
            uid: Arc::clone(uid),
            reason: "Unschedulable",
            message: message.to_string(),
            outdated,
        })
    }

    /// The nomination of a pod that has no claim any more. One that this planner knows nothing of may be another scheduler's that has
    /// not ended the victims yet: it is taken back only when it is still there the next time.
    fn outdated_nomination(&mut self, uid: &Arc<str>) -> String {
        let info = self.core.pod_id(uid).and_then(|pod| self.core.pod(pod));
        let Some(nominated) = info.and_then(|info| info.nominated.clone()) else {
            self.outdated.remove(uid);
            return String::new();
        };
        if self.claims.contains_key(uid) {
            return String::new();
        }
        match self.outdated.insert(Arc::clone(uid), Some(Arc::clone(&nominated))) {
            Some(None) => nominated.to_string(),
            Some(Some(before)) if before == nominated => nominated.to_string(),
            _ => String::new(),
        }
    }

    /// Classes whose explanation is made now: of those that are due the longest, as many as one call may look at nodes for.
    fn to_explain(&self, now_ms: i64) -> BTreeSet<u32> {
        let due = self.waiting.iter().filter(|(_, waiting)| waiting.explain_at_ms <= now_ms);
        let mut due: Vec<(i64, u32)> = due.map(|(class, waiting)| (waiting.explain_at_ms, *class)).collect();
        due.sort_unstable();
        due.truncate((EXPLAIN_NODES / self.core.node_count().max(1)).max(1));
        due.into_iter().map(|(_, class)| class).collect()
    }

    /// Explanations for classes that have begun to wait or have waited on, and what else is to be told.
    fn reports(&mut self, now_ms: i64) -> Vec<Report> {
        let mut tell: Vec<(Arc<str>, Arc<str>)> = Vec::new();
        let untold: Vec<Arc<str>> = self.untold.keys().take(REPORTS).cloned().collect();
        for uid in untold {
            tell.extend(self.untold.remove_entry(&uid));
        }
        let explained = self.to_explain(now_ms);
        for (class, waiting) in &mut self.waiting {
            let due = explained.contains(class);
            if tell.len() >= REPORTS || !(due || (waiting.joined && !waiting.message.is_empty())) {
                continue;
            }
            let first = waiting.turns.first().and_then(|(_, _, uid)| self.core.pod_id(uid));
            let Some(first) = first else { continue };
            if due {
                waiting.message = self.core.explain(first).to_string().into();
                waiting.explain_at_ms = now_ms + EXPLAIN_MS;
            }
            waiting.joined = false;
            let nominated = |uid: &str| {
                let info = self.core.pod_id(uid).and_then(|pod| self.core.pod(pod));
                info.is_some_and(|info| info.nominated.is_some())
            };
            let news = waiting
                .turns
                .iter()
                .filter(|(_, _, uid)| self.reported.get(uid) != Some(&waiting.message) || (due && nominated(uid)));
            for (_, _, uid) in news {
                if tell.len() >= REPORTS {
                    waiting.joined = true;
                    break;
                }
                tell.push((Arc::clone(uid), Arc::clone(&waiting.message)));
            }
        }
        tell.iter().filter_map(|(uid, message)| self.make_report(uid, message)).collect()
    }
}

fn turn(info: &PodInfo) -> Turn {
    (Reverse(info.needs.priority), info.created_ms, Arc::clone(&info.uid))
}

/// Which of the shards a pod belongs to. All of a group are in one: no two schedulers may each see half a gang.
fn shard_of(info: &PodInfo, shards: u32) -> u32 {
    match gang::key(info) {
        Some((namespace, name)) => shard(&format!("{namespace}/{name}"), shards),
        None => shard(&info.uid, shards),
    }
}

/// FNV-1a: the same in every scheduler and every build.
fn shard(text: &str, shards: u32) -> u32 {
    let hash = text
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    (hash % u64::from(shards)) as u32
}
