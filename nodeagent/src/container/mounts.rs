//! What is mounted in a container: the kernel's file systems, the pod's own files, and its volumes.

use std::path::{Component, Path};

use minipod_podshim::protocol::{Mount, MountKind, Propagation};
use minipod_proto::v1::{Volume, VolumeMount};

use super::ConfigError;
use super::env::Environment;
use super::expand::expand;
use super::process::is_privileged;
use super::spec::{Input, SharedMemory, text};
use crate::projection::is_projection;
use crate::volumes::is_in_memory;

/// Where a container leaves its last words unless the manifest says otherwise.
const TERMINATION_LOG: &str = "/dev/termination-log";

const SHM: &str = "/dev/shm";

/// A file system of the kernel.
fn kernel(kind: MountKind, target: &str, readonly: bool, noexec: bool) -> Mount {
    Mount {
        kind: kind.into(),
        target: target.to_owned(),
        readonly,
        nosuid: true,
        nodev: true,
        noexec,
        ..Mount::default()
    }
}

fn bind(source: &Path, target: &str, readonly: bool) -> Mount {
    Mount {
        kind: MountKind::Bind.into(),
        source: text(source),
        target: target.to_owned(),
        readonly,
        propagation: Propagation::None.into(),
        idmapped: true,
        ..Mount::default()
    }
}

/// Everything that is mounted in the container, in order.
///
/// # Errors
/// A volume that the pod does not have, or a subPathExpr that names no place in one.
pub(super) fn all(
    input: &Input<'_>,
    environment: &Environment,
    readonly_root: bool,
) -> Result<Vec<Mount>, ConfigError> {
    let Input { pod, container, paths, .. } = *input;
    let privileged = container.security_context.as_deref().is_some_and(is_privileged);
    let dev = Mount {
        kind: MountKind::Dev.into(),
        target: "/dev".to_owned(),
        nosuid: true,
        noexec: true,
        devices: privileged,
        ..Mount::default()
    };
    let shm = match input.memory {
        SharedMemory::Sandbox => kernel(MountKind::SharedMemory, SHM, false, true),
        SharedMemory::Node => {
            Mount { nosuid: true, nodev: true, noexec: true, idmapped: false, ..bind(Path::new(SHM), SHM, false) }
        }
        SharedMemory::Mounted => {
            Mount { nosuid: true, nodev: true, noexec: true, idmapped: false, ..bind(&paths.shm(), SHM, false) }
        }
    };
    let termination = match container.termination_message_path.as_str() {
        "" => TERMINATION_LOG,
        path => path,
    };
    let own = paths.container(&container.name, input.attempt);
    let etc = paths.etc();
    let mut all = vec![
        kernel(MountKind::Proc, "/proc", false, true),
        dev,
        kernel(MountKind::Mqueue, "/dev/mqueue", false, true),
        shm,
        kernel(MountKind::Sysfs, "/sys", !privileged, true),
        kernel(MountKind::Cgroup, "/sys/fs/cgroup", !privileged, true),
        bind(&etc.join("hosts"), "/etc/hosts", readonly_root),
        bind(&etc.join("hostname"), "/etc/hostname", readonly_root),
        bind(&etc.join("resolv.conf"), "/etc/resolv.conf", readonly_root),
        bind(&own.termination_log, termination, false),
    ];
    let mut volumes = Vec::new();
    for mount in &container.volume_mounts {
        let volume = pod.spec().volumes.iter().find(|volume| volume.name == mount.name);
        let volume = volume.ok_or_else(|| ConfigError::UnknownVolume(mount.name.clone()))?;
        let made = volume_mount(volume, mount, &paths.volume(&mount.name), environment)?;
        let made = Mount { devices: privileged, ..made };
        // What the manifest mounts there replaces what we would.
        all.retain(|other| other.target != made.target);
        volumes.push(made);
    }
    // Outer ones first, whatever the manifest's order: an inner one would be hidden.
    volumes.sort_by_key(|mount| mount.target.split('/').count());
    all.extend(volumes);
    Ok(all)
}

/// One entry of volumeMounts; `own` is the volume's directory where it is not a path of the node.
fn volume_mount(
    volume: &Volume,
    mount: &VolumeMount,
    own: &Path,
    environment: &Environment,
) -> Result<Mount, ConfigError> {
    let source = volume.host_path.as_ref().map_or(own, |source| Path::new(&source.path));
    let propagation = match mount.mount_propagation.as_str() {
        "HostToContainer" => Propagation::HostToContainer,
        "Bidirectional" => Propagation::Bidirectional,
        _ => Propagation::None,
    };
    let readonly = mount.read_only || is_projection(volume) || volume.image.is_some();
    Ok(Mount {
        recursive: true,
        shallow_readonly: !matches!(mount.recursive_read_only.as_str(), "Enabled" | "IfPossible"),
        propagation: propagation.into(),
        sub_path: sub_path(mount, environment)?,
        noexec: volume.image.is_some(),
        idmapped: !is_in_memory(volume),
        ..bind(source, mount.mount_path.trim_end_matches('/'), readonly)
    })
}

/// subPath, or subPathExpr with the container's own variables put in. An unknown name is an error here, other than in
/// command and args: the data of two pods would end in one directory.
fn sub_path(mount: &VolumeMount, environment: &Environment) -> Result<String, ConfigError> {
    if mount.sub_path_expr.is_empty() {
        return Ok(mount.sub_path.clone());
    }
    let unknown = std::cell::Cell::new(None);
    let path = expand(&mount.sub_path_expr, |name| {
        let value = environment.own.get(name).map(String::as_str);
        if value.is_none() {
            unknown.set(Some(name.to_owned()));
        }
        value
    });
    let wrong = |why: String| ConfigError::SubPathExpr { expression: mount.sub_path_expr.clone(), why };
    if let Some(name) = unknown.take() {
        return Err(wrong(format!("the container has no variable {name:?} in its env")));
    }
    let inside = |part: Component<'_>| matches!(part, Component::Normal(_) | Component::CurDir);
    if path.is_empty() || !Path::new(&path).components().all(inside) {
        return Err(wrong(format!("it becomes {path:?}, want a relative path without \"..\"")));
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use minipod_podshim::protocol::ContainerSpec;
    use minipod_proto::v1::{EnvVar, HostPathVolumeSource, VolumeMount};

    use super::super::spec::tests::{context, made, own, volume_mount};
    use super::*;

    /// target, source or kind, flags.
    fn mount_table(spec: &ContainerSpec) -> Vec<String> {
        let one = |mount: &Mount| {
            let from = if mount.source.is_empty() { format!("{:?}", mount.kind()) } else { mount.source.clone() };
            let flag = |is: bool, name: &'static str| if is { name } else { "" };
            let flags = [
                flag(mount.readonly, " ro"),
                flag(mount.nosuid, " nosuid"),
                flag(mount.nodev, " nodev"),
                flag(mount.noexec, " noexec"),
            ];
            format!("{} {from}{}", mount.target, flags.concat())
        };
        spec.mounts.iter().map(one).collect()
    }

    #[test]
    fn mounts_in_their_order() {
        let base = [
            "/proc Proc nosuid nodev noexec",
            "/dev Dev nosuid noexec",
            "/dev/mqueue Mqueue nosuid nodev noexec",
            "/dev/shm SharedMemory nosuid nodev noexec",
            "/sys Sysfs ro nosuid nodev noexec",
            "/sys/fs/cgroup Cgroup ro nosuid nodev noexec",
            "/etc/hosts /var/m/pods/u/etc/hosts",
            "/etc/hostname /var/m/pods/u/etc/hostname",
            "/etc/resolv.conf /var/m/pods/u/etc/resolv.conf",
            "/dev/termination-log /var/m/pods/u/containers/web/3/termination-log",
        ];
        assert_eq!(mount_table(&made(|_| {}).expect("made")), base);
        let volumes = made(|pod| {
            own(pod).volume_mounts = vec![
                volume_mount("a", "/data/inner", false),
                volume_mount("b", "/data/", true),
                volume_mount("a", "/etc/hosts", false),
            ];
        });
        let table = mount_table(&volumes.expect("made"));
        assert!(!table.contains(&base[6].to_owned()));
        assert_eq!(
            table[9..],
            [
                "/data /var/m/pods/u/volumes/b ro",
                "/data/inner /var/m/pods/u/volumes/a",
                "/etc/hosts /var/m/pods/u/volumes/a"
            ]
        );
        let shared = made(|pod| {
            pod.spec_mut().host_ipc = true;
            context(pod).read_only_root_filesystem = Some(true);
            own(pod).termination_message_path = "/tmp/last".into();
        });
        let table = mount_table(&shared.expect("made"));
        for line in ["/dev/shm /dev/shm nosuid nodev noexec", "/etc/hosts /var/m/pods/u/etc/hosts ro"] {
            assert!(table.iter().any(|other| other == line), "{line} is not in {table:#?}");
        }
        assert!(table.iter().any(|line| line.starts_with("/tmp/last ")));
    }

    /// What the agent makes in memory has the pod's ids already; what is on a disk has those that the pod sees.
    #[test]
    fn ids_of_a_disk_are_shown_as_the_pods() {
        let spec = made(|pod| {
            pod.spec_mut().volumes[0].empty_dir.get_or_insert_default().medium = "Memory".into();
            let source = HostPathVolumeSource { path: "/srv".into(), ..HostPathVolumeSource::default() };
            pod.spec_mut().volumes.push(Volume { name: "h".into(), host_path: Some(source), ..Volume::default() });
            let map = minipod_proto::v1::ConfigMapVolumeSource::default();
            pod.spec_mut().volumes.push(Volume { name: "c".into(), config_map: Some(map), ..Volume::default() });
            own(pod).volume_mounts =
                ["a", "b", "h", "c"].map(|name| volume_mount(name, &format!("/v/{name}"), false)).into();
        });
        let spec = spec.expect("made");
        let not: Vec<&str> = spec
            .mounts
            .iter()
            .filter(|mount| mount.kind() == MountKind::Bind && !mount.idmapped)
            .map(|mount| mount.target.as_str())
            .collect();
        assert_eq!(not, ["/v/a", "/v/c"]);
    }

    #[test]
    fn a_privileged_container_sees_everything() {
        let spec = made(|pod| {
            context(pod).privileged = Some(true);
            own(pod).volume_mounts = vec![volume_mount("a", "/data", false)];
        });
        let spec = spec.expect("made");
        assert!(spec.masked_paths.is_empty() && spec.readonly_paths.is_empty() && !spec.no_new_privs);
        assert_eq!(spec.capabilities.expect("capabilities").effective, (1 << 41) - 1);
        let devices: Vec<&str> =
            spec.mounts.iter().filter(|mount| mount.devices).map(|mount| mount.target.as_str()).collect();
        assert_eq!(devices, ["/dev", "/data"]);
        assert!(spec.root.expect("root").devices && spec.mounts.iter().all(|mount| !mount.readonly));
    }

    #[test]
    fn parts_of_volumes_and_paths_of_the_node() {
        let mounts = |change: &dyn Fn(&mut VolumeMount)| {
            let made = made(|pod| {
                let source = HostPathVolumeSource { path: "/srv/data".into(), ..HostPathVolumeSource::default() };
                let volume = Volume { name: "host".into(), host_path: Some(source), ..Volume::default() };
                pod.spec_mut().volumes.push(volume);
                let env = |name: &str, value: &str| EnvVar { name: name.into(), value: value.into(), value_from: None };
                own(pod).env = vec![env("NAME", "web-0"), env("UP", "..")];
                let mut mount = volume_mount("host", "/data", true);
                change(&mut mount);
                own(pod).volume_mounts = vec![mount];
            });
            made.map(|spec| spec.mounts.last().cloned().expect("a mount")).map_err(|error| error.to_string())
        };
        let plain = mounts(&|_| {}).expect("made");
        assert_eq!((plain.source.as_str(), plain.sub_path.as_str()), ("/srv/data", ""));
        assert!(plain.readonly && plain.recursive && plain.shallow_readonly);
        assert_eq!(plain.propagation(), Propagation::None);
        let all = mounts(&|mount| mount.recursive_read_only = "Enabled".into()).expect("made");
        assert!(all.readonly && !all.shallow_readonly);
        let slave = mounts(&|mount| mount.mount_propagation = "HostToContainer".into()).expect("made");
        assert_eq!(slave.propagation(), Propagation::HostToContainer);
        let part = |expression: &str| mounts(&|mount| mount.sub_path_expr = expression.into());
        assert_eq!(mounts(&|mount| mount.sub_path = "a/b".into()).expect("made").sub_path, "a/b");
        assert_eq!(part("logs/$(NAME)").expect("made").sub_path, "logs/web-0");
        assert!(part("$(HOME)").expect_err("unknown").contains("no variable \"HOME\""));
        assert!(part("x/$(UP)").expect_err("leads out").contains("becomes \"x/..\""));
    }
}
