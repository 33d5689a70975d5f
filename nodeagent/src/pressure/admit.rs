//! Which new pods a node takes that runs short: pure, as the kubelet's eviction manager admits them.
//!
//! A scheduler that has seen the node's taints sends none of those that are refused here; one that has not, or a pod that tolerates the taint of
//! another condition, meets this. What is on the node already stays: whether that goes is the business of [`super::plan`].

use minipod_proto::resources::{QosClass, qos_class};
use minipod_proto::scheduling::{NO_SCHEDULE, tolerates};
use minipod_proto::v1::{Pod, Taint};

use super::plan::{CRITICAL_PRIORITY, Conditions};
use crate::plan::EVICTED;
use crate::plan::model::Refused;

/// The taint of MemoryPressure.
const MEMORY_PRESSURE: &str = "node.kubernetes.io/memory-pressure";

/// Why a pod that is new cannot be on a node in this condition, in the kubelet's words.
#[must_use]
pub fn refusal(pod: &Pod, node: Conditions) -> Option<Refused> {
    let spec = pod.spec();
    let names = node.names();
    if names.is_empty() || spec.priority.unwrap_or(0) >= CRITICAL_PRIORITY {
        return None;
    }
    // Only memory is promised to who asks for it; the disk and process ids are everybody's.
    if node == (Conditions { memory: true, ..Conditions::default() }) {
        let taint = Taint { key: MEMORY_PRESSURE.to_owned(), effect: NO_SCHEDULE.to_owned(), ..Taint::default() };
        let asks = qos_class(spec).unwrap_or(QosClass::BestEffort) != QosClass::BestEffort;
        if asks || tolerates(&spec.tolerations, &taint) {
            return None;
        }
    }
    let message = format!("The node had condition: [{}]. ", names.join(" "));
    Some(Refused { reason: EVICTED, message })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `kind`: BestEffort, Burstable or Guaranteed.
    fn pod(kind: &str, priority: i32, toleration: &str) -> Pod {
        let resources = match kind {
            "BestEffort" => "",
            "Burstable" => ", resources: {requests: {memory: 1Mi}}",
            "Guaranteed" => ", resources: {limits: {memory: 1Mi, cpu: 1}}",
            other => panic!("{other}"),
        };
        let yaml = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: p}}\nspec:\n  tolerations: [{toleration}]\n  containers: [{{name: c, image: \
             i{resources}}}]\n"
        );
        let mut objects = minipod_proto::manifest::parse(&yaml).unwrap_or_else(|problems| panic!("{problems}"));
        let mut object = objects.remove(0);
        minipod_proto::defaults::apply(&mut object);
        let Some(minipod_proto::v1::object::Kind::Pod(mut pod)) = object.kind else { panic!("not a pod") };
        pod.spec_mut().priority = Some(priority);
        pod
    }

    #[test]
    fn who_is_taken_depends_on_what_is_short() {
        const MEMORY: &str = "{key: node.kubernetes.io/memory-pressure, operator: Exists, effect: NoSchedule}";
        const DISK: &str = "{key: node.kubernetes.io/disk-pressure, operator: Exists}";
        const ANY: &str = "{operator: Exists}";
        const OTHER_EFFECT: &str = "{key: node.kubernetes.io/memory-pressure, operator: Exists, effect: NoExecute}";
        // What is short; quality of service, priority, toleration; whether it is taken.
        for (short, kind, priority, toleration, taken) in [
            ("", "BestEffort", 0, "", true),
            ("memory", "BestEffort", 0, "", false),
            ("memory", "BestEffort", 1_999_999_999, "", false),
            ("memory", "BestEffort", 2_000_000_000, "", true),
            ("memory", "BestEffort", 0, MEMORY, true),
            ("memory", "BestEffort", 0, ANY, true),
            ("memory", "BestEffort", 0, DISK, false),
            ("memory", "BestEffort", 0, OTHER_EFFECT, false),
            ("memory", "Burstable", 0, "", true),
            ("memory", "Guaranteed", 0, "", true),
            ("disk", "BestEffort", 0, "", false),
            ("disk", "Burstable", 0, DISK, false),
            ("disk", "Guaranteed", 0, ANY, false),
            ("disk", "Guaranteed", 2_000_000_000, "", true),
            ("pids", "Guaranteed", 0, ANY, false),
            ("pids", "BestEffort", 2_000_001_000, "", true),
            // Memory is not all that is short.
            ("memory disk", "Guaranteed", 0, MEMORY, false),
            ("memory pids", "Burstable", 0, "", false),
            ("memory disk pids", "BestEffort", 2_000_000_000, "", true),
        ] {
            let has = |name| short.split(' ').any(|word| word == name);
            let node = Conditions { memory: has("memory"), disk: has("disk"), pids: has("pids") };
            let got = refusal(&pod(kind, priority, toleration), node);
            assert_eq!(got.is_none(), taken, "{short}: {kind} {priority} {toleration}");
            assert!(got.is_none_or(|refused| refused.reason == "Evicted"));
        }
    }

    #[test]
    fn the_message_names_what_is_short() {
        let told = |node| refusal(&pod("Guaranteed", 0, ""), node).expect("refused").message;
        let disk = Conditions { disk: true, ..Conditions::default() };
        assert_eq!(told(disk), "The node had condition: [DiskPressure]. ");
        let all = Conditions { memory: true, disk: true, pids: true };
        assert_eq!(told(all), "The node had condition: [MemoryPressure DiskPressure PIDPressure]. ");
    }
}
