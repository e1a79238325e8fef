//! The one key: acquisitions, leases, and what any leader has granted.

use crate::state::{Entry, Kind, Process, Role, Slot, State, apply_key, bit};
use crate::{Holdfast, Violation};

impl Holdfast {
    /// A leader proposes an acquisition of a key that is free in its log.
    pub(crate) fn acquire(&self, state: &State, slot: Slot) -> Option<State> {
        let leader = self.leader_with_room(state, slot)?;
        let cluster = leader.naming?.cluster;
        if state.acquires >= self.limits.acquires
            || leader.holder(leader.log.len()).is_some()
            || state.clusters[usize::from(cluster)].quarantine
        {
            return None;
        }
        let number = state.acquires;
        let mut next = state.clone();
        next.acquires += 1;
        propose(&mut next, slot, Kind::Acquire(number))?;
        Some(next)
    }

    /// The lease of a granted acquisition ends, or its backend has ended: nothing runs for it any more.
    pub(crate) fn lease_ends(&self, state: &State, number: u8) -> Option<State> {
        if !self.limits.releases || state.granted & !state.ended & bit(number) == 0 {
            return None;
        }
        let mut next = state.clone();
        next.ended |= bit(number);
        Some(next)
    }

    /// A leader frees the key after the holder's end: by its report, or by the expiry.
    pub(crate) fn release(&self, state: &State, slot: Slot) -> Option<State> {
        let leader = self.leader_with_room(state, slot)?;
        let number = leader.holder(leader.log.len())?;
        if state.ended & bit(number) == 0 {
            return None;
        }
        let mut next = state.clone();
        propose(&mut next, slot, Kind::Release(number))?;
        Some(next)
    }

    /// Notes the acquisitions that a leader has applied among its entries up to `len`: their backends may
    /// run.
    pub(crate) fn grant(&self, next: &mut State, leader: &Process, len: usize) {
        let base = leader.naming.map_or(0, |naming| next.clusters[usize::from(naming.cluster)].base);
        let mut holder = None;
        for (at, entry) in leader.log[..len].iter().enumerate() {
            let granted = apply_key(&mut holder, entry);
            let Kind::Acquire(number) = entry.kind else { continue };
            if !granted || at < usize::from(leader.applied) || next.granted & bit(number) != 0 {
                continue;
            }
            // Its lease was over before it was committed (by the old cluster, after a restore): nothing runs
            // for it.
            if next.ended & bit(number) != 0 {
                continue;
            }
            let token = base + at as u8;
            next.granted |= bit(number);
            let grows = token > next.last_token;
            next.last_token = next.last_token.max(token);
            let alone = (next.granted & !next.ended).count_ones() <= 1;
            self.check(next, grows, Violation::TokenShrinks);
            self.check(next, alone, Violation::TwoHolders);
        }
    }

    /// The leader at an address, if its log may grow.
    pub(crate) fn leader_with_room<'a>(&self, state: &'a State, slot: Slot) -> Option<&'a Process> {
        let process = state.at(slot)?;
        (process.role == Role::Leader && process.log.len() < usize::from(self.limits.log)).then_some(process)
    }
}

/// Appends an entry to the log of a leader.
pub(crate) fn propose(next: &mut State, slot: Slot, kind: Kind) -> Option<()> {
    let leader = next.at_mut(slot)?;
    leader.log.push(Entry { term: leader.term, kind });
    Some(())
}
