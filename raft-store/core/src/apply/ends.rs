//! Backends that end because their time is over: their lifetime, the time they may be idle, their drone's drain. They are
//! found through time indexes in bounded batches, as of the entry's own cluster time, and how far a batch came is in the
//! state; so it goes on through leader changes and restarts.

use super::step::{Step, damaged};
use super::sweep::name_of;
use crate::codec::{decode, decode_first};
use crate::command::ActivityReport;
use crate::kv::{ReadState, StateError, Table, keys};
use crate::limits::{
    ACTIVITIES_PER_ENTRY_MAX, DRAIN_LOOKS_PER_ENTRY_MAX, DRAINS_PER_ENTRY_MAX, ENDS_PER_ENTRY_MAX,
    IDLE_SLACK_MS,
};
use crate::outcome::{Outcome, Refusal};
use crate::records::{ActivityRecord, BackendHead, BackendRecord, DroneRecord};
use holdfast_wire::{BackendStatus, TerminationKind, TerminationReason};
use std::collections::BTreeSet;

/// How these backends end. Their drones kill what does not end by itself.
const KIND: TerminationKind = TerminationKind::Soft;
const REASON: TerminationReason = TerminationReason::Swept;

impl<R: ReadState + ?Sized> Step<'_, '_, R> {
    pub(super) fn end_due(&mut self) -> Result<Outcome, StateError> {
        let until = keys::timed(self.now_ms.saturating_add(1), &[]);
        for (entry, _) in self.txn.scan(Table::BackendEnds, &[], Some(&until), ENDS_PER_ENTRY_MAX)? {
            let id = name_of(Table::BackendEnds, &entry)?;
            let mut backend = self.known_backend(&id)?;
            let lifetime_over = backend.lifetime_ends_at_ms.is_some_and(|at_ms| at_ms <= self.now_ms);
            // Its entry goes either way: it has no end of its own any more.
            if lifetime_over || self.is_watched(&backend)? {
                self.ask_end(&id, backend, KIND, REASON)?;
            } else {
                backend.activity = None;
                self.put_backend(&id, &mut backend);
            }
        }
        self.end_drained(&until)?;
        Ok(Outcome::Done)
    }

    /// Whether the process that runs as its drone now is the one that said what is known of its connections. A drone's
    /// successor says it anew, or does not look at connections and may have some.
    fn is_watched(&self, backend: &BackendRecord) -> Result<bool, StateError> {
        let drone = self.known_drone(backend.drone_id)?;
        Ok(backend.activity.as_ref().is_some_and(|activity| activity.incarnation == drone.incarnation))
    }

    /// Goes on with the pass over all backends that ends those of drained drones. Drains that are equally far share it: a
    /// rack of drones with one deadline is one pass.
    fn end_drained(&mut self, until: &[u8]) -> Result<(), StateError> {
        let mut due = self.txn.scan(Table::DrainEnds, &[], Some(until), DRAINS_PER_ENTRY_MAX)?;
        let Some((_, cursor)) = due.first().cloned() else { return Ok(()) };
        due.retain(|(_, its_cursor)| *its_cursor == cursor);
        let mut drones = BTreeSet::new();
        for (entry, _) in &due {
            let drone_id = keys::split_timed(entry)
                .and_then(|(_, drone)| keys::split_drone(drone))
                .ok_or_else(|| damaged("an entry of drain_ends"))?;
            if self.known_drone(drone_id)?.backend_count > 0 {
                drones.insert(drone_id);
            }
        }
        let mut start = cursor;
        if !start.is_empty() {
            start.push(0);
        }
        let rows = match drones.is_empty() {
            true => Vec::new(),
            false => self.txn.scan(Table::Backends, &start, None, DRAIN_LOOKS_PER_ENTRY_MAX)?,
        };
        let reached =
            rows.last().filter(|_| rows.len() == DRAIN_LOOKS_PER_ENTRY_MAX).map(|(id, _)| id.clone());
        for (id, bytes) in rows {
            let (head, _) = decode_first::<BackendHead>(&bytes)?;
            if drones.contains(&head.drone_id) {
                let id = String::from_utf8(id).map_err(|_| damaged("a backend id is not UTF-8"))?;
                self.ask_end(&id, decode(&bytes)?, KIND, REASON)?;
            }
        }
        for (entry, _) in due {
            match &reached {
                Some(reached) => self.txn.put(Table::DrainEnds, entry, reached.clone()),
                None => self.txn.delete(Table::DrainEnds, entry),
            }
        }
        Ok(())
    }

    pub(super) fn activity(
        &mut self,
        drone_id: i32,
        session: &str,
        number: u64,
        items: &[ActivityReport],
    ) -> Result<Outcome, StateError> {
        if items.len() > ACTIVITIES_PER_ENTRY_MAX {
            let what = "the number of activity reports in one entry".to_owned();
            return Ok(Outcome::Refused(Refusal::Full(what)));
        }
        // One of an older session may have been overtaken by the drone's reports on the newer one.
        let Some(drone) = self.view().drone(drone_id)?.filter(|drone| drone.session == session) else {
            return Ok(Outcome::Done);
        };
        for item in items {
            let Some(mut backend) = self.view().backend(&item.backend_id)? else { continue };
            let holds = backend.drone_id == drone_id && item.token.is_none_or(|token| token == backend.token);
            if holds
                && backend.max_idle_seconds.is_some()
                && backend.state().status() < BackendStatus::Terminating
                && let Some(activity) = self.newer_activity(&backend, &drone, number, item)
            {
                backend.activity = Some(activity);
                self.put_backend(&item.backend_id, &mut backend);
            }
        }
        Ok(Outcome::Done)
    }

    /// What becomes of a backend's activity record; `None` if the report says nothing new.
    fn newer_activity(
        &self,
        backend: &BackendRecord,
        drone: &DroneRecord,
        number: u64,
        item: &ActivityReport,
    ) -> Option<ActivityRecord> {
        let known = backend.activity.as_ref();
        if known.is_some_and(|known| known.session == drone.session && known.number >= number) {
            return None;
        }
        // Nor does the word of an earlier process count any more: this one says the same with its own name.
        let known = known.filter(|known| known.incarnation == drone.incarnation);
        // No backend is idle before it is ready.
        let is_ready = |status| status == BackendStatus::Ready;
        let ready_at_ms = backend.history.iter().find(|(_, state)| is_ready(state.status()));
        let earliest_ms = ready_at_ms.map_or(self.now_ms, |(at_ms, _)| *at_ms);
        let idle_since_ms = item.idle_ms.map(|ms| self.now_ms.saturating_sub(ms).max(earliest_ms));
        let is_news = match (known.map(|known| known.idle_since_ms), idle_since_ms) {
            (Some(Some(before_ms)), Some(since_ms)) => since_ms > before_ms.saturating_add(IDLE_SLACK_MS),
            (Some(before), since) => before != since,
            (None, _) => true,
        };
        is_news.then(|| ActivityRecord {
            incarnation: drone.incarnation.clone(),
            session: drone.session.clone(),
            number,
            idle_since_ms,
        })
    }
}
