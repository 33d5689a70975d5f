//! Runs cases of scheduling facts (`*.jsonl`, one case a line) through the scheduler's core. The format is described in
//! `scheduler/testdata/README.md`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use minipod_proto::Resource;
use minipod_proto::quantity::Quantity;
use minipod_proto::resources;
use minipod_proto::selector::LabelSelector;
use minipod_proto::v1::{self, Affinity, Namespace, Node, Pod};
use serde::Deserialize;
use serde_json::Value;

use crate::plan::{Budget, Core, Event, NodeInfo, PodId, PodInfo, Profile, Reason, Score};

/// A file of cases that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CasesError {
    /// The directory or a file cannot be read.
    #[error("read {path}: {source}")]
    Read {
        /// Which.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// There is no case at all.
    #[error("{path}: there is no *.jsonl file with a case in it")]
    Empty {
        /// Which directory.
        path: String,
    },
}

/// What a case says and how it went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// The case.
    pub id: String,
    /// `None`: as expected; else the difference.
    pub difference: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Case {
    id: String,
    kind: String,
    nodes: Vec<Node>,
    existing_pods: Vec<Pod>,
    namespaces: Vec<Namespace>,
    pod: Pod,
    args: Args,
    expect: Value,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Args {
    /// Look at this one concern only, by the name of Kubernetes' plugin; empty: at everything.
    plugin: String,
    budgets: Vec<BudgetArg>,
    selector: String,
    labels: BTreeMap<String, String>,
    text: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct BudgetArg {
    namespace: String,
    selector: v1::LabelSelector,
    allowed: i64,
}

/// Runs all cases of a directory, file by file in the order of their names.
///
/// # Errors
/// When the directory cannot be read or has no case.
pub fn run_directory(directory: &Path) -> Result<Vec<Verdict>, CasesError> {
    let read = |path: &Path, source| CasesError::Read { path: path.display().to_string(), source };
    let entries = std::fs::read_dir(directory).map_err(|source| read(directory, source))?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(|source| read(directory, source))?.path();
        if path.extension().is_some_and(|extension| extension == "jsonl") {
            files.push(path);
        }
    }
    files.sort();
    let mut verdicts = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(&file).map_err(|source| read(&file, source))?;
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            verdicts.push(run_line(line, &format!("{name}:{}", number + 1)));
        }
    }
    if verdicts.is_empty() { Err(CasesError::Empty { path: directory.display().to_string() }) } else { Ok(verdicts) }
}

/// Runs one case; `place` names it if it has no id.
pub fn run_line(line: &str, place: &str) -> Verdict {
    match serde_json::from_str::<Case>(line) {
        Err(error) => Verdict { id: place.to_owned(), difference: Some(format!("not a case: {error}")) },
        Ok(case) => {
            let id = if case.id.is_empty() { place.to_owned() } else { case.id.clone() };
            Verdict { id, difference: case.run().err() }
        }
    }
}

/// Id and verdict per case, and a total.
pub fn report(verdicts: &[Verdict]) -> String {
    let mut text = String::new();
    for verdict in verdicts {
        // Writing to a String cannot fail.
        let _ = match &verdict.difference {
            None => writeln!(text, "{} ok", verdict.id),
            Some(difference) => writeln!(text, "{} DIFFERS {}", verdict.id, difference.replace('\n', " ")),
        };
    }
    let different = verdicts.iter().filter(|verdict| verdict.difference.is_some()).count();
    let _ = writeln!(text, "total {} ok {} differ {different}", verdicts.len(), verdicts.len() - different);
    text
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, ours: &T, expected: &T) -> Result<(), String> {
    if ours == expected { Ok(()) } else { Err(format!("{what}: ours {ours:?}, expected {expected:?}")) }
}

impl Case {
    fn run(&self) -> Result<(), String> {
        match self.kind.as_str() {
            "filter" => self.filter(),
            "score" => self.score(),
            "preempt" => self.preempt(),
            "requests" => self.requests(),
            "selector" => self.selector(),
            "quantity" => self.quantity(),
            other => Err(format!(
                "unknown kind {other:?}: there are filter, score, preempt, requests, selector and quantity"
            )),
        }
    }

    /// The case's cluster, and its pod.
    fn core(&self) -> Result<(Core, PodId), String> {
        let profile = if self.args.plugin.ends_with("MostAllocated") { Profile::Pack } else { Profile::Spread };
        let mut core = Core::new(profile);
        for namespace in &self.namespaces {
            core.apply(Event::Namespace(namespace.name().into(), namespace.meta().labels.clone()));
        }
        for node in &self.nodes {
            let mut node = node.clone();
            only_node(&self.args.plugin, &mut node);
            core.apply(Event::Node(NodeInfo::new(&node).map_err(|error| error.to_string())?));
        }
        for (at, pod) in self.existing_pods.iter().enumerate() {
            let mut pod = self.prepared(pod, &format!("existing-{at}"));
            if pod.node_name().is_none() {
                pod.spec_mut().node_name = "no-such-node".to_owned();
            }
            core.apply(Event::Pod(PodInfo::new(&pod).map_err(|error| error.to_string())?));
        }
        let mut pod = self.prepared(&self.pod, "the-pod");
        pod.spec_mut().node_name.clear();
        let info = PodInfo::new(&pod).map_err(|error| error.to_string())?;
        let id = core.upsert_pod(info).ok_or("the pod has ended already")?;
        Ok((core, id))
    }

    fn prepared(&self, pod: &Pod, name: &str) -> Pod {
        let mut pod = pod.clone();
        only_pod(&self.args.plugin, &mut pod);
        let meta = pod.meta_mut();
        // Names in the tables are not always unique or there; the place in the list is.
        meta.uid = name.to_owned();
        if meta.name.is_empty() {
            meta.name = name.to_owned();
        }
        pod
    }

    fn filter(&self) -> Result<(), String> {
        let expected: BTreeMap<String, bool> =
            serde_json::from_value(self.expect.clone()).map_err(|error| format!("expect: want node: bool, {error}"))?;
        let (core, pod) = match self.core() {
            Ok(known) => known,
            // A pod that cannot be understood goes nowhere, and its condition says why.
            Err(_) if expected.values().all(|fits| !fits) => return Ok(()),
            Err(error) => return Err(error),
        };
        for reason in core.explain(pod).nodes {
            // A spread constraint says nothing of nodes that the pod's node affinity excludes.
            let elsewhere = self.args.plugin == "PodTopologySpread" && matches!(reason.reason, Some(Reason::Fixed(_)));
            if let Some(fits) = expected.get(&reason.node).filter(|_| !elsewhere)
                && *fits != reason.reason.is_none()
            {
                let ours = reason.reason.map_or("fits".to_owned(), |reason| reason.to_string());
                return Err(format!(
                    "{}: ours {ours}, expected {}",
                    reason.node,
                    if *fits { "fits" } else { "refused" }
                ));
            }
        }
        Ok(())
    }

    fn score(&self) -> Result<(), String> {
        let expected: BTreeMap<String, i64> = serde_json::from_value(self.expect.clone())
            .map_err(|error| format!("expect: want node: score, {error}"))?;
        let (mut core, pod) = self.core()?;
        let mut ours = Vec::new();
        for (node, theirs) in &expected {
            let id = core.node_id(node).ok_or_else(|| format!("there is no node {node}"))?;
            // Theirs scores what would not fit as well; here it has no score.
            if let Some(score) = core.score(pod, id) {
                ours.push((node, *theirs, self.concern(&score)));
            }
        }
        if ours.is_empty() {
            return Err("all nodes are refused and have no score".to_owned());
        }
        for (better, theirs, score) in &ours {
            // Theirs are rounded: equal scores say nothing, different ones fix the order.
            let worse = ours.iter().find(|(_, other, other_score)| theirs > other && score <= other_score);
            if let Some((worse, ..)) = worse {
                return Err(format!("{better} must be better than {worse}"));
            }
        }
        Ok(())
    }

    /// The part of a score that the case is about.
    fn concern(&self, score: &Score) -> (i64, i64) {
        match self.args.plugin.as_str() {
            "TaintToleration" => (-i64::from(score.fixed.shunned.0), 0),
            "NodeAffinity" => (score.fixed.preference, 0),
            "InterPodAffinity" => (score.pull, 0),
            "PodTopologySpread" => (score.crowding.0.saturating_neg(), 0),
            _ => (score.rank, 0),
        }
    }

    fn preempt(&self) -> Result<(), String> {
        #[derive(Deserialize)]
        struct Expect {
            candidates: BTreeMap<String, Option<Candidate>>,
            chosen: Vec<String>,
        }
        #[derive(Deserialize, PartialEq, Debug)]
        struct Candidate {
            victims: Vec<String>,
            violations: usize,
        }
        let expected: Expect =
            serde_json::from_value(self.expect.clone()).map_err(|error| format!("expect: {error}"))?;
        let (mut core, pod) = self.core()?;
        let budgets = self.args.budgets.iter().map(|budget| {
            let selector = LabelSelector::from_message(&budget.selector).map_err(|error| error.to_string())?;
            Ok(Budget { namespace: budget.namespace.clone(), selector, allowed: budget.allowed })
        });
        core.set_budgets(budgets.collect::<Result<_, String>>()?);
        for (name, theirs) in expected.candidates {
            let node = core.node_id(&name).ok_or_else(|| format!("there is no node {name}"))?;
            let ours = core.victims(pod, node).map(|one| {
                let names = one.victims.iter().filter_map(|victim| core.pod(*victim));
                let mut victims: Vec<String> = names.map(PodInfo::key).collect();
                victims.sort();
                Candidate { victims, violations: one.violations }
            });
            let theirs = theirs.map(|mut one| {
                one.victims.sort();
                one
            });
            same(&name, &ours, &theirs)?;
        }
        let ours = core.preempt(pod).map(|one| core.node_name(one.node).to_owned());
        match ours {
            Some(node) if expected.chosen.contains(&node) => Ok(()),
            None if expected.chosen.is_empty() => Ok(()),
            ours => Err(format!("chosen: ours {ours:?}, expected one of {:?}", expected.chosen)),
        }
    }

    fn requests(&self) -> Result<(), String> {
        let expected: BTreeMap<String, i64> = serde_json::from_value(self.expect.clone())
            .map_err(|error| format!("expect: want resource: amount, {error}"))?;
        let ours = resources::pod_requests(self.pod.spec()).map_err(|error| error.to_string())?;
        expected.iter().try_for_each(|(resource, amount)| same(resource, &ours.get(resource), amount))
    }

    fn selector(&self) -> Result<(), String> {
        let parsed = LabelSelector::parse(&self.args.selector);
        match (self.expect.get("valid").and_then(Value::as_bool), self.expect.get("matches").and_then(Value::as_bool)) {
            (Some(valid), _) => same("valid", &parsed.is_ok(), &valid),
            (None, Some(matches)) => {
                let parsed = parsed.map_err(|error| error.to_string())?;
                same("matches", &parsed.matches(&self.args.labels), &matches)
            }
            (None, None) => Err("expect: want valid or matches".to_owned()),
        }
    }

    fn quantity(&self) -> Result<(), String> {
        let parsed = self.args.text.parse::<Quantity>();
        if self.expect.get("valid").and_then(Value::as_bool) == Some(false) {
            return same("valid", &parsed.is_ok(), &false);
        }
        let quantity = parsed.map_err(|error| error.to_string())?;
        let expected = |key: &str| self.expect.get(key);
        if let Some(canonical) = expected("canonical").and_then(Value::as_str) {
            same("canonical", &quantity.to_string().as_str(), &canonical)?;
        }
        if let Some(value) = expected("value").and_then(Value::as_i64) {
            same("value", &quantity.value_ceil(), &value)?;
        }
        if let Some(milli) = expected("milli").and_then(Value::as_i64) {
            same("milli", &quantity.milli_value_ceil(), &milli)?;
        }
        Ok(())
    }
}

/// Leaves of a node what one plugin looks at.
fn only_node(plugin: &str, node: &mut Node) {
    if plugin.is_empty() {
        return;
    }
    if plugin.ends_with("Allocated") {
        node.status_mut().allocatable.insert("pods".to_owned(), "1M".to_owned());
    } else if plugin != "NodeResourcesFit" {
        let plenty = [("cpu", "1M"), ("memory", "1Pi"), ("ephemeral-storage", "1Pi"), ("pods", "1M")];
        node.status_mut().allocatable = plenty.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    }
    node.status_mut().conditions.clear();
    if plugin != "TaintToleration" {
        node.spec_mut().taints.clear();
    }
    if plugin != "NodeUnschedulable" {
        node.spec_mut().unschedulable = false;
    }
}

/// Leaves of a pod what one plugin looks at.
fn only_pod(plugin: &str, pod: &mut Pod) {
    if plugin.is_empty() {
        return;
    }
    let spec = pod.spec_mut();
    if !plugin.starts_with("NodeResources") {
        spec.overhead.clear();
        spec.resources = None;
        for container in spec.init_containers.iter_mut().chain(&mut spec.containers) {
            container.resources = None;
        }
    }
    if plugin != "NodePorts" {
        for container in spec.init_containers.iter_mut().chain(&mut spec.containers) {
            container.ports.clear();
        }
    }
    let by_node = plugin == "NodeAffinity" || plugin == "PodTopologySpread";
    if !by_node {
        spec.node_selector.clear();
    }
    let affinity = spec.affinity.take().unwrap_or_default();
    spec.affinity = Some(Box::new(Affinity {
        node_affinity: affinity.node_affinity.filter(|_| by_node),
        pod_affinity: affinity.pod_affinity.filter(|_| plugin == "InterPodAffinity"),
        pod_anti_affinity: affinity.pod_anti_affinity.filter(|_| plugin == "InterPodAffinity"),
    }));
    if plugin != "PodTopologySpread" {
        spec.topology_spread_constraints.clear();
    }
    if plugin != "TaintToleration" && plugin != "NodeUnschedulable" {
        spec.tolerations.clear();
    }
}
