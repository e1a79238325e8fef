//! `holdfast`, the command line.
//!
//! ```text
//!   argv, HOLDFAST_*, TOML ──args──▶ command ──holdfast-client──▶ controllers
//!                                      │  │
//!                      dev ────────────┘  └──▶ output: tables or JSON on stdout, everything else on stderr
//!                       │
//!                       └── starts, watches and ends holdfast-controller and holdfast-drone processes
//! ```
//!
//! Invariants:
//!
//! 1. With `--json`, stdout holds one JSON document and nothing else.
//! 2. The exit code says what happened: 0 done, 1 refused or failed, 2 wrong use, 3 no controller reachable.
//! 3. A reader of stdout that goes away ends the command silently.
//! 4. No process that `dev` started outlives it: not at its ordinary end, and if it is killed controllers are killed
//!    with it and drones are asked to end, which they do after their backends.

mod args;
mod backends;
mod cluster;
mod connect;
mod dev;
mod drones;
mod error;
mod format;
mod keys;
mod listing;
mod logs;
mod output;
mod settings;
mod snapshot;

use args::{Cli, Command};
use clap::CommandFactory;
use error::CliError;
use holdfast_client::{Client, RequestOptions};
use output::Out;
use std::process::ExitCode;

/// Without a single reachable controller, commands give up after this long rather than after `--timeout`: nothing is
/// running there, more likely than not. In milliseconds.
const ALL_UNREACHABLE_MS: u64 = 3_000;

fn main() -> ExitCode {
    let cli = match args::parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(error) => return error.report(),
    };
    start_log();
    // One thread: a child's parent-death signal is tied to the thread that started it, and this one lives to the end.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return CliError::io("starting", error).report(),
    };
    match runtime.block_on(run(cli)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => error.report(),
    }
}

/// Log lines go to stderr, and only when `HOLDFAST_LOG` asks for them.
fn start_log() {
    let filter = tracing_subscriber::EnvFilter::builder()
        .with_default_directive(tracing_subscriber::filter::LevelFilter::OFF.into())
        .with_env_var("HOLDFAST_LOG")
        .from_env_lossy();
    holdfast_logging::start(filter);
}

async fn run(cli: Cli) -> Result<(), CliError> {
    let out = Out::new(cli.json);
    let options = RequestOptions {
        deadline_ms: cli.timeout_ms,
        all_unreachable_ms: ALL_UNREACHABLE_MS.min(cli.timeout_ms),
        ..RequestOptions::default()
    };
    let client = || Client::new(cli.controller.clone()).map(|client| client.with_options(options));
    match cli.command {
        Command::Dev(args) => dev::run(args, &out).await,
        Command::Connect(args) => connect::run(&client()?, args, &out).await,
        Command::Keys(command) => keys::run(&client()?, command, &out).await,
        Command::Backends(command) => backends::run(&client()?, command, &out).await,
        Command::Drones(command) => drones::run(&client()?, command, &out).await,
        Command::Cluster(command) => cluster::run(&client()?, &cli.controller, command, &out).await,
        Command::Snapshot(command) => snapshot::run(client, command, &out).await,
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "holdfast", &mut script);
            out.bytes(&script)
        }
    }
}
