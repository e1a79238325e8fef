//! `holdfast drones`.

use crate::args::DronesCommand;
use crate::error::CliError;
use crate::format::{clean, duration};
use crate::listing;
use crate::output::{Column, Out};
use futures::TryStreamExt;
use holdfast_client::wire::http::DroneInfo;
use holdfast_client::{Client, DroneFilter};
use std::collections::BTreeSet;

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
        DronesCommand::Drain { name, cluster } => {
            let cluster = match cluster {
                Some(cluster) => cluster,
                None => cluster_of(client, &name).await?,
            };
            let result = client.drain(&cluster, &name).await?;
            if out.json {
                out.json(&result)
            } else if result.updated {
                out.text(&format!("{name} takes no new backends"))
            } else {
                out.text(&format!("{name} was draining already"))
            }
        }
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
