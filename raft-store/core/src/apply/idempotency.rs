//! Requests with an `Idempotency-Key` (invariant 8): the answer is recorded in the step that made it.

use super::step::Step;
use crate::codec::encode;
use crate::command::{Command, Idempotency};
use crate::kv::{ReadState, StateError, Table, keys};
use crate::limits::{IDEMPOTENCY_KEEP_MS, IDEMPOTENCY_RECORDS_MAX};
use crate::outcome::{Outcome, Refusal};
use crate::records::IdempotencyRecord;

/// What is known of a request.
pub(super) enum Recall {
    /// Done before; this was the answer.
    Replay(Box<Outcome>),
    /// Not to be done.
    Refuse(Refusal),
    /// Not seen yet.
    New,
    /// Not seen yet, and done without a record, for which there is no room: repeating it does no harm.
    Unrecorded,
}

impl<R: ReadState + ?Sized> Step<'_, '_, R> {
    pub(super) fn recall(&self, idempotency: &Idempotency, command: &Command) -> Result<Recall, StateError> {
        Ok(match self.view().idempotency(&idempotency.key)? {
            Some(record) if record.expires_at_ms > self.now_ms => {
                if record.body_digest == idempotency.body_digest {
                    Recall::Replay(Box::new(record.outcome))
                } else {
                    Recall::Refuse(Refusal::IdempotencyMismatch)
                }
            }
            // Past its time, not yet swept: its place is taken over.
            Some(_) => Recall::New,
            None if self.progress.idempotency_records >= IDEMPOTENCY_RECORDS_MAX => match command {
                Command::Acquire(_) => {
                    Recall::Refuse(Refusal::Full("the number of remembered Idempotency-Keys".to_owned()))
                }
                _ => Recall::Unrecorded,
            },
            None => Recall::New,
        })
    }

    /// Records the answer, unless the request may well be answered otherwise when it is repeated.
    pub(super) fn remember(
        &mut self,
        idempotency: &Idempotency,
        outcome: &Outcome,
    ) -> Result<(), StateError> {
        if matches!(outcome, Outcome::Refused(_) | Outcome::Leaving(_)) {
            return Ok(());
        }
        let name = idempotency.key.as_bytes();
        match self.view().idempotency(&idempotency.key)? {
            Some(old) => self.txn.delete(Table::IdempotencyExpiry, keys::timed(old.expires_at_ms, name)),
            None => self.progress.idempotency_records += 1,
        }
        let record = IdempotencyRecord {
            body_digest: idempotency.body_digest,
            expires_at_ms: self.now_ms.saturating_add(IDEMPOTENCY_KEEP_MS),
            index: self.at.index,
            outcome: outcome.clone(),
        };
        self.txn.put(Table::IdempotencyExpiry, keys::timed(record.expires_at_ms, name), Vec::new());
        self.txn.put(Table::Idempotency, name.to_vec(), encode(&record));
        Ok(())
    }
}
