//! Boots a machine, shows its console and learns how its tests ended.

use crate::run;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

/// What the init script prints at its end, followed by the tests' exit code.
pub const VERDICT: &str = "minipod-vm: exit ";
/// What a test prints that wants the machine killed (`nodeagent/tests/power_cut.rs`).
const CUT: &str = "minipod-vm: cut the power";
/// How long after that, in turn: a pull is fetched, unpacked and flushed meanwhile.
const CUT_AFTER_MS: [u64; 3] = [400, 1_500, 4_000];
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
    /// The root file system; it is written to.
    pub disk: Disk<'a>,
    /// How long it may run.
    pub bound: Duration,
}

/// The image of a root file system.
#[derive(Clone, Copy)]
pub enum Disk<'a> {
    /// Raw; what is written stays.
    Plain(&'a Path),
    /// qcow2; what is written stays once it is flushed.
    Losing(&'a Path),
}

/// How a boot ended.
enum End {
    /// With the tests' exit code.
    Verdict(String),
    /// In the dark, as a test wanted it.
    Cut,
}

/// Ends the machine with whoever waited for it.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs the machine to the verdict of its tests; boots it again from the same disk whenever they have its power cut.
///
/// # Errors
/// When tests failed, when it ends without a verdict, or not in time.
pub fn run(machine: &Machine) -> Result<(), String> {
    for after_ms in CUT_AFTER_MS.into_iter().chain([0]) {
        match boot(machine, Duration::from_millis(after_ms))? {
            End::Verdict(code) if code == "0" => return Ok(()),
            End::Verdict(code) => return Err(format!("tests in the machine failed (exit code {code})")),
            End::Cut => println!("==> the machine was killed {after_ms} ms after it was asked for"),
        }
    }
    Err(format!("a test wants the power cut more than {} times", CUT_AFTER_MS.len()))
}

/// One boot. A machine that is to be cut goes on for a while first.
fn boot(machine: &Machine, cut_after: Duration) -> Result<End, String> {
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
    let end = follow(&lines, machine.bound);
    if matches!(end, Ok(End::Cut)) {
        // Its few lines have room in the channel meanwhile.
        std::thread::sleep(cut_after);
    }
    drop((running, lines));
    let _ = reader.join();
    end
}

/// Shows the console until the end.
fn follow(lines: &mpsc::Receiver<String>, bound: Duration) -> Result<End, String> {
    let end = Instant::now() + bound;
    let mut last = String::new();
    loop {
        match lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                if let Some((_, code)) = line.split_once(VERDICT) {
                    return Ok(End::Verdict(code.trim().to_owned()));
                }
                println!("{line}");
                if line.contains(CUT) {
                    return Ok(End::Cut);
                }
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
    // What a machine that is killed has not flushed, of what its disk had not had before, is lost with qemu's tables of the overlay: as
    // in the cache of a disk. A machine that lives to its end need not wait for flushes.
    let drive = match machine.disk {
        Disk::Plain(image) => format!("file={},if=virtio,format=raw,cache=unsafe", image.display()),
        Disk::Losing(image) => format!("file={},if=virtio,format=qcow2,cache=writeback", image.display()),
    };
    qemu.arg("-drive").arg(drive);
    // `nokaslr` and no mitigations: emulated, they cost time and protect nobody.
    qemu.args(["-append", "console=ttyS0 quiet loglevel=4 panic=-1 nokaslr mitigations=off cgroup_no_v1=all"]);
    qemu
}
