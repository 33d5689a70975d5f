//! Places at which the crash tests kill the agent: before and after each step, and inside steps that leave several things.
//!
//! Only with the feature `failpoints`. `FAILPOINTS=before:spawn-shim=return` kills the agent (SIGKILL to itself) when it gets
//! there; `=1*off->return` the second time.

use crate::plan::model::Step;

macro_rules! failpoints {
    ($($pattern:pat => $name:literal,)*; $($inner:literal,)*) => {
        /// Every failpoint's name.
        pub const FAILPOINTS: &[&str] = &[
            $(concat!("before:", $name), concat!("after:", $name),)*
            $($inner,)*
        ];

        /// The failpoint before a step.
        #[must_use]
        pub fn before(step: &Step) -> &'static str {
            match step { $($pattern => concat!("before:", $name),)* }
        }

        /// A step's name, for metrics.
        #[must_use]
        pub fn name(step: &Step) -> &'static str {
            match step { $($pattern => $name,)* }
        }

        /// The failpoint after a step.
        #[must_use]
        pub fn after(step: &Step) -> &'static str {
            match step { $($pattern => concat!("after:", $name),)* }
        }
    };
}

failpoints! {
    Step::EnsurePodDir => "ensure-pod-dir",
    Step::SpawnShim => "spawn-shim",
    Step::CleanUpShim => "clean-up-shim",
    Step::PrepareVolumes => "prepare-volumes",
    Step::CreateSandbox { .. } => "create-sandbox",
    Step::AttachNetwork { .. } => "attach-network",
    Step::WriteEtcFiles { .. } => "write-etc-files",
    Step::PrepareImage { .. } => "prepare-image",
    Step::StartContainer { .. } => "start-container",
    Step::KillContainer { .. } => "kill-container",
    Step::PostStart { .. } => "post-start",
    Step::PreStop { .. } => "pre-stop",
    Step::Resize { .. } => "resize",
    Step::StopSandbox => "stop-sandbox",
    Step::DetachNetwork => "detach-network",
    Step::RemovePodData => "remove-pod-data",
    Step::RemovePodDir => "remove-pod-dir",
    ;
    "ensure-pod-dir:before-spec",
    "spawn-shim:before-connect",
    "start-container:before-request",
    "remove-pod-data:before-files",
    "remove-pod-dir:before-logs",
    "remove-pod-dir:before-run",
}

/// Reads `FAILPOINTS`; keep what it returns as long as the process lives.
#[cfg(feature = "failpoints")]
#[must_use]
pub fn arm() -> impl Sized {
    fail::FailScenario::setup()
}

/// Nothing to arm in this build.
#[cfg(not(feature = "failpoints"))]
#[must_use]
pub fn arm() -> impl Sized {}

/// Dies here if the test asked for it.
pub fn failpoint(name: &str) {
    debug_assert!(FAILPOINTS.contains(&name), "{name} is not in the list");
    #[cfg(feature = "failpoints")]
    fail::fail_point!(name, |_| die(name));
}

/// As if by kill -9: nothing is flushed, nothing is run.
#[cfg(feature = "failpoints")]
fn die(name: &str) {
    use nix::sys::signal::{Signal, kill};
    eprintln!("failpoint {name}: the agent kills itself");
    let _ = kill(nix::unistd::getpid(), Signal::SIGKILL);
    std::process::abort();
}
