//! `holdfast backends`.

use crate::args::BackendsCommand;
use crate::error::CliError;
use crate::format::{clean, duration, key, time};
use crate::output::{Column, Out, fields};
use crate::{listing, logs};
use holdfast_client::wire::TerminationKind;
use holdfast_client::wire::http::BackendInfo;
use holdfast_client::{BackendFilter, Client};
use serde::Serialize;
use serde_json::json;

const COLUMNS: [Column; 7] = [
    Column::Left("ID"),
    Column::Left("KEY"),
    Column::Left("DRONE"),
    Column::Left("STATUS"),
    Column::Maybe("ADDRESS"),
    Column::Right("TOKEN"),
    Column::Right("AGE"),
];

pub(crate) async fn run(client: &Client, command: BackendsCommand, out: &Out) -> Result<(), CliError> {
    match command {
        BackendsCommand::List { prefix, limit } => {
            let filter = BackendFilter { prefix, page_rows: listing::page_rows(limit.rows) };
            let backends = listing::collect(client.backends(filter), limit.rows, out).await?;
            // Ages are of cluster time, which a listing does not tell.
            let now = match backends.is_empty() || out.json {
                true => None,
                false => client.cluster_info().await.ok().map(|info| info.cluster_time),
            };
            listing::print(&backends, out, "no backends", &COLUMNS, |backend| row(backend, now))
        }
        BackendsCommand::Show { id } => {
            let info = find(client, &id).await?;
            if out.json { out.json(&info) } else { out.text(&shown(&info)) }
        }
        BackendsCommand::Logs(args) => logs::run(client, args, out).await,
        BackendsCommand::Terminate { id, hard } => {
            let kind = if hard { TerminationKind::Hard } else { TerminationKind::Soft };
            client.terminate(&id, kind).await?;
            match (out.json, kind) {
                (true, kind) => out.json(&json!({ "id": id, "kind": kind })),
                (false, TerminationKind::Soft) => out.text(&format!("{id} is asked to end")),
                (false, TerminationKind::Hard) => out.text(&format!("{id} is being killed")),
            }
        }
    }
}

/// The backend, which is to exist.
async fn find(client: &Client, id: &str) -> Result<BackendInfo, CliError> {
    client.backend(id).await?.ok_or_else(|| CliError::Failed(format!("there is no backend {}", clean(id))))
}

fn row(backend: &BackendInfo, now: Option<u64>) -> Vec<String> {
    vec![
        backend.id.clone(),
        key(&backend.key.namespace, &backend.key.name),
        backend.drone.clone(),
        backend.status.to_string(),
        backend.address.map(|address| address.to_string()).unwrap_or_default(),
        backend.fencing_token.to_string(),
        now.map_or_else(|| "-".to_owned(), |now| duration(now.saturating_sub(backend.created_at))),
    ]
}

fn shown(backend: &BackendInfo) -> String {
    fields(&[
        ("id", backend.id.clone()),
        ("key", key(&backend.key.namespace, &backend.key.name)),
        ("tag", clean(&backend.key.tag).into_owned()),
        ("cluster", clean(&backend.cluster).into_owned()),
        ("drone", backend.drone.clone()),
        ("status", format!("{} since {}", backend.status, time(backend.status_at))),
        ("address", backend.address.map(|address| address.to_string()).unwrap_or_default()),
        ("fencing token", backend.fencing_token.to_string()),
        ("created", time(backend.created_at)),
        (
            "ended by",
            backend.termination_kind.map(|kind| format!("{} termination", word(&kind))).unwrap_or_default(),
        ),
        ("because", backend.termination_reason.map(|reason| word(&reason)).unwrap_or_default()),
        ("exit code", backend.exit_code.map(|code| code.to_string()).unwrap_or_default()),
    ])
}

/// An enum's value as the wire has it.
pub(crate) fn word(value: &impl Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}
