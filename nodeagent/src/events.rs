//! What users read under "Events": reasons and texts as Kubernetes has them.

use minipod_proto::v1::{EventReport, Pod};

use crate::plan::model::Kind;
use crate::want::{Uid, key_of};

/// Normal or Warning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// As intended.
    Normal,
    /// Someone may have to look.
    Warning,
}

/// An event about the pod as a whole.
#[must_use]
pub fn pod_event(pod: &Pod, uid: &Uid, severity: Severity, reason: &str, message: String) -> EventReport {
    let (namespace, name) = key_of(pod);
    EventReport {
        namespace,
        pod: name,
        uid: uid.0.clone(),
        r#type: match severity {
            Severity::Normal => "Normal".to_owned(),
            Severity::Warning => "Warning".to_owned(),
        },
        reason: reason.to_owned(),
        message,
        field_path: String::new(),
    }
}

/// A container's image is being pulled.
#[must_use]
pub fn pulling(pod: &Pod, uid: &Uid, container: &str, image: &str) -> EventReport {
    let is_init = pod.spec().init_containers.iter().any(|init| init.name == container);
    let is_debug = pod.spec().ephemeral_container(container).is_some();
    let kind = if is_init { Kind::Init } else { Kind::App };
    let field_path = field_path(if is_debug { Kind::Debug } else { kind }, container);
    EventReport { field_path, ..pod_event(pod, uid, Severity::Normal, "Pulling", format!("Pulling image \"{image}\"")) }
}

/// Where a container stands in the manifest.
#[must_use]
pub fn field_path(kind: Kind, container: &str) -> String {
    match kind {
        Kind::App => format!("spec.containers{{{container}}}"),
        Kind::Debug => format!("spec.ephemeralContainers{{{container}}}"),
        Kind::Init | Kind::Sidecar => format!("spec.initContainers{{{container}}}"),
    }
}
