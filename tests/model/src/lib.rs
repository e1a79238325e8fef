//! A model of how a cluster is formed, changed and repaired, and of Raft underneath, which a checker
//! explores.
//!
//! # The question
//!
//! A replica that lost its disk has forgotten its votes and what it acknowledged. If it takes part under its
//! old id, two leaders can commit different entries at one index, and two backends of one key run. The rules
//! in the design's chapter "Membership" exclude that: an id belongs to a *disk identity*, which is lost
//! exactly when the votes and the log are, and no process ever decides by itself that a cluster exists. This
//! crate asks whether these rules are enough, for every order of events within bounds; and, by breaking one
//! rule at a time, whether each is needed.
//!
//! # A state
//!
//! [`State`] holds a process at each address with its disk (identity, the durable record that names it, term,
//! vote, log, how much is applied) and its role; the answers in flight; and a history that no process knows:
//! who led each term, what was acknowledged, which acquisitions were granted and whose lease is over.
//!
//! A log entry is a membership (initial, learner added, voters changed jointly as openraft does it, member
//! removed, address changed), the blank entry of a new leader, or an acquisition or release of the one key.
//! The token of an acquisition is the index of its entry.
//!
//! # A step
//!
//! A [`Step`] is an event at one process, or a request that one process sends and another handles at once.
//! *Answers* are not part of that step. A granted vote or an acknowledged append stays in flight, and its
//! candidate or leader counts it at any later moment or never. So each answer may be lost, may be late, and
//! may arrive after the disk that gave it is gone, which is the dangerous case. A crash, a lost disk or an
//! operator's command may come between any two steps. A process that takes no steps is a paused one, and a
//! pair that exchanges no requests is partitioned. A crash of a member loses its role and nothing else; from
//! then on it behaves like a candidate or leader that takes no steps until it stands again, so
//! [`Step::Stand`] covers it. Only the coordinator of an init has a crash of its own.
//!
//! Every request passes the hello first, which names the cluster, the sender and the receiver with their
//! identities. A refusal that looks at the *sender* may come too late, for a connection that was accepted
//! before: the steps marked `held` pass it by, so safety is shown without these refusals. What a connection
//! says about the *receiver* cannot become wrong: a connection ends with the process, and a process keeps its
//! identity.
//!
//! # The rules
//!
//! The rules are those of `docs/architecture.md`, "Membership". Five of them are not obvious, and each has a
//! [`Variant`] without it that violates a property (`docs/model.md` tells the schedules):
//!
//! - A receiver compares the identity of a sender with its *applied* membership: an entry that is not
//!   committed may record another disk under the same id.
//! - A sender counts as removed only by applied state.
//! - The largest id that was ever used is replicated state, so that the id of a removed member never returns.
//! - A leader makes a learner a voter only while so many of the present voters answer that the new vote is
//!   not needed.
//! - A learner gets only committed entries. Once the log of the leader counts it as a voter, it gets all.
//!
//! A leader, and only a leader, names a waiting process, and only if a committed entry records its disk.
//!
//! # The properties
//!
//! [`Violation`] lists what must not happen, each with its invariant's number: two holders of the key, a
//! token that does not grow, an acknowledged entry that a later leader lacks, a replica that truncates what
//! it applied, replicas that disagree, two leaders of one term, two clusters out of one list, a promotion
//! that stops a good majority if the disk of the promoted member is lost at once. A violation ends the path
//! that led to it.
//!
//! [`SERVES`] is the liveness property: from each state whose good disks are a majority, a fair schedule (no
//! further faults, every message arrives, processes stand for election in turn) leads to a leader that
//! commits. It is checked in each state by running that schedule, so a state that is stuck forever is found.
//! While a change is in progress, "a majority" means one of each membership that the logs of good disks hold.
//!
//! # What is left out, and why that is sound
//!
//! - *Most requests in flight.* A request is handled when it is sent; a late one of a sender that lives is
//!   the same request sent later, since nothing obliges a deposed leader to notice that it is one. What
//!   differs is the late append of a sender that has stepped down, crashed or lost its disk: the runs with
//!   [`Limits::late_request`] have one in flight at a time. A late vote request of such a candidate only
//!   raises the term of its voter.
//! - *Time.* Elections happen at any moment, so pre-vote, leader leases and timeouts only remove behaviours.
//!   Leases appear as what they guarantee: "the lease of this acquisition is over" is a step, and only then
//!   may the key be freed, or the quarantine of a restored cluster end. A lease counts from the heartbeat
//!   before its proposal, so the end of the quarantine also ends acquisitions that were proposed earlier and
//!   never committed; one that is committed later still runs nothing.
//! - *Snapshots.* A snapshot carries committed entries only; here an append carries the log from its
//!   beginning.
//! - *A late `Bind`* has the effect of one that arrived at once, because its receiver waits in between: it
//!   takes no step.
//! - *The end of a founder's own unfinished questions*, when it is bound: an operator's command that ends in
//!   a refusal.
//! - *The record of starts.* It tells a copied or set-back directory, which is outside the fault model. In
//!   the model no directory is set back, so every start knows all earlier ones, and the check passes.
//! - *The age of an answer.* A voter answers a leader that is about to promote a learner if it has its disk
//!   at that moment and knows the term. The implementation counts heartbeats that were answered within the
//!   last election timeout: a disk that is lost in that time counts as one that is lost after the promotion
//!   began.
//! - *The entries that wait for a learner.* The leader holds nothing back here, it sends again.
//! - *The refusal of a truncation, and leaders that stop counting a follower.* Truncating an applied entry is
//!   a violation here in any case.
//! - *Terms learned from refusals.* A process raises its term by standing for election.
//! - *Numbers of founders* that are exchangeable ([`Limits::symmetry`]).
//!
//! The checker compares states by a 64-bit hash. With n states the chance that two different ones are taken
//! for one is about n² / 2⁶⁵: one in a million for five million states.

mod config;
mod formation;
mod keys;
mod membership;
mod properties;
mod raft;
mod recovery;
mod run;
pub mod scenarios;
mod state;
mod symmetry;

use std::sync::Arc;

use stateright::{Model, Property};

pub use config::{Limits, Start, Step, Variant};
pub use properties::{ADDED_LEADS, GRANTED_AFTER_LOSS, SECOND_LEADER, SERVES, Violation};
pub use run::{Outcome, check};
pub use state::State;
use state::{Cluster, ClusterId, MemberId, Slot};

/// The model: the protocol with its variants, within bounds.
#[derive(Clone, Debug)]
pub struct Holdfast {
    /// The bounds.
    pub limits: Limits,
    /// The rules that are broken.
    pub variants: Vec<Variant>,
    /// Only this violation is looked for: a run passes the others by, to see what they lead to.
    pub watch: Option<Violation>,
    /// Steps that have been taken before the run begins.
    pub script: Vec<Step>,
}

impl Holdfast {
    /// The protocol within these bounds.
    pub fn new(limits: Limits) -> Holdfast {
        Holdfast { limits, variants: Vec::new(), watch: None, script: Vec::new() }
    }

    /// The protocol with one rule broken.
    pub fn with(mut self, variant: Variant) -> Holdfast {
        self.variants.push(variant);
        self
    }

    /// Looks only for this violation.
    pub fn watching(mut self, violation: Violation) -> Holdfast {
        self.watch = Some(violation);
        self
    }

    /// Begins after these steps.
    pub fn after(mut self, script: Vec<Step>) -> Holdfast {
        self.script = script;
        self
    }

    fn is(&self, variant: Variant) -> bool {
        self.variants.contains(&variant)
    }

    /// Notes a violation that a step has found.
    fn check(&self, next: &mut State, holds: bool, violation: Violation) {
        if !holds && self.watch.is_none_or(|watched| watched == violation) {
            next.violate(violation);
        }
    }

    fn prune(&self, state: &mut State) {
        state.prune(self.limits.adds);
    }

    fn cluster_mut<'a>(&self, state: &'a mut State, cluster: ClusterId) -> Option<&'a mut Cluster> {
        state.clusters.get_mut(usize::from(cluster)).map(Arc::make_mut)
    }

    /// The state after a step, or none if the step is not possible.
    pub fn step(&self, state: &State, step: Step) -> Option<State> {
        match step {
            Step::Crash(slot) => self.crash(state, slot),
            Step::Lose(slot) => self.lose(state, slot),
            Step::Stand(slot) => self.stand(state, slot),
            Step::AskVote { from, id, held } => self.ask_vote(state, from, id, held),
            Step::Lead(slot) => self.lead(state, slot),
            Step::Append { from, id, len, held } => self.append(state, from, id, len, held),
            Step::SendLate { from, id } => self.send_late(state, from, id),
            Step::DeliverLate => self.deliver_late(state),
            Step::Commit(slot) => self.commit(state, slot),
            Step::Acquire(slot) => self.acquire(state, slot),
            Step::LeaseEnds(number) => self.lease_ends(state, number),
            Step::Release(slot) => self.release(state, slot),
            Step::Add { leader, slot } => self.add(state, leader, slot),
            Step::Bind { from, id } => self.bind(state, from, id),
            Step::Promote { leader, id } => self.promote(state, leader, id),
            Step::Remove { leader, id } => self.remove(state, leader, id),
            Step::Finish(slot) => self.finish(state, slot),
            Step::Relocate { from, to } => self.relocate(state, from, to),
            Step::Move { leader, id, slot } => self.move_member(state, leader, id, slot),
            Step::Ask { init, slot } => self.ask(state, init, slot),
            Step::Name { init } => self.name(state, init),
            Step::BindFounder { init, slot } => self.bind_founder(state, init, slot),
            Step::Initialise { init } => self.initialise(state, init),
            Step::InitialiseSelf(slot) => self.initialise_self(state, slot),
            Step::Restore(slot) => self.restore(state, slot),
            Step::QuarantineEnds(cluster) => self.quarantine_ends(state, cluster),
        }
    }

    /// Every step that might be possible; [`Holdfast::step`] decides.
    fn steps(&self, state: &State, steps: &mut Vec<Step>) {
        let slots = 0..state.slots.len() as Slot;
        for (slot, process) in state.processes() {
            if process.asked.is_some() {
                steps.push(Step::Crash(slot));
            }
            steps.extend([Step::Lose(slot), Step::Stand(slot), Step::Lead(slot)]);
            steps.extend([Step::Commit(slot), Step::Acquire(slot), Step::Release(slot), Step::Finish(slot)]);
            if self.limits.restores > 0 {
                steps.push(Step::Restore(slot));
            }
            if self.limits.moves {
                steps.extend(slots.clone().map(|to| Step::Relocate { from: slot, to }));
            }
            if self.is(Variant::EveryoneInitialises) {
                steps.push(Step::InitialiseSelf(slot));
            }
            if process.role == state::Role::Follower {
                continue;
            }
            if self.limits.adds {
                steps.extend(slots.clone().map(|other| Step::Add { leader: slot, slot: other }));
            }
            let members = process.effective().into_iter().flat_map(|m| m.members());
            for id in members.map(|(id, _)| id) {
                self.steps_to(slot, id, process.log.len() as u8, steps);
            }
        }
        steps.push(Step::DeliverLate);
        for number in 0..state.acquires {
            steps.push(Step::LeaseEnds(number));
        }
        for cluster in 1..state.clusters.len() as ClusterId {
            steps.push(Step::QuarantineEnds(cluster));
        }
        if !self.is(Variant::EveryoneInitialises) {
            for (at, (_, list)) in self.inits().iter().enumerate() {
                let init = at as u8 + 1;
                steps.extend([Step::Name { init }, Step::Initialise { init }]);
                for slot in list.iter().copied() {
                    steps.extend([Step::Ask { init, slot }, Step::BindFounder { init, slot }]);
                }
            }
        }
    }

    /// The steps of a candidate or leader that concern one member.
    fn steps_to(&self, from: Slot, id: MemberId, len: u8, steps: &mut Vec<Step>) {
        for held in [false, true] {
            steps.push(Step::AskVote { from, id, held });
            let shortest = if self.limits.partial_appends { 1 } else { len };
            steps.extend((shortest..=len).map(|len| Step::Append { from, id, len, held }));
        }
        steps.extend([Step::Bind { from, id }, Step::SendLate { from, id }]);
        if self.limits.changes > 0 {
            steps.extend([Step::Promote { leader: from, id }, Step::Remove { leader: from, id }]);
        }
        if self.limits.moves {
            let slots = 0..self.limits.slots;
            steps.extend(slots.map(|slot| Step::Move { leader: from, id, slot }));
        }
    }
}

impl Model for Holdfast {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        let mut state = self.start();
        for (at, step) in self.script.iter().enumerate() {
            match self.step(&state, *step) {
                Some(next) => state = next,
                None => panic!("step {at} of the script, {step:?}, is not possible in {state:?}"),
            }
        }
        vec![state]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Step>) {
        if state.violations.is_empty() {
            self.steps(state, actions);
        }
    }

    fn next_state(&self, state: &State, step: Step) -> Option<State> {
        self.step(state, step).map(|next| self.representative(next)).filter(|next| next != state)
    }

    fn properties(&self) -> Vec<Property<Holdfast>> {
        properties::properties(self)
    }
}
