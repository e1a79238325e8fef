//! What is durable of each backend: how it is written, read and removed. Every call is about one backend and blocks only
//! for as long as that backend's files do, so that one damaged directory never stops, delays or ends the others.
//!
//! A backend's directory appears with its journal in one step: it is made aside, under a name that no backend can have,
//! and renamed. So a directory exists exactly if its backend was taken on, and an id whose directory exists in any form is
//! never started again.

use crate::data_dir::{BackendsDir, GUARD_LOG, has_guard};
use crate::guard::peer::{OUTCOME, SOCKET};
use crate::journal::{Content, END, EndNote, Found, JOURNAL, JOURNAL_BYTES_MAX, OUTCOME_BYTES_MAX, Record};
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// What a directory that is being made begins with; backend ids are of letters, digits and `-`.
pub(crate) const ASIDE: &str = ".new-";

/// Why a backend was not made durable.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// Its id has a directory, so it was taken on before.
    #[error("its directory exists already")]
    Exists,
    /// The disk failed. Nothing or all of it may be there.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl BackendsDir {
    /// The backends that have a directory, or anything else under their name. What was only being made is removed.
    pub fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.path())? {
            let Ok(name) = entry?.file_name().into_string() else { continue };
            if name.starts_with(ASIDE) {
                // It was never part of anything; the next start tries again.
                let _ = fs::remove_dir_all(self.path().join(name));
            } else {
                names.push(name);
            }
        }
        Ok(names)
    }

    /// Makes a backend and its record durable.
    pub fn create_backend(&self, record: &Record) -> Result<(), CreateError> {
        let aside = self.path().join(format!("{ASIDE}{}", record.backend));
        match fs::remove_dir_all(&aside) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e.into()),
            _ => {}
        }
        let dir = self.path().join(&record.backend);
        if fs::symlink_metadata(&dir).is_ok() {
            return Err(CreateError::Exists);
        }
        fs::create_dir(&aside)?;
        write_synced(&aside.join(JOURNAL), &record.encode().map_err(io::Error::other)?)?;
        File::open(&aside)?.sync_all()?;
        match renameat2(AT_FDCWD, &aside, AT_FDCWD, &dir, RenameFlags::RENAME_NOREPLACE) {
            Ok(()) => {}
            Err(nix::errno::Errno::EEXIST) => return Err(CreateError::Exists),
            // A file system without it. No other process makes directories here, and it was not there before.
            Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOSYS) => fs::rename(&aside, &dir)?,
            Err(e) => return Err(io::Error::from(e).into()),
        }
        File::open(self.path())?.sync_all()?;
        Ok(())
    }

    /// Makes an end that was asked for durable. A later note replaces an earlier one.
    pub fn note_end(&self, backend: &str, note: &EndNote) -> io::Result<()> {
        let dir = self.path().join(backend);
        let aside = dir.join("end.new");
        write_synced(&aside, &note.encode().map_err(io::Error::other)?)?;
        fs::rename(&aside, dir.join(END))?;
        File::open(&dir)?.sync_all()
    }

    /// Reads a backend's directory. An error says nothing about the backend: look again.
    pub fn look(&self, backend: &str) -> io::Result<Found> {
        let dir = self.path().join(backend);
        if !fs::symlink_metadata(&dir).is_ok_and(|meta| meta.is_dir()) {
            // Not a directory that a drone has made: nothing was started in it.
            return Ok(Found::default());
        }
        // The lock before the outcome: a guard that ends meanwhile has written it by then.
        let guarded = has_guard(&dir.join(GUARD_LOG));
        Ok(Found {
            journal: read(&dir.join(JOURNAL), JOURNAL_BYTES_MAX)?,
            guarded,
            outcome: read(&dir.join(OUTCOME), OUTCOME_BYTES_MAX)?,
            end: read(&dir.join(END), JOURNAL_BYTES_MAX)?,
        })
    }

    /// The backend's end is acknowledged, or does not matter any more. Not synced: what comes back is only reported once
    /// more. The note goes last: while the journal is there, the note counts.
    pub fn forget_backend(&self, backend: &str) -> io::Result<()> {
        let dir = self.path().join(backend);
        let _ = fs::remove_file(dir.join(SOCKET));
        remove_any(&dir.join(JOURNAL))?;
        remove_any(&dir.join(END))
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// A file's content; of one that is too long, as much as is enough to be damaged. It does not wait for what is no file.
fn read(path: &Path, bytes_max: u64) -> io::Result<Content> {
    let file =
        match OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW).open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Content::None),
            // A link, a socket.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ELOOP | libc::ENXIO)) => {
                return Ok(Content::NoFile);
            }
            Err(e) => return Err(e),
        };
    if !file.metadata()?.is_file() {
        return Ok(Content::NoFile);
    }
    let mut content = Vec::new();
    file.take(bytes_max + 1).read_to_end(&mut content)?;
    Ok(Content::Bytes(content))
}

fn remove_any(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    match removed {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data_dir::DataDir;
    use crate::journal::{Boot, Fate, judge};
    use holdfast_wire::{KeyConfig, TerminationKind, TerminationReason};

    fn record(backend: &str) -> Record {
        Record {
            boot_id: "boot-1".into(),
            backend: backend.into(),
            key: KeyConfig::default(),
            token: 1,
            address: "127.0.0.1:20000".parse().unwrap(),
            soft_boot_ms: 1,
            hard_boot_ms: 2,
        }
    }

    fn fate(dirs: &BackendsDir, backend: &str) -> Fate {
        let boot = Boot { id: "boot-1".into(), same_machine: true };
        judge(backend, &dirs.look(backend).unwrap(), &boot).fate
    }

    #[test]
    fn an_id_whose_directory_exists_in_any_form_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let dirs = DataDir::open(dir.path()).unwrap().backends();
        let at = |name: &str| dir.path().join("backends").join(name);
        dirs.create_backend(&record("ba-1")).unwrap();
        assert_eq!(fate(&dirs, "ba-1"), Fate::Unguarded(record("ba-1")));
        dirs.forget_backend("ba-1").unwrap();
        assert_eq!(fate(&dirs, "ba-1"), Fate::Finished);
        fs::create_dir(at("ba-2")).unwrap();
        fs::write(at("ba-3"), "").unwrap();
        std::os::unix::fs::symlink("nowhere", at("ba-4")).unwrap();
        for backend in ["ba-1", "ba-2", "ba-3", "ba-4"] {
            let created = dirs.create_backend(&record(backend));
            assert!(matches!(created, Err(CreateError::Exists)), "{backend}: {created:?}");
        }
    }

    #[test]
    fn what_was_only_being_made_is_no_backend_and_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let dirs = DataDir::open(dir.path()).unwrap().backends();
        let aside = dir.path().join("backends").join(format!("{ASIDE}ba-1"));
        fs::create_dir(&aside).unwrap();
        fs::write(aside.join(JOURNAL), "to").unwrap();
        dirs.create_backend(&record("ba-1")).unwrap();
        fs::create_dir(&aside).unwrap();
        assert_eq!(dirs.names().unwrap(), ["ba-1"]);
        assert!(!aside.exists());
    }

    #[test]
    fn an_end_is_noted_replaced_and_forgotten_with_its_backend() {
        let dir = tempfile::tempdir().unwrap();
        let dirs = DataDir::open(dir.path()).unwrap().backends();
        dirs.create_backend(&record("ba-1")).unwrap();
        let boot = Boot { id: "boot-1".into(), same_machine: true };
        let noted = || judge("ba-1", &dirs.look("ba-1").unwrap(), &boot).end;
        for kind in [TerminationKind::Soft, TerminationKind::Hard] {
            let reason = TerminationReason::External;
            let note = EndNote { boot_id: "boot-1".into(), kind, reason, kill_boot_ms: 5 };
            dirs.note_end("ba-1", &note).unwrap();
            assert_eq!(noted(), Some(note));
        }
        dirs.forget_backend("ba-1").unwrap();
        assert_eq!(noted(), None);
        assert!(
            dirs.note_end(
                "ba-unknown",
                &EndNote {
                    boot_id: String::new(),
                    kind: TerminationKind::Soft,
                    reason: TerminationReason::External,
                    kill_boot_ms: 0,
                }
            )
            .is_err()
        );
    }

    #[test]
    fn what_is_no_file_is_read_without_waiting_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let dirs = DataDir::open(dir.path()).unwrap().backends();
        let at = |name: &str| dir.path().join("backends").join(name);
        fs::create_dir_all(at("ba-fifo")).unwrap();
        nix::unistd::mkfifo(&at("ba-fifo").join(JOURNAL), nix::sys::stat::Mode::S_IRWXU).unwrap();
        fs::create_dir_all(at("ba-dir").join(JOURNAL).join("more")).unwrap();
        fs::create_dir_all(at("ba-link")).unwrap();
        std::os::unix::fs::symlink("/dev/zero", at("ba-link").join(JOURNAL)).unwrap();
        for backend in ["ba-fifo", "ba-dir", "ba-link"] {
            assert!(matches!(fate(&dirs, backend), Fate::Damaged(_)), "{backend}");
            dirs.forget_backend(backend).unwrap();
            assert_eq!(fate(&dirs, backend), Fate::Finished, "{backend}");
        }
        dirs.create_backend(&record("ba-outcome")).unwrap();
        fs::create_dir(at("ba-outcome").join(OUTCOME)).unwrap();
        assert_eq!(fate(&dirs, "ba-outcome"), Fate::Unguarded(record("ba-outcome")));
    }
}
