//! The bytes of the log and of the records are a format: these tests pin them. After a deliberate change (appended
//! variants and fields, or a new version byte) run with `UPDATE_GOLDENFILES=1` and read the difference.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use bincode::{Decode, Encode};
use common::{
    LEASE, STATUSES, acquire, form, heartbeat, idempotent, plain, register, report, spawn, state_of,
};
use holdfast_core::codec::{VERSION, decode, encode};
use holdfast_core::command::{
    ActivityReport, Command, FromDrone, Listed, Proposal, Renew, RenewKey, ReportStates, Stamp, Sweep,
    SweepKey,
};
use holdfast_core::outcome::{Holder, Outcome, Refusal, RenewOutcome, ReportOutcome};
use holdfast_core::records::{
    ActionRecord, ActivityRecord, BackendRecord, ClusterRecord, DroneRecord, HeartbeatRecord,
    IdempotencyRecord, KeyRecord, MemberIdsRecord, PendingAction, Presence, ProgressRecord, RestoredRecord,
    SpawnTarget,
};
use holdfast_wire::{BackendState, BackendStatus, KeyConfig, TerminationKind, TerminationReason};
use proptest::prelude::*;
use std::fmt::{Debug, Write as _};

fn key() -> KeyConfig {
    KeyConfig { name: "room".to_owned(), namespace: "games".to_owned(), tag: "v2".to_owned() }
}

fn proposals() -> Vec<(&'static str, Proposal)> {
    let mut full = spawn("b1", &[1, 300]);
    full.id_supplied = true;
    full.lifetime_limit_seconds = Some(3600);
    full.max_idle_seconds = Some(60);
    full.static_token = Some("static".to_owned());
    full.subdomain = Some("sub".to_owned());
    let text = str::to_owned;
    vec![
        ("form_cluster", plain(form(LEASE, 3_600_000))),
        ("set_lease", plain(Command::SetLease(LEASE))),
        ("acquire", plain(acquire(key(), Some(full)))),
        ("acquire_without_spawn", plain(acquire(key(), None))),
        (
            "renew",
            plain(Command::Renew(Renew {
                drone_id: 3,
                keys: vec![
                    RenewKey { backend_id: text("b1"), token: Some(1 << 40) },
                    RenewKey { backend_id: text("b2"), token: None },
                ],
            })),
        ),
        (
            "set_allow_renew",
            plain(Command::SetAllowRenew { namespace: text("games"), name: text("room"), allow: true }),
        ),
        ("revoke_key", plain(Command::RevokeKey { namespace: text("games"), name: text("room") })),
        ("register_drone", plain(register("d1", "i1", "s1", true))),
        ("heartbeats", plain(Command::Heartbeats(vec![heartbeat(1, "s1", -5), heartbeat(2, "s2", 1 << 41)]))),
        ("report_states", plain(report(3, "b1", state_of(BackendStatus::Ready), Some(9)))),
        ("ack_actions", plain(Command::AckActions { drone_id: 3, action_ids: vec![text("ak-5-0")] })),
        (
            "terminate",
            plain(Command::Terminate {
                backend_id: text("b1"),
                kind: TerminationKind::Hard,
                reason: TerminationReason::KeyExpired,
            }),
        ),
        (
            "drain",
            plain(Command::Drain {
                cluster: text("c"),
                drone: text("d1"),
                draining: true,
                deadline_in_ms: Some(300_000),
            }),
        ),
        ("revoke_tokens", plain(Command::RevokeTokens { backend_id: text("b1"), user: text("alice") })),
        (
            "sweep",
            plain(Command::Sweep(Sweep {
                keys: vec![SweepKey {
                    indexed_at_ms: 1_700_000_000_000,
                    namespace: text("games"),
                    name: text("room"),
                    token: 77,
                }],
                records: true,
            })),
        ),
        ("tick", plain(Command::Tick)),
        ("idempotent_tick", idempotent(Command::Tick, "request-1", 0xab)),
        ("end_due", plain(Command::EndDue)),
        (
            "together",
            plain(Command::Together(vec![
                FromDrone::Renew(Renew { drone_id: 3, keys: vec![] }),
                FromDrone::ReportStates(ReportStates {
                    drone_id: 3,
                    data_id: Some(text("m1")),
                    reports: vec![],
                }),
                FromDrone::AckActions { drone_id: 3, action_ids: vec![text("ak-5-0")] },
                FromDrone::Activity {
                    drone_id: 3,
                    incarnation: text("i1"),
                    activity_id: 7,
                    items: vec![
                        ActivityReport { backend_id: text("b1"), token: Some(1 << 40), idle_ms: Some(5000) },
                        ActivityReport { backend_id: text("b2"), token: None, idle_ms: None },
                    ],
                },
                FromDrone::Leaving { drone_id: 3, session: text("s1") },
                FromDrone::Listed(Listed {
                    drone_id: 3,
                    session: text("s1"),
                    absent: vec![(text("b1"), 1 << 40)],
                    ending: vec![text("b2")],
                    received: vec![text("b3")],
                    last: true,
                }),
            ])),
        ),
    ]
}

fn holder() -> Holder {
    Holder {
        key: key(),
        backend_id: "b1".to_owned(),
        cluster: "c".to_owned(),
        drone: "d1".to_owned(),
        token: 77,
        state: state_of(BackendStatus::Ready),
        termination_asked: Some(TerminationKind::Soft),
        is_waited_for: true,
        static_token: None,
        secret_token: "secret".to_owned(),
        subdomain: Some("sub".to_owned()),
    }
}

fn outcomes() -> Vec<(&'static str, Outcome)> {
    let text = str::to_owned;
    let refused = Outcome::Refused;
    vec![
        ("done", Outcome::Done),
        ("formed", Outcome::Formed(true)),
        ("acquired", Outcome::Acquired(holder())),
        ("found", Outcome::Found(holder())),
        ("leaving", Outcome::Leaving(holder())),
        ("not_formed", refused(Refusal::NotFormed)),
        ("tag_mismatch", refused(Refusal::TagMismatch { held: text("v1") })),
        ("no_spawn_config", refused(Refusal::NoSpawnConfig)),
        ("no_drone", refused(Refusal::NoDrone)),
        ("backend_id_used", refused(Refusal::BackendIdUsed(text("b1")))),
        ("no_such_key", refused(Refusal::NoSuchKey)),
        ("not_expired", refused(Refusal::NotExpired)),
        ("no_such_backend", refused(Refusal::NoSuchBackend(text("b1")))),
        ("no_such_drone", refused(Refusal::NoSuchDrone(text("d1")))),
        ("name_taken", refused(Refusal::NameTaken)),
        ("idempotency_mismatch", refused(Refusal::IdempotencyMismatch)),
        ("full", refused(Refusal::Full(text("x")))),
        ("lease", refused(Refusal::Lease(text("x")))),
        ("restored", refused(Refusal::Restored { wait_ms: 60_000 })),
        (
            "renewed",
            Outcome::Renewed(vec![
                RenewOutcome::Renewed,
                RenewOutcome::Prevented,
                RenewOutcome::NotHolder,
                RenewOutcome::Unknown,
            ]),
        ),
        ("registered", Outcome::Registered { drone_id: 3 }),
        ("updated", Outcome::Updated(false)),
        ("drained", Outcome::Drained { updated: true, remaining: 300 }),
        ("idle", Outcome::Idle(vec![(text("b1"), 60_000)])),
        ("together", Outcome::Together(vec![Outcome::Done, Outcome::Updated(true)])),
        (
            "reported",
            Outcome::Reported(vec![
                ReportOutcome::Recorded,
                ReportOutcome::Old,
                ReportOutcome::Ended,
                ReportOutcome::NotHolder,
                ReportOutcome::Unknown,
            ]),
        ),
    ]
}

fn backend() -> BackendRecord {
    BackendRecord {
        key: key(),
        cluster: "c".to_owned(),
        drone_id: 3,
        presence: Presence::Leaving,
        drone: "d1".to_owned(),
        data_id: Some("m1".to_owned()),
        spawn_repeated: true,
        id_supplied: true,
        token: 77,
        history: STATUSES.iter().zip(1000..).map(|(status, at)| (at, state_of(*status))).collect(),
        termination_asked: Some((TerminationKind::Soft, TerminationReason::External)),
        lifetime_ends_at_ms: Some(5000),
        max_idle_seconds: Some(60),
        static_token: Some("static".to_owned()),
        secret_token: "secret".to_owned(),
        subdomain: None,
        revoked_users: vec!["alice".to_owned()],
        terminate_action: Some((80, 1)),
        activity: Some(ActivityRecord {
            incarnation: "i1".to_owned(),
            activity_id: 7,
            idle_since_ms: Some(4000),
        }),
        end_filed_at_ms: Some(5000),
    }
}

fn line<T: Encode + Decode<()> + PartialEq + Debug>(out: &mut String, kind: &str, name: &str, value: &T) {
    let bytes = encode(value);
    assert_eq!(decode::<T>(&bytes).unwrap(), *value, "{kind} {name}");
    for cut in 0..bytes.len() {
        assert!(decode::<T>(&bytes[..cut]).is_err(), "{kind} {name} cut after {cut} bytes");
    }
    let mut longer = bytes.clone();
    longer.push(0);
    assert!(decode::<T>(&longer).is_err(), "{kind} {name} with a byte too many");
    for version in (0..=255).filter(|version| *version != VERSION) {
        let mut other = bytes.clone();
        other[0] = version;
        assert!(decode::<T>(&other).is_err(), "{kind} {name} of version {version}");
    }
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    writeln!(out, "{kind} {name} {hex}").unwrap();
}

#[test]
fn the_bytes_are_those_of_the_fixture_and_nothing_else_decodes() {
    let mut out = String::new();
    for (name, proposal) in proposals() {
        line(&mut out, "proposal", name, &proposal);
    }
    line(&mut out, "stamp", "stamp", &Stamp { cluster_time_ms: 1_700_000_000_000, own_term_only: true });
    for (name, outcome) in outcomes() {
        line(&mut out, "outcome", name, &outcome);
    }
    let states = STATUSES.map(state_of);
    for state in &states {
        line(&mut out, "state", state.status().as_str(), state);
    }
    let reasons = [
        TerminationReason::Swept,
        TerminationReason::External,
        TerminationReason::KeyExpired,
        TerminationReason::Lost,
        TerminationReason::StartupTimeout,
        TerminationReason::InternalError,
    ];
    for reason in reasons {
        let state = BackendState::Terminated {
            last_status: BackendStatus::Ready,
            termination: Some(TerminationKind::Hard),
            reason: Some(reason),
            exit_code: Some(-1),
        };
        line(&mut out, "state", &format!("terminated-{reason:?}"), &state);
    }

    let cluster = ClusterRecord {
        cluster_id: "cluster-1".to_owned(),
        token_secret: [7; 32],
        lease: LEASE,
        terminated_keep_ms: 3_600_000,
    };
    line(&mut out, "record", "cluster", &cluster);
    let progress = ProgressRecord {
        cluster_time_ms: 1_700_000_000_000,
        checksum: u64::MAX,
        published: vec![(64, 1), (128, u64::MAX)],
        keys_held: 1,
        idempotency_records: 2,
        supplied_ids: 3,
        last_drone_id: 4,
    };
    line(&mut out, "record", "progress", &progress);
    let key = KeyRecord {
        tag: "v2".to_owned(),
        backend_id: "b1".to_owned(),
        drone_id: 3,
        token: 77,
        allow_renew: true,
        acquired_at_ms: 1000,
        expires_at_ms: 61_000,
        indexed_at_ms: 61_000,
    };
    line(&mut out, "record", "key", &key);
    line(&mut out, "record", "backend", &backend());
    let mut drone = DroneRecord {
        cluster: "c".to_owned(),
        name: "d1".to_owned(),
        pool: "gpu".to_owned(),
        incarnation: "i1".to_owned(),
        data_id: Some("m1".to_owned()),
        session: "s1".to_owned(),
        address: "10.0.0.1".to_owned(),
        registered_index: 70,
        is_listed: true,
        controller: 2,
        version: "1".to_owned(),
        git_hash: "abc".to_owned(),
        draining: true,
        backend_count: 5,
        registered_at_ms: 1000,
        heartbeat: Some(HeartbeatRecord { at_ms: 2000, term: 3, local_time_ms: -1 }),
        drain_deadline_ms: Some(9000),
        leaving: true,
        heard_filed_at_ms: Some(1500),
    };
    line(&mut out, "record", "drone", &drone);
    drone.heartbeat = None;
    line(&mut out, "record", "drone-without-heartbeat", &drone);
    let action = PendingAction::Spawn {
        target: SpawnTarget::Incarnation("i1".to_owned()),
        local_time_ms: 1_700_000_000_000,
        heartbeat_at_ms: 2000,
        lease: LEASE,
        token: 77,
        executable_json: "{}".to_owned(),
    };
    let mut action = ActionRecord { backend_id: "b1".to_owned(), action };
    line(&mut out, "record", "action-spawn", &action);
    if let PendingAction::Spawn { target, .. } = &mut action.action {
        *target = SpawnTarget::Session { session: "s1".to_owned(), address: "10.0.0.1".to_owned() };
    }
    line(&mut out, "record", "action-spawn-plane", &action);
    let action = PendingAction::Terminate { kind: TerminationKind::Soft, reason: TerminationReason::Swept };
    line(&mut out, "record", "action-terminate", &ActionRecord { backend_id: "b1".to_owned(), action });
    let idempotency = IdempotencyRecord {
        body_digest: [9; 16],
        expires_at_ms: 600_000,
        index: 77,
        outcome: Outcome::Acquired(holder()),
    };
    line(&mut out, "record", "idempotency", &idempotency);
    let restored = RestoredRecord {
        from_cluster_id: "cluster-1".to_owned(),
        from_index: 77,
        id_prefix: "restored-0123456789abcdef-".to_owned(),
        lease: LEASE,
        terminated_keep_ms: 3_600_000,
        quarantine_ms: 60_000,
        acquisitions_from_ms: Some(1_700_000_060_000),
    };
    line(&mut out, "record", "restored", &restored);
    let mut member_ids = MemberIdsRecord::default();
    [3, 9, 1, 2, 4].into_iter().for_each(|id| member_ids.insert(id));
    line(&mut out, "record", "member-ids", &member_ids);

    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/bytes-v1.txt");
    if std::env::var_os("UPDATE_GOLDENFILES").is_some() {
        std::fs::write(path, &out).unwrap();
    }
    let pinned = std::fs::read_to_string(path).unwrap();
    for (now, then) in out.lines().zip(pinned.lines()) {
        assert_eq!(now, then, "the format changed");
    }
    assert_eq!(out.lines().count(), pinned.lines().count());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Neither panics nor asks for memory that there is not (a length of 2^60 would abort the process).
    #[test]
    fn garbage_never_panics(mut bytes in prop::collection::vec(any::<u8>(), 0..80), versioned in any::<bool>()) {
        if versioned && !bytes.is_empty() {
            bytes[0] = VERSION;
        }
        let _ = decode::<Proposal>(&bytes);
        let _ = decode::<Outcome>(&bytes);
        let _ = decode::<BackendRecord>(&bytes);
        let _ = decode::<ProgressRecord>(&bytes);
        let _ = decode::<ActionRecord>(&bytes);
        let _ = decode::<IdempotencyRecord>(&bytes);
    }

    #[test]
    fn a_flipped_byte_never_panics(which in 0..19usize, at in any::<prop::sample::Index>(), to in any::<u8>()) {
        let (_, proposal) = &proposals()[which];
        let mut bytes = encode(proposal);
        let at = at.index(bytes.len());
        bytes[at] = to;
        if let Ok(read) = decode::<Proposal>(&bytes) {
            // What decodes is a value of its own right.
            prop_assert_eq!(decode::<Proposal>(&encode(&read)).unwrap(), read);
        }
    }
}

#[test]
fn a_length_that_cannot_be_is_an_error() {
    // `Heartbeats` with 2^60 items, and `RevokeKey` with a namespace of 2^60 bytes.
    for variant in [7, 5] {
        let mut bytes = vec![VERSION, variant, 253];
        bytes.extend_from_slice(&(1u64 << 60).to_le_bytes());
        assert!(decode::<Proposal>(&bytes).is_err());
    }
}
