//! Installs what is missing, by the names of Debian's packages. Asks apt for nothing when all is there.

use crate::run;
use std::path::Path;
use std::process::Command;

/// A package and how to see that it is there: a program's name, or a file's full path, in whose name one `*` stands for any text.
pub struct Need {
    package: &'static str,
    proof: &'static str,
    why: &'static str,
}

const fn need(package: &'static str, proof: &'static str, why: &'static str) -> Need {
    Need { package, proof, why }
}

/// Needed to build, test and demonstrate.
pub const BASE: &[Need] = &[
    need("protobuf-compiler", "protoc", "compiles proto/"),
    need("libprotobuf-dev", "/usr/include/google/protobuf/descriptor.proto", "the well-known .proto files"),
    need("etcd-server", "etcd", "the store"),
    need("etcd-client", "etcdctl", "the tests of the store's protocol"),
    need("busybox-static", "busybox", "the image minipod.local/busybox"),
    need("netcat-openbsd", "nc.openbsd", "unix sockets in the image minipod.local/toolbox"),
    need("iproute2", "ip", "a network namespace per node"),
    need("docker-registry", "docker-registry", "the registry of the pull tests"),
    need("skopeo", "skopeo", "fills it"),
    need("nftables", "nft", "the nodes' packet rules"),
];

/// Needed to make the images of the example tomcat-war.
pub const TOMCAT: &[Need] =
    &[need("zip", "zip", "packs the example's war"), need("dpkg", "dpkg-deb", "unpacks the packages of Tomcat")];

/// What is in the image `minipod.local/tomcat`, beside a Java runtime: fetched and unpacked there, never installed here.
pub const TOMCAT_CONTENT: &[&str] = &["tomcat10", "tomcat10-common", "libtomcat10-java"];

/// Depends on this Debian's own Java runtime.
const JAVA: &str = "default-jre-headless";

/// Needed to compare with podman.
pub const PODMAN: &[Need] = &[
    need("podman", "podman", "the benchmarks compare with it"),
    need("runc", "runc", "the runtime that podman uses here"),
    need("conmon", "conmon", "podman's monitor of a container"),
    need("catatonit", "/usr/bin/catatonit", "podman's pause"),
    need("containernetworking-plugins", "/usr/lib/cni/bridge", "podman's network"),
];

/// Needed for the node's tests in a machine of their own.
pub const MACHINE: &[Need] = &[
    need("qemu-system-x86", "qemu-system-x86_64", "the machine"),
    need("qemu-utils", "qemu-img", "a disk that loses what was not flushed"),
    need("linux-image-cloud-amd64", "/boot/vmlinuz-*-cloud-amd64", "its kernel"),
    need("e2fsprogs", "mke2fs", "makes its disk"),
    need("binutils", "strip", "makes the tests on it small"),
    need("nftables", "nft", "the nodes' packet rules"),
    need("apparmor", "apparmor_parser", "loads the nodes' profiles: its kernel has AppArmor"),
];

/// Needed for the cluster in containers.
pub const DOCKER: &[Need] = &[
    need("docker.io", "dockerd", "runs the containers of deploy/compose.yaml"),
    need("docker-compose", "docker-compose", "reads deploy/compose.yaml"),
    need("binutils", "strip", "makes the binaries in the images small"),
];

/// Installs the packages of `needs` that are missing.
///
/// # Errors
/// When something is missing and this is not root on Debian with a package archive in reach.
pub fn install(needs: &[Need]) -> Result<(), String> {
    let missing: Vec<&Need> = needs.iter().filter(|n| !present(n)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = missing.iter().map(|n| n.package).collect();
    for need in &missing {
        eprintln!("    missing: {} ({})", need.package, need.why);
    }
    let by_hand = format!("install them by hand: apt-get install {}", names.join(" "));
    if run::find("apt-get").is_none() {
        return Err(format!("packages are missing and there is no apt-get here; {by_hand} (Debian's names)"));
    }
    if !is_root() {
        return Err(format!("packages are missing and this is not root; {by_hand}"));
    }
    run::step(&format!("install {}", names.join(" ")));
    apt(&["update"]).map_err(|e| format!("{e}\nthe package archive cannot be reached; {by_hand}"))?;
    let mut args = vec!["install", "--yes", "--no-install-recommends"];
    args.extend(&names);
    apt(&args).map_err(|e| format!("{e}\n{by_hand}"))?;
    match missing.iter().find(|n| !present(n)) {
        None => Ok(()),
        Some(n) => Err(format!("{} is installed, but {} is not there", n.package, n.proof)),
    }
}

/// Fetches packages into a directory without installing them.
///
/// # Errors
/// When there is no such package, or no package archive in reach.
pub fn fetch(packages: &[&str], into: &Path) -> Result<(), String> {
    let mut download = Command::new("apt-get");
    // As root apt would fetch as a user who may not write here, and warn.
    download.args(["-qq", "-o", "APT::Sandbox::User=root", "download"]).args(packages).current_dir(into);
    with_lists(|| run::output(&mut download).map(|_| ()))
}

/// The package with this Debian's Java runtime.
///
/// # Errors
/// When no package archive is in reach.
pub fn java_package() -> Result<String, String> {
    with_lists(|| {
        let listed = run::output(Command::new("apt-cache").args(["depends", "--important", JAVA]))?;
        let runtime = |word: &&str| word.starts_with("openjdk-") && word.ends_with("-jre-headless");
        let found = listed.split_whitespace().find(runtime).map(str::to_owned);
        found.ok_or_else(|| format!("{JAVA} depends on no openjdk-*-jre-headless:\n{listed}"))
    })
}

/// Does what needs apt's lists of packages; once more with new ones, because a fresh machine has none and old ones name
/// packages that are gone.
fn with_lists<T>(mut work: impl FnMut() -> Result<T, String>) -> Result<T, String> {
    work().or_else(|_| {
        apt(&["update"]).map_err(|e| format!("{e}\nthe package archive cannot be reached"))?;
        work()
    })
}

fn apt(args: &[&str]) -> Result<(), String> {
    let mut apt = Command::new("apt-get");
    apt.arg("-qq").args(args).env("DEBIAN_FRONTEND", "noninteractive");
    // Daemons that a package would start (etcd) are not ours to run: each test starts its own.
    apt.env("RUNLEVEL", "1");
    run::output(&mut apt).map(|_| ())
}

fn present(need: &Need) -> bool {
    let path = Path::new(need.proof);
    match (path.parent(), path.file_name().and_then(|name| name.to_str()).and_then(|name| name.split_once('*'))) {
        _ if !path.is_absolute() => run::find(need.proof).is_some(),
        (Some(dir), Some((head, tail))) => std::fs::read_dir(dir).into_iter().flatten().flatten().any(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            name.starts_with(head) && name.ends_with(tail)
        }),
        _ => path.exists(),
    }
}

fn is_root() -> bool {
    run::output(Command::new("id").arg("-u")).is_ok_and(|id| id.trim() == "0")
}
