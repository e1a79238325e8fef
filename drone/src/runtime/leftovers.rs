//! What a killed guard leaves behind, and how it is ended and reaped.
//!
//! The drone is a child subreaper: what a dead guard has started comes to it. So every child of the drone that is no
//! guard (and was not there before the drone: a shell may `exec` it) was left by a guard.

use super::watcher::{HUNT_EMPTY_LOOKS, HUNT_INTERVAL};
use crate::data_dir::BackendsDir;
use crate::ports::between_trials;
use crate::processes::{self, Process};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use std::collections::{BTreeSet, HashSet};
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::process::{Child, Command};
use tracing::warn;

/// The children of this process that nobody left behind: guards, and what was there before.
#[derive(Debug, Clone)]
pub(super) struct Family {
    own_pid: i32,
    /// Held while children are started, looked for and reaped: so no number changes its meaning meanwhile.
    known: Arc<Mutex<HashSet<i32>>>,
}

/// A guard that counts as known until this is dropped, which has to be after it was reaped.
#[derive(Debug)]
pub(super) struct KnownGuard {
    family: Family,
    pid: Option<i32>,
}

impl Drop for KnownGuard {
    fn drop(&mut self) {
        if let Some(pid) = self.pid {
            self.family.known().remove(&pid);
        }
    }
}

impl Family {
    /// With the children that are there already.
    pub(super) fn new() -> io::Result<Self> {
        let own_pid = Pid::this().as_raw();
        let children = processes::all()?.into_iter().filter(|p| p.parent == own_pid).map(|p| p.pid);
        Ok(Self { own_pid, known: Arc::new(Mutex::new(children.collect())) })
    }

    fn known(&self) -> MutexGuard<'_, HashSet<i32>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a guard.
    pub(super) fn spawn(&self, command: &mut Command) -> io::Result<(Child, KnownGuard)> {
        let mut known = self.known();
        let child = between_trials(|| command.spawn())?;
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
        known.extend(pid);
        drop(known);
        Ok((child, KnownGuard { family: self.clone(), pid }))
    }

    /// Reaps what was left and has ended. What cannot be looked at now is reaped the next time.
    pub(super) fn reap(&self) {
        let known = self.known();
        let left = processes::all().and_then(|all| self.left(&known, &all));
        for left in left.unwrap_or_default() {
            reap(left.pid);
        }
    }

    /// Kills what has the backend's mark in its environment, and everything that was left behind, whoever's it was; whether
    /// there was anything. An error says that there may be more than was seen.
    pub(super) fn hunt(&self, mark: &str) -> io::Result<bool> {
        let known = self.known();
        let all = processes::all()?;
        let (mut targets, unseen) = split(&all, |process| processes::has_variable(process.pid, mark));
        for left in self.left(&known, &all)? {
            targets.insert(left.pid);
            targets.extend(processes::descendants(&all, left.pid).iter().map(|p| p.pid));
        }
        for pid in &targets {
            let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
            reap(*pid);
        }
        unseen.map_or(Ok(!targets.is_empty()), Err)
    }

    fn left(&self, known: &HashSet<i32>, all: &[Process]) -> io::Result<Vec<Process>> {
        // In a process that is no subreaper, other children are its own business.
        if !prctl::get_child_subreaper()? {
            return Ok(Vec::new());
        }
        Ok(all.iter().filter(|p| p.parent == self.own_pid && !known.contains(&p.pid)).copied().collect())
    }
}

/// Those that fit, and the first error of one that could not be judged.
fn split(all: &[Process], fits: impl Fn(&Process) -> io::Result<bool>) -> (BTreeSet<i32>, Option<io::Error>) {
    let (mut fitting, mut unseen) = (BTreeSet::new(), None);
    for process in all {
        match fits(process) {
            Ok(true) => {
                fitting.insert(process.pid);
            }
            Ok(false) => {}
            Err(e) => unseen = unseen.or(Some(e)),
        }
    }
    (fitting, unseen)
}

/// Kills a backend's guard, whoever started it, and what has the backend's mark in its environment, until nothing is found any
/// more and nothing holds the backend's directory.
pub(super) async fn end_left(dirs: BackendsDir, backend: String) {
    let mut hunted = Hunted::new(&backend);
    while !hunted.is_over() {
        let (dirs, id, mark) = (dirs.clone(), backend.clone(), dirs.mark(&backend));
        let look = move || {
            let (left, unseen) = split(&processes::all()?, |process| {
                let pid = process.pid;
                Ok(!process.zombie && (is_of_guard(pid, &dirs, &id)? || processes::has_variable(pid, &mark)?))
            });
            for pid in &left {
                let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
            }
            unseen.map_or(Ok(!left.is_empty() || dirs.is_guarded(&id)), Err)
        };
        let looked = tokio::task::spawn_blocking(look).await;
        hunted.note(looked.map_err(io::Error::other).flatten());
        tokio::time::sleep(HUNT_INTERVAL).await;
    }
}

/// The looks of a hunt so far. It is over when nothing was found so often in a row; a look that failed found nothing out.
pub(super) struct Hunted<'a> {
    backend: &'a str,
    empty_looks: u32,
    failed: bool,
}

impl<'a> Hunted<'a> {
    pub(super) fn new(backend: &'a str) -> Self {
        Self { backend, empty_looks: 0, failed: false }
    }

    pub(super) fn is_over(&self) -> bool {
        self.empty_looks >= HUNT_EMPTY_LOOKS
    }

    /// Takes notice of a look: whether it found anything.
    pub(super) fn note(&mut self, look: io::Result<bool>) {
        match look {
            Ok(false) => self.empty_looks += 1,
            Ok(true) => self.empty_looks = 0,
            Err(e) => {
                if !self.failed {
                    warn!(
                        backend = self.backend,
                        "cannot look for what is left of it, so it is not reported as ended: {e}"
                    );
                }
                self.failed = true;
                self.empty_looks = 0;
            }
        }
    }
}

/// Whether a process is a backend's guard, or was forked by it (as the namespace's init is): by its command line, which
/// is cheap, and by its standard error, which is the log in this backend's directory and no other drone's.
pub(super) fn is_of_guard(pid: i32, dirs: &BackendsDir, backend: &str) -> io::Result<bool> {
    let command = [b"holdfast-drone\0guard\0", backend.as_bytes(), b"\0"].concat();
    if processes::read(pid, "cmdline")?.is_none_or(|found| found != command) {
        return Ok(false);
    }
    let stderr = match processes::if_there(std::fs::read_link(format!("/proc/{pid}/fd/2"))) {
        Ok(stderr) => stderr,
        Err(e) => return if processes::is_foreign(pid)? { Ok(false) } else { Err(e) },
    };
    let log = dirs.guard_log(backend).into_os_string().into_vec();
    // The kernel says so of a file that was removed.
    let removed = [log.as_slice(), b" (deleted)"].concat();
    Ok(stderr.is_some_and(|stderr| {
        let stderr = stderr.into_os_string().into_vec();
        stderr == log || stderr == removed
    }))
}

/// Reaps a process that has ended, if it is a child of ours.
pub(super) fn reap(pid: i32) {
    let _ = waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG));
}
