//! What becomes of a message that arrives, at the controllers and at the drones.

use crate::common::{list, register_from, report_from, state_of};
use crate::drone::Spawned;
use crate::ops::Message;
use crate::sim::{LEASE, Sim};
use holdfast_core::command::{Command, FromDrone, Renew, RenewKey};
use holdfast_core::listing::Differences;
use holdfast_core::outcome::{Outcome, RenewOutcome, ReportOutcome};
use holdfast_core::records::{PendingAction, Presence};
use holdfast_core::view::DueAction;
use holdfast_wire::{BackendStatus, TerminationKind};

impl Sim {
    pub fn deliver(&mut self, message: Message) -> Result<(), String> {
        match message {
            Message::Heartbeat(item) => {
                self.propose(Command::Heartbeats(vec![item]));
            }
            Message::Renew { drone, session, local_time_ms, keys } => {
                return self.renew(drone, session, local_time_ms, keys);
            }
            Message::Report { drone, session, data_id, backend_id, status, token } => {
                self.report(drone, session, data_id.as_deref(), &backend_id, status, token);
            }
            Message::Ack { drone, action_id } => {
                let drone_id = self.drones[drone].id;
                self.propose(Command::AckActions { drone_id, action_ids: vec![action_id] });
            }
            Message::Register { drone, session, incarnation, data_id, address } => {
                let name = self.drones[drone].name.clone();
                let pending = self.spawns_sent_to(drone);
                let session_name = format!("{name}-s{session}");
                self.propose(register_from(
                    &name,
                    &incarnation,
                    &session_name,
                    true,
                    data_id.as_deref(),
                    &format!("10.0.0.{address}"),
                ));
                self.stats.sent_again += u64::from(pending > 0 && self.spawns_sent_to(drone) > 0);
                if let Some(machine) = self.machine(drone, session).filter(|machine| !machine.planes) {
                    let backends = machine.list();
                    self.network.push(Message::List { drone, session, backends });
                }
            }
            Message::List { drone, session, backends } => {
                let view = self.replica.view();
                let id = self.drones[drone].id;
                let name = format!("{}-s{session}", self.drones[drone].name);
                if view.drone(id).unwrap().is_some_and(|record| record.session == name) {
                    let differences = list(&view, id, &backends);
                    self.network.push(Message::Listed { drone, session, differences });
                }
            }
            Message::Listed { drone, session, differences } => self.listed(drone, session, differences),
            Message::End { drone, session, backend_id } => {
                let real_ms = self.real_ms;
                if let Some(machine) = self.machine(drone, session)
                    && let Some((key, token)) =
                        machine.backends.get(&backend_id).map(|backend| (backend.key, backend.token))
                {
                    machine.terminate(real_ms, &backend_id, key, token, TerminationKind::Hard);
                }
            }
            Message::Sweep(sweep) => {
                self.propose(Command::Sweep(sweep));
            }
            Message::Action { drone, session, action } => {
                return self.receive(drone, session, &action);
            }
            Message::Renewed { drone, session, local_time_ms, backend_ids } => {
                if let Some(machine) = self.machine(drone, session) {
                    for id in backend_ids {
                        machine.renewed(&id, LEASE, local_time_ms);
                    }
                }
            }
        }
        Ok(())
    }

    fn renew(
        &mut self,
        drone: usize,
        session: u64,
        local_time_ms: i64,
        keys: Vec<RenewKey>,
    ) -> Result<(), String> {
        let drone_id = self.drones[drone].id;
        let outcome = self.propose(Command::Renew(Renew { drone_id, keys: keys.clone() }));
        let Outcome::Renewed(outcomes) = outcome else { return Err(format!("renewal: {outcome:?}")) };
        let now_ms = self.now_ms();
        let mut granted = Vec::new();
        for (item, outcome) in keys.into_iter().zip(outcomes) {
            let held = self.model.values_mut().find(|held| {
                held.backend_id == item.backend_id
                    && held.drone == drone
                    && item.token.is_none_or(|token| token == held.token)
                    && held.expires_at_ms > now_ms
            });
            let presence = self.replica.view().backend(&item.backend_id).unwrap().map(|b| b.presence);
            let held = held.filter(|_| presence != Some(Presence::Leaving));
            match (outcome, held) {
                (RenewOutcome::Renewed, Some(held)) if held.allow_renew => {
                    self.stats.renewed += 1;
                    held.expires_at_ms = held.expires_at_ms.max(now_ms + LEASE.expiry_ms);
                    held.extended_real_ms = self.real_ms;
                    granted.push(item.backend_id);
                }
                (RenewOutcome::Prevented, Some(held)) if !held.allow_renew => {}
                (RenewOutcome::NotHolder | RenewOutcome::Unknown, None) => self.stats.renewals_refused += 1,
                (outcome, held) => {
                    return Err(format!("invariant 4: {item:?} was {outcome:?} with {held:?}"));
                }
            }
        }
        self.network.push(Message::Renewed { drone, session, local_time_ms, backend_ids: granted });
        Ok(())
    }

    /// Spawns of a drone that its present session may be sent.
    fn spawns_sent_to(&self, drone: usize) -> usize {
        let view = self.replica.view();
        let id = self.drones[drone].id;
        let Some(record) = view.drone(id).unwrap() else { return 0 };
        let due = view.due_actions(id, &record.session, None, self.now_ms(), 100).unwrap();
        due.iter().filter(|due| matches!(due.record.action, PendingAction::Spawn { .. })).count()
    }

    fn report(
        &mut self,
        drone: usize,
        session: u64,
        data_id: Option<&str>,
        backend_id: &str,
        status: BackendStatus,
        token: u64,
    ) {
        let before = self.replica.view().backend(backend_id).unwrap();
        let command = report_from(self.drones[drone].id, data_id, backend_id, state_of(status), Some(token));
        let Outcome::Reported(outcomes) = self.propose(command) else { return };
        let ended = status == BackendStatus::Terminated;
        if !ended && outcomes.iter().any(|outcome| outcome.must_end()) {
            self.stats.ended_as_reported += 1;
            self.network.push(Message::End { drone, session, backend_id: backend_id.to_owned() });
        }
        let held = self.model.iter().find(|(_, held)| held.backend_id == backend_id);
        let (Some((&at, held)), Some(before), true) = (held, before, ended) else { return };
        if before.data_id.as_deref() != data_id {
            self.stats.foreign_ends += 1;
        } else if before.spawn_repeated {
            self.stats.kept_for_second += u64::from(outcomes == [ReportOutcome::Recorded]);
        } else {
            self.stats.released += 1;
            self.gone.entry(at).or_default().insert(held.token);
            self.model.remove(&at);
        }
    }

    /// The entries of a list are applied, and what holds no key is told to end.
    fn listed(&mut self, drone: usize, session: u64, differences: Differences) {
        let id = self.drones[drone].id;
        let leaving = |sim: &Self| {
            let (backends, _) = sim.replica.view().backends("", None, 10_000).unwrap();
            backends.iter().filter(|(_, backend)| backend.presence == Presence::Leaving).count() as u64
        };
        let (leaving_before, listed_before) = (leaving(self), self.is_listed(id));
        let ending: usize = differences.entries.iter().map(|entry| entry.ending.len()).sum();
        for entry in differences.entries {
            self.propose(Command::Together(vec![FromDrone::Listed(entry)]));
        }
        if !listed_before && self.is_listed(id) {
            self.stats.listed += 1;
            self.stats.asked_again += ending as u64;
            self.stats.leaving_by_list += leaving(self) - leaving_before;
            self.stats.sent_again += u64::from(self.spawns_sent_to(drone) > 0);
            self.stats.ended_as_listed += differences.not_held.len() as u64;
            for backend_id in differences.not_held {
                self.network.push(Message::End { drone, session, backend_id });
            }
        }
    }

    fn is_listed(&self, id: i32) -> bool {
        self.replica.view().drone(id).unwrap().is_some_and(|drone| drone.is_listed)
    }

    fn receive(&mut self, drone: usize, session: u64, due: &DueAction) -> Result<(), String> {
        let id = &due.record.backend_id;
        let key: usize = due.backend.key.name[1..].parse().map_err(|_| "a key that nobody asked for")?;
        let real_ms = self.real_ms;
        let Some(machine) = self.machine(drone, session) else { return Ok(()) };
        let mut spawned = None;
        match &due.record.action {
            PendingAction::Spawn { lease, token, .. } => {
                let from_ms = due.lease_from_ms.ok_or("a spawn without its time")?;
                spawned = Some(machine.spawn(real_ms, id, key, *token, *lease, from_ms));
            }
            PendingAction::Terminate { kind, .. } => {
                machine.terminate(real_ms, id, key, due.backend.token, *kind);
            }
        }
        let said = machine.backends.get(id).map(|backend| (backend.status, backend.token));
        let data_id = machine.data_id();
        self.network.push(Message::Ack { drone, action_id: due.action_id.clone() });
        if let Some((status, token)) = said {
            let backend_id = id.clone();
            self.network.push(Message::Report { drone, session, data_id, backend_id, status, token });
        }
        match spawned {
            Some(Spawned::Started | Spawned::StartedAgain) => {
                self.stats.started += 1;
                self.stats.started_again += u64::from(spawned == Some(Spawned::StartedAgain));
                if self.gone.get(&key).is_some_and(|gone| !gone.is_empty()) {
                    self.stats.successors += 1;
                }
            }
            Some(Spawned::Late) => self.stats.late_spawns += 1,
            Some(Spawned::Known) | None => {}
        }
        Ok(())
    }
}
