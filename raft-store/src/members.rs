//! Members come, go and move.
//!
//! ```text
//!   never seen ──Set──▶ learner ──caught up──▶ joint ──▶ voter ──Remove──▶ joint ──▶ removed, its id used for ever
//!                          │  (by the leader's look)              ▲                     ▲
//!                          └────────────Remove────────────────────┼─────────────────────┘
//!                                        Set with another address: stays what it is
//! ```
//!
//! *What survives a change of leader.* All of it is in the membership entries of the log: a learner is there to be promoted
//! and for nothing else, so whoever leads promotes every learner that has caught up ([`Step::Promote`]); a joint
//! membership whose leader was lost is taken to its end by the next one ([`Step::Flatten`]). Nobody's memory is needed.
//!
//! *Ids.* Applying a membership entry records the ids in it ([`holdfast_core::records::MemberIdsRecord`]); the record is
//! part of every snapshot. An id that is recorded and not in the membership was removed, and is refused: its new log would
//! pass through old memberships in which it had a vote. A change is proposed only on top of the membership that was looked
//! at (a precondition that openraft checks at append), which is applied here by then, so no id slips through.
//!
//! *A removed member* can't disturb: with pre-vote it never raises its term while a quorum hears of a leader, its log is
//! behind, and its peers refuse its hello and say why ([`Standing::is_gone`]). Then, or when it applies the entry that
//! removes it, it stops serving: [`Standing::dismissed`]. Who is "gone" is judged by the *applied* membership: an
//! uncommitted one may yet be truncated, and then the member's vote may be needed.
//!
//! *Addresses.* A connection starts with a hello that names cluster and member, so a wrong address reaches nobody: the
//! split brain that openraft warns of (two members behind one address) can't come about. The network looks the address
//! up whenever it connects ([`Standing::addr_of`]), because openraft keeps its streams when only the address changes.

use crate::api::{MemberChange, MemberChanged, MemberError, MemberRole};
use crate::boot_clock::boot_ms;
use crate::store::{Inner, Store};
use crate::transport::client::{RpcError, connect, dial};
use crate::transport::wire::{Mode, PROTOCOL, Reply, Request};
use crate::types::{LogId, Member, TypeConfig};
use futures::future::join_all;
use holdfast_core::kv::StateError;
use holdfast_core::limits::MEMBER_ID_RANGES_MAX;
use holdfast_core::records::MemberIdsRecord;
use holdfast_core::view::View;
use openraft::async_runtime::instant::Instant as _;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{ChangeMembershipError, ClientWriteError, RaftError};
use openraft::{ChangeMembers, Precondition, RaftMetrics};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// Most members, learners among them. Each is replicated to.
pub const MEMBERS_MAX: usize = 15;
/// Longest peer address, in bytes.
pub const PEER_ADDR_BYTES_MAX: usize = 260;
/// A learner that lacks no more than so many entries, and answers, becomes a voter.
const PROMOTE_LAG_MAX: u64 = 256;
/// How often the leader looks whether a learner has caught up. Everything else wakes it.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How often members are greeted whose URL is not known, or all of them while nobody leads.
const GREET_EVERY: Duration = Duration::from_secs(1);
/// How long one step of a change may take to be committed.
const STEP_DEADLINE: Duration = Duration::from_secs(5);
/// How long a leader that is to be removed may take to hand over.
const HAND_OVER_DEADLINE: Duration = Duration::from_secs(2);
/// How long to wait for news of a leader before asking again.
const LEADER_POLL: Duration = Duration::from_millis(50);
/// How long connections of a removed member stay, so that what it has under way is answered.
const GONE_GRACE: Duration = Duration::from_millis(500);

/// Ids that were used and are not in the applied membership.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Gone {
    used: MemberIdsRecord,
    members: BTreeSet<u64>,
}

impl Gone {
    fn contains(&self, id: u64) -> bool {
        self.used.contains(id) && !self.members.contains(&id)
    }
}

/// Who belongs to the cluster and where, as the peer transport needs it.
#[derive(Debug, Default)]
pub struct Standing {
    addrs: Mutex<BTreeMap<u64, String>>,
    gone: watch::Sender<Gone>,
    dismissed: watch::Sender<bool>,
    /// Log index of the membership in force.
    index: AtomicU64,
}

impl Standing {
    /// The address of a member, by the membership in force.
    pub fn addr_of(&self, id: u64) -> Option<String> {
        self.addrs.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    /// Whether that member was removed, as far as this node has applied the log.
    pub fn is_gone(&self, id: u64) -> bool {
        self.gone.borrow().contains(id)
    }

    /// Resolves a little after that member was removed.
    pub async fn until_gone(&self, id: u64) {
        let mut gone = self.gone.subscribe();
        if gone.wait_for(|gone| gone.contains(id)).await.is_err() {
            // The sender lives as long as this.
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(GONE_GRACE).await;
    }

    /// A peer of the same cluster says that this member was removed.
    pub fn dismiss(&self) {
        if self.dismissed.send_if_modified(|dismissed| !std::mem::replace(dismissed, true)) {
            tracing::error!(
                "this member was removed from the cluster and serves nobody any more; its data can be deleted"
            );
        }
    }

    /// Whether this member was removed.
    pub fn dismissed(&self) -> bool {
        *self.dismissed.borrow()
    }
}

/// What a leader does next about the membership. Pure.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// The last change is not committed, or there is nothing to do.
    Nothing,
    /// Take a joint membership to its end.
    Flatten,
    /// Make a learner that has caught up a voter.
    Promote(u64),
}

/// What [`next_step`] looks at.
struct Seen<'a> {
    committed: bool,
    joint: bool,
    learners: &'a [u64],
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
    let caught_up = |id: &&u64| {
        let lag = (seen.matched)(**id).map(|at| seen.last_log.saturating_sub(at));
        lag.is_some_and(|lag| lag <= PROMOTE_LAG_MAX) && (seen.answers)(**id)
    };
    seen.learners.iter().find(caught_up).map_or(Step::Nothing, |id| Step::Promote(*id))
}

/// Refuses a removal after which the cluster could not go on: `answering` are those of `remaining` that answer now.
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

type Metrics = RaftMetrics<TypeConfig>;

impl Inner {
    pub(crate) fn metrics(&self) -> Metrics {
        self.raft.metrics().borrow_watched().clone()
    }

    pub(crate) fn leads(&self, metrics: &Metrics) -> bool {
        metrics.current_leader == Some(self.config.id) && metrics.state.is_leader()
    }

    /// Whether that member has answered a heartbeat lately. Only a leader knows.
    fn answers(&self, metrics: &Metrics, id: u64) -> bool {
        self.answers_within(metrics, id, Duration::from_millis(self.config.election_timeout_ms))
    }

    /// Whether that member has answered a heartbeat that was sent no longer ago than that.
    fn answers_within(&self, metrics: &Metrics, id: u64, recent: Duration) -> bool {
        let at = metrics.heartbeat.as_ref().and_then(|beats| beats.get(&id).copied().flatten());
        id == self.config.id || at.is_some_and(|at| at.into_inner().elapsed() <= recent)
    }

    /// Why this member serves nobody any more, if it was removed.
    pub(crate) fn removed(&self) -> Option<String> {
        self.directory
            .standing
            .dismissed()
            .then(|| format!("member {} was removed from the cluster", self.config.id))
    }
}

/// The most advanced voter that answers, or the one that is asked for if it would do.
fn successor(inner: &Inner, metrics: &Metrics, wanted: Option<u64>) -> Option<u64> {
    let me = inner.config.id;
    let voters: BTreeSet<u64> = metrics.membership_config.membership().voter_ids().collect();
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
pub(crate) async fn hand_over(inner: &Inner, wanted: Option<u64>, deadline: Duration) -> bool {
    let me = inner.config.id;
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

/// Makes the change, if this replica leads.
pub(crate) async fn change_here(inner: &Inner, change: MemberChange) -> Result<MemberChanged, MemberError> {
    if let Some(why) = inner.removed() {
        return Err(MemberError::Stopped(why));
    }
    let Ok(_alone) = inner.changing.try_lock() else {
        return Err(MemberError::Busy("another change of the membership is under way".into()));
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
    let nodes: BTreeMap<u64, String> =
        membership.nodes().map(|(id, node)| (*id, node.peer_addr.clone())).collect();
    let voters: BTreeSet<u64> = membership.voter_ids().collect();
    let used = View(inner.state.clone())
        .member_ids()
        .map_err(|error| MemberError::Stopped(format!("reading the state failed: {error}")))?;
    let on_top_of = *effective.log_id();
    match change {
        MemberChange::Set { id, peer_addr, joining, protocol } => {
            if protocol != 0 && protocol != PROTOCOL {
                return Err(MemberError::invalid(
                    "protocol",
                    format!("{protocol} is spoken by this version; the cluster speaks {PROTOCOL}"),
                ));
            }
            check_addr(&peer_addr)?;
            let voter = voters.contains(&id);
            let role = if voter { MemberRole::Voter } else { MemberRole::Learner };
            match nodes.get(&id) {
                Some(_) if joining && voter => return Err(MemberError::LostDisk(id)),
                Some(known) if *known == peer_addr => return Ok(MemberChanged { role, changed: false }),
                Some(_) => {}
                None if used.contains(id) => return Err(MemberError::IdUsed(id)),
                None if nodes.len() >= MEMBERS_MAX => {
                    return Err(MemberError::invalid(
                        "id",
                        format!("is one too many: {MEMBERS_MAX} members are allowed"),
                    ));
                }
                None if id == 0 => return Err(MemberError::invalid("id", "must be positive")),
                None => {
                    let mut with = used.clone();
                    with.insert(id);
                    if with.ranges().len() > MEMBER_ID_RANGES_MAX {
                        let problem = "is too far from the ids that were used; take one next to them";
                        return Err(MemberError::invalid("id", problem));
                    }
                }
            }
            if let Some((other, _)) = nodes.iter().find(|(other, addr)| **other != id && **addr == peer_addr)
            {
                return Err(MemberError::invalid("peer_addr", format!("is that of member {other}")));
            }
            // It must be there, be that member, and be of this cluster or of none.
            if id != inner.config.id
                && let Err(why) = dial(&inner.directory, id, &peer_addr, Mode::Rpc).await
            {
                return Err(MemberError::invalid("peer_addr", format!("does not do: {why}")));
            }
            let node = BTreeMap::from([(id, Member { peer_addr })]);
            let asked = if nodes.contains_key(&id) {
                ChangeMembers::SetNodes(node)
            } else {
                ChangeMembers::AddNodes(node)
            };
            write(inner, asked, on_top_of).await?;
            Ok(MemberChanged { role, changed: true })
        }
        MemberChange::Remove { id } => {
            if !nodes.contains_key(&id) {
                return if used.contains(id) {
                    Ok(MemberChanged { role: MemberRole::Removed, changed: false })
                } else {
                    Err(MemberError::NoSuchMember(id))
                };
            }
            if membership.get_joint_config().len() > 1 {
                return Err(MemberError::Busy("the last change of the membership has not ended yet".into()));
            }
            if !voters.contains(&id) {
                write(inner, ChangeMembers::RemoveNodes(BTreeSet::from([id])), on_top_of).await?;
                return Ok(MemberChanged { role: MemberRole::Removed, changed: true });
            }
            let remaining: BTreeSet<u64> = voters.iter().copied().filter(|voter| *voter != id).collect();
            majority_remains(inner, id, &remaining).await?;
            if id == inner.config.id {
                // Whoever leads next removes this one: a leader that removes itself leaves a gap.
                if hand_over(inner, None, HAND_OVER_DEADLINE).await {
                    return Err(MemberError::NotLeader);
                }
                return Err(MemberError::Busy("leadership could not be handed over in time".into()));
            }
            write(inner, ChangeMembers::RemoveVoters(BTreeSet::from([id])), on_top_of).await?;
            Ok(MemberChanged { role: MemberRole::Removed, changed: true })
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
        let answers = |voter: &u64| inner.answers_within(&now, *voter, asked.elapsed());
        let answering = remaining.iter().copied().filter(answers).collect();
        let Err(refusal) = check_removal(id, remaining, &answering) else { return Ok(()) };
        if !matches!(tokio::time::timeout_at(until, watched.changed()).await, Ok(Ok(()))) {
            return Err(refusal);
        }
    }
}

fn check_addr(addr: &str) -> Result<(), MemberError> {
    let wrong = |problem: &str| Err(MemberError::invalid("peer_addr", problem));
    if addr.len() > PEER_ADDR_BYTES_MAX {
        return wrong("is too long");
    }
    match addr.rsplit_once(':') {
        Some((host, port))
            if !host.is_empty()
                && !addr.chars().any(|c| c.is_whitespace() || c.is_control())
                && port.parse::<u16>().is_ok_and(|port| port > 0) =>
        {
            Ok(())
        }
        _ => wrong("must be HOST:PORT"),
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
            if change == (MemberChange::Remove { id: inner.config.id }) && inner.removed().is_some() {
                return Ok(MemberChanged { role: MemberRole::Removed, changed: true });
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
                Some(info) if info.id == inner.config.id => change_here(inner, change.clone()).await,
                Some(info) => ask(inner, info.id, &change, left).await,
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

    /// Whether this member is in no membership that it knows of: it has to ask a cluster for admission.
    pub fn must_join(&self) -> bool {
        let metrics = self.inner.metrics();
        self.removed().is_none()
            && metrics.membership_config.membership().get_node(&self.inner.config.id).is_none()
    }

    /// Whether nothing is known here: neither a log nor a vote. A member that lost its disk looks so too.
    pub fn is_blank(&self) -> bool {
        let metrics = self.inner.metrics();
        metrics.last_log_index.is_none() && metrics.last_applied.is_none()
    }

    /// Before asking cluster `cluster_id` for admission: peers of other clusters are refused from here on, and this member
    /// does not vote before it has caught up.
    pub fn prepare_to_join(&self, cluster_id: &str) -> std::io::Result<()> {
        let directory = &self.inner.directory;
        directory.rejoin.met_formed_peer()?;
        if directory.cluster_id().is_none() {
            directory.set_cluster_id(cluster_id.to_owned());
        }
        Ok(())
    }

    /// Log index of the membership in force: it changes when a member comes, goes or moves.
    pub fn membership_index(&self) -> u64 {
        self.inner.directory.standing.index.load(Ordering::Relaxed)
    }

    /// Version of the peer protocol.
    pub fn protocol() -> u32 {
        PROTOCOL
    }
}

async fn ask(
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

/// Keeps [`Standing`] current and does what a leader owes to its members, until the replica stops.
pub(crate) async fn run(inner: Arc<Inner>) {
    let mut server = inner.raft.server_metrics();
    let mut applied = inner.applied.clone();
    let mut gone_as_of = None;
    loop {
        // Marked as seen before it is looked at, so that nothing is missed.
        let in_force = server.borrow_and_update().membership_config.clone();
        let addrs = in_force.membership().nodes().map(|(id, node)| (*id, node.peer_addr.clone())).collect();
        *inner.directory.standing.addrs.lock().unwrap_or_else(PoisonError::into_inner) = addrs;
        inner.directory.standing.index.store(in_force.log_id().map_or(0, |at| at.index), Ordering::Relaxed);
        applied.borrow_and_update();
        if let Err(error) = note_who_is_gone(&inner, &mut gone_as_of) {
            inner.fail(error.to_string());
            return;
        }
        if let Ok(_alone) = inner.changing.try_lock() {
            lead(&inner).await;
        }
        tokio::select! {
            changed = server.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(LOOK_EVERY) => {}
            () = inner.cancel.cancelled() => return,
        }
    }
}

fn note_who_is_gone(inner: &Inner, as_of: &mut Option<LogId>) -> Result<(), StateError> {
    let (_, membership) = inner.state.applied()?;
    if membership.log_id().is_none() || *membership.log_id() == *as_of {
        return Ok(());
    }
    *as_of = *membership.log_id();
    let used = View(inner.state.clone()).member_ids()?;
    let members: BTreeSet<u64> = membership.membership().nodes().map(|(id, _)| *id).collect();
    let gone = Gone { used, members };
    if gone.contains(inner.config.id) {
        inner.directory.standing.dismiss();
    }
    inner.directory.standing.gone.send_replace(gone);
    Ok(())
}

async fn lead(inner: &Inner) {
    let metrics = inner.metrics();
    if !inner.leads(&metrics) || !inner.formed.load(Ordering::Acquire) {
        return;
    }
    let effective = metrics.membership_config.clone();
    let membership = effective.membership();
    let learners: Vec<u64> = membership.learner_ids().collect();
    let matched = |id: u64| {
        metrics.replication.as_ref().and_then(|all| all.get(&id).copied().flatten()).map(|at| at.index)
    };
    let answers = |id: u64| inner.answers(&metrics, id);
    let step = next_step(&Seen {
        committed: metrics.committed_membership_config.log_id() == effective.log_id(),
        joint: membership.get_joint_config().len() > 1,
        learners: &learners,
        last_log: metrics.last_log_index.unwrap_or(0),
        matched: &matched,
        answers: &answers,
    });
    let change = match step {
        Step::Nothing => return,
        Step::Flatten => ChangeMembers::AddVoterIds(BTreeSet::new()),
        Step::Promote(id) => ChangeMembers::AddVoterIds(BTreeSet::from([id])),
    };
    if let Err(error) = write(inner, change, *effective.log_id()).await {
        tracing::debug!(%error, ?step, "the membership was not changed; the leader looks again");
    }
}

/// Says hello to members whose URL is not known (they learn ours by it), and to all of them while nobody leads: one of
/// them may know that this member was removed.
pub(crate) async fn greet(inner: Arc<Inner>) {
    let mut server = inner.raft.server_metrics();
    loop {
        let now = server.borrow_and_update().clone();
        let heard_ms = inner.leader_heard_ms();
        let leaderless = now.current_leader != Some(inner.config.id)
            && boot_ms().saturating_sub(heard_ms) > 2 * inner.config.election_timeout_ms;
        let strangers = now.membership_config.membership().nodes().filter(|(id, _)| {
            **id != inner.config.id && (leaderless || inner.directory.url_of(**id).is_none())
        });
        let hellos = strangers.map(|(id, node)| {
            let (inner, id, addr) = (inner.clone(), *id, node.peer_addr.clone());
            async move { connect(&inner.directory, id, &addr, Mode::Rpc).await.map(drop) }
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
        Seen { committed, joint, learners: &[4, 5], last_log: 1_000, matched, answers }
    }

    #[test]
    fn a_learner_is_promoted_when_it_has_caught_up_and_answers_and_nothing_else_is_under_way() {
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

    #[test]
    fn addresses_are_checked() {
        for good in ["127.0.0.1:7201", "[::1]:7201", "controller-4.example:1"] {
            assert!(check_addr(good).is_ok(), "{good}");
        }
        for bad in ["", ":1", "a", "a:0", "a:x", "a b:1", "a:70000", &format!("{}:1", "a".repeat(300))] {
            assert!(matches!(check_addr(bad), Err(MemberError::Invalid { .. })), "{bad}");
        }
    }

    #[test]
    fn only_a_used_id_outside_the_membership_is_gone() {
        let mut gone = Gone::default();
        (1..=4).for_each(|id| gone.used.insert(id));
        gone.members = BTreeSet::from([1, 2, 4]);
        assert!(gone.contains(3));
        assert!(!gone.contains(4) && !gone.contains(5));
    }
}
