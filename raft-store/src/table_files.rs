//! Checks what describes a table: footer, index, filter, properties.
//!
//! Reading every row checks the blocks that hold rows. The rest of a table is not read by that, or is read when the table
//! is opened and then only missed: RocksDB goes on without a filter that is damaged, and of other blocks it names the
//! database and not the file. Here every block of the description is read and its file named.
//!
//! The format (RocksDB, `table/format.cc`, versions 6 and 7 of the footer): the file ends with a footer of 53 bytes, and in
//! front of it is the *metaindex* block, whose rows give offset and size of every other block of the description. Behind
//! each block stand a byte (its compression) and four bytes of checksum, which depends on the place too. The format of a
//! later RocksDB is not judged: it has checksums of its own.

use crate::log_files::Damage;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::xxh3_64;

const FOOTER_BYTES: usize = 53;
/// Compression and checksum behind a block.
const TRAILER_BYTES: usize = 5;
const MAGIC: u64 = 0x88e2_41b7_85f4_cff7;
const EXTENDED_MAGIC: [u8; 4] = [0x3e, 0, 0x7a, 0];
const XXH3: u8 = 4;
const VERSIONS: std::ops::RangeInclusive<u32> = 6..=7;
/// Multiplies the last byte into a checksum.
const LAST_BYTE_FACTOR: u32 = 0x6b90_83d9;
/// Bits of a block's last word that are not the number of its restarts.
const RESTARTS_FLAGS: u32 = 0xf000_0000;
/// Largest block of a description that is read, in bytes: an index or a filter of a table of many GiB.
const BLOCK_BYTES_MAX: u64 = 1 << 30;

fn checksum(content: &[u8], last_byte: u8) -> u32 {
    (xxh3_64(content) as u32) ^ u32::from(last_byte).wrapping_mul(LAST_BYTE_FACTOR)
}

fn of_place(base: u32, offset: u64) -> u32 {
    base ^ (offset as u32).wrapping_add((offset >> 32) as u32)
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Takes a number of variable length off the front.
fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// Name, offset and size of each block that a metaindex lists.
fn listed(block: &[u8]) -> Option<Vec<(String, u64, u64)>> {
    let restarts = word(block, block.len().checked_sub(4)?)? & !RESTARTS_FLAGS;
    let rows_end = block.len().checked_sub(4 + 4 * restarts as usize)?;
    let (mut rows, mut found, mut key) = (block.get(..rows_end)?, Vec::new(), Vec::<u8>::new());
    while !rows.is_empty() {
        let (shared, own, value) = (varint(&mut rows)?, varint(&mut rows)?, varint(&mut rows)?);
        key.truncate(usize::try_from(shared).ok()?);
        let (own, value) = (usize::try_from(own).ok()?, usize::try_from(value).ok()?);
        key.extend_from_slice(rows.get(..own)?);
        let mut handle = rows.get(own..own.checked_add(value)?)?;
        rows = rows.get(own + value..)?;
        let place = (varint(&mut handle)?, varint(&mut handle)?);
        found.push((String::from_utf8_lossy(&key).into_owned(), place.0, place.1));
    }
    Some(found)
}

struct Table<'a> {
    path: &'a Path,
    file: File,
    /// Where the footer begins.
    footer_at: u64,
    /// Makes checksums depend on the file and the place.
    base: u32,
}

impl Table<'_> {
    fn damaged(&self, what: impl Into<String>) -> io::Error {
        Damage { file: self.path.to_owned(), what: what.into() }.into()
    }

    /// A block's content; an error if its checksum does not fit.
    fn block(&self, name: &str, offset: u64, size: u64) -> io::Result<Vec<u8>> {
        let end = offset.checked_add(size).and_then(|end| end.checked_add(TRAILER_BYTES as u64));
        if size > BLOCK_BYTES_MAX || end.is_none_or(|end| end > self.footer_at) {
            return Err(self.damaged(format!("its {name} can't be at offset {offset} with {size} bytes")));
        }
        let mut content = vec![0; size as usize + TRAILER_BYTES];
        self.file.read_exact_at(&mut content, offset)?;
        let trailer = content.split_off(size as usize);
        let found = checksum(&content, trailer[0]).wrapping_add(of_place(self.base, offset));
        if word(&trailer, 1) != Some(found) {
            return Err(self.damaged(format!("the checksum of its {name} at offset {offset} does not fit")));
        }
        Ok(content)
    }
}

/// Checks the description of a table. An error of kind `InvalidData` names the file and the block.
pub fn check_table(path: &Path) -> io::Result<()> {
    let damaged = |what: &str| io::Error::from(Damage { file: path.to_owned(), what: what.to_owned() });
    let file = File::open(path)?;
    let footer_at = file.metadata()?.len().checked_sub(FOOTER_BYTES as u64);
    let Some(footer_at) = footer_at else { return Err(damaged("it is too short for a table")) };
    let mut footer = [0; FOOTER_BYTES];
    file.read_exact_at(&mut footer, footer_at)?;
    let word_at = |at: usize| word(&footer, at).unwrap_or_default();
    let magic = u64::from(word_at(45)) | u64::from(word_at(49)) << 32;
    if magic != MAGIC {
        return Err(damaged("it does not end as a table does"));
    }
    if !VERSIONS.contains(&word_at(41)) {
        return Ok(());
    }
    let (stored, base, metaindex_bytes) = (word_at(5), word_at(9), u64::from(word_at(13)));
    let mut without = footer;
    without[5..9].fill(0);
    let (last, rest) = (without[FOOTER_BYTES - 1], &without[..FOOTER_BYTES - 1]);
    let found = checksum(rest, last).wrapping_add(of_place(base, footer_at));
    if footer[0] != XXH3 || footer[1..5] != EXTENDED_MAGIC || found != stored {
        return Err(damaged("the checksum of its footer does not fit"));
    }
    let table = Table { path, file, footer_at, base };
    let metaindex_at = footer_at.checked_sub(metaindex_bytes + TRAILER_BYTES as u64);
    let Some(metaindex_at) = metaindex_at else {
        return Err(table.damaged("its metaindex would begin before the file"));
    };
    let metaindex = table.block("metaindex", metaindex_at, metaindex_bytes)?;
    let Some(blocks) = listed(&metaindex) else { return Err(table.damaged("its metaindex can't be read")) };
    for (name, offset, size) in blocks {
        table.block(&name, offset, size)?;
    }
    Ok(())
}

/// The tables in `dir` that are damaged, with what is wrong: to name them when RocksDB names only the database.
pub fn damaged_tables(dir: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let tables = entries.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "sst"));
    let mut tables: Vec<PathBuf> = tables.collect();
    tables.sort();
    tables.iter().filter_map(|table| Some(check_table(table).err()?.to_string())).collect()
}

/// RocksDB's error about the database in `dir`, with the tables that are found to be damaged.
pub fn with_damaged_tables(dir: &Path, error: &rocksdb::Error) -> String {
    let damaged = damaged_tables(dir);
    if damaged.is_empty() {
        format!("{}: {error}", dir.display())
    } else {
        format!("{} ({}: {error})", damaged.join("; "), dir.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rocksdb::{BlockBasedOptions, DB, Options};
    use std::fs;

    fn table(dir: &Path, rows: u32) -> PathBuf {
        let mut options = Options::default();
        options.create_if_missing(true);
        let mut blocks = BlockBasedOptions::default();
        blocks.set_bloom_filter(10.0, false);
        options.set_block_based_table_factory(&blocks);
        let db = DB::open(&options, dir).unwrap();
        for i in 0..rows {
            db.put(i.to_be_bytes(), [7; 20]).unwrap();
        }
        db.flush().unwrap();
        let file = db.live_files().unwrap().remove(0);
        dir.join(file.name.trim_start_matches('/'))
    }

    #[test]
    fn a_table_is_whole_and_every_flipped_bit_of_its_description_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = table(&dir.path().join("db"), 300);
        check_table(&path).unwrap();
        let content = fs::read(&path).unwrap();
        let (mut in_description, mut first) = (0, content.len());
        for at in 0..content.len() {
            let mut flipped = content.clone();
            flipped[at] ^= 1 << (at % 8);
            let copy = dir.path().join("copy.sst");
            fs::write(&copy, flipped).unwrap();
            match check_table(&copy) {
                Err(error) => {
                    assert!(error.to_string().contains("copy.sst is damaged"), "{at}: {error}");
                    in_description += 1;
                    first = first.min(at);
                }
                // The format of another version; RocksDB itself compares the footer's checksum then.
                Ok(()) => {
                    assert!(at < first || at >= content.len() - 12, "{at} of {first}..{}", content.len())
                }
            }
        }
        // Filter, index, properties, metaindex, footer: all of it, from the end of the rows on.
        assert!(in_description >= content.len() - first - 4, "{in_description} of {}", content.len() - first);
        assert!(first > 0 && content.len() - first > 1_000, "{first} of {}", content.len());
    }

    #[test]
    fn every_flipped_bit_of_a_table_is_found_by_reading_its_rows_and_its_description() {
        let dir = tempfile::tempdir().unwrap();
        let db = dir.path().join("db");
        let path = table(&db, 40);
        let content = fs::read(&path).unwrap();
        for at in 0..content.len() {
            let mut flipped = content.clone();
            flipped[at] ^= 0x10;
            fs::write(&path, flipped).unwrap();
            let rows = || -> Result<(), rocksdb::Error> {
                let db = DB::open_for_read_only(&Options::default(), &db, false)?;
                db.iterator(rocksdb::IteratorMode::Start).try_for_each(|row| row.map(drop))
            };
            assert!(check_table(&path).is_err() || rows().is_err(), "byte {at} of {}", content.len());
        }
    }

    #[test]
    fn what_is_no_table_is_named() {
        let dir = tempfile::tempdir().unwrap();
        for content in [&b""[..], &[0; 52], &[0; 53], &[0xff; 4_000]] {
            let path = dir.path().join("000009.sst");
            fs::write(&path, content).unwrap();
            assert!(check_table(&path).unwrap_err().to_string().contains("000009.sst is damaged"));
            assert_eq!(damaged_tables(dir.path()).len(), 1);
        }
    }
}
