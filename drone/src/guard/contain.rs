//! What holds a backend and everything it starts: a PID namespace where the guard may make one. And who holds the hard
//! deadline beside the guard, which may be stopped, or blocked while it starts the backend: the namespace's init, or a
//! watcher where there is no namespace.

use super::deadline::SharedDeadline;
use crate::clock::{BootTimer, boot_ms};
use crate::processes::{self, Process};
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal, kill, killpg};
use nix::sys::signalfd::{SfdFlags, SignalFd, siginfo};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, pipe, read, write};
use std::collections::BTreeSet;
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

/// Asks the namespace's init to send SIGTERM to everything in its namespace.
const TERM_ALL: Signal = Signal::SIGTERM;
/// Tells the namespace's init that the main process has ended, so that it is to end as soon as nothing else is left.
const END_IF_ALONE: Signal = Signal::SIGUSR1;
/// Most walks over a process tree to find what was forked during the one before.
const TERM_WALKS_MAX: u32 = 5;

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
/// it cannot. This process must have a single thread. It keeps the machine's mounts; the backend gets its own later.
pub fn contain(deadline: &SharedDeadline) -> Container {
    // Orphans of the tree become ours in any case. Inside a namespace they become its init's.
    if let Err(e) = prctl::set_child_subreaper(true) {
        log_line(&format!("cannot become a subreaper: {e}"));
    }
    if let Err(e) = unshare(CloneFlags::CLONE_NEWPID) {
        return tree(format!("no PID namespace: {e}"), deadline);
    }
    match start_init(deadline) {
        Ok(init) => Container::Namespace(init),
        // Children of ours would go to a namespace without an init: without a namespace for children again, the
        // backend could not be started at all. The caller reports that.
        Err(e) => tree(format!("no init for the PID namespace: {e}"), deadline),
    }
}

/// The backend was started: later children of the guard, if any, and its threads are not meant for the namespace.
pub fn leave_namespace(container: &Container) {
    if !matches!(container, Container::Namespace(_)) {
        return;
    }
    let own =
        std::fs::File::open("/proc/self/ns/pid").map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(0)));
    if let Err(e) = own.and_then(|own| setns(own, CloneFlags::CLONE_NEWPID)) {
        log_line(&format!("cannot leave the PID namespace: {e}"));
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
            if let Err(e) = until_deadline(deadline, |_| false) {
                log_line(&format!("the watcher cannot wait: {e}"));
            }
            let mut empty_looks = 0;
            while empty_looks < WATCHER_EMPTY_LOOKS {
                match kill_descendants(guard, Some(Pid::this())) {
                    Ok(false) => empty_looks += 1,
                    Ok(true) => empty_looks = 0,
                    Err(e) => {
                        log_line(&format!("the watcher cannot look for what is left: {e}"));
                        empty_looks = 0;
                    }
                }
                std::thread::sleep(WATCHER_KILL_INTERVAL);
            }
            exit_now(0);
        }
    }
}

/// Kills what lives below a process, but for one; whether anything did. An error says that something may.
fn kill_descendants(root: Pid, except: Option<Pid>) -> io::Result<bool> {
    let below = processes::descendants(&processes::all()?, root.as_raw());
    let is_target = |p: &&Process| !p.zombie && except.is_none_or(|except| except.as_raw() != p.pid);
    let targets: Vec<&Process> = below.iter().filter(is_target).collect();
    for target in &targets {
        let _ = kill(Pid::from_raw(target.pid), Signal::SIGKILL);
    }
    Ok(!targets.is_empty())
}

/// Waits until the deadline, wherever it is moved to, or until `is_done`, which is called at first and after signals, with
/// those. All signals are blocked, as the guard had them.
fn until_deadline(deadline: &SharedDeadline, mut is_done: impl FnMut(&[siginfo]) -> bool) -> io::Result<()> {
    let mut awaited = SigSet::empty();
    for signal in [Signal::SIGCHLD, TERM_ALL, END_IF_ALONE] {
        awaited.add(signal);
    }
    let signals = SignalFd::with_flags(&awaited, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    let timer = BootTimer::new()?;
    let mut received = Vec::new();
    loop {
        if is_done(&received) {
            return Ok(());
        }
        received.clear();
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
        while let Some(signal) = signals.read_signal()? {
            received.push(signal);
        }
    }
}

/// Forks the namespace's init and waits until it is bound to this process.
fn start_init(deadline: &SharedDeadline) -> nix::Result<Pid> {
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
            // The pipes belong to the guard alone: their ends must be seen when it dies.
            detach_stdio();
            // If the guard died before PDEATHSIG was set, nobody reads this and init ends here. (In the namespace
            // getppid() is 0 whether or not the parent lives.)
            if write(&bound_write, &[1]).is_err() {
                exit_now(1);
            }
            drop(bound_write);
            // The end of init is the end of the whole namespace, also of a backend before its exec.
            let mut main_has_ended = false;
            let is_done = |signals: &[siginfo]| {
                // A sender outside of the namespace has no number in it: the guard. Others have no say here.
                let is_guards = |signal: &&siginfo| signal.ssi_pid == 0 && signal.ssi_code == libc::SI_USER;
                for signal in signals.iter().filter(is_guards) {
                    if signal.ssi_signo == TERM_ALL as u32 {
                        let _ = kill(Pid::from_raw(-1), Signal::SIGTERM);
                    } else if signal.ssi_signo == END_IF_ALONE as u32 {
                        main_has_ended = true;
                    }
                }
                reap_orphans();
                // The last one to end is init's child, so that SIGCHLD tells of it.
                main_has_ended && kill(Pid::from_raw(-1), None) == Err(Errno::ESRCH)
            };
            match until_deadline(deadline, is_done) {
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

/// Asks every process of the backend to end, once.
pub fn term_all(container: &Container, backend: Pid) {
    match container {
        Container::Namespace(init) => {
            let _ = kill(*init, TERM_ALL);
        }
        Container::Tree { watcher, .. } => {
            if let Err(e) = term_descendants(*watcher) {
                log_line(&format!("cannot look for the backend's processes; asking its group to end: {e}"));
                let _ = killpg(backend, Signal::SIGTERM);
            }
        }
    }
}

fn term_descendants(watcher: Option<Pid>) -> io::Result<()> {
    let mut asked: BTreeSet<i32> = watcher.map(Pid::as_raw).into_iter().collect();
    for _ in 0..TERM_WALKS_MAX {
        let below = processes::descendants(&processes::all()?, Pid::this().as_raw());
        let new: Vec<i32> = below.iter().map(|p| p.pid).filter(|pid| asked.insert(*pid)).collect();
        if new.is_empty() {
            break;
        }
        for pid in new {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
    }
    Ok(())
}

/// The main process has ended, and the rest may take its time: ends what is Holdfast's own once nothing of the backend is
/// left. Called after each child's end.
pub fn end_if_alone(container: &Container) -> io::Result<()> {
    match container {
        Container::Namespace(init) => {
            let _ = kill(*init, END_IF_ALONE);
        }
        Container::Tree { watcher, .. } => {
            let own = Pid::this().as_raw();
            let is_rest =
                |p: &Process| p.parent == own && !p.zombie && watcher.is_none_or(|w| w.as_raw() != p.pid);
            if let Some(watcher) = watcher
                && !processes::all()?.iter().any(is_rest)
            {
                let _ = kill(*watcher, Signal::SIGKILL);
            }
        }
    }
    Ok(())
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
            match (kill_descendants(Pid::this(), *watcher), watcher) {
                // The watcher last: until then it is there should we be stopped.
                (Ok(false), Some(watcher)) => {
                    let _ = kill(*watcher, Signal::SIGKILL);
                }
                (Ok(_), _) => {}
                (Err(e), _) => log_line(&format!("cannot look for what is left: {e}")),
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
