//! What a member does about the membership by itself: the leader promotes learners and completes joint memberships, and hands
//! over when it is asked to; every member greets those that it does not know.

use super::changes::write;
use crate::boot_clock::boot_ms;
use crate::store::Inner;
use crate::transport::client::connect;
use crate::transport::wire::Mode;
use crate::types::TypeConfig;
use futures::future::join_all;
use openraft::async_runtime::instant::Instant as _;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::{ChangeMembers, RaftMetrics};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::Instant;

/// A learner that lacks no more than so many entries, and answers, becomes a voter.
const PROMOTE_LAG_MAX: u64 = 256;
/// How often the leader looks whether a learner has caught up. Everything else wakes it.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How often members are greeted whose URL is not known, or all of them while no leader is known.
const GREET_EVERY: Duration = Duration::from_secs(1);

/// What a leader does next about the membership. Pure.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// The last change is not committed, or there is nothing to do.
    Nothing,
    /// Take a joint membership to its end.
    Flatten,
    /// Make a learner that has caught up a voter.
    Promote(u64),
    /// A learner has caught up, but its vote would be needed at once: too many voters do not answer.
    Await { learner: u64, silent: Vec<u64> },
}

/// What [`next_step`] looks at.
struct Seen<'a> {
    committed: bool,
    joint: bool,
    learners: &'a [u64],
    voters: &'a [u64],
    last_log: u64,
    matched: &'a dyn Fn(u64) -> Option<u64>,
    answers: &'a dyn Fn(u64) -> bool,
}

fn next_step(seen: &Seen<'_>) -> Step {
    if !seen.committed {
        return Step::Nothing;
    }
    if seen.joint {
        return Step::Flatten;
    }
    let caught_up = |id: u64| {
        let lag = (seen.matched)(id).map(|at| seen.last_log.saturating_sub(at));
        lag.is_some_and(|lag| lag <= PROMOTE_LAG_MAX) && (seen.answers)(id)
    };
    let Some(learner) = seen.learners.iter().copied().find(|id| caught_up(*id)) else { return Step::Nothing };
    // The new voter must never be needed for what makes it one: were its disk lost just then, a majority of the voters
    // before it could not continue without it (the model found it).
    let voters_then = seen.voters.len() + 1;
    let wanted = seen.voters.len().min(voters_then / 2 + 1);
    let silent: Vec<u64> = seen.voters.iter().copied().filter(|voter| !(seen.answers)(*voter)).collect();
    if seen.voters.len() - silent.len() < wanted {
        return Step::Await { learner, silent };
    }
    Step::Promote(learner)
}

pub(crate) type Metrics = RaftMetrics<TypeConfig>;

impl Inner {
    pub(crate) fn metrics(&self) -> Metrics {
        self.raft.metrics().borrow_watched().clone()
    }

    pub(crate) fn leads(&self, metrics: &Metrics) -> bool {
        metrics.current_leader == Some(self.id) && metrics.state.is_leader()
    }

    /// Whether that member has answered a heartbeat lately. Only a leader knows.
    fn answers(&self, metrics: &Metrics, id: u64) -> bool {
        self.answers_within(metrics, id, Duration::from_millis(self.config.election_timeout_ms))
    }

    /// Whether that member has answered a heartbeat that was sent no longer ago than that.
    pub(super) fn answers_within(&self, metrics: &Metrics, id: u64, recent: Duration) -> bool {
        let at = metrics.heartbeat.as_ref().and_then(|beats| beats.get(&id).copied().flatten());
        id == self.id || at.is_some_and(|at| at.into_inner().elapsed() <= recent)
    }

    /// Why this member serves no one any more, if it was removed.
    pub(crate) fn removed(&self) -> Option<String> {
        self.directory
            .standing
            .dismissed()
            .then(|| format!("member {} was removed from the cluster", self.id))
    }
}

/// The most advanced voter that answers, or the one that is asked for if it would do.
fn successor(inner: &Inner, metrics: &Metrics, wanted: Option<u64>) -> Option<u64> {
    let me = inner.id;
    let differing = inner.directory.checksums.status().differing;
    let voters = metrics.membership_config.membership().voter_ids();
    let voters: BTreeSet<u64> = voters.filter(|voter| !differing.contains(voter)).collect();
    // One that has just died has as long a log as any; handing over to it would leave the cluster without a leader.
    metrics.replication.as_ref().and_then(|matched| {
        matched
            .iter()
            .filter(|(id, at)| {
                **id != me && voters.contains(id) && at.is_some() && inner.answers(metrics, **id)
            })
            .filter(|(id, _)| wanted.is_none_or(|wanted| wanted == **id))
            .max_by_key(|(_, at)| at.map(|at| at.index))
            .map(|(id, _)| *id)
    })
}

/// If this replica leads, hands leadership to `wanted`, or to the most advanced follower, and waits for the change, at
/// most `deadline`. Returns whether it no longer leads.
pub async fn hand_over(inner: &Inner, wanted: Option<u64>, deadline: Duration) -> bool {
    let me = inner.id;
    let mut watched = inner.raft.metrics();
    let until = Instant::now() + deadline;
    loop {
        let now = watched.borrow_watched().clone();
        if now.current_leader != Some(me) {
            return true;
        }
        if now.membership_config.membership().voter_ids().all(|voter| voter == me) {
            return false;
        }
        // A follower that is only a heartbeat late may do in a moment.
        let Some(to) = successor(inner, &now, wanted) else {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || tokio::time::timeout(left, watched.changed()).await.is_err() {
                return false;
            }
            continue;
        };
        if inner.raft.trigger().transfer_leader(to).await.is_err() {
            return false;
        }
        let changed = watched.wait_until(|now| now.current_leader.is_some_and(|leader| leader != me));
        let left = until.saturating_duration_since(Instant::now());
        return tokio::time::timeout(left, changed).await.is_ok_and(|changed| changed.is_ok());
    }
}

/// Keeps [`Standing`] current and does what a leader owes to its members, until the replica stops.
pub async fn run(inner: Arc<Inner>) {
    let mut server = inner.raft.server_metrics();
    let mut applied = inner.directory.standing.applied_changes();
    loop {
        // Marked as seen before it is looked at, so that nothing is missed.
        let in_force = server.borrow_and_update().membership_config.clone();
        inner.directory.standing.set_in_force(&in_force);
        if applied.borrow_and_update().is_gone(inner.id) {
            inner.directory.standing.dismiss();
        }
        let leads = inner.leads(&inner.metrics());
        inner.directory.standing.set_leads(leads);
        if !leads {
            inner.directory.forget_losses();
        }
        if let Ok(_alone) = inner.changing.try_lock() {
            lead(&inner).await;
        }
        tokio::select! {
            changed = server.changed() => if changed.is_err() { return },
            changed = applied.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(LOOK_EVERY) => {}
            () = inner.cancel.cancelled() => return,
        }
    }
}

async fn lead(inner: &Inner) {
    let metrics = inner.metrics();
    if !inner.leads(&metrics) || !inner.formed.load(Ordering::Acquire) {
        inner.directory.standing.set_awaits(None);
        return;
    }
    let effective = metrics.membership_config.clone();
    let membership = effective.membership();
    let learners: Vec<u64> = membership.learner_ids().collect();
    let voters: Vec<u64> = membership.voter_ids().collect();
    let matched = |id: u64| {
        metrics.replication.as_ref().and_then(|all| all.get(&id).copied().flatten()).map(|at| at.index)
    };
    let answers = |id: u64| inner.answers(&metrics, id);
    let step = next_step(&Seen {
        committed: metrics.committed_membership_config.log_id() == effective.log_id(),
        joint: membership.get_joint_config().len() > 1,
        learners: &learners,
        voters: &voters,
        last_log: metrics.last_log_index.unwrap_or(0),
        matched: &matched,
        answers: &answers,
    });
    let standing = &inner.directory.standing;
    standing.set_awaits(match &step {
        Step::Await { learner, silent } => Some((
            *learner,
            format!(
                "has caught up, but is no voter while voters {silent:?} do not answer: start or remove them"
            ),
        )),
        _ => None,
    });
    let change = match step {
        Step::Nothing | Step::Await { .. } => return,
        Step::Flatten => ChangeMembers::AddVoterIds(BTreeSet::new()),
        Step::Promote(id) => ChangeMembers::AddVoterIds(BTreeSet::from([id])),
    };
    if let Err(error) = write(inner, change, *effective.log_id()).await {
        tracing::debug!(%error, ?step, "the membership was not changed; the leader looks again");
    }
}

/// Says hello to members whose URL is not known (they learn ours by it), and to all of them while no leader is known: one of
/// them may know that this member was removed.
pub async fn greet(inner: Arc<Inner>) {
    let mut server = inner.raft.server_metrics();
    loop {
        let now = server.borrow_and_update().clone();
        let heard_ms = inner.leader_heard_ms();
        let leaderless = now.current_leader != Some(inner.id)
            && boot_ms().saturating_sub(heard_ms) > 2 * inner.config.election_timeout_ms;
        let strangers = now
            .membership_config
            .membership()
            .nodes()
            .filter(|(id, _)| **id != inner.id && (leaderless || inner.directory.url_of(**id).is_none()));
        let hellos = strangers.map(|(id, node)| {
            let (inner, id, node) = (inner.clone(), *id, node.clone());
            async move { connect(&inner.directory, id, &node, Mode::Rpc).await.map(drop) }
        });
        let hellos: Vec<_> = hellos.collect();
        for answer in join_all(hellos).await {
            if let Err(why) = answer {
                tracing::debug!(%why, "a member was not greeted");
            }
        }
        tokio::select! {
            () = tokio::time::sleep(GREET_EVERY) => {}
            () = inner.cancel.cancelled() => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen<'a>(
        committed: bool,
        joint: bool,
        matched: &'a dyn Fn(u64) -> Option<u64>,
        answers: &'a dyn Fn(u64) -> bool,
    ) -> Seen<'a> {
        Seen { committed, joint, learners: &[4, 5], voters: &[1, 2, 3], last_log: 1_000, matched, answers }
    }

    #[test]
    fn a_learner_that_has_caught_up_and_answers_is_promoted() {
        let all = |_| true;
        let near = |id| (id == 5).then_some(1_000 - PROMOTE_LAG_MAX);
        assert_eq!(next_step(&seen(true, false, &near, &all)), Step::Promote(5));
        assert_eq!(next_step(&seen(false, false, &near, &all)), Step::Nothing);
        assert_eq!(next_step(&seen(true, true, &near, &all)), Step::Flatten);
        assert_eq!(next_step(&seen(false, true, &near, &all)), Step::Nothing);
        assert_eq!(next_step(&seen(true, false, &near, &|_| false)), Step::Nothing);
        let far = |_| Some(1_000 - PROMOTE_LAG_MAX - 1);
        assert_eq!(next_step(&seen(true, false, &far, &all)), Step::Nothing);
        assert_eq!(
            next_step(&seen(true, false, &|_| None, &all)),
            Step::Nothing,
            "nothing has arrived there"
        );
    }

    #[test]
    fn a_learner_is_not_promoted_while_its_vote_would_be_needed() {
        let near = |_| Some(1_000);
        let step = |voters: &[u64], silent: u64| {
            let answers = move |id| id != silent;
            next_step(&Seen { voters, ..seen(true, false, &near, &answers) })
        };
        assert_eq!(step(&[1, 2, 3], 0), Step::Promote(4));
        let waits = step(&[1, 2, 3], 3);
        assert_eq!(waits, Step::Await { learner: 4, silent: vec![3] }, "3 of 4 are needed, and 2 answer");
        assert_eq!(step(&[1, 2, 3, 6], 3), Step::Promote(4), "3 of 5 are needed");
        assert_eq!(step(&[1], 0), Step::Promote(4), "a lone voter has no choice");
        assert_eq!(step(&[1, 2], 2), Step::Await { learner: 4, silent: vec![2] });
    }
}
