//! Backends that end because their time is over: their lifetime, the time they may be idle, their drone's drain.
//!
//! Lifetimes and drains are found through time indexes in bounded batches, as of the entry's own cluster time, and how far a
//! batch came is in the state; so it continues through leader changes and restarts.
//!
//! Only an activity notice ends a backend as idle: one that says, after a new look at its connections, that it has been
//! without one for long enough. So a drone that is cut off, cannot look or has another process since ends nothing. The
//! answer to a notice says when the limit is due, and the drone looks and says it again then. Notices of an incarnation
//! are numbered, so one that was overtaken on its way counts no more.

use super::step::{Step, damaged};
use super::sweep::name_of;
use crate::command::ActivityReport;
use crate::kv::{ReadState, StateError, Table, keys};
use crate::limits::{
    ACTIVITIES_PER_ENTRY_MAX, DRAIN_ENDS_PER_ENTRY_MAX, DRAINS_PER_ENTRY_MAX, ENDS_PER_ENTRY_MAX,
};
use crate::outcome::{Outcome, Refusal};
use crate::records::ActivityRecord;
use holdfast_wire::{BackendStatus, TerminationKind, TerminationReason};

/// How these backends end. Their drones kill what does not end by itself.
const KIND: TerminationKind = TerminationKind::Soft;
const REASON: TerminationReason = TerminationReason::Swept;

impl<R: ReadState + ?Sized> Step<'_, '_, R> {
    pub(super) fn end_due(&mut self) -> Result<Outcome, StateError> {
        let until = keys::timed(self.now_ms.saturating_add(1), &[]);
        for (entry, _) in self.txn.scan(Table::BackendEnds, &[], Some(&until), ENDS_PER_ENTRY_MAX)? {
            let id = name_of(Table::BackendEnds, &entry)?;
            let backend = self.known_backend(&id)?;
            // Its entry goes: it has no end of its own any more.
            self.ask_end(&id, backend, KIND, REASON)?;
        }
        self.end_drained(&until)?;
        Ok(Outcome::Done)
    }

    /// Continues with the passes over the backends of drained drones.
    fn end_drained(&mut self, until: &[u8]) -> Result<(), StateError> {
        let mut room = DRAIN_ENDS_PER_ENTRY_MAX;
        for (entry, cursor) in self.txn.scan(Table::DrainEnds, &[], Some(until), DRAINS_PER_ENTRY_MAX)? {
            let drone_id = keys::split_timed(&entry)
                .and_then(|(_, drone)| keys::split_drone(drone))
                .ok_or_else(|| damaged("an entry of drain_ends"))?;
            let after = String::from_utf8(cursor).map_err(|_| damaged("the cursor of a drain"))?;
            let after = Some(after.as_str()).filter(|after| !after.is_empty());
            let backends = self.view().drone_backends(drone_id, after, room)?;
            for (id, _) in &backends {
                let backend = self.known_backend(id)?;
                self.ask_end(id, backend, KIND, REASON)?;
            }
            match backends.last().filter(|_| backends.len() == room) {
                Some((reached, _)) => {
                    self.txn.put(Table::DrainEnds, entry, reached.clone().into_bytes());
                    return Ok(());
                }
                None => self.txn.delete(Table::DrainEnds, entry),
            }
            room -= backends.len();
        }
        Ok(())
    }

    pub(super) fn activity(
        &mut self,
        drone_id: i32,
        incarnation: &str,
        activity_id: i64,
        items: &[ActivityReport],
    ) -> Result<Outcome, StateError> {
        if items.len() > ACTIVITIES_PER_ENTRY_MAX {
            let what = "the number of activity reports in one entry".to_owned();
            return Ok(Outcome::Refused(Refusal::Full(what)));
        }
        let mut idle = Vec::new();
        if self.view().drone(drone_id)?.is_none_or(|drone| drone.incarnation != incarnation) {
            return Ok(Outcome::Idle(idle));
        }
        for item in items {
            if let Some(due_in_ms) = self.activity_of_one(drone_id, incarnation, activity_id, item)? {
                idle.push((item.backend_id.clone(), due_in_ms));
            }
        }
        Ok(Outcome::Idle(idle))
    }

    /// Records a notice about one backend, and ends it if it has been idle for long enough. Otherwise says after how many
    /// milliseconds it will have been.
    fn activity_of_one(
        &mut self,
        drone_id: i32,
        incarnation: &str,
        activity_id: i64,
        item: &ActivityReport,
    ) -> Result<Option<u64>, StateError> {
        let Some(mut backend) = self.view().backend(&item.backend_id)? else { return Ok(None) };
        let Some(max_idle_seconds) = backend.max_idle_seconds else { return Ok(None) };
        let known = backend.activity.as_ref().filter(|known| known.incarnation == incarnation);
        if backend.drone_id != drone_id
            || item.token.is_some_and(|token| token != backend.token)
            || backend.is_ending()
            || known.is_some_and(|known| known.activity_id >= activity_id)
        {
            return Ok(None);
        }
        // No backend is idle before it is ready.
        let ready_at_ms = backend.history.iter().find(|(_, state)| state.status() == BackendStatus::Ready);
        let earliest_ms = ready_at_ms.map_or(self.now_ms, |(at_ms, _)| *at_ms);
        let idle_since_ms = item.idle_ms.map(|ms| self.now_ms.saturating_sub(ms).max(earliest_ms));
        backend.activity =
            Some(ActivityRecord { incarnation: incarnation.to_owned(), activity_id, idle_since_ms });
        self.put_backend(&item.backend_id, &mut backend);
        let limit_ms = u64::from(max_idle_seconds) * 1000;
        let Some(since_ms) = idle_since_ms else { return Ok(None) };
        let due_in_ms = since_ms.saturating_add(limit_ms).saturating_sub(self.now_ms);
        if due_in_ms == 0 {
            self.ask_end(&item.backend_id, backend, KIND, REASON)?;
            return Ok(None);
        }
        Ok(Some(due_in_ms))
    }
}
