//! The real binary on a real terminal: raw while a program runs, given back afterwards, whatever ends it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use minipod_client::fake::Fake;
use minipod_proto::Resource;
use minipod_proto::v1::{Container, Pod};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr};

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(20);

/// A terminal with minictl on it. Dropping it kills minictl.
struct Stage {
    keyboard: File,
    /// Kept open, so that the terminal's modes can still be read after minictl.
    terminal: File,
    minictl: Child,
}

impl Stage {
    fn with(server: &str, arguments: &[&str]) -> Self {
        let keyboard = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
        grantpt(&keyboard).expect("granted");
        unlockpt(&keyboard).expect("unlocked");
        let name = ptsname(&keyboard, Vec::new()).expect("it has a name");
        let path = std::path::Path::new(std::ffi::OsStr::from_bytes(name.to_bytes()));
        let terminal = File::options().read(true).write(true).open(path).expect("the terminal opens");
        let side = || Stdio::from(terminal.try_clone().expect("a descriptor"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_minictl"));
        command.args(arguments).env_clear().env("MINIPOD_SERVER", server);
        let minictl = command.stdin(side()).stdout(side()).stderr(side()).spawn().expect("minictl starts");
        Self { keyboard: keyboard.into(), terminal, minictl }
    }

    fn modes(&self) -> Termios {
        tcgetattr(&self.terminal).expect("modes")
    }

    fn is_raw(&self) -> bool {
        !self.modes().local_modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }

    async fn until_raw(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.is_raw() {
            assert!(self.minictl.try_wait().expect("wait").is_none(), "minictl ended: {}", self.shown());
            assert!(Instant::now() < deadline, "the terminal never became raw");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn exit_code(&mut self) -> Option<i32> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.minictl.try_wait().expect("wait") {
                return status.code();
            }
            assert!(Instant::now() < deadline, "minictl did not end");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn shown(&mut self) -> String {
        let mut buffer = vec![0; 65536];
        let length = self.keyboard.read(&mut buffer).unwrap_or(0);
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = self.minictl.kill();
        let _ = self.minictl.wait();
    }
}

async fn fake() -> Fake {
    let fake = Fake::start().await.expect("fake API server");
    let mut pod = Pod::default();
    pod.meta_mut().name = "web".into();
    pod.meta_mut().namespace = "default".into();
    pod.spec_mut().containers = vec![Container { name: "app".into(), image: "busybox".into(), ..Container::default() }];
    fake.put(pod);
    fake
}

#[tokio::test(flavor = "multi_thread")]
async fn the_terminal_is_given_back_after_the_program() {
    let fake = fake().await;
    let mut stage = Stage::with(&fake.url(), &["exec", "-it", "web", "--", "exit", "7"]);
    let before = format!("{:?}", stage.modes().local_modes);
    assert_eq!(stage.exit_code().await, Some(7), "the program's exit code");
    assert_eq!(format!("{:?}", stage.modes().local_modes), before);
    let mut stage = Stage::with(&fake.url(), &["exec", "-it", "web", "--", "nope"]);
    assert_ne!(stage.exit_code().await, Some(0));
    assert_eq!(format!("{:?}", stage.modes().local_modes), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_terminal_is_given_back_after_a_signal() {
    let fake = fake().await;
    for (signal, code) in [("TERM", 143), ("HUP", 129), ("INT", 130), ("QUIT", 131)] {
        let mut stage = Stage::with(&fake.url(), &["exec", "-it", "web", "--", "cat"]);
        stage.until_raw().await;
        // Every key passes: this one would be a signal on a terminal that is not raw.
        stage.keyboard.write_all(b"\x03hello").expect("typed");
        let deadline = Instant::now() + PATIENCE;
        let mut shown = String::new();
        while !shown.contains("hello") {
            assert!(Instant::now() < deadline, "{shown:?}");
            shown.push_str(&stage.shown());
        }
        let pid = stage.minictl.id().to_string();
        assert!(Command::new("kill").args(["-s", signal, &pid]).status().expect("kill").success());
        assert_eq!(stage.exit_code().await, Some(code), "{signal}");
        assert!(!stage.is_raw(), "{signal} left the terminal raw");
    }
}
