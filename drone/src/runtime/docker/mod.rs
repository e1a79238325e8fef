//! Backends as containers of this machine's engine, each under a guard process.
//!
//! ```text
//!   run ──image, create──▶ engine        run ──Arm, Update──▶ guard ──start, kill──▶ engine
//!    ▲                                    └◀────Report─────────┘└──SIGTERM, SIGKILL──▶ the container's processes
//!    └──Desired, Observation──▶ agent                            sweep ──ends what nobody guards──▶ engine
//! ```
//!
//! The drone makes a container, its guard starts it: see [`crate::guard`]. The drone has to run where the engine does:
//! in the same PID namespace, and with `--data-dir` and `--mount-base` at the same paths, since the guard sees to the
//! container's processes itself, and both directories are mounted from.
//!
//! Invariants, beside those of the trait:
//!
//! 1. Nothing but its guard starts a container, which has no restart policy.
//! 2. Before the drone takes on anything, and every so often, what runs under its labels without a guard is ended.
//! 3. Containers of others, other drones' included, are never touched.
//! 4. A drone starts only where it can see the engine's processes. What the engine says runs, and was never seen here,
//!    counts as running until the engine has removed it.

mod create;
mod end;
mod fields;
mod labels;
mod mount;
mod preflight;
mod prune;
mod stats;
mod watch;

pub use end::EndError;
pub use labels::Owner;

use super::leftovers::{Family, end_left};
use super::watcher::{Guard, line, tell};
use super::{BackendSpec, Runtime, process};
use crate::adopt::Link;
use crate::backend_state::{Desired, Observation};
use crate::clock::DroneClock;
use crate::data_dir::BackendsDir;
use crate::guard::{Arm, ContainerTarget, GUARD_ARGUMENT};
use bollard::{API_DEFAULT_VERSION, Docker};
use create::CreateError;
use fields::ContainerFields;
use futures::future::BoxFuture;
use holdfast_wire::FieldError;
use holdfast_wire::http::{DockerExecutable, Executable};
use std::collections::{BTreeMap, HashSet};
use std::fs::OpenOptions;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::process::Command;
use tokio::sync::{Semaphore, mpsc, watch as watch_channel};
use tracing::{info, warn};
use watch::Watch;

/// Time between two attempts to reach the engine before the drone begins.
const REACH_INTERVAL: Duration = Duration::from_secs(1);
/// Name of the file without which a container cannot be started, in the backend's directory.
const PERMIT: &str = "permit";
/// This program, also after its file was replaced by an upgrade.
const OWN_PROGRAM: &str = "/proc/self/exe";

/// The base of what is mounted is not usable.
#[derive(Debug, thiserror::Error)]
#[error("--mount-base {path}: {source}")]
pub struct MountBaseError {
    /// Where.
    path: PathBuf,
    /// What.
    source: io::Error,
}

/// Where the engine is, and what may be mounted.
#[derive(Debug, Clone)]
pub struct DockerConfig {
    socket: PathBuf,
    mount_base: Option<PathBuf>,
}

impl DockerConfig {
    /// An engine at this Unix socket. Backends may have directories mounted that are below `mount_base`, none without.
    pub fn new(socket: PathBuf, mount_base: Option<PathBuf>) -> Result<Self, MountBaseError> {
        let checked = |path: PathBuf| {
            // Without links in it: below it none is followed.
            path.canonicalize()
                .and_then(
                    |base| if base.is_dir() { Ok(base) } else { Err(io::ErrorKind::NotADirectory.into()) },
                )
                .map_err(|source| MountBaseError { path, source })
        };
        Ok(Self { socket, mount_base: mount_base.map(checked).transpose()? })
    }
}

/// See the module.
#[derive(Debug, Clone)]
pub struct DockerRuntime {
    clock: DroneClock,
    dirs: BackendsDir,
    docker: Docker,
    config: DockerConfig,
    owner: Owner,
    /// A killed guard leaves its deputy to this process, to be reaped.
    family: Family,
    stats_turn: Arc<Semaphore>,
    /// Backends that a task of this drone watches.
    watched: Arc<Mutex<HashSet<String>>>,
}

/// A backend counts as watched until this is dropped.
struct Watched {
    all: Arc<Mutex<HashSet<String>>>,
    backend: String,
}

impl Drop for Watched {
    fn drop(&mut self) {
        lock(&self.all).remove(&self.backend);
    }
}

fn lock(watched: &Mutex<HashSet<String>>) -> MutexGuard<'_, HashSet<String>> {
    watched.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The permit in a backend's directory.
fn permit_in(dir: &Path) -> PathBuf {
    dir.join(PERMIT)
}

impl DockerRuntime {
    /// Reaches the engine, for as long as that takes, and ends what an earlier drone has left behind without a guard.
    /// Goes on to do so every so often.
    pub async fn start(
        clock: DroneClock,
        dirs: BackendsDir,
        owner: Owner,
        config: DockerConfig,
    ) -> io::Result<Self> {
        let docker = reach(&config.socket).await;
        preflight::check(&config.socket).await?;
        let runtime = Self {
            clock,
            dirs,
            docker,
            config,
            owner,
            family: Family::new()?,
            stats_turn: Arc::new(Semaphore::new(stats::REQUESTS_MAX)),
            watched: Arc::default(),
        };
        while let Err(e) = prune::sweep(&runtime).await {
            warn!("an earlier drone's containers may be left: {e}; trying again");
            tokio::time::sleep(REACH_INTERVAL).await;
        }
        info!(socket = %runtime.config.socket.display(), "containers that nobody guards are ended");
        tokio::spawn(keep_sweeping(runtime.clone()));
        Ok(runtime)
    }

    fn watched(&self) -> HashSet<String> {
        lock(&self.watched).clone()
    }

    fn watch_over(&self, backend: &str) -> Watched {
        lock(&self.watched).insert(backend.to_owned());
        Watched { all: Arc::clone(&self.watched), backend: backend.to_owned() }
    }

    async fn run_backend(
        self,
        spec: BackendSpec,
        mut want: watch_channel::Receiver<Desired>,
        facts: mpsc::Sender<Observation>,
    ) {
        let backend = spec.id.clone();
        let watched = self.watch_over(&backend);
        if let Err(e) = self.try_run(spec, &mut want, &facts).await {
            warn!(backend, "not started: {e}");
            tell(&facts, Observation::Failed).await;
        }
        drop(watched);
        tell(&facts, Observation::Gone).await;
    }

    async fn try_run(
        &self,
        spec: BackendSpec,
        want: &mut watch_channel::Receiver<Desired>,
        facts: &mpsc::Sender<Observation>,
    ) -> Result<(), CreateError> {
        let Executable::Docker(docker) = &spec.executable else {
            let problem = "is for a drone that runs processes; this one runs containers";
            return Err(FieldError::new("executable.command", problem).into());
        };
        let dir = self.dirs.create(&spec.id)?.dir;
        let permit = permit_in(&dir);
        let made = tokio::select! {
            made = self.make(&spec, docker, &dir, facts) => made,
            // What was made of it by then, or still is, cannot be started without a permit.
            () = ended(want) => Ok(None),
        };
        let container = match made {
            Ok(Some(container)) => container,
            not_made => {
                end::remove_permit(&permit)?;
                return not_made.map(|_| ());
            }
        };
        let first = *want.borrow();
        let target = ContainerTarget {
            engine: self.config.socket.clone(),
            id: container.clone(),
            permit: permit.clone(),
        };
        let guard = match self.start_guard(&spec, target, first) {
            Ok(started) => started,
            Err(e) => {
                end::end(&self.docker, &container, &permit).await;
                return Err(io::Error::other(format!("cannot start a guard: {e}")).into());
            }
        };
        let watch = Watch::new(self, &spec.id, &container, &permit, facts);
        watch.watch(guard, want.clone(), first).await;
        Ok(())
    }

    async fn watch_adopted(
        self,
        id: String,
        link: Link,
        want: watch_channel::Receiver<Desired>,
        facts: mpsc::Sender<Observation>,
    ) {
        let watched = self.watch_over(&id);
        match link.hello.container.clone() {
            Some(target) => {
                // What it was told before stands; only changes are passed on.
                let first = *want.borrow();
                let watch = Watch::new(&self, &id, &target.id, &target.permit, &facts);
                watch.watch(Guard::adopted(link), want, first).await;
            }
            None => {
                warn!(
                    backend = id,
                    "its guard holds no container: this drone ran processes before; ending it"
                );
                self.clone().end_all_left(id).await;
                tell(&facts, Observation::Lost).await;
            }
        }
        drop(watched);
        tell(&facts, Observation::Gone).await;
    }

    /// Ends a backend's guard, and then its containers, for as long as that takes.
    async fn end_all_left(self, id: String) {
        end_left(self.dirs.clone(), id.clone()).await;
        while let Err(e) = prune::end_backend(&self, &id).await {
            warn!(backend = id, "its container may be left: {e}; trying again");
            tokio::time::sleep(REACH_INTERVAL).await;
        }
    }

    /// Makes the container, with all that it needs.
    async fn make(
        &self,
        spec: &BackendSpec,
        executable: &DockerExecutable,
        dir: &Path,
        facts: &mpsc::Sender<Observation>,
    ) -> Result<Option<String>, CreateError> {
        let fields = ContainerFields::check(executable)?;
        let (base, wanted, key) = (self.config.mount_base.clone(), fields.mount.clone(), spec.key.clone());
        let mount = tokio::task::spawn_blocking(move || mount::directory(base.as_deref(), &wanted, &key));
        let mount = mount.await.map_err(io::Error::other)??;
        create::image(&self.docker, &fields).await?;
        tell(facts, Observation::Starting).await;
        let permit = permit_in(dir);
        OpenOptions::new().create(true).truncate(true).write(true).open(&permit)?;
        let mount = mount.as_deref();
        create::container(&self.docker, &self.owner, spec, &fields, mount, dir, &permit).await.map(Some)
    }

    /// Starts the guard. It does nothing before it has got the line that arms it.
    fn start_guard(&self, spec: &BackendSpec, target: ContainerTarget, want: Desired) -> io::Result<Guard> {
        let paths = self.dirs.create(&spec.id)?;
        let guard_log = BackendsDir::open_guard_log(&paths)?;
        let arm = Arm {
            command: Vec::new(),
            env: BTreeMap::new(),
            cwd: paths.dir,
            log: paths.output_log,
            hide: None,
            open_files: None,
            container: Some(target),
            update: process::update(self.clock, want),
        };
        let arm_line = line(&arm)?;
        let mut command = Command::new(OWN_PROGRAM);
        command
            // For whoever looks at the list of processes.
            .arg0("holdfast-drone")
            .arg(GUARD_ARGUMENT)
            .arg(&spec.id)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(guard_log)
            // Ctrl-C at the drone's terminal is for the drone alone.
            .process_group(0);
        let (child, known) = self.family.spawn(&mut command)?;
        Ok(Guard::started(child, Some(known), arm_line))
    }
}

impl Runtime for DockerRuntime {
    fn adopt(
        &self,
        id: String,
        link: Link,
        want: watch_channel::Receiver<Desired>,
        facts: mpsc::Sender<Observation>,
    ) -> BoxFuture<'static, ()> {
        Box::pin(self.clone().watch_adopted(id, link, want, facts))
    }

    fn end_left(&self, id: String) -> BoxFuture<'static, ()> {
        Box::pin(self.clone().end_all_left(id))
    }

    fn run(
        &self,
        spec: BackendSpec,
        want: watch_channel::Receiver<Desired>,
        facts: mpsc::Sender<Observation>,
    ) -> BoxFuture<'static, ()> {
        Box::pin(self.clone().run_backend(spec, want, facts))
    }
}

/// Waits until an end is wanted; for ever if nobody can want one any more.
async fn ended(want: &mut watch_channel::Receiver<Desired>) {
    if want.wait_for(|want| want.end.is_some()).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Waits for the engine, and agrees with it on a version.
async fn reach(socket: &Path) -> Docker {
    let address = format!("unix://{}", socket.display());
    loop {
        let reached =
            match Docker::connect_with_unix(&address, create::ENGINE_MAX.as_secs(), API_DEFAULT_VERSION) {
                Ok(docker) => docker.negotiate_version().await,
                Err(e) => Err(e),
            };
        match reached {
            Ok(docker) => return docker,
            Err(e) => warn!("--docker-socket {}: {e}; trying again", socket.display()),
        }
        tokio::time::sleep(REACH_INTERVAL).await;
    }
}

async fn keep_sweeping(runtime: DockerRuntime) {
    loop {
        tokio::time::sleep(prune::INTERVAL).await;
        runtime.family.reap();
        if let Err(e) = prune::sweep(&runtime).await {
            warn!("containers without a guard may be left: {e}");
        }
    }
}
