//! Applying an entry: see the crate's page.
//!
//! ```text
//!   apply ─▶ formed? ─▶ cluster time ─▶ idempotency ─▶ command ─▶ progress, checksum
//!                                           │             │
//!                          recorded answer ◀┘             └▶ acquire · renew · release · reports · actions ·
//!                                                            drones · cluster · sweep · ends
//! ```
//!
//! Every command checks first and writes after, so that a refusal changes nothing but cluster time and checksum.
//! What only a fault of this program or of the disk can cause (two records that contradict each other, a token that
//! would not grow) is a [`StateError`]: the replica stops rather than go on from a state it can't trust.

mod acquire;
mod actions;
mod checksum;
mod cluster;
mod drones;
mod ends;
mod idempotency;
mod listed;
mod release;
mod renew;
mod reports;
mod step;
mod sweep;

pub(crate) use actions::due_actions;

use crate::codec::encode;
use crate::command::{Command, FromDrone, Proposal, Stamp};
use crate::kv::{ReadState, StateError, Table, Txn, keys};
use crate::limits::TOGETHER_ITEMS_MAX;
use crate::outcome::{Effect, Outcome, Refusal};
use crate::view::View;
use idempotency::Recall;
use step::Step;

/// Where an entry stands in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Term of the leader that appended it.
    pub term: u64,
    /// Log index.
    pub index: u64,
}

/// What applying one entry gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// The answer.
    pub outcome: Outcome,
    /// The answer is the recorded one of an earlier entry with the same idempotency key.
    pub replayed: bool,
    /// Who has to look.
    pub effects: Vec<Effect>,
    /// Cluster time as of the entry, in milliseconds.
    pub cluster_time_ms: u64,
}

/// Applies one stamped proposal on top of `txn`. It begins a new entry of the transaction itself: what the caller
/// wrote before or writes after does not enter the checksum. The error is fatal: the replica must stop and must not
/// commit the transaction.
pub fn apply<R: ReadState + ?Sized>(
    txn: &mut Txn<'_, R>,
    at: Position,
    stamp: Stamp,
    proposal: &Proposal,
) -> Result<Applied, StateError> {
    txn.begin_entry();
    let mut head = txn.take_head()?;
    if head.cluster.is_none() && !matches!(proposal.command, Command::FormCluster(_)) {
        // Cluster time is anchored by forming the cluster, so nothing before it may move it.
        let cluster_time_ms = head.progress.cluster_time_ms;
        checksum::seal(txn, at, head);
        return Ok(Applied {
            outcome: Outcome::Refused(Refusal::NotFormed),
            replayed: false,
            effects: Vec::new(),
            cluster_time_ms,
        });
    }
    head.progress.cluster_time_ms = head.progress.cluster_time_ms.max(stamp.cluster_time_ms);
    let cluster_time_ms = head.progress.cluster_time_ms;
    let mut step = Step::new(txn, at, stamp.own_term_only, head);
    let (outcome, replayed) = match &proposal.idempotency {
        None => (step.run(&proposal.command)?, false),
        Some(idempotency) => match step.recall(idempotency, &proposal.command)? {
            Recall::Replay(outcome) => (*outcome, true),
            Recall::Refuse(refusal) => (Outcome::Refused(refusal), false),
            Recall::New => {
                let outcome = step.run(&proposal.command)?;
                step.remember(idempotency, &outcome)?;
                (outcome, false)
            }
            Recall::Unrecorded => (step.run(&proposal.command)?, false),
        },
    };
    let (head, effects) = step.finish();
    checksum::seal(txn, at, head);
    Ok(Applied { outcome, replayed, effects, cluster_time_ms })
}

/// Accounts for a blank entry: it moves only the running checksum.
pub fn apply_blank<R: ReadState + ?Sized>(txn: &mut Txn<'_, R>, at: Position) -> Result<(), StateError> {
    txn.begin_entry();
    let head = txn.take_head()?;
    checksum::seal(txn, at, head);
    Ok(())
}

/// Accounts for a membership entry that names these members: their ids are used from now on, for ever.
pub fn apply_membership<R: ReadState + ?Sized>(
    txn: &mut Txn<'_, R>,
    at: Position,
    ids: impl IntoIterator<Item = u64>,
) -> Result<(), StateError> {
    txn.begin_entry();
    let before = View(&*txn).member_ids()?;
    let head = txn.take_head()?;
    let mut used = before.clone();
    ids.into_iter().for_each(|id| used.insert(id));
    if used != before {
        txn.put(Table::Meta, keys::MEMBER_IDS.to_vec(), encode(&used));
    }
    checksum::seal(txn, at, head);
    Ok(())
}

impl<R: ReadState + ?Sized> Step<'_, '_, R> {
    fn run(&mut self, command: &Command) -> Result<Outcome, StateError> {
        match command {
            Command::FormCluster(form) => self.form_cluster(form),
            Command::SetLease(lease) => self.set_lease(*lease),
            Command::Acquire(acquire) => self.acquire(acquire),
            Command::Renew(renew) => self.renew(renew),
            Command::SetAllowRenew { namespace, name, allow } => {
                self.set_allow_renew(namespace, name, *allow)
            }
            Command::RevokeKey { namespace, name } => self.revoke_key(namespace, name),
            Command::RegisterDrone(register) => self.register_drone(register),
            Command::Heartbeats(items) => self.heartbeats(items),
            Command::ReportStates(report) => self.report_states(report),
            Command::AckActions { drone_id, action_ids } => self.ack_actions(*drone_id, action_ids),
            Command::Terminate { backend_id, kind, reason } => self.terminate(backend_id, *kind, *reason),
            Command::Drain { cluster, drone, draining, deadline_in_ms } => {
                self.drain(cluster, drone, *draining, *deadline_in_ms)
            }
            Command::RevokeTokens { backend_id, user } => self.revoke_tokens(backend_id, user),
            Command::Sweep(sweep) => self.sweep(sweep),
            Command::Tick => Ok(Outcome::Done),
            Command::Together(commands) => self.together(commands),
            Command::EndDue => self.end_due(),
        }
    }

    fn together(&mut self, commands: &[FromDrone]) -> Result<Outcome, StateError> {
        if commands.iter().map(FromDrone::items).sum::<usize>() > TOGETHER_ITEMS_MAX {
            return Ok(Outcome::Refused(Refusal::Full("the number of items in one entry".to_owned())));
        }
        let outcomes = commands.iter().map(|command| match command {
            FromDrone::Renew(renew) => self.renew(renew),
            FromDrone::ReportStates(report) => self.report_states(report),
            FromDrone::AckActions { drone_id, action_ids } => self.ack_actions(*drone_id, action_ids),
            FromDrone::Activity { drone_id, incarnation, activity_id, items } => {
                self.activity(*drone_id, incarnation, *activity_id, items)
            }
            FromDrone::Listed(listed) => self.listed(listed),
            FromDrone::Leaving { drone_id, session } => self.leaving(*drone_id, session),
        });
        Ok(Outcome::Together(outcomes.collect::<Result<_, _>>()?))
    }
}
