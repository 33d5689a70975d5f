//! What Kubernetes knows and minipod refuses: never ignored, always named, with the reason.
//!
//! Two tables: [`REFUSED`] are fields of core.proto that nothing carries out yet (delete the row with the change that does),
//! and `FOREIGN` are fields that core.proto does not have. [`markdown`] prints the first for ARCHITECTURE.md.

use crate::{
    manifest::{Checker, Map, Node, Tree},
    problem::Problem,
    v1::Object,
};

/// A field that is refused.
pub struct Row {
    /// Message in core.proto.
    pub message: &'static str,
    /// Field of it.
    pub field: &'static str,
    /// Why, and what to do instead where there is something.
    pub why: &'static str,
    accepted: Accepted,
}

/// Which values of a refused field change nothing and are therefore accepted.
enum Accepted {
    /// Only absence and emptiness.
    Empty,
    /// These scalars too.
    Values(&'static [&'static str]),
    /// What this says of the value, the message around it and the pod's spec.
    When(&'static str, fn(&Node, &Map, Option<&Map>) -> bool),
}

use Accepted::{Empty, Values, When};

const fn row(message: &'static str, field: &'static str, accepted: Accepted, why: &'static str) -> Row {
    Row { message, field, why, accepted }
}

const PROBES: &str = "probes are not run yet";
const SOURCES: &str = "only emptyDir volumes are made yet";
const NO_ACCOUNTS: &str = "there are no service accounts";
const NO_TTY: &str = "containers have no terminal and no attach yet";

/// The fields of core.proto that are refused, in the order of core.proto.
pub const REFUSED: &[Row] = &[
    row("PodSpec", "ephemeralContainers", Empty, "debug containers are not started yet"),
    row("PodSpec", "serviceAccountName", Values(&["default"]), NO_ACCOUNTS),
    row("PodSpec", "serviceAccount", Values(&["default"]), NO_ACCOUNTS),
    row("PodSpec", "automountServiceAccountToken", Values(&["false"]), NO_ACCOUNTS),
    row("PodSpec", "imagePullSecrets", Empty, "images are loaded with `minictl image load`, not pulled yet"),
    row("PodSpec", "runtimeClassName", Empty, "there is one runtime"),
    row("PodSpec", "hostUsers", Values(&["true"]), "user namespaces are not made yet"),
    row("PodSpec", "hostnameOverride", Empty, "use hostname"),
    row("Container", "envFrom", Empty, "ConfigMaps and Secrets do not reach containers yet"),
    row("Container", "restartPolicyRules", Empty, "the agent follows restartPolicy alone"),
    row("Container", "volumeDevices", Empty, "there are no block volumes"),
    row("Container", "livenessProbe", Empty, PROBES),
    row("Container", "readinessProbe", Empty, PROBES),
    row("Container", "startupProbe", Empty, PROBES),
    row("Container", "stdin", Values(&["false"]), NO_TTY),
    row("Container", "stdinOnce", Values(&["false"]), NO_TTY),
    row("Container", "tty", Values(&["false"]), NO_TTY),
    row("ContainerPort", "hostPort", When("with hostNetwork", host_port), "ports of the node are not forwarded yet"),
    row("EnvVarSource", "configMapKeyRef", Empty, "ConfigMaps do not reach containers yet"),
    row("EnvVarSource", "secretKeyRef", Empty, "Secrets do not reach containers yet"),
    row("VolumeMount", "recursiveReadOnly", Values(&["Disabled"]), "submounts are not made read-only yet"),
    row("VolumeMount", "subPath", Empty, "mount the whole volume"),
    row("VolumeMount", "mountPropagation", Values(&["None"]), "mounts do not propagate yet"),
    row("VolumeMount", "subPathExpr", Empty, "mount the whole volume"),
    row("Lifecycle", "postStart", Empty, "hooks are not run yet"),
    row("Lifecycle", "preStop", Empty, "hooks are not run yet"),
    row("SecurityContext", "privileged", Values(&["false"]), "name the capabilities that are needed"),
    row("SecurityContext", "seLinuxOptions", Empty, "SELinux labels are not set"),
    row("SecurityContext", "procMount", Values(&["Default"]), "/proc is always masked"),
    row("SecurityContext", "appArmorProfile", Empty, "AppArmor profiles are not set yet"),
    row("PodSecurityContext", "seLinuxOptions", Empty, "SELinux labels are not set"),
    row("PodSecurityContext", "supplementalGroupsPolicy", Values(&["Merge"]), "the image's groups are always kept"),
    row(
        "PodSecurityContext",
        "fsGroup",
        Empty,
        "volumes are not handed to a group yet; emptyDir is open to all users of the pod",
    ),
    row("PodSecurityContext", "fsGroupChangePolicy", Empty, "volumes are not handed to a group yet"),
    row("PodSecurityContext", "appArmorProfile", Empty, "AppArmor profiles are not set yet"),
    row("PodSecurityContext", "seLinuxChangePolicy", Empty, "SELinux labels are not set"),
    row("SeccompProfile", "type", Values(&["Unconfined"]), "seccomp filters are not loaded yet"),
    row("Volume", "hostPath", Empty, SOURCES),
    row("Volume", "secret", Empty, SOURCES),
    row("Volume", "downwardAPI", Empty, SOURCES),
    row("Volume", "configMap", Empty, SOURCES),
    row("Volume", "projected", Empty, SOURCES),
    row("Volume", "image", Empty, SOURCES),
    row("EmptyDirVolumeSource", "sizeLimit", When("with medium Memory", in_memory), "space on disk is not limited yet"),
];

/// On the node's network the container's port is the node's.
fn host_port(value: &Node, _: &Map, pod_spec: Option<&Map>) -> bool {
    let host_network = pod_spec.and_then(|spec| find(spec, "hostNetwork"));
    value.tree == Tree::Number("0".to_owned()) || host_network.is_some_and(|node| node.tree == Tree::Bool(true))
}

fn in_memory(_: &Node, around: &Map, _: Option<&Map>) -> bool {
    find(around, "medium").is_some_and(|node| node.tree == Tree::Text("Memory".to_owned()))
}

fn find<'a>(map: &'a Map, name: &str) -> Option<&'a Node> {
    map.iter().find(|(key, _)| key.name == name).map(|(_, node)| node)
}

/// Why this value of a field is refused, if it is.
pub(crate) fn refused(
    message: &str,
    field: &str,
    value: &Node,
    around: &Map,
    pod_spec: Option<&Map>,
) -> Option<&'static str> {
    // An ephemeral container has the fields of a container; the list of them is refused as a whole.
    let row = REFUSED.iter().find(|row| row.message == message && row.field == field)?;
    let empty = match &value.tree {
        Tree::Null => true,
        Tree::List(items) => items.is_empty(),
        Tree::Text(text) => text.is_empty(),
        // An empty map is a choice (`emptyDir: {}`), not an absence.
        Tree::Bool(_) | Tree::Number(_) | Tree::Map(_) => false,
    };
    let accepted = empty
        || match &row.accepted {
            Empty => false,
            Values(values) => match &value.tree {
                Tree::Bool(value) => values.contains(&if *value { "true" } else { "false" }),
                Tree::Text(text) | Tree::Number(text) => values.contains(&text.as_str()),
                _ => false,
            },
            When(_, accepts) => accepts(value, around, pod_spec),
        };
    (!accepted).then_some(row.why)
}

/// The refused fields that an object uses, for objects that came without a manifest.
pub fn check(object: &Object) -> Vec<Problem> {
    let Some(kind) = object.kind_of() else { return Vec::new() };
    let node = serde_json::to_value(object).map_err(|error| Problem::new("", error.to_string()));
    match node.and_then(|json| Node::from_value(json, 0)) {
        Ok(node) => {
            let mut checker = Checker::default();
            checker.object(kind, &node);
            checker.problems.list
        }
        Err(problem) => vec![problem],
    }
}

/// The table for ARCHITECTURE.md.
pub fn markdown() -> String {
    let mut text = "| field | accepted | why not |\n|---|---|---|\n".to_owned();
    for row in REFUSED {
        let accepted = match &row.accepted {
            Empty => String::new(),
            Values(values) => format!("`{}`", values.join("`, `")),
            When(when, _) => (*when).to_owned(),
        };
        text += &format!("| `{}.{}` | {accepted} | {} |\n", row.message, row.field, row.why);
    }
    text
}

const LEGACY_VOLUMES: &str =
    "network and cloud volumes need drivers that minipod does not have; only emptyDir volumes are made yet";
const NO_WINDOWS: &str = "nodes run Linux";
const NO_DEVICES: &str = "devices are not claimed; use an extended resource";
const SERVER_SIDE: &str = "fields have no recorded owners; delete it from the manifest";
const STATUS_ONLY: &str = "this part of the status is not kept; delete the status from the manifest";

/// Fields that core.proto does not have: message, field (`*`: any message), why.
const FOREIGN: &[(&str, &[&str], &str)] = &[
    (
        "Volume",
        &[
            "awsElasticBlockStore",
            "azureDisk",
            "azureFile",
            "cephfs",
            "cinder",
            "csi",
            "fc",
            "flexVolume",
            "flocker",
            "gcePersistentDisk",
            "glusterfs",
            "iscsi",
            "nfs",
            "photonPersistentDisk",
            "portworxVolume",
            "quobyte",
            "rbd",
            "scaleIO",
            "storageos",
            "vsphereVolume",
        ],
        LEGACY_VOLUMES,
    ),
    (
        "Volume",
        &["persistentVolumeClaim", "ephemeral"],
        "there are no persistent volumes; only emptyDir volumes are made yet",
    ),
    ("Volume", &["gitRepo"], "Kubernetes removed it too: clone in an init container"),
    ("VolumeProjection", &["serviceAccountToken", "clusterTrustBundle", "podCertificate"], NO_ACCOUNTS),
    ("PodSpec", &["resourceClaims"], NO_DEVICES),
    ("PodSpec", &["workloadRef", "schedulingGroup"], "there are no workload objects"),
    ("ResourceRequirements", &["claims"], NO_DEVICES),
    ("EnvVarSource", &["fileKeyRef"], "values cannot come from files"),
    ("SecurityContext", &["windowsOptions"], NO_WINDOWS),
    ("PodSecurityContext", &["windowsOptions"], NO_WINDOWS),
    ("ObjectMeta", &["managedFields", "selfLink", "clusterName"], SERVER_SIDE),
    (
        "PodStatus",
        &["resourceClaimStatuses", "extendedResourceClaimStatus", "nodeAllocatableResourceClaimStatuses"],
        STATUS_ONLY,
    ),
    ("ContainerStatus", &["volumeMounts", "user", "allocatedResourcesStatus"], STATUS_ONLY),
    ("NodeSpec", &["configSource", "externalID"], "nodes are configured on the machine"),
    (
        "NodeStatus",
        &[
            "phase",
            "daemonEndpoints",
            "volumesInUse",
            "volumesAttached",
            "config",
            "runtimeHandlers",
            "features",
            "declaredFeatures",
        ],
        STATUS_ONLY,
    ),
    ("NodeSystemInfo", &["swap"], STATUS_ONLY),
    ("NamespaceStatus", &["conditions"], STATUS_ONLY),
];

/// Why a field that core.proto does not have is not there, if Kubernetes has it.
pub(crate) fn foreign(message: &str, field: &str) -> Option<&'static str> {
    let rows = FOREIGN.iter();
    rows.filter(|(of, ..)| *of == message).find(|(_, fields, _)| fields.contains(&field)).map(|(.., why)| *why)
}

/// Kinds of Kubernetes that minipod does not have, with what they would need.
const FOREIGN_KINDS: &[(&[&str], &str)] = &[
    (
        &["Deployment", "ReplicaSet", "StatefulSet", "DaemonSet", "ReplicationController", "Job", "CronJob"],
        "there are no workload controllers, write the Pod of its template",
    ),
    (
        &["Service", "Endpoints", "EndpointSlice", "Ingress", "NetworkPolicy"],
        "there are no services, use the pod's address",
    ),
    (&["PersistentVolume", "PersistentVolumeClaim", "StorageClass"], "there are no persistent volumes"),
    (&["ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"], NO_ACCOUNTS),
    (&["CustomResourceDefinition"], "the kinds are fixed"),
    (
        &["LimitRange", "ResourceQuota", "PodDisruptionBudget", "HorizontalPodAutoscaler", "RuntimeClass"],
        "there is no such object yet",
    ),
];

/// Why Kubernetes' kind of that name is not here, if it is Kubernetes'.
pub(crate) fn foreign_kind(kind: &str) -> Option<&'static str> {
    FOREIGN_KINDS.iter().find(|(kinds, _)| kinds.contains(&kind)).map(|(_, why)| *why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema;

    #[test]
    fn the_tables_name_what_is_there_and_what_is_not() {
        for row in REFUSED {
            let message = schema::message(row.message).unwrap_or_else(|| panic!("no message {}", row.message));
            assert!(message.field(row.field).is_some(), "{}.{} is not in core.proto", row.message, row.field);
        }
        for (message, fields, _) in FOREIGN {
            let known = schema::message(message).unwrap_or_else(|| panic!("no message {message}"));
            for field in *fields {
                assert!(known.field(field).is_none(), "{message}.{field} is in core.proto");
            }
        }
        let kinds = FOREIGN_KINDS.iter().flat_map(|(kinds, _)| *kinds);
        kinds.for_each(|kind| assert_eq!(crate::Kind::from_name(kind), None));
    }

    #[test]
    fn the_architecture_has_this_table() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../ARCHITECTURE.md");
        let text = std::fs::read_to_string(file).expect("read ARCHITECTURE.md");
        let (begin, end) = ("<!-- unsupported:begin -->\n", "<!-- unsupported:end -->");
        let table = text.split_once(begin).and_then(|(_, rest)| rest.split_once(end)).map(|(table, _)| table);
        let table = table.expect("the marks are there");
        assert!(table == markdown(), "put this between the marks in ARCHITECTURE.md:\n{}", markdown());
    }
}
