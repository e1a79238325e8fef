//! One entry being applied: typed reads and writes on the transaction, and what the entry carries along.

use super::Position;
use crate::codec::encode;
use crate::kv::{Head, ReadState, StateError, Table, Txn, keys};
use crate::outcome::Effect;
use crate::records::{ActionRecord, BackendRecord, ClusterRecord, DroneRecord, KeyRecord, ProgressRecord};
use crate::view::View;
use std::collections::BTreeSet;

/// Sub-number of the `Spawn` action within its entry. `Terminate` actions count on from 1.
pub(super) const SPAWN_SUB: u32 = 0;

/// See the module.
pub(super) struct Step<'s, 'b, R: ReadState + ?Sized> {
    pub(super) txn: &'s mut Txn<'b, R>,
    pub(super) at: Position,
    /// Cluster time of this entry, in milliseconds.
    pub(super) now_ms: u64,
    /// See [`crate::command::Stamp::own_term_only`].
    pub(super) own_term_only: bool,
    /// Written back when the entry ends.
    pub(super) progress: ProgressRecord,
    cluster: Option<ClusterRecord>,
    effects: BTreeSet<Effect>,
    next_terminate_sub: u32,
}

/// A contradiction in the state that no entry can cause: the replica must stop.
pub(super) fn damaged(what: impl Into<String>) -> StateError {
    StateError::Damaged(what.into())
}

/// Checks an invariant that this program keeps.
pub(super) fn ensure(holds: bool, otherwise: impl FnOnce() -> String) -> Result<(), StateError> {
    if holds { Ok(()) } else { Err(damaged(otherwise())) }
}

impl<'s, 'b, R: ReadState + ?Sized> Step<'s, 'b, R> {
    pub(super) fn new(
        txn: &'s mut Txn<'b, R>,
        at: Position,
        own_term_only: bool,
        Head { cluster, progress }: Head,
    ) -> Self {
        Self {
            txn,
            at,
            now_ms: progress.cluster_time_ms,
            own_term_only,
            progress,
            cluster,
            effects: BTreeSet::new(),
            next_terminate_sub: SPAWN_SUB + 1,
        }
    }

    /// What the entry leaves: the head to be sealed, and who has to look.
    pub(super) fn finish(self) -> (Head, Vec<Effect>) {
        (Head { cluster: self.cluster, progress: self.progress }, self.effects.into_iter().collect())
    }

    pub(super) fn view(&self) -> View<&Txn<'b, R>> {
        View(&*self.txn)
    }

    pub(super) fn effect(&mut self, effect: Effect) {
        self.effects.insert(effect);
    }

    pub(super) fn actions_changed(&mut self, drone_id: i32) {
        self.effect(Effect::Actions { drone_id });
    }

    pub(super) fn backend_changed(&mut self, backend_id: &str) {
        self.effect(Effect::Backend { backend_id: backend_id.to_owned() });
    }

    /// The cluster's record, once formed.
    pub(super) fn cluster_if_formed(&self) -> Option<&ClusterRecord> {
        self.cluster.as_ref()
    }

    /// The cluster's record; only `FormCluster` runs without one.
    pub(super) fn cluster(&self) -> Result<&ClusterRecord, StateError> {
        self.cluster.as_ref().ok_or_else(|| damaged("a command ran before the cluster was formed"))
    }

    pub(super) fn put_cluster(&mut self, record: ClusterRecord) {
        self.txn.put(Table::Meta, keys::CLUSTER.to_vec(), encode(&record));
        self.cluster = Some(record);
    }

    pub(super) fn put_key(&mut self, namespace: &str, name: &str, record: &KeyRecord) {
        self.txn.put(Table::Keys, keys::pair(namespace, name), encode(record));
    }

    /// Files a key in the expiry index under its `indexed_at_ms`.
    pub(super) fn file_key(&mut self, namespace: &str, name: &str, record: &KeyRecord) {
        let at = keys::timed(record.indexed_at_ms, &keys::pair(namespace, name));
        self.txn.put(Table::KeyExpiry, at, record.token.to_be_bytes().to_vec());
    }

    pub(super) fn unfile_key(&mut self, namespace: &str, name: &str, indexed_at_ms: u64) {
        self.txn.delete(Table::KeyExpiry, keys::timed(indexed_at_ms, &keys::pair(namespace, name)));
    }

    /// A backend that another record leads to.
    pub(super) fn known_backend(&self, id: &str) -> Result<BackendRecord, StateError> {
        self.view().backend(id)?.ok_or_else(|| damaged(format!("a record leads to the unknown backend {id}")))
    }

    /// Writes a backend, and moves it to where `backend_ends` must have it now.
    pub(super) fn put_backend(&mut self, id: &str, record: &mut BackendRecord) {
        let ends_at_ms = record.ends_at_ms();
        if record.end_filed_at_ms != ends_at_ms {
            let entry = |at_ms| keys::timed(at_ms, id.as_bytes());
            if let Some(at_ms) = record.end_filed_at_ms {
                self.txn.delete(Table::BackendEnds, entry(at_ms));
            }
            if let Some(at_ms) = ends_at_ms {
                self.txn.put(Table::BackendEnds, entry(at_ms), Vec::new());
            }
            record.end_filed_at_ms = ends_at_ms;
        }
        self.txn.put(Table::Backends, id.as_bytes().to_vec(), encode(record));
    }

    /// A drone that another record leads to.
    pub(super) fn known_drone(&self, id: i32) -> Result<DroneRecord, StateError> {
        self.view().drone(id)?.ok_or_else(|| damaged(format!("a record leads to the unknown drone {id}")))
    }

    pub(super) fn put_drone(&mut self, id: i32, record: &DroneRecord) {
        self.txn.put(Table::Drones, keys::drone(id), encode(record));
    }

    /// Files a drone under the time when it was heard of last. The caller writes the record.
    pub(super) fn file_drone(&mut self, id: i32, record: &mut DroneRecord) {
        let heard_at_ms = record.heard_at_ms();
        if record.heard_filed_at_ms == Some(heard_at_ms) {
            return;
        }
        self.unfile_drone(id, record);
        self.txn.put(Table::DronesHeard, keys::timed(heard_at_ms, &keys::drone(id)), Vec::new());
        record.heard_filed_at_ms = Some(heard_at_ms);
    }

    /// The caller writes the record.
    pub(super) fn unfile_drone(&mut self, id: i32, record: &mut DroneRecord) {
        if let Some(at_ms) = record.heard_filed_at_ms.take() {
            self.txn.delete(Table::DronesHeard, keys::timed(at_ms, &keys::drone(id)));
        }
    }

    pub(super) fn put_action(&mut self, drone_id: i32, (index, sub): (u64, u32), record: &ActionRecord) {
        self.txn.put(Table::Actions, keys::action(drone_id, index, sub), encode(record));
        self.actions_changed(drone_id);
    }

    /// Deletes an action if it is there. Nobody is woken for it: there is nothing new to send.
    pub(super) fn delete_action(
        &mut self,
        drone_id: i32,
        (index, sub): (u64, u32),
    ) -> Result<(), StateError> {
        let key = keys::action(drone_id, index, sub);
        if self.txn.get(Table::Actions, &key)?.is_some() {
            self.txn.delete(Table::Actions, key);
        }
        Ok(())
    }

    /// Place of this entry's next `Terminate` action.
    pub(super) fn next_terminate_place(&mut self) -> (u64, u32) {
        let sub = self.next_terminate_sub;
        self.next_terminate_sub += 1;
        (self.at.index, sub)
    }
}
