//! Changes of the membership that an operator asks for: add, move, remove.

use super::duties::hand_over;
use super::{MEMBERS_MAX, check_addr};
use crate::api::{MemberChange, MemberChanged, MemberError, MemberRole};
use crate::store::{Inner, Store};
use crate::transport::client::{RpcError, ask, dial};
use crate::transport::wire::{Mode, Opening, Reply, Request};
use crate::types::{LogId, Member};
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{ChangeMembershipError, ClientWriteError, RaftError};
use openraft::{ChangeMembers, Precondition};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::Instant;

/// How long one step of a change may take to be committed.
const STEP_DEADLINE: Duration = Duration::from_secs(5);
/// How long a leader that is to be removed may take to hand over.
const HAND_OVER_DEADLINE: Duration = Duration::from_secs(2);
/// How long to wait for news of a leader before asking again.
const LEADER_POLL: Duration = Duration::from_millis(50);

/// Refuses a removal after which the cluster could not continue: `answering` are those of `remaining` that answer now.
fn check_removal(id: u64, remaining: &BTreeSet<u64>, answering: &BTreeSet<u64>) -> Result<(), MemberError> {
    if remaining.is_empty() {
        return Err(MemberError::Unsafe(format!("member {id} is the last voter")));
    }
    if answering.len() <= remaining.len() / 2 {
        return Err(MemberError::Unsafe(format!(
            "of the voters that would remain ({remaining:?}) only {answering:?} answer, which is no majority: the \
             cluster would stop"
        )));
    }
    Ok(())
}

/// Makes the change, if this replica leads.
pub async fn change_here(inner: &Inner, change: MemberChange) -> Result<MemberChanged, MemberError> {
    if let Some(why) = inner.removed() {
        return Err(MemberError::Stopped(why));
    }
    let Ok(_alone) = inner.changing.try_lock() else {
        return Err(MemberError::Busy("another change of the membership is in progress".into()));
    };
    let metrics = inner.metrics();
    if !inner.leads(&metrics) || !inner.formed.load(Ordering::Acquire) {
        return Err(MemberError::NotLeader);
    }
    let effective = metrics.membership_config.clone();
    if metrics.committed_membership_config.log_id() != effective.log_id() {
        return Err(MemberError::Busy("the last change of the membership is not committed yet".into()));
    }
    let index = effective.log_id().map_or(0, |at| at.index);
    // The record of used ids must cover the membership that the change is made on.
    let mut applied = inner.applied.clone();
    let caught_up = applied.wait_for(|to| to.index >= index);
    if !matches!(tokio::time::timeout(STEP_DEADLINE, caught_up).await, Ok(Ok(_))) {
        return Err(MemberError::Busy("the last change of the membership is not applied yet".into()));
    }
    let membership = effective.membership();
    let nodes: BTreeMap<u64, Member> = membership.nodes().map(|(id, node)| (*id, node.clone())).collect();
    let voters: BTreeSet<u64> = membership.voter_ids().collect();
    let used = inner.directory.standing.applied_changes().borrow().used.clone();
    let on_top_of = *effective.log_id();
    let role = |id: u64| if voters.contains(&id) { MemberRole::Voter } else { MemberRole::Learner };
    match change {
        MemberChange::Add { peer_addr } => {
            check_addr(&peer_addr).map_err(|problem| MemberError::invalid("peer_addr", problem))?;
            let known = |addr: &str| nodes.iter().find(|(_, node)| node.peer_addr == addr);
            let (identity, naming) = ask(&peer_addr, &Opening::Identify)
                .await
                .map_err(|why| MemberError::invalid("peer_addr", format!("is not usable: {why}")))?;
            if let Some((id, _)) = nodes.iter().find(|(_, node)| node.identity == identity) {
                return Ok(MemberChanged { id: *id, role: role(*id), changed: false });
            }
            if let Some((id, _)) = known(&peer_addr) {
                return Err(MemberError::LostDisk(*id));
            }
            if let Some(naming) = naming {
                return Err(MemberError::Named {
                    peer_addr,
                    member: naming.member_id,
                    cluster_id: naming.cluster_id,
                });
            }
            if nodes.len() >= MEMBERS_MAX {
                let problem = format!("is one too many: {MEMBERS_MAX} members are allowed");
                return Err(MemberError::invalid("peer_addr", problem));
            }
            let id = used.largest().saturating_add(1);
            let node = BTreeMap::from([(id, Member { peer_addr, identity })]);
            write(inner, ChangeMembers::AddNodes(node), on_top_of).await?;
            Ok(MemberChanged { id, role: MemberRole::Learner, changed: true })
        }
        MemberChange::Move { id, peer_addr } => {
            check_addr(&peer_addr).map_err(|problem| MemberError::invalid("peer_addr", problem))?;
            let Some(known) = nodes.get(&id) else {
                return Err(if used.contains(id) {
                    MemberError::IdUsed(id)
                } else {
                    MemberError::NoSuchMember(id)
                });
            };
            if known.peer_addr == peer_addr {
                return Ok(MemberChanged { id, role: role(id), changed: false });
            }
            if let Some((other, _)) = nodes.iter().find(|(_, node)| node.peer_addr == peer_addr) {
                return Err(MemberError::invalid("peer_addr", format!("is that of member {other}")));
            }
            // The disk is the one that is recorded, whatever answers there: it must be this very member.
            let node = Member { peer_addr, identity: known.identity };
            if id != inner.id
                && let Err(why) = dial(&inner.directory, id, &node, Mode::Rpc).await
            {
                return Err(MemberError::invalid("peer_addr", format!("is not usable: {why}")));
            }
            write(inner, ChangeMembers::SetNodes(BTreeMap::from([(id, node)])), on_top_of).await?;
            Ok(MemberChanged { id, role: role(id), changed: true })
        }
        MemberChange::Remove { id } => {
            if !nodes.contains_key(&id) {
                return if used.contains(id) {
                    Ok(MemberChanged { id, role: MemberRole::Removed, changed: false })
                } else {
                    Err(MemberError::NoSuchMember(id))
                };
            }
            if membership.get_joint_config().len() > 1 {
                return Err(MemberError::Busy("the last change of the membership has not ended yet".into()));
            }
            if !voters.contains(&id) {
                write(inner, ChangeMembers::RemoveNodes(BTreeSet::from([id])), on_top_of).await?;
                return Ok(MemberChanged { id, role: MemberRole::Removed, changed: true });
            }
            let remaining: BTreeSet<u64> = voters.iter().copied().filter(|voter| *voter != id).collect();
            majority_remains(inner, id, &remaining).await?;
            if id == inner.id {
                // Whoever leads next removes this one: a leader that removes itself leaves a gap.
                if hand_over(inner, None, HAND_OVER_DEADLINE).await {
                    return Err(MemberError::NotLeader);
                }
                return Err(MemberError::Busy("leadership could not be handed over in time".into()));
            }
            write(inner, ChangeMembers::RemoveVoters(BTreeSet::from([id])), on_top_of).await?;
            Ok(MemberChanged { id, role: MemberRole::Removed, changed: true })
        }
    }
}

/// Checks that the cluster could go on without `id`. Only an answer to a heartbeat that was sent after the request came
/// counts: a removal that was begun with a voter that has just died could neither be ended nor taken back, and nothing
/// else could be committed.
pub(crate) async fn majority_remains(
    inner: &Inner,
    id: u64,
    remaining: &BTreeSet<u64>,
) -> Result<(), MemberError> {
    let mut watched = inner.raft.metrics();
    let asked = Instant::now();
    let until = asked + Duration::from_millis(inner.config.election_timeout_ms);
    loop {
        let now = watched.borrow_and_update().clone();
        // While values differ no unconfirmed snapshot is sent: one that needs one answers, and can commit nothing.
        let purged = now.purged.map_or(0, |at| at.index);
        let follows = |voter: &u64| {
            let matched = now.replication.as_ref().and_then(|all| all.get(voter).copied().flatten());
            *voter == inner.id
                || !inner.directory.checksums.is_contested()
                || matched.is_some_and(|at| at.index >= purged)
        };
        let answers = |voter: &u64| inner.answers_within(&now, *voter, asked.elapsed()) && follows(voter);
        let answering = remaining.iter().copied().filter(answers).collect();
        let Err(refusal) = check_removal(id, remaining, &answering) else { return Ok(()) };
        if !matches!(tokio::time::timeout_at(until, watched.changed()).await, Ok(Ok(()))) {
            return Err(refusal);
        }
    }
}

/// Writes one change. Voters that are left out are gone, not learners.
pub(crate) async fn write(
    inner: &Inner,
    change: ChangeMembers<u64, Member>,
    on_top_of: Option<LogId>,
) -> Result<(), MemberError> {
    tracing::info!(%change, "changing the membership");
    let precondition = Precondition::LastMembershipLogId { last_membership_log_id: on_top_of };
    let written = inner.raft.change_membership_if(change, false, [precondition]);
    match tokio::time::timeout(STEP_DEADLINE, written).await {
        Ok(Ok(_)) => Ok(()),
        Err(_) => Err(MemberError::OutcomeUnknown("it was not committed in time".into())),
        Ok(Err(RaftError::APIError(error))) => Err(match error {
            // Of a change in two steps, the first may have been made: the next leader takes it to its end.
            ClientWriteError::ForwardToLeader(_) => MemberError::NotLeader,
            ClientWriteError::LogEntryDiscarded(_) => {
                MemberError::OutcomeUnknown("the leader changed meanwhile".into())
            }
            ClientWriteError::PreconditionFailed(_)
            | ClientWriteError::ChangeMembershipError(
                ChangeMembershipError::InProgress(_) | ChangeMembershipError::UncommittedLeaderLog(_),
            ) => MemberError::Busy("another change of the membership came first".into()),
            ClientWriteError::ChangeMembershipError(error) => MemberError::Unsafe(error.to_string()),
        }),
        Ok(Err(RaftError::Fatal(fatal))) => Err(MemberError::Stopped(fatal.to_string())),
    }
}

impl Store {
    /// Adds, moves or removes a member through whoever leads, which verifies everything. Asks again while the answer is
    /// "not the leader", until `deadline` from now: doing any of them twice does nothing the second time.
    pub async fn change_members(
        &self,
        change: MemberChange,
        deadline: Duration,
    ) -> Result<MemberChanged, MemberError> {
        let inner = &self.inner;
        let until = Instant::now() + deadline;
        let mut leader = self.leader();
        let mut doubt = None;
        loop {
            if change == (MemberChange::Remove { id: inner.id }) && inner.removed().is_some() {
                return Ok(MemberChanged { id: inner.id, role: MemberRole::Removed, changed: true });
            }
            if let Some(why) = inner.stopped() {
                return Err(doubt.map_or(MemberError::Stopped(why), MemberError::OutcomeUnknown));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(doubt.map_or(MemberError::NotLeader, MemberError::OutcomeUnknown));
            }
            let known = leader.borrow_and_update().clone();
            let answer = match known {
                Some(info) if info.id == inner.id => change_here(inner, change.clone()).await,
                Some(info) => ask_leader(inner, info.id, &change, left).await,
                None => Err(MemberError::NotLeader),
            };
            match answer {
                Err(MemberError::NotLeader) => {}
                Err(MemberError::OutcomeUnknown(why)) => doubt = Some(why),
                definite => return definite,
            }
            let _ = tokio::time::timeout(left.min(LEADER_POLL), leader.changed()).await;
        }
    }

    /// Why this member serves nobody any more, if it was removed from the cluster.
    pub fn removed(&self) -> Option<String> {
        self.inner.removed()
    }

    /// Log index of the membership in force: it changes when a member comes, goes or moves.
    pub fn membership_index(&self) -> u64 {
        self.inner.directory.standing.index()
    }
}

async fn ask_leader(
    inner: &Inner,
    leader: u64,
    change: &MemberChange,
    left: Duration,
) -> Result<MemberChanged, MemberError> {
    let Some(client) = inner.forward_client(leader) else { return Err(MemberError::NotLeader) };
    match client.request(&Request::ChangeMembers(change.clone()), left).await {
        Ok(Reply::MembersChanged(result)) => result,
        Ok(other) => Err(MemberError::OutcomeUnknown(format!("the leader answered {other:?}"))),
        Err(RpcError::NotSent(_)) => Err(MemberError::NotLeader),
        Err(RpcError::NoAnswer(why)) => Err(MemberError::OutcomeUnknown(why)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_removal_that_would_stop_the_cluster_is_refused() {
        let set = |ids: &[u64]| ids.iter().copied().collect::<BTreeSet<u64>>();
        assert!(check_removal(3, &set(&[1, 2]), &set(&[1, 2])).is_ok());
        assert!(check_removal(2, &set(&[1]), &set(&[1])).is_ok());
        assert!(check_removal(4, &set(&[1, 2, 3]), &set(&[1, 2])).is_ok());
        for (remaining, answering) in [(&[][..], &[][..]), (&[1, 2], &[1]), (&[1, 2, 3, 5], &[1, 2])] {
            let refused = check_removal(4, &set(remaining), &set(answering));
            assert!(matches!(refused, Err(MemberError::Unsafe(_))), "{remaining:?} {answering:?}");
        }
    }
}
