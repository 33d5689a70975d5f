//! The agent's side of a pod's supervisor: starting it, talking to it, cleaning up after its death.
//!
//! One task per supervisor owns the connection (`connection.rs`); [`Shim`] is a handle on it. An exec'd process has a
//! connection of its own (`exec.rs`), so that its output is held back by its reader alone.

mod connection;
mod exec;
mod spare;
mod spawn;

use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use minipod_podshim::cleanup::{self, CleanupError, Presence};
use minipod_podshim::protocol::{
    self, Ask, ContainerSpec, Empty, Fault, FrameError, Happened, Kill, Refused, SandboxPhase, SandboxSpec, Say,
};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

use crate::paths::PodPaths;
use crate::plan::model::{Ended, Run, RunState, SandboxState};
use crate::sys::Netns;

pub use exec::{ExecInput, ExecInputs, ExecOutput, ExecOutputs, ExecProcess, ExecStreams};
pub use spare::Spare;

/// Requests between steps and the connection: the planner has a few steps of a pod in flight at a time.
const CALL_QUEUE: usize = 16;
/// Events between the connection and the worker; while it is full the connection is not read, and the supervisor keeps them.
const EVENT_QUEUE: usize = 64;
/// How long the supervisor may take for what needs no process to die.
const ANSWER_PATIENCE: Duration = Duration::from_secs(30);
/// How long it may take to end a pod: processes that hang in the kernel, slow disks.
const STOP_PATIENCE: Duration = Duration::from_secs(120);

/// Where a pod's supervisor is and what it is made of.
#[derive(Debug, Clone)]
pub struct Launch {
    /// The supervisor's binary.
    pub podshim: PathBuf,
    /// The infra container's binary.
    pub pause: PathBuf,
    /// The pod's run directory; must exist.
    pub dir: PathBuf,
    /// The pod's uid.
    pub uid: String,
    /// Name of the cgroup that holds all pods.
    pub cgroup_root: String,
    /// Where one may be waiting.
    pub spare: Arc<Spare>,
}

/// A request to a supervisor failed.
#[derive(Debug, thiserror::Error)]
pub enum ShimError {
    /// It could not be started.
    #[error("{operation} {}", path.display())]
    Start {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// It ended, or the connection broke.
    #[error("the pod's supervisor is gone{}", if .0.is_empty() { String::new() } else { format!(": {}", .0) })]
    Gone(String),
    /// It did not answer.
    #[error("the pod's supervisor did not {operation} within {} s", patience.as_secs())]
    Silent {
        /// What it was asked.
        operation: &'static str,
        /// How long it had.
        patience: Duration,
    },
    /// It speaks another language.
    #[error("talk to the pod's supervisor")]
    Frame(#[from] FrameError),
    /// It answered something else than it was asked.
    #[error("the pod's supervisor answered {operation} with something else: is it older than this agent?")]
    Unexpected {
        /// What it was asked.
        operation: &'static str,
    },
    /// An agent was upgraded, this pod's supervisor was not: it would ignore what it does not know.
    #[error("the pod's supervisor is of a version that does not know {field}: delete the pod and create it again")]
    TooOld {
        /// What it was asked to carry out.
        field: &'static str,
    },
    /// It did not do it.
    #[error("{}", refusal(.0))]
    Refused(Refused),
    /// What a dead one left cannot be removed.
    #[error("clean up after the pod's supervisor")]
    Cleanup(#[from] CleanupError),
}

impl ShimError {
    /// Whether the container's spec, image or program is at fault: the same start would fail again in the same way.
    #[must_use]
    pub fn is_containers_fault(&self) -> bool {
        matches!(self, Self::Refused(refused) if refused.fault() == Fault::Container)
    }
}

fn refusal(refused: &Refused) -> String {
    let mut text = refused.step.clone();
    if !refused.object.is_empty() {
        text.push(' ');
        text.push_str(&refused.object);
    }
    if refused.errno != 0 {
        text.push_str(": ");
        text.push_str(nix::errno::Errno::from_raw(refused.errno).desc());
    }
    if !refused.detail.is_empty() {
        text.push_str(": ");
        text.push_str(&refused.detail);
    }
    text
}

/// A connection to a live supervisor. Clones share it; it ends with the last of them.
#[derive(Clone)]
pub struct Shim(Arc<Inner>);

struct Inner {
    id: u64,
    launch_socket: PathBuf,
    /// Boxed, as events are: a channel has room for 32 from its beginning, for each pod.
    calls: mpsc::Sender<Box<Call>>,
    acknowledged: watch::Sender<u64>,
    /// [`protocol::ABILITIES`] of its build; 0 until it said so.
    abilities: AtomicU32,
    /// See [`Shim::take_network`].
    network: Mutex<Option<Netns>>,
}

/// A request on its way, and who waits for the answer.
struct Call {
    ask: Ask,
    answer: oneshot::Sender<Say>,
}

impl fmt::Debug for Shim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shim").field("id", &self.0.id).finish_non_exhaustive()
    }
}

/// Something that a supervisor saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShimEvent {
    /// To acknowledge it with, once it is written down.
    pub sequence: Option<u64>,
    /// What happened.
    pub what: What,
}

/// What a supervisor can see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// A run's program runs.
    Started {
        /// The container.
        name: String,
        /// The run.
        attempt: u32,
        /// In this sandbox.
        sandbox: u32,
        /// Since then.
        wall_ms: u64,
    },
    /// A run is over and its log complete.
    Ended {
        /// The container.
        name: String,
        /// The run.
        attempt: u32,
        /// In this sandbox.
        sandbox: u32,
        /// How.
        ended: Ended,
    },
    /// The infra container is gone, and all of its sandbox.
    SandboxEnded {
        /// The sandbox.
        sandbox: u32,
    },
}

/// What a supervisor knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShimState {
    /// The newest sandbox.
    pub sandbox: SandboxState,
    /// Its number; 0 before the first.
    pub sandbox_attempt: u32,
    /// The infra container while it lives.
    pub pause_pid: Option<u32>,
    /// The newest run of each container.
    pub runs: Vec<(String, Run)>,
    /// The first process of each container that runs.
    pub processes: Vec<Process>,
    /// The supervisor itself.
    pub shim_pid: u32,
}

/// The first process of a container that runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// The container.
    pub name: String,
    /// Its run.
    pub attempt: u32,
    /// In the node's PID namespace.
    pub pid: u32,
    /// Who it was made as; `None` where an older supervisor does not say.
    pub user: Option<protocol::User>,
    /// The capabilities that it was made with.
    pub capabilities: u64,
}

/// The first [`protocol::ABILITIES`] with `Mount::sub_path`.
const SUB_PATH_SINCE: u32 = 2;
/// The first with `Exec::terminal`.
const TERMINALS_SINCE: u32 = 3;
/// The first with terminals of containers, `stdinOnce`, `ContainerSpec::pid_of` and `Ask::Attach`.
const ATTACH_SINCE: u32 = 4;
/// The first with `Ask::Resize`.
const RESIZE_SINCE: u32 = 5;
/// The first with `SandboxSpec::users`.
const USERS_SINCE: u32 = 6;
/// The first with `SandboxSpec::shared_memory`.
const SHARED_MEMORY_SINCE: u32 = 7;

/// The first with `ContainerSpec::apparmor_profile`.
const APPARMOR_SINCE: u32 = 7;

/// What there is of a pod's supervisor.
#[derive(Debug)]
pub enum Found {
    /// It lives: what it knows, and its events from the first that was not acknowledged.
    Live(Shim, ShimState, mpsc::Receiver<Box<ShimEvent>>),
    /// It died, and may have left something.
    Dead,
    /// There was none, or it ended in order.
    Never,
}

impl Shim {
    /// Starts a supervisor and connects to it; connects to the one that lives, if one does.
    ///
    /// # Errors
    /// When it cannot be started or does not answer.
    pub async fn spawn(launch: &Launch) -> Result<(Self, mpsc::Receiver<Box<ShimEvent>>), ShimError> {
        let network = spawn::ensure(launch).await?;
        crate::failpoints::failpoint("spawn-shim:before-connect");
        let (shim, _, events) = Self::connect(launch.dir.join(protocol::files::SOCKET)).await?;
        *shim.network() = network;
        Ok((shim, events))
    }

    /// Finds the supervisor of a pod. One that lives and does not answer is as good as dead; cleaning up kills it.
    pub async fn find(paths: &PodPaths) -> Found {
        let began = std::time::Instant::now();
        loop {
            let error = match cleanup::look(&paths.run) {
                Ok(Presence::Never) => return Found::Never,
                Ok(Presence::Dead) => return Found::Dead,
                Ok(Presence::Live) => match Self::connect(paths.run.join(protocol::files::SOCKET)).await {
                    Ok((shim, state, events)) => return Found::Live(shim, state, events),
                    Err(error) => crate::report::chain(&error),
                },
                Err(error) => error.to_string(),
            };
            if began.elapsed() > ANSWER_PATIENCE {
                tracing::error!(dir = %paths.run.display(), error, "a pod's supervisor lives and does not answer");
                return Found::Dead;
            }
            // It may be in the middle of its end.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn connect(socket: PathBuf) -> Result<(Self, ShimState, mpsc::Receiver<Box<ShimEvent>>), ShimError> {
        let stream = UnixStream::connect(&socket).await.map_err(|error| ShimError::Gone(error.to_string()))?;
        let (calls, queue) = mpsc::channel(CALL_QUEUE);
        let (acknowledged, acks) = watch::channel(0);
        let (sender, events) = mpsc::channel(EVENT_QUEUE);
        connection::serve(stream, queue, acks, sender);
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        let shim = Self(Arc::new(Inner {
            id,
            launch_socket: socket,
            calls,
            acknowledged,
            abilities: AtomicU32::new(0),
            network: Mutex::default(),
        }));
        let state = match shim.ask("answer", Ask::Subscribe(Empty {}), ANSWER_PATIENCE).await? {
            Say::State(state) => {
                shim.0.abilities.store(state.version, Ordering::Relaxed);
                state_of(state)
            }
            _ => return Err(ShimError::Unexpected { operation: "subscribe" }),
        };
        Ok((shim, state, events))
    }

    fn network(&self) -> MutexGuard<'_, Option<Netns>> {
        self.0.network.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The network namespace that its first sandbox gets, unless that has the node's or users of its own; once, and only of a supervisor that
    /// has waited for its pod.
    #[must_use]
    pub fn take_network(&self) -> Option<Netns> {
        self.network().take()
    }

    /// Tells connections apart.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.0.id
    }

    async fn ask(&self, operation: &'static str, ask: Ask, patience: Duration) -> Result<Say, ShimError> {
        let (answer, answered) = oneshot::channel();
        let asked = async {
            let gone = || ShimError::Gone(String::new());
            self.0.calls.send(Box::new(Call { ask, answer })).await.map_err(|_| gone())?;
            answered.await.map_err(|_| gone())
        };
        match timeout(patience, asked).await {
            Ok(Ok(Say::Refused(refused))) => Err(ShimError::Refused(refused)),
            Ok(answer) => answer,
            Err(_) => Err(ShimError::Silent { operation, patience }),
        }
    }

    async fn ask_done(&self, operation: &'static str, ask: Ask, patience: Duration) -> Result<(), ShimError> {
        match self.ask(operation, ask, patience).await? {
            Say::Done(_) => Ok(()),
            _ => Err(ShimError::Unexpected { operation }),
        }
    }

    /// Everything that it knows.
    ///
    /// # Errors
    /// When it is gone.
    pub async fn state(&self) -> Result<ShimState, ShimError> {
        match self.ask("tell its state", Ask::State(Empty {}), ANSWER_PATIENCE).await? {
            Say::State(state) => Ok(state_of(state)),
            _ => Err(ShimError::Unexpected { operation: "state" }),
        }
    }

    /// Makes the sandbox; answers its infra container's pid as soon as the namespaces exist. One that is up already with
    /// that number is answered like a new one.
    ///
    /// # Errors
    /// See [`ShimError`].
    pub async fn create_sandbox(&self, spec: SandboxSpec) -> Result<u32, ShimError> {
        if spec.users.is_some() {
            self.must_know(USERS_SINCE, "hostUsers: false")?;
        }
        if !spec.shared_memory.is_empty() {
            self.must_know(SHARED_MEMORY_SINCE, "the pod's /dev/shm")?;
        }
        match self.ask("create the sandbox", Ask::CreateSandbox(spec), ANSWER_PATIENCE).await? {
            Say::SandboxStarted(started) => Ok(started.pause_pid),
            _ => Err(ShimError::Unexpected { operation: "create sandbox" }),
        }
    }

    /// Starts a run of a container and waits until its program runs. A run that was started before is answered as then.
    ///
    /// # Errors
    /// See [`ShimError::is_containers_fault`].
    pub async fn start(&self, spec: ContainerSpec) -> Result<protocol::Started, ShimError> {
        if spec.mounts.iter().any(|mount| !mount.sub_path.is_empty()) {
            self.must_know(SUB_PATH_SINCE, "volumeMounts.subPath")?;
        }
        for (asked, field) in [
            (spec.terminal.is_some(), "tty"),
            (spec.stdin_once, "stdinOnce"),
            (!spec.pid_of.is_empty(), "targetContainerName"),
        ] {
            if asked {
                self.must_know(ATTACH_SINCE, field)?;
            }
        }
        if !spec.apparmor_profile.is_empty() {
            self.must_know(APPARMOR_SINCE, "AppArmor profiles")?;
        }
        match self.ask("start the container", Ask::Start(Box::new(spec)), ANSWER_PATIENCE).await? {
            Say::Started(started) => Ok(started),
            _ => Err(ShimError::Unexpected { operation: "start" }),
        }
    }

    /// The signal now, KILL to all of the container after the grace. Returns at once; a run that is over already, or
    /// unknown, is no error.
    ///
    /// # Errors
    /// When it is gone.
    pub async fn kill(&self, name: &str, attempt: u32, signal: i32, grace_ms: u64) -> Result<(), ShimError> {
        let kill = Kill { name: name.to_owned(), attempt, signal, grace_ms };
        self.ask_done("kill the container", Ask::Kill(kill), ANSWER_PATIENCE).await
    }

    /// Gives the pod and runs of its containers other limits.
    ///
    /// # Errors
    /// [`ShimError::Refused`] where memory is in use above its new limit; then nothing has changed.
    pub async fn resize(&self, resize: protocol::Resize) -> Result<(), ShimError> {
        self.must_know(RESIZE_SINCE, "resizes")?;
        self.ask_done("resize the pod", Ask::Resize(resize), ANSWER_PATIENCE).await
    }

    /// Kills all, removes the pod's cgroups and ends the supervisor. One that is gone already is no error if it ended in
    /// order.
    ///
    /// # Errors
    /// When something of the pod cannot be ended.
    pub async fn stop(&self) -> Result<(), ShimError> {
        let asked = self.ask_done("stop", Ask::Stop(Empty {}), STOP_PATIENCE).await;
        match asked {
            Err(ShimError::Gone(_)) if self.ended_in_order() => Ok(()),
            answer => answer,
        }
    }

    fn ended_in_order(&self) -> bool {
        let dir = self.0.launch_socket.parent();
        dir.is_some_and(|dir| cleanup::look(dir).is_ok_and(|presence| presence == Presence::Never))
    }

    fn must_know(&self, since: u32, field: &'static str) -> Result<(), ShimError> {
        let known = self.0.abilities.load(Ordering::Relaxed);
        if known < since { Err(ShimError::TooOld { field }) } else { Ok(()) }
    }

    /// Whether it can give a container an AppArmor profile.
    #[must_use]
    pub fn knows_apparmor(&self) -> bool {
        self.must_know(APPARMOR_SINCE, "AppArmor profiles").is_ok()
    }

    /// Runs a program in a container.
    ///
    /// # Errors
    /// [`ShimError::Refused`] when the container does not run or the program cannot be run.
    /// [`ShimError::TooOld`] for a terminal where a supervisor is older than terminals.
    pub async fn exec(
        &self,
        name: &str,
        attempt: u32,
        argv: &[String],
        streams: ExecStreams,
    ) -> Result<ExecProcess, ShimError> {
        let ExecStreams { stdin, terminal } = streams;
        if terminal.is_some() {
            self.must_know(TERMINALS_SINCE, "terminals")?;
        }
        let exec =
            protocol::Exec { name: name.to_owned(), attempt, argv: argv.to_vec(), stdin, env: Vec::new(), terminal };
        let began = timeout(ANSWER_PATIENCE, ExecProcess::begin(&self.0.launch_socket, Ask::Exec(exec))).await;
        began.map_err(|_| ShimError::Silent { operation: "run the program", patience: ANSWER_PATIENCE })?
    }

    /// Takes part in the streams of a container's first process: its output from now on, its input where that is open. Dropping
    /// the answer leaves the process alone.
    ///
    /// # Errors
    /// [`ShimError::Refused`] when the container does not run; [`ShimError::TooOld`] where a supervisor is older than this.
    pub async fn attach(&self, name: &str, attempt: u32, streams: ExecStreams) -> Result<ExecProcess, ShimError> {
        self.must_know(ATTACH_SINCE, "attaching to containers")?;
        let ExecStreams { stdin, terminal } = streams;
        let attach = protocol::Attach { name: name.to_owned(), attempt, stdin, window: terminal };
        let began = timeout(ANSWER_PATIENCE, ExecProcess::begin(&self.0.launch_socket, Ask::Attach(attach))).await;
        began.map_err(|_| ShimError::Silent { operation: "attach to the container", patience: ANSWER_PATIENCE })?
    }

    /// Lets the supervisor forget all events up to this one: they are written down.
    pub fn acknowledge(&self, sequence: u64) {
        self.0.acknowledged.send_if_modified(|known| {
            let newer = sequence > *known;
            *known = sequence.max(*known);
            newer
        });
    }
}

/// Kills what runs of a pod whose supervisor died, and removes its cgroups and the supervisor's files. Blocks.
///
/// # Errors
/// When something stays; it may be asked for again.
pub fn clean_up(launch: &Launch) -> Result<(), ShimError> {
    Ok(cleanup::clean_up(&launch.dir, &launch.cgroup_root, &launch.uid)?)
}

/// Removes the pod's cgroups if any are left. Blocks.
///
/// # Errors
/// When a process is in them.
pub fn remove_cgroups(launch: &Launch) -> Result<(), ShimError> {
    Ok(cleanup::remove_cgroups(&launch.cgroup_root, &launch.uid)?)
}

/// What a dead supervisor saw and the agent does not know, so that true exit codes outlive it: events that were never
/// acknowledged, and ends that it had not told yet because their output was not complete.
#[must_use]
pub fn last_words(paths: &PodPaths) -> Vec<ShimEvent> {
    let events = cleanup::kept_events(&paths.run).into_iter().filter_map(event_of);
    let ends = cleanup::kept_ends(&paths.run).into_iter();
    events.chain(ends.map(|ended| ShimEvent { sequence: None, what: end_of(ended) })).collect()
}

fn end_of(ended: protocol::Ended) -> What {
    What::Ended { ended: ended_of(&ended), name: ended.name, attempt: ended.attempt, sandbox: ended.sandbox }
}

// ------------------------------------------------------------------------------------------- from the wire to the plan

fn state_of(state: protocol::State) -> ShimState {
    let sandbox = match state.phase() {
        SandboxPhase::None => SandboxState::None,
        SandboxPhase::Up => SandboxState::Up,
        SandboxPhase::Ended => SandboxState::Ended,
    };
    let living = state.runs.iter().filter(|run| run.ended.is_none());
    let process = |run: &protocol::Run| {
        let started = run.started.as_ref()?;
        let (name, user, capabilities) = (started.name.clone(), run.user.clone(), run.capabilities);
        Some(Process { name, attempt: started.attempt, pid: started.pid, user, capabilities })
    };
    let processes = living.filter_map(process).collect();
    ShimState {
        sandbox,
        sandbox_attempt: state.sandbox,
        pause_pid: (state.pause_pid != 0).then_some(state.pause_pid),
        runs: state.runs.into_iter().filter_map(run_of).collect(),
        processes,
        shim_pid: state.shim_pid,
    }
}

fn run_of(run: protocol::Run) -> Option<(String, Run)> {
    let started = run.started?;
    let state = run.ended.map_or(RunState::Running, |ended| RunState::Ended(ended_of(&ended)));
    let (attempt, sandbox, started_wall_ms) = (started.attempt, started.sandbox, started.started_wall_ms);
    Some((started.name, Run { attempt, sandbox, started_wall_ms, state }))
}

fn ended_of(ended: &protocol::Ended) -> Ended {
    let reason = match ended.exit_code {
        0 => "Completed",
        _ if ended.oom => "OOMKilled",
        _ => "Error",
    };
    Ended {
        exit_code: ended.exit_code,
        signal: ended.signal,
        reason: reason.to_owned(),
        message: String::new(),
        started_wall_ms: ended.started_wall_ms,
        finished_wall_ms: ended.finished_wall_ms,
        restart: false,
    }
}

/// `None` for what a newer supervisor says and this agent does not know.
fn event_of(event: protocol::Event) -> Option<ShimEvent> {
    let what = match event.happened? {
        Happened::Started(started) => What::Started {
            name: started.name,
            attempt: started.attempt,
            sandbox: started.sandbox,
            wall_ms: started.started_wall_ms,
        },
        Happened::Ended(ended) => end_of(ended),
        Happened::SandboxEnded(ended) => {
            if !ended.message.is_empty() {
                tracing::warn!(sandbox = ended.sandbox, error = ended.message, "a sandbox ended");
            }
            What::SandboxEnded { sandbox: ended.sandbox }
        }
    };
    Some(ShimEvent { sequence: Some(event.sequence), what })
}

#[cfg(test)]
mod abilities_tests;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_step_object_and_why() {
        let refused = Refused {
            step: "run the program".into(),
            object: "/bin/nonsense".into(),
            errno: libc::ENOENT,
            fault: Fault::Container.into(),
            ..Refused::default()
        };
        let error = ShimError::Refused(refused);
        assert_eq!(error.to_string(), "run the program /bin/nonsense: No such file or directory");
        assert!(error.is_containers_fault());
        assert!(!ShimError::Gone(String::new()).is_containers_fault());
    }

    #[test]
    fn reasons_are_those_of_the_field() {
        let reason = |exit_code, oom| ended_of(&protocol::Ended { exit_code, oom, ..Default::default() }).reason;
        assert_eq!(reason(0, false), "Completed");
        assert_eq!(reason(0, true), "Completed", "only a child of it was killed");
        assert_eq!(reason(1, false), "Error");
        assert_eq!(reason(137, true), "OOMKilled");
    }
}
