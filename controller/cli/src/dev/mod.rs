//! `holdfast dev`: a whole cluster on this machine, until Ctrl-C.
//!
//! ```text
//!   plan ──▶ controllers started ──init, ready──▶ drones started ──ready──▶ summary, watch ──signal──▶ stop
//!                 │ one ends, or time is up                              │ one ends: say so       drones first
//!                 └──────────────▶ its log's end, stop                   └ the last ends: stop
//! ```

mod children;
mod plan;
mod summary;

use crate::args::DevArgs;
use crate::error::CliError;
use crate::format::duration;
use crate::output::Out;
use children::{Patience, Running, any_alive, described, next_end, start, stop};
use futures::TryStreamExt;
use futures::future::join_all;
use holdfast_client::wire::ApiErrorKind;
use holdfast_client::{Client, ClientError, DroneFilter, RequestOptions};
use nix::sys::signal::Signal;
use plan::Plan;
use std::io::{Read, Seek, SeekFrom};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::Duration;
use summary::Summary;
use tempfile::TempDir;
use tokio::signal::unix::{Signal as Listener, SignalKind, signal};
use tokio::time::{Instant, sleep, timeout};

/// How long controllers, and then drones, may take to be ready.
const READY_MAX: Duration = Duration::from_secs(60);
/// Between two questions whether they are ready; HTTP has no way to be told.
const READY_POLL: Duration = Duration::from_millis(50);
/// Time-out of one such question, in milliseconds: longer than a controller takes to say that it is not.
const READY_ATTEMPT_MS: u64 = 2_000;
/// How long drones may take to end: they end their backends first, for which they allow themselves 36 s.
const DRONE_PATIENCE: Patience = Patience { asked: Duration::from_secs(40), urged: Duration::from_secs(10) };
/// How long controllers may take to end.
const CONTROLLER_PATIENCE: Patience =
    Patience { asked: Duration::from_secs(10), urged: Duration::from_secs(2) };
/// What controllers get if this process is killed. They are made for it.
const CONTROLLER_ORPHANED: Signal = Signal::SIGKILL;
/// What drones get if this process is killed: time to end their backends, which would live on to their hard deadline.
const DRONE_ORPHANED: Signal = Signal::SIGTERM;
/// How much of a log is shown when its process ends too soon, in bytes.
const LOG_TAIL_BYTES: u64 = 2_048;

/// What asks this process to end.
struct Signals {
    interrupt: Listener,
    terminate: Listener,
    hangup: Listener,
}

impl Signals {
    fn new() -> Result<Self, CliError> {
        let listen = |kind| signal(kind).map_err(|error| CliError::io("listening for signals", error));
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hangup.recv() => {}
        }
    }
}

/// Where everything is kept.
struct DataDir {
    path: PathBuf,
    /// Removes itself.
    temporary: Option<TempDir>,
}

impl DataDir {
    fn new(given: Option<&Path>) -> Result<Self, CliError> {
        match given {
            Some(path) => {
                let failed = |error| CliError::io(format!("making {}", path.display()), error);
                std::fs::create_dir_all(path).map_err(failed)?;
                Ok(Self { path: std::path::absolute(path).map_err(failed)?, temporary: None })
            }
            None => {
                let temporary = tempfile::Builder::new()
                    .prefix("holdfast-dev-")
                    .tempdir()
                    .map_err(|error| CliError::io("making a temporary directory", error))?;
                Ok(Self { path: temporary.path().to_owned(), temporary: Some(temporary) })
            }
        }
    }

    fn remove(self) -> Result<(), CliError> {
        let doing = format!("removing {}", self.path.display());
        self.temporary.map_or(Ok(()), TempDir::close).map_err(|error| CliError::io(doing, error))
    }
}

/// What has been started.
#[derive(Default)]
struct Cluster {
    /// Controllers first.
    children: Vec<Running>,
    controllers: usize,
}

pub(crate) async fn run(args: DevArgs, out: &Out) -> Result<(), CliError> {
    let controller_program = beside_this("holdfast-controller")?;
    let drone_program = beside_this("holdfast-drone")?;
    // Checked before anything is made.
    Plan::new(&args, Path::new("/"))?;
    let dir = DataDir::new(args.data_dir.as_deref())?;
    let plan = Plan::new(&args, &dir.path)?;
    check_ports(&plan)?;
    let mut signals = Signals::new()?;
    let mut cluster = Cluster::default();
    let lived =
        live(&plan, [&controller_program, &drone_program], &dir, &mut cluster, &mut signals, out).await;
    end(&mut cluster, &mut signals, out).await;
    let removed = dir.remove();
    lived.and(removed)
}

/// From the first process to the signal that ends it all.
async fn live(
    plan: &Plan,
    [controller_program, drone_program]: [&Path; 2],
    dir: &DataDir,
    cluster: &mut Cluster,
    signals: &mut Signals,
    out: &Out,
) -> Result<(), CliError> {
    let begun = Instant::now();
    let client = Client::new(plan.urls())?.with_options(RequestOptions {
        deadline_ms: READY_ATTEMPT_MS,
        all_unreachable_ms: 0,
        attempt_ms: READY_ATTEMPT_MS,
        ..RequestOptions::default()
    });
    for controller in &plan.controllers {
        cluster.children.push(start(controller_program, &controller.process, CONTROLLER_ORPHANED)?);
        cluster.controllers += 1;
    }
    let children = &mut cluster.children;
    if !get_ready("the cluster", formed(&client, plan), children, signals).await? {
        return Ok(());
    }
    if !get_ready("the controllers", controllers_ready(&client, plan), children, signals).await? {
        return Ok(());
    }
    for drone in &plan.drones {
        children.push(start(drone_program, &drone.process, DRONE_ORPHANED)?);
    }
    if !get_ready("the drones", drones_ready(&client, plan), children, signals).await? {
        return Ok(());
    }
    let summary = Summary {
        plan,
        children,
        dir: &dir.path,
        temporary: dir.temporary.is_some(),
        took_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
        program: std::env::args().next().unwrap_or_else(|| "holdfast".to_owned()),
    };
    if out.json {
        out.json(&summary.json())?
    } else {
        out.text(&summary.text())?
    }
    watch(children, signals, out).await
}

/// Waits until `ready` completes. False if a signal came first.
async fn get_ready(
    what: &str,
    ready: impl Future<Output = ()>,
    children: &mut [Running],
    signals: &mut Signals,
) -> Result<bool, CliError> {
    tokio::select! {
        ready = timeout(READY_MAX, ready) => match ready {
            Ok(()) => Ok(true),
            Err(_) => Err(CliError::Failed(format!(
                "{what} were not ready after {}.{}",
                duration(u64::try_from(READY_MAX.as_millis()).unwrap_or(u64::MAX)),
                children.iter().map(log_end).collect::<String>()
            ))),
        },
        () = signals.next() => Ok(false),
        (index, status) = next_end(children) => {
            let running = children.get(index);
            Err(CliError::Failed(format!(
                "{} ended before it was ready ({}).{}",
                running.map_or("a process", |running| running.label.as_str()),
                described(status),
                running.map(log_end).unwrap_or_default()
            )))
        }
    }
}

/// Forms the cluster, unless the data directories are those of one. Asks again while not all of its members answer.
async fn formed(client: &Client, plan: &Plan) {
    let Some(first) = plan.controllers.first() else { return };
    let init = plan.init();
    loop {
        match client.init_at(&first.url, &init).await {
            Ok(_) => return,
            Err(ClientError::Refused(refusal, _)) if refusal.kind == ApiErrorKind::AlreadyInitialised => {
                return;
            }
            Err(error) => tracing::debug!(%error, "the cluster is not formed yet"),
        }
        sleep(READY_POLL).await;
    }
}

async fn controllers_ready(client: &Client, plan: &Plan) {
    loop {
        let answers = join_all(plan.controllers.iter().map(|c| client.ready_at(&c.url))).await;
        if answers.iter().all(|answer| matches!(answer, Ok(true))) {
            return;
        }
        sleep(READY_POLL).await;
    }
}

async fn drones_ready(client: &Client, plan: &Plan) {
    loop {
        let filter = DroneFilter { cluster: Some(plan.cluster.clone()), page_rows: None };
        let known: Vec<_> = client.drones(filter).try_collect().await.unwrap_or_default();
        let is_ready = |name: &str| {
            known.iter().any(|drone| drone.name == name && drone.cluster == plan.cluster && drone.ready)
        };
        if plan.drones.iter().all(|drone| is_ready(&drone.name)) {
            return;
        }
        sleep(READY_POLL).await;
    }
}

/// Until a signal comes, or nothing is left.
async fn watch(children: &mut [Running], signals: &mut Signals, out: &Out) -> Result<(), CliError> {
    while any_alive(children) {
        tokio::select! {
            () = signals.next() => return Ok(()),
            (index, status) = next_end(children) => {
                if let Some(running) = children.get(index) {
                    out.note(&format!(
                        "{} (pid {}) ended by itself: {}; its log: {}",
                        running.label, running.pid, described(status), running.log.display()
                    ));
                }
            }
        }
    }
    Err(CliError::Failed("nothing is left running".to_owned()))
}

/// Drones first, so that they can still tell the controllers what they ended. A further signal makes it faster.
async fn end(cluster: &mut Cluster, signals: &mut Signals, out: &Out) {
    if any_alive(&cluster.children) {
        out.note("ending (Ctrl-C again to hurry) …");
    }
    let at = cluster.controllers.min(cluster.children.len());
    let (controllers, drones) = cluster.children.split_at_mut(at);
    stop(drones, DRONE_PATIENCE, signals.next()).await;
    stop(controllers, CONTROLLER_PATIENCE, signals.next()).await;
}

pub(crate) fn beside_this(program: &str) -> Result<PathBuf, CliError> {
    let this = std::env::current_exe().map_err(|error| CliError::io("finding this program", error))?;
    let path = this.with_file_name(program);
    if path.is_file() {
        Ok(path)
    } else {
        Err(CliError::Failed(format!(
            "{} is missing; it is built together with this program (cargo build --release)",
            path.display()
        )))
    }
}

fn check_ports(plan: &Plan) -> Result<(), CliError> {
    for controller in &plan.controllers {
        for address in [controller.listen, controller.peer_listen] {
            TcpListener::bind(address).map_err(|error| {
                CliError::Failed(format!("{address} can't be used: {error}. Choose another --base-port"))
            })?;
        }
    }
    Ok(())
}

/// The last lines of a log, each on a line of its own.
fn log_end(running: &Running) -> String {
    let read = || -> std::io::Result<String> {
        let mut file = std::fs::File::open(&running.log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
        let mut tail = Vec::new();
        file.take(LOG_TAIL_BYTES).read_to_end(&mut tail)?;
        Ok(String::from_utf8_lossy(&tail).into_owned())
    };
    let tail = read().unwrap_or_else(|error| error.to_string());
    tail.lines().map(|line| format!("\n  {}: {line}", running.label)).collect()
}
