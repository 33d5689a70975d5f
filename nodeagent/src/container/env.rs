//! A container's environment: the image's, then the manifest's in order with expansion.

use std::collections::{BTreeMap, HashMap};

use minipod_proto::quantity::Quantity;
use minipod_proto::references::Reference;
use minipod_proto::v1::{Container, EnvVarSource, Pod};

use super::ConfigError;
use super::expand::expand;
use super::resources::field_value;
use crate::sources::Known;
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
    /// The ConfigMaps and Secrets of the pod's namespace.
    pub sources: Known,
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
    let mut out = Environment::default();
    // By name, because an image or a manifest can have some hundred thousand.
    let mut places: HashMap<String, usize> = HashMap::new();
    let mut set = |name: &str, value: String| match places.get(name) {
        Some(at) => out.all[*at].1 = value,
        None => {
            places.insert(name.to_owned(), out.all.len());
            out.all.push((name.to_owned(), value));
        }
    };
    set("PATH", DEFAULT_PATH.to_owned());
    set("HOSTNAME", facts.hostname.clone());
    for pair in image_env {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        set(name, value.to_owned());
    }
    for (name, value) in from_sources(container, &facts.sources)? {
        set(&name, value.clone());
        out.own.insert(name, value);
    }
    // What `env` refers to is earlier in `env`; commands can refer to `envFrom` too.
    let mut earlier: BTreeMap<String, String> = BTreeMap::new();
    for var in &container.env {
        let value = match &var.value_from {
            Some(source) => match referred(pod, container, &var.name, source, facts)? {
                Some(value) => value,
                None => continue,
            },
            None => expand(&var.value, |name| earlier.get(name).map(String::as_str)),
        };
        earlier.insert(var.name.clone(), value.clone());
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
) -> Result<Option<String>, ConfigError> {
    if let Some(field) = &source.field_ref {
        return field_ref(pod, &field.field_path, facts)
            .map(Some)
            .ok_or_else(|| ConfigError::UnknownField { variable: name.to_owned(), path: field.field_path.clone() });
    }
    if let Some(field) = &source.resource_field_ref {
        let other =
            if field.container_name.is_empty() { Some(container) } else { find_container(pod, &field.container_name) };
        return other
            .and_then(|other| {
                field_value(other.resources.as_ref(), &field.resource, &field.divisor, &facts.allocatable)
            })
            .map(Some)
            .ok_or_else(|| ConfigError::UnknownField { variable: name.to_owned(), path: field.resource.clone() });
    }
    let (kind, reference, object, key, optional) = match (&source.config_map_key_ref, &source.secret_key_ref) {
        (Some(map), _) => ("configmap", Reference::ConfigMap(map.name.clone()), &map.name, &map.key, map.optional),
        (None, Some(secret)) => {
            ("secret", Reference::Secret(secret.name.clone()), &secret.name, &secret.key, secret.optional)
        }
        (None, None) => return Err(ConfigError::Unsupported(format!("env[{name}].valueFrom"))),
    };
    let found = match facts.sources.get(&reference) {
        None => Err(ConfigError::SourceNotFound { kind, name: object.clone() }),
        Some(content) => {
            content.data.get(key).ok_or_else(|| ConfigError::NoKey { kind, name: object.clone(), key: key.clone() })
        }
    };
    match found {
        Ok(bytes) => text(name, bytes).map(Some),
        Err(_) if optional == Some(true) => Ok(None),
        Err(error) => Err(error),
    }
}

fn text(name: &str, bytes: &[u8]) -> Result<String, ConfigError> {
    let text = std::str::from_utf8(bytes).ok().filter(|text| !text.contains('\0'));
    text.map(str::to_owned).ok_or_else(|| ConfigError::NotText(name.to_owned()))
}

/// The variables of `envFrom`, in order; a later one of the same name wins.
fn from_sources(container: &Container, sources: &Known) -> Result<Vec<(String, String)>, ConfigError> {
    let mut out = Vec::new();
    for from in &container.env_from {
        let (kind, reference, object, optional) = match (&from.config_map_ref, &from.secret_ref) {
            (Some(map), _) => ("configmap", Reference::ConfigMap(map.name.clone()), &map.name, map.optional),
            (None, Some(secret)) => ("secret", Reference::Secret(secret.name.clone()), &secret.name, secret.optional),
            (None, None) => return Err(ConfigError::Unsupported("envFrom without a reference".to_owned())),
        };
        let Some(content) = sources.get(&reference) else {
            if optional == Some(true) {
                continue;
            }
            return Err(ConfigError::SourceNotFound { kind, name: object.clone() });
        };
        for (key, bytes) in &content.data {
            let name = format!("{}{key}", from.prefix);
            // As Kubernetes since 1.34: everything printable but `=`. The API server's rules for keys allow nothing else.
            if name.is_empty() || !name.chars().all(|c| (c.is_ascii_graphic() || c == ' ') && c != '=') {
                return Err(ConfigError::BadName(name));
            }
            out.push((name.clone(), text(&name, bytes)?));
        }
    }
    Ok(out)
}

/// The value of a fieldRef; absent labels and annotations are empty.
pub(crate) fn field_ref(pod: &Pod, path: &str, facts: &EnvFacts) -> Option<String> {
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

    fn sources() -> Known {
        use std::sync::Arc;
        let content = |pairs: &[(&str, &[u8])]| {
            let data = pairs.iter().map(|(key, value)| ((*key).to_owned(), value.to_vec())).collect();
            Arc::new(crate::sources::Content { data, ..Default::default() })
        };
        let map = content(&[("mode", b"fast"), ("a.b", b"$(V)")]);
        let secret = content(&[("pass", b"geheim"), ("blob", &[0xff])]);
        [(Reference::ConfigMap("map".into()), map), (Reference::Secret("sec".into()), secret)].into()
    }

    fn from_yaml(text: &str) -> Result<Vec<String>, String> {
        let yaml = format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: p}}\nspec:\n  containers:\n  - {text}\n");
        let objects = minipod_proto::manifest::parse(&yaml).unwrap_or_else(|problems| panic!("{problems:?}"));
        let pod = objects.first().and_then(|object| object.as_pod()).cloned().expect("a pod");
        let built = environment(&pod, &pod.spec().containers[0], &[], &facts()).map_err(|error| error.to_string())?;
        Ok(built.all.into_iter().skip(2).map(|(name, value)| format!("{name}={value}")).collect())
    }

    #[test]
    fn values_of_config_maps_and_secrets() {
        let table: &[(&str, Result<&[&str], &str>)] = &[
            ("env: [{name: V, valueFrom: {configMapKeyRef: {name: map, key: mode}}}]", Ok(&["V=fast"])),
            (
                "env: [{name: V, valueFrom: {secretKeyRef: {name: sec, key: pass}}}, {name: W, value: is $(V)}]",
                Ok(&["V=geheim", "W=is geheim"]),
            ),
            (
                "env: [{name: V, valueFrom: {configMapKeyRef: {name: map, key: none}}}]",
                Err("couldn't find key none in configmap \"map\""),
            ),
            ("env: [{name: V, valueFrom: {configMapKeyRef: {name: map, key: none, optional: true}}}]", Ok(&[])),
            ("env: [{name: V, valueFrom: {secretKeyRef: {name: map, key: x}}}]", Err("secret \"map\" not found")),
            ("env: [{name: V, valueFrom: {secretKeyRef: {name: map, key: x, optional: true}}}]", Ok(&[])),
            (
                "env: [{name: V, valueFrom: {secretKeyRef: {name: sec, key: blob}}}]",
                Err("env V: the value is not text without NUL bytes"),
            ),
            // The values of envFrom are taken as they are, and env overrides them.
            ("envFrom: [{configMapRef: {name: map}}]", Ok(&["a.b=$(V)", "mode=fast"])),
            (
                "{envFrom: [{configMapRef: {name: map}, prefix: P_}], env: [{name: P_mode, value: x}, {name: Y, value: $(P_a.b)}]}",
                Ok(&["P_a.b=$(V)", "P_mode=x", "Y=$(P_a.b)"]),
            ),
            ("envFrom: [{secretRef: {name: none}}]", Err("secret \"none\" not found")),
            ("envFrom: [{secretRef: {name: none, optional: true}}]", Ok(&[])),
        ];
        for (text, expected) in table {
            let fields = text.strip_prefix('{').and_then(|text| text.strip_suffix('}')).unwrap_or(text);
            let found = from_yaml(&format!("{{name: c, image: x, {fields}}}"));
            let expected = expected.map(|lines| lines.iter().map(|line| (*line).to_owned()).collect::<Vec<_>>());
            assert_eq!(found, expected.map_err(str::to_owned), "{text}");
        }
    }

    fn facts() -> EnvFacts {
        EnvFacts {
            node_name: "node-a".into(),
            host_ip: "192.0.2.1".into(),
            pod_ip: "10.0.0.5".into(),
            hostname: "p".into(),
            allocatable: [("cpu".to_owned(), Quantity::from_units(2))].into(),
            sources: sources(),
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
        let env = vec![EnvVar { name: "V".into(), value_from: Some(EnvVarSource::default()), ..EnvVar::default() }];
        assert!(built(env, &[]).expect_err("unsupported").to_string().contains("env[V].valueFrom"));
    }

    #[test]
    fn some_hundred_thousand_variables_are_built_at_once() {
        let image: Vec<String> = (0..300_000).map(|number| format!("A{}=x", number / 2)).collect();
        let began = std::time::Instant::now();
        let built = environment(&pod(), &Container::default(), &image, &EnvFacts::default()).expect("built");
        // PATH and HOSTNAME are of every container.
        assert_eq!(built.all.len(), 150_002);
        assert!(began.elapsed() < std::time::Duration::from_secs(20), "{:?}", began.elapsed());
    }
}
