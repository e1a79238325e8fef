//! placeholder

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
            steps.extend([Step::Crash(slot), Step::Lose(slot), Step::Stand(slot), Step::Lead(slot)]);
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
        steps.push(Step::Bind { from, id });
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
