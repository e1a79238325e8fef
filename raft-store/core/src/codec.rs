//! Bytes of records and proposals: one version byte, then bincode with the standard configuration. Neither bincode nor
//! the derives promise a stable format, so the version byte says which one it is, and tests pin the bytes.

use crate::kv::StateError;
use bincode::config::{Configuration, Limit, LittleEndian, Varint, standard};
use bincode::{Decode, Encode};

/// The version that this program writes.
pub const VERSION: u8 = 1;

/// Most memory that decoding one value may claim, in bytes. Without it a damaged length would be believed, and the
/// allocation it asks for would abort the process.
pub const DECODED_BYTES_MAX: usize = 256 * 1024 * 1024;

const CONFIG: Configuration<LittleEndian, Varint, Limit<DECODED_BYTES_MAX>> =
    standard().with_limit::<DECODED_BYTES_MAX>();

/// Encodes a value.
pub fn encode<T: Encode>(value: &T) -> Vec<u8> {
    let mut bytes = vec![VERSION];
    // Encoding into a Vec fails only for types that refuse to be encoded, and none of ours does.
    if let Err(error) = bincode::encode_into_std_write(value, &mut bytes, CONFIG) {
        unreachable!("encoding into memory failed: {error}");
    }
    bytes
}

/// Decodes a value and checks that nothing is left over.
pub fn decode<T: Decode<()>>(bytes: &[u8]) -> Result<T, StateError> {
    match bytes.split_first() {
        Some((&VERSION, rest)) => match bincode::decode_from_slice(rest, CONFIG) {
            Ok((value, read)) if read == rest.len() => Ok(value),
            Ok((_, read)) => {
                Err(StateError::Damaged(format!("{} bytes too many in a record", rest.len() - read)))
            }
            Err(error) => Err(StateError::Damaged(format!("a record does not decode: {error}"))),
        },
        Some((version, _)) => Err(StateError::Damaged(format!("a record has the unknown version {version}"))),
        None => Err(StateError::Damaged("a record is empty".to_owned())),
    }
}
