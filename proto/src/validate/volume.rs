//! Volumes of a pod.

use super::{
    container::{exactly_one, field_ref, resource_ref},
    walk::{Walk, absolute, relative},
};
use crate::{
    names::{config_key, dns_label, dns_subdomain},
    quantity::Quantity,
    v1::{DownwardApiVolumeFile, KeyToPath, PodSpec, ProjectedVolumeSource, Volume},
};

/// Fields that a downward API file can hold.
const FILE_FIELDS: [&str; 5] =
    ["metadata.annotations", "metadata.labels", "metadata.name", "metadata.namespace", "metadata.uid"];

pub(super) fn all(walk: &mut Walk, spec: &PodSpec) {
    walk.each("volumes", &spec.volumes, |walk, one| volume(walk, one, spec));
    walk.unique("volumes", "name", spec.volumes.iter().map(|volume| volume.name.as_str()));
}

fn volume(walk: &mut Walk, volume: &Volume, spec: &PodSpec) {
    walk.form("name", &volume.name, dns_label);
    let kinds = [
        ("hostPath", volume.host_path.is_some()),
        ("emptyDir", volume.empty_dir.is_some()),
        ("secret", volume.secret.is_some()),
        ("downwardAPI", volume.downward_api.is_some()),
        ("configMap", volume.config_map.is_some()),
        ("projected", volume.projected.is_some()),
        ("image", volume.image.is_some()),
    ];
    // None at all is an emptyDir.
    if kinds.iter().any(|(_, set)| *set) {
        exactly_one(walk, &kinds);
    }
    if let Some(source) = &volume.empty_dir {
        walk.word("emptyDir.medium", &source.medium, &["Memory"]);
        match source.size_limit.parse::<Quantity>() {
            Ok(limit) if limit.sign() < 0 => walk.bad("emptyDir.sizeLimit", &source.size_limit, "want 0 or more"),
            Err(error) if !source.size_limit.is_empty() => walk.wrong("emptyDir.sizeLimit", error.to_string()),
            _ => {}
        }
    }
    if let Some(source) = &volume.host_path {
        walk.form("hostPath.path", &source.path, absolute);
        let types = ["DirectoryOrCreate", "Directory", "FileOrCreate", "File", "Socket", "CharDevice", "BlockDevice"];
        walk.word("hostPath.type", &source.r#type, &types);
    }
    if let Some(source) = &volume.secret {
        walk.form("secret.secretName", &source.secret_name, dns_subdomain);
        walk.within("secret", |walk| files(walk, &source.items, source.default_mode));
    }
    if let Some(source) = &volume.config_map {
        walk.form("configMap.name", &source.name, dns_subdomain);
        walk.within("configMap", |walk| files(walk, &source.items, source.default_mode));
    }
    if let Some(source) = &volume.downward_api {
        walk.within("downwardAPI", |walk| {
            mode(walk, "defaultMode", source.default_mode);
            walk.each("items", &source.items, |walk, item| downward(walk, item, spec));
        });
    }
    if let Some(source) = &volume.projected {
        walk.within("projected", |walk| projected(walk, source, spec));
    }
    if let Some(source) = &volume.image {
        if source.reference.is_empty() {
            walk.missing("image.reference", "want an image");
        }
        walk.word("image.pullPolicy", &source.pull_policy, &["Always", "IfNotPresent", "Never"]);
    }
}

fn mode(walk: &mut Walk, field: &str, mode: Option<i32>) {
    if let Some(mode) = mode
        && !(0..=0o777).contains(&mode)
    {
        walk.bad(field, mode, "want 0 to 511 (0777)");
    }
}

fn files(walk: &mut Walk, items: &[KeyToPath], default_mode: Option<i32>) {
    mode(walk, "defaultMode", default_mode);
    keys(walk, items);
}

fn keys(walk: &mut Walk, items: &[KeyToPath]) {
    walk.each("items", items, |walk, item| {
        walk.form("key", &item.key, config_key);
        walk.form("path", &item.path, relative);
        mode(walk, "mode", item.mode);
    });
    walk.unique("items", "path", items.iter().map(|item| item.path.as_str()));
}

fn downward(walk: &mut Walk, item: &DownwardApiVolumeFile, spec: &PodSpec) {
    walk.form("path", &item.path, relative);
    mode(walk, "mode", item.mode);
    exactly_one(
        walk,
        &[("fieldRef", item.field_ref.is_some()), ("resourceFieldRef", item.resource_field_ref.is_some())],
    );
    if let Some(field) = &item.field_ref {
        walk.within("fieldRef", |walk| field_ref(walk, field, &FILE_FIELDS));
    }
    if let Some(field) = &item.resource_field_ref {
        if field.container_name.is_empty() {
            walk.missing("resourceFieldRef.containerName", "want the name of a container of the pod");
        }
        walk.within("resourceFieldRef", |walk| resource_ref(walk, field, spec));
    }
}

fn projected(walk: &mut Walk, source: &ProjectedVolumeSource, spec: &PodSpec) {
    mode(walk, "defaultMode", source.default_mode);
    walk.each("sources", &source.sources, |walk, one| {
        exactly_one(
            walk,
            &[
                ("secret", one.secret.is_some()),
                ("downwardAPI", one.downward_api.is_some()),
                ("configMap", one.config_map.is_some()),
            ],
        );
        if let Some(secret) = &one.secret {
            walk.form("secret.name", &secret.name, dns_subdomain);
            walk.within("secret", |walk| keys(walk, &secret.items));
        }
        if let Some(map) = &one.config_map {
            walk.form("configMap.name", &map.name, dns_subdomain);
            walk.within("configMap", |walk| keys(walk, &map.items));
        }
        if let Some(fields) = &one.downward_api {
            walk.within("downwardAPI", |walk| {
                walk.each("items", &fields.items, |walk, item| downward(walk, item, spec));
            });
        }
    });
}
