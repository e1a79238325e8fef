//! What drones must be told: queueing, acknowledging, and what is due. Also what only marks a backend.
//!
//! An action is kept until the drone has it. Its place is `(log index, sub)` of the entry that made it, so that a
//! drone gets actions in the order of the log and a `Terminate` never overtakes its backend's `Spawn`.

use super::step::{SPAWN_SUB, Step, damaged};
use crate::codec::decode;
use crate::kv::{ReadState, StateError, Table, keys};
use crate::limits::{ACKS_PER_ENTRY_MAX, ACTIONS_PER_READ_MAX, REVOKED_USERS_MAX};
use crate::outcome::{Outcome, Refusal};
use crate::records::{ActionRecord, BackendRecord, DroneRecord, PendingAction, SpawnTarget};
use crate::view::{DueAction, View};
use holdfast_wire::{BackendStatus, TerminationKind, TerminationReason};

impl<R: ReadState + ?Sized> Step<'_, '_, R> {
    pub(super) fn ack_actions(
        &mut self,
        drone_id: i32,
        action_ids: &[String],
    ) -> Result<Outcome, StateError> {
        if action_ids.len() > ACKS_PER_ENTRY_MAX {
            let what = "the number of acknowledgements in one entry".to_owned();
            return Ok(Outcome::Refused(Refusal::Full(what)));
        }
        for place in action_ids.iter().filter_map(|id| keys::split_action_id(id)) {
            self.delete_action(drone_id, place)?;
        }
        Ok(Outcome::Done)
    }

    pub(super) fn terminate(
        &mut self,
        backend_id: &str,
        kind: TerminationKind,
        reason: TerminationReason,
    ) -> Result<Outcome, StateError> {
        let Some(backend) = self.view().backend(backend_id)? else {
            return Ok(Outcome::Refused(Refusal::NoSuchBackend(backend_id.to_owned())));
        };
        Ok(Outcome::Updated(self.ask_end(backend_id, backend, kind, reason)?))
    }

    /// Asks for the end of a backend, unless it has ended. If as hard an end was asked for before, that one is delivered
    /// again, unless it is still to be delivered. Says whether there is something to deliver now that was not before.
    pub(super) fn ask_end(
        &mut self,
        backend_id: &str,
        mut backend: BackendRecord,
        kind: TerminationKind,
        reason: TerminationReason,
    ) -> Result<bool, StateError> {
        if backend.state().status() == BackendStatus::Terminated {
            return Ok(false);
        }
        let asked = backend.termination_asked.filter(|(asked, _)| *asked >= kind);
        let (kind, reason) = asked.unwrap_or((kind, reason));
        let is_queued = self.queue_terminate(backend_id, &mut backend, kind, reason)?;
        if is_queued || asked.is_none() {
            backend.termination_asked = Some((kind, reason));
            self.put_backend(backend_id, &mut backend);
            self.backend_changed(backend_id);
        }
        Ok(is_queued)
    }

    /// Queues a `Terminate`, in the place of a pending softer one; does nothing if one as hard is pending. Says whether it
    /// did. The caller writes the record.
    pub(super) fn queue_terminate(
        &mut self,
        backend_id: &str,
        backend: &mut BackendRecord,
        kind: TerminationKind,
        reason: TerminationReason,
    ) -> Result<bool, StateError> {
        if let Some((index, sub)) = backend.terminate_action {
            let key = keys::action(backend.drone_id, index, sub);
            if let Some(bytes) = self.txn.get(Table::Actions, &key)? {
                let pending: ActionRecord = decode(&bytes)?;
                if matches!(pending.action, PendingAction::Terminate { kind: pending, .. } if pending >= kind)
                {
                    return Ok(false);
                }
                self.delete_action(backend.drone_id, (index, sub))?;
            }
        }
        let place = self.next_terminate_place();
        backend.terminate_action = Some(place);
        let action = PendingAction::Terminate { kind, reason };
        self.put_action(backend.drone_id, place, &ActionRecord { backend_id: backend_id.to_owned(), action });
        Ok(true)
    }

    /// Deletes whatever is pending for a backend.
    pub(super) fn delete_actions_of(&mut self, backend: &BackendRecord) -> Result<(), StateError> {
        self.delete_action(backend.drone_id, (backend.token, SPAWN_SUB))?;
        match backend.terminate_action {
            Some(place) => self.delete_action(backend.drone_id, place),
            None => Ok(()),
        }
    }

    pub(super) fn revoke_tokens(&mut self, backend_id: &str, user: &str) -> Result<Outcome, StateError> {
        let Some(mut backend) = self.view().backend(backend_id)? else {
            return Ok(Outcome::Refused(Refusal::NoSuchBackend(backend_id.to_owned())));
        };
        if backend.revoked_users.iter().any(|revoked| revoked == user) {
            return Ok(Outcome::Updated(false));
        }
        if backend.revoked_users.len() >= REVOKED_USERS_MAX {
            let what = "the number of revoked users of this backend".to_owned();
            return Ok(Outcome::Refused(Refusal::Full(what)));
        }
        backend.revoked_users.push(user.to_owned());
        self.put_backend(backend_id, &mut backend);
        Ok(Outcome::Updated(true))
    }
}

/// The keys of a drone's actions, as a range: from `after` (exclusive) if given.
fn range_of(drone_id: i32, after: Option<(u64, u32)>) -> (Vec<u8>, Vec<u8>) {
    let start = match after {
        Some((index, sub)) => {
            let mut start = keys::action(drone_id, index, sub);
            start.push(0);
            start
        }
        None => keys::drone(drone_id),
    };
    (start, keys::after_drone(drone_id))
}

/// All actions of a drone from `after` on, a bounded piece at a time: each is given to `look`, which says whether to
/// go on.
pub(super) fn each_action<S: ReadState>(
    state: &S,
    drone_id: i32,
    after: Option<(u64, u32)>,
    mut look: impl FnMut((u64, u32), ActionRecord) -> Result<bool, StateError>,
) -> Result<(), StateError> {
    let (mut start, end) = range_of(drone_id, after);
    loop {
        let rows = state.scan(Table::Actions, &start, Some(&end), ACTIONS_PER_READ_MAX)?;
        let last_piece = rows.len() < ACTIONS_PER_READ_MAX;
        for (key, value) in rows {
            let place = keys::split_action(&key).ok_or_else(|| damaged("the key of an action"))?;
            if !look(place, decode(&value)?)? {
                return Ok(());
            }
            start = key;
        }
        if last_piece {
            return Ok(());
        }
        start.push(0);
    }
}

/// See [`crate::view::View::due_actions`].
pub(crate) fn due_actions(
    state: &impl ReadState,
    (drone_id, session): (i32, &str),
    after: Option<(u64, u32)>,
    now_ms: u64,
    limit: usize,
) -> Result<Vec<DueAction>, StateError> {
    let mut due = Vec::new();
    let view = View(state);
    let Some(drone) = view.drone(drone_id)?.filter(|drone| drone.session == session) else { return Ok(due) };
    // Deadlines are given in the clock of this incarnation, so it must have said what that shows. All actions wait for
    // that, so that what is due later never stands before what was sent.
    let may_act = drone.is_listed && (drone.is_planes() || drone.heartbeat.is_some());
    if limit == 0 || !may_act {
        return Ok(due);
    }
    each_action(state, drone_id, after, |(index, sub), record| {
        let backend = view.backend(&record.backend_id)?.ok_or_else(|| {
            damaged(format!("an action is about the unknown backend {}", record.backend_id))
        })?;
        let mut lease_from_ms = None;
        if let PendingAction::Spawn { heartbeat_at_ms, lease, token, .. } = &record.action {
            lease_from_ms = spawn_from_ms(&drone, &record.action);
            let is_due = lease_from_ms.is_some()
                && now_ms.saturating_sub(*heartbeat_at_ms) < lease.soft_terminate_ms
                && backend.state().status() == BackendStatus::Scheduled
                && view
                    .key(&backend.key.namespace, &backend.key.name)?
                    .is_some_and(|key| key.backend_id == record.backend_id && key.token == *token);
            if !is_due {
                return Ok(true);
            }
        }
        let action_id = keys::action_id(index, sub);
        due.push(DueAction { action_id, index, sub, record, backend, lease_from_ms });
        Ok(due.len() < limit)
    })?;
    Ok(due)
}

/// From when on the clock of this drone the lease of a spawn counts, in milliseconds; `None` if the spawn is not for it.
///
/// One of our drones gets the moment that its clock showed at the heartbeat of the acquisition, seen from its last
/// heartbeat. A heartbeat is recorded after the clock was read, so that is never too late, whatever incarnation it is.
fn spawn_from_ms(drone: &DroneRecord, spawn: &PendingAction) -> Option<i64> {
    let PendingAction::Spawn { target, local_time_ms, heartbeat_at_ms, .. } = spawn else { return None };
    match target {
        SpawnTarget::Session { session, .. } => {
            (drone.is_planes() && *session == drone.session).then_some(*local_time_ms)
        }
        SpawnTarget::Incarnation(incarnation) => {
            let heartbeat =
                drone.heartbeat.filter(|_| !drone.is_planes() && *incarnation == drone.incarnation)?;
            let passed_ms = heartbeat.at_ms.saturating_sub(*heartbeat_at_ms);
            Some(heartbeat.local_time_ms.saturating_sub(i64::try_from(passed_ms).unwrap_or(i64::MAX)))
        }
    }
}
