//! State reports that no controller has acknowledged yet. Pure: the caller brings the time and sends.
//!
//! Invariants:
//!
//! 1. Reports are sent in the order in which they were made; a new session starts again with the oldest.
//! 2. A report is forgotten only when it was acknowledged (or its cluster has gone).
//! 3. At most [`IN_FLIGHT_MAX`] reports are in flight. The number that waits is bounded by the number of backends: each
//!    makes at most one report for each status.
//! 4. The work of a call grows with what it sends or forgets, not with what waits.

use crate::tables::{Schedule, Table};
use holdfast_wire::BackendState;
use holdfast_wire::drone::BackendEvent;
use std::collections::BTreeSet;

/// A report that is not acknowledged within this time is sent again, in milliseconds.
pub const RESEND_MS: i64 = 2_000;
/// Most reports that wait before new spawns are put off: eight statuses for each backend.
pub const WAITING_MAX: usize = 8 * crate::admission::BACKENDS_MAX;
/// Most reports sent and not acknowledged.
pub const IN_FLIGHT_MAX: usize = 512;

/// The reports that wait, and which of them are in flight.
#[derive(Debug, Default)]
pub struct Outbox {
    last_id: i64,
    waiting: Table<i64, BackendEvent>,
    /// Not sent in this session yet.
    unsent: BTreeSet<i64>,
    /// Sent in this session: when to send again.
    in_flight: Schedule<i64>,
    by_backend: Table<String, BTreeSet<i64>>,
}

impl Outbox {
    /// Empty; the first report gets number 1.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a report.
    pub fn push(&mut self, backend_id: &str, state: BackendState, timestamp: i64, token: Option<u64>) {
        self.last_id += 1;
        let event_id = self.last_id;
        let event = BackendEvent { event_id, backend_id: backend_id.to_owned(), state, timestamp, token };
        self.waiting.insert(event_id, event);
        self.unsent.insert(event_id);
        self.by_backend.entry(backend_id.to_owned()).or_default().insert(event_id);
    }

    /// Takes the report's number off the list and returns it.
    pub fn acknowledged(&mut self, event_id: i64) -> Option<BackendEvent> {
        let event = self.take(event_id)?;
        if let Some(of_backend) = self.by_backend.get_mut(&event.backend_id) {
            of_backend.remove(&event_id);
            if of_backend.is_empty() {
                self.by_backend.remove(&event.backend_id);
            }
        }
        Some(event)
    }

    fn take(&mut self, event_id: i64) -> Option<BackendEvent> {
        self.unsent.remove(&event_id);
        self.in_flight.set(&event_id, None);
        self.waiting.remove(&event_id)
    }

    /// Everything has to be sent again.
    pub fn session_lost(&mut self) {
        self.unsent.extend(self.in_flight.take_all());
    }

    /// Forgets all reports of a backend.
    pub fn forget(&mut self, backend_id: &str) {
        for event_id in self.by_backend.remove(backend_id).unwrap_or_default() {
            self.take(event_id);
        }
    }

    /// Whether a report of this backend waits.
    pub fn holds(&self, backend_id: &str) -> bool {
        self.by_backend.contains(backend_id)
    }

    /// Whether [`WAITING_MAX`] is reached.
    pub fn is_full(&self) -> bool {
        self.waiting.len() >= WAITING_MAX
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// What is due, oldest first; it counts as sent.
    pub fn flush(&mut self, now_ms: i64) -> Vec<BackendEvent> {
        let mut due: BTreeSet<i64> = std::iter::from_fn(|| self.in_flight.pop_due(now_ms)).collect();
        while self.in_flight.len() + due.len() < IN_FLIGHT_MAX
            && let Some(event_id) = self.unsent.pop_first()
        {
            due.insert(event_id);
        }
        for event_id in &due {
            self.in_flight.set(event_id, Some(now_ms.saturating_add(RESEND_MS)));
        }
        due.iter().filter_map(|event_id| self.waiting.get(event_id).cloned()).collect()
    }

    /// When [`Outbox::flush`] next has something to send: a moment that may have passed, or none.
    pub fn next_wake(&self) -> Option<i64> {
        if !self.unsent.is_empty() && self.in_flight.len() < IN_FLIGHT_MAX {
            return Some(i64::MIN);
        }
        self.in_flight.next()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flushed(outbox: &mut Outbox, now: i64) -> Vec<i64> {
        outbox.flush(now).iter().map(|event| event.event_id).collect()
    }

    fn three() -> Outbox {
        let mut outbox = Outbox::new();
        for state in [BackendState::Loading, BackendState::Starting] {
            outbox.push("ba-1", state, 0, Some(7));
        }
        outbox.push("ba-2", BackendState::Loading, 0, None);
        outbox
    }

    #[test]
    fn reports_are_sent_in_order_once_and_again_after_the_time_out() {
        let mut outbox = three();
        assert_eq!(flushed(&mut outbox, 0), [1, 2, 3]);
        assert_eq!(flushed(&mut outbox, RESEND_MS - 1), [0i64; 0]);
        assert_eq!(outbox.next_wake(), Some(RESEND_MS));
        assert_eq!(outbox.acknowledged(2).map(|e| e.event_id), Some(2));
        assert_eq!(outbox.acknowledged(2), None);
        assert_eq!(flushed(&mut outbox, RESEND_MS), [1, 3]);
    }

    #[test]
    fn a_new_session_gets_everything_again() {
        let mut outbox = three();
        flushed(&mut outbox, 0);
        outbox.acknowledged(1);
        outbox.session_lost();
        assert_eq!(flushed(&mut outbox, 1), [2, 3]);
    }

    #[test]
    fn no_more_reports_than_the_window_are_in_flight() {
        let mut outbox = Outbox::new();
        for _ in 0..IN_FLIGHT_MAX + 2 {
            outbox.push("ba", BackendState::Loading, 0, None);
        }
        assert_eq!(flushed(&mut outbox, 0).len(), IN_FLIGHT_MAX);
        outbox.acknowledged(1);
        assert_eq!(flushed(&mut outbox, 1), [IN_FLIGHT_MAX as i64 + 1]);
    }

    #[test]
    fn a_forgotten_backend_leaves_the_others() {
        let mut outbox = three();
        outbox.forget("ba-1");
        assert!(!outbox.holds("ba-1") && outbox.holds("ba-2"));
        assert_eq!(flushed(&mut outbox, 0), [3]);
    }
}
