//! Backends as processes of this machine, each under a guard process.

use super::leftovers::{Family, end_left};
use super::watcher::{Guard, Watcher, line, tell};
use super::{BackendSpec, Runtime};
use crate::adopt::Link;
use crate::backend_state::{Desired, Observation};
use crate::clock::DroneClock;
use crate::data_dir::{BackendsDir, ENV_BACKEND_DIR};
use crate::guard::{Arm, EndNow, GUARD_ARGUMENT, Update};
use crate::open_files::OpenFiles;
use futures::future::BoxFuture;
use holdfast_wire::TerminationKind;
use holdfast_wire::http::{Executable, ProcessExecutable};
use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::process::Stdio;
use tokio::process::Command;
use tokio::sync::{mpsc, watch};
use tracing::warn;

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
    family: Family,
    /// The backends' limit, where it is not the drone's.
    open_files: Option<OpenFiles>,
    /// What backends are not to see, but for their own directories.
    hidden: Option<PathBuf>,
}

impl ProcessRuntime {
    /// Keeps each backend's directory below `dirs`.
    pub fn new(clock: DroneClock, dirs: BackendsDir) -> io::Result<Self> {
        Ok(Self {
            clock,
            dirs,
            guard_program: PathBuf::from(OWN_PROGRAM),
            family: Family::new()?,
            open_files: None,
            hidden: None,
        })
    }

    /// Gives backends this limit of open files instead of the drone's.
    pub fn with_open_files(mut self, open_files: OpenFiles) -> Self {
        self.open_files = Some(open_files);
        self
    }

    /// Hides this directory, which holds those of all backends, from them; each sees its own working directory alone.
    pub fn with_hidden(mut self, data_dir: PathBuf) -> Self {
        self.hidden = Some(data_dir);
        self
    }

    /// Uses another program as guard: for tests, which run inside a program that is none.
    pub fn with_guard_program(mut self, program: PathBuf) -> Self {
        self.guard_program = program;
        self
    }

    /// Starts the guard. It does nothing before it has got the line that arms it.
    fn start(&self, spec: &BackendSpec, process: &ProcessExecutable, want: Desired) -> io::Result<Guard> {
        let paths = self.dirs.create(&spec.id)?;
        let guard_log = BackendsDir::open_guard_log(&paths)?;
        let mut env: BTreeMap<String, String> = ["PATH", "HOME", "LANG"]
            .iter()
            .filter_map(|name| Some(((*name).to_owned(), std::env::var(name).ok()?)))
            .collect();
        env.entry("PATH".to_owned()).or_insert_with(|| PATH_DEFAULT.to_owned());
        env.entry("HOME".to_owned()).or_insert_with(|| paths.work.to_string_lossy().into_owned());
        env.extend(process.env.clone());
        env.extend(spec.session_env());
        env.insert(ENV_BACKEND_DIR.to_owned(), paths.work.to_string_lossy().into_owned());
        let arm = Arm {
            command: process.command.clone(),
            env,
            cwd: process.cwd.as_ref().map_or(paths.work, PathBuf::from),
            log: paths.output_log,
            hide: self.hidden.clone(),
            open_files: self.open_files,
            container: None,
            update: update(self.clock, want),
        };
        let mut command = Command::new(&self.guard_program);
        command
            // For whoever looks at the list of processes.
            .arg0("holdfast-drone")
            .arg(GUARD_ARGUMENT)
            .arg(&spec.id)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Not the drone's: who waits for the end of a killed drone's output must not wait for its guards.
            .stderr(guard_log)
            // Ctrl-C at the drone's terminal is for the drone alone.
            .process_group(0);
        let arm_line = line(&arm)?;
        let (child, known) = self.family.spawn(&mut command)?;
        Ok(Guard::started(child, Some(known), arm_line))
    }

    async fn run_backend(
        self,
        spec: BackendSpec,
        want: watch::Receiver<Desired>,
        facts: mpsc::Sender<Observation>,
    ) {
        let Executable::Process(process) = &spec.executable else {
            warn!(backend = %spec.id, "a container was asked for, but this drone runs processes");
            tell(&facts, Observation::Failed).await;
            tell(&facts, Observation::Gone).await;
            return;
        };
        if want.borrow().end.is_some() {
            tell(&facts, Observation::Gone).await;
            return;
        }
        tell(&facts, Observation::Starting).await;
        let first = *want.borrow();
        match self.start(&spec, process, first) {
            Ok(guard) => {
                Watcher::new(self.clock, &self.dirs, &self.family, &spec.id, &facts)
                    .watch(guard, want, first)
                    .await;
            }
            Err(e) => {
                warn!(backend = %spec.id, "cannot start a guard: {e}");
                tell(&facts, Observation::Failed).await;
            }
        }
        tell(&facts, Observation::Gone).await;
    }
}

impl ProcessRuntime {
    async fn watch_adopted(
        self,
        id: String,
        link: Link,
        want: watch::Receiver<Desired>,
        facts: mpsc::Sender<Observation>,
    ) {
        // What it was told before stands; only changes are passed on.
        let first = *want.borrow();
        let watcher = Watcher::new(self.clock, &self.dirs, &self.family, &id, &facts);
        watcher.watch(Guard::adopted(link), want, first).await;
        tell(&facts, Observation::Gone).await;
    }
}

impl Runtime for ProcessRuntime {
    fn adopt(
        &self,
        id: String,
        link: Link,
        want: watch::Receiver<Desired>,
        facts: mpsc::Sender<Observation>,
    ) -> BoxFuture<'static, ()> {
        Box::pin(self.clone().watch_adopted(id, link, want, facts))
    }

    fn end_left(&self, id: String) -> BoxFuture<'static, ()> {
        Box::pin(end_left(self.dirs.clone(), id))
    }

    fn run(
        &self,
        spec: BackendSpec,
        want: watch::Receiver<Desired>,
        facts: mpsc::Sender<Observation>,
    ) -> BoxFuture<'static, ()> {
        Box::pin(self.clone().run_backend(spec, want, facts))
    }
}

/// What a guard has to know of what is wanted.
pub(super) fn update(clock: DroneClock, want: Desired) -> Update {
    Update {
        soft_boot_ms: clock.to_boot_ms(want.deadlines.soft_terminate_at),
        hard_boot_ms: clock.to_boot_ms(want.deadlines.hard_terminate_at),
        end: want.end.map(|kind| match kind {
            TerminationKind::Soft => EndNow::Soft { kill_boot_ms: clock.to_boot_ms(want.kill_at) },
            TerminationKind::Hard => EndNow::Hard,
        }),
        expiry_ms: Some(want.expiry_ms),
        ready: want.ready,
    }
}
