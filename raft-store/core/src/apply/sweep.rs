//! Tidying up, in bounded batches. Correctness does not depend on it: an expired key can be taken without.

use super::step::{Step, damaged};
use crate::command::{Sweep, SweepKey};
use crate::kv::{ReadState, StateError, Table, keys};
use crate::limits::{DRONE_KEEP_MS, SWEEP_KEYS_MAX, SWEEP_RECORDS_MAX};
use crate::outcome::Outcome;

/// The name in an entry of a time index.
pub(super) fn name_of(table: Table, entry: &[u8]) -> Result<String, StateError> {
    keys::split_timed(entry)
        .and_then(|(_, name)| std::str::from_utf8(name).ok())
        .map(str::to_owned)
        .ok_or_else(|| damaged(format!("an entry of {}", table.name())))
}

impl<R: ReadState + ?Sized> Step<'_, '_, R> {
    pub(super) fn sweep(&mut self, sweep: &Sweep) -> Result<Outcome, StateError> {
        for seen in sweep.keys.iter().take(SWEEP_KEYS_MAX) {
            self.sweep_key(seen)?;
        }
        if sweep.records {
            self.sweep_terminated()?;
            self.sweep_idempotency()?;
            self.sweep_supplied_ids()?;
            self.sweep_drones()?;
        }
        Ok(Outcome::Done)
    }

    fn sweep_key(&mut self, seen: &SweepKey) -> Result<(), StateError> {
        let (namespace, name) = (&seen.namespace, &seen.name);
        let entry = keys::timed(seen.indexed_at_ms, &keys::pair(namespace, name));
        if self.txn.get(Table::KeyExpiry, &entry)? != Some(seen.token.to_be_bytes().to_vec()) {
            return Ok(());
        }
        let key = self.view().key(namespace, name)?;
        match key.filter(|key| key.token == seen.token && key.indexed_at_ms == seen.indexed_at_ms) {
            // Nothing that this entry stands for is left.
            None => self.txn.delete(Table::KeyExpiry, entry),
            Some(key) if key.expires_at_ms <= self.now_ms => self.end_expired(namespace, name, &key)?,
            // Renewed since it was filed.
            Some(mut key) => {
                self.txn.delete(Table::KeyExpiry, entry);
                key.indexed_at_ms = key.expires_at_ms;
                self.put_key(namespace, name, &key);
                self.file_key(namespace, name, &key);
            }
        }
        Ok(())
    }

    /// Keys of a time index at or before `until_ms`, without their times; the entries themselves are deleted.
    fn take_due(&mut self, table: Table, until_ms: u64) -> Result<Vec<String>, StateError> {
        let end = keys::timed(until_ms.saturating_add(1), &[]);
        let rows = self.txn.scan(table, &[], Some(&end), SWEEP_RECORDS_MAX)?;
        let mut due = Vec::with_capacity(rows.len());
        for (entry, _) in rows {
            due.push(name_of(table, &entry)?);
            self.txn.delete(table, entry);
        }
        Ok(due)
    }

    fn sweep_terminated(&mut self) -> Result<(), StateError> {
        let Some(until_ms) = self.now_ms.checked_sub(self.cluster()?.terminated_keep_ms) else {
            return Ok(());
        };
        for id in self.take_due(Table::Terminated, until_ms)? {
            let backend = self.known_backend(&id)?;
            self.delete_actions_of(&backend)?;
            self.txn.delete(Table::Backends, id.into_bytes());
        }
        Ok(())
    }

    fn sweep_supplied_ids(&mut self) -> Result<(), StateError> {
        for id in self.take_due(Table::SuppliedEnds, self.now_ms)? {
            self.txn.delete(Table::SuppliedIds, id.into_bytes());
            self.progress.supplied_ids = self
                .progress
                .supplied_ids
                .checked_sub(1)
                .ok_or_else(|| damaged("fewer than no supplied backend ids"))?;
        }
        Ok(())
    }

    /// Deletes drones that have been silent for long, are empty and not drained. Of the others none is looked at again
    /// before it was heard of, emptied or undrained.
    fn sweep_drones(&mut self) -> Result<(), StateError> {
        let Some(until_ms) = self.now_ms.checked_sub(DRONE_KEEP_MS) else { return Ok(()) };
        let end = keys::timed(until_ms.saturating_add(1), &[]);
        for (entry, _) in self.txn.scan(Table::DronesHeard, &[], Some(&end), SWEEP_RECORDS_MAX)? {
            let drone_id = keys::split_timed(&entry)
                .and_then(|(_, drone)| keys::split_drone(drone))
                .ok_or_else(|| damaged("an entry of drones_heard"))?;
            let mut drone = self.known_drone(drone_id)?;
            if drone.heard_at_ms() > until_ms {
                self.file_drone(drone_id, &mut drone);
                self.put_drone(drone_id, &drone);
            } else if drone.backend_count > 0 || drone.draining {
                self.unfile_drone(drone_id, &mut drone);
                self.put_drone(drone_id, &drone);
            } else {
                self.unfile_drone(drone_id, &mut drone);
                self.txn.delete(Table::DroneNames, keys::pair(&drone.cluster, &drone.name));
                self.txn.delete(Table::Drones, keys::drone(drone_id));
            }
        }
        Ok(())
    }

    fn sweep_idempotency(&mut self) -> Result<(), StateError> {
        for key in self.take_due(Table::IdempotencyExpiry, self.now_ms)? {
            self.txn.delete(Table::Idempotency, key.into_bytes());
            self.progress.idempotency_records = self
                .progress
                .idempotency_records
                .checked_sub(1)
                .ok_or_else(|| damaged("fewer than no idempotency records"))?;
        }
        Ok(())
    }
}
