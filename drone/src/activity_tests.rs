//! What a drone says of its backends' connections, and when.

use super::*;

fn seen(open: u64, closed_ago_ms: Option<u64>) -> Seen {
    Seen { open, closed_ago_ms }
}

/// What a message says of one backend.
fn said(message: Option<BackendActivity>) -> Option<(i64, u64, u64)> {
    let message = message?;
    assert_eq!(message.backends.len(), 1);
    Some((message.activity_id, message.backends[0].connections, message.backends[0].idle_ms))
}

#[test]
fn a_backend_is_idle_since_its_first_look_and_then_since_its_last_connection() {
    let mut tracker = Tracker::default();
    tracker.seen("b", 7, Some(seen(0, None)), 10_000);
    assert_eq!(said(tracker.message(10_000)), Some((1, 0, 0)));
    tracker.acknowledged(1, &[], 10_000);
    tracker.seen("b", 7, Some(seen(0, None)), 15_000);
    assert_eq!(tracker.message(15_000), None);
    tracker.seen("b", 7, Some(seen(2, None)), 16_000);
    assert_eq!(said(tracker.message(16_000)), Some((2, 2, 0)));
    tracker.acknowledged(2, &[], 16_000);
    tracker.seen("b", 7, Some(seen(1, None)), 17_000);
    assert_eq!(tracker.message(17_000), None, "how many there are changes nothing");
    // Gone, and back at once: that is no end.
    tracker.seen("b", 7, Some(seen(0, None)), 18_000);
    assert_eq!(tracker.message(18_000), None);
    tracker.seen("b", 7, Some(seen(1, None)), 18_500);
    tracker.seen("b", 7, Some(seen(0, None)), 20_400);
    assert_eq!(tracker.message(20_400), None);
    // It ended at some time since 18.5 s; the look that missed it counts.
    tracker.seen("b", 7, Some(seen(0, None)), 22_300);
    assert_eq!(tracker.message(22_300), None);
    tracker.seen("b", 7, Some(seen(0, None)), 22_400);
    assert_eq!(said(tracker.message(22_400)), Some((3, 0, 2_000)));
}

#[test]
fn a_connection_between_two_looks_counts_by_what_it_left_behind() {
    let mut tracker = Tracker::default();
    // The drone's own question whether it is ready.
    tracker.seen("b", 7, Some(seen(0, Some(300))), 10_000);
    assert_eq!(said(tracker.message(10_000)), Some((1, 0, 0)));
    tracker.acknowledged(1, &[], 10_000);
    tracker.seen("b", 7, Some(seen(0, Some(20_300))), 30_000);
    assert_eq!(tracker.message(30_000), None);
    tracker.seen("b", 7, Some(seen(0, Some(600))), 31_000);
    assert_eq!(said(tracker.message(31_000)), Some((2, 1, 0)));
    tracker.acknowledged(2, &[], 31_000);
    tracker.seen("b", 7, Some(seen(0, Some(2_600))), 33_000);
    assert_eq!(said(tracker.message(33_000)), Some((3, 0, 2_600)));
}

#[test]
fn a_notice_is_repeated_until_acknowledged_ever_more_seldom() {
    let mut tracker = Tracker::default();
    tracker.seen("b", 7, Some(seen(1, None)), 0);
    assert_eq!(said(tracker.message(0)), Some((1, 1, 0)));
    assert_eq!(tracker.message(1_999), None);
    assert_eq!(said(tracker.message(2_000)), Some((2, 1, 0)));
    assert_eq!(tracker.message(5_999), None);
    assert_eq!(said(tracker.message(6_000)), Some((3, 1, 0)));
    // The acknowledgement of one that was said before does not count: something else may be in flight after it.
    tracker.acknowledged(1, &[], 6_001);
    let later = (0..600).filter(|s| tracker.message(6_000 + s * 1_000).is_some()).count();
    assert!((8..=14).contains(&later), "{later} times in ten minutes");
    assert_eq!(tracker.in_flight.len(), 1, "only the latest message can be acknowledged");
}

#[test]
fn after_a_reconnect_everything_is_said_again_with_a_larger_number() {
    let mut tracker = Tracker::default();
    tracker.seen("b", 7, Some(seen(1, None)), 0);
    assert_eq!(said(tracker.message(0)), Some((1, 1, 0)));
    tracker.acknowledged(1, &[], 1);
    assert_eq!(tracker.message(10_000), None);
    tracker.connected(10_001);
    assert_eq!(said(tracker.message(10_001)), Some((2, 1, 0)), "although it was recorded");
    // The acknowledgement of the earlier session comes late.
    tracker.acknowledged(1, &[], 10_002);
    assert_eq!(said(tracker.message(12_001)), Some((3, 1, 0)));
}

#[test]
fn a_look_that_failed_has_not_found_nothing() {
    let mut tracker = Tracker::default();
    tracker.seen("b", 7, Some(seen(0, None)), 0);
    assert_eq!(said(tracker.message(0)), Some((1, 0, 0)));
    tracker.acknowledged(1, &[], 0);
    // From here on someone may be connected.
    tracker.seen("b", 7, None, 5_000);
    assert_eq!(said(tracker.message(5_000)), Some((2, 1, 0)));
    tracker.acknowledged(2, &[], 5_000);
    tracker.seen("b", 7, None, 60_000);
    assert_eq!(tracker.message(60_000), None);
    tracker.seen("b", 7, Some(seen(0, None)), 61_000);
    assert_eq!(tracker.message(61_000), None, "a connection may have ended just now");
    tracker.seen("b", 7, Some(seen(0, None)), 63_000);
    assert_eq!(said(tracker.message(63_000)), Some((3, 0, 2_000)), "idle since the look that succeeded");
}

#[test]
fn an_idle_backend_is_named_again_after_a_new_look_when_asked() {
    let again = |in_ms| [AskAgain { backend: "b".into(), in_ms }];
    let mut tracker = Tracker::default();
    tracker.seen("b", 7, Some(seen(0, None)), 0);
    assert_eq!(said(tracker.message(0)), Some((1, 0, 0)));
    tracker.acknowledged(1, &again(30_000), 0);
    tracker.seen("b", 7, Some(seen(0, None)), 29_999);
    assert_eq!(tracker.message(30_500), None, "no new look yet");
    tracker.seen("b", 7, Some(seen(0, None)), 30_600);
    assert_eq!(said(tracker.message(30_600)), Some((2, 0, 30_600)));
    tracker.acknowledged(2, &again(10_000), 30_600);
    // A look that fails says nothing of its idleness, and a busy one is said to be busy.
    tracker.seen("b", 7, Some(seen(1, None)), 40_700);
    assert_eq!(said(tracker.message(40_700)), Some((3, 1, 0)));
}

#[test]
fn a_notice_that_holds_again_is_said_over_one_in_flight() {
    let mut tracker = Tracker::default();
    tracker.seen("b", 7, Some(seen(1, None)), 0);
    assert_eq!(said(tracker.message(0)), Some((1, 1, 0)));
    tracker.acknowledged(1, &[], 0);
    tracker.seen("b", 7, Some(seen(0, None)), 5_000);
    assert_eq!(tracker.message(5_000), None, "it may have ended just now");
    tracker.seen("b", 7, Some(seen(0, None)), 7_000);
    assert_eq!(said(tracker.message(7_000)), Some((2, 0, 2_000)));
    // Before that is acknowledged, somebody connects.
    tracker.seen("b", 7, Some(seen(1, None)), 8_000);
    assert_eq!(said(tracker.message(8_000)), Some((3, 1, 0)));
    tracker.acknowledged(2, &[], 8_000);
    tracker.acknowledged(3, &[], 8_000);
    assert_eq!(tracker.message(60_000), None);
    tracker.forget("b");
    assert_eq!(tracker.message(100_000), None);
    // Another backend under the same id is another matter.
    tracker.seen("b", 8, Some(seen(1, None)), 100_000);
    assert_eq!(said(tracker.message(100_000)), Some((4, 1, 0)));
}

#[test]
fn messages_are_bounded_and_go_round() {
    let mut tracker = Tracker::default();
    let count = ACTIVITIES_MAX + 10;
    (0..count).for_each(|at| tracker.seen(&format!("b{at}"), 1, Some(seen(1, None)), 0));
    let first = tracker.message(0).unwrap();
    let second = tracker.message(0).unwrap();
    assert_eq!((first.backends.len(), second.backends.len()), (ACTIVITIES_MAX, 10));
    assert_eq!(tracker.message(0), None);
    tracker.acknowledged(first.activity_id, &[], 0);
    assert_eq!(tracker.message(60_000).unwrap().backends, second.backends);
}
