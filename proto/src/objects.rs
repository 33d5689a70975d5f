//! What all objects have in common, and sharper views of their fields.

use std::{fmt, sync::LazyLock};

use crate::v1::{
    ConfigMap, Container, EphemeralContainer, Event, Namespace, Node, NodeCondition, NodeSpec, NodeStatus, Object,
    ObjectMeta, Pod, PodCondition, PodDisruptionBudget, PodDisruptionBudgetSpec, PodSpec, PodStatus, PriorityClass,
    Secret, Time, object,
};

static NO_META: LazyLock<ObjectMeta> = LazyLock::new(ObjectMeta::default);
static NO_POD_SPEC: LazyLock<PodSpec> = LazyLock::new(PodSpec::default);
static NO_POD_STATUS: LazyLock<PodStatus> = LazyLock::new(PodStatus::default);
static NO_NODE_SPEC: LazyLock<NodeSpec> = LazyLock::new(NodeSpec::default);
static NO_NODE_STATUS: LazyLock<NodeStatus> = LazyLock::new(NodeStatus::default);

/// The kinds of objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Kind {
    Pod,
    Node,
    Namespace,
    Event,
    ConfigMap,
    Secret,
    PriorityClass,
    PodDisruptionBudget,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Kind; 8] = [
        Kind::Pod,
        Kind::Node,
        Kind::Namespace,
        Kind::Event,
        Kind::ConfigMap,
        Kind::Secret,
        Kind::PriorityClass,
        Kind::PodDisruptionBudget,
    ];

    /// As in `kind:`.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Pod => "Pod",
            Kind::Node => "Node",
            Kind::Namespace => "Namespace",
            Kind::Event => "Event",
            Kind::ConfigMap => "ConfigMap",
            Kind::Secret => "Secret",
            Kind::PriorityClass => "PriorityClass",
            Kind::PodDisruptionBudget => "PodDisruptionBudget",
        }
    }

    /// As in store keys and REST paths.
    pub fn plural(self) -> &'static str {
        match self {
            Kind::Pod => "pods",
            Kind::Node => "nodes",
            Kind::Namespace => "namespaces",
            Kind::Event => "events",
            Kind::ConfigMap => "configmaps",
            Kind::Secret => "secrets",
            Kind::PriorityClass => "priorityclasses",
            Kind::PodDisruptionBudget => "poddisruptionbudgets",
        }
    }

    /// As kubectl abbreviates it; empty where it does not.
    pub fn short(self) -> &'static str {
        match self {
            Kind::Pod => "po",
            Kind::Node => "no",
            Kind::Namespace => "ns",
            Kind::Event => "ev",
            Kind::ConfigMap => "cm",
            Kind::Secret => "",
            Kind::PriorityClass => "pc",
            Kind::PodDisruptionBudget => "pdb",
        }
    }

    /// As in `apiVersion:`.
    pub fn api_version(self) -> &'static str {
        match self {
            Kind::PriorityClass => "scheduling.k8s.io/v1",
            Kind::PodDisruptionBudget => "policy/v1",
            _ => "v1",
        }
    }

    /// Whether its objects live in a namespace.
    pub fn namespaced(self) -> bool {
        !matches!(self, Kind::Node | Kind::Namespace | Kind::PriorityClass)
    }

    /// The kind with exactly that `kind:`.
    pub fn from_name(name: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// The kind that a user means: singular, plural or short name in any case.
    pub fn parse(text: &str) -> Option<Kind> {
        let text = text.to_ascii_lowercase();
        Kind::ALL.into_iter().find(|kind| {
            kind.plural() == text
                || kind.name().to_ascii_lowercase() == text
                || (!text.is_empty() && kind.short() == text)
        })
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What every kind of object has.
pub trait Resource: prost::Message + Default + Clone + Into<Object> + TryFrom<Object, Error = Object> {
    /// Which kind it is.
    const KIND: Kind;

    /// The metadata, empty if there is none.
    fn meta(&self) -> &ObjectMeta;

    /// The metadata, made if there is none.
    fn meta_mut(&mut self) -> &mut ObjectMeta;

    /// Sets apiVersion and kind, which may be absent in memory and in the store.
    fn set_type(&mut self);

    /// `namespace/name`, or the name alone where there is no namespace.
    fn key(&self) -> String {
        key(self.meta())
    }

    /// metadata.name.
    fn name(&self) -> &str {
        &self.meta().name
    }

    /// metadata.namespace.
    fn namespace(&self) -> &str {
        &self.meta().namespace
    }

    /// metadata.uid.
    fn uid(&self) -> &str {
        &self.meta().uid
    }

    /// metadata.resourceVersion as a number; 0 if there is none.
    fn revision(&self) -> i64 {
        self.meta().resource_version.parse().unwrap_or(0)
    }
}

fn key(meta: &ObjectMeta) -> String {
    if meta.namespace.is_empty() { meta.name.clone() } else { format!("{}/{}", meta.namespace, meta.name) }
}

macro_rules! resources {
    ($($kind:ident),*) => {
        $(
            impl Resource for $kind {
                const KIND: Kind = Kind::$kind;

                fn meta(&self) -> &ObjectMeta {
                    self.metadata.as_ref().unwrap_or_else(|| &NO_META)
                }
                fn meta_mut(&mut self) -> &mut ObjectMeta {
                    self.metadata.get_or_insert_default()
                }
                fn set_type(&mut self) {
                    self.api_version = Self::KIND.api_version().to_owned();
                    self.kind = Self::KIND.name().to_owned();
                }
            }

            impl From<$kind> for Object {
                fn from(inner: $kind) -> Object {
                    Object { kind: Some(object::Kind::$kind(inner)) }
                }
            }

            impl TryFrom<Object> for $kind {
                type Error = Object;

                fn try_from(object: Object) -> Result<$kind, Object> {
                    match object.kind {
                        Some(object::Kind::$kind(inner)) => Ok(inner),
                        _ => Err(object),
                    }
                }
            }
        )*

        impl Object {
            /// Which kind it is; `None` for an object of a kind that this build does not know.
            pub fn kind_of(&self) -> Option<Kind> {
                self.kind.as_ref().map(|kind| match kind { $(object::Kind::$kind(_) => Kind::$kind,)* })
            }

            /// The metadata, empty if there is none.
            pub fn meta(&self) -> &ObjectMeta {
                match &self.kind {
                    $(Some(object::Kind::$kind(inner)) => inner.meta(),)*
                    None => &NO_META,
                }
            }

            /// The metadata, made if there is none; `None` for an object of an unknown kind.
            pub fn meta_mut(&mut self) -> Option<&mut ObjectMeta> {
                match &mut self.kind {
                    $(Some(object::Kind::$kind(inner)) => Some(inner.meta_mut()),)*
                    None => None,
                }
            }

            /// Sets apiVersion and kind.
            pub fn set_type(&mut self) {
                match &mut self.kind {
                    $(Some(object::Kind::$kind(inner)) => inner.set_type(),)*
                    None => {}
                }
            }

            /// An empty object of a kind.
            pub fn empty(kind: Kind) -> Object {
                match kind { $(Kind::$kind => $kind::default().into(),)* }
            }

            /// The encoded inner message, without the envelope that says which kind it is: the form in the store.
            pub fn encode_inner(&self) -> Vec<u8> {
                match &self.kind {
                    $(Some(object::Kind::$kind(inner)) => prost::Message::encode_to_vec(inner),)*
                    None => Vec::new(),
                }
            }

            /// The other way.
            pub fn decode_inner(kind: Kind, bytes: &[u8]) -> Result<Object, prost::DecodeError> {
                match kind { $(Kind::$kind => <$kind as prost::Message>::decode(bytes).map(Object::from),)* }
            }
        }

        impl serde::Serialize for Object {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                match &self.kind {
                    $(Some(object::Kind::$kind(inner)) => inner.serialize(serializer),)*
                    None => serializer.serialize_none(),
                }
            }
        }
    };
}

resources!(Pod, Node, Namespace, Event, ConfigMap, Secret, PriorityClass, PodDisruptionBudget);

impl Object {
    /// `namespace/name`, or the name alone where there is no namespace.
    pub fn key(&self) -> String {
        key(self.meta())
    }

    /// The pod, if it is one.
    pub fn as_pod(&self) -> Option<&Pod> {
        match &self.kind {
            Some(object::Kind::Pod(pod)) => Some(pod),
            _ => None,
        }
    }

    /// The pod, if it is one.
    pub fn as_pod_mut(&mut self) -> Option<&mut Pod> {
        match &mut self.kind {
            Some(object::Kind::Pod(pod)) => Some(pod),
            _ => None,
        }
    }

    /// The disruption budget, if it is one.
    pub fn as_budget(&self) -> Option<&PodDisruptionBudget> {
        match &self.kind {
            Some(object::Kind::PodDisruptionBudget(budget)) => Some(budget),
            _ => None,
        }
    }

    /// The node, if it is one.
    pub fn as_node(&self) -> Option<&Node> {
        match &self.kind {
            Some(object::Kind::Node(node)) => Some(node),
            _ => None,
        }
    }
}

/// Where a pod is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Phase {
    /// Not all containers have started yet.
    #[default]
    Pending,
    /// Bound, and something runs or will run again.
    Running,
    /// All ended well and will not start again.
    Succeeded,
    /// All ended, one of them badly.
    Failed,
    /// Never set here; read as what it is.
    Unknown,
}

impl Phase {
    /// The name in the status.
    pub fn as_str(self) -> &'static str {
        match self {
            Phase::Pending => "Pending",
            Phase::Running => "Running",
            Phase::Succeeded => "Succeeded",
            Phase::Failed => "Failed",
            Phase::Unknown => "Unknown",
        }
    }

    /// Succeeded or Failed.
    pub fn is_terminal(self) -> bool {
        matches!(self, Phase::Succeeded | Phase::Failed)
    }
}

impl From<&str> for Phase {
    /// Empty is Pending: a pod that nothing has reported on yet.
    fn from(text: &str) -> Phase {
        match text {
            "" | "Pending" => Phase::Pending,
            "Running" => Phase::Running,
            "Succeeded" => Phase::Succeeded,
            "Failed" => Phase::Failed,
            _ => Phase::Unknown,
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// When an ended container starts again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum RestartPolicy {
    /// Whatever its exit.
    #[default]
    Always,
    /// After a failure.
    OnFailure,
    /// Not at all.
    Never,
}

impl RestartPolicy {
    /// The policy of that name; `None` for any other text, also the empty one.
    pub fn parse(text: &str) -> Option<RestartPolicy> {
        match text {
            "Always" => Some(RestartPolicy::Always),
            "OnFailure" => Some(RestartPolicy::OnFailure),
            "Never" => Some(RestartPolicy::Never),
            _ => None,
        }
    }
}

/// The grace that a pod has where its spec says nothing, seconds.
pub const DEFAULT_GRACE_SECONDS: i64 = 30;

impl Pod {
    /// The spec, empty if there is none.
    pub fn spec(&self) -> &PodSpec {
        self.spec.as_ref().unwrap_or_else(|| &NO_POD_SPEC)
    }

    /// The spec, made if there is none.
    pub fn spec_mut(&mut self) -> &mut PodSpec {
        self.spec.get_or_insert_default()
    }

    /// The status, empty if there is none.
    pub fn status(&self) -> &PodStatus {
        self.status.as_ref().unwrap_or_else(|| &NO_POD_STATUS)
    }

    /// The status, made if there is none.
    pub fn status_mut(&mut self) -> &mut PodStatus {
        self.status.get_or_insert_default()
    }

    /// Where it is in its life.
    pub fn phase(&self) -> Phase {
        Phase::from(self.status().phase.as_str())
    }

    /// Succeeded or Failed: it never runs again.
    pub fn is_terminal(&self) -> bool {
        self.phase().is_terminal()
    }

    /// Marked for deletion.
    pub fn is_terminating(&self) -> bool {
        self.meta().deletion_timestamp.is_some()
    }

    /// The node it is bound to; `None` before the binding.
    pub fn node_name(&self) -> Option<&str> {
        Some(self.spec().node_name.as_str()).filter(|name| !name.is_empty())
    }

    /// The condition of that type.
    pub fn condition(&self, kind: &str) -> Option<&PodCondition> {
        self.status().conditions.iter().find(|condition| condition.r#type == kind)
    }

    /// Whether that condition is True.
    pub fn condition_true(&self, kind: &str) -> bool {
        self.condition(kind).is_some_and(|condition| condition.status == "True")
    }
}

impl PodSpec {
    /// The pod's restart policy; Always where it says nothing (or nonsense, which validation refuses).
    pub fn restart_policy(&self) -> RestartPolicy {
        RestartPolicy::parse(&self.restart_policy).unwrap_or_default()
    }

    /// Seconds between TERM and KILL.
    pub fn grace_seconds(&self) -> i64 {
        self.termination_grace_period_seconds.unwrap_or(DEFAULT_GRACE_SECONDS).max(0)
    }

    /// Init containers (sidecars among them) and then app containers.
    pub fn all_containers(&self) -> impl Iterator<Item = &Container> {
        self.init_containers.iter().chain(&self.containers)
    }

    /// Debug container of that name.
    pub fn ephemeral_container(&self, name: &str) -> Option<&EphemeralContainer> {
        self.ephemeral_containers.iter().find(|container| container.name == name)
    }

    /// Init or app container of that name.
    pub fn container(&self, name: &str) -> Option<&Container> {
        self.all_containers().find(|container| container.name == name)
    }

    /// Whether one process namespace is for the whole pod.
    pub fn shares_processes(&self) -> bool {
        self.share_process_namespace.unwrap_or(false)
    }

    /// Whether the pod has users of its own, in a user namespace, instead of the node's.
    pub fn has_own_users(&self) -> bool {
        self.host_users == Some(false)
    }
}

impl EphemeralContainer {
    /// The same as a container; what only this kind has is left behind.
    pub fn as_container(&self) -> Container {
        Container {
            name: self.name.clone(),
            image: self.image.clone(),
            command: self.command.clone(),
            args: self.args.clone(),
            working_dir: self.working_dir.clone(),
            ports: self.ports.clone(),
            env_from: self.env_from.clone(),
            env: self.env.clone(),
            resources: self.resources.clone(),
            resize_policy: self.resize_policy.clone(),
            restart_policy: self.restart_policy.clone(),
            restart_policy_rules: self.restart_policy_rules.clone(),
            volume_mounts: self.volume_mounts.clone(),
            volume_devices: self.volume_devices.clone(),
            liveness_probe: self.liveness_probe.clone(),
            readiness_probe: self.readiness_probe.clone(),
            startup_probe: self.startup_probe.clone(),
            lifecycle: self.lifecycle.clone(),
            termination_message_path: self.termination_message_path.clone(),
            termination_message_policy: self.termination_message_policy.clone(),
            image_pull_policy: self.image_pull_policy.clone(),
            security_context: self.security_context.clone(),
            stdin: self.stdin,
            stdin_once: self.stdin_once,
            tty: self.tty,
        }
    }
}

impl Container {
    /// Whether this init container keeps running beside the apps (only meaningful in `initContainers`).
    pub fn is_sidecar(&self) -> bool {
        self.restart_policy == "Always"
    }
}

impl PodDisruptionBudget {
    /// The spec, empty if there is none.
    pub fn spec(&self) -> &PodDisruptionBudgetSpec {
        static NONE: LazyLock<PodDisruptionBudgetSpec> = LazyLock::new(PodDisruptionBudgetSpec::default);
        self.spec.as_ref().unwrap_or_else(|| &NONE)
    }

    /// The spec, made if there is none.
    pub fn spec_mut(&mut self) -> &mut PodDisruptionBudgetSpec {
        self.spec.get_or_insert_default()
    }
}

impl PodStatus {
    /// Sets a condition; lastTransitionTime moves to `now` only when the status changes. Tells whether anything changed.
    pub fn set_condition(&mut self, kind: &str, status: &str, reason: &str, message: &str, now: Time) -> bool {
        let existing = self.conditions.iter_mut().find(|condition| condition.r#type == kind);
        let Some(existing) = existing else {
            self.conditions.push(PodCondition {
                r#type: kind.to_owned(),
                status: status.to_owned(),
                last_transition_time: Some(now),
                reason: reason.to_owned(),
                message: message.to_owned(),
                ..Default::default()
            });
            return true;
        };
        let changed = existing.status != status || existing.reason != reason || existing.message != message;
        if existing.status != status {
            existing.last_transition_time = Some(now);
            existing.status = status.to_owned();
        }
        if changed {
            existing.reason = reason.to_owned();
            existing.message = message.to_owned();
        }
        changed
    }
}

impl Node {
    /// The spec, empty if there is none.
    pub fn spec(&self) -> &NodeSpec {
        self.spec.as_ref().unwrap_or_else(|| &NO_NODE_SPEC)
    }

    /// The spec, made if there is none.
    pub fn spec_mut(&mut self) -> &mut NodeSpec {
        self.spec.get_or_insert_default()
    }

    /// The status, empty if there is none.
    pub fn status(&self) -> &NodeStatus {
        self.status.as_ref().unwrap_or_else(|| &NO_NODE_STATUS)
    }

    /// The status, made if there is none.
    pub fn status_mut(&mut self) -> &mut NodeStatus {
        self.status.get_or_insert_default()
    }

    /// The condition of that type.
    pub fn condition(&self, kind: &str) -> Option<&NodeCondition> {
        self.status().conditions.iter().find(|condition| condition.r#type == kind)
    }

    /// Whether the condition Ready is True.
    pub fn is_ready(&self) -> bool {
        self.condition("Ready").is_some_and(|condition| condition.status == "True")
    }

    /// The address of that type (`InternalIP`, `Hostname` …).
    pub fn address(&self, kind: &str) -> Option<&str> {
        let addresses = &self.status().addresses;
        addresses.iter().find(|address| address.r#type == kind).map(|address| address.address.as_str())
    }
}

impl NodeStatus {
    /// Sets a condition; lastTransitionTime moves to `now` only when the status changes. Tells whether anything but the
    /// heartbeat time changed.
    pub fn set_condition(&mut self, kind: &str, status: &str, reason: &str, message: &str, now: Time) -> bool {
        let existing = self.conditions.iter_mut().find(|condition| condition.r#type == kind);
        let old = existing.as_deref().cloned();
        let last_transition_time = match &old {
            Some(old) if old.status == status => old.last_transition_time,
            _ => Some(now),
        };
        let new = NodeCondition {
            r#type: kind.to_owned(),
            status: status.to_owned(),
            last_heartbeat_time: Some(now),
            last_transition_time,
            reason: reason.to_owned(),
            message: message.to_owned(),
        };
        match existing {
            Some(existing) => *existing = new,
            None => self.conditions.push(new),
        }
        old.is_none_or(|old| old.status != status || old.reason != reason || old.message != message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_by_every_name() {
        for kind in Kind::ALL {
            for text in [kind.name(), kind.plural(), &kind.name().to_uppercase()] {
                assert_eq!(Kind::parse(text), Some(kind), "{text}");
            }
            assert_eq!(Kind::from_name(kind.name()), Some(kind));
            assert_eq!(Object::empty(kind).kind_of(), Some(kind));
        }
        assert_eq!(Kind::parse("po"), Some(Kind::Pod));
        assert_eq!(Kind::parse(""), None);
        assert_eq!(Kind::from_name("pod"), None);
    }

    #[test]
    fn conditions_keep_their_transition_time() {
        let mut status = PodStatus::default();
        let at = |seconds| Time::from_unix(seconds, 0);
        assert!(status.set_condition("Ready", "False", "Starting", "", at(1)));
        assert!(!status.set_condition("Ready", "False", "Starting", "", at(2)));
        assert!(status.set_condition("Ready", "False", "StillStarting", "", at(3)));
        assert_eq!(status.conditions[0].last_transition_time, Some(at(1)));
        assert!(status.set_condition("Ready", "True", "", "", at(4)));
        assert_eq!(status.conditions[0].last_transition_time, Some(at(4)));
        let mut status = NodeStatus::default();
        assert!(status.set_condition("Ready", "True", "", "", at(1)));
        assert!(!status.set_condition("Ready", "True", "", "", at(2)));
        assert_eq!(status.conditions[0].last_heartbeat_time, Some(at(2)));
        assert_eq!(status.conditions[0].last_transition_time, Some(at(1)));
    }

    #[test]
    fn objects_in_the_store() {
        let mut pod = Pod::default();
        pod.meta_mut().name = "a".into();
        pod.meta_mut().namespace = "default".into();
        let object = Object::from(pod.clone());
        let back = Object::decode_inner(Kind::Pod, &object.encode_inner()).unwrap();
        assert_eq!(back, object);
        assert_eq!(Pod::try_from(back), Ok(pod));
        assert!(Node::try_from(object.clone()).is_err());
        assert_eq!(object.key(), "default/a");
        assert_eq!(serde_json::to_string(&object).unwrap(), r#"{"metadata":{"name":"a","namespace":"default"}}"#);
    }
}
