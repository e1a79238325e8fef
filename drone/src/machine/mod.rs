//! The drone's decisions, all of them, as one pure machine: an input and the time go in, effects come out. The loop in
//! [`crate::agent`] carries the effects out and brings back what became of them.
//!
//! ```text
//!                    spawn ──▶ Preparing ──durable──▶ Watched ──gone──▶ Over ──report acknowledged──▶ forgotten
//!                               (acknowledged only         ▲               ▲
//!                                from here on)             │ its guard     │ nothing is left
//!   directory at start ──▶ Unread ──▶ Connecting ──────────┘ greets        │
//!                            │            └──guard never greets──▶ Ending ─┤
//!                            ├──ended, other boot─────────────────────────▶┘
//!                            ├──unguarded, damaged──▶ Ending
//!                            └──of another machine──▶ Elsewhere (named, never reported)
//! ```
//!
//! Backends are independent: whatever one of them waits for (a disk, a guard, an engine, a process that does not die) is
//! waited for by that backend alone.
//!
//! Invariants, checked after every step of the property test in `tests/property.rs`:
//!
//! 1. **Never started after it was reported.** A spawn that cannot be remembered is neither reported nor acknowledged; one
//!    that was reported or acknowledged without being started is never started.
//! 2. **Acknowledged means durable or carried out.** A spawn is acknowledged, and anything reported of it, only after its
//!    record is durable (or it is refused for good). A terminate is acknowledged only after its note is durable, or nothing
//!    of the backend is left. A successor carries out what is noted.
//! 3. **Started at most once**, in this and in all later processes, and only by a spawn of this incarnation before its
//!    soft deadline.
//! 4. **`terminated` only when nothing is left**, as far as its guard, its outcome or a completed hunt says.
//! 5. **The list is complete.** It names every backend of which anything is on the disk and the end is not acknowledged.
//! 6. **Only the newest session counts.** Nothing is sent to another one and nothing is done that another one asks for.
//! 7. **An end is never taken back**, only made harder, and is delivered to the guard each time that it is asked for.
//! 8. **Everything is bounded**: see `check`.

mod backend;
mod ends;
mod found;
mod interface;
mod session;
mod spawns;
#[cfg(test)]
mod tests;

pub use interface::{CreateFailure, Effect, Input, Spawn};

use crate::activity::{Place, Seen, Tracker};
use crate::admission::Admission;
use crate::backend_state::{Changes, Desired, Observation};
use crate::clock::DroneClock;
use crate::journal::Record;
use crate::lease::{Duty, LeaseKeeper};
use crate::outbox::Outbox;
use crate::tables::{Schedule, Table};
use backend::{Backend, End, Phase};
use holdfast_wire::drone::{MessageFromDrone, RenewItem, RenewKeysRequest};
use holdfast_wire::lease::{EXPIRY_MS_MAX, KILL_MS_MAX};
use holdfast_wire::limits::RENEW_KEYS_MAX;
use holdfast_wire::{Deadlines, LeaseConfig, TerminationKind, TerminationReason};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use session::Listing;
use std::collections::BTreeSet;
use tracing::{error, info, warn};

/// Time from SIGTERM to SIGKILL of a soft end that was asked for, in milliseconds; the hard deadline may cut it short.
pub const GRACE_MS: i64 = 10_000;
/// Longest time that a stopping drone waits for its backends, in milliseconds.
pub const STOP_MS_MAX: i64 = 30_000;
/// And after killing what is left by then, in milliseconds.
pub const STOP_KILL_MS: i64 = 3_000;
/// Longest time that it waits for the last acknowledgements once its backends are gone, in milliseconds.
pub const STOP_REPORT_MS: i64 = 3_000;
/// After how long it is said again that this drone is stopping, in milliseconds.
const DRAINING_AGAIN_MS: i64 = 1_000;
/// After how long what failed on the disk is tried again, in milliseconds.
const RETRY_MS: i64 = 1_000;
/// Most actions of one backend that wait for being durable; controllers repeat the others.
const ACTIONS_PER_BACKEND_MAX: usize = 8;

#[derive(Debug, Clone, Copy)]
struct Stopping {
    /// When to kill what is left, in drone time.
    kill_at: i64,
    /// When to exit in any case, in drone time.
    leave_at: i64,
    /// When the last backend was gone, in drone time.
    over_at: Option<i64>,
}

/// Which cluster's keys the backends hold.
#[derive(Debug)]
struct Cluster {
    /// As it is durable.
    known: Option<String>,
    /// The one that is being made durable.
    keeping: Option<String>,
    /// When that is tried again after the disk failed, in drone time.
    keep_again_at: Option<i64>,
    /// The one that the backends are being ended for.
    moving_to: Option<String>,
    /// As the controller of the newest session says.
    session: Option<String>,
}

/// What a machine starts with.
#[derive(Debug)]
pub struct Start {
    /// Turns drone time into `CLOCK_BOOTTIME` and back.
    pub clock: DroneClock,
    /// This process's incarnation.
    pub incarnation: String,
    /// This boot's id.
    pub boot_id: String,
    /// The cluster whose id is durable.
    pub cluster_id: Option<String>,
    /// What has a directory.
    pub found: Vec<String>,
    /// For spreading renewals.
    pub seed: u64,
}

/// The drone's decisions: see the module.
#[derive(Debug)]
pub struct Machine {
    clock: DroneClock,
    incarnation: String,
    boot_id: String,
    started_at: i64,
    jitter: StdRng,
    keeper: LeaseKeeper,
    admission: Admission,
    outbox: Outbox,
    activity: Tracker,
    backends: Table<String, Backend>,
    /// Per key, the backends of earlier drones whose keys no controller has renewed or refused yet. Spawns for the same
    /// key wait for them.
    delaying: Table<(String, String), BTreeSet<String>>,
    /// When a backend's phase takes too long.
    timers: Schedule<String>,
    /// The number of backends that are not over.
    alive: usize,
    /// The number of directories that were not read yet.
    unread: usize,
    /// The session that is open.
    session: Option<u64>,
    /// The newest session that there was.
    newest_session: u64,
    listing: Option<Listing>,
    lease: Option<LeaseConfig>,
    cluster: Cluster,
    stopping: Option<Stopping>,
    left: bool,
    /// When the controllers are told next that this drone takes no new backends, in drone time; never, once they have it.
    say_draining_at: Option<i64>,
    effects: Vec<Effect>,
}

impl Machine {
    /// A machine that knows nothing but which directories there are, and its first effects.
    pub fn new(start: Start, now: i64) -> (Self, Vec<Effect>) {
        let Start { clock, incarnation, boot_id, cluster_id, found, seed } = start;
        let mut machine = Self {
            clock,
            incarnation,
            boot_id,
            started_at: now,
            jitter: StdRng::seed_from_u64(seed),
            keeper: LeaseKeeper::new(),
            admission: Admission::new(now),
            outbox: Outbox::new(),
            activity: Tracker::default(),
            backends: Table::default(),
            delaying: Table::default(),
            timers: Schedule::default(),
            alive: 0,
            unread: 0,
            session: None,
            newest_session: 0,
            listing: None,
            lease: None,
            cluster: Cluster {
                known: cluster_id,
                keeping: None,
                keep_again_at: None,
                moving_to: None,
                session: None,
            },
            stopping: None,
            left: false,
            say_draining_at: None,
            effects: Vec::new(),
        };
        for backend in found {
            machine.found_directory(backend);
        }
        let effects = std::mem::take(&mut machine.effects);
        (machine, effects)
    }

    /// Takes an input at a moment of drone time. Moments do not go back.
    pub fn step(&mut self, input: Input, now: i64) -> Vec<Effect> {
        // Deadlines first: an answer that waited in the queue past its deadline is too late.
        self.due(now);
        self.take(input, now);
        self.say(now);
        std::mem::take(&mut self.effects)
    }

    fn take(&mut self, input: Input, now: i64) {
        match input {
            Input::Tick => {}
            Input::Connected { session, handshake } => self.connected(session, handshake, now),
            Input::Message { session, message } if self.session == Some(session) => {
                self.message(*message, now);
            }
            Input::Lost { session } if self.session == Some(session) => self.lost(),
            // A session that was replaced.
            Input::Message { .. } | Input::Lost { .. } => {}
            Input::Created { backend, result } => self.created(&backend, result, now),
            Input::EndNoted { backend, kind } => self.end_noted(&backend, kind),
            Input::Looked { backend, judged } => self.looked(&backend, judged.map(|judged| *judged), now),
            Input::Greeted { backend, told } => self.greeted(&backend, told, now),
            Input::GuardEnded { backend } => self.guard_ended(backend),
            Input::LeftEnded { backend } => self.left_ended(&backend, now),
            Input::Observed { backend, observation } => self.observed(&backend, observation, now),
            Input::Connections(found) => self.connections(found, now),
            Input::ClusterIdKept { durable } => self.cluster_id_kept(durable, now),
            Input::Stop => self.stop(now),
            Input::Leave => {
                info!(backends = self.alive, "leaving the backends to their guards and the next drone");
                self.left = true;
            }
        }
    }

    /// Does what is due by now.
    fn due(&mut self, now: i64) {
        let mut renewals = Vec::new();
        let jitter = &mut self.jitter;
        for duty in self.keeper.due(now, || jitter.random_range(0.5..=1.0)) {
            match duty {
                Duty::RenewNow { backend, token } => renewals.push(RenewItem { backend, token }),
                Duty::SoftTerminate { backend, reason } => {
                    warn!(backend, "its key was not renewed in time: ending it");
                    self.end(&backend, End { kind: TerminationKind::Soft, reason, kill_at: i64::MAX }, now);
                }
                Duty::HardTerminate { backend, reason } => {
                    warn!(backend, "its key was not renewed in time: killing it");
                    self.end(&backend, End { kind: TerminationKind::Hard, reason, kill_at: now }, now);
                }
            }
        }
        for keys in renewals.chunks(RENEW_KEYS_MAX) {
            self.send(MessageFromDrone::RenewKeys(RenewKeysRequest { local_time: now, keys: keys.to_vec() }));
        }
        while let Some(backend) = self.timers.pop_due(now) {
            self.timer_fired(&backend, now);
        }
        if let Some(stopping) = self.stopping
            && now >= stopping.kill_at
            && !stopping.is_killing()
        {
            self.stopping = Some(Stopping { kill_at: i64::MAX, ..stopping });
            self.end_all(TerminationKind::Hard, TerminationReason::Swept, now, now);
        }
        if self.cluster.keep_again_at.is_some_and(|at| now >= at) {
            self.cluster.keep_again_at = None;
            if let Some(id) = self.cluster.keeping.clone() {
                self.effects.push(Effect::KeepClusterId(id));
            }
        }
        self.admission.tidy(now);
    }

    /// Says what the controllers have to hear.
    fn say(&mut self, now: i64) {
        if self.session.is_none() {
            return;
        }
        if self.say_draining_at.is_some_and(|at| now >= at) {
            self.say_draining_at = Some(now.saturating_add(DRAINING_AGAIN_MS));
            self.send(MessageFromDrone::Draining {});
        }
        self.list(now);
        while let Some(activity) = self.activity.message(now) {
            self.send(MessageFromDrone::BackendActivity(activity));
        }
        for event in self.outbox.flush(now) {
            self.send(MessageFromDrone::BackendEvent(event));
        }
    }

    /// When the machine next has something to do if nothing happens: a moment of drone time that may have passed, or none.
    pub fn next_wake(&self) -> Option<i64> {
        let stopping = self.stopping.map(|s| s.kill_at.min(s.leave_at));
        let always = [self.keeper.next_wake(), self.timers.next(), stopping, self.cluster.keep_again_at];
        let connected =
            [self.outbox.next_wake(), self.activity.next_wake(), self.say_draining_at, self.listing_wake()];
        let connected = connected.into_iter().flatten().filter(|_| self.session.is_some());
        always.into_iter().flatten().chain(connected).min()
    }

    /// Whether the drone was told to stop and everything is ended and reported or has taken too long, or it is to leave.
    pub fn has_stopped(&mut self, now: i64) -> bool {
        if self.left {
            return true;
        }
        let Some(stopping) = &mut self.stopping else { return false };
        if self.alive == 0 {
            let over_at = *stopping.over_at.get_or_insert(now);
            stopping.leave_at = stopping.leave_at.min(over_at.saturating_add(STOP_REPORT_MS));
            if self.outbox.is_empty() {
                return true;
            }
        }
        let late = now >= stopping.leave_at;
        if late {
            error!(
                "leaves without having ended and reported everything; guards that are left keep their deadlines"
            );
        }
        late
    }

    /// The backends that are not over: their directories are in use.
    pub fn in_use(&self) -> impl Iterator<Item = &String> {
        self.backends.iter().filter(|(_, backend)| backend.is_alive()).map(|(id, _)| id)
    }

    /// Time allowed for a kill to take effect, in milliseconds.
    fn kill_ms(&self) -> u64 {
        self.lease.map_or(KILL_MS_MAX, |lease| lease.kill_ms())
    }

    /// Longest time that any deadline lies ahead, in milliseconds.
    fn expiry_ms(&self) -> u64 {
        self.lease.map_or(EXPIRY_MS_MAX, |lease| lease.expiry_ms)
    }

    fn send(&mut self, message: MessageFromDrone) {
        if self.session.is_some() {
            self.effects.push(Effect::Send(Box::new(message)));
        }
    }

    fn acknowledge(&mut self, action_id: String) {
        self.send(MessageFromDrone::AckAction { action_id });
    }

    fn stop(&mut self, now: i64) {
        if self.stopping.is_some() {
            warn!("asked to stop again: killing the backends");
            let leave_at = now.saturating_add(STOP_KILL_MS);
            self.stopping = Some(Stopping { kill_at: i64::MAX, leave_at, over_at: None });
            self.end_all(TerminationKind::Hard, TerminationReason::Swept, now, now);
            return;
        }
        info!(backends = self.alive, "stopping");
        // What is started from now on would be ended at once.
        self.say_draining_at = Some(now);
        let kill_at = now.saturating_add(STOP_MS_MAX);
        let leave_at = kill_at.saturating_add(STOP_KILL_MS);
        self.stopping = Some(Stopping { kill_at, leave_at, over_at: None });
        let grace_until = now.saturating_add(GRACE_MS);
        self.end_all(TerminationKind::Soft, TerminationReason::Swept, grace_until, now);
    }

    /// Reports what follows from an observation or a decision, and passes an end on to the keeper and the guard.
    fn carry_out(&mut self, id: &str, changes: Changes, kill_at: i64, now: i64) {
        let Some(backend) = self.backends.get_mut(id) else { return };
        for state in changes.states {
            info!(backend = id, status = %state.status(), "reports");
            backend.latest = Some(state.clone());
            self.outbox.push(id, state, now, backend.token);
        }
        if let Some(kind) = changes.end {
            self.keeper.ending(id);
            if let Some(desired) = &mut backend.desired {
                desired.end = Some(kind);
                desired.kill_at = kill_at.min(desired.deadlines.hard_terminate_at);
                desired.deliveries += 1;
                let desired = *desired;
                self.want(id, desired);
            }
        }
    }

    fn want(&mut self, id: &str, desired: Desired) {
        self.effects.push(Effect::Want { backend: id.to_owned(), desired });
    }

    /// Something was found out of a backend that is watched.
    fn observed(&mut self, id: &str, observation: Observation, now: i64) {
        let observation = match observation {
            Observation::Metrics(metrics) => {
                self.send(MessageFromDrone::BackendMetrics(metrics));
                return;
            }
            observation => observation,
        };
        let Some(backend) = self.backends.get_mut(id) else { return };
        if !matches!(backend.phase, Phase::Watched) {
            return;
        }
        if let Observation::ConnectionsAt(place) = observation {
            backend.place = Some(place);
            if backend.connections_watched {
                self.watch_connections(id);
            }
            return;
        }
        let ready = observation == Observation::Ready;
        let gone = observation == Observation::Gone;
        let exited = matches!(observation, Observation::Exited(_));
        let Some(lifecycle) = &mut backend.lifecycle else { return };
        let changes = lifecycle.learn(observation);
        let first_answer =
            backend.desired.as_mut().filter(|desired| ready && !desired.ready).map(|desired| {
                desired.ready = true;
                *desired
            });
        if let Some(desired) = first_answer {
            // Its guard tells a later drone, which then does not wait for an answer again.
            self.want(id, desired);
        }
        self.carry_out(id, changes, now.saturating_add(GRACE_MS), now);
        if ready {
            self.watch_connections(id);
        }
        if exited {
            // Nothing is left to renew the key for.
            self.keeper.ending(id);
        }
        if gone {
            self.over(id, now);
        }
    }

    /// Connections are looked at from the first answer on.
    fn watch_connections(&mut self, id: &str) {
        let Some(backend) = self.backends.get_mut(id) else { return };
        let (Some(token), Some(address)) = (backend.token, backend.address) else { return };
        backend.connections_watched = true;
        let place = backend.place.unwrap_or(Place { pid: None, port: address.port() });
        self.effects.push(Effect::WatchConnections { backend: id.to_owned(), token, place });
    }

    fn connections(&mut self, found: Vec<(String, u64, Option<Seen>)>, now: i64) {
        for (id, token, seen) in found {
            if self.backends.get(&id).is_some_and(|backend| backend.connections_watched) {
                self.activity.seen(&id, token, seen, now);
            }
        }
    }

    /// Nothing of a backend is left, and that is reported.
    fn over(&mut self, id: &str, now: i64) {
        let Some(backend) = self.backends.get_mut(id) else { return };
        if !backend.is_alive() {
            return;
        }
        backend.phase = Phase::Over;
        backend.desired = None;
        backend.connections_watched = false;
        self.effects.push(Effect::Release { backend: id.to_owned(), address: backend.address });
        // Carried out.
        let acks = std::mem::take(&mut backend.spawn_acks).into_iter();
        let acks: Vec<String> = acks.chain(backend.end_acks.drain(..).map(|(id, _)| id)).collect();
        for action_id in acks {
            self.acknowledge(action_id);
        }
        self.keeper.ended(id);
        self.activity.forget(id);
        self.timers.set(&id.to_owned(), None);
        self.confirmed(id);
        self.alive -= 1;
        self.move_on(now);
    }

    /// A controller has said whether an adopted backend holds its key, or the backend is over: spawns for its key need not
    /// wait for it any more.
    fn confirmed(&mut self, id: &str) {
        let Some(key) = self.backends.get_mut(id).and_then(|backend| backend.delays.take()) else { return };
        if let Some(delaying) = self.delaying.get_mut(&key) {
            delaying.remove(id);
            if delaying.is_empty() {
                self.delaying.remove(&key);
            }
        }
    }

    /// The record of an earlier drone's backend, turned into this process's time.
    fn deadlines_of(&self, record: &Record, now: i64) -> Deadlines {
        self.deadlines_from_boot(record.soft_boot_ms, record.hard_boot_ms, now)
    }

    fn deadlines_from_boot(&self, soft_boot_ms: i64, hard_boot_ms: i64, now: i64) -> Deadlines {
        let soft_terminate_at = self.clock.of_boot_ms(soft_boot_ms);
        Deadlines {
            renew_at: now.min(soft_terminate_at.saturating_sub(1)),
            soft_terminate_at,
            hard_terminate_at: self.clock.of_boot_ms(hard_boot_ms),
        }
    }
}

impl Stopping {
    /// The kill was ordered already.
    fn is_killing(&self) -> bool {
        self.kill_at == i64::MAX
    }
}
