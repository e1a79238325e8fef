//! Makes the bytes of a backup. Pure: who calls it sends them somewhere.

use crate::{
    FORMAT, FRAME_BYTES, FRAME_BYTES_MAX, Header, KIND_HEADER, KIND_ROWS, KIND_TRAILER, MAGIC,
    ROW_HEADER_BYTES, Trailer,
};
use bincode::Encode;
use holdfast_core::codec::encode;
use holdfast_core::kv::Table;
use sha2::{Digest, Sha256};

/// Turns rows into frames.
pub struct Writer {
    hash: Sha256,
    rows: u64,
    /// Payload of the frame that is being filled.
    payload: Vec<u8>,
}

fn frame(payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    assert!(payload.len() <= FRAME_BYTES_MAX, "a frame of {} bytes", payload.len());
    let mut bytes = Vec::with_capacity(payload.len() + 8);
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&crc32fast::hash(payload).to_le_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

fn record(kind: u8, value: &impl Encode) -> Vec<u8> {
    let mut payload = vec![kind];
    payload.extend_from_slice(&encode(value));
    frame(&payload)
}

impl Writer {
    /// Begins a backup; gives its first bytes.
    pub fn new(header: &Header) -> (Self, Vec<u8>) {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&FORMAT.to_le_bytes());
        bytes.extend_from_slice(&record(KIND_HEADER, header));
        let mut this = Self { hash: Sha256::new(), rows: 0, payload: vec![KIND_ROWS] };
        this.hash.update(&bytes);
        (this, bytes)
    }

    /// Adds a row; gives the frame that it filled, if it did. An error says that the row is too long for a backup, which
    /// no record is.
    pub fn row(&mut self, table: Table, key: &[u8], value: &[u8]) -> Result<Option<Vec<u8>>, String> {
        let bytes = ROW_HEADER_BYTES + key.len() + value.len();
        if bytes >= FRAME_BYTES_MAX - FRAME_BYTES {
            return Err(format!("a row of table {} has {bytes} bytes", table.name()));
        }
        let (Ok(key_bytes), Ok(value_bytes)) = (u32::try_from(key.len()), u32::try_from(value.len())) else {
            return Err(format!("a row of table {} has {bytes} bytes", table.name()));
        };
        self.payload.push(table as u8);
        self.payload.extend_from_slice(&key_bytes.to_le_bytes());
        self.payload.extend_from_slice(&value_bytes.to_le_bytes());
        self.payload.extend_from_slice(key);
        self.payload.extend_from_slice(value);
        self.rows += 1;
        Ok((self.payload.len() >= FRAME_BYTES).then(|| self.close()))
    }

    fn close(&mut self) -> Vec<u8> {
        let bytes = frame(&self.payload);
        self.payload.truncate(1);
        self.hash.update(&bytes);
        bytes
    }

    /// Ends the backup; gives its last bytes.
    pub fn finish(mut self) -> Vec<u8> {
        let mut bytes = if self.payload.len() > 1 { self.close() } else { Vec::new() };
        let trailer = Trailer { sha256: self.hash.finalize().into(), rows: self.rows };
        bytes.extend_from_slice(&record(KIND_TRAILER, &trailer));
        bytes
    }
}
