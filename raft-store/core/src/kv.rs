//! The tables of the state, their keys, and how they are read and written.
//!
//! | table | key | value |
//! | --- | --- | --- |
//! | `meta` | `cluster`, `progress`, `restored`, `member_ids` (and, of `raft-store` alone, `applied`, `membership`) | [`crate::records::ClusterRecord`], [`crate::records::ProgressRecord`], [`crate::records::RestoredRecord`], [`crate::records::MemberIdsRecord`] |
//! | `keys` | `{namespace}\0{name}` | [`crate::records::KeyRecord`] |
//! | `key_expiry` | `{expires_at_ms: u64 BE}{namespace}\0{name}` | token, u64 BE |
//! | `backends` | `{backend id}` | [`crate::records::BackendRecord`] |
//! | `terminated` | `{terminated_at_ms: u64 BE}{backend id}` | empty |
//! | `supplied_ids` | `{backend id}` | empty; from the acquisition until the id is forgotten |
//! | `drones` | `{drone id: u32 BE}` | [`crate::records::DroneRecord`] |
//! | `drone_names` | `{cluster}\0{name}` | drone id, u32 BE |
//! | `actions` | `{drone id: u32 BE}{log index: u64 BE}{sub: u32 BE}` | [`crate::records::ActionRecord`] |
//! | `idempotency` | `{idempotency key}` | [`crate::records::IdempotencyRecord`] |
//! | `idempotency_expiry` | `{expires_at_ms: u64 BE}{idempotency key}` | empty |
//! | `backend_ends` | `{ends_at_ms: u64 BE}{backend id}` | empty; one for each backend that a limit will end ([`crate::records::BackendRecord::ends_at_ms`]) |
//! | `drain_ends` | `{drain_deadline_ms: u64 BE}{drone id: u32 BE}` | `{backend id}`: how far the pass over the drone's backends has come; empty before it begins, and the entry goes with its end |
//! | `drone_backends` | `{drone id: u32 BE}{backend id}` | token, u64 BE; one for each backend that has not terminated |
//! | `drones_heard` | `{heard_at_ms: u64 BE}{drone id: u32 BE}` | empty; by [`crate::records::DroneRecord::heard_filed_at_ms`] |
//! | `supplied_ends` | `{forget_at_ms: u64 BE}{backend id}` | empty; one for each supplied id whose backend has ended |
//!
//! Names hold no control characters, so `\0` separates and keeps the order of (namespace, name). Values are
//! [`crate::codec`] records: a version byte, then bincode.

use crate::codec::{decode, encode};
use crate::records::{ClusterRecord, ProgressRecord};
use std::collections::BTreeMap;

/// A column family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Table {
    Meta = 0,
    Keys = 1,
    KeyExpiry = 2,
    Backends = 3,
    Terminated = 4,
    SuppliedIds = 5,
    Drones = 6,
    DroneNames = 7,
    Actions = 8,
    Idempotency = 9,
    IdempotencyExpiry = 10,
    BackendEnds = 11,
    DrainEnds = 12,
    DroneBackends = 13,
    DronesHeard = 14,
    SuppliedEnds = 15,
}

impl Table {
    /// All of them, in the order of their numbers.
    pub const ALL: [Table; 16] = [
        Table::Meta,
        Table::Keys,
        Table::KeyExpiry,
        Table::Backends,
        Table::Terminated,
        Table::SuppliedIds,
        Table::Drones,
        Table::DroneNames,
        Table::Actions,
        Table::Idempotency,
        Table::IdempotencyExpiry,
        Table::BackendEnds,
        Table::DrainEnds,
        Table::DroneBackends,
        Table::DronesHeard,
        Table::SuppliedEnds,
    ];

    /// Name of the column family.
    pub fn name(self) -> &'static str {
        match self {
            Table::Meta => "meta",
            Table::Keys => "keys",
            Table::KeyExpiry => "key_expiry",
            Table::Backends => "backends",
            Table::Terminated => "terminated",
            Table::SuppliedIds => "supplied_ids",
            Table::Drones => "drones",
            Table::DroneNames => "drone_names",
            Table::Actions => "actions",
            Table::Idempotency => "idempotency",
            Table::IdempotencyExpiry => "idempotency_expiry",
            Table::BackendEnds => "backend_ends",
            Table::DrainEnds => "drain_ends",
            Table::DroneBackends => "drone_backends",
            Table::DronesHeard => "drones_heard",
            Table::SuppliedEnds => "supplied_ends",
        }
    }
}

/// The state could not be read, or holds something that no version of this program writes. A replica that meets it
/// must stop: it can no longer be trusted.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The disk or the database failed.
    #[error("reading the state failed: {0}")]
    Read(String),
    /// A record does not decode, or two records contradict each other.
    #[error("the state is damaged: {0}")]
    Damaged(String),
}

/// A row of a table.
pub type Row = (Vec<u8>, Vec<u8>);

/// Read access to one consistent version of the state.
pub trait ReadState {
    /// The value under a key.
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StateError>;

    /// Up to `limit` rows with `start <= key`, and `key < end` if an end is given, in the order of keys.
    fn scan(
        &self,
        table: Table,
        start: &[u8],
        end: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<Row>, StateError>;
}

impl<T: ReadState + ?Sized> ReadState for &T {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StateError> {
        (**self).get(table, key)
    }
    fn scan(
        &self,
        table: Table,
        start: &[u8],
        end: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<Row>, StateError> {
        (**self).scan(table, start, end, limit)
    }
}

/// The writes of a transaction: a new value, or `None` for a deletion.
pub type Writes = BTreeMap<(Table, Vec<u8>), Option<Vec<u8>>>;

/// What every entry reads, and mostly changes. A transaction keeps it decoded from one entry to the next.
#[derive(Debug, Clone)]
pub struct Head {
    pub(crate) cluster: Option<ClusterRecord>,
    pub(crate) progress: ProgressRecord,
}

/// Reads through to a base, and keeps its own writes on top until somebody commits them.
pub struct Txn<'a, R: ReadState + ?Sized> {
    base: &'a R,
    writes: Writes,
    /// Writes since [`Txn::begin_entry`], for the checksum.
    entry_writes: Writes,
    /// Stands for `meta/progress` once an entry was applied. `meta/cluster` is written as well when it changes.
    head: Option<Head>,
}

impl<'a, R: ReadState + ?Sized> Txn<'a, R> {
    /// An empty transaction on `base`.
    pub fn new(base: &'a R) -> Self {
        Self { base, writes: Writes::new(), entry_writes: Writes::new(), head: None }
    }

    /// Starts the next entry: what is written from here on counts as its writes.
    pub fn begin_entry(&mut self) {
        let done = std::mem::take(&mut self.entry_writes);
        self.writes.extend(done);
    }

    /// What the current entry wrote so far.
    pub fn entry_writes(&self) -> &Writes {
        &self.entry_writes
    }

    /// Writes a value.
    pub fn put(&mut self, table: Table, key: Vec<u8>, value: Vec<u8>) {
        self.entry_writes.insert((table, key), Some(value));
    }

    /// Deletes a key.
    pub fn delete(&mut self, table: Table, key: Vec<u8>) {
        self.entry_writes.insert((table, key), None);
    }

    /// A transaction that goes on where another one ended, whose writes are in `base` now.
    pub fn after(base: &'a R, head: Option<Head>) -> Self {
        Self { head, ..Self::new(base) }
    }

    /// For [`Self::after`].
    pub fn head(&self) -> Option<Head> {
        self.head.clone()
    }

    /// Takes the head for one entry. [`Self::put_head`] gives it back; without that the entry has failed, and the
    /// transaction with it.
    pub(crate) fn take_head(&mut self) -> Result<Head, StateError> {
        if let Some(head) = self.head.take() {
            return Ok(head);
        }
        let read = |key| self.get(Table::Meta, key);
        let cluster = read(keys::CLUSTER)?.map(|bytes| decode(&bytes)).transpose()?;
        let progress = read(keys::PROGRESS)?.map(|bytes| decode(&bytes)).transpose()?.unwrap_or_default();
        Ok(Head { cluster, progress })
    }

    /// See [`Self::take_head`].
    pub(crate) fn put_head(&mut self, head: Head) {
        self.head = Some(head);
    }

    fn progress_row(&self) -> Option<Vec<u8>> {
        self.head.as_ref().map(|head| encode(&head.progress))
    }

    /// All writes, for the commit.
    pub fn into_writes(mut self) -> Writes {
        self.begin_entry();
        if let Some(progress) = self.progress_row() {
            self.writes.insert((Table::Meta, keys::PROGRESS.to_vec()), Some(progress));
        }
        self.writes
    }
}

impl<R: ReadState + ?Sized> ReadState for Txn<'_, R> {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StateError> {
        if table == Table::Meta && key == keys::PROGRESS && self.head.is_some() {
            return Ok(self.progress_row());
        }
        let at = (table, key.to_vec());
        match self.entry_writes.get(&at).or_else(|| self.writes.get(&at)) {
            Some(written) => Ok(written.clone()),
            None => self.base.get(table, key),
        }
    }

    fn scan(
        &self,
        table: Table,
        start: &[u8],
        end: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<Row>, StateError> {
        if end.is_some_and(|end| end <= start) || limit == 0 {
            return Ok(Vec::new());
        }
        let lower = (table, start.to_vec());
        let in_range =
            |key: &(Table, Vec<u8>)| key.0 == table && end.is_none_or(|end| key.1.as_slice() < end);
        let mut overlay: BTreeMap<&[u8], Option<&Vec<u8>>> = BTreeMap::new();
        for writes in [&self.writes, &self.entry_writes] {
            for (key, value) in writes.range(lower.clone()..).take_while(|(key, _)| in_range(key)) {
                overlay.insert(&key.1, value.as_ref());
            }
        }
        let progress = self.progress_row().filter(|_| table == Table::Meta);
        if progress.is_some() && keys::PROGRESS >= start && end.is_none_or(|end| keys::PROGRESS < end) {
            overlay.insert(keys::PROGRESS, progress.as_ref());
        }
        // Every deletion on top can hide one row below, so ask for that many more.
        let hidden = overlay.values().filter(|v| v.is_none()).count();
        let base = self.base.scan(table, start, end, limit.saturating_add(hidden))?;
        let base_full = base.len() == limit.saturating_add(hidden);
        let base_last = base.last().map(|(key, _)| key.clone());
        let mut rows: BTreeMap<Vec<u8>, Vec<u8>> = base.into_iter().collect();
        for (key, value) in overlay {
            // Past the last base row read, rows below are not known; what lies there is beyond the limit anyway.
            if base_full && base_last.as_deref().is_some_and(|last| key > last) {
                continue;
            }
            match value {
                Some(value) => rows.insert(key.to_vec(), value.clone()),
                None => rows.remove(key),
            };
        }
        Ok(rows.into_iter().take(limit).collect())
    }
}

/// The state in memory, for tests and tools.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemState {
    rows: BTreeMap<(Table, Vec<u8>), Vec<u8>>,
}

impl MemState {
    /// Applies the writes of a transaction.
    pub fn commit(&mut self, writes: Writes) {
        for (key, value) in writes {
            match value {
                Some(value) => self.rows.insert(key, value),
                None => self.rows.remove(&key),
            };
        }
    }

    /// All rows, in order.
    pub fn rows(&self) -> impl Iterator<Item = (&(Table, Vec<u8>), &Vec<u8>)> {
        self.rows.iter()
    }
}

impl ReadState for MemState {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StateError> {
        Ok(self.rows.get(&(table, key.to_vec())).cloned())
    }

    fn scan(
        &self,
        table: Table,
        start: &[u8],
        end: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<Row>, StateError> {
        if end.is_some_and(|end| end <= start) {
            return Ok(Vec::new());
        }
        Ok(self
            .rows
            .range((table, start.to_vec())..)
            .take_while(|((t, key), _)| *t == table && end.is_none_or(|end| key.as_slice() < end))
            .take(limit)
            .map(|((_, key), value)| (key.clone(), value.clone()))
            .collect())
    }
}

/// Keys of the tables.
pub mod keys {
    /// `meta/cluster`.
    pub const CLUSTER: &[u8] = b"cluster";
    /// `meta/progress`.
    pub const PROGRESS: &[u8] = b"progress";
    /// `meta/restored`.
    pub const RESTORED: &[u8] = b"restored";
    /// `meta/member_ids`.
    pub const MEMBER_IDS: &[u8] = b"member_ids";

    /// `{a}\0{b}`, for `keys` (namespace, name) and `drone_names` (cluster, name).
    pub fn pair(a: &str, b: &str) -> Vec<u8> {
        let mut key = Vec::with_capacity(a.len() + b.len() + 1);
        key.extend_from_slice(a.as_bytes());
        key.push(0);
        key.extend_from_slice(b.as_bytes());
        key
    }

    /// Takes [`pair`] apart.
    pub fn split_pair(key: &[u8]) -> Option<(&str, &str)> {
        let text = std::str::from_utf8(key).ok()?;
        text.split_once('\0')
    }

    /// `{time_ms}{rest}`, for the time indexes.
    pub fn timed(time_ms: u64, rest: &[u8]) -> Vec<u8> {
        let mut key = Vec::with_capacity(8 + rest.len());
        key.extend_from_slice(&time_ms.to_be_bytes());
        key.extend_from_slice(rest);
        key
    }

    /// Takes [`timed`] apart.
    pub fn split_timed(key: &[u8]) -> Option<(u64, &[u8])> {
        let (time, rest) = key.split_first_chunk::<8>()?;
        Some((u64::from_be_bytes(*time), rest))
    }

    /// Key of a drone. Ids are positive.
    pub fn drone(drone_id: i32) -> Vec<u8> {
        drone_id.cast_unsigned().to_be_bytes().to_vec()
    }

    /// Takes [`drone`] apart.
    pub fn split_drone(key: &[u8]) -> Option<i32> {
        Some(u32::from_be_bytes(key.try_into().ok()?).cast_signed())
    }

    /// Key of a backend among those of its drone.
    pub fn drone_backend(drone_id: i32, backend_id: &str) -> Vec<u8> {
        let mut key = drone(drone_id);
        key.extend_from_slice(backend_id.as_bytes());
        key
    }

    /// Takes [`drone_backend`] apart: the backend's id.
    pub fn split_drone_backend(key: &[u8]) -> Option<&str> {
        let (_, id) = key.split_first_chunk::<4>()?;
        std::str::from_utf8(id).ok()
    }

    /// The first key after all that begin with a drone's id.
    pub fn after_drone(drone_id: i32) -> Vec<u8> {
        drone_id.cast_unsigned().saturating_add(1).to_be_bytes().to_vec()
    }

    /// Key of an action.
    pub fn action(drone_id: i32, index: u64, sub: u32) -> Vec<u8> {
        let mut key = drone(drone_id);
        key.extend_from_slice(&index.to_be_bytes());
        key.extend_from_slice(&sub.to_be_bytes());
        key
    }

    /// The name of an action on the wire, `ak-{index}-{sub}`: it leads straight to the record.
    pub fn action_id(index: u64, sub: u32) -> String {
        format!("ak-{index}-{sub}")
    }

    /// Takes [`action_id`] apart.
    pub fn split_action_id(id: &str) -> Option<(u64, u32)> {
        let (index, sub) = id.strip_prefix("ak-")?.split_once('-')?;
        Some((index.parse().ok()?, sub.parse().ok()?))
    }

    /// Takes [`action`] apart: log index and sub-number.
    pub fn split_action(key: &[u8]) -> Option<(u64, u32)> {
        let (_, rest) = key.split_first_chunk::<4>()?;
        let (index, sub) = rest.split_first_chunk::<8>()?;
        Some((u64::from_be_bytes(*index), u32::from_be_bytes(sub.try_into().ok()?)))
    }
}
