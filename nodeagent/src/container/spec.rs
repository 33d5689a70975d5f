//! What podshim is told about a sandbox and about one run of a container. Pure: pod, image and facts of the node in, spec out.

use std::path::{Path, PathBuf};

use minipod_podshim::call::SHARED_MEMORY;
use minipod_podshim::protocol::{
    Capabilities, ContainerSpec, IdRange, Limits, LogSpec, Rootfs, SandboxSpec, Sysctl, User, Window,
};
use minipod_proto::resources as pod_resources;
use minipod_proto::v1::{Container, Pod, PodSpec, SecurityContext};

use super::ConfigError;
use super::env::{EnvFacts, environment};
use super::process::{arguments, capabilities, is_privileged, user};
use super::resources::{CPU_PERIOD_US, Resources, oom_score_adj};
use crate::image::{ImageConfig, ResolvedUser};
use crate::paths::PodPaths;
use crate::volumes::root_owns;

pub use super::process::stop_signal;

/// Kubernetes' value: the infra container is killed last.
const PAUSE_OOM_SCORE_ADJ: i32 = -998;
/// A log file that has grown to this is rotated (Kubernetes' default).
const LOG_MAX_BYTES: u64 = 10 << 20;
/// Log files kept of a run (Kubernetes' default).
const LOG_MAX_FILES: u32 = 5;
/// What tells of the node or changes it; the list that the field agreed on (moby, containerd, CRI-O).
const MASKED_PATHS: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];
/// May be looked at.
const READONLY_PATHS: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// What a container's spec is made of.
#[derive(Debug, Clone)]
pub struct Input<'a> {
    /// The pod.
    pub pod: &'a Pod,
    /// The container of it.
    pub container: &'a Container,
    /// Its image's wishes.
    pub image: &'a ImageConfig,
    /// Who its user is in the image.
    pub image_user: &'a ResolvedUser,
    /// The image's layers, the topmost first.
    pub lowers: Vec<PathBuf>,
    /// What environment variables may refer to.
    pub facts: &'a EnvFacts,
    /// The pod's directories.
    pub paths: &'a PodPaths,
    /// The file of this run's log.
    pub log: PathBuf,
    /// The run.
    pub attempt: u32,
    /// The filter of its system calls; empty: none.
    pub seccomp_filter: Vec<u8>,
    /// Its AppArmor profile; empty: none.
    pub apparmor_profile: String,
    /// The pod's own users; `None`: they are the node's.
    pub users: Option<IdRange>,
    /// Where its /dev/shm is.
    pub memory: SharedMemory,
    /// The node's memory, for the OOM score.
    pub node_memory_bytes: u64,
}

/// The user to resolve in the image: the nearest word on it that a manifest or the image has.
#[must_use]
pub fn user_text(pod: &Pod, container: &Container, image: &ImageConfig) -> String {
    let own = container.security_context.as_ref().and_then(|context| context.run_as_user);
    let of_pod = || pod.spec().security_context.as_ref().and_then(|context| context.run_as_user);
    own.or_else(of_pod).map_or_else(|| image.user.clone(), |uid| uid.to_string())
}

/// Where a pod's /dev/shm is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SharedMemory {
    /// The sandbox has it.
    Sandbox,
    /// It is the node's: the pod has the node's IPC namespace.
    Node,
    /// An older agent has mounted it below the pod's data.
    Mounted,
}

impl SharedMemory {
    /// Of a pod; `is_mounted` tells of one whose data an older agent has made.
    #[must_use]
    pub fn of(spec: &PodSpec, is_mounted: bool) -> Self {
        match (spec.host_ipc, is_mounted) {
            (true, _) => Self::Node,
            (false, true) => Self::Mounted,
            (false, false) => Self::Sandbox,
        }
    }
}

/// The sandbox of a pod. `hostname` is what `uname -n` shall say, `users` are its own ids if it has some,
/// `pids_limit` how many processes and threads it may have.
#[must_use]
pub fn sandbox(
    pod: &Pod,
    hostname: &str,
    attempt: u32,
    (memory, users): (SharedMemory, Option<IdRange>),
    pids_limit: Option<u64>,
) -> SandboxSpec {
    let spec = pod.spec();
    let shared_memory = match memory {
        SharedMemory::Sandbox => root_owns(SHARED_MEMORY, users),
        SharedMemory::Node | SharedMemory::Mounted => String::new(),
    };
    let sysctls = spec.security_context.iter().flat_map(|context| &context.sysctls);
    SandboxSpec {
        attempt,
        hostname: hostname.to_owned(),
        host_network: spec.host_network,
        host_ipc: spec.host_ipc,
        host_pid: spec.host_pid,
        share_pid: spec.share_process_namespace.unwrap_or(false) && !spec.host_pid,
        sysctls: sysctls.map(|sysctl| Sysctl { name: sysctl.name.clone(), value: sysctl.value.clone() }).collect(),
        limits: Some(Limits { pids_limit, ..limits_of_all(&pod_level(spec)) }),
        oom_score_adj: PAUSE_OOM_SCORE_ADJ,
        users,
        shared_memory,
    }
}

/// Requests and limits of the pod as a whole: a limit only where every container has one, because a container without
/// may use what the node has.
#[must_use]
pub fn pod_level(spec: &PodSpec) -> Resources {
    let requests = pod_resources::pod_requests(spec).unwrap_or_default();
    let all_limits = pod_resources::pod_limits(spec).unwrap_or_default();
    let amount = |resources: &pod_resources::Resources, name: &str| {
        u64::try_from(resources.get(name)).ok().filter(|amount| *amount > 0)
    };
    let has_limit = |container: &Container, name: &str| {
        container.resources.as_ref().is_some_and(|resources| resources.limits.contains_key(name))
    };
    let limit = |name: &str| {
        let stated = spec.resources.as_ref().is_some_and(|resources| resources.limits.contains_key(name));
        let mut containers = spec.init_containers.iter().chain(&spec.containers);
        let bounded = stated || containers.all(|container| has_limit(container, name));
        amount(&all_limits, name).filter(|_| bounded)
    };
    Resources {
        cpu_request_milli: amount(&requests, "cpu"),
        cpu_limit_milli: limit("cpu"),
        memory_request_bytes: amount(&requests, "memory"),
        memory_limit_bytes: limit("memory"),
    }
}

/// As the supervisor sets them.
#[must_use]
pub fn limits(resources: &Resources) -> Limits {
    let values = resources.cgroup();
    Limits {
        cpu_shares: Some(values.cpu_shares),
        cpu_weight: Some(values.cpu_weight),
        cpu_quota_us: values.cpu_quota_us,
        cpu_period_us: CPU_PERIOD_US,
        memory_limit_bytes: values.memory_limit_bytes,
        oom_group: true,
        ..Limits::default()
    }
}

/// The same of a group that holds groups. Out of memory there ends one of them, which goes as a whole: not the infra container with all others.
#[must_use]
pub fn limits_of_all(resources: &Resources) -> Limits {
    Limits { oom_group: false, ..limits(resources) }
}

/// One run of a container.
///
/// # Errors
/// What of the manifest cannot be carried out.
pub fn container(input: &Input<'_>) -> Result<ContainerSpec, ConfigError> {
    let Input { pod, container, .. } = *input;
    let context = container.security_context.as_deref();
    let spec = pod.spec();
    supported(spec, container, context)?;
    let environment = environment(pod, container, &input.image.env, input.facts)?;
    let user = user(context, spec.security_context.as_ref(), input.image_user)?;
    within(input.users, &user)?;
    let set = capabilities(context)?;
    let privileged = context.is_some_and(is_privileged);
    let unmasked = context.is_some_and(|context| context.proc_mount == "Unmasked");
    let unless_open = |paths: &[&str]| -> Vec<String> {
        if privileged || unmasked { Vec::new() } else { paths.iter().map(|path| (*path).to_owned()).collect() }
    };
    let resources = Resources::of(container.resources.as_ref());
    let readonly_root = context.and_then(|context| context.read_only_root_filesystem).unwrap_or(false);
    let argv = arguments(container, input.image, &environment)?;
    let mut env: Vec<String> = environment.all.iter().map(|(name, value)| format!("{name}={value}")).collect();
    if !environment.all.iter().any(|(name, _)| name == "HOME") {
        env.push(format!("HOME={}", user.home));
    }
    Ok(ContainerSpec {
        name: container.name.clone(),
        attempt: input.attempt,
        argv,
        env,
        cwd: [&container.working_dir, &input.image.working_dir]
            .into_iter()
            .find(|dir| !dir.is_empty())
            .cloned()
            .unwrap_or_default(),
        user: Some(User { uid: user.uid, gid: user.gid, groups: user.groups }),
        capabilities: Some(Capabilities {
            bounding: set,
            permitted: set,
            effective: set,
            // Not inheritable: they would come back by file capabilities (CVE-2022-24769).
            inheritable: 0,
            ambient: 0,
        }),
        // Stricter than Kubernetes, where only an explicit `false` sets it.
        no_new_privs: !context.and_then(|context| context.allow_privilege_escalation).unwrap_or(privileged),
        rlimits: Vec::new(),
        oom_score_adj: oom_score_adj(spec, container, input.node_memory_bytes),
        root: Some(Rootfs { devices: privileged, ..root(input, readonly_root) }),
        mounts: super::mounts::all(input, &environment, readonly_root)?,
        masked_paths: unless_open(&MASKED_PATHS),
        readonly_paths: unless_open(&READONLY_PATHS),
        log: Some(LogSpec { path: text(&input.log), max_bytes: LOG_MAX_BYTES, max_files: LOG_MAX_FILES }),
        limits: Some(limits(&resources)),
        seccomp_filter: input.seccomp_filter.clone(),
        stdin: container.stdin,
        // Its size comes with who attaches.
        terminal: container.tty.then(Window::default),
        stdin_once: container.stdin && container.stdin_once,
        pid_of: String::new(),
        apparmor_profile: input.apparmor_profile.clone(),
    })
}

/// The API server refuses these fields; should one come through, a container must not start without what it asks for.
fn supported(spec: &PodSpec, container: &Container, context: Option<&SecurityContext>) -> Result<(), ConfigError> {
    let own_users = spec.has_own_users();
    let proc_mount = context.map_or("", |context| context.proc_mount.as_str());
    let has = [
        (!container.volume_devices.is_empty(), "volumeDevices"),
        (
            !(matches!(proc_mount, "" | "Default") || proc_mount == "Unmasked" && own_users),
            "securityContext.procMount without hostUsers: false",
        ),
        (
            own_users && spec.volumes.iter().any(|volume| volume.image.is_some()),
            "an image volume with hostUsers: false",
        ),
    ];
    has.iter().find(|(used, _)| *used).map_or(Ok(()), |(_, field)| Err(ConfigError::Unsupported((*field).to_owned())))
}

/// What the namespace does not have, nobody in it can be.
fn within(users: Option<IdRange>, user: &ResolvedUser) -> Result<(), ConfigError> {
    let Some(users) = users else { return Ok(()) };
    let own = [("user", user.uid), ("group", user.gid)].into_iter();
    let mut all = own.chain(user.groups.iter().map(|group| ("supplementary group", *group)));
    match all.find(|(_, id)| users.outside(*id).is_none()) {
        Some((what, id)) => Err(ConfigError::BeyondUsers { what, id, last: users.count - 1 }),
        None => Ok(()),
    }
}

pub(super) fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn root(input: &Input<'_>, readonly: bool) -> Rootfs {
    let own = input.paths.container(&input.container.name, input.attempt);
    Rootfs {
        lowers: input.lowers.iter().map(|lower| text(lower)).collect(),
        upper: text(&own.upper),
        work: text(&own.work),
        target: text(&own.root),
        readonly,
        devices: false,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use minipod_proto::v1::{
        EmptyDirVolumeSource, ImageVolumeSource, PodSecurityContext, ResourceRequirements, Volume, VolumeMount,
    };

    use super::*;
    use crate::paths::Paths;
    use crate::want::Uid;

    fn resources(limits: &[(&str, &str)]) -> Option<ResourceRequirements> {
        let limits = limits.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Some(ResourceRequirements { limits, ..ResourceRequirements::default() })
    }

    pub(in crate::container) fn volume_mount(name: &str, path: &str, read_only: bool) -> VolumeMount {
        VolumeMount { name: name.into(), mount_path: path.into(), read_only, ..VolumeMount::default() }
    }

    fn pod() -> Pod {
        let container = Container {
            name: "web".into(),
            command: vec!["serve".into()],
            resources: resources(&[("memory", "64Mi"), ("cpu", "500m")]),
            ..Container::default()
        };
        let volume = |name: &str| Volume {
            name: name.into(),
            empty_dir: Some(EmptyDirVolumeSource::default()),
            ..Volume::default()
        };
        let spec =
            PodSpec { containers: vec![container], volumes: vec![volume("a"), volume("b")], ..PodSpec::default() };
        Pod { spec: Some(spec), ..Pod::default() }
    }

    pub(in crate::container) fn made(change: impl FnOnce(&mut Pod)) -> Result<ContainerSpec, ConfigError> {
        let mut pod = pod();
        change(&mut pod);
        let own_users = pod.spec().has_own_users();
        let image = ImageConfig { working_dir: "/srv".into(), ..ImageConfig::default() };
        container(&Input {
            container: &pod.spec().containers[0],
            pod: &pod,
            image: &image,
            image_user: &ResolvedUser { uid: 0, gid: 0, groups: vec![], home: "/root".into() },
            lowers: vec!["/l/2".into(), "/l/1".into()],
            facts: &EnvFacts::default(),
            paths: &Paths::new(Path::new("/run/m"), Path::new("/var/m")).pod(&Uid("u".into())),
            log: "/var/m/logs/x/web/3.log".into(),
            attempt: 3,
            seccomp_filter: Vec::new(),
            apparmor_profile: String::new(),
            users: own_users.then_some(IdRange { first: 1 << 20, count: 65_536 }),
            memory: SharedMemory::of(pod.spec(), false),
            node_memory_bytes: 1 << 30,
        })
    }

    pub(in crate::container) fn own(pod: &mut Pod) -> &mut Container {
        &mut pod.spec_mut().containers[0]
    }

    pub(in crate::container) fn context(pod: &mut Pod) -> &mut SecurityContext {
        own(pod).security_context.get_or_insert_default()
    }

    #[test]
    fn a_plain_container_has_the_fields_defaults() {
        let spec = made(|_| {}).expect("made");
        assert_eq!((spec.argv, spec.cwd, spec.attempt), (vec!["serve".to_owned()], "/srv".to_owned(), 3));
        assert!(spec.env.contains(&"HOME=/root".to_owned()) && spec.env.iter().any(|pair| pair.starts_with("PATH=")));
        let set = 0xa804_25fb;
        let wanted = Capabilities { bounding: set, permitted: set, effective: set, inheritable: 0, ambient: 0 };
        assert_eq!((spec.capabilities, spec.no_new_privs), (Some(wanted), true));
        assert_eq!(spec.oom_score_adj, -997, "limits alone make it Guaranteed");
        let limits = spec.limits.expect("limits");
        assert_eq!((limits.memory_limit_bytes, limits.cpu_quota_us), (Some(64 << 20), Some(50_000)));
        let root = spec.root.expect("root");
        assert_eq!((root.lowers, root.readonly), (vec!["/l/2".to_owned(), "/l/1".to_owned()], false));
        assert_eq!(root.upper, "/var/m/pods/u/containers/web/3/upper");
        assert_eq!(spec.log.expect("log").path, "/var/m/logs/x/web/3.log");
    }

    #[test]
    fn what_is_not_carried_out_does_not_start() {
        type Change = fn(&mut Pod);
        let table: [(Change, &str); 7] = [
            (|pod| context(pod).proc_mount = "Unmasked".into(), "procMount"),
            (
                |pod| {
                    pod.spec_mut().host_users = Some(false);
                    context(pod).run_as_user = Some(70_000);
                },
                "user 70000; a pod with hostUsers: false has the ids 0 to 65535",
            ),
            (
                |pod| {
                    pod.spec_mut().host_users = Some(false);
                    pod.spec_mut().security_context.get_or_insert_default().fs_group = Some(65_536);
                },
                "supplementary group 65536",
            ),
            (
                |pod| {
                    pod.spec_mut().host_users = Some(false);
                    pod.spec_mut().volumes[0].image = Some(ImageVolumeSource::default());
                },
                "image volume",
            ),
            (|pod| own(pod).volume_mounts = vec![volume_mount("c", "/c", false)], "volume \"c\""),
            (|pod| own(pod).command.clear(), "neither the manifest nor the image"),
            (|pod| context(pod).run_as_non_root = Some(true), "runAsNonRoot"),
        ];
        for (change, part) in table {
            let error = made(change).expect_err(part).to_string();
            assert!(error.contains(part), "{part}: {error}");
        }
    }

    #[test]
    fn proc_is_open_where_the_pod_has_its_own_users() {
        let spec = made(|pod| {
            pod.spec_mut().host_users = Some(false);
            context(pod).proc_mount = "Unmasked".into();
        });
        let spec = spec.expect("made");
        assert!(spec.masked_paths.is_empty() && spec.readonly_paths.is_empty() && spec.no_new_privs);
        let masked = made(|pod| pod.spec_mut().host_users = Some(false)).expect("made");
        assert_eq!(
            (masked.masked_paths.len(), masked.readonly_paths.len()),
            (MASKED_PATHS.len(), READONLY_PATHS.len())
        );
        let range = IdRange { first: 7 << 16, count: 65_536 };
        assert_eq!(sandbox(&pod(), "p", 1, (SharedMemory::Sandbox, Some(range)), None).users, Some(range));
    }

    #[test]
    fn the_pods_limit_needs_the_limit_of_all() {
        let limit = |change: fn(&mut Pod)| {
            let mut pod = pod();
            change(&mut pod);
            sandbox(&pod, "p", 1, (SharedMemory::Sandbox, None), None).limits.expect("limits").memory_limit_bytes
        };
        assert_eq!(limit(|_| {}), Some(64 << 20));
        assert_eq!(limit(|pod| pod.spec_mut().containers.push(Container::default())), None);
        let with_init = |pod: &mut Pod| {
            let init = Container { resources: resources(&[("memory", "1Gi")]), ..Container::default() };
            pod.spec_mut().init_containers.push(init);
        };
        assert_eq!(limit(with_init), Some(1 << 30), "an init container may need more than the apps");
        assert_eq!(
            limit(|pod| pod.spec_mut().resources = resources(&[("memory", "2Gi")]).map(Box::new)),
            Some(2 << 30)
        );
    }

    #[test]
    fn namespaces_follow_the_pod() {
        let flags = |change: fn(&mut PodSpec)| {
            let mut pod = pod();
            change(pod.spec_mut());
            let spec = sandbox(&pod, "name", 2, (SharedMemory::of(pod.spec(), false), None), Some(7));
            (spec.host_network, spec.host_ipc, spec.host_pid, spec.share_pid)
        };
        assert_eq!(flags(|_| {}), (false, false, false, false));
        assert_eq!(flags(|spec| spec.share_process_namespace = Some(true)), (false, false, false, true));
        assert_eq!(flags(|spec| spec.host_network = true), (true, false, false, false));
        assert_eq!(flags(|spec| spec.host_pid = true), (false, false, true, false));
    }

    #[test]
    fn the_nearest_word_names_the_user() {
        let image = ImageConfig { user: "web:7".into(), ..ImageConfig::default() };
        let mut pod = pod();
        assert_eq!(user_text(&pod, &pod.spec().containers[0].clone(), &image), "web:7");
        let of_pod = PodSecurityContext { run_as_user: Some(5), ..PodSecurityContext::default() };
        pod.spec_mut().security_context = Some(of_pod);
        assert_eq!(user_text(&pod, &pod.spec().containers[0].clone(), &image), "5");
        context(&mut pod).run_as_user = Some(6);
        assert_eq!(user_text(&pod, &pod.spec().containers[0].clone(), &image), "6");
    }
}
