//! System calls that nix does not wrap, or wraps in a way that a freshly cloned child must not use: glibc's `setresuid` and its
//! kin ask the other threads of the process to follow, and a child made by clone3 has none, though glibc thinks so.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

use nix::errno::Errno;
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};

/// Result of a system call.
pub type Result<T> = std::result::Result<T, Errno>;

fn owned(result: libc::c_long) -> Result<OwnedFd> {
    let fd = i32::try_from(Errno::result(result)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: called with the result of a system call that makes a descriptor; it is fresh and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Which side of a clone this is.
#[derive(Debug)]
pub enum Side {
    /// The caller, with the child's number and descriptor.
    Parent(u32, OwnedFd),
    /// The new process.
    Child,
}

/// Makes a child with a copy of this process' memory, in new namespaces and perhaps in another cgroup.
///
/// # Safety
/// If the process has other threads, none of them may hold a lock that the child takes; malloc's is one. The child must end
/// by exec or `_exit` and must not return into the caller's loop.
pub unsafe fn clone3(namespaces: libc::c_int, cgroup: Option<BorrowedFd<'_>>) -> Result<Side> {
    let mut pidfd: libc::c_int = -1;
    // SAFETY: clone_args is made of integers, for which zero is valid and means "not used".
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    let bits = |flags: libc::c_int| u64::from(flags.cast_unsigned());
    args.flags = bits(namespaces) | bits(libc::CLONE_PIDFD);
    args.pidfd = (&raw mut pidfd).addr() as u64;
    args.exit_signal = bits(libc::SIGCHLD);
    if let Some(cgroup) = cgroup {
        // Too large for c_int; libc's constant of that type is cut.
        args.flags |= 0x2_0000_0000;
        args.cgroup = u64::from(cgroup.as_raw_fd().cast_unsigned());
    }
    // SAFETY: `args` is a valid clone_args of the size given; without CLONE_VM the child has its own copy of memory and
    // goes on from here with a copy of this stack. The caller keeps the rest of the contract.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
    match Errno::result(pid)? {
        0 => Ok(Side::Child),
        pid => {
            let number = u32::try_from(pid).map_err(|_| Errno::ESRCH)?;
            Ok(Side::Parent(number, owned(pidfd.into())?))
        }
    }
}

/// A descriptor that a system call just made, as a file.
pub fn file_of(fd: libc::c_int) -> std::fs::File {
    // SAFETY: callers pass the fresh result of F_DUPFD_CLOEXEC, or what a message has just brought; nobody else owns it.
    unsafe { std::fs::File::from_raw_fd(fd) }
}

/// malloc keeps one arena: the log thread allocates only while it begins, and an own arena would cost every pod.
pub fn one_arena() {
    // SAFETY: numbers only; called before there is a second thread.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

unsafe extern "C" {
    /// The first byte of the program in memory; the linker defines it.
    static __executable_start: u8;
    /// The byte after the program's code; the linker defines it.
    static etext: u8;
}

const PAGE_BYTES: usize = 4096;

fn forget_pages(from: usize, to: usize) {
    let (from, to) = (from.next_multiple_of(PAGE_BYTES), to / PAGE_BYTES * PAGE_BYTES);
    if from < to {
        // SAFETY: each caller says why nothing is lost by it.
        unsafe { libc::madvise(std::ptr::with_exposed_provenance_mut(from), to - from, libc::MADV_DONTNEED) };
    }
}

/// Gives back what a supervisor at rest does not need: freed memory, and its mappings of code, of which hardly any is used
/// until something happens. The code stays in the page cache, once for all supervisors.
pub fn rest() {
    // SAFETY: malloc_trim takes a number and may be called at any time.
    unsafe { libc::malloc_trim(0) };
    // Constants and code are private file mappings that nobody writes to: what is forgotten is mapped again from the same
    // file when it is used, this very code included.
    forget_pages((&raw const __executable_start).expose_provenance(), (&raw const etext).expose_provenance());
}

/// Gives the memory of a buffer back whose content is of no use any more; it reads as zeros afterwards.
pub fn forget_content(buffer: &mut [u8]) {
    // Exclusive access to plain bytes, for which zeros are as good; whole pages within the buffer only.
    let from = buffer.as_mut_ptr().expose_provenance();
    forget_pages(from, from + buffer.len());
}

/// The same for the unused part of a vector.
pub fn forget_spare(buffer: &mut Vec<u8>) {
    // Nobody may read spare capacity before writing it, so its content is of no use.
    let spare = buffer.spare_capacity_mut();
    let from = spare.as_mut_ptr().expose_provenance();
    forget_pages(from, from + spare.len());
}

/// Closes a child's copy of a descriptor that stays its parent's business. Whoever owns it in this copy of memory is never
/// dropped: a child ends by exec or `_exit`.
pub fn close_in_child(fd: &impl AsFd) {
    // SAFETY: closing takes a number; the owner does not close it again, see above, and does not use it.
    unsafe { libc::close(fd.as_fd().as_raw_fd()) };
}

/// Ends this process without running anything of the parent's.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit(2) takes a number and does not return.
    unsafe { libc::_exit(code) }
}

/// Replaces the program by an open file.
pub fn exec_fd(program: &OwnedFd, argv: &[CString]) -> Errno {
    let argv = pointers(argv);
    let no_env: [*const libc::c_char; 1] = [ptr::null()];
    // SAFETY: both arrays end with a null pointer and point to strings that live until the call returns, if it does.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program.as_raw_fd(),
            c"".as_ptr(),
            argv.as_ptr(),
            no_env.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
    }
    Errno::last()
}

fn pointers(texts: &[CString]) -> Vec<*const libc::c_char> {
    texts.iter().map(|text| text.as_ptr()).chain([ptr::null()]).collect()
}

/// No signal is ignored from now on, in this process and in its children: exec resets handlers, but what is ignored stays so.
pub fn ignore_no_signal() {
    for signal in 1..=64 {
        // SAFETY: SIG_DFL needs no code of ours; KILL, STOP and what glibc keeps for itself are refused, which is fine.
        unsafe {
            let mut known: libc::sigaction = std::mem::zeroed();
            let asked = libc::sigaction(signal, ptr::null(), &raw mut known);
            if asked == 0 && known.sa_sigaction == libc::SIG_IGN {
                libc::signal(signal, libc::SIG_DFL);
            }
        }
    }
}

/// No signal is blocked from now on.
pub fn unblock_signals() {
    // SAFETY: the set is initialised by sigemptyset before it is read, and the old mask is not asked for.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
    }
}

/// prctl with plain numbers.
fn prctl(option: libc::c_int, second: libc::c_ulong, third: libc::c_ulong) -> Result<()> {
    let zero: libc::c_ulong = 0;
    // SAFETY: every option that this module uses takes numbers only.
    Errno::result(unsafe { libc::prctl(option, second, third, zero, zero) })?;
    Ok(())
}

/// Orphans below this process become its children.
pub fn become_subreaper() -> Result<()> {
    prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0)
}

/// /proc/PID of this process is root's, and nobody may trace it.
pub fn forbid_tracing() -> Result<()> {
    prctl(libc::PR_SET_DUMPABLE, 0, 0)
}

/// This process is killed when its parent dies. A change of credentials clears it.
pub fn die_with_parent() -> Result<()> {
    prctl(libc::PR_SET_PDEATHSIG, 9, 0)
}

/// A change of the user leaves the permitted capabilities.
pub fn keep_capabilities(keep: bool) -> Result<()> {
    prctl(libc::PR_SET_KEEPCAPS, keep.into(), 0)
}

/// No exec grants anything from now on.
pub fn set_no_new_privs() -> Result<()> {
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0)
}

/// Takes a capability out of the bounding set; false when the kernel does not know it.
pub fn drop_bounding(capability: u32) -> Result<bool> {
    match prctl(libc::PR_CAPBSET_DROP, capability.into(), 0) {
        Ok(()) => Ok(true),
        Err(Errno::EINVAL) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// Empties the ambient set.
pub fn clear_ambient() -> Result<()> {
    prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as libc::c_ulong, 0)
}

/// Adds a capability to the ambient set.
pub fn raise_ambient(capability: u32) -> Result<()> {
    prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE as libc::c_ulong, capability.into())
}

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Default, Clone, Copy)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// _LINUX_CAPABILITY_VERSION_3.
const CAP_VERSION: u32 = 0x2008_0522;

/// Effective, permitted and inheritable capabilities of this process.
pub fn capabilities() -> Result<(u64, u64, u64)> {
    let mut header = CapHeader { version: CAP_VERSION, pid: 0 };
    let mut data = [CapData::default(); 2];
    // SAFETY: version 3 reads one header and writes two data structures, which these are.
    Errno::result(unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) })?;
    let whole = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    let [a, b] = data;
    Ok((whole(a.effective, b.effective), whole(a.permitted, b.permitted), whole(a.inheritable, b.inheritable)))
}

/// Sets them.
pub fn set_capabilities(effective: u64, permitted: u64, inheritable: u64) -> Result<()> {
    let mut header = CapHeader { version: CAP_VERSION, pid: 0 };
    // Truncation is meant: each structure has one half.
    #[allow(clippy::cast_possible_truncation)]
    let half = |shift: u32| CapData {
        effective: (effective >> shift) as u32,
        permitted: (permitted >> shift) as u32,
        inheritable: (inheritable >> shift) as u32,
    };
    let data = [half(0), half(32)];
    // SAFETY: version 3 reads one header and two data structures, which these are.
    Errno::result(unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) })?;
    Ok(())
}

/// Sets the supplementary groups, the group and the user of this thread, which is all there is of the process.
pub fn set_user(uid: u32, gid: u32, groups: &[u32]) -> Result<()> {
    // SAFETY: the kernel reads `groups.len()` 32-bit numbers from the slice.
    Errno::result(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) })?;
    // SAFETY: numbers only.
    Errno::result(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) })?;
    // SAFETY: numbers only.
    Errno::result(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) })?;
    Ok(())
}

/// Makes this process another user and group where it touches files. Its capabilities stay: without more, the change would take
/// those that concern files.
pub fn act_as(id: u32) -> Result<()> {
    let (effective, permitted, inheritable) = capabilities()?;
    let (user, group) = (Uid::from_raw(id), Gid::from_raw(id));
    setfsgid(group);
    setfsuid(user);
    // They do not say whether it was done, only who it was before.
    if setfsgid(group) != group || setfsuid(user) != user {
        return Err(Errno::EPERM);
    }
    set_capabilities(effective, permitted, inheritable)
}

/// Loads a seccomp filter: an array of `struct sock_filter` as bytes.
pub fn load_seccomp(filter: &[u8]) -> Result<()> {
    let size = size_of::<libc::sock_filter>();
    if filter.is_empty() || !filter.len().is_multiple_of(size) {
        return Err(Errno::EINVAL);
    }
    let instructions: Vec<libc::sock_filter> = filter
        .chunks_exact(size)
        .filter_map(|chunk| {
            let [c0, c1, jt, jf, k0, k1, k2, k3] = *chunk.first_chunk::<8>()?;
            let (code, k) = (u16::from_ne_bytes([c0, c1]), u32::from_ne_bytes([k0, k1, k2, k3]));
            Some(libc::sock_filter { code, jt, jf, k })
        })
        .collect();
    let length = u16::try_from(instructions.len()).map_err(|_| Errno::EINVAL)?;
    let program = libc::sock_fprog { len: length, filter: instructions.as_ptr().cast_mut() };
    // SAFETY: `program` points to `len` instructions that live until the call returns; the kernel copies and checks them.
    Errno::result(unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) })?;
    Ok(())
}

/// Marks every descriptor from `first` on close-on-exec.
pub fn close_from_on_exec(first: u32) -> Result<()> {
    // SAFETY: numbers only.
    Errno::result(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) })?;
    Ok(())
}

/// A resource limit of this process: what was before.
pub fn prlimit(resource: u32, new: Option<(u64, u64)>) -> Result<(u64, u64)> {
    let new = new.map(|(soft, hard)| libc::rlimit64 { rlim_cur: soft, rlim_max: hard });
    let mut old = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    let pointer = new.as_ref().map_or(ptr::null(), ptr::from_ref);
    // SAFETY: the kernel reads one rlimit64 where there is one, and writes one.
    Errno::result(unsafe { libc::syscall(libc::SYS_prlimit64, 0, resource, pointer, &raw mut old) })?;
    Ok((old.rlim_cur, old.rlim_max))
}

/// Opens the other side of a terminal by its master, whatever the file system shows now. Not as controlling terminal.
pub fn open_terminal_peer(master: BorrowedFd<'_>) -> Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: the argument is a number; the answer is a new descriptor or an error.
    let fd = Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) })?;
    // SAFETY: the kernel just made it, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Lets a terminal be opened by its master; a fresh one is locked.
pub fn unlock_terminal(master: BorrowedFd<'_>) -> Result<()> {
    let locked: libc::c_int = 0;
    // SAFETY: the kernel reads one int where there is one.
    Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const locked) })?;
    Ok(())
}

/// Tells a terminal its size; its foreground processes get SIGWINCH if that is news.
pub fn set_terminal_size(terminal: BorrowedFd<'_>, rows: u16, columns: u16) -> Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the kernel reads one winsize where there is one.
    Errno::result(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) })?;
    Ok(())
}

/// Makes stdin the controlling terminal of this session.
pub fn control_by_stdin() -> Result<()> {
    // SAFETY: numbers only.
    Errno::result(unsafe { libc::ioctl(libc::STDIN_FILENO, libc::TIOCSCTTY, 0) })?;
    Ok(())
}

/// What lies unread in a pipe.
pub fn unread_bytes(pipe: BorrowedFd<'_>) -> Result<u32> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the kernel writes one int where there is one.
    Errno::result(unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &raw mut bytes) })?;
    Ok(bytes.unsigned_abs())
}

/// The size of a pipe, as a wish.
pub fn widen_pipe(pipe: BorrowedFd<'_>, bytes: libc::c_int) {
    // SAFETY: numbers only; a refusal leaves the pipe as it is.
    unsafe { libc::fcntl(pipe.as_raw_fd(), libc::F_SETPIPE_SZ, bytes) };
}

// ------------------------------------------------------------------------------------------------------------ mounts

/// A mount that is not attached anywhere yet; it goes when its descriptor is closed.
pub type Tree = OwnedFd;

/// A copy of the mount at `path` (relative to `dir`; empty: `dir` itself), with those below it if `recursive`.
pub fn open_tree(dir: BorrowedFd<'_>, path: &CStr, recursive: bool) -> Result<Tree> {
    let mut flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH.cast_unsigned();
    if recursive {
        flags |= libc::AT_RECURSIVE.cast_unsigned();
    }
    // SAFETY: `path` is a C string that lives until the call returns.
    owned(unsafe { libc::syscall(libc::SYS_open_tree, dir.as_raw_fd(), path.as_ptr(), flags) })
}

/// Attaches a tree on what `target` is open on.
pub fn attach(tree: impl AsFd, target: impl AsFd) -> Result<()> {
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH;
    let (from, to) = (tree.as_fd().as_raw_fd(), target.as_fd().as_raw_fd());
    // SAFETY: both paths are empty C strings of static life.
    Errno::result(unsafe { libc::syscall(libc::SYS_move_mount, from, c"".as_ptr(), to, c"".as_ptr(), flags) })?;
    Ok(())
}

/// Changes flags (`MOUNT_ATTR_*`) and propagation (`MS_PRIVATE` …; 0: as it is) of a mount.
pub fn set_attributes(tree: impl AsFd, recursive: bool, set: u64, propagation: u64) -> Result<()> {
    mount_setattr(tree, recursive, &libc::mount_attr { attr_set: set, attr_clr: 0, propagation, userns_fd: 0 })
}

/// Shows a mount's ids as those of a user namespace. The mount must not be attached yet.
pub fn set_idmap(tree: impl AsFd, recursive: bool, users: BorrowedFd<'_>) -> Result<()> {
    let userns_fd = u64::from(users.as_raw_fd().cast_unsigned());
    let attributes = libc::mount_attr { attr_set: libc::MOUNT_ATTR_IDMAP, attr_clr: 0, propagation: 0, userns_fd };
    mount_setattr(tree, recursive, &attributes)
}

fn mount_setattr(tree: impl AsFd, recursive: bool, attributes: &libc::mount_attr) -> Result<()> {
    let mut flags = libc::AT_EMPTY_PATH;
    if recursive {
        flags |= libc::AT_RECURSIVE;
    }
    let size = size_of::<libc::mount_attr>();
    let fd = tree.as_fd().as_raw_fd();
    // SAFETY: the path is an empty C string, and `attributes` is a mount_attr of the size given.
    Errno::result(unsafe {
        libc::syscall(libc::SYS_mount_setattr, fd, c"".as_ptr(), flags, &raw const *attributes, size)
    })?;
    Ok(())
}

/// Commands of fsconfig(2).
const FSCONFIG_SET_FLAG: libc::c_uint = 0;
const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;

/// A new file system with options (`key=value` or `key`) and mount flags.
pub fn new_mount(kind: &CStr, options: &[(CString, Option<CString>)], attributes: u64) -> Result<Tree> {
    // SAFETY: `kind` is a C string.
    let context = owned(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), FSOPEN_CLOEXEC) })?;
    let fd = context.as_raw_fd();
    let config = |command: libc::c_uint, key: *const libc::c_char, value: *const libc::c_char| {
        // SAFETY: keys and values are null or C strings that live until the call returns, as each command wants.
        Errno::result(unsafe { libc::syscall(libc::SYS_fsconfig, fd, command, key, value, 0) })
    };
    for (key, value) in options {
        match value {
            Some(value) => config(FSCONFIG_SET_STRING, key.as_ptr(), value.as_ptr())?,
            None => config(FSCONFIG_SET_FLAG, key.as_ptr(), ptr::null())?,
        };
    }
    config(FSCONFIG_CMD_CREATE, ptr::null(), ptr::null())?;
    // SAFETY: numbers only.
    owned(unsafe { libc::syscall(libc::SYS_fsmount, fd, FSMOUNT_CLOEXEC, attributes) })
}
