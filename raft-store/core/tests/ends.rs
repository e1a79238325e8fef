//! Ends of many backends at once: bounded entries, one after the other, until nothing is due.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{LEASE, Replica, acquire, form, heartbeat, key, plain, register, spawn, stamp, tables_agree};
use holdfast_core::command::Command;
use holdfast_core::kv::Table;
use holdfast_core::limits::{DRAIN_ENDS_PER_ENTRY_MAX, ENDS_PER_ENTRY_MAX};
use holdfast_wire::{TerminationKind, TerminationReason};

const SWEPT: Option<(TerminationKind, TerminationReason)> =
    Some((TerminationKind::Soft, TerminationReason::Swept));

fn run(replica: &mut Replica, at_ms: u64, command: Command) {
    replica.apply(1, stamp(at_ms), &plain(command));
}

/// Three drones with `count` backends each, turn by turn.
fn cluster(count: usize, lifetime_limit_seconds: Option<u32>) -> Replica {
    let mut replica = Replica::default();
    run(&mut replica, 0, form(LEASE, 3_600_000));
    for (id, name) in [(1, "d1"), (2, "d2"), (3, "d3")] {
        run(&mut replica, 0, register(name, "i1", name, true));
        run(&mut replica, 0, Command::Heartbeats(vec![heartbeat(id, name, 500_000)]));
    }
    for at in 0..3 * count {
        let mut spawn = spawn(&format!("b{at:05}"), &[i32::try_from(at % 3).unwrap() + 1]);
        spawn.lifetime_limit_seconds = lifetime_limit_seconds;
        run(&mut replica, 0, acquire(key(&format!("k{at}"), ""), Some(spawn)));
    }
    replica
}

/// Backends of each drone that were asked to end.
fn asked(replica: &Replica) -> [usize; 3] {
    let (backends, _) = replica.view().backends("", None, usize::MAX - 1).unwrap();
    let mut asked = [0; 3];
    for (_, backend) in backends.iter().filter(|(_, backend)| backend.termination_asked == SWEPT) {
        asked[usize::try_from(backend.drone_id).unwrap() - 1] += 1;
    }
    asked
}

/// Ends what is due at a time as a leader does; each entry starts from the committed state alone. Gives what each wrote.
fn end_due(replica: &mut Replica, at_ms: u64) -> Vec<usize> {
    let mut ended = Vec::new();
    while replica.view().has_ends_due(at_ms).unwrap() {
        let (_, writes) = replica.apply(1, stamp(at_ms), &plain(Command::EndDue));
        ended.push(writes.keys().filter(|(table, _)| *table == Table::Backends).count());
        tables_agree(&replica.state);
        assert!(ended.len() < 100, "no end of it: {ended:?}");
    }
    ended
}

#[test]
fn limits_that_pass_at_once_are_seen_to_in_bounded_entries() {
    let count = ENDS_PER_ENTRY_MAX / 2;
    let mut replica = cluster(count, Some(10));
    assert!(!replica.view().has_ends_due(9_999).unwrap());
    assert_eq!(end_due(&mut replica, 10_000), [ENDS_PER_ENTRY_MAX, count]);
    assert_eq!(asked(&replica), [count; 3]);
}

#[test]
fn a_drain_of_two_of_three_drones_is_done_in_bounded_entries() {
    let count = DRAIN_ENDS_PER_ENTRY_MAX / 2 + 10;
    let mut replica = cluster(count, None);
    for drone in ["d1", "d3"] {
        let (cluster, drone) = ("c".to_owned(), drone.to_owned());
        let drain = Command::Drain { cluster, drone, draining: true, deadline_in_ms: Some(5_000) };
        run(&mut replica, 0, drain);
    }
    assert!(!replica.view().has_ends_due(4_999).unwrap());
    let ended = end_due(&mut replica, 5_000);
    assert_eq!(ended, [DRAIN_ENDS_PER_ENTRY_MAX, 20], "the third drone's backends cost nothing");
    assert_eq!(asked(&replica), [count, 0, count]);
}

#[test]
fn an_undone_drain_stops_in_the_middle_of_its_pass() {
    let mut replica = cluster(2 * DRAIN_ENDS_PER_ENTRY_MAX, None);
    let drain = |draining, deadline_in_ms| Command::Drain {
        cluster: "c".to_owned(),
        drone: "d1".to_owned(),
        draining,
        deadline_in_ms,
    };
    run(&mut replica, 0, drain(true, Some(5_000)));
    run(&mut replica, 5_000, Command::EndDue);
    let before = asked(&replica);
    assert!(before[0] > 0);
    run(&mut replica, 5_000, drain(false, None));
    assert!(end_due(&mut replica, 9_000).is_empty());
    assert_eq!(asked(&replica), before);
    // A newer drain begins from the beginning and asks nobody twice.
    run(&mut replica, 9_000, drain(true, Some(0)));
    let ended: usize = end_due(&mut replica, 9_000).into_iter().sum();
    assert_eq!(before[0] + ended, 2 * DRAIN_ENDS_PER_ENTRY_MAX);
}
