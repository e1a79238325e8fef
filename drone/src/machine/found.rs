//! What earlier drones have left, one backend at a time: none of them waits for another one.

use super::{Backend, Effect, End, Machine, Phase, RETRY_MS};
use crate::backend_state::{Changes, Desired, Lifecycle, Observation};
use crate::guard::{EndNow, Update};
use crate::journal::{Fate, Judged, Record};
use holdfast_wire::lease::EXPIRY_MS_MAX;
use holdfast_wire::{TerminationKind, TerminationReason};
use tracing::{info, warn};

/// A guard that has not greeted although everything that it guards must have ended by now gets this much longer, in
/// milliseconds; so does one that is to kill and does not greet.
const GUARD_PATIENCE_MS: i64 = 1_000;

impl Machine {
    /// There was a directory at the start.
    pub(super) fn found_directory(&mut self, id: String) {
        self.effects.push(Effect::Look { backend: id.clone() });
        self.backends.insert(id, Backend::new(Phase::Unread, true));
        self.alive += 1;
        self.unread += 1;
    }

    /// A directory was read.
    pub(super) fn looked(&mut self, id: &str, judged: Option<Judged>, now: i64) {
        let Some(backend) = self.backends.get_mut(id) else { return };
        if !matches!(backend.phase, Phase::Unread) {
            return;
        }
        let Some(Judged { fate, end }) = judged else {
            // A look that failed has not found nothing.
            self.timers.set(&id.to_owned(), Some(now.saturating_add(RETRY_MS)));
            return;
        };
        self.timers.set(&id.to_owned(), None);
        self.unread -= 1;
        if let Some(note) = end {
            backend.noted.durable = backend.noted.durable.max(Some(note.kind));
            let kill_at =
                if note.boot_id == self.boot_id { self.clock.of_boot_ms(note.kill_boot_ms) } else { now };
            // What was asked for in this process meanwhile can only be harder.
            let asked = backend.end.filter(|end| end.kind > note.kind);
            let kind = asked.map_or(note.kind, |end| end.kind);
            backend.end = Some(End { kind, reason: note.reason, kill_at });
        }
        match fate {
            Fate::Finished => self.was_finished(id, now),
            Fate::Guarded(record) => {
                let address = record.address;
                self.know(id, &record, now);
                info!(backend = id, key = record.key.name, token = record.token, "left by an earlier drone");
                if let Some(backend) = self.backends.get_mut(id) {
                    backend.phase = Phase::Connecting;
                    backend.address = Some(address);
                }
                self.delay_spawns(id, &record);
                self.guard_patience(id, now);
                self.effects.push(Effect::Connect { backend: id.to_owned(), address });
            }
            Fate::Ended(record, reports) => {
                self.know(id, &record, now);
                let observations: Vec<_> = reports.iter().filter_map(Observation::of).collect();
                self.ended(id, observations, now);
            }
            Fate::OtherBoot(record) => {
                self.know(id, &record, now);
                self.ended(id, vec![Observation::Lost], now);
            }
            Fate::Unguarded(record) => {
                warn!(backend = id, "its guard has died: ending what is left of it");
                self.know(id, &record, now);
                self.delay_spawns(id, &record);
                self.end_left(id);
            }
            Fate::Damaged(damage) => {
                warn!(backend = id, "its journal cannot be used: {damage}; ending whatever is left of it");
                self.end_left(id);
            }
            Fate::Elsewhere(record) => self.is_elsewhere(id, &record, now),
        }
    }

    /// Its record is known. An end that is noted or was asked for meanwhile is begun.
    fn know(&mut self, id: &str, record: &Record, now: i64) {
        let deadlines = self.deadlines_of(record, now);
        let Some(backend) = self.backends.get_mut(id) else { return };
        backend.token = Some(record.token);
        let lifecycle = backend.lifecycle.get_or_insert_with(|| Lifecycle::new(record.address));
        let states = backend.end.map(|end| lifecycle.end(end.kind, end.reason).states).unwrap_or_default();
        self.admission.adopted(id, deadlines.soft_terminate_at);
        self.carry_out(id, Changes { states, end: None }, now, now);
    }

    /// Spawns of its key wait until a controller has said whether it still holds it, or it is over.
    fn delay_spawns(&mut self, id: &str, record: &Record) {
        let key = (record.key.namespace.clone(), record.key.name.clone());
        if let Some(backend) = self.backends.get_mut(id) {
            backend.delays = Some(key.clone());
        }
        self.delaying.entry(key).or_default().insert(id.to_owned());
    }

    /// Nothing is left of it, and these are its last observations.
    fn ended(&mut self, id: &str, observations: Vec<Observation>, now: i64) {
        let Some(lifecycle) = self.backends.get_mut(id).and_then(|backend| backend.lifecycle.as_mut()) else {
            return;
        };
        let mut states = Vec::new();
        for observation in observations.into_iter().chain([Observation::Gone]) {
            states.extend(lifecycle.learn(observation).states);
        }
        self.carry_out(id, Changes { states, end: None }, now, now);
        self.over(id, now);
    }

    /// Its end was acknowledged before.
    fn was_finished(&mut self, id: &str, now: i64) {
        let Some(backend) = self.backends.remove(id) else { return };
        // Carried out: nothing of it is left.
        for (action_id, _) in backend.end_acks {
            self.acknowledge(action_id);
        }
        self.alive -= 1;
        self.move_on(now);
    }

    fn is_elsewhere(&mut self, id: &str, record: &Record, now: i64) {
        warn!(
            backend = id,
            "it may run on the machine that this data directory was moved from: its key has to expire"
        );
        let Some(backend) = self.backends.get_mut(id) else { return };
        backend.phase = Phase::Elsewhere;
        backend.token = Some(record.token);
        self.admission.adopted(id, i64::MAX);
        self.timers.set(&id.to_owned(), Some(now.saturating_add_unsigned(EXPIRY_MS_MAX)));
        self.alive -= 1;
        self.move_on(now);
    }

    fn end_left(&mut self, id: &str) {
        if let Some(backend) = self.backends.get_mut(id) {
            backend.phase = Phase::Ending;
        }
        self.timers.set(&id.to_owned(), None);
        self.effects.push(Effect::EndLeft { backend: id.to_owned() });
    }

    /// How long its guard may take to greet. A living guard is waited for: it holds the deadline meanwhile. The latest that
    /// it can have is one that the earlier drone was granted just before this one started. A guard that is to kill, and
    /// that is not there to be told, is killed instead.
    pub(super) fn guard_patience(&mut self, id: &str, now: i64) {
        let hard = self.lease.map_or(EXPIRY_MS_MAX, |lease| lease.hard_terminate_ms);
        let over_at = self.started_at.saturating_add_unsigned(hard).saturating_add_unsigned(self.kill_ms());
        let Some(backend) = self.backends.get_mut(id) else { return };
        let kills = backend
            .lifecycle
            .as_ref()
            .is_some_and(|lifecycle| lifecycle.end_kind() == Some(TerminationKind::Hard));
        let until = if kills { over_at.min(now) } else { over_at.max(now) };
        self.timers.set(&id.to_owned(), Some(until.saturating_add(GUARD_PATIENCE_MS)));
    }

    /// The lease has become known: guards that have not greeted are waited for by it.
    pub(super) fn guard_patience_of_all(&mut self, now: i64) {
        let connecting = |backend: &Backend| matches!(backend.phase, Phase::Connecting);
        let ids: Vec<String> =
            self.backends.iter().filter(|(_, b)| connecting(b)).map(|(id, _)| id.clone()).collect();
        for id in ids {
            self.guard_patience(&id, now);
        }
    }

    /// A backend's phase has taken too long.
    pub(super) fn timer_fired(&mut self, id: &str, now: i64) {
        let Some(backend) = self.backends.get_mut(id) else { return };
        match backend.phase {
            Phase::Unread => self.effects.push(Effect::Look { backend: id.to_owned() }),
            Phase::Connecting => {
                warn!(backend = id, "its guard does not greet: ending both");
                self.end_left(id);
            }
            Phase::Elsewhere => {
                info!(backend = id, "forgotten: its key has expired by now");
                self.backends.remove(id);
                self.admission.adopted(id, now);
                self.admission.finished(id);
                self.effects.push(Effect::Forget { backend: id.to_owned() });
            }
            Phase::Preparing(_) | Phase::Watched | Phase::Ending | Phase::Over => {}
        }
    }

    /// The guard of an earlier drone's backend commands it for this drone from now on.
    pub(super) fn greeted(&mut self, id: &str, told: Update, now: i64) {
        let deadlines = self.deadlines_from_boot(told.soft_boot_ms, told.hard_boot_ms, now);
        let told_end = told.end.map(|end| match end {
            EndNow::Soft { kill_boot_ms } => (TerminationKind::Soft, self.clock.of_boot_ms(kill_boot_ms)),
            EndNow::Hard => (TerminationKind::Hard, deadlines.hard_terminate_at),
        });
        let (kill_ms, expiry_ms) = (self.kill_ms(), self.expiry_ms());
        let Some(backend) = self.backends.get_mut(id) else { return };
        let (Phase::Connecting, Some(lifecycle), Some(token), Some(address)) =
            (&backend.phase, &mut backend.lifecycle, backend.token, backend.address)
        else {
            return;
        };
        let desired = Desired {
            deadlines,
            end: told_end.map(|(kind, _)| kind),
            kill_at: told_end.map_or(deadlines.hard_terminate_at, |(_, kill_at)| kill_at),
            kill_ms,
            expiry_ms,
            ready: told.ready,
            deliveries: 0,
        };
        // An end that the guard was told goes on; if it is not noted, it is not known here any more who asked for it.
        let states = told_end
            .map(|(kind, _)| lifecycle.end(kind, TerminationReason::External).states)
            .unwrap_or_default();
        let end = lifecycle.end_kind();
        backend.phase = Phase::Watched;
        backend.desired = Some(desired);
        let noted_kill_at = backend.end.map(|end| end.kill_at);
        info!(backend = id, token, "adopted");
        self.timers.set(&id.to_owned(), None);
        self.keeper.acquired(id, token, deadlines);
        self.effects.push(Effect::Adopt { backend: id.to_owned(), desired, address });
        // What was noted or asked for, and the guard was not told.
        let news = end.filter(|kind| desired.end.is_none_or(|told| told < *kind));
        let kill_at = noted_kill_at.unwrap_or(i64::MAX);
        self.carry_out(id, Changes { states, end: news }, kill_at, now);
        if end.is_some() {
            self.keeper.ending(id);
        }
    }

    /// A guard that was being connected to has ended: its directory says what became of the backend.
    pub(super) fn guard_ended(&mut self, id: String) {
        let Some(backend) = self.backends.get_mut(&id) else { return };
        if matches!(backend.phase, Phase::Connecting) {
            backend.phase = Phase::Unread;
            self.unread += 1;
            self.timers.set(&id, None);
            self.effects.push(Effect::Look { backend: id });
        }
    }

    /// Nothing is left of a backend whose guard was not there.
    pub(super) fn left_ended(&mut self, id: &str, now: i64) {
        let Some(backend) = self.backends.get_mut(id) else { return };
        if !matches!(backend.phase, Phase::Ending) {
            return;
        }
        if backend.lifecycle.is_some() {
            self.ended(id, vec![Observation::Lost], now);
            return;
        }
        // Which key it held is not known, so nothing can be reported: its key expires.
        self.effects.push(Effect::Forget { backend: id.to_owned() });
        self.was_finished(id, now);
    }
}
