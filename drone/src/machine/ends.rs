//! Ends: asked for by controllers, by the lease, by the drone's own stop. An end that a controller asked for is made
//! durable before it is acknowledged, and delivered to the guard at once, each time that it is asked for.

use super::{ACTIONS_PER_BACKEND_MAX, Effect, End, GRACE_MS, Machine, Phase};
use crate::backend_state::Lifecycle;
use crate::journal::EndNote;
use holdfast_wire::{TerminationKind, TerminationReason};
use tracing::{debug, warn};

impl Machine {
    /// A controller asks for an end.
    pub(super) fn terminate(
        &mut self,
        action_id: String,
        id: &str,
        kind: TerminationKind,
        reason: TerminationReason,
        now: i64,
    ) {
        if !self.backends.contains(id) {
            debug!(backend = id, "asked to end a backend that is not here");
            // Its spawn may have been put off, and come again. Without room to remember this it comes again too.
            if self.admission.end_first(id, reason, self.lease, now) {
                self.acknowledge(action_id);
            }
            return;
        }
        let end = End { kind, reason, kill_at: now.saturating_add(GRACE_MS) };
        if !self.end(id, end, now) {
            self.deliver_again(id);
        }
        let Some(backend) = self.backends.get_mut(id) else { return };
        if matches!(backend.phase, Phase::Over) || backend.noted.durable.is_some_and(|noted| noted >= kind) {
            self.acknowledge(action_id);
            return;
        }
        if !backend.end_acks.iter().any(|(known, _)| *known == action_id) {
            if backend.end_acks.len() >= ACTIONS_PER_BACKEND_MAX {
                return;
            }
            backend.end_acks.push((action_id, kind));
        }
        self.note_end(id, kind, reason, end.kill_at);
    }

    /// Makes an end durable, unless one is being made durable just now, or there is no directory for it yet.
    fn note_end(&mut self, id: &str, kind: TerminationKind, reason: TerminationReason, kill_at: i64) {
        let Some(backend) = self.backends.get_mut(id) else { return };
        if backend.noted.writing || matches!(backend.phase, Phase::Preparing(_)) {
            return;
        }
        backend.noted.writing = true;
        // Why it was ended first is what is reported.
        let reason = backend.lifecycle.as_ref().and_then(Lifecycle::end_reason).unwrap_or(reason);
        let kill_boot_ms = self.clock.to_boot_ms(kill_at);
        let note = EndNote { boot_id: self.boot_id.clone(), kind, reason, kill_boot_ms };
        self.effects.push(Effect::NoteEnd { backend: id.to_owned(), note });
    }

    /// A note is durable, or could not be made so. Then it is tried again when the controllers repeat the action.
    pub(super) fn end_noted(&mut self, id: &str, kind: Option<TerminationKind>) {
        let Some(backend) = self.backends.get_mut(id) else { return };
        backend.noted.writing = false;
        let Some(kind) = kind else {
            warn!(backend = id, "its end is not durable, so it is not acknowledged before it is carried out");
            return;
        };
        backend.noted.durable = backend.noted.durable.max(Some(kind));
        let asked = std::mem::take(&mut backend.end_acks).into_iter();
        let (durable, rest): (Vec<_>, Vec<_>) = asked.partition(|(_, asked)| *asked <= kind);
        backend.end_acks = rest;
        let harder = backend.end_acks.iter().map(|(_, asked)| *asked).max();
        for (action_id, _) in durable {
            self.acknowledge(action_id);
        }
        if let Some(harder) = harder {
            // Asked for meanwhile.
            self.note_end(id, harder, TerminationReason::External, i64::MAX);
        }
    }

    /// Begins an end, or makes one harder. False if there is nothing to begin.
    pub(super) fn end(&mut self, id: &str, end: End, now: i64) -> bool {
        let Some(backend) = self.backends.get_mut(id) else { return false };
        if !backend.is_alive() {
            return false;
        }
        let Some(lifecycle) = &mut backend.lifecycle else {
            // Carried out once its record is known or durable.
            let before = backend.end;
            backend.end = Some(match before {
                Some(before) if before.kind >= end.kind => before,
                Some(before) => End { reason: before.reason, ..end },
                None => end,
            });
            return true;
        };
        let changes = lifecycle.end(end.kind, end.reason);
        let begun = changes.end.is_some();
        if begun && backend.desired.is_none() {
            // Its guard has still to be told.
            backend.end = Some(end);
        }
        let connecting = matches!(backend.phase, Phase::Connecting);
        self.carry_out(id, changes, end.kill_at, now);
        if begun && connecting {
            self.guard_patience(id, now);
        }
        begun
    }

    /// An end that has begun is asked for again: the guard may have missed it.
    fn deliver_again(&mut self, id: &str) {
        let Some(backend) = self.backends.get_mut(id) else { return };
        if let Some(desired) = &mut backend.desired
            && desired.end.is_some()
        {
            desired.deliveries += 1;
            let desired = *desired;
            self.want(id, desired);
        }
    }

    pub(super) fn end_all(
        &mut self,
        kind: TerminationKind,
        reason: TerminationReason,
        kill_at: i64,
        now: i64,
    ) {
        let ids: Vec<String> = self.in_use().cloned().collect();
        for id in ids {
            self.end(&id, End { kind, reason, kill_at }, now);
        }
    }
}
