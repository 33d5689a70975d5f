//! Users, privileges, kernel parameters.

use super::walk::{Walk, relative};
use crate::apparmor;
use crate::names::Check;
use crate::v1::{AppArmorProfile, Pod, PodSecurityContext, PodSpec, SeccompProfile, SecurityContext};

/// Largest user or group id: beyond it systems disagree on the sign.
const MAX_ID: i64 = i32::MAX as i64;
/// Longest name of an AppArmor profile, as in Kubernetes.
const MAX_PROFILE_BYTES: usize = 4095;
/// Longest name of a sysctl.
const MAX_SYSCTL_BYTES: usize = 253;

/// A pod with users of its own has those ids that 16 bits can name.
const MAX_OWN_ID: i64 = u16::MAX as i64;

fn id(walk: &mut Walk, field: &str, id: Option<i64>, spec: &PodSpec) {
    let Some(id) = id else { return };
    if spec.has_own_users() && (MAX_OWN_ID + 1..=MAX_ID).contains(&id) {
        walk.bad(field, id, format!("want 0 to {MAX_OWN_ID} with hostUsers: false, the pod's users have no other ids"));
    } else {
        walk.between(field, id, 0, MAX_ID);
    }
}

fn seccomp(walk: &mut Walk, profile: Option<&SeccompProfile>) {
    if let Some(profile) = profile {
        walk.within("seccompProfile", |walk| named(walk, &profile.r#type, &profile.localhost_profile, relative));
    }
}

fn apparmor(walk: &mut Walk, profile: Option<&AppArmorProfile>) {
    if let Some(profile) = profile {
        walk.within("appArmorProfile", |walk| named(walk, &profile.r#type, &profile.localhost_profile, profile_name));
    }
}

/// A profile's name is a name and no path, though many look like one.
fn profile_name(name: &str) -> Check {
    let ok = (1..=MAX_PROFILE_BYTES).contains(&name.len()) && name.trim() == name && !name.contains(char::is_control);
    if ok { Ok(()) } else { Err("want the name of a profile that the node has loaded, without white space around it") }
}

fn named(walk: &mut Walk, kind: &str, localhost: &str, form: fn(&str) -> Check) {
    walk.must_be("type", kind, &["RuntimeDefault", "Unconfined", "Localhost"]);
    match (kind == "Localhost", localhost.is_empty()) {
        (true, _) => walk.form("localhostProfile", localhost, form),
        (false, true) => {}
        (false, false) => walk.bad("localhostProfile", localhost, "want it with type Localhost only"),
    }
}

/// Annotations that name AppArmor profiles: each for a container that is there, and saying what its field says.
pub(super) fn apparmor_annotations(walk: &mut Walk, pod: &Pod) {
    for (key, value) in pod.metadata.iter().flat_map(|meta| &meta.annotations) {
        let Some(name) = key.strip_prefix(apparmor::ANNOTATION) else { continue };
        let spec = pod.spec();
        let container = spec.init_containers.iter().chain(&spec.containers).find(|container| container.name == name);
        let field = container.map(|one| one.security_context.as_ref().and_then(|own| own.app_armor_profile.as_ref()));
        let wrong = match (apparmor::from_annotation(value), field) {
            (Err(wanted), _) => wanted,
            (_, None) => "want the name of one of the pod's containers in the annotation's",
            (Ok(profile), Some(Some(field))) if profile != *field => {
                "want the same as securityContext.appArmorProfile of the container, or no annotation"
            }
            (Ok(profile), _) if profile.r#type == "Localhost" && profile_name(&profile.localhost_profile).is_err() => {
                apparmor::WANTED
            }
            _ => continue,
        };
        walk.bad(&format!("metadata.annotations[{key:?}]"), value, wrong);
    }
}

pub(super) fn pod(walk: &mut Walk, spec: &PodSpec) {
    if spec.host_pid && spec.shares_processes() {
        walk.bad(
            "shareProcessNamespace",
            true,
            "want false with hostPID, the node's processes are not the pod's to share",
        );
    }
    if spec.has_own_users() {
        own_users(walk, spec);
    }
    let Some(context) = &spec.security_context else { return };
    walk.within("securityContext", |walk| pod_context(walk, context, spec));
}

/// What users of a pod's own have no rights in, or cannot be shown in.
fn own_users(walk: &mut Walk, spec: &PodSpec) {
    for (field, node) in [("hostNetwork", spec.host_network), ("hostPID", spec.host_pid), ("hostIPC", spec.host_ipc)] {
        if node {
            walk.bad(field, true, "want false with hostUsers: false, the pod's users have no rights there");
        }
    }
    walk.each("volumes", &spec.volumes, |walk, volume| {
        if volume.image.is_some() {
            walk.wrong(
                "image",
                "want no image volume with hostUsers: false, its files cannot be shown with the pod's user ids",
            );
        }
    });
}

fn pod_context(walk: &mut Walk, context: &PodSecurityContext, spec: &PodSpec) {
    id(walk, "runAsUser", context.run_as_user, spec);
    id(walk, "runAsGroup", context.run_as_group, spec);
    id(walk, "fsGroup", context.fs_group, spec);
    walk.each("supplementalGroups", &context.supplemental_groups, |walk, group| id(walk, "", Some(*group), spec));
    walk.word("supplementalGroupsPolicy", &context.supplemental_groups_policy, &["Merge", "Strict"]);
    walk.word("fsGroupChangePolicy", &context.fs_group_change_policy, &["OnRootMismatch", "Always"]);
    seccomp(walk, context.seccomp_profile.as_ref());
    apparmor(walk, context.app_armor_profile.as_ref());
    walk.each("sysctls", &context.sysctls, |walk, sysctl| {
        let dotted = sysctl.name.replace('/', ".");
        let part = |part: &str| {
            !part.is_empty()
                && part
                    .bytes()
                    .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'_'))
        };
        if sysctl.name.len() > MAX_SYSCTL_BYTES || !dotted.split('.').all(part) {
            walk.bad("name", &sysctl.name, "want the name of a kernel parameter such as net.ipv4.tcp_syncookies");
        }
        let ipc = ["kernel.shm", "kernel.msg", "kernel.sem", "fs.mqueue."];
        let own_net = dotted.starts_with("net.");
        let own_ipc = ipc.iter().any(|prefix| dotted.starts_with(prefix));
        if own_net && spec.host_network || own_ipc && spec.host_ipc {
            walk.bad("name", &sysctl.name, "want it without hostNetwork and hostIPC, it would change the node's");
        } else if !own_net && !own_ipc {
            walk.bad(
                "name",
                &sysctl.name,
                "want a parameter of a namespace (net.*, kernel.shm*, kernel.msg*, kernel.sem, fs.mqueue.*)",
            );
        }
        if sysctl.value.is_empty() {
            walk.missing("value", "want what is written to the parameter");
        }
    });
    walk.unique("sysctls", "name", context.sysctls.iter().map(|sysctl| sysctl.name.as_str()));
}

pub(super) fn container(walk: &mut Walk, context: Option<&SecurityContext>, spec: &PodSpec) {
    let Some(context) = context else { return };
    walk.within("securityContext", |walk| {
        id(walk, "runAsUser", context.run_as_user, spec);
        id(walk, "runAsGroup", context.run_as_group, spec);
        seccomp(walk, context.seccomp_profile.as_ref());
        apparmor(walk, context.app_armor_profile.as_ref());
        walk.word("procMount", &context.proc_mount, &["Default", "Unmasked"]);
        if context.proc_mount == "Unmasked" && !spec.has_own_users() {
            walk.bad("procMount", "Unmasked", "want spec.hostUsers: false beside it, or root could change the node");
        }
        let added = context.capabilities.iter().flat_map(|capabilities| &capabilities.add);
        let admin =
            added.into_iter().any(|name| matches!(name.to_ascii_uppercase().as_str(), "SYS_ADMIN" | "CAP_SYS_ADMIN"));
        if context.allow_privilege_escalation == Some(false) && (context.privileged == Some(true) || admin) {
            walk.bad(
                "allowPrivilegeEscalation",
                false,
                "want true for a container that is privileged or has SYS_ADMIN",
            );
        }
        for (field, names) in context
            .capabilities
            .iter()
            .flat_map(|all| [("capabilities.add", &all.add), ("capabilities.drop", &all.drop)])
        {
            walk.each(field, names, |walk, name| {
                if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
                    walk.bad("", name, "want the name of a capability such as NET_ADMIN");
                }
            });
        }
    });
}
