//! The drone's watch over one guard: passes on what it reports and what the drone wants, kills it if it does not kill in
//! time, and waits for what it leaves behind.

use super::Want;
use super::leftovers::{Family, KnownGuard, reap};
use super::process::update;
use crate::clock::DroneClock;
use crate::guard::Report;
use crate::life::Fact;
use holdfast_wire::TerminationKind;
use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::process::{Child, ChildStdin};
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};

/// How often the remains of a backend whose guard was killed are looked for, where nothing tells of their end.
const HUNT_INTERVAL: Duration = Duration::from_millis(50);
/// The hunt is over when nothing was found so often in a row: what was being forked during one look is seen by the next.
const HUNT_EMPTY_LOOKS: u32 = 2;
/// A guard that was told to kill and has not finished within half of the time allowed for a kill, or this, is killed
/// itself, which ends the backend too.
const GUARD_PATIENCE_MAX: Duration = Duration::from_secs(1);

/// How long a guard that was told to kill is waited for.
pub(super) fn patience(kill_ms: u64) -> Duration {
    GUARD_PATIENCE_MAX.min(Duration::from_millis(kill_ms) / 2)
}

/// What is known of the thing that holds the backend.
enum Contained {
    /// Nothing was started yet.
    Unknown,
    /// The namespace's init, and a handle on it that is readable once the namespace is empty.
    Namespace(i32, OwnedFd),
    /// The namespace's init; its handle could not be had.
    NamespaceByPid(i32),
    /// The namespace is empty.
    NamespaceGone,
    /// No namespace.
    Tree,
}

impl Contained {
    fn in_namespace(init_pid: i32, handle: io::Result<OwnedFd>) -> Self {
        match handle {
            Ok(fd) => Self::Namespace(init_pid, fd),
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Self::NamespaceGone,
            // Too many open files, no memory, an old kernel: that says nothing about the init.
            Err(e) => {
                warn!(init_pid, "no handle on a namespace's init: {e}");
                Self::NamespaceByPid(init_pid)
            }
        }
    }
}

/// A started guard.
pub(super) struct Guard {
    pub(super) child: Child,
    pub(super) known: KnownGuard,
    /// Closed when the guard stops reading.
    pub(super) stdin: Option<ChildStdin>,
    /// The line that arms it.
    pub(super) arm_line: Vec<u8>,
}

pub(super) struct Watcher<'a> {
    pub(super) clock: DroneClock,
    pub(super) family: &'a Family,
    pub(super) backend: &'a str,
    pub(super) facts: &'a mpsc::Sender<Fact>,
    contained: Contained,
    /// The backend's main process.
    main_pid: Option<i32>,
    gone: bool,
}

impl<'a> Watcher<'a> {
    pub(super) fn new(
        clock: DroneClock,
        family: &'a Family,
        backend: &'a str,
        facts: &'a mpsc::Sender<Fact>,
    ) -> Self {
        Self { clock, family, backend, facts, contained: Contained::Unknown, main_pid: None, gone: false }
    }

    /// Watches until nothing is left.
    pub(super) async fn watch(mut self, guard: Guard, mut want: watch::Receiver<Want>, mut told: Want) {
        let Guard { mut child, known, mut stdin, arm_line } = guard;
        let mut unsent = Unsent::new(arm_line);
        // What is wanted by now is not in `unsent`. Only the latest counts, so a guard that does not read holds up nothing.
        let mut newer = false;
        if let Some(stdout) = child.stdout.take() {
            let mut lines = BufReader::new(stdout).lines();
            // The sender's end does not make the backend end: its guard goes on without us.
            let mut wants_open = true;
            let mut impatient = false;
            let out_of_patience = tokio::time::sleep(patience(told.kill_ms));
            tokio::pin!(out_of_patience);
            loop {
                if newer && unsent.is_empty() {
                    newer = false;
                    match line(&update(self.clock, told)) {
                        Ok(bytes) => unsent = Unsent::new(bytes),
                        Err(e) => warn!(backend = self.backend, "an update that is no JSON: {e}"),
                    }
                }
                let killing = told.end == Some(TerminationKind::Hard);
                tokio::select! {
                    () = &mut out_of_patience, if killing && !impatient => {
                        impatient = true;
                        warn!(backend = self.backend, "the guard does not finish; killing it");
                        self.kill(&mut child);
                    }
                    line = lines.next_line() => match line {
                        Ok(Some(line)) => self.report(&line).await,
                        Ok(None) => break,
                        Err(e) => {
                            warn!(backend = self.backend, "cannot read the guard's reports: {e}");
                            self.kill(&mut child);
                            break;
                        }
                    },
                    changed = want.changed(), if wants_open => {
                        wants_open = changed.is_ok();
                        let now = *want.borrow_and_update();
                        if now == told {
                            continue;
                        }
                        told = now;
                        newer = true;
                        if told.end == Some(TerminationKind::Hard) && !killing {
                            let until = tokio::time::Instant::now() + patience(told.kill_ms);
                            out_of_patience.as_mut().reset(until);
                        }
                    }
                    written = unsent.send(&mut stdin), if stdin.is_some() && !unsent.is_empty() => {
                        if written.is_err() {
                            stdin = None;
                        }
                    }
                }
            }
        } else {
            self.kill(&mut child);
        }
        if let Err(e) = child.wait().await {
            warn!(backend = self.backend, "cannot wait for the guard: {e}");
        }
        drop(known);
        if !self.gone {
            warn!(backend = self.backend, "the guard has died; ending what is left of the backend");
            tell(self.facts, Fact::Failed).await;
            self.wait_for_the_rest().await;
        }
    }

    fn kill(&self, guard: &mut Child) {
        if let Err(e) = guard.start_kill() {
            warn!(backend = self.backend, "cannot kill the guard: {e}");
        }
    }

    async fn report(&mut self, line: &str) {
        let report = match serde_json::from_str::<Report>(line) {
            Ok(report) => report,
            Err(e) => {
                warn!(backend = self.backend, "unreadable report of the guard: {e}");
                return;
            }
        };
        let backend = self.backend;
        match report {
            Report::Contained { init_pid } => {
                self.contained = Contained::in_namespace(init_pid, pidfd(init_pid));
            }
            Report::Uncontained { problem } => {
                warn!(backend, "{problem}: the backend's descendants are watched one by one instead");
                self.contained = Contained::Tree;
            }
            Report::Started { pid } => {
                info!(backend, pid, "started");
                self.main_pid = Some(pid);
                tell(self.facts, Fact::Started).await;
            }
            Report::NotStarted { late, problem } => {
                warn!(backend, late, "not started: {problem}");
                tell(self.facts, if late { Fact::StartedTooLate } else { Fact::Failed }).await;
            }
            Report::SoftDeadline => tell(self.facts, Fact::SoftDeadline).await,
            Report::Killing => tell(self.facts, Fact::Killing).await,
            Report::Exited { code, signal } => {
                info!(backend, code, signal, "the main process has ended");
                tell(self.facts, Fact::Exited(code)).await;
            }
            Report::Gone => self.gone = true,
        }
    }

    /// After the guard's death: waits until the kernel, or we, have ended what it held.
    async fn wait_for_the_rest(&mut self) {
        match std::mem::replace(&mut self.contained, Contained::NamespaceGone) {
            Contained::Namespace(init_pid, fd) => self.wait_for_namespace(init_pid, fd).await,
            Contained::NamespaceByPid(init_pid) => self.poll_namespace(init_pid).await,
            Contained::NamespaceGone => {}
            Contained::Unknown | Contained::Tree => self.hunt_down().await,
        }
    }

    /// The init dies with its guard, but is gone only when everything in its namespace is reaped.
    async fn wait_for_namespace(&self, init_pid: i32, fd: OwnedFd) {
        // SAFETY: an OwnedFd is the same open descriptor until it is dropped.
        let init = match unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) } {
            Ok(init) => init,
            Err(e) => {
                warn!(backend = self.backend, "cannot wait for the namespace: {e}");
                self.poll_namespace(init_pid).await;
                return;
            }
        };
        let mut looks = tokio::time::interval(HUNT_INTERVAL);
        loop {
            self.reap_main();
            tokio::select! {
                ended = init.readable() => {
                    if let Err(e) = ended {
                        warn!(backend = self.backend, "cannot wait for the namespace: {e}");
                        self.poll_namespace(init_pid).await;
                    }
                    reap(init_pid);
                    return;
                }
                _ = looks.tick() => {}
            }
        }
    }

    async fn poll_namespace(&self, init_pid: i32) {
        loop {
            self.reap_main();
            reap(init_pid);
            if kill(Pid::from_raw(init_pid), None) == Err(Errno::ESRCH) {
                return;
            }
            tokio::time::sleep(HUNT_INTERVAL).await;
        }
    }

    /// The main process was the guard's child: it became ours. A guard that was killed between fork and report has not
    /// told its number.
    fn reap_main(&self) {
        match self.main_pid {
            Some(pid) => reap(pid),
            None => self.family.reap(),
        }
    }

    /// Kills what belongs to the backend until nothing does.
    async fn hunt_down(&self) {
        let mut empty_looks = 0;
        while empty_looks < HUNT_EMPTY_LOOKS {
            let (family, backend) = (self.family.clone(), self.backend.to_owned());
            match tokio::task::spawn_blocking(move || family.hunt(&backend)).await {
                Ok(false) => empty_looks += 1,
                Ok(true) => empty_looks = 0,
                Err(e) => warn!(backend = self.backend, "the hunt for its remains failed: {e}"),
            }
            tokio::time::sleep(HUNT_INTERVAL).await;
        }
    }
}

/// The rest of a line to the guard.
pub(super) struct Unsent {
    bytes: Vec<u8>,
    sent: usize,
}

impl Unsent {
    pub(super) fn new(bytes: Vec<u8>) -> Self {
        Self { bytes, sent: 0 }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.sent >= self.bytes.len()
    }

    /// Sends a part of it. Nothing was sent if this is dropped before it is done.
    pub(super) async fn send(&mut self, pipe: &mut Option<ChildStdin>) -> io::Result<()> {
        if let (Some(pipe), Some(rest)) = (pipe, self.bytes.get(self.sent..)) {
            self.sent += pipe.write(rest).await?;
        }
        Ok(())
    }
}

/// A line of the guard's protocol.
pub(super) fn line(message: &impl serde::Serialize) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(line)
}

pub(super) async fn tell(facts: &mpsc::Sender<Fact>, fact: Fact) {
    // Without a listener the drone is ending; the guard goes on.
    let _ = facts.send(fact).await;
}

/// A handle on a process that cannot come to mean another one.
fn pidfd(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and returns a new descriptor (close-on-exec) or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0u32) };
    match i32::try_from(fd) {
        // SAFETY: the descriptor is new and nobody else's.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_process_that_is_not_there_is_gone() {
        let error = |code| Err(io::Error::from_raw_os_error(code));
        for code in [libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::ENOSYS, libc::EPERM] {
            assert!(
                matches!(Contained::in_namespace(7, error(code)), Contained::NamespaceByPid(7)),
                "{code}"
            );
        }
        assert!(matches!(Contained::in_namespace(7, error(libc::ESRCH)), Contained::NamespaceGone));
        let own = Pid::this().as_raw();
        assert!(matches!(Contained::in_namespace(own, pidfd(own)), Contained::Namespace(_, _)));
    }

    #[tokio::test]
    async fn an_init_without_a_handle_is_waited_for_by_its_number() {
        let family = Family::new();
        let (facts, _listener) = mpsc::channel(1);
        let mut init = std::process::Command::new("sleep").arg("300").spawn().unwrap();
        let pid = i32::try_from(init.id()).unwrap();
        let mut watcher = Watcher::new(DroneClock::start(), &family, "ba", &facts);
        watcher.contained = Contained::NamespaceByPid(pid);
        let waiting = watcher.wait_for_the_rest();
        tokio::pin!(waiting);
        assert!(tokio::time::timeout(HUNT_INTERVAL * 3, &mut waiting).await.is_err(), "it is alive");
        init.kill().unwrap();
        tokio::time::timeout(Duration::from_secs(20), waiting).await.unwrap();
        assert!(init.wait().is_err(), "it is reaped");
    }

    #[test]
    fn the_patience_leaves_half_of_the_time_for_the_kill_itself() {
        assert_eq!(patience(2_000), Duration::from_secs(1));
        assert_eq!(patience(400), Duration::from_millis(200));
        assert_eq!(patience(u64::MAX), GUARD_PATIENCE_MAX);
    }
}
