//! The state machine against a model: drones on skewed clocks, a network that loses, reorders and repeats, leaders that
//! come and go. After every step the numbered invariants of the design are checked.
//!
//! ```text
//!   Op ─▶ Sim ── messages ──▶ Replica (the real apply, the real cluster clock)
//!          │  ◀── actions, deadlines ──┘        │
//!          ▼                                    ▼
//!     SimDrones (what really runs)        Model (what must be held)
//!          └──────────▶ invariants ◀────────────┘
//! ```

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../common/mod.rs"]
mod common;
mod delivery;
mod drone;
mod invariants;
mod ops;
mod sim;

use ops::{Faults, Op, Stats};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use sim::Sim;

fn ops(len: std::ops::Range<usize>) -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        6 => (0..KEYS, 0..2u8, 0..DRONES, 0..DRONES)
            .prop_map(|(key, tag, first, second)| Op::Connect { key, tag, first, second }),
        4 => (0..DRONES).prop_map(Op::Heartbeat),
        4 => (0..DRONES).prop_map(Op::Renew),
        3 => (0..DRONES).prop_map(Op::ReadActions),
        6 => any::<prop::sample::Index>().prop_map(Op::Deliver),
        2 => any::<prop::sample::Index>().prop_map(Op::Repeat),
        2 => any::<prop::sample::Index>().prop_map(Op::Lose),
        6 => Just(Op::Settle),
        3 => (1..25_000u64).prop_map(Op::Advance),
        5 => (0..KEYS, -2..4i64).prop_map(|(key, offset_ms)| Op::AdvanceToExpiry { key, offset_ms }),
        2 => (0..DRONES, -40_000_000..40_000_000i64)
            .prop_map(|(drone, wall_ms)| Op::Restart { drone, wall_ms }),
        1 => (0..DRONES, -40_000_000..40_000_000i64)
            .prop_map(|(drone, wall_ms)| Op::OtherMachine { drone, wall_ms }),
        1 => (0..DRONES, -40_000_000..40_000_000i64)
            .prop_map(|(drone, wall_ms)| Op::MoveDisk { drone, wall_ms }),
        2 => (0..DRONES).prop_map(Op::OldMachineSpeaks),
        1 => (0..KEYS).prop_map(|key| Op::SecondSending { key }),
        1 => (0..DRONES).prop_map(Op::Crash),
        2 => (0..DRONES, any::<bool>()).prop_map(|(drone, moved)| Op::Reconnect { drone, moved }),
        1 => (0..DRONES).prop_map(Op::ReportAgain),
        1 => (0..DRONES).prop_map(Op::BackendExits),
        3 => (0..KEYS, any::<bool>()).prop_map(|(key, hard)| Op::Terminate { key, hard }),
        1 => (0..KEYS, any::<bool>()).prop_map(|(key, allow)| Op::AllowRenew { key, allow }),
        2 => Just(Op::ProposeSweep),
        2 => Just(Op::EndDue),
        1 => (0..DRONES, prop::option::of(0..30_000u64), prop::bool::weighted(0.7))
            .prop_map(|(drone, deadline_ms, undo)| Op::Drain { drone, deadline_ms, undo }),
        1 => (0..KEYS).prop_map(Op::Revoke),
        2 => (prop_oneof![0..6_000u64, 0..90_000u64], 950..=1050u64, 0..1_000_000_000u64).prop_map(
            |(outage_ms, rate_permille, boot_ms)| Op::LeaderChange { outage_ms, rate_permille, boot_ms }
        ),
    ];
    prop::collection::vec(op, len)
}

const KEYS: usize = 3;
/// The last one is a drone of Plane's.
const DRONES: usize = 3;

fn run(ops: &[Op], faults: Faults) -> Result<Stats, String> {
    let mut sim = Sim::new(DRONES, faults);
    for (step, op) in ops.iter().enumerate() {
        sim.step(op)
            .and_then(|()| invariants::all(&mut sim))
            .map_err(|broken| format!("step {step}, {op:?}: {broken}"))?;
    }
    Ok(sim.stats)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_invariants_hold_whatever_happens(ops in ops(1..120)) {
        if let Err(broken) = run(&ops, Faults::none()) {
            return Err(TestCaseError::fail(broken));
        }
    }
}

/// Runs of the same operations each time: what happened in those that kept the invariants, and what broke in the others.
fn fixed_runs(count: usize, faults: Faults) -> (Stats, Vec<String>) {
    let mut runner = TestRunner::deterministic();
    let mut total = Stats::default();
    let mut broken = Vec::new();
    for _ in 0..count {
        let ops = ops(60..120).new_tree(&mut runner).unwrap().current();
        match run(&ops, faults) {
            Ok(stats) => total.add(stats),
            Err(what) => broken.push(what),
        }
    }
    (total, broken)
}

/// A model that does nothing proves nothing.
#[test]
fn the_runs_reach_what_matters() {
    let (stats, broken) = fixed_runs(600, Faults::none());
    assert!(broken.is_empty(), "{broken:?}");
    println!("{stats:?}");
    for (what, count) in [
        ("acquired", stats.acquired),
        ("found", stats.found),
        ("leaving", stats.leaving),
        ("tag mismatches", stats.tag_mismatch),
        ("taken over after expiry", stats.taken_over),
        ("released by report", stats.released),
        ("swept", stats.swept),
        ("renewed", stats.renewed),
        ("renewals refused", stats.renewals_refused),
        ("started", stats.started),
        ("spawns refused as late", stats.late_spawns),
        ("ended at the hard deadline", stats.killed_at_deadline),
        ("started under a key that had another backend", stats.successors),
        ("adopted", stats.adopted),
        ("lists that took effect", stats.listed),
        ("spawns handed to another session", stats.sent_again),
        ("backends left by a list", stats.leaving_by_list),
        ("ended because they were listed and not held", stats.ended_as_listed),
        ("ends that were asked for again", stats.asked_again),
        ("reports of living backends answered by an end", stats.ended_as_reported),
        ("terminated reports of another disk that freed nothing", stats.foreign_ends),
        ("terminated reports of Plane's that freed nothing", stats.kept_for_second),
        ("second processes of Plane's", stats.started_again),
        ("asked to end by a limit or a drain", stats.ended_by_time),
    ] {
        assert!(count >= 20, "only {count} times: {what} ({stats:?})");
    }
}

#[test]
fn drones_that_do_not_kill_at_the_deadline_are_caught() {
    let (_, broken) = fixed_runs(400, Faults { ignore_deadlines: true, ..Faults::none() });
    assert!(broken.iter().any(|what| what.contains("invariant 1")), "{broken:?}");
}

#[test]
fn clocks_outside_the_tolerance_are_caught() {
    let (_, broken) = fixed_runs(400, Faults { drone_rate_permille: Some(850), ..Faults::none() });
    assert!(broken.iter().any(|what| what.contains("invariant 1")), "{broken:?}");
}

#[test]
fn a_cluster_clock_that_runs_ahead_is_caught() {
    let (_, broken) = fixed_runs(100, Faults { leader_rate_permille: Some(1300), ..Faults::none() });
    assert!(broken.iter().any(|what| what.contains("invariant 3")), "{broken:?}");
}
