//! From `user[:group]` to numbers, by the image's own /etc/passwd and /etc/group.

use std::io::Read;
use std::path::PathBuf;

use super::ImageError;
use super::tree::{Dir, Found};

/// Most of /etc/passwd and /etc/group that is read.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Who the container's process is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedUser {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Supplementary groups of the image's /etc/group, ascending, without `gid`.
    pub groups: Vec<u32>,
    /// Home directory from /etc/passwd, `/` when the user is not in there.
    pub home: String,
}

/// Resolves `name|uid[:group|gid]`, empty: root.
pub(super) fn resolve(text: &str, passwd: &str, group: &str) -> Result<ResolvedUser, ImageError> {
    let wrong = |reason: String| ImageError::User { user: text.to_owned(), reason };
    let (user, own_group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    // name:password:uid:gid:comment:home:shell
    let lines = || passwd.lines().map(|line| line.split(':').collect::<Vec<_>>()).filter(|fields| fields.len() >= 6);
    let by_name = lines().find(|fields| fields[0] == user);
    let found = by_name.or_else(|| {
        let uid: u32 = user.parse().ok()?;
        lines().find(|fields| fields[2].parse() == Ok(uid))
    });
    let number = |text: &str| text.parse::<u32>().ok().filter(|id| *id != u32::MAX);
    let (uid, gid, home, name) = match &found {
        Some(fields) => {
            let bad = || wrong("its line in the image's /etc/passwd is malformed".to_owned());
            let (uid, gid) = number(fields[2]).zip(number(fields[3])).ok_or_else(bad)?;
            (uid, gid, fields[5], fields[0])
        }
        None => {
            let unknown = || wrong(format!("{user:?} is no number and not in the image's /etc/passwd"));
            (number(user).ok_or_else(unknown)?, 0, "/", "")
        }
    };
    let gid = match own_group {
        None | Some("") => gid,
        Some(wanted) => group_id(wanted, group)
            .ok_or_else(|| wrong(format!("group {wanted:?} is no number and not in the image's /etc/group")))?,
    };
    // A stated group replaces all of them, as in the field.
    let mut groups: Vec<u32> =
        if own_group.is_none() && !name.is_empty() { groups_of(name, group) } else { Vec::new() };
    groups.retain(|other| *other != gid);
    groups.sort_unstable();
    groups.dedup();
    let home = if home.is_empty() { "/" } else { home };
    Ok(ResolvedUser { uid, gid, groups, home: home.to_owned() })
}

/// name:password:gid:members
fn group_lines(group: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let (name, gid) = (fields.next()?, fields.nth(1)?);
        Some((name, gid.parse().ok()?, fields.next().unwrap_or_default()))
    })
}

fn group_id(wanted: &str, group: &str) -> Option<u32> {
    let named = group_lines(group).find(|(name, _, _)| *name == wanted).map(|(_, gid, _)| gid);
    named.or_else(|| wanted.parse().ok()).filter(|gid| *gid != u32::MAX)
}

fn groups_of(user: &str, group: &str) -> Vec<u32> {
    let is_member = |members: &str| members.split(',').any(|member| member == user);
    group_lines(group).filter(|(_, _, members)| is_member(members)).map(|(_, gid, _)| gid).collect()
}

/// `/etc/NAME` as a container sees it before it changes anything; empty when there is none. Symlinks are not followed: they
/// could lead out of the image.
pub(super) fn read_from_layers(lowers: &[PathBuf], name: &str) -> String {
    for lower in lowers {
        let Ok(top) = Dir::top(lower) else { continue };
        if !matches!(top.find(b"etc"), Ok(Found::Dir)) {
            match top.find(b"etc") {
                Ok(Found::Nothing) => continue,
                _ => return String::new(),
            }
        }
        let Ok(etc) = top.open(b"etc") else { return String::new() };
        match etc.find(name.as_bytes()) {
            Ok(Found::Nothing) if etc.is_opaque() => return String::new(),
            Ok(Found::Nothing) => continue,
            Ok(Found::Other) => {}
            _ => return String::new(),
        }
        let mut bytes = Vec::new();
        let read = etc.open_file(name.as_bytes()).and_then(|file| file.take(MAX_FILE_BYTES).read_to_end(&mut bytes));
        return read.map_or_else(|_| String::new(), |_| String::from_utf8_lossy(&bytes).into_owned());
    }
    String::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_and_groups_by_name_and_number() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34:web:/srv:/bin/false\nbroken:x:a:1:b:/:/\nshort:x\n";
        let group = "root:x:0:\nweb:x:34:\nlog:x:50:a,web\nmail:x:40:web\nbad\n";
        type Want = Result<(u32, u32, &'static [u32], &'static str), &'static str>;
        let cases: [(&str, Want); 12] = [
            ("", Ok((0, 0, &[], "/root"))),
            ("root", Ok((0, 0, &[], "/root"))),
            ("web", Ok((33, 34, &[40, 50], "/srv"))),
            ("33", Ok((33, 34, &[40, 50], "/srv"))),
            ("web:mail", Ok((33, 40, &[], "/srv"))),
            ("web:7", Ok((33, 7, &[], "/srv"))),
            ("1000", Ok((1000, 0, &[], "/"))),
            ("1000:1001", Ok((1000, 1001, &[], "/"))),
            ("nobody", Err("not in the image's /etc/passwd")),
            ("web:none", Err("not in the image's /etc/group")),
            ("broken", Err("malformed")),
            ("4294967295", Err("no number")),
        ];
        for (text, want) in cases {
            match (resolve(text, passwd, group), want) {
                (Ok(got), Ok((uid, gid, groups, home))) => {
                    let want = ResolvedUser { uid, gid, groups: groups.to_vec(), home: home.to_owned() };
                    assert_eq!(got, want, "{text}");
                }
                (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{text}: {error}"),
                (got, _) => panic!("{text}: {got:?}"),
            }
        }
    }
}
