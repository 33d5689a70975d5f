//! The cluster as the scheduler knows it: events in, indexes up to date.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use super::class::{Class, Classes, NewCounter, Rule};
use super::hold::Hold;
use super::needs::{NodeInfo, PodInfo};
use super::nodes::Nodes;
use super::order::Partition;
use super::preempt::{Budget, Trials};
use super::statics::Statics;
use super::topology::{Counted, NOWHERE, Topology};
use super::{NodeId, PodId, Profile};

/// Improvements that are remembered for memos: enough for what happens between two looks at a class that waits.
const LOG_LENGTH: usize = 8192;
/// Partitions kept at once; each costs an ordered insert per placement. Further classes are searched node by node.
const MAX_PARTITIONS: usize = 6;
/// Classes without pods that are kept before the indexes are made anew without them.
const MAX_IDLE_CLASSES: usize = 4096;

/// What happens in the cluster.
#[derive(Debug, Clone)]
pub enum Event {
    /// A node is there or has changed.
    Node(NodeInfo),
    /// A node is gone.
    NodeGone(Arc<str>),
    /// A pod is there or has changed.
    Pod(PodInfo),
    /// The pod with this uid is gone.
    PodGone(Arc<str>),
    /// A namespace has these labels.
    Namespace(Arc<str>, BTreeMap<String, String>),
    /// A namespace is gone.
    NamespaceGone(Arc<str>),
    /// How many pods of which may be ended, all of it.
    Budgets(Vec<Budget>),
}

/// A pod in the core.
pub struct PodEntry {
    /// What is known of it.
    pub info: PodInfo,
    /// Its class.
    pub class: u32,
    /// The node on which it counts.
    pub place: Option<NodeId>,
    /// Its position in the node's list.
    slot: u32,
    /// It counts on its node because of a decision that no event has confirmed yet.
    pub assumed: bool,
    /// It counts there only because its place is being cleared: nothing of it is there that could be ended.
    pub promised: bool,
}

/// Nodes on which something has become possible, in order.
#[derive(Default)]
pub struct ChangeLog {
    nodes: VecDeque<NodeId>,
    base: u64,
}

impl ChangeLog {
    fn push(&mut self, node: NodeId) {
        if self.nodes.len() == LOG_LENGTH {
            self.nodes.pop_front();
            self.base += 1;
        }
        self.nodes.push_back(node);
    }

    /// The next position.
    pub fn end(&self) -> u64 {
        self.base + self.nodes.len() as u64
    }

    /// Nodes logged from a position on; `None` when the log does not reach back so far.
    pub fn since(&self, at: u64) -> Option<impl Iterator<Item = NodeId> + '_> {
        let skip = at.checked_sub(self.base)?;
        Some(self.nodes.iter().skip(skip as usize).copied())
    }
}

/// The cluster, indexed.
pub struct Core {
    /// Nodes.
    pub(super) nodes: Nodes,
    /// Static eligibility.
    pub(super) statics: Statics,
    /// Pods per domain.
    pub(super) topology: Topology,
    /// Classes of pods.
    pub(super) classes: Classes,
    /// Pods by id.
    pub(super) pods: Vec<Option<PodEntry>>,
    vacant: Vec<PodId>,
    uids: HashMap<Arc<str>, PodId>,
    /// Pods bound to nodes that are not known.
    orphans: HashMap<Arc<str>, Vec<PodId>>,
    /// Groupings of the nodes; the first one by shape alone.
    pub(super) partitions: Vec<Partition>,
    /// Grows when routes must be made anew; starts at 1.
    pub(super) routes: u64,
    /// Improvements.
    pub(super) log: ChangeLog,
    /// Nodes that are kept free.
    pub(super) hold: Option<Hold>,
    /// Nodes of a group that may fail before the bitmaps are joined.
    pub(super) walk_limit: usize,
    profile: Profile,
    generation: u64,
    /// Which pods may be ended.
    pub(super) budgets: Vec<Budget>,
    /// Number of pods that are on nodes, by priority.
    priorities: BTreeMap<i32, usize>,
    /// Pods whose places are promised, the least important first.
    pub(super) promises: BTreeSet<(i32, PodId)>,
    /// What preemption would cost.
    pub(super) trials: Trials,
}

impl Core {
    /// An empty cluster.
    pub fn new(profile: Profile) -> Core {
        let (nodes, topology) = (Nodes::new(profile), Topology::default());
        let partitions = vec![Partition::new(Vec::new(), &nodes, &topology)];
        Core {
            nodes,
            statics: Statics::default(),
            topology,
            classes: Classes::default(),
            pods: Vec::new(),
            vacant: Vec::new(),
            uids: HashMap::new(),
            orphans: HashMap::new(),
            partitions,
            routes: 1,
            log: ChangeLog::default(),
            hold: None,
            walk_limit: super::decide::WALK,
            profile,
            generation: 0,
            budgets: Vec::new(),
            priorities: BTreeMap::new(),
            promises: BTreeSet::new(),
            trials: Trials::default(),
        }
    }

    /// Sets after how many failures the walk through a group gives up and the bitmaps are joined. It changes how long a
    /// decision takes, never what it is.
    pub fn set_walk_limit(&mut self, limit: usize) {
        self.walk_limit = limit;
    }

    /// Takes over one event.
    pub fn apply(&mut self, event: Event) {
        match event {
            Event::Node(info) => self.upsert_node(info),
            Event::NodeGone(name) => self.remove_node(&name),
            Event::Pod(info) => drop(self.upsert_pod(info)),
            Event::PodGone(uid) => self.remove_pod(&uid),
            Event::Namespace(name, labels) => self.set_namespace(&name, Some(labels)),
            Event::NamespaceGone(name) => self.set_namespace(&name, None),
            Event::Budgets(budgets) => self.set_budgets(budgets),
        }
    }

    /// Id of the pod with this uid.
    pub fn pod_id(&self, uid: &str) -> Option<PodId> {
        self.uids.get(uid).copied()
    }

    /// What is known of a pod.
    pub fn pod(&self, pod: PodId) -> Option<&PodInfo> {
        self.pods.get(pod as usize).and_then(Option::as_ref).map(|entry| &entry.info)
    }

    /// Grows whenever classes get new numbers.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Class of a pod: pods of one class have equal needs.
    pub fn class_of(&self, pod: PodId) -> Option<u32> {
        self.entry(pod).map(|entry| entry.class)
    }

    /// Where a pod counts, bound or assumed.
    pub fn place_of(&self, pod: PodId) -> Option<NodeId> {
        self.pods.get(pod as usize).and_then(Option::as_ref).and_then(|entry| entry.place)
    }

    /// Whether a pod counts on a node by an unconfirmed decision.
    pub fn is_assumed(&self, pod: PodId) -> bool {
        self.pods.get(pod as usize).and_then(Option::as_ref).is_some_and(|entry| entry.assumed)
    }

    /// Name of a node.
    pub fn node_name(&self, node: NodeId) -> &str {
        self.nodes.name(node)
    }

    /// Id of the node of that name.
    pub fn node_id(&self, name: &str) -> Option<NodeId> {
        self.nodes.id(name)
    }

    /// Number of nodes.
    pub fn node_count(&self) -> usize {
        self.nodes.alive.len()
    }

    /// Number of pods, bound and pending.
    pub fn pod_count(&self) -> usize {
        self.uids.len()
    }

    /// The lowest priority of a pod on any node.
    pub(super) fn lowest_priority(&self) -> Option<i32> {
        self.priorities.first_key_value().map(|(priority, _)| *priority)
    }

    /// Whether what is on a node is no more than it has.
    pub fn is_within_bounds(&self, node: NodeId) -> bool {
        self.nodes.columns.iter().all(|column| column.free.get(node as usize).is_none_or(|free| *free >= 0))
    }

    pub(super) fn entry(&self, pod: PodId) -> Option<&PodEntry> {
        self.pods.get(pod as usize).and_then(Option::as_ref)
    }

    pub(super) fn class(&self, class: u32) -> &Class {
        &self.classes.all[class as usize]
    }

    // ------------------------------------------------------------------------------------------------------- nodes

    fn upsert_node(&mut self, info: NodeInfo) {
        let known = self.nodes.id(&info.name);
        if let Some(node) = known
            && let Some(old) = self.nodes.info[node as usize].as_ref()
        {
            if *old == info {
                return;
            }
            // Amounts alone change often (an agent measures anew) and concern no label.
            let same_otherwise = old.labels == info.labels
                && old.taints == info.taints
                && (old.unschedulable, old.ready) == (info.unschedulable, info.ready);
            if same_otherwise {
                self.nodes.set_allocatable(node, &info.allocatable);
                self.nodes.info[node as usize] = Some(info);
                self.file(node);
                self.log.push(node);
                return;
            }
        }
        let node = known.unwrap_or_else(|| self.nodes.admit(&info.name));
        self.count_pods_of(node, -1);
        let name = Arc::clone(&info.name);
        self.nodes.set_allocatable(node, &info.allocatable);
        self.topology.place_node(node, Some(&info));
        self.statics.place_node(node, Some(&info));
        self.nodes.info[node as usize] = Some(info);
        self.regroup_if_needed();
        self.file(node);
        self.count_pods_of(node, 1);
        if known.is_none() {
            for pod in self.orphans.remove(&name).unwrap_or_default() {
                self.put(pod, node, false);
            }
        }
        self.log.push(node);
    }

    fn remove_node(&mut self, name: &Arc<str>) {
        let Some(node) = self.nodes.id(name) else { return };
        while let Some(pod) = self.nodes.pods[node as usize].last().copied() {
            self.take_off(pod);
            if self.entry(pod).is_some_and(|entry| entry.info.node.is_some()) {
                self.orphans.entry(Arc::clone(name)).or_default().push(pod);
            }
        }
        self.topology.place_node(node, None);
        self.statics.place_node(node, None);
        for partition in &mut self.partitions {
            partition.remove(node);
        }
        if let Some(hold) = &mut self.hold {
            hold.nodes.set(node, false);
        }
        self.nodes.dismiss(node);
    }

    fn file(&mut self, node: NodeId) {
        for partition in &mut self.partitions {
            partition.file(node, &self.nodes, &self.topology);
        }
    }

    fn rerank(&mut self, node: NodeId) {
        let rank = self.nodes.rank[node as usize];
        for partition in &mut self.partitions {
            partition.rerank(node, rank);
        }
    }

    /// When a key has turned out to have very many domains, groups by it are given up.
    fn regroup_if_needed(&mut self) {
        let fine = |key: &usize| self.topology.keys[*key].fine;
        if self.partitions.iter().any(|partition| partition.keys.iter().any(fine)) {
            self.partitions.truncate(1);
            self.routes += 1;
        }
    }

    // -------------------------------------------------------------------------------------------------------- pods

    /// Takes over a pod; an assumption that it is on a node stays until an event says otherwise. `None` if it has ended.
    pub fn upsert_pod(&mut self, mut info: PodInfo) -> Option<PodId> {
        if info.terminal {
            self.remove_pod(&info.uid);
            return None;
        }
        let known = self.uids.get(&info.uid).copied();
        let before = known.and_then(|pod| self.pods[pod as usize].as_ref());
        let class = match before.filter(|before| Arc::ptr_eq(&before.info.needs, &info.needs)) {
            Some(before) => before.class,
            None => self.class_for(&info),
        };
        // What is equal is kept once.
        info.needs = Arc::clone(&self.classes.all[class as usize].needs);
        let target = info.node.clone();
        let pod = match known {
            Some(pod) => {
                self.change_pod(pod, info, class);
                pod
            }
            None => self.admit_pod(info, class),
        };
        let Some(name) = target else { return Some(pod) };
        match self.nodes.id(&name) {
            Some(node) => {
                if self.place_of(pod) != Some(node) {
                    self.take_off(pod);
                    self.put(pod, node, false);
                } else if let Some(entry) = self.pods[pod as usize].as_mut() {
                    entry.assumed = false;
                    if std::mem::take(&mut entry.promised) {
                        self.promises.remove(&(entry.info.needs.priority, pod));
                    }
                }
            }
            None => {
                self.take_off(pod);
                let waiting = self.orphans.entry(name).or_default();
                if !waiting.contains(&pod) {
                    waiting.push(pod);
                }
            }
        }
        Some(pod)
    }

    fn admit_pod(&mut self, info: PodInfo, class: u32) -> PodId {
        let uid = Arc::clone(&info.uid);
        let entry = Some(PodEntry { info, class, place: None, slot: 0, assumed: false, promised: false });
        let pod = self.vacant.pop().unwrap_or_else(|| {
            self.pods.push(None);
            self.pods.len() as PodId - 1
        });
        self.pods[pod as usize] = entry;
        self.uids.insert(uid, pod);
        self.join_class(class);
        pod
    }

    fn change_pod(&mut self, pod: PodId, info: PodInfo, class: u32) {
        let Some(entry) = self.pods[pod as usize].as_mut() else { return };
        let same = entry.class == class && entry.info.terminating == info.terminating;
        if same {
            // Preemption spares what has run longer.
            if let Some(node) = entry.place.filter(|_| entry.info.started_ms != info.started_ms) {
                self.nodes.version[node as usize] += 1;
            }
            entry.info = info;
            return;
        }
        let (place, assumed, promised, old) = (entry.place, entry.assumed, entry.promised, entry.class);
        self.take_off(pod);
        if let Some(entry) = self.pods[pod as usize].as_mut() {
            entry.info = info;
            entry.class = class;
        }
        self.leave_class(old);
        self.join_class(class);
        if let Some(node) = place {
            self.put(pod, node, assumed);
            if promised {
                self.note_promise(pod);
            }
        }
    }

    /// The pod with this uid is gone.
    pub fn remove_pod(&mut self, uid: &str) {
        let Some(pod) = self.uids.remove(uid) else { return };
        self.take_off(pod);
        if let Some(entry) = self.pods[pod as usize].take() {
            if let Some(waiting) = entry.info.node.as_ref().and_then(|node| self.orphans.get_mut(node)) {
                waiting.retain(|other| *other != pod);
            }
            self.leave_class(entry.class);
        }
        self.vacant.push(pod);
        self.rebuild_if_worth_it();
    }

    /// Counts a pod on a node as decided, before any event confirms it.
    pub fn assume(&mut self, pod: PodId, node: NodeId) {
        if self.place_of(pod).is_none() && self.entry(pod).is_some() && self.nodes.alive.contains(node) {
            self.put(pod, node, true);
        }
    }

    /// Takes back an assumption; what an event has confirmed stays.
    pub fn forget(&mut self, pod: PodId) {
        if self.is_assumed(pod) {
            self.take_off(pod);
        }
    }

    fn join_class(&mut self, class: u32) {
        let class = &mut self.classes.all[class as usize];
        class.pods += 1;
        self.classes.idle -= usize::from(class.pods == 1);
    }

    fn leave_class(&mut self, class: u32) {
        let class = &mut self.classes.all[class as usize];
        class.pods -= 1;
        self.classes.idle += usize::from(class.pods == 0);
    }

    fn class_for(&mut self, info: &PodInfo) -> u32 {
        if let Some(class) = self.classes.find(&info.needs) {
            return class;
        }
        let (class, fresh) = self.classes.admit(&info.needs, &mut self.nodes, &mut self.statics, &mut self.topology);
        for NewCounter(counter) in fresh {
            self.count_all(counter);
        }
        class
    }

    /// Counts what is bound already for a counter that is new.
    fn count_all(&mut self, counter: usize) {
        let by_class: Vec<bool> = self.classes.all.iter().map(|class| class.counted_by.contains(&counter)).collect();
        let live_only = matches!(self.topology.counters[counter].counted, Counted::Spread(..));
        for entry in self.pods.iter().flatten() {
            let Some(node) = entry.place else { continue };
            let counts = by_class.get(entry.class as usize).copied().unwrap_or(false);
            if counts && !(live_only && entry.info.terminating) {
                let domain = self.topology.domain(counter, node);
                self.topology.counters[counter].add(domain, 1);
            }
        }
    }

    // -------------------------------------------------------------------------------------------------- placements

    pub(super) fn put(&mut self, pod: PodId, node: NodeId, assumed: bool) {
        let Some(entry) = self.pods[pod as usize].as_mut() else { return };
        let list = &mut self.nodes.pods[node as usize];
        entry.place = Some(node);
        entry.assumed = assumed;
        entry.slot = list.len() as u32;
        list.push(pod);
        self.charge(pod, node, 1);
    }

    pub(super) fn take_off(&mut self, pod: PodId) {
        let Some(entry) = self.pods[pod as usize].as_mut() else { return };
        let Some(node) = entry.place.take() else { return };
        entry.assumed = false;
        if std::mem::take(&mut entry.promised) {
            self.promises.remove(&(entry.info.needs.priority, pod));
        }
        let slot = entry.slot;
        let list = &mut self.nodes.pods[node as usize];
        list.swap_remove(slot as usize);
        if let Some(moved) = list.get(slot as usize).copied()
            && let Some(moved) = self.pods[moved as usize].as_mut()
        {
            moved.slot = slot;
        }
        self.charge(pod, node, -1);
        self.log.push(node);
    }

    /// Everything that a pod takes of a node, or gives back.
    fn charge(&mut self, pod: PodId, node: NodeId, sign: i64) {
        let Some(entry) = self.pods[pod as usize].as_ref() else { return };
        let class = &self.classes.all[entry.class as usize];
        self.nodes.charge(node, &class.requests, class.needs.weight, sign);
        let same = self.priorities.entry(class.needs.priority).or_insert(0);
        if sign > 0 {
            *same += 1;
        } else {
            *same = same.saturating_sub(1);
            if *same == 0 {
                self.priorities.remove(&class.needs.priority);
            }
        }
        if !class.needs.ports.is_empty() {
            self.nodes.take_ports(node, &class.needs.ports, sign > 0);
        }
        count(&mut self.topology, class, node, entry.info.terminating, sign);
        self.rerank(node);
    }

    fn count_pods_of(&mut self, node: NodeId, sign: i64) {
        for pod in &self.nodes.pods[node as usize] {
            if let Some(entry) = self.pods[*pod as usize].as_ref() {
                let class = &self.classes.all[entry.class as usize];
                count(&mut self.topology, class, node, entry.info.terminating, sign);
            }
        }
    }

    // ------------------------------------------------------------------------------------------------------ rarely

    fn set_namespace(&mut self, name: &Arc<str>, labels: Option<BTreeMap<String, String>>) {
        let changed = self.topology.set_namespace(name, labels);
        let by_label = |counter: &super::topology::Counter| match &counter.counted {
            Counted::Matching(all) => all.iter().any(|who| who.namespace_selector.is_some()),
            Counted::Spread(who, _) | Counted::Repelling(who) | Counted::Pulling(who) => {
                who.namespace_selector.is_some()
            }
        };
        // Labels of namespaces change seldom; which pods a selector speaks of is then found out from the beginning.
        if changed && self.topology.counters.iter().any(by_label) {
            self.rebuild();
        }
    }

    fn rebuild_if_worth_it(&mut self) {
        if self.classes.idle > MAX_IDLE_CLASSES && self.classes.idle > 4 * (self.classes.all.len() - self.classes.idle)
        {
            self.rebuild();
        }
    }

    /// Makes all indexes anew; ids of nodes and pods stay.
    fn rebuild(&mut self) {
        let mut fresh = Core::new(self.profile);
        fresh.topology.namespaces = std::mem::take(&mut self.topology.namespaces);
        // Vacant ids are filled for the time being, so that every node and pod gets its old id.
        let placeholder: Arc<str> = "".into();
        let mut vacant_nodes = Vec::new();
        for (id, info) in std::mem::take(&mut self.nodes.info).into_iter().enumerate() {
            match info {
                Some(info) => fresh.upsert_node(info),
                None => {
                    fresh.nodes.admit(&placeholder);
                    fresh.nodes.alive.set(id as NodeId, false);
                    vacant_nodes.push(id as NodeId);
                }
            }
        }
        for node in vacant_nodes {
            fresh.nodes.retire(node);
        }
        let places: Vec<(PodId, NodeId, bool, bool)> = self
            .pods
            .iter()
            .enumerate()
            .filter_map(|(pod, entry)| {
                let entry = entry.as_ref()?;
                Some((pod as PodId, entry.place?, entry.assumed, entry.promised))
            })
            .collect();
        for mut entry in std::mem::take(&mut self.pods) {
            if let Some(entry) = &mut entry {
                entry.class = fresh.class_for(&entry.info);
                entry.place = None;
                entry.promised = false;
                fresh.join_class(entry.class);
            }
            fresh.pods.push(entry);
        }
        fresh.vacant = std::mem::take(&mut self.vacant);
        fresh.uids = std::mem::take(&mut self.uids);
        fresh.orphans = std::mem::take(&mut self.orphans);
        fresh.hold = self.hold.take();
        fresh.walk_limit = self.walk_limit;
        fresh.routes = self.routes + 1;
        fresh.generation = self.generation + 1;
        fresh.budgets = std::mem::take(&mut self.budgets);
        for (pod, node, assumed, promised) in places {
            fresh.put(pod, node, assumed);
            if promised {
                fresh.note_promise(pod);
            }
        }
        *self = fresh;
    }

    /// Makes the class's route anew if it is out of date.
    pub(super) fn refresh_route(&mut self, class: u32) {
        let routes = self.routes;
        let class = &mut self.classes.all[class as usize];
        if class.route.made == routes {
            return;
        }
        let counters = class.checks.iter().map(|check| check.counter);
        let counters =
            counters.chain(class.pulls.iter().map(|(counter, _)| *counter)).chain(class.soft.iter().copied());
        let mut keys: Vec<usize> = counters.map(|counter| self.topology.counters[counter].key).collect();
        keys.retain(|key| !self.topology.keys[*key].fine);
        keys.sort_unstable();
        keys.dedup();
        let found = self.partitions.iter().position(|partition| partition.keys == keys);
        let partition = match found {
            Some(partition) => partition,
            None if self.partitions.len() >= MAX_PARTITIONS => 0,
            None => {
                self.partitions.push(Partition::new(keys, &self.nodes, &self.topology));
                self.partitions.len() - 1
            }
        };
        class.route.partition = partition;
        class.route.made = routes;
    }

    /// Sum of the versions of all counters that decide whether the class fits.
    pub(super) fn versions(&self, class: &Class) -> u64 {
        class.checks.iter().map(|check| self.topology.counters[check.counter].version).sum()
    }

    /// Whether a class has to look at pods of other nodes.
    pub(super) fn near_rules(class: &Class) -> impl Iterator<Item = usize> + '_ {
        class.checks.iter().filter(|check| matches!(check.rule, Rule::Near)).map(|check| check.counter)
    }
}

fn count(topology: &mut Topology, class: &Class, node: NodeId, terminating: bool, sign: i64) {
    for counter in &class.counted_by {
        if terminating && matches!(topology.counters[*counter].counted, Counted::Spread(..)) {
            continue;
        }
        let domain = topology.domain(*counter, node);
        if domain != NOWHERE {
            topology.counters[*counter].add(domain, sign);
        }
    }
    for (counter, weight) in &class.holds {
        let domain = topology.domain(*counter, node);
        topology.counters[*counter].add(domain, sign * weight);
    }
}
