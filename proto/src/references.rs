//! Which ConfigMaps and Secrets a pod refers to: what its node has to know, and nothing else.

use std::collections::BTreeSet;

use crate::v1::{Pod, PodSpec, Volume};

/// What a pod refers to by name, in its own namespace.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reference {
    /// A ConfigMap's name.
    ConfigMap(String),
    /// A Secret's name.
    Secret(String),
}

/// The ConfigMaps and Secrets that the pod's variables and volumes take values from, optional ones too, and the Secrets that
/// open registries.
#[must_use]
pub fn references(pod: &Pod) -> BTreeSet<Reference> {
    let mut all = BTreeSet::new();
    let Some(spec) = &pod.spec else { return all };
    of_environment(spec, &mut all);
    all.extend(spec.image_pull_secrets.iter().map(|secret| Reference::Secret(secret.name.clone())));
    spec.volumes.iter().for_each(|volume| of_volume(volume, &mut all));
    // An empty name is no reference; validation refuses it where it stands.
    all.retain(|one| matches!(one, Reference::ConfigMap(name) | Reference::Secret(name) if !name.is_empty()));
    all
}

fn of_environment(spec: &PodSpec, all: &mut BTreeSet<Reference>) {
    let containers = spec.init_containers.iter().chain(&spec.containers).map(|one| (&one.env_from, &one.env));
    let debug = spec.ephemeral_containers.iter().map(|one| (&one.env_from, &one.env));
    for (env_from, env) in containers.chain(debug) {
        for source in env_from {
            all.extend(source.config_map_ref.iter().map(|map| Reference::ConfigMap(map.name.clone())));
            all.extend(source.secret_ref.iter().map(|secret| Reference::Secret(secret.name.clone())));
        }
        for source in env.iter().filter_map(|variable| variable.value_from.as_ref()) {
            all.extend(source.config_map_key_ref.iter().map(|map| Reference::ConfigMap(map.name.clone())));
            all.extend(source.secret_key_ref.iter().map(|secret| Reference::Secret(secret.name.clone())));
        }
    }
}

fn of_volume(volume: &Volume, all: &mut BTreeSet<Reference>) {
    all.extend(volume.config_map.iter().map(|map| Reference::ConfigMap(map.name.clone())));
    all.extend(volume.secret.iter().map(|secret| Reference::Secret(secret.secret_name.clone())));
    for source in volume.projected.iter().flat_map(|projected| &projected.sources) {
        all.extend(source.config_map.iter().map(|map| Reference::ConfigMap(map.name.clone())));
        all.extend(source.secret.iter().map(|secret| Reference::Secret(secret.name.clone())));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_that_names_one_is_found() {
        let yaml = "
apiVersion: v1
kind: Pod
metadata: {name: p}
spec:
  imagePullSecrets: [{name: s5}]
  initContainers:
  - {name: i, image: x, envFrom: [{secretRef: {name: s1}}]}
  containers:
  - name: c
    image: x
    envFrom: [{configMapRef: {name: m1}}]
    env:
    - {name: A, valueFrom: {configMapKeyRef: {name: m2, key: k}}}
    - {name: B, valueFrom: {secretKeyRef: {name: s2, key: k, optional: true}}}
  volumes:
  - {name: v1, configMap: {name: m3}}
  - {name: v2, secret: {secretName: s3}}
  - {name: v3, projected: {sources: [{configMap: {name: m4}}, {secret: {name: s4}}, {secret: {name: s1}}]}}
  - {name: v4, emptyDir: {}}
";
        let objects = crate::manifest::parse(yaml).unwrap_or_else(|problems| panic!("{problems:?}"));
        let pod = objects.first().and_then(|object| object.as_pod()).expect("a pod");
        let maps = ["m1", "m2", "m3", "m4"].map(|name| Reference::ConfigMap(name.into()));
        let secrets = ["s1", "s2", "s3", "s4", "s5"].map(|name| Reference::Secret(name.into()));
        assert_eq!(references(pod), maps.into_iter().chain(secrets).collect());
        assert!(references(&Pod::default()).is_empty());
    }
}
