//! The Raft log and vote in RocksDB, with group commit.
//!
//! ```text
//!  raft task ──append/vote/truncate/purge──▶ tail (memory) ──▶ queue ──▶ writer thread
//!      ▲                                                                   │ drains the queue into one batch,
//!      └──────────── callbacks, in order, after the sync ◀─────────────────┘ one WAL sync
//! ```
//!
//! One queue gives votes, appends, truncations and purges one serial order. Nothing here syncs on the caller's thread.
//! The tail in memory serves replication and apply, and always holds whatever is not yet on disk.

use crate::codec::{WireLogId, WireVote, decode_entry, encode_entry};
use crate::gauge::Gauge;
use crate::log_files::{Wal, check_db, sync_parent};
use crate::membership::naming::{Disk, DiskIdentity, Naming, Starts};
use crate::scrub::{check_tables, read_through};
use crate::table_files::with_damaged_tables;
use crate::types::{LogEntry, LogId, Stamper, TypeConfig, Vote};
use bytes::Bytes;
use futures::{Stream, TryStreamExt};
use holdfast_core::codec::{decode, encode};
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use openraft::{OptionalSend, entry::RaftEntry};
use rocksdb::{ColumnFamilyDescriptor, DB, Direction, IteratorMode, Options, WriteBatch, WriteOptions};
use std::collections::VecDeque;
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use tokio::sync::oneshot;

/// Most bytes of flushed entries kept in memory.
const TAIL_BYTES_MAX: usize = 64 << 20;
/// Most flushed entries kept in memory.
const TAIL_ENTRIES_MAX: usize = 16_384;
/// Most operations in one batch.
const BATCH_OPS_MAX: usize = 4096;
/// Most bytes in one batch (a single larger operation still goes alone).
const BATCH_BYTES_MAX: usize = 8 << 20;
/// Most entries that one replication read returns.
const READ_ENTRIES_MAX: u64 = 1024;
/// Most bytes that one replication read returns (a single larger entry still goes alone).
const READ_BYTES_MAX: usize = 4 << 20;

const CF_LOG: &str = "log";
const CF_META: &str = "meta";
const KEY_VOTE: &[u8] = b"vote";
const KEY_PURGED: &[u8] = b"purged";
const KEY_COMMITTED: &[u8] = b"committed";
const KEY_IDENTITY: &[u8] = b"identity";
const KEY_STARTS: &[u8] = b"starts";
const KEY_NAMING: &[u8] = b"naming";

/// Makes the state durable; called before entries are purged, so that the state never needs one that is gone.
pub type BeforePurge = Box<dyn Fn() -> io::Result<()> + Send + Sync>;

struct TailEntry {
    entry: LogEntry,
    bytes: usize,
}

/// What is known of the log without reading the disk.
#[derive(Default)]
struct Tail {
    entries: VecDeque<TailEntry>,
    /// Index of the first entry in `entries`, or where it would be.
    first: u64,
    bytes: usize,
    /// All entries up to here are on disk.
    flushed: u64,
    last: Option<LogId>,
    purged: Option<LogId>,
    vote: Option<Vote>,
    committed: Option<LogId>,
}

impl Tail {
    fn next_index(&self) -> u64 {
        self.first + self.entries.len() as u64
    }

    fn evict(&mut self) {
        while (self.entries.len() > TAIL_ENTRIES_MAX || self.bytes > TAIL_BYTES_MAX)
            && self.first <= self.flushed
        {
            self.pop_front();
        }
    }

    fn pop_front(&mut self) {
        if let Some(evicted) = self.entries.pop_front() {
            self.bytes -= evicted.bytes;
            self.first += 1;
        }
    }
}

enum Op {
    Append {
        rows: Vec<(u64, Vec<u8>)>,
        last: u64,
        bytes: usize,
        callback: IOFlushed<TypeConfig>,
    },
    Vote {
        vote: Vote,
        done: oneshot::Sender<io::Result<()>>,
    },
    Truncate {
        from: u64,
        done: oneshot::Sender<io::Result<()>>,
    },
    Purge {
        upto: LogId,
        done: Option<oneshot::Sender<io::Result<()>>>,
    },
    /// What had to come before a purge failed: the replica must stop.
    Failed {
        why: String,
    },
    Stop,
}

impl Op {
    fn bytes(&self) -> usize {
        match self {
            Op::Append { bytes, .. } => *bytes,
            _ => 0,
        }
    }
}

struct Shared {
    db: DB,
    /// Bytes of entries appended since the start.
    appended_bytes: AtomicU64,
    tail: Mutex<Tail>,
    disk: Disk,
    naming: Mutex<Option<Naming>>,
    queue: mpsc::Sender<Op>,
    stamper: Arc<Stamper>,
    writer: Mutex<Option<std::thread::JoinHandle<()>>>,
    before_purge: BeforePurge,
    /// The last purge under way.
    purger: Mutex<Option<std::thread::JoinHandle<()>>>,
    gauge: Gauge,
}

impl Shared {
    fn tail(&self) -> MutexGuard<'_, Tail> {
        self.tail.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn naming(&self) -> MutexGuard<'_, Option<Naming>> {
        self.naming.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn purger(&self) -> MutexGuard<'_, Option<std::thread::JoinHandle<()>>> {
        self.purger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Shared {
    /// Waits for the writer, so that whoever opens the directory next finds it closed.
    fn drop(&mut self) {
        let _ = self.queue.send(Op::Stop);
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(writer) = writer
            && writer.thread().id() != std::thread::current().id()
        {
            let _ = writer.join();
        }
    }
}

/// The log of one replica. Cloning it is cheap.
#[derive(Clone)]
pub struct LogStore {
    shared: Arc<Shared>,
}

fn io_error(error: impl std::fmt::Display) -> io::Error {
    io::Error::other(error.to_string())
}

fn index_key(index: u64) -> [u8; 8] {
    index.to_be_bytes()
}

/// Options that both databases of a replica share.
pub(crate) fn db_options(recovery: rocksdb::DBRecoveryMode) -> Options {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.set_wal_recovery_mode(recovery);
    options.set_track_and_verify_wals_in_manifest(true);
    options.set_paranoid_checks(true);
    options.set_keep_log_file_num(4);
    options.set_max_background_jobs(2);
    options
}

impl LogStore {
    /// Opens the log in `dir`, or makes a new one with a disk identity of its own.
    pub fn open(dir: &Path, stamper: Arc<Stamper>, before_purge: BeforePurge) -> io::Result<Self> {
        // A torn tail is what an unsynced write looks like after power loss; anything else that is damaged must stop us.
        check_db(dir, Wal::Synced)?;
        let mut options = db_options(rocksdb::DBRecoveryMode::TolerateCorruptedTailRecords);
        options.set_write_buffer_size(64 << 20);
        options.set_max_total_wal_size(256 << 20);
        let cfs = [CF_LOG, CF_META].map(|name| {
            let mut options = Options::default();
            options.set_write_buffer_size(64 << 20);
            ColumnFamilyDescriptor::new(name, options)
        });
        let db = DB::open_cf_descriptors(&options, dir, cfs)
            .map_err(|e| io_error(with_damaged_tables(dir, &e)))?;
        sync_parent(dir)?;
        let meta = db.cf_handle(CF_META).ok_or_else(|| io_error("the log has no meta table"))?;
        let disk = read_disk(&db)?;
        let naming = db
            .get_cf(meta, KEY_NAMING)
            .map_err(io_error)?
            .map(|b| decode::<Naming>(&b).map_err(io_error))
            .transpose()?;
        let read_id = |key| -> io::Result<Option<LogId>> {
            let bytes = db.get_cf(meta, key).map_err(io_error)?;
            bytes.map(|b| decode::<WireLogId>(&b).map(Into::into).map_err(io_error)).transpose()
        };
        let purged = read_id(KEY_PURGED)?;
        let committed = read_id(KEY_COMMITTED)?;
        let vote = db
            .get_cf(meta, KEY_VOTE)
            .map_err(io_error)?
            .map(|b| decode::<WireVote>(&b).map(Vote::from).map_err(io_error))
            .transpose()?;
        let last = last_on_disk(&db)?.map(|entry| entry.log_id);
        let last = last.max(purged);
        let next = last.map_or(0, |id| id.index + 1);
        if let Some(purged) = purged
            && last.is_some_and(|last| last.index > purged.index)
        {
            check_first_after(&db, purged.index)?;
        }
        let tail = Tail {
            first: next,
            flushed: next.saturating_sub(1),
            last,
            purged,
            vote,
            committed,
            ..Tail::default()
        };
        let (queue, ops) = mpsc::channel();
        let shared = Arc::new(Shared {
            db,
            appended_bytes: AtomicU64::new(0),
            tail: Mutex::new(tail),
            disk,
            naming: Mutex::new(naming),
            queue,
            stamper,
            writer: Mutex::new(None),
            before_purge,
            purger: Mutex::default(),
            gauge: Gauge::default(),
        });
        let this = Self { shared: shared.clone() };
        this.refresh_last_stamp()?;
        // The thread holds the database only weakly between batches, so that dropping the store closes it.
        let weak = Arc::downgrade(&shared);
        let writer = std::thread::Builder::new().name("log-writer".into()).spawn(move || {
            let mut failed = None;
            while let Ok(first) = ops.recv() {
                let Some(shared) = weak.upgrade() else { break };
                if !write_batch(&shared, &ops, first, &mut failed) {
                    break;
                }
            }
        })?;
        *shared.writer.lock().unwrap_or_else(PoisonError::into_inner) = Some(writer);
        Ok(this)
    }

    /// Counts a start of this disk, durably: once in each process that is going to meet others. It shows in [`Self::disk`]
    /// when the log is opened again. Blocks on the disk.
    pub fn count_start(&self) -> io::Result<()> {
        let db = &self.shared.db;
        let meta = db.cf_handle(CF_META).ok_or_else(|| io_error("the meta table is gone"))?;
        let mut starts = self.shared.disk.starts.clone();
        starts.begin();
        db.put_cf_opt(meta, KEY_STARTS, encode(&starts), &synced()).map_err(io_error)
    }

    /// Identity and starts of this disk.
    pub fn disk(&self) -> &Disk {
        &self.shared.disk
    }

    /// Which member this disk is, if it was named.
    pub fn naming(&self) -> Option<Naming> {
        self.shared.naming().clone()
    }

    /// Names this disk, durably, and gives the name that it has: the one that it had before if it is named already.
    /// The coordinator of an init completes its own. Blocks on the disk.
    pub fn name(&self, naming: &Naming) -> io::Result<Naming> {
        let mut held = self.shared.naming();
        if let Some(before) = held.as_ref()
            && !(before.is_same_member(naming) && before.is_unfinished_init())
        {
            return Ok(before.clone());
        }
        let db = &self.shared.db;
        let meta = db.cf_handle(CF_META).ok_or_else(|| io_error("the meta table is gone"))?;
        db.put_cf_opt(meta, KEY_NAMING, encode(naming), &synced()).map_err(io_error)?;
        *held = Some(naming.clone());
        Ok(naming.clone())
    }

    /// The last entry that this replica knows to be committed.
    pub fn committed(&self) -> Option<LogId> {
        let tail = self.shared.tail();
        tail.committed.min(tail.last).max(tail.purged)
    }

    /// What is applied is committed, whatever the log's hint says.
    pub fn note_applied(&self, applied: Option<LogId>) {
        let mut tail = self.shared.tail();
        tail.committed = tail.committed.max(applied);
    }

    /// Stops the writer thread after everything queued so far, and waits for it.
    pub fn stop(&self) {
        let purger = self.shared.purger().take();
        if let Some(purger) = purger {
            let _ = purger.join();
        }
        let _ = self.shared.queue.send(Op::Stop);
        let writer = self.shared.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(writer) = writer {
            let _ = writer.join();
        }
    }

    /// Bytes of entries appended since the start.
    pub fn appended_bytes(&self) -> u64 {
        self.shared.appended_bytes.load(Ordering::Relaxed)
    }

    /// Whether nothing was ever written: no vote and no entry.
    pub fn is_pristine(&self) -> bool {
        let tail = self.shared.tail();
        tail.last.is_none() && tail.vote.is_none()
    }

    /// How long syncs of the log take, and since when the one under way has taken.
    pub fn gauge(&self) -> &Gauge {
        &self.shared.gauge
    }

    /// How often RocksDB has failed in the background; after that it writes nothing, or soon will not.
    pub fn background_errors(&self) -> u64 {
        background_errors(&self.shared.db)
    }

    /// Reads everything that is on disk, so that every checksum is checked. See [`read_through`].
    pub fn scrub(&self, mut pause: impl FnMut() -> bool) -> io::Result<()> {
        let db = &self.shared.db;
        for name in [CF_LOG, CF_META] {
            let cf = db.cf_handle(name).ok_or_else(|| io_error(format!("the {name} table is gone")))?;
            read_through(db, cf, &mut pause).map_err(io_error)?;
        }
        check_tables(db, db.path(), &mut pause)
    }

    /// The entry at an index, if it is in the log.
    pub fn entry(&self, index: u64) -> io::Result<Option<LogEntry>> {
        Ok(self.read(index, index + 1, 1, usize::MAX)?.pop())
    }

    /// The vote, the last entry and how far the log is purged.
    pub fn ends(&self) -> (Option<Vote>, Option<LogId>, Option<LogId>) {
        let tail = self.shared.tail();
        (tail.vote, tail.last, tail.purged)
    }

    fn send(&self, op: Op) -> io::Result<()> {
        self.shared.queue.send(op).map_err(|_| io_error("the log's writer has stopped"))
    }

    async fn wait(done: oneshot::Receiver<io::Result<()>>) -> io::Result<()> {
        done.await.map_err(|_| io_error("the log's writer has stopped"))?
    }

    /// Reads `[start, end)`, from disk what is no longer in memory.
    fn read(&self, start: u64, end: u64, entries_max: u64, bytes_max: usize) -> io::Result<Vec<LogEntry>> {
        let end = end.min(start.saturating_add(entries_max));
        let (disk_end, mut from_memory) = {
            let tail = self.shared.tail();
            let start = tail.purged.map_or(start, |p| start.max(p.index + 1));
            let from = start.max(tail.first);
            let mut bytes = 0;
            let mut entries = Vec::new();
            for at in from..end.min(tail.next_index()) {
                let held = &tail.entries[usize::try_from(at - tail.first).map_err(io_error)?];
                bytes += held.bytes;
                if bytes > bytes_max && !entries.is_empty() {
                    break;
                }
                entries.push(held.entry.clone());
            }
            (end.min(tail.first), entries)
        };
        if start >= disk_end {
            return Ok(from_memory);
        }
        let mut entries = match self.read_disk(start, disk_end, bytes_max)? {
            (entries, true) => entries,
            (entries, false) => return Ok(entries),
        };
        entries.append(&mut from_memory);
        Ok(entries)
    }

    /// As [`Self::read`], without holding up the caller's thread when something is on disk alone.
    async fn read_aside(
        &self,
        start: u64,
        end: u64,
        entries_max: u64,
        bytes_max: usize,
    ) -> io::Result<Vec<LogEntry>> {
        let in_memory = {
            let tail = self.shared.tail();
            tail.purged.map_or(start, |purged| start.max(purged.index + 1)) >= tail.first
        };
        if in_memory {
            return self.read(start, end, entries_max, bytes_max);
        }
        let this = self.clone();
        let reading = tokio::task::spawn_blocking(move || this.read(start, end, entries_max, bytes_max));
        reading.await.map_err(io_error)?
    }

    /// Reads `[start, disk_end)` from disk, and says whether the bound in bytes let it come to the end.
    fn read_disk(&self, start: u64, disk_end: u64, bytes_max: usize) -> io::Result<(Vec<LogEntry>, bool)> {
        let cf = self.shared.db.cf_handle(CF_LOG).ok_or_else(|| io_error("the log table is gone"))?;
        let mut entries = Vec::new();
        let mut bytes = 0;
        let mut expected = None;
        for row in self.shared.db.iterator_cf(cf, IteratorMode::From(&index_key(start), Direction::Forward)) {
            let (key, value) = row.map_err(io_error)?;
            let index = u64::from_be_bytes(key.as_ref().try_into().map_err(io_error)?);
            if index >= disk_end {
                break;
            }
            if expected.is_some_and(|expected| expected != index) {
                return Err(io_error(format!("the log has a hole before index {index}")));
            }
            expected = Some(index + 1);
            bytes += value.len();
            if bytes > bytes_max && !entries.is_empty() {
                return Ok((entries, false));
            }
            entries.push(decode_entry(index, &Bytes::from(value)).map_err(io_error)?);
        }
        // Nothing may be missing between the disk's part and memory's; before both, the log may simply not begin yet.
        if expected.is_some_and(|expected| expected != disk_end) {
            return Err(io_error(format!("the log has a hole before index {disk_end}")));
        }
        Ok((entries, true))
    }

    /// Sets the stamper's last stamp to that of the last stamped entry that is in the log *now*: a truncated entry's
    /// stamp must not count, or time would run ahead for the keys that the surviving leader stamped (invariant 3).
    fn refresh_last_stamp(&self) -> io::Result<()> {
        let (mut at, purged) = {
            let tail = self.shared.tail();
            (tail.last.map_or(0, |id| id.index), tail.purged.map_or(0, |id| id.index))
        };
        let mut stamp_ms = 0;
        while at > purged {
            if let Some(stamp) = self.read(at, at + 1, 1, usize::MAX)?.first().and_then(LogEntry::stamp) {
                stamp_ms = stamp.cluster_time_ms;
                break;
            }
            at -= 1;
        }
        self.shared.stamper.last_in_log_ms.store(stamp_ms, Ordering::Release);
        Ok(())
    }
}

fn synced() -> WriteOptions {
    let mut options = WriteOptions::default();
    options.set_sync(true);
    options
}

/// Reads the disk's identity and starts; makes the identity if the database is new.
fn read_disk(db: &DB) -> io::Result<Disk> {
    let meta = db.cf_handle(CF_META).ok_or_else(|| io_error("the log has no meta table"))?;
    let read = |key: &[u8]| db.get_cf(meta, key).map_err(io_error);
    let identity = read(KEY_IDENTITY)?.map(|b| decode::<DiskIdentity>(&b).map_err(io_error)).transpose()?;
    let starts = read(KEY_STARTS)?.map(|b| decode::<Starts>(&b).map_err(io_error)).transpose()?;
    let starts = starts.unwrap_or_default();
    if let Some(identity) = identity {
        return Ok(Disk { identity, starts });
    }
    let identity = DiskIdentity::random();
    db.put_cf_opt(meta, KEY_IDENTITY, encode(&identity), &synced()).map_err(io_error)?;
    Ok(Disk { identity, starts })
}

fn last_on_disk(db: &DB) -> io::Result<Option<LogEntry>> {
    let cf = db.cf_handle(CF_LOG).ok_or_else(|| io_error("the log table is missing"))?;
    match db.iterator_cf(cf, IteratorMode::End).next() {
        None => Ok(None),
        Some(row) => {
            let (key, value) = row.map_err(io_error)?;
            let index = u64::from_be_bytes(key.as_ref().try_into().map_err(io_error)?);
            Ok(Some(decode_entry(index, &Bytes::from(value)).map_err(io_error)?))
        }
    }
}

/// See [`LogStore::background_errors`].
pub(crate) fn background_errors(db: &DB) -> u64 {
    db.property_int_value(rocksdb::properties::BACKGROUND_ERRORS).ok().flatten().unwrap_or(0)
}

fn check_first_after(db: &DB, purged: u64) -> io::Result<()> {
    let cf = db.cf_handle(CF_LOG).ok_or_else(|| io_error("the log table is missing"))?;
    match db.iterator_cf(cf, IteratorMode::From(&index_key(purged + 1), Direction::Forward)).next() {
        Some(Ok((key, _))) if *key == index_key(purged + 1) => Ok(()),
        Some(Err(error)) => Err(io_error(error)),
        _ => Err(io_error(format!("the log does not go on at index {} after its purged part", purged + 1))),
    }
}

/// Writes `first` and whatever else is queued as one batch. Returns false to stop.
fn write_batch(shared: &Shared, ops: &mpsc::Receiver<Op>, first: Op, failed: &mut Option<String>) -> bool {
    let mut bytes = first.bytes();
    let mut batch_ops = vec![first];
    while batch_ops.len() < BATCH_OPS_MAX && bytes < BATCH_BYTES_MAX {
        let Ok(op) = ops.try_recv() else { break };
        bytes += op.bytes();
        batch_ops.push(op);
    }
    let result = match failed {
        // After a failed write nobody knows what is on disk: everything later fails too, and the replica stops.
        Some(error) => Err(io_error(&*error)),
        None => commit(shared, &batch_ops),
    };
    if let Err(error) = &result {
        tracing::error!(%error, "writing the log failed");
        *failed = Some(error.to_string());
    }
    let outcome = || match &result {
        Ok(()) => Ok(()),
        Err(error) => Err(io_error(error)),
    };
    let mut go_on = true;
    for op in batch_ops {
        match op {
            Op::Append { last, callback, .. } => {
                if result.is_ok() {
                    let mut tail = shared.tail();
                    // A truncation may have been queued behind this append.
                    tail.flushed = tail.flushed.max(last.min(tail.next_index().saturating_sub(1)));
                    tail.evict();
                }
                callback.io_completed(outcome());
            }
            Op::Vote { done, .. } | Op::Truncate { done, .. } | Op::Purge { done: Some(done), .. } => {
                let _ = done.send(outcome());
            }
            Op::Purge { done: None, .. } | Op::Failed { .. } => {}
            Op::Stop => go_on = false,
        }
    }
    go_on
}

fn commit(shared: &Shared, ops: &[Op]) -> io::Result<()> {
    let db = &shared.db;
    let log = db.cf_handle(CF_LOG).ok_or_else(|| io_error("the log table is gone"))?;
    let meta = db.cf_handle(CF_META).ok_or_else(|| io_error("the meta table is gone"))?;
    let mut batch = WriteBatch::default();
    let mut sync = false;
    for op in ops {
        match op {
            Op::Append { rows, .. } => {
                sync = true;
                for (index, bytes) in rows {
                    batch.put_cf(log, index_key(*index), bytes);
                }
            }
            Op::Vote { vote, .. } => {
                sync = true;
                batch.put_cf(meta, KEY_VOTE, encode(&WireVote::from(*vote)));
            }
            Op::Truncate { from, .. } => {
                sync = true;
                batch.delete_range_cf(log, index_key(*from), index_key(u64::MAX));
            }
            Op::Purge { upto, .. } => {
                sync = true;
                batch.put_cf(meta, KEY_PURGED, encode(&WireLogId::from(*upto)));
                batch.delete_range_cf(log, index_key(0), index_key(upto.index + 1));
            }
            Op::Failed { why } => return Err(io_error(why)),
            Op::Stop => {}
        }
    }
    // Nothing is ever written without a sync: what follows an unsynced write could reach the disk before it, and a hole
    // in the write-ahead log could not be told from damage (see `log_files`).
    if !sync {
        return Ok(());
    }
    // Only a hint of how far the state may be rebuilt at start, so it rides along. What it covers may still be in the
    // queue, but nothing else can be on disk in its place: a truncation is waited for.
    if let Some(committed) = shared.tail().committed {
        batch.put_cf(meta, KEY_COMMITTED, encode(&WireLogId::from(committed)));
    }
    let _under_way = shared.gauge.begin();
    db.write_opt(batch, &synced()).map_err(io_error)
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> io::Result<Vec<LogEntry>> {
        let (start, end) = bounds(&range);
        self.read_aside(start, end, u64::MAX, usize::MAX).await
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        Ok(self.shared.tail().vote)
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<LogEntry>> {
        let entries = self.read_aside(start, end, READ_ENTRIES_MAX, READ_BYTES_MAX).await?;
        // Never a gap: what was purged meanwhile is for a snapshot to bring.
        Ok(if entries.first().is_some_and(|first| first.log_id.index == start) {
            entries
        } else {
            Vec::new()
        })
    }

    /// In pieces, so that applying a long committed range after a restart needs bounded memory.
    async fn entries_stream<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> impl Stream<Item = io::Result<LogEntry>> + OptionalSend {
        let (start, end) = bounds(&range);
        let pieces = futures::stream::try_unfold((self.clone(), start), move |(log, at)| async move {
            if at >= end {
                return Ok::<_, io::Error>(None);
            }
            let piece = log.read_aside(at, end, READ_ENTRIES_MAX, READ_BYTES_MAX).await?;
            let Some(last) = piece.last() else { return Ok(None) };
            let next = last.log_id.index + 1;
            Ok(Some((futures::stream::iter(piece.into_iter().map(Ok::<_, io::Error>)), (log, next))))
        });
        Box::pin(pieces.try_flatten())
    }
}

fn bounds(range: &impl RangeBounds<u64>) -> (u64, u64) {
    let start = match range.start_bound() {
        Bound::Included(at) => *at,
        Bound::Excluded(at) => at + 1,
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(at) => at.saturating_add(1),
        Bound::Excluded(at) => *at,
        Bound::Unbounded => u64::MAX,
    };
    (start, end)
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> io::Result<LogState<TypeConfig>> {
        let tail = self.shared.tail();
        Ok(LogState { last_purged_log_id: tail.purged, last_log_id: tail.last })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        let (done, saved) = oneshot::channel();
        self.send(Op::Vote { vote: *vote, done })?;
        Self::wait(saved).await?;
        self.shared.tail().vote = Some(*vote);
        Ok(())
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> io::Result<()> {
        self.shared.tail().committed = committed;
        Ok(())
    }

    async fn read_committed(&mut self) -> io::Result<Option<LogId>> {
        // What was appended unsynced before a crash may be gone while the hint to it is not, or the other way round.
        let tail = self.shared.tail();
        Ok(tail.committed.min(tail.last))
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> io::Result<()>
    where
        I: IntoIterator<Item = LogEntry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut rows = Vec::new();
        let mut total = 0;
        let mut last = 0;
        {
            let mut tail = self.shared.tail();
            for entry in entries {
                let encoded = encode_entry(&entry)?;
                let index = entry.index();
                if tail.entries.is_empty() {
                    tail.first = index;
                }
                assert!(
                    index == tail.next_index(),
                    "the log must have no hole: {index} after {:?}",
                    tail.last
                );
                if let Some(stamp) = entry.stamp() {
                    self.shared.stamper.last_in_log_ms.store(stamp.cluster_time_ms, Ordering::Release);
                }
                last = index;
                total += encoded.len();
                tail.bytes += encoded.len();
                tail.last = Some(entry.log_id);
                tail.entries.push_back(TailEntry { entry, bytes: encoded.len() });
                rows.push((index, encoded));
            }
        }
        self.shared.appended_bytes.fetch_add(total as u64, Ordering::Relaxed);
        self.send(Op::Append { rows, last, bytes: total, callback })
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> io::Result<()> {
        let from = last_log_id.map_or(0, |id| id.index + 1);
        {
            let mut tail = self.shared.tail();
            // What this replica knows to be committed is applied, or about to be. openraft never asks for this, and
            // compares nothing below its commit index: a leader that contradicts it is found by `contradicts`.
            if let Some(committed) = tail.committed.filter(|committed| committed.index >= from) {
                return Err(io_error(format!(
                    "a leader wants entries from {from} on removed, but entries up to {} are committed and applied \
                     here: acknowledged entries were lost elsewhere. Stop all members and compare their logs",
                    committed.index
                )));
            }
            while tail.next_index() > from && !tail.entries.is_empty() {
                if let Some(cut) = tail.entries.pop_back() {
                    tail.bytes -= cut.bytes;
                }
            }
            if tail.entries.is_empty() {
                tail.first = from;
            }
            tail.flushed = tail.flushed.min(from.saturating_sub(1));
            if tail.last.is_some_and(|last| last.index >= from) {
                tail.last = last_log_id;
            }
        }
        let (done, truncated) = oneshot::channel();
        self.send(Op::Truncate { from, done })?;
        Self::wait(truncated).await?;
        let this = self.clone();
        tokio::task::spawn_blocking(move || this.refresh_last_stamp()).await.map_err(io_error)?
    }

    async fn purge(&mut self, log_id: LogId) -> io::Result<()> {
        let continues = {
            let mut tail = self.shared.tail();
            let continues = tail.last.is_some_and(|last| last.index >= log_id.index);
            tail.purged = tail.purged.max(Some(log_id));
            while tail.first <= log_id.index && !tail.entries.is_empty() {
                tail.pop_front();
            }
            if tail.entries.is_empty() {
                tail.first = tail.first.max(log_id.index + 1);
            }
            tail.last = tail.last.max(Some(log_id));
            if tail.last == tail.purged {
                // Nothing is left; the stamp of an entry that was never committed must not outlive it. What a snapshot
                // brought counts through the state's cluster time.
                self.shared.stamper.last_in_log_ms.store(0, Ordering::Release);
            }
            continues
        };
        // The state is made durable before what could rebuild it goes: away from the writer, which votes and entries wait
        // for, and away from the task that calls this, which heartbeats wait for.
        let this = self.clone();
        let (done, purged) = oneshot::channel();
        let (now, later) = if continues { (None, Some(done)) } else { (Some(done), None) };
        {
            let mut purger = self.shared.purger();
            let earlier = purger.take();
            let thread = std::thread::Builder::new().name("log-purger".into()).spawn(move || {
                // In their order: how far the log is purged must never go back.
                if let Some(earlier) = earlier {
                    let _ = earlier.join();
                }
                let op = match (this.shared.before_purge)() {
                    Ok(()) => Op::Purge { upto: log_id, done: now },
                    Err(error) => Op::Failed { why: format!("making the state durable failed: {error}") },
                };
                // It fails only when the store is being closed.
                let _ = this.send(op);
            })?;
            *purger = Some(thread);
        }
        if later.is_some() {
            // Nobody needs to know when it is done: a crash before that finds more of the log, which does no harm.
            return Ok(());
        }
        // A snapshot took the place of the whole log: entries that follow must not be written before the old ones are gone.
        Self::wait(purged).await
    }
}
