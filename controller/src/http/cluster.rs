//! This controller and its cluster: health, members, leadership.

use super::args::{Consistency, QueryArgs, Write};
use super::error::Failure;
use crate::app::App;
use axum::Json;
use axum::extract::State;
use holdfast_core::checksums::show_value;
use holdfast_wire::ApiErrorKind;
use holdfast_wire::drone::VersionInfo;
use holdfast_wire::http::{
    Checksum, ChecksumAgreement, ClusterInfo, DrainResult, MemberChecksum, MemberInfo, StatusResponse,
    TransferLeader,
};
use raft_store::{ChecksumStatus, LeaderInfo, MemberStatus, ReplicaStatus};
use serde_json::{Value, json};
use std::time::Duration;

/// How long a leader waits for its successor.
const TRANSFER_DEADLINE: Duration = Duration::from_secs(5);

/// How long an operator's decision may take. It waits for a leader that has the right state, a change of the membership and
/// an entry.
const ACCEPT_DEADLINE: Duration = Duration::from_secs(15);

/// GET `/pub/health`: 200 while the process lives.
pub async fn health() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

/// GET `/ctrl/status`.
pub async fn status() -> Json<StatusResponse> {
    let version = VersionInfo::current();
    Json(StatusResponse { status: "ok".to_owned(), version: version.version, hash: version.git_hash })
}

fn member(member: MemberStatus, status: &ReplicaStatus) -> MemberInfo {
    let itself = member.id == status.id;
    let leader = status.leader.as_ref().map(|leader| leader.id);
    let role = if leader == Some(member.id) {
        "leader"
    } else if !member.voter {
        "learner"
    } else if leader.is_some() {
        "follower"
    } else {
        "unknown"
    };
    let last_log = if itself { Some(status.last_log) } else { member.last_log };
    MemberInfo {
        id: member.id,
        url: member.url,
        peer_addr: member.peer_addr,
        identity: member.identity.to_string(),
        problem: member.problem,
        role: role.to_owned(),
        last_log,
        applied: itself.then_some(status.applied),
        // Only the leader knows how far the log goes.
        lag: last_log.filter(|_| status.is_leader).map(|last| status.last_log.saturating_sub(last)),
    }
}

/// GET `/ctrl/cluster`.
pub async fn cluster(State(app): State<App>, query: QueryArgs) -> Result<Json<ClusterInfo>, Failure> {
    let consistency = query.consistency()?;
    let point = app.read(consistency).await?;
    let status = app.store.status();
    let cluster = point.view.cluster()?;
    let progress = point.view.progress()?;
    let (index, value) = progress.published.last().copied().unwrap_or_default();
    let term = if consistency == Consistency::Linearizable { point.term } else { status.term };
    Ok(Json(ClusterInfo {
        cluster_id: cluster.as_ref().map(|cluster| cluster.cluster_id.clone()),
        leader: status.leader.as_ref().map(|leader| leader.id),
        term,
        cluster_time: point.now_ms,
        members: status.members.iter().map(|m| member(m.clone(), &status)).collect(),
        checksum: Checksum::new(index, value),
        checksum_agreement: agreement(status.checksums),
        lease: cluster.map(|cluster| cluster.lease),
    }))
}

fn agreement(of: ChecksumStatus) -> ChecksumAgreement {
    let values = of.values.into_iter();
    ChecksumAgreement {
        state: of.state.name().to_owned(),
        index: of.index,
        values: values.map(|(member, value)| MemberChecksum { member, value: show_value(value) }).collect(),
        differing: of.differing,
    }
}

/// POST `/ctrl/cluster/checksum`: the operator's choice where the replicas' checksums differ and no majority agrees.
pub async fn accept_checksum(State(app): State<App>, write: Write) -> Result<Json<DrainResult>, Failure> {
    let checksum: Checksum = write.json()?;
    let value = checksum.number()?;
    let done = app.store.accept_checksum(checksum.index, value, ACCEPT_DEADLINE).await;
    let outcome = done.as_ref().map_or_else(ToString::to_string, |updated| format!("updated: {updated}"));
    tracing::info!(
        target: "holdfast::audit",
        index = checksum.index,
        value = %show_value(value),
        %outcome,
        "asked to accept a checksum"
    );
    Ok(Json(DrainResult { updated: done?, remaining: None }))
}

/// POST `/ctrl/cluster/transfer-leader`, body `{to?: id}`: another member takes over from this one, which must lead.
pub async fn transfer_leader(State(app): State<App>, write: Write) -> Result<Json<DrainResult>, Failure> {
    // Whatever is no object says nothing.
    let TransferLeader { to } = if write.body.trim_ascii_start().starts_with(b"{") {
        write.json()?
    } else {
        write.ignored_body()?;
        TransferLeader::default()
    };
    let status = app.store.status();
    if !status.is_leader {
        return Err(not_the_leader(&status));
    }
    let updated = match to {
        None => app.store.transfer_leadership(TRANSFER_DEADLINE).await,
        Some(to) if to == status.id => false,
        Some(to) if !status.members.iter().any(|member| member.id == to && member.voter) => {
            return Err(Failure::invalid("to", format!("is {to}, which is no voter")));
        }
        Some(to) => app.store.transfer_leadership_to(to, TRANSFER_DEADLINE).await,
    };
    Ok(Json(DrainResult { updated, remaining: None }))
}

/// The request is not passed on: only the leader can hand over, and the caller may have meant this member.
fn not_the_leader(status: &ReplicaStatus) -> Failure {
    let this = format!("member {} does not lead, so it has nothing to hand over", status.id);
    match &status.leader {
        Some(LeaderInfo { url: Some(url), .. }) => {
            Failure::new(ApiErrorKind::InvalidRequest, format!("{this}; ask the leader, {url}"))
        }
        Some(LeaderInfo { id, url: None }) => {
            Failure::new(ApiErrorKind::InvalidRequest, format!("{this}; ask the leader, member {id}"))
        }
        // Nothing is wrong with the request.
        None => Failure::new(ApiErrorKind::NoLeader, format!("{this}; nobody is known to lead now")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use raft_store::DiskIdentity;

    fn replica(leader: Option<u64>) -> ReplicaStatus {
        ReplicaStatus {
            id: 1,
            term: 3,
            leader: leader.map(|id| LeaderInfo { id, url: None }),
            is_leader: leader == Some(1),
            last_log: 100,
            applied: 99,
            snapshot: 0,
            members: Vec::new(),
            checksums: ChecksumStatus::default(),
        }
    }

    fn other(voter: bool, last_log: Option<u64>) -> MemberStatus {
        MemberStatus {
            id: 2,
            peer_addr: "a:1".into(),
            identity: DiskIdentity::default(),
            problem: None,
            url: None,
            voter,
            last_log,
        }
    }

    #[test]
    fn who_does_not_lead_says_who_does() {
        let mut status = replica(Some(2));
        let failure = not_the_leader(&status);
        assert_eq!(failure.kind, ApiErrorKind::InvalidRequest);
        assert!(failure.message.contains("member 1 does not lead") && failure.message.ends_with("member 2"));
        status.leader = Some(LeaderInfo { id: 2, url: Some("http://two:1".into()) });
        assert!(not_the_leader(&status).message.ends_with("http://two:1"));
        assert_eq!(not_the_leader(&replica(None)).kind, ApiErrorKind::NoLeader);
    }

    #[test]
    fn roles_and_lag_are_what_this_replica_can_know() {
        let seen = member(other(true, Some(90)), &replica(Some(1)));
        assert_eq!((seen.role.as_str(), seen.lag, seen.applied), ("follower", Some(10), None));
        assert_eq!(member(other(true, None), &replica(Some(2))).role, "leader");
        assert_eq!(member(other(true, None), &replica(None)).role, "unknown");
        assert_eq!(member(other(false, None), &replica(Some(1))).role, "learner");
        let itself = MemberStatus { id: 1, ..other(true, None) };
        let itself = member(itself, &replica(Some(2)));
        assert_eq!((itself.applied, itself.last_log, itself.lag), (Some(99), Some(100), None));
    }
}
