//! `holdfast cluster`.

use crate::args::ClusterCommand;
use crate::error::CliError;
use crate::format::{clean, time};
use crate::output::{Column, Out, fields, table};
use futures::future::join_all;
use holdfast_client::wire::ApiErrorKind;
use holdfast_client::wire::http::{
    Checksum, ChecksumAgreement, ClusterInfo, DrainResult, InitCluster, MemberChangeResult, MemberInfo,
    SetMember,
};
use holdfast_client::{Client, ClientError, RequestOptions};
use std::time::Duration;
use tokio::time::Instant;

/// How long to look for a leader, in milliseconds: longer than an election takes.
const LEADER_MS_MAX: u64 = 3_000;
/// How long one controller may take to say how far it is, in milliseconds.
const MEMBER_MS_MAX: u64 = 1_000;

/// How long a cluster that was just formed may take to elect a leader.
const FORMED_PATIENCE: Duration = Duration::from_secs(10);

/// How often `init` and `add --wait` look.
const WAIT_POLL: Duration = Duration::from_millis(200);

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
    match command {
        ClusterCommand::Status => {}
        ClusterCommand::Members => return members(client, urls, out).await,
        ClusterCommand::Init { members, lease } => {
            return init(client, urls, &InitCluster { members, lease }, out).await;
        }
        ClusterCommand::Add { peer_addr, wait, wait_timeout_ms } => {
            let wait_ms = wait.then_some(wait_timeout_ms);
            return add(client, peer_addr, wait_ms, out).await;
        }
        ClusterCommand::Move { id, peer_addr } => {
            let text = format!("member {id} is reached at {peer_addr} from now on");
            let change = SetMember { id: Some(id), peer_addr };
            let done = once_free(client, || client.set_member(&change)).await?;
            return said(out, &done, &text);
        }
        ClusterCommand::Remove { id } => {
            let done = once_free(client, || client.remove_member(id)).await?;
            return said(out, &done, &format!("member {id} is removed; its id can't be used again"));
        }
        ClusterCommand::AcceptChecksum { index, value } => {
            return accept_checksum(client, Checksum { index, value }, out).await;
        }
        ClusterCommand::TransferLeader { to } => return transfer_leader(client, to, out).await,
    }
    let mut info = any_view(client, urls, out).await?;
    let answers = ask_members(client, &mut info).await;
    if out.json { out.json(&info) } else { out.text(&shown(&info, &answers)) }
}

fn said<T: serde::Serialize>(out: &Out, result: &T, text: &str) -> Result<(), CliError> {
    if out.json { out.json(result) } else { out.text(text) }
}

async fn members(client: &Client, urls: &[String], out: &Out) -> Result<(), CliError> {
    let mut info = any_view(client, urls, out).await?;
    let answers = ask_members(client, &mut info).await;
    if out.json { out.json(&info.members) } else { out.text(&member_table(&info, &answers)) }
}

/// Asks the first controller that can be reached: an interrupted init must be repeated at the same one.
async fn init(client: &Client, urls: &[String], init: &InitCluster, out: &Out) -> Result<(), CliError> {
    let mut unreachable = None;
    for url in urls {
        match client.init_at(url, init).await {
            Ok(formed) => {
                let members: Vec<String> = formed
                    .members
                    .iter()
                    .map(|member| format!("{} at {}", member.id, member.peer_addr))
                    .collect();
                let (id, members) = (&formed.cluster_id, members.join(", "));
                let text = match serves(client, url).await {
                    true => format!("cluster {id} is formed: {members}"),
                    false => format!(
                        "all members of cluster {id} have answered: {members}\nit has no leader yet; see cluster status"
                    ),
                };
                return said(out, &formed, &text);
            }
            Err(error @ ClientError::Unreachable { .. }) => unreachable = Some(error),
            Err(error) => return Err(error.into()),
        }
    }
    Err(unreachable
        .map_or_else(|| CliError::Usage("--controller names no controller".to_owned()), Into::into))
}

/// Waits until a leader serves through this controller: until then only its own disk knows the members.
async fn serves(client: &Client, url: &str) -> bool {
    let until = Instant::now() + FORMED_PATIENCE;
    while Instant::now() < until {
        if matches!(client.ready_at(url).await, Ok(true)) {
            return true;
        }
        tokio::time::sleep(WAIT_POLL).await;
    }
    false
}

/// Asks again while another change of the membership is in progress, such as the end of the one before.
async fn once_free<F: Future<Output = Result<MemberChangeResult, ClientError>>>(
    client: &Client,
    ask: impl Fn() -> F,
) -> Result<MemberChangeResult, ClientError> {
    let until = Instant::now() + Duration::from_millis(client.options().deadline_ms);
    loop {
        match ask().await {
            Err(error) if error.kind() == Some(ApiErrorKind::ChangeInProgress) && Instant::now() < until => {
                tokio::time::sleep(WAIT_POLL).await;
            }
            answer => return answer,
        }
    }
}

async fn add(client: &Client, peer_addr: String, wait_ms: Option<u64>, out: &Out) -> Result<(), CliError> {
    let change = SetMember { id: None, peer_addr };
    let mut done = once_free(client, || client.set_member(&change)).await?;
    let id = done.id;
    let until = wait_ms.map(|ms| Instant::now() + Duration::from_millis(ms));
    while done.role == "learner" && until.is_some_and(|until| Instant::now() < until) {
        tokio::time::sleep(WAIT_POLL).await;
        let info = client.cluster_info().await?;
        // A leader that does not know it yet says nothing; one that has removed it will not say "voter" any more.
        if let Some(member) = info.members.iter().find(|member| member.id == id)
            && matches!(member.role.as_str(), "follower" | "leader")
        {
            done.role = "voter".to_owned();
        }
    }
    let text = match (done.role.as_str(), done.updated) {
        ("voter", _) => format!("member {id} votes"),
        (_, true) => format!("member {id} is added; it votes as soon as it has caught up"),
        (_, false) => format!("member {id} was added already; it votes as soon as it has caught up"),
    };
    said(out, &done, &text)
}

async fn accept_checksum(client: &Client, checksum: Checksum, out: &Out) -> Result<(), CliError> {
    checksum.number().map_err(|error| CliError::Usage(error.to_string()))?;
    let updated = client.accept_checksum(&checksum).await?;
    let Checksum { index, value } = &checksum;
    let text = if updated {
        format!(
            "checksum {value} at index {index} is right; members with another one are removed, and keys can be acquired \
             again"
        )
    } else {
        format!("checksum {value} at index {index} was accepted already")
    };
    said(out, &DrainResult { updated, remaining: None }, &text)
}

async fn transfer_leader(client: &Client, to: Option<u64>, out: &Out) -> Result<(), CliError> {
    let info = client.cluster_info().await?;
    let Some(url) = leader_of(&info).and_then(|leader| leader.url.clone()) else {
        return Err(CliError::Usage("nobody is known to lead now; try again".to_owned()));
    };
    if to.is_some() && to == info.leader {
        return said(out, &DrainResult { updated: false, remaining: None }, "it leads already");
    }
    let updated = client.transfer_leader_at(&url, to).await?;
    let text = if updated {
        "leadership was handed over"
    } else {
        "leadership was not handed over: no other voter answers"
    };
    said(out, &DrainResult { updated, remaining: None }, text)
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
        ("checksum", format!("{} at index {}", clean(&info.checksum.value), info.checksum.index)),
        ("replicas", agreement(&info.checksum_agreement)),
    ]);
    let mut text = format!("{head}\n\n{}", member_table(info, answers));
    for (member, problem) in info.members.iter().filter_map(|m| m.problem.as_ref().map(|p| (m.id, p))) {
        text.push_str(&format!("\nmember {member}: {}", clean(problem)));
    }
    text
}

/// Whether the controllers' states agree, and what to do if not.
fn agreement(of: &ChecksumAgreement) -> String {
    let index = of.index;
    let values = || {
        let each = of.values.iter().map(|v| format!("member {} has {}", v.member, clean(&v.value)));
        each.collect::<Vec<_>>().join(", ")
    };
    let wrong = match of.differing.as_slice() {
        [] => String::new(),
        ids => {
            let ids = ids.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
            format!("; WRONG STATE on member {ids}: remove it, empty its data directory, add it")
        }
    };
    match of.state.as_str() {
        "agrees" => format!("agree at index {index}{wrong}"),
        "split" => format!(
            "DIFFER at index {index}, no key is acquired: {}; decide with cluster accept-checksum {index} CHECKSUM",
            values()
        ),
        "undecided" => format!("DIFFER at index {index}, waiting for a majority: {}", values()),
        "minority" => format!("WRONG STATE here at index {index}: this controller stops"),
        _ => "not compared yet".to_owned(),
    }
}

fn member_table(info: &ClusterInfo, answers: &[bool]) -> String {
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
    table(&COLUMNS, &rows)
}
