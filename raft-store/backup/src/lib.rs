//! The file of a backup: what it holds, how it is written, read and checked. No RocksDB, no Raft: the command line reads
//! backups without either.
//!
//! ```text
//! "HFBACKUP"  format: u32 LE
//! frame*      {length: u32 LE}{crc32 of the payload: u32 LE}{payload}
//!   payload   1 {Header}      first; holdfast_core::codec
//!             2 {row*}        any number: {table: u8}{key length: u32 LE}{value length: u32 LE}{key}{value}
//!             3 {Trailer}     last; holdfast_core::codec; nothing follows
//! ```
//!
//! Rows are the state's own ([`holdfast_core::kv`] names every record), all tables in the order of their numbers, each in
//! the order of its keys. So two backups of one log index are the same bytes but for the header, whichever replica made
//! them and whatever its files looked like.
//!
//! Invariants:
//!
//! 1. A file that is cut, longer, or has a changed bit anywhere is refused, and the error says where: each frame has a
//!    checksum, the trailer the SHA-256 of everything before it and the count of rows.
//! 2. Reading needs memory for one frame, never for the file.
//! 3. What the header says and what the rows say is compared.

mod inspect;
mod reader;
mod writer;

pub use inspect::{Summary, inspect};
pub use reader::{BackupError, Reader, Row};
pub use writer::Writer;

use bincode::{Decode, Encode};
use holdfast_wire::LeaseConfig;
use std::collections::BTreeMap;

/// First bytes of a backup.
pub const MAGIC: [u8; 8] = *b"HFBACKUP";
/// The format that this program writes and reads.
pub const FORMAT: u32 = 1;
/// Bytes of rows after which a frame is closed. A single larger row makes a larger frame.
pub const FRAME_BYTES: usize = 256 << 10;
/// Longest payload of a frame, in bytes: the largest record, with room. A longer one is damage.
pub const FRAME_BYTES_MAX: usize = 64 << 20;

const FRAME_HEADER_BYTES: usize = 8;
const ROW_HEADER_BYTES: usize = 9;
const KIND_HEADER: u8 = 1;
const KIND_ROWS: u8 = 2;
const KIND_TRAILER: u8 = 3;

/// What a backup is of.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Header {
    /// Id of the cluster.
    pub cluster_id: String,
    /// Member that made the backup.
    pub member: u64,
    /// Log index up to which the state is applied.
    pub index: u64,
    /// Term of that entry.
    pub term: u64,
    /// Cluster time of the state, in milliseconds.
    pub cluster_time_ms: u64,
    /// Wall clock of the member when it made the backup, in milliseconds since the epoch. For people only.
    pub made_at_ms: u64,
    /// Members of the cluster: id → peer address.
    pub members: BTreeMap<u64, String>,
    /// Those of them that vote.
    pub voters: Vec<u64>,
    /// Lease durations.
    pub lease: LeaseConfig,
    /// Keys held.
    pub keys_held: u64,
    /// The state's running checksum at `index`, which every replica has there.
    pub state_checksum: u64,
    /// Version of the program that made it.
    pub program: String,
}

/// Last frame.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Trailer {
    /// SHA-256 of every byte before this frame.
    pub sha256: [u8; 32],
    /// Rows in all.
    pub rows: u64,
}

#[cfg(test)]
mod tests;
