//! Rows that the state thread has read or written, so that it need not ask the database for them again.
//!
//! A renewal reads two rows, and a million keys are renewed in half a minute; a look into the database costs several
//! times what all the rest of a renewal does. Only the state thread writes the state, so what it keeps here can't be out of
//! date: every batch that it commits is entered here as well. A snapshot that replaces the state empties it.

use crate::state_db::StateHandle;
use holdfast_core::kv::{ReadState, Row, StateError, Table, Writes};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;

/// Memory for rows. A million held keys take about 700 MB; of more than fit, some are read from the database each time.
pub const ROW_CACHE_BYTES: usize = 768 << 20;
/// Memory that a row takes beside its bytes, about.
const ROW_EXTRA_BYTES: usize = 72;

type Rows = HashMap<Box<[u8]>, Box<[u8]>>;

/// See the module.
#[derive(Default)]
pub struct RowCache {
    keys: RefCell<Rows>,
    backends: RefCell<Rows>,
    bytes: Cell<usize>,
}

fn bytes_of(key: &[u8], value: &[u8]) -> usize {
    key.len() + value.len() + ROW_EXTRA_BYTES
}

impl RowCache {
    fn table(&self, table: Table) -> Option<&RefCell<Rows>> {
        match table {
            Table::Keys => Some(&self.keys),
            Table::Backends => Some(&self.backends),
            _ => None,
        }
    }

    fn put(&self, table: Table, key: &[u8], value: &[u8]) {
        let Some(rows) = self.table(table) else { return };
        let mut rows = rows.borrow_mut();
        let mut bytes = self.bytes.get();
        if let Some(held) = rows.get_mut(key) {
            bytes = bytes - held.len() + value.len();
            *held = value.into();
        } else {
            bytes += bytes_of(key, value);
            rows.insert(key.into(), value.into());
        }
        // Whichever comes first in the table's order, which is as good as random, has to go.
        while bytes > ROW_CACHE_BYTES {
            let Some(out) = rows.keys().next().cloned() else { break };
            if let Some(value) = rows.remove(&out) {
                bytes -= bytes_of(&out, &value);
            }
        }
        self.bytes.set(bytes);
    }

    fn remove(&self, table: Table, key: &[u8]) {
        let Some(rows) = self.table(table) else { return };
        if let Some(value) = rows.borrow_mut().remove(key) {
            self.bytes.set(self.bytes.get() - bytes_of(key, &value));
        }
    }

    /// Enters what is being committed.
    pub fn absorb(&self, writes: &Writes) {
        for ((table, key), value) in writes {
            match value {
                Some(value) => self.put(*table, key, value),
                None => self.remove(*table, key),
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
        let Some(rows) = self.cache.table(table) else { return self.state.get(table, key) };
        if let Some(value) = rows.borrow().get(key) {
            return Ok(Some(value.to_vec()));
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
        let rows =
            |rows: &RefCell<Rows>| -> usize { rows.borrow().iter().map(|(k, v)| bytes_of(k, v)).sum() };
        assert_eq!(cache.bytes.get(), rows(&cache.keys) + rows(&cache.backends));
    }
}
