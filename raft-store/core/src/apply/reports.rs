//! What drones report of their backends.

use super::step::{SPAWN_SUB, Step};
use crate::command::StateReport;
use crate::kv::{ReadState, StateError};
use crate::limits::REPORTS_PER_ENTRY_MAX;
use crate::outcome::{Outcome, Refusal, ReportOutcome};
use crate::records::{BackendRecord, VOIDED};
use holdfast_wire::BackendStatus;
use std::collections::BTreeMap;

impl<R: ReadState + ?Sized> Step<'_, '_, R> {
    pub(super) fn report_states(
        &mut self,
        drone_id: i32,
        reports: &[StateReport],
    ) -> Result<Outcome, StateError> {
        if reports.len() > REPORTS_PER_ENTRY_MAX {
            return Ok(Outcome::Refused(Refusal::Full("the number of reports in one entry".to_owned())));
        }
        // A backend that has just started reports several states at once: it is read and written once for all of them.
        let mut changed = BTreeMap::new();
        let outcomes = reports
            .iter()
            .map(|report| self.report_one(drone_id, report, &mut changed))
            .collect::<Result<_, _>>()?;
        for (id, mut backend) in changed {
            self.put_backend(id, &mut backend);
        }
        Ok(Outcome::Reported(outcomes))
    }

    fn report_one<'r>(
        &mut self,
        drone_id: i32,
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
        if backend.drone_id != drone_id || report.token.is_some_and(|token| token != backend.token) {
            return Ok(ReportOutcome::NotHolder);
        }
        let status = report.state.status();
        // Whatever it says, the drone has the spawn; and what is gone needs no more orders.
        self.delete_action(drone_id, (backend.token, SPAWN_SUB))?;
        if status == BackendStatus::Terminated
            && let Some(place) = backend.terminate_action
        {
            self.delete_action(drone_id, place)?;
        }
        if status <= backend.state().status() {
            return Ok(ReportOutcome::Old);
        }
        if status < BackendStatus::Terminating && backend.termination_asked == Some(VOIDED) {
            // The spawn had arrived before the drone's restart, and the backend was adopted.
            backend.termination_asked = None;
        }
        self.record_state(id, backend, report.state.clone())?;
        if status == BackendStatus::Terminated {
            let (namespace, name) = (&backend.key.namespace, &backend.key.name);
            if let Some(key) = self.view().key(namespace, name)?
                && key.backend_id == *id
                && key.token == backend.token
            {
                self.free_key(namespace, name, &key)?;
            }
        }
        if let Some(backend) = read {
            changed.insert(id, backend);
        }
        Ok(ReportOutcome::Recorded)
    }
}
