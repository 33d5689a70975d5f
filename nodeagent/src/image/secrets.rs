//! The credentials that a pod brings: imagePullSecrets.

use std::collections::BTreeMap;

use minipod_proto::references::Reference;
use minipod_proto::v1::Pod;

use super::pull::{Credentials, Registries};
use crate::sources::Known;

/// A Secret's key in the form of docker's config.json (type `kubernetes.io/dockerconfigjson`).
const CONFIG: &str = ".dockerconfigjson";
/// The older form: the content of `auths` alone (type `kubernetes.io/dockercfg`).
const OLD_CONFIG: &str = ".dockercfg";

/// What the pod's Secrets say, by registry; of two for one registry the first counts. A Secret that is not there or not
/// understood is left out and told: the image may be public, or the node may have credentials of its own.
#[must_use]
pub fn credentials(pod: &Pod, known: &Known) -> (BTreeMap<String, Credentials>, Vec<String>) {
    let (mut all, mut problems) = (BTreeMap::new(), Vec::new());
    for secret in pod.spec.iter().flat_map(|spec| &spec.image_pull_secrets) {
        let content = known.get(&Reference::Secret(secret.name.clone()));
        match content.map_or(Err("not found".to_owned()), |content| read(&content.data)) {
            Ok(credentials) => credentials.into_iter().for_each(|(registry, one)| {
                all.entry(registry).or_insert(one);
            }),
            Err(why) => problems.push(format!("imagePullSecrets: secret {:?}: {why}", secret.name)),
        }
    }
    (all, problems)
}

fn read(data: &BTreeMap<String, Vec<u8>>) -> Result<BTreeMap<String, Credentials>, String> {
    match (data.get(CONFIG), data.get(OLD_CONFIG)) {
        (Some(text), _) => Registries::docker_config(text).map_err(|error| format!("{CONFIG}: {error}")),
        (None, Some(text)) => {
            let whole = [br#"{"auths":"#.as_slice(), text, b"}"].concat();
            Registries::docker_config(&whole).map_err(|error| format!("{OLD_CONFIG}: {error}"))
        }
        (None, None) => Err(format!("has neither the key {CONFIG} nor {OLD_CONFIG}")),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use minipod_proto::v1::{LocalObjectReference, PodSpec};

    use super::*;
    use crate::sources::Content;

    #[test]
    fn secrets_by_registry_and_what_is_wrong_with_them() {
        let known: Known = [
            ("one", CONFIG, r#"{"auths": {"https://index.docker.io/v1/": {"auth": "YTpi"}, "r:5000": {"username": "u", "password": "p"}}}"#),
            ("two", OLD_CONFIG, r#"{"r:5000": {"username": "late", "password": "p"}, "old": {"username": "o", "password": "q"}}"#),
            ("bad", CONFIG, "{"),
            ("odd", "key", "{}"),
        ]
        .into_iter()
        .map(|(name, key, text)| {
            let data = [(key.to_owned(), text.as_bytes().to_vec())].into();
            (Reference::Secret(name.to_owned()), Arc::new(Content { data, ..Content::default() }))
        })
        .collect();
        let names = ["one", "none", "two", "bad", "odd"];
        let image_pull_secrets = names.map(|name| LocalObjectReference { name: name.to_owned() }).to_vec();
        let spec = PodSpec { image_pull_secrets, ..PodSpec::default() };
        let (all, problems) = credentials(&Pod { spec: Some(spec), ..Pod::default() }, &known);
        let users: Vec<_> = all.iter().map(|(registry, one)| (registry.as_str(), one.user.as_str())).collect();
        assert_eq!(users, [("docker.io", "a"), ("old", "o"), ("r:5000", "u")]);
        let parts =
            ["secret \"none\": not found", "\"bad\": .dockerconfigjson: not a docker config", "\"odd\": has neither"];
        assert_eq!(problems.len(), parts.len());
        for (problem, part) in problems.iter().zip(parts) {
            assert!(problem.contains(part), "{problem}");
        }
    }
}
