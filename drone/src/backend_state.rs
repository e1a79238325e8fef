//! One backend's states as the drone reports them. Pure: observations of the runtime and decisions to end the backend go
//! in, the states to report and what the guard must do come out.
//!
//! Invariants:
//!
//! 1. Reported states only go forward in the order of [`BackendStatus`], each at most once.
//! 2. `terminated` is reported only on [`Observation::Gone`]: nothing of the backend is left.
//! 3. An end that has begun is never taken back; it can only turn from soft to hard.

use crate::activity::Place;
use crate::guard::Report;
use holdfast_wire::{BackendState, BackendStatus, Deadlines, TerminationKind, TerminationReason};
use std::net::SocketAddr;

/// What the drone wants of a backend by now. Only the latest counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Desired {
    /// The deadlines that stand, in drone time.
    pub deadlines: Deadlines,
    /// An end that has begun. It is not taken back.
    pub end: Option<TerminationKind>,
    /// When the grace of a soft end is over, in drone time; never later than the hard deadline.
    pub kill_at: i64,
    /// Time allowed for a kill to take effect, in milliseconds: the lease's, counted from the hard deadline.
    pub kill_ms: u64,
    /// The lease's expiry, in milliseconds: no deadline lies further ahead.
    pub expiry_ms: u64,
    /// It has answered HTTP.
    pub ready: bool,
    /// How often the end was asked for. Each time it is delivered to the guard again, which may have missed it.
    pub deliveries: u64,
}

/// What a runtime, or the watch over a backend, has found out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Observation {
    /// What it needs is there; it is being started.
    Starting,
    /// It runs; it does not answer yet.
    Started,
    /// It answers HTTP.
    Ready,
    /// It did not answer HTTP in time.
    StartupTimeout,
    /// It was not started, because its time had run out.
    StartedTooLate,
    /// It could not be started, or its guard failed.
    Failed,
    /// Its guard began a graceful end at the soft deadline by itself.
    SoftDeadline,
    /// Its guard is killing it: grace is over, or the hard deadline has come.
    Killing,
    /// Its main process has ended; no code if a signal ended it.
    Exited(Option<i32>),
    /// Nothing of it is left, and its end was not seen: the machine was started again, or its guard was killed.
    Lost,
    /// Where its connections are seen, if not at its port on this machine.
    ConnectionsAt(Place),
    /// What it uses, as the controllers are told it.
    Metrics(serde_json::Value),
    /// Nothing of it is left.
    Gone,
}

impl Observation {
    /// What a guard's report says of the backend, if anything. That nothing of it is left is a fact only once its guard has
    /// ended too.
    pub fn of(report: &Report) -> Option<Self> {
        match report {
            Report::Contained { .. } | Report::Uncontained { .. } | Report::Gone => None,
            Report::Started { .. } => Some(Self::Started),
            Report::NotStarted { late: true, .. } => Some(Self::StartedTooLate),
            Report::NotStarted { late: false, .. } => Some(Self::Failed),
            Report::Ready => Some(Self::Ready),
            Report::SoftDeadline => Some(Self::SoftDeadline),
            Report::Killing => Some(Self::Killing),
            Report::Exited { code, .. } => Some(Self::Exited(*code)),
        }
    }
}

/// What follows from an observation or a decision.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// States to report, in order.
    pub states: Vec<BackendState>,
    /// The guard must begin this kind of end.
    pub end: Option<TerminationKind>,
}

#[derive(Debug, Clone, Copy)]
struct End {
    kind: TerminationKind,
    /// Of the first decision to end it.
    reason: TerminationReason,
}

/// The states of one backend, from `scheduled` to `terminated`.
#[derive(Debug)]
pub struct Lifecycle {
    address: SocketAddr,
    /// The latest that was reported.
    status: BackendStatus,
    /// The latest before an end was begun.
    status_alive: BackendStatus,
    end: Option<End>,
    exited: bool,
    exit_code: Option<i32>,
    /// Why it ended, if no one decided to end it.
    failure: Option<TerminationReason>,
}

impl Lifecycle {
    /// A backend that was scheduled here, to answer at `address`.
    pub fn new(address: SocketAddr) -> Self {
        Self {
            address,
            status: BackendStatus::Scheduled,
            status_alive: BackendStatus::Scheduled,
            end: None,
            exited: false,
            exit_code: None,
            failure: None,
        }
    }

    /// The drone has taken it on.
    pub fn begin(&mut self) -> Changes {
        let mut changes = Changes::default();
        self.advance(BackendState::Loading, &mut changes);
        changes
    }

    /// The runtime has found something out.
    pub fn learn(&mut self, observation: Observation) -> Changes {
        let mut changes = Changes::default();
        let address = self.address;
        match observation {
            Observation::Starting => self.advance(BackendState::Starting, &mut changes),
            Observation::Started => self.advance(BackendState::Waiting { address }, &mut changes),
            Observation::Ready if !self.exited => self.advance(BackendState::Ready { address }, &mut changes),
            Observation::Ready => {}
            Observation::StartupTimeout if !self.exited => {
                return self.end(TerminationKind::Soft, TerminationReason::StartupTimeout);
            }
            Observation::StartupTimeout => {}
            Observation::StartedTooLate => self.failure = Some(TerminationReason::KeyExpired),
            Observation::Failed => self.failure = Some(TerminationReason::InternalError),
            Observation::SoftDeadline if !self.exited => {
                return self.end(TerminationKind::Soft, TerminationReason::KeyExpired);
            }
            Observation::SoftDeadline => {}
            // What remains of a backend that has ended by itself is killed too; that is not an end of ours.
            Observation::Killing if self.exited && self.end.is_none() => {}
            Observation::Killing => {
                let reason = self.end.map_or(TerminationReason::KeyExpired, |end| end.reason);
                return self.end(TerminationKind::Hard, reason);
            }
            Observation::Lost => self.failure = Some(TerminationReason::Lost),
            // No change of state.
            Observation::Metrics(_) | Observation::ConnectionsAt(_) => {}
            Observation::Exited(code) => {
                self.exited = true;
                self.exit_code = code;
            }
            Observation::Gone => {
                let terminated = BackendState::Terminated {
                    last_status: self.status_alive,
                    termination: self.end.map(|end| end.kind),
                    reason: self.end.map(|end| end.reason).or(self.failure),
                    exit_code: self.exit_code,
                };
                self.advance(terminated, &mut changes);
            }
        }
        changes
    }

    /// It was decided to end it.
    pub fn end(&mut self, kind: TerminationKind, reason: TerminationReason) -> Changes {
        let mut changes = Changes::default();
        if self.is_over() {
            return changes;
        }
        let first = self.end.is_none();
        let last_status = self.status_alive;
        match (self.end, kind) {
            (None, _) => self.end = Some(End { kind, reason }),
            (Some(End { kind: TerminationKind::Soft, reason: first }), TerminationKind::Hard) => {
                self.end = Some(End { kind, reason: first });
            }
            // Already being ended as firmly as that.
            (Some(_), _) => return changes,
        }
        changes.end = Some(kind);
        match kind {
            TerminationKind::Soft => {
                assert!(first, "only the first end can be soft");
                let state = BackendState::Terminating { last_status, termination: kind, reason };
                self.advance(state, &mut changes);
            }
            TerminationKind::Hard => {
                self.advance(BackendState::HardTerminating { last_status, reason }, &mut changes);
            }
        }
        changes
    }

    /// The end that has begun.
    pub fn end_kind(&self) -> Option<TerminationKind> {
        self.end.map(|end| end.kind)
    }

    /// Why the first end was begun.
    pub fn end_reason(&self) -> Option<TerminationReason> {
        self.end.map(|end| end.reason)
    }

    /// Whether `terminated` was reported.
    pub fn is_over(&self) -> bool {
        self.status == BackendStatus::Terminated
    }

    fn advance(&mut self, state: BackendState, changes: &mut Changes) {
        let status = state.status();
        if status <= self.status {
            return;
        }
        self.status = status;
        if status < BackendStatus::Terminating {
            self.status_alive = status;
        }
        changes.states.push(state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use TerminationKind::{Hard, Soft};
    use TerminationReason::{External, InternalError, KeyExpired, StartupTimeout};

    fn address() -> SocketAddr {
        "127.0.0.1:4000".parse().unwrap()
    }

    fn terminated(
        last_status: BackendStatus,
        termination: Option<TerminationKind>,
        reason: Option<TerminationReason>,
        exit_code: Option<i32>,
    ) -> BackendState {
        BackendState::Terminated { last_status, termination, reason, exit_code }
    }

    fn ready() -> Lifecycle {
        let mut life = Lifecycle::new(address());
        life.begin();
        for fact in [Observation::Starting, Observation::Started, Observation::Ready] {
            life.learn(fact);
        }
        assert_eq!(life.status, BackendStatus::Ready);
        life
    }

    #[test]
    fn a_backend_that_ends_by_itself_goes_through_every_state_once() {
        let mut life = Lifecycle::new(address());
        let mut states = life.begin().states;
        let facts = [
            Observation::Starting,
            Observation::Starting,
            Observation::Started,
            Observation::Ready,
            Observation::Started,
            Observation::Exited(Some(3)),
            Observation::Killing,
            Observation::Gone,
            Observation::Gone,
        ];
        for fact in facts {
            let changes = life.learn(fact);
            assert_eq!(changes.end, None);
            states.extend(changes.states);
        }
        assert_eq!(
            states,
            [
                BackendState::Loading,
                BackendState::Starting,
                BackendState::Waiting { address: address() },
                BackendState::Ready { address: address() },
                terminated(BackendStatus::Ready, None, None, Some(3)),
            ]
        );
        assert!(life.is_over());
    }

    #[test]
    fn soft_then_hard_keeps_the_first_reason_in_the_end() {
        let mut life = ready();
        let soft = life.end(Soft, External);
        assert_eq!(soft.end, Some(Soft));
        let last_status = BackendStatus::Ready;
        assert_eq!(
            soft.states,
            [BackendState::Terminating { last_status, termination: Soft, reason: External }]
        );
        let hard = life.end(Hard, KeyExpired);
        assert_eq!(hard.end, Some(Hard));
        assert_eq!(hard.states, [BackendState::HardTerminating { last_status, reason: KeyExpired }]);
        life.learn(Observation::Exited(None));
        assert_eq!(
            life.learn(Observation::Gone).states,
            [terminated(last_status, Some(Hard), Some(External), None)]
        );
    }

    #[test]
    fn an_end_is_neither_repeated_nor_taken_back() {
        let mut life = ready();
        life.end(Hard, External);
        assert_eq!(life.end(Soft, KeyExpired), Changes::default());
        assert_eq!(life.end(Hard, KeyExpired), Changes::default());
        assert_eq!(life.learn(Observation::Killing), Changes::default());
        assert_eq!(life.learn(Observation::SoftDeadline), Changes::default());
        life.learn(Observation::Gone);
        assert_eq!(life.end(Hard, External), Changes::default());
    }

    #[test]
    fn a_guard_that_acts_by_itself_is_reported_as_an_expired_key() {
        let mut life = ready();
        let last_status = BackendStatus::Ready;
        assert_eq!(
            life.learn(Observation::SoftDeadline).states,
            [BackendState::Terminating { last_status, termination: Soft, reason: KeyExpired }]
        );
        assert_eq!(
            life.learn(Observation::Killing).states,
            [BackendState::HardTerminating { last_status, reason: KeyExpired }]
        );
    }

    #[test]
    fn ready_after_the_end_began_is_not_reported() {
        let mut life = Lifecycle::new(address());
        life.begin();
        life.learn(Observation::Starting);
        life.learn(Observation::Started);
        life.end(Soft, External);
        assert_eq!(life.learn(Observation::Ready), Changes::default());
    }

    #[test]
    fn a_startup_timeout_ends_it_softly() {
        let mut life = Lifecycle::new(address());
        life.begin();
        life.learn(Observation::Started);
        assert_eq!(life.learn(Observation::StartupTimeout).end, Some(Soft));
        life.learn(Observation::Exited(Some(0)));
        assert_eq!(
            life.learn(Observation::Gone).states,
            [terminated(BackendStatus::Waiting, Some(Soft), Some(StartupTimeout), Some(0))]
        );
    }

    #[test]
    fn a_backend_that_was_never_started_says_why() {
        for (fact, reason) in
            [(Observation::StartedTooLate, KeyExpired), (Observation::Failed, InternalError)]
        {
            let mut life = Lifecycle::new(address());
            life.begin();
            life.learn(fact);
            assert_eq!(
                life.learn(Observation::Gone).states,
                [terminated(BackendStatus::Loading, None, Some(reason), None)]
            );
        }
    }
}
