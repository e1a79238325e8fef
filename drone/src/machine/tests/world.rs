//! A model of what is around the machine: the disk, the guards and a controller. It outlives the machine, which is crashed
//! and restarted on it. What the machine asks for happens later, in any order, fails, or is lost with a crash.
//!
//! The invariants of the module `machine` are checked where the machine's effects meet this world.

use super::*;
use crate::guard::{EndNow, Report};
use holdfast_wire::drone::{RenewKeysResponse, RenewRefusal, RenewedKey};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

/// What is durable of a backend.
#[derive(Debug, Default, Clone)]
pub(super) struct Dir {
    /// Its record; missing once its end is acknowledged.
    pub(super) record: Option<Record>,
    pub(super) damaged: bool,
    pub(super) note: Option<EndNote>,
    pub(super) outcome: Option<Vec<Report>>,
}

/// A guard, and with it its backend: they live and die together.
#[derive(Debug, Clone)]
pub(super) struct Guard {
    pub(super) soft_at: i64,
    pub(super) hard_at: i64,
    pub(super) end: Option<EndNow>,
    /// It does not greet, or read, for now.
    pub(super) stuck: bool,
    /// A drone is connected to it.
    pub(super) connected: bool,
    pub(super) reports: Vec<Report>,
    /// What the drone wants and has not arrived yet.
    pub(super) wanted: Option<Desired>,
}

/// Something that the machine asked for and that has not happened yet.
#[derive(Debug, Clone)]
pub(super) enum Io {
    Effect(Effect),
    /// The next observation of a backend; those of one backend come in order.
    Observation(String),
}

#[derive(Debug)]
pub(super) struct World {
    pub(super) now: i64,
    pub(super) disk: BTreeMap<String, Dir>,
    pub(super) guards: BTreeMap<String, Guard>,
    pub(super) machine: Machine,
    pub(super) io: Vec<Io>,
    pub(super) observations: BTreeMap<String, VecDeque<Observation>>,
    starts: u32,
    incarnation: String,
    boot: u32,
    session: Option<u64>,
    sessions: u64,
    /// Spawns by backend, as they were sent: the action's name and the time that their deadlines count from.
    pub(super) spawns: BTreeMap<String, (Action, String)>,
    /// Terminates by their action's name.
    terminates: HashMap<String, (String, TerminationKind)>,
    /// Terminates that were acknowledged.
    pub(super) ended: BTreeSet<String>,
    events: Vec<i64>,
    renewals: Vec<RenewItem>,
    renewals_at: i64,
    page_in_flight: bool,
    named: BTreeSet<String>,
    /// Backends that were started, ever.
    started: BTreeSet<String>,
    /// Backends that must never be started: something was said that is true only then.
    void: BTreeSet<String>,
    /// Backends whose end was acknowledged by the controller.
    pub(super) acknowledged: BTreeSet<String>,
    events_of: HashMap<i64, (String, bool)>,
    pub(super) harder: HashMap<String, TerminationKind>,
}

impl World {
    pub(super) fn new() -> Self {
        let incarnation = "in-1".to_owned();
        let (machine, _) = Machine::new(start(&incarnation, "boot-1", Vec::new()), START);
        Self {
            now: START,
            disk: BTreeMap::new(),
            guards: BTreeMap::new(),
            machine,
            io: Vec::new(),
            observations: BTreeMap::new(),
            starts: 1,
            incarnation,
            boot: 1,
            session: None,
            sessions: 0,
            spawns: BTreeMap::new(),
            terminates: HashMap::new(),
            ended: BTreeSet::new(),
            events: Vec::new(),
            renewals: Vec::new(),
            renewals_at: START,
            page_in_flight: false,
            named: BTreeSet::new(),
            started: BTreeSet::new(),
            void: BTreeSet::new(),
            acknowledged: BTreeSet::new(),
            events_of: HashMap::new(),
            harder: HashMap::new(),
        }
    }

    pub(super) fn boot_id(&self) -> String {
        format!("boot-{}", self.boot)
    }

    pub(super) fn runs(&self, backend: &str) -> bool {
        self.guards.contains_key(backend)
    }

    /// A step of the machine, after which everything is checked.
    pub(super) fn step(&mut self, input: Input) {
        let effects = self.machine.step(input, self.now);
        self.take(effects);
        self.machine.check();
    }

    fn take(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            self.check_effect(&effect);
            match effect {
                Effect::Send(message) => self.sent(*message),
                Effect::Want { backend, desired } => {
                    if let Some(guard) = self.guards.get_mut(&backend) {
                        guard.wanted = Some(desired);
                    }
                }
                Effect::Adopt { backend, .. } => {
                    let guard = self.guards.get_mut(&backend).expect("it has greeted");
                    guard.connected = true;
                    let replayed: Vec<_> = guard.reports.iter().filter_map(Observation::of).collect();
                    self.will_be_observed(&backend, replayed);
                }
                Effect::Release { .. } | Effect::WatchConnections { .. } => {}
                effect => self.io.push(Io::Effect(effect)),
            }
        }
    }

    fn check_effect(&mut self, effect: &Effect) {
        match effect {
            // Invariants 1 and 3.
            Effect::Start { spawn, .. } => {
                let id = &spawn.backend;
                assert!(!self.void.contains(id), "{id} is started after it was reported or acknowledged");
                assert!(self.started.insert(id.clone()), "{id} is started twice");
                assert!(self.disk.get(id).is_some_and(|dir| dir.record.is_some()), "{id} is not durable");
                assert!(self.now < spawn.deadlines.soft_terminate_at, "{id} is started too late");
                if let (Action::Spawn { incarnation: Some(incarnation), .. }, _) = &self.spawns[id] {
                    assert_eq!(*incarnation, self.incarnation, "{id} is of another incarnation");
                }
            }
            // Invariant 7.
            Effect::Want { backend, desired } => {
                let before = self.harder.get(backend).copied();
                assert!(desired.end >= before, "{backend}: an end is taken back");
                if let Some(kind) = desired.end {
                    self.harder.insert(backend.clone(), kind);
                }
            }
            _ => {}
        }
    }

    fn sent(&mut self, message: MessageFromDrone) {
        // Invariant 6.
        assert!(self.session.is_some(), "{message:?} without a session");
        match message {
            MessageFromDrone::AckAction { action_id } => self.action_acknowledged(action_id),
            MessageFromDrone::BackendEvent(event) => {
                let id = event.backend_id.clone();
                let over = event.state.status() == BackendStatus::Terminated;
                // Invariant 4.
                assert!(!(over && self.runs(&id)), "{id} is reported as terminated and runs");
                // Invariant 2.
                if !self.disk.contains_key(&id) {
                    assert!(over, "{id} is reported before it is durable");
                    self.void.insert(id.clone());
                }
                if over {
                    self.void.insert(id.clone());
                }
                self.events_of.insert(event.event_id, (id, over));
                self.events.push(event.event_id);
            }
            MessageFromDrone::RenewKeys(request) => {
                self.renewals_at = request.local_time;
                self.renewals = request.keys;
            }
            MessageFromDrone::Backends(page) => {
                self.named.extend(page.backends.into_iter().map(|listed| listed.backend));
                self.page_in_flight = true;
                if page.last {
                    self.check_list();
                }
            }
            _ => {}
        }
    }

    /// Invariant 5.
    fn check_list(&self) {
        for (id, dir) in &self.disk {
            let matters = dir.record.is_some() && !self.acknowledged.contains(id);
            assert!(!matters || self.named.contains(id), "{id} is on the disk and not listed");
        }
        for id in self.guards.keys() {
            assert!(self.named.contains(id), "{id} runs and is not listed");
        }
    }

    fn action_acknowledged(&mut self, action_id: String) {
        if let Some((id, kind)) = self.terminates.get(&action_id).cloned() {
            let noted =
                self.disk.get(&id).and_then(|dir| dir.note.as_ref()).is_some_and(|note| note.kind >= kind);
            assert!(noted || !self.runs(&id), "{id}: its end is acknowledged, not durable, and it runs");
            if !noted {
                // Then it must not be started either.
                self.void.insert(id.clone());
            }
            self.ended.insert(id);
        } else if let Some(id) = action_id.strip_prefix("spawn-")
            && !self.disk.contains_key(id)
        {
            self.void.insert(id.to_owned());
        }
    }

    // What happens in this world.

    pub(super) fn connect(&mut self, cluster: &str) {
        self.sessions += 1;
        self.session = Some(self.sessions);
        self.named.clear();
        self.page_in_flight = false;
        self.events.clear();
        self.renewals.clear();
        self.step(Input::Connected { session: self.sessions, handshake: handshake(cluster) });
    }

    pub(super) fn disconnect(&mut self) {
        if let Some(session) = self.session {
            self.step(Input::Lost { session });
            self.session = None;
        }
    }

    /// Something that was sent in a session that was replaced must do nothing.
    pub(super) fn stale(&mut self, backend: &str) {
        let Some(session) = self.session.filter(|session| *session > 1) else { return };
        self.step(Input::Tick);
        let before = self.io.len();
        self.step(action(session - 1, "stale", backend, terminate_action(TerminationKind::Hard)));
        self.step(Input::Lost { session: session - 1 });
        self.step(Input::Connected { session: session - 1, handshake: handshake("another cluster") });
        assert_eq!(self.io.len(), before, "a session that was replaced still counts");
    }

    /// Sends a spawn for the first time, or again as it was.
    pub(super) fn spawn(&mut self, backend: &str, key: &str, age_ms: i64, whose: u8) {
        let stale = format!("in-{}", self.starts - 1);
        let incarnation = match whose {
            0 => None,
            1 => Some(stale.as_str()),
            _ => Some(self.incarnation.as_str()),
        };
        let made = (spawn_action(key, 7, self.now - age_ms, incarnation), format!("spawn-{backend}"));
        let (spawn, action_id) = self.spawns.entry(backend.to_owned()).or_insert(made).clone();
        if let Some(session) = self.session {
            self.step(action(session, &action_id, backend, spawn));
        }
    }

    pub(super) fn terminate(&mut self, backend: &str, kind: TerminationKind) {
        // A controller ends only what it has made. It never makes a spawn after that; repeats may still be in flight.
        let Some(session) = self.session.filter(|_| self.spawns.contains_key(backend)) else { return };
        let action_id = format!("end-{backend}-{kind:?}");
        self.terminates.insert(action_id.clone(), (backend.to_owned(), kind));
        let watched = self.guards.get(backend).is_some_and(|guard| guard.connected);
        if let Some(guard) = self.guards.get_mut(backend) {
            guard.wanted = None;
        }
        let moving = !self.machine.takes_actions();
        self.step(action(session, &action_id, backend, terminate_action(kind)));
        // Invariant 7: delivered each time.
        if let Some(guard) = self.guards.get(backend).filter(|_| watched && !moving) {
            let told = guard.wanted.and_then(|desired| desired.end);
            assert!(told >= Some(kind), "{backend}: a terminate is not delivered: {told:?}");
        }
    }

    /// Lets the guard get what is wanted.
    pub(super) fn deliver(&mut self, backend: &str) {
        let Some(guard) = self.guards.get_mut(backend) else { return };
        if guard.stuck || !guard.connected {
            return;
        }
        let Some(desired) = guard.wanted.take() else { return };
        if guard.end.is_none() {
            guard.soft_at = guard.soft_at.max(desired.deadlines.soft_terminate_at);
            guard.hard_at = guard.hard_at.max(desired.deadlines.hard_terminate_at);
        }
        match desired.end {
            Some(TerminationKind::Hard) => {
                guard.end = Some(EndNow::Hard);
                self.dies(
                    backend,
                    vec![Report::Killing, Report::Exited { code: None, signal: Some(9) }],
                    true,
                );
            }
            Some(TerminationKind::Soft) if guard.end.is_none() => {
                guard.end = Some(EndNow::Soft { kill_boot_ms: desired.kill_at });
            }
            _ => {}
        }
    }

    /// The backend is gone. Its guard says so and leaves an outcome, or was killed and says nothing.
    pub(super) fn dies(&mut self, backend: &str, reports: Vec<Report>, outcome: bool) {
        let Some(mut guard) = self.guards.remove(backend) else { return };
        let connected = guard.connected;
        let mut observations: Vec<Observation> = Vec::new();
        if outcome {
            observations.extend(reports.iter().filter_map(Observation::of));
            guard.reports.extend(reports);
            guard.reports.push(Report::Gone);
            if let Some(dir) = self.disk.get_mut(backend) {
                dir.outcome = Some(guard.reports);
            }
        } else {
            observations.push(Observation::Failed);
        }
        observations.push(Observation::Gone);
        if connected {
            self.will_be_observed(backend, observations);
        }
    }

    pub(super) fn exits(&mut self, backend: &str) {
        self.dies(backend, vec![Report::Exited { code: Some(0), signal: None }], true);
    }

    pub(super) fn advance(&mut self, ms: i64) {
        let until = self.now + ms;
        while self.now < until {
            self.now = (self.now + 2_000).min(until);
            let now = self.now;
            let due = |guard: &Guard| {
                now >= guard.hard_at
                    || matches!(guard.end, Some(EndNow::Soft { kill_boot_ms }) if now >= kill_boot_ms)
            };
            let over: Vec<String> =
                self.guards.iter().filter(|(_, g)| due(g)).map(|(id, _)| id.clone()).collect();
            for backend in over {
                self.dies(&backend, vec![Report::Killing, Report::Exited { code: None, signal: None }], true);
            }
            self.step(Input::Tick);
        }
    }

    /// The controller answers all renewals of the last request.
    pub(super) fn answer_renewals(&mut self, grant: bool) {
        let (Some(session), keys) = (self.session, std::mem::take(&mut self.renewals)) else { return };
        let deadlines = LEASE.deadlines(self.renewals_at);
        let keys = keys
            .into_iter()
            .map(|item| RenewedKey {
                backend: item.backend,
                deadlines: grant.then_some(deadlines),
                refused: (!grant).then_some(RenewRefusal::NotHolder),
            })
            .collect();
        self.step(message(session, MessageToDrone::RenewKeysResponse(RenewKeysResponse { keys })));
    }

    pub(super) fn acknowledge_events(&mut self) {
        for event_id in std::mem::take(&mut self.events) {
            let Some(session) = self.session else { return };
            if let Some((id, true)) = self.events_of.get(&event_id).cloned() {
                self.acknowledged.insert(id);
            }
            self.step(message(session, MessageToDrone::AckEvent { event_id }));
        }
    }

    pub(super) fn acknowledge_page(&mut self) {
        if let Some(session) = self.session.filter(|_| std::mem::take(&mut self.page_in_flight)) {
            self.step(message(session, MessageToDrone::AckBackends {}));
        }
    }

    /// The drone's process ends at once, or by SIGHUP. What it had asked of the disk may still have happened; what it
    /// wanted of guards may have arrived or not.
    pub(super) fn restart(&mut self, finished: impl Fn(usize) -> bool, reboot: bool) {
        for (at, io) in std::mem::take(&mut self.io).into_iter().enumerate() {
            let on_disk = matches!(
                &io,
                Io::Effect(
                    Effect::Create(_) | Effect::NoteEnd { .. } | Effect::Forget { .. } | Effect::Start { .. }
                )
            );
            if on_disk && finished(at) {
                self.happens(io, true);
            }
        }
        let guards: Vec<String> = self.guards.keys().cloned().collect();
        for (at, backend) in guards.iter().enumerate() {
            if finished(at) {
                self.deliver(backend);
            }
            if let Some(guard) = self.guards.get_mut(backend) {
                (guard.connected, guard.wanted) = (false, None);
            }
        }
        self.io.clear();
        self.observations.clear();
        self.now += 1;
        if reboot {
            self.guards.clear();
            self.boot += 1;
        }
        self.session = None;
        self.events.clear();
        self.events_of.clear();
        self.harder.clear();
        self.starts += 1;
        self.incarnation = format!("in-{}", self.starts);
        let found = self.disk.keys().cloned().collect();
        let (machine, effects) = Machine::new(start(&self.incarnation, &self.boot_id(), found), self.now);
        self.machine = machine;
        self.take(effects);
        self.machine.check();
    }

    /// Everything works from now on, and whatever was asked for happens.
    pub(super) fn settle(&mut self) {
        self.connect("c-1");
        for _ in 0..60 {
            self.guards.values_mut().for_each(|guard| guard.stuck = false);
            for _ in 0..2_000 {
                if self.io.is_empty() {
                    break;
                }
                self.happen(0, true);
            }
            let guards: Vec<String> = self.guards.keys().cloned().collect();
            guards.iter().for_each(|backend| self.deliver(backend));
            self.acknowledge_page();
            self.answer_renewals(true);
            self.acknowledge_events();
            self.advance(4_000);
        }
    }
}

fn start(incarnation: &str, boot_id: &str, found: Vec<String>) -> Start {
    Start {
        clock: DroneClock::with_offset(0),
        incarnation: incarnation.into(),
        boot_id: boot_id.into(),
        cluster_id: Some("c-1".into()),
        found,
        seed: 1,
    }
}
