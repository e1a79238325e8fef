//! Looks at RocksDB's files before RocksDB does: it forgives more than a Raft member may.
//!
//! RocksDB takes a record whose length is damaged so that it reaches beyond the end of the file for one that was being
//! written, skips a header of zeroes, starts an empty database where `CURRENT` is missing, and does not miss a write-ahead
//! log. Each of these can silently drop what was acknowledged. So the files in its log format (write-ahead logs, `MANIFEST`)
//! are read here first. A file is
//!
//! - *whole*;
//! - *torn*: its end is what a power loss leaves of the last write, which nobody was told is durable. The end is cut off,
//!   and the log says so;
//! - *damaged*: anything else. The replica refuses to start and names the file and the place.
//!
//! How torn and damaged are told apart: a torn write is the last record, with nothing whole behind it, and part of it is
//! not there: the file ends early, or a page that did not reach the disk reads as zeroes. A record that is all there and
//! whose checksum does not fit is damaged, and so is one whose length is wrong (some shorter length fits the checksum).
//! This needs every write but the last to be synced, which the log store sees to. What can't be told apart: a file that was
//! cut at the end of a record *after* its sync. That is a disk that lies about what it has stored.
//!
//! The format (RocksDB, `db/log_format.h`): blocks of 32 KiB; in them fragments of a masked CRC-32C over type and payload,
//! a length of two bytes, and a type (whole, first, middle, last); up to six bytes at the end of a block are unused.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

const BLOCK: usize = 32 * 1024;
const HEADER: usize = 7;
/// What a lost page leaves is zeroes up to a multiple of this.
const PAGE: usize = 4096;
/// Fewer zeroes than this could be data.
const ZEROES_MIN: usize = 16;

const FULL: u8 = 1;
const FIRST: u8 = 2;
const MIDDLE: u8 = 3;
const LAST: u8 = 4;
/// Types that describe the file: user-defined timestamps, the predecessor of a WAL.
const DESCRIPTIONS: [u8; 2] = [10, 130];

/// A file that must not be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{} is damaged: {what}", .file.display())]
pub struct Damage {
    /// The file.
    pub file: PathBuf,
    /// What is wrong, and where.
    pub what: String,
}

impl From<Damage> for io::Error {
    fn from(damage: Damage) -> Self {
        Self::new(io::ErrorKind::InvalidData, damage.to_string())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Whole,
    /// The last write begins here and is not all there.
    Torn(usize),
}

/// Whether every write to the write-ahead log but the last is known to be synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wal {
    /// They are: whatever is damaged stops the replica.
    Synced,
    /// They are not: how much of it is left is not known, and the Raft log brings the rest again.
    Unsynced,
}

fn masked_crc(mut crc: u32, bytes: &[u8]) -> u32 {
    crc = crc32c::crc32c_append(crc, bytes);
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// A fragment at `at`, if a whole one is there: its type and its end.
fn fragment(content: &[u8], at: usize) -> Option<(u8, usize)> {
    let header = content.get(at..at + HEADER)?;
    let crc = u32::from_le_bytes(header[..4].try_into().ok()?);
    let len = usize::from(u16::from_le_bytes([header[4], header[5]]));
    let end = at + HEADER + len;
    let block_end = (at / BLOCK + 1) * BLOCK;
    if end > block_end || end > content.len() || (header[6] == 0 && len == 0) {
        return None;
    }
    (masked_crc(0, &content[at + 6..end]) == crc).then_some((header[6], end))
}

/// The next place where a fragment can begin.
fn next(at: usize) -> usize {
    let left = BLOCK - at % BLOCK;
    if left < HEADER { at + left } else { at }
}

fn examine(content: &[u8]) -> Result<Found, String> {
    let mut at = 0;
    // Where the record began whose end has not come yet.
    let mut open: Option<usize> = None;
    while at < content.len() {
        at = next(at);
        if at >= content.len() {
            break;
        }
        let Some((kind, end)) = fragment(content, at) else {
            return broken(content, at, open.unwrap_or(at));
        };
        match (kind, open) {
            (FULL, None) => {}
            (FIRST, None) => open = Some(at),
            (MIDDLE, Some(_)) => {}
            (LAST, Some(_)) => open = None,
            (kind, None) if DESCRIPTIONS.contains(&kind) => {}
            (kind, _) => return Err(format!("a fragment of type {kind} does not fit there (offset {at})")),
        }
        at = end;
    }
    Ok(open.map_or(Found::Whole, Found::Torn))
}

/// There is no whole fragment at `at`; the record that it belongs to begins at `record`.
fn broken(content: &[u8], at: usize, record: usize) -> Result<Found, String> {
    let block_end = (at / BLOCK + 1) * BLOCK;
    // Something whole that begins behind it was written later, and so this was synced.
    let mut block = block_end;
    while block < content.len() {
        let mut inside = block;
        while let Some((kind, end)) = fragment(content, inside) {
            if kind != MIDDLE && kind != LAST {
                return Err(format!(
                    "what begins at offset {record} can't be read, and more follows at {inside}"
                ));
            }
            inside = next(end);
            if inside >= block + BLOCK {
                break;
            }
        }
        block += BLOCK;
    }
    let rest = &content[at..];
    let Some(header) = rest.get(..HEADER) else { return Ok(Found::Torn(record)) };
    let len = usize::from(u16::from_le_bytes([header[4], header[5]]));
    if at + HEADER + len <= block_end
        && let Some((FULL | FIRST, _)) = fragment(content, next(at + HEADER + len))
    {
        return Err(format!("the checksum of the record at offset {record} does not fit"));
    }
    // Zeroes up to the end of a page or of the file: a page that was never written.
    let lost_page = (at / PAGE..content.len().div_ceil(PAGE)).any(|page| {
        let end = ((page + 1) * PAGE).min(content.len());
        let zeroes = content[at.max(page * PAGE)..end].iter().rev().take_while(|byte| **byte == 0).count();
        zeroes >= ZEROES_MIN.min(end - at)
    });
    let short = at + HEADER + len > content.len();
    if !lost_page && (!short || at + HEADER + len > block_end) {
        return Err(format!("the checksum of the record at offset {record} does not fit"));
    }
    // Is it all there under another length?
    let crc = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let payload = &rest[HEADER..rest.len().min(block_end - at)];
    let mut running = crc32c::crc32c(&header[6..]);
    for (len, byte) in payload.iter().enumerate() {
        if masked_crc(running, &[]) == crc && header[6] != 0 {
            return Err(format!("the length of the record at offset {record} is wrong; {len} would fit"));
        }
        running = crc32c::crc32c_append(running, &[*byte]);
    }
    if masked_crc(running, &[]) == crc && header[6] != 0 {
        return Err(format!(
            "the length of the record at offset {record} is wrong; {} would fit",
            payload.len()
        ));
    }
    Ok(Found::Torn(record))
}

fn damage(file: &Path, what: impl Into<String>) -> Damage {
    Damage { file: file.to_owned(), what: what.into() }
}

/// Examines a file; cuts a torn end off if it may have one.
fn check(file: &Path, may_be_torn: bool) -> io::Result<()> {
    let content = fs::read(file)?;
    match examine(&content).map_err(|what| damage(file, what))? {
        Found::Whole => Ok(()),
        Found::Torn(at) if may_be_torn => {
            let lost = content.len() - at;
            tracing::warn!(file = %file.display(), at, bytes = lost, "the last write was torn by a crash; it is cut off");
            let writable = OpenOptions::new().write(true).open(file)?;
            writable.set_len(at as u64)?;
            writable.sync_all()
        }
        Found::Torn(at) => Err(damage(file, format!("it ends within the record at offset {at}")).into()),
    }
}

/// Checks the database in `dir` as far as RocksDB would not. Nothing, if there is none yet.
pub fn check_db(dir: &Path, wal: Wal) -> io::Result<()> {
    let mut wals = Vec::new();
    let (mut tables, mut manifests) = (false, false);
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        if let Some(number) = name.strip_suffix(".log").and_then(|number| number.parse::<u64>().ok()) {
            wals.push((number, dir.join(&*name)));
        }
        tables |= name.ends_with(".sst");
        manifests |= name.starts_with("MANIFEST-");
    }
    wals.sort();
    let current = dir.join("CURRENT");
    let manifest = match fs::read_to_string(&current) {
        Ok(text) => text,
        // A first start may have been cut short before it made anything but a manifest.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return if tables || !wals.is_empty() {
                Err(damage(&current, "it is missing, though the database is there").into())
            } else {
                Ok(())
            };
        }
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            return Err(damage(&current, "it is not text").into());
        }
        Err(error) => return Err(error),
    };
    let named = manifest.strip_suffix('\n').filter(|name| {
        name.strip_prefix("MANIFEST-").is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
    });
    let Some(named) = named else {
        return Err(damage(&current, format!("it holds {manifest:?}, not the name of a manifest")).into());
    };
    let manifest = dir.join(named);
    if !manifest.try_exists()? {
        let also = if manifests { ", though there are others" } else { "" };
        return Err(damage(&manifest, format!("it is missing{also}; CURRENT names it")).into());
    }
    check(&manifest, true)?;
    if wals.is_empty()
        && named.trim_start_matches("MANIFEST-").parse::<u64>().is_ok_and(|n| n > FIRST_MANIFEST)
    {
        return Err(
            damage(&dir.join("*.log"), "there is no write-ahead log; every open database has one").into()
        );
    }
    if wal == Wal::Synced {
        let newest = wals.len().saturating_sub(1);
        for (at, (_, file)) in wals.iter().enumerate() {
            check(file, at == newest)?;
        }
    }
    Ok(())
}

/// The manifest that a new database begins with; it has no write-ahead log yet.
const FIRST_MANIFEST: u64 = 1;

/// Opens and syncs a directory's parent, so that the directory itself is durable.
pub fn sync_parent(dir: &Path) -> io::Result<()> {
    match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => File::open(parent)?.sync_all(),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes records as RocksDB does.
    fn write(records: &[Vec<u8>]) -> Vec<u8> {
        let mut out = Vec::new();
        for record in records {
            let mut rest = &record[..];
            let mut begin = true;
            loop {
                let left = BLOCK - out.len() % BLOCK;
                if left < HEADER {
                    out.resize(out.len() + left, 0);
                    continue;
                }
                let take = rest.len().min(left - HEADER);
                let end = take == rest.len();
                let kind = match (begin, end) {
                    (true, true) => FULL,
                    (true, false) => FIRST,
                    (false, false) => MIDDLE,
                    (false, true) => LAST,
                };
                let mut body = vec![kind];
                body.extend(&rest[..take]);
                out.extend(masked_crc(0, &body).to_le_bytes());
                out.extend(u16::try_from(take).unwrap().to_le_bytes());
                out.extend(body);
                rest = &rest[take..];
                begin = false;
                if end {
                    break;
                }
            }
        }
        out
    }

    fn records() -> Vec<Vec<u8>> {
        let noise = |len: usize, seed: usize| {
            (0..len).map(|i| u8::try_from((i * 31 + seed * 7 + i / 251) % 255).unwrap() + 1).collect()
        };
        vec![noise(100, 1), noise(70_000, 2), noise(0, 3), noise(9_000, 4), noise(50, 5)]
    }

    #[test]
    fn what_was_written_whole_is_whole() {
        assert_eq!(examine(&[]), Ok(Found::Whole));
        assert_eq!(examine(&write(&records())), Ok(Found::Whole));
    }

    #[test]
    fn a_file_cut_anywhere_in_its_last_record_is_torn_at_its_beginning() {
        let mut all = records();
        all.push(vec![9; 40_000]);
        let before = write(&all[..all.len() - 1]).len();
        let content = write(&all);
        for end in (before + 1..content.len()).step_by(97) {
            assert_eq!(examine(&content[..end]), Ok(Found::Torn(before)), "cut at {end}");
        }
        assert_eq!(examine(&content[..before]), Ok(Found::Whole));
    }

    #[test]
    fn pages_that_never_reached_the_disk_are_torn_not_damaged() {
        let mut all = records();
        all.push(vec![9; 40_000]);
        let before = write(&all[..all.len() - 1]).len();
        let content = write(&all);
        for page in before.div_ceil(PAGE)..content.len() / PAGE {
            let mut lost = content.clone();
            lost[page * PAGE..(page + 1) * PAGE].fill(0);
            assert_eq!(examine(&lost), Ok(Found::Torn(before)), "page {page}");
        }
        let mut all_lost = content.clone();
        all_lost[before..].fill(0);
        assert_eq!(examine(&all_lost), Ok(Found::Torn(before)));
    }

    #[test]
    fn every_flipped_bit_is_damage() {
        let content = write(&records());
        let last = write(&records()[..4]).len();
        // Every bit of the last record and of the headers of some others, and one bit of many other bytes.
        let every = (last..content.len()).chain(0..8).flat_map(|at| (0..8).map(move |bit| (at, bit)));
        for (at, bit) in every.chain((0..last).step_by(13).map(|at| (at, at % 8))) {
            let mut flipped = content.clone();
            flipped[at] ^= 1 << bit;
            let block_trailer = BLOCK - at % BLOCK < HEADER && fragment(&content, next(at)).is_some();
            let found = examine(&flipped);
            assert!(found.is_err() || block_trailer, "byte {at} bit {bit}: {found:?}");
        }
    }

    #[test]
    fn a_lost_page_in_the_middle_is_damage() {
        let content = write(&records());
        let mut lost = content.clone();
        lost[PAGE..2 * PAGE].fill(0);
        assert!(examine(&lost).is_err());
        // Even a whole block of zeroes, which RocksDB would skip.
        let mut lost = content;
        lost[BLOCK..2 * BLOCK].fill(0);
        assert!(examine(&lost).is_err());
    }

    #[test]
    fn a_database_without_its_current_file_or_its_write_ahead_log_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        let mut options = rocksdb::Options::default();
        options.create_if_missing(true);
        check_db(&path, Wal::Synced).unwrap();
        for i in 0..3_u8 {
            let db = rocksdb::DB::open(&options, &path).unwrap();
            db.put([i], [i]).unwrap();
            drop(db);
            check_db(&path, Wal::Synced).unwrap();
        }
        let name = |wanted: &dyn Fn(&str) -> bool| {
            let mut names =
                fs::read_dir(&path).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
            names.find(|name| wanted(name)).unwrap()
        };
        for wanted in
            ["CURRENT".to_owned(), name(&|n| n.starts_with("MANIFEST")), name(&|n| n.ends_with(".log"))]
        {
            let (from, to) = (path.join(&wanted), dir.path().join("away"));
            fs::rename(&from, &to).unwrap();
            let error = check_db(&path, Wal::Synced).unwrap_err().to_string();
            assert!(error.contains(&wanted) || error.contains("*.log"), "{wanted}: {error}");
            fs::rename(&to, &from).unwrap();
        }
        fs::write(path.join("CURRENT"), "MANIFEST-00000x\n").unwrap();
        assert!(check_db(&path, Wal::Synced).unwrap_err().to_string().contains("CURRENT"));
    }

    #[test]
    fn a_torn_end_is_cut_off_and_the_file_is_whole_then() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("000004.log");
        let content = write(&records());
        fs::write(&file, &content[..content.len() - 1]).unwrap();
        assert!(check(&file, false).is_err());
        check(&file, true).unwrap();
        assert_eq!(examine(&fs::read(&file).unwrap()), Ok(Found::Whole));
        assert_eq!(fs::read(&file).unwrap(), write(&records()[..4]));
    }
}
