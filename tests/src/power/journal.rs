//! The journal that the shim and the test's clients write.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

const MAGIC: u32 = 0x4654_4c46;
const HEADER_BYTES: usize = 32;
const KIND_MARK: u8 = 13;

/// What was done. Paths are below the watched directory.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "inodes, paths, offsets and numbers of syncs are what they are called")]
pub enum Op {
    /// A new file.
    Create { ino: u64, path: String },
    /// A file has another length.
    Truncate { ino: u64, size: u64 },
    /// Bytes (of the journal) were written.
    Write { ino: u64, offset: u64, data: Range<usize> },
    /// A sync of a file began.
    SyncBegin { ino: u64, id: u64 },
    /// It ended well.
    SyncEnd { ino: u64, id: u64 },
    /// A sync of a directory began.
    DirSyncBegin { path: String, id: u64 },
    /// It ended well.
    DirSyncEnd { path: String, id: u64 },
    /// A name was moved.
    Rename { from: String, to: String },
    /// A file's name was removed.
    Unlink { path: String },
    /// A file got another name.
    Link { from: String, to: String },
    /// A directory was made.
    MakeDir { path: String },
    /// A directory was removed.
    RemoveDir { path: String },
    /// Something that the test wrote.
    Mark(String),
}

/// One record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Whose disk.
    pub node: u8,
    /// What.
    pub op: Op,
}

/// A whole journal.
#[derive(Debug)]
pub struct Journal {
    /// In the order in which things happened.
    pub records: Vec<Record>,
    /// What [`Op::Write`] points into.
    pub bytes: Arc<Vec<u8>>,
}

impl Journal {
    /// Reads a journal. Panics on what the shim could not record.
    pub fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).expect("the journal");
        let mut records = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            let header = &bytes[at..at + HEADER_BYTES];
            let u32_at = |i: usize| u32::from_le_bytes(header[i..i + 4].try_into().expect("four bytes"));
            let u64_at = |i: usize| u64::from_le_bytes(header[i..i + 8].try_into().expect("eight bytes"));
            assert_eq!(u32_at(0), MAGIC, "a record at {at}");
            let (kind, node, a, b) = (header[4], header[5], u64_at(8), u64_at(16));
            let (len1, len2) = (u32_at(24) as usize, u32_at(28) as usize);
            let first = at + HEADER_BYTES;
            let data = first..first + len1;
            let text =
                |range: Range<usize>| String::from_utf8(bytes[range].to_vec()).expect("a path in UTF-8");
            let path = || text(data.clone());
            let second = || text(data.end..data.end + len2);
            let op = match kind {
                1 => Op::Create { ino: a, path: path() },
                2 => Op::Truncate { ino: a, size: b },
                3 => Op::Write { ino: a, offset: b, data: data.clone() },
                4 => Op::SyncBegin { ino: a, id: b },
                5 => Op::SyncEnd { ino: a, id: b },
                6 => Op::DirSyncBegin { path: path(), id: b },
                7 => Op::DirSyncEnd { path: path(), id: b },
                8 => Op::Rename { from: path(), to: second() },
                9 => Op::Unlink { path: path() },
                10 => Op::Link { from: path(), to: second() },
                11 => Op::MakeDir { path: path() },
                12 => Op::RemoveDir { path: path() },
                KIND_MARK => Op::Mark(path()),
                other => panic!("the shim could not record this ({other}): {}", path()),
            };
            records.push(Record { node, op });
            at = data.end + len2;
        }
        Self { records, bytes: Arc::new(bytes) }
    }

    /// A handle for [`Journal::mark`].
    pub fn append_to(path: &Path) -> File {
        OpenOptions::new().create(true).append(true).open(path).expect("the journal")
    }

    /// Writes something down between what the processes do.
    pub fn mark(mut file: &File, text: &str) {
        let mut record = Vec::with_capacity(HEADER_BYTES + text.len());
        record.extend(MAGIC.to_le_bytes());
        record.extend([KIND_MARK, 0, 0, 0]);
        record.extend([0; 16]);
        record.extend(u32::try_from(text.len()).expect("a short text").to_le_bytes());
        record.extend([0; 4]);
        record.extend(text.as_bytes());
        // One write: O_APPEND makes it one record among those of others.
        let written = file.write(&record).expect("the journal");
        assert_eq!(written, record.len(), "a record was split");
    }
}
