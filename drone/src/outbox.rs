//! State reports that no controller has acknowledged yet. Pure: the caller brings the time and sends.
//!
//! Invariants:
//!
//! 1. Reports are sent in the order in which they were made; a new session starts again with the oldest.
//! 2. A report is forgotten only when its acknowledgement has come (or its cluster has gone).
//! 3. At most [`IN_FLIGHT_MAX`] reports are on the way at once. What waits is bounded by the number of backends: each
//!    makes at most one report for each status.

use holdfast_wire::BackendState;
use holdfast_wire::drone::BackendEvent;
use std::collections::VecDeque;

/// A report that is not acknowledged within this time is sent again, in milliseconds.
pub const RESEND_MS: i64 = 2_000;
/// Most reports that wait before new spawns are put off: eight statuses for each backend.
pub const WAITING_MAX: usize = 8 * crate::admission::BACKENDS_MAX;
/// Most reports sent and not acknowledged.
pub const IN_FLIGHT_MAX: usize = 512;

#[derive(Debug)]
struct Waiting {
    event: BackendEvent,
    sent_at: Option<i64>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Outbox {
    last_id: i64,
    waiting: VecDeque<Waiting>,
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
        self.waiting.push_back(Waiting { event, sent_at: None });
    }

    /// Takes the report's number off the list and returns it.
    pub fn acknowledged(&mut self, event_id: i64) -> Option<BackendEvent> {
        // Numbers are in order; acknowledgements mostly too.
        let at = self.waiting.binary_search_by_key(&event_id, |w| w.event.event_id).ok()?;
        self.waiting.remove(at).map(|w| w.event)
    }

    /// Everything has to be sent again.
    pub fn session_lost(&mut self) {
        for waiting in &mut self.waiting {
            waiting.sent_at = None;
        }
    }

    /// Forgets all reports of a backend.
    pub fn forget(&mut self, backend_id: &str) {
        self.waiting.retain(|w| w.event.backend_id != backend_id);
    }

    /// Whether a report of this backend waits.
    pub fn holds(&self, backend_id: &str) -> bool {
        self.waiting.iter().any(|w| w.event.backend_id == backend_id)
    }

    /// Whether [`WAITING_MAX`] is reached.
    pub fn is_full(&self) -> bool {
        self.waiting.len() >= WAITING_MAX
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Hands what is due to `send`, oldest first, until that answers false (no room).
    pub fn flush(&mut self, now_ms: i64, mut send: impl FnMut(&BackendEvent) -> bool) {
        for waiting in self.waiting.iter_mut().take(IN_FLIGHT_MAX) {
            if waiting.sent_at.is_some_and(|at| now_ms < at.saturating_add(RESEND_MS)) {
                continue;
            }
            if !send(&waiting.event) {
                return;
            }
            waiting.sent_at = Some(now_ms);
        }
    }

    /// When [`Outbox::flush`] next has something to send: a moment that may have passed, or none.
    pub fn next_wake(&self) -> Option<i64> {
        let due = |w: &Waiting| w.sent_at.map_or(i64::MIN, |at| at.saturating_add(RESEND_MS));
        self.waiting.iter().take(IN_FLIGHT_MAX).map(due).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flushed(outbox: &mut Outbox, now: i64) -> Vec<i64> {
        let mut sent = Vec::new();
        outbox.flush(now, |event| {
            sent.push(event.event_id);
            true
        });
        sent
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
    fn without_room_the_rest_waits_in_order() {
        let mut outbox = three();
        let mut room = 1;
        outbox.flush(0, |_| {
            room -= 1;
            room >= 0
        });
        assert_eq!(flushed(&mut outbox, 1), [2, 3]);
    }

    #[test]
    fn no_more_than_the_window_is_on_the_way() {
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
