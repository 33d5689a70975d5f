//! Performs the planner's steps, and chooses nothing. Every step is idempotent: the agent may be killed before, within or
//! after it and ask for it again.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use minipod_podshim::protocol::{Resize, ResizeContainer};
use minipod_proto::v1::{Container, Pod};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::agent::Agent;
use crate::apparmor;
use crate::container::ConfigError;
use crate::container::env::EnvFacts;
use crate::container::resources::Resources;
use crate::container::{process, spec};
use crate::events::{Severity, pod_event};
use crate::failpoints::{after, before, failpoint, name};
use crate::image::pull::{Progress, PullError};
use crate::image::{ImageError, ImageRecord, secrets};
use crate::net::files::{self, HostnameInput, Hostnames};
use crate::net::{NetError, Netns, PodNetwork, PortWish, Protocol};
use crate::plan::model::Step;
use crate::probe::perform::{self as handler, Target};
use crate::record::{self, Record, RecordError};
use crate::seccomp;
use crate::shim::{Shim, ShimError, ShimEvent};
use crate::users::UsersError;
use crate::volumes::{self, VolumeError};
use crate::want::{Uid, any_container, key_of};
use crate::worker::PodView;

/// Domain of the pods' names.
pub const CLUSTER_DOMAIN: &str = "cluster.local";
/// Logs of this many attempts are kept.
const KEPT_LOGS: u32 = 2;

/// What a step needs; made when it begins.
#[derive(Debug, Clone)]
pub struct Job {
    /// The agent.
    pub agent: Arc<Agent>,
    /// The pod.
    pub uid: Uid,
    /// As it was last seen.
    pub pod: Arc<Pod>,
    /// Its supervisor, when connected.
    pub shim: Option<Shim>,
    /// Its address, empty before it has one.
    pub pod_ip: String,
    /// The image that was prepared for the step's container.
    pub image: Option<ImageRecord>,
    /// The newest attempt of the step's container.
    pub attempt: u32,
    /// The newest sandbox.
    pub sandbox: u32,
    /// To keep beside the spec.
    pub record: Record,
    /// Tells a hook when its run is over.
    pub view: tokio::sync::watch::Receiver<PodView>,
}

/// What a step brought.
#[derive(Debug)]
pub enum Done {
    /// Only that it is done.
    Nothing,
    /// A supervisor.
    Shim(Shim, mpsc::Receiver<Box<ShimEvent>>),
    /// The pod's network; of a sandbox as well, where it was there at once.
    Network(PodNetwork),
    /// The volumes, with the ids of the images that some of them show.
    Volumes(BTreeMap<String, String>),
    /// A container's image, and how it came here.
    Image(Box<ImageRecord>, Came),
    /// Limits were changed.
    Resized {
        /// What the pod has now.
        pod: Resources,
        /// What these runs have now.
        runs: Vec<(String, u32, Resources)>,
    },
    /// A hook came to its end, or its run did.
    Hooked(Result<(), String>),
    /// A container's process lives (or has lived: its end comes as an event).
    Started {
        /// In this sandbox.
        sandbox: u32,
        /// Since then.
        wall_ms: u64,
        /// What its status tells of it.
        begun: Box<Begun>,
    },
}

/// What a run began with.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Begun {
    /// Its user id.
    pub uid: u32,
    /// Its group id.
    pub gid: u32,
    /// Its other groups.
    pub groups: Vec<u32>,
    /// The number of the signal that asks it to end.
    pub stop_signal: i32,
}

/// How an image came to the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Came {
    /// It was there.
    Present,
    /// A registry was asked, and has the same.
    Confirmed,
    /// It was pulled.
    Pulled {
        /// How long that took.
        ms: u64,
    },
}

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// The supervisor is not connected (any more).
    #[error("the pod's supervisor is not connected")]
    NoShim,
    /// The supervisor refused or could not be reached.
    #[error(transparent)]
    Shim(ShimError),
    /// The container's process did not come to be, by its own fault.
    #[error("start container {container}: {source}")]
    NotStarted {
        /// The container.
        container: String,
        /// Which step of its start failed, and how.
        source: ShimError,
    },
    /// The container cannot be made as it is written.
    #[error("{0}")]
    Config(String),
    /// The image is not on this node, and must not be fetched.
    #[error("image {image:?} is not on this node, and imagePullPolicy is Never: load it with `minictl image load`")]
    ImageAbsent {
        /// As written in the manifest.
        image: String,
    },
    /// The image could not be fetched.
    #[error("pull image {image:?}")]
    Pull {
        /// As written in the manifest.
        image: String,
        /// Why.
        #[source]
        source: PullError,
    },
    /// The pod's network.
    #[error("attach network")]
    Network(#[source] NetError),
    /// The node's network.
    #[error("{0}")]
    NodeNetwork(String),
    /// Volumes and directories.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// The pod's own users.
    #[error(transparent)]
    Users(#[from] UsersError),
    /// The pod's own files.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// A file operation.
    #[error("{operation} {path}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: String,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// A background thread ended: the agent is ending.
    #[error("interrupted")]
    Interrupted,
}

impl StepError {
    /// Kubernetes' waiting reason, where the container itself cannot start as it is.
    #[must_use]
    pub fn waiting_reason(&self) -> Option<&'static str> {
        match self {
            Self::Config(_) => Some("CreateContainerConfigError"),
            Self::ImageAbsent { .. } => Some("ErrImageNeverPull"),
            Self::Pull { source, .. } => Some(source.waiting_reason()),
            _ => None,
        }
    }
}

impl From<ConfigError> for StepError {
    fn from(error: ConfigError) -> Self {
        Self::Config(error.to_string())
    }
}

fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> StepError {
    let path = path.display().to_string();
    move |source| StepError::Io { operation, path, source }
}

/// Performs one step.
///
/// # Errors
/// See [`StepError`]; what the step had made stays and is found by its repetition.
pub async fn perform(job: Job, step: &Step) -> Result<Done, StepError> {
    let agent = job.agent.clone();
    // A hook takes as long as it likes and makes nothing: it takes nobody's place, and the agent's end does not wait for it.
    let _permit = match step {
        Step::PostStart { .. } | Step::PreStop { .. } => None,
        _ => Some(agent.step_permit().await.ok_or(StepError::Interrupted)?),
    };
    failpoint(before(step));
    let began = std::time::Instant::now();
    let outcome = perform_now(job, step).await;
    agent.metrics.step(name(step), began.elapsed(), outcome.is_err());
    failpoint(after(step));
    outcome
}

async fn perform_now(job: Job, step: &Step) -> Result<Done, StepError> {
    match step {
        Step::EnsurePodDir => blocking(move || ensure_pod_dir(&job)).await,
        Step::SpawnShim => spawn_shim(&job).await,
        Step::CleanUpShim => clean_up_shim(job).await,
        Step::PrepareVolumes => prepare_volumes(job).await,
        Step::CreateSandbox { attempt } => create_sandbox(&job, *attempt).await,
        Step::AttachNetwork { .. } => attach_network(&job).await,
        Step::WriteEtcFiles { .. } => write_etc_files(&job),
        Step::PrepareImage { name } => prepare_image(&job, name).await,
        Step::StartContainer { name, attempt } => start_container(&job, name, *attempt).await,
        Step::KillContainer { name, grace_ms } => kill_container(&job, name, *grace_ms).await,
        Step::PostStart { name, attempt } | Step::PreStop { name, attempt } => {
            run_hook(job, name, *attempt, matches!(step, Step::PreStop { .. })).await
        }
        Step::Resize { runs } => resize(&job, runs).await,
        Step::StopSandbox => stop_sandbox(&job).await,
        Step::DetachNetwork => detach_network(job).await,
        Step::RemovePodData => blocking(move || remove_data(&job)).await,
        Step::RemovePodDir => blocking(move || remove_all(&job)).await,
    }
}

/// Runs what may block for longer than a moment away from the tasks.
async fn blocking(work: impl FnOnce() -> Result<(), StepError> + Send + 'static) -> Result<Done, StepError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| StepError::Interrupted)??;
    Ok(Done::Nothing)
}

fn shim(job: &Job) -> Result<&Shim, StepError> {
    job.shim.as_ref().ok_or(StepError::NoShim)
}

fn container<'a>(job: &'a Job, name: &str) -> Result<Cow<'a, Container>, StepError> {
    any_container(&job.pod, name).ok_or_else(|| StepError::Config(format!("container {name} is not in the pod's spec")))
}

// ------------------------------------------------------------------------------------------------------- creation

fn ensure_pod_dir(job: &Job) -> Result<(), StepError> {
    let paths = job.agent.paths.pod(&job.uid);
    // Without its run directory nothing of the pod has started since the machine did. Root file systems that are there are those of runs
    // before, of which the API server may not have heard: the next run can have the same number, and begins with its image alone.
    volumes::remove_tree(&paths.roots())?;
    for dir in [&paths.run, &paths.data, &paths.etc(), &job.agent.paths.logs_of(&job.pod, &job.uid)] {
        std::fs::create_dir_all(dir).map_err(io_error("create", dir))?;
    }
    // The pod's data is its own and root's; containers reach it by mounts only.
    for dir in [&paths.run, &paths.data] {
        set_mode(dir, 0o700)?;
    }
    failpoint("ensure-pod-dir:before-spec");
    record::save_spec(&paths.run, &job.pod)?;
    job.record.save(&paths.run)?;
    Ok(())
}

fn set_mode(path: &Path, mode: u32) -> Result<(), StepError> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(io_error("set mode of", path))
}

/// Images of volumes first, then all volumes.
async fn prepare_volumes(job: Job) -> Result<Done, StepError> {
    let (mut images, mut lowers) = (BTreeMap::new(), BTreeMap::new());
    for volume in &job.pod.spec().volumes {
        let Some(source) = &volume.image else { continue };
        let (image, _) = obtain_image(&job, &source.reference, &source.pull_policy, "").await?;
        lowers.insert(volume.name.clone(), job.agent.images.lower_dirs(&image));
        images.insert(volume.name.clone(), image.id.as_str().to_owned());
    }
    blocking(move || {
        let agent = &job.agent;
        let made = volumes::Around {
            facts: &agent.volume_facts(&job.pod),
            writing: &agent.sources.writing,
            images: &lowers,
            users: agent.hold_users(&job.pod, &job.uid)?,
        };
        Ok(volumes::prepare(&job.pod, &agent.paths.pod(&job.uid), &made)?)
    })
    .await?;
    Ok(Done::Volumes(images))
}

async fn spawn_shim(job: &Job) -> Result<Done, StepError> {
    let (shim, events) = Shim::spawn(&job.agent.launch(&job.uid)).await.map_err(StepError::Shim)?;
    Ok(Done::Shim(shim, events))
}

/// The pod's network is set up meanwhile where its namespace is there already.
async fn create_sandbox(job: &Job, attempt: u32) -> Result<Done, StepError> {
    let names = hostnames(job)?;
    let users = job.agent.hold_users(&job.pod, &job.uid)?;
    let spec =
        spec::sandbox(&job.pod, &names.uts, attempt, (shared_memory(job), users), job.agent.config.pod_pids_limit);
    let shim = shim(job)?;
    let ready = shim.take_network().filter(|_| users.is_none() && !spec.host_network).map(Arc::new);
    let attach = async {
        let ready = ready.clone()?;
        // It is that step, at an earlier time.
        failpoint("before:attach-network");
        let attached = attach_network_to(job, ready).await;
        failpoint("after:attach-network");
        Some(attached)
    };
    let (created, attached) = tokio::join!(shim.create_sandbox(spec), attach);
    let pause = created.map_err(StepError::Shim)?;
    let (Some(ready), Some(Ok(network))) = (ready, attached) else {
        // What is wrong with the network is told by its own step.
        return Ok(Done::Nothing);
    };
    // It may not be the one, if the supervisor was asked before.
    let used = netns_of(pause).and_then(|netns| netns.is(&ready).map_err(io_error("look at", Path::new("/proc"))));
    Ok(if used? { Done::Network(network) } else { Done::Nothing })
}

fn shared_memory(job: &Job) -> spec::SharedMemory {
    let mounted = volumes::is_mount_point(&job.agent.paths.pod(&job.uid).shm());
    spec::SharedMemory::of(job.pod.spec(), mounted.unwrap_or(false))
}

async fn attach_network(job: &Job) -> Result<Done, StepError> {
    let pause = shim(job)?.state().await.map_err(StepError::Shim)?.pause_pid.ok_or(StepError::NoShim)?;
    attach_network_to(job, Arc::new(netns_of(pause)?)).await.map(Done::Network)
}

fn netns_of(pause: u32) -> Result<Netns, StepError> {
    Netns::of_pid(pause).map_err(io_error("open network namespace", Path::new(&format!("/proc/{pause}/ns/net"))))
}

async fn attach_network_to(job: &Job, netns: Arc<Netns>) -> Result<PodNetwork, StepError> {
    let network = job.agent.network().await.map_err(StepError::NodeNetwork)?;
    let uid = job.uid.0.clone();
    let wishes = port_wishes(&job.pod).map_err(StepError::Config)?;
    let attached = tokio::task::spawn_blocking(move || network.attach(&uid, &netns, &wishes)).await;
    attached.map_err(|_| StepError::Interrupted)?.map_err(StepError::Network)
}

/// The node's ports that the pod wants.
fn port_wishes(pod: &Pod) -> Result<Vec<PortWish>, String> {
    let ports = pod.spec().all_containers().flat_map(|container| &container.ports);
    let wish = |port: &minipod_proto::v1::ContainerPort| {
        let number = |number: i32| u16::try_from(number).map_err(|_| format!("port {number}: want 1 to 65535"));
        let host_ip = match port.host_ip.as_str() {
            "" | "0.0.0.0" | "::" => None,
            text => {
                Some(text.parse().map_err(|_| format!("hostIP {text:?}: want an IPv4 address, pods have no other"))?)
            }
        };
        let protocol = Protocol::parse(&port.protocol).ok_or_else(|| format!("protocol {:?}", port.protocol))?;
        Ok(PortWish { protocol, host_ip, host_port: number(port.host_port)?, port: number(port.container_port)? })
    };
    ports.filter(|port| port.host_port > 0).map(wish).collect()
}

/// The pod's names.
pub(crate) fn hostnames(job: &Job) -> Result<Hostnames, StepError> {
    let (namespace, pod_name) = key_of(&job.pod);
    let spec = job.pod.spec.clone().unwrap_or_default();
    files::hostnames(&HostnameInput {
        pod_name: &pod_name,
        namespace: &namespace,
        hostname: &spec.hostname,
        subdomain: &spec.subdomain,
        set_hostname_as_fqdn: spec.set_hostname_as_fqdn.unwrap_or(false),
        cluster_domain: CLUSTER_DOMAIN,
    })
    .map_err(StepError::Config)
}

fn write_etc_files(job: &Job) -> Result<Done, StepError> {
    let (namespace, _) = key_of(&job.pod);
    let spec = job.pod.spec.clone().unwrap_or_default();
    let names = hostnames(job)?;
    let aliases: Vec<files::HostAlias> = spec
        .host_aliases
        .iter()
        .map(|alias| files::HostAlias { ip: alias.ip.clone(), hostnames: alias.hostnames.clone() })
        .collect();
    let node_file = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let hosts = if spec.host_network {
        files::etc_hosts_of_node(&node_file("/etc/hosts"), &aliases)
    } else {
        let ip = job.pod_ip.parse().map_err(|_| StepError::NodeNetwork("the pod has no address".to_owned()))?;
        files::etc_hosts(ip, &names, &aliases)
    };
    let dns = spec.dns_config.clone().unwrap_or_default();
    let options: Vec<(String, Option<String>)> =
        dns.options.iter().map(|option| (option.name.clone(), option.value.clone())).collect();
    let resolv = files::resolv_conf(&files::DnsInput {
        policy: files::DnsPolicy::parse(&spec.dns_policy).unwrap_or_default(),
        host_network: spec.host_network,
        node_file: &node_file("/etc/resolv.conf"),
        cluster_dns: &[],
        cluster_domain: CLUSTER_DOMAIN,
        namespace: &namespace,
        nameservers: &dns.nameservers,
        searches: &dns.searches,
        options: &options,
    });
    for warning in &resolv.warnings {
        let event = pod_event(&job.pod, &job.uid, Severity::Warning, "DNSConfigForming", warning.clone());
        job.agent.outbox.event(event);
    }
    let etc = job.agent.paths.pod(&job.uid).etc();
    let files = [("hosts", hosts), ("hostname", format!("{}\n", names.uts)), ("resolv.conf", resolv.text)];
    for (name, content) in files {
        // In place: containers have the file itself mounted, not its name.
        let path = etc.join(name);
        std::fs::write(&path, content).map_err(io_error("write", &path))?;
        set_mode(&path, 0o644)?;
    }
    Ok(Done::Nothing)
}

async fn prepare_image(job: &Job, name: &str) -> Result<Done, StepError> {
    let container = container(job, name)?;
    let (record, came) = obtain_image(job, &container.image, &container.image_pull_policy, name).await?;
    // The start makes what is missing; the first one finds it made, beside the sandbox.
    make_places(job, name, job.attempt)?;
    Ok(Done::Image(Box::new(record), came))
}

/// By imagePullPolicy: `Never`, `IfNotPresent`, or `Always`, which asks the registry whether what is here is still what
/// the name stands for, and pulls only when it is not.
async fn obtain_image(job: &Job, image: &str, policy: &str, name: &str) -> Result<(ImageRecord, Came), StepError> {
    let (images, puller) = (&job.agent.images, &job.agent.puller);
    let pull_error = |source| StepError::Pull { image: image.to_owned(), source };
    let (credentials, problems) = secrets::credentials(&job.pod, &job.agent.sources.known(&key_of(&job.pod).0));
    for problem in problems {
        let reason = "FailedToRetrieveImagePullSecret";
        job.agent.outbox.event(pod_event(&job.pod, &job.uid, Severity::Warning, reason, problem));
    }
    match (policy, images.take(image)) {
        ("Never", None) => return Err(StepError::ImageAbsent { image: image.to_owned() }),
        ("Never" | "IfNotPresent", Some(record)) => return Ok((record, Came::Present)),
        (_, Some(record)) => {
            let digest = puller.digest(image, &credentials).await.map_err(pull_error)?;
            if record.manifest_digest.as_ref() == Some(&digest) {
                return Ok((record, Came::Confirmed));
            }
        }
        (_, None) => {}
    }
    job.agent.outbox.event(crate::events::pulling(&job.pod, &job.uid, name, image));
    let began_ms = crate::clock::boot_ms();
    let progress = tokio::sync::watch::Sender::new(Progress::default());
    let record = puller.pull(image, &credentials, &progress).await.map_err(pull_error)?;
    job.agent.images_were_loaded();
    // Taken as well: it may be one that was here by another name.
    let record = images.take(record.id.as_str()).unwrap_or(record);
    Ok((record, Came::Pulled { ms: crate::clock::boot_ms() - began_ms }))
}

/// The directories of a run: of its root file system and of its log.
fn make_places(job: &Job, name: &str, attempt: u32) -> Result<(), StepError> {
    let paths = job.agent.paths.pod(&job.uid).container(name, attempt);
    let log = job.agent.paths.log_file(&job.pod, &job.uid, name, attempt);
    for dir in [&*paths.upper, &*paths.work, &*paths.root].into_iter().chain(log.parent()) {
        std::fs::create_dir_all(dir).map_err(io_error("create", dir))?;
    }
    // The upper directory is the root directory that the container sees.
    set_mode(&paths.upper, 0o755)
}

async fn start_container(job: &Job, name: &str, attempt: u32) -> Result<Done, StepError> {
    let container = container(job, name)?;
    let image = job.image.as_ref().ok_or_else(|| StepError::Config(format!("no image was prepared for {name}")))?;
    let facts = EnvFacts {
        pod_ip: if job.pod_ip.is_empty() { job.agent.node_ip().to_string() } else { job.pod_ip.clone() },
        hostname: hostnames(job)?.uts,
        ..job.agent.volume_facts(&job.pod)
    };
    let images = &job.agent.images;
    let user = images
        .resolve_user(image, &spec::user_text(&job.pod, &container, &image.config))
        .map_err(|error: ImageError| StepError::Config(crate::report::chain(&error)))?;
    let pod_paths = job.agent.paths.pod(&job.uid);
    let log = job.agent.paths.log_file(&job.pod, &job.uid, name, attempt);
    let choice = seccomp::choice(&job.pod, &container, job.agent.config.seccomp_default);
    let set = process::capabilities(container.security_context.as_deref())?;
    let filter = job.agent.seccomp.filter(&choice, set).map_err(ConfigError::from)?;
    let can_set = shim(job)?.knows_apparmor();
    let profile = apparmor::profile(&job.pod, &container, &job.agent.apparmor, can_set).map_err(ConfigError::from)?;
    if !profile.is_empty() {
        apparmor::must_be_loaded(&profile).map_err(ConfigError::from)?;
    }
    let input = spec::Input {
        pod: &job.pod,
        container: &container,
        image: &image.config,
        image_user: &user,
        lowers: images.lower_dirs(image),
        facts: &facts,
        paths: &pod_paths,
        log: log.clone(),
        attempt,
        seccomp_filter: filter.to_vec(),
        apparmor_profile: profile,
        users: job.agent.hold_users(&job.pod, &job.uid)?,
        memory: shared_memory(job),
        node_memory_bytes: job.agent.machine.memory_bytes(),
    };
    let mut spec = spec::container(&input)?;
    if let Some(debug) = job.pod.spec().ephemeral_container(name) {
        spec.pid_of.clone_from(&debug.target_container_name);
    }
    let paths = pod_paths.container(name, attempt);
    make_places(job, name, attempt)?;
    std::fs::write(&paths.termination_log, b"").map_err(io_error("create", &paths.termination_log))?;
    set_mode(&paths.termination_log, 0o666)?;
    failpoint("start-container:before-request");
    let user = spec.user.clone().unwrap_or_default();
    let own_signal = container.lifecycle.as_ref().map_or("", |lifecycle| lifecycle.stop_signal.as_str());
    let stop_signal = spec::stop_signal(own_signal, &image.config.stop_signal);
    let begun = Box::new(Begun { uid: user.uid, gid: user.gid, groups: user.groups, stop_signal });
    let started = shim(job)?.start(spec).await.map_err(|error| match error {
        error if error.is_containers_fault() => StepError::NotStarted { container: name.to_owned(), source: error },
        error => StepError::Shim(error),
    })?;
    if attempt > 0 {
        forget_old_attempts(job, name, attempt);
    }
    Ok(Done::Started { sandbox: job.sandbox, wall_ms: started.started_wall_ms, begun })
}

/// Removes root file systems of former attempts, and logs but for the newest two. Beside the start, not before it.
fn forget_old_attempts(job: &Job, name: &str, attempt: u32) {
    let roots = job.agent.paths.pod(&job.uid).attempts(name);
    let logs = job.agent.paths.log_file(&job.pod, &job.uid, name, attempt).parent().map(Path::to_owned);
    tokio::task::spawn_blocking(move || {
        let old_roots = older_than(&roots, attempt);
        let old_logs = logs.iter().flat_map(|logs| older_than(logs, (attempt + 1).saturating_sub(KEPT_LOGS)));
        for path in old_roots.into_iter().chain(old_logs) {
            let removed = if path.is_dir() {
                volumes::remove_tree(&path).map_err(|error| crate::report::chain(&error))
            } else {
                std::fs::remove_file(&path).map_err(|error| error.to_string())
            };
            if let Err(error) = removed {
                tracing::warn!(path = %path.display(), error, "something of a former attempt stays");
            }
        }
    });
}

/// Entries whose name is the number of an attempt before this one, alone or with an ending: `3`, `3.log`, `3.log.1`.
fn older_than(dir: &Path, attempt: u32) -> Vec<PathBuf> {
    let is_older = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.and_then(|name| name.split('.').next()?.parse::<u32>().ok()).is_some_and(|number| number < attempt)
    };
    std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).filter(is_older).collect()
}

async fn resize(job: &Job, runs: &[(String, u32)]) -> Result<Done, StepError> {
    let (mut containers, mut applied) = (Vec::new(), Vec::new());
    for (name, attempt) in runs {
        let resources = Resources::of(container(job, name)?.resources.as_ref());
        let limits = Some(spec::limits(&resources));
        containers.push(ResizeContainer { name: name.clone(), attempt: *attempt, limits });
        applied.push((name.clone(), *attempt, resources));
    }
    let pod = spec::pod_level(job.pod.spec());
    shim(job)?.resize(Resize { pod: Some(spec::limits_of_all(&pod)), containers }).await.map_err(StepError::Shim)?;
    Ok(Done::Resized { pod, runs: applied })
}

// --------------------------------------------------------------------------------------------------------- the end

async fn kill_container(job: &Job, name: &str, grace_ms: u64) -> Result<Done, StepError> {
    let container = container(job, name)?;
    let image_signal = job
        .image
        .clone()
        .or_else(|| job.agent.images.get(&container.image))
        .map_or_else(String::new, |image| image.config.stop_signal);
    let own = container.lifecycle.as_ref().map_or("", |lifecycle| lifecycle.stop_signal.as_str());
    let signal = spec::stop_signal(own, &image_signal);
    shim(job)?.kill(name, job.attempt, signal, grace_ms).await.map_err(StepError::Shim)?;
    Ok(Done::Nothing)
}

/// Runs a hook until it is done or its run is over.
async fn run_hook(mut job: Job, name: &str, attempt: u32, pre_stop: bool) -> Result<Done, StepError> {
    let container = container(&job, name)?.into_owned();
    let lifecycle = container.lifecycle.as_ref();
    let hook =
        lifecycle.and_then(|lifecycle| if pre_stop { &lifecycle.pre_stop } else { &lifecycle.post_start }.as_ref());
    let Some(hook) = hook.cloned() else { return Ok(Done::Hooked(Ok(()))) };
    let target = Target { shim: job.shim.clone(), attempt, address: address(&job), container };
    let over = |view: &PodView| !view.runs.get(name).is_some_and(|run| run.attempt == attempt && run.running);
    tokio::select! {
        // Given up when the run is over, and with it whatever the hook works on.
        outcome = handler::hook(&target, &hook) => Ok(Done::Hooked(outcome)),
        // Cancel safe: a level. A worker that is gone ends the hook too.
        _ = job.view.wait_for(over) => Ok(Done::Hooked(Ok(()))),
    }
}

/// Where the pod answers.
pub(crate) fn address(job: &Job) -> String {
    if job.pod.spec().host_network { job.agent.node_ip().to_string() } else { job.pod_ip.clone() }
}

async fn stop_sandbox(job: &Job) -> Result<Done, StepError> {
    shim(job)?.stop().await.map_err(StepError::Shim)?;
    Ok(Done::Nothing)
}

async fn clean_up_shim(job: Job) -> Result<Done, StepError> {
    blocking(move || crate::shim::clean_up(&job.agent.launch(&job.uid)).map_err(StepError::Shim)).await
}

async fn detach_network(job: Job) -> Result<Done, StepError> {
    let network = match job.agent.network_now() {
        Some(network) => network,
        None => job.agent.network().await.map_err(StepError::NodeNetwork)?,
    };
    blocking(move || network.detach(&job.uid.0).map_err(StepError::Network)).await
}

fn remove_data(job: &Job) -> Result<(), StepError> {
    crate::shim::remove_cgroups(&job.agent.launch(&job.uid)).map_err(StepError::Shim)?;
    failpoint("remove-pod-data:before-files");
    volumes::remove_tree(&job.agent.paths.pod(&job.uid).data)?;
    // Nothing has them any more: no process, no mount, no file.
    Ok(job.agent.release_users(&job.uid)?)
}

fn remove_all(job: &Job) -> Result<(), StepError> {
    remove_data(job)?;
    failpoint("remove-pod-dir:before-logs");
    volumes::remove_tree(&job.agent.paths.logs_of(&job.pod, &job.uid))?;
    failpoint("remove-pod-dir:before-run");
    // Last: as long as it is there, a restarted agent finds the pod and goes on removing.
    Ok(volumes::remove_tree(&job.agent.paths.pod(&job.uid).run)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotated_logs_go_with_their_attempt() {
        let dir = tempfile::tempdir().expect("tempdir");
        for name in ["0.log", "0.log.1", "1.log", "10.log", "x.log", "2"] {
            std::fs::write(dir.path().join(name), b"").expect("write");
        }
        let old = |attempt| {
            let paths = older_than(dir.path(), attempt);
            let mut names: Vec<String> =
                paths.iter().filter_map(|path| Some(path.file_name()?.to_string_lossy().into_owned())).collect();
            names.sort();
            names
        };
        assert_eq!(old(0), [""; 0]);
        assert_eq!(old(1), ["0.log", "0.log.1"]);
        assert_eq!(old(3), ["0.log", "0.log.1", "1.log", "2"]);
    }
}
