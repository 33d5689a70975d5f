//! Builds OCI images from Debian's packages with `tar` and `sha256sum`: there is no registry to pull from in a test.
//!
//! - `minipod.local/busybox`: Debian's static busybox with its applets.
//! - `minipod.local/toolbox`: a second layer on it with OpenBSD's nc (unix sockets) and the libraries that it needs.
//! - `minipod.local/tomcat` and `minipod.local/sample`, for one example: see [`tomcat`].
//!
//! The archives are OCI layouts, byte for byte the same for the same packages.

mod tomcat;

use crate::{run, setup};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where the archives are.
pub fn dir() -> PathBuf {
    run::target().join("images")
}

/// Builds every image that is not there yet.
///
/// # Errors
/// When a program or a package is missing or the disk refuses.
pub fn build_all() -> Result<(), String> {
    build_base()?;
    setup::install(setup::TOMCAT)?;
    tomcat::build()
}

/// Builds the two images that all examples but one need, unless the archives are newer than the programs that go into them.
///
/// # Errors
/// When a program is missing or the disk refuses.
pub fn build_base() -> Result<(), String> {
    let busybox = program("busybox")?;
    let nc = program("nc.openbsd")?;
    let archives = [dir().join("busybox.oci.tar"), dir().join("toolbox.oci.tar")];
    let this = std::env::current_exe().map_err(|e| format!("find xtask: {e}"))?;
    if archives.iter().all(|a| newer(a, &[&busybox, &nc, &this])) {
        return Ok(());
    }
    run::step("build the images minipod.local/busybox and minipod.local/toolbox");
    let work = dir().join(format!("work-{}", std::process::id()));
    let built = build_in(&work, &busybox, &nc, &archives);
    let cleaned = fs::remove_dir_all(&work).map_err(|e| format!("remove {}: {e}", work.display()));
    built.and(cleaned)
}

fn build_in(work: &Path, busybox: &Path, nc: &Path, archives: &[PathBuf; 2]) -> Result<(), String> {
    let base = work.join("busybox");
    busybox_rootfs(&base, busybox)?;
    let tools = work.join("toolbox");
    toolbox_rootfs(&tools, nc)?;
    let base = Layer::pack(&base, &work.join("busybox.tar"))?;
    let tools = Layer::pack(&tools, &work.join("toolbox.tar"))?;
    archive("minipod.local/busybox:latest", &[&base], SHELL, &work.join("busybox-layout"), &archives[0])?;
    archive("minipod.local/toolbox:latest", &[&base, &tools], SHELL, &work.join("toolbox-layout"), &archives[1])
}

/// What an image runs that says nothing else.
const SHELL: &str = r#""Cmd":["sh"]"#;

fn busybox_rootfs(root: &Path, busybox: &Path) -> Result<(), String> {
    for dir in ["bin", "dev", "etc", "proc", "root", "run", "sys", "tmp", "usr", "var"] {
        make_dir(&root.join(dir))?;
    }
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777))
        .map_err(|e| format!("chmod /tmp: {e}"))?;
    copy(busybox, &root.join("bin/busybox"))?;
    for applet in run::output(Command::new(busybox).arg("--list"))?.lines().filter(|a| *a != "busybox") {
        link("busybox", &root.join("bin").join(applet))?;
    }
    for (place, target) in [("sbin", "bin"), ("usr/bin", "../bin"), ("usr/sbin", "../bin")] {
        link(target, &root.join(place))?;
    }
    write(&root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")?;
    write(&root.join("etc/group"), "root:x:0:\nnogroup:x:65534:\n")?;
    write(&root.join("etc/nsswitch.conf"), "hosts: files dns\n")
}

fn toolbox_rootfs(root: &Path, nc: &Path) -> Result<(), String> {
    copy(nc, &root.join("bin/nc"))?;
    let libraries = shared_libraries(nc)?;
    for library in &libraries {
        let place = library.strip_prefix("/").unwrap_or(library);
        copy(library, &root.join(place))?;
    }
    Ok(())
}

/// The shared libraries that `ldd` names, the loader among them.
///
/// # Errors
/// When `ldd` fails.
pub fn shared_libraries(program: &Path) -> Result<Vec<PathBuf>, String> {
    let ldd = run::output(Command::new("ldd").arg(program))?;
    Ok(ldd.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect())
}

struct Layer {
    tar: PathBuf,
    digest: String,
    size: u64,
}

impl Layer {
    fn pack(root: &Path, tar: &Path) -> Result<Layer, String> {
        let mut pack = Command::new("tar");
        pack.args([
            "--create",
            "--sort=name",
            "--owner=0",
            "--group=0",
            "--numeric-owner",
            "--mtime=@0",
            "--format=pax",
        ]);
        // Without these, pax headers would carry this run's times.
        pack.arg("--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime");
        run::output(pack.arg("--file").arg(tar).arg("--directory").arg(root).arg("."))?;
        let digest = sha256(tar)?;
        let size = fs::metadata(tar).map_err(|e| format!("stat {}: {e}", tar.display()))?.len();
        Ok(Layer { tar: tar.to_path_buf(), digest, size })
    }
}

/// Writes an image's archive; `process` are the fields of its config, beside the environment, that say what it runs.
fn archive(name: &str, layers: &[&Layer], process: &str, layout: &Path, to: &Path) -> Result<(), String> {
    let blobs = layout.join("blobs/sha256");
    make_dir(&blobs)?;
    for layer in layers {
        copy(&layer.tar, &blobs.join(&layer.digest))?;
    }
    let diff_ids: Vec<String> = layers.iter().map(|l| format!("\"sha256:{}\"", l.digest)).collect();
    let config = format!(
        r#"{{"architecture":"{}","os":"linux","config":{{"Env":["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],{process}}},"rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#,
        oci_arch(),
        diff_ids.join(",")
    );
    let (config_digest, config_size) = blob(&blobs, layout, &config)?;
    let descriptors: Vec<String> =
        layers.iter().map(|l| descriptor("application/vnd.oci.image.layer.v1.tar", &l.digest, l.size, "")).collect();
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{},"layers":[{}]}}"#,
        descriptor("application/vnd.oci.image.config.v1+json", &config_digest, config_size, ""),
        descriptors.join(",")
    );
    let (digest, size) = blob(&blobs, layout, &manifest)?;
    let named = format!(
        r#","annotations":{{"org.opencontainers.image.ref.name":"{name}","io.containerd.image.name":"{name}"}}"#
    );
    let entry = descriptor("application/vnd.oci.image.manifest.v1+json", &digest, size, &named);
    let index =
        format!(r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{entry}]}}"#);
    write(&layout.join("index.json"), &index)?;
    write(&layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    let packed = Layer::pack(layout, &layout.with_extension("tar"))?;
    fs::rename(&packed.tar, to).map_err(|e| format!("move {} to {}: {e}", packed.tar.display(), to.display()))
}

fn descriptor(media_type: &str, digest: &str, size: u64, more: &str) -> String {
    format!(r#"{{"mediaType":"{media_type}","digest":"sha256:{digest}","size":{size}{more}}}"#)
}

/// Writes a JSON blob under its digest.
fn blob(blobs: &Path, layout: &Path, text: &str) -> Result<(String, u64), String> {
    let draft = layout.join("draft");
    write(&draft, text)?;
    let digest = sha256(&draft)?;
    fs::rename(&draft, blobs.join(&digest)).map_err(|e| format!("move blob {digest}: {e}"))?;
    Ok((digest, text.len() as u64))
}

fn sha256(file: &Path) -> Result<String, String> {
    let line = run::output(Command::new("sha256sum").arg("--binary").arg(file))?;
    line.split_whitespace()
        .next()
        .map(str::to_owned)
        .ok_or_else(|| format!("sha256sum of {} said nothing", file.display()))
}

/// The architecture in the names of OCI.
fn oci_arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn program(name: &str) -> Result<PathBuf, String> {
    run::find(name).ok_or_else(|| format!("{name} is not installed: run `cargo xtask setup`"))
}

fn newer(file: &Path, than: &[&Path]) -> bool {
    let modified = |p: &Path| fs::metadata(p).and_then(|m| m.modified()).ok();
    let Some(time) = modified(file) else { return false };
    than.iter().all(|p| modified(p).is_some_and(|t| t <= time))
}

/// Copies a file with its mode, and makes the directory it goes to.
///
/// # Errors
/// When the file system refuses.
pub fn copy(from: &Path, to: &Path) -> Result<(), String> {
    make_dir(to.parent().unwrap_or(Path::new("/")))?;
    fs::copy(from, to).map(|_| ()).map_err(|e| format!("copy {} to {}: {e}", from.display(), to.display()))
}

/// Makes a directory and those above it.
///
/// # Errors
/// When the file system refuses.
pub fn make_dir(dir: &Path) -> Result<(), String> {
    fs::create_dir_all(dir).map_err(|e| format!("make directory {}: {e}", dir.display()))
}

fn write(file: &Path, text: &str) -> Result<(), String> {
    fs::write(file, text).map_err(|e| format!("write {}: {e}", file.display()))
}

fn link(target: &str, place: &Path) -> Result<(), String> {
    symlink(target, place).map_err(|e| format!("link {}: {e}", place.display()))
}
