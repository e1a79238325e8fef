//! Reads a backup, frame by frame, and refuses what is damaged.

use crate::{
    FORMAT, FRAME_BYTES_MAX, FRAME_HEADER_BYTES, Header, KIND_HEADER, KIND_ROWS, KIND_TRAILER, MAGIC,
    ROW_HEADER_BYTES, Trailer,
};
use holdfast_core::codec::decode;
use holdfast_core::kv::Table;
use sha2::{Digest, Sha256};
use std::io::{self, Read};

/// A row of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// The table.
    pub table: Table,
    /// Its key.
    pub key: Vec<u8>,
    /// Its value.
    pub value: Vec<u8>,
}

/// A backup that can't be used. All but [`BackupError::Read`] and [`BackupError::Format`] mean that the file is damaged:
/// take another copy of it.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The disk failed, or the file is not there.
    #[error("reading failed: {0}")]
    Read(#[from] io::Error),
    /// Something else.
    #[error("this is not a backup of Holdfast")]
    NotABackup,
    /// Of another program version.
    #[error("the backup has format {0}, this program reads format {FORMAT} only")]
    Format(u32),
    /// It ends too early.
    #[error("the backup is cut off: it ends at byte {at}, in the middle of {what}")]
    CutOff {
        /// Length of the file.
        at: u64,
        /// What was being read.
        what: &'static str,
    },
    /// A frame is not what was written.
    #[error("the backup is damaged: the part at byte {at} {problem}")]
    Frame {
        /// Where the frame begins.
        at: u64,
        /// What is wrong with it.
        problem: String,
    },
    /// The frames are whole, but not those that were written.
    #[error("the backup is damaged: its checksum (SHA-256) is not that of its content")]
    Digest,
    /// Something follows its end.
    #[error("the backup is damaged: {0} bytes or more follow its end")]
    TooLong(u64),
    /// A record does not decode, or records contradict each other.
    #[error("the backup is damaged: {0}")]
    Content(String),
}

/// The source, with what was read of it.
struct Frames<R> {
    source: R,
    at: u64,
    /// Of everything read so far.
    hash: Sha256,
}

/// Reads from the start; whoever uses what it gives before [`Reader::next_rows`] said `None` uses something unchecked.
pub struct Reader<R> {
    frames: Frames<R>,
    header: Header,
    rows: u64,
    last: Option<(Table, Vec<u8>)>,
    trailer: Option<Trailer>,
}

/// Reads all of `bytes`; how much less there was.
fn fill(source: &mut impl Read, bytes: &mut [u8]) -> io::Result<usize> {
    let mut have = 0;
    while have < bytes.len() {
        match source.read(&mut bytes[have..]) {
            Ok(0) => break,
            Ok(read) => have += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(have)
}

fn table(number: u8) -> Option<Table> {
    Table::ALL.into_iter().find(|table| *table as u8 == number)
}

impl<R: Read> Frames<R> {
    /// Payload of the next frame.
    fn next(&mut self, what: &'static str) -> Result<Vec<u8>, BackupError> {
        let begins = self.at;
        let mut head = [0; FRAME_HEADER_BYTES];
        let have = fill(&mut self.source, &mut head)?;
        self.at += have as u64;
        if have < head.len() {
            return Err(BackupError::CutOff { at: self.at, what });
        }
        let length = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
        if length == 0 || length > FRAME_BYTES_MAX {
            return Err(BackupError::Frame { at: begins, problem: format!("claims to have {length} bytes") });
        }
        // In steps: a damaged length must not claim memory that the file does not fill.
        let mut payload = Vec::new();
        while payload.len() < length {
            let from = payload.len();
            payload.resize(length.min(from + (1 << 20)), 0);
            let have = fill(&mut self.source, &mut payload[from..])?;
            self.at += have as u64;
            if from + have < payload.len() {
                return Err(BackupError::CutOff { at: self.at, what });
            }
        }
        if crc32fast::hash(&payload) != u32::from_le_bytes([head[4], head[5], head[6], head[7]]) {
            return Err(BackupError::Frame { at: begins, problem: "has a wrong checksum".to_owned() });
        }
        self.hash.update(head);
        self.hash.update(&payload);
        Ok(payload)
    }
}

impl<R: Read> Reader<R> {
    /// Reads and checks the header.
    pub fn open(mut source: R) -> Result<Self, BackupError> {
        let mut first = [0; 12];
        let have = fill(&mut source, &mut first)?;
        if !first[..have].starts_with(&MAGIC[..have.min(8)]) || have == 0 {
            return Err(BackupError::NotABackup);
        }
        if have < first.len() {
            return Err(BackupError::CutOff { at: have as u64, what: "its beginning" });
        }
        let format = u32::from_le_bytes([first[8], first[9], first[10], first[11]]);
        if format != FORMAT {
            return Err(BackupError::Format(format));
        }
        let mut hash = Sha256::new();
        hash.update(first);
        let mut frames = Frames { source, at: first.len() as u64, hash };
        let at = frames.at;
        let payload = frames.next("its header")?;
        let header = match payload.split_first() {
            Some((&KIND_HEADER, header)) => decode::<Header>(header).map_err(|e| e.to_string()),
            _ => Err("is not a header".to_owned()),
        };
        let header = header.map_err(|problem| BackupError::Frame { at, problem })?;
        Ok(Self { frames, header, rows: 0, last: None, trailer: None })
    }

    /// What the backup is of.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Bytes read so far.
    pub fn bytes(&self) -> u64 {
        self.frames.at
    }

    /// SHA-256 of the content; there once everything was read and checked.
    pub fn sha256(&self) -> Option<[u8; 32]> {
        self.trailer.as_ref().map(|trailer| trailer.sha256)
    }

    /// The next rows, in the order of table and key. `None`: that was all, and everything is as it was written.
    pub fn next_rows(&mut self) -> Result<Option<Vec<Row>>, BackupError> {
        if self.trailer.is_some() {
            return Ok(None);
        }
        let begins = self.frames.at;
        let before = self.frames.hash.clone();
        let payload = self.frames.next("its rows")?;
        let frame = |problem: &str| BackupError::Frame { at: begins, problem: problem.to_owned() };
        match payload.split_first() {
            Some((&KIND_ROWS, rows)) => {
                Ok(Some(self.rows(rows).ok_or_else(|| frame("has unreadable rows"))?))
            }
            Some((&KIND_TRAILER, trailer)) => {
                let trailer = decode::<Trailer>(trailer).map_err(|e| frame(&e.to_string()))?;
                if trailer.sha256 != <[u8; 32]>::from(before.finalize()) || trailer.rows != self.rows {
                    return Err(BackupError::Digest);
                }
                let mut more = [0; 64];
                let have = fill(&mut self.frames.source, &mut more)?;
                if have > 0 {
                    return Err(BackupError::TooLong(have as u64));
                }
                self.trailer = Some(trailer);
                Ok(None)
            }
            _ => Err(frame("is of no known kind")),
        }
    }

    fn rows(&mut self, mut bytes: &[u8]) -> Option<Vec<Row>> {
        let mut rows = Vec::new();
        while !bytes.is_empty() {
            let (head, rest) = bytes.split_first_chunk::<ROW_HEADER_BYTES>()?;
            let table = table(head[0])?;
            let key_bytes = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
            let value_bytes = u32::from_le_bytes([head[5], head[6], head[7], head[8]]) as usize;
            let (key, rest) = rest.split_at_checked(key_bytes)?;
            let (value, rest) = rest.split_at_checked(value_bytes)?;
            // Strictly rising, so that no row can come twice.
            if self.last.as_ref().is_some_and(|(t, k)| (*t, k.as_slice()) >= (table, key)) {
                return None;
            }
            self.last = Some((table, key.to_vec()));
            rows.push(Row { table, key: key.to_vec(), value: value.to_vec() });
            bytes = rest;
        }
        self.rows += rows.len() as u64;
        Some(rows)
    }
}
