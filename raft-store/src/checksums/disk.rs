//! What a replica remembers of checksums beside its databases, because it must hold before any of them is read and without
//! a leader.

use crate::files::{sync_dir, write_durably};
use holdfast_core::codec::{decode, encode};
use holdfast_core::records::ChecksumSplit;
use std::io;
use std::path::Path;

/// In the data directory of a replica that was stopped for good. Holds the reason.
const STOPPED: &str = "STOPPED-FOR-GOOD";
/// In the data directory of a replica that has learned of a split: [`Note`].
const NOTE: &str = "CHECKSUMS-DIFFER";

/// The split that a replica has learned of.
pub(super) type Note = ChecksumSplit;

fn read_if_there(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Why the replica of this data directory was stopped for good, if it was. An unreadable reason counts too.
pub(super) fn stopped(dir: &Path) -> io::Result<Option<String>> {
    let why = read_if_there(&dir.join(STOPPED))?;
    Ok(why.map(|bytes| String::from_utf8_lossy(&bytes).trim().to_owned()))
}

/// Durably stops the replica of this data directory.
pub(super) fn mark_stopped(dir: &Path, why: &str) -> io::Result<()> {
    let mark = dir.join(STOPPED);
    // On a full disk an empty file may still fit, and counts too.
    write_durably(&mark, format!("{why}\n").as_bytes()).or_else(|_| {
        std::fs::File::create(&mark).and_then(|file| file.sync_all()).and_then(|()| sync_dir(dir))
    })
}

/// The note, if there is one. A damaged one is an error: what it says can't be guessed.
pub(super) fn read_note(dir: &Path) -> io::Result<Option<Note>> {
    let path = dir.join(NOTE);
    let Some(bytes) = read_if_there(&path)? else { return Ok(None) };
    let note = decode(&bytes).map_err(|error| {
        let what = format!("{}: {error}; remove it to let this replica acquire keys again", path.display());
        io::Error::new(io::ErrorKind::InvalidData, what)
    })?;
    Ok(Some(note))
}

/// Durably writes the note, or removes it.
pub(super) fn write_note(dir: &Path, note: Option<&Note>) -> io::Result<()> {
    let path = dir.join(NOTE);
    match note {
        Some(note) => write_durably(&path, &encode(note)),
        None => match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => sync_dir(dir),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_and_a_mark_are_read_back_and_a_note_can_be_removed() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!((read_note(dir.path()).unwrap(), stopped(dir.path()).unwrap()), (None, None));
        let note = Note { index: 64, values: vec![(1, 7), (2, 8)] };
        write_note(dir.path(), Some(&note)).unwrap();
        assert_eq!(read_note(dir.path()).unwrap(), Some(note));
        write_note(dir.path(), None).unwrap();
        write_note(dir.path(), None).unwrap();
        assert_eq!(read_note(dir.path()).unwrap(), None);
        mark_stopped(dir.path(), "why").unwrap();
        assert_eq!(stopped(dir.path()).unwrap().as_deref(), Some("why"));
    }

    #[test]
    fn a_damaged_note_names_its_file() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(NOTE), b"x").unwrap();
        let error = read_note(dir.path()).unwrap_err().to_string();
        assert!(error.contains(NOTE), "{error}");
    }
}
