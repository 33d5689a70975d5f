//! `exec` and `attach`, and which container is meant where none is named.

use std::io::{IsTerminal, Read, Write};

use bytes::Bytes;
use minipod_client::{Exec, ExecOutput, ExecStdin, ExecTerminal};
use minipod_proto::Resource;
use minipod_proto::v1::{AttachStart, ExecStart, Pod};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::args::{AttachArgs, ExecArgs};
use super::error::CliError;
use super::session::Session;
use super::terminal::{self, Ends, Raw};
use super::{print_bytes, target};
use crate::view::text;

/// Bytes of one read of standard input.
const PIECE: usize = 32 << 10;
/// Pieces between the thread that reads standard input and the connection: one is sent while the next is read.
const PIECES: usize = 2;
/// Which container is meant where none is named.
const DEFAULT_CONTAINER: &str = "kubectl.kubernetes.io/default-container";

/// Runs a command in a container. Its output passes as it is: whoever runs a program on a terminal wants what it draws.
pub async fn exec(session: &Session, options: &ExecArgs) -> Result<(), CliError> {
    let name = target::pod_name(&options.pod)?;
    let tty = options.tty && options.stdin && std::io::stdin().is_terminal();
    if options.tty && !tty {
        note!("no terminal for the command: that needs -i, and standard input to be one");
    }
    let start = ExecStart {
        namespace: session.namespace.clone(),
        pod: name.to_owned(),
        container: container(session, &session.namespace, name, &options.container).await?,
        command: options.command.clone(),
        stdin: options.stdin,
        tty,
        size: tty.then(terminal::size),
    };
    carry(session.client.exec(start).await?).await
}

/// Takes part in the streams of a container's own process.
pub async fn attach(session: &Session, options: &AttachArgs) -> Result<(), CliError> {
    let name = target::pod_name(&options.pod)?;
    let pod: Pod = session.client.get(&session.namespace, name).await?;
    let container = match options.container.as_str() {
        "" => say_choice(&pod),
        named => named.to_owned(),
    };
    attach_to(session, &pod, &container, (options.stdin, options.tty)).await
}

/// The same to a container of a pod that was just read.
pub async fn attach_to(
    session: &Session,
    pod: &Pod,
    container: &str,
    (stdin, tty): (bool, bool),
) -> Result<(), CliError> {
    let streams = streams_of(pod, container);
    let wants_input = stdin && streams.stdin;
    if stdin && !streams.stdin {
        note!("container {:?} takes no input: its manifest has no stdin: true", text::line(container));
    }
    if tty && !streams.tty {
        note!("container {:?} has no terminal: its manifest has no tty: true", text::line(container));
    }
    // What is typed on a raw terminal belongs to the container: without -i there is nothing to make raw.
    let raw = streams.tty && wants_input && std::io::stdin().is_terminal();
    let start = AttachStart {
        namespace: session.namespace.clone(),
        pod: pod.meta().name.clone(),
        container: container.to_owned(),
        stdin: wants_input,
        size: raw.then(terminal::size),
    };
    let attached = session.client.attach(start, raw).await?;
    if raw {
        note!("Attached. If there is no prompt, press enter.");
    }
    carry(attached).await
}

/// What a container's manifest says of its streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Streams {
    stdin: bool,
    tty: bool,
}

fn streams_of(pod: &Pod, container: &str) -> Streams {
    let spec = pod.spec();
    let debug = spec.ephemeral_containers.iter().find(|known| known.name == container);
    let of_debug = debug.map(|known| Streams { stdin: known.stdin, tty: known.tty });
    let own = spec.container(container).map(|known| Streams { stdin: known.stdin, tty: known.tty });
    own.or(of_debug).unwrap_or_default()
}

/// Passes a process' streams on until it ends; its exit code becomes ours.
async fn carry(mut exec: Exec) -> Result<(), CliError> {
    // From here on every way out of this function gives the terminal back as it was.
    let (_raw, mut ends) = match exec.take_terminal() {
        Some(remote) => {
            tokio::spawn(follow_size(remote));
            (Some(Raw::begin()?), Some(Ends::listen()?))
        }
        None => (None, None),
    };
    if let Some(stdin) = exec.take_stdin() {
        pass_stdin(stdin);
    }
    loop {
        // Both arms are cancel safe.
        let output = tokio::select! {
            output = exec.next() => output?,
            code = ended(ends.as_mut()) => return Err(CliError::Exit(code)),
        };
        match output {
            ExecOutput::Stdout(data) => print_bytes(&data)?,
            ExecOutput::Stderr(data) => {
                let mut err = std::io::stderr().lock();
                // Nobody could be told that standard error does not work.
                let _ = err.write_all(&data).and_then(|()| err.flush());
            }
            ExecOutput::Exit(0) => return Ok(()),
            ExecOutput::Exit(code) => return Err(CliError::Exit(code)),
        }
    }
}

/// The exit code for a signal that asks minictl to end, where it listens to them.
async fn ended(ends: Option<&mut Ends>) -> i32 {
    match ends {
        Some(ends) => ends.next().await,
        None => std::future::pending().await,
    }
}

/// Tells the process' terminal each new size of this one.
async fn follow_size(remote: ExecTerminal) {
    let Ok(mut changes) = signal(SignalKind::window_change()) else { return };
    while changes.recv().await.is_some() && remote.resize(terminal::size()).await {}
}

/// A thread reads, because a read of a terminal cannot be called off; the end of the process ends it.
fn pass_stdin(stdin: ExecStdin) {
    let (sender, mut receiver) = mpsc::channel::<Bytes>(PIECES);
    std::thread::spawn(move || {
        let mut buffer = vec![0; PIECE];
        loop {
            match std::io::stdin().lock().read(&mut buffer) {
                Ok(length) if length > 0 => {
                    let piece = Bytes::copy_from_slice(buffer.get(..length).unwrap_or_default());
                    if sender.blocking_send(piece).is_err() {
                        return;
                    }
                }
                // The end, or nothing more can be read: the process sees the end of its input.
                _ => return,
            }
        }
    });
    tokio::spawn(async move {
        while let Some(piece) = receiver.recv().await {
            if !stdin.write(piece).await {
                return;
            }
        }
        stdin.close().await;
    });
}

/// The container that is meant, and says so when there was a choice.
pub async fn container(session: &Session, namespace: &str, pod: &str, named: &str) -> Result<String, CliError> {
    if !named.is_empty() {
        return Ok(named.to_owned());
    }
    Ok(say_choice(&session.client.get(namespace, pod).await?))
}

fn say_choice(pod: &Pod) -> String {
    let chosen = choose(pod);
    let spec = pod.spec();
    if spec.all_containers().count() > 1 && std::io::stderr().is_terminal() {
        let inits = spec.init_containers.iter().map(|container| format!("{} (init)", container.name));
        let all: Vec<String> = spec.containers.iter().map(|container| container.name.clone()).chain(inits).collect();
        note!("container {:?} of: {}", text::line(&chosen), text::line(&all.join(", ")));
    }
    chosen
}

/// The container that a command on this pod is about when none is named.
pub fn choose(pod: &Pod) -> String {
    let annotated = pod.meta().annotations.get(DEFAULT_CONTAINER).filter(|name| pod.spec().container(name).is_some());
    let first = pod.spec().containers.first().map(|container| &container.name);
    annotated.or(first).cloned().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use minipod_proto::v1::{Container, EphemeralContainer};

    use super::*;

    #[test]
    fn streams_are_those_of_the_manifest() {
        let mut pod = Pod::default();
        pod.spec_mut().containers = vec![Container { name: "a".into(), stdin: true, ..Container::default() }];
        let debug = EphemeralContainer { name: "d".into(), tty: true, ..EphemeralContainer::default() };
        pod.spec_mut().ephemeral_containers = vec![debug];
        assert_eq!(streams_of(&pod, "a"), Streams { stdin: true, tty: false });
        assert_eq!(streams_of(&pod, "d"), Streams { stdin: false, tty: true });
        assert_eq!(streams_of(&pod, "x"), Streams::default());
    }

    #[test]
    fn the_container_that_is_meant() {
        let mut pod = Pod::default();
        assert_eq!(choose(&pod), "");
        let container = |name: &str| Container { name: name.into(), ..Container::default() };
        pod.spec_mut().containers = vec![container("a"), container("b")];
        assert_eq!(choose(&pod), "a");
        pod.meta_mut().annotations.insert(DEFAULT_CONTAINER.into(), "b".into());
        assert_eq!(choose(&pod), "b");
        pod.meta_mut().annotations.insert(DEFAULT_CONTAINER.into(), "gone".into());
        assert_eq!(choose(&pod), "a");
    }
}
