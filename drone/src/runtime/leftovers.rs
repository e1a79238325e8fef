//! What a killed guard leaves behind, and how it is ended and reaped.
//!
//! The drone is a child subreaper: what a dead guard has started comes to it. So every child of the drone that is no
//! guard (and was not there before the drone: a shell may `exec` it) was left by a guard.

use super::ENV_BACKEND_ID;
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
    pub(super) fn new() -> Self {
        let own_pid = Pid::this().as_raw();
        let children = processes::all().into_iter().filter(|p| p.parent == own_pid).map(|p| p.pid);
        Self { own_pid, known: Arc::new(Mutex::new(children.collect())) }
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

    /// Reaps what was left and has ended.
    pub(super) fn reap(&self) {
        let known = self.known();
        for left in self.left(&known, &processes::all()) {
            reap(left.pid);
        }
    }

    /// Kills what names the backend in its environment, and everything that was left behind, whoever's it was; whether
    /// there was anything.
    pub(super) fn hunt(&self, backend: &str) -> bool {
        let known = self.known();
        let all = processes::all();
        let mut targets: BTreeSet<i32> =
            all.iter().map(|p| p.pid).filter(|pid| names(*pid, backend)).collect();
        for left in self.left(&known, &all) {
            targets.insert(left.pid);
            targets.extend(processes::descendants(&all, left.pid).iter().map(|p| p.pid));
        }
        for pid in &targets {
            let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
            reap(*pid);
        }
        !targets.is_empty()
    }

    fn left(&self, known: &HashSet<i32>, all: &[Process]) -> Vec<Process> {
        // In a process that is no subreaper, other children are its own business.
        if !prctl::get_child_subreaper().unwrap_or(false) {
            return Vec::new();
        }
        all.iter().filter(|p| p.parent == self.own_pid && !known.contains(&p.pid)).copied().collect()
    }
}

/// Kills a backend's guard, whoever started it, and what names the backend in its environment, until nothing is found any
/// more and nothing holds the backend's directory.
pub(super) async fn end_left(dirs: BackendsDir, backend: String) {
    let mut empty_looks = 0;
    while empty_looks < HUNT_EMPTY_LOOKS {
        let (dirs, id) = (dirs.clone(), backend.clone());
        let look = move || {
            let all = processes::all();
            let left = all.iter().filter(|p| !p.zombie && (is_of_guard(p.pid, &id) || names(p.pid, &id)));
            let mut found = false;
            for process in left {
                found = true;
                let _ = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
            }
            found || dirs.is_guarded(&id)
        };
        match tokio::task::spawn_blocking(look).await {
            Ok(false) => empty_looks += 1,
            Ok(true) => empty_looks = 0,
            Err(e) => warn!(backend, "the hunt for what is left failed: {e}"),
        }
        tokio::time::sleep(HUNT_INTERVAL).await;
    }
}

/// Whether a process is a backend's guard, or was forked by it (as the namespace's init is).
pub(super) fn is_of_guard(pid: i32, backend: &str) -> bool {
    let command = [b"holdfast-drone\0guard\0", backend.as_bytes(), b"\0"].concat();
    std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|found| found == command)
}

/// Reaps a process that has ended, if it is a child of ours.
pub(super) fn reap(pid: i32) {
    let _ = waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG));
}

/// Whether a process names the backend in its environment. A zombie's is empty.
fn names(pid: i32, backend: &str) -> bool {
    let mark = format!("{ENV_BACKEND_ID}={backend}");
    std::fs::read(format!("/proc/{pid}/environ"))
        .is_ok_and(|environment| environment.split(|b| *b == 0).any(|variable| variable == mark.as_bytes()))
}
