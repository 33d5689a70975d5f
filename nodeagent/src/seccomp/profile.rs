//! Profiles as the field writes them (the OCI runtime specification's `linux.seccomp` with moby's additions), and what of one
//! holds for a container.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::bpf::{Action, Condition, Is, Rule, Table};
use crate::container::process::capability_bit;

/// A filter for one process.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Profile {
    /// Where no entry says anything.
    pub default_action: String,
    /// For `SCMP_ACT_ERRNO`; EPERM if absent.
    pub default_errno_ret: Option<u16>,
    /// Names such as `SCMP_ARCH_X86_64`; none: the node's and what it runs beside it.
    pub architectures: Vec<String>,
    /// The same by the node's architecture.
    pub arch_map: Vec<Family>,
    /// Of the loading, not of the filter.
    pub flags: Vec<String>,
    /// In order; the first that holds decides.
    pub syscalls: Vec<Entry>,
}

/// An architecture and those that run beside it.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Family {
    /// The node's.
    pub architecture: String,
    /// Those beside it.
    pub sub_architectures: Vec<String>,
}

/// What holds for some system calls.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Entry {
    /// Of one system call; the old form.
    pub name: String,
    /// Of system calls; those of other architectures do no harm.
    pub names: Vec<String>,
    /// What becomes of them.
    pub action: String,
    /// For `SCMP_ACT_ERRNO`; EPERM if absent.
    pub errno_ret: Option<u16>,
    /// All must hold.
    pub args: Vec<Argument>,
    /// Not read.
    pub comment: String,
    /// The entry counts only if all of it is so.
    pub includes: When,
    /// The entry does not count if any of it is so.
    pub excludes: When,
}

/// A comparison of an argument.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Argument {
    /// Which, from 0.
    pub index: u8,
    /// With what; the mask for `SCMP_CMP_MASKED_EQ`.
    pub value: u64,
    /// What the masked argument must be.
    pub value_two: u64,
    /// `SCMP_CMP_…`.
    pub op: String,
}

/// Facts of the container and the node.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct When {
    /// It has these capabilities.
    pub caps: Vec<String>,
    /// The node is one of these, in Go's names (amd64, arm64).
    pub arches: Vec<String>,
    /// The kernel is at least this, `major.minor`.
    pub min_kernel: Option<String>,
}

/// What a profile depends on beside itself.
#[derive(Debug, Clone, Copy)]
pub struct Facts {
    /// The container's capabilities by their numbers.
    pub capabilities: u64,
    /// Major and minor.
    pub kernel: (u32, u32),
}

/// A profile that cannot be carried out; a container does not start without the one it asks for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProfileError {
    /// Not in the format.
    #[error("{0}")]
    Format(String),
    /// A word that is not known, or known and not carried out.
    #[error("{field} {value:?}: want {wanted}")]
    Word {
        /// Where it stands.
        field: &'static str,
        /// The word.
        value: String,
        /// What would be right.
        wanted: &'static str,
    },
}

/// An architecture whose system calls we know.
struct Known {
    name: &'static str,
    audit: u32,
    number: fn(&str) -> Option<u32>,
    newest: u32,
}

macro_rules! known {
    ($name:literal, $audit:literal, $module:ident) => {
        Known {
            name: $name,
            audit: $audit,
            number: |name| {
                let call = name.parse::<syscalls::$module::Sysno>().ok()?;
                u32::try_from(call.id()).ok()
            },
            newest: syscalls::$module::Sysno::last().id().cast_unsigned(),
        }
    };
}

/// The node's own first; linux/audit.h has the numbers.
#[cfg(target_arch = "x86_64")]
const KNOWN: [Known; 2] = [known!("SCMP_ARCH_X86_64", 0xc000_003e, x86_64), known!("SCMP_ARCH_X86", 0x4000_0003, x86)];
#[cfg(target_arch = "aarch64")]
const KNOWN: [Known; 2] =
    [known!("SCMP_ARCH_AARCH64", 0xc000_00b7, aarch64), known!("SCMP_ARCH_ARM", 0x4000_0028, arm)];

/// The node in Go's names.
#[cfg(target_arch = "x86_64")]
const NODE: &str = "amd64";
#[cfg(target_arch = "aarch64")]
const NODE: &str = "arm64";

const EPERM: u16 = 1;
const ENOSYS: u16 = 38;

impl Profile {
    /// Reads one.
    ///
    /// # Errors
    /// What is wrong, with line and column.
    pub fn parse(text: &[u8]) -> Result<Self, ProfileError> {
        serde_json::from_slice(text).map_err(|error| ProfileError::Format(error.to_string()))
    }

    /// What of it holds.
    ///
    /// # Errors
    /// A word that is not known: nothing is left out silently.
    pub fn tables(&self, facts: Facts) -> Result<Vec<Table>, ProfileError> {
        // These change how a filter is loaded; it is loaded by a process of one thread, and costs are not traded for safety.
        let harmless = |flag: &&String| !matches!(flag.as_str(), "SECCOMP_FILTER_FLAG_TSYNC");
        if let Some(flag) = self.flags.iter().find(harmless) {
            let wanted = "no flag but SECCOMP_FILTER_FLAG_TSYNC";
            return Err(ProfileError::Word { field: "flags", value: flag.clone(), wanted });
        }
        let otherwise = action("defaultAction", &self.default_action, self.default_errno_ret)?;
        let mut tables = Vec::new();
        for known in KNOWN.iter().filter(|known| self.is_for(known.name)) {
            // A program must be able to tell "too new" from "forbidden", or it does not fall back to an older call.
            let unknown = if let Action::Errno(_) = otherwise { Action::Errno(ENOSYS) } else { otherwise };
            let mut calls: BTreeMap<u32, Vec<Rule>> = BTreeMap::new();
            for entry in &self.syscalls {
                if !entry.counts(facts)? {
                    continue;
                }
                let rule = entry.rule()?;
                for name in entry.names.iter().chain(Some(&entry.name).filter(|name| !name.is_empty())) {
                    match (known.number)(name) {
                        Some(number) => calls.entry(number).or_default().push(rule.clone()),
                        // What is not known is refused anyway where that is the default; else it would slip through.
                        None if otherwise == Action::Allow
                            && KNOWN.iter().all(|known| (known.number)(name).is_none()) =>
                        {
                            let wanted = "the name of a system call, the default lets all others through";
                            return Err(ProfileError::Word { field: "syscalls.names", value: name.clone(), wanted });
                        }
                        None => {}
                    }
                }
            }
            tables.push(Table { architecture: known.audit, calls, otherwise, newest: known.newest, unknown });
        }
        Ok(tables)
    }

    fn is_for(&self, architecture: &str) -> bool {
        if !self.arch_map.is_empty() {
            let own = self.arch_map.iter().find(|family| family.architecture == KNOWN[0].name);
            return own.is_some_and(|family| {
                family.architecture == architecture || family.sub_architectures.iter().any(|sub| sub == architecture)
            });
        }
        // The node's own always counts: nothing could run otherwise.
        self.architectures.is_empty()
            || architecture == KNOWN[0].name
            || self.architectures.iter().any(|name| name == architecture)
    }
}

impl Entry {
    fn counts(&self, facts: Facts) -> Result<bool, ProfileError> {
        let has = |name: &String| {
            let bit = capability_bit(name);
            let wanted = "the name of a capability such as CAP_SYS_ADMIN";
            let bit = bit.ok_or_else(|| ProfileError::Word { field: "caps", value: name.clone(), wanted })?;
            Ok(facts.capabilities & bit != 0)
        };
        let new_enough = |version: &String| {
            let parts = version.split_once('.');
            let numbers = parts.and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
            let wanted = "major.minor such as 4.8";
            let least: (u32, u32) =
                numbers.ok_or_else(|| ProfileError::Word { field: "minKernel", value: version.clone(), wanted })?;
            Ok::<bool, ProfileError>(facts.kernel >= least)
        };
        let (includes, excludes) = (&self.includes, &self.excludes);
        for capability in &includes.caps {
            if !has(capability)? {
                return Ok(false);
            }
        }
        for capability in &excludes.caps {
            if has(capability)? {
                return Ok(false);
            }
        }
        let here = |names: &[String]| names.iter().any(|name| name == NODE);
        let right_kernel = includes.min_kernel.as_ref().map_or(Ok(true), new_enough)?;
        let wrong_kernel = excludes.min_kernel.as_ref().map_or(Ok(false), new_enough)?;
        Ok(right_kernel
            && !wrong_kernel
            && (includes.arches.is_empty() || here(&includes.arches))
            && !here(&excludes.arches))
    }

    fn rule(&self) -> Result<Rule, ProfileError> {
        let conditions = self.args.iter().map(condition).collect::<Result<_, _>>()?;
        Ok(Rule { conditions, action: action("syscalls.action", &self.action, self.errno_ret)? })
    }
}

fn condition(argument: &Argument) -> Result<Condition, ProfileError> {
    if argument.index > 5 {
        let (value, wanted) = (argument.index.to_string(), "0 to 5");
        return Err(ProfileError::Word { field: "args.index", value, wanted });
    }
    let plain = |is| Condition { argument: argument.index, is, value: argument.value };
    Ok(match argument.op.as_str() {
        "SCMP_CMP_NE" => plain(Is::NotEqual),
        "SCMP_CMP_LT" => plain(Is::Less),
        "SCMP_CMP_LE" => plain(Is::NotGreater),
        "SCMP_CMP_EQ" => plain(Is::Equal),
        "SCMP_CMP_GE" => plain(Is::NotLess),
        "SCMP_CMP_GT" => plain(Is::Greater),
        "SCMP_CMP_MASKED_EQ" => Condition { value: argument.value_two, ..plain(Is::EqualUnder(argument.value)) },
        other => {
            let wanted = "SCMP_CMP_NE, LT, LE, EQ, GE, GT or MASKED_EQ";
            return Err(ProfileError::Word { field: "args.op", value: other.to_owned(), wanted });
        }
    })
}

fn action(field: &'static str, word: &str, number: Option<u16>) -> Result<Action, ProfileError> {
    Ok(match word {
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => Action::KillThread,
        "SCMP_ACT_KILL_PROCESS" => Action::KillProcess,
        "SCMP_ACT_TRAP" => Action::Trap,
        "SCMP_ACT_ERRNO" => Action::Errno(number.unwrap_or(EPERM)),
        "SCMP_ACT_TRACE" => Action::Trace(number.unwrap_or(EPERM)),
        "SCMP_ACT_LOG" => Action::Log,
        "SCMP_ACT_ALLOW" => Action::Allow,
        other => {
            let wanted = "SCMP_ACT_ALLOW, ERRNO, KILL, KILL_PROCESS, KILL_THREAD, TRAP, TRACE or LOG";
            return Err(ProfileError::Word { field, value: other.to_owned(), wanted });
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Facts = Facts { capabilities: 0, kernel: (6, 1) };

    fn first(text: &str, facts: Facts) -> Result<Table, ProfileError> {
        let tables = Profile::parse(text.as_bytes())?.tables(facts)?;
        Ok(tables.into_iter().next().expect("the node's own"))
    }

    fn rules(table: &Table, name: &str) -> Vec<Action> {
        let number = (KNOWN[0].number)(name).expect("a system call");
        table.calls.get(&number).into_iter().flatten().map(|rule| rule.action).collect()
    }

    #[test]
    fn entries_count_by_the_containers_facts() {
        let text = r#"{
            "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1,
            "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"]},
                        {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"]}],
            "syscalls": [
                {"names": ["read", "no_such_call"], "action": "SCMP_ACT_ALLOW", "comment": "plain"},
                {"name": "write", "action": "SCMP_ACT_LOG"},
                {"names": ["chroot"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_CHROOT"]}},
                {"names": ["chroot"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38, "excludes": {"caps": ["CAP_SYS_CHROOT"]}},
                {"names": ["ptrace"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "4.8"}},
                {"names": ["bpf"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["s390x"]}},
                {"names": ["mount"], "action": "SCMP_ACT_ALLOW", "excludes": {"arches": ["amd64", "arm64"]}}
            ]}"#;
        let table = first(text, NONE).expect("a profile");
        let of = |name: &str| rules(&table, name);
        assert_eq!((of("read"), of("write")), (vec![Action::Allow], vec![Action::Log]));
        assert_eq!((of("chroot"), of("ptrace")), (vec![Action::Errno(38)], vec![Action::Allow]));
        assert_eq!((of("bpf"), of("mount")), (vec![], vec![]));
        assert_eq!((table.otherwise, table.unknown), (Action::Errno(1), Action::Errno(38)));
        let able = Facts { capabilities: capability_bit("SYS_CHROOT").expect("known"), kernel: (4, 7) };
        let table = first(text, able).expect("a profile");
        assert_eq!((rules(&table, "chroot"), rules(&table, "ptrace")), (vec![Action::Allow], vec![]));
        assert_eq!(Profile::parse(text.as_bytes()).expect("read").tables(NONE).expect("tables").len(), 2);
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for (text, part) in [
            ("{", "EOF"),
            (r#"{"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/x"}"#, "unknown field `listenerPath`"),
            (r#"{"defaultAction": "ALLOW"}"#, "defaultAction \"ALLOW\": want SCMP_ACT_ALLOW"),
            (r#"{"defaultAction": "SCMP_ACT_NOTIFY"}"#, "SCMP_ACT_NOTIFY"),
            (r#"{"defaultAction": "SCMP_ACT_ALLOW", "flags": ["SECCOMP_FILTER_FLAG_SPEC_ALLOW"]}"#, "flags"),
            (
                r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mout"], "action": "SCMP_ACT_ERRNO"}]}"#,
                "syscalls.names \"mout\"",
            ),
            (
                r#"{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW",
                    "args": [{"index": 6, "value": 1, "op": "SCMP_CMP_EQ"}]}]}"#,
                "args.index \"6\": want 0 to 5",
            ),
            (
                r#"{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW",
                    "args": [{"index": 0, "value": 1, "op": "="}]}]}"#,
                "args.op \"=\"",
            ),
            (
                r#"{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW",
                    "includes": {"caps": ["CAP_FLY"]}}]}"#,
                "caps \"CAP_FLY\"",
            ),
        ] {
            let error = first(text, NONE).expect_err(part).to_string();
            assert!(error.contains(part), "{part}: {error}");
        }
    }
}
