//! Snapshots on disk: checkpoints of the state, each in its own directory, made visible by a rename.
//!
//! ```text
//! snapshots/making-3/           being built here
//! snapshots/incoming-4/         arriving from member 4 (see `incoming`; kept over a restart)
//! snapshots/arrived-5/          complete, about to be installed
//! snapshots/adopted-6/          being copied from a directory elsewhere
//! snapshots/snap-0000000000000042/   complete; the number is the last log index it holds
//! ```
//!
//! While a snapshot is being sent to a follower no newer one is made, within bounds ([`Snapshots::is_held`]): a newer one
//! would replace what a broken transfer is to go on with, and let the log be purged beyond what the follower needs next, so
//! that under many writes a large snapshot would never be followed by anything but the next snapshot.

use crate::files::{copy_or_link_dir, remove_dir_if_there, sync_dir};
use crate::incoming::is_incoming;
use crate::log_files::Damage;
use crate::state_db::read_meta;
use crate::types::SnapshotMeta;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A complete snapshot. Its directory lives as long as somebody holds it and it has not been replaced.
pub struct SnapshotDir {
    /// Where it is.
    pub path: PathBuf,
    replaced: AtomicBool,
}

impl SnapshotDir {
    /// A directory that is deleted when nobody holds it any more, unless it is adopted.
    pub fn temporary(path: PathBuf) -> Arc<Self> {
        Arc::new(Self { path, replaced: AtomicBool::new(true) })
    }
}

impl std::fmt::Debug for SnapshotDir {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SnapshotDir({})", self.path.display())
    }
}

impl Drop for SnapshotDir {
    fn drop(&mut self) {
        if self.replaced.load(Ordering::Acquire)
            && let Err(error) = remove_dir_if_there(&self.path)
        {
            tracing::warn!(%error, path = %self.path.display(), "an old snapshot can't be removed");
        }
    }
}

/// The snapshots of one replica.
pub struct Snapshots {
    root: PathBuf,
    next: AtomicU64,
    current: Mutex<Option<(SnapshotMeta, Arc<SnapshotDir>)>>,
    /// What is being sent: member → how it goes.
    transfers: Mutex<BTreeMap<u64, Transfer>>,
    /// The state is wrong: none is built of it.
    closed: AtomicBool,
    paused: AtomicBool,
}

/// Longest time for which one transfer puts off newer snapshots, and with them the purging of the log.
const HELD_MAX: Duration = Duration::from_secs(600);
/// A transfer without progress for this long puts off nothing any more; until then its receiver may come back.
const HELD_IDLE: Duration = Duration::from_secs(60);
/// For this long after its end too: until entries flow to the follower, which then keep those that it needs.
const HELD_AFTER: Duration = Duration::from_secs(5);

/// A snapshot on its way to a follower.
#[derive(Debug, Clone, Copy)]
struct Transfer {
    /// The snapshot, by its last log index.
    index: u64,
    began: Instant,
    last: Instant,
    done: bool,
}

impl Transfer {
    fn new(index: u64, now: Instant) -> Self {
        Self { index, began: now, last: now, done: false }
    }

    fn holds(&self, now: Instant) -> bool {
        let idle = if self.done { HELD_AFTER } else { HELD_IDLE };
        now.duration_since(self.last) < idle && now.duration_since(self.began) < HELD_MAX
    }
}

impl Snapshots {
    /// Opens `root`; finds the newest complete snapshot and deletes everything else.
    pub fn open(root: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(root)?;
        let mut complete = Vec::new();
        for entry in std::fs::read_dir(root)? {
            let entry = entry?;
            let name = entry.file_name();
            if name.to_string_lossy().starts_with("snap-") {
                complete.push(entry.path());
            } else if !is_incoming(&name.to_string_lossy()) {
                remove_dir_if_there(&entry.path())?;
            }
        }
        complete.sort();
        let newest = complete.pop();
        for old in complete {
            remove_dir_if_there(&old)?;
        }
        let current = match newest {
            Some(path) => {
                let meta = read_meta(&path)?;
                let index = meta.last_log_id.map_or(0, |id| id.index);
                if path.file_name() != Some(format!("snap-{index:016}").as_ref()) {
                    // Its write-ahead log has lost its end.
                    let what =
                        format!("it holds the state as of index {index}, not of the one it is named by");
                    return Err(Damage { file: path, what }.into());
                }
                Some((meta, Arc::new(SnapshotDir { path, replaced: AtomicBool::new(false) })))
            }
            None => None,
        };
        Ok(Self {
            root: root.to_owned(),
            next: AtomicU64::new(1),
            current: Mutex::new(current),
            transfers: Mutex::default(),
            closed: AtomicBool::new(false),
            paused: AtomicBool::new(false),
        })
    }

    /// The directory of all of them.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn transfers(&self) -> MutexGuard<'_, BTreeMap<u64, Transfer>> {
        self.transfers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A snapshot that ends at `index` has come on its way to `target`.
    pub fn progressed(&self, target: u64, index: u64) {
        let now = Instant::now();
        let mut transfers = self.transfers();
        let transfer = transfers.entry(target).or_insert(Transfer::new(index, now));
        if transfer.index != index || transfer.done {
            *transfer = Transfer::new(index, now);
        }
        transfer.last = now;
    }

    /// It has arrived at `target`.
    pub fn arrived(&self, target: u64) {
        if let Some(transfer) = self.transfers().get_mut(&target) {
            (transfer.done, transfer.last) = (true, Instant::now());
        }
    }

    /// Whether a newer snapshot has to wait for one that is being sent, or was just now.
    pub fn is_held(&self) -> bool {
        let now = Instant::now();
        let mut transfers = self.transfers();
        // One that was held for as long as is allowed is kept, so that it does not count as a new one.
        transfers.retain(|_, transfer| now.duration_since(transfer.last) < HELD_IDLE);
        transfers.values().any(|transfer| transfer.holds(now))
    }

    /// No snapshot is built from here on.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    /// While it is paused no snapshot is built, so that the last one that is known to be right and the log after it stay.
    pub fn set_paused(&self, paused: bool) {
        self.paused.store(paused, Ordering::Release);
    }

    /// See [`Self::set_paused`].
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Acquire)
    }

    /// See [`Self::close`].
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// A directory name to build under, not existing yet.
    pub fn aside(&self, what: &str) -> io::Result<PathBuf> {
        let path = self.root.join(format!("{what}-{}", self.next.fetch_add(1, Ordering::Relaxed)));
        remove_dir_if_there(&path)?;
        Ok(path)
    }

    /// Makes a directory that was built aside (complete and synced) the current snapshot, unless a newer one is there.
    pub fn publish(&self, aside: &Path, meta: &SnapshotMeta) -> io::Result<Arc<SnapshotDir>> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let index = meta.last_log_id.map_or(0, |id| id.index);
        if let Some((held, dir)) = current.as_ref()
            && held.last_log_id >= meta.last_log_id
        {
            assert!(dir.path != aside, "a published snapshot is not published again");
            remove_dir_if_there(aside)?;
            return Ok(dir.clone());
        }
        let path = self.root.join(format!("snap-{index:016}"));
        remove_dir_if_there(&path)?;
        std::fs::rename(aside, &path)?;
        sync_dir(&self.root)?;
        let dir = Arc::new(SnapshotDir { path, replaced: AtomicBool::new(false) });
        if let Some((_, old)) = current.replace((meta.clone(), dir.clone())) {
            old.replaced.store(true, Ordering::Release);
        }
        Ok(dir)
    }

    /// Makes a snapshot that arrived from elsewhere ours.
    pub fn adopt(&self, arrived: &SnapshotDir, meta: &SnapshotMeta) -> io::Result<Arc<SnapshotDir>> {
        // At a start openraft hands back our own newest snapshot, when the state is older than it.
        if let Some((held, dir)) = self.current()
            && dir.path == arrived.path
        {
            return if held == *meta {
                Ok(dir)
            } else {
                Err(io::Error::other("the snapshot is not what it was"))
            };
        }
        if arrived.path.parent() == Some(self.root.as_path()) {
            return self.publish(&arrived.path, meta);
        }
        let aside = self.aside("adopted")?;
        copy_or_link_dir(&arrived.path, &aside)?;
        self.publish(&aside, meta)
    }

    /// The newest complete snapshot.
    pub fn current(&self) -> Option<(SnapshotMeta, Arc<SnapshotDir>)> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transfer_puts_off_newer_snapshots_while_it_goes_on_and_a_little_longer_and_never_for_ever() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut transfer = Transfer::new(7, start);
        assert!(transfer.holds(at(59)) && !transfer.holds(at(60)));
        transfer.last = at(590);
        assert!(transfer.holds(at(599)) && !transfer.holds(at(600)));
        let done = Transfer { done: true, ..Transfer::new(7, start) };
        assert!(done.holds(at(4)) && !done.holds(at(5)));
    }

    #[test]
    fn only_a_snapshot_on_its_way_is_held() {
        let dir = tempfile::tempdir().unwrap();
        let snapshots = Snapshots::open(dir.path()).unwrap();
        assert!(!snapshots.is_held());
        snapshots.arrived(2);
        assert!(!snapshots.is_held());
        snapshots.progressed(2, 7);
        assert!(snapshots.is_held());
        snapshots.arrived(2);
        assert!(snapshots.is_held(), "for a moment");
        if let Some(transfer) = snapshots.transfers().get_mut(&2) {
            transfer.last -= HELD_AFTER;
        }
        assert!(!snapshots.is_held());
    }
}
