//! Which AppArmor profile confines a container.
//!
//! The profile of RuntimeDefault is ours (`minipod-default`). `apparmor_parser` compiles and loads it at the agent's start: the compiled form is
//! tables of automata whose layout follows the kernel's features, and whoever has AppArmor has the parser, which compiles the system's own
//! profiles at boot. podshim tells the kernel the profile's name before the container's program is run, and again for each exec'd one.

use std::io::{self, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use minipod_proto::v1::{AppArmorProfile, Container, Pod};

use crate::container::process::is_privileged;
use crate::plan::model::Refused;

/// The profile of RuntimeDefault.
pub const DEFAULT: &str = "minipod-default";
const DEFAULT_TEXT: &str = include_str!("minipod-default");
/// Where the kernel tells of itself; the second is there only once securityfs is mounted.
const ENABLED: &str = "/sys/module/apparmor/parameters/enabled";
const POLICY: &str = "/sys/kernel/security/apparmor";
const PARSER: &str = "apparmor_parser";
/// Where the parser is, which is not always in a service's PATH.
const PARSER_DIRS: [&str; 3] = ["/sbin", "/usr/sbin", "/usr/local/sbin"];
/// How long a profile may take to be compiled; a slow machine takes a second.
const PARSER_PATIENCE: Duration = Duration::from_secs(20);

/// What the node has of AppArmor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Support {
    /// The kernel does not confine with it.
    None,
    /// It does.
    Enabled {
        /// Whether the profile of RuntimeDefault is loaded, or why not.
        default: Result<(), String>,
    },
}

/// No profile can be given to a container.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AppArmorError {
    /// A node without it.
    #[error("appArmorProfile: AppArmor is not enabled on the host")]
    NotEnabled,
    /// RuntimeDefault is not there.
    #[error("appArmorProfile: the profile {DEFAULT} of RuntimeDefault is not loaded: {0}")]
    NoDefault(String),
    /// Localhost of which the kernel knows nothing.
    #[error("appArmorProfile.localhostProfile {0:?}: no profile of that name is loaded on the node")]
    NotLoaded(String),
}

/// The nearest word on a container's profile; `None`: nobody says anything.
#[must_use]
pub fn said<'a>(pod: &'a Pod, container: &'a Container) -> Option<&'a AppArmorProfile> {
    let own = container.security_context.as_ref().and_then(|context| context.app_armor_profile.as_ref());
    own.or_else(|| pod.spec.as_ref()?.security_context.as_ref()?.app_armor_profile.as_ref())
}

/// The name of a container's profile; empty: none.
///
/// A privileged container has that of RuntimeDefault never, as in the field, and one that it names itself always. `can_set`: the pod's
/// supervisor knows profiles.
///
/// # Errors
/// When the node has not what is asked for. What nobody asks for is given where it is there, and where it can be: in a pod of an older
/// supervisor no container has had one, and must start again all the same.
pub fn profile(pod: &Pod, container: &Container, node: &Support, can_set: bool) -> Result<String, AppArmorError> {
    let said = said(pod, container);
    let kind = said.map(|said| said.r#type.as_str());
    let privileged = container.security_context.as_deref().is_some_and(is_privileged);
    match (kind, node) {
        (Some("Unconfined"), _) | (None, Support::None) => Ok(String::new()),
        (None, _) if !can_set => Ok(String::new()),
        (Some(_), Support::None) => Err(AppArmorError::NotEnabled),
        (Some("Localhost"), _) => Ok(said.map(|said| said.localhost_profile.clone()).unwrap_or_default()),
        // A word that a newer API server may know is not a reason to confine less.
        (_, _) if privileged => Ok(String::new()),
        (_, Support::Enabled { default: Ok(()) }) => Ok(DEFAULT.to_owned()),
        (None, Support::Enabled { .. }) => Ok(String::new()),
        (Some(_), Support::Enabled { default: Err(why) }) => Err(AppArmorError::NoDefault(why.clone())),
    }
}

/// Why a pod that is new cannot be on this node at all, in the kubelet's words: it asks for what the kernel does not have.
#[must_use]
pub fn refusal(pod: &Pod, node: &Support) -> Option<Refused> {
    if *node != Support::None {
        return None;
    }
    let asks = |profile: Option<&AppArmorProfile>| profile.is_some_and(|profile| profile.r#type != "Unconfined");
    let spec = pod.spec.as_ref()?;
    let of_pod = spec.security_context.as_ref().and_then(|context| context.app_armor_profile.as_ref());
    let mut of_containers = spec.all_containers().map(|container| said(pod, container));
    (asks(of_pod) || of_containers.any(asks)).then(|| Refused {
        reason: "AppArmor",
        message: "Cannot enforce AppArmor: AppArmor is not enabled on the host".to_owned(),
    })
}

impl Support {
    /// Looks at the kernel, and gives it the profile of RuntimeDefault. Takes as long as the parser: a fraction of a second.
    #[must_use]
    pub fn find() -> Self {
        let enabled = std::fs::read_to_string(ENABLED).is_ok_and(|text| text.starts_with('Y'));
        if !enabled || !Path::new(POLICY).is_dir() {
            if enabled {
                tracing::warn!("the kernel has AppArmor, but {POLICY} is not there: mount securityfs to use it");
            }
            return Self::None;
        }
        let default = load();
        if let Err(why) = &default {
            tracing::warn!(why, "containers that name no AppArmor profile run without one");
        }
        Self::Enabled { default }
    }
}

/// Whether the kernel has a profile of that name; podshim finds out where that cannot be read.
///
/// # Errors
/// [`AppArmorError::NotLoaded`].
pub fn must_be_loaded(name: &str) -> Result<(), AppArmorError> {
    match std::fs::read_to_string(Path::new(POLICY).join("profiles")) {
        Ok(list) if !is_listed(&list, name) => Err(AppArmorError::NotLoaded(name.to_owned())),
        _ => Ok(()),
    }
}

/// Lines are `NAME (MODE)`, and names may have anything in them.
fn is_listed(list: &str, name: &str) -> bool {
    list.lines().filter_map(|line| line.rsplit_once(" (")).any(|(listed, _)| listed == name)
}

/// Loads the profile, in place of an older version of it.
fn load() -> Result<(), String> {
    let program = PARSER_DIRS.iter().map(|dir| Path::new(dir).join(PARSER)).find(|path| path.is_file());
    let program = program.unwrap_or_else(|| PARSER.into());
    let named = |what: &str, error: io::Error| format!("{what} {}: {error}", program.display());
    let mut command = Command::new(&program);
    // Without its caches: they are the distribution's.
    command.args(["--replace", "--skip-cache", "--quiet"]);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => format!("{PARSER} is not installed (Debian: the package apparmor)"),
        _ => named("start", error),
    })?;
    // Less than a pipe holds: it is written at once, whatever the parser does.
    let written = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(DEFAULT_TEXT.as_bytes()));
    let deadline = Instant::now() + PARSER_PATIENCE;
    while child.try_wait().map_err(|error| named("wait for", error))?.is_none() {
        if Instant::now() > deadline {
            // An error means that it has ended.
            let _ = child.kill();
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().map_err(|error| named("wait for", error))?;
    match written {
        Ok(()) if output.status.success() => Ok(()),
        _ => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(format!("{}: {}: {}", program.display(), output.status, said.trim()))
        }
    }
}

#[cfg(test)]
mod tests {
    use minipod_proto::v1::{EphemeralContainer, PodSecurityContext, PodSpec, SecurityContext};

    use super::*;

    fn named(kind: &str) -> Option<AppArmorProfile> {
        let (kind, name) = kind.split_once(' ').unwrap_or((kind, ""));
        let profile = AppArmorProfile { r#type: kind.to_owned(), localhost_profile: name.to_owned() };
        (!kind.is_empty()).then_some(profile)
    }

    fn pod(of_pod: &str, own: &str, privileged: bool) -> Pod {
        let context = PodSecurityContext { app_armor_profile: named(of_pod), ..PodSecurityContext::default() };
        let own = SecurityContext {
            app_armor_profile: named(own),
            privileged: Some(privileged),
            ..SecurityContext::default()
        };
        let container = Container { security_context: Some(Box::new(own)), ..Container::default() };
        let spec = PodSpec { security_context: Some(context), containers: vec![container], ..PodSpec::default() };
        Pod { spec: Some(spec), ..Pod::default() }
    }

    /// The pod's word, the container's, whether it is privileged; and what comes of it on a node without AppArmor, one with it
    /// and one whose profile could not be loaded.
    #[test]
    fn the_nearest_word_and_the_node_decide() {
        let enabled = Support::Enabled { default: Ok(()) };
        let bare = Support::Enabled { default: Err("no parser".to_owned()) };
        for (of_pod, own, privileged, without, with, unloaded) in [
            ("", "", false, "", "minipod-default", ""),
            ("", "", true, "", "", ""),
            ("", "RuntimeDefault", false, "not enabled", "minipod-default", "no parser"),
            ("RuntimeDefault", "", false, "not enabled", "minipod-default", "no parser"),
            ("RuntimeDefault", "", true, "not enabled", "", ""),
            ("RuntimeDefault", "Unconfined", false, "", "", ""),
            ("Unconfined", "", false, "", "", ""),
            ("Unconfined", "Localhost a", false, "not enabled", "a", "a"),
            ("Localhost a", "", false, "not enabled", "a", "a"),
            ("Localhost a", "Localhost b", false, "not enabled", "b", "b"),
            ("Localhost a", "", true, "not enabled", "a", "a"),
            ("", "Whatever", false, "not enabled", "minipod-default", "no parser"),
        ] {
            let pod = pod(of_pod, own, privileged);
            for (node, wanted) in [(&Support::None, without), (&enabled, with), (&bare, unloaded)] {
                let what = format!("pod {of_pod:?}, container {own:?}, privileged {privileged}, {node:?}");
                let container = &pod.spec().containers[0];
                match profile(&pod, container, node, true) {
                    Ok(name) => assert_eq!(name, wanted, "{what}"),
                    Err(error) => assert!(error.to_string().contains(wanted) && !wanted.is_empty(), "{what}: {error}"),
                }
                // Of an older supervisor nothing is asked that nobody has asked for; what somebody has is not left out.
                let old = profile(&pod, container, node, false);
                let asked = said(&pod, container).is_some();
                let new = profile(&pod, container, node, true);
                assert_eq!(old, if asked { new } else { Ok(String::new()) }, "{what}, an older supervisor");
            }
        }
    }

    #[test]
    fn a_pod_is_refused_where_the_kernel_has_not_what_it_asks_for() {
        let enabled = Support::Enabled { default: Err("no parser".to_owned()) };
        for (of_pod, own, refused) in [
            ("", "", false),
            ("Unconfined", "Unconfined", false),
            ("Unconfined", "", false),
            ("", "RuntimeDefault", true),
            ("", "Localhost a", true),
            ("Unconfined", "Localhost a", true),
            // As the kubelet has it, though no container would be confined.
            ("RuntimeDefault", "Unconfined", true),
        ] {
            let pod = pod(of_pod, own, false);
            assert_eq!(refusal(&pod, &Support::None).is_some(), refused, "{of_pod:?} {own:?}");
            assert_eq!(refusal(&pod, &enabled), None);
        }
        let mut debugged = pod("", "", false);
        let context = SecurityContext { app_armor_profile: named("RuntimeDefault"), ..SecurityContext::default() };
        let debug = EphemeralContainer { security_context: Some(Box::new(context)), ..EphemeralContainer::default() };
        debugged.spec_mut().ephemeral_containers.push(debug);
        assert_eq!(refusal(&debugged, &Support::None), None, "one that is added later fails alone");
    }

    #[test]
    fn loaded_profiles_are_found_by_their_whole_name() {
        let list = "minipod-default (enforce)\n/usr/bin/man (complain)\na b (odd) (enforce)\n";
        for (name, listed) in [
            ("minipod-default", true),
            ("/usr/bin/man", true),
            ("a b (odd)", true),
            ("a b", false),
            ("minipod", false),
            ("", false),
        ] {
            assert_eq!(is_listed(list, name), listed, "{name}");
        }
        assert!(DEFAULT_TEXT.contains(&format!("profile {DEFAULT} flags")));
    }
}
