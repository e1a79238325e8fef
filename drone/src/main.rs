//! `holdfast-drone`: see the library.

use clap::Parser;
use holdfast_drone::agent::{Agent, EVENTS_MAX, Event};
use holdfast_drone::clock::DroneClock;
use holdfast_drone::config::{Config, Flags, RuntimeKind};
use holdfast_drone::data_dir::DataDir;
use holdfast_drone::data_id::{self, Machine};
use holdfast_drone::discovery::Discovery;
use holdfast_drone::guard::{self, GUARD_ARGUMENT};
use holdfast_drone::journal::{self, Boot};
use holdfast_drone::open_files::{self, OpenFiles};
use holdfast_drone::runtime::Runtime;
use holdfast_drone::runtime::docker::{DockerConfig, DockerRuntime, Owner};
use holdfast_drone::runtime::process::ProcessRuntime;
use holdfast_drone::runtime::supervised::Supervised;
use holdfast_drone::session::{Identity, Session, random_id};
use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use tracing_subscriber::EnvFilter;

/// Something failed while it ran.
const EXIT_FAILED: u8 = 1;
/// What `--shared-user` gives up.
const SHARED_USER_LOSS: &str = "a backend can read and remove the drone's files and those of other backends, and signal \
                                guards, so that a faulty one can end all others";
/// Wrong use.
const EXIT_USAGE: u8 = 2;

fn main() -> ExitCode {
    // Before anything else: a guard stays small, and has one thread.
    if std::env::args_os().nth(1).is_some_and(|argument| argument == GUARD_ARGUMENT) {
        return guard::main();
    }
    // The clock starts here: the only reading of the wall clock.
    let clock = DroneClock::start();
    let config = match Config::load(Flags::parse()) {
        Ok(config) => config,
        Err(e) => return usage(&e),
    };
    let filter = match &config.log {
        Some(filter) => match EnvFilter::try_new(filter) {
            Ok(filter) => filter,
            Err(e) => return usage(&format!("--log {e}")),
        },
        None => EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info")),
    };
    holdfast_logging::start(filter);
    let data_dir = match DataDir::open(&config.data_dir) {
        Ok(data_dir) => data_dir.with_output_bytes_max(config.output_bytes_max),
        Err(e) => return usage(&e),
    };
    let hides_data_dir = match config.runtime {
        // A container sees nothing of it.
        RuntimeKind::Docker => false,
        RuntimeKind::Process => match guard::probe(data_dir.path()) {
            Ok(()) => true,
            Err(e) if config.shared_user => {
                warn!(
                    "--shared-user, since backends cannot have mounts of their own ({e}): {SHARED_USER_LOSS}"
                );
                false
            }
            Err(e) => {
                return usage(&format!(
                    "backends cannot have mounts of their own ({e}): run the drone as root with CAP_SYS_ADMIN, or accept \
                     with --shared-user that {SHARED_USER_LOSS}"
                ));
            }
        },
    };
    let docker = match config.runtime {
        RuntimeKind::Process => None,
        RuntimeKind::Docker => {
            match DockerConfig::new(config.docker_socket.clone(), config.mount_base.clone()) {
                Ok(docker) => Some(docker),
                Err(e) => return usage(&e),
            }
        }
    };
    // What a killed guard leaves comes to us, and can be reaped: it is gone only then.
    if let Err(e) = nix::sys::prctl::set_child_subreaper(true) {
        warn!("cannot become a child subreaper: {e}");
    }
    let backends_open_files = match OpenFiles::raise() {
        Ok((before, after)) => {
            info!(from = before.soft, to = after.soft, "limit of open files raised as far as it may be");
            if after.soft < open_files::WANTED {
                warn!(
                    limit = after.soft,
                    "{} open files are enough for about {} backends; raise the hard limit (LimitNOFILE=) to {} for {}",
                    after.soft,
                    after.backends(),
                    open_files::WANTED,
                    open_files::BACKENDS_MAX
                );
            }
            Some(before)
        }
        Err(e) => {
            warn!("cannot raise the limit of open files: {e}");
            None
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            error!("cannot start: {e}");
            return ExitCode::from(EXIT_FAILED);
        }
    };
    match runtime.block_on(run(config, clock, data_dir, hides_data_dir, backends_open_files, docker)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            error!("{e}");
            ExitCode::from(EXIT_FAILED)
        }
    }
}

fn usage(problem: &dyn std::fmt::Display) -> ExitCode {
    holdfast_logging::line(&format!("holdfast-drone: {problem}"));
    ExitCode::from(EXIT_USAGE)
}

async fn run(
    config: Config,
    clock: DroneClock,
    data_dir: DataDir,
    hides_data_dir: bool,
    backends_open_files: Option<OpenFiles>,
    docker: Option<DockerConfig>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let boot_id = journal::boot_id()?;
    let data_id = data_id::of_directory(data_dir.path(), &Machine::read(&boot_id), random_id())?;
    let boot = Boot { id: boot_id, same_machine: data_id.same_machine };
    let identity = Identity {
        name: config.name,
        cluster: config.cluster,
        pool: config.pool,
        incarnation: random_id(),
        data_id: data_id.id,
    };
    info!(
        name = identity.name,
        incarnation = identity.incarnation,
        data_id = identity.data_id,
        "drone starts"
    );
    let (inputs, waiting) = mpsc::channel(EVENTS_MAX);
    let backends: Arc<dyn Runtime> = match docker {
        None => {
            let mut backends = ProcessRuntime::new(clock, data_dir.backends())?;
            if let Some(open_files) = backends_open_files {
                backends = backends.with_open_files(open_files);
            }
            if hides_data_dir {
                backends = backends.with_hidden(data_dir.path().to_owned());
            }
            Arc::new(backends)
        }
        Some(docker) => {
            let owner = Owner { cluster: identity.cluster.clone(), drone: identity.name.clone() };
            // Nothing is taken on, and nobody is told that we are here, before it is done.
            Arc::new(DockerRuntime::start(clock, data_dir.backends(), owner, docker).await?)
        }
    };
    let backends: Arc<dyn Runtime> = Arc::new(Supervised::new(backends));
    let agent =
        Agent::new(clock, data_dir, backends, config.ip, inputs.clone(), &identity.incarnation, boot)?;
    let session = Session::new(identity, clock, Discovery::new(config.controllers)?, inputs.clone());
    let stop = CancellationToken::new();
    let mut session = tokio::spawn(session.run(stop.clone()));
    let signals = tokio::spawn(pass_on_signals(inputs)?);
    let result = tokio::select! {
        result = agent.run(waiting) => result,
        // It ends only when it is told to, or by a panic. The next drone adopts the backends.
        ended = &mut session => {
            return Err(format!("the session with the controllers has failed: {ended:?}").into());
        }
    };
    signals.abort();
    stop.cancel();
    // Closes the socket, so that the controllers need not find out.
    session.await?;
    info!("drone ends");
    Ok(result?)
}

/// Tells the agent of SIGTERM, SIGINT and SIGHUP.
fn pass_on_signals(inputs: mpsc::Sender<Event>) -> io::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    Ok(async move {
        loop {
            let event = tokio::select! {
                _ = terminate.recv() => Event::Stop,
                _ = interrupt.recv() => Event::Stop,
                _ = hang_up.recv() => Event::Leave,
            };
            if inputs.send(event).await.is_err() {
                return;
            }
        }
    })
}
