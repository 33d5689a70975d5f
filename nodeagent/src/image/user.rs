//! From `user[:group]` to numbers, by the image's own /etc/passwd and /etc/group.

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
