//! The running checksum (invariant 6): every replica that applied the same entries on the same state has the same one.

use super::Position;
use crate::kv::{Head, ReadState, Txn, Writes};
use crate::limits::{CHECKSUM_EVERY, CHECKSUM_LEVEL_FACTOR, CHECKSUM_LEVELS, CHECKSUMS_PER_LEVEL};
use crate::records::ProgressRecord;
use xxhash_rust::xxh3::xxh3_64;

/// The bytes that are hashed.
#[derive(Default)]
struct Hashed(Vec<u8>);

impl Hashed {
    fn number(&mut self, number: u64) {
        self.0.extend_from_slice(&number.to_le_bytes());
    }

    /// With the length in front, so that neighbours can't trade bytes.
    fn sized(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }
}

/// `checksum' = xxh3(checksum, index, writes, progress)`, the writes in the order of table and key, and of `progress`
/// what does not follow from the checksum. XXH3 is the same on every platform and in every version of the library,
/// which the standard library's hashers do not promise.
fn advance(index: u64, writes: &Writes, progress: &ProgressRecord) -> u64 {
    let ProgressRecord {
        cluster_time_ms,
        checksum,
        published: _,
        keys_held,
        idempotency_records,
        supplied_ids,
        last_drone_id,
    } = progress;
    let mut hashed = Hashed::default();
    for number in [checksum, &index, cluster_time_ms, keys_held, idempotency_records, supplied_ids] {
        hashed.number(*number);
    }
    hashed.0.extend_from_slice(&last_drone_id.to_le_bytes());
    for ((table, key), value) in writes {
        hashed.0.push(*table as u8);
        hashed.sized(key);
        match value {
            Some(value) => {
                hashed.0.push(1);
                hashed.sized(value);
            }
            None => hashed.0.push(0),
        }
    }
    xxh3_64(&hashed.0)
}

/// Whether the checksum published at `index` is kept once `newest` is published: see [`crate::limits::CHECKSUM_LEVELS`].
fn is_kept(index: u64, newest: u64) -> bool {
    let age = newest.saturating_sub(index);
    (0..CHECKSUM_LEVELS).any(|level| {
        let spacing = CHECKSUM_EVERY * CHECKSUM_LEVEL_FACTOR.pow(level);
        index.is_multiple_of(spacing) && age < spacing * CHECKSUMS_PER_LEVEL
    })
}

/// Ends an entry: the checksum takes in its writes and the progress, and is published if it is time.
pub(super) fn seal<R: ReadState + ?Sized>(txn: &mut Txn<'_, R>, at: Position, mut head: Head) {
    let progress = &mut head.progress;
    progress.checksum = advance(at.index, txn.entry_writes(), progress);
    if at.index.is_multiple_of(CHECKSUM_EVERY) {
        progress.published.push((at.index, progress.checksum));
        let record = &head.checksums;
        progress.published.retain(|(index, _)| is_kept(*index, at.index) || record.names(*index));
    }
    txn.put_head(head);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::Table;

    #[test]
    fn older_checksums_are_kept_in_ever_wider_steps() {
        let newest = 5_000_000 / CHECKSUM_EVERY * CHECKSUM_EVERY;
        let all = (1..=newest / CHECKSUM_EVERY).map(|n| n * CHECKSUM_EVERY);
        let kept: Vec<u64> = all.filter(|index| is_kept(*index, newest)).collect();
        assert!(kept.len() <= crate::limits::CHECKSUMS_KEPT - 2, "{}", kept.len());
        assert_eq!(kept.last(), Some(&newest));
        assert!(newest - kept[0] > 900_000, "{kept:?}");
        // A replica that is far behind finds an index in common, and one near where it stands.
        for behind in [100, 1_000, 10_000, 100_000, 900_000] {
            let stands = (newest - behind) / CHECKSUM_EVERY * CHECKSUM_EVERY;
            let common = kept.iter().rev().find(|index| is_kept(**index, stands) && **index <= stands);
            assert!(
                common.is_some_and(|index| stands - index <= behind.max(4096) * 2),
                "{behind}: {common:?}"
            );
        }
    }

    #[test]
    fn the_hash_is_pinned() {
        let progress = ProgressRecord { checksum: 1, cluster_time_ms: 2, ..ProgressRecord::default() };
        let writes = Writes::from([((Table::Keys, b"ab".to_vec()), Some(b"c".to_vec()))]);
        assert_eq!(advance(3, &writes, &progress), 731_842_353_096_712_708);
    }

    #[test]
    fn every_part_of_a_write_counts() {
        let progress = ProgressRecord { checksum: 1, ..ProgressRecord::default() };
        let write = |table, key: &[u8], value: Option<&[u8]>| {
            advance(2, &Writes::from([((table, key.to_vec()), value.map(<[u8]>::to_vec))]), &progress)
        };
        let alone = |index, progress| advance(index, &Writes::new(), &progress);
        let all = [
            write(Table::Keys, b"ab", Some(b"c")),
            write(Table::Keys, b"a", Some(b"bc")),
            write(Table::Keys, b"ab", Some(b"")),
            write(Table::Keys, b"ab", None),
            write(Table::Backends, b"ab", Some(b"c")),
            alone(2, ProgressRecord { checksum: 1, ..ProgressRecord::default() }),
            alone(3, ProgressRecord { checksum: 1, ..ProgressRecord::default() }),
            alone(2, ProgressRecord { checksum: 2, ..ProgressRecord::default() }),
            alone(2, ProgressRecord { checksum: 1, cluster_time_ms: 1, ..ProgressRecord::default() }),
            alone(2, ProgressRecord { checksum: 1, keys_held: 1, ..ProgressRecord::default() }),
            alone(2, ProgressRecord { checksum: 1, idempotency_records: 1, ..ProgressRecord::default() }),
            alone(2, ProgressRecord { checksum: 1, supplied_ids: 1, ..ProgressRecord::default() }),
            alone(2, ProgressRecord { checksum: 1, last_drone_id: 1, ..ProgressRecord::default() }),
        ];
        let different: std::collections::BTreeSet<u64> = all.into_iter().collect();
        assert_eq!(different.len(), all.len());
    }
}
