//! Changes of a formed cluster: add, promote, remove, move, and the disks that are lost meanwhile.

use std::sync::Arc;

use crate::config::Variant;
use crate::keys::propose;
use crate::state::{
    Cluster, Entry, IDS, Kind, MemberId, Membership, Naming, Node, Process, Role, Slot, State, bit,
};
use crate::{Holdfast, Violation};

impl Holdfast {
    /// The leader at an address and its membership, if it may propose a change.
    fn may_change<'a>(
        &self,
        state: &'a State,
        leader: Slot,
        allowed: bool,
    ) -> Option<(&'a Process, Membership)> {
        let process = self.leader_with_room(state, leader)?;
        let may = allowed && state.changes < self.limits.changes && process.membership_settled();
        may.then_some((process, *process.effective()?))
    }

    /// Proposes a membership.
    fn change(&self, state: &State, leader: Slot, membership: Membership) -> Option<State> {
        let mut next = state.clone();
        next.changes += 1;
        propose(&mut next, leader, Kind::Membership(membership))?;
        Some(next)
    }

    /// The leader asks a waiting process for its identity and proposes it as a learner with an unused id.
    pub(crate) fn add(&self, state: &State, leader: Slot, slot: Slot) -> Option<State> {
        let (_, mut membership) = self.may_change(state, leader, self.limits.adds)?;
        let asked = state.at(slot)?;
        let recorded = membership.members().any(|(_, node)| node.slot == slot);
        if asked.naming.is_some() || recorded || membership.id_of(asked.identity).is_some() {
            return None;
        }
        if self.is(Variant::ReusesIds) {
            membership.used = membership.members().map(|(id, _)| id).max()?;
        }
        let id = membership.used + 1;
        if usize::from(id) > IDS {
            return None;
        }
        membership.set(id, Node { slot, identity: asked.identity });
        membership.used = id;
        self.change(state, leader, membership)
    }

    /// A leader that dials a waiting process names it, if its committed membership records just this disk.
    pub(crate) fn bind(&self, state: &State, from: Slot, id: MemberId) -> Option<State> {
        let dialer = state.at(from)?;
        if dialer.role != Role::Leader || !dialer.runs(from) {
            return None;
        }
        let source = match self.is(Variant::BindsUncommitted) {
            true => dialer.effective(),
            false => dialer.applied_membership(),
        };
        let identity = source?.node(id)?.identity;
        let slot = dialer.effective()?.node(id)?.slot;
        let asked = state.at(slot)?;
        if asked.naming.is_some() || asked.identity != identity {
            return None;
        }
        let naming = Naming { cluster: dialer.naming?.cluster, id, founding: None };
        let mut next = state.clone();
        next.at_mut(slot)?.naming = Some(naming);
        Some(next)
    }

    /// The leader proposes that a learner votes which has all that is committed.
    pub(crate) fn promote(&self, state: &State, leader: Slot, id: MemberId) -> Option<State> {
        let (process, mut membership) = self.may_change(state, leader, self.limits.adds)?;
        let node = membership.node(id)?;
        let term = (process.naming?.cluster, process.term);
        let caught_up = state.appended.iter().any(|ack| {
            ack.term == term && (ack.id, ack.identity) == (id, node.identity) && ack.len >= process.applied
        });
        let anytime = self.is(Variant::PromotesWhileVotersAreSilent);
        if membership.votes(id) || !caught_up || !(anytime || spares_new_vote(state, process, &membership)) {
            return None;
        }
        membership.outgoing = membership.voters;
        membership.voters |= bit(id);
        let mut next = self.change(state, leader, membership)?;
        // The second of two voters is always needed.
        if self.limits.recovery && membership.outgoing.count_ones() > 1 {
            let serves = self.serves_without(&next, node.slot);
            self.check(&mut next, serves, Violation::NewVoterNeeded);
        }
        Some(next)
    }

    /// The leader proposes to remove a member: a voter by a joint change, a learner at once.
    pub(crate) fn remove(&self, state: &State, leader: Slot, id: MemberId) -> Option<State> {
        let (_, mut membership) = self.may_change(state, leader, self.limits.removes)?;
        membership.node(id)?;
        if membership.votes(id) {
            membership.outgoing = membership.voters;
            membership.voters &= !bit(id);
            if membership.voters == 0 {
                return None;
            }
        } else {
            membership.set(id, Node::default());
        }
        self.change(state, leader, membership)
    }

    /// The leader ends a joint change that is committed. Voters that are none any more leave the cluster.
    pub(crate) fn finish(&self, state: &State, slot: Slot) -> Option<State> {
        let leader = self.leader_with_room(state, slot)?;
        let mut membership = *leader.effective()?;
        if membership.outgoing == 0 || leader.applied_membership()? != &membership {
            return None;
        }
        for id in 1..=IDS as MemberId {
            if membership.outgoing & !membership.voters & bit(id) != 0 {
                membership.set(id, Node::default());
            }
        }
        membership.outgoing = 0;
        let mut next = state.clone();
        propose(&mut next, slot, Kind::Membership(membership))?;
        Some(next)
    }

    /// The leader proposes another address for a member, at which the process answers as this member.
    pub(crate) fn move_member(&self, state: &State, leader: Slot, id: MemberId, slot: Slot) -> Option<State> {
        let (process, mut membership) = self.may_change(state, leader, self.limits.moves)?;
        let naming = Naming { cluster: process.naming?.cluster, id, founding: None };
        let node = membership.node(id)?;
        let asked = state.at(slot)?;
        let committed = self.is(Variant::MoveTakesDialedIdentityBindsCommitted);
        if committed || self.is(Variant::MoveTakesDialedIdentity) {
            if asked.naming.is_some() || membership.id_of(asked.identity).is_some() {
                return None;
            }
            membership.set(id, Node { slot, identity: asked.identity });
            let mut next = self.change(state, leader, membership)?;
            if !committed {
                next.at_mut(slot)?.naming = Some(naming);
            }
            return Some(next);
        }
        let answers = asked.identity == node.identity
            && asked.naming.is_some_and(|own| (own.cluster, own.id) == (naming.cluster, id));
        if node.slot == slot || !answers {
            return None;
        }
        membership.set(id, Node { slot, ..node });
        self.change(state, leader, membership)
    }

    /// An operator restarts a member at an address where a process waited, and an empty one at its old
    /// address.
    pub(crate) fn relocate(&self, state: &State, from: Slot, to: Slot) -> Option<State> {
        let allowed = self.limits.moves && state.changes < self.limits.changes;
        if !allowed || from == to || state.at(from)?.naming.is_none() || state.at(to)?.naming.is_some() {
            return None;
        }
        let mut next = self.crash(state, from).unwrap_or_else(|| state.clone());
        next.changes += 1;
        let fresh = next.draw_identity();
        let moved = next.slots[usize::from(from)].replace(Arc::new(Process::waiting(fresh)));
        next.slots[usize::from(to)] = moved;
        self.prune(&mut next);
        Some(next)
    }

    /// The process at an address dies and starts again from its disk.
    pub(crate) fn crash(&self, state: &State, slot: Slot) -> Option<State> {
        let process = state.at(slot)?;
        if process.role == Role::Follower && process.asked.is_none() {
            return None;
        }
        let mut next = state.clone();
        let process = next.at_mut(slot)?;
        process.role = Role::Follower;
        process.asked = None;
        self.prune(&mut next);
        Some(next)
    }

    /// The disk at an address is lost. What the variant keeps beside it stays.
    pub(crate) fn lose(&self, state: &State, slot: Slot) -> Option<State> {
        let process = state.at(slot)?;
        let (identity, naming) = (process.identity, process.naming);
        // Nothing notices the loss of a disk of which no other has heard.
        let known = naming.is_some()
            || state.processes().any(|(_, p)| {
                p.asked.is_some_and(|asked| asked.answers.contains(&identity))
                    || p.effective().is_some_and(|m| m.id_of(identity).is_some())
            });
        if state.lost >= self.limits.lost || !known {
            return None;
        }
        let mut next = state.clone();
        next.lost += 1;
        let fresh = if self.is(Variant::WipedKeepsId) {
            Process { naming, banned: true, ..Process::waiting(identity) }
        } else if self.is(Variant::IdentityBesideLog) {
            Process::waiting(identity)
        } else {
            Process::waiting(next.draw_identity())
        };
        next.slots[usize::from(slot)] = Some(Arc::new(fresh));
        self.prune(&mut next);
        Some(next)
    }

    /// After the loss of a majority, a restore makes a waiting process the first member of a new cluster.
    pub(crate) fn restore(&self, state: &State, slot: Slot) -> Option<State> {
        let process = state.at(slot)?;
        let restores = state.clusters.len() - 1;
        let old = self.latest_membership(state, 0)?;
        let alive = old.quorum(|_, node| state.processes().any(|(_, p)| p.identity == node.identity));
        if process.naming.is_some() || alive || restores >= usize::from(self.limits.restores) {
            return None;
        }
        let mut next = state.clone();
        let cluster = next.clusters.len() as u8;
        let mut membership = Membership { voters: bit(1), used: 1, ..Membership::default() };
        membership.set(1, Node { slot, identity: process.identity });
        let entry = Entry { term: 0, kind: Kind::Membership(membership) };
        let base = if self.is(Variant::RestoreWithoutJump) { 0 } else { 100 };
        next.clusters.push(Arc::new(Cluster {
            base,
            acknowledged: vec![(entry, 0)],
            quarantine: !self.is(Variant::RestoreWithoutQuarantine),
            ..Cluster::default()
        }));
        let process = next.at_mut(slot)?;
        process.naming = Some(Naming { cluster, id: 1, founding: None });
        process.log = vec![entry];
        process.applied = 1;
        Some(next)
    }

    /// The longest lease that the old cluster can have given is over.
    pub(crate) fn quarantine_ends(&self, state: &State, cluster: u8) -> Option<State> {
        state.clusters.get(usize::from(cluster)).filter(|cluster| cluster.quarantine)?;
        let mut next = state.clone();
        self.cluster_mut(&mut next, cluster)?.quarantine = false;
        next.ended |= bit(state.acquires) - 1;
        Some(next)
    }
}

/// Whether so many of the present voters answer the leader that a new one is not needed for the change that
/// makes it a voter. A voter answers if it has its disk and knows the leader's term.
fn spares_new_vote(state: &State, leader: &Process, membership: &Membership) -> bool {
    let answers = |id: MemberId, node: Node| {
        membership.votes(id)
            && state.at(node.slot).is_some_and(|p| p.identity == node.identity && p.term >= leader.term)
    };
    let voters = membership.voters.count_ones() as usize;
    let answering = membership.members().filter(|(id, node)| answers(*id, *node)).count();
    answering >= voters.min(voters.div_ceil(2) + 1)
}
