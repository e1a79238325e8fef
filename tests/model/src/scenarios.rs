//! The runs: the protocol within several bounds, and each broken rule within bounds that show what it breaks.

use crate::config::{Limits, Start, Step, Variant};
use crate::state::{MemberId, Slot};
use crate::{Holdfast, Outcome, SERVES, Violation};

/// A named run and what it must find.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Its name, unique.
    pub name: &'static str,
    /// The model.
    pub model: Holdfast,
    /// The property that must be violated; none for the protocol itself.
    pub violates: Option<&'static str>,
}

impl Scenario {
    /// Whether a run found what it must: the violation of just one property, or nothing.
    pub fn accepts(&self, outcome: &Outcome) -> bool {
        let violated: Vec<_> = outcome.counterexamples.iter().map(|(property, _)| *property).collect();
        violated.as_slice() == self.violates.as_slice()
    }
}

/// All scenarios, with the long bounds.
pub fn all() -> Vec<Scenario> {
    [protocol(true), variants(), examined()].concat()
}

fn holds(name: &'static str, limits: Limits) -> Scenario {
    Scenario { name, model: Holdfast::new(limits), violates: None }
}

fn breaks(name: &'static str, limits: Limits, variant: Variant, violation: Violation) -> Scenario {
    let model = Holdfast::new(limits).with(variant).watching(violation);
    Scenario { name, model, violates: Some(violation.property()) }
}

/// Two `cluster init` commands at different members of three.
fn two_inits(second: Vec<u8>, lost: u8) -> Limits {
    let start = Start::Waiting(vec![(0, vec![0, 1, 2]), (1, second)]);
    Limits { start, lost, terms: 1, acquires: 0, log: 2, ..Limits::formed(3) }
}

/// The protocol. `long` are the bounds of `make model`, the others fit into the tests.
pub fn protocol(long: bool) -> Vec<Scenario> {
    let three = Limits { symmetry: true, ..Limits::formed(3) };
    let five = Limits { terms: 2, log: 3, symmetry: true, ..Limits::formed(5) };
    let adds = Limits { slots: 4, adds: true, terms: 2, acquires: 1, log: 6, changes: 2, ..three.clone() };
    let removes = Limits { removes: true, terms: 2, acquires: 1, log: 5, changes: 1, ..three.clone() };
    let moves =
        Limits { slots: 4, moves: true, terms: 2, acquires: 1, log: 4, changes: 2, ..Limits::formed(3) };
    let restore = Limits { lost: 2, restores: 1, terms: 2, log: 3, ..Limits::formed(3) };
    let initialised = Limits { start: Start::Initialised(3), lost: 2, ..three.clone() };
    let inits = |list: Vec<u8>| Limits { recovery: true, ..two_inits(list, 1) };
    let mut all = vec![
        holds("3 members", Limits { lost: 2, ..three.clone() }),
        holds("3 members, recovery", Limits { lost: 2, terms: 2, recovery: true, ..three.clone() }),
        holds("3 members, just initialised", initialised),
        holds("3 members, late append", Limits { lost: 1, terms: 2, late_request: true, ..three.clone() }),
        holds("5 members", Limits { lost: 1, acquires: 1, ..five.clone() }),
        holds("two inits, one list", inits(vec![0, 1, 2])),
        holds("two inits, another order", inits(vec![2, 1, 0])),
        holds("two inits, overlapping lists", inits(vec![1, 2])),
        holds("remove", Limits { lost: 1, recovery: true, ..removes.clone() }),
        holds("add", Limits { lost: 0, acquires: 0, ..adds.clone() }),
        Scenario { name: "add, lost disk", model: growing(), violates: None },
        holds("restore", Limits { acquires: 1, ..restore.clone() }),
    ];
    if long {
        all.extend([
            holds("3 members, releases", Limits { lost: 2, releases: true, log: 5, ..three.clone() }),
            holds("3 members, partial appends", Limits { lost: 1, partial_appends: true, ..three.clone() }),
            holds("3 members, late append, 3 terms", Limits { lost: 1, late_request: true, ..three.clone() }),
            holds("5 members, 2 lost", Limits { lost: 2, ..five }),
            holds("add, lost disk, key", Limits { lost: 1, ..adds.clone() }),
            holds("remove, 2 lost", Limits { lost: 2, terms: 3, ..removes }),
            holds("replace", Limits { removes: true, lost: 1, acquires: 0, log: 7, changes: 3, ..adds }),
            holds("move", Limits { lost: 1, ..moves }),
            holds("restore, 2 keys", restore),
        ]);
    }
    all
}

/// Each broken rule.
pub fn variants() -> Vec<Scenario> {
    use Variant::*;
    use Violation::*;
    let three = Limits { lost: 1, terms: 2, ..Limits::formed(3) };
    let moves = Limits { changes: 1, moves: true, ..three.clone() };
    let list = Start::Waiting(vec![(0, vec![0, 1, 2])]);
    let one_init = Limits { start: list, acquires: 0, log: 2, ..three.clone() };
    let restore = Limits { lost: 2, restores: 1, ..three.clone() };
    vec![
        breaks("wiped keeps id: two holders", three.clone(), WipedKeepsId, TwoHolders),
        breaks("wiped keeps id: tokens", three.clone(), WipedKeepsId, TokenShrinks),
        breaks("wiped keeps id: lost entries", three.clone(), WipedKeepsId, AcknowledgedLost),
        breaks("wiped keeps id: truncation", three.clone(), WipedKeepsId, TruncatedApplied),
        breaks("everyone initialises", one_init, EveryoneInitialises, TwoLeaders),
        breaks("answers bind no one", two_inits(vec![0, 1, 2], 1), AnswersBindNoOne, TwoClusters),
        breaks("identity beside the log", three.clone(), IdentityBesideLog, TwoHolders),
        breaks("move takes the dialed identity", moves, MoveTakesDialedIdentity, TwoHolders),
        breaks("believes a wrong hello", three.clone(), BelievesWrongHello, TwoHolders),
        breaks("restore without jump", restore.clone(), RestoreWithoutJump, TokenShrinks),
        breaks("restore without quarantine", restore, RestoreWithoutQuarantine, TwoHolders),
        stuck("sender compared with uncommitted", stale_add(), ComparesUncommitted),
        stuck("learners get uncommitted entries", growing(), LearnersGetUncommitted),
        stuck("learners get the rest at the end", deposed_leader(), LearnersGetRestAtEnd),
        breaks(
            "promotes while voters are silent",
            growing().limits,
            PromotesWhileVotersAreSilent,
            NewVoterNeeded,
        ),
        stuck("used ids from uncommitted", lagging_follower(), UsedByUncommitted),
        stuck("ids of removed members return", returning_id(), ReusesIds),
    ]
}

/// Weaker rules for which no counterexample is known, and the protocol after the scripts that break a
/// variant.
pub fn examined() -> Vec<Scenario> {
    let moves = Limits { changes: 1, moves: true, lost: 1, terms: 2, ..Limits::formed(3) };
    let adds =
        Limits { slots: 4, adds: true, terms: 2, acquires: 0, log: 6, changes: 2, ..Limits::formed(3) };
    let variant =
        |name, limits, variant| Scenario { name, model: Holdfast::new(limits).with(variant), violates: None };
    vec![
        Scenario { name: "protocol after a stale add", model: stale_add(), violates: None },
        Scenario { name: "protocol with a deposed leader", model: deposed_leader(), violates: None },
        Scenario { name: "protocol with a lagging follower", model: lagging_follower(), violates: None },
        Scenario {
            name: "learners get uncommitted entries and stand",
            model: growing().with(Variant::LearnersGetUncommitted).with(Variant::LearnersStand),
            violates: None,
        },
        variant("move binds after the commit", moves, Variant::MoveTakesDialedIdentityBindsCommitted),
        variant("bind before the commit", adds.clone(), Variant::BindsUncommitted),
        variant(
            "promotes while voters are silent: safety",
            Limits { lost: 1, acquires: 1, symmetry: true, ..adds },
            Variant::PromotesWhileVotersAreSilent,
        ),
    ]
}

/// Three members, one of whose disks is lost, and a process that is added and promoted.
fn growing() -> Holdfast {
    Holdfast::new(Limits {
        slots: 4,
        adds: true,
        changes: 2,
        log: 6,
        terms: 2,
        acquires: 0,
        lost: 1,
        recovery: true,
        symmetry: true,
        ..Limits::formed(3)
    })
}

/// A variant after which a majority of good disks does not serve.
fn stuck(name: &'static str, model: Holdfast, variant: Variant) -> Scenario {
    Scenario { name, model: model.with(variant), violates: Some(SERVES) }
}

fn vote(from: Slot, id: MemberId) -> Step {
    Step::AskVote { from, id, held: false }
}

fn append(from: Slot, id: MemberId, len: u8) -> Step {
    Step::Append { from, id, len, held: false }
}

/// Member 1 leads term 1 and its log alone holds `add 4`, for the process at address 4. Member 2 leads term 2
/// and adds the process at address 3 under the same id, which becomes a voter. One disk may be lost from then
/// on.
fn stale_add() -> Holdfast {
    let limits = Limits {
        slots: 5,
        adds: true,
        changes: 3,
        log: 6,
        acquires: 0,
        lost: 1,
        recovery: true,
        ..Limits::formed(3)
    };
    let mut script = vec![Step::Stand(0), vote(0, 2), Step::Lead(0), Step::Add { leader: 0, slot: 4 }];
    script.extend([Step::Stand(1), vote(1, 3), Step::Lead(1), Step::Add { leader: 1, slot: 3 }]);
    script.extend([append(1, 3, 3), Step::Commit(1), Step::Bind { from: 1, id: 4 }, append(1, 4, 3)]);
    script.push(append(1, 1, 1));
    script.extend([Step::Promote { leader: 1, id: 4 }, append(1, 3, 4), append(1, 4, 4), Step::Commit(1)]);
    script.extend([Step::Finish(1), append(1, 3, 5), append(1, 4, 5), Step::Commit(1)]);
    Holdfast::new(limits).after(script)
}

/// Three members and a learner that has all that is committed. The first leader's log alone holds its
/// promotion. Member 2 leads term 2, as member 3 knows. One disk may be lost and one more process may stand
/// from then on.
fn deposed_leader() -> Holdfast {
    let Holdfast { limits, .. } = growing();
    let mut script = vec![Step::Stand(0), vote(0, 2), Step::Lead(0), append(0, 3, 2)];
    script.extend([Step::Add { leader: 0, slot: 3 }, append(0, 2, 3), Step::Commit(0)]);
    script.extend([Step::Bind { from: 0, id: 4 }, append(0, 4, 3), Step::Promote { leader: 0, id: 4 }]);
    script.extend([Step::Stand(1), vote(1, 3), Step::Lead(1)]);
    Holdfast::new(Limits { terms: 3, symmetry: false, ..limits }).after(script)
}

/// Member 4 was added and promoted while member 2 had not yet applied the entry that added it.
fn lagging_follower() -> Holdfast {
    let limits = Limits {
        slots: 4,
        adds: true,
        changes: 2,
        log: 6,
        terms: 2,
        acquires: 0,
        lost: 1,
        recovery: true,
        ..Limits::formed(3)
    };
    let mut script = vec![Step::Stand(0), vote(0, 2), Step::Lead(0), Step::Add { leader: 0, slot: 3 }];
    script.extend([append(0, 2, 3), Step::Commit(0), Step::Bind { from: 0, id: 4 }, append(0, 4, 3)]);
    script.push(append(0, 3, 1));
    script.extend([Step::Promote { leader: 0, id: 4 }, append(0, 3, 4), append(0, 4, 4), Step::Commit(0)]);
    script.extend([Step::Finish(0), append(0, 3, 5), append(0, 4, 5), Step::Commit(0)]);
    Holdfast::new(limits).after(script)
}

/// Member 4 was added and removed, as member 3 has not yet heard; another process was added under its id and
/// votes.
fn returning_id() -> Holdfast {
    let limits = Limits {
        slots: 5,
        adds: true,
        removes: true,
        changes: 4,
        log: 8,
        terms: 2,
        acquires: 0,
        lost: 1,
        recovery: true,
        ..Limits::formed(3)
    };
    let mut script = vec![Step::Stand(0), vote(0, 2), Step::Lead(0), Step::Add { leader: 0, slot: 3 }];
    script.extend([append(0, 2, 3), Step::Commit(0), append(0, 3, 3)]);
    script.extend([Step::Remove { leader: 0, id: 4 }, append(0, 2, 4), Step::Commit(0)]);
    script.extend([Step::Add { leader: 0, slot: 4 }, append(0, 2, 5), Step::Commit(0)]);
    script.extend([Step::Bind { from: 0, id: 4 }, append(0, 4, 5), Step::Promote { leader: 0, id: 4 }]);
    script.extend([append(0, 2, 6), append(0, 4, 6), Step::Commit(0)]);
    script.extend([Step::Finish(0), append(0, 2, 7), append(0, 4, 7), Step::Commit(0)]);
    Holdfast::new(limits).after(script)
}
