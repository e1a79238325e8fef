//! Whether to repeat a request, where and when. A pure function of what happened: no IO, no clock, no randomness.

use crate::targets::Targets;
use holdfast_wire::ApiErrorKind;
use std::collections::HashMap;

/// How long a request is repeated unless [`RequestOptions`] says otherwise, in milliseconds.
pub const DEADLINE_MS_DEFAULT: u64 = 30_000;
/// How long a request is repeated while not one controller can be connected to, in milliseconds.
pub const ALL_UNREACHABLE_MS_DEFAULT: u64 = 30_000;
/// Time-out of one attempt, in milliseconds: a little more than the 5 s after which a controller itself gives a definite
/// answer (`NoLeader`, `OutcomeUnknown`). For `connect` see there.
pub const ATTEMPT_MS_DEFAULT: u64 = 6_000;
/// First pause after all controllers have been asked in vain, in milliseconds; doubles from round to round.
pub const BACKOFF_MS_MIN: u64 = 20;
/// Longest pause between rounds, in milliseconds.
pub const BACKOFF_MS_MAX: u64 = 500;
/// Longest `Retry-After` that is honoured, in milliseconds.
pub(crate) const RETRY_AFTER_MS_MAX: u64 = 10_000;

/// How hard to try. All times in milliseconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestOptions {
    /// No attempt is begun later than this after the first. An attempt under way at that time still gets its time-out.
    pub deadline_ms: u64,
    /// Give up sooner if, for this long, not one controller could be connected to (0: after asking each once).
    pub all_unreachable_ms: u64,
    /// Time-out of one attempt.
    pub attempt_ms: u64,
    /// Whether to repeat a request for which there is no drone just now.
    pub retry_no_drone: bool,
    /// Sent as `Idempotency-Key`. One key belongs to one request: another request under it is refused.
    pub idempotency_key: Option<String>,
}

impl Default for RequestOptions {
    fn default() -> Self {
        Self {
            deadline_ms: DEADLINE_MS_DEFAULT,
            all_unreachable_ms: ALL_UNREACHABLE_MS_DEFAULT,
            attempt_ms: ATTEMPT_MS_DEFAULT,
            retry_no_drone: false,
            idempotency_key: None,
        }
    }
}

/// How one attempt ended, as far as the decision needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AttemptOutcome {
    /// A success.
    Answered,
    /// The service answered with an error.
    Refused { kind: ApiErrorKind, retry_after_ms: Option<u64> },
    /// There was no connection, so nothing was sent.
    NotConnected,
    /// Sent, and then the connection broke or the time was up.
    Lost,
    /// Something answered that is no controller.
    Garbled,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Hand the answer to the caller, a refusal included.
    Done,
    /// Send it again.
    Retry { url: String, delay_ms: u64 },
    /// Tell the caller that the outcome is unknown.
    OutcomeUnknown,
    /// Tell the caller that no controller can be reached.
    Unreachable,
}

/// One request over all of its attempts.
#[derive(Debug)]
pub(crate) struct Plan {
    started_ms: u64,
    deadline_ms: u64,
    all_unreachable_ms: u64,
    retry_no_drone: bool,
    /// Whether the request can take effect; only then is a lost attempt's outcome worth telling.
    changes_state: bool,
    /// An attempt may have taken effect, and none since has said anything definite.
    maybe_applied: bool,
    /// How often everyone has been asked.
    round: u32,
    /// Who has been asked in this round.
    tried: Vec<String>,
    /// Whom not to ask before when (`Retry-After`).
    not_before_ms: HashMap<String, u64>,
    /// When a connection was last made, or this request began.
    last_contact_ms: u64,
    /// Attempts since then.
    unconnected: usize,
}

impl Plan {
    pub(crate) fn new(options: &RequestOptions, changes_state: bool, now_ms: u64) -> Self {
        Self {
            started_ms: now_ms,
            deadline_ms: options.deadline_ms,
            all_unreachable_ms: options.all_unreachable_ms,
            retry_no_drone: options.retry_no_drone,
            changes_state,
            maybe_applied: false,
            round: 0,
            tried: Vec::new(),
            not_before_ms: HashMap::new(),
            last_contact_ms: now_ms,
            unconnected: 0,
        }
    }

    /// Decides what follows an attempt at `url` that ended as `outcome` at `now_ms`. `targets` already knows of it.
    /// `jitter` is a random number in `0.0..1.0`.
    pub(crate) fn decide(
        &mut self,
        url: &str,
        outcome: AttemptOutcome,
        targets: &Targets,
        now_ms: u64,
        jitter: f64,
    ) -> Decision {
        if outcome == AttemptOutcome::NotConnected {
            self.unconnected += 1;
        } else {
            self.unconnected = 0;
            self.last_contact_ms = now_ms;
        }
        self.tried.push(url.to_owned());
        let mut whole_service = false;
        match outcome {
            AttemptOutcome::Answered => return Decision::Done,
            AttemptOutcome::Garbled if self.maybe_applied => return Decision::OutcomeUnknown,
            AttemptOutcome::Garbled => return Decision::Done,
            AttemptOutcome::NotConnected => {}
            AttemptOutcome::Lost => self.maybe_applied |= self.changes_state,
            AttemptOutcome::Refused { kind, retry_after_ms } => {
                match kind {
                    ApiErrorKind::NoLeader => {}
                    ApiErrorKind::OutcomeUnknown => self.maybe_applied |= self.changes_state,
                    // Another controller would say the same: this is no reason to go round.
                    ApiErrorKind::NoDroneAvailable if self.retry_no_drone => whole_service = true,
                    _ => return Decision::Done,
                }
                if let Some(ms) = retry_after_ms {
                    let until_ms = now_ms.saturating_add(ms.min(RETRY_AFTER_MS_MAX));
                    self.not_before_ms.insert(url.to_owned(), until_ms);
                }
            }
        }

        let order = targets.order(now_ms);
        let nobody_there = self.unconnected >= order.len()
            && now_ms.saturating_sub(self.last_contact_ms) >= self.all_unreachable_ms;
        let next = if nobody_there { None } else { self.next(&order, whole_service, now_ms, jitter) };
        match next {
            Some((url, delay_ms))
                if now_ms.saturating_add(delay_ms) <= self.started_ms.saturating_add(self.deadline_ms) =>
            {
                Decision::Retry { url, delay_ms }
            }
            _ if self.maybe_applied => Decision::OutcomeUnknown,
            _ if matches!(outcome, AttemptOutcome::Refused { .. }) => Decision::Done,
            _ => Decision::Unreachable,
        }
    }

    /// The one that may be asked soonest: at once if it has not been asked in this round, else after a pause, and in
    /// neither case before the time it gave itself. Among equals the order of `order` decides.
    fn next(
        &mut self,
        order: &[String],
        whole_service: bool,
        now_ms: u64,
        jitter: f64,
    ) -> Option<(String, u64)> {
        let pause_ms = backoff_ms(self.round, jitter);
        let (at_ms, url, fresh) = order
            .iter()
            .map(|url| {
                let fresh = !whole_service && !self.tried.contains(url);
                let at_ms = if fresh { now_ms } else { now_ms.saturating_add(pause_ms) };
                (at_ms.max(self.not_before_ms.get(url).copied().unwrap_or(0)), url, fresh)
            })
            .min_by_key(|(at_ms, _, _)| *at_ms)?;
        if !fresh {
            self.round = self.round.saturating_add(1);
            self.tried.clear();
        }
        Some((url.clone(), at_ms.saturating_sub(now_ms)))
    }
}

/// Pause after round `round` (from 0): between a half and the whole of a value that doubles up to [`BACKOFF_MS_MAX`].
pub(crate) fn backoff_ms(round: u32, jitter: f64) -> u64 {
    let full_ms = BACKOFF_MS_MIN.saturating_mul(1 << round.min(16)).min(BACKOFF_MS_MAX);
    let half_ms = full_ms / 2;
    // The product is at most `half_ms`, far inside what f64 holds exactly.
    half_ms + (half_ms as f64 * jitter.clamp(0.0, 1.0)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "http://a:1";
    const B: &str = "http://b:2";
    const NO_LEADER: AttemptOutcome =
        AttemptOutcome::Refused { kind: ApiErrorKind::NoLeader, retry_after_ms: None };
    const UNKNOWN: AttemptOutcome =
        AttemptOutcome::Refused { kind: ApiErrorKind::OutcomeUnknown, retry_after_ms: None };

    fn two() -> Targets {
        Targets::new(vec![A.into(), B.into()]).unwrap()
    }

    fn plan(changes_state: bool) -> Plan {
        Plan::new(&RequestOptions { deadline_ms: 1_000, ..RequestOptions::default() }, changes_state, 0)
    }

    fn retry(url: &str, delay_ms: u64) -> Decision {
        Decision::Retry { url: url.into(), delay_ms }
    }

    #[test]
    fn success_and_refusals_are_handed_on() {
        assert_eq!(plan(true).decide(A, AttemptOutcome::Answered, &two(), 1, 0.0), Decision::Done);
        for kind in [ApiErrorKind::KeyHeld, ApiErrorKind::InvalidRequest, ApiErrorKind::NoDroneAvailable] {
            let outcome = AttemptOutcome::Refused { kind, retry_after_ms: None };
            assert_eq!(plan(true).decide(A, outcome, &two(), 1, 0.0), Decision::Done, "{kind:?}");
        }
    }

    #[test]
    fn a_failure_moves_on_at_once_and_pauses_only_between_rounds() {
        let mut plan = plan(true);
        let targets = two();
        assert_eq!(plan.decide(A, AttemptOutcome::NotConnected, &targets, 0, 0.0), retry(B, 0));
        assert_eq!(
            plan.decide(B, AttemptOutcome::NotConnected, &targets, 0, 0.0),
            retry(A, BACKOFF_MS_MIN / 2)
        );
        assert_eq!(plan.decide(A, NO_LEADER, &targets, 10, 0.0), retry(B, 0));
        assert_eq!(plan.decide(B, NO_LEADER, &targets, 10, 0.0), retry(A, BACKOFF_MS_MIN));
    }

    #[test]
    fn retry_after_keeps_that_controller_alone_waiting() {
        let mut plan = plan(true);
        let targets = two();
        let wait = AttemptOutcome::Refused { kind: ApiErrorKind::NoLeader, retry_after_ms: Some(300) };
        assert_eq!(plan.decide(A, wait, &targets, 0, 0.0), retry(B, 0));
        assert_eq!(plan.decide(B, AttemptOutcome::NotConnected, &targets, 0, 0.0), retry(B, 10));
        assert_eq!(plan.decide(B, wait, &targets, 20, 0.0), retry(A, 280));
    }

    #[test]
    fn retry_after_is_bounded() {
        let mut plan = Plan::new(&RequestOptions::default(), true, 0);
        let targets = Targets::new(vec![A.into()]).unwrap();
        let wait = AttemptOutcome::Refused { kind: ApiErrorKind::NoLeader, retry_after_ms: Some(u64::MAX) };
        assert_eq!(plan.decide(A, wait, &targets, 0, 0.0), retry(A, RETRY_AFTER_MS_MAX));
    }

    #[test]
    fn doubt_once_raised_survives_to_the_deadline() {
        for doubtful in [UNKNOWN, AttemptOutcome::Lost] {
            let mut plan = plan(true);
            assert_eq!(plan.decide(A, doubtful, &two(), 0, 0.0), retry(B, 0));
            assert_eq!(plan.decide(B, NO_LEADER, &two(), 1_000, 0.0), Decision::OutcomeUnknown);
        }
        // … but a definite answer ends it.
        let mut definite = plan(true);
        definite.decide(A, UNKNOWN, &two(), 0, 0.0);
        let held = AttemptOutcome::Refused { kind: ApiErrorKind::KeyHeld, retry_after_ms: None };
        assert_eq!(definite.decide(B, held, &two(), 10, 0.0), Decision::Done);
        // … while rubbish does not.
        let mut rubbish = plan(true);
        rubbish.decide(A, AttemptOutcome::Lost, &two(), 0, 0.0);
        assert_eq!(rubbish.decide(B, AttemptOutcome::Garbled, &two(), 10, 0.0), Decision::OutcomeUnknown);
    }

    #[test]
    fn a_lost_read_is_not_an_unknown_outcome() {
        let mut plan = plan(false);
        assert_eq!(plan.decide(A, AttemptOutcome::Lost, &two(), 0, 0.0), retry(B, 0));
        assert_eq!(plan.decide(B, AttemptOutcome::Lost, &two(), 1_000, 0.0), Decision::Unreachable);
    }

    #[test]
    fn no_leader_until_the_deadline_is_the_services_own_refusal() {
        let mut plan = plan(true);
        plan.decide(A, NO_LEADER, &two(), 0, 0.0);
        assert_eq!(plan.decide(B, NO_LEADER, &two(), 995, 0.0), Decision::Done);
    }

    #[test]
    fn nobody_there_can_be_said_before_the_deadline() {
        let options = RequestOptions { all_unreachable_ms: 100, ..RequestOptions::default() };
        let mut plan = Plan::new(&options, true, 0);
        let targets = two();
        assert!(matches!(
            plan.decide(A, AttemptOutcome::NotConnected, &targets, 0, 0.0),
            Decision::Retry { .. }
        ));
        assert!(matches!(
            plan.decide(B, AttemptOutcome::NotConnected, &targets, 50, 0.0),
            Decision::Retry { .. }
        ));
        assert_eq!(plan.decide(A, AttemptOutcome::NotConnected, &targets, 100, 0.0), Decision::Unreachable);
    }

    #[test]
    fn no_drone_is_retried_only_when_asked_and_after_a_pause() {
        let outcome = AttemptOutcome::Refused { kind: ApiErrorKind::NoDroneAvailable, retry_after_ms: None };
        let options = RequestOptions { retry_no_drone: true, ..RequestOptions::default() };
        let mut plan = Plan::new(&options, true, 0);
        assert_eq!(plan.decide(A, outcome, &two(), 0, 0.0), retry(A, BACKOFF_MS_MIN / 2));
    }

    #[test]
    fn a_leader_learned_meanwhile_is_next() {
        let mut plan = plan(true);
        let mut targets = two();
        targets.answered(A, Some("http://c:3"));
        assert_eq!(plan.decide(A, NO_LEADER, &targets, 0, 0.0), retry("http://c:3", 0));
    }

    #[test]
    fn pauses_double_within_their_bounds() {
        assert_eq!(backoff_ms(0, 1.0), BACKOFF_MS_MIN);
        assert_eq!(backoff_ms(1, 0.0), BACKOFF_MS_MIN);
        assert_eq!(backoff_ms(u32::MAX, 1.0), BACKOFF_MS_MAX);
        for round in 0..20 {
            assert!(backoff_ms(round, 0.3) <= backoff_ms(round + 1, 0.3));
        }
    }
}
