//! `debug`: a container of the user's choice beside those of a running pod.

use std::hash::{BuildHasher as _, RandomState};
use std::time::Duration;

use minipod_client::ClientError;
use minipod_proto::Resource as _;
use minipod_proto::v1::{Capabilities, ContainerStatus, EnvVar, EphemeralContainer, Pod, SecurityContext};
use tokio::time::{Instant, sleep};

use super::access;
use super::args::{DebugArgs, Profile};
use super::error::CliError;
use super::session::Session;
use super::target;
use crate::view::text;

/// Between two looks at a container that is to start.
const PAUSE: Duration = Duration::from_millis(100);
/// How long an end that has happened may take to be told by the node.
const END_PATIENCE: Duration = Duration::from_secs(5);
/// How often it is tried again when others write to the pod at the same time.
const TRIES: usize = 10;
/// Letters of generated names: no vowels, so that no words come out.
const LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
/// An id that no image gives to anybody.
const NOBODY: i64 = 65_534;

/// Adds the container, waits until it runs, and attaches to it.
pub async fn debug(session: &Session, options: &DebugArgs) -> Result<(), CliError> {
    let name = target::pod_name(&options.pod)?;
    let debug = container(options)?;
    let pod = add(session, name, &debug).await?;
    note!("debug container {:?} added to pod {}", text::line(&debug.name), text::line(&pod.meta().name));
    if !options.attach.unwrap_or(options.stdin) {
        return Ok(());
    }
    let pod = wait(session, name, &debug.name).await?;
    let outcome = access::attach_to(session, &pod, &debug.name, (options.stdin, options.tty)).await;
    if !matches!(outcome, Err(CliError::Client(_))) {
        return outcome;
    }
    // It may have been so quick that there was nothing to attach to any more: its node is about to say what came of it.
    let deadline = Instant::now() + END_PATIENCE;
    loop {
        let pod: Pod = session.client.get(&session.namespace, name).await?;
        match ended(&pod, &debug.name) {
            Some(code) => {
                note!("it ended before it could be attached to; its output: minictl logs {name} -c {}", debug.name);
                return if code == 0 { Ok(()) } else { Err(CliError::Exit(code)) };
            }
            None if Instant::now() >= deadline => return outcome,
            None => sleep(PAUSE).await,
        }
    }
}

async fn add(session: &Session, name: &str, debug: &EphemeralContainer) -> Result<Pod, CliError> {
    let mut tries = 0;
    loop {
        let mut pod: Pod = session.client.get(&session.namespace, name).await?;
        pod.spec_mut().ephemeral_containers.push(debug.clone());
        tries += 1;
        match session.client.update_ephemeral_containers(pod).await {
            // Its status, mostly.
            Err(ClientError::Conflict { .. }) if tries < TRIES => {}
            done => return Ok(done?),
        }
    }
}

fn container(options: &DebugArgs) -> Result<EphemeralContainer, CliError> {
    let variable = |pair: &String| {
        let (name, value) = pair
            .split_once('=')
            .filter(|(name, _)| !name.is_empty())
            .ok_or_else(|| CliError::usage(format!("--env {pair:?} has no NAME=VALUE"), "such as --env LEVEL=debug"))?;
        Ok::<_, CliError>(EnvVar { name: name.to_owned(), value: value.to_owned(), ..EnvVar::default() })
    };
    let security = match options.profile {
        Profile::General => SecurityContext {
            capabilities: Some(Capabilities { add: vec!["SYS_PTRACE".to_owned()], ..Capabilities::default() }),
            ..SecurityContext::default()
        },
        Profile::Sysadmin => SecurityContext { privileged: Some(true), ..SecurityContext::default() },
        Profile::Restricted => SecurityContext {
            capabilities: Some(Capabilities { drop: vec!["ALL".to_owned()], ..Capabilities::default() }),
            run_as_non_root: Some(true),
            run_as_user: Some(NOBODY),
            allow_privilege_escalation: Some(false),
            ..SecurityContext::default()
        },
    };
    Ok(EphemeralContainer {
        name: if options.container.is_empty() { generated_name() } else { options.container.clone() },
        image: options.image.clone(),
        image_pull_policy: options.image_pull_policy.clone(),
        command: options.command.clone(),
        env: options.env.iter().map(variable).collect::<Result<_, _>>()?,
        stdin: options.stdin,
        tty: options.tty,
        target_container_name: options.target.clone(),
        security_context: Some(Box::new(security)),
        ..EphemeralContainer::default()
    })
}

/// Every hasher of std begins with other random keys.
fn generated_name() -> String {
    let mut random = RandomState::new().hash_one(());
    let mut name = "debugger-".to_owned();
    for _ in 0..5 {
        let length = LETTERS.len() as u64;
        // Less than the number of letters.
        name.push(LETTERS.get((random % length) as usize).copied().map_or('x', char::from));
        random /= length;
    }
    name
}

/// Waits until the container runs or has ended; says what it waits for.
async fn wait(session: &Session, pod: &str, container: &str) -> Result<Pod, CliError> {
    let mut told = String::new();
    loop {
        let now: Pod = session.client.get(&session.namespace, pod).await?;
        let status = status(&now, container);
        let state = status.and_then(|status| status.state.as_ref());
        if state.is_some_and(|state| state.running.is_some() || state.terminated.is_some()) {
            return Ok(now);
        }
        if now.is_terminal() || now.meta().deletion_timestamp.is_some() {
            let ended = format!("pod {pod:?} ends before the debug container starts");
            return Err(CliError::usage(ended, "see what it says: minictl describe pod NAME"));
        }
        if let Some(waiting) = state.and_then(|state| state.waiting.as_ref()) {
            let why = format!("{} {}", waiting.reason, waiting.message);
            if why != told && !waiting.message.is_empty() {
                note!("waiting: {}", text::line(&why));
                told = why;
            }
        }
        sleep(PAUSE).await;
    }
}

fn status<'a>(pod: &'a Pod, container: &str) -> Option<&'a ContainerStatus> {
    pod.status().ephemeral_container_statuses.iter().find(|status| status.name == container)
}

fn ended(pod: &Pod, container: &str) -> Option<i32> {
    Some(status(pod, container)?.state.as_ref()?.terminated.as_ref()?.exit_code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_labels_and_differ() {
        let names: std::collections::HashSet<String> = (0..50).map(|_| generated_name()).collect();
        assert!(names.len() > 45 && names.iter().all(|name| name.len() == 14), "{names:?}");
    }

    #[test]
    fn a_profile_is_a_security_context() {
        let made = |profile| {
            let options = DebugArgs {
                pod: "p".into(),
                image: "i".into(),
                image_pull_policy: "Never".into(),
                container: "c".into(),
                target: "t".into(),
                stdin: true,
                tty: false,
                attach: None,
                env: vec!["A=b=c".into()],
                profile,
                command: vec!["sh".into()],
            };
            container(&options).expect("made")
        };
        let general = made(Profile::General);
        assert_eq!((general.target_container_name.as_str(), general.stdin, general.tty), ("t", true, false));
        assert_eq!((general.env[0].name.as_str(), general.env[0].value.as_str()), ("A", "b=c"));
        let context = |profile| made(profile).security_context.expect("a context");
        assert_eq!(context(Profile::General).capabilities.expect("some").add, ["SYS_PTRACE"]);
        assert_eq!(context(Profile::Sysadmin).privileged, Some(true));
        let restricted = context(Profile::Restricted);
        assert_eq!((restricted.run_as_user, restricted.run_as_non_root), (Some(NOBODY), Some(true)));
    }
}
