//! Getting a key: one step from "free" to "held, with its backend scheduled".

use super::step::{SPAWN_SUB, Step, damaged, ensure};
use crate::command::{Acquire, Spawn};
use crate::kv::{ReadState, StateError, Table, keys};
use crate::limits::{CANDIDATES_MAX, SUPPLIED_IDS_MAX, TOKEN_MAX};
use crate::outcome::{Outcome, Refusal};
use crate::records::{
    ActionRecord, BackendRecord, HeartbeatRecord, KeyRecord, PendingAction, Presence, SpawnTarget,
};
use crate::view::{holder_of, is_eligible};
use holdfast_wire::BackendState;

impl<R: ReadState + ?Sized> Step<'_, '_, R> {
    pub(super) fn acquire(&mut self, request: &Acquire) -> Result<Outcome, StateError> {
        let key = &request.key;
        let held = self.view().key(&key.namespace, &key.name)?;
        if let Some(record) = held.as_ref().filter(|record| record.expires_at_ms > self.now_ms) {
            return self.answer_held(request, record);
        }
        let refused = |refusal| Ok(Outcome::Refused(refusal));
        let Some(spawn) = &request.spawn else { return refused(Refusal::NoSpawnConfig) };
        if let Some(wait_ms) = self.view().quarantine_left_ms(self.now_ms)? {
            // The backup cannot know who got this key after it was made (invariant 1).
            return refused(Refusal::Restored { wait_ms });
        }
        if self.backend_id_used(&spawn.backend_id)? {
            // A generated one too: the proposer tries again with another.
            return refused(Refusal::BackendIdUsed(spawn.backend_id.clone()));
        }
        if spawn.id_supplied && self.progress.supplied_ids >= SUPPLIED_IDS_MAX {
            return refused(Refusal::Full("the number of supplied backend ids".to_owned()));
        }
        let Some((drone_id, heartbeat)) = self.choose_drone(spawn)? else {
            return refused(Refusal::NoDrone);
        };
        // From here on nothing is refused.
        if let Some(expired) = held {
            ensure(expired.token < self.at.index, || {
                format!("token {} of key {:?} is followed by {}", expired.token, key.name, self.at.index)
            })?;
            self.end_expired(&key.namespace, &key.name, &expired)?;
        }
        self.take(request, spawn, drone_id, heartbeat)
    }

    fn answer_held(&self, request: &Acquire, record: &KeyRecord) -> Result<Outcome, StateError> {
        if record.tag != request.key.tag {
            return Ok(Outcome::Refused(Refusal::TagMismatch { held: record.tag.clone() }));
        }
        let backend = self.known_backend(&record.backend_id)?;
        let holder = holder_of(&record.backend_id, backend);
        Ok(if holder.is_waited_for { Outcome::Leaving(holder) } else { Outcome::Found(holder) })
    }

    fn backend_id_used(&self, id: &str) -> Result<bool, StateError> {
        Ok(self.txn.get(Table::Backends, id.as_bytes())?.is_some()
            || self.txn.get(Table::SuppliedIds, id.as_bytes())?.is_some())
    }

    /// The eligible candidate with the fewest backends, the earlier one of equals.
    fn choose_drone(&self, spawn: &Spawn) -> Result<Option<(i32, HeartbeatRecord)>, StateError> {
        let renew_ms = self.cluster()?.lease.renew_ms;
        let own_term = self.own_term_only.then_some(self.at.term);
        let mut best: Option<(u64, i32, HeartbeatRecord)> = None;
        for &drone_id in spawn.candidates.iter().take(CANDIDATES_MAX) {
            let Some(drone) = self.view().drone(drone_id)? else { continue };
            if drone.cluster != spawn.cluster || drone.pool != spawn.pool {
                continue;
            }
            let Some(heartbeat) = is_eligible(&drone, self.now_ms, renew_ms, own_term) else { continue };
            if best.as_ref().is_none_or(|(count, ..)| drone.backend_count < *count) {
                best = Some((drone.backend_count, drone_id, heartbeat));
            }
        }
        Ok(best.map(|(_, drone_id, heartbeat)| (drone_id, heartbeat)))
    }

    /// Writes everything that belongs to a new holder.
    fn take(
        &mut self,
        request: &Acquire,
        spawn: &Spawn,
        drone_id: i32,
        heartbeat: HeartbeatRecord,
    ) -> Result<Outcome, StateError> {
        let key = &request.key;
        let token = self.at.index;
        ensure(token <= TOKEN_MAX, || format!("token {token} is above 2^53"))?;
        let lease = self.cluster()?.lease;

        let expires_at_ms = self.now_ms.saturating_add(lease.expiry_ms);
        let record = KeyRecord {
            tag: key.tag.clone(),
            backend_id: spawn.backend_id.clone(),
            drone_id,
            token,
            allow_renew: true,
            acquired_at_ms: self.now_ms,
            expires_at_ms,
            indexed_at_ms: expires_at_ms,
        };
        self.put_key(&key.namespace, &key.name, &record);
        self.file_key(&key.namespace, &key.name, &record);
        self.progress.keys_held += 1;

        let mut drone = self.known_drone(drone_id)?;
        drone.backend_count = drone
            .backend_count
            .checked_add(1)
            .ok_or_else(|| damaged(format!("the backend count of drone {drone_id} overflows")))?;
        self.put_drone(drone_id, &drone);

        let mut backend = BackendRecord {
            key: key.clone(),
            cluster: spawn.cluster.clone(),
            drone_id,
            presence: Presence::Expected,
            drone: drone.name,
            data_id: drone.data_id.clone(),
            spawn_repeated: false,
            id_supplied: spawn.id_supplied,
            token,
            history: vec![(self.now_ms, BackendState::Scheduled)],
            termination_asked: None,
            lifetime_ends_at_ms: spawn
                .lifetime_limit_seconds
                .map(|seconds| self.now_ms.saturating_add(u64::from(seconds) * 1000)),
            max_idle_seconds: spawn.max_idle_seconds,
            static_token: spawn.static_token.clone(),
            secret_token: spawn.secret_token.clone(),
            subdomain: spawn.subdomain.clone(),
            revoked_users: Vec::new(),
            terminate_action: None,
            activity: None,
            end_filed_at_ms: None,
        };
        self.put_backend(&spawn.backend_id, &mut backend);
        let of_drone = keys::drone_backend(drone_id, &spawn.backend_id);
        self.txn.put(Table::DroneBackends, of_drone, token.to_be_bytes().to_vec());
        self.backend_changed(&spawn.backend_id);
        if spawn.id_supplied {
            self.txn.put(Table::SuppliedIds, spawn.backend_id.as_bytes().to_vec(), Vec::new());
            self.progress.supplied_ids += 1;
        }

        let target = match drone.data_id {
            Some(_) => SpawnTarget::Incarnation(drone.incarnation),
            None => SpawnTarget::Session { session: drone.session, address: drone.address },
        };
        let action = PendingAction::Spawn {
            target,
            local_time_ms: heartbeat.local_time_ms,
            heartbeat_at_ms: heartbeat.at_ms,
            lease,
            token,
            executable_json: spawn.executable_json.clone(),
        };
        let action = ActionRecord { backend_id: spawn.backend_id.clone(), action };
        self.put_action(drone_id, (token, SPAWN_SUB), &action);
        Ok(Outcome::Acquired(holder_of(&spawn.backend_id, backend)))
    }
}
