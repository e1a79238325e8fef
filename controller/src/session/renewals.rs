//! Renewals of one session: queued, coalesced into entries, answered one by one. Pure.
//!
//! A drone that asks for many keys one by one (Plane's form) must not cost an entry for each; whatever is queued when an
//! entry is made goes into it. Deadlines are made from each request's own `local_time` (invariant 2 of the session).

use holdfast_core::command::RenewKey;
use holdfast_core::limits::RENEWALS_PER_ENTRY_MAX;
use holdfast_core::outcome::RenewOutcome;
use holdfast_wire::LeaseConfig;
use holdfast_wire::drone::{
    MessageToDrone, RenewKeyRequest, RenewKeyResponse, RenewKeysRequest, RenewKeysResponse, RenewRefusal,
    RenewedKey,
};
use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};

/// Keys that can wait for an entry. Beyond it the oldest requests are left unanswered; the drone asks again.
pub const QUEUED_KEYS_MAX: usize = 4 * RENEWALS_PER_ENTRY_MAX;

/// One request of the drone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The drone's clock when it asked, in milliseconds.
    local_time_ms: i64,
    /// When it came here.
    received: Instant,
    /// Plane's form, for one key.
    single: bool,
    keys: Vec<RenewKey>,
}

impl Request {
    /// From Plane's form.
    pub fn single(request: RenewKeyRequest, received: Instant) -> Self {
        let key = RenewKey { backend_id: request.backend, token: request.token };
        Self { local_time_ms: request.local_time, received, single: true, keys: vec![key] }
    }

    /// From ours.
    pub fn batch(request: RenewKeysRequest, received: Instant) -> Self {
        let keys = request
            .keys
            .into_iter()
            .map(|item| RenewKey { backend_id: item.backend, token: Some(item.token) })
            .collect();
        Self { local_time_ms: request.local_time, received, single: false, keys }
    }
}

/// Requests that wait for an entry.
#[derive(Debug, Default)]
pub struct Queue {
    requests: VecDeque<Request>,
    keys: usize,
}

impl Queue {
    /// Adds a request and returns how many older ones had to go.
    pub fn push(&mut self, request: Request) -> usize {
        // An empty one counts too: it is answered.
        self.keys += request.keys.len().max(1);
        self.requests.push_back(request);
        let mut dropped = 0;
        while self.keys > QUEUED_KEYS_MAX && self.requests.len() > 1 {
            if let Some(oldest) = self.requests.pop_front() {
                self.keys -= oldest.keys.len().max(1);
                dropped += 1;
            }
        }
        dropped
    }

    /// Takes what goes into one entry: whole requests, in order.
    pub fn take(&mut self) -> Vec<Request> {
        let mut taken = Vec::new();
        let mut keys = 0;
        while let Some(request) = self.requests.front() {
            keys += request.keys.len().max(1);
            if keys > RENEWALS_PER_ENTRY_MAX && !taken.is_empty() {
                break;
            }
            if let Some(request) = self.requests.pop_front() {
                self.keys -= request.keys.len().max(1);
                taken.push(request);
            }
        }
        taken
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }
}

/// How many keys some requests have together.
pub fn count(requests: &[Request]) -> usize {
    requests.iter().map(|request| request.keys.len()).sum()
}

/// Keys of some requests, in order: those at `range` of all of them.
pub fn keys(requests: &[Request], range: Range<usize>) -> Vec<RenewKey> {
    let all = requests.iter().flat_map(|request| &request.keys);
    all.skip(range.start).take(range.len()).cloned().collect()
}

/// Where each piece of at most `size` keys begins and ends.
pub fn pieces(requests: &[Request], size: usize) -> Vec<Range<usize>> {
    let all = count(requests);
    (0..all).step_by(size).map(|at| at..(at + size).min(all)).collect()
}

/// Until when it makes sense to try, from the youngest of the requests: a drone renews at `renew_at`, so after the rest
/// of its lease has passed there is nothing left to save, and after `soft_terminate` the new deadlines are void.
pub fn give_up_at(requests: &[Request], lease: &LeaseConfig) -> Option<Instant> {
    let rest_ms = lease.hard_terminate_ms.saturating_sub(lease.renew_ms).min(lease.soft_terminate_ms);
    requests.iter().map(|request| request.received).max()?.checked_add(Duration::from_millis(rest_ms))
}

/// What the drone gets.
#[derive(Debug, Default, PartialEq)]
pub struct Answers {
    /// One for each request that can still be answered.
    pub messages: Vec<MessageToDrone>,
    /// Backends that the drone must end, for drones that know no `refused`.
    pub end: Vec<String>,
}

/// Answers requests with the outcomes of their keys (in [`keys`]' order) at `now`.
pub fn answers(
    requests: &[Request],
    outcomes: &[RenewOutcome],
    lease: &LeaseConfig,
    now: Instant,
) -> Answers {
    let mut answers = Answers::default();
    let mut outcomes = outcomes.iter().copied();
    for request in requests {
        let age = now.saturating_duration_since(request.received);
        // The key was extended all the same, which harms nobody: the drone ends the backend on the older timeline.
        let too_late = age >= Duration::from_millis(lease.soft_terminate_ms);
        let renewed: Vec<RenewedKey> = request
            .keys
            .iter()
            .zip(outcomes.by_ref())
            .map(|(key, outcome)| {
                let (deadlines, refused) = match outcome {
                    RenewOutcome::Renewed if too_late => (None, None),
                    RenewOutcome::Renewed => (Some(lease.deadlines(request.local_time_ms)), None),
                    RenewOutcome::Prevented => (None, Some(RenewRefusal::RenewalPrevented)),
                    RenewOutcome::NotHolder => (None, Some(RenewRefusal::NotHolder)),
                    RenewOutcome::Unknown => (None, Some(RenewRefusal::Unknown)),
                };
                if matches!(refused, Some(RenewRefusal::NotHolder | RenewRefusal::Unknown)) {
                    answers.end.push(key.backend_id.clone());
                }
                RenewedKey { backend: key.backend_id.clone(), deadlines, refused }
            })
            .collect();
        if request.single {
            answers.messages.extend(renewed.into_iter().map(|key| {
                let response = RenewKeyResponse { backend: key.backend, deadlines: key.deadlines };
                MessageToDrone::RenewKeyResponse(response)
            }));
        } else {
            answers.messages.push(MessageToDrone::RenewKeysResponse(RenewKeysResponse { keys: renewed }));
        }
    }
    answers
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_wire::drone::RenewItem;
    use holdfast_wire::limits::{NAME_BYTES_MAX, RENEW_KEYS_MAX};

    fn batch(local_time: i64, count: usize, received: Instant) -> Request {
        let keys = (0..count).map(|i| RenewItem { backend: format!("ba-{i}"), token: 7 }).collect();
        Request::batch(RenewKeysRequest { local_time, keys }, received)
    }

    fn single(local_time: i64, backend: &str, received: Instant) -> Request {
        Request::single(RenewKeyRequest { backend: backend.into(), local_time, token: None }, received)
    }

    #[test]
    fn requests_are_coalesced_and_answered_one_by_one_each_from_its_own_time() {
        let now = Instant::now();
        let mut queue = Queue::default();
        queue.push(single(100, "ba-x", now));
        queue.push(batch(200, 2, now));
        let taken = queue.take();
        assert!(queue.is_empty());
        assert_eq!(count(&taken), 3);
        let names = |range| keys(&taken, range).into_iter().map(|key| key.backend_id).collect::<Vec<_>>();
        assert_eq!(names(0..3), ["ba-x", "ba-0", "ba-1"]);
        assert_eq!(pieces(&taken, 2), [0..2, 2..3]);
        assert_eq!(names(2..3), ["ba-1"]);
        assert_eq!(pieces(&[], 2), []);
        let lease = LeaseConfig::default();
        let outcomes = [RenewOutcome::Renewed, RenewOutcome::Renewed, RenewOutcome::Prevented];
        let answers = answers(&taken, &outcomes, &lease, now);
        assert_eq!(
            answers.messages,
            [
                MessageToDrone::RenewKeyResponse(RenewKeyResponse {
                    backend: "ba-x".into(),
                    deadlines: Some(lease.deadlines(100))
                }),
                MessageToDrone::RenewKeysResponse(RenewKeysResponse {
                    keys: vec![
                        RenewedKey {
                            backend: "ba-0".into(),
                            deadlines: Some(lease.deadlines(200)),
                            refused: None
                        },
                        RenewedKey {
                            backend: "ba-1".into(),
                            deadlines: None,
                            refused: Some(RenewRefusal::RenewalPrevented)
                        },
                    ]
                }),
            ]
        );
        assert!(answers.end.is_empty());
    }

    #[test]
    fn who_does_not_hold_the_key_is_told_to_end_the_backend() {
        let now = Instant::now();
        let requests = [batch(1, 2, now), single(1, "ba-x", now)];
        let outcomes = [RenewOutcome::NotHolder, RenewOutcome::Unknown, RenewOutcome::NotHolder];
        let answers = answers(&requests, &outcomes, &LeaseConfig::default(), now);
        assert_eq!(answers.end, ["ba-0", "ba-1", "ba-x"]);
    }

    #[test]
    fn no_deadlines_are_given_from_a_time_whose_soft_deadline_has_passed() {
        let received = Instant::now();
        let lease = LeaseConfig::default();
        let at = |ms| {
            let now = received + Duration::from_millis(ms);
            match answers(&[single(1, "b", received)], &[RenewOutcome::Renewed], &lease, now).messages.pop() {
                Some(MessageToDrone::RenewKeyResponse(response)) => response.deadlines,
                other => panic!("{other:?}"),
            }
        };
        assert!(at(39_999).is_some());
        assert!(at(40_000).is_none());
        assert_eq!(give_up_at(&[batch(1, 1, received)], &lease), Some(received + Duration::from_secs(20)));
    }

    #[test]
    fn the_largest_answer_reaches_the_drone() {
        let now = Instant::now();
        let keys = (0..RENEW_KEYS_MAX).map(|_| RenewItem { backend: "b".repeat(NAME_BYTES_MAX), token: 7 });
        let request = RenewKeysRequest { local_time: i64::MIN / 2, keys: keys.collect() };
        let outcomes = vec![RenewOutcome::Renewed; RENEW_KEYS_MAX];
        let answers = answers(&[Request::batch(request, now)], &outcomes, &LeaseConfig::default(), now);
        let text = serde_json::to_string(&answers.messages[0]).unwrap();
        assert!(text.len() < crate::session::DRONE_FRAME_BYTES_MAX, "{}", text.len());
    }

    #[test]
    fn the_queue_is_bounded_and_entries_hold_whole_requests() {
        let now = Instant::now();
        let mut queue = Queue::default();
        let mut dropped = 0;
        for at in 0..6 {
            dropped += queue.push(batch(at, RENEWALS_PER_ENTRY_MAX, now));
        }
        assert_eq!(dropped, 2);
        assert_eq!(queue.take()[0].local_time_ms, 2);
        queue.push(batch(9, 1, now));
        assert_eq!(queue.take().len(), 1, "a second full one does not fit");
        while !queue.take().is_empty() {}
        assert_eq!(queue.keys, 0);
        for at in 0..2 * QUEUED_KEYS_MAX {
            queue.push(batch(i64::try_from(at).unwrap(), 0, now));
        }
        assert_eq!(queue.requests.len(), QUEUED_KEYS_MAX);
    }
}
