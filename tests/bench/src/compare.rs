//! `bench compare`: ours and the peers in turn, in one run.
//!
//! Every measurement has a fresh cluster of its own, so that none inherits another's keys, caches or compactions, and only
//! one system runs at a time. Rows of the same kind are measured one after the other, so that a machine that changes its
//! mind during a run changes it for all.

use crate::load::{self, Measured, Span};
use crate::place::Place;
use crate::problem::{During, Result};
use crate::report::{self, Row, SYSTEMS};
use crate::{etcd, holdfast, postgres};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

/// The load runs so long before it is counted.
const WARM_UP: Duration = Duration::from_secs(2);
/// Keys of each client for `renew`, renewed in turn.
const RENEW_KEYS: usize = 100;
/// Keys of each drone for `renew_batched`.
const BATCH_KEYS: usize = 1_000;
/// All drones' keys together for `renew_batched`: of more than 64 drones each has fewer.
const BATCH_KEYS_ALL: usize = 64_000;

/// What to measure.
#[derive(Debug, Clone)]
pub struct Options {
    /// Numbers of clients.
    pub clients: Vec<usize>,
    /// Systems.
    pub systems: Vec<String>,
    /// Operations.
    pub operations: Vec<String>,
    /// Seconds that are counted.
    pub seconds: u64,
    /// How often each row is measured; the one with the middle rate counts.
    pub repeat: usize,
    /// Where ours and etcd's clients connect.
    pub holdfast_place: Place,
    /// See above.
    pub etcd_place: Place,
    /// Connections of PostgreSQL's pool.
    pub postgres_connections: usize,
    /// Drones for `acquire`.
    pub drones: usize,
    /// Data of the peers; ours is in `target/tmp`.
    pub dir: PathBuf,
    /// Where the rows go.
    pub json: PathBuf,
    /// Settings of our controllers.
    pub settings: holdfast::Settings,
}

impl Options {
    fn span(&self) -> Span {
        Span { warm_up: WARM_UP, measured: Duration::from_secs(self.seconds) }
    }

    fn wants(&self, system: &str, operation: &str) -> bool {
        self.systems.iter().any(|s| s == system) && self.operations.iter().any(|o| o == operation)
    }

    fn temp_dir(&self) -> Result<TempDir> {
        std::fs::create_dir_all(&self.dir).during(self.dir.display())?;
        let dir =
            tempfile::Builder::new().prefix("bench-").tempdir_in(&self.dir).during(self.dir.display())?;
        // The server that does not run as root must be able to pass through.
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(dir.path(), open).during(dir.path().display())?;
        Ok(dir)
    }
}

async fn acquire(system: &str, clients: usize, options: &Options, dir: &Path) -> Result<Measured> {
    let span = options.span();
    match system {
        "etcd" => {
            let cluster = etcd::Cluster::start(dir).await?;
            let load = cluster.acquirers(clients, options.etcd_place).await?;
            Ok(load::run(load, span, &cluster.servers()).await?.0)
        }
        "postgres" => {
            let database = postgres::Database::start(dir, options.drones).await?;
            let load = database.acquirers(clients, options.postgres_connections).await?;
            Ok(load::run(load, span, &database.servers()).await?.0)
        }
        _ => {
            let cluster = holdfast::Cluster::start(&options.settings).await?;
            let place = options.holdfast_place;
            let drones = cluster.drones(options.drones, place, |_| String::new()).await?;
            let working: Vec<_> = drones.into_iter().map(holdfast::Working::start).collect();
            cluster.wait_fit("", place).await?;
            let load = cluster.acquirers(clients, place).await?;
            let measured = load::run(load, span, &cluster.servers()).await?.0;
            // A drone that has failed says so here.
            holdfast::Working::stop_all(working, 0).await?;
            Ok(measured)
        }
    }
}

async fn renew(system: &str, clients: usize, options: &Options, dir: &Path) -> Result<Measured> {
    let span = options.span();
    match system {
        "etcd" => {
            let cluster = etcd::Cluster::start(dir).await?;
            let load = cluster.renewers(clients, RENEW_KEYS, options.etcd_place).await?;
            Ok(load::run(load, span, &cluster.servers()).await?.0)
        }
        "postgres" => {
            let database = postgres::Database::start(dir, options.drones).await?;
            let load = database.renewers(clients, RENEW_KEYS, options.postgres_connections).await?;
            Ok(load::run(load, span, &database.servers()).await?.0)
        }
        _ => {
            let cluster = holdfast::Cluster::start(&options.settings).await?;
            let drones = cluster.holders(clients, RENEW_KEYS, options.holdfast_place).await?;
            let load = drones.into_iter().map(|drone| holdfast::Renewer::new(drone, RENEW_KEYS)).collect();
            Ok(load::run(load, span, &cluster.servers()).await?.0)
        }
    }
}

async fn renew_batched(clients: usize, options: &Options) -> Result<Measured> {
    let keys = BATCH_KEYS.min(BATCH_KEYS_ALL / clients).max(1);
    let cluster = holdfast::Cluster::start(&options.settings).await?;
    let drones = cluster.holders(clients, keys, options.holdfast_place).await?;
    let load = drones.into_iter().map(|drone| holdfast::BatchRenewer::new(drone, keys)).collect();
    Ok(load::run(load, options.span(), &cluster.servers()).await?.0)
}

async fn measure(system: &str, operation: &str, clients: usize, options: &Options) -> Result<Measured> {
    let dir = options.temp_dir()?;
    match operation {
        "acquire" => acquire(system, clients, options, dir.path()).await,
        "renew" => renew(system, clients, options, dir.path()).await,
        _ => renew_batched(clients, options).await,
    }
}

/// Measures, prints as it goes, and writes the rows.
pub async fn run(options: &Options) -> Result<()> {
    println!(
        "{} cores for servers and load alike; {} s a row after {} s of warm-up, {} × each\n",
        std::thread::available_parallelism().map_or(0, usize::from),
        options.seconds,
        WARM_UP.as_secs(),
        options.repeat,
    );
    println!("{}", report::head());
    let mut rows = Vec::new();
    for operation in ["acquire", "renew", "renew_batched"] {
        for clients in &options.clients {
            let mut repeated = SYSTEMS.map(|_| Vec::new());
            for _ in 0..options.repeat {
                for (system, into) in SYSTEMS.iter().zip(&mut repeated) {
                    // Only ours has batches.
                    if !options.wants(system, operation)
                        || (operation == "renew_batched" && *system != "holdfast")
                    {
                        continue;
                    }
                    let measured = measure(system, operation, *clients, options)
                        .await
                        .during(format!("{system} {operation} at {clients} clients"))?;
                    let row = Row::new(system, operation, *clients, &measured);
                    println!("{}", report::line(&row, &measured));
                    into.push(row);
                }
            }
            rows.extend(repeated.into_iter().filter_map(report::middle));
        }
    }
    println!("\nratios of ours to theirs:");
    for line in report::ratio_lines(&report::ratios(&rows)) {
        println!("{line}");
    }
    let text = serde_json::to_string_pretty(&rows).during("the rows")?;
    if let Some(parent) = options.json.parent() {
        std::fs::create_dir_all(parent).during(parent.display())?;
    }
    std::fs::write(&options.json, text + "\n").during(options.json.display())?;
    println!("\nwritten to {}", options.json.display());
    Ok(())
}
