//! What drones report of their backends.
//!
//! A `terminated` report frees the key in the same step, with two exceptions. It must come from the data directory that the
//! backend was started from: a drone of the same name on another disk finds nothing of the backend and knows nothing of it.
//! And the spawn must have been sent once: of a drone of Plane's that got it twice, a second process may run.

use super::step::{SPAWN_SUB, Step};
use crate::command::{ReportStates, StateReport};
use crate::kv::{ReadState, StateError};
use crate::limits::REPORTS_PER_ENTRY_MAX;
use crate::outcome::{Outcome, Refusal, ReportOutcome};
use crate::records::{BackendRecord, Presence};
use holdfast_wire::BackendStatus;
use std::collections::BTreeMap;

impl<R: ReadState + ?Sized> Step<'_, '_, R> {
    pub(super) fn report_states(&mut self, report: &ReportStates) -> Result<Outcome, StateError> {
        if report.reports.len() > REPORTS_PER_ENTRY_MAX {
            return Ok(Outcome::Refused(Refusal::Full("the number of reports in one entry".to_owned())));
        }
        // A backend that has just started reports several states at once: it is read and written once for all of them.
        let mut changed = BTreeMap::new();
        let outcomes = report
            .reports
            .iter()
            .map(|one| self.report_one(report, one, &mut changed))
            .collect::<Result<_, _>>()?;
        for (id, mut backend) in changed {
            self.put_backend(id, &mut backend);
        }
        Ok(Outcome::Reported(outcomes))
    }

    fn report_one<'r>(
        &mut self,
        from: &ReportStates,
        report: &'r StateReport,
        changed: &mut BTreeMap<&'r str, BackendRecord>,
    ) -> Result<ReportOutcome, StateError> {
        let id = &report.backend_id;
        let before = changed.get_mut(id.as_str());
        let mut read = None;
        let backend = match before {
            Some(backend) => backend,
            None => match self.view().backend(id)? {
                Some(backend) => read.insert(backend),
                None => return Ok(ReportOutcome::Unknown),
            },
        };
        if backend.drone_id != from.drone_id
            || report.token.is_some_and(|token| token != backend.token)
            || backend.data_id != from.data_id
        {
            return Ok(ReportOutcome::NotHolder);
        }
        let status = report.state.status();
        let is_alive = status < BackendStatus::Terminated;
        // Whatever it says, the drone has the spawn; and what is gone needs no more orders.
        self.delete_action(from.drone_id, (backend.token, SPAWN_SUB))?;
        if !is_alive && let Some(place) = backend.terminate_action {
            self.delete_action(from.drone_id, place)?;
        }
        if is_alive && backend.state().status() == BackendStatus::Terminated {
            return Ok(ReportOutcome::Ended);
        }
        let appeared = is_alive && backend.presence == Presence::Doubtful;
        if appeared {
            backend.presence = Presence::Expected;
            self.backend_changed(id);
        }
        let is_news = status > backend.state().status();
        if is_news {
            self.record_state(id, backend, report.state.clone())?;
        }
        if is_news && !is_alive {
            self.release(id, backend)?;
        }
        let outcome = match backend.presence {
            Presence::Leaving if is_alive => ReportOutcome::Ended,
            _ if is_news => ReportOutcome::Recorded,
            _ => ReportOutcome::Old,
        };
        if (is_news || appeared)
            && let Some(backend) = read
        {
            changed.insert(id, backend);
        }
        Ok(outcome)
    }

    /// Frees the key of a backend of which nothing is left.
    fn release(&mut self, id: &str, backend: &mut BackendRecord) -> Result<(), StateError> {
        if backend.spawn_repeated {
            // The key goes with its expiry.
            backend.presence = Presence::Leaving;
            return Ok(());
        }
        self.file_terminated(id, backend);
        let (namespace, name) = (&backend.key.namespace, &backend.key.name);
        if let Some(key) = self.view().key(namespace, name)?
            && key.backend_id == *id
            && key.token == backend.token
        {
            self.free_key(namespace, name, &key)?;
        }
        Ok(())
    }
}
