//! The world around the state machine, and the model of what it must hold.

use crate::common::{Replica, acquire, form, key, plain, spawn};
use crate::drone::{SimBackend, SimDrone};
use crate::ops::{Faults, Message, Op, Stats};
use holdfast_core::clock::ClusterClock;
use holdfast_core::command::{Command, Proposal, RenewKey, Sweep};
use holdfast_core::outcome::{Outcome, Refusal};
use holdfast_core::records::PendingAction;
use holdfast_wire::{BackendStatus, LeaseConfig, TerminationKind, TerminationReason};
use std::collections::{BTreeMap, BTreeSet};

/// As tight as the rule of the timeline allows: 52 s · 1.05/0.95 + 2 s ≤ 60 s.
pub const LEASE: LeaseConfig =
    LeaseConfig { renew_ms: 30_000, soft_terminate_ms: 40_000, hard_terminate_ms: 52_000, expiry_ms: 60_000 };
const RECORDS_KEEP_MS: u64 = 3_600_000;

/// A held key, as it must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelKey {
    pub backend_id: String,
    pub drone: usize,
    pub tag: String,
    pub token: u64,
    pub expires_at_ms: u64,
    pub allow_renew: bool,
    /// Real time of the acquisition or last renewal, ms.
    pub extended_real_ms: u64,
}

/// See the module.
pub struct Sim {
    pub replica: Replica,
    pub real_ms: u64,
    /// The machines where the drones run.
    pub drones: Vec<SimDrone>,
    /// Machines that a drone has left.
    pub others: Vec<SimDrone>,
    /// Processes and data directories so far.
    runs: u64,
    /// Sessions of drones of Plane's and the spawns that were sent on them.
    sent_once: BTreeSet<(u64, u64)>,
    pub model: BTreeMap<usize, ModelKey>,
    /// Tokens that held a key and no longer do.
    pub gone: BTreeMap<usize, BTreeSet<u64>>,
    pub stats: Stats,
    faults: Faults,
    clock: ClusterClock,
    term: u64,
    leader_rate_permille: u64,
    leader_boot_ms: u64,
    leaderless_ms: u64,
    pub network: Vec<Message>,
    next_backend: u64,
}

pub fn key_name(key: usize) -> String {
    format!("k{key}")
}

impl Sim {
    pub fn new(drones: usize, faults: Faults) -> Self {
        let rate = |i: usize| faults.drone_rate_permille.unwrap_or([950, 1000, 1050][i % 3]);
        let mut sim = Self {
            replica: Replica::default(),
            real_ms: 0,
            drones: (0..drones).map(|i| SimDrone::new(i as i32 + 1, rate(i), i + 1 == drones)).collect(),
            others: Vec::new(),
            runs: 1,
            sent_once: BTreeSet::new(),
            model: BTreeMap::new(),
            gone: BTreeMap::new(),
            stats: Stats::default(),
            faults,
            clock: ClusterClock::new(),
            term: 1,
            leader_rate_permille: faults.leader_rate_permille.unwrap_or(1050),
            leader_boot_ms: 77_000,
            leaderless_ms: 0,
            network: Vec::new(),
            next_backend: 0,
        };
        sim.propose(form(LEASE, RECORDS_KEEP_MS));
        for drone in 0..drones {
            sim.connect_drone(drone);
        }
        // Registration, list, and what follows from it.
        for _ in 0..3 {
            for message in std::mem::take(&mut sim.network) {
                sim.deliver(message).unwrap();
            }
        }
        sim
    }

    /// The machine that has this session and whose drone lives.
    pub fn machine(&mut self, drone: usize, session: u64) -> Option<&mut SimDrone> {
        let id = self.drones[drone].id;
        let mut all = self.drones.iter_mut().chain(&mut self.others);
        all.find(|machine| machine.id == id && machine.session == session && machine.alive)
    }

    fn next_run(&mut self) -> u64 {
        self.runs += 1;
        self.runs
    }

    /// The drone runs on `machine` from now on.
    fn run_on(&mut self, drone: usize, mut machine: SimDrone, wall_ms: i64) {
        machine.restart(self.next_run(), wall_ms);
        let left = std::mem::replace(&mut self.drones[drone], machine);
        self.others.push(left);
        self.connect_drone(drone);
        self.report_again(drone);
    }

    fn other_machine(&mut self, drone: usize, wall_ms: i64) {
        let it = &self.drones[drone];
        let machine = match self.others.iter().position(|other| other.id == it.id && other.disk.is_some()) {
            Some(at) => self.others.swap_remove(at),
            None => {
                let disk = Some(self.runs + 1);
                SimDrone { backends: BTreeMap::new(), disk, address: self.runs + 1, ..it.clone() }
            }
        };
        self.run_on(drone, machine, wall_ms);
    }

    fn move_disk(&mut self, drone: usize, wall_ms: i64) {
        let disk = Some(self.runs + 1);
        let mut moved = SimDrone { disk, address: self.runs + 1, ..self.drones[drone].clone() };
        // Nothing runs there. Its journal says what it said.
        moved.backends.values_mut().for_each(|backend| backend.running = false);
        let it = &mut self.drones[drone];
        (it.disk, it.alive) = (None, false);
        self.run_on(drone, moved, wall_ms);
    }

    fn second_sending(&mut self, key: usize) -> Result<(), String> {
        let drone = self.drones.len() - 1;
        let heartbeat = self.drones[drone].heartbeat(self.real_ms);
        self.propose(Command::Heartbeats(vec![heartbeat]));
        self.connect(key, 0, [drone, drone])?;
        self.receive_actions(drone)?;
        let is_of_it = |message: &Message| match message {
            Message::Ack { drone: of, .. } | Message::Report { drone: of, .. } => *of == drone,
            _ => false,
        };
        self.network.retain(|message| !is_of_it(message));
        for backend in self.drones[drone].backends.values_mut().filter(|backend| backend.running) {
            backend.running = false;
            backend.status = BackendStatus::Terminated;
        }
        self.drones[drone].session = self.next_run();
        self.connect_drone(drone);
        if let Some(register) = self.network.pop() {
            self.deliver(register)?;
        }
        // On their way from here on.
        self.report_again(drone);
        self.receive_actions(drone)
    }

    /// Everything that is due for a drone is sent and arrives.
    fn receive_actions(&mut self, drone: usize) -> Result<(), String> {
        self.read_actions(drone);
        let is_action =
            |message: &Message| matches!(message, Message::Action { drone: of, .. } if *of == drone);
        let (actions, others): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.network).into_iter().partition(is_action);
        self.network = others;
        actions.into_iter().try_for_each(|action| self.deliver(action))
    }

    pub fn propose(&mut self, command: Command) -> Outcome {
        let logged_ms = self.replica.progress().cluster_time_ms;
        let boot_ms = self.leader_boot_ms + self.real_ms * self.leader_rate_permille / 1000;
        let stamp = self.clock.stamp(self.term, boot_ms, logged_ms, Some(self.leaderless_ms));
        let proposal: Proposal = plain(command);
        self.replica.apply(self.term, stamp, &proposal).0.outcome
    }

    pub fn now_ms(&self) -> u64 {
        self.replica.progress().cluster_time_ms
    }

    /// What the leader's clock says now, applied or not.
    pub fn leader_now_ms(&self) -> u64 {
        let boot_ms = self.leader_boot_ms + self.real_ms * self.leader_rate_permille / 1000;
        self.clock.now_ms(self.term, boot_ms).unwrap_or(0).max(self.now_ms())
    }

    pub fn step(&mut self, op: &Op) -> Result<(), String> {
        match op {
            Op::Connect { key, tag, first, second } => return self.connect(*key, *tag, [*first, *second]),
            Op::Heartbeat(drone) => self.send_heartbeat(*drone),
            Op::Renew(drone) => self.send_renewals(*drone),
            Op::ReadActions(drone) => self.read_actions(*drone),
            Op::Deliver(index) if !self.network.is_empty() => {
                let message = self.network.remove(index.index(self.network.len()));
                return self.deliver(message);
            }
            Op::Repeat(index) if !self.network.is_empty() => {
                let message = self.network[index.index(self.network.len())].clone();
                // Within a session the transport repeats nothing, and a drone of Plane's does not look for repeats.
                if !matches!(message, Message::Action { drone, .. } if self.drones[drone].planes) {
                    return self.deliver(message);
                }
            }
            Op::Lose(index) if !self.network.is_empty() => {
                self.network.remove(index.index(self.network.len()));
            }
            Op::Deliver(_) | Op::Repeat(_) | Op::Lose(_) => {}
            Op::Settle => return self.settle(),
            Op::Advance(ms) => self.advance(*ms),
            Op::AdvanceToExpiry { key, offset_ms } => {
                if let Some(held) = self.model.get(key) {
                    let ahead_ms = held.expires_at_ms.saturating_sub(self.leader_now_ms());
                    let real_ms =
                        (ahead_ms * 1000 / self.leader_rate_permille).saturating_add_signed(*offset_ms);
                    self.advance(real_ms);
                }
            }
            Op::Restart { drone, wall_ms } => {
                // A drone of Plane's has no guard: its process lives.
                if self.drones[*drone].planes {
                    return Ok(());
                }
                let run = self.next_run();
                self.drones[*drone].restart(run, *wall_ms);
                self.connect_drone(*drone);
                self.report_again(*drone);
            }
            Op::OtherMachine { drone, wall_ms } if !self.drones[*drone].planes => {
                self.other_machine(*drone, *wall_ms);
            }
            Op::MoveDisk { drone, wall_ms } if !self.drones[*drone].planes => {
                self.move_disk(*drone, *wall_ms)
            }
            Op::OtherMachine { .. } | Op::MoveDisk { .. } => {}
            Op::OldMachineSpeaks(drone) => {
                let id = self.drones[*drone].id;
                let old = self.others.iter().filter(|other| other.id == id && other.alive).cloned();
                for machine in old.collect::<Vec<_>>() {
                    self.renewals_of(*drone, &machine);
                    self.reports_of(*drone, &machine);
                }
            }
            Op::SecondSending { key } => return self.second_sending(*key),
            Op::Crash(drone) if self.drones[*drone].planes => {}
            Op::Crash(drone) => self.drones[*drone].alive = false,
            Op::Reconnect { drone, moved } if self.drones[*drone].alive => {
                self.drones[*drone].session = self.next_run();
                self.drones[*drone].address += u64::from(*moved);
                self.connect_drone(*drone);
            }
            Op::Reconnect { .. } => {}
            Op::ReportAgain(drone) if self.drones[*drone].alive => self.report_again(*drone),
            Op::ReportAgain(_) => {}
            Op::BackendExits(drone) => {
                if let Some(backend) = self.drones[*drone].backends.values_mut().find(|b| b.running) {
                    backend.running = false;
                    backend.status = BackendStatus::Terminated;
                }
            }
            Op::Terminate { key, hard } => {
                if let Some(held) = self.model.get(key) {
                    let backend_id = held.backend_id.clone();
                    let kind = if *hard { TerminationKind::Hard } else { TerminationKind::Soft };
                    self.propose(Command::Terminate {
                        backend_id,
                        kind,
                        reason: TerminationReason::External,
                    });
                }
            }
            Op::AllowRenew { key, allow } => {
                let (namespace, name) = (String::new(), key_name(*key));
                let outcome = self.propose(Command::SetAllowRenew { namespace, name, allow: *allow });
                if let (Outcome::Updated(_), Some(held)) = (outcome, self.model.get_mut(key)) {
                    held.allow_renew = *allow;
                }
            }
            Op::EndDue => return self.end_due(),
            Op::Drain { drone, deadline_ms, undo } => {
                self.propose(Command::Drain {
                    cluster: "c".to_owned(),
                    drone: self.drones[*drone].name.clone(),
                    draining: !*undo,
                    deadline_in_ms: *deadline_ms,
                });
            }
            Op::ProposeSweep => {
                let keys = self.replica.view().expired_candidates(self.leader_now_ms(), 10).unwrap();
                self.network.push(Message::Sweep(Sweep { keys, records: true }));
            }
            Op::Revoke(key) => {
                self.propose(Command::RevokeKey { namespace: String::new(), name: key_name(*key) });
            }
            Op::LeaderChange { outage_ms, rate_permille, boot_ms } => {
                self.advance(*outage_ms);
                self.term += 1;
                self.leader_rate_permille = self.faults.leader_rate_permille.unwrap_or(*rate_permille);
                self.leader_boot_ms = *boot_ms;
                self.leaderless_ms = *outage_ms;
                self.replica.blank(self.term);
            }
        }
        Ok(())
    }

    /// Nothing is asked to end before its limit or its drone's deadline, and of what has a limit nothing is left out.
    fn end_due(&mut self) -> Result<(), String> {
        let asked = |sim: &Self| -> BTreeSet<String> {
            let (backends, _) = sim.replica.view().backends("", None, 10_000).unwrap();
            let asked = backends.into_iter().filter(|(_, backend)| backend.termination_asked.is_some());
            asked.map(|(id, _)| id).collect()
        };
        let before = asked(self);
        self.propose(Command::EndDue);
        let now_ms = self.now_ms();
        let view = self.replica.view();
        for id in asked(self).difference(&before) {
            let backend = view.backend(id).unwrap().unwrap();
            let drained_at_ms = view.drone(backend.drone_id).unwrap().unwrap().drain_deadline_ms;
            let over = [backend.lifetime_ends_at_ms, drained_at_ms].into_iter().flatten().min();
            if over.is_none_or(|at_ms| at_ms > now_ms) {
                return Err(format!("{id} was ended at {now_ms}, before its time: {backend:?}"));
            }
            self.stats.ended_by_time += 1;
        }
        if view.has_ends_due(now_ms).unwrap() {
            return Err(format!("something is still due at {now_ms}"));
        }
        Ok(())
    }

    fn advance(&mut self, ms: u64) {
        self.real_ms += ms;
        if self.faults.ignore_deadlines {
            return;
        }
        for drone in self.drones.iter_mut().chain(&mut self.others) {
            self.stats.killed_at_deadline += drone.end_overdue(self.real_ms, LEASE.kill_ms()) as u64;
        }
    }

    fn connect(&mut self, at: usize, tag: u8, candidates: [usize; 2]) -> Result<(), String> {
        let tag = if tag == 0 { String::new() } else { "other".to_owned() };
        let backend_id = format!("b{}", self.next_backend);
        self.next_backend += 1;
        let ids = candidates.map(|drone| self.drones[drone].id);
        let mut spawn = spawn(&backend_id, &ids);
        // One of the keys.
        spawn.lifetime_limit_seconds = (at == 0).then_some(45);
        let outcome = self.propose(acquire(key(&key_name(at), &tag), Some(spawn)));
        let now_ms = self.now_ms();
        let held = self.model.get(&at).cloned();
        let live = held.as_ref().filter(|held| held.expires_at_ms > now_ms);
        match (outcome, live) {
            (Outcome::Refused(Refusal::TagMismatch { held }), Some(live))
                if live.tag == held && held != tag =>
            {
                self.stats.tag_mismatch += 1;
            }
            (Outcome::Found(holder), Some(live))
                if live.tag == tag && live.backend_id == holder.backend_id =>
            {
                self.stats.found += 1;
            }
            (Outcome::Leaving(holder), Some(live))
                if live.tag == tag && live.backend_id == holder.backend_id =>
            {
                self.stats.leaving += 1;
            }
            (Outcome::Refused(Refusal::NoDrone), None) => self.stats.no_drone += 1,
            (Outcome::Acquired(holder), None) => {
                self.stats.acquired += 1;
                if let Some(expired) = held {
                    self.stats.taken_over += 1;
                    self.forget(at, &expired)?;
                }
                let drone = (0..self.drones.len())
                    .find(|drone| self.drones[*drone].name == holder.drone)
                    .ok_or("a drone that does not exist was chosen")?;
                let taken = ModelKey {
                    backend_id,
                    drone,
                    tag,
                    token: self.replica.index,
                    expires_at_ms: now_ms + LEASE.expiry_ms,
                    allow_renew: true,
                    extended_real_ms: self.real_ms,
                };
                self.model.insert(at, taken);
            }
            (outcome, live) => {
                return Err(format!("invariant 3: {outcome:?} while the model has {live:?}"));
            }
        }
        Ok(())
    }

    /// A key ended by its expiry: real time must agree, within the tolerance of the leaders' clocks.
    pub fn forget(&mut self, at: usize, held: &ModelKey) -> Result<(), String> {
        self.gone.entry(at).or_default().insert(held.token);
        let lasted_ms = self.real_ms - held.extended_real_ms;
        if held.expires_at_ms > self.now_ms() || lasted_ms * 105 / 100 + 5 < LEASE.expiry_ms {
            return Err(format!("invariant 3: {held:?} was ended after {lasted_ms} ms at {}", self.now_ms()));
        }
        Ok(())
    }

    fn connect_drone(&mut self, drone: usize) {
        let it = &self.drones[drone];
        let (incarnation, data_id) = (it.incarnation_name(), it.data_id());
        let (session, address) = (it.session, it.address);
        self.network.push(Message::Register { drone, session, incarnation, data_id, address });
    }

    fn send_heartbeat(&mut self, drone: usize) {
        if self.drones[drone].alive {
            self.network.push(Message::Heartbeat(self.drones[drone].heartbeat(self.real_ms)));
        }
    }

    fn send_renewals(&mut self, drone: usize) {
        if self.drones[drone].alive {
            let it = self.drones[drone].clone();
            self.renewals_of(drone, &it);
        }
    }

    fn renewals_of(&mut self, drone: usize, it: &SimDrone) {
        let token = |backend: &SimBackend| (!it.planes).then_some(backend.token);
        let keys = it
            .backends
            .iter()
            .map(|(id, backend)| RenewKey { backend_id: id.clone(), token: token(backend) })
            .collect();
        let (session, local_time_ms) = (it.session, it.local_ms(self.real_ms));
        self.network.push(Message::Renew { drone, session, local_time_ms, keys });
    }

    fn report_again(&mut self, drone: usize) {
        let it = self.drones[drone].clone();
        self.reports_of(drone, &it);
    }

    fn reports_of(&mut self, drone: usize, it: &SimDrone) {
        for (id, backend) in &it.backends {
            self.network.push(Message::Report {
                drone,
                session: it.session,
                data_id: it.data_id(),
                backend_id: id.clone(),
                status: backend.status,
                token: backend.token,
            });
        }
    }

    /// The controller that has the drone's session sends what is due. It serves the session only while it is the
    /// drone's current one.
    fn read_actions(&mut self, drone: usize) {
        let it = &self.drones[drone];
        let view = self.replica.view();
        let current = view.drone(it.id).unwrap().is_some_and(|record| record.session == it.session_name());
        if !it.alive || !current {
            return;
        }
        let session = it.session;
        for action in view.due_actions(it.id, &it.session_name(), None, self.leader_now_ms(), 100).unwrap() {
            // A session sends a drone of Plane's each spawn once.
            let is_spawn = matches!(action.record.action, PendingAction::Spawn { .. });
            if it.planes && is_spawn && !self.sent_once.insert((session, action.index)) {
                continue;
            }
            self.network.push(Message::Action { drone, session, action: Box::new(action) });
        }
    }

    fn settle(&mut self) -> Result<(), String> {
        for drone in 0..self.drones.len() {
            self.send_heartbeat(drone);
            self.send_renewals(drone);
            if self.drones[drone].alive {
                self.report_again(drone);
            }
        }
        for _ in 0..4 {
            for message in std::mem::take(&mut self.network) {
                self.deliver(message)?;
            }
            for drone in 0..self.drones.len() {
                self.read_actions(drone);
            }
        }
        for message in std::mem::take(&mut self.network) {
            self.deliver(message)?;
        }
        Ok(())
    }
}
