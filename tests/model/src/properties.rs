//! The properties, each with the number of the invariant in the design that it stands for.

use stateright::Property;

use crate::Holdfast;
use crate::state::{Kind, Role, State};

/// What can go wrong in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Violation {
    /// Two backends of the key may run: two acquisitions are granted, and neither lease is over.
    TwoHolders,
    /// An acquisition has a token that is not larger than all before it.
    TokenShrinks,
    /// A leader lacks an entry that was committed in an earlier term, or commits another in its place.
    AcknowledgedLost,
    /// A leader made a replica truncate an entry that it had applied.
    TruncatedApplied,
    /// A replica applies another entry than was committed.
    ReplicasDisagree,
    /// Two processes lead one term, or one leads it twice.
    TwoLeaders,
    /// Two clusters with a founder in common have committed entries.
    TwoClusters,
    /// A majority of the voters, all with their disks, can't serve without a member that is just being made a
    /// voter.
    NewVoterNeeded,
}

impl Violation {
    /// All of them.
    pub const ALL: [Violation; 8] = [
        Violation::TwoHolders,
        Violation::TokenShrinks,
        Violation::AcknowledgedLost,
        Violation::TruncatedApplied,
        Violation::ReplicasDisagree,
        Violation::TwoLeaders,
        Violation::TwoClusters,
        Violation::NewVoterNeeded,
    ];

    /// The property that is violated.
    pub fn property(self) -> &'static str {
        match self {
            Violation::TwoHolders => "1: one holder per key at a time",
            Violation::TokenShrinks => "2: tokens grow",
            Violation::AcknowledgedLost => "5: nothing acknowledged is lost",
            Violation::TruncatedApplied => "5: no replica truncates what it has applied",
            Violation::ReplicasDisagree => "6: replicas agree",
            Violation::TwoLeaders => "5: one leader per term",
            Violation::TwoClusters => "5: one cluster per init list",
            Violation::NewVoterNeeded => "5: a promotion needs no vote of the promoted",
        }
    }
}

/// The liveness property.
pub const SERVES: &str = "5: a majority of good disks serves in the end";
/// Reached when two leaders of different terms have committed entries: the bounds are not too tight.
pub const SECOND_LEADER: &str = "reached: a second leader commits";
/// Reached when an acquisition is granted after a disk was lost.
pub const GRANTED_AFTER_LOSS: &str = "reached: an acquisition after a lost disk";
/// Reached when a member that was added leads.
pub const ADDED_LEADS: &str = "reached: an added member leads";

fn absent<const N: usize>(_: &Holdfast, state: &State) -> bool {
    !state.violations.contains(&Violation::ALL[N])
}

/// The properties of a run: those that must hold in every state, and what must be reachable for the run to
/// mean anything.
pub(crate) fn properties(model: &Holdfast) -> Vec<Property<Holdfast>> {
    let conditions: [fn(&Holdfast, &State) -> bool; 8] = [
        absent::<0>,
        absent::<1>,
        absent::<2>,
        absent::<3>,
        absent::<4>,
        absent::<5>,
        absent::<6>,
        absent::<7>,
    ];
    let mut properties: Vec<Property<Holdfast>> = Violation::ALL
        .iter()
        .zip(conditions)
        .map(|(violation, condition)| Property::always(violation.property(), condition))
        .collect();
    if model.limits.recovery {
        properties.push(Property::always(SERVES, |model, state| model.recovers(state)));
    }
    if model.limits.terms > 1 {
        properties.push(Property::sometimes(SECOND_LEADER, |_, state: &State| {
            let entries = state.clusters.iter().flat_map(|c| &c.acknowledged);
            entries.filter(|(entry, _)| matches!(entry.kind, Kind::Blank)).count() > 1
        }));
    }
    if model.limits.lost > 0 && model.limits.acquires > 0 {
        properties.push(Property::sometimes(GRANTED_AFTER_LOSS, |_, state: &State| {
            state.lost > 0 && state.granted != 0
        }));
    }
    if model.limits.adds {
        properties.push(Property::sometimes(ADDED_LEADS, |_, state: &State| {
            state.processes().any(|(_, p)| {
                p.role == Role::Leader && p.naming.is_some_and(|naming| naming.founding.is_none())
            })
        }));
    }
    properties
}
