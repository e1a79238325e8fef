//! Snapshots on disk: checkpoints of the state, each in its own directory, made visible by a rename.
//!
//! ```text
//! snapshots/making-3/           being built here
//! snapshots/incoming-4/         arriving from the leader
//! snapshots/adopted-5/          being copied from a directory elsewhere
//! snapshots/snap-0000000000000042/   complete; the number is the last log index it holds
//! ```

use crate::files::{copy_or_link_dir, remove_dir_if_there, sync_dir};
use crate::log_files::Damage;
use crate::state_db::read_meta;
use crate::types::SnapshotMeta;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

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
}

impl Snapshots {
    /// Opens `root`; finds the newest complete snapshot and deletes everything else.
    pub fn open(root: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(root)?;
        let mut complete = Vec::new();
        for entry in std::fs::read_dir(root)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with("snap-") {
                complete.push(entry.path());
            } else {
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
        Ok(Self { root: root.to_owned(), next: AtomicU64::new(1), current: Mutex::new(current) })
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
