use std::collections::HashMap;

use minipod_proto::{
    Kind,
    resources::Resources,
    v1::{Container, ContainerPort, Object, PodSchedulingGate, ResourceRequirements, Time},
};

use super::*;
use crate::dice::Dice;

fn charge(uid: &str, cpu: i64, memory: i64, port: Option<i32>) -> Charge {
    let requests = Resources { cpu_milli: cpu, memory_bytes: memory, pods: 1, ..Resources::default() };
    let port =
        port.map(|port| ledger::PortUse { port, protocol: "TCP".into(), host_ip: String::new(), pod_uid: uid.into() });
    Charge { uid: uid.into(), requests, ports: port.into_iter().collect(), tolerates_unschedulable: false }
}

fn ledger_of(cpu: i64, memory: i64, pods: i64) -> Ledger {
    Ledger {
        allocatable: [("cpu".into(), cpu), ("memory".into(), memory), ("pods".into(), pods)].into(),
        ..Ledger::default()
    }
}

/// Binds, releases and changes of the nodes in any order: every ledger is the sum of its pods at every step, and a grant never
/// puts a node over what it has.
#[test]
fn ledgers_are_sums_whatever_happens() {
    for seed in 1..=300 {
        let mut dice = Dice(u64::wrapping_mul(seed, 0x9e37_79b9_7f4a_7c15));
        let names: Vec<String> = (0..4).map(|n| format!("n{n}")).collect();
        let mut ledgers: BTreeMap<String, Option<Ledger>> =
            names.iter().map(|name| (name.clone(), Some(ledger_of(4_000, 8_000, 12)))).collect();
        let mut bound: HashMap<String, (String, Charge)> = HashMap::new();
        for step in 0..200 {
            match dice.roll(4) {
                0 | 1 => bind_some(&mut dice, &names, &mut ledgers, &mut bound, step),
                2 => {
                    let uids: Vec<String> = bound.keys().cloned().collect();
                    if let Some(uid) = uids.get(dice.roll(uids.len().max(1) as u64) as usize) {
                        let (node, charge) = bound.remove(uid).expect("it is bound");
                        ledgers.get_mut(&node).and_then(Option::as_mut).expect("it has a ledger").release(&charge);
                    }
                }
                _ => {
                    let node = &names[dice.roll(4) as usize];
                    let ledger = ledgers.get_mut(node).and_then(Option::as_mut).expect("a ledger");
                    ledger.allocatable.insert("cpu".into(), dice.roll(5_000) as i64);
                    ledger.unschedulable = dice.roll(8) == 0;
                }
            }
            for (node, ledger) in &ledgers {
                check_sum(node, ledger.as_ref().expect("a ledger"), &bound, (seed, step));
            }
        }
    }
}

/// What a test's ledgers say of a node.
fn known<'l>(ledgers: &'l BTreeMap<String, Option<Ledger>>) -> impl Fn(&str) -> Option<&'l Ledger> {
    |node| ledgers.get(node).and_then(Option::as_ref)
}

fn bind_some(
    dice: &mut Dice,
    names: &[String],
    ledgers: &mut BTreeMap<String, Option<Ledger>>,
    bound: &mut HashMap<String, (String, Charge)>,
    step: u64,
) {
    let wishes: Vec<(String, Charge)> = (0..=dice.roll(5))
        .map(|n| {
            let port = (dice.roll(3) == 0).then(|| 80 + dice.roll(3) as i32);
            let node = names[dice.roll(4) as usize].clone();
            (node, charge(&format!("{step}-{n}"), dice.roll(1_500) as i64, dice.roll(3_000) as i64, port))
        })
        .collect();
    let all = dice.roll(3) == 0;
    let plan = plan(wishes.iter().map(|(node, charge)| (node.as_str(), charge)), known(ledgers), None, all);
    assert_eq!(plan.granted.len() + plan.refused.len(), wishes.len());
    assert!(!all || plan.refused.is_empty() || plan.granted.is_empty(), "a gang is bound whole or not at all");
    for position in plan.granted {
        let (node, charge) = wishes[position].clone();
        bound.insert(charge.uid.clone(), (node, charge));
    }
    for (node, ledger) in plan.ledgers {
        assert!(!ledger.unschedulable);
        for (resource, used) in &ledger.used {
            let had = ledgers[&node].as_ref().map_or(0, |old| old.used.get(resource).copied().unwrap_or(0));
            let allocatable = ledger.allocatable.get(resource).copied().unwrap_or(0);
            assert!(
                *used <= allocatable || *used == had,
                "{node} is given {used} of {resource}, but has {allocatable}"
            );
        }
        ledgers.insert(node, Some(ledger));
    }
}

fn check_sum(node: &str, ledger: &Ledger, bound: &HashMap<String, (String, Charge)>, at: (u64, u64)) {
    let mut sum: BTreeMap<String, i64> = BTreeMap::new();
    let mut ports: Vec<i32> = Vec::new();
    for (_, charge) in bound.values().filter(|(on, _)| on == node) {
        for (resource, amount) in charge.requests.iter().filter(|(_, amount)| *amount != 0) {
            *sum.entry(resource.to_owned()).or_default() += amount;
        }
        ports.extend(charge.ports.iter().map(|port| port.port));
    }
    assert_eq!(ledger.used, sum, "seed and step {at:?}, {node}");
    let mut taken: Vec<i32> = ledger.ports.iter().map(|port| port.port).collect();
    ports.sort_unstable();
    taken.sort_unstable();
    assert_eq!(taken, ports, "seed and step {at:?}, {node}");
    let count = taken.len();
    taken.dedup();
    assert_eq!(taken.len(), count, "seed and step {at:?}: a port of {node} was given twice");
}

#[test]
fn refusals_say_what_is_short() {
    let mut full = ledger_of(1_000, 1 << 30, 2);
    full.take(&charge("a", 500, 1 << 29, Some(80)));
    let refusal = |ledger: Option<Ledger>, wish: Charge| {
        let ledgers = [("n".to_owned(), ledger)].into();
        let plan = plan([("n", &wish)], known(&ledgers), None, false);
        plan.refused.first().map(|(_, result)| format!("{:?} {}", result.code(), result.message))
    };
    let shown = |result: Option<&str>| result.map(str::to_owned);
    let with = |change: fn(&mut Ledger)| {
        let mut ledger = full.clone();
        change(&mut ledger);
        Some(ledger)
    };
    for (ledger, wish, want) in [
        (Some(full.clone()), charge("b", 500, 1 << 29, None), None),
        (Some(full.clone()), charge("b", 750, 0, None), Some("NoFit n: cpu short by 250m")),
        (
            Some(full.clone()),
            charge("b", 501, (1 << 29) + (1 << 20), Some(80)),
            Some("NoFit n: cpu short by 1m, memory short by 1Mi, host port 80/TCP is taken"),
        ),
        (with(|l| l.take(&charge("c", 0, 0, None))), charge("b", 0, 0, None), Some("NoFit n: pods short by 1")),
        (
            with(|l| l.unschedulable = true),
            charge("b", 0, 0, None),
            Some("NodeUnschedulable node n takes no pods: it is marked unschedulable"),
        ),
        (with(|l| l.unschedulable = true), Charge { tolerates_unschedulable: true, ..charge("b", 0, 0, None) }, None),
        (
            with(|l| l.not_ready = true),
            charge("b", 0, 0, None),
            Some("NodeUnschedulable node n takes no pods: it is not ready"),
        ),
        (with(|l| l.deleting = true), charge("b", 0, 0, None), Some("NodeGone node n does not exist")),
        (None, charge("b", 0, 0, None), Some("NodeGone node n does not exist")),
    ] {
        assert_eq!(refusal(ledger, wish), shown(want));
    }
}

fn pod_entry(change: impl FnOnce(&mut Pod)) -> Entry {
    let mut pod = Pod::default();
    let meta = pod.metadata.get_or_insert_default();
    meta.name = "p".into();
    meta.namespace = "d".into();
    meta.uid = "u".into();
    pod.spec_mut().containers.push(Container {
        ports: vec![ContainerPort { host_port: 80, ..ContainerPort::default() }],
        resources: Some(ResourceRequirements {
            requests: [("cpu".into(), "100m".into())].into(),
            ..Default::default()
        }),
        ..Container::default()
    });
    change(&mut pod);
    let bytes = Object::from(pod).encode_inner();
    Entry::decode(Kind::Pod, "d/p", &bytes, 20).expect("it decodes")
}

#[test]
fn pods_are_judged_by_their_newest_state() {
    let item = |revision| Item { namespace: "d".into(), pod: "p".into(), uid: "u".into(), revision, node: "n".into() };
    let judge = |revision, entry: Option<Entry>| match judge_pod(&item(revision), entry.as_ref()) {
        Ok(wants) => format!("{}m {} port", wants.charge.requests.cpu_milli, wants.charge.ports.len()),
        Err(result) => format!("{:?} {}", result.code(), result.node),
    };
    assert_eq!(judge(20, Some(pod_entry(|_| ()))), "100m 1 port");
    assert_eq!(judge(0, Some(pod_entry(|_| ()))), "100m 1 port");
    assert_eq!(judge(19, Some(pod_entry(|_| ()))), "PodChanged ");
    let mut older_spec = pod_entry(|_| ());
    older_spec.spec_revision = 15;
    assert_eq!(judge(19, Some(older_spec)), "100m 1 port");
    assert_eq!(judge(20, None), "PodGone ");
    assert_eq!(judge(20, Some(pod_entry(|pod| pod.metadata.get_or_insert_default().uid = "v".into()))), "PodGone ");
    assert_eq!(judge(20, Some(pod_entry(|pod| pod.spec_mut().node_name = "m".into()))), "AlreadyBound m");
    let marked = |pod: &mut Pod| pod.metadata.get_or_insert_default().deletion_timestamp = Some(Time::default());
    assert_eq!(judge(20, Some(pod_entry(marked))), "PodTerminating ");
    assert_eq!(judge(20, Some(pod_entry(|pod| pod.status_mut().phase = "Failed".into()))), "PodChanged ");
    let gated = |pod: &mut Pod| pod.spec_mut().scheduling_gates.push(PodSchedulingGate { name: "g".into() });
    assert_eq!(judge(20, Some(pod_entry(gated))), "PodChanged ");
}

#[test]
fn ended_pods_count_nothing() {
    let charged = |node: &str, phase: &str| {
        let entry = pod_entry(|pod| {
            pod.spec_mut().node_name = node.into();
            pod.status_mut().phase = phase.into();
        });
        let pod = entry.object.as_pod().expect("a pod");
        ledger::charged(pod).expect("summable").map(|(node, _)| node.to_owned())
    };
    assert_eq!(charged("", "Pending"), None);
    assert_eq!(charged("n", "Running"), Some("n".into()));
    assert_eq!(charged("n", "Succeeded"), None);
    assert_eq!(charged("n", "Failed"), None);
}
