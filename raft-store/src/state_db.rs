//! The applied state in RocksDB: one column family for each [`Table`], swapped as a whole when a snapshot is installed.
//! What was committed last is still in memory ([`crate::overlay`]); a thread takes it to the database.
//!
//! Layout of the data directory's `state/`:
//!
//! ```text
//! state/CURRENT-STATE     names the live directory; replaced by rename
//! state/db-7/             the live database
//! state/db-8/             being built from a snapshot, or left over from a crash (deleted at start)
//! ```

use crate::codec::{WireLogId, WireSnapshotMeta, WireStoredMembership};
use crate::files::{copy_or_link_dir, make_dir_whole, remove_dir_if_there, sync_dir, write_durably};
use crate::floors::Floors;
use crate::gauge::Gauge;
use crate::log_files::{Damage, Wal, check_db, sync_parent};
use crate::log_store::{background_errors, db_options};
use crate::overlay::{Layer, Layers, lay_over};
use crate::scrub::{check_tables, read_through};
use crate::table_files::with_damaged_tables;
use crate::types::{LogId, SnapshotMeta, StoredMembership};
use holdfast_core::codec::{decode, encode};
use holdfast_core::kv::{ReadState, Row, StateError, Table, Writes};
use rocksdb::checkpoint::Checkpoint;
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamilyDescriptor, DB, DataBlockIndexType, Direction, FlushOptions,
    IteratorMode, Options, ReadOptions, Snapshot, WriteBatch, WriteOptions,
};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};
use std::time::Duration;

/// Bytes committed in memory at which the flusher takes them to the database.
const FLUSH_BYTES: usize = 8 << 20;
/// Bytes committed in memory at which whoever commits waits for the database.
const FLUSH_BYTES_MAX: usize = 32 << 20;
/// How long something may stay only in memory. A crash costs applying that much of the log again.
const FLUSH_EVERY: Duration = Duration::from_secs(1);
/// Memory for blocks read from the database's files, over all tables.
const BLOCK_CACHE_BYTES: usize = 256 << 20;
/// Memory for what was written and is in none of the files yet, over all tables.
const WRITE_BUFFERS_BYTES: usize = 256 << 20;
/// Bits per row of the filters that save looking for a row that is not there.
const BLOOM_BITS: f64 = 10.0;

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
    layers: RwLock<Layers>,
    floors: Floors,
    /// Held by whoever takes a layer to the database. After an error nobody knows what the database holds, and nothing
    /// is written or committed any more.
    flushing: Mutex<Result<(), String>>,
    gauge: Arc<Gauge>,
}

/// Cheap, cloneable read access to the applied state.
#[derive(Clone)]
pub struct StateHandle {
    shared: Arc<Shared>,
}

struct Shared {
    current: RwLock<Arc<OpenDb>>,
    root: PathBuf,
    /// Held while the state is copied or replaced: a copy must not lose the files it is linking.
    copying: Mutex<()>,
    /// Wakes the flusher; dropping it ends the flusher.
    wake: Mutex<Option<SyncSender<()>>>,
    flusher: Mutex<Option<std::thread::JoinHandle<()>>>,
    gauge: Arc<Gauge>,
}

impl Shared {
    fn current(&self) -> Arc<OpenDb> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Shared {
    /// Waits for the flusher, so that whoever opens the directory next finds it closed.
    fn drop(&mut self) {
        self.wake.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        let flusher = self.flusher.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(flusher) = flusher
            && flusher.thread().id() != std::thread::current().id()
        {
            let _ = flusher.join();
        }
    }
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

fn table_options(cache: &Cache) -> Options {
    let mut options = Options::default();
    options.set_write_buffer_size(WRITE_BUFFERS_BYTES / 4);
    // Most rows are looked for by their whole key, and a new name or id mostly in vain.
    options.set_memtable_whole_key_filtering(true);
    options.set_memtable_prefix_bloom_ratio(0.02);
    let mut blocks = BlockBasedOptions::default();
    blocks.set_block_cache(cache);
    blocks.set_bloom_filter(BLOOM_BITS, false);
    blocks.set_data_block_index_type(DataBlockIndexType::BinaryAndHash);
    options.set_block_based_table_factory(&blocks);
    options
}

fn open_db(dir: &Path) -> io::Result<DB> {
    check_db(dir, Wal::Unsynced)?;
    // The WAL of this database is not synced, so after power loss it may end early, or lack an end while its successor
    // has one. Recover the prefix without a hole; the Raft log brings the rest again.
    let mut options = db_options(rocksdb::DBRecoveryMode::PointInTime);
    // A batch touches several tables: they must reach the disk together even when memtables are flushed.
    options.set_atomic_flush(true);
    options.set_db_write_buffer_size(WRITE_BUFFERS_BYTES);
    options.set_max_total_wal_size(2 * WRITE_BUFFERS_BYTES as u64);
    let cache = Cache::new_lru_cache(BLOCK_CACHE_BYTES);
    let cfs = Table::ALL.map(|table| ColumnFamilyDescriptor::new(table.name(), table_options(&cache)));
    DB::open_cf_descriptors(&options, dir, cfs).map_err(|e| io_error(with_damaged_tables(dir, &e)))
}

impl OpenDb {
    fn open(root: &Path, number: u64, gauge: Arc<Gauge>) -> io::Result<Self> {
        let dir = root.join(format!("db-{number}"));
        if !dir.try_exists()? {
            // RocksDB makes a new database in several steps, between which the power may fail.
            make_dir_whole(&dir, |aside| open_db(aside).map(drop))?;
        }
        let db = open_db(&dir)?;
        let (layers, floors) = (RwLock::default(), Floors::default());
        Ok(Self { db, dir, number, layers, floors, flushing: Mutex::new(Ok(())), gauge })
    }

    fn layers(&self) -> RwLockReadGuard<'_, Layers> {
        self.layers.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn layers_mut(&self) -> RwLockWriteGuard<'_, Layers> {
        self.layers.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes everything committed so far to the database (not synced).
    fn flush(&self) -> io::Result<()> {
        let mut state = self.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = &*state {
            return Err(io_error(error));
        }
        let layer = {
            let mut layers = self.layers_mut();
            if layers.fresh.is_empty() {
                return Ok(());
            }
            let layer = Arc::new(std::mem::take(&mut layers.fresh));
            layers.flushing = Some(layer.clone());
            layer
        };
        let written = self.write(&layer);
        if let Err(error) = &written {
            *state = Err(error.to_string());
        } else {
            self.layers_mut().flushing = None;
        }
        written
    }

    fn write(&self, layer: &Layer) -> io::Result<()> {
        let mut batch = WriteBatch::default();
        let cfs = Table::ALL.map(|table| cf(&self.db, table));
        for (table, key, value) in layer.rows() {
            let cf = cfs[table as usize].as_ref().map_err(io_error)?;
            match value {
                Some(value) => batch.put_cf(cf, key, value),
                None => batch.delete_cf(cf, key),
            }
        }
        let meta = cf(&self.db, Table::Meta).map_err(io_error)?;
        if let Some(applied) = layer.applied {
            batch.put_cf(meta, KEY_APPLIED, encode(&WireLogId::from(applied)));
        }
        if let Some(membership) = &layer.membership {
            batch.put_cf(meta, KEY_MEMBERSHIP, encode(&WireStoredMembership::from(membership)));
        }
        // Whoever flushes is alone (`flushing`). In each table the layer's rows come in order.
        let _floors = self.floors.write(Table::ALL.into_iter().filter_map(|table| layer.first(table)));
        // Not synced: the log is, and it is not purged before `make_durable`.
        let _under_way = self.gauge.begin();
        self.db.write(batch).map_err(io_error)
    }
}

/// Takes what is committed to the database whenever it is woken or time is up.
fn run_flusher(shared: &Weak<Shared>, woken: &std::sync::mpsc::Receiver<()>) {
    while !matches!(woken.recv_timeout(FLUSH_EVERY), Err(RecvTimeoutError::Disconnected)) {
        let Some(shared) = shared.upgrade() else { return };
        if let Err(error) = shared.current().flush() {
            // The next commit meets it and stops the replica, unless a snapshot has just replaced that database.
            tracing::error!(%error, "writing the state failed");
        }
    }
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
        let (wake, woken) = sync_channel(1);
        let gauge = Arc::new(Gauge::default());
        let shared = Arc::new(Shared {
            current: RwLock::new(Arc::new(OpenDb::open(root, number, gauge.clone())?)),
            root: root.to_owned(),
            copying: Mutex::default(),
            wake: Mutex::new(Some(wake)),
            flusher: Mutex::default(),
            gauge,
        });
        sync_dir(root)?;
        let weak = Arc::downgrade(&shared);
        let flusher = std::thread::Builder::new()
            .name("state-flusher".into())
            .spawn(move || run_flusher(&weak, &woken))?;
        *shared.flusher.lock().unwrap_or_else(PoisonError::into_inner) = Some(flusher);
        Ok(Self { shared })
    }

    fn current(&self) -> Arc<OpenDb> {
        self.shared.current()
    }

    /// Log id of the last applied entry and the membership as of it.
    pub fn applied(&self) -> Result<(Option<LogId>, StoredMembership), StateError> {
        let current = self.current();
        let layers = current.layers();
        let (applied, membership) = layers.applied();
        let meta = cf(&current.db, Table::Meta)?;
        let get = |key| current.db.get_cf(meta, key).map_err(read_error);
        let applied = match applied {
            Some(applied) => Some(applied),
            None => get(KEY_APPLIED)?.map(|b| decode::<WireLogId>(&b)).transpose()?.map(Into::into),
        };
        let membership = match (membership, get(KEY_MEMBERSHIP)?) {
            (Some(membership), _) => membership.clone(),
            (None, Some(bytes)) => decode::<WireStoredMembership>(&bytes)?.try_into()?,
            (None, None) => StoredMembership::default(),
        };
        Ok((applied, membership))
    }

    /// Commits the writes of applied entries together with how far they go. An error is of an earlier commit, which
    /// the database did not take.
    pub fn commit(
        &self,
        writes: Writes,
        applied: LogId,
        membership: Option<StoredMembership>,
    ) -> io::Result<()> {
        let current = self.current();
        let bytes = {
            let mut layers = current.layers_mut();
            layers.fresh.absorb(writes, applied, membership);
            layers.fresh.bytes()
        };
        if bytes >= FLUSH_BYTES_MAX {
            return current.flush();
        }
        if let Ok(state) = current.flushing.try_lock()
            && let Err(error) = &*state
        {
            return Err(io_error(error));
        }
        if bytes >= FLUSH_BYTES
            && let Some(wake) = &*self.shared.wake.lock().unwrap_or_else(PoisonError::into_inner)
        {
            // Full means that it is woken already.
            let _ = wake.try_send(());
        }
        Ok(())
    }

    /// How long writes to the database take, and since when the one under way has taken.
    pub(crate) fn gauge(&self) -> &Gauge {
        &self.shared.gauge
    }

    /// How often RocksDB has failed in the background.
    pub(crate) fn background_errors(&self) -> u64 {
        background_errors(&self.current().db)
    }

    /// Reads everything, so that every checksum is checked. See [`read_through`].
    pub(crate) fn scrub(&self, mut pause: impl FnMut() -> bool) -> io::Result<()> {
        for table in Table::ALL {
            let current = self.current();
            let cf = cf(&current.db, table).map_err(io_error)?;
            read_through(&current.db, cf, &mut pause).map_err(io_error)?;
        }
        let current = self.current();
        check_tables(&current.db, &current.dir, &mut pause)
    }

    /// Takes everything committed so far to the database, as the flusher does.
    #[cfg(test)]
    pub(crate) fn flush(&self) -> io::Result<()> {
        self.current().flush()
    }

    /// Makes everything committed so far durable.
    pub fn make_durable(&self) -> io::Result<()> {
        let current = self.current();
        current.flush()?;
        current.db.flush_wal(true).map_err(io_error)
    }

    /// Copies one instant of the state to `dir` (which must not exist) and returns what it holds, read from the copy.
    pub fn checkpoint(&self, dir: &Path) -> io::Result<SnapshotMeta> {
        {
            let _copying = self.shared.copying.lock().unwrap_or_else(PoisonError::into_inner);
            let current = self.current();
            current.flush()?;
            Checkpoint::new(&current.db).map_err(io_error)?.create_checkpoint(dir).map_err(io_error)?;
        }
        read_meta(dir)
    }

    /// Replaces the whole state by the database in `source`, which stays as it is: builds aside, syncs, swaps.
    pub fn replace(&self, source: &Path) -> io::Result<()> {
        let _copying = self.shared.copying.lock().unwrap_or_else(PoisonError::into_inner);
        let old = self.current();
        let number = old.number + 1;
        let root = &self.shared.root;
        let dir = root.join(format!("db-{number}"));
        remove_dir_if_there(&dir)?;
        copy_or_link_dir(source, &dir)?;
        sync_dir(root)?;
        let new = OpenDb::open(root, number, self.shared.gauge.clone())?;
        write_durably(&root.join(POINTER), format!("{number}\n").as_bytes())?;
        *self.shared.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(new);
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

/// A row with its table.
pub(crate) type TableRow = (Table, Vec<u8>, Vec<u8>);
/// A row as RocksDB gives it.
type RawRow = (Box<[u8]>, Box<[u8]>);

/// The state as of one instant, in the database that is live now.
pub(crate) struct Frozen<'a> {
    db: &'a DB,
    snapshot: Snapshot<'a>,
}

impl StateHandle {
    /// Runs `work` on the state as of now, however long it takes and whatever is applied meanwhile. Nothing is copied for
    /// it; what is overwritten stays on disk until `work` returns.
    pub(crate) fn frozen<T>(&self, work: impl FnOnce(&Frozen<'_>) -> T) -> io::Result<T> {
        let current = self.current();
        current.flush()?;
        Ok(work(&Frozen { db: &current.db, snapshot: current.db.snapshot() }))
    }

    /// Writes rows of a state that is being built, without a log: durable after [`Self::finish_load`] alone.
    pub(crate) fn load(&self, rows: impl IntoIterator<Item = TableRow>) -> io::Result<()> {
        let current = self.current();
        let _alone = current.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut batch = WriteBatch::default();
        let rows: Vec<TableRow> = rows.into_iter().collect();
        for (table, key, value) in &rows {
            batch.put_cf(cf(&current.db, *table).map_err(io_error)?, key, value);
        }
        let _floors = current.floors.write(rows.iter().map(|(table, key, _)| (*table, key.as_slice())));
        let mut options = WriteOptions::default();
        options.disable_wal(true);
        current.db.write_opt(batch, &options).map_err(io_error)
    }

    /// Ends [`Self::load`]: where the state stands, and everything on disk.
    pub(crate) fn finish_load(&self, applied: LogId, membership: &StoredMembership) -> io::Result<()> {
        let applied = (Table::Meta, KEY_APPLIED.to_vec(), encode(&WireLogId::from(applied)));
        let membership = encode(&WireStoredMembership::from(membership));
        self.load([applied, (Table::Meta, KEY_MEMBERSHIP.to_vec(), membership)])?;
        let current = self.current();
        let tables = Table::ALL.map(|table| cf(&current.db, table));
        let tables = tables.into_iter().collect::<Result<Vec<_>, _>>().map_err(io_error)?;
        let mut options = FlushOptions::default();
        options.set_wait(true);
        current.db.flush_cfs_opt(&tables, &options).map_err(io_error)
    }
}

impl Frozen<'_> {
    /// Every row of a table, in the order of its keys.
    pub(crate) fn rows(&self, table: Table) -> Result<impl Iterator<Item = io::Result<RawRow>>, StateError> {
        let cf = cf(self.db, table)?;
        let mut options = ReadOptions::default();
        // What is read once must not drive out what is read again and again.
        options.fill_cache(false);
        let rows = self.snapshot.iterator_cf_opt(cf, options, IteratorMode::Start);
        Ok(rows.map(|row| row.map_err(io_error)))
    }

    /// Log id of the last applied entry and the membership as of it.
    pub(crate) fn applied(&self) -> Result<(Option<LogId>, StoredMembership), StateError> {
        let applied = self.get(Table::Meta, KEY_APPLIED)?.map(|b| decode::<WireLogId>(&b)).transpose()?;
        let membership = match self.get(Table::Meta, KEY_MEMBERSHIP)? {
            Some(bytes) => decode::<WireStoredMembership>(&bytes)?.try_into()?,
            None => StoredMembership::default(),
        };
        Ok((applied.map(Into::into), membership))
    }
}

impl ReadState for Frozen<'_> {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StateError> {
        self.snapshot.get_cf(cf(self.db, table)?, key).map_err(read_error)
    }

    fn scan(
        &self,
        table: Table,
        start: &[u8],
        end: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<Row>, StateError> {
        let from = IteratorMode::From(start, Direction::Forward);
        let rows = self.snapshot.iterator_cf(cf(self.db, table)?, from);
        rows.take_while(|row| !row.as_ref().is_ok_and(|(key, _)| end.is_some_and(|end| **key >= *end)))
            .take(limit)
            .map(|row| row.map(|(key, value)| (key.into_vec(), value.into_vec())).map_err(read_error))
            .collect()
    }
}

/// Rows of the meta table that belong to this replica's log, and not to the state that is backed up.
pub(crate) fn is_position(table: Table, key: &[u8]) -> bool {
    table == Table::Meta && (key == KEY_APPLIED || key == KEY_MEMBERSHIP)
}

/// What the database in `dir` holds.
pub fn read_meta(dir: &Path) -> io::Result<SnapshotMeta> {
    let cfs = Table::ALL.map(Table::name);
    let db = DB::open_cf_for_read_only(&Options::default(), dir, cfs, false)
        .map_err(|e| io_error(with_damaged_tables(dir, &e)))?;
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
        .map_err(|e| io_error(with_damaged_tables(dir, &e)))?;
    for table in Table::ALL {
        read_through(&db, cf(&db, table).map_err(io_error)?, &mut pause).map_err(io_error)?;
    }
    check_tables(&db, dir, &mut pause)
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
        // What leaves the layers is in the database before it does, so this order misses nothing.
        let above = current.layers().get(table, key);
        match above {
            Some(value) => Ok(value),
            None => current.db.get_cf(cf(&current.db, table)?, key).map_err(read_error),
        }
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
        let floor = current.floors.read(table);
        let (above, snapshot) = {
            // Both of one instant, or a row could be seen as it was before another one of the same entry.
            let layers = current.layers();
            (layers.range(table, start, end, limit), current.db.snapshot())
        };
        let floor = Some(floor).filter(|floor| current.floors.still_holds(floor));
        lay_over(above, limit, |limit| {
            let from = floor.as_ref().map_or(start, |floor| floor.floor().max(start));
            let mut options = ReadOptions::default();
            if let Some(end) = end {
                if end <= from {
                    return Ok(Vec::new());
                }
                options.set_iterate_upper_bound(end);
            }
            let rows = snapshot.iterator_cf_opt(cf, options, IteratorMode::From(from, Direction::Forward));
            let rows: Vec<Row> = rows
                .take(limit)
                .map(|row| row.map(|(key, value)| (key.into_vec(), value.into_vec())))
                .collect::<Result<_, _>>()
                .map_err(read_error)?;
            // It began at the floor, or below: what lies before the first row is empty.
            if let Some(floor) = floor.filter(|floor| start <= floor.floor())
                && let Some(first) = rows.first().map(|(key, _)| key.as_slice()).or(end)
            {
                current.floors.raise(&floor, first);
            }
            Ok(rows)
        })
    }
}
