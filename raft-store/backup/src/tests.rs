use super::*;
use holdfast_core::codec::encode;
use holdfast_core::kv::{Table, keys};
use holdfast_core::records::{ClusterRecord, KeyRecord, ProgressRecord};
use proptest::prelude::*;

fn header(keys_held: u64) -> Header {
    Header {
        cluster_id: "c1".into(),
        member: 2,
        index: 77,
        term: 3,
        cluster_time_ms: 1_700_000_000_000,
        made_at_ms: 1_700_000_000_500,
        members: BTreeMap::from([(1, "a:1".into()), (2, "b:1".into())]),
        voters: vec![1, 2],
        lease: LeaseConfig::default(),
        keys_held,
        state_checksum: 99,
        program: "0.1.0".into(),
    }
}

fn key_record(n: u64, filler: usize) -> Vec<u8> {
    encode(&KeyRecord {
        tag: "t".repeat(filler),
        backend_id: format!("ba-{n}"),
        drone_id: 1,
        token: n,
        allow_renew: true,
        acquired_at_ms: 1,
        expires_at_ms: 2,
        indexed_at_ms: 2,
    })
}

fn backup_with(keys_held: u64, header: &Header, filler: usize) -> Vec<u8> {
    let (mut writer, mut bytes) = Writer::new(header);
    let cluster = ClusterRecord {
        cluster_id: "c1".into(),
        token_secret: [7; 32],
        lease: LeaseConfig::default(),
        terminated_keep_ms: 1,
    };
    let progress = ProgressRecord {
        cluster_time_ms: 1_700_000_000_000,
        checksum: 99,
        keys_held,
        ..ProgressRecord::default()
    };
    let mut add = |table, key: &[u8], value: &[u8]| {
        bytes.extend(writer.row(table, key, value).unwrap().unwrap_or_default());
    };
    add(Table::Meta, keys::CLUSTER, &encode(&cluster));
    add(Table::Meta, keys::PROGRESS, &encode(&progress));
    for n in 0..keys_held {
        add(Table::Keys, &keys::pair("", &format!("k{n:08}")), &key_record(n, filler));
    }
    bytes.extend(writer.finish());
    bytes
}

fn backup(keys_held: u64) -> Vec<u8> {
    backup_with(keys_held, &header(keys_held), 0)
}

#[test]
fn what_is_written_is_read_again_over_many_frames() {
    let bytes = backup_with(5_000, &header(5_000), 200);
    assert!(bytes.len() > 4 * FRAME_BYTES);
    let summary = inspect(bytes.as_slice()).unwrap();
    assert_eq!((summary.index, summary.keys_held, summary.rows), (77, 5_000, 5_002));
    assert_eq!(summary.bytes, bytes.len() as u64);
    assert_eq!(summary.sha256.len(), 64);
}

#[test]
fn a_backup_cut_anywhere_is_refused() {
    let bytes = backup(20);
    for end in 0..bytes.len() {
        let error = inspect(&bytes[..end]).unwrap_err();
        assert!(matches!(error, BackupError::CutOff { .. } | BackupError::NotABackup), "{end}: {error}");
    }
}

#[test]
fn a_changed_bit_anywhere_is_refused() {
    let bytes = backup(20);
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut changed = bytes.clone();
            changed[at] ^= 1 << bit;
            assert!(inspect(changed.as_slice()).is_err(), "bit {bit} of byte {at}");
        }
    }
}

#[test]
fn what_follows_the_end_is_refused() {
    let mut bytes = backup(3);
    bytes.push(0);
    assert!(matches!(inspect(bytes.as_slice()), Err(BackupError::TooLong(1))));
}

#[test]
fn a_frame_that_is_left_out_or_comes_twice_is_refused() {
    let whole = backup_with(3_000, &header(3_000), 300);
    let mut frames = Vec::new();
    let mut at = 12;
    while at < whole.len() {
        let length = u32::from_le_bytes(whole[at..at + 4].try_into().unwrap()) as usize;
        frames.push(&whole[at..at + 8 + length]);
        at += 8 + length;
    }
    assert!(frames.len() >= 5, "header, rows, trailer");
    let join = |frames: &[&[u8]]| [&whole[..12], &frames.concat()].concat();
    assert!(inspect(join(&frames).as_slice()).is_ok());
    let mut without = frames.clone();
    without.remove(2);
    assert!(matches!(inspect(join(&without).as_slice()), Err(BackupError::Digest)));
    let mut twice = frames.clone();
    twice.insert(2, frames[2]);
    assert!(matches!(inspect(join(&twice).as_slice()), Err(BackupError::Frame { .. })));
}

#[test]
fn other_files_and_other_formats_are_told_apart_from_damage() {
    assert!(matches!(inspect(&b"hello, world, hello"[..]), Err(BackupError::NotABackup)));
    assert!(matches!(inspect(&b""[..]), Err(BackupError::NotABackup)));
    let mut bytes = backup(1);
    bytes[8] = 2;
    assert!(matches!(inspect(bytes.as_slice()), Err(BackupError::Format(2))));
}

#[test]
fn a_header_that_does_not_go_with_the_records_is_refused() {
    for (change, named) in [
        ((|h: &mut Header| h.keys_held += 1) as fn(&mut Header), "number of keys"),
        (|h| h.cluster_id = "other".into(), "identity"),
        (|h| h.state_checksum += 1, "position"),
    ] {
        let mut header = header(3);
        change(&mut header);
        let error = inspect(backup_with(3, &header, 0).as_slice()).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    /// A damaged length asks for no memory that the file does not fill.
    #[test]
    fn garbage_is_refused_and_never_panics(mut bytes in prop::collection::vec(any::<u8>(), 0..200), like in any::<bool>()) {
        if like {
            let head = backup(0);
            let cut = head.len().min(12);
            bytes.splice(0..0, head[..cut].iter().copied());
        }
        prop_assert!(inspect(bytes.as_slice()).is_err());
    }
}
