//! A container's environment: the image's, then the manifest's in order with expansion.

use std::collections::BTreeMap;

use minipod_proto::quantity::Quantity;
use minipod_proto::v1::{Container, EnvVarSource, Pod};

use super::ConfigError;
use super::expand::expand;
use super::resources::field_value;
use crate::want::find_container;

/// What a search for programs starts with when neither image nor manifest says.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Facts of node and sandbox that a manifest can refer to.
#[derive(Debug, Clone, Default)]
pub struct EnvFacts {
    /// This node.
    pub node_name: String,
    /// Its address.
    pub host_ip: String,
    /// The pod's address.
    pub pod_ip: String,
    /// The pod's hostname.
    pub hostname: String,
    /// The node's allocatable: the default of `limits.*`.
    pub allocatable: BTreeMap<String, Quantity>,
}

/// The environment in the order of first mention, every name once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Environment {
    /// Image and manifest together: what the process gets.
    pub all: Vec<(String, String)>,
    /// The manifest's alone: what `$(NAME)` can refer to.
    pub own: BTreeMap<String, String>,
}

/// Builds the environment.
///
/// # Errors
/// A reference that cannot be resolved: the container cannot be made as it is written.
pub fn environment(
    pod: &Pod,
    container: &Container,
    image_env: &[String],
    facts: &EnvFacts,
) -> Result<Environment, ConfigError> {
    if !container.env_from.is_empty() {
        return Err(ConfigError::Unsupported("envFrom".to_owned()));
    }
    let mut out = Environment::default();
    let mut set = |name: &str, value: String| match out.all.iter_mut().find(|(other, _)| other == name) {
        Some((_, old)) => *old = value,
        None => out.all.push((name.to_owned(), value)),
    };
    set("PATH", DEFAULT_PATH.to_owned());
    set("HOSTNAME", facts.hostname.clone());
    for pair in image_env {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        set(name, value.to_owned());
    }
    for var in &container.env {
        let value = match &var.value_from {
            Some(source) => referred(pod, container, &var.name, source, facts)?,
            None => expand(&var.value, |name| out.own.get(name).map(String::as_str)),
        };
        out.own.insert(var.name.clone(), value.clone());
        set(&var.name, value);
    }
    Ok(out)
}

fn referred(
    pod: &Pod,
    container: &Container,
    name: &str,
    source: &EnvVarSource,
    facts: &EnvFacts,
) -> Result<String, ConfigError> {
    if let Some(field) = &source.field_ref {
        return field_ref(pod, &field.field_path, facts)
            .ok_or_else(|| ConfigError::UnknownField { variable: name.to_owned(), path: field.field_path.clone() });
    }
    if let Some(field) = &source.resource_field_ref {
        let other =
            if field.container_name.is_empty() { Some(container) } else { find_container(pod, &field.container_name) };
        return other
            .and_then(|other| {
                field_value(other.resources.as_ref(), &field.resource, &field.divisor, &facts.allocatable)
            })
            .ok_or_else(|| ConfigError::UnknownField { variable: name.to_owned(), path: field.resource.clone() });
    }
    let what = if source.config_map_key_ref.is_some() { "configMapKeyRef" } else { "secretKeyRef" };
    Err(ConfigError::Unsupported(format!("env[{name}].valueFrom.{what}")))
}

/// The value of a fieldRef; absent labels and annotations are empty.
fn field_ref(pod: &Pod, path: &str, facts: &EnvFacts) -> Option<String> {
    let meta = pod.metadata.as_ref()?;
    if let Some((map, key)) = path.strip_suffix("']").and_then(|path| path.split_once("['")) {
        let map = match map {
            "metadata.labels" => &meta.labels,
            "metadata.annotations" => &meta.annotations,
            _ => return None,
        };
        return Some(map.get(key).cloned().unwrap_or_default());
    }
    let account = || pod.spec.as_ref().map_or_else(String::new, |spec| spec.service_account_name.clone());
    Some(match path {
        "metadata.name" => meta.name.clone(),
        "metadata.namespace" => meta.namespace.clone(),
        "metadata.uid" => meta.uid.clone(),
        "spec.nodeName" => facts.node_name.clone(),
        "spec.serviceAccountName" => account(),
        "status.podIP" | "status.podIPs" => facts.pod_ip.clone(),
        "status.hostIP" | "status.hostIPs" => facts.host_ip.clone(),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use minipod_proto::v1::{
        EnvVar, ObjectFieldSelector, ObjectMeta, PodSpec, ResourceFieldSelector, ResourceRequirements,
    };

    use super::*;

    fn literal(name: &str, value: &str) -> EnvVar {
        EnvVar { name: name.into(), value: value.into(), value_from: None }
    }

    fn field(path: &str) -> EnvVar {
        let field_ref = Some(ObjectFieldSelector { field_path: path.into(), ..ObjectFieldSelector::default() });
        let value_from = Some(EnvVarSource { field_ref, ..EnvVarSource::default() });
        EnvVar { name: "V".into(), value_from, ..EnvVar::default() }
    }

    fn pod() -> Pod {
        Pod {
            metadata: Some(ObjectMeta {
                name: "p".into(),
                namespace: "ns".into(),
                uid: "u-1".into(),
                labels: [("app".to_owned(), "web".to_owned())].into(),
                annotations: [("example.com/a.b".to_owned(), "note".to_owned())].into(),
                ..ObjectMeta::default()
            }),
            spec: Some(PodSpec { service_account_name: "default".into(), ..PodSpec::default() }),
            ..Pod::default()
        }
    }

    fn facts() -> EnvFacts {
        EnvFacts {
            node_name: "node-a".into(),
            host_ip: "192.0.2.1".into(),
            pod_ip: "10.0.0.5".into(),
            hostname: "p".into(),
            allocatable: [("cpu".to_owned(), Quantity::from_units(2))].into(),
        }
    }

    fn built(env: Vec<EnvVar>, image: &[&str]) -> Result<Vec<String>, ConfigError> {
        let limits = [("memory".to_owned(), "64Mi".to_owned())].into();
        let resources = Some(ResourceRequirements { limits, ..ResourceRequirements::default() });
        let container = Container { env, resources, ..Container::default() };
        let image: Vec<String> = image.iter().map(|pair| (*pair).to_owned()).collect();
        let environment = environment(&pod(), &container, &image, &facts())?;
        Ok(environment.all.into_iter().skip(2).map(|(name, value)| format!("{name}={value}")).collect())
    }

    #[test]
    fn the_manifest_overrides_the_image_in_place() {
        let env = vec![literal("B", "manifest"), literal("C", "see $(B) and $(A)")];
        let all = built(env, &["A=image", "B=image"]).expect("builds");
        assert_eq!(all, ["A=image", "B=manifest", "C=see manifest and $(A)"]);
        assert_eq!(built(vec![literal("A", "$(B)"), literal("B", "late")], &[]).expect("builds"), ["A=$(B)", "B=late"]);
    }

    #[test]
    fn the_path_has_a_default_that_image_and_manifest_replace() {
        let get = |env: Vec<EnvVar>, image: &[String]| {
            let container = Container { env, ..Container::default() };
            environment(&pod(), &container, image, &facts()).expect("builds").all[0].clone()
        };
        assert_eq!(get(vec![], &[]), ("PATH".into(), DEFAULT_PATH.into()));
        assert_eq!(get(vec![], &["PATH=/a".into()]), ("PATH".into(), "/a".into()));
        assert_eq!(get(vec![literal("PATH", "/b")], &["PATH=/a".into()]), ("PATH".into(), "/b".into()));
    }

    #[test]
    fn fields_of_the_pod() {
        for (path, expected) in [
            ("metadata.name", "p"),
            ("metadata.namespace", "ns"),
            ("metadata.uid", "u-1"),
            ("metadata.labels['app']", "web"),
            ("metadata.labels['none']", ""),
            ("metadata.annotations['example.com/a.b']", "note"),
            ("spec.nodeName", "node-a"),
            ("spec.serviceAccountName", "default"),
            ("status.podIP", "10.0.0.5"),
            ("status.podIPs", "10.0.0.5"),
            ("status.hostIP", "192.0.2.1"),
            ("status.hostIPs", "192.0.2.1"),
        ] {
            assert_eq!(built(vec![field(path)], &[]).expect(path), [format!("V={expected}")]);
        }
        let error = built(vec![field("spec.nonsense")], &[]).expect_err("unknown");
        assert_eq!(error.to_string(), "env V refers to unknown field spec.nonsense");
    }

    #[test]
    fn resource_fields_and_unsupported_sources() {
        let resource = |resource: &str, divisor: &str, container: &str| {
            let selector = ResourceFieldSelector {
                container_name: container.into(),
                resource: resource.into(),
                divisor: divisor.into(),
            };
            let value_from = EnvVarSource { resource_field_ref: Some(selector), ..EnvVarSource::default() };
            vec![EnvVar { name: "V".into(), value_from: Some(value_from), ..EnvVar::default() }]
        };
        assert_eq!(built(resource("limits.memory", "1Mi", ""), &[]).expect("builds"), ["V=64"]);
        assert_eq!(built(resource("limits.cpu", "1", ""), &[]).expect("builds"), ["V=2"]);
        assert!(built(resource("limits.memory", "1Mi", "other"), &[]).is_err());
        let source = EnvVarSource { config_map_key_ref: Some(Default::default()), ..EnvVarSource::default() };
        let env = vec![EnvVar { name: "V".into(), value_from: Some(source), ..EnvVar::default() }];
        assert!(built(env, &[]).expect_err("unsupported").to_string().contains("configMapKeyRef"));
    }
}
