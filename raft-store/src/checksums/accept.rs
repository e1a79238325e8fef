//! The operator's decision which of several checksums is right.
//!
//! ```text
//!   the leader has the accepted checksum? ─no─▶ hand over to a voter that has it, which is asked then
//!        │ yes
//!   voters with another one leave the membership, in one change
//!        │
//!   the decision is committed: acquisitions begin again
//! ```
//!
//! *Voters that differ are removed before anything stops.* No value has a majority, so the voters that remain are no
//! quorum of the present membership: once the others had stopped, nothing could be committed any more. Their *logs* are
//! right, so they can still acknowledge the change that removes them.
//!
//! Asking again is safe at every step: who is removed already is not removed again, and the same decision twice changes
//! nothing.

use crate::api::MemberError;
use crate::membership::changes::{majority_remains, write};
use crate::membership::duties::hand_over;
use crate::store::{Inner, Store};
use crate::transport::client::RpcError;
use crate::transport::wire::{ProposeRefusal, Reply, Request};
use holdfast_core::checksums::{Verdict, show_value, show_values};
use holdfast_core::command::{Command, Proposal};
use holdfast_core::outcome::Outcome;
use openraft::ChangeMembers;
use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::Instant;

/// How long a leader without the accepted checksum may take to hand over.
const HAND_OVER_DEADLINE: Duration = Duration::from_secs(2);
/// How long the decision may take to be committed.
const COMMIT_DEADLINE: Duration = Duration::from_secs(5);
/// How long to wait for news of a leader before asking again.
const LEADER_POLL: Duration = Duration::from_millis(50);

/// Carries out the decision, if this replica leads. Gives whether anything changed.
pub(crate) async fn accept_here(inner: &Inner, index: u64, value: u64) -> Result<bool, MemberError> {
    if let Some(why) = inner.stopped() {
        return Err(MemberError::Stopped(why));
    }
    let Ok(_alone) = inner.changing.try_lock() else {
        return Err(MemberError::Busy("the membership is being changed".into()));
    };
    let metrics = inner.metrics();
    if !inner.leads(&metrics) || !inner.formed.load(Ordering::Acquire) {
        return Err(MemberError::NotLeader);
    }
    let me = inner.id;
    let effective = metrics.membership_config.clone();
    if metrics.committed_membership_config.log_id() != effective.log_id()
        || effective.membership().get_joint_config().len() > 1
    {
        return Err(MemberError::Busy("the last change of the membership has not ended yet".into()));
    }
    let unreadable = |error| MemberError::Stopped(format!("reading the state failed: {error}"));
    let state = super::read_state(inner).map_err(unreadable)?;
    let Some(split) = &state.record.split else {
        return match state.record.accepted {
            Some(accepted) if (accepted.index, accepted.value) == (index, value) => Ok(false),
            _ => Err(MemberError::Unsafe(nothing_to_decide(inner, &state))),
        };
    };
    if split.index != index {
        return Err(MemberError::invalid(
            "index",
            format!(
                "is {index}, and what is to be decided is the checksum at index {}, where {}",
                split.index,
                show_values(&split.values)
            ),
        ));
    }
    // What was recorded, and what has become known since.
    let mut values = split.values.clone();
    for (member, seen) in state.values_at(me, &inner.directory.checksums.seen(), index) {
        if let Err(at) = values.binary_search_by_key(&member, |(known, _)| *known) {
            values.insert(at, (member, seen));
        }
    }
    if !values.iter().any(|(_, seen)| *seen == value) {
        return Err(MemberError::invalid(
            "value",
            format!(
                "is {}, which no member has at index {index}: {}",
                show_value(value),
                show_values(&values)
            ),
        ));
    }
    let voters: BTreeSet<u64> = effective.membership().voter_ids().collect();
    let having = |wanted: bool| {
        let these = values.iter().filter(move |(_, seen)| (*seen == value) == wanted);
        these.map(|(member, _)| *member).filter(|member| voters.contains(member)).collect::<BTreeSet<u64>>()
    };
    let (right, wrong) = (having(true), having(false));
    if !right.contains(&me) {
        for member in &right {
            if hand_over(inner, Some(*member), HAND_OVER_DEADLINE).await {
                return Err(MemberError::NotLeader);
            }
        }
        return Err(MemberError::Unsafe(format!(
            "no voter that has {} at index {index} could take over the leadership from member {me} (voters that have it: \
             {right:?})",
            show_value(value)
        )));
    }
    if let Some(first) = wrong.first() {
        let remaining: BTreeSet<u64> = voters.difference(&wrong).copied().collect();
        majority_remains(inner, *first, &remaining).await?;
        write(inner, ChangeMembers::RemoveVoters(wrong.clone()), *effective.log_id()).await?;
    }
    if !split.values.iter().any(|(_, seen)| *seen == value) {
        // It became known after the record was made, which names the values that can be accepted.
        decide(inner, Command::ChecksumSplit { index, values: values.clone() }).await?;
    }
    let changed = decide(inner, Command::AcceptChecksum { index, value }).await?;
    tracing::warn!(
        target: "holdfast::audit",
        index,
        value = %show_value(value),
        values = %show_values(&values),
        removed = ?wrong,
        "an operator decided which checksum is right"
    );
    Ok(changed)
}

fn nothing_to_decide(inner: &Inner, state: &super::State) -> String {
    let seen = inner.directory.checksums.seen();
    match state.compare(inner.id, &seen).verdict {
        Verdict::Undecided { index, values, missing } => format!(
            "at index {index} {}, and members {missing:?} have not answered yet: they are waited for until it is known \
             that no majority agrees",
            show_values(&values)
        ),
        Verdict::Split { index, .. } => {
            format!("the difference at index {index} is not recorded yet: ask again in a moment")
        }
        _ => "the replicas' checksums do not differ: there is nothing to decide".to_owned(),
    }
}

async fn decide(inner: &Inner, command: Command) -> Result<bool, MemberError> {
    let bytes = holdfast_core::codec::encode(&Proposal { command, idempotency: None });
    match inner.propose_with(bytes.into(), None, COMMIT_DEADLINE).await {
        Ok(reply) => match reply.outcome {
            Outcome::Updated(changed) => Ok(changed),
            Outcome::Refused(refusal) => Err(MemberError::Unsafe(refusal.to_string())),
            other => Err(MemberError::OutcomeUnknown(format!("unexpected outcome {other:?}"))),
        },
        Err(ProposeRefusal::NotLeader) => Err(MemberError::NotLeader),
        Err(ProposeRefusal::Overloaded) => Err(MemberError::Busy("too many proposals are in flight".into())),
        Err(ProposeRefusal::Unknown(why)) => Err(MemberError::OutcomeUnknown(why)),
    }
}

impl Store {
    /// Makes an operator's decision known to the leader: of the checksums that were seen at `index`, `value` is right.
    /// Voters that have another one are removed, and keys can be acquired again. Asks again while the answer is "not the
    /// leader", until `deadline` from now. Gives whether anything changed: asking twice does nothing the second time.
    pub async fn accept_checksum(
        &self,
        index: u64,
        value: u64,
        deadline: Duration,
    ) -> Result<bool, MemberError> {
        let inner = &self.inner;
        let until = Instant::now() + deadline;
        let mut leader = self.leader();
        let mut doubt = None;
        loop {
            if let Some(why) = inner.stopped() {
                return Err(doubt.map_or(MemberError::Stopped(why), MemberError::OutcomeUnknown));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(doubt.map_or(MemberError::NotLeader, MemberError::OutcomeUnknown));
            }
            let known = leader.borrow_and_update().clone();
            let answer = match known {
                Some(info) if info.id == inner.id => accept_here(inner, index, value).await,
                Some(info) => ask(inner, info.id, index, value, left).await,
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
}

async fn ask(
    inner: &Inner,
    leader: u64,
    index: u64,
    value: u64,
    left: Duration,
) -> Result<bool, MemberError> {
    let Some(client) = inner.forward_client(leader) else { return Err(MemberError::NotLeader) };
    match client.request(&Request::AcceptChecksum { index, value }, left).await {
        Ok(Reply::ChecksumAccepted(result)) => result,
        Ok(other) => Err(MemberError::OutcomeUnknown(format!("the leader answered {other:?}"))),
        Err(RpcError::NotSent(_)) => Err(MemberError::NotLeader),
        Err(RpcError::NoAnswer(why)) => Err(MemberError::OutcomeUnknown(why)),
    }
}
