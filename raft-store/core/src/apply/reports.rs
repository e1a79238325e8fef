//! What drones report of their backends.

use super::step::{SPAWN_SUB, Step};
use crate::command::StateReport;
use crate::kv::{ReadState, StateError};
use crate::limits::REPORTS_PER_ENTRY_MAX;
use crate::outcome::{Outcome, Refusal, ReportOutcome};
use crate::records::VOIDED;
use holdfast_wire::BackendStatus;

impl<R: ReadState + ?Sized> Step<'_, '_, R> {
    pub(super) fn report_states(
        &mut self,
        drone_id: i32,
        reports: &[StateReport],
    ) -> Result<Outcome, StateError> {
        if reports.len() > REPORTS_PER_ENTRY_MAX {
            return Ok(Outcome::Refused(Refusal::Full("the number of reports in one entry".to_owned())));
        }
        let outcomes =
            reports.iter().map(|report| self.report_one(drone_id, report)).collect::<Result<_, _>>()?;
        Ok(Outcome::Reported(outcomes))
    }

    fn report_one(&mut self, drone_id: i32, report: &StateReport) -> Result<ReportOutcome, StateError> {
        let id = &report.backend_id;
        let Some(mut backend) = self.view().backend(id)? else { return Ok(ReportOutcome::Unknown) };
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
        self.record_state(id, &mut backend, report.state.clone())?;
        if status == BackendStatus::Terminated {
            let (namespace, name) = (&backend.key.namespace, &backend.key.name);
            if let Some(key) = self.view().key(namespace, name)?
                && key.backend_id == *id
                && key.token == backend.token
            {
                self.free_key(namespace, name, &key)?;
            }
        }
        self.put_backend(id, &backend);
        Ok(ReportOutcome::Recorded)
    }
}
