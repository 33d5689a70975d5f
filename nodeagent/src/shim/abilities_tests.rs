//! Supervisors of every age: what is asked of them, and what they are spared because they would do something else.

use std::sync::Mutex;

use minipod_podshim::protocol::{ABILITIES, IdRange, Mount, Request, Response, State, Window, put_frame, take_frame};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixListener;

use super::*;

/// A supervisor of that age that only tells its age and refuses all else; what it was asked is kept.
struct Old {
    dir: tempfile::TempDir,
    asked: Arc<Mutex<Vec<Ask>>>,
}

impl Old {
    fn begin(abilities: u32) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let listener = UnixListener::bind(dir.path().join(protocol::files::SOCKET)).expect("bind");
        let asked: Arc<Mutex<Vec<Ask>>> = Arc::default();
        let kept = asked.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(Self::serve(stream, abilities, kept.clone()));
            }
        });
        Self { dir, asked }
    }

    async fn serve(mut stream: UnixStream, abilities: u32, asked: Arc<Mutex<Vec<Ask>>>) {
        let mut bytes = Vec::new();
        while stream.read_buf(&mut bytes).await.is_ok_and(|got| got > 0) {
            while let Some(Request { id, ask }) = take_frame(&mut bytes).expect("a frame") {
                let ask = ask.expect("a request that it knows");
                let say = if matches!(ask, Ask::Subscribe(_)) {
                    Say::State(State { version: abilities, ..State::default() })
                } else {
                    asked.lock().expect("lock").push(ask);
                    Say::Refused(Refused { step: "reached".to_owned(), ..Refused::default() })
                };
                let mut frame = Vec::new();
                put_frame(&Response { id, say: Some(say) }, &mut frame).expect("short");
                stream.write_all(&frame).await.expect("answered");
            }
        }
    }
}

/// Asks for it; answers why it cannot be had.
async fn ask(shim: &Shim, what: &str) -> ShimError {
    let sandbox = SandboxSpec::default();
    let container = ContainerSpec { name: "app".to_owned(), ..ContainerSpec::default() };
    let argv = ["true".to_owned()];
    let (plain, terminal) = (ExecStreams { stdin: false, terminal: None }, Some(Window::default()));
    let mount = Mount { sub_path: "a".to_owned(), ..Mount::default() };
    let users = Some(IdRange { first: 65_536, count: 65_536 });
    let said = match what {
        "sandbox" => shim.create_sandbox(sandbox).await.err(),
        "hostUsers: false" => shim.create_sandbox(SandboxSpec { users, ..sandbox }).await.err(),
        "/dev/shm" => shim.create_sandbox(SandboxSpec { shared_memory: "mode=1777".to_owned(), ..sandbox }).await.err(),
        "container" => shim.start(container).await.err(),
        "subPath" => shim.start(ContainerSpec { mounts: vec![mount], ..container }).await.err(),
        "tty" => shim.start(ContainerSpec { terminal, ..container }).await.err(),
        "stdinOnce" => shim.start(ContainerSpec { stdin_once: true, ..container }).await.err(),
        "targetContainerName" => shim.start(ContainerSpec { pid_of: "app".to_owned(), ..container }).await.err(),
        "AppArmor" => shim.start(ContainerSpec { apparmor_profile: "a".to_owned(), ..container }).await.err(),
        "exec" => shim.exec("app", 0, &argv, plain).await.err(),
        "terminals" => shim.exec("app", 0, &argv, ExecStreams { terminal, ..plain }).await.err(),
        "attaching" => shim.attach("app", 0, plain).await.err(),
        "resizes" => shim.resize(protocol::Resize::default()).await.err(),
        "kill" => shim.kill("app", 0, 15, 0).await.err(),
        "stop" => shim.stop().await.err(),
        other => panic!("{other}"),
    };
    said.unwrap_or_else(|| panic!("{what}: it refuses everything"))
}

#[tokio::test]
async fn a_supervisor_is_asked_only_for_what_its_age_can_do() {
    // What is asked, and the first age that can do it: 0 is before ages were told.
    const SINCE: [(&str, u32); 15] = [
        ("sandbox", 0),
        ("container", 0),
        ("exec", 0),
        ("kill", 0),
        ("stop", 0),
        ("subPath", 2),
        ("terminals", 3),
        ("tty", 4),
        ("stdinOnce", 4),
        ("targetContainerName", 4),
        ("attaching", 4),
        ("resizes", 5),
        ("hostUsers: false", 6),
        ("/dev/shm", 7),
        ("AppArmor", 7),
    ];
    let newest = SINCE.iter().map(|(_, since)| *since).max();
    assert_eq!(newest, Some(ABILITIES), "a new ability needs a line here");
    for abilities in 0..=ABILITIES {
        let old = Old::begin(abilities);
        let (shim, state, _events) =
            Shim::connect(old.dir.path().join(protocol::files::SOCKET)).await.expect("it answers");
        assert_eq!(state.sandbox, SandboxState::None);
        assert_eq!(shim.knows_apparmor(), abilities >= 7);
        for (what, since) in SINCE {
            old.asked.lock().expect("lock").clear();
            let error = ask(&shim, what).await;
            let reached = old.asked.lock().expect("lock").len();
            let case = format!("{what} of one that can {abilities}: {error}");
            if abilities >= since {
                assert!(matches!(error, ShimError::Refused(_)) && reached == 1, "{case}");
            } else {
                // Named in the manifest's words, with what to do; and it never hears of it.
                let text = error.to_string();
                assert!(matches!(error, ShimError::TooOld { .. }) && reached == 0, "{case}");
                assert!(text.contains(what) && text.contains("delete the pod"), "{case}");
            }
        }
    }
}
