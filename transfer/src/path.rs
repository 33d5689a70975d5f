//! Paths as they are sent. Pure.

/// Longest path that the kernel takes, with its NUL.
const PATH_MAX: usize = 4096;

/// A path below the tree's root, as names; `None` when it could lead anywhere else.
pub(crate) fn names(path: &[u8]) -> Option<Vec<&[u8]>> {
    if path.len() >= PATH_MAX || path.contains(&0) {
        return None;
    }
    let names: Vec<&[u8]> = path.split(|byte| *byte == b'/').collect();
    names.iter().all(|name| !matches!(*name, b"" | b"." | b"..")).then_some(names)
}

/// Whether a symlink at `path` (below the tree's root) could lead out of the tree.
///
/// Its text may go up at its begin only: after a name, which may be a link itself, nobody knows where `..` leads.
#[must_use]
pub fn leads_out(path: &[u8], text: &[u8]) -> bool {
    if text.starts_with(b"/") {
        return true;
    }
    // The link's own directory: as deep as its path has slashes.
    let depth = path.iter().filter(|byte| **byte == b'/').count();
    let mut parts = text.split(|byte| *byte == b'/').filter(|part| !matches!(*part, b"" | b"."));
    let ups = parts.by_ref().take_while(|part| *part == b"..").count();
    // `take_while` has taken one name more, which is no `..`.
    ups > depth || parts.any(|part| part == b"..")
}

/// The directory part and the last name of a path of the user's; the name is empty where the path names a directory's content.
pub(crate) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    let end = path.iter().rposition(|byte| *byte != b'/').map_or(0, |at| at + 1);
    let path = path.get(..end).unwrap_or_default();
    let (dir, name) = match path.iter().rposition(|byte| *byte == b'/') {
        Some(0) => (&b"/"[..], path.get(1..).unwrap_or_default()),
        Some(at) => (path.get(..at).unwrap_or_default(), path.get(at + 1..).unwrap_or_default()),
        None => (&b"."[..], path),
    };
    if matches!(name, b"" | b"." | b"..") { (if path.is_empty() { b"/" } else { path }, b"") } else { (dir, name) }
}

/// What a copy of this path is called in a directory; empty where the path stands for a directory's content (`/`, `.`, `a/.`).
#[must_use]
pub fn name_of(path: &[u8]) -> &[u8] {
    split(path).1
}

pub(crate) fn join(parent: &[u8], name: &[u8]) -> Vec<u8> {
    match (parent.is_empty(), name.is_empty()) {
        (true, _) => name.to_vec(),
        (false, true) => parent.to_vec(),
        (false, false) => [parent, b"/", name].concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_paths_are_taken() {
        assert_eq!(names(b"a/b"), Some(vec![&b"a"[..], b"b"]));
        assert_eq!(names(b"..a/b."), Some(vec![&b"..a"[..], b"b."]));
        for bad in [&b""[..], b"/a", b"a/", b"a//b", b".", b"..", b"a/../b", b"../a", b"./a", b"a\0b", &[b'x'; 5000]] {
            assert_eq!(names(bad), None, "{:?}", String::from_utf8_lossy(bad));
        }
    }

    #[test]
    fn links_that_lead_out() {
        for (path, text, out) in [
            ("l", "a", false),
            ("l", "a/b/c", false),
            ("l", "./a", false),
            ("l", "", false),
            ("l", "..", true),
            ("l", "../a", true),
            ("l", "/etc/passwd", true),
            ("l", "//etc", true),
            ("d/l", "..", false),
            ("d/l", "../a", false),
            ("d/l", "../../a", true),
            ("d/e/l", "../../a", false),
            ("d/e/l", ".././../a", false),
            // `a` may be a link to the tree's root.
            ("d/l", "a/..", true),
            ("l", "a/../b", true),
            ("d/l", "../a/..", true),
        ] {
            assert_eq!(leads_out(path.as_bytes(), text.as_bytes()), out, "{path} -> {text}");
        }
    }

    #[test]
    fn users_paths_are_split() {
        for (path, dir, name) in [
            ("/a/b", "/a", "b"),
            ("/a/b/", "/a", "b"),
            ("/a", "/", "a"),
            ("a", ".", "a"),
            ("a/b", "a", "b"),
            ("/", "/", ""),
            ("//", "/", ""),
            (".", ".", ""),
            ("a/.", "a/.", ""),
            ("/a/..", "/a/..", ""),
        ] {
            let (got_dir, got_name) = split(path.as_bytes());
            assert_eq!((got_dir, got_name), (dir.as_bytes(), name.as_bytes()), "{path}");
        }
    }
}
