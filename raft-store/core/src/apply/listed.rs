//! What follows from a drone's complete list of its backends ([`crate::listing`]).

use super::step::{SPAWN_SUB, Step};
use crate::codec::decode;
use crate::command::Listed;
use crate::kv::{ReadState, StateError, Table, keys};
use crate::limits::LISTED_PER_ENTRY_MAX;
use crate::outcome::{Outcome, Refusal};
use crate::records::{ActionRecord, BackendRecord, DroneRecord, PendingAction, Presence, SpawnTarget};
use holdfast_wire::BackendStatus;

impl<R: ReadState + ?Sized> Step<'_, '_, R> {
    pub(super) fn listed(&mut self, listed: &Listed) -> Result<Outcome, StateError> {
        if listed.items() > LISTED_PER_ENTRY_MAX {
            return Ok(Outcome::Refused(Refusal::Full(
                "the number of listed backends in one entry".to_owned(),
            )));
        }
        let drone_id = listed.drone_id;
        let Some(mut drone) = self.view().drone(drone_id)?.filter(|drone| drone.session == listed.session)
        else {
            return Ok(Outcome::Done);
        };
        for (id, token) in &listed.absent {
            self.absent(drone_id, &drone, id, *token)?;
        }
        for id in &listed.received {
            let backend = self.view().backend(id)?.filter(|backend| backend.drone_id == drone_id);
            // What was acquired later on this session is not delivered yet.
            if let Some(backend) = backend.filter(|backend| backend.token < drone.registered_index) {
                self.delete_action(drone_id, (backend.token, SPAWN_SUB))?;
            }
        }
        for id in &listed.ending {
            let Some(mut backend) = self.view().backend(id)?.filter(|backend| backend.drone_id == drone_id)
            else {
                continue;
            };
            if let Some((kind, reason)) = backend.termination_asked
                && backend.state().status() != BackendStatus::Terminated
                && self.queue_terminate(id, &mut backend, kind, reason)?
            {
                self.put_backend(id, &mut backend);
            }
        }
        if listed.last && !drone.is_listed {
            drone.is_listed = true;
            self.put_drone(drone_id, &drone);
            self.actions_changed(drone_id);
        }
        Ok(Outcome::Done)
    }

    /// A backend of which nothing is on the drone's disk gets its spawn again, or is leaving. Its key stays held.
    fn absent(&mut self, drone_id: i32, drone: &DroneRecord, id: &str, token: u64) -> Result<(), StateError> {
        let Some(mut backend) = self.view().backend(id)? else { return Ok(()) };
        if backend.drone_id != drone_id
            || backend.token != token
            || token >= drone.registered_index
            || backend.state().status() == BackendStatus::Terminated
            || backend.presence == Presence::Leaving
        {
            return Ok(());
        }
        if backend.data_id == drone.data_id && self.spawn_again(drone_id, drone, id, &backend)? {
            return Ok(());
        }
        backend.presence = Presence::Leaving;
        if backend.data_id == drone.data_id {
            self.delete_action(drone_id, (token, SPAWN_SUB))?;
        } else {
            // It is on another disk, perhaps on another machine: this drone can do nothing about it.
            self.delete_actions_of(&backend)?;
        }
        self.put_backend(id, &mut backend);
        self.backend_changed(id);
        Ok(())
    }

    /// Hands a spawn that was not delivered to the present incarnation, if it may still be carried out.
    fn spawn_again(
        &mut self,
        drone_id: i32,
        drone: &DroneRecord,
        id: &str,
        backend: &BackendRecord,
    ) -> Result<bool, StateError> {
        let place = (backend.token, SPAWN_SUB);
        let Some(bytes) = self.txn.get(Table::Actions, &keys::action(drone_id, place.0, place.1))? else {
            return Ok(false);
        };
        let mut record: ActionRecord = decode(&bytes)?;
        let PendingAction::Spawn { target, heartbeat_at_ms, lease, .. } = &mut record.action else {
            return Ok(false);
        };
        let hard_at_ms = heartbeat_at_ms.saturating_add(lease.hard_terminate_ms);
        if backend.termination_asked.is_some() || hard_at_ms <= self.now_ms || !self.holds_key(id, backend)? {
            return Ok(false);
        }
        *target = SpawnTarget::Incarnation(drone.incarnation.clone());
        self.put_action(drone_id, place, &record);
        Ok(true)
    }

    /// Whether a backend holds its key.
    pub(super) fn holds_key(&self, id: &str, backend: &BackendRecord) -> Result<bool, StateError> {
        let key = self.view().key(&backend.key.namespace, &backend.key.name)?;
        Ok(key.is_some_and(|key| key.backend_id == id && key.token == backend.token))
    }
}
