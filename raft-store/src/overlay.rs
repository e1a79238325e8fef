//! What is committed to the state but not in its database yet.
//!
//! ```text
//!   commit ──▶ fresh ──(full, or a second old)──▶ flushing ──one batch──▶ RocksDB
//!                │                                    │                      │
//!                └──────────── reads look here first ─┴──── and here last ───┘
//! ```
//!
//! Most rows of this state are written many times within a second: every entry moves the progress and a drone's count,
//! and an action is written and deleted within milliseconds. In memory they replace each other, and the database is
//! given only what is left. A crash loses both layers, and the Raft log brings them again: it is never purged past what
//! the database has made durable.
//!
//! Invariant: a layer is a prefix of the log. It goes to the database as one batch together with the log id that it ends
//! at, so the database is always a state that some entry left behind.

use crate::types::{LogId, StoredMembership};
use holdfast_core::kv::{Row, Table, Writes};
use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::Arc;

/// Memory that a row takes beside its bytes, about.
const ROW_EXTRA_BYTES: usize = 96;

/// The rows of one table.
#[derive(Debug)]
enum Rows {
    /// In order, for tables that are scanned all the time.
    Ordered(BTreeMap<Vec<u8>, Option<Vec<u8>>>),
    /// For large tables of which mostly single rows are read; a scan sorts what it finds.
    Hashed(HashMap<Vec<u8>, Option<Vec<u8>>>),
}

type RowRef<'a> = (&'a Vec<u8>, &'a Option<Vec<u8>>);

impl Rows {
    fn new(table: Table) -> Self {
        match table {
            Table::Keys | Table::Backends | Table::SuppliedIds | Table::Idempotency => {
                Self::Hashed(HashMap::new())
            }
            _ => Self::Ordered(BTreeMap::new()),
        }
    }

    fn get(&self, key: &[u8]) -> Option<&Option<Vec<u8>>> {
        match self {
            Self::Ordered(rows) => rows.get(key),
            Self::Hashed(rows) => rows.get(key),
        }
    }

    fn insert(&mut self, key: Vec<u8>, value: Option<Vec<u8>>) -> Option<Option<Vec<u8>>> {
        match self {
            Self::Ordered(rows) => rows.insert(key, value),
            Self::Hashed(rows) => rows.insert(key, value),
        }
    }

    /// The lowest key with a value.
    fn first_written(&self) -> Option<&[u8]> {
        match self {
            Self::Ordered(rows) => {
                rows.iter().find(|(_, value)| value.is_some()).map(|(key, _)| key.as_slice())
            }
            Self::Hashed(rows) => {
                rows.iter().filter(|(_, value)| value.is_some()).map(|(key, _)| key.as_slice()).min()
            }
        }
    }

    /// All rows from `start` to before `end`, in order.
    fn range<'a>(&'a self, start: &[u8], end: Option<&[u8]>) -> Box<dyn Iterator<Item = RowRef<'a>> + 'a> {
        match self {
            Self::Ordered(rows) => {
                let end = end.map_or(Bound::Unbounded, Bound::Excluded);
                Box::new(rows.range::<[u8], _>((Bound::Included(start), end)))
            }
            Self::Hashed(rows) => {
                let inside = |key: &[u8]| key >= start && end.is_none_or(|end| key < end);
                let mut found: Vec<_> = rows.iter().filter(|(key, _)| inside(key)).collect();
                found.sort_unstable_by_key(|(key, _)| *key);
                Box::new(found.into_iter())
            }
        }
    }
}

/// Committed writes on top of something older.
#[derive(Debug)]
pub struct Layer {
    tables: [Rows; Table::ALL.len()],
    bytes: usize,
    /// The last entry in it.
    pub applied: Option<LogId>,
    /// Set if an entry in it set it.
    pub membership: Option<StoredMembership>,
}

impl Default for Layer {
    fn default() -> Self {
        Self { tables: Table::ALL.map(Rows::new), bytes: 0, applied: None, membership: None }
    }
}

impl Layer {
    /// Adds the writes of later entries, up to `applied`.
    pub fn absorb(&mut self, writes: Writes, applied: LogId, membership: Option<StoredMembership>) {
        assert!(self.applied < Some(applied), "entries are committed in order");
        for ((table, key), value) in writes {
            let (key_bytes, value_bytes) = (key.len(), value.as_ref().map_or(0, Vec::len));
            self.bytes += value_bytes;
            match self.tables[table as usize].insert(key, value) {
                Some(old) => self.bytes -= old.map_or(0, |old| old.len()),
                None => self.bytes += key_bytes + ROW_EXTRA_BYTES,
            }
        }
        self.applied = Some(applied);
        if membership.is_some() {
            self.membership = membership;
        }
    }

    /// Memory it takes, about.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether nothing was committed to it.
    pub fn is_empty(&self) -> bool {
        self.applied.is_none()
    }

    /// All rows, in order.
    pub fn rows(&self) -> impl Iterator<Item = (Table, &Vec<u8>, &Option<Vec<u8>>)> {
        Table::ALL.into_iter().flat_map(|table| {
            self.tables[table as usize].range(&[], None).map(move |(key, value)| (table, key, value))
        })
    }

    /// The lowest key of a table that it writes a value to, with the table; `None` if it deletes there alone.
    pub fn first(&self, table: Table) -> Option<(Table, &[u8])> {
        self.tables[table as usize].first_written().map(|key| (table, key))
    }

    fn get(&self, table: Table, key: &[u8]) -> Option<&Option<Vec<u8>>> {
        self.tables[table as usize].get(key)
    }

    fn range<'a>(
        &'a self,
        table: Table,
        start: &[u8],
        end: Option<&[u8]>,
    ) -> Box<dyn Iterator<Item = RowRef<'a>> + 'a> {
        self.tables[table as usize].range(start, end)
    }
}

/// The layers on top of a database.
#[derive(Debug, Default)]
pub struct Layers {
    /// Takes what is committed.
    pub fresh: Layer,
    /// On its way to the database.
    pub flushing: Option<Arc<Layer>>,
}

impl Layers {
    /// What the layers say of a row: a value, deleted, or nothing.
    pub fn get(&self, table: Table, key: &[u8]) -> Option<Option<Vec<u8>>> {
        let below = || self.flushing.as_ref().and_then(|layer| layer.get(table, key));
        self.fresh.get(table, key).or_else(below).cloned()
    }

    /// Last entry and membership, if the layers know them.
    pub fn applied(&self) -> (Option<LogId>, Option<&StoredMembership>) {
        let below = self.flushing.as_ref();
        let applied = self.fresh.applied.or_else(|| below.and_then(|layer| layer.applied));
        let membership = self.fresh.membership.as_ref();
        (applied, membership.or_else(|| below.and_then(|layer| layer.membership.as_ref())))
    }

    /// The rows of `start..end` that the layers know of, in order, until `live_max` of them are not deletions: what comes
    /// after can't be among the first `live_max` rows of the whole.
    pub fn range(
        &self,
        table: Table,
        start: &[u8],
        end: Option<&[u8]>,
        live_max: usize,
    ) -> Vec<(Vec<u8>, Option<Vec<u8>>)> {
        let mut upper = self.fresh.range(table, start, end).peekable();
        let mut lower =
            self.flushing.as_ref().into_iter().flat_map(|layer| layer.range(table, start, end)).peekable();
        let (mut rows, mut live) = (Vec::new(), 0);
        while live < live_max {
            let row = match (upper.peek(), lower.peek()) {
                (None, None) => break,
                (Some((above, _)), Some((below, _))) if above == below => {
                    lower.next();
                    upper.next()
                }
                (Some((above, _)), Some((below, _))) if above > below => lower.next(),
                (Some(_), _) => upper.next(),
                (None, Some(_)) => lower.next(),
            };
            if let Some((key, value)) = row {
                live += usize::from(value.is_some());
                rows.push((key.clone(), value.clone()));
            }
        }
        rows
    }
}

/// Lays `above` (in order, see [`Layers::range`]) over the rows that `below` gives when asked for so many.
pub fn lay_over<E>(
    above: Vec<(Vec<u8>, Option<Vec<u8>>)>,
    limit: usize,
    below: impl FnOnce(usize) -> Result<Vec<Row>, E>,
) -> Result<Vec<Row>, E> {
    // Every deletion can hide one row below, so ask for that many more.
    let hidden = above.iter().filter(|(_, value)| value.is_none()).count();
    let mut lower = below(limit.saturating_add(hidden))?.into_iter().peekable();
    let mut upper = above.into_iter().peekable();
    let mut rows = Vec::new();
    while rows.len() < limit {
        match (upper.peek(), lower.peek()) {
            (None, None) => break,
            (Some((above, _)), Some((below, _))) if above > below => rows.extend(lower.next()),
            (None, Some(_)) => rows.extend(lower.next()),
            (Some((above, _)), below) => {
                if below.is_some_and(|(below, _)| below == above) {
                    lower.next();
                }
                if let Some((key, Some(value))) = upper.next() {
                    rows.push((key, value));
                }
            }
        }
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::WireLogId;
    use proptest::prelude::*;

    type Write = (u8, Option<u8>);

    fn layer(index: u64, table: Table, writes: &[Write]) -> Layer {
        let mut layer = Layer::default();
        let writes: Writes =
            writes.iter().map(|(key, value)| ((table, vec![*key]), value.map(|v| vec![v]))).collect();
        layer.absorb(writes, WireLogId { term: 1, index }.into(), None);
        layer
    }

    fn writes() -> impl Strategy<Value = Vec<Write>> {
        prop::collection::vec((0..12u8, prop::option::of(any::<u8>())), 0..12)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn layers_over_a_database_read_like_one_map(
            base in writes(),
            flushing in prop::option::of(writes()),
            fresh in writes(),
            start in 0..13u8,
            end in prop::option::of(0..13u8),
            limit in 0..14usize,
            table in prop::sample::select(vec![Table::Keys, Table::Actions]),
        ) {
            let mut whole = BTreeMap::new();
            let mut database = BTreeMap::new();
            for (key, value) in &base {
                database.insert(vec![*key], vec![value.unwrap_or(0)]);
            }
            whole.clone_from(&database);
            for (key, value) in flushing.iter().flatten().chain(&fresh) {
                match value {
                    Some(value) => whole.insert(vec![*key], vec![*value]),
                    None => whole.remove(&vec![*key]),
                };
            }
            let layers = Layers {
                flushing: flushing.map(|writes| Arc::new(layer(1, table, &writes))),
                fresh: layer(2, table, &fresh),
            };
            let end = end.filter(|end| *end > start).map(|end| vec![end]);
            let in_range = |key: &[u8]| key >= &[start][..] && end.as_ref().is_none_or(|end| key < &end[..]);
            let first = |rows: &BTreeMap<Vec<u8>, Vec<u8>>, limit| -> Vec<Row> {
                rows.iter()
                    .filter(|(key, _)| in_range(key))
                    .take(limit)
                    .map(|(key, value)| (key.clone(), value.clone()))
                    .collect()
            };
            let above = layers.range(table, &[start], end.as_deref(), limit);
            let rows = lay_over::<()>(above, limit, |limit| Ok(first(&database, limit))).unwrap();
            prop_assert_eq!(rows, first(&whole, limit));
            for key in 0..12u8 {
                let read = layers.get(table, &[key]).unwrap_or_else(|| database.get(&vec![key]).cloned());
                prop_assert_eq!(read.as_ref(), whole.get(&vec![key]));
            }
        }
    }

    #[test]
    fn a_layer_knows_its_size_and_its_end() {
        let mut layer = layer(1, Table::Keys, &[(1, Some(1)), (2, None)]);
        let rows = 2 * (1 + ROW_EXTRA_BYTES) + 1;
        assert_eq!(layer.bytes(), rows);
        let shorter = Writes::from([((Table::Keys, vec![1]), None)]);
        layer.absorb(shorter, WireLogId { term: 1, index: 2 }.into(), None);
        assert_eq!(layer.bytes(), rows - 1);
        assert_eq!(layer.applied.map(|at| at.index), Some(2));
    }
}
