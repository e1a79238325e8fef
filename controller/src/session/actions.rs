//! What is due for a drone: what to send now and what to send again. Pure: the caller looks at the state.
//!
//! Actions stand in the order of the log. New ones are always beyond the newest that was sent, so they are found without
//! looking at older ones, and go out first; unacknowledged ones are sent again a page at a time. However many older ones
//! are unacknowledged, newer ones do not wait for them.

use holdfast_core::limits::ACTIONS_PER_READ_MAX;
use holdfast_core::records::{PendingAction, SpawnTarget};
use holdfast_core::view::DueAction;
use holdfast_wire::drone::{AcquiredKey, Action, ActionMessage};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// After how long an unacknowledged action is sent again.
pub const RESEND_AFTER: Duration = Duration::from_secs(2);
/// Actions that are queued in one turn, new ones and ones sent again each: a few dozen MiB if all of them are the largest.
pub const ACTIONS_AT_ONCE_MAX: usize = 128;
/// Pages of older actions that one round looks at.
const RESEND_PAGES_MAX: usize = 4;

/// Log index and number within that entry.
type At = (u64, u32);

/// The place before `at`; none before the first of all.
fn before((index, sub): At) -> Option<At> {
    match sub.checked_sub(1) {
        Some(sub) => Some((index, sub)),
        None => Some((index.checked_sub(1)?, u32::MAX)),
    }
}

/// What a session has sent.
#[derive(Debug, Default)]
pub struct Tracker {
    /// The newest that was sent.
    newest: Option<At>,
    /// Where the next round of resending goes on.
    resend_after: Option<At>,
    /// When each that may still be due was sent.
    sent: BTreeMap<At, Instant>,
}

impl Tracker {
    /// New due actions, at most `room`. `look(after, limit)` gives due actions in order; fewer than `limit` means that
    /// there are no more.
    pub fn fresh<E>(
        &mut self,
        now: Instant,
        room: usize,
        mut look: impl FnMut(Option<At>, usize) -> Result<Vec<DueAction>, E>,
    ) -> Result<Vec<DueAction>, E> {
        let mut due = Vec::new();
        while due.len() < room {
            let limit = (room - due.len()).min(ACTIONS_PER_READ_MAX);
            let page = look(self.newest, limit)?;
            let last_page = page.len() < limit;
            for action in page {
                let at = (action.index, action.sub);
                self.newest = Some(at);
                self.sent.insert(at, now);
                due.push(action);
            }
            if last_page {
                break;
            }
        }
        Ok(due)
    }

    /// Sent actions that are still due and were not acknowledged in time, at most `room`.
    pub fn again<E>(
        &mut self,
        now: Instant,
        room: usize,
        mut look: impl FnMut(Option<At>, usize) -> Result<Vec<DueAction>, E>,
    ) -> Result<Vec<DueAction>, E> {
        let mut due = Vec::new();
        if room == 0 {
            return Ok(due);
        }
        for _ in 0..RESEND_PAGES_MAX {
            if self.sent.is_empty() {
                break;
            }
            // What was sent begins there; before it lies what is gone, which the database would have to walk over.
            let from = self.resend_after.or_else(|| self.sent.keys().next().and_then(|first| before(*first)));
            let page = look(from, ACTIONS_PER_READ_MAX)?;
            let page_end =
                if page.len() < ACTIONS_PER_READ_MAX { None } else { page.last().map(|a| (a.index, a.sub)) };
            self.forget_all_but(&page, page_end);
            for action in page {
                let at = (action.index, action.sub);
                let Some(sent) = self.sent.get_mut(&at) else { continue };
                if !is_repeated(&action) || now.saturating_duration_since(*sent) < RESEND_AFTER {
                    continue;
                }
                *sent = now;
                due.push(action);
                if due.len() == room {
                    // The next round continues right behind it, so that none waits longer than the others.
                    self.resend_after = Some(at);
                    return Ok(due);
                }
            }
            self.resend_after = page_end;
            if page_end.is_none() {
                break;
            }
        }
        Ok(due)
    }

    /// Forgets what a page should have held and did not: acknowledged, or not due any more.
    fn forget_all_but(&mut self, page: &[DueAction], page_end: Option<At>) {
        let after = self.resend_after;
        let kept: std::collections::BTreeSet<At> = page.iter().map(|a| (a.index, a.sub)).collect();
        self.sent.retain(|at, _| {
            let within = after.is_none_or(|after| *at > after) && page_end.is_none_or(|end| *at <= end);
            !within || kept.contains(at)
        });
    }
}

/// Whether an action that was sent on this session is sent on it again. A drone of Plane's may start a backend for each
/// spawn that reaches it; sending one again takes an entry (`apply/drones.rs`).
fn is_repeated(action: &DueAction) -> bool {
    !matches!(action.record.action, PendingAction::Spawn { target: SpawnTarget::Session { .. }, .. })
}

/// An action as the drone gets it. The error is a spawn whose executable is not JSON, which no controller accepts.
pub fn message(drone_id: i32, due: DueAction) -> Result<ActionMessage, serde_json::Error> {
    let action = match due.record.action {
        PendingAction::Spawn { target, local_time_ms, lease, token, executable_json, .. } => Action::Spawn {
            executable: serde_json::from_str(&executable_json)?,
            key: AcquiredKey {
                key: due.backend.key,
                deadlines: lease.deadlines(due.lease_from_ms.unwrap_or(local_time_ms)),
                token,
            },
            static_token: due.backend.static_token,
            incarnation: match target {
                SpawnTarget::Incarnation(incarnation) => Some(incarnation),
                SpawnTarget::Session { .. } => None,
            },
        },
        PendingAction::Terminate { kind, reason } => Action::Terminate { kind, reason },
    };
    Ok(ActionMessage { action_id: due.action_id, backend_id: due.record.backend_id, drone_id, action })
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_core::records::{ActionRecord, BackendRecord, Presence};
    use holdfast_wire::{KeyConfig, LeaseConfig, TerminationKind, TerminationReason};
    use serde_json::json;
    use std::convert::Infallible;

    fn due(index: u64, action: PendingAction) -> DueAction {
        let backend = BackendRecord {
            key: KeyConfig { name: "k".into(), ..KeyConfig::default() },
            cluster: String::new(),
            drone_id: 1,
            presence: Presence::Expected,
            drone: String::new(),
            data_id: None,
            spawn_repeated: false,
            id_supplied: false,
            token: index,
            history: Vec::new(),
            termination_asked: None,
            lifetime_ends_at_ms: None,
            max_idle_seconds: None,
            static_token: None,
            secret_token: String::new(),
            subdomain: None,
            revoked_users: Vec::new(),
            terminate_action: None,
            activity: None,
            end_filed_at_ms: None,
        };
        let record = ActionRecord { backend_id: format!("ba-{index}"), action };
        DueAction { action_id: format!("ak-{index}-0"), index, sub: 0, record, backend, lease_from_ms: None }
    }

    fn end() -> PendingAction {
        PendingAction::Terminate { kind: TerminationKind::Soft, reason: TerminationReason::External }
    }

    /// A state with these actions due.
    fn state(
        indexes: impl IntoIterator<Item = u64>,
    ) -> impl Fn(Option<At>, usize) -> Result<Vec<DueAction>, Infallible> {
        let indexes: Vec<u64> = indexes.into_iter().collect();
        move |after, limit| {
            let after = after.map_or(0, |(index, _)| index);
            Ok(indexes.iter().filter(|i| **i > after).take(limit).map(|i| due(*i, end())).collect())
        }
    }

    fn indexes(due: Result<Vec<DueAction>, Infallible>) -> Vec<u64> {
        due.unwrap().into_iter().map(|action| action.index).collect()
    }

    #[test]
    fn each_action_is_sent_at_once_and_again_only_after_a_while() {
        let start = Instant::now();
        let mut tracker = Tracker::default();
        assert_eq!(indexes(tracker.fresh(start, 100, state([1, 2]))), [1, 2]);
        assert!(indexes(tracker.fresh(start, 100, state([1, 2]))).is_empty());
        let soon = start + RESEND_AFTER / 2;
        assert_eq!(indexes(tracker.fresh(soon, 100, state([1, 2, 3]))), [3]);
        assert!(indexes(tracker.again(soon, 100, state([1, 2, 3]))).is_empty());
        // 2 was acknowledged.
        let later = start + RESEND_AFTER;
        assert_eq!(indexes(tracker.again(later, 100, state([1, 3]))), [1]);
        assert_eq!(tracker.sent.len(), 2);
        assert!(indexes(tracker.again(later + RESEND_AFTER, 100, state([]))).is_empty());
        assert!(tracker.sent.is_empty());
    }

    #[test]
    fn thousands_of_unacknowledged_actions_do_not_hold_up_a_new_one() {
        let start = Instant::now();
        let mut tracker = Tracker::default();
        assert_eq!(indexes(tracker.fresh(start, 10_000, state(1..=5_000))).len(), 5_000);
        assert_eq!(indexes(tracker.fresh(start, 1, state(1..=5_001))), [5_001]);
    }

    #[test]
    fn what_finds_no_room_is_sent_in_the_next_round() {
        let start = Instant::now();
        let mut tracker = Tracker::default();
        assert_eq!(indexes(tracker.fresh(start, 2, state(1..=3))), [1, 2]);
        assert_eq!(indexes(tracker.fresh(start, 2, state(1..=3))), [3]);
        assert!(indexes(tracker.fresh(start, 0, state(1..=9))).is_empty());
    }

    #[test]
    fn resending_gets_round_to_every_action_page_by_page() {
        let start = Instant::now();
        let count = u64::try_from(ACTIONS_PER_READ_MAX * RESEND_PAGES_MAX).unwrap() + 10;
        let mut tracker = Tracker::default();
        tracker.fresh(start, usize::MAX, state(1..=count)).unwrap();
        let later = start + RESEND_AFTER;
        let first = indexes(tracker.again(later, usize::MAX, state(1..=count)));
        let second = indexes(tracker.again(later, usize::MAX, state(1..=count)));
        let mut all: Vec<u64> = first.into_iter().chain(second).collect();
        all.sort_unstable();
        assert_eq!(all, (1..=count).collect::<Vec<_>>());
    }

    /// A round that has room for a few only does not start over, and leaves none out.
    #[test]
    fn resending_with_little_room_gets_round_to_every_action() {
        let mut now = Instant::now();
        let mut tracker = Tracker::default();
        tracker.fresh(now, usize::MAX, state(1..=10)).unwrap();
        now += RESEND_AFTER;
        let mut all = Vec::new();
        for _ in 0..4 {
            assert!(indexes(tracker.again(now, 0, state(1..=10))).is_empty());
            all.extend(indexes(tracker.again(now, 3, state(1..=10))));
        }
        assert_eq!(all, (1..=10).collect::<Vec<_>>());
        assert_eq!(tracker.sent.len(), 10);
    }

    fn spawn(target: SpawnTarget) -> PendingAction {
        PendingAction::Spawn {
            target,
            local_time_ms: 1_000,
            heartbeat_at_ms: 0,
            lease: LeaseConfig::default(),
            token: 17,
            executable_json: r#"{"command":["x"]}"#.into(),
        }
    }

    #[test]
    fn a_spawn_is_sent_to_a_drone_of_planes_once_in_a_session() {
        let start = Instant::now();
        let mut tracker = Tracker::default();
        let look = |after: Option<At>, limit: usize| {
            let plane = SpawnTarget::Session { session: "s".into(), address: "10.0.0.1".into() };
            let all = [due(1, spawn(plane)), due(2, end())];
            let after = after.map_or(0, |(index, _)| index);
            Ok::<_, Infallible>(all.into_iter().filter(|a| a.index > after).take(limit).collect::<Vec<_>>())
        };
        assert_eq!(indexes(tracker.fresh(start, 9, look)), [1, 2]);
        assert_eq!(indexes(tracker.again(start + RESEND_AFTER, 9, look)), [2]);
    }

    #[test]
    fn a_spawn_counts_from_where_the_state_says_and_names_its_incarnation() {
        let sent = message(
            3,
            DueAction { lease_from_ms: Some(500), ..due(1, spawn(SpawnTarget::Incarnation("i".into()))) },
        );
        let sent = sent.unwrap();
        assert_eq!((sent.action_id.as_str(), sent.drone_id), ("ak-1-0", 3));
        let Action::Spawn { executable, key, incarnation, .. } = sent.action else { panic!("{sent:?}") };
        assert_eq!(executable, json!({"command": ["x"]}));
        assert_eq!((key.deadlines.hard_terminate_at, key.token), (50_500, 17));
        assert_eq!(incarnation.as_deref(), Some("i"));
    }
}
