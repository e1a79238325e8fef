//! Bytes of records and proposals: one version byte, then bincode with the standard configuration. Neither bincode nor
//! the derives promise a stable format, so the version byte says which one it is, and tests pin the bytes.

use crate::kv::StateError;
use bincode::config::{Configuration, Limit, LittleEndian, Varint, standard};
use bincode::{Decode, Encode};
use std::cell::Cell;

/// The version that this program writes.
pub const VERSION: u8 = 1;

/// Most memory that decoding one value may claim, in bytes. Without it a damaged length would be believed, and the
/// allocation it asks for would abort the process.
pub const DECODED_BYTES_MAX: usize = 256 * 1024 * 1024;

const CONFIG: Configuration<LittleEndian, Varint, Limit<DECODED_BYTES_MAX>> =
    standard().with_limit::<DECODED_BYTES_MAX>();

/// A thread's buffer for encoding grows to its largest value; above this size it is given back.
const SCRATCH_BYTES_MAX: usize = 64 * 1024;

thread_local! {
    static SCRATCH: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Encodes a value. The result takes no more memory than it needs: most of them are kept.
pub fn encode<T: Encode>(value: &T) -> Vec<u8> {
    let mut scratch = SCRATCH.take();
    scratch.clear();
    scratch.push(VERSION);
    // Encoding into a Vec fails only for types that refuse to be encoded, and none of ours does.
    if let Err(error) = bincode::encode_into_std_write(value, &mut scratch, CONFIG) {
        unreachable!("encoding into memory failed: {error}");
    }
    let bytes = scratch.as_slice().to_vec();
    if scratch.capacity() <= SCRATCH_BYTES_MAX {
        SCRATCH.set(scratch);
    }
    bytes
}

/// Decodes a value and checks that nothing is left over.
pub fn decode<T: Decode<()>>(bytes: &[u8]) -> Result<T, StateError> {
    match decode_first(bytes)? {
        (value, 0) => Ok(value),
        (_, left) => Err(StateError::Damaged(format!("{left} bytes too many in a record"))),
    }
}

/// Decodes a value that others follow, and says how many bytes do.
pub(crate) fn decode_first<T: Decode<()>>(bytes: &[u8]) -> Result<(T, usize), StateError> {
    match bytes.split_first() {
        Some((&VERSION, rest)) => match bincode::decode_from_slice(rest, CONFIG) {
            Ok((value, read)) => Ok((value, rest.len() - read)),
            Err(error) => Err(StateError::Damaged(format!("a record does not decode: {error}"))),
        },
        Some((version, _)) => Err(StateError::Damaged(format!("a record has the unknown version {version}"))),
        None => Err(StateError::Damaged("a record is empty".to_owned())),
    }
}
