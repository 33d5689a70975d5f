//! What a container's process is: arguments, user, capabilities, signals.

use minipod_proto::v1::{Container, PodSecurityContext, SecurityContext};

use super::ConfigError;
use super::env::Environment;
use super::expand::expand;
use crate::image::{ImageConfig, ResolvedUser};

/// Capabilities by number, as in linux/capability.h.
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// What every container of the field gets unless it says otherwise.
const DEFAULT_CAPABILITIES: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

/// The argument vector: command replaces the image's entrypoint and cmd, args replace its cmd.
///
/// # Errors
/// When nothing says what to run.
pub fn arguments(
    container: &Container,
    image: &ImageConfig,
    environment: &Environment,
) -> Result<Vec<String>, ConfigError> {
    let expanded = |texts: &[String]| -> Vec<String> {
        texts.iter().map(|text| expand(text, |name| environment.own.get(name).map(String::as_str))).collect()
    };
    let mut argv = if container.command.is_empty() { image.entrypoint.clone() } else { expanded(&container.command) };
    if !container.args.is_empty() {
        argv.extend(expanded(&container.args));
    } else if container.command.is_empty() {
        argv.extend(image.cmd.iter().cloned());
    }
    if argv.first().is_none_or(String::is_empty) {
        return Err(ConfigError::NoCommand(container.name.clone()));
    }
    Ok(argv)
}

/// Who the process is: the container's word, the pod's, the image's.
///
/// # Errors
/// When root is asked not to be and would be.
pub fn user(
    container: Option<&SecurityContext>,
    pod: Option<&PodSecurityContext>,
    image: &ResolvedUser,
) -> Result<ResolvedUser, ConfigError> {
    let number = |value: Option<i64>| value.and_then(|value| u32::try_from(value).ok());
    let uid = number(container.and_then(|c| c.run_as_user)).or(number(pod.and_then(|p| p.run_as_user)));
    let gid = number(container.and_then(|c| c.run_as_group)).or(number(pod.and_then(|p| p.run_as_group)));
    let mut out = image.clone();
    if let Some(uid) = uid {
        // Another user than the image's: its groups are not this one's.
        out = ResolvedUser { uid, gid: if uid == image.uid { image.gid } else { 0 }, ..image.clone() };
        if uid != image.uid {
            out.groups.clear();
        }
    }
    if let Some(gid) = gid {
        out.gid = gid;
    }
    if pod.is_some_and(|pod| pod.supplemental_groups_policy == "Strict") {
        out.groups.clear();
    }
    let more = pod.into_iter().flat_map(|pod| pod.supplemental_groups.iter().copied().chain(pod.fs_group));
    for group in more.filter_map(|group| u32::try_from(group).ok()) {
        if !out.groups.contains(&group) {
            out.groups.push(group);
        }
    }
    let not_root = container.and_then(|c| c.run_as_non_root).or(pod.and_then(|p| p.run_as_non_root));
    if not_root == Some(true) && out.uid == 0 {
        return Err(ConfigError::WouldBeRoot);
    }
    Ok(out)
}

/// Whether the container is as mighty as the node's root: all capabilities and devices, nothing hidden, no filter.
#[must_use]
pub fn is_privileged(context: &SecurityContext) -> bool {
    context.privileged == Some(true)
}

/// A capability's bit; with or without `CAP_`, in any case.
#[must_use]
pub fn capability_bit(name: &str) -> Option<u64> {
    let upper = name.to_uppercase();
    let plain = upper.strip_prefix("CAP_").unwrap_or(&upper);
    let number = CAPABILITIES.iter().position(|other| *other == plain)?;
    Some(1 << number)
}

/// The capability set as a bit mask.
///
/// # Errors
/// A name that is no capability.
pub fn capabilities(context: Option<&SecurityContext>) -> Result<u64, ConfigError> {
    let bit = |name: &str| capability_bit(name).ok_or_else(|| ConfigError::UnknownCapability(name.to_owned()));
    let all = (1_u64 << CAPABILITIES.len()) - 1;
    let mut set = 0;
    for name in DEFAULT_CAPABILITIES {
        set |= bit(name)?;
    }
    if context.is_some_and(is_privileged) {
        return Ok(all);
    }
    let Some(change) = context.and_then(|context| context.capabilities.as_ref()) else { return Ok(set) };
    // ALL first, names after it: "drop ALL, add CHOWN" and "add ALL, drop MKNOD" both mean what they say.
    let is_all = |name: &String| name.eq_ignore_ascii_case("ALL");
    if change.add.iter().any(is_all) {
        set = all;
    }
    if change.drop.iter().any(is_all) {
        set = 0;
    }
    for name in change.add.iter().filter(|name| !is_all(name)) {
        set |= bit(name)?;
    }
    for name in change.drop.iter().filter(|name| !is_all(name)) {
        set &= !bit(name)?;
    }
    Ok(set)
}

/// The signal that asks a container to end: the container's, the image's, TERM. Names and numbers, with or without SIG.
#[must_use]
pub fn stop_signal(own: &str, image: &str) -> i32 {
    [own, image].into_iter().find_map(parse_signal).unwrap_or(libc::SIGTERM)
}

/// A signal's name in a manifest; empty for none.
#[must_use]
pub fn signal_name(number: i32) -> String {
    match nix::sys::signal::Signal::try_from(number) {
        Ok(signal) => signal.as_str().to_owned(),
        Err(_) if (34..=49).contains(&number) => format!("SIGRTMIN+{}", number - 34).trim_end_matches("+0").to_owned(),
        Err(_) if (50..=64).contains(&number) => format!("SIGRTMAX-{}", 64 - number).trim_end_matches("-0").to_owned(),
        Err(_) => String::new(),
    }
}

fn parse_signal(text: &str) -> Option<i32> {
    use nix::sys::signal::Signal;
    let text = text.trim().to_uppercase();
    if text.is_empty() {
        return None;
    }
    if let Ok(number) = text.parse::<i32>() {
        return (1..=64).contains(&number).then_some(number);
    }
    let name = if text.starts_with("SIG") { text.clone() } else { format!("SIG{text}") };
    if let Ok(signal) = name.parse::<Signal>() {
        return Some(signal as i32);
    }
    let offset = |prefix: &str, base: i32, sign: i32| {
        let rest = name.strip_prefix(prefix)?;
        let number = if rest.is_empty() { 0 } else { rest.get(1..)?.parse::<i32>().ok()? };
        Some(base + sign * number).filter(|signal| (34..=64).contains(signal))
    };
    offset("SIGRTMIN", 34, 1).or_else(|| offset("SIGRTMAX", 64, -1))
}

#[cfg(test)]
mod tests {
    use minipod_proto::v1::Capabilities;

    use super::*;

    fn texts(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn command_and_args_replace_entrypoint_and_cmd() {
        let environment = Environment { own: [("A".to_owned(), "1".to_owned())].into(), ..Environment::default() };
        for (command, args, entrypoint, cmd, expected) in [
            (&[][..], &[][..], &["e"][..], &["c"][..], &["e", "c"][..]),
            (&[], &["a"], &["e"], &["c"], &["e", "a"]),
            (&["x"], &[], &["e"], &["c"], &["x"]),
            (&["x"], &["$(A)", "$$(A)", "$(B)"], &["e"], &["c"], &["x", "1", "$(A)", "$(B)"]),
            (&[], &[], &[], &["c"], &["c"]),
            (&[], &[], &["$(A)"], &[], &["$(A)"]),
        ] {
            let container = Container { command: texts(command), args: texts(args), ..Container::default() };
            let image = ImageConfig { entrypoint: texts(entrypoint), cmd: texts(cmd), ..ImageConfig::default() };
            assert_eq!(arguments(&container, &image, &environment).expect("argv"), expected);
        }
        assert!(arguments(&Container::default(), &ImageConfig::default(), &environment).is_err());
    }

    #[test]
    fn the_nearest_word_decides_the_user() {
        let image = ResolvedUser { uid: 100, gid: 101, groups: vec![5], home: "/home/x".into() };
        let own = |uid, gid| SecurityContext { run_as_user: uid, run_as_group: gid, ..SecurityContext::default() };
        let pod = |uid| PodSecurityContext {
            run_as_user: uid,
            supplemental_groups: vec![7],
            fs_group: Some(8),
            ..PodSecurityContext::default()
        };
        let ids = |user: ResolvedUser| (user.uid, user.gid, user.groups);
        assert_eq!(ids(user(None, None, &image).expect("user")), (100, 101, vec![5]));
        assert_eq!(ids(user(None, Some(&pod(Some(9))), &image).expect("user")), (9, 0, vec![7, 8]));
        let both = user(Some(&own(Some(3), Some(4))), Some(&pod(Some(9))), &image);
        assert_eq!(ids(both.expect("user")), (3, 4, vec![7, 8]));
        let strict = PodSecurityContext { supplemental_groups_policy: "Strict".into(), ..pod(None) };
        assert_eq!(ids(user(None, Some(&strict), &image).expect("user")), (100, 101, vec![7, 8]));
        let root = ResolvedUser { uid: 0, gid: 0, groups: vec![], home: "/".into() };
        let not_root = SecurityContext { run_as_non_root: Some(true), ..SecurityContext::default() };
        assert!(user(Some(&not_root), None, &root).is_err());
        assert!(user(Some(&not_root), None, &image).is_ok());
    }

    #[test]
    fn capabilities_are_added_and_dropped() {
        let set = |add: &[&str], drop: &[&str]| {
            let capabilities = Some(Capabilities { add: texts(add), drop: texts(drop) });
            capabilities_of(&SecurityContext { capabilities, ..SecurityContext::default() })
        };
        fn capabilities_of(context: &SecurityContext) -> Result<u64, ConfigError> {
            capabilities(Some(context))
        }
        // The default set of the field: 00000000a80425fb in /proc/self/status.
        assert_eq!(capabilities(None).expect("set"), 0xa804_25fb);
        assert_eq!(set(&["NET_ADMIN"], &[]).expect("set"), 0xa804_25fb | 1 << 12);
        assert_eq!(set(&["CAP_CHOWN"], &["ALL"]).expect("set"), 1);
        assert_eq!(set(&["ALL"], &["CHOWN"]).expect("set"), 0x1ff_ffff_fffe);
        assert_eq!(set(&[], &["all"]).expect("set"), 0);
        assert!(set(&["NONSENSE"], &[]).is_err());
    }

    #[test]
    fn signals_by_name_and_number() {
        for (own, image, expected) in [
            ("", "", 15),
            ("", "SIGINT", 2),
            ("SIGUSR1", "SIGINT", 10),
            ("", "quit", 3),
            ("", "9", 9),
            ("", "nonsense", 15),
            ("", "99", 15),
            ("", "SIGRTMIN+3", 37),
            ("", "RTMAX-1", 63),
            ("", "SIGRTMIN", 34),
        ] {
            assert_eq!(stop_signal(own, image), expected, "{own} {image}");
            assert_eq!(stop_signal(&signal_name(expected), ""), expected);
        }
    }
}
