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
use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

/// Memory that a row takes beside its bytes, about.
const ROW_EXTRA_BYTES: usize = 96;

type Rows = BTreeMap<Vec<u8>, Option<Vec<u8>>>;

/// Committed writes on top of something older.
#[derive(Debug, Default)]
pub struct Layer {
    tables: [Rows; Table::ALL.len()],
    bytes: usize,
    /// The last entry in it.
    pub applied: Option<LogId>,
    /// Set if an entry in it set it.
    pub membership: Option<StoredMembership>,
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

    /// All rows.
    pub fn rows(&self) -> impl Iterator<Item = (Table, &Vec<u8>, &Option<Vec<u8>>)> {
        Table::ALL
            .into_iter()
            .flat_map(|table| self.tables[table as usize].iter().map(move |(key, value)| (table, key, value)))
    }

    fn get(&self, table: Table, key: &[u8]) -> Option<&Option<Vec<u8>>> {
        self.tables[table as usize].get(key)
    }

    fn range<'a>(
        &'a self,
        table: Table,
        start: &[u8],
        end: Option<&[u8]>,
    ) -> impl Iterator<Item = (&'a Vec<u8>, &'a Option<Vec<u8>>)> {
        let end = end.map_or(Bound::Unbounded, Bound::Excluded);
        self.tables[table as usize].range::<[u8], _>((Bound::Included(start), end))
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

    fn layer(index: u64, writes: &[Write]) -> Layer {
        let mut layer = Layer::default();
        let writes: Writes =
            writes.iter().map(|(key, value)| ((Table::Keys, vec![*key]), value.map(|v| vec![v]))).collect();
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
                flushing: flushing.map(|writes| Arc::new(layer(1, &writes))),
                fresh: layer(2, &fresh),
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
            let above = layers.range(Table::Keys, &[start], end.as_deref(), limit);
            let rows = lay_over::<()>(above, limit, |limit| Ok(first(&database, limit))).unwrap();
            prop_assert_eq!(rows, first(&whole, limit));
            for key in 0..12u8 {
                let read = layers.get(Table::Keys, &[key]).unwrap_or_else(|| database.get(&vec![key]).cloned());
                prop_assert_eq!(read.as_ref(), whole.get(&vec![key]));
            }
        }
    }

    #[test]
    fn a_layer_knows_its_size_and_its_end() {
        let mut layer = layer(1, &[(1, Some(1)), (2, None)]);
        let rows = 2 * (1 + ROW_EXTRA_BYTES) + 1;
        assert_eq!(layer.bytes(), rows);
        let shorter = Writes::from([((Table::Keys, vec![1]), None)]);
        layer.absorb(shorter, WireLogId { term: 1, index: 2 }.into(), None);
        assert_eq!(layer.bytes(), rows - 1);
        assert_eq!(layer.applied.map(|at| at.index), Some(2));
    }
}
