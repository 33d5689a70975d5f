//! Boots a machine, shows its console and learns how its tests ended.

use crate::run;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

/// What the init script prints at its end, followed by the tests' exit code.
pub const VERDICT: &str = "minipod-vm: exit ";
/// The machine's memory. Tests fill 64 MB at a time; their programs are on the disk.
const MEMORY_MB: u32 = 2048;
/// One processor for each of two threads of tests: emulation gains nothing from more than the host has.
const PROCESSORS: u32 = 2;
/// The console lines that may wait to be shown.
const LINES: usize = 1024;

/// What a machine is made of.
pub struct Machine<'a> {
    pub kernel: &'a Path,
    pub initramfs: &'a Path,
    /// Raw image of the root file system; it is written to.
    pub disk: &'a Path,
    /// How long it may run.
    pub bound: Duration,
}

/// Ends the machine with whoever waited for it.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs the machine to the verdict of its tests.
///
/// # Errors
/// When tests failed, when it ends without a verdict, or not in time.
pub fn run(machine: &Machine) -> Result<(), String> {
    run::step(&format!("boot a machine (at most {} s, {MEMORY_MB} MB)", machine.bound.as_secs()));
    let mut qemu = command(machine);
    let child = qemu.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
    let mut running = Running(child.map_err(|e| format!("start qemu-system-x86_64: {e}"))?);
    let console = running.0.stdout.take().ok_or("qemu has no console")?;
    let (sender, lines) = mpsc::sync_channel(LINES);
    let reader = std::thread::spawn(move || {
        let mut console = BufReader::new(console);
        let mut line = Vec::new();
        while console.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            line.clear();
            if sender.send(text).is_err() {
                return;
            }
        }
    });
    let verdict = follow(&lines, machine.bound);
    drop((running, lines));
    let _ = reader.join();
    match verdict?.as_str() {
        "0" => Ok(()),
        code => Err(format!("tests in the machine failed (exit code {code})")),
    }
}

/// Shows the console until the verdict.
fn follow(lines: &mpsc::Receiver<String>, bound: Duration) -> Result<String, String> {
    let end = Instant::now() + bound;
    let mut last = String::new();
    loop {
        match lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                if let Some((_, code)) = line.split_once(VERDICT) {
                    return Ok(code.trim().to_owned());
                }
                println!("{line}");
                last = line;
            }
            Err(RecvTimeoutError::Timeout) => {
                return Err(format!("the machine did not end within {} s; its last line: {last}", bound.as_secs()));
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err(format!("the machine ended without a verdict; its last line: {last}"));
            }
        }
    }
}

fn command(machine: &Machine) -> Command {
    let mut qemu = Command::new("qemu-system-x86_64");
    // Emulated everywhere: a nested KVM fails in ways that a test of ours should not depend on.
    let (accelerator, processor) = ("tcg,thread=multi", "max");
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio", "-nic", "none"]);
    qemu.args(["-accel", accelerator, "-cpu", processor]);
    qemu.args(["-smp", &PROCESSORS.to_string(), "-m", &MEMORY_MB.to_string()]);
    qemu.arg("-kernel").arg(machine.kernel).arg("-initrd").arg(machine.initramfs);
    // The host keeps what the machine wrote when only the machine dies: that is a power cut, cheaply.
    qemu.arg("-drive").arg(format!("file={},if=virtio,format=raw,cache=unsafe", machine.disk.display()));
    // `nokaslr` and no mitigations: emulated, they cost time and protect nobody.
    qemu.args(["-append", "console=ttyS0 quiet loglevel=4 panic=-1 nokaslr mitigations=off cgroup_no_v1=all"]);
    qemu
}
