//! What is durably known of a backend that this drone, or an earlier one on the same data directory, has taken on.
//!
//! ```text
//!   DIR/backends/<id>/journal    made durable before the guard is started; removed when the end is acknowledged
//!   DIR/backends/<id>/end        the end that a controller asked for, made durable before that is acknowledged
//!   DIR/backends/<id>/outcome    the guard's reports, once nothing of the backend is left
//! ```
//!
//! Moments are those of `CLOCK_BOOTTIME` and belong to one boot: neither a wall clock that is set anew nor a reboot
//! changes what they mean. The deadlines are those of the start; the guard holds the ones in force and tells them.
//!
//! A record is one line that names its version and checksum, and one of JSON. One that does not fit is damaged; whatever
//! its directory may have run is ended then, and its key expires.

use crate::guard::Report;
use holdfast_wire::{KeyConfig, TerminationKind, TerminationReason};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// Name of the record in the backend's directory.
pub const JOURNAL: &str = "journal";
/// Name of the note of an end in the backend's directory.
pub const END: &str = "end";
/// Largest record, in bytes: a key's names, escaped, and little more.
pub const JOURNAL_BYTES_MAX: u64 = 64 * 1024;
/// Largest outcome that is read, in bytes.
pub const OUTCOME_BYTES_MAX: u64 = 1024 * 1024;
/// What a record begins with.
const HEAD: &str = "holdfast-journal 1 ";
/// What the note of an end begins with.
const END_HEAD: &str = "holdfast-end 1 ";
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

/// An end that a controller asked for and that is durable, so that it can be acknowledged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndNote {
    /// The boot whose moments these are.
    pub boot_id: String,
    /// How to end it.
    pub kind: TerminationKind,
    /// Why, as it is reported.
    pub reason: TerminationReason,
    /// When the grace of a soft end is over, in milliseconds of `CLOCK_BOOTTIME`.
    pub kill_boot_ms: i64,
}

fn encode(head: &str, content: &impl Serialize) -> Result<Vec<u8>, serde_json::Error> {
    let json = serde_json::to_string(content)?;
    let checksum = crc32fast::hash(json.as_bytes());
    Ok(format!("{head}{checksum:0CHECKSUM_DIGITS$x}\n{json}\n").into_bytes())
}

/// Reads what was kept, exactly.
fn decode<T: DeserializeOwned>(head: &str, bytes: &[u8]) -> Result<T, Damage> {
    let damaged = |what: &str| Damage::Content(what.to_owned());
    let text = std::str::from_utf8(bytes).map_err(|_| damaged("it is not text"))?;
    let rest = text.strip_prefix(head).ok_or_else(|| damaged("it does not begin as a record does"))?;
    let (checksum, json) = rest.split_once('\n').ok_or_else(|| damaged("it ends in its first line"))?;
    let json = json.strip_suffix('\n').ok_or_else(|| damaged("it does not end with its second line"))?;
    if format!("{:0CHECKSUM_DIGITS$x}", crc32fast::hash(json.as_bytes())) != checksum {
        return Err(damaged("the checksum does not fit"));
    }
    serde_json::from_str(json).map_err(|e| Damage::Content(e.to_string()))
}

impl Record {
    /// As it is kept.
    pub fn encode(&self) -> Result<Vec<u8>, serde_json::Error> {
        encode(HEAD, self)
    }

    /// Reads what was kept, exactly.
    pub fn decode(bytes: &[u8]) -> Result<Self, Damage> {
        decode(HEAD, bytes)
    }
}

impl EndNote {
    /// As it is kept.
    pub fn encode(&self) -> Result<Vec<u8>, serde_json::Error> {
        encode(END_HEAD, self)
    }

    /// Reads what was kept. An end was asked for even if it cannot be read how: softly then, until the hard deadline.
    fn read(content: &Content, boot_id: &str) -> Option<Self> {
        let unreadable = Self {
            boot_id: boot_id.to_owned(),
            kind: TerminationKind::Soft,
            reason: TerminationReason::External,
            kill_boot_ms: i64::MAX,
        };
        match content {
            Content::None => None,
            Content::Bytes(bytes) => Some(decode(END_HEAD, bytes).unwrap_or(unreadable)),
            Content::NoFile => Some(unreadable),
        }
    }
}

/// What has become of a backend while no drone was there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// Its end was acknowledged, or it was never taken on.
    Finished,
    /// Its guard lives.
    Guarded(Record),
    /// Its guard has seen its end, and reported this.
    Ended(Record, Vec<Report>),
    /// The machine, certainly this one, was started again since: nothing of it is left.
    OtherBoot(Record),
    /// It is of another boot, perhaps of another machine, on which it may still run. Nothing can be reported of it.
    Elsewhere(Record),
    /// Its guard has died without reporting an end: something of it may be left.
    Unguarded(Record),
    /// It cannot be known what it is: whatever may be left is to be ended.
    Damaged(Damage),
}

/// What is read of one file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Content {
    /// There is none.
    #[default]
    None,
    /// This.
    Bytes(Vec<u8>),
    /// It is no file (a directory, a FIFO), or cannot be a file of ours.
    NoFile,
}

/// What is found in a backend's directory.
#[derive(Debug, Clone, Default)]
pub struct Found {
    /// The journal.
    pub journal: Content,
    /// A guard holds the directory.
    pub guarded: bool,
    /// The outcome.
    pub outcome: Content,
    /// The note of an end.
    pub end: Content,
}

/// The boot, and whether records of another one are of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Boot {
    /// This boot.
    pub id: String,
    /// What another boot left here was certainly left by this machine.
    pub same_machine: bool,
}

/// What a directory says of its backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judged {
    /// What has become of it.
    pub fate: Fate,
    /// The end that was asked for, durably.
    pub end: Option<EndNote>,
}

/// Judges a directory.
pub fn judge(backend: &str, found: &Found, boot: &Boot) -> Judged {
    Judged { fate: fate(backend, found, boot), end: EndNote::read(&found.end, &boot.id) }
}

fn fate(backend: &str, found: &Found, boot: &Boot) -> Fate {
    let record = match &found.journal {
        Content::Bytes(bytes) => Record::decode(bytes),
        Content::NoFile => Err(Damage::Content("it is no file".into())),
        Content::None if found.guarded => Err(Damage::Missing),
        Content::None => return Fate::Finished,
    };
    let record = match record {
        Ok(record) if record.backend != backend => return Fate::Damaged(Damage::Other(record.backend)),
        Ok(record) => record,
        Err(damage) => return Fate::Damaged(damage),
    };
    if record.boot_id != boot.id {
        return match (found.guarded, boot.same_machine) {
            // No lock outlives a boot: then the directory is shared with another machine, which must not be.
            (true, _) => Fate::Damaged(Damage::Content(
                "it is of another boot, but a guard holds the directory".into(),
            )),
            (false, true) => Fate::OtherBoot(record),
            (false, false) => Fate::Elsewhere(record),
        };
    }
    if found.guarded {
        return Fate::Guarded(record);
    }
    let reports = match &found.outcome {
        Content::Bytes(bytes) => outcome(bytes),
        Content::None | Content::NoFile => None,
    };
    match reports {
        Some(reports) => Fate::Ended(record, reports),
        None => Fate::Unguarded(record),
    }
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
        let content = |bytes: Option<Vec<u8>>| bytes.map_or(Content::None, Content::Bytes);
        Found {
            journal: content(journal),
            guarded,
            outcome: content(outcome.map(|text| text.as_bytes().to_vec())),
            ..Found::default()
        }
    }

    fn boot(id: &str, same_machine: bool) -> Boot {
        Boot { id: id.into(), same_machine }
    }

    fn fate_of(found: &Found) -> Fate {
        judge("ba-1", found, &boot("boot-1", true)).fate
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
        let judge = |found: Found| fate_of(&found);
        assert_eq!(judge(found(None, false, None)), Fate::Finished);
        assert_eq!(judge(found(None, false, Some(gone))), Fate::Finished);
        assert_eq!(judge(found(None, true, None)), Fate::Damaged(Damage::Missing));
        assert_eq!(judge(found(whole(), true, None)), Fate::Guarded(record()));
        assert_eq!(judge(found(whole(), false, None)), Fate::Unguarded(record()));
        let reports =
            vec![Report::Started { pid: 7 }, Report::Exited { code: Some(3), signal: None }, Report::Gone];
        assert_eq!(judge(found(whole(), false, Some(gone))), Fate::Ended(record(), reports));
        // An outcome that breaks off is none; unknown reports are ignored.
        assert_eq!(judge(found(whole(), false, Some(&gone[..40]))), Fate::Unguarded(record()));
        let newer = format!("{{\"new\":1}}\n{gone}");
        assert!(
            matches!(judge(found(whole(), false, Some(&newer))), Fate::Ended(_, reports) if reports.len() == 3)
        );
        let mut damaged = whole().unwrap();
        damaged[30] ^= 1;
        assert!(matches!(judge(found(Some(damaged), false, Some(gone))), Fate::Damaged(_)));
        assert!(matches!(judge(found(Some(Vec::new()), false, None)), Fate::Damaged(_)));
        let no_file = Found { journal: Content::NoFile, ..Found::default() };
        assert!(matches!(judge(no_file), Fate::Damaged(_)));
        let no_outcome = Found { outcome: Content::NoFile, ..found(whole(), false, None) };
        assert_eq!(judge(no_outcome), Fate::Unguarded(record()));
    }

    #[test]
    fn another_boot_proves_an_end_only_on_certainly_the_same_machine() {
        let found = |guarded| found(Some(record().encode().unwrap()), guarded, None);
        let judge = |guarded, same| judge("ba-1", &found(guarded), &boot("boot-2", same)).fate;
        assert_eq!(judge(false, true), Fate::OtherBoot(record()));
        assert_eq!(judge(false, false), Fate::Elsewhere(record()));
        // The directory is shared with another machine, which must not be.
        assert!(matches!(judge(true, true), Fate::Damaged(_)));
    }

    #[test]
    fn a_record_in_another_backends_directory_is_damage() {
        let found = found(Some(record().encode().unwrap()), false, None);
        let fate = judge("ba-2", &found, &boot("boot-1", true)).fate;
        assert_eq!(fate, Fate::Damaged(Damage::Other("ba-1".into())));
    }

    #[test]
    fn a_noted_end_is_never_lost_even_if_the_note_is_damaged() {
        let note = EndNote {
            boot_id: "boot-1".into(),
            kind: TerminationKind::Hard,
            reason: TerminationReason::Swept,
            kill_boot_ms: 7,
        };
        let whole = note.encode().unwrap();
        let end = |content| judge("ba-1", &Found { end: content, ..Found::default() }, &boot("b", true)).end;
        assert_eq!(end(Content::None), None);
        assert_eq!(end(Content::Bytes(whole.clone())), Some(note));
        for damaged in [Content::Bytes(whole[..20].to_vec()), Content::Bytes(Vec::new()), Content::NoFile] {
            assert!(matches!(end(damaged), Some(EndNote { kind: TerminationKind::Soft, .. })));
        }
    }
}
