//! The drone's directory.
//!
//! ```text
//!   DIR/lock                           held by the running drone
//!   DIR/cluster_id                     the cluster whose keys the backends here hold
//!   DIR/backends/<id>/output.log       what the backend wrote
//!   DIR/backends/<id>/guard.log        what its guard noted
//!   DIR/backends/<id>/journal          see [`crate::journal`]; as long as its end is not acknowledged
//!   DIR/backends/<id>/outcome          how it ended, as its guard saw it
//!   DIR/backends/<id>/guard.sock       where a later drone reaches its guard
//! ```
//!
//! Bounded: directories of finished backends are removed, oldest first, beyond [`FINISHED_MAX`]; a log is emptied when
//! it exceeds [`LOG_BYTES_MAX`]. A guard holds a shared lock on its `guard.log` as long as it or anything of its namespace
//! lives (it inherits the locked file): a directory whose guard has outlived its drone is not removed.

use crate::journal::JOURNAL;
use nix::fcntl::{Flock, FlockArg};
use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Directories of finished backends that are kept.
pub const FINISHED_MAX: usize = 1_000;
/// Largest log of a backend, in bytes.
pub const LOG_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Name of a guard's log.
pub(crate) const GUARD_LOG: &str = "guard.log";
/// Longest cluster id, in bytes.
const CLUSTER_ID_BYTES_MAX: u64 = 1_024;

/// Why a data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    /// Another drone has it.
    #[error("--data-dir {0} is in use by another drone")]
    InUse(PathBuf),
    /// Something failed in it.
    #[error("--data-dir {path}: {source}")]
    Io {
        /// Where.
        path: PathBuf,
        /// What.
        source: io::Error,
    },
}

/// An open data directory; others are kept out until it is dropped.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    _lock: Flock<File>,
}

impl DataDir {
    /// Makes it if need be, and locks it.
    pub fn open(path: &Path) -> Result<Self, DataDirError> {
        let io_at = |source| DataDirError::Io { path: path.to_owned(), source };
        fs::create_dir_all(path.join("backends")).map_err(io_at)?;
        // Guards have another working directory.
        let path = fs::canonicalize(path).map_err(io_at)?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path.join("lock"))
            .map_err(|source| DataDirError::Io { path: path.clone(), source })?;
        match Flock::lock(lock, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Self { path, _lock: lock }),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Err(DataDirError::InUse(path)),
            Err((_, e)) => Err(DataDirError::Io { path, source: e.into() }),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The cluster id that was kept, if any.
    pub fn cluster_id(&self) -> Result<Option<String>, DataDirError> {
        let path = self.path.join("cluster_id");
        let read = || -> io::Result<Option<String>> {
            match fs::metadata(&path) {
                Ok(meta) if meta.len() > CLUSTER_ID_BYTES_MAX => Err(io::Error::other("is too long")),
                Ok(_) => Ok(Some(fs::read_to_string(&path)?.trim().to_owned()).filter(|id| !id.is_empty())),
                Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(e) => Err(e),
            }
        };
        read().map_err(|source| DataDirError::Io { path: path.clone(), source })
    }

    /// Keeps a cluster id, durably and in one step.
    pub fn set_cluster_id(&self, id: &str) -> Result<(), DataDirError> {
        let (path, new) = (self.path.join("cluster_id"), self.path.join("cluster_id.new"));
        let write = || -> io::Result<()> {
            let mut file = File::create(&new)?;
            file.write_all(id.as_bytes())?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            File::open(&self.path)?.sync_all()
        };
        write().map_err(|source| DataDirError::Io { path: path.clone(), source })
    }

    /// The directories of the backends.
    pub fn backends(&self) -> BackendsDir {
        BackendsDir { path: self.path.join("backends") }
    }
}

/// Where each backend has its directory.
#[derive(Debug, Clone)]
pub struct BackendsDir {
    path: PathBuf,
}

/// The places of one backend.
#[derive(Debug)]
pub struct BackendPaths {
    /// Its directory, and working directory by default.
    pub dir: PathBuf,
    /// Its standard output and error.
    pub output_log: PathBuf,
    /// Its guard's notes.
    pub guard_log: PathBuf,
}

impl BackendsDir {
    fn paths(&self, backend: &str) -> BackendPaths {
        let dir = self.path.join(backend);
        BackendPaths { output_log: dir.join("output.log"), guard_log: dir.join(GUARD_LOG), dir }
    }

    /// Makes a backend's directory. The name must have been checked.
    pub fn create(&self, backend: &str) -> io::Result<BackendPaths> {
        let paths = self.paths(backend);
        fs::create_dir_all(&paths.dir)?;
        Ok(paths)
    }

    /// Opens a guard's log for appending, locked as long as anybody has it open.
    pub fn open_guard_log(paths: &BackendPaths) -> io::Result<File> {
        let log = OpenOptions::new().create(true).append(true).open(&paths.guard_log)?;
        log.lock_shared()?;
        Ok(log)
    }

    /// Where the directories are.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The backend's directory, for its guard's socket.
    pub fn open_dir(&self, backend: &str) -> io::Result<File> {
        File::open(self.paths(backend).dir)
    }

    /// Whether a guard holds the backend's directory.
    pub fn is_guarded(&self, backend: &str) -> bool {
        has_guard(&self.paths(backend).guard_log)
    }

    /// Enforces the bounds. `running`, what an earlier drone's guard still runs, and what is still to be reported are not
    /// removed.
    pub fn tidy(&self, running: &HashSet<String>) -> io::Result<()> {
        let mut finished: Vec<(SystemTime, PathBuf)> = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            if running.contains(&name) {
                let paths = self.paths(&name);
                for log in [paths.output_log, paths.guard_log] {
                    empty_if_too_long(&log)?;
                }
            } else {
                let changed = entry.metadata()?.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                finished.push((changed, entry.path()));
            }
        }
        finished.sort();
        let surplus = finished.len().saturating_sub(FINISHED_MAX);
        let over = |dir: &Path| !has_guard(&dir.join(GUARD_LOG)) && !dir.join(JOURNAL).exists();
        let guardless = finished.into_iter().filter(|(_, dir)| over(dir));
        for (_, dir) in guardless.take(surplus) {
            fs::remove_dir_all(dir)?;
        }
        Ok(())
    }
}

/// Whether a guard holds this log; if that cannot be told, it does.
pub(crate) fn has_guard(guard_log: &Path) -> bool {
    match File::open(guard_log) {
        Ok(log) => log.try_lock().is_err(),
        Err(e) => e.kind() != io::ErrorKind::NotFound,
    }
}

/// Its writers append, so they go on at the new end.
fn empty_if_too_long(log: &Path) -> io::Result<()> {
    match fs::metadata(log) {
        Ok(meta) if meta.len() > LOG_BYTES_MAX => OpenOptions::new().write(true).open(log)?.set_len(0),
        Ok(_) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_drone_is_kept_out_until_the_first_has_gone() {
        let dir = tempfile::tempdir().unwrap();
        let first = DataDir::open(dir.path()).unwrap();
        assert!(matches!(DataDir::open(dir.path()), Err(DataDirError::InUse(_))));
        drop(first);
        DataDir::open(dir.path()).unwrap();
    }

    #[test]
    fn the_cluster_id_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::open(dir.path()).unwrap();
        assert_eq!(data.cluster_id().unwrap(), None);
        data.set_cluster_id("abc").unwrap();
        data.set_cluster_id("def").unwrap();
        drop(data);
        assert_eq!(DataDir::open(dir.path()).unwrap().cluster_id().unwrap().as_deref(), Some("def"));
    }

    #[test]
    fn tidying_keeps_the_running_and_the_newest_and_empties_long_logs() {
        let dir = tempfile::tempdir().unwrap();
        let backends = DataDir::open(dir.path()).unwrap().backends();
        for i in 0..FINISHED_MAX + 3 {
            backends.create(&format!("ba-{i}")).unwrap();
        }
        let log = backends.create("running").unwrap().output_log;
        File::create(&log).unwrap().set_len(LOG_BYTES_MAX + 1).unwrap();
        let running = HashSet::from(["running".to_owned(), "ba-0".to_owned()]);
        // The guard of an earlier drone still runs; another one has ended.
        let guarded = BackendsDir::open_guard_log(&backends.create("ba-1").unwrap()).unwrap();
        drop(BackendsDir::open_guard_log(&backends.create("ba-2").unwrap()).unwrap());
        for (name, age) in [("ba-1", 7_000), ("ba-2", 6_000), ("ba-3", 5_000)] {
            let old = SystemTime::now() - std::time::Duration::from_secs(age);
            File::open(dir.path().join("backends").join(name)).unwrap().set_modified(old).unwrap();
        }
        backends.tidy(&running).unwrap();
        assert!(dir.path().join("backends/ba-1").exists());
        assert!(!dir.path().join("backends/ba-2").exists() && !dir.path().join("backends/ba-3").exists());
        drop(guarded);
        assert_eq!(fs::metadata(log).unwrap().len(), 0);
        assert!(dir.path().join("backends/ba-0").exists());
        assert_eq!(fs::read_dir(dir.path().join("backends")).unwrap().count(), FINISHED_MAX + 2);
    }
}
