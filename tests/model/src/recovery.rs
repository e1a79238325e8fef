//! "A cluster whose good disks are a majority of its voters serves in the end", checked in every state.
//!
//! The faults end in this state: no more crashes, losses and operators. From then on a fair schedule runs, in
//! which the processes stand for election one after the other, every message between running processes
//! arrives, and a refused candidate learns the higher term. Each state in which the good disks are a majority
//! must lead to one in which a leader has committed an entry of its own term and has ended the joint change,
//! if there was one. The schedule is one of the many fair ones; randomised timeouts give each candidate its
//! turn with probability 1.

use std::sync::Arc;

use crate::Holdfast;
use crate::config::Step;
use crate::state::{ClusterId, Entry, Kind, MemberId, Membership, Naming, Node, Process, Slot, State};

/// Bounds that no recovery reaches.
const UNBOUNDED: u8 = 200;

impl Holdfast {
    /// The last committed membership of a cluster. Before any is, the initial one, if a disk that is left has
    /// it.
    pub(crate) fn latest_membership(&self, state: &State, cluster: ClusterId) -> Option<Membership> {
        let entries = &state.clusters.get(usize::from(cluster))?.acknowledged;
        let committed = entries.iter().rev().find_map(|(entry, _)| membership(entry));
        let in_cluster = |p: &Process| p.naming.is_some_and(|naming| naming.cluster == cluster);
        let initial = || {
            let mut members = state.processes().filter(|(_, p)| in_cluster(p));
            members.find_map(|(_, p)| p.log.first().and_then(membership))
        };
        committed.or_else(initial)
    }

    /// Whether this state leads to one that serves, or has no good majority.
    pub(crate) fn recovers(&self, state: &State) -> bool {
        if !state.violations.is_empty() {
            return true;
        }
        let model = self.unbounded();
        match state.clusters.len() {
            0 => true,
            1 if model.init_may_continue(state) => model.continue_init(state).is_some(),
            _ => (0..state.clusters.len() as ClusterId)
                .all(|cluster| !model.good_majority(state, cluster) || model.serves(state.clone(), cluster)),
        }
    }

    /// Whether a cluster whose good disks were a majority still serves when the disk at this address is lost
    /// now.
    pub(crate) fn serves_without(&self, state: &State, slot: Slot) -> bool {
        let Some(Naming { cluster, .. }) = state.at(slot).and_then(|p| p.naming) else { return true };
        let mut state = state.clone();
        let fresh = state.draw_identity();
        state.slots[usize::from(slot)] = Some(Arc::new(Process::waiting(fresh)));
        let committed = self.latest_membership(&state, cluster);
        let majority = committed.is_some_and(|m| m.quorum(|id, node| is_good(&state, cluster, id, node)));
        !majority || self.unbounded().serves(state, cluster)
    }

    /// Without bounds that could end a fair schedule.
    fn unbounded(&self) -> Holdfast {
        let mut model = self.clone();
        let limits = &mut model.limits;
        (limits.terms, limits.log, limits.acquires) = (UNBOUNDED, UNBOUNDED, UNBOUNDED);
        model
    }

    /// Whether the good disks are a majority in the last committed membership, and in each later one that any
    /// good disk has in its log: a joint change that was begun needs both of its majorities.
    fn good_majority(&self, state: &State, cluster: ClusterId) -> bool {
        let Some(committed) = self.latest_membership(state, cluster) else { return false };
        let acknowledged = &state.clusters[usize::from(cluster)].acknowledged;
        let good = |id: MemberId, node: Node| is_good(state, cluster, id, node);
        let in_cluster = |p: &Process| p.naming.is_some_and(|n| n.cluster == cluster);
        committed.quorum(good)
            && state.processes().filter(|(_, p)| in_cluster(p)).all(|(_, p)| {
                let known = p.log.iter().zip(acknowledged).take_while(|(a, (b, _))| *a == b).count();
                p.log[known..].iter().filter_map(membership).all(|m| m.quorum(good))
            })
    }

    /// Runs the fair schedule until a leader serves.
    fn serves(&self, mut state: State, cluster: ClusterId) -> bool {
        let slots = state.slots.len() as Slot;
        (0..slots * 2).any(|turn| {
            let slot = turn % slots;
            let Some(process) = state.at(slot) else { return false };
            if process.naming.is_none_or(|naming| naming.cluster != cluster) {
                return false;
            }
            if let Some(crashed) = self.crash(&state, slot) {
                state = crashed;
            }
            self.elect(&mut state, slot) && self.leads_to_service(&mut state, slot)
        })
    }

    /// Lets one process stand in a term above all others.
    fn elect(&self, state: &mut State, slot: Slot) -> bool {
        let top = state.processes().map(|(_, p)| p.term).max().unwrap_or_default();
        let before = state.clone();
        if let Some(process) = state.at_mut(slot) {
            process.term = top;
        }
        let Some(next) = self.stand(state, slot) else {
            *state = before;
            return false;
        };
        *state = next;
        for id in self.members_known_at(state, slot) {
            self.take(state, Step::AskVote { from: slot, id, held: false });
        }
        let led = self.lead(state, slot);
        if let Some(next) = led {
            *state = next;
            return true;
        }
        false
    }

    /// Lets a leader replicate, commit, name the waiting learners and end a joint change.
    fn leads_to_service(&self, state: &mut State, slot: Slot) -> bool {
        for _ in 0..4 {
            for id in self.members_known_at(state, slot) {
                self.take(state, Step::Bind { from: slot, id });
                let len = state.at(slot).map_or(0, |p| p.log.len() as u8);
                self.take(state, Step::Append { from: slot, id, len, held: false });
            }
            self.take(state, Step::Commit(slot));
            self.take(state, Step::Finish(slot));
            if state.at(slot).is_some_and(|p| usize::from(p.applied) == p.log.len() && p.membership_settled())
            {
                return true;
            }
        }
        false
    }

    /// Takes a step if it is possible.
    fn take(&self, state: &mut State, step: Step) {
        if let Some(next) = self.step(state, step) {
            *state = next;
        }
    }

    fn members_known_at(&self, state: &State, slot: Slot) -> Vec<MemberId> {
        state
            .at(slot)
            .and_then(|p| p.effective())
            .map_or_else(Vec::new, |m| m.members().map(|(id, _)| id).collect())
    }

    /// Whether the one init that was begun meets only processes that wait or are bound by it.
    fn init_may_continue(&self, state: &State) -> bool {
        let founded = state.processes().find_map(|(slot, p)| {
            let naming = p.naming?;
            let (init, coordinator) = naming.founding?;
            (coordinator == slot).then_some((init, naming.cluster, p.log.is_empty()))
        });
        let Some((init, cluster, true)) = founded else { return false };
        let Some((_, list)) = self.inits().get(usize::from(init) - 1) else { return false };
        list.iter().all(|slot| {
            state.at(*slot).is_some_and(|p| {
                let naming = p.naming;
                naming.is_none_or(|n| n.cluster == cluster && n.founding.is_some_and(|(i, _)| i == init))
            })
        })
    }

    /// The operator repeats the init at its coordinator, which has restarted.
    fn continue_init(&self, state: &State) -> Option<State> {
        let (init, coordinator) = state
            .processes()
            .find_map(|(slot, p)| p.naming?.founding.filter(|(_, coordinator)| *coordinator == slot))?;
        let mut next = self.crash(state, coordinator).unwrap_or_else(|| state.clone());
        let list = self.inits()[usize::from(init) - 1].1.clone();
        for slot in &list {
            next = self.ask(&next, init, *slot)?;
        }
        for slot in list.iter().filter(|slot| **slot != coordinator) {
            next = self.bind_founder(&next, init, *slot)?;
        }
        let mut next = self.initialise(&next, init)?;
        // The coordinator leads first: no one else knows a membership. Its first commit forms the cluster.
        self.elect(&mut next, coordinator);
        self.leads_to_service(&mut next, coordinator).then_some(next)
    }
}

/// Whether the process at a recorded address has the recorded disk, and is bound as this member.
fn is_good(state: &State, cluster: ClusterId, id: MemberId, node: Node) -> bool {
    state.at(node.slot).is_some_and(|p| {
        p.identity == node.identity && p.naming.is_some_and(|n| (n.cluster, n.id) == (cluster, id))
    })
}

/// The membership that an entry holds.
fn membership(entry: &Entry) -> Option<Membership> {
    match entry.kind {
        Kind::Membership(membership) => Some(membership),
        _ => None,
    }
}
