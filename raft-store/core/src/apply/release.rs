//! How a holder ends: by its drone's word that nothing of it is left, or by its key's expiry.

use super::step::{SPAWN_SUB, Step, damaged, ensure};
use crate::kv::{ReadState, StateError, Table, keys};
use crate::limits::SUPPLIED_ID_KEEP_MS;
use crate::outcome::{Effect, Outcome, Refusal};
use crate::records::{BackendRecord, KeyRecord};
use holdfast_wire::{BackendState, BackendStatus, TerminationKind, TerminationReason};

impl<R: ReadState + ?Sized> Step<'_, '_, R> {
    pub(super) fn revoke_key(&mut self, namespace: &str, name: &str) -> Result<Outcome, StateError> {
        let Some(key) = self.view().key(namespace, name)? else {
            return Ok(Outcome::Refused(Refusal::NoSuchKey));
        };
        if key.expires_at_ms > self.now_ms {
            return Ok(Outcome::Refused(Refusal::NotExpired));
        }
        self.end_expired(namespace, name, &key)?;
        Ok(Outcome::Updated(true))
    }

    /// Ends the holder of an expired key. Its drone, should it be alive after all, is told to kill the backend.
    pub(super) fn end_expired(
        &mut self,
        namespace: &str,
        name: &str,
        key: &KeyRecord,
    ) -> Result<(), StateError> {
        ensure(key.expires_at_ms <= self.now_ms, || format!("key {name:?} is ended before its expiry"))?;
        let mut backend = self.known_backend(&key.backend_id)?;
        ensure(backend.token == key.token, || {
            format!("key {name:?} has token {} and its backend {}", key.token, backend.token)
        })?;
        self.free_key(namespace, name, key)?;
        if backend.state().status() != BackendStatus::Terminated {
            let lost = BackendState::Terminated {
                last_status: backend.state().status(),
                termination: None,
                reason: Some(TerminationReason::Lost),
                exit_code: None,
            };
            self.record_state(&key.backend_id, &mut backend, lost)?;
            self.delete_action(backend.drone_id, (backend.token, SPAWN_SUB))?;
            self.queue_terminate(
                &key.backend_id,
                &mut backend,
                TerminationKind::Hard,
                TerminationReason::KeyExpired,
            )?;
        }
        self.file_terminated(&key.backend_id, &backend);
        self.put_backend(&key.backend_id, &mut backend);
        Ok(())
    }

    /// Files a backend that has terminated and holds no key, so that it is swept after its time.
    pub(super) fn file_terminated(&mut self, id: &str, backend: &BackendRecord) {
        if let Some((at_ms, _)) = backend.history.last() {
            self.txn.put(Table::Terminated, keys::timed(*at_ms, id.as_bytes()), Vec::new());
        }
    }

    /// Deletes a key and its entry in the expiry index.
    pub(super) fn free_key(
        &mut self,
        namespace: &str,
        name: &str,
        key: &KeyRecord,
    ) -> Result<(), StateError> {
        self.txn.delete(Table::Keys, keys::pair(namespace, name));
        self.unfile_key(namespace, name, key.indexed_at_ms);
        self.progress.keys_held =
            self.progress.keys_held.checked_sub(1).ok_or_else(|| damaged("fewer than no keys are held"))?;
        self.effect(Effect::KeyFreed { namespace: namespace.to_owned(), name: name.to_owned() });
        Ok(())
    }

    /// Appends a later state to a backend's history; the last one ends it as a live backend. The caller writes the
    /// record, and [files](Self::file_terminated) it once its key is free.
    pub(super) fn record_state(
        &mut self,
        id: &str,
        backend: &mut BackendRecord,
        state: BackendState,
    ) -> Result<(), StateError> {
        let status = state.status();
        ensure(status > backend.state().status(), || {
            format!("backend {id} would go from {} to {status}", backend.state().status())
        })?;
        backend.history.push((self.now_ms, state));
        if status == BackendStatus::Terminated {
            self.txn.delete(Table::DroneBackends, keys::drone_backend(backend.drone_id, id));
            if backend.id_supplied {
                let forget_at_ms = self.now_ms.saturating_add(SUPPLIED_ID_KEEP_MS);
                self.txn.put(Table::SuppliedEnds, keys::timed(forget_at_ms, id.as_bytes()), Vec::new());
            }
            let mut drone = self.known_drone(backend.drone_id)?;
            drone.backend_count = drone.backend_count.checked_sub(1).ok_or_else(|| {
                damaged(format!("drone {} would have fewer than no backends", backend.drone_id))
            })?;
            if drone.backend_count == 0 {
                // It may have to be swept some day.
                self.file_drone(backend.drone_id, &mut drone);
            }
            self.put_drone(backend.drone_id, &drone);
        }
        self.backend_changed(id);
        Ok(())
    }
}
