//! What a backend sees of the file system: everything but the drone's data directory, of which it sees its own working
//! directory alone, at its usual place. So it can neither remove the drone's control files nor connect to a guard.
//!
//! ```text
//!   DATA_DIR (tmpfs, read-only)/backends/<id>/work ──▶ the real one, writable
//! ```
//!
//! This is done in the backend's own mount namespace, between fork and exec, so every step is a system call alone. It
//! protects against mistakes of a backend that runs as root, and not against one that undoes its mounts on purpose: that
//! one is met by the guard, which listens to nothing in its backend's PID namespace.

use nix::errno::Errno;
use std::ffi::{CStr, CString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// Of the file system that hides the data directory: room for the three directories that lead to a working directory.
const HIDING_OPTIONS: &CStr = c"size=64k,nr_inodes=16,mode=0755";
/// `open_tree(2)`: a copy of the mount; closed on exec (`O_CLOEXEC`).
const OPEN_TREE_FLAGS: libc::c_uint = 1 | libc::O_CLOEXEC as libc::c_uint;
/// `move_mount(2)`: the source is the descriptor itself.
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 4;

/// The mounts to make for one backend.
#[derive(Debug)]
pub(super) struct Isolation {
    hidden: CString,
    work: CString,
    /// The directories from `hidden` (not included) down to `work`.
    below: Vec<CString>,
}

impl Isolation {
    /// Hides the directory `hidden` but for `work`, which is below it.
    pub(super) fn new(hidden: &Path, work: &Path) -> io::Result<Self> {
        let text = |path: &Path| CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other);
        let inner = work.strip_prefix(hidden).map_err(io::Error::other)?;
        let mut below = Vec::new();
        let mut path = hidden.to_owned();
        for part in inner.components() {
            path.push(part);
            below.push(text(&path)?);
        }
        Ok(Self { hidden: text(hidden)?, work: text(work)?, below })
    }

    /// Makes the mounts, in a mount namespace of this process's own. Async-signal-safe.
    pub(super) fn enter(&self) -> io::Result<()> {
        own_mounts()?;
        mount_proc()?;
        // SAFETY: a valid C string; returns a new descriptor or -1.
        let tree = check(unsafe {
            libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, self.work.as_ptr(), OPEN_TREE_FLAGS)
        })?;
        let hiding = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
        mount(Some(c"holdfast"), &self.hidden, Some(c"tmpfs"), hiding, Some(HIDING_OPTIONS))?;
        for dir in &self.below {
            // SAFETY: a valid C string.
            check(unsafe { libc::mkdir(dir.as_ptr(), 0o755) }.into())?;
        }
        // SAFETY: an open descriptor and valid C strings.
        check(unsafe {
            let (empty, work) = (c"".as_ptr(), self.work.as_ptr());
            libc::syscall(libc::SYS_move_mount, tree, empty, libc::AT_FDCWD, work, MOVE_MOUNT_F_EMPTY_PATH)
        })?;
        mount(None, &self.hidden, None, libc::MS_REMOUNT | libc::MS_BIND | libc::MS_RDONLY | hiding, None)
    }
}

/// Gives this process a mount namespace whose changes stay in it.
fn own_mounts() -> io::Result<()> {
    // SAFETY: a flag alone.
    check(unsafe { libc::unshare(libc::CLONE_NEWNS) }.into())?;
    mount(None, c"/", None, libc::MS_REC | libc::MS_SLAVE, None)
}

/// Shows the processes of this process's own PID namespace in `/proc`.
fn mount_proc() -> io::Result<()> {
    let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    mount(Some(c"proc"), c"/proc", Some(c"proc"), flags, None)
}

/// Without isolation: shows a backend its own processes all the same, where that is possible. Async-signal-safe.
pub(super) fn show_own_processes() {
    let _ = own_mounts().and_then(|()| mount_proc());
}

/// Changes the working directory. Async-signal-safe.
pub(super) fn change_dir(path: &CStr) -> io::Result<()> {
    // SAFETY: a valid C string.
    check(unsafe { libc::chdir(path.as_ptr()) }.into()).map(drop)
}

fn mount(
    source: Option<&CStr>,
    target: &CStr,
    kind: Option<&CStr>,
    flags: libc::c_ulong,
    options: Option<&CStr>,
) -> io::Result<()> {
    let pointer = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
    // SAFETY: valid C strings or null.
    let rc = unsafe {
        libc::mount(pointer(source), target.as_ptr(), pointer(kind), flags, pointer(options).cast())
    };
    check(rc.into()).map(drop)
}

fn check(rc: libc::c_long) -> io::Result<libc::c_long> {
    if rc < 0 { Err(Errno::last().into()) } else { Ok(rc) }
}

/// Whether backends can be kept from the drone's files below `data_dir`: tries it, in a process that ends at once.
pub fn probe(data_dir: &Path) -> io::Result<()> {
    let work = data_dir.join("probe").join("work");
    std::fs::create_dir_all(&work)?;
    let isolation = Isolation::new(data_dir, &work)?;
    let mut command = Command::new("/proc/self/exe");
    // A guard without anything to do.
    command.arg(super::GUARD_ARGUMENT).stdin(Stdio::piped()).stdout(Stdio::null());
    // SAFETY: only async-signal-safe calls between fork and exec.
    unsafe {
        command.pre_exec(move || {
            check(libc::unshare(libc::CLONE_NEWPID).into())?;
            isolation.enter()
        });
    }
    let probed = command.spawn().and_then(|mut child| child.wait()).map(drop);
    std::fs::remove_dir_all(data_dir.join("probe"))?;
    probed
}
