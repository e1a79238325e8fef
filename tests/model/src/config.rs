//! The bounds of a run, the rules that a variant breaks, and the steps.

use crate::state::{ClusterId, MemberId, Slot};

/// A rule of the protocol that is replaced by a worse one, to see that the checker notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Variant {
    /// A wiped member keeps its id. It does not vote, but it accepts entries.
    WipedKeepsId,
    /// Every founder writes the initial membership by itself once it has seen the others.
    EveryoneInitialises,
    /// A process that answers an init notes nothing.
    AnswersBindNoOne,
    /// The identity is in a file beside the log: the log can be lost alone.
    IdentityBesideLog,
    /// A change of address records the identity that answers there, and names that process in the same dial.
    MoveTakesDialedIdentity,
    /// A change of address records the identity that answers there. That process is named after the commit.
    MoveTakesDialedIdentityBindsCommitted,
    /// A receiver that is named wrongly becomes what it is called.
    BelievesWrongHello,
    /// A leader names a waiting process for a membership entry that is not yet committed.
    BindsUncommitted,
    /// Sender checks compare with the membership in force, committed or not, instead of the applied one.
    ComparesUncommitted,
    /// An id counts as used as soon as any entry in the log names it, committed or not.
    UsedByUncommitted,
    /// A leader sends learners entries that are not yet committed, as openraft does.
    LearnersGetUncommitted,
    /// A learner gets what waits for the commit as soon as its leader may learn that it leads no more: the
    /// connection ends, and nothing is held back at its end.
    LearnersGetRestAtEnd,
    /// A learner is made a voter whether or not the present voters answer.
    PromotesWhileVotersAreSilent,
    /// A learner may stand for election. Its own vote does not count.
    LearnersStand,
    /// The next id is one more than the largest id in the membership, so that the id of a removed member
    /// returns.
    ReusesIds,
    /// A restored cluster acquires keys at once.
    RestoreWithoutQuarantine,
    /// A restored cluster counts its log from the place of the backup.
    RestoreWithoutJump,
}

/// How a run begins.
#[derive(Clone, Debug)]
pub enum Start {
    /// The first `n` addresses form a cluster whose initial membership everyone has applied.
    Formed(u8),
    /// The coordinator (the first address) has written the initial membership; the other founders are bound.
    Initialised(u8),
    /// All processes wait. Each `cluster init` that the operators may give: its coordinator and its list.
    Waiting(Vec<(Slot, Vec<Slot>)>),
}

/// The bounds of a run.
#[derive(Clone, Debug)]
pub struct Limits {
    /// How the run begins.
    pub start: Start,
    /// How many addresses there are; those outside of the cluster have a waiting process.
    pub slots: u8,
    /// The highest term.
    pub terms: u8,
    /// The longest log.
    pub log: u8,
    /// How many acquisitions are proposed.
    pub acquires: u8,
    /// Whether keys are released, and leases end.
    pub releases: bool,
    /// How many disks are lost.
    pub lost: u8,
    /// How many membership changes are proposed.
    pub changes: u8,
    /// Which changes: additions (and promotions).
    pub adds: bool,
    /// Removals.
    pub removes: bool,
    /// Changes of address.
    pub moves: bool,
    /// How many restores there are.
    pub restores: u8,
    /// An append carries any number of entries instead of all that the leader has.
    pub partial_appends: bool,
    /// Whether one append at a time may be in flight, and arrive when its sender leads no more or has lost
    /// its disk.
    pub late_request: bool,
    /// Whether "a majority of good disks serves in the end" is checked in every state.
    pub recovery: bool,
    /// Whether states that differ in the numbers of the founders alone count as one. The steps of a
    /// counterexample then name members by changing numbers.
    pub symmetry: bool,
}

impl Limits {
    /// `members` members that form a cluster, two leader changes, two acquisitions, and no more.
    pub fn formed(members: u8) -> Limits {
        Limits {
            start: Start::Formed(members),
            slots: members,
            terms: 3,
            log: 4,
            acquires: 2,
            releases: false,
            lost: 0,
            changes: 0,
            adds: false,
            removes: false,
            moves: false,
            restores: 0,
            partial_appends: false,
            late_request: false,
            recovery: false,
            symmetry: false,
        }
    }
}

/// One step of one process, of a pair of processes, of an operator or of fate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(
    missing_docs,
    reason = "the fields name the addresses and ids that the variant's sentence speaks of"
)]
pub enum Step {
    /// The coordinator of an init dies and starts again from its disk.
    Crash(Slot),
    /// The disk at this address is lost; a new process waits there.
    Lose(Slot),
    /// The process becomes a candidate in the next term, perhaps after a crash.
    Stand(Slot),
    /// A candidate asks a voter, whose answer is in flight afterwards. `held`: over a connection that was
    /// accepted before the receiver had reason to refuse the sender.
    AskVote { from: Slot, id: MemberId, held: bool },
    /// A candidate counts a quorum of votes.
    Lead(Slot),
    /// A leader sends the first `len` entries of its log; the answer is in flight afterwards.
    Append { from: Slot, id: MemberId, len: u8, held: bool },
    /// A leader sends its log to a member, and the request stays in flight.
    SendLate { from: Slot, id: MemberId },
    /// The request that stayed in flight arrives.
    DeliverLate,
    /// A leader counts answers, and commits and applies all that it can.
    Commit(Slot),
    /// A leader proposes an acquisition.
    Acquire(Slot),
    /// The backend of an acquisition has ended, or its lease is over.
    LeaseEnds(u8),
    /// A leader proposes to free the key whose lease is over.
    Release(Slot),
    /// `cluster add`: a leader proposes the process at an address as a learner.
    Add { leader: Slot, slot: Slot },
    /// A leader names a waiting process that its membership records.
    Bind { from: Slot, id: MemberId },
    /// A leader proposes that a learner votes.
    Promote { leader: Slot, id: MemberId },
    /// `cluster remove`.
    Remove { leader: Slot, id: MemberId },
    /// A leader ends a joint change.
    Finish(Slot),
    /// An operator restarts a member at another address; a new process waits at the old one.
    Relocate { from: Slot, to: Slot },
    /// `cluster move`.
    Move { leader: Slot, id: MemberId, slot: Slot },
    /// The coordinator of the init with this number asks an address for its identity.
    Ask { init: u8, slot: Slot },
    /// The coordinator names itself.
    Name { init: u8 },
    /// The coordinator binds a founder.
    BindFounder { init: u8, slot: Slot },
    /// The coordinator writes the initial membership.
    Initialise { init: u8 },
    /// Only if everyone initialises: a founder does.
    InitialiseSelf(Slot),
    /// The majority of the disks is lost: a waiting process becomes the first member of a new cluster.
    Restore(Slot),
    /// The longest possible lease of the old cluster is over.
    QuarantineEnds(ClusterId),
}
