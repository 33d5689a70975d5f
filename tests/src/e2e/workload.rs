//! Workloads as data. Shapes and counts are those of scheduler_perf (Kubernetes 1.20, `test/integration/scheduler_perf`), with ten
//! thousand measured pods where the nodes have room for them.

/// Measured pods.
const PODS: usize = 10_000;
/// Pods of one call where they are created together.
pub const TOGETHER: usize = 64;
/// The zone of nodes where all have the same.
const ONE_ZONE: &[&str] = &["zone1"];
/// The zones of the spread workload.
const THREE_ZONES: &[&str] = &["moon-1", "moon-2", "moon-3"];
/// Label of a node's zone.
pub const ZONE: &str = "topology.kubernetes.io/zone";

/// What kind of pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// 100m and 500Mi.
    Default,
    /// As default, in the zone of its like.
    Affinity,
    /// As default, on no node with its like. Of four colours, so that ten thousand fit on 5,000 nodes.
    AntiAffinity,
    /// As default, on nodes of two zones by name.
    NodeAffinity,
    /// As default, spread over zones with a skew of 5.
    Spread,
    /// 900m, of low priority.
    Low,
    /// 3000m, of high priority.
    High,
    /// 9 CPUs: more than any node has.
    TooLarge,
}

/// One measurement.
#[derive(Debug, Clone, Copy)]
pub struct Workload {
    /// Its name; also what its figures begin with.
    pub name: &'static str,
    /// Nodes of 4 CPUs, 32Gi and 110 pods.
    pub nodes: usize,
    /// The nodes' zones, in turn.
    pub zones: &'static [&'static str],
    /// Pods that are there before.
    pub init: (Shape, usize),
    /// Pods that are measured.
    pub measured: (Shape, usize),
    /// Pods that are created in one call.
    pub together: usize,
    /// Whether nodes and pods that do not fit come and go meanwhile.
    pub churn: bool,
}

const fn workload(
    name: &'static str,
    nodes: usize,
    zones: &'static [&'static str],
    init: (Shape, usize),
    measured: (Shape, usize),
) -> Workload {
    Workload { name, nodes, zones, init, measured, together: 1, churn: false }
}

const fn together(workload: Workload) -> Workload {
    Workload { together: TOGETHER, ..workload }
}

/// All of them.
pub const ALL: &[Workload] = &[
    workload("basic_500", 500, ONE_ZONE, (Shape::Default, 500), (Shape::Default, PODS)),
    workload("basic_5000", 5_000, ONE_ZONE, (Shape::Default, 1_000), (Shape::Default, PODS)),
    // The same, from clients that have many pods to create at once.
    together(workload("basic_5000_together", 5_000, ONE_ZONE, (Shape::Default, 1_000), (Shape::Default, PODS))),
    workload("affinity_5000", 5_000, ONE_ZONE, (Shape::Affinity, 5_000), (Shape::Affinity, PODS)),
    together(workload("affinity_5000_together", 5_000, ONE_ZONE, (Shape::Affinity, 5_000), (Shape::Affinity, PODS))),
    workload("anti_affinity_5000", 5_000, ONE_ZONE, (Shape::AntiAffinity, 1_000), (Shape::AntiAffinity, PODS)),
    workload("node_affinity_5000", 5_000, ONE_ZONE, (Shape::Default, 5_000), (Shape::NodeAffinity, PODS)),
    workload("spread_5000", 5_000, THREE_ZONES, (Shape::Default, 5_000), (Shape::Spread, PODS)),
    // Four low ones fill a node; as many high ones as nodes, each of which ends three of them.
    workload("preemption_500", 500, ONE_ZONE, (Shape::Low, 2_000), (Shape::High, 500)),
    workload("unschedulable_5000", 5_000, ONE_ZONE, (Shape::TooLarge, 200), (Shape::Default, PODS)),
    Workload { churn: true, ..workload("churn_5000", 5_000, ONE_ZONE, (Shape::Default, 0), (Shape::Default, PODS)) },
];

impl Workload {
    /// Smaller by that factor: nodes, and pods before and measured.
    #[must_use]
    pub fn divided(self, by: usize) -> Workload {
        let (init, measured) = (self.init, self.measured);
        let (init, measured) = ((init.0, init.1 / by), (measured.0, measured.1 / by));
        Workload { nodes: self.nodes / by, init, measured, ..self }
    }

    /// Whether the pods that are there before get a node.
    pub fn init_fits(&self) -> bool {
        self.init.0 != Shape::TooLarge
    }
}

impl Shape {
    /// A pod of the shape. The scheduler of that name is to bind it.
    pub fn manifest(self, name: &str, index: usize, scheduler: &str) -> String {
        let cpu = match self {
            Shape::Low => "900m",
            Shape::High => "3000m",
            Shape::TooLarge => "9",
            _ => "100m",
        };
        let priority = match self {
            Shape::Low => "\n  priorityClassName: low",
            Shape::High => "\n  priorityClassName: high",
            _ => "",
        };
        let label = match self {
            Shape::Affinity | Shape::Spread => "blue".to_owned(),
            Shape::AntiAffinity => format!("green-{}", index % 4),
            _ => "none".to_owned(),
        };
        let rules = self.rules(&label);
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{color: {label}}}}}\nspec:\n  \
             schedulerName: {scheduler}{priority}{rules}\n  containers:\n  - name: pause\n    image: k8s.gcr.io/pause:3.2\n    \
             ports: [{{containerPort: 80}}]\n    resources: {{limits: {{cpu: \"{cpu}\", memory: 500Mi}}, \
             requests: {{cpu: \"{cpu}\", memory: 500Mi}}}}\n"
        )
    }

    fn rules(self, label: &str) -> String {
        let term = |key: &str| format!("[{{labelSelector: {{matchLabels: {{color: {label}}}}}, topologyKey: {key}}}]");
        let required = "requiredDuringSchedulingIgnoredDuringExecution";
        match self {
            Shape::Affinity => format!("\n  affinity: {{podAffinity: {{{required}: {}}}}}", term(ZONE)),
            Shape::AntiAffinity => {
                format!("\n  affinity: {{podAntiAffinity: {{{required}: {}}}}}", term("kubernetes.io/hostname"))
            }
            Shape::NodeAffinity => format!(
                "\n  affinity: {{nodeAffinity: {{{required}: {{nodeSelectorTerms: [{{matchExpressions: \
                 [{{key: {ZONE}, operator: In, values: [zone1, zone2]}}]}}]}}}}}}"
            ),
            Shape::Spread => format!(
                "\n  topologySpreadConstraints: [{{maxSkew: 5, topologyKey: {ZONE}, whenUnsatisfiable: DoNotSchedule, \
                 labelSelector: {{matchLabels: {{color: {label}}}}}}}]"
            ),
            _ => String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::pod;

    #[test]
    fn every_shape_is_a_pod_that_validation_takes() {
        for workload in ALL {
            for shape in [workload.init.0, workload.measured.0] {
                let mut object = pod(&shape.manifest("pod-7", 7, "default-scheduler")).into();
                minipod_proto::defaults::apply(&mut object);
                let problems = minipod_proto::validate::create(&object);
                assert!(problems.is_empty(), "{shape:?}: {problems:?}");
            }
        }
    }

    #[test]
    fn names_are_each_there_once() {
        let names: std::collections::BTreeSet<&str> = ALL.iter().map(|workload| workload.name).collect();
        assert_eq!(names.len(), ALL.len());
    }
}
