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
//!    be put off and come again after the end was acknowledged.
//! 5. A spawn that cannot be remembered is neither started nor reported: if it were reported as ended, its key would be
//!    free, and the same spawn could be started later.

use crate::tables::{Schedule, Table};
use holdfast_wire::lease::EXPIRY_MS_MAX;
use holdfast_wire::{Deadlines, LeaseConfig, TerminationReason};

/// Most backends of one drone, running or remembered; and as many again whose end came first.
pub const BACKENDS_MAX: usize = 20_000;

/// What to do with a spawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Start it. Its id is remembered.
    Start,
    /// Known already: change nothing.
    Repeated,
    /// Its time has run out: report that it was not started.
    TooLate,
    /// Its deadlines are not of this process's time, or that cannot be told: start nothing and report nothing. An earlier
    /// process's guard may run it; its key expires.
    NotOurTime,
    /// Its end was asked for before: report that it was not started.
    Ended(TerminationReason),
    /// [`BACKENDS_MAX`] is reached: neither report nor acknowledge it. It comes again.
    Full,
}

/// Whose time the deadlines of a spawn are in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimeBase {
    /// The controller names this process's incarnation.
    Ours,
    /// The controller is of a release that names none: it has to be told from the deadlines.
    Unnamed,
}

/// Ids that were accepted, and how long they must be remembered.
#[derive(Debug)]
pub struct Admission {
    /// Drone time at which this process started, in milliseconds.
    started_at: i64,
    /// Backend to the `soft_terminate_at` of its spawn.
    accepted: Table<String, i64>,
    /// When an accepted id whose backend is over is forgotten.
    forget_at: Schedule<String>,
    /// Backends whose ends were asked for before their spawns were taken, and why.
    ended: Table<String, TerminationReason>,
    /// Until when that is remembered.
    ended_until: Schedule<String>,
}

impl Admission {
    /// For a process that started at this drone time.
    pub fn new(started_at: i64) -> Self {
        Self {
            started_at,
            accepted: Table::default(),
            forget_at: Schedule::default(),
            ended: Table::default(),
            ended_until: Schedule::default(),
        }
    }

    /// Judges a spawn, and remembers the id if it is to be started. `lease` is the cluster's, if it is known.
    pub fn judge(
        &mut self,
        backend: &str,
        deadlines: Deadlines,
        base: TimeBase,
        lease: Option<LeaseConfig>,
        now_ms: i64,
    ) -> Verdict {
        if self.accepted.contains(backend) {
            return Verdict::Repeated;
        }
        if !self.is_of_our_time(deadlines, base, lease, now_ms) {
            return Verdict::NotOurTime;
        }
        if now_ms >= deadlines.soft_terminate_at {
            return Verdict::TooLate;
        }
        if let Some(reason) = self.ended.get(backend) {
            return Verdict::Ended(*reason);
        }
        if self.accepted.len() >= BACKENDS_MAX {
            return Verdict::Full;
        }
        self.accepted.insert(backend.to_owned(), deadlines.soft_terminate_at);
        Verdict::Start
    }

    fn is_of_our_time(
        &self,
        deadlines: Deadlines,
        base: TimeBase,
        lease: Option<LeaseConfig>,
        now_ms: i64,
    ) -> bool {
        let ordered = deadlines.renew_at < deadlines.soft_terminate_at
            && deadlines.soft_terminate_at < deadlines.hard_terminate_at;
        let acquired_at =
            lease.map(|lease| deadlines.hard_terminate_at.saturating_sub_unsigned(lease.hard_terminate_ms));
        let derived = match (base, acquired_at) {
            // A spawn that is sent again counts from its acquisition, which may lie before our start, never after now.
            (TimeBase::Ours, Some(acquired_at)) => acquired_at <= now_ms,
            (TimeBase::Ours, None) => true,
            // An acquisition counts from the `local_time` of a heartbeat, which lies between the start and now. A spawn
            // that was meant for an earlier process, whose clock was ahead of ours, does not.
            (TimeBase::Unnamed, Some(acquired_at)) => (self.started_at..=now_ms).contains(&acquired_at),
            // Without the cluster's lease no one can tell whose time a late one is of.
            (TimeBase::Unnamed, None) => now_ms < deadlines.soft_terminate_at,
        };
        ordered && derived
    }

    /// The end of a backend that is not here was asked for. Remembered until no spawn that was made before can be started
    /// any more; false if there is no room to.
    #[must_use]
    pub fn end_first(
        &mut self,
        backend: &str,
        reason: TerminationReason,
        lease: Option<LeaseConfig>,
        now_ms: i64,
    ) -> bool {
        if self.accepted.contains(backend) {
            return true;
        }
        if !self.ended.contains(backend) {
            if self.ended.len() >= BACKENDS_MAX {
                return false;
            }
            self.ended.insert(backend.to_owned(), reason);
        }
        // A spawn's soft deadline counts from a heartbeat, so from before now.
        let until = now_ms.saturating_add_unsigned(lease.map_or(EXPIRY_MS_MAX, |l| l.soft_terminate_ms));
        self.ended_until.set(&backend.to_owned(), Some(until));
        true
    }

    /// An earlier process has taken it on; its spawn may still be repeated until this moment.
    pub fn adopted(&mut self, backend: &str, soft_terminate_at: i64) {
        self.accepted.insert(backend.to_owned(), soft_terminate_at);
    }

    /// The backend has ended and its report is acknowledged: remember the id only as long as it is needed.
    pub fn finished(&mut self, backend: &str) {
        if let Some(until) = self.accepted.get(backend) {
            self.forget_at.set(&backend.to_owned(), Some(*until));
        }
    }

    /// Forgets what need not be remembered any more.
    pub fn tidy(&mut self, now_ms: i64) {
        while let Some(backend) = self.forget_at.pop_due(now_ms) {
            self.accepted.remove(&backend);
        }
        while let Some(backend) = self.ended_until.pop_due(now_ms) {
            self.ended.remove(&backend);
        }
    }

    /// Ids that are remembered, and ends that came first.
    #[cfg(test)]
    pub(crate) fn sizes(&self) -> (usize, usize) {
        (self.accepted.len(), self.ended.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNNAMED: TimeBase = TimeBase::Unnamed;

    fn lease() -> LeaseConfig {
        LeaseConfig::default()
    }

    #[test]
    fn a_repeated_spawn_is_known_even_after_the_backend_has_ended() {
        let mut admission = Admission::new(0);
        let deadlines = lease().deadlines(1_000);
        assert_eq!(admission.judge("ba", deadlines, UNNAMED, Some(lease()), 2_000), Verdict::Start);
        assert_eq!(admission.judge("ba", deadlines, UNNAMED, Some(lease()), 2_001), Verdict::Repeated);
        admission.finished("ba");
        admission.tidy(40_999);
        assert_eq!(admission.judge("ba", deadlines, UNNAMED, Some(lease()), 40_999), Verdict::Repeated);
        admission.tidy(41_000);
        assert_eq!(admission.judge("ba", deadlines, UNNAMED, Some(lease()), 41_000), Verdict::TooLate);
        assert!(admission.accepted.is_empty());
    }

    #[test]
    fn a_running_backend_is_remembered_past_the_first_deadline() {
        let mut admission = Admission::new(0);
        admission.judge("ba", lease().deadlines(0), UNNAMED, None, 0);
        admission.tidy(1_000_000);
        assert_eq!(admission.judge("ba", lease().deadlines(0), UNNAMED, None, 1_000_000), Verdict::Repeated);
    }

    #[test]
    fn a_spawn_of_another_process_time_is_refused() {
        let mut admission = Admission::new(5_000);
        // The earlier process's clock was an hour ahead, or its heartbeat lies before our start.
        for base in [3_600_000, 4_999] {
            let deadlines = lease().deadlines(base);
            assert_eq!(admission.judge("ba", deadlines, UNNAMED, Some(lease()), 6_000), Verdict::NotOurTime);
        }
        assert_eq!(
            admission.judge("ba", lease().deadlines(5_000), UNNAMED, Some(lease()), 6_000),
            Verdict::Start
        );
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
            assert_eq!(
                admission.judge("ba", lease().deadlines(base), UNNAMED, lease_known, now),
                verdict,
                "{base}"
            );
        }
    }

    #[test]
    fn a_backend_that_was_to_end_before_its_spawn_was_taken_is_not_started() {
        let mut admission = Admission::new(0);
        let deadlines = lease().deadlines(1_000);
        let reason = TerminationReason::External;
        assert!(admission.end_first("ba", reason, Some(lease()), 2_000));
        let verdict = |admission: &mut Admission, now_ms| {
            admission.judge("ba", deadlines, UNNAMED, Some(lease()), now_ms)
        };
        assert_eq!(verdict(&mut admission, 2_001), Verdict::Ended(reason));
        admission.tidy(40_999);
        assert_eq!(verdict(&mut admission, 40_999), Verdict::Ended(reason), "it is still in time");
        admission.tidy(42_000);
        assert!(admission.ended.is_empty());
        assert_eq!(verdict(&mut admission, 42_000), Verdict::TooLate);
        // One of another process's time is left alone all the same.
        assert!(admission.end_first("bb", reason, Some(lease()), 50_000));
        let deadlines = lease().deadlines(-1);
        assert_eq!(admission.judge("bb", deadlines, UNNAMED, Some(lease()), 50_000), Verdict::NotOurTime);
        // What is here ends by itself.
        assert_eq!(admission.judge("bc", lease().deadlines(50_000), UNNAMED, None, 50_000), Verdict::Start);
        assert!(admission.end_first("bc", reason, None, 50_001));
        assert!(!admission.ended.contains("bc"));
    }

    #[test]
    fn a_spawn_for_this_incarnation_may_have_been_acquired_before_its_start() {
        let mut admission = Admission::new(5_000);
        let mut judge = |backend: &str, base, now_ms| {
            admission.judge(backend, lease().deadlines(base), TimeBase::Ours, Some(lease()), now_ms)
        };
        assert_eq!(judge("ba", 1_000, 6_000), Verdict::Start);
        assert_eq!(judge("bb", 6_001, 6_000), Verdict::NotOurTime, "no acquisition lies ahead");
        assert_eq!(judge("bc", 1_000, 41_000), Verdict::TooLate);
        assert_eq!(judge("bd", 1_000, 51_000), Verdict::TooLate, "after its hard deadline too");
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
            assert_eq!(
                admission.judge(&format!("ba-{i}"), lease().deadlines(0), UNNAMED, None, 1),
                Verdict::Start
            );
        }
        assert_eq!(admission.judge("one-more", lease().deadlines(0), UNNAMED, None, 1), Verdict::Full);
    }
}
