//! The lease keeper: when to renew, when to end a backend. Pure: the caller brings the time, in milliseconds of the
//! drone's clock, and the randomness, and carries out the [`Duty`]s.
//!
//! ```text
//!                  acquired
//!                     │            renewed (later deadlines)
//!                     ▼           ┌────────┐
//!   renew_at ──▶  [ held ]────────┘        │ refused: renewal_prevented
//!    RenewNow, again until answered        ▼
//!                     │               [ winding down ]   (also: an end that was asked for)
//!                     └─────┬──────────────┘
//!        soft_terminate_at  ▼
//!                       [ soft ]  SoftTerminate(keyexpired)
//!        hard_terminate_at  │        refused: not_holder, unknown
//!                           ▼                  │
//!                       [ hard ]  HardTerminate(keyexpired) ◀──┘
//! ```
//!
//! Invariants:
//!
//! 1. Deadlines never go back.
//! 2. At the first look at or after `hard_terminate_at` of the latest deadlines, a backend that has not ended is told to
//!    be killed, whatever came before.
//! 3. No renewal is asked for, and none counts, from `soft_terminate_at` on, or after an end has begun.
//! 4. A renewal counts only if this keeper asked for it: its deadlines lie after a `local_time` that was sent.

use crate::tables::{Schedule, Table};
use holdfast_wire::drone::RenewRefusal;
use holdfast_wire::lease::EXPIRY_MS_MAX;
use holdfast_wire::{Deadlines, TerminationReason};

/// Renewals are repeated after a fifth of the time from `renew_at` to `soft_terminate_at`, within these bounds.
pub const RENEW_RETRY_PARTS: i64 = 5;
/// Shortest time between two requests for one key, in milliseconds.
pub const RENEW_RETRY_MS_MIN: i64 = 50;
/// Longest time between two requests for one key, in milliseconds.
pub const RENEW_RETRY_MS_MAX: i64 = 2_000;
/// Renewals due this soon go along with one that is due, in milliseconds.
pub const RENEW_COALESCE_MS: i64 = 20;

/// What the caller has to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Duty {
    /// Ask the controllers to renew, with the time given to [`LeaseKeeper::due`] as `local_time`.
    RenewNow {
        /// The backend that holds the key.
        backend: String,
        /// Its fencing token.
        token: u64,
    },
    /// End the backend gracefully; it is killed at the hard deadline.
    SoftTerminate {
        /// The backend.
        backend: String,
        /// Why.
        reason: TerminationReason,
    },
    /// Kill the backend.
    HardTerminate {
        /// The backend.
        backend: String,
        /// Why.
        reason: TerminationReason,
    },
}

/// What became of an answer to a renewal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Renewal {
    /// The new deadlines stand.
    Extended,
    /// A late or repeated answer, which does not count.
    NotLater,
    /// The backend is unknown here, ending, or past `soft_terminate_at`.
    TooLate,
    /// Out of order, or not derived from a request of ours.
    Malformed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Held,
    WindingDown,
    Soft,
    Hard,
}

#[derive(Debug)]
struct Lease {
    token: u64,
    deadlines: Deadlines,
    phase: Phase,
    /// When to ask for the next renewal.
    ask_at: i64,
    /// First and last `local_time` sent since the deadlines last changed.
    asked: Option<(i64, i64)>,
    /// The same of the deadlines before, whose first answer has counted: the answers to its repetitions may follow.
    answered: Option<(i64, i64)>,
}

impl Lease {
    fn next_wake(&self) -> Option<i64> {
        match self.phase {
            Phase::Held => Some(self.ask_at.min(self.deadlines.soft_terminate_at)),
            // `WindingDown` still turns soft on the timeline: the backend may run until then.
            Phase::WindingDown => Some(self.deadlines.soft_terminate_at),
            Phase::Soft => Some(self.deadlines.hard_terminate_at),
            Phase::Hard => None,
        }
    }

    fn retry_ms(&self) -> i64 {
        let room_ms = self.deadlines.soft_terminate_at.saturating_sub(self.deadlines.renew_at);
        (room_ms / RENEW_RETRY_PARTS).clamp(RENEW_RETRY_MS_MIN, RENEW_RETRY_MS_MAX)
    }
}

/// All leases of a drone.
#[derive(Debug, Default)]
pub struct LeaseKeeper {
    leases: Table<String, Lease>,
    /// When each lease next has something to say.
    wakes: Schedule<String>,
}

impl LeaseKeeper {
    /// Without leases.
    pub fn new() -> Self {
        Self::default()
    }

    /// A backend is about to be started under these deadlines. Does nothing and answers false if it has a lease already.
    pub fn acquired(&mut self, backend: &str, token: u64, deadlines: Deadlines) -> bool {
        if self.leases.contains(backend) {
            return false;
        }
        let lease = Lease {
            token,
            deadlines,
            phase: Phase::Held,
            ask_at: deadlines.renew_at,
            asked: None,
            answered: None,
        };
        self.leases.insert(backend.to_owned(), lease);
        self.index(backend);
        true
    }

    /// A renewal was granted.
    pub fn renewed(&mut self, backend: &str, deadlines: Deadlines, now_ms: i64) -> Renewal {
        let Some(lease) = self.leases.get_mut(backend) else { return Renewal::TooLate };
        if lease.phase != Phase::Held || now_ms >= lease.deadlines.soft_terminate_at {
            return Renewal::TooLate;
        }
        let Deadlines { renew_at, soft_terminate_at, hard_terminate_at } = deadlines;
        if !(renew_at < soft_terminate_at && soft_terminate_at < hard_terminate_at) {
            return Renewal::Malformed;
        }
        let held = lease.deadlines;
        if renew_at <= held.renew_at
            || soft_terminate_at <= held.soft_terminate_at
            || hard_terminate_at <= held.hard_terminate_at
        {
            return Renewal::NotLater;
        }
        let derived_from = |(first, last): (i64, i64)| {
            renew_at > first && hard_terminate_at <= last.saturating_add_unsigned(EXPIRY_MS_MAX)
        };
        if !lease.asked.is_some_and(derived_from) {
            // A repeated request was answered twice. The first answer has counted; the next request is as good.
            let repeated = lease.answered.is_some_and(derived_from);
            return if repeated { Renewal::NotLater } else { Renewal::Malformed };
        }
        lease.deadlines = deadlines;
        lease.ask_at = renew_at;
        lease.answered = lease.asked.take();
        self.index(backend);
        Renewal::Extended
    }

    /// A renewal was refused.
    pub fn refused(&mut self, backend: &str, refusal: RenewRefusal) -> Option<Duty> {
        let lease = self.leases.get_mut(backend)?;
        let duty = match refusal {
            RenewRefusal::RenewalPrevented => {
                if lease.phase == Phase::Held {
                    lease.phase = Phase::WindingDown;
                }
                None
            }
            RenewRefusal::NotHolder | RenewRefusal::Unknown => {
                if lease.phase == Phase::Hard {
                    return None;
                }
                lease.phase = Phase::Hard;
                let reason = TerminationReason::KeyExpired;
                Some(Duty::HardTerminate { backend: backend.to_owned(), reason })
            }
        };
        self.index(backend);
        duty
    }

    /// An end was begun for another reason (asked for, drained): nothing is renewed any more; the deadlines stand.
    pub fn ending(&mut self, backend: &str) {
        if let Some(lease) = self.leases.get_mut(backend) {
            lease.phase = match lease.phase {
                // Nothing is left to say at `soft_terminate_at`; the hard deadline is.
                Phase::Held | Phase::WindingDown => Phase::Soft,
                other => other,
            };
            self.index(backend);
        }
    }

    /// Nothing of the backend is left.
    pub fn ended(&mut self, backend: &str) {
        self.leases.remove(backend);
        self.index(backend);
    }

    /// A new session: what was asked for and not answered is asked for again, now.
    pub fn ask_again(&mut self, now_ms: i64) {
        let unanswered: Vec<String> = self
            .leases
            .iter_mut()
            .filter(|(_, lease)| lease.phase == Phase::Held && lease.asked.is_some())
            .map(|(backend, lease)| {
                lease.ask_at = now_ms;
                backend.clone()
            })
            .collect();
        for backend in unanswered {
            self.index(&backend);
        }
    }

    /// What is due now. `jitter` is drawn once for each renewal and answers a factor from 0.5 to 1 for the time until it
    /// is repeated.
    pub fn due(&mut self, now_ms: i64, mut jitter: impl FnMut() -> f64) -> Vec<Duty> {
        let mut duties = Vec::new();
        if self.wakes.next().is_none_or(|at| at > now_ms) {
            return duties;
        }
        let horizon_ms = now_ms.saturating_add(RENEW_COALESCE_MS);
        let candidates: Vec<String> = self.wakes.until(horizon_ms).cloned().collect();
        for backend in candidates {
            let Some(lease) = self.leases.get_mut(&backend) else { continue };
            let reason = TerminationReason::KeyExpired;
            if now_ms >= lease.deadlines.hard_terminate_at && lease.phase != Phase::Hard {
                lease.phase = Phase::Hard;
                duties.push(Duty::HardTerminate { backend: backend.clone(), reason });
            } else if now_ms >= lease.deadlines.soft_terminate_at
                && matches!(lease.phase, Phase::Held | Phase::WindingDown)
            {
                lease.phase = Phase::Soft;
                duties.push(Duty::SoftTerminate { backend: backend.clone(), reason });
            } else if lease.phase == Phase::Held && lease.ask_at <= horizon_ms {
                let factor = jitter().clamp(0.5, 1.0);
                // At least a millisecond, so that a repeated look at the same moment ends.
                let wait_ms = ((lease.retry_ms() as f64 * factor) as i64).max(RENEW_COALESCE_MS + 1);
                lease.ask_at = now_ms.saturating_add(wait_ms);
                lease.asked = Some((lease.asked.map_or(now_ms, |(first, _)| first), now_ms));
                duties.push(Duty::RenewNow { backend: backend.clone(), token: lease.token });
            }
            self.index(&backend);
        }
        duties
    }

    /// When [`LeaseKeeper::due`] next has something to say.
    pub fn next_wake(&self) -> Option<i64> {
        self.wakes.next()
    }

    /// The deadlines that stand for a backend.
    pub fn deadlines(&self, backend: &str) -> Option<Deadlines> {
        self.leases.get(backend).map(|lease| lease.deadlines)
    }

    fn index(&mut self, backend: &str) {
        let at = self.leases.get(backend).and_then(Lease::next_wake);
        self.wakes.set(&backend.to_owned(), at);
    }
}

#[cfg(test)]
#[path = "lease_tests.rs"]
mod tests;
