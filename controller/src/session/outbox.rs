//! What a session has to say to its drone, in order, until the writer takes it.
//!
//! ```text
//!   session ──push──▶ [ waiting ] ──flush──▶ (channel) ──▶ writer ═══▶ drone
//! ```
//!
//! One entry can bring thousands of answers at once, far more than the channel holds; that says nothing about the drone.
//! So they wait here. Only a drone that takes nothing for a while, or the bound, ends the session. The bound is never
//! reached by a session that begins nothing new while it [is busy](Outbox::is_busy).

use super::End;
use super::actions::ACTIONS_AT_ONCE_MAX;
use super::run::RENEWALS_UNDER_WAY_MAX;
use axum::extract::ws::Message;
use holdfast_core::limits::{RENEWALS_PER_ENTRY_MAX, REPORTS_PER_ENTRY_MAX};
use std::collections::VecDeque;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Most messages that wait for the channel.
const WAITING_MAX: usize = 24 * 1024;
/// With so many waiting nothing is begun that brings more.
const BUSY_MESSAGES: usize = 1024;
/// With so many bytes waiting nothing is begun that brings more.
const BUSY_BYTES: usize = 8 * 1024 * 1024;
/// A drone that takes nothing for so long, while something waits for it, is gone.
pub const STALLED_MAX: Duration = Duration::from_secs(5);

// What can come although nothing new is begun: the answers of all entries under way, and the actions of one turn, new and
// sent again.
const _: () = assert!(
    BUSY_MESSAGES
        + RENEWALS_UNDER_WAY_MAX * RENEWALS_PER_ENTRY_MAX
        + REPORTS_PER_ENTRY_MAX
        + 2 * ACTIONS_AT_ONCE_MAX
        < WAITING_MAX
);

/// The payload of a frame.
pub fn bytes_of(message: &Message) -> usize {
    match message {
        Message::Text(text) => text.len(),
        Message::Binary(bytes) | Message::Ping(bytes) | Message::Pong(bytes) => bytes.len(),
        Message::Close(_) => 0,
    }
}

/// See the module.
#[derive(Debug)]
pub struct Outbox {
    out: mpsc::Sender<Message>,
    waiting: VecDeque<Message>,
    waiting_bytes: usize,
    /// When the writer last took something, or when something began to wait.
    moved: Instant,
}

impl Outbox {
    /// Before the writer's channel.
    pub fn new(out: mpsc::Sender<Message>) -> Self {
        Self { out, waiting: VecDeque::new(), waiting_bytes: 0, moved: Instant::now() }
    }

    /// Adds a message. The error is that too many wait already.
    pub fn push(&mut self, message: Message, now: Instant) -> Result<(), End> {
        if self.waiting.len() >= WAITING_MAX {
            tracing::warn!(waiting = self.waiting.len(), "the drone takes less than it asks for");
            return Err(End::Gone);
        }
        if self.waiting.is_empty() {
            self.moved = now;
        }
        self.waiting_bytes += bytes_of(&message);
        self.waiting.push_back(message);
        Ok(())
    }

    /// Hands on what the channel has room for now. The error is that the writer has ended, and so the connection.
    pub fn flush(&mut self, now: Instant) -> Result<(), End> {
        while !self.waiting.is_empty() {
            let permit = match self.out.try_reserve() {
                Ok(permit) => permit,
                Err(mpsc::error::TrySendError::Full(())) => break,
                Err(mpsc::error::TrySendError::Closed(())) => return Err(End::Gone),
            };
            if let Some(message) = self.waiting.pop_front() {
                self.waiting_bytes -= bytes_of(&message);
                permit.send(message);
                self.moved = now;
            }
        }
        Ok(())
    }

    /// Waits until the channel has room, for [`Self::flush`]. The error is as there.
    pub async fn room(&self) -> Result<(), End> {
        self.out.reserve().await.map(drop).map_err(|_| End::Gone)
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether so much waits that nothing should be begun that brings more.
    pub fn is_busy(&self) -> bool {
        self.waiting.len() >= BUSY_MESSAGES || self.waiting_bytes >= BUSY_BYTES
    }

    /// Whether something has waited for [`STALLED_MAX`] while the writer took nothing.
    pub fn is_stalled(&self, now: Instant) -> bool {
        !self.is_empty() && now.saturating_duration_since(self.moved) > STALLED_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(at: usize) -> Message {
        Message::Text(at.to_string().into())
    }

    #[tokio::test]
    async fn the_largest_answers_wait_in_order_while_the_drone_takes_them() {
        let (out, mut queue) = mpsc::channel(8);
        let mut outbox = Outbox::new(out);
        let now = Instant::now();
        let count = RENEWALS_UNDER_WAY_MAX * RENEWALS_PER_ENTRY_MAX + REPORTS_PER_ENTRY_MAX;
        for at in 0..count {
            outbox.push(text(at), now).unwrap();
        }
        assert!(outbox.is_busy());
        for at in 0..count {
            outbox.room().await.unwrap();
            outbox.flush(now).unwrap();
            assert_eq!(queue.recv().await, Some(text(at)));
        }
        outbox.flush(now).unwrap();
        assert!(outbox.is_empty() && !outbox.is_busy() && outbox.waiting_bytes == 0);
    }

    #[test]
    fn only_the_bound_a_standstill_and_the_writers_end_are_the_end() {
        let (out, mut queue) = mpsc::channel(1);
        let mut outbox = Outbox::new(out);
        let start = Instant::now();
        for at in 0..WAITING_MAX {
            outbox.push(text(at), start).unwrap();
        }
        assert_eq!(outbox.push(text(0), start), Err(End::Gone));
        outbox.flush(start).unwrap();
        outbox.flush(start).unwrap();
        assert!(!outbox.is_stalled(start + STALLED_MAX));
        assert!(outbox.is_stalled(start + STALLED_MAX + Duration::from_millis(1)));
        // Slow, but not standing still.
        assert!(queue.try_recv().is_ok());
        outbox.flush(start + STALLED_MAX).unwrap();
        assert!(!outbox.is_stalled(start + 2 * STALLED_MAX));
        drop(queue);
        assert_eq!(outbox.flush(start), Err(End::Gone));
    }

    #[test]
    fn an_outbox_that_was_empty_for_long_is_not_stalled() {
        let (out, _queue) = mpsc::channel(1);
        let mut outbox = Outbox::new(out);
        let later = Instant::now() + 10 * STALLED_MAX;
        assert!(!outbox.is_stalled(later));
        outbox.push(text(1), later).unwrap();
        assert!(!outbox.is_stalled(later + STALLED_MAX));
    }

    #[test]
    fn a_few_large_messages_make_it_busy_too() {
        let (out, _queue) = mpsc::channel(1);
        let mut outbox = Outbox::new(out);
        outbox.push(Message::Text("x".repeat(BUSY_BYTES).into()), Instant::now()).unwrap();
        assert!(outbox.is_busy());
    }
}
