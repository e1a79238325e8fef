//! Replicas agree (invariant 6): the same log gives the same bytes, however it is cut into batches; another log gives
//! another checksum.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{
    LEASE, STATUSES, acquire, form, heartbeat, idempotent, key, plain, register, report, spawn, state_of,
    tables_agree,
};
use holdfast_core::apply::{Applied, Position, apply, apply_blank};
use holdfast_core::command::{
    ActivityReport, Command, FromDrone, Proposal, Renew, RenewKey, Stamp, Sweep, SweepKey,
};
use holdfast_core::kv::{MemState, Txn};
use holdfast_core::limits::{CHECKSUM_EVERY, CHECKSUMS_KEPT};
use holdfast_core::records::ProgressRecord;
use holdfast_core::view::View;
use holdfast_wire::{LeaseConfig, TerminationKind, TerminationReason};
use proptest::prelude::*;

/// One entry of a log: the proposal (or a blank entry), and how far its stamp is from the one before.
#[derive(Debug, Clone)]
struct Entry {
    proposal: Option<Proposal>,
    term: u64,
    elapsed_ms: u64,
    own_term_only: bool,
}

fn name(prefix: &'static str, count: u8) -> impl Strategy<Value = String> {
    (0..count).prop_map(move |n| format!("{prefix}{n}"))
}

fn commands() -> impl Strategy<Value = Command> {
    let drone = || 1..4i32;
    let backend = || name("b", 12);
    let token = || prop::option::of(1..60u64);
    let limits = (prop::option::of(1..60u32), prop::option::of(1..20u32));
    prop_oneof![
        1 => Just(form(LEASE, 20_000)),
        1 => (60_000..70_000u64).prop_map(|expiry_ms| Command::SetLease(LeaseConfig { expiry_ms, ..LEASE })),
        12 => (name("k", 4), name("t", 2), prop::option::of((backend(), any::<bool>(), drone(), drone(), limits)))
            .prop_map(|(name, tag, want)| {
                let spawn = want.map(|(id, id_supplied, a, b, (lifetime, max_idle))| {
                    let mut spawn = spawn(&id, &[a, b]);
                    spawn.id_supplied = id_supplied;
                    spawn.lifetime_limit_seconds = lifetime;
                    spawn.max_idle_seconds = max_idle;
                    spawn
                });
                acquire(key(&name, &tag), spawn)
            }),
        4 => (drone(), prop::collection::vec((backend(), token()), 0..4)).prop_map(|(drone_id, keys)| {
            let keys = keys.into_iter().map(|(backend_id, token)| RenewKey { backend_id, token }).collect();
            Command::Renew(Renew { drone_id, keys })
        }),
        1 => (name("k", 4), any::<bool>()).prop_map(|(name, allow)| {
            Command::SetAllowRenew { namespace: String::new(), name, allow }
        }),
        1 => name("k", 4).prop_map(|name| Command::RevokeKey { namespace: String::new(), name }),
        3 => (name("d", 3), name("i", 3), name("s", 3), any::<bool>())
            .prop_map(|(name, incarnation, session, take_over)| {
                register(&name, &incarnation, &session, take_over)
            }),
        8 => prop::collection::vec((drone(), name("s", 3), any::<i32>()), 0..4).prop_map(|items| {
            let items = items.into_iter().map(|(id, session, at)| heartbeat(id, &session, at.into()));
            Command::Heartbeats(items.collect())
        }),
        8 => (drone(), backend(), prop::sample::select(STATUSES.to_vec()), token())
            .prop_map(|(drone, id, status, token)| report(drone, &id, state_of(status), token)),
        2 => (drone(), 1..60u64, 0..2u32).prop_map(|(drone_id, index, sub)| {
            Command::AckActions { drone_id, action_ids: vec![format!("ak-{index}-{sub}")] }
        }),
        3 => (backend(), any::<bool>()).prop_map(|(backend_id, hard)| Command::Terminate {
            backend_id,
            kind: if hard { TerminationKind::Hard } else { TerminationKind::Soft },
            reason: TerminationReason::External,
        }),
        1 => (name("d", 3), any::<bool>(), prop::option::of(0..60_000u64)).prop_map(
            |(drone, draining, deadline_in_ms)| {
                Command::Drain { cluster: "c".to_owned(), drone, draining, deadline_in_ms }
            }
        ),
        4 => (drone(), name("i", 2), 1..20i64, backend(), prop::option::of(0..20_000u64)).prop_map(
            |(drone_id, incarnation, activity_id, backend_id, idle_ms)| {
                let items = vec![ActivityReport { backend_id, token: None, idle_ms }];
                Command::Together(vec![
                    FromDrone::Activity { drone_id, incarnation, activity_id, items },
                ])
            }
        ),
        1 => (drone(), name("s", 3))
            .prop_map(|(drone_id, session)| Command::Together(vec![FromDrone::Leaving { drone_id, session }])),
        2 => Just(Command::EndDue),
        1 => (backend(), name("u", 3)).prop_map(|(backend_id, user)| {
            Command::RevokeTokens { backend_id, user }
        }),
        1 => Just(Command::Tick),
    ]
}

/// A sweep is proposed by somebody who looked: `None` stands for "what the state says at that point".
fn proposals() -> impl Strategy<Value = Option<Proposal>> {
    prop_oneof![
        20 => commands().prop_map(|command| Some(plain(command))),
        3 => (commands(), name("r", 3), 0..2u8)
            .prop_map(|(command, key, digest)| Some(idempotent(command, &key, digest))),
        1 => Just(None),
    ]
}

fn logs() -> impl Strategy<Value = Vec<Entry>> {
    let entry =
        (proposals(), 0..3u64, prop_oneof![0..500u64, 0..30_000u64], prop::bool::weighted(0.1)).prop_map(
            |(proposal, term, elapsed_ms, own_term_only)| Entry { proposal, term, elapsed_ms, own_term_only },
        );
    prop::collection::vec(entry, 1..150).prop_map(|mut entries| {
        let opening =
            [form(LEASE, 20_000), register("d0", "i0", "s0", true), register("d1", "i0", "s0", true)];
        let opening = opening.map(|command| Entry {
            proposal: Some(plain(command)),
            term: 0,
            elapsed_ms: 0,
            own_term_only: false,
        });
        entries.splice(0..0, opening);
        entries
    })
}

fn apply_one(
    txn: &mut Txn<'_, MemState>,
    index: u64,
    cluster_time_ms: u64,
    entry: &Entry,
) -> Option<Applied> {
    let at = Position { term: 1 + entry.term, index };
    match &entry.proposal {
        None => {
            apply_blank(txn, at).unwrap();
            None
        }
        Some(proposal) => {
            let stamp = Stamp { cluster_time_ms, own_term_only: entry.own_term_only };
            Some(apply(txn, at, stamp, proposal).unwrap())
        }
    }
}

/// Applies a log, committing after as many entries as `batches` says in turn.
fn replica(log: &[Entry], batches: &[usize]) -> (MemState, Vec<Option<Applied>>) {
    let mut state = MemState::default();
    let mut answers = Vec::new();
    let mut rest = log;
    let mut time_ms = 1_000_000;
    for size in batches.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (batch, later) = rest.split_at((*size).min(rest.len()));
        rest = later;
        let mut txn = Txn::new(&state);
        for entry in batch {
            time_ms += entry.elapsed_ms;
            answers.push(apply_one(&mut txn, answers.len() as u64 + 1, time_ms, entry));
        }
        let writes = txn.into_writes();
        state.commit(writes);
    }
    (state, answers)
}

fn progress(state: &MemState) -> ProgressRecord {
    View(state).progress().unwrap()
}

/// Puts real sweeps where the log has blanks: what a leader would have proposed there.
fn with_sweeps(log: Vec<Entry>) -> Vec<Entry> {
    let mut state = MemState::default();
    let mut time_ms = 1_000_000;
    let mut out = Vec::new();
    for (i, mut entry) in log.into_iter().enumerate() {
        time_ms += entry.elapsed_ms;
        if entry.proposal.is_none() && i % 4 != 0 {
            let mut keys = View(&state).expired_candidates(time_ms, 5).unwrap();
            keys.push(SweepKey {
                indexed_at_ms: time_ms,
                namespace: String::new(),
                name: "k0".to_owned(),
                token: 5,
            });
            entry.proposal = Some(plain(Command::Sweep(Sweep { keys, records: true })));
        }
        let mut txn = Txn::new(&state);
        apply_one(&mut txn, i as u64 + 1, time_ms, &entry);
        let writes = txn.into_writes();
        state.commit(writes);
        tables_agree(&state);
        out.push(entry);
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn batching_makes_no_difference(
        log in logs().prop_map(with_sweeps),
        batches in prop::collection::vec(1..40usize, 1..6),
    ) {
        let (one_by_one, answers) = replica(&log, &[1]);
        let (batched, same_answers) = replica(&log, &batches);
        let (at_once, _) = replica(&log, &[usize::MAX]);
        prop_assert_eq!(&answers, &same_answers);
        prop_assert_eq!(&one_by_one, &batched);
        prop_assert_eq!(&one_by_one, &at_once);

        let published = progress(&one_by_one).published;
        prop_assert!(published.len() <= CHECKSUMS_KEPT);
        prop_assert_eq!(published.len() as u64, (log.len() as u64 / CHECKSUM_EVERY).min(CHECKSUMS_KEPT as u64));
    }

    #[test]
    fn a_log_that_differs_in_one_entry_has_another_checksum(
        log in logs().prop_map(with_sweeps),
        at in any::<prop::sample::Index>(),
    ) {
        let at = at.index(log.len());
        let mut other = log.clone();
        // Something that no generated log holds, and that changes the state.
        other[at].proposal = Some(plain(register("stranger", "i9", "s9", true)));
        let (state, _) = replica(&log, &[1]);
        let (other_state, _) = replica(&other, &[1]);
        // Before the cluster is formed it would be refused and, like what it replaced, change nothing.
        prop_assume!(View(&other_state).drone_by_name("c", "stranger").unwrap().is_some());
        prop_assert_ne!(progress(&state).checksum, progress(&other_state).checksum);
    }

    #[test]
    fn a_refused_or_replayed_command_changes_nothing_but_time(log in logs().prop_map(with_sweeps)) {
        let mut state = MemState::default();
        let mut time_ms = 1_000_000;
        for (i, entry) in log.iter().enumerate() {
            time_ms += entry.elapsed_ms;
            let mut txn = Txn::new(&state);
            let applied = apply_one(&mut txn, i as u64 + 1, time_ms, entry);
            let writes = txn.into_writes();
            let refused = applied.is_some_and(|applied| {
                applied.replayed || matches!(applied.outcome, holdfast_core::outcome::Outcome::Refused(_))
            });
            if refused {
                prop_assert_eq!(writes.len(), 1, "{:?} wrote {:?}", entry, writes);
            }
            state.commit(writes);
        }
    }
}

#[test]
fn a_snapshot_carries_the_checksum_on() {
    let log: Vec<Entry> = (0..200)
        .map(|i| Entry {
            proposal: Some(plain(if i == 0 { form(LEASE, 1000) } else { Command::Tick })),
            term: 0,
            elapsed_ms: 10,
            own_term_only: false,
        })
        .collect();
    let (whole, _) = replica(&log, &[7]);
    // A replica that starts from a copy of the state at entry 100.
    let (mut copy, _) = replica(&log[..100], &[100]);
    for (i, entry) in log.iter().enumerate().skip(100) {
        let mut txn = Txn::new(&copy);
        apply_one(&mut txn, i as u64 + 1, 1_000_000 + (i as u64 + 1) * 10, entry);
        let writes = txn.into_writes();
        copy.commit(writes);
    }
    assert_eq!(copy, whole);
    assert_eq!(progress(&copy).published.iter().map(|p| p.0).collect::<Vec<_>>(), [64, 128, 192]);
}
