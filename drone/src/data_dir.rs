//! The drone's directory.
//!
//! ```text
//!   DIR/lock                           held by the running drone
//!   DIR/cluster_id                     the cluster whose keys the backends here hold
//!   DIR/backends/<id>/output.log       what the backend wrote last
//!   DIR/backends/<id>/output.log.1     what it wrote before that
//!   DIR/backends/<id>/guard.log        what its guard noted
//!   DIR/backends/<id>/work             the backend's own directory: empty at its start, and all that it sees of DIR
//!   DIR/backends/<id>/journal          see [`crate::journal`]; as long as its end is not acknowledged
//!   DIR/backends/<id>/end              an end that was asked for, as long as the journal is there
//!   DIR/backends/<id>/outcome          how it ended, as its guard saw it
//!   DIR/backends/<id>/guard.sock       where a later drone reaches its guard
//! ```
//!
//! Bounded: directories of finished backends are removed, oldest first, beyond [`FINISHED_MAX`]. A guard keeps its
//! backend's output within two files of [`FILE_BYTES_MAX`] at all times; beyond [`OUTPUT_BYTES_MAX`] for the whole drone,
//! the output of finished backends is removed, the oldest first, then the older files and at last the current ones of
//! running backends, the largest first. A guard holds a shared lock on its `guard.log` as long as it or anything of its namespace
//! lives (it inherits the locked file): a directory whose guard has outlived its drone is not removed.

use crate::backend_store::ASIDE;
use crate::guard::output::{FILE_BYTES_MAX, older};
use crate::journal::JOURNAL;
use nix::fcntl::{Flock, FlockArg};
use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Directories of finished backends that are kept.
pub const FINISHED_MAX: usize = 1_000;
/// Output of all backends together that is kept, in bytes, unless the drone is told otherwise.
pub const OUTPUT_BYTES_MAX: u64 = 4 * 1024 * 1024 * 1024;
/// Largest log of a guard, in bytes. A guard stops long before it.
const GUARD_LOG_BYTES_MAX: u64 = 16 * 1024 * 1024;
/// Names the backend's own directory in its environment. Ids are unique in a cluster only, directories on the machine.
pub const ENV_BACKEND_DIR: &str = "HOLDFAST_BACKEND_DIR";
/// Name of a backend's own directory.
pub(crate) const WORK: &str = "work";
/// Name of a guard's log.
pub(crate) const GUARD_LOG: &str = "guard.log";
/// Permissions of the data directory.
const DIR_MODE: u32 = 0o700;
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
    output_bytes_max: u64,
    _lock: Flock<File>,
}

impl DataDir {
    /// Makes it if need be, and locks it.
    pub fn open(path: &Path) -> Result<Self, DataDirError> {
        let io_at = |source| DataDirError::Io { path: path.to_owned(), source };
        fs::create_dir_all(path.join("backends")).map_err(io_at)?;
        // What backends write, and what their guards can be told, is the drone's user's alone.
        if fs::metadata(path).map_err(io_at)?.permissions().mode() & 0o777 != DIR_MODE {
            fs::set_permissions(path, fs::Permissions::from_mode(DIR_MODE)).map_err(io_at)?;
        }
        // Guards have another working directory.
        let path = fs::canonicalize(path).map_err(io_at)?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path.join("lock"))
            .map_err(|source| DataDirError::Io { path: path.clone(), source })?;
        match Flock::lock(lock, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Self { path, output_bytes_max: OUTPUT_BYTES_MAX, _lock: lock }),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Err(DataDirError::InUse(path)),
            Err((_, e)) => Err(DataDirError::Io { path, source: e.into() }),
        }
    }

    /// Keeps so many bytes of all backends' output together.
    pub fn with_output_bytes_max(mut self, bytes: u64) -> Self {
        self.output_bytes_max = bytes;
        self
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

    /// Where it is, without links.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directories of the backends.
    pub fn backends(&self) -> BackendsDir {
        BackendsDir { path: self.path.join("backends"), output_bytes_max: self.output_bytes_max }
    }
}

/// Where each backend has its directory.
#[derive(Debug, Clone)]
pub struct BackendsDir {
    path: PathBuf,
    output_bytes_max: u64,
}

/// The places of one backend.
#[derive(Debug)]
pub struct BackendPaths {
    /// Its directory, with the control files.
    pub dir: PathBuf,
    /// The backend's own directory, and working directory by default.
    pub work: PathBuf,
    /// Its standard output and error.
    pub output_log: PathBuf,
    /// Its guard's notes.
    pub guard_log: PathBuf,
}

impl BackendsDir {
    fn paths(&self, backend: &str) -> BackendPaths {
        let dir = self.path.join(backend);
        BackendPaths {
            output_log: dir.join("output.log"),
            guard_log: dir.join(GUARD_LOG),
            work: dir.join(WORK),
            dir,
        }
    }

    /// Makes a backend's directory. The name must have been checked.
    pub fn create(&self, backend: &str) -> io::Result<BackendPaths> {
        let paths = self.paths(backend);
        fs::create_dir_all(&paths.work)?;
        Ok(paths)
    }

    /// A variable that names the backend in its own environment, and is like no other's on this machine.
    pub(crate) fn mark(&self, backend: &str) -> String {
        format!("{ENV_BACKEND_DIR}={}", self.paths(backend).work.display())
    }

    /// Where the backend's guard notes things.
    pub(crate) fn guard_log(&self, backend: &str) -> PathBuf {
        self.paths(backend).guard_log
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
    /// removed. What fails does not keep the rest from being done; the first failure is the answer.
    pub fn tidy(&self, running: &HashSet<String>) -> io::Result<()> {
        let mut failures = Failures::default();
        let (mut finished, mut outputs) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            if name.starts_with(ASIDE) {
                // It is being made.
                continue;
            }
            let paths = self.paths(&name);
            let is_running = running.contains(&name);
            let changed = entry.metadata().and_then(|meta| meta.modified());
            let changed = failures.note(&paths.dir, changed).unwrap_or(SystemTime::now());
            if is_running {
                failures.note(&paths.guard_log, empty_if_longer(&paths.guard_log, GUARD_LOG_BYTES_MAX));
                // A guard of an earlier version does not limit it.
                failures.note(&paths.output_log, empty_if_longer(&paths.output_log, 2 * FILE_BYTES_MAX));
            } else {
                finished.push((changed, paths.dir.clone()));
            }
            for (path, is_current) in [(older(&paths.output_log), false), (paths.output_log, true)] {
                match fs::metadata(&path) {
                    Ok(meta) => {
                        outputs.push(OutputFile { is_running, is_current, changed, bytes: meta.len(), path });
                    }
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                    Err(e) => failures.add(&path, &e),
                }
            }
        }
        finished.sort();
        let mut surplus = finished.len().saturating_sub(FINISHED_MAX);
        for (_, dir) in finished {
            if surplus == 0 {
                break;
            }
            match is_over(&dir).and_then(|is_over| if is_over { fs::remove_dir_all(&dir) } else { Ok(()) }) {
                Ok(()) => surplus -= usize::from(!dir.exists()),
                Err(e) => failures.add(&dir, &e),
            }
        }
        outputs.retain(|output| output.path.exists());
        for (path, cut) in surplus_output(outputs, self.output_bytes_max) {
            failures.note(&path, if cut { empty_if_longer(&path, 0) } else { fs::remove_file(&path) });
        }
        failures.first.map_or(Ok(()), Err)
    }
}

/// Whether nothing needs this directory any more. An error says that something may.
fn is_over(dir: &Path) -> io::Result<bool> {
    Ok(!has_guard(&dir.join(GUARD_LOG)) && !dir.join(JOURNAL).try_exists()?)
}

/// Failures that do not keep the rest from being done.
#[derive(Debug, Default)]
struct Failures {
    first: Option<io::Error>,
}

impl Failures {
    fn note<T>(&mut self, path: &Path, result: io::Result<T>) -> Option<T> {
        match result {
            Ok(done) => Some(done),
            Err(e) => {
                self.add(path, &e);
                None
            }
        }
    }

    fn add(&mut self, path: &Path, e: &io::Error) {
        self.first.get_or_insert_with(|| io::Error::new(e.kind(), format!("{}: {e}", path.display())));
    }
}

/// A file of a backend's output.
#[derive(Debug, Clone)]
struct OutputFile {
    is_running: bool,
    /// It may be written to.
    is_current: bool,
    /// When its directory was changed.
    changed: SystemTime,
    bytes: u64,
    path: PathBuf,
}

/// What has to go so that no more than `bytes_max` are left; true: cut, because its guard has it open.
fn surplus_output(mut files: Vec<OutputFile>, bytes_max: u64) -> Vec<(PathBuf, bool)> {
    let mut bytes: u64 = files.iter().map(|file| file.bytes).sum();
    files.sort_by(|a, b| {
        // Ended backends by age, running ones by size.
        let age = |file: &OutputFile| if file.is_running { SystemTime::UNIX_EPOCH } else { file.changed };
        let rank = |file: &OutputFile| (file.is_running, file.is_running && file.is_current, age(file));
        rank(a).cmp(&rank(b)).then(b.bytes.cmp(&a.bytes))
    });
    let mut surplus = Vec::new();
    for file in files {
        if bytes <= bytes_max {
            break;
        }
        bytes -= file.bytes;
        surplus.push((file.path, file.is_running && file.is_current));
    }
    surplus
}

/// Whether a guard holds this log; if that cannot be told, it does.
pub(crate) fn has_guard(guard_log: &Path) -> bool {
    // It does not wait for the other end of what is no file.
    match OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(guard_log) {
        Ok(log) => log.try_lock().is_err(),
        Err(e) => e.kind() != io::ErrorKind::NotFound,
    }
}

/// Its writers append, so they continue at the new end.
fn empty_if_longer(log: &Path, bytes_max: u64) -> io::Result<()> {
    match fs::metadata(log) {
        Ok(meta) if meta.len() > bytes_max => OpenOptions::new().write(true).open(log)?.set_len(0),
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
        File::create(&log).unwrap().set_len(2 * FILE_BYTES_MAX + 1).unwrap();
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

    #[test]
    fn the_output_of_the_oldest_goes_first_and_of_the_running_the_largest() {
        let file = |name: &str, is_running, is_current, age_s: u64, bytes: u64| OutputFile {
            is_running,
            is_current,
            changed: SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000 - age_s),
            bytes,
            path: PathBuf::from(name),
        };
        let files = vec![
            file("run-big", true, true, 0, 30),
            file("run-small", true, true, 900, 10),
            file("run-small.1", true, false, 900, 5),
            file("run-big.1", true, false, 0, 20),
            file("new", false, true, 1, 7),
            file("old", false, true, 500, 3),
        ];
        let surplus = |bytes_max| {
            let surplus = surplus_output(files.clone(), bytes_max);
            surplus.iter().map(|(path, cut)| (path.to_str().unwrap().to_owned(), *cut)).collect::<Vec<_>>()
        };
        assert_eq!(surplus(75), []);
        assert_eq!(surplus(74), [("old".to_owned(), false)]);
        let names: Vec<_> = surplus(0).into_iter().collect();
        let expected = [
            ("old", false),
            ("new", false),
            ("run-big.1", false),
            ("run-small.1", false),
            ("run-big", true),
            ("run-small", true),
        ];
        assert_eq!(names, expected.map(|(name, cut)| (name.to_owned(), cut)));
    }

    #[test]
    fn all_output_together_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let backends = DataDir::open(dir.path()).unwrap().with_output_bytes_max(2_500).backends();
        let write = |name: &str| {
            let log = backends.create(name).unwrap().output_log;
            fs::write(&log, vec![b'x'; 1_000]).unwrap();
            log
        };
        let (ended, running) = (write("ended"), write("running"));
        fs::write(older(&running), vec![b'x'; 1_000]).unwrap();
        backends.tidy(&HashSet::from(["running".to_owned()])).unwrap();
        assert!(!ended.exists() && running.exists() && older(&running).exists());
        let smaller = BackendsDir { output_bytes_max: 500, ..backends };
        smaller.tidy(&HashSet::from(["running".to_owned()])).unwrap();
        assert!(!older(&running).exists());
        assert_eq!(fs::metadata(running).unwrap().len(), 0);
    }

    #[test]
    fn one_directory_that_cannot_be_removed_does_not_keep_the_others() {
        let dir = tempfile::tempdir().unwrap();
        let backends = DataDir::open(dir.path()).unwrap().backends();
        for i in 0..FINISHED_MAX + 2 {
            let paths = backends.create(&format!("ba-{i}")).unwrap();
            let age = std::time::Duration::from_secs(if i < 3 { 9_000 - i as u64 } else { 1_000 });
            File::open(&paths.dir).unwrap().set_modified(SystemTime::now() - age).unwrap();
        }
        // A mount point for root, who may remove everything else; else a directory that may not be changed.
        let (oldest, none) = (dir.path().join("backends/ba-0/work"), None::<&str>);
        let is_root = nix::unistd::geteuid().is_root();
        if is_root {
            let flags = nix::mount::MsFlags::empty();
            nix::mount::mount(Some("x"), &oldest, Some("tmpfs"), flags, none).unwrap();
        } else {
            fs::write(oldest.join("file"), "").unwrap();
            fs::set_permissions(&oldest, fs::Permissions::from_mode(0o500)).unwrap();
        }
        let tidied = backends.tidy(&HashSet::new());
        if is_root {
            nix::mount::umount(&oldest).unwrap();
        } else {
            fs::set_permissions(&oldest, fs::Permissions::from_mode(0o700)).unwrap();
        }
        assert!(tidied.unwrap_err().to_string().contains("ba-0"), "the failure is named");
        for i in 1..3 {
            assert!(!dir.path().join(format!("backends/ba-{i}")).exists(), "ba-{i}");
        }
        assert_eq!(fs::read_dir(dir.path().join("backends")).unwrap().count(), FINISHED_MAX);
    }
}
