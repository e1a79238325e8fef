//! The drone's watch over one guard: passes on what it reports and what the drone wants, kills it if it does not kill in
//! time, and waits for what it leaves behind.

use super::leftovers::{Family, Hunted, KnownGuard, is_of_guard, reap};
use super::process::update;
use crate::adopt::{AdoptedProcess, Link, pidfd};
use crate::backend_state::{Desired, Observation};
use crate::clock::DroneClock;
use crate::data_dir::BackendsDir;
use crate::guard::Report;
use holdfast_wire::TerminationKind;
use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncWrite, AsyncWriteExt, BufReader, Interest};
use tokio::process::Child;
use tokio::sync::{mpsc, watch};
use tracing::{debug, info, warn};

/// How often the remains of a backend whose guard was killed are looked for, where nothing tells of their end.
pub(super) const HUNT_INTERVAL: Duration = Duration::from_millis(50);
/// The hunt is over when nothing was found so often in a row: what was being forked during one look is seen by the next.
pub(super) const HUNT_EMPTY_LOOKS: u32 = 2;
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

/// A guard's process.
pub(super) enum GuardProcess {
    /// Started by this drone.
    Child(Box<Child>),
    /// Started by an earlier one.
    Adopted(AdoptedProcess),
}

impl GuardProcess {
    /// Kills it.
    pub(super) fn start_kill(&mut self) -> io::Result<()> {
        match self {
            Self::Child(child) => child.start_kill(),
            Self::Adopted(process) => process.kill(),
        }
    }

    /// Waits for its end.
    pub(super) async fn wait(&mut self) -> io::Result<()> {
        match self {
            Self::Child(child) => child.wait().await.map(drop),
            Self::Adopted(process) => process.ended().await,
        }
    }
}

/// A guard, and how it is talked to.
pub(super) struct Guard {
    pub(super) process: GuardProcess,
    /// Dropped after it was reaped, if it is a child.
    pub(super) known: Option<KnownGuard>,
    /// `None` when the guard stops reading.
    pub(super) input: Option<Box<dyn AsyncWrite + Send + Unpin>>,
    /// Its reports; missing if it has none.
    pub(super) output: Option<Box<dyn AsyncBufRead + Send + Unpin>>,
    /// What is said first: the line that arms it.
    pub(super) arm_line: Vec<u8>,
}

impl Guard {
    /// One that was just started.
    pub(super) fn started(mut child: Child, known: Option<KnownGuard>, arm_line: Vec<u8>) -> Self {
        let input = child.stdin.take().map(|pipe| Box::new(pipe) as Box<dyn AsyncWrite + Send + Unpin>);
        let output = child
            .stdout
            .take()
            .map(|pipe| Box::new(BufReader::new(pipe)) as Box<dyn AsyncBufRead + Send + Unpin>);
        Self { process: GuardProcess::Child(Box::new(child)), known, input, output, arm_line }
    }

    /// An earlier drone's. It has been armed long since.
    pub(super) fn adopted(link: Link) -> Self {
        let Link { reader, writer, process, .. } = link;
        Self {
            process: GuardProcess::Adopted(process),
            known: None,
            input: Some(Box::new(writer)),
            output: Some(Box::new(reader)),
            arm_line: Vec::new(),
        }
    }
}

pub(super) struct Watcher<'a> {
    pub(super) clock: DroneClock,
    dirs: &'a BackendsDir,
    pub(super) family: &'a Family,
    pub(super) backend: &'a str,
    pub(super) facts: &'a mpsc::Sender<Observation>,
    contained: Contained,
    /// The main process, for its end.
    main: Option<AsyncFd<OwnedFd>>,
    /// The guard has said that it has ended.
    exited: bool,
    /// The backend's main process.
    main_pid: Option<i32>,
    /// Its guard is an earlier drone's.
    adopted: bool,
    gone: bool,
}

impl<'a> Watcher<'a> {
    pub(super) fn new(
        clock: DroneClock,
        dirs: &'a BackendsDir,
        family: &'a Family,
        backend: &'a str,
        facts: &'a mpsc::Sender<Observation>,
    ) -> Self {
        let contained = Contained::Unknown;
        Self {
            clock,
            dirs,
            family,
            backend,
            facts,
            contained,
            main: None,
            exited: false,
            main_pid: None,
            adopted: false,
            gone: false,
        }
    }

    /// Watches until nothing is left.
    pub(super) async fn watch(mut self, guard: Guard, mut want: watch::Receiver<Desired>, mut told: Desired) {
        let Guard { mut process, known, input: mut stdin, output, arm_line } = guard;
        self.adopted = matches!(process, GuardProcess::Adopted(_));
        let mut unsent = Unsent::new(arm_line);
        // What is wanted by now is not in `unsent`. Only the latest counts, so a guard that does not read holds up nothing.
        let mut newer = false;
        if let Some(output) = output {
            let mut lines = output.lines();
            // The sender's end does not make the backend end: its guard goes on without us.
            let mut wants_open = true;
            let mut impatient = false;
            // The main process has ended; the guard has still to say so. One that is stopped reaps nobody, and so keeps even
            // the namespace's init from ending.
            let mut over = false;
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
                    () = ended(self.main.as_ref()), if !over => {
                        over = true;
                        if !killing {
                            out_of_patience.as_mut().reset(tokio::time::Instant::now() + patience(told.kill_ms));
                        }
                    }
                    () = &mut out_of_patience, if (killing || (over && !self.exited)) && !impatient => {
                        impatient = true;
                        warn!(backend = self.backend, "the guard does not finish; killing it");
                        self.kill(&mut process);
                    }
                    line = lines.next_line() => match line {
                        Ok(Some(line)) => self.report(&line).await,
                        Ok(None) => break,
                        Err(e) => {
                            warn!(backend = self.backend, "cannot read the guard's reports: {e}");
                            self.kill(&mut process);
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
            self.kill(&mut process);
        }
        if let Err(e) = process.wait().await {
            warn!(backend = self.backend, "cannot wait for the guard: {e}");
        }
        drop(known);
        if !self.gone {
            warn!(backend = self.backend, "the guard has died; ending what is left of the backend");
            tell(self.facts, Observation::Failed).await;
            self.wait_for_the_rest().await;
        }
    }

    fn kill(&self, guard: &mut GuardProcess) {
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
        match &report {
            // Long since reported by an adopted guard: the number may mean another process by now.
            Report::Contained { init_pid }
                if self.adopted
                    && is_of_guard(*init_pid, self.dirs, backend).is_ok_and(|is_init| !is_init) =>
            {
                self.contained = Contained::NamespaceGone;
            }
            Report::Contained { init_pid } => {
                self.contained = Contained::in_namespace(*init_pid, pidfd(*init_pid));
            }
            Report::Uncontained { problem } => {
                warn!(backend, "{problem}: the backend's descendants are watched one by one instead");
                self.contained = Contained::Tree;
            }
            Report::Started { pid } => {
                info!(backend, pid, "started");
                self.main_pid = Some(*pid);
                // SAFETY: an OwnedFd is the same open descriptor until it is dropped.
                let main = pidfd(*pid).and_then(|fd| unsafe {
                    AsyncFd::register_with_interest(fd, Interest::READABLE).map_err(Into::into)
                });
                // Without it a guard that is stopped keeps its key, and nothing worse.
                self.main = main.inspect_err(|e| debug!(backend, "its end is not seen: {e}")).ok();
            }
            Report::NotStarted { late, problem } => warn!(backend, late, "not started: {problem}"),
            Report::Exited { code, signal } => {
                info!(backend, code, signal, "the main process has ended");
                self.exited = true;
            }
            Report::Ready | Report::SoftDeadline | Report::Killing => {}
            Report::Gone => self.gone = true,
        }
        if let Some(fact) = Observation::of(&report) {
            tell(self.facts, fact).await;
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
        let mut hunted = Hunted::new(self.backend);
        while !hunted.is_over() {
            let (family, mark) = (self.family.clone(), self.dirs.mark(self.backend));
            let looked = tokio::task::spawn_blocking(move || family.hunt(&mark)).await;
            hunted.note(looked.map_err(io::Error::other).flatten());
            tokio::time::sleep(HUNT_INTERVAL).await;
        }
    }
}

/// Waits until a process has ended; for ever if there is none.
async fn ended(process: Option<&AsyncFd<OwnedFd>>) {
    match process {
        Some(process) if process.readable().await.is_ok() => {}
        _ => std::future::pending().await,
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
    pub(super) async fn send(
        &mut self,
        pipe: &mut Option<Box<dyn AsyncWrite + Send + Unpin>>,
    ) -> io::Result<()> {
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

pub(super) async fn tell(facts: &mpsc::Sender<Observation>, fact: Observation) {
    // Without a listener the drone is ending; the guard goes on.
    let _ = facts.send(fact).await;
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
        let family = Family::new().unwrap();
        let (facts, _listener) = mpsc::channel(1);
        let dir = tempfile::tempdir().unwrap();
        let dirs = crate::data_dir::DataDir::open(dir.path()).unwrap().backends();
        let mut init = std::process::Command::new("sleep").arg("300").spawn().unwrap();
        let pid = i32::try_from(init.id()).unwrap();
        let mut watcher = Watcher::new(DroneClock::start(), &dirs, &family, "ba", &facts);
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
