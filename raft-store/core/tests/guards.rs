//! Checks that the state machine makes although its other rules keep them from ever mattering: a state in which one of
//! these rules was broken (by a fault of ours, or by the disk) must not let two backends run.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{
    LEASE, Replica, acquire, form, heartbeat, key, plain, register, report, spawn, stamp, state_of,
};
use holdfast_core::apply::{Position, apply};
use holdfast_core::codec::encode;
use holdfast_core::command::{Command, Renew, RenewKey};
use holdfast_core::kv::{StateError, Table, Txn, Writes, keys};
use holdfast_core::outcome::{Outcome, RenewOutcome};
use holdfast_core::records::KeyRecord;
use holdfast_wire::BackendStatus;

/// Backend `b1` holds key `k` on drone 1 with token 4; its spawn is pending.
fn with_a_holder() -> Replica {
    let mut replica = Replica::default();
    for command in [
        form(LEASE, 1000),
        register("d1", "i1", "s1", true),
        Command::Heartbeats(vec![heartbeat(1, "s1", 500_000)]),
        acquire(key("k", ""), Some(spawn("b1", &[1]))),
    ] {
        replica.apply(1, stamp(0), &plain(command));
    }
    assert_eq!(replica.view().due_actions(1, "s1", None, 0, 10).unwrap().len(), 1);
    replica
}

fn put(replica: &mut Replica, table: Table, key: Vec<u8>, value: Option<Vec<u8>>) {
    replica.state.commit(Writes::from([((table, key), value)]));
}

fn change_key(replica: &mut Replica, change: impl FnOnce(&mut KeyRecord)) {
    let mut record = replica.view().key("", "k").unwrap().unwrap();
    change(&mut record);
    put(replica, Table::Keys, keys::pair("", "k"), Some(encode(&record)));
}

#[test]
fn a_spawn_of_another_session_is_not_due() {
    let mut replica = with_a_holder();
    let mut drone = replica.view().drone(1).unwrap().unwrap();
    drone.session = "s2".to_owned();
    put(&mut replica, Table::Drones, keys::drone(1), Some(encode(&drone)));
    for session in ["s1", "s2"] {
        assert_eq!(replica.view().due_actions(1, session, None, 0, 10).unwrap(), [], "{session}");
    }
}

#[test]
fn a_spawn_without_its_key_is_not_due() {
    let mut replica = with_a_holder();
    change_key(&mut replica, |key| key.token = 99);
    assert_eq!(replica.view().due_actions(1, "s1", None, 0, 10).unwrap(), []);

    let mut replica = with_a_holder();
    change_key(&mut replica, |key| key.backend_id = "b2".to_owned());
    assert_eq!(replica.view().due_actions(1, "s1", None, 0, 10).unwrap(), []);

    let mut replica = with_a_holder();
    put(&mut replica, Table::Keys, keys::pair("", "k"), None);
    assert_eq!(replica.view().due_actions(1, "s1", None, 0, 10).unwrap(), []);
}

#[test]
fn a_renewal_does_not_extend_the_key_of_another_backend() {
    let mut replica = with_a_holder();
    change_key(&mut replica, |key| key.backend_id = "b2".to_owned());
    let keys = vec![RenewKey { backend_id: "b1".to_owned(), token: None }];
    let (applied, writes) =
        replica.apply(1, stamp(1000), &plain(Command::Renew(Renew { drone_id: 1, keys })));
    assert_eq!(applied.outcome, Outcome::Renewed(vec![RenewOutcome::NotHolder]));
    assert_eq!(writes.len(), 1);
}

#[test]
fn a_terminated_report_does_not_release_the_key_of_another_token() {
    let mut replica = with_a_holder();
    change_key(&mut replica, |key| key.token = 99);
    replica.apply(1, stamp(0), &plain(report(1, "b1", state_of(BackendStatus::Terminated), None)));
    assert_eq!(replica.view().key("", "k").unwrap().unwrap().token, 99);
}

#[test]
fn a_token_that_would_not_grow_stops_the_replica() {
    let mut replica = with_a_holder();
    change_key(&mut replica, |key| key.token = 1_000);
    replica.apply(1, stamp(60_000), &plain(Command::Heartbeats(vec![heartbeat(1, "s1", 560_000)])));
    let mut txn = Txn::new(&replica.state);
    let again = plain(acquire(key("k", ""), Some(spawn("b2", &[1]))));
    let applied = apply(&mut txn, Position { term: 1, index: 6 }, stamp(60_000), &again);
    assert!(matches!(applied, Err(StateError::Damaged(what)) if what.contains("token 1000")));
}

#[test]
fn a_token_past_what_json_can_carry_stops_the_replica() {
    let replica = with_a_holder();
    let mut txn = Txn::new(&replica.state);
    let other = plain(acquire(key("other", ""), Some(spawn("b2", &[1]))));
    let applied = apply(&mut txn, Position { term: 1, index: 1 << 53 }, stamp(0), &other);
    assert!(matches!(applied, Err(StateError::Damaged(_))));
}

#[test]
fn a_key_without_its_backend_stops_the_replica() {
    let mut replica = with_a_holder();
    put(&mut replica, Table::Backends, b"b1".to_vec(), None);
    let mut txn = Txn::new(&replica.state);
    let found =
        apply(&mut txn, Position { term: 1, index: 5 }, stamp(0), &plain(acquire(key("k", ""), None)));
    assert!(matches!(found, Err(StateError::Damaged(_))));
}
