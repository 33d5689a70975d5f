//! Who the process is at last: limits, user, capabilities, filters. The order matters at every line.

use minipod_podshim::protocol::{Capabilities, ContainerSpec, Rlimit};
use nix::errno::Errno;

use super::report::{Context as _, Failure, Reporter, Step};
use crate::sys;

/// Capabilities that a kernel of today can have; asked for one by one until it knows no more.
const MAX_CAPABILITY: u32 = 63;
/// Names for messages, by number.
const RLIMITS: [&str; 16] = [
    "CPU",
    "FSIZE",
    "DATA",
    "STACK",
    "CORE",
    "RSS",
    "NPROC",
    "NOFILE",
    "MEMLOCK",
    "AS",
    "LOCKS",
    "SIGPENDING",
    "MSGQUEUE",
    "NICE",
    "RTPRIO",
    "RTTIME",
];

/// The score of the out-of-memory killer. Lowering it needs a right that the node may not have.
pub fn set_oom_score(score: i32, reporter: &mut Reporter) -> Step<()> {
    let path = "/proc/self/oom_score_adj";
    match std::fs::write(path, score.to_string()) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EACCES | libc::EPERM)) => {
            reporter.warn(format!("oom_score_adj {score} is not permitted on this node"));
            Ok(())
        }
        result => result.node("set", path),
    }
}

/// Has the kernel change to an AppArmor profile at the next exec. Told through the node's procfs, before this process sees the container's:
/// there anything could lie in the file's place (CVE-2019-16884). What it does until then is not confined.
pub fn confine(profile: &str) -> Step<()> {
    if profile.is_empty() {
        return Ok(());
    }
    // The second name is that of kernels before 5.8, where one security module has it to itself.
    let paths = ["/proc/thread-self/attr/apparmor/exec", "/proc/thread-self/attr/exec"];
    let files = paths.map(|path| (path, std::fs::OpenOptions::new().write(true).open(path)));
    let opened = files.into_iter().find(|(_, file)| file.is_ok()).unwrap_or((paths[0], Err(Errno::ENOENT.into())));
    let (path, file) = (opened.0, opened.1.node("open", opened.0)?);
    match nix::unistd::write(&file, format!("exec {profile}").as_bytes()) {
        Ok(_) => Ok(()),
        Err(Errno::ENOENT) => {
            let failure = Failure::container("set the AppArmor profile", profile, Errno::ENOENT);
            Err(failure.because("the node has loaded no profile of that name"))
        }
        Err(errno) => Err(Failure::node("set the AppArmor profile through", path, errno)),
    }
}

/// Sets resource limits; what the node does not permit is lowered to what it has.
pub fn set_rlimits(limits: &[Rlimit], reporter: &mut Reporter) -> Step<()> {
    for limit in limits {
        let name = usize::try_from(limit.resource).ok().and_then(|number| RLIMITS.get(number)).unwrap_or(&"unknown");
        match sys::prlimit(limit.resource, Some((limit.soft, limit.hard))) {
            Ok(_) => {}
            Err(Errno::EPERM) => {
                let (_, hard) = sys::prlimit(limit.resource, None).node("read resource limit", name)?;
                let soft = limit.soft.min(hard);
                sys::prlimit(limit.resource, Some((soft, hard))).node("set resource limit", name)?;
                reporter.warn(format!("resource limit {name} above {hard} is not permitted on this node"));
            }
            Err(errno) => return Err(Failure::container("set resource limit", name, errno)),
        }
    }
    Ok(())
}

/// Becomes the container's user with its capabilities, and gives up everything else.
pub fn assume(spec: &ContainerSpec, reporter: &mut Reporter) -> Step<()> {
    let wanted = spec.capabilities.unwrap_or_default();
    let capabilities = permitted(wanted, reporter)?;
    let user = spec.user.clone().unwrap_or_default();
    // Without no_new_privs a filter can only be loaded by the mighty.
    if !spec.no_new_privs && !spec.seccomp_filter.is_empty() {
        load_filter(&spec.seccomp_filter)?;
    }
    for capability in 0..=MAX_CAPABILITY {
        if capabilities.bounding >> capability & 1 == 0
            && !sys::drop_bounding(capability).node("drop a capability from the bounding set", "")?
        {
            break;
        }
    }
    sys::keep_capabilities(true).node("keep capabilities", "")?;
    let who = format!("{}:{}", user.uid, user.gid);
    sys::set_user(user.uid, user.gid, &user.groups).node("become user", &who)?;
    sys::set_capabilities(capabilities.effective, capabilities.permitted, capabilities.inheritable)
        .node("set capabilities", "")?;
    sys::clear_ambient().node("clear ambient capabilities", "")?;
    for capability in (0..=MAX_CAPABILITY).filter(|capability| capabilities.ambient >> capability & 1 == 1) {
        sys::raise_ambient(capability).container("raise ambient capability", capability.to_string())?;
    }
    sys::keep_capabilities(false).node("keep no capabilities", "")?;
    sys::die_with_parent().node("bind the process' life to its supervisor", "")?;
    if spec.no_new_privs {
        sys::set_no_new_privs().node("set no_new_privs", "")?;
        if !spec.seccomp_filter.is_empty() {
            load_filter(&spec.seccomp_filter)?;
        }
    }
    Ok(())
}

fn load_filter(filter: &[u8]) -> Step<()> {
    sys::load_seccomp(filter).container("load the seccomp filter", "")
}

/// What of the wanted capabilities this node has itself.
fn permitted(wanted: Capabilities, reporter: &mut Reporter) -> Step<Capabilities> {
    let (_, own, _) = sys::capabilities().node("read own capabilities", "")?;
    let missing = wanted.permitted & !own;
    if missing != 0 {
        reporter.warn(format!("this node cannot give the capabilities {missing:#x}"));
    }
    let permitted = wanted.permitted & own;
    let inheritable = wanted.inheritable & own;
    Ok(Capabilities {
        bounding: wanted.bounding,
        permitted,
        effective: wanted.effective & permitted,
        inheritable,
        ambient: wanted.ambient & permitted & inheritable,
    })
}
