//! Drones: sessions and incarnations, heartbeats, draining.

use super::actions::each_action;
use super::step::Step;
use crate::command::{HeartbeatItem, RegisterDrone};
use crate::kv::{ReadState, StateError, Table, keys};
use crate::limits::{DRONE_ID_MAX, HEARTBEATS_PER_ENTRY_MAX, NAME_HELD_MS};
use crate::outcome::{Effect, Outcome, Refusal};
use crate::records::{DroneRecord, HeartbeatRecord, PendingAction, VOIDED};

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
            let heard_at_ms = old.heartbeat.map_or(0, |heartbeat| heartbeat.at_ms).max(old.registered_at_ms);
            if self.now_ms.saturating_sub(heard_at_ms) < held_ms {
                return Ok(Outcome::Refused(Refusal::NameTaken));
            }
        }
        if restarted {
            self.void_spawns(drone_id)?;
        }
        if old.is_none() {
            self.progress.last_drone_id = drone_id;
            let name = keys::pair(&register.cluster, &register.name);
            self.txn.put(Table::DroneNames, name, keys::drone(drone_id));
        }
        let record = DroneRecord {
            cluster: register.cluster.clone(),
            name: register.name.clone(),
            pool: register.pool.clone(),
            incarnation: register.incarnation.clone(),
            session: register.session.clone(),
            controller: register.controller,
            version: register.version.clone(),
            git_hash: register.git_hash.clone(),
            draining: old.as_ref().is_some_and(|old| old.draining),
            backend_count: old.as_ref().map_or(0, |old| old.backend_count),
            registered_at_ms: self.now_ms,
            // Another process has another clock: nothing can be chosen for it before its own first heartbeat.
            heartbeat: old.as_ref().and_then(|old| old.heartbeat).filter(|_| !restarted),
            drain_deadline_ms: old.as_ref().and_then(|old| old.drain_deadline_ms),
            leaving: !restarted && old.is_some_and(|old| old.leaving),
        };
        self.put_drone(drone_id, &record);
        self.effect(Effect::Session { drone_id, session: register.session.clone() });
        self.actions_changed(drone_id);
        Ok(Outcome::Registered { drone_id })
    }

    /// Deletes the spawns that an earlier incarnation did not receive: their deadlines are in a clock that is gone.
    /// Their keys stay held (the spawn may have arrived after all), only their backends are marked.
    fn void_spawns(&mut self, drone_id: i32) -> Result<(), StateError> {
        let mut void = Vec::new();
        each_action(&*self.txn, drone_id, None, |place, record| {
            if matches!(record.action, PendingAction::Spawn { .. }) {
                void.push((place, record.backend_id));
            }
            Ok(true)
        })?;
        for (place, backend_id) in void {
            self.delete_action(drone_id, place)?;
            let mut backend = self.known_backend(&backend_id)?;
            if backend.termination_asked.is_none() {
                backend.termination_asked = Some(VOIDED);
                self.put_backend(&backend_id, &mut backend);
                self.backend_changed(&backend_id);
            }
        }
        Ok(())
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
            drone.heartbeat = Some(HeartbeatRecord {
                at_ms: self.now_ms,
                term: self.at.term,
                local_time_ms: drone
                    .heartbeat
                    .map_or(item.local_time_ms, |old| old.local_time_ms.max(item.local_time_ms)),
            });
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
