//! A scheduler's answers as text and as JSON: why a pod fits nowhere, where pods would go.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use minipod_proto::resources::amount_text;
use minipod_proto::v1::{Explanation, FitResponse, NodeVerdict, Remedy};
use serde_json::{Value, json};

use super::table::Table;

/// Up to so many nodes are shown one by one; more are counted by reason.
const NAMED: usize = 8;
/// Of a group of nodes so many are named.
const EXAMPLES: usize = 3;
/// Pods to end that are named.
const EVICTED: usize = 4;
/// Ways out that are shown.
const WAYS: usize = 3;

/// Everything about a pod that fits nowhere. `wide`: every node; otherwise nodes are grouped when there are many.
#[must_use]
pub fn text(told: &Explanation, wide: bool) -> String {
    let mut out = String::new();
    if !told.state.is_empty() {
        let _ = writeln!(out, "{}", told.state);
    }
    if !told.gates.is_empty() {
        let _ = writeln!(out, "scheduling gates are closed: {}", told.gates.join(", "));
    }
    if told.nodes.is_empty() {
        if told.state.is_empty() {
            let _ = writeln!(out, "{}", told.summary);
        }
        return out;
    }
    let fitting = told.nodes.iter().filter(|node| node.reason.is_empty()).count();
    let _ = writeln!(out, "it fits on {fitting} of {} nodes", told.nodes.len());
    if wide || told.nodes.len() <= NAMED {
        one_by_one(&mut out, &told.nodes);
    } else {
        grouped(&mut out, &told.nodes);
    }
    if fitting == 0 {
        ways_out(&mut out, told);
    }
    out
}

fn one_by_one(out: &mut String, nodes: &[NodeVerdict]) {
    let mut table = Table::new(&["NODE", "AGAINST IT", "WHAT WOULD HELP"]);
    for node in nodes {
        let against = if node.reason.is_empty() { "nothing" } else { node.reason.as_str() };
        table.row([node.node.clone(), against.to_owned(), node.remedy.as_ref().map_or_else(String::new, help)]);
    }
    table.render(true).lines().for_each(|line| {
        let _ = writeln!(out, "  {line}");
    });
}

/// One line per kind of reason, the most frequent first.
fn grouped(out: &mut String, nodes: &[NodeVerdict]) {
    let mut kinds: BTreeMap<&str, Vec<&NodeVerdict>> = BTreeMap::new();
    for node in nodes {
        kinds.entry(&node.kind).or_default().push(node);
    }
    let mut kinds: Vec<(&str, Vec<&NodeVerdict>)> = kinds.into_iter().collect();
    kinds.sort_by_key(|(_, nodes)| std::cmp::Reverse(nodes.len()));
    let mut table = Table::new(&["NODES", "AGAINST THEM", "NEAREST", "SUCH AS"]);
    for (kind, mut nodes) in kinds {
        nodes.sort_by_key(|node| (missing(node), node.node.as_str()));
        let nearest = nodes.first().filter(|node| !node.shortfalls.is_empty());
        let nearest = nearest.map_or_else(String::new, |node| node.reason.clone());
        let names: Vec<&str> = nodes.iter().take(EXAMPLES).map(|node| node.node.as_str()).collect();
        let more = if nodes.len() > EXAMPLES { ", …" } else { "" };
        let kind = if kind.is_empty() { "nothing: it fits" } else { kind };
        table.row([nodes.len().to_string(), kind.to_owned(), nearest, names.join(", ") + more]);
    }
    table.render(true).lines().for_each(|line| {
        let _ = writeln!(out, "  {line}");
    });
    let _ = writeln!(out, "  every node: -o wide");
}

/// How much a node lacks, in billionths of what is asked for.
fn missing(node: &NodeVerdict) -> i128 {
    let share = |short: &minipod_proto::v1::node_verdict::Short| {
        (i128::from(short.requested) - i128::from(short.free)) * 1_000_000_000 / i128::from(short.requested.max(1))
    };
    node.shortfalls.iter().map(share).max().unwrap_or(0)
}

/// The cheapest ways to make room: first what the scheduler may do itself, then the fewest pods.
fn ways_out(out: &mut String, told: &Explanation) {
    let with = told.nodes.iter().filter_map(|node| Some((node, node.remedy.as_ref()?)));
    let mut ways: Vec<(&NodeVerdict, &Remedy)> = with.filter(|(_, remedy)| !remedy.evict.is_empty()).collect();
    ways.sort_by_key(|(node, remedy)| (!remedy.by_preemption, remedy.evict.len(), missing(node), node.node.as_str()));
    if ways.is_empty() {
        let _ = writeln!(out, "no end of pods on a single node would make it fit");
        return;
    }
    let _ = writeln!(out, "it would fit");
    for (node, remedy) in ways.into_iter().take(WAYS) {
        let own = if remedy.by_preemption { ", which the scheduler may do itself (lower priority)" } else { "" };
        let _ = writeln!(out, "  on {} after the end of {}{own}", node.node, pods(remedy));
    }
    let tried = usize::try_from(told.remedies_tried).unwrap_or(usize::MAX);
    if tried < told.nodes.len() {
        let _ = writeln!(out, "  (pods to end were looked for on {tried} of {} nodes)", told.nodes.len());
    }
}

fn help(remedy: &Remedy) -> String {
    match (remedy.text.as_str(), remedy.evict.is_empty()) {
        (text, true) => text.to_owned(),
        ("", false) => format!("end {}", pods(remedy)),
        (text, false) => format!("{text}: end {}", pods(remedy)),
    }
}

fn pods(remedy: &Remedy) -> String {
    let named = remedy.evict.iter().take(EVICTED);
    let named: Vec<String> =
        named.map(|pod| format!("{}/{} (priority {})", pod.namespace, pod.name, pod.priority)).collect();
    match remedy.evict.len().saturating_sub(EVICTED) {
        0 => named.join(", "),
        more => format!("{} and {more} more", named.join(", ")),
    }
}

/// An explanation as JSON.
#[must_use]
pub fn json(told: &Explanation) -> String {
    pretty(&value(told))
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

fn value(told: &Explanation) -> Value {
    let nodes = told.nodes.iter().map(|node| {
        let shortfalls = node.shortfalls.iter().map(|short| {
            let amount = |amount| amount_text(&short.resource, amount);
            json!({"resource": short.resource, "requested": amount(short.requested), "free": amount(short.free),
                "missing": amount(short.requested.saturating_sub(short.free)), "allocatable": amount(short.allocatable)})
        });
        let remedy = node.remedy.as_ref().map(|remedy| {
            let evict = remedy.evict.iter().map(
                |pod| json!({"namespace": pod.namespace, "name": pod.name, "priority": pod.priority}),
            );
            json!({"text": remedy.text, "evict": evict.collect::<Vec<_>>(), "byPreemption": remedy.by_preemption})
        });
        json!({"node": node.node, "fits": node.reason.is_empty(), "reason": node.reason, "kind": node.kind,
            "shortfalls": shortfalls.collect::<Vec<_>>(), "remedy": remedy})
    });
    json!({"scheduler": told.scheduler, "summary": told.summary, "state": told.state, "gates": told.gates,
        "remediesTried": told.remedies_tried, "nodes": nodes.collect::<Vec<_>>()})
}

/// Where pods would go.
#[must_use]
pub fn fit_text(fit: &FitResponse, wide: bool) -> String {
    let mut out = String::new();
    let placed = fit.placements.len();
    let _ = writeln!(out, "{placed} of {} pods find a place; nothing was created", fit.asked);
    let mut nodes: BTreeMap<&str, BTreeMap<&str, usize>> = BTreeMap::new();
    for placement in &fit.placements {
        *nodes.entry(&placement.node).or_default().entry(&placement.pod).or_default() += 1;
    }
    if !nodes.is_empty() {
        let mut table = Table::new(&["NODE", "PODS", "WHICH"]);
        for (node, pods) in nodes {
            let which: Vec<String> = pods.iter().map(|(pod, count)| format!("{pod} × {count}")).collect();
            table.row([node.to_owned(), pods.values().sum::<usize>().to_string(), which.join(", ")]);
        }
        out += &table.render(true);
    }
    if !fit.group.is_empty() {
        let _ = writeln!(out, "group {}: none of it would be bound", fit.group);
    }
    if let Some(why) = &fit.why {
        let copy = fit.unplaced_copy;
        let _ = writeln!(out, "the first that finds none is {}, copy {copy}:", fit.unplaced);
        text(why, wide).lines().for_each(|line| {
            let _ = writeln!(out, "  {line}");
        });
    }
    out
}

/// Where pods would go, as JSON.
#[must_use]
pub fn fit_json(fit: &FitResponse) -> String {
    let placements = fit.placements.iter().map(|one| json!({"pod": one.pod, "copy": one.copy, "node": one.node}));
    let unplaced =
        fit.why.as_ref().map(|why| json!({"pod": fit.unplaced, "copy": fit.unplaced_copy, "why": value(why)}));
    let group = (!fit.group.is_empty()).then_some(&fit.group);
    pretty(&json!({"scheduler": fit.scheduler, "asked": fit.asked, "placed": fit.placements.len(),
        "placements": placements.collect::<Vec<_>>(), "unplaced": unplaced, "groupFallsShort": group}))
}

#[cfg(test)]
mod tests {
    use minipod_proto::v1::fit_response::Placement;
    use minipod_proto::v1::node_verdict::Short;
    use minipod_proto::v1::remedy::Pod;

    use super::*;

    fn short(node: &str, free: i64, evict: &[(&str, i32)]) -> NodeVerdict {
        let evict = evict.iter().map(|(name, priority)| Pod {
            namespace: "default".into(),
            name: (*name).into(),
            priority: *priority,
        });
        let missing = (1 << 30) - free;
        NodeVerdict {
            node: node.into(),
            reason: format!("memory short by {}", amount_text("memory", missing)),
            kind: "too little memory".into(),
            shortfalls: vec![Short { resource: "memory".into(), requested: 1 << 30, free, allocatable: 2 << 30 }],
            remedy: Some(Remedy {
                text: format!("free {} memory", amount_text("memory", missing)),
                evict: evict.collect(),
                by_preemption: false,
            }),
        }
    }

    fn told(nodes: Vec<NodeVerdict>) -> Explanation {
        let tried = nodes.len() as i64;
        Explanation { scheduler: "default-scheduler".into(), nodes, remedies_tried: tried, ..Explanation::default() }
    }

    #[test]
    fn few_nodes_are_shown_one_by_one_with_what_would_help() {
        let told = told(vec![short("a", 768 << 20, &[("web", 5)]), short("b", 0, &[])]);
        assert_eq!(
            text(&told, false),
            "it fits on 0 of 2 nodes
  NODE   AGAINST IT              WHAT WOULD HELP
  a      memory short by 256Mi   free 256Mi memory: end default/web (priority 5)
  b      memory short by 1Gi     free 1Gi memory
it would fit
  on a after the end of default/web (priority 5)
"
        );
    }

    #[test]
    fn thousands_of_nodes_are_a_few_lines() {
        let mut nodes: Vec<NodeVerdict> = (0..4_000).map(|at| short(&format!("n{at:04}"), at << 10, &[])).collect();
        nodes.extend((0..1_000).map(|at| NodeVerdict {
            node: format!("m{at:04}"),
            reason: "not ready".into(),
            kind: "not ready".into(),
            ..NodeVerdict::default()
        }));
        let told = told(nodes);
        let short = text(&told, false);
        assert_eq!(short.lines().count(), 6, "{short}");
        assert!(short.contains("4000    too little memory") && short.contains("n3999, n3998, n3997, …"), "{short}");
        assert!(short.contains("1000    not ready"), "{short}");
        assert_eq!(text(&told, true).lines().count(), 5_003);
        let value: Value = serde_json::from_str(&json(&told)).expect("JSON");
        assert_eq!(value["nodes"].as_array().map(Vec::len), Some(5_000));
        assert_eq!(value["nodes"][0]["shortfalls"][0]["missing"], "1Gi");
    }

    #[test]
    fn where_pods_would_go() {
        let placement = |copy, node: &str| Placement { pod: "web".into(), copy, node: node.into() };
        let fit = FitResponse {
            placements: vec![placement(1, "b"), placement(2, "a"), placement(3, "b")],
            asked: 40,
            unplaced: "web".into(),
            unplaced_copy: 4,
            why: Some(told(vec![short("a", 0, &[]), short("b", 0, &[])])),
            ..FitResponse::default()
        };
        let shown = fit_text(&fit, false);
        assert!(shown.starts_with("3 of 40 pods find a place; nothing was created\nNODE   PODS   WHICH\na      1      web × 1\nb      2      web × 2\nthe first that finds none is web, copy 4:\n  it fits on 0 of 2 nodes\n"), "{shown}");
        let value: Value = serde_json::from_str(&fit_json(&fit)).expect("JSON");
        assert_eq!((&value["placed"], &value["unplaced"]["copy"]), (&json!(3), &json!(4)));
    }
}
