//! `holdfast cluster`.

use crate::args::ClusterCommand;
use crate::error::CliError;
use crate::format::{clean, time};
use crate::output::{Column, Out, fields, table};
use futures::future::join_all;
use holdfast_client::wire::http::{ClusterInfo, MemberInfo};
use holdfast_client::{Client, RequestOptions};

/// How long to look for a leader, in milliseconds: longer than an election takes.
const LEADER_MS_MAX: u64 = 3_000;
/// How long one controller may take to say how far it is, in milliseconds.
const MEMBER_MS_MAX: u64 = 1_000;

const COLUMNS: [Column; 7] = [
    Column::Right("ID"),
    Column::Left("ROLE"),
    Column::Left("URL"),
    Column::Left("PEERS"),
    Column::Right("APPLIED"),
    Column::Right("LAG"),
    Column::Left("ANSWERS"),
];

pub(crate) async fn run(
    client: &Client,
    urls: &[String],
    command: ClusterCommand,
    out: &Out,
) -> Result<(), CliError> {
    let ClusterCommand::Status = command;
    let mut info = any_view(client, urls, out).await?;
    let answers = ask_members(client, &mut info).await;
    if out.json { out.json(&info) } else { out.text(&shown(&info, &answers)) }
}

/// The leader's view; where nobody leads, what some controller last knew.
async fn any_view(client: &Client, urls: &[String], out: &Out) -> Result<ClusterInfo, CliError> {
    let all = client.options();
    let patient = client.with_options(RequestOptions {
        deadline_ms: all.deadline_ms.min(LEADER_MS_MAX),
        attempt_ms: all.attempt_ms.min(LEADER_MS_MAX),
        ..all.clone()
    });
    let error = match patient.cluster_info().await {
        Ok(info) => return Ok(info),
        Err(error) => error,
    };
    let one = client.with_options(RequestOptions { attempt_ms: MEMBER_MS_MAX, ..all.clone() });
    for url in urls {
        if let Ok(info) = one.cluster_info_at(url).await {
            out.note(&format!("no leader answers; this is what {url} last knew"));
            return Ok(info);
        }
    }
    Err(error.into())
}

/// A controller knows its own applied index alone, so each is asked for its own. Says which of them answered.
async fn ask_members(client: &Client, info: &mut ClusterInfo) -> Vec<bool> {
    let client =
        client.with_options(RequestOptions { attempt_ms: MEMBER_MS_MAX, ..client.options().clone() });
    let views = join_all(info.members.iter().map(|member| {
        let (client, url) = (client.clone(), member.url.clone());
        async move { client.cluster_info_at(&url?).await.ok() }
    }))
    .await;
    let leader_applied = leader_of(info).and_then(|leader| leader.applied);
    let mut answers = Vec::with_capacity(views.len());
    for (member, view) in info.members.iter_mut().zip(views) {
        answers.push(view.is_some());
        let own = view.and_then(|view| view.members.into_iter().find(|m| m.id == member.id));
        if member.applied.is_none() {
            member.applied = own.and_then(|own| own.applied);
        }
        if member.lag.is_none() {
            member.lag = leader_applied.zip(member.applied).map(|(leader, own)| leader.saturating_sub(own));
        }
    }
    answers
}

fn leader_of(info: &ClusterInfo) -> Option<&MemberInfo> {
    info.members.iter().find(|member| Some(member.id) == info.leader)
}

fn shown(info: &ClusterInfo, answers: &[bool]) -> String {
    let head = fields(&[
        ("cluster", info.cluster_id.clone().unwrap_or_else(|| "not formed yet".to_owned())),
        (
            "leader",
            match (info.leader, leader_of(info).and_then(|leader| leader.url.as_deref())) {
                (Some(id), Some(url)) => format!("{id} at {}", clean(url)),
                (Some(id), None) => id.to_string(),
                (None, _) => "none".to_owned(),
            },
        ),
        ("term", info.term.to_string()),
        ("cluster time", time(info.cluster_time)),
        ("lease", info.lease.map(|lease| lease.to_string()).unwrap_or_default()),
        ("checksum", format!("{:016x} at index {}", info.checksum.value, info.checksum.index)),
    ]);
    let number = |n: Option<u64>| n.map_or_else(|| "-".to_owned(), |n| n.to_string());
    let rows: Vec<Vec<String>> = info
        .members
        .iter()
        .zip(answers)
        .map(|(member, answers)| {
            vec![
                member.id.to_string(),
                clean(&member.role).into_owned(),
                member.url.as_deref().map_or_else(|| "-".to_owned(), |url| clean(url).into_owned()),
                clean(&member.peer_addr).into_owned(),
                number(member.applied),
                number(member.lag),
                crate::format::yes_no(*answers),
            ]
        })
        .collect();
    format!("{head}\n\n{}", table(&COLUMNS, &rows))
}
