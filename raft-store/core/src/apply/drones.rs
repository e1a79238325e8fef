//! Drones: sessions and incarnations, heartbeats, draining.

use super::actions::each_action;
use super::step::Step;
use crate::command::{HeartbeatItem, RegisterDrone};
use crate::kv::{ReadState, StateError, Table, keys};
use crate::limits::{DRONE_ID_MAX, HEARD_REFILE_MS, HEARTBEATS_PER_ENTRY_MAX, NAME_HELD_MS};
use crate::outcome::{Effect, Outcome, Refusal};
use crate::records::{
    ActionRecord, BackendRecord, DroneRecord, HeartbeatRecord, PendingAction, Presence, SpawnTarget,
};
use holdfast_wire::BackendStatus;

impl<R: ReadState + ?Sized> Step<'_, '_, R> {
    pub(super) fn register_drone(&mut self, register: &RegisterDrone) -> Result<Outcome, StateError> {
        let (drone_id, old) = match self.view().drone_by_name(&register.cluster, &register.name)? {
            Some((drone_id, drone)) if drone.session == register.session => {
                return Ok(Outcome::Registered { drone_id });
            }
            Some((drone_id, drone)) => (drone_id, Some(drone)),
            None if self.progress.last_drone_id == DRONE_ID_MAX => {
                return Ok(Outcome::Refused(Refusal::Full("the number of drones".to_owned())));
            }
            None => (self.progress.last_drone_id + 1, None),
        };
        let restarted = old.as_ref().is_some_and(|old| old.incarnation != register.incarnation);
        if let Some(old) = old.as_ref().filter(|_| restarted && !register.take_over) {
            let held_ms = NAME_HELD_MS.min(self.cluster()?.lease.renew_ms / 2);
            if self.now_ms.saturating_sub(old.heard_at_ms()) < held_ms {
                return Ok(Outcome::Refused(Refusal::NameTaken));
            }
        }
        if register.data_id.is_none() {
            self.repeat_spawns(drone_id, register)?;
        }
        if old.is_none() {
            self.progress.last_drone_id = drone_id;
            let name = keys::pair(&register.cluster, &register.name);
            self.txn.put(Table::DroneNames, name, keys::drone(drone_id));
        }
        let mut record = DroneRecord {
            cluster: register.cluster.clone(),
            name: register.name.clone(),
            pool: register.pool.clone(),
            incarnation: register.incarnation.clone(),
            data_id: register.data_id.clone(),
            session: register.session.clone(),
            address: register.address.clone(),
            registered_index: self.at.index,
            is_listed: register.data_id.is_none(),
            controller: register.controller,
            version: register.version.clone(),
            git_hash: register.git_hash.clone(),
            draining: old.as_ref().is_some_and(|old| old.draining),
            backend_count: old.as_ref().map_or(0, |old| old.backend_count),
            registered_at_ms: self.now_ms,
            // Another process has another clock: nothing can be chosen for it before its own first heartbeat.
            heartbeat: old.as_ref().and_then(|old| old.heartbeat).filter(|_| !restarted),
            drain_deadline_ms: old.as_ref().and_then(|old| old.drain_deadline_ms),
            leaving: !restarted && old.as_ref().is_some_and(|old| old.leaving),
            heard_filed_at_ms: old.as_ref().and_then(|old| old.heard_filed_at_ms),
        };
        self.file_drone(drone_id, &mut record);
        self.put_drone(drone_id, &record);
        self.effect(Effect::Session { drone_id, session: register.session.clone() });
        self.actions_changed(drone_id);
        Ok(Outcome::Registered { drone_id })
    }

    /// A drone of Plane's opened another session. This entry stands for sending to it, for the second time, every spawn
    /// that was not acknowledged and may still be sent: unchanged, since its deadlines are of the machine's wall clock, to
    /// the address it was made for, with enough time left to renew, and if its end was not asked for. The others are not
    /// sent again; the drone may have got them all the same.
    fn repeat_spawns(&mut self, drone_id: i32, register: &RegisterDrone) -> Result<(), StateError> {
        let mut spawns = Vec::new();
        each_action(&*self.txn, drone_id, None, |place, record| {
            if matches!(record.action, PendingAction::Spawn { .. }) {
                spawns.push((place, record));
            }
            Ok(true)
        })?;
        for (place, mut record) in spawns {
            let id = record.backend_id.clone();
            let mut backend = self.known_backend(&id)?;
            if self.may_repeat(&record, &backend, register)? {
                if let PendingAction::Spawn { target: SpawnTarget::Session { session, .. }, .. } =
                    &mut record.action
                {
                    session.clone_from(&register.session);
                }
                backend.spawn_repeated = true;
                self.put_action(drone_id, place, &record);
            } else {
                self.delete_action(drone_id, place)?;
                if backend.presence == Presence::Expected {
                    backend.presence = Presence::Doubtful;
                }
                self.backend_changed(&id);
            }
            self.put_backend(&id, &mut backend);
        }
        Ok(())
    }

    fn may_repeat(
        &self,
        record: &ActionRecord,
        backend: &BackendRecord,
        register: &RegisterDrone,
    ) -> Result<bool, StateError> {
        let PendingAction::Spawn { target, heartbeat_at_ms, lease, .. } = &record.action else {
            return Ok(false);
        };
        let same_address = matches!(target, SpawnTarget::Session { address, .. }
            if !address.is_empty() && *address == register.address);
        let soft_at_ms = heartbeat_at_ms.saturating_add(lease.soft_terminate_ms);
        Ok(same_address
            && soft_at_ms > self.now_ms.saturating_add(lease.renew_ms)
            && backend.termination_asked.is_none()
            && backend.state().status() == BackendStatus::Scheduled
            && self.holds_key(&record.backend_id, backend)?)
    }

    pub(super) fn heartbeats(&mut self, items: &[HeartbeatItem]) -> Result<Outcome, StateError> {
        if items.len() > HEARTBEATS_PER_ENTRY_MAX {
            return Ok(Outcome::Refused(Refusal::Full("the number of heartbeats in one entry".to_owned())));
        }
        for item in items {
            let Some(mut drone) = self.view().drone(item.drone_id)? else { continue };
            if drone.session != item.session {
                continue;
            }
            if drone.heartbeat.is_none() {
                // Actions have waited for it.
                self.actions_changed(item.drone_id);
            }
            drone.heartbeat = Some(HeartbeatRecord {
                at_ms: self.now_ms,
                term: self.at.term,
                local_time_ms: drone
                    .heartbeat
                    .map_or(item.local_time_ms, |old| old.local_time_ms.max(item.local_time_ms)),
            });
            if drone
                .heard_filed_at_ms
                .is_none_or(|at_ms| self.now_ms >= at_ms.saturating_add(HEARD_REFILE_MS))
            {
                self.file_drone(item.drone_id, &mut drone);
            }
            self.put_drone(item.drone_id, &drone);
        }
        Ok(Outcome::Done)
    }

    pub(super) fn drain(
        &mut self,
        cluster: &str,
        name: &str,
        draining: bool,
        deadline_in_ms: Option<u64>,
    ) -> Result<Outcome, StateError> {
        let Some((drone_id, mut drone)) = self.view().drone_by_name(cluster, name)? else {
            return Ok(Outcome::Refused(Refusal::NoSuchDrone(name.to_owned())));
        };
        let before = drone.drain_deadline_ms;
        let deadline_ms = match deadline_in_ms {
            _ if !draining => None,
            Some(in_ms) => Some(self.now_ms.saturating_add(in_ms)),
            None => before,
        };
        let updated = drone.draining != draining || before != deadline_ms;
        if before != deadline_ms {
            let entry = |at_ms| keys::timed(at_ms, &keys::drone(drone_id));
            if let Some(at_ms) = before {
                self.txn.delete(Table::DrainEnds, entry(at_ms));
            }
            if let Some(at_ms) = deadline_ms {
                self.txn.put(Table::DrainEnds, entry(at_ms), Vec::new());
            }
        }
        if updated {
            drone.draining = draining;
            drone.drain_deadline_ms = deadline_ms;
            if !draining && drone.heard_filed_at_ms.is_none() {
                // It may have to be swept some day.
                self.file_drone(drone_id, &mut drone);
            }
            self.put_drone(drone_id, &drone);
        }
        Ok(Outcome::Drained { updated, remaining: drone.backend_count })
    }

    pub(super) fn leaving(&mut self, drone_id: i32, session: &str) -> Result<Outcome, StateError> {
        if let Some(mut drone) = self.view().drone(drone_id)?
            && drone.session == session
            && !drone.leaving
        {
            drone.leaving = true;
            self.put_drone(drone_id, &drone);
        }
        Ok(Outcome::Done)
    }
}
