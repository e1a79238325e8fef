//! Backends as processes of this machine, each under a guard process.

use super::{BackendSpec, ENV_BACKEND_ID, Runtime, Want};
use crate::clock::DroneClock;
use crate::data_dir::BackendsDir;
use crate::guard::{Arm, EndNow, GUARD_ARGUMENT, Report, Update};
use crate::life::Fact;
use futures::future::BoxFuture;
use holdfast_wire::TerminationKind;
use holdfast_wire::http::{Executable, ProcessExecutable};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::{BTreeMap, HashSet};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};

/// How often the remains of a backend whose guard was killed are looked for, where there is no PID namespace.
const HUNT_INTERVAL: Duration = Duration::from_millis(50);
/// A guard that was told to kill and has not finished within this time is killed itself, which ends the backend too.
const GUARD_PATIENCE: Duration = Duration::from_secs(1);
/// `PATH` of a backend if the drone has none.
const PATH_DEFAULT: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// This program, also after its file was replaced by an upgrade.
const OWN_PROGRAM: &str = "/proc/self/exe";

/// See the module.
#[derive(Debug, Clone)]
pub struct ProcessRuntime {
    clock: DroneClock,
    dirs: BackendsDir,
    guard_program: PathBuf,
}

impl ProcessRuntime {
    /// Keeps each backend's directory below `dirs`.
    pub fn new(clock: DroneClock, dirs: BackendsDir) -> Self {
        Self { clock, dirs, guard_program: PathBuf::from(OWN_PROGRAM) }
    }

    /// Uses another program as guard: for tests, which run inside a program that is none.
    pub fn with_guard_program(mut self, program: PathBuf) -> Self {
        self.guard_program = program;
        self
    }

    fn update(&self, want: Want) -> Update {
        Update {
            soft_boot_ms: self.clock.to_boot_ms(want.deadlines.soft_terminate_at),
            hard_boot_ms: self.clock.to_boot_ms(want.deadlines.hard_terminate_at),
            end: want.end.map(|kind| match kind {
                TerminationKind::Soft => EndNow::Soft { kill_boot_ms: self.clock.to_boot_ms(want.kill_at) },
                TerminationKind::Hard => EndNow::Hard,
            }),
        }
    }

    /// Starts the guard and arms it.
    async fn start(
        &self,
        spec: &BackendSpec,
        process: &ProcessExecutable,
        want: Want,
    ) -> io::Result<(Child, ChildStdin)> {
        let paths = self.dirs.create(&spec.id)?;
        let guard_log = std::fs::OpenOptions::new().create(true).append(true).open(&paths.guard_log)?;
        let mut env: BTreeMap<String, String> = ["PATH", "HOME", "LANG"]
            .iter()
            .filter_map(|name| Some(((*name).to_owned(), std::env::var(name).ok()?)))
            .collect();
        env.entry("PATH".to_owned()).or_insert_with(|| PATH_DEFAULT.to_owned());
        env.entry("HOME".to_owned()).or_insert_with(|| paths.dir.to_string_lossy().into_owned());
        env.extend(process.env.clone());
        env.extend(spec.session_env());
        let arm = Arm {
            command: process.command.clone(),
            env,
            cwd: process.cwd.as_ref().map_or(paths.dir, PathBuf::from),
            log: paths.output_log,
            update: self.update(want),
        };
        let mut guard = Command::new(&self.guard_program)
            // For whoever looks at the list of processes.
            .arg0("holdfast-drone")
            .arg(GUARD_ARGUMENT)
            .arg(&spec.id)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Not the drone's: who waits for the end of a killed drone's output must not wait for its guards.
            .stderr(guard_log)
            // Ctrl-C at the drone's terminal is for the drone alone.
            .process_group(0)
            .spawn()?;
        let Some(mut stdin) = guard.stdin.take() else {
            return Err(io::Error::other("the guard has no standard input"));
        };
        write_line(&mut stdin, &arm).await?;
        Ok((guard, stdin))
    }

    async fn run_backend(self, spec: BackendSpec, want: watch::Receiver<Want>, facts: mpsc::Sender<Fact>) {
        let Executable::Process(process) = &spec.executable else {
            warn!(backend = %spec.id, "a container was asked for, but this drone runs processes");
            tell(&facts, Fact::Failed).await;
            tell(&facts, Fact::Gone).await;
            return;
        };
        if want.borrow().end.is_some() {
            tell(&facts, Fact::Gone).await;
            return;
        }
        tell(&facts, Fact::Starting).await;
        let first = *want.borrow();
        match self.start(&spec, process, first).await {
            Ok((guard, stdin)) => {
                let watcher = Watcher {
                    runtime: &self,
                    backend: &spec.id,
                    facts: &facts,
                    contained: Contained::Unknown,
                    main_pid: None,
                    gone: false,
                };
                watcher.watch(guard, stdin, want, first).await;
            }
            Err(e) => {
                // A guard that was not armed ends by itself without starting anything.
                warn!(backend = %spec.id, "cannot start a guard: {e}");
                tell(&facts, Fact::Failed).await;
            }
        }
        tell(&facts, Fact::Gone).await;
    }
}

impl Runtime for ProcessRuntime {
    fn run(
        &self,
        spec: BackendSpec,
        want: watch::Receiver<Want>,
        facts: mpsc::Sender<Fact>,
    ) -> BoxFuture<'static, ()> {
        Box::pin(self.clone().run_backend(spec, want, facts))
    }
}

/// What is known of the thing that holds the backend.
enum Contained {
    /// Nothing was started yet.
    Unknown,
    /// The namespace's init, and a handle on it that is readable once the namespace is empty.
    Namespace(i32, OwnedFd),
    /// Its handle could not be had: it was gone already.
    NamespaceGone,
    /// No namespace.
    Tree,
}

struct Watcher<'a> {
    runtime: &'a ProcessRuntime,
    backend: &'a str,
    facts: &'a mpsc::Sender<Fact>,
    contained: Contained,
    /// The backend's main process.
    main_pid: Option<i32>,
    gone: bool,
}

impl Watcher<'_> {
    /// Passes on what the guard reports and what the drone wants, until nothing is left.
    async fn watch(
        mut self,
        mut guard: Child,
        stdin: ChildStdin,
        mut want: watch::Receiver<Want>,
        mut told: Want,
    ) {
        // Closed when the guard stops reading.
        let mut stdin = Some(stdin);
        if let Some(stdout) = guard.stdout.take() {
            let mut lines = BufReader::new(stdout).lines();
            // The sender's end does not make the backend end: its guard goes on without us.
            let mut wants_open = true;
            let mut impatient = false;
            let patience = tokio::time::sleep(GUARD_PATIENCE);
            tokio::pin!(patience);
            loop {
                let killing = told.end == Some(TerminationKind::Hard);
                tokio::select! {
                    () = &mut patience, if killing && !impatient => {
                        impatient = true;
                        warn!(backend = self.backend, "the guard does not finish; killing it");
                        if let Err(e) = guard.start_kill() {
                            warn!(backend = self.backend, "cannot kill the guard: {e}");
                        }
                    }
                    line = lines.next_line() => match line {
                        Ok(Some(line)) => self.report(&line).await,
                        Ok(None) => break,
                        Err(e) => {
                            warn!(backend = self.backend, "cannot read the guard's reports: {e}");
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
                        patience.as_mut().reset(tokio::time::Instant::now() + GUARD_PATIENCE);
                        if let Some(pipe) = &mut stdin
                            && write_line(pipe, &self.runtime.update(now)).await.is_err() {
                                stdin = None;
                            }
                    }
                }
            }
        }
        if let Err(e) = guard.wait().await {
            warn!(backend = self.backend, "cannot wait for the guard: {e}");
        }
        if !self.gone {
            warn!(backend = self.backend, "the guard has died; ending what is left of the backend");
            tell(self.facts, Fact::Failed).await;
            self.wait_for_the_rest().await;
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
                self.contained = match pidfd(init_pid) {
                    Ok(fd) => Contained::Namespace(init_pid, fd),
                    Err(_) => Contained::NamespaceGone,
                };
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
            Contained::Namespace(init_pid, fd) => {
                // SAFETY: an OwnedFd is the same open descriptor until it is dropped.
                let init = match unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) } {
                    Ok(init) => init,
                    Err(e) => {
                        warn!(backend = self.backend, "cannot wait for the namespace: {e}");
                        self.hunt_down().await;
                        return;
                    }
                };
                // The init dies with its guard, but is gone only when everything in its namespace is reaped. The main
                // process was the guard's child: it became ours.
                let mut looks = tokio::time::interval(HUNT_INTERVAL);
                loop {
                    self.main_pid.into_iter().for_each(reap);
                    tokio::select! {
                        ended = init.readable() => {
                            if let Err(e) = ended {
                                warn!(backend = self.backend, "cannot wait for the namespace: {e}");
                                self.hunt_down().await;
                            }
                            reap(init_pid);
                            return;
                        }
                        _ = looks.tick() => {}
                    }
                }
            }
            Contained::NamespaceGone => {}
            Contained::Unknown | Contained::Tree => self.hunt_down().await,
        }
    }

    /// Kills what names the backend in its environment until nothing does.
    async fn hunt_down(&self) {
        let mut killed = self.main_pid.into_iter().collect::<HashSet<i32>>();
        loop {
            let found = hunt(self.backend);
            killed.extend(&found);
            killed.iter().copied().for_each(reap);
            if found.is_empty() {
                return;
            }
            tokio::time::sleep(HUNT_INTERVAL).await;
        }
    }
}

/// Reaps a process that has ended, if it is a child of ours: what a dead guard leaves comes to the drone, which is a
/// child subreaper.
fn reap(pid: i32) {
    let _ = nix::sys::wait::waitpid(Pid::from_raw(pid), Some(nix::sys::wait::WaitPidFlag::WNOHANG));
}

async fn tell(facts: &mpsc::Sender<Fact>, fact: Fact) {
    // Without a listener the drone is ending; the guard goes on.
    let _ = facts.send(fact).await;
}

async fn write_line(pipe: &mut ChildStdin, message: &impl serde::Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    pipe.write_all(&line).await?;
    pipe.flush().await
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

/// Kills every process that names the backend in its environment; returns them.
fn hunt(backend: &str) -> Vec<i32> {
    let mark = format!("{ENV_BACKEND_ID}={backend}");
    let mut found = Vec::new();
    let Ok(entries) = std::fs::read_dir("/proc") else { return found };
    for entry in entries.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        // A zombie's environment is empty.
        let Ok(environment) = std::fs::read(entry.path().join("environ")) else { continue };
        if environment.split(|b| *b == 0).any(|variable| variable == mark.as_bytes()) {
            found.push(pid);
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
    found
}
