//! What drones must be told: queueing, acknowledging, and what is due. Also what only marks a backend.
//!
//! An action is kept until the drone has it. Its place is `(log index, sub)` of the entry that made it, so that a
//! drone gets actions in the order of the log and a `Terminate` never overtakes its backend's `Spawn`.

use super::step::{SPAWN_SUB, Step, damaged};
use crate::codec::decode;
use crate::kv::{ReadState, StateError, Table, keys};
use crate::limits::{ACKS_PER_ENTRY_MAX, ACTIONS_PER_READ_MAX, REVOKED_USERS_MAX};
use crate::outcome::{Outcome, Refusal};
use crate::records::{ActionRecord, BackendRecord, PendingAction, VOIDED};
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

    /// Asks for the end of a backend, unless it has ended or as hard an end was asked for before; says whether it did.
    pub(super) fn ask_end(
        &mut self,
        backend_id: &str,
        mut backend: BackendRecord,
        kind: TerminationKind,
        reason: TerminationReason,
    ) -> Result<bool, StateError> {
        // A void spawn is only a mark: nobody was told to end it yet.
        let asked = backend.termination_asked.filter(|asked| *asked != VOIDED);
        if backend.state().status() == BackendStatus::Terminated
            || asked.is_some_and(|(asked_kind, _)| asked_kind >= kind)
        {
            return Ok(false);
        }
        backend.termination_asked = Some((kind, reason));
        self.queue_terminate(backend_id, &mut backend, kind, reason)?;
        self.put_backend(backend_id, &mut backend);
        self.backend_changed(backend_id);
        Ok(true)
    }

    /// Queues a `Terminate`, in the place of a pending softer one; does nothing if one as hard is pending. The caller
    /// writes the record.
    pub(super) fn queue_terminate(
        &mut self,
        backend_id: &str,
        backend: &mut BackendRecord,
        kind: TerminationKind,
        reason: TerminationReason,
    ) -> Result<(), StateError> {
        if let Some((index, sub)) = backend.terminate_action {
            let key = keys::action(backend.drone_id, index, sub);
            if let Some(bytes) = self.txn.get(Table::Actions, &key)? {
                let pending: ActionRecord = decode(&bytes)?;
                if matches!(pending.action, PendingAction::Terminate { kind: pending, .. } if pending >= kind)
                {
                    return Ok(());
                }
                self.delete_action(backend.drone_id, (index, sub))?;
            }
        }
        let place = self.next_terminate_place();
        backend.terminate_action = Some(place);
        let action = PendingAction::Terminate { kind, reason };
        self.put_action(backend.drone_id, place, &ActionRecord { backend_id: backend_id.to_owned(), action });
        Ok(())
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
    let end = drone_id.cast_unsigned().saturating_add(1).to_be_bytes().to_vec();
    (start, end)
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
    drone_id: i32,
    after: Option<(u64, u32)>,
    now_ms: u64,
    limit: usize,
) -> Result<Vec<DueAction>, StateError> {
    let mut due = Vec::new();
    let view = View(state);
    let Some(drone) = view.drone(drone_id)? else { return Ok(due) };
    if limit == 0 {
        return Ok(due);
    }
    each_action(state, drone_id, after, |(index, sub), record| {
        let backend = view.backend(&record.backend_id)?.ok_or_else(|| {
            damaged(format!("an action is about the unknown backend {}", record.backend_id))
        })?;
        let is_due = match &record.action {
            PendingAction::Terminate { .. } => true,
            PendingAction::Spawn { incarnation, heartbeat_at_ms, lease, token, .. } => {
                *incarnation == drone.incarnation
                    && now_ms.saturating_sub(*heartbeat_at_ms) < lease.soft_terminate_ms
                    && backend.state().status() == BackendStatus::Scheduled
                    && view
                        .key(&backend.key.namespace, &backend.key.name)?
                        .is_some_and(|key| key.backend_id == record.backend_id && key.token == *token)
            }
        };
        if is_due {
            let action_id = keys::action_id(index, sub);
            due.push(DueAction { action_id, index, sub, record, backend });
        }
        Ok(due.len() < limit)
    })?;
    Ok(due)
}
