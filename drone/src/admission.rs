//! Which spawns a drone accepts. Pure.
//!
//! Invariants:
//!
//! 1. A backend id is started at most once in a process: an id that was accepted is remembered until the spawn's own
//!    `soft_terminate_at` has passed, even if the backend has ended and its report is acknowledged. A repeated spawn may
//!    arrive late from a controller that lags behind; after that moment its deadline refuses it.
//! 2. A spawn whose `soft_terminate_at` has passed, or whose deadlines cannot stem from a heartbeat of this process, is
//!    not started.
//! 3. Only a spawn of this process's time may be reported as ended: one of an earlier process may have been started by
//!    it, and run on under a guard that has outlived it.
//! 4. A backend whose end was asked for before its spawn was taken is not started. The two come in order, but a spawn may
//!    be put off (see `Agent::message`) and come again after the end was acknowledged.

use holdfast_wire::lease::EXPIRY_MS_MAX;
use holdfast_wire::{Deadlines, LeaseConfig, TerminationReason};
use std::collections::{BTreeMap, BTreeSet};

/// Most backends of one drone, running or remembered; and as many again whose end came first.
pub const BACKENDS_MAX: usize = 20_000;

/// What to do with a spawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Start it.
    Start,
    /// Known already: change nothing.
    Repeated,
    /// Its time has run out: report that it was not started.
    TooLate,
    /// Its deadlines are not of this process's time, or that cannot be told: start nothing and report nothing. An earlier
    /// process's guard may run it; its key expires.
    NotOurTime,
    /// It was to end before it came: report that it was not started.
    Ended(TerminationReason),
    /// [`BACKENDS_MAX`] is reached: report that it was not started.
    Full,
}

/// Ids that were accepted, and how long they must be remembered.
#[derive(Debug)]
pub struct Admission {
    /// Drone time at which this process started, in milliseconds.
    started_at: i64,
    /// Backend to the `soft_terminate_at` of its spawn.
    accepted: BTreeMap<String, i64>,
    by_time: BTreeSet<(i64, String)>,
    /// Backends that were to end before their spawns were taken: until when that is remembered, and why they were to.
    ended: BTreeMap<String, (i64, TerminationReason)>,
}

impl Admission {
    /// For a process that started at this drone time.
    pub fn new(started_at: i64) -> Self {
        Self { started_at, accepted: BTreeMap::new(), by_time: BTreeSet::new(), ended: BTreeMap::new() }
    }

    /// Judges a spawn, and remembers the id if it is to be started. `lease` is the cluster's, where it said so.
    pub fn judge(
        &mut self,
        backend: &str,
        deadlines: Deadlines,
        lease: Option<LeaseConfig>,
        now_ms: i64,
    ) -> Verdict {
        if self.accepted.contains_key(backend) {
            return Verdict::Repeated;
        }
        let ordered = deadlines.renew_at < deadlines.soft_terminate_at
            && deadlines.soft_terminate_at < deadlines.hard_terminate_at;
        // An acquisition counts from the `local_time` of a heartbeat, which lies between the start and now. A spawn
        // that was meant for an earlier process, whose clock was ahead of ours, does not.
        let derived = lease.map(|lease| {
            let base = deadlines.hard_terminate_at.saturating_sub_unsigned(lease.hard_terminate_ms);
            (self.started_at..=now_ms).contains(&base)
        });
        let late = now_ms >= deadlines.soft_terminate_at;
        match derived {
            _ if !ordered => return Verdict::NotOurTime,
            Some(false) => return Verdict::NotOurTime,
            // Without the cluster's lease nobody can tell whose time a late one is of.
            None if late => return Verdict::NotOurTime,
            Some(true) if late => return Verdict::TooLate,
            Some(true) | None => {}
        }
        if let Some((_, reason)) = self.ended.get(backend) {
            return Verdict::Ended(*reason);
        }
        if self.accepted.len() >= BACKENDS_MAX {
            return Verdict::Full;
        }
        self.accepted.insert(backend.to_owned(), deadlines.soft_terminate_at);
        Verdict::Start
    }

    /// A backend that is not here is to end. Remembered until no spawn that was made before can be started any more; false if
    /// there is no room to.
    #[must_use]
    pub fn end_first(
        &mut self,
        backend: &str,
        reason: TerminationReason,
        lease: Option<LeaseConfig>,
        now_ms: i64,
    ) -> bool {
        if self.accepted.contains_key(backend) || self.ended.contains_key(backend) {
            return true;
        }
        // A spawn's soft deadline counts from a heartbeat, so from before now.
        let until = now_ms.saturating_add_unsigned(lease.map_or(EXPIRY_MS_MAX, |l| l.soft_terminate_ms));
        let room = self.ended.len() < BACKENDS_MAX;
        if room {
            self.ended.insert(backend.to_owned(), (until, reason));
        }
        room
    }

    /// An earlier process has taken it on; its spawn may still be repeated until this moment.
    pub fn adopted(&mut self, backend: &str, soft_terminate_at: i64) {
        self.accepted.insert(backend.to_owned(), soft_terminate_at);
    }

    /// The backend has ended and its report is acknowledged: remember the id only as long as it is needed.
    pub fn finished(&mut self, backend: &str) {
        if let Some(until) = self.accepted.get(backend) {
            self.by_time.insert((*until, backend.to_owned()));
        }
    }

    /// Forgets what need not be remembered any more.
    pub fn tidy(&mut self, now_ms: i64) {
        while let Some((until, _)) = self.by_time.first()
            && *until <= now_ms
            && let Some((_, backend)) = self.by_time.pop_first()
        {
            self.accepted.remove(&backend);
        }
        self.ended.retain(|_, (until, _)| *until > now_ms);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease() -> LeaseConfig {
        LeaseConfig::default()
    }

    #[test]
    fn a_repeated_spawn_is_known_even_after_the_backend_has_ended() {
        let mut admission = Admission::new(0);
        let deadlines = lease().deadlines(1_000);
        assert_eq!(admission.judge("ba", deadlines, Some(lease()), 2_000), Verdict::Start);
        assert_eq!(admission.judge("ba", deadlines, Some(lease()), 2_001), Verdict::Repeated);
        admission.finished("ba");
        admission.tidy(40_999);
        assert_eq!(admission.judge("ba", deadlines, Some(lease()), 40_999), Verdict::Repeated);
        admission.tidy(41_000);
        assert_eq!(admission.judge("ba", deadlines, Some(lease()), 41_000), Verdict::TooLate);
        assert!(admission.accepted.is_empty());
    }

    #[test]
    fn a_running_backend_is_remembered_past_the_first_deadline() {
        let mut admission = Admission::new(0);
        admission.judge("ba", lease().deadlines(0), None, 0);
        admission.tidy(1_000_000);
        assert_eq!(admission.judge("ba", lease().deadlines(0), None, 1_000_000), Verdict::Repeated);
    }

    #[test]
    fn a_spawn_of_another_process_time_is_refused() {
        let mut admission = Admission::new(5_000);
        // The earlier process's clock was an hour ahead, or its heartbeat lies before our start.
        for base in [3_600_000, 4_999] {
            let deadlines = lease().deadlines(base);
            assert_eq!(admission.judge("ba", deadlines, Some(lease()), 6_000), Verdict::NotOurTime);
        }
        assert_eq!(admission.judge("ba", lease().deadlines(5_000), Some(lease()), 6_000), Verdict::Start);
    }

    #[test]
    fn a_late_spawn_of_another_process_time_is_not_called_too_late() {
        let mut admission = Admission::new(100_000);
        let now = 200_000;
        for (base, lease_known, verdict) in [
            // An earlier process may have started it, and had its key renewed since.
            (99_999, Some(lease()), Verdict::NotOurTime),
            (100_000, Some(lease()), Verdict::TooLate),
            (100_000, None, Verdict::NotOurTime),
        ] {
            assert_eq!(admission.judge("ba", lease().deadlines(base), lease_known, now), verdict, "{base}");
        }
    }

    #[test]
    fn a_backend_that_was_to_end_before_its_spawn_was_taken_is_not_started() {
        let mut admission = Admission::new(0);
        let deadlines = lease().deadlines(1_000);
        let reason = TerminationReason::External;
        assert!(admission.end_first("ba", reason, Some(lease()), 2_000));
        let verdict =
            |admission: &mut Admission, now_ms| admission.judge("ba", deadlines, Some(lease()), now_ms);
        assert_eq!(verdict(&mut admission, 2_001), Verdict::Ended(reason));
        admission.tidy(40_999);
        assert_eq!(verdict(&mut admission, 40_999), Verdict::Ended(reason), "it is still in time");
        admission.tidy(42_000);
        assert!(admission.ended.is_empty());
        assert_eq!(verdict(&mut admission, 42_000), Verdict::TooLate);
        // One of another process's time is left alone all the same.
        assert!(admission.end_first("bb", reason, Some(lease()), 50_000));
        let deadlines = lease().deadlines(-1);
        assert_eq!(admission.judge("bb", deadlines, Some(lease()), 50_000), Verdict::NotOurTime);
        // What is here ends by itself.
        assert_eq!(admission.judge("bc", lease().deadlines(50_000), None, 50_000), Verdict::Start);
        assert!(admission.end_first("bc", reason, None, 50_001));
        assert!(!admission.ended.contains_key("bc"));
    }

    #[test]
    fn the_number_of_ends_that_came_first_is_bounded() {
        let mut admission = Admission::new(0);
        let mut end =
            |n: usize| admission.end_first(&format!("ba-{n}"), TerminationReason::External, None, 1);
        assert!((0..BACKENDS_MAX).all(&mut end));
        assert!(!end(BACKENDS_MAX));
        assert!(end(0), "known already");
    }

    #[test]
    fn the_number_of_backends_is_bounded() {
        let mut admission = Admission::new(0);
        for i in 0..BACKENDS_MAX {
            assert_eq!(admission.judge(&format!("ba-{i}"), lease().deadlines(0), None, 1), Verdict::Start);
        }
        assert_eq!(admission.judge("one-more", lease().deadlines(0), None, 1), Verdict::Full);
    }
}
