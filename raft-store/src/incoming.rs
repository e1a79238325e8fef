//! A snapshot on its way here from a leader, kept in pieces until it is whole: a transfer that breaks goes on where it
//! stopped, also after a restart of either side.
//!
//! ```text
//! snapshots/incoming-4/          what has arrived from member 4
//! snapshots/incoming-4.header    what is to arrive: description and files
//! ```
//!
//! What is on disk is all there is to know. To go on, the receiver says how far it is and the checksum of everything
//! before; the sender compares it with its own files and begins there, or at the start. So a torn or damaged piece costs a
//! transfer, never a wrong snapshot.
//!
//! Bounded: one transfer at a time, and the pieces of one. A newer connection takes over from one that may be dead.

use crate::files::{remove_dir_if_there, sync_dir, write_durably};
use crate::transport::wire::SnapshotHeader;
use crate::types::Vote;
use holdfast_core::codec::encode;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use tokio::sync::{Mutex as AsyncMutex, MutexGuard};
use tokio_util::sync::CancellationToken;

/// Bytes read at once for a checksum.
const READ_BYTES: usize = 1 << 20;

/// How far a transfer is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Place {
    /// Number of the file in the header that comes next.
    pub file: usize,
    /// Bytes of it that are there.
    pub offset: u64,
    /// Checksum (CRC-32) of everything before, over all files.
    pub crc: u32,
}

/// Where snapshots arrive: one at a time.
#[derive(Default)]
pub struct Incoming {
    place: AsyncMutex<()>,
    current: Mutex<Option<(Vote, CancellationToken)>>,
}

/// The right to receive. `cancelled` says that a newer transfer waits for it.
pub struct Turn<'a> {
    /// Cancelled when another transfer wants to begin.
    pub cancelled: CancellationToken,
    _place: MutexGuard<'a, ()>,
}

impl Incoming {
    /// Waits for the right to receive. `None`: a newer leader is sending.
    pub async fn enter(&self, vote: Vote) -> Option<Turn<'_>> {
        let cancelled = CancellationToken::new();
        {
            let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((held, earlier)) = current.as_ref() {
                if *held > vote {
                    return None;
                }
                earlier.cancel();
            }
            *current = Some((vote, cancelled.clone()));
        }
        Some(Turn { cancelled, _place: self.place.lock().await })
    }
}

/// The pieces of one snapshot.
#[derive(Debug)]
pub struct Partial {
    /// Where they are.
    pub dir: PathBuf,
    header: PathBuf,
    files: Vec<(String, u64)>,
}

/// Whether an entry of the snapshots' directory belongs to a transfer.
pub fn is_incoming(name: &str) -> bool {
    name.starts_with("incoming-")
}

/// Adds what `path` holds, up to `bytes`, to a checksum. Gives how much there was.
fn add_file(hash: &mut crc32fast::Hasher, path: &Path, bytes: u64) -> io::Result<u64> {
    let mut source = File::open(path)?.take(bytes);
    let mut buffer = vec![0; READ_BYTES];
    let mut done = 0;
    loop {
        let read = match source.read(&mut buffer) {
            Ok(0) => return Ok(done),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        hash.update(&buffer[..read]);
        done += read as u64;
    }
}

/// Checksum of `files` in `dir` before `place`. An error if they are shorter than that.
pub fn checksum_before(dir: &Path, files: &[(String, u64)], file: usize, offset: u64) -> io::Result<u32> {
    let mut hash = crc32fast::Hasher::new();
    for (number, (name, size)) in files.iter().enumerate().take(file.saturating_add(1)) {
        let bytes = if number < file { *size } else { offset };
        if bytes > *size || (bytes > 0 && add_file(&mut hash, &dir.join(name), bytes)? != bytes) {
            return Err(io::Error::other(format!("{name} is shorter than {bytes} bytes")));
        }
    }
    Ok(hash.finalize())
}

impl Partial {
    /// Finds the pieces of this snapshot from `sender`, or makes room for them; removes those of any other.
    pub fn open(root: &Path, sender: u64, header: &SnapshotHeader) -> io::Result<(Self, Place)> {
        let name = format!("incoming-{sender}");
        let this = Self {
            dir: root.join(&name),
            header: root.join(format!("{name}.header")),
            files: header.files.clone(),
        };
        for entry in std::fs::read_dir(root)? {
            let entry = entry?;
            let path = entry.path();
            if is_incoming(&entry.file_name().to_string_lossy()) && path != this.dir && path != this.header {
                if entry.file_type()?.is_dir() {
                    remove_dir_if_there(&path)?
                } else {
                    std::fs::remove_file(&path)?
                }
            }
        }
        // Not the vote: another term of the same leader sends the same snapshot.
        let described = encode(&(header.meta.clone(), header.files.clone()));
        let same = std::fs::read(&this.header).is_ok_and(|found| found == described);
        if same
            && this.dir.is_dir()
            && let Some(place) = this.place()?
        {
            return Ok((this, place));
        }
        this.remove()?;
        std::fs::create_dir_all(&this.dir)?;
        write_durably(&this.header, &described)?;
        Ok((this, Place::default()))
    }

    /// How far the pieces go. `None`: they are not what they should be.
    fn place(&self) -> io::Result<Option<Place>> {
        let mut hash = crc32fast::Hasher::new();
        for (file, (name, size)) in self.files.iter().enumerate() {
            let path = self.dir.join(name);
            let there = match std::fs::metadata(&path) {
                Ok(meta) => meta.len(),
                Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
                Err(error) => return Err(error),
            };
            if there > *size {
                return Ok(None);
            }
            if there > 0 {
                add_file(&mut hash, &path, there)?;
            }
            if there < *size {
                return Ok(Some(Place { file, offset: there, crc: hash.finalize() }));
            }
            // An empty file is complete once it is there.
            if *size == 0 {
                File::create(&path)?;
            }
        }
        Ok(Some(Place { file: self.files.len(), offset: 0, crc: hash.finalize() }))
    }

    /// Forgets what has arrived.
    pub fn restart(&self) -> io::Result<()> {
        remove_dir_if_there(&self.dir)?;
        std::fs::create_dir_all(&self.dir)
    }

    /// Makes everything that has arrived durable.
    pub fn sync(&self) -> io::Result<()> {
        for (name, _) in &self.files {
            File::open(self.dir.join(name))?.sync_all()?;
        }
        sync_dir(&self.dir)
    }

    /// Removes the description, once the directory has become a snapshot (or is gone).
    pub fn forget(&self) -> io::Result<()> {
        match std::fs::remove_file(&self.header) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Removes everything.
    pub fn remove(&self) -> io::Result<()> {
        self.forget()?;
        remove_dir_if_there(&self.dir)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{WireLogId, WireMembership, WireSnapshotMeta, WireStoredMembership, WireVote};

    fn header(index: u64, files: &[(&str, u64)]) -> SnapshotHeader {
        let membership = WireMembership { configs: Vec::new(), nodes: Default::default() };
        SnapshotHeader {
            vote: WireVote { term: 1, node: 1, committed: true },
            meta: WireSnapshotMeta {
                last_log_id: Some(WireLogId { term: 1, index }),
                membership: WireStoredMembership { log_id: None, membership },
            },
            files: files.iter().map(|(name, size)| ((*name).to_owned(), *size)).collect(),
        }
    }

    #[test]
    fn a_transfer_goes_on_where_it_stopped_and_both_sides_compute_the_same_checksum() {
        let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let files = [("a", 5), ("b", 0), ("c", 6)];
        for (name, content) in [("a", "12345"), ("b", ""), ("c", "abcdef")] {
            std::fs::write(there.path().join(name), content).unwrap();
        }
        let wanted = header(7, &files);
        let (partial, place) = Partial::open(here.path(), 2, &wanted).unwrap();
        assert_eq!(place, Place::default());
        std::fs::write(partial.dir.join("a"), "12345").unwrap();
        std::fs::write(partial.dir.join("c"), "abc").unwrap();
        // Also in another term, and after a restart.
        let mut again = wanted.clone();
        again.vote.term = 9;
        let (partial, place) = Partial::open(here.path(), 2, &again).unwrap();
        assert_eq!((place.file, place.offset), (2, 3));
        let sent = checksum_before(there.path(), &wanted.files, place.file, place.offset).unwrap();
        assert_eq!(place.crc, sent);
        // A changed byte is noticed.
        std::fs::write(partial.dir.join("c"), "abX").unwrap();
        let (_, place) = Partial::open(here.path(), 2, &wanted).unwrap();
        assert_ne!(place.crc, checksum_before(there.path(), &wanted.files, 2, 3).unwrap());
        std::fs::write(partial.dir.join("c"), "abcdef").unwrap();
        let (_, place) = Partial::open(here.path(), 2, &wanted).unwrap();
        assert_eq!((place.file, place.offset), (3, 0));
        assert_eq!(place.crc, checksum_before(there.path(), &wanted.files, 3, 0).unwrap());
    }

    #[test]
    fn pieces_of_another_snapshot_or_too_many_bytes_are_thrown_away() {
        let root = tempfile::tempdir().unwrap();
        let wanted = header(7, &[("a", 5)]);
        let (partial, _) = Partial::open(root.path(), 2, &wanted).unwrap();
        std::fs::write(partial.dir.join("a"), "123456").unwrap();
        assert_eq!(Partial::open(root.path(), 2, &wanted).unwrap().1, Place::default());
        std::fs::write(partial.dir.join("a"), "123").unwrap();
        assert_eq!(Partial::open(root.path(), 2, &header(8, &[("a", 5)])).unwrap().1, Place::default());
        std::fs::write(partial.dir.join("a"), "123").unwrap();
        // Another leader's begins; at most one is kept.
        assert_eq!(Partial::open(root.path(), 3, &wanted).unwrap().1, Place::default());
        let names: Vec<_> = std::fs::read_dir(root.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2, "{names:?}");
        assert!(!partial.dir.exists());
    }

    #[test]
    fn a_place_beyond_the_senders_files_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a"), "123").unwrap();
        assert!(checksum_before(dir.path(), &[("a".to_owned(), 3)], 0, 4).is_err());
        assert!(checksum_before(dir.path(), &[("a".to_owned(), 9)], 0, 4).is_err());
    }
}
