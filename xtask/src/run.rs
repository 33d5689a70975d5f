//! Running other programs, and where things are.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The root of the checkout.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// `target/`, or where `CARGO_TARGET_DIR` puts it.
pub fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => root().join(dir),
        None => root().join("target"),
    }
}

/// Where cargo puts the debug binaries: xtask is one of them.
pub fn bin_dir() -> PathBuf {
    match std::env::current_exe() {
        Ok(exe) => exe.parent().map(Path::to_path_buf).unwrap_or_default(),
        Err(_) => target().join("debug"),
    }
}

/// Where cargo puts the release binaries.
pub fn release_dir() -> PathBuf {
    bin_dir().with_file_name("release")
}

/// Announces a step on standard error.
pub fn step(text: &str) {
    eprintln!("==> {text}");
}

/// The full path of a program, also when `sbin` is not in PATH.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    let dirs = path.split(':').chain(["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"]);
    dirs.map(|dir| Path::new(dir).join(program)).find(|file| file.is_file())
}

/// Runs a command to its end with our terminal.
///
/// # Errors
/// When it cannot be started or ends with anything but 0.
pub fn command(command: &mut Command) -> Result<(), String> {
    let status = command.status().map_err(|e| format!("start {}: {e}", shown(command)))?;
    if status.success() { Ok(()) } else { Err(format!("{} failed: {status}", shown(command))) }
}

/// Runs a command and returns what it printed.
///
/// # Errors
/// When it cannot be started or ends with anything but 0; what it printed is in the error.
pub fn output(command: &mut Command) -> Result<String, String> {
    let out = command.stdin(Stdio::null()).output().map_err(|e| format!("start {}: {e}", shown(command)))?;
    let stdout = String::from_utf8_lossy(&out.stdout).into_owned();
    if out.status.success() {
        return Ok(stdout);
    }
    let stderr = String::from_utf8_lossy(&out.stderr);
    Err(format!("{} failed: {}\n{stdout}{stderr}", shown(command), out.status))
}

/// Runs the cargo that runs us, in the root of the checkout.
///
/// # Errors
/// As [`command`].
pub fn cargo(args: &[&str]) -> Result<(), String> {
    cargo_with(args, &[])
}

/// As [`cargo`], with more environment.
///
/// # Errors
/// As [`command`].
pub fn cargo_with(args: &[&str], environment: &[(&str, &str)]) -> Result<(), String> {
    command(cargo_command().args(args).envs(environment.iter().copied()))
}

/// The cargo that runs us, in the root of the checkout, as if the user had called it.
///
/// Without what cargo tells xtask of its package: build scripts that look at it (ring's) would run again, and everything above
/// them be built again, whenever `cargo xtask` and `cargo build` alternate.
pub fn cargo_command() -> Command {
    let mut cargo = Command::new(std::env::var("CARGO").unwrap_or_else(|_| "cargo".into()));
    let of_package = |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(of_package) {
            cargo.env_remove(name);
        }
    }
    cargo.current_dir(root());
    cargo
}

fn shown(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|a| a.to_string_lossy().into_owned()));
    words.join(" ")
}
