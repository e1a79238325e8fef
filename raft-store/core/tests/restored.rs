//! A state that a restore from a backup has made: it is formed anew, and acquires nothing for one full expiry.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{LEASE, Replica, acquire, form, heartbeat, key, plain, register, spawn, stamp};
use holdfast_core::codec::encode;
use holdfast_core::command::Command;
use holdfast_core::kv::{MemState, ReadState, Table, Txn, keys};
use holdfast_core::outcome::{Outcome, Refusal};
use holdfast_core::records::{ProgressRecord, RestoredRecord};
use holdfast_wire::LeaseConfig;

/// Cluster time of the backup, in milliseconds.
const BACKUP_MS: u64 = 1_700_000_000_000;
const JUMPED: u64 = 1 << 32;

fn restored(quarantine_ms: u64) -> Replica {
    let mut state = MemState::default();
    let mut txn = Txn::new(&state);
    let record = RestoredRecord {
        from_cluster_id: "old".to_owned(),
        from_index: 77,
        lease: LEASE,
        terminated_keep_ms: 20_000,
        quarantine_ms,
        acquisitions_from_ms: None,
    };
    let progress = ProgressRecord { cluster_time_ms: BACKUP_MS, ..ProgressRecord::default() };
    txn.put(Table::Meta, keys::RESTORED.to_vec(), encode(&record));
    txn.put(Table::Meta, keys::PROGRESS.to_vec(), encode(&progress));
    let writes = txn.into_writes();
    state.commit(writes);
    Replica { state, index: JUMPED }
}

fn connect(replica: &mut Replica, id: &str, at_ms: u64) -> Outcome {
    let wanted = acquire(key("k", ""), Some(spawn(id, &[1])));
    replica.apply(9, stamp(at_ms), &plain(wanted)).0.outcome
}

fn beat(replica: &mut Replica, at_ms: u64) {
    replica.apply(9, stamp(at_ms), &plain(Command::Heartbeats(vec![heartbeat(1, "s1", 5)])));
}

#[test]
fn nothing_is_acquired_for_one_full_expiry_of_the_old_cluster_and_then_with_a_token_beyond_all_of_its() {
    let mut replica = restored(LEASE.expiry_ms);
    assert_eq!(connect(&mut replica, "b0", BACKUP_MS), Outcome::Refused(Refusal::NotFormed));
    // Whoever forms it proposes other durations: those of the old cluster count, its backends live by them.
    let other = LeaseConfig { expiry_ms: 600_000, ..LEASE };
    let formed = replica.apply(9, stamp(BACKUP_MS + 10), &plain(form(other, 1))).0.outcome;
    assert_eq!(formed, Outcome::Formed(true));
    let cluster = replica.view().cluster().unwrap().unwrap();
    assert_eq!(cluster.cluster_id, "cluster-1");
    assert_eq!((cluster.lease, cluster.terminated_keep_ms, cluster.token_secret), (LEASE, 20_000, [7; 32]));

    replica.apply(9, stamp(BACKUP_MS + 20), &plain(register("d1", "i1", "s1", false)));
    let ends_ms = BACKUP_MS + 10 + LEASE.expiry_ms;
    for at_ms in [BACKUP_MS + 20, ends_ms - 1] {
        beat(&mut replica, at_ms);
        let refused = connect(&mut replica, "b1", at_ms);
        assert_eq!(refused, Outcome::Refused(Refusal::Restored { wait_ms: ends_ms - at_ms }));
        assert!(replica.state.scan(Table::Keys, &[], None, 1).unwrap().is_empty());
    }
    beat(&mut replica, ends_ms);
    let Outcome::Acquired(holder) = connect(&mut replica, "b1", ends_ms) else { panic!("not acquired") };
    assert!(holder.token > JUMPED);
    // A second forming changes nothing, and begins no second wait.
    assert_eq!(replica.apply(9, stamp(ends_ms), &plain(form(LEASE, 1))).0.outcome, Outcome::Formed(false));
    assert_eq!(replica.view().quarantine_left_ms(ends_ms).unwrap(), None);
}

#[test]
fn the_wait_can_be_longer_than_an_expiry_and_never_shorter() {
    for (asked_ms, waits_ms) in [(1, LEASE.expiry_ms), (600_000, 600_000)] {
        let mut replica = restored(asked_ms);
        replica.apply(9, stamp(BACKUP_MS), &plain(form(LEASE, 1)));
        assert_eq!(replica.view().quarantine_left_ms(BACKUP_MS).unwrap(), Some(waits_ms));
    }
}
