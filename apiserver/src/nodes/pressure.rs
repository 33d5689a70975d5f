//! Taints that follow a node's conditions: a node that runs short gets no new pods but those that tolerate it.

use minipod_proto::v1::{Node, Taint, Time};

/// Conditions, and the taints that they bring (Kubernetes' names).
const TAINTS: [(&str, &str); 3] = [
    ("MemoryPressure", "node.kubernetes.io/memory-pressure"),
    ("DiskPressure", "node.kubernetes.io/disk-pressure"),
    ("PIDPressure", "node.kubernetes.io/pid-pressure"),
];

/// Makes the taints those that the conditions call for; all others stay.
pub fn follow_pressure(node: &mut Node, now: Time) {
    for (condition, key) in TAINTS {
        let short = node.condition(condition).is_some_and(|condition| condition.status == "True");
        let taints = &mut node.spec_mut().taints;
        let has = taints.iter().any(|taint| taint.key == key && taint.effect == "NoSchedule");
        if short && !has {
            let taint = Taint {
                key: key.to_owned(),
                effect: "NoSchedule".to_owned(),
                time_added: Some(now),
                ..Taint::default()
            };
            taints.push(taint);
        } else if !short && has {
            taints.retain(|taint| taint.key != key || taint.effect != "NoSchedule");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taints_come_and_go_with_their_conditions_alone() {
        let mut node = Node::default();
        let own = Taint { key: "example.com/x".into(), effect: "NoSchedule".into(), ..Taint::default() };
        node.spec_mut().taints.push(own);
        let mut keys = Vec::new();
        for (memory, disk, pids) in [
            ("True", "False", "False"),
            ("True", "True", "False"),
            ("Unknown", "True", "True"),
            ("False", "False", "False"),
        ] {
            for (kind, status) in [("MemoryPressure", memory), ("DiskPressure", disk), ("PIDPressure", pids)] {
                node.status_mut().set_condition(kind, status, "", "", Time::default());
            }
            follow_pressure(&mut node, Time::default());
            let names =
                node.spec().taints.iter().map(|taint| taint.key.rsplit('/').next().unwrap_or_default().to_owned());
            keys.push(names.collect::<Vec<_>>().join(" "));
        }
        assert_eq!(keys, ["x memory-pressure", "x memory-pressure disk-pressure", "x disk-pressure pid-pressure", "x"]);
    }
}
