//! Tests of the lease keeper: first sentences, then a property.

use super::*;
use holdfast_wire::LeaseConfig;
use proptest::prelude::*;

const LEASE: LeaseConfig =
    LeaseConfig { renew_ms: 30_000, soft_terminate_ms: 40_000, hard_terminate_ms: 50_000, expiry_ms: 60_000 };
const KEY_EXPIRED: TerminationReason = TerminationReason::KeyExpired;

/// A step of a sentence.
#[derive(Debug, Clone, Copy)]
enum Do {
    /// Look at the clock and expect: `r` a renewal, `s` a soft, `h` a hard end, nothing.
    At(i64, &'static str),
    /// An answer at the first time, to a request of the second.
    Renewed(i64, i64, Renewal),
    Refused(RenewRefusal, &'static str),
    Ending,
    Ended,
    NewSession(i64),
}
use Do::*;
use RenewRefusal::{NotHolder, RenewalPrevented, Unknown};

fn letters(duties: &[Duty]) -> String {
    duties
        .iter()
        .map(|duty| match duty {
            Duty::RenewNow { token: 7, .. } => 'r',
            Duty::SoftTerminate { reason: KEY_EXPIRED, .. } => 's',
            Duty::HardTerminate { reason: KEY_EXPIRED, .. } => 'h',
            other => panic!("unexpected {other:?}"),
        })
        .collect()
}

/// Every sentence starts with a lease acquired at 0 with token 7: renew at 30 s, soft at 40 s, hard at 50 s.
const SENTENCES: &[(&str, &[Do])] = &[
    ("nothing is due before renew_at", &[At(0, ""), At(29_999, "")]),
    ("a renewal is asked for at renew_at", &[At(30_000, "r")]),
    (
        "an unanswered renewal is repeated until soft_terminate_at, and not after",
        &[
            At(30_000, "r"),
            At(30_001, ""),
            At(32_000, "r"),
            At(34_000, "r"),
            At(39_999, "r"),
            At(40_000, "s"),
            At(45_000, ""),
        ],
    ),
    (
        "without an answer: soft, then hard, each once",
        &[At(40_000, "s"), At(49_999, ""), At(50_000, "h"), At(60_000, "")],
    ),
    ("after a long suspension the backend is killed at once", &[At(90_000, "h"), At(90_001, "")]),
    (
        "a renewal moves every deadline",
        &[
            At(30_000, "r"),
            Renewed(30_100, 30_000, Renewal::Extended),
            At(59_999, ""),
            At(60_000, "r"),
            At(70_000, "s"),
            At(80_000, "h"),
        ],
    ),
    (
        "an answer to the first request counts though it was repeated",
        &[At(30_000, "r"), At(32_000, "r"), Renewed(32_100, 30_000, Renewal::Extended), At(59_000, "")],
    ),
    (
        "a second answer to the same request changes nothing",
        &[
            At(30_000, "r"),
            Renewed(30_100, 30_000, Renewal::Extended),
            Renewed(30_200, 30_000, Renewal::NotLater),
        ],
    ),
    (
        "the answers to a request and to its repetition: the first one counts",
        &[
            At(30_000, "r"),
            At(32_000, "r"),
            Renewed(32_100, 30_000, Renewal::Extended),
            Renewed(32_200, 32_000, Renewal::NotLater),
            At(59_999, ""),
            At(60_000, "r"),
        ],
    ),
    (
        "an answer nobody asked for does not count",
        &[Renewed(10_000, 5_000, Renewal::Malformed), At(40_000, "s")],
    ),
    (
        "an answer from before the acquisition does not count",
        &[At(30_000, "r"), Renewed(30_100, -5_000, Renewal::NotLater), At(40_000, "s")],
    ),
    (
        "an answer that comes at soft_terminate_at is too late",
        &[At(30_000, "r"), Renewed(40_000, 30_000, Renewal::TooLate), At(40_000, "s"), At(50_000, "h")],
    ),
    (
        "an answer that comes after the end began is too late",
        &[At(30_000, "r"), Ending, Renewed(30_100, 30_000, Renewal::TooLate), At(50_000, "h")],
    ),
    (
        "prevented: no more requests, and the end comes on the timeline",
        &[At(30_000, "r"), Refused(RenewalPrevented, ""), At(33_000, ""), At(40_000, "s"), At(50_000, "h")],
    ),
    (
        "prevented, and an earlier request granted late: the deadlines stand",
        &[
            At(30_000, "r"),
            Refused(RenewalPrevented, ""),
            Renewed(30_500, 30_000, Renewal::TooLate),
            At(40_000, "s"),
        ],
    ),
    (
        "not the holder: killed now, once",
        &[At(30_000, "r"), Refused(NotHolder, "h"), Refused(Unknown, ""), At(50_000, "")],
    ),
    ("unknown to the controllers: killed now", &[At(30_000, "r"), Refused(Unknown, "h")]),
    (
        "not the holder, while ending softly: killed now",
        &[At(40_000, "s"), Refused(NotHolder, "h"), At(50_000, "")],
    ),
    (
        "an end that was asked for is not renewed, and is still killed at the hard deadline",
        &[Ending, At(30_000, ""), At(40_000, ""), At(50_000, "h")],
    ),
    ("what has ended has no duties", &[Ended, At(30_000, ""), At(50_000, ""), Refused(NotHolder, "")]),
    (
        "a new session asks at once for what was not answered",
        &[At(30_000, "r"), NewSession(30_500), At(30_500, "r"), Renewed(30_600, 30_500, Renewal::Extended)],
    ),
    ("a new session does not ask early", &[NewSession(1_000), At(1_000, ""), At(29_999, "")]),
];

#[test]
fn sentences() {
    for (sentence, steps) in SENTENCES {
        let mut keeper = LeaseKeeper::new();
        assert!(keeper.acquired("ba", 7, LEASE.deadlines(0)));
        for step in *steps {
            match *step {
                At(now, expected) => {
                    assert_eq!(letters(&keeper.due(now, || 1.0)), expected, "{sentence}: {step:?}");
                }
                Renewed(now, sent, expected) => {
                    assert_eq!(
                        keeper.renewed("ba", LEASE.deadlines(sent), now),
                        expected,
                        "{sentence}: {step:?}"
                    );
                }
                Refused(refusal, expected) => {
                    let duty = keeper.refused("ba", refusal);
                    assert_eq!(letters(duty.as_slice()), expected, "{sentence}: {step:?}");
                }
                Ending => keeper.ending("ba"),
                Ended => keeper.ended("ba"),
                NewSession(now) => keeper.ask_again(now),
            }
        }
    }
}

#[test]
fn a_second_acquisition_of_a_known_backend_changes_nothing() {
    let mut keeper = LeaseKeeper::new();
    assert!(keeper.acquired("ba", 7, LEASE.deadlines(0)));
    assert!(!keeper.acquired("ba", 8, LEASE.deadlines(99)));
    assert_eq!(keeper.deadlines("ba"), Some(LEASE.deadlines(0)));
}

#[test]
fn renewals_due_within_the_coalescing_time_go_together_and_ends_come_not_a_moment_early() {
    let mut keeper = LeaseKeeper::new();
    keeper.acquired("a", 7, LEASE.deadlines(0));
    keeper.acquired("b", 7, LEASE.deadlines(RENEW_COALESCE_MS));
    keeper.acquired("c", 7, LEASE.deadlines(RENEW_COALESCE_MS + 1));
    assert_eq!(letters(&keeper.due(29_999, || 1.0)), "");
    assert_eq!(letters(&keeper.due(30_000, || 1.0)), "rr");
    for backend in ["a", "b", "c"] {
        keeper.refused(backend, RenewalPrevented);
    }
    assert_eq!(letters(&keeper.due(40_000, || 1.0)), "s");
    assert_eq!(keeper.next_wake(), Some(40_000 + RENEW_COALESCE_MS));
}

#[test]
fn deadlines_out_of_order_are_malformed() {
    let mut keeper = LeaseKeeper::new();
    keeper.acquired("ba", 7, LEASE.deadlines(0));
    keeper.due(30_000, || 1.0);
    let wrong = Deadlines { renew_at: 90_000, soft_terminate_at: 80_000, hard_terminate_at: 95_000 };
    assert_eq!(keeper.renewed("ba", wrong, 30_001), Renewal::Malformed);
    let far = Deadlines { renew_at: 90_000, soft_terminate_at: 95_000, hard_terminate_at: i64::MAX };
    assert_eq!(keeper.renewed("ba", far, 30_001), Renewal::Malformed);
}

/// One step of a random run.
#[derive(Debug, Clone)]
enum Step {
    Pass(i64),
    Renew { ago: i64 },
    Garbage { renew_at: i64, soft_ms: i64, hard_ms: i64 },
    Refuse(RenewRefusal),
    Ending,
    NewSession,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (1i64..12_000).prop_map(Step::Pass),
        6 => (0i64..20_000).prop_map(|ago| Step::Renew { ago }),
        1 => (-100_000i64..1_000_000, -10i64..50_000, -10i64..50_000)
            .prop_map(|(renew_at, soft_ms, hard_ms)| Step::Garbage { renew_at, soft_ms, hard_ms }),
        1 => prop_oneof![Just(RenewalPrevented), Just(NotHolder), Just(Unknown)].prop_map(Step::Refuse),
        1 => Just(Step::Ending),
        1 => Just(Step::NewSession),
    ]
}

proptest! {
    /// Invariants 1 to 3, however the world answers.
    #[test]
    fn no_backend_is_left_running_past_its_hard_deadline_and_deadlines_never_go_back(
        steps in prop::collection::vec(step(), 1..120)
    ) {
        let mut keeper = LeaseKeeper::new();
        let mut now = 0;
        keeper.acquired("ba", 7, LEASE.deadlines(now));
        let mut latest = LEASE.deadlines(now);
        let (mut softened, mut killed, mut stopped) = (false, false, false);
        for step in steps {
            match step {
                Step::Pass(ms) => {
                    // Stop at every wake-up on the way, as the drone does.
                    let until = now + ms;
                    while let Some(at) = keeper.next_wake().filter(|at| *at <= until) {
                        now = now.max(at);
                        for duty in keeper.due(now, || 0.75) {
                            match duty {
                                Duty::RenewNow { .. } => {
                                    prop_assert!(!stopped && !softened && !killed);
                                    prop_assert!(now < latest.soft_terminate_at);
                                    prop_assert!(now + RENEW_COALESCE_MS >= latest.renew_at);
                                }
                                Duty::SoftTerminate { .. } => {
                                    prop_assert!(!softened && !killed && now >= latest.soft_terminate_at);
                                    softened = true;
                                }
                                Duty::HardTerminate { .. } => {
                                    prop_assert!(!killed && now >= latest.hard_terminate_at);
                                    killed = true;
                                }
                            }
                        }
                    }
                    now = until;
                }
                Step::Renew { ago } => {
                    let before = keeper.deadlines("ba").unwrap();
                    let answer = keeper.renewed("ba", LEASE.deadlines(now - ago), now);
                    let after = keeper.deadlines("ba").unwrap();
                    if answer == Renewal::Extended {
                        prop_assert!(!softened && !killed && !stopped && now < before.soft_terminate_at);
                        prop_assert!(after.hard_terminate_at > before.hard_terminate_at);
                        latest = after;
                    } else {
                        prop_assert_eq!(before, after);
                    }
                }
                Step::Garbage { renew_at, soft_ms, hard_ms } => {
                    let before = keeper.deadlines("ba").unwrap();
                    let soft_terminate_at = renew_at + soft_ms;
                    let hard_terminate_at = soft_terminate_at + hard_ms;
                    keeper.renewed("ba", Deadlines { renew_at, soft_terminate_at, hard_terminate_at }, now);
                    let after = keeper.deadlines("ba").unwrap();
                    prop_assert!(after.renew_at >= before.renew_at);
                    prop_assert!(after.soft_terminate_at >= before.soft_terminate_at);
                    prop_assert!(after.hard_terminate_at >= before.hard_terminate_at);
                    latest = after;
                }
                Step::Refuse(refusal) => {
                    stopped = true;
                    if keeper.refused("ba", refusal).is_some() {
                        prop_assert!(!killed);
                        killed = true;
                    }
                }
                Step::Ending => {
                    keeper.ending("ba");
                    stopped = true;
                }
                Step::NewSession => keeper.ask_again(now),
            }
            prop_assert!(
                killed || now < latest.hard_terminate_at,
                "at {now} the backend still runs, past {}", latest.hard_terminate_at
            );
        }
    }
}
