//! Spawns: which are taken, and how one becomes durable before anything of it is said or started.

use super::{ACTIONS_PER_BACKEND_MAX, Backend, CreateFailure, Effect, End, Machine, Phase, Spawn};
use crate::admission::{BACKENDS_MAX, TimeBase, Verdict};
use crate::backend_state::{Desired, Lifecycle, Observation};
use holdfast_wire::drone::AcquiredKey;
use holdfast_wire::http::Executable;
use holdfast_wire::names::check_name;
use holdfast_wire::{BackendState, BackendStatus, TerminationReason};
use std::net::SocketAddr;
use tracing::{debug, info, warn};

/// Most backends that are known at once: those that may run, and those whose end is not acknowledged yet. Beyond it spawns
/// wait.
pub(super) const KNOWN_MAX: usize = 2 * BACKENDS_MAX;

/// What a controller asks to start.
pub(super) struct Request {
    pub(super) executable: serde_json::Value,
    pub(super) key: AcquiredKey,
    pub(super) static_token: Option<String>,
    pub(super) incarnation: Option<String>,
}

impl Machine {
    pub(super) fn spawn(&mut self, action_id: String, id: &str, request: Request, now: i64) {
        let Request { executable, key, static_token, incarnation } = request;
        let base = match incarnation {
            Some(incarnation) if incarnation == self.incarnation => TimeBase::Ours,
            Some(incarnation) => {
                debug!(backend = id, incarnation, "a spawn for another incarnation is void here");
                return;
            }
            None => TimeBase::Unnamed,
        };
        if let Some(backend) = self.backends.get_mut(id) {
            match backend.phase {
                // Acknowledged once it is durable.
                Phase::Preparing(_) => {
                    if backend.spawn_acks.len() < ACTIONS_PER_BACKEND_MAX
                        && !backend.spawn_acks.contains(&action_id)
                    {
                        backend.spawn_acks.push(action_id);
                    }
                }
                // Whether it is of this spawn is not known, or never will be.
                Phase::Unread | Phase::Elsewhere => {}
                Phase::Ending if backend.lifecycle.is_none() => {}
                _ => self.acknowledge(action_id),
            }
            return;
        }
        let key_name = (key.key.namespace.clone(), key.key.name.clone());
        if self.delaying.contains(&key_name) {
            debug!(backend = id, "waits for an earlier backend of its key");
            return;
        }
        if self.backends.len() >= KNOWN_MAX {
            warn!(backend = id, "not taken: the ends of too many backends are not acknowledged");
            return;
        }
        let refused = match self.admission.judge(id, key.deadlines, base, self.lease, now) {
            Verdict::Start => None,
            Verdict::Repeated => return self.acknowledge(action_id),
            Verdict::NotOurTime => {
                warn!(
                    backend = id,
                    "not started and not reported: its deadlines are not of this process's time; its key expires"
                );
                return self.acknowledge(action_id);
            }
            Verdict::Full => {
                warn!(backend = id, "not taken: this drone has {BACKENDS_MAX} backends");
                return;
            }
            Verdict::TooLate => {
                Some((TerminationReason::KeyExpired, "its soft deadline has passed".to_owned()))
            }
            Verdict::Ended(reason) => Some((reason, "its end was asked for before it came".to_owned())),
        };
        let parsed = check_name("backend_id", id).and_then(|()| Executable::parse(&executable));
        let (executable, refused) = match (parsed, refused, self.stopping) {
            (_, Some(refused), _) => (None, Some(refused)),
            (_, None, Some(_)) => {
                (None, Some((TerminationReason::Swept, "this drone is stopping".to_owned())))
            }
            (Err(e), None, None) => (None, Some((TerminationReason::InternalError, e.to_string()))),
            (Ok(executable), None, None) => (Some(executable), None),
        };
        if let Some((reason, problem)) = refused {
            warn!(backend = id, "not started: {problem}");
            self.acknowledge(action_id);
            self.refuse(id, key.token, reason, now);
            return;
        }
        let Some(executable) = executable else { return };
        let spawn = Box::new(Spawn {
            backend: id.to_owned(),
            executable,
            key: key.key,
            token: key.token,
            static_token,
            deadlines: key.deadlines,
        });
        let mut backend = Backend::new(Phase::Preparing(spawn.clone()), true);
        backend.token = Some(spawn.token);
        backend.spawn_acks.push(action_id);
        self.backends.insert(id.to_owned(), backend);
        self.alive += 1;
        self.effects.push(Effect::Create(spawn));
    }

    /// Reports a spawn that will never be started. Its id is remembered, or it is too late for any process to start it.
    fn refuse(&mut self, id: &str, token: u64, reason: TerminationReason, now: i64) {
        let state = BackendState::Terminated {
            last_status: BackendStatus::Scheduled,
            termination: None,
            reason: Some(reason),
            exit_code: None,
        };
        let mut backend = Backend::new(Phase::Over, false);
        backend.token = Some(token);
        backend.latest = Some(state.clone());
        self.backends.insert(id.to_owned(), backend);
        self.outbox.push(id, state, now, Some(token));
    }

    /// A backend is durable, or not.
    pub(super) fn created(&mut self, id: &str, result: Result<SocketAddr, CreateFailure>, now: i64) {
        let Some(backend) = self.backends.get_mut(id) else { return };
        let Phase::Preparing(spawn) = &backend.phase else { return };
        let spawn = spawn.clone();
        let end = backend.end.take();
        let acks = std::mem::take(&mut backend.spawn_acks);
        let (address, failure) = match result {
            Ok(address) => (Some(address), None),
            Err(CreateFailure::Failed(problem)) => (None, Some(problem)),
            Err(CreateFailure::Exists) => {
                warn!(backend = id, "not started: it was taken on before, since its directory exists");
                // As one that is known and over: nothing is reported, since that was or will not be known here.
                let ends = std::mem::take(&mut backend.end_acks).into_iter().map(|(action_id, _)| action_id);
                for action_id in acks.into_iter().chain(ends) {
                    self.acknowledge(action_id);
                }
                self.backends.remove(id);
                self.admission.finished(id);
                self.alive -= 1;
                self.move_on(now);
                return;
            }
        };
        // It is durable, or will never be started; either can be acknowledged, and reported from now on.
        backend.address = address;
        let somewhere = address.unwrap_or_else(|| SocketAddr::from(([0, 0, 0, 0], 0)));
        let mut lifecycle = Lifecycle::new(somewhere);
        let mut changes = lifecycle.begin();
        let late = now >= spawn.deadlines.soft_terminate_at;
        if let Some(problem) = &failure {
            warn!(backend = id, "not started: it cannot be made durable: {problem}");
            lifecycle.learn(Observation::Failed);
        } else if late && end.is_none() {
            warn!(backend = id, "not started: its soft deadline passed before it was durable");
            lifecycle.learn(Observation::StartedTooLate);
        }
        if let Some(End { kind, reason, .. }) = end {
            changes.states.extend(lifecycle.end(kind, reason).states);
        }
        let starts = failure.is_none() && !late && end.is_none();
        if !starts {
            changes.states.extend(lifecycle.learn(Observation::Gone).states);
        }
        if failure.is_some() {
            // What is not durable was never there.
            changes.states.retain(|state| state.status() == BackendStatus::Terminated);
        }
        backend.lifecycle = Some(lifecycle);
        for action_id in acks {
            self.acknowledge(action_id);
        }
        self.carry_out(id, changes, now, now);
        match address.filter(|_| starts) {
            Some(address) => self.start(id, spawn, address),
            None => self.over(id, now),
        }
    }

    fn start(&mut self, id: &str, spawn: Box<Spawn>, address: SocketAddr) {
        info!(backend = id, key = spawn.key.name, token = spawn.token, %address, "starting");
        let deadlines = spawn.deadlines;
        let desired = Desired {
            deadlines,
            end: None,
            kill_at: deadlines.hard_terminate_at,
            kill_ms: self.kill_ms(),
            expiry_ms: self.expiry_ms(),
            ready: false,
            deliveries: 0,
        };
        self.keeper.acquired(id, spawn.token, deadlines);
        if let Some(backend) = self.backends.get_mut(id) {
            backend.phase = Phase::Watched;
            backend.desired = Some(desired);
        }
        self.effects.push(Effect::Start { spawn, address, desired });
    }
}
