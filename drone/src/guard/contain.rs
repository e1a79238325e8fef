//! What holds a backend and everything it starts: a PID namespace where the guard may make one. And who holds the hard
//! deadline beside the guard, which may be stopped, or blocked while it starts the backend: the namespace's init, or a
//! watcher where there is no namespace.

use super::deadline::SharedDeadline;
use crate::clock::{BootTimer, boot_ms};
use crate::processes::{self, Process};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal, kill, killpg};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, pipe, read, write};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// How often a watcher looks for what is left after the hard deadline.
const WATCHER_KILL_INTERVAL: Duration = Duration::from_millis(20);
/// A watcher that has found nothing so often in a row has done its work: what was being forked during one look is seen
/// by the next.
const WATCHER_EMPTY_LOOKS: u32 = 2;

/// Most that one process of a guard logs in its life, in bytes.
const LOG_BYTES_MAX: usize = 256 * 1024;

/// What [`contain`] has achieved.
#[derive(Debug)]
pub enum Container {
    /// A PID namespace with this init.
    Namespace(Pid),
    /// Only the process tree below the guard.
    Tree {
        /// Why.
        problem: String,
        /// Kills the tree at the hard deadline if the guard does not; missing if it could not be forked.
        watcher: Option<Pid>,
    },
}

/// Makes a PID namespace for later children, with an init that dies with this process and at the deadline, or says why
/// it cannot. This process must have a single thread.
pub fn contain(deadline: &SharedDeadline) -> Container {
    // Orphans of the tree become ours in any case. Inside a namespace they become its init's.
    if let Err(e) = prctl::set_child_subreaper(true) {
        log_line(&format!("cannot become a subreaper: {e}"));
    }
    let with_mounts = CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS;
    let own_mounts = match unshare(with_mounts) {
        Ok(()) => true,
        Err(_) => match unshare(CloneFlags::CLONE_NEWPID) {
            Ok(()) => false,
            Err(e) => return tree(format!("no PID namespace: {e}"), deadline),
        },
    };
    match start_init(own_mounts, deadline) {
        Ok(init) => Container::Namespace(init),
        // Children of ours would go to a namespace without an init: without a namespace for children again, the
        // backend could not be started at all. The caller reports that.
        Err(e) => tree(format!("no init for the PID namespace: {e}"), deadline),
    }
}

fn tree(problem: String, deadline: &SharedDeadline) -> Container {
    let watcher = match start_watcher(deadline) {
        Ok(watcher) => Some(watcher),
        Err(e) => {
            log_line(&format!("no watcher, so that the deadline is the guard's alone: {e}"));
            None
        }
    };
    Container::Tree { problem, watcher }
}

/// Forks a process that kills the tree of this one at the deadline.
fn start_watcher(deadline: &SharedDeadline) -> nix::Result<Pid> {
    let guard = Pid::this();
    // SAFETY: a guard has one thread, so the child may do everything the parent may.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            let _ = prctl::set_name(c"holdfast-watch");
            if prctl::set_pdeathsig(Signal::SIGKILL).is_err() || Pid::parent() != guard {
                exit_now(1);
            }
            detach_stdio();
            // If it cannot wait it kills now: what nobody watches over must not run.
            if let Err(e) = until_deadline(deadline, || {}) {
                log_line(&format!("the watcher cannot wait: {e}"));
            }
            let mut empty_looks = 0;
            while empty_looks < WATCHER_EMPTY_LOOKS {
                let alive = kill_descendants(guard, Some(Pid::this()));
                empty_looks = if alive { 0 } else { empty_looks + 1 };
                std::thread::sleep(WATCHER_KILL_INTERVAL);
            }
            exit_now(0);
        }
    }
}

/// Kills what lives below a process, but for one; whether anything did.
fn kill_descendants(root: Pid, except: Option<Pid>) -> bool {
    let below = processes::descendants(&processes::all(), root.as_raw());
    let is_target = |p: &&Process| !p.zombie && except.is_none_or(|except| except.as_raw() != p.pid);
    let targets: Vec<&Process> = below.iter().filter(is_target).collect();
    for target in &targets {
        let _ = kill(Pid::from_raw(target.pid), Signal::SIGKILL);
    }
    !targets.is_empty()
}

/// Waits until the deadline, wherever it is moved to, and calls `on_child_end` at first and after children's ends.
/// SIGCHLD is blocked, as the guard had it.
fn until_deadline(deadline: &SharedDeadline, on_child_end: impl Fn()) -> io::Result<()> {
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    let signals = SignalFd::with_flags(&children, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    let timer = BootTimer::new()?;
    loop {
        on_child_end();
        // A deadline that was put off is found out at the earlier one; the timer wakes us then.
        let hard_boot_ms = deadline.get();
        if boot_ms() >= hard_boot_ms {
            return Ok(());
        }
        timer.arm(Some(hard_boot_ms))?;
        let poll = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut fds = [poll(signals.as_raw_fd()), poll(timer.as_raw_fd())];
        // SAFETY: `fds` is a valid array of its length.
        let rc = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
        if rc < 0 && Errno::last() != Errno::EINTR {
            return Err(Errno::last().into());
        }
        timer.clear()?;
        while signals.read_signal()?.is_some() {}
    }
}

/// Forks the namespace's init and waits until it is bound to this process.
fn start_init(own_mounts: bool, deadline: &SharedDeadline) -> nix::Result<Pid> {
    let (bound_read, bound_write) = pipe()?;
    // SAFETY: a guard has one thread, so the child may do everything the parent may.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => {
            drop(bound_write);
            match read(&bound_read, &mut [0u8]) {
                Ok(1) => Ok(child),
                Ok(_) => Err(Errno::ECHILD),
                Err(e) => Err(e),
            }
        }
        ForkResult::Child => {
            drop(bound_read);
            let _ = prctl::set_name(c"holdfast-init");
            if prctl::set_pdeathsig(Signal::SIGKILL).is_err() {
                exit_now(1);
            }
            if own_mounts {
                mount_proc();
            }
            // The pipes belong to the guard alone: their ends must be seen when it dies.
            detach_stdio();
            // If the guard died before PDEATHSIG was set, nobody reads this and init ends here. (In the namespace
            // getppid() is 0 whether or not the parent lives.)
            if write(&bound_write, &[1]).is_err() {
                exit_now(1);
            }
            drop(bound_write);
            // The end of init is the end of the whole namespace, also of a backend before its exec.
            match until_deadline(deadline, reap_orphans) {
                Ok(()) => exit_now(0),
                Err(e) => {
                    log_line(&format!("the namespace's init cannot wait: {e}"));
                    exit_now(1);
                }
            }
        }
    }
}

/// Replaces stdin and stdout by `/dev/null`.
pub fn detach_stdio() {
    if let Ok(null) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null") {
        for fd in [libc::STDIN_FILENO, libc::STDOUT_FILENO] {
            // SAFETY: plain descriptor numbers of this process; nothing in it owns 0 and 1 as Rust objects across this.
            unsafe { libc::dup2(null.as_fd().as_raw_fd(), fd) };
        }
    }
}

/// Shows the namespace's own processes in `/proc`, in a mount namespace of its own. Programs that look at `/proc` by
/// their process number need it; the rest does not, so a failure is only noted.
fn mount_proc() {
    let none: Option<&str> = None;
    let result = mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none).and_then(|()| {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("proc"), "/proc", Some("proc"), flags, none)
    });
    if let Err(e) = result {
        log_line(&format!("the backend sees the machine's /proc, not its own: {e}"));
    }
}

fn reap_orphans() {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(_) => break,
            Ok(_) => {}
        }
    }
}

/// Ends a forked process.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: ends the process without running the guard's destructors, which are not the child's.
    unsafe { libc::_exit(code) }
}

/// Kills everything below the guard. Called again until nothing is left to wait for: a process tree may grow while it is
/// walked.
pub fn kill_all(container: &Container, backend: Option<Pid>) {
    match container {
        // The kernel kills whatever is in the namespace, and init's end is complete only when all of it is gone.
        Container::Namespace(init) => {
            let _ = kill(*init, Signal::SIGKILL);
        }
        Container::Tree { watcher, .. } => {
            if let Some(backend) = backend {
                let _ = killpg(backend, Signal::SIGKILL);
            }
            // The watcher last: until then it is there should we be stopped.
            if !kill_descendants(Pid::this(), *watcher)
                && let Some(watcher) = watcher
            {
                let _ = kill(*watcher, Signal::SIGKILL);
            }
        }
    }
}

/// Adds a line to the guard's log, its standard error, up to [`LOG_BYTES_MAX`] by each of its processes.
pub fn log_line(text: &str) {
    static LOGGED_BYTES: AtomicUsize = AtomicUsize::new(0);
    let line = format!("guard {}: {text}", std::process::id());
    let before = LOGGED_BYTES.fetch_add(line.len(), Ordering::Relaxed);
    match before {
        LOG_BYTES_MAX.. => {}
        _ if before + line.len() >= LOG_BYTES_MAX => {
            holdfast_logging::line(&format!("{line}\nguard {}: no more is logged", std::process::id()));
        }
        _ => holdfast_logging::line(&line),
    }
}
