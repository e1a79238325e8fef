//! `holdfast-controller`: one replica. See the library.

use clap::Parser;
use holdfast_controller::config::{Flags, Settings};
use holdfast_controller::restore::RestoreFlags;
use holdfast_controller::room;
use holdfast_controller::serve::{ServeError, serve};
use raft_store::OpenError;
use std::io::Write;
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// What one thread allocates here another one mostly frees (a request's answer, an entry's bytes), at which the C library
/// is slow: about a fifth of a loaded controller's time went there.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Exit code of wrong use; clap's own errors end with it too.
const WRONG_USE: u8 = 2;
/// Exit code of a failure.
const FAILED: u8 = 1;

/// What is logged unless told otherwise. The Raft library's own news are for those who look into it.
const LOG_DEFAULT: &str = "info,openraft=error";

fn complain(error: &dyn std::fmt::Display) {
    holdfast_logging::line(&format!("holdfast-controller: {error}"));
}

fn log_filter(settings: &Settings) -> Result<EnvFilter, String> {
    match &settings.log {
        Some(filter) => filter.parse().map_err(|error| format!("--log {filter:?} is not a filter: {error}")),
        None => Ok(EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(LOG_DEFAULT))),
    }
}

fn restore(flags: RestoreFlags) -> ExitCode {
    raise_open_files();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            complain(&format_args!("can't start: {error}"));
            return ExitCode::from(FAILED);
        }
    };
    match runtime.block_on(flags.run()) {
        Ok(done) => {
            // Where stdout is closed there is nobody to tell.
            let _ = writeln!(std::io::stdout(), "{done}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            complain(&error);
            ExitCode::from(if error.is_wrong_use() { WRONG_USE } else { FAILED })
        }
    }
}

/// Takes all the open files that the system lets us have: each drone and client needs one, and a shell gives 1,024.
fn raise_open_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files can't be raised; more than some hundred drones may not fit");
    }
}

/// Resolves when the process is asked to stop.
async fn asked_to_stop() -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// As [`asked_to_stop`]; without signals it serves until it is killed, which it survives too.
async fn stop() {
    if let Err(error) = asked_to_stop().await {
        tracing::error!(%error, "signals can't be received");
        std::future::pending::<()>().await;
    }
}

fn main() -> ExitCode {
    // The one subcommand: everything else about this program is flags.
    if std::env::args_os().nth(1).is_some_and(|first| first == "restore") {
        return restore(RestoreFlags::parse_from(std::env::args_os().skip(1)));
    }
    let settings = match Flags::parse().with_file().and_then(Flags::settle) {
        Ok(settings) => settings,
        Err(error) => {
            complain(&error);
            return ExitCode::from(WRONG_USE);
        }
    };
    let filter = match log_filter(&settings) {
        Ok(filter) => filter,
        Err(error) => {
            complain(&error);
            return ExitCode::from(WRONG_USE);
        }
    };
    holdfast_logging::start(filter);
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            complain(&format_args!("can't start: {error}"));
            return ExitCode::from(FAILED);
        }
    };
    let served = runtime.block_on(serve(settings.clone(), stop()));
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is_out_of_space() => {
            complain(&error);
            if runtime.block_on(room::wait(&settings, &error.to_string(), stop())) {
                let error = room::start_afresh();
                complain(&format_args!("can't start afresh: {error}"));
                return ExitCode::from(FAILED);
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            complain(&error);
            let wrong_use = matches!(error, ServeError::Open(OpenError::Config { .. }));
            ExitCode::from(if wrong_use { WRONG_USE } else { FAILED })
        }
    }
}
