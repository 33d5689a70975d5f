//! Which system calls a container may make.
//!
//! [`default`] is the profile RuntimeDefault and [`profile`] reads those of the node's operator (Localhost); both become rules
//! by number, and [`bpf`] makes the kernel's filter of them. podshim loads it as the last thing before exec. A container
//! whose profile cannot be made does not start; none is ever left out.

mod bpf;
mod default;
mod profile;

use std::collections::HashMap;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use minipod_proto::v1::{Container, Pod, SeccompProfile};

use crate::container::process::is_privileged;
use bpf::{Action, TooLong};
use profile::{Facts, Profile, ProfileError};

/// Larger files are no profiles.
const MAX_PROFILE_BYTES: u64 = 1 << 20;

/// What a container asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choice {
    /// No filter.
    Unconfined,
    /// The runtime's own.
    RuntimeDefault,
    /// A file below the node's directory of profiles.
    Localhost(String),
}

/// The container's word, the pod's, the node's default. A privileged container has none.
#[must_use]
pub fn choice(pod: &Pod, container: &Container, node_default: bool) -> Choice {
    let own = container.security_context.as_deref();
    if own.is_some_and(is_privileged) {
        return Choice::Unconfined;
    }
    let of_pod = || pod.spec.as_ref()?.security_context.as_ref()?.seccomp_profile.as_ref();
    let said: Option<&SeccompProfile> = own.and_then(|context| context.seccomp_profile.as_ref()).or_else(of_pod);
    match said.map(|profile| profile.r#type.as_str()) {
        Some("Unconfined") => Choice::Unconfined,
        Some("Localhost") => Choice::Localhost(said.map(|said| said.localhost_profile.clone()).unwrap_or_default()),
        // A word that a newer API server may know is not a reason to confine less.
        Some(_) => Choice::RuntimeDefault,
        None if node_default => Choice::RuntimeDefault,
        None => Choice::Unconfined,
    }
}

/// No filter can be made for a container.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SeccompError {
    /// The file.
    #[error("seccompProfile: read {}: {why}", path.display())]
    Read {
        /// Where it should be.
        path: PathBuf,
        /// The system's answer.
        why: String,
    },
    /// Its name.
    #[error("seccompProfile.localhostProfile {0:?}: want a relative path without \"..\"")]
    Name(String),
    /// Its content.
    #[error("seccompProfile {name:?}")]
    Profile {
        /// As in the manifest.
        name: String,
        /// What is wrong.
        #[source]
        source: ProfileError,
    },
    /// Its size.
    #[error("seccompProfile {name:?}")]
    TooLong {
        /// As in the manifest.
        name: String,
        /// How much.
        #[source]
        source: TooLong,
    },
}

/// The node's profiles.
#[derive(Debug)]
pub struct Profiles {
    dir: PathBuf,
    kernel: (u32, u32),
    /// Filters of RuntimeDefault by capabilities: all pods of a node share two or three.
    defaults: Mutex<HashMap<u64, Arc<Vec<u8>>>>,
}

impl Profiles {
    /// Profiles of the operator lie below `dir`.
    #[must_use]
    pub fn new(dir: PathBuf) -> Self {
        Self { dir, kernel: kernel(), defaults: Mutex::default() }
    }

    /// The filter for a container with these capabilities, as an array of `struct sock_filter`; empty: none. Reads a file for
    /// [`Choice::Localhost`], each time, so that a changed one counts for what starts next.
    ///
    /// # Errors
    /// See [`SeccompError`].
    pub fn filter(&self, choice: &Choice, capabilities: u64) -> Result<Arc<Vec<u8>>, SeccompError> {
        match choice {
            Choice::Unconfined => Ok(Arc::default()),
            Choice::RuntimeDefault => {
                let mut defaults = self.defaults.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(made) = defaults.get(&capabilities) {
                    return Ok(Arc::clone(made));
                }
                let made = Arc::new(self.compile("RuntimeDefault", &default::profile(), capabilities)?);
                defaults.insert(capabilities, Arc::clone(&made));
                Ok(made)
            }
            Choice::Localhost(name) => {
                let path = Path::new(name);
                if name.is_empty() || !path.components().all(|part| matches!(part, Component::Normal(_))) {
                    return Err(SeccompError::Name(name.clone()));
                }
                let path = self.dir.join(path);
                let text =
                    read(&path).map_err(|error| SeccompError::Read { path: path.clone(), why: error.to_string() })?;
                let wrong = |source| SeccompError::Profile { name: name.clone(), source };
                let profile = Profile::parse(&text).map_err(wrong)?;
                self.compile(name, &profile, capabilities).map(Arc::new)
            }
        }
    }

    fn compile(&self, name: &str, profile: &Profile, capabilities: u64) -> Result<Vec<u8>, SeccompError> {
        let name = || name.to_owned();
        let facts = Facts { capabilities, kernel: self.kernel };
        let tables = profile.tables(facts).map_err(|source| SeccompError::Profile { name: name(), source })?;
        // Of an architecture that the profile does not speak of, nothing is known.
        bpf::compile(&tables, Action::KillProcess).map_err(|source| SeccompError::TooLong { name: name(), source })
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    use std::io::Read as _;
    let mut text = Vec::new();
    std::fs::File::open(path)?.take(MAX_PROFILE_BYTES + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX_PROFILE_BYTES {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("more than {MAX_PROFILE_BYTES} bytes")));
    }
    Ok(text)
}

/// Major and minor of the running kernel.
fn kernel() -> (u32, u32) {
    let release = nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned());
    let release = release.unwrap_or_default();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use minipod_proto::v1::{PodSecurityContext, PodSpec, SecurityContext};

    use super::bpf::tests::run;
    use super::*;
    use crate::container::process::capability_bit;

    #[cfg(target_arch = "x86_64")]
    const HERE: u32 = 0xc000_003e;
    #[cfg(target_arch = "aarch64")]
    const HERE: u32 = 0xc000_00b7;

    fn answer(filter: &[u8], call: libc::c_long, first: u64) -> u32 {
        run(filter, HERE, u32::try_from(call).expect("a number"), [first, 0, 0, 0, 0, 0]).0
    }

    #[test]
    fn the_default_profile() {
        let profiles = Profiles::new("/nonexistent".into());
        let of = |capabilities: &[&str]| {
            let set = capabilities.iter().map(|name| capability_bit(name).expect("known")).sum();
            profiles.filter(&Choice::RuntimeDefault, set).expect("a filter")
        };
        let (plain, admin) = (of(&[]), of(&["SYS_ADMIN"]));
        let refused = |errno: i32| libc::SECCOMP_RET_ERRNO | errno.cast_unsigned();
        let allowed = libc::SECCOMP_RET_ALLOW;
        for (call, first, wanted) in [
            (libc::SYS_read, 0, allowed),
            (libc::SYS_execve, 0, allowed),
            (libc::SYS_mount, 0, refused(libc::EPERM)),
            (libc::SYS_unshare, 0, refused(libc::EPERM)),
            (libc::SYS_bpf, 0, refused(libc::EPERM)),
            (libc::SYS_io_uring_setup, 0, refused(libc::EPERM)),
            (libc::SYS_userfaultfd, 0, refused(libc::EPERM)),
            (libc::SYS_keyctl, 0, refused(libc::EPERM)),
            (libc::SYS_clone3, 0, refused(libc::ENOSYS)),
            (libc::SYS_clone, 17, allowed),
            (libc::SYS_clone, 17 | 0x1000_0000, refused(libc::EPERM)),
            (libc::SYS_personality, 0, allowed),
            (libc::SYS_personality, 0x4_0000, refused(libc::EPERM)),
            (libc::SYS_socket, 2, allowed),
            (libc::SYS_socket, 40, refused(libc::EPERM)),
            (9999, 0, refused(libc::ENOSYS)),
        ] {
            assert_eq!(answer(&plain, call, first), wanted, "system call {call} with {first:#x}");
        }
        for (call, first) in [(libc::SYS_mount, 0), (libc::SYS_clone, 17 | 0x1000_0000), (libc::SYS_clone3, 0)] {
            assert_eq!(answer(&admin, call, first), allowed);
        }
        assert_eq!(answer(&of(&["SYS_CHROOT"]), libc::SYS_chroot, 0), allowed);
        assert_eq!(run(&plain, 0x1234, 0, [0; 6]).0, libc::SECCOMP_RET_KILL_PROCESS);
        // A call costs a dozen steps, wherever it stands.
        let most = (0..470).map(|number| run(&plain, HERE, number, [0; 6]).1).max().expect("some");
        assert!(most <= 25, "{most} steps");
        assert!(Arc::ptr_eq(&plain, &of(&[])), "compiled once");
    }

    #[test]
    fn files_of_the_operator() {
        let dir = tempfile::tempdir().expect("tempdir");
        let profiles = Profiles::new(dir.path().to_owned());
        std::fs::create_dir(dir.path().join("team")).expect("make");
        let text =
            r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"}]}"#;
        std::fs::write(dir.path().join("team/a.json"), text).expect("write");
        std::fs::write(dir.path().join("bad.json"), "{}").expect("write");
        let of = |name: &str| profiles.filter(&Choice::Localhost(name.to_owned()), 0);
        let filter = of("team/a.json").expect("a filter");
        assert_eq!(answer(&filter, libc::SYS_read, 0), libc::SECCOMP_RET_ALLOW);
        #[cfg(target_arch = "x86_64")]
        assert_eq!(answer(&filter, libc::SYS_mkdir, 0), libc::SECCOMP_RET_ERRNO | 1);
        for (name, part) in [
            ("../a.json", "without \"..\""),
            ("", "want a relative path"),
            ("none.json", "No such file"),
            ("bad.json", "seccompProfile \"bad.json\""),
        ] {
            let error = of(name).expect_err(name).to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn the_nearest_word_counts() {
        let profile = |kind: &str, file: &str| {
            Some(SeccompProfile { r#type: kind.to_owned(), localhost_profile: file.to_owned() })
        };
        let made = |of_pod: Option<SeccompProfile>, own: Option<SeccompProfile>, privileged: bool, default: bool| {
            let context = PodSecurityContext { seccomp_profile: of_pod, ..PodSecurityContext::default() };
            let spec = PodSpec { security_context: Some(context), ..PodSpec::default() };
            let own =
                SecurityContext { seccomp_profile: own, privileged: Some(privileged), ..SecurityContext::default() };
            let container = Container { security_context: Some(Box::new(own)), ..Container::default() };
            choice(&Pod { spec: Some(spec), ..Pod::default() }, &container, default)
        };
        assert_eq!(made(None, None, false, true), Choice::RuntimeDefault);
        assert_eq!(made(None, None, false, false), Choice::Unconfined);
        assert_eq!(made(profile("Unconfined", ""), None, false, true), Choice::Unconfined);
        let own = made(profile("Unconfined", ""), profile("Localhost", "a"), false, true);
        assert_eq!(own, Choice::Localhost("a".to_owned()));
        assert_eq!(made(profile("Localhost", "a"), profile("RuntimeDefault", ""), true, true), Choice::Unconfined);
    }
}
