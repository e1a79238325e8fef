//! The guard's deputy: a process that the guard forks before it has its container started, and that does nothing as long as
//! the guard lives and the hard deadline is ahead. When either ends it kills the container. So a guard that is stopped
//! holds no deadline up, and the death of the guard is the death of the container, which is no child of either.

use super::ContainerTarget;
use super::contain::{detach_stdio, exit_now, log_line};
use super::deadline::SharedDeadline;
use super::engine;
use crate::cgroup;
use crate::clock::{BootTimer, boot_ms};
use crate::processes;
use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

/// Time between two looks at the machine's processes, in milliseconds: at first, and at most. It doubles.
const LOOK_MS_MIN: i64 = 20;
const LOOK_MS_MAX: i64 = 1_000;
/// Longest time for an answer of the engine, in milliseconds.
const ENGINE_MS_MAX: i64 = 2_000;
/// Nothing is left when nothing was seen so often in a row: what was being forked during one look is seen by the next.
const EMPTY_LOOKS: u32 = 2;

/// See the module.
#[derive(Debug)]
pub(super) struct Deputy {
    pid: Pid,
    deadline: SharedDeadline,
}

impl Deputy {
    /// Forks it. This process must have a single thread.
    pub(super) fn start(target: &ContainerTarget, hard_boot_ms: i64) -> io::Result<Self> {
        let deadline = SharedDeadline::new(hard_boot_ms)?;
        let own = Pid::this().as_raw();
        let guard = processes::handle(own)?.ok_or_else(|| io::Error::other("this process is not there"))?;
        // SAFETY: a guard has one thread, so the child may do everything the parent may.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => Ok(Self { pid: child, deadline }),
            ForkResult::Child => {
                let _ = prctl::set_name(c"holdfast-deputy");
                // The pipes belong to the guard alone: their ends must be seen when it dies.
                detach_stdio();
                // If it cannot wait it kills now: what nobody watches over must not run.
                if let Err(e) = wait(&guard, &deadline) {
                    log_line(&format!("the deputy cannot wait: {e}"));
                }
                let mut looks = Looks::new();
                loop {
                    let permit_gone = remove_permit(&target.permit);
                    if looks.look(&target.id, boot_ms()) && permit_gone {
                        // What the engine says runs, and was never seen here, the engine alone can end.
                        if looks.seen || !says_running(target) {
                            exit_now(0);
                        }
                        remove(target);
                    }
                    let pause_ms = u64::try_from(looks.at - boot_ms()).unwrap_or(0).max(1);
                    std::thread::sleep(Duration::from_millis(pause_ms));
                }
            }
        }
    }

    /// Moves the deadline.
    pub(super) fn set(&self, hard_boot_ms: i64) {
        self.deadline.set(hard_boot_ms);
    }

    /// Ends it: the container is gone.
    pub(super) fn dismiss(self) {
        let _ = kill(self.pid, Signal::SIGKILL);
        let _ = waitpid(self.pid, None);
    }
}

/// Waits until the guard has ended, or the deadline has come.
fn wait(guard: &OwnedFd, deadline: &SharedDeadline) -> io::Result<()> {
    let timer = BootTimer::new()?;
    loop {
        // A deadline that was put off is found out at the earlier one; the timer wakes us then.
        let hard_boot_ms = deadline.get();
        if boot_ms() >= hard_boot_ms {
            return Ok(());
        }
        timer.arm(Some(hard_boot_ms))?;
        let poll = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut fds = [poll(guard.as_raw_fd()), poll(timer.as_raw_fd())];
        // SAFETY: `fds` is a valid array of its length.
        let rc = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
        if rc < 0 && Errno::last() != Errno::EINTR {
            return Err(Errno::last().into());
        }
        if fds[0].revents != 0 {
            return Ok(());
        }
        timer.clear()?;
    }
}

/// Whether the engine says that the container runs. One that does not answer says nothing.
fn says_running(target: &ContainerTarget) -> bool {
    let path = format!("/containers/{}/json", target.id);
    match engine::ask(&target.engine, "GET", &path, ENGINE_MS_MAX) {
        Ok(answer) => answer.is_success() && engine::is_running(&answer),
        Err(e) => {
            log_line(&format!("the deputy asks whether the container runs: {e}"));
            false
        }
    }
}

/// Has the engine kill and remove the container, if it can.
fn remove(target: &ContainerTarget) {
    let path = format!("/containers/{}?force=true&v=true", target.id);
    if let Err(e) = engine::ask(&target.engine, "DELETE", &path, ENGINE_MS_MAX) {
        log_line(&format!("the deputy asks for the container's removal: {e}"));
    }
}

/// Removes the file without which nobody can start the container; whether it is gone.
pub(super) fn remove_permit(permit: &Path) -> bool {
    match std::fs::remove_file(permit) {
        Ok(()) => true,
        Err(e) if e.kind() == io::ErrorKind::NotFound => true,
        Err(e) => {
            log_line(&format!("cannot remove the permit: {e}"));
            false
        }
    }
}

/// Looks at the machine's processes: rarer and rarer, since each costs.
#[derive(Debug)]
pub(super) struct Looks {
    /// When the next is due, in milliseconds of `CLOCK_BOOTTIME`.
    pub(super) at: i64,
    interval_ms: i64,
    empty: u32,
    /// Something was seen at least once: a look that sees nothing means something.
    pub(super) seen: bool,
}

impl Looks {
    pub(super) fn new() -> Self {
        Self { at: i64::MIN, interval_ms: LOOK_MS_MIN, empty: 0, seen: false }
    }

    /// Kills what belongs to the container if a look is due; whether it is sure that nothing does.
    pub(super) fn look(&mut self, container: &str, now: i64) -> bool {
        if now >= self.at {
            self.at = now + self.interval_ms;
            match cgroup::kill_all(container) {
                Ok(0) => {
                    self.empty += 1;
                    self.interval_ms = (self.interval_ms * 2).min(LOOK_MS_MAX);
                }
                Ok(_) => *self = Self { at: now + LOOK_MS_MIN, seen: true, ..Self::new() },
                Err(e) => {
                    log_line(&format!("cannot look for the container's processes: {e}"));
                    self.empty = 0;
                }
            }
        }
        self.empty >= EMPTY_LOOKS
    }
}
