//! Rows that the state thread has read or written, so that it need not ask the database for them again.
//!
//! A renewal reads two rows, and a million keys are renewed in half a minute; a look into the database costs several
//! times what all the rest of a renewal does. Only the state thread writes the state, so what it keeps here can't be out of
//! date: every batch that it commits is entered here as well. A snapshot that replaces the state empties it.

use crate::state_db::StateHandle;
use holdfast_core::kv::{ReadState, Row, StateError, Table, Writes};
use quick_cache::unsync::{Cache, DefaultLifecycle};
use quick_cache::{DefaultHashBuilder, Equivalent, OptionsBuilder, Weighter};
use std::cell::RefCell;

/// Memory for rows, of both tables together. A million held keys take about 750 MB; of more than fit, those that are used
/// least are read from the database each time (ended backends, which are kept for an hour and asked for by nobody).
pub const ROW_CACHE_BYTES: u64 = 896 << 20;
/// Memory that a row takes beside its bytes, about.
const ROW_EXTRA_BYTES: usize = 96;
/// What a row takes, about; only the number of evicted rows that are remembered depends on it.
const ROW_BYTES_USUAL: u64 = 400;
/// Evicted rows that are remembered, as a share of what fits: one that comes back soon is kept for longer then.
const GHOSTS: f64 = 0.1;

#[derive(Debug, PartialEq, Eq, Hash)]
struct RowKey(Table, Box<[u8]>);

/// A [`RowKey`] to look with; its hash has to be the same.
#[derive(Debug, Hash)]
struct RowName<'a>(Table, &'a [u8]);

impl Equivalent<RowKey> for RowName<'_> {
    fn equivalent(&self, key: &RowKey) -> bool {
        self.0 == key.0 && self.1 == &*key.1
    }
}

#[derive(Debug, Clone)]
struct Bytes;

impl Weighter<RowKey, Box<[u8]>> for Bytes {
    fn weight(&self, key: &RowKey, value: &Box<[u8]>) -> u64 {
        (key.1.len() + value.len() + ROW_EXTRA_BYTES) as u64
    }
}

/// See the module.
pub struct RowCache {
    rows: RefCell<Cache<RowKey, Box<[u8]>, Bytes>>,
}

impl Default for RowCache {
    fn default() -> Self {
        Self::holding(ROW_CACHE_BYTES)
    }
}

impl RowCache {
    fn holding(bytes: u64) -> Self {
        let items = usize::try_from(bytes / ROW_BYTES_USUAL).unwrap_or(usize::MAX);
        let options = OptionsBuilder::new()
            .weight_capacity(bytes)
            .estimated_items_capacity(items)
            .ghost_allocation(GHOSTS)
            .build();
        let rows = match options {
            Ok(options) => Cache::with_options(
                options,
                Bytes,
                DefaultHashBuilder::default(),
                DefaultLifecycle::default(),
            ),
            // Both numbers are given above; the same but for the ghosts.
            Err(_) => Cache::with_weighter(items, bytes, Bytes),
        };
        Self { rows: RefCell::new(rows) }
    }

    /// Whether rows of the table are kept: those that a renewal reads.
    fn keeps(table: Table) -> bool {
        matches!(table, Table::Keys | Table::Backends)
    }

    fn get(&self, table: Table, key: &[u8]) -> Option<Vec<u8>> {
        self.rows.borrow().get(&RowName(table, key)).map(|value| value.to_vec())
    }

    fn put(&self, table: Table, key: &[u8], value: &[u8]) {
        let mut rows = self.rows.borrow_mut();
        if let Some(mut held) = rows.get_mut(&RowName(table, key)) {
            *held = value.into();
            return;
        }
        rows.insert(RowKey(table, key.into()), value.into());
    }

    /// Enters what is being committed.
    pub fn absorb(&self, writes: &Writes) {
        for ((table, key), value) in writes {
            match value {
                _ if !Self::keeps(*table) => {}
                Some(value) => self.put(*table, key, value),
                None => drop(self.rows.borrow_mut().remove(&RowName(*table, key))),
            }
        }
    }
}

/// The state as the state thread reads it.
pub struct CachedState<'a> {
    /// The state.
    pub state: &'a StateHandle,
    /// The cache in front of it.
    pub cache: &'a RowCache,
}

impl ReadState for CachedState<'_> {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StateError> {
        if !RowCache::keeps(table) {
            return self.state.get(table, key);
        }
        if let Some(value) = self.cache.get(table, key) {
            return Ok(Some(value));
        }
        let value = self.state.get(table, key)?;
        if let Some(value) = &value {
            self.cache.put(table, key, value);
        }
        Ok(value)
    }

    fn scan(
        &self,
        table: Table,
        start: &[u8],
        end: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<Row>, StateError> {
        self.state.scan(table, start, end, limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::WireLogId;

    #[test]
    fn the_cache_says_what_the_state_says_after_every_commit() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateHandle::open(dir.path()).unwrap();
        let cache = RowCache::default();
        let cached = CachedState { state: &state, cache: &cache };
        let mut random = 1u32;
        for index in 1..400u64 {
            let mut writes = Writes::new();
            for table in [Table::Keys, Table::Backends, Table::Actions] {
                random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let key = vec![(random >> 16) as u8 % 16];
                let value = (random >> 28 > 4).then(|| vec![7; (random >> 20) as usize % 50]);
                writes.insert((table, key), value);
            }
            cache.absorb(&writes);
            state.commit(writes, WireLogId { term: 1, index }.into(), None).unwrap();
            if index % 50 == 0 {
                state.make_durable().unwrap();
            }
            for table in [Table::Keys, Table::Backends, Table::Actions] {
                for key in 0..16u8 {
                    assert_eq!(cached.get(table, &[key]).unwrap(), state.get(table, &[key]).unwrap());
                }
            }
        }
        let rows = cache.rows.borrow();
        let bytes: u64 = rows.iter().map(|(key, value)| Bytes.weight(key, value)).sum();
        assert_eq!(rows.weight(), bytes);
    }

    /// A cache that is full of rows which nobody asks for any more, as a controller's is after minutes of full load.
    #[test]
    fn a_full_cache_keeps_the_rows_that_are_in_use_and_those_that_have_just_come() {
        const ROWS: u32 = 1_000;
        let row_bytes = (4 + 100 + ROW_EXTRA_BYTES) as u64;
        let cache = RowCache::holding(u64::from(ROWS) * row_bytes);
        let kept = |number: u32| cache.get(Table::Backends, &number.to_be_bytes()).is_some();
        let in_use = 0..ROWS / 4;
        for number in 0..20 * ROWS {
            cache.put(Table::Backends, &number.to_be_bytes(), &[7; 100]);
            if number >= ROWS && number.is_multiple_of(ROWS) {
                // Keys that are renewed, round by round.
                assert!(in_use.clone().all(kept), "a row in use was evicted");
            }
            assert!(cache.rows.borrow().weight() <= u64::from(ROWS) * row_bytes);
        }
        // A backend is written several times within a moment: loading, starting, waiting, ready.
        let missing = (20 * ROWS - 20..20 * ROWS).filter(|number| !kept(*number)).count();
        assert_eq!(missing, 0, "of the last 20");
    }
}
