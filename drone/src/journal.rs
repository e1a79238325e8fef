//! What is durably known of a backend that this drone, or an earlier one on the same data directory, has taken on.
//!
//! ```text
//!   DIR/backends/<id>/journal    made durable before the guard is started; removed when the end is acknowledged
//!   DIR/backends/<id>/outcome    the guard's reports, once nothing of the backend is left
//! ```
//!
//! Moments are those of `CLOCK_BOOTTIME` and belong to one boot: neither a wall clock that is set anew nor a reboot
//! changes what they mean. The deadlines are those of the start; the guard holds the ones in force and tells them.
//!
//! A record is one line that names its version and checksum, and one of JSON. One that does not fit is damaged, and then
//! everything that it might have run is ended before anything is started.

use crate::guard::Report;
use holdfast_wire::KeyConfig;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// Name of the record in the backend's directory.
pub const JOURNAL: &str = "journal";
/// Largest record, in bytes: a key's names, escaped, and little more.
pub const JOURNAL_BYTES_MAX: u64 = 64 * 1024;
/// Largest outcome that is read, in bytes.
pub const OUTCOME_BYTES_MAX: u64 = 1024 * 1024;
/// What a record begins with.
const HEAD: &str = "holdfast-journal 1 ";
/// Length of the checksum: hexadecimal digits.
const CHECKSUM_DIGITS: usize = 8;

/// A backend that was taken on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The boot whose moments these are.
    pub boot_id: String,
    /// The backend.
    pub backend: String,
    /// The key it holds.
    pub key: KeyConfig,
    /// The fencing token.
    pub token: u64,
    /// Where it has to listen.
    pub address: SocketAddr,
    /// When it was to end softly, as of its start, in milliseconds of `CLOCK_BOOTTIME`.
    pub soft_boot_ms: i64,
    /// When it was to be killed, as of its start, in milliseconds of `CLOCK_BOOTTIME`.
    pub hard_boot_ms: i64,
}

/// Why a record cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// It is not what was written.
    #[error("it is damaged: {0}")]
    Content(String),
    /// There is none, though a guard runs.
    #[error("there is none, though a guard holds the directory")]
    Missing,
    /// It is of another backend than its directory.
    #[error("it is of backend {0}")]
    Other(String),
}

impl Record {
    /// As it is kept.
    pub fn encode(&self) -> Result<Vec<u8>, serde_json::Error> {
        let json = serde_json::to_string(self)?;
        let checksum = crc32fast::hash(json.as_bytes());
        Ok(format!("{HEAD}{checksum:0CHECKSUM_DIGITS$x}\n{json}\n").into_bytes())
    }

    /// Reads what was kept, exactly.
    pub fn decode(bytes: &[u8]) -> Result<Self, Damage> {
        let damaged = |what: &str| Damage::Content(what.to_owned());
        let text = std::str::from_utf8(bytes).map_err(|_| damaged("it is not text"))?;
        let rest = text.strip_prefix(HEAD).ok_or_else(|| damaged("it does not begin as a record does"))?;
        let (checksum, json) = rest.split_once('\n').ok_or_else(|| damaged("it ends in its first line"))?;
        let json = json.strip_suffix('\n').ok_or_else(|| damaged("it does not end with its second line"))?;
        if format!("{:0CHECKSUM_DIGITS$x}", crc32fast::hash(json.as_bytes())) != checksum {
            return Err(damaged("the checksum does not fit"));
        }
        serde_json::from_str(json).map_err(|e| Damage::Content(e.to_string()))
    }
}

/// What has become of a backend while no drone was there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// Its guard lives.
    Guarded(Record),
    /// Its guard has seen its end, and reported this.
    Ended(Record, Vec<Report>),
    /// The machine was started anew since: nothing of it is left.
    OtherBoot(Record),
    /// Its guard has died without a word: something of it may be left.
    Unguarded(Record),
    /// Nobody knows what it is: whatever may be left has to be ended first of all.
    Damaged(Damage),
}

/// What is found in a backend's directory.
#[derive(Debug, Clone, Default)]
pub struct Found {
    /// The content of the journal, if there is one.
    pub journal: Option<Vec<u8>>,
    /// A guard holds the directory.
    pub guarded: bool,
    /// The content of the outcome, if there is one.
    pub outcome: Option<Vec<u8>>,
}

/// Judges a directory; nothing if its backend has ended and that is acknowledged.
pub fn judge(backend: &str, found: &Found, boot_id: &str) -> Option<Fate> {
    let record = match &found.journal {
        Some(bytes) => Record::decode(bytes),
        None if found.guarded => Err(Damage::Missing),
        None => return None,
    };
    let record = match record {
        Ok(record) if record.backend != backend => return Some(Fate::Damaged(Damage::Other(record.backend))),
        Ok(record) => record,
        Err(damage) => return Some(Fate::Damaged(damage)),
    };
    if record.boot_id != boot_id {
        // No lock outlives a boot: then the directory is shared with another machine, which must not be.
        let shared =
            Fate::Damaged(Damage::Content("it is of another boot, but a guard holds the directory".into()));
        return Some(if found.guarded { shared } else { Fate::OtherBoot(record) });
    }
    if found.guarded {
        return Some(Fate::Guarded(record));
    }
    let reports = found.outcome.as_deref().and_then(outcome);
    Some(match reports {
        Some(reports) => Fate::Ended(record, reports),
        None => Fate::Unguarded(record),
    })
}

/// The reports of a whole outcome. One without the last report says nothing.
fn outcome(bytes: &[u8]) -> Option<Vec<Report>> {
    let lines = bytes.split(|b| *b == b'\n').filter(|line| !line.is_empty());
    // A newer guard may have reported what this drone does not know.
    let reports: Vec<Report> = lines.filter_map(|line| serde_json::from_slice(line).ok()).collect();
    (reports.last() == Some(&Report::Gone)).then_some(reports)
}

/// This boot's id; another one after each start of the machine.
pub fn boot_id() -> std::io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record {
            boot_id: "boot-1".into(),
            backend: "ba-1".into(),
            key: KeyConfig { name: "schlüssel\n\"1\"".into(), namespace: "n".into(), tag: "t".into() },
            token: u64::MAX,
            address: "[::1]:20001".parse().unwrap(),
            soft_boot_ms: -1,
            hard_boot_ms: i64::MAX,
        }
    }

    fn found(journal: Option<Vec<u8>>, guarded: bool, outcome: Option<&str>) -> Found {
        Found { journal, guarded, outcome: outcome.map(|text| text.as_bytes().to_vec()) }
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        assert_eq!(Record::decode(&record().encode().unwrap()), Ok(record()));
    }

    #[test]
    fn every_flipped_bit_and_every_missing_byte_is_damage() {
        let bytes = record().encode().unwrap();
        for at in 0..bytes.len() {
            assert!(Record::decode(&bytes[..at]).is_err(), "cut at {at}");
            for bit in 0..8 {
                let mut flipped = bytes.clone();
                flipped[at] ^= 1 << bit;
                assert!(Record::decode(&flipped).is_err(), "byte {at} bit {bit}");
            }
        }
        let longer = [&bytes[..], b"x"].concat();
        assert!(Record::decode(&longer).is_err());
        assert!(Record::decode(&[]).is_err());
    }

    #[test]
    fn what_is_found_decides_what_becomes_of_a_backend() {
        let whole = || Some(record().encode().unwrap());
        let gone = "{\"started\":{\"pid\":7}}\n{\"exited\":{\"code\":3,\"signal\":null}}\n\"gone\"\n";
        let judge = |found: Found| judge("ba-1", &found, "boot-1");
        assert_eq!(judge(found(None, false, None)), None);
        assert_eq!(judge(found(None, false, Some(gone))), None);
        assert_eq!(judge(found(None, true, None)), Some(Fate::Damaged(Damage::Missing)));
        assert_eq!(judge(found(whole(), true, None)), Some(Fate::Guarded(record())));
        assert_eq!(judge(found(whole(), false, None)), Some(Fate::Unguarded(record())));
        let reports =
            vec![Report::Started { pid: 7 }, Report::Exited { code: Some(3), signal: None }, Report::Gone];
        assert_eq!(judge(found(whole(), false, Some(gone))), Some(Fate::Ended(record(), reports)));
        // An outcome that breaks off is none; unknown reports are passed over.
        assert_eq!(judge(found(whole(), false, Some(&gone[..40]))), Some(Fate::Unguarded(record())));
        let newer = format!("{{\"new\":1}}\n{gone}");
        assert!(
            matches!(judge(found(whole(), false, Some(&newer))), Some(Fate::Ended(_, reports)) if reports.len() == 3)
        );
        let mut damaged = whole().unwrap();
        damaged[30] ^= 1;
        assert!(matches!(judge(found(Some(damaged), false, Some(gone))), Some(Fate::Damaged(_))));
        assert!(matches!(judge(found(Some(Vec::new()), false, None)), Some(Fate::Damaged(_))));
    }

    #[test]
    fn after_a_reboot_nothing_is_left_and_a_directory_that_is_held_then_is_not_ours() {
        let found = |guarded| found(Some(record().encode().unwrap()), guarded, None);
        assert_eq!(judge("ba-1", &found(false), "boot-2"), Some(Fate::OtherBoot(record())));
        assert!(matches!(judge("ba-1", &found(true), "boot-2"), Some(Fate::Damaged(_))));
    }

    #[test]
    fn a_record_in_another_backends_directory_is_damage() {
        let found = found(Some(record().encode().unwrap()), false, None);
        assert_eq!(judge("ba-2", &found, "boot-1"), Some(Fate::Damaged(Damage::Other("ba-1".into()))));
    }
}
