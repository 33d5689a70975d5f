//! What the machine boots from: an initramfs that finds the disk, and the disk with the tests at the paths they have here.

use super::copy_into;
use crate::{images, run};
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Size of the root file system; the image is sparse.
const DISK: &str = "3G";
/// Kernel modules that the machine needs before it has its disk.
const BOOT_MODULES: [&str; 2] = ["virtio_pci", "virtio_blk"];
/// Directories of modules that the kernel loads by itself when somebody asks for a file system, link or rule.
const MODULES: [&str; 6] = ["arch", "crypto", "fs", "lib", "net", "drivers/net"];
/// Programs that the tests and the agent call.
const PROGRAMS: [&str; 4] = ["ip", "nft", "unshare", "apparmor_parser"];

/// A kernel of Debian's package.
pub struct Kernel {
    pub image: PathBuf,
    modules: PathBuf,
}

impl Kernel {
    /// The newest cloud kernel in /boot.
    ///
    /// # Errors
    /// When there is none, or not its modules.
    pub fn newest() -> Result<Self, String> {
        let entries = fs::read_dir("/boot").map_err(|e| format!("list /boot: {e}"))?;
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let versions = names.filter_map(|name| name.strip_prefix("vmlinuz-").map(str::to_owned));
        let mut versions: Vec<String> = versions.filter(|name| name.ends_with("-cloud-amd64")).collect();
        versions.sort_by_key(|version| numbers(version));
        let missing = "no kernel /boot/vmlinuz-*-cloud-amd64: install linux-image-cloud-amd64";
        let version = versions.pop().ok_or(missing)?;
        let (image, modules) =
            (Path::new("/boot").join(format!("vmlinuz-{version}")), Path::new("/lib/modules").join(&version));
        if !modules.join("modules.dep").is_file() {
            return Err(format!("{} is missing: install linux-image-cloud-amd64 again", modules.display()));
        }
        Ok(Self { image, modules })
    }

    /// The files of modules and what they depend on, in the order in which they are loaded.
    fn load_order(&self, names: &[&str]) -> Result<Vec<String>, String> {
        let path = self.modules.join("modules.dep");
        let text = fs::read_to_string(&path).map_err(|e| format!("read {}: {e}", path.display()))?;
        Ok(load_order(&text, names))
    }
}

/// Numbers in a version, so that 6.1.0-9 comes before 6.1.0-56.
fn numbers(version: &str) -> Vec<u64> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

/// `modules.dep` names for each file all that it needs, the last to be loaded first. What is not in it is built in.
fn load_order(modules_dep: &str, names: &[&str]) -> Vec<String> {
    let mut order: Vec<String> = Vec::new();
    for name in names {
        let file = format!("/{name}.ko");
        let line = modules_dep.lines().filter_map(|line| line.split_once(':')).find(|(path, _)| path.ends_with(&file));
        let Some((path, needs)) = line else { continue };
        for module in needs.split_whitespace().rev().chain([path]) {
            if !order.iter().any(|known| known == module) {
                order.push(module.to_owned());
            }
        }
    }
    order
}

/// The initramfs: busybox, the modules of the disk and the script that goes there.
///
/// # Errors
/// When something cannot be read or written.
pub fn initramfs(kernel: &Kernel, work: &Path) -> Result<PathBuf, String> {
    let order = kernel.load_order(&BOOT_MODULES)?;
    let mut archive = Archive::default();
    for dir in ["bin", "proc", "dev", "root"] {
        archive.put(dir, 0o040_755, b"");
    }
    archive.put("bin/busybox", 0o100_755, &read(&program("busybox")?)?);
    archive.put("init", 0o100_755, include_bytes!("init.sh"));
    let mut names = Vec::new();
    for (number, module) in order.iter().enumerate() {
        let name = format!("{number}.ko");
        archive.put(&name, 0o100_644, &read(&kernel.modules.join(module))?);
        names.push(name);
    }
    archive.put("modules", 0o100_644, names.join("\n").as_bytes());
    let path = work.join("initramfs");
    fs::write(&path, archive.finish()).map_err(|e| format!("write {}: {e}", path.display()))?;
    Ok(path)
}

/// A cpio archive in the form that the kernel unpacks (`newc`).
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn put(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        // inode, mode, uid, gid, links, time, size, device (2), special device (2), length of the name, checksum
        let fields = [self.entries, mode, 0, 0, 1, 0, length(content), 0, 0, 0, 0, length(name.as_bytes()) + 1, 0];
        let head: String = fields.iter().map(|field| format!("{field:08x}")).collect();
        self.bytes.extend_from_slice(b"070701");
        self.bytes.extend_from_slice(head.as_bytes());
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.put("TRAILER!!!", 0, b"");
        self.bytes
    }
}

/// No file of an initramfs comes near 4 GB; one that did would be an archive that the kernel refuses.
fn length(content: &[u8]) -> u32 {
    u32::try_from(content.len()).unwrap_or(u32::MAX)
}

/// The disk with the root file system: `files` (made small) and what they need, and the script that runs the tests.
///
/// # Errors
/// When something is missing or the disk is full.
pub fn root(kernel: &Kernel, files: &[PathBuf], script: &str, journal: bool, work: &Path) -> Result<PathBuf, String> {
    run::step("make the machine's disk");
    let root = work.join("root");
    for dir in ["bin", "sbin", "dev", "proc", "sys", "run", "tmp", "root", "etc", "var"] {
        make_dir(&root.join(dir))?;
    }
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777))
        .map_err(|e| format!("chmod /tmp: {e}"))?;
    programs(&root)?;
    for file in files {
        let place = copy_into(&root, file)?;
        run::output(Command::new("strip").arg("--strip-debug").arg(place))?;
    }
    tests_need(&root)?;
    modules(kernel, &root)?;
    write(&root.join("sbin/vm-init"), &format!("{}{script}", include_str!("vm-init.sh")))?;
    let image = work.join("disk");
    // Without a journal unless the file system has to come back from a cut: the image lives for one run.
    let features = if journal { "has_journal" } else { "^has_journal" };
    let mut make = Command::new("mke2fs");
    make.args(["-q", "-t", "ext4", "-O", features, "-d"]).arg(&root).arg(&image).arg(DISK);
    run::output(&mut make)?;
    fs::remove_dir_all(&root).map_err(|e| format!("remove {}: {e}", root.display()))?;
    Ok(image)
}

/// An image above another one that holds what is written.
///
/// # Errors
/// When it cannot be made.
pub fn overlay(image: &Path, work: &Path) -> Result<PathBuf, String> {
    let overlay = work.join("overlay");
    let mut make = Command::new("qemu-img");
    make.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).arg(image).arg(&overlay);
    run::output(&mut make).map(|_| overlay)
}

/// busybox with its applets, and the programs it has not with their libraries.
fn programs(root: &Path) -> Result<(), String> {
    let busybox = program("busybox")?;
    let place = root.join("bin/busybox");
    fs::copy(&busybox, &place).map_err(|e| format!("copy {} to {}: {e}", busybox.display(), place.display()))?;
    for applet in run::output(Command::new(&busybox).arg("--list"))?.lines() {
        if applet != "busybox" && !PROGRAMS.contains(&applet) {
            link("busybox", &root.join("bin").join(applet))?;
        }
    }
    // Where the kernel looks for it.
    link("../bin/busybox", &root.join("sbin/modprobe"))?;
    for name in PROGRAMS {
        let path = program(name)?;
        let path = fs::canonicalize(&path).map_err(|e| format!("find {}: {e}", path.display()))?;
        for library in images::shared_libraries(&path)? {
            copy_into(root, &library)?;
        }
        let place = root.join("bin").join(name);
        fs::copy(&path, &place).map_err(|e| format!("copy {} to {}: {e}", path.display(), place.display()))?;
    }
    write(&root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")?;
    write(&root.join("etc/group"), "root:x:0:\nnogroup:x:65534:\n")?;
    write(&root.join("etc/hosts"), "127.0.0.1 localhost\n")
}

/// What the tests look for at paths that were compiled into them.
fn tests_need(root: &Path) -> Result<(), String> {
    for name in ["busybox", "toolbox"] {
        copy_into(root, &images::dir().join(format!("{name}.oci.tar")))?;
    }
    for dir in ["deploy/examples", "nodeagent/testdata"] {
        copy_tree(root, &run::root().join(dir))?;
    }
    // cargo's directory for the tests' own files is beside the profile's.
    let tests = run::bin_dir().with_file_name("tmp");
    for dir in [tests, run::root().join("nodeagent/podshim")] {
        make_dir(&root.join(dir.strip_prefix("/").unwrap_or(&dir)))?;
    }
    Ok(())
}

fn modules(kernel: &Kernel, root: &Path) -> Result<(), String> {
    for dir in MODULES {
        let dir = kernel.modules.join("kernel").join(dir);
        if dir.is_dir() {
            copy_tree(root, &dir)?;
        }
    }
    for entry in fs::read_dir(&kernel.modules).map_err(|e| format!("list {}: {e}", kernel.modules.display()))?.flatten()
    {
        if entry.path().is_file() {
            copy_into(root, &entry.path())?;
        }
    }
    Ok(())
}

/// Copies a directory to the same path below `root`.
fn copy_tree(root: &Path, dir: &Path) -> Result<(), String> {
    let place = root.join(dir.strip_prefix("/").unwrap_or(dir));
    make_dir(place.parent().unwrap_or(root))?;
    run::output(Command::new("cp").arg("-a").arg(dir).arg(&place)).map(|_| ())
}

fn program(name: &str) -> Result<PathBuf, String> {
    run::find(name).ok_or_else(|| format!("{name} is missing: run `cargo xtask setup`"))
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|e| format!("read {}: {e}", path.display()))
}

/// Makes a directory and those above it.
///
/// # Errors
/// When the disk refuses.
pub fn make_dir(path: &Path) -> Result<(), String> {
    fs::create_dir_all(path).map_err(|e| format!("create {}: {e}", path.display()))
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|e| format!("write {}: {e}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).map_err(|e| format!("chmod {}: {e}", path.display()))
}

fn link(target: &str, path: &Path) -> Result<(), String> {
    symlink(target, path).map_err(|e| format!("link {}: {e}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_loaded_after_what_they_need() {
        let dep = "kernel/a/one.ko: kernel/b/two.ko kernel/c/three.ko\nkernel/b/two.ko: kernel/c/three.ko\nkernel/c/three.ko:\n";
        assert_eq!(load_order(dep, &["one"]), ["kernel/c/three.ko", "kernel/b/two.ko", "kernel/a/one.ko"]);
        assert_eq!(load_order(dep, &["two", "one", "built-in"]).len(), 3);
        assert!(load_order(dep, &["wo"]).is_empty());
    }

    #[test]
    fn versions_are_ordered_by_their_numbers() {
        assert!(numbers("6.1.0-9-cloud-amd64") < numbers("6.1.0-56-cloud-amd64"));
    }

    #[test]
    fn an_archive_is_padded_to_words() {
        let mut archive = Archive::default();
        archive.put("a", 0o100_644, b"12345");
        let bytes = archive.finish();
        assert_eq!(&bytes[..6], b"070701");
        // Head and name are 112 bytes, content 8, trailer 110 + 11, padded.
        assert_eq!(bytes.len(), 112 + 8 + 124);
        assert_eq!(&bytes[112..117], b"12345");
    }
}
