//! What Kubernetes knows and minipod refuses: never ignored, always named, with the reason.
//!
//! Two tables: [`REFUSED`] are fields of core.proto that nothing carries out yet (delete the row with the change that does),
//! and `FOREIGN` are fields that core.proto does not have. [`markdown`] prints the first for ARCHITECTURE.md.

use std::borrow::Cow;

use serde_json::Value as Json;

use crate::{
    manifest::{Node, Tree},
    problem::Problem,
    schema::{self, Cardinality, Message, Value},
    v1::{Object, PodSpec},
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
}

use Accepted::{Empty, Values};

const fn row(message: &'static str, field: &'static str, accepted: Accepted, why: &'static str) -> Row {
    Row { message, field, why, accepted }
}

const NO_ACCOUNTS: &str = "there are no service accounts";

/// The fields of core.proto that are refused, in the order of core.proto.
pub const REFUSED: &[Row] = &[
    row("PodSpec", "serviceAccountName", Values(&["default"]), NO_ACCOUNTS),
    row("PodSpec", "serviceAccount", Values(&["default"]), NO_ACCOUNTS),
    row("PodSpec", "automountServiceAccountToken", Values(&["false"]), NO_ACCOUNTS),
    row("PodSpec", "runtimeClassName", Empty, "there is one runtime"),
    row("PodSpec", "hostnameOverride", Empty, "use hostname"),
    row("Container", "volumeDevices", Empty, "there are no block volumes"),
    row("LifecycleHandler", "tcpSocket", Empty, "Kubernetes accepts it and never runs it: use exec or httpGet"),
    row("SecurityContext", "seLinuxOptions", Empty, "SELinux labels are not set"),
    row("PodSecurityContext", "seLinuxOptions", Empty, "SELinux labels are not set"),
    row("PodSecurityContext", "seLinuxChangePolicy", Empty, "SELinux labels are not set"),
];

/// What a rule sees of a value, of a manifest or of an object.
pub(crate) trait Seen: Sized {
    /// The scalar as text; `None` for lists and maps.
    fn scalar(&self) -> Option<Cow<'_, str>>;
    /// Whether it is as good as absent. An empty map is a choice (`emptyDir: {}`), not an absence.
    fn is_nothing(&self) -> bool;
}

fn truth(value: bool) -> &'static str {
    if value { "true" } else { "false" }
}

impl Seen for Node {
    fn scalar(&self) -> Option<Cow<'_, str>> {
        match &self.tree {
            Tree::Bool(value) => Some(truth(*value).into()),
            Tree::Text(text) | Tree::Number(text) => Some(text.into()),
            _ => None,
        }
    }
    fn is_nothing(&self) -> bool {
        match &self.tree {
            Tree::Null => true,
            Tree::List(items) => items.is_empty(),
            Tree::Text(text) => text.is_empty(),
            Tree::Bool(_) | Tree::Number(_) | Tree::Map(_) => false,
        }
    }
}

impl Seen for Json {
    fn scalar(&self) -> Option<Cow<'_, str>> {
        match self {
            Json::Bool(value) => Some(truth(*value).into()),
            Json::String(text) => Some(text.into()),
            Json::Number(number) => Some(number.to_string().into()),
            _ => None,
        }
    }
    fn is_nothing(&self) -> bool {
        match self {
            Json::Null => true,
            Json::Array(items) => items.is_empty(),
            Json::String(text) => text.is_empty(),
            Json::Bool(_) | Json::Number(_) | Json::Object(_) => false,
        }
    }
}

/// Why this value of a field is refused, if it is.
pub(crate) fn refused<V: Seen>(message: &str, field: &str, value: &V) -> Option<&'static str> {
    // An ephemeral container has the fields of a container; those that are refused here it must not have at all.
    let row = REFUSED.iter().find(|row| row.field == field && row.message == message)?;
    let accepted = value.is_nothing()
        || match &row.accepted {
            Empty => false,
            Values(values) => value.scalar().is_some_and(|found| values.contains(&found.as_ref())),
        };
    (!accepted).then_some(row.why)
}

/// The refused fields that an object uses, for objects that came without a manifest.
pub fn check(object: &Object) -> Vec<Problem> {
    // All rows are about pods.
    let Some(spec) = object.as_pod().and_then(|pod| pod.spec.as_ref()) else { return Vec::new() };
    if !may_be_refused(spec) {
        return Vec::new();
    }
    let Some(message) = schema::message("PodSpec") else { return Vec::new() };
    let mut problems = Vec::new();
    match serde_json::to_value(spec) {
        Ok(json) => walk(message, &json, &Place { name: "spec", index: None, above: None }, &mut problems),
        Err(error) => problems.push(Problem::new("spec", error.to_string())),
    }
    problems
}

/// Whether one of the refused fields is set: few pods have any, and every create is asked. [`check`] says whether its value is refused, and
/// where it is.
fn may_be_refused(spec: &PodSpec) -> bool {
    let containers = spec.init_containers.iter().chain(&spec.containers);
    let of_pod = spec.security_context.as_ref();
    !spec.service_account_name.is_empty()
        || !spec.service_account.is_empty()
        || spec.automount_service_account_token.is_some()
        || !spec.runtime_class_name.is_empty()
        || !spec.hostname_override.is_empty()
        // Their containers have another type; few pods have them.
        || !spec.ephemeral_containers.is_empty()
        || of_pod.is_some_and(|of_pod| {
            of_pod.se_linux_options.is_some() || !of_pod.se_linux_change_policy.is_empty()
        })
        || containers.into_iter().any(|container| {
            let hooks = container.lifecycle.as_ref();
            let hooks = hooks.into_iter().flat_map(|hooks| hooks.post_start.iter().chain(&hooks.pre_stop));
            !container.volume_devices.is_empty()
                || container.security_context.as_ref().is_some_and(|context| context.se_linux_options.is_some())
                || hooks.into_iter().any(|hook| hook.tcp_socket.is_some())
        })
}

/// A path that is only put together when there is a problem.
struct Place<'a> {
    name: &'a str,
    index: Option<usize>,
    above: Option<&'a Place<'a>>,
}

impl Place<'_> {
    fn path(&self) -> String {
        let above = self.above.map(|above| above.path() + ".").unwrap_or_default();
        let index = self.index.map(|index| format!("[{index}]")).unwrap_or_default();
        format!("{above}{}{index}", self.name)
    }
}

fn walk(message: &Message, json: &Json, place: &Place, problems: &mut Vec<Problem>) {
    let Json::Object(map) = json else { return };
    for (name, value) in map {
        let here = Place { name, index: None, above: Some(place) };
        if let Some(why) = refused(message.name, name, value) {
            problems.push(Problem::new(here.path(), format!("known to Kubernetes, not supported by minipod: {why}")));
        }
        let Some(field) = message.field(name) else { continue };
        match (field.value, field.cardinality, value) {
            (Value::Message(inner), Cardinality::One, value) => walk(inner, value, &here, problems),
            (Value::Message(inner), Cardinality::List, Json::Array(items)) => {
                for (index, item) in items.iter().enumerate() {
                    walk(inner, item, &Place { index: Some(index), ..here }, problems);
                }
            }
            _ => {}
        }
    }
}

/// The table for ARCHITECTURE.md.
pub fn markdown() -> String {
    let mut text = "| field | accepted | why not |\n|---|---|---|\n".to_owned();
    for row in REFUSED {
        let accepted = match &row.accepted {
            Empty => String::new(),
            Values(values) => format!("`{}`", values.join("`, `")),
        };
        text += &format!("| `{}.{}` | {accepted} | {} |\n", row.message, row.field, row.why);
    }
    text
}

const LEGACY_VOLUMES: &str = "network and cloud volumes need drivers that minipod does not have";
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
    ("Volume", &["persistentVolumeClaim", "ephemeral"], "there are no persistent volumes"),
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
    ("ContainerStatus", &["allocatedResourcesStatus"], STATUS_ONLY),
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
    (&["LimitRange", "ResourceQuota", "HorizontalPodAutoscaler", "RuntimeClass"], "there is no such object yet"),
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

    /// An object that came over the wire is told what a manifest is told.
    #[test]
    fn objects_are_refused_like_manifests() {
        let text = "
apiVersion: v1
kind: Pod
metadata: {name: p}
spec:
  hostUsers: true
  containers:
    - {name: a, image: b, tty: false, ports: [{containerPort: 1}], securityContext: {privileged: false}}
  volumes: [{name: v, emptyDir: {medium: Memory, sizeLimit: 1Mi}}]
";
        let good = crate::manifest::parse(text).unwrap_or_else(|problems| panic!("{problems}")).remove(0);
        assert_eq!(check(&good), []);
        let mut bad = good.clone();
        let Some(crate::v1::object::Kind::Pod(pod)) = &mut bad.kind else { panic!("a pod") };
        let spec = pod.spec_mut();
        spec.runtime_class_name = "x".into();
        spec.hostname_override = "h".into();
        let paths: Vec<String> = check(&bad).into_iter().map(|problem| problem.path).collect();
        let expected = ["spec.runtimeClassName", "spec.hostnameOverride"];
        assert_eq!(paths, expected);
        let Err(problems) = crate::manifest::parse(&crate::manifest::to_yaml(&bad)) else { panic!("refused") };
        assert_eq!(problems.list.into_iter().map(|problem| problem.path).collect::<Vec<_>>(), expected);
    }

    /// No row is passed over by the look that most objects end with.
    #[test]
    fn every_row_is_found_in_an_object() {
        for row in REFUSED {
            let value = match row.field {
                "automountServiceAccountToken" => serde_json::json!(true),
                "volumeDevices" => serde_json::json!([{"name": "d", "devicePath": "/d"}]),
                "tcpSocket" => serde_json::json!({"port": 1}),
                "seLinuxOptions" => serde_json::json!({"level": "x"}),
                _ => serde_json::json!("x"),
            };
            let places: &[&[&str]] = match row.message {
                "PodSpec" => &[&[]],
                "PodSecurityContext" => &[&["securityContext"]],
                "Container" => &[&["containers"], &["initContainers"]],
                "SecurityContext" => &[&["containers", "securityContext"], &["initContainers", "securityContext"]],
                "LifecycleHandler" => {
                    &[&["containers", "lifecycle", "postStart"], &["initContainers", "lifecycle", "preStop"]]
                }
                other => panic!("where is a {other}?"),
            };
            for place in places {
                let within = place.iter().rev().fold(serde_json::json!({row.field: value}), |inner, step| {
                    let inner = if step.ends_with("ontainers") { serde_json::json!([inner]) } else { inner };
                    serde_json::json!({*step: inner})
                });
                let pod: crate::v1::Pod = serde_json::from_value(serde_json::json!({"spec": within})).expect("a pod");
                let found = check(&pod.into());
                assert!(
                    found.len() == 1 && found[0].path.ends_with(row.field),
                    "{}.{}: {found:?}",
                    row.message,
                    row.field
                );
            }
        }
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
