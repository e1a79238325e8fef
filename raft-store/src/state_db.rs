//! The applied state in RocksDB: one column family for each [`Table`], swapped as a whole when a snapshot is installed.
//!
//! Layout of the data directory's `state/`:
//!
//! ```text
//! state/CURRENT-STATE     names the live directory; replaced by rename
//! state/db-7/             the live database
//! state/db-8/             being built from a snapshot, or left over from a crash (deleted at start)
//! ```

use crate::codec::{WireLogId, WireSnapshotMeta, WireStoredMembership};
use crate::files::{copy_or_link_dir, remove_dir_if_there, sync_dir, write_durably};
use crate::gauge::Gauge;
use crate::log_files::{Damage, Wal, check_db, sync_parent};
use crate::log_store::{background_errors, db_options};
use crate::scrub::read_through;
use crate::types::{LogId, SnapshotMeta, StoredMembership};
use holdfast_core::codec::{decode, encode};
use holdfast_core::kv::{ReadState, Row, StateError, Table, Writes};
use rocksdb::checkpoint::Checkpoint;
use rocksdb::{ColumnFamilyDescriptor, DB, Direction, IteratorMode, Options, ReadOptions, WriteBatch};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

const POINTER: &str = "CURRENT-STATE";
const KEY_APPLIED: &[u8] = b"applied";
const KEY_MEMBERSHIP: &[u8] = b"membership";

fn io_error(error: impl std::fmt::Display) -> io::Error {
    io::Error::other(error.to_string())
}

fn read_error(error: impl std::fmt::Display) -> StateError {
    StateError::Read(error.to_string())
}

struct OpenDb {
    db: DB,
    dir: PathBuf,
    number: u64,
}

/// Cheap, cloneable read access to the applied state.
#[derive(Clone)]
pub struct StateHandle {
    current: Arc<RwLock<Arc<OpenDb>>>,
    root: Arc<PathBuf>,
    /// Held while the state is copied or replaced: a copy must not lose the files it is linking.
    copying: Arc<Mutex<()>>,
    gauge: Arc<Gauge>,
}

fn damaged(file: &Path, what: String) -> io::Error {
    Damage { file: file.to_owned(), what }.into()
}

/// Numbers of the databases below `root` that were opened at least once.
fn databases(root: &Path) -> io::Result<Vec<u64>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(root)? {
        let entry = entry?;
        let number = entry.file_name().to_string_lossy().strip_prefix("db-").and_then(|n| n.parse().ok());
        if let Some(number) = number
            && std::fs::read_dir(entry.path())?.next().is_some()
        {
            found.push(number);
        }
    }
    found.sort_unstable();
    Ok(found)
}

fn table_options() -> Options {
    let mut options = Options::default();
    options.set_write_buffer_size(32 << 20);
    options
}

fn open_db(dir: &Path) -> io::Result<DB> {
    check_db(dir, Wal::Unsynced)?;
    // The WAL of this database is not synced, so after power loss it may end early, or lack an end while its successor
    // has one. Recover the prefix without a hole; the Raft log brings the rest again.
    let mut options = db_options(rocksdb::DBRecoveryMode::PointInTime);
    // A batch touches several tables: they must reach the disk together even when memtables are flushed.
    options.set_atomic_flush(true);
    options.set_max_total_wal_size(128 << 20);
    let cfs = Table::ALL.map(|table| ColumnFamilyDescriptor::new(table.name(), table_options()));
    DB::open_cf_descriptors(&options, dir, cfs).map_err(|e| io_error(format!("{}: {e}", dir.display())))
}

impl StateHandle {
    /// Opens the state below `root`, or makes an empty one.
    pub fn open(root: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(root)?;
        sync_parent(root)?;
        let pointer = root.join(POINTER);
        let number = match std::fs::read_to_string(&pointer) {
            Ok(text) => text
                .trim()
                .parse::<u64>()
                .map_err(|_| damaged(&pointer, format!("it holds {text:?}, not a number")))?,
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                return Err(damaged(&pointer, "it is not text".to_owned()));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if let Some(other) = databases(root)?.first() {
                    return Err(damaged(&pointer, format!("it is missing, though there is db-{other}")));
                }
                write_durably(&pointer, b"1\n")?;
                1
            }
            Err(error) => return Err(error),
        };
        // A first start may have been cut short between the pointer and the database.
        let there = databases(root)?;
        if !there.contains(&number) && (number != 1 || !there.is_empty()) {
            return Err(damaged(
                &pointer,
                format!("it names db-{number}, which is not there (but {there:?})"),
            ));
        }
        // What other directories hold was never made current, or is no longer.
        for entry in std::fs::read_dir(root)? {
            let entry = entry?;
            let name = entry.file_name();
            if name.to_string_lossy().starts_with("db-") && name.to_string_lossy() != format!("db-{number}") {
                remove_dir_if_there(&entry.path())?;
            }
        }
        let dir = root.join(format!("db-{number}"));
        let db = open_db(&dir)?;
        sync_dir(root)?;
        let current = Arc::new(RwLock::new(Arc::new(OpenDb { db, dir, number })));
        Ok(Self { current, root: Arc::new(root.to_owned()), copying: Arc::default(), gauge: Arc::default() })
    }

    fn current(&self) -> Arc<OpenDb> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Log id of the last applied entry and the membership as of it.
    pub fn applied(&self) -> Result<(Option<LogId>, StoredMembership), StateError> {
        let current = self.current();
        let meta = cf(&current.db, Table::Meta)?;
        let get = |key| current.db.get_cf(meta, key).map_err(read_error);
        let applied = get(KEY_APPLIED)?.map(|b| decode::<WireLogId>(&b)).transpose()?.map(Into::into);
        let membership = match get(KEY_MEMBERSHIP)? {
            Some(bytes) => decode::<WireStoredMembership>(&bytes)?.try_into()?,
            None => StoredMembership::default(),
        };
        Ok((applied, membership))
    }

    /// Commits the writes of applied entries together with how far they go.
    pub fn commit(
        &self,
        writes: &Writes,
        applied: LogId,
        membership: Option<&StoredMembership>,
    ) -> io::Result<()> {
        let current = self.current();
        let mut batch = WriteBatch::default();
        for ((table, key), value) in writes {
            let cf = cf(&current.db, *table).map_err(io_error)?;
            match value {
                Some(value) => batch.put_cf(cf, key, value),
                None => batch.delete_cf(cf, key),
            }
        }
        let meta = cf(&current.db, Table::Meta).map_err(io_error)?;
        batch.put_cf(meta, KEY_APPLIED, encode(&WireLogId::from(applied)));
        if let Some(membership) = membership {
            batch.put_cf(meta, KEY_MEMBERSHIP, encode(&WireStoredMembership::from(membership)));
        }
        // Not synced: the log is, and it is not purged before `make_durable`.
        let _under_way = self.gauge.begin();
        current.db.write(batch).map_err(io_error)
    }

    /// How long commits take, and since when the one under way has taken.
    pub(crate) fn gauge(&self) -> &Gauge {
        &self.gauge
    }

    /// How often RocksDB has failed in the background.
    pub(crate) fn background_errors(&self) -> u64 {
        background_errors(&self.current().db)
    }

    /// Reads everything, so that every checksum is checked. See [`read_through`].
    pub(crate) fn scrub(&self, mut pause: impl FnMut() -> bool) -> Result<(), StateError> {
        for table in Table::ALL {
            let current = self.current();
            read_through(&current.db, cf(&current.db, table)?, &mut pause).map_err(read_error)?;
        }
        Ok(())
    }

    /// Makes everything committed so far durable.
    pub fn make_durable(&self) -> io::Result<()> {
        self.current().db.flush_wal(true).map_err(io_error)
    }

    /// Copies one instant of the state to `dir` (which must not exist) and returns what it holds, read from the copy.
    pub fn checkpoint(&self, dir: &Path) -> io::Result<SnapshotMeta> {
        {
            let _copying = self.copying.lock().unwrap_or_else(PoisonError::into_inner);
            let current = self.current();
            Checkpoint::new(&current.db).map_err(io_error)?.create_checkpoint(dir).map_err(io_error)?;
        }
        read_meta(dir)
    }

    /// Replaces the whole state by the database in `source`, which stays as it is: builds aside, syncs, swaps.
    pub fn replace(&self, source: &Path) -> io::Result<()> {
        let _copying = self.copying.lock().unwrap_or_else(PoisonError::into_inner);
        let old = self.current();
        let number = old.number + 1;
        let dir = self.root.join(format!("db-{number}"));
        remove_dir_if_there(&dir)?;
        copy_or_link_dir(source, &dir)?;
        sync_dir(&self.root)?;
        let db = open_db(&dir)?;
        write_durably(&self.root.join(POINTER), format!("{number}\n").as_bytes())?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(OpenDb { db, dir, number });
        let old_dir = old.dir.clone();
        drop(old);
        // A reader may still hold the old database; its open files stay readable after their names are gone. What can't
        // be removed now is removed at the next start.
        if let Err(error) = remove_dir_if_there(&old_dir) {
            tracing::warn!(%error, dir = %old_dir.display(), "the replaced state can't be removed yet");
        }
        Ok(())
    }
}

/// What the database in `dir` holds.
pub fn read_meta(dir: &Path) -> io::Result<SnapshotMeta> {
    let cfs = Table::ALL.map(Table::name);
    let db = DB::open_cf_for_read_only(&Options::default(), dir, cfs, false)
        .map_err(|e| io_error(format!("{}: {e}", dir.display())))?;
    let meta = cf(&db, Table::Meta).map_err(io_error)?;
    let applied = db
        .get_cf(meta, KEY_APPLIED)
        .map_err(io_error)?
        .map(|b| decode::<WireLogId>(&b).map_err(io_error))
        .transpose()?;
    let last_membership = match db.get_cf(meta, KEY_MEMBERSHIP).map_err(io_error)? {
        Some(bytes) => {
            decode::<WireStoredMembership>(&bytes).and_then(StoredMembership::try_from).map_err(io_error)?
        }
        None => StoredMembership::default(),
    };
    Ok(SnapshotMeta { last_log_id: applied.map(Into::into), last_membership })
}

/// Reads everything in the database in `dir`, which nobody has open, so that every checksum is checked. See
/// [`read_through`].
pub fn scrub_dir(dir: &Path, mut pause: impl FnMut() -> bool) -> io::Result<()> {
    let cfs = Table::ALL.map(Table::name);
    let db = DB::open_cf_for_read_only(&Options::default(), dir, cfs, false)
        .map_err(|e| io_error(format!("{}: {e}", dir.display())))?;
    for table in Table::ALL {
        read_through(&db, cf(&db, table).map_err(io_error)?, &mut pause).map_err(io_error)?;
    }
    Ok(())
}

impl From<&SnapshotMeta> for WireSnapshotMeta {
    fn from(meta: &SnapshotMeta) -> Self {
        Self { last_log_id: meta.last_log_id.map(Into::into), membership: (&meta.last_membership).into() }
    }
}

impl TryFrom<WireSnapshotMeta> for SnapshotMeta {
    type Error = StateError;
    fn try_from(wire: WireSnapshotMeta) -> Result<Self, StateError> {
        Ok(Self {
            last_log_id: wire.last_log_id.map(Into::into),
            last_membership: wire.membership.try_into()?,
        })
    }
}

fn cf(db: &DB, table: Table) -> Result<&rocksdb::ColumnFamily, StateError> {
    db.cf_handle(table.name())
        .ok_or_else(|| StateError::Damaged(format!("table {} is missing", table.name())))
}

impl ReadState for StateHandle {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StateError> {
        let current = self.current();
        let cf = cf(&current.db, table)?;
        current.db.get_cf(cf, key).map_err(read_error)
    }

    fn scan(
        &self,
        table: Table,
        start: &[u8],
        end: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<Row>, StateError> {
        if limit == 0 || end.is_some_and(|end| end <= start) {
            return Ok(Vec::new());
        }
        let current = self.current();
        let cf = cf(&current.db, table)?;
        let mut options = ReadOptions::default();
        if let Some(end) = end {
            options.set_iterate_upper_bound(end);
        }
        let mut rows = Vec::new();
        for row in current.db.iterator_cf_opt(cf, options, IteratorMode::From(start, Direction::Forward)) {
            let (key, value) = row.map_err(read_error)?;
            rows.push((key.into_vec(), value.into_vec()));
            if rows.len() == limit {
                break;
            }
        }
        Ok(rows)
    }
}
