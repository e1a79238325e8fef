//! `holdfast drones`.

use crate::args::{DrainArgs, DronesCommand};
use crate::error::CliError;
use crate::format::{clean, duration};
use crate::listing;
use crate::output::{Column, Out};
use futures::TryStreamExt;
use holdfast_client::wire::http::{DrainRequest, DrainResult, DroneInfo};
use holdfast_client::wire::limits::LIST_LIMIT_MAX;
use holdfast_client::{Client, DroneFilter};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// How often `drain --wait` looks how many backends are still to go.
const LOOK_EVERY: Duration = Duration::from_millis(500);

const COLUMNS: [Column; 7] = [
    Column::Left("NAME"),
    Column::Left("CLUSTER"),
    Column::Maybe("POOL"),
    Column::Left("STATE"),
    Column::Right("BACKENDS"),
    Column::Right("HEARD"),
    Column::Left("VERSION"),
];

pub(crate) async fn run(client: &Client, command: DronesCommand, out: &Out) -> Result<(), CliError> {
    match command {
        DronesCommand::List { cluster, limit } => {
            let filter = DroneFilter { cluster, page_rows: listing::page_rows(limit.rows) };
            let drones = listing::collect(client.drones(filter), limit.rows, out).await?;
            listing::print(&drones, out, "no drones", &COLUMNS, row)
        }
        DronesCommand::Drain(args) => drain(client, args, out).await,
        DronesCommand::Undrain { name, cluster } => {
            let cluster = cluster_or_found(client, &name, cluster).await?;
            let undo = DrainRequest { undo: true, ..DrainRequest::default() };
            let result = client.drain_with(&cluster, &name, &undo).await?;
            let text = if result.updated { "takes backends again" } else { "was not draining" };
            said(out, &result, &format!("{name} {text}"))
        }
    }
}

async fn drain(client: &Client, args: DrainArgs, out: &Out) -> Result<(), CliError> {
    let DrainArgs { name, cluster, deadline_ms, wait, wait_timeout_ms } = args;
    let cluster = cluster_or_found(client, &name, cluster).await?;
    let mut result = match deadline_ms {
        None => client.drain(&cluster, &name).await?,
        Some(_) => client.drain_with(&cluster, &name, &DrainRequest { deadline_ms, undo: false }).await?,
    };
    let mut text = format!("{name} {}", drained(&result));
    if wait {
        let time_ms = wait_timeout_ms.saturating_add(deadline_ms.unwrap_or(0));
        let end = Instant::now().checked_add(Duration::from_millis(time_ms));
        while let left @ 1.. = backends_of(client, &cluster, &name).await? {
            if end.is_some_and(|end| Instant::now() >= end) {
                return Err(CliError::Failed(format!("{name} still has {}", backends(left))));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        result.remaining = Some(0);
        text = format!("{name} takes no new backends and has none");
    }
    said(out, &result, &text)
}

fn drained(result: &DrainResult) -> String {
    let said = if result.updated { "takes no new backends" } else { "was draining already" };
    match result.remaining {
        // An older controller.
        None => said.to_owned(),
        Some(left) => format!("{said} and has {}", backends(left)),
    }
}

fn backends(count: u64) -> String {
    match count {
        0 => "none".to_owned(),
        1 => "1 backend".to_owned(),
        count => format!("{count} backends"),
    }
}

fn said(out: &Out, result: &DrainResult, text: &str) -> Result<(), CliError> {
    if out.json { out.json(result) } else { out.text(text) }
}

/// How many backends a drone has.
async fn backends_of(client: &Client, cluster: &str, name: &str) -> Result<u64, CliError> {
    let filter = DroneFilter { cluster: Some(cluster.to_owned()), page_rows: Some(LIST_LIMIT_MAX) };
    let mut drones = std::pin::pin!(client.drones(filter));
    while let Some(drone) = drones.try_next().await? {
        if drone.name == name {
            return Ok(drone.backend_count);
        }
    }
    Err(CliError::Failed(format!("there is no drone {name}")))
}

async fn cluster_or_found(client: &Client, name: &str, cluster: Option<String>) -> Result<String, CliError> {
    match cluster {
        Some(cluster) => Ok(cluster),
        None => cluster_of(client, name).await,
    }
}

/// The one cluster that has a drone of that name.
async fn cluster_of(client: &Client, name: &str) -> Result<String, CliError> {
    let drones: Vec<DroneInfo> = client.drones(DroneFilter::default()).try_collect().await?;
    let clusters: BTreeSet<String> =
        drones.into_iter().filter(|drone| drone.name == name).map(|drone| drone.cluster).collect();
    let mut names = clusters.into_iter();
    match (names.next(), names.next()) {
        (None, _) => Err(CliError::Failed(format!("there is no drone {name}"))),
        (Some(cluster), None) => Ok(cluster),
        (Some(first), Some(second)) => {
            let all: Vec<String> = [first, second].into_iter().chain(names).collect();
            Err(CliError::Usage(format!(
                "several clusters have a drone {name}: name one of them with --cluster ({})",
                all.join(", ")
            )))
        }
    }
}

fn state(drone: &DroneInfo) -> &'static str {
    match (drone.draining, drone.ready) {
        _ if drone.stopping => "stopping",
        (true, _) => "draining",
        (false, true) => "ready",
        (false, false) => "not ready",
    }
}

fn row(drone: &DroneInfo) -> Vec<String> {
    vec![
        clean(&drone.name).into_owned(),
        clean(&drone.cluster).into_owned(),
        clean(&drone.pool).into_owned(),
        state(drone).to_owned(),
        drone.backend_count.to_string(),
        drone.last_heartbeat_age_ms.map_or_else(|| "never".to_owned(), |ms| format!("{} ago", duration(ms))),
        clean(&drone.version).into_owned(),
    ]
}
