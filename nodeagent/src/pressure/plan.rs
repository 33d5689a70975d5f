//! What a node that runs short does: pure. Thresholds, what was measured and the pods in; conditions and at most one eviction out.
//!
//! The rules are the kubelet's: conditions hold for a while after the last threshold was met; a soft threshold has to be met for its
//! grace; the node's own leavings go before any pod; and of the pods first the one that uses more than it asked for, then the one of
//! the lower priority, then the one that uses the most beyond its request. One pod at a time: what it frees shows in the next round.

use std::collections::BTreeMap;

use minipod_proto::quantity::Quantity;

use super::thresholds::{Signal, Threshold};
use crate::want::Uid;

/// Pods from this priority on are never evicted (Kubernetes' system classes).
pub const CRITICAL_PRIORITY: i32 = 2_000_000_000;

/// What a signal says now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Observed {
    /// What is left.
    pub available: u64,
    /// What there is.
    pub capacity: u64,
}

/// A use and what was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Use {
    /// Measured.
    pub used: u64,
    /// The request; 0 without one.
    pub requested: u64,
}

/// What one pod uses.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PodUse {
    /// Namespace and name, for the order of equals.
    pub name: String,
    /// spec.priority.
    pub priority: i32,
    /// terminationGracePeriodSeconds in milliseconds.
    pub grace_ms: u64,
    /// Bytes of memory.
    pub memory: Use,
    /// Bytes of disk: writable layers, logs, emptyDirs.
    pub disk: Use,
    /// Files.
    pub inodes: u64,
    /// Processes and threads.
    pub tasks: u64,
    /// By container: memory and disk.
    pub containers: Vec<(String, Use, Use)>,
}

/// What is remembered from round to round.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Memory {
    /// Since when each threshold is met without a break, by its place in the list.
    met_since_ms: BTreeMap<usize, u64>,
    /// When each was last found short.
    short_ms: BTreeMap<Shortage, u64>,
}

/// What a node can run short of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Shortage {
    Memory,
    Disk,
    Pids,
}

impl Shortage {
    fn of(signal: Signal) -> Self {
        match signal {
            Signal::MemoryAvailable => Self::Memory,
            Signal::PidAvailable => Self::Pids,
            _ => Self::Disk,
        }
    }
}

/// What the node says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Conditions {
    /// MemoryPressure.
    pub memory: bool,
    /// DiskPressure.
    pub disk: bool,
    /// PIDPressure.
    pub pids: bool,
}

impl Conditions {
    /// The names of those that hold.
    #[must_use]
    pub fn names(self) -> Vec<&'static str> {
        let all = [(self.memory, "MemoryPressure"), (self.disk, "DiskPressure"), (self.pids, "PIDPressure")];
        all.into_iter().filter(|(holds, _)| *holds).map(|(_, name)| name).collect()
    }
}

/// The pod to end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Eviction {
    /// Which.
    pub uid: Uid,
    /// status.message.
    pub message: String,
    /// How long its containers may take.
    pub grace_ms: u64,
}

/// What is configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// Hard and soft.
    pub thresholds: Vec<Threshold>,
    /// How long a condition holds after it was last so.
    pub transition_ms: u64,
    /// The longest grace of a pod that a soft threshold evicts.
    pub max_pod_grace_ms: u64,
}

/// The threshold that is to be acted upon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Short {
    threshold: Threshold,
    observed: Observed,
}

impl Short {
    /// The signal that is short.
    #[must_use]
    pub fn signal(&self) -> Signal {
        self.threshold.signal
    }
}

/// Takes note of what was measured: the conditions, and the threshold to act upon, if any.
pub fn observe(
    rules: &Rules,
    memory: &mut Memory,
    observed: &BTreeMap<Signal, Observed>,
    now_ms: u64,
) -> (Conditions, Option<Short>) {
    let mut due: Vec<Short> = Vec::new();
    for (place, threshold) in rules.thresholds.iter().enumerate() {
        let now = observed.get(&threshold.signal).copied();
        let Some(now) = now.filter(|now| now.available < threshold.amount.of(now.capacity)) else {
            memory.met_since_ms.remove(&place);
            continue;
        };
        let since_ms = *memory.met_since_ms.entry(place).or_insert(now_ms);
        memory.short_ms.insert(Shortage::of(threshold.signal), now_ms);
        if now_ms - since_ms >= threshold.grace_ms.unwrap_or(0) {
            due.push(Short { threshold: *threshold, observed: now });
        }
    }
    let last = |shortage| memory.short_ms.get(&shortage);
    let holds = |shortage| last(shortage).is_some_and(|at_ms| now_ms - at_ms < rules.transition_ms.max(1));
    let conditions =
        Conditions { memory: holds(Shortage::Memory), disk: holds(Shortage::Disk), pids: holds(Shortage::Pids) };
    // Memory first, and of one signal the hard threshold.
    due.sort_by_key(|short| (short.threshold.signal, short.threshold.grace_ms.is_some()));
    (conditions, due.into_iter().next())
}

/// The pod to end for a threshold, if there is one that may be.
#[must_use]
pub fn choose(rules: &Rules, short: &Short, pods: &BTreeMap<Uid, PodUse>) -> Option<Eviction> {
    let signal = short.threshold.signal;
    let of = |pod: &PodUse| match signal {
        Signal::MemoryAvailable => pod.memory,
        Signal::NodefsAvailable | Signal::ImagefsAvailable => pod.disk,
        Signal::NodefsInodesFree | Signal::ImagefsInodesFree => Use { used: pod.inodes, requested: 0 },
        Signal::PidAvailable => Use { used: pod.tasks, requested: 0 },
    };
    let mut candidates: Vec<(&Uid, &PodUse)> =
        pods.iter().filter(|(_, pod)| pod.priority < CRITICAL_PRIORITY).collect();
    candidates.sort_by_key(|(_, pod)| {
        let Use { used, requested } = of(pod);
        // Nobody asks for files or process ids: there, no one is over.
        let within = used <= requested && !matches!(signal.resource(), "inodes" | "pids");
        (within, pod.priority, std::cmp::Reverse(i128::from(used) - i128::from(requested)), &pod.name)
    });
    let (uid, pod) = candidates.first()?;
    let grace_ms = match short.threshold.grace_ms {
        None => 0,
        Some(_) => pod.grace_ms.min(rules.max_pod_grace_ms),
    };
    Some(Eviction { uid: (*uid).clone(), message: message(short, pod), grace_ms })
}

/// In the kubelet's words, which people search for.
fn message(short: &Short, pod: &PodUse) -> String {
    let Short { threshold, observed } = short;
    let resource = threshold.signal.resource();
    let text = |amount: u64| match resource {
        "inodes" | "pids" => amount.to_string(),
        _ => Quantity::from_size(amount).to_string(),
    };
    let (limit, left) = (text(threshold.amount.of(observed.capacity)), text(observed.available));
    let mut message =
        format!("The node was low on resource: {resource}. Threshold quantity: {limit}, available: {left}. ");
    for (name, memory, disk) in &pod.containers {
        let Use { used, requested } = match resource {
            "memory" => *memory,
            "ephemeral-storage" => *disk,
            _ => continue,
        };
        if used > requested {
            let (used, requested) = (text(used), text(requested));
            message.push_str(&format!(
                "Container {name} was using {used}, request is {requested}, has larger consumption of {resource}. "
            ));
        }
    }
    message
}

#[cfg(test)]
mod tests {
    use super::super::thresholds::{Amount, Graces, Limits, thresholds};
    use super::*;

    fn rules(hard: &str, soft: &str, graces: &str) -> Rules {
        let (hard, soft): (Limits, Limits) = (hard.parse().expect("hard"), soft.parse().expect("soft"));
        let graces: Graces = graces.parse().expect("graces");
        let thresholds = thresholds(&hard, &soft, &graces).expect("complete");
        Rules { thresholds, transition_ms: 300_000, max_pod_grace_ms: 20_000 }
    }

    fn observed(memory: u64, disk: u64) -> BTreeMap<Signal, Observed> {
        let of = |available| Observed { available, capacity: 1000 };
        [(Signal::MemoryAvailable, of(memory)), (Signal::NodefsAvailable, of(disk))].into()
    }

    #[test]
    fn conditions_hold_and_soft_thresholds_wait() {
        let rules = rules("memory.available<100,nodefs.available<10%", "memory.available<300", "memory.available=60s");
        let mut memory = Memory::default();
        // Seconds, memory, disk → MemoryPressure, DiskPressure, what is acted upon.
        for (at_s, free, disk, memory_pressure, disk_pressure, acts) in [
            (0, 500, 500, false, false, None),
            // The soft threshold is met: told at once, acted upon after its grace.
            (10, 299, 500, true, false, None),
            (60, 299, 500, true, false, None),
            // A break begins the grace anew.
            (65, 300, 500, true, false, None),
            (70, 250, 500, true, false, None),
            (130, 250, 500, true, false, Some((Signal::MemoryAvailable, Some(60_000)))),
            // The hard one does not wait, and memory goes before the disk.
            (140, 99, 99, true, true, Some((Signal::MemoryAvailable, None))),
            (150, 500, 99, true, true, Some((Signal::NodefsAvailable, None))),
            // Five minutes after the last time.
            (439, 500, 100, true, true, None),
            (440, 500, 100, false, true, None),
            (450, 500, 100, false, false, None),
        ] {
            let (conditions, short) = observe(&rules, &mut memory, &observed(free, disk), at_s * 1000);
            let got = short.map(|short| (short.signal(), short.threshold.grace_ms));
            let told = (conditions.memory, conditions.disk, got);
            assert_eq!(told, (memory_pressure, disk_pressure, acts), "at {at_s} s");
        }
    }

    #[test]
    fn each_shortage_has_a_condition_of_its_own() {
        let rules = rules("memory.available<100,pid.available<100,imagefs.inodesFree<100", "", "");
        let of = |available| Observed { available, capacity: 1000 };
        for (signal, names) in [
            (Signal::MemoryAvailable, "MemoryPressure"),
            (Signal::PidAvailable, "PIDPressure"),
            (Signal::ImagefsInodesFree, "DiskPressure"),
        ] {
            let observed = [(signal, of(99))].into();
            let (conditions, short) = observe(&rules, &mut Memory::default(), &observed, 0);
            assert_eq!(
                (conditions.names().join(" ").as_str(), short.map(|short| short.signal())),
                (names, Some(signal))
            );
        }
    }

    #[test]
    fn a_signal_that_was_not_measured_is_not_short() {
        let rules = rules("imagefs.available<100%", "", "");
        let (conditions, short) = observe(&rules, &mut Memory::default(), &observed(0, 0), 0);
        assert_eq!((conditions, short), (Conditions::default(), None));
    }

    fn pod(name: &str, priority: i32, memory: (u64, u64), disk: (u64, u64), inodes: u64) -> (Uid, PodUse) {
        let of = |(used, requested)| Use { used, requested };
        let (memory, disk) = (of(memory), of(disk));
        let containers = vec![("app".to_owned(), memory, disk)];
        let tasks = 10 - inodes.min(10);
        let pod = PodUse { name: name.into(), priority, grace_ms: 30_000, memory, disk, inodes, tasks, containers };
        (Uid(name.into()), pod)
    }

    #[test]
    fn over_the_request_first_then_priority_then_use() {
        let rules = rules("memory.available<1000", "", "");
        let short = |signal| Short {
            threshold: Threshold { signal, amount: Amount::Units(900), grace_ms: None },
            observed: Observed { available: 5, capacity: 1000 },
        };
        let pods: BTreeMap<Uid, PodUse> = [
            pod("within-low", -5, (10, 50), (70, 80), 9),
            pod("over-high", 10, (80, 50), (10, 80), 1),
            pod("over-little", 0, (60, 50), (0, 0), 7),
            pod("over-much", 0, (90, 20), (90, 80), 3),
            pod("critical", CRITICAL_PRIORITY, (900, 0), (900, 0), 900),
        ]
        .into();
        let order = |signal| {
            let mut left = pods.clone();
            let mut order = Vec::new();
            while let Some(eviction) = choose(&rules, &short(signal), &left) {
                left.remove(&eviction.uid);
                order.push(eviction.uid.0);
            }
            assert_eq!(left.len(), 1, "the critical one stays");
            order.join(" ")
        };
        assert_eq!(order(Signal::MemoryAvailable), "over-much over-little over-high within-low");
        assert_eq!(order(Signal::NodefsAvailable), "over-much within-low over-little over-high");
        assert_eq!(order(Signal::ImagefsInodesFree), "within-low over-little over-much over-high");
        assert_eq!(order(Signal::PidAvailable), "within-low over-much over-little over-high");
    }

    #[test]
    fn the_message_says_what_was_short_and_who_used_it() {
        let mut rules = rules("", "memory.available<10%", "memory.available=0s");
        let (_, short) = observe(&rules, &mut Memory::default(), &observed(50, 500), 0);
        let (uid, one) = pod("a", 0, (3 << 20, 1 << 20), (0, 0), 0);
        let pods: BTreeMap<Uid, PodUse> = [(uid, one)].into();
        let eviction = choose(&rules, &short.expect("short"), &pods).expect("one");
        assert_eq!(
            eviction.message,
            "The node was low on resource: memory. Threshold quantity: 100, available: 50. Container app was using 3Mi, \
             request is 1Mi, has larger consumption of memory. "
        );
        assert_eq!(eviction.grace_ms, 20_000, "a soft threshold leaves the pod its grace, up to the node's");
        rules.thresholds[0].grace_ms = None;
        let (_, short) = observe(&rules, &mut Memory::default(), &observed(50, 500), 0);
        assert_eq!(choose(&rules, &short.expect("short"), &pods).map(|eviction| eviction.grace_ms), Some(0));
        assert_eq!(choose(&rules, &short.expect("short"), &BTreeMap::new()), None);
    }
}
