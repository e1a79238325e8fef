//! The running checksum (invariant 6): every replica that applied the same entries on the same state has the same one.

use super::Position;
use crate::codec::encode;
use crate::kv::{ReadState, Table, Txn, Writes, keys};
use crate::limits::{CHECKSUM_EVERY, CHECKSUMS_KEPT};
use crate::records::ProgressRecord;

/// FNV-1a with 64 bits: small, and the same on every platform and in every version, which the standard library's
/// hashers do not promise.
struct Fnv1a(u64);

impl Fnv1a {
    const OFFSET_BASIS: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01b3;

    fn new() -> Self {
        Self(Self::OFFSET_BASIS)
    }

    fn bytes(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(Self::PRIME);
        }
    }

    fn number(&mut self, number: u64) {
        self.bytes(&number.to_le_bytes());
    }

    /// With the length in front, so that neighbours can't trade bytes.
    fn sized(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.bytes(bytes);
    }
}

/// `checksum' = h(checksum, index, writes)`, the writes in the order of table and key.
fn advance(checksum: u64, index: u64, writes: &Writes) -> u64 {
    let mut hash = Fnv1a::new();
    hash.number(checksum);
    hash.number(index);
    for ((table, key), value) in writes {
        hash.bytes(&[*table as u8]);
        hash.sized(key);
        match value {
            Some(value) => {
                hash.bytes(&[1]);
                hash.sized(value);
            }
            None => hash.bytes(&[0]),
        }
    }
    hash.0
}

/// Ends an entry: the checksum takes in its writes, `progress` among them (without the checksum itself and the
/// published ones, which follow from it), and `progress` is written.
pub(super) fn seal<R: ReadState + ?Sized>(txn: &mut Txn<'_, R>, at: Position, mut progress: ProgressRecord) {
    let published = std::mem::take(&mut progress.published);
    let checksum = std::mem::take(&mut progress.checksum);
    txn.put(Table::Meta, keys::PROGRESS.to_vec(), encode(&progress));
    progress.checksum = advance(checksum, at.index, txn.entry_writes());
    progress.published = published;
    if at.index.is_multiple_of(CHECKSUM_EVERY) {
        progress.published.push((at.index, progress.checksum));
        let excess = progress.published.len().saturating_sub(CHECKSUMS_KEPT);
        progress.published.drain(..excess);
    }
    txn.put(Table::Meta, keys::PROGRESS.to_vec(), encode(&progress));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_fnv_1a() {
        // Test vectors of the FNV authors.
        for (text, expected) in
            [("", 0xcbf2_9ce4_8422_2325), ("a", 0xaf63_dc4c_8601_ec8c), ("foobar", 0x8594_4171_f739_67e8)]
        {
            let mut hash = Fnv1a::new();
            hash.bytes(text.as_bytes());
            assert_eq!(hash.0, expected, "{text}");
        }
    }

    #[test]
    fn every_part_of_a_write_counts() {
        let write = |table, key: &[u8], value: Option<&[u8]>| {
            advance(1, 2, &Writes::from([((table, key.to_vec()), value.map(<[u8]>::to_vec))]))
        };
        let all = [
            write(Table::Keys, b"ab", Some(b"c")),
            write(Table::Keys, b"a", Some(b"bc")),
            write(Table::Keys, b"ab", Some(b"")),
            write(Table::Keys, b"ab", None),
            write(Table::Backends, b"ab", Some(b"c")),
            advance(1, 2, &Writes::new()),
            advance(1, 3, &Writes::new()),
            advance(2, 2, &Writes::new()),
        ];
        let different: std::collections::BTreeSet<u64> = all.into_iter().collect();
        assert_eq!(different.len(), all.len());
    }
}
