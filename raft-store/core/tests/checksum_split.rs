//! The record of replicas whose checksums differ without a majority, and the operator's decision.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{LEASE, Replica, acquire, form, heartbeat, key, plain, register, spawn, stamp};
use holdfast_core::command::{Command, Renew, RenewKey};
use holdfast_core::limits::{CHECKSUM_EVERY, CHECKSUM_SPLIT_VALUES_MAX};
use holdfast_core::outcome::{Outcome, Refusal, RenewOutcome};
use holdfast_core::records::{AcceptedChecksum, ChecksumsRecord};

fn run(replica: &mut Replica, command: Command) -> Outcome {
    let now_ms = replica.progress().cluster_time_ms + 1;
    replica.apply(1, stamp(now_ms), &plain(command)).0.outcome
}

fn formed() -> Replica {
    let mut replica = Replica::default();
    replica.apply(1, stamp(1_000_000), &plain(form(LEASE, 1000)));
    run(&mut replica, register("d1", "i1", "s1", false));
    run(&mut replica, Command::Heartbeats(vec![heartbeat(1, "s1", 5)]));
    replica
}

fn connect(replica: &mut Replica, name: &str, id: &str) -> Outcome {
    run(replica, acquire(key(name, ""), Some(spawn(id, &[1]))))
}

fn split(index: u64, values: &[(u64, u64)]) -> Command {
    Command::ChecksumSplit { index, values: values.to_vec() }
}

fn accept(index: u64, value: u64) -> Command {
    Command::AcceptChecksum { index, value }
}

#[test]
fn while_replicas_differ_nothing_is_acquired_and_all_else_works() {
    let mut replica = formed();
    let Outcome::Acquired(held) = connect(&mut replica, "held", "b0") else { panic!("not acquired") };
    assert_eq!(run(&mut replica, split(16, &[(2, 8), (1, 7)])), Outcome::Updated(true));
    assert_eq!(connect(&mut replica, "free", "b1"), Outcome::Refused(Refusal::ChecksumsDiffer { index: 16 }));
    assert!(matches!(connect(&mut replica, "held", "b1"), Outcome::Found(_)));
    let keys = vec![RenewKey { backend_id: "b0".to_owned(), token: Some(held.token) }];
    let renewed = run(&mut replica, Command::Renew(Renew { drone_id: 1, keys }));
    assert_eq!(renewed, Outcome::Renewed(vec![RenewOutcome::Renewed]));
    assert_eq!(run(&mut replica, accept(16, 7)), Outcome::Updated(true));
    assert!(matches!(connect(&mut replica, "free", "b1"), Outcome::Acquired(_)));
}

#[test]
fn only_a_value_that_was_seen_at_that_index_can_be_accepted() {
    let mut replica = formed();
    let nothing = run(&mut replica, accept(16, 7));
    assert!(matches!(nothing, Outcome::Refused(Refusal::Checksum(_))), "{nothing:?}");
    run(&mut replica, split(16, &[(1, 7), (2, 8)]));
    for wrong in [accept(32, 7), accept(16, 9)] {
        let Outcome::Refused(Refusal::Checksum(why)) = run(&mut replica, wrong) else { panic!("accepted") };
        assert!(why.contains("index 16") && why.contains("member 2 has 0000000000000008"), "{why}");
    }
    assert_eq!(run(&mut replica, accept(16, 8)), Outcome::Updated(true));
    // The same decision again, and another one.
    assert_eq!(run(&mut replica, accept(16, 8)), Outcome::Updated(false));
    assert!(matches!(run(&mut replica, accept(16, 7)), Outcome::Refused(Refusal::Checksum(_))));
    let accepted = replica.view().checksums().unwrap().accepted;
    assert!(matches!(accepted, Some(AcceptedChecksum { index: 16, value: 8, .. })));
}

#[test]
fn a_split_is_recorded_once_and_missing_values_are_added() {
    let mut replica = formed();
    run(&mut replica, split(16, &[(1, 7), (3, 8)]));
    assert_eq!(run(&mut replica, split(16, &[(1, 7), (3, 8)])), Outcome::Updated(false));
    assert_eq!(run(&mut replica, split(32, &[(1, 1), (2, 2)])), Outcome::Updated(false), "another index");
    assert_eq!(run(&mut replica, split(16, &[(2, 9), (3, 5)])), Outcome::Updated(true));
    let record = replica.view().checksums().unwrap();
    assert_eq!(record.split.unwrap().values, [(1, 7), (2, 9), (3, 8)], "what was recorded stands");
    let many: Vec<(u64, u64)> = (1..100).map(|id| (id, id)).collect();
    run(&mut replica, split(16, &many));
    let record = replica.view().checksums().unwrap();
    assert_eq!(record.split.unwrap().values.len(), CHECKSUM_SPLIT_VALUES_MAX);
}

#[test]
fn a_late_report_does_not_reopen_what_was_decided() {
    let mut replica = formed();
    run(&mut replica, split(32, &[(1, 7), (2, 8)]));
    run(&mut replica, accept(32, 7));
    for index in [16, 32] {
        assert_eq!(run(&mut replica, split(index, &[(1, 7), (2, 8)])), Outcome::Updated(false));
    }
    assert_eq!(run(&mut replica, split(48, &[(1, 7), (2, 8)])), Outcome::Updated(true));
}

/// The record is the same on replicas that disagree: it follows from the entries, not from their own checksums.
#[test]
fn replicas_that_disagree_record_and_refuse_alike() {
    let mut replicas = [formed(), formed()];
    connect(&mut replicas[0], "a", "b-one");
    connect(&mut replicas[1], "b", "b-two");
    let mut records = Vec::new();
    for replica in &mut replicas {
        run(replica, split(16, &[(1, 7), (2, 8)]));
        let refused = connect(replica, "c", "b-three");
        assert_eq!(refused, Outcome::Refused(Refusal::ChecksumsDiffer { index: 16 }));
        records.push(replica.view().checksums().unwrap());
    }
    assert_ne!(replicas[0].progress().checksum, replicas[1].progress().checksum);
    assert_eq!(records[0], records[1]);
}

#[test]
fn the_checksum_at_the_index_of_a_split_is_kept_however_many_entries_follow() {
    let mut replica = formed();
    while replica.index < 3 * CHECKSUM_EVERY {
        run(&mut replica, Command::Tick);
    }
    let at = 2 * CHECKSUM_EVERY;
    let value = |replica: &Replica| {
        replica.progress().published.iter().find(|(index, _)| *index == at).map(|(_, value)| *value)
    };
    let own = value(&replica).unwrap();
    run(&mut replica, split(at, &[(1, own), (2, 0)]));
    for _ in 0..400 {
        run(&mut replica, Command::Tick);
    }
    assert_eq!(value(&replica), Some(own));
    run(&mut replica, accept(at, own));
    for _ in 0..400 {
        run(&mut replica, Command::Tick);
    }
    // So that one that was away compares itself with the decision.
    assert_eq!(value(&replica), Some(own));
    assert!(replica.progress().published.iter().all(|(index, _)| *index != 3 * CHECKSUM_EVERY));
}

#[test]
fn without_a_split_nothing_is_written() {
    let replica = formed();
    assert_eq!(replica.view().checksums().unwrap(), ChecksumsRecord::default());
}
