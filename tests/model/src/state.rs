//! What a state of the model is: disks, their logs, the acknowledgements in flight, and the history that the
//! properties look at.

use std::sync::Arc;

use crate::Violation;

/// An address. There is one place for a process at each.
pub type Slot = u8;
/// A disk identity, drawn in ascending order so that equal histories give equal states. 0 is no identity.
pub type Identity = u8;
/// A member id, from 1. 0 is no member.
pub type MemberId = u8;
/// A cluster id: an index into [`State::clusters`].
pub type ClusterId = u8;

/// The most member ids that a log can name.
pub const IDS: usize = 7;

/// The set of members or slots with these numbers, as bits.
pub type Set = u8;

/// A member as a membership entry records it. `identity == 0`: there is no such member.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Node {
    /// Its recorded address.
    pub slot: Slot,
    /// Its recorded disk identity.
    pub identity: Identity,
}

/// The content of a membership entry: learners and voters, and during a joint change the voters before it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Membership {
    /// The member with id `i + 1`.
    pub nodes: [Node; IDS],
    /// Bit `id` is set for each voter.
    pub voters: Set,
    /// The voters before a change that is not finished; 0 when none is in progress.
    pub outgoing: Set,
    /// The largest id that was ever given to a member.
    pub used: MemberId,
}

impl Membership {
    /// The record of a member, unless there is none.
    pub fn node(&self, id: MemberId) -> Option<Node> {
        let node = *self.nodes.get(usize::from(id).checked_sub(1)?)?;
        (node.identity != 0).then_some(node)
    }

    /// Sets or removes (`Node::default()`) the record of a member.
    pub fn set(&mut self, id: MemberId, node: Node) {
        self.nodes[usize::from(id) - 1] = node;
    }

    /// All members, learners included.
    pub fn members(&self) -> impl Iterator<Item = (MemberId, Node)> + '_ {
        (1..=IDS as u8).filter_map(|id| Some((id, self.node(id)?)))
    }

    /// The id of the member with this disk.
    pub fn id_of(&self, identity: Identity) -> Option<MemberId> {
        self.members().find(|(_, node)| node.identity == identity).map(|(id, _)| id)
    }

    /// Whether this id votes, before or after the change in progress.
    pub fn votes(&self, id: MemberId) -> bool {
        (self.voters | self.outgoing) & bit(id) != 0
    }

    /// Whether the members that `has` accepts are a quorum: a majority before and after the change in
    /// progress.
    pub fn quorum(&self, mut has: impl FnMut(MemberId, Node) -> bool) -> bool {
        let mut yes: Set = 0;
        for (id, node) in self.members() {
            if self.votes(id) && has(id, node) {
                yes |= bit(id);
            }
        }
        let majority = |of: Set| (of & yes).count_ones() * 2 > of.count_ones();
        majority(self.voters) && (self.outgoing == 0 || majority(self.outgoing))
    }
}

/// The set that holds only this number.
pub fn bit(n: u8) -> Set {
    1 << n
}

/// What a log entry does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// The first entry of a new leader.
    Blank,
    /// A membership, in force from the moment that it is in the log.
    Membership(Membership),
    /// Acquires the one key. The number tells acquisitions apart; the token is the index of the entry.
    Acquire(u8),
    /// Frees the key that the acquisition with this number holds: its backend has ended or its lease has.
    Release(u8),
}

/// A log entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Entry {
    /// The term of the leader that appended it.
    pub term: u8,
    /// Its content.
    pub kind: Kind,
}

/// The durable record of a process that belongs to a cluster. Written once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Naming {
    /// The cluster.
    pub cluster: ClusterId,
    /// The id in it.
    pub id: MemberId,
    /// For a founder: the number of the `cluster init` command (from 1) and its coordinator's address.
    pub founding: Option<(u8, Slot)>,
}

/// What a process does in Raft at the moment. Lost with a crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Answers others.
    Follower,
    /// Asks for votes in its term.
    Candidate,
    /// Leads its term, as far as it knows.
    Leader,
}

/// The part of `cluster init` that its coordinator holds in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Asked {
    /// The number of the command, from 1.
    pub init: u8,
    /// The identity that each slot answered; 0: none yet.
    pub answers: [Identity; IDS],
    /// The slots that have acknowledged `Bind`.
    pub bound: Set,
}

/// A process and its disk.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Process {
    /// The identity in the log's database.
    pub identity: Identity,
    /// None: it waits.
    pub naming: Option<Naming>,
    /// The highest term that it knows.
    pub term: u8,
    /// The member that it voted for in this term, or that leads it; 0: none.
    pub voted: MemberId,
    /// The log from its first index.
    pub log: Vec<Entry>,
    /// How many entries are committed and applied.
    pub applied: u8,
    /// Lost with a crash.
    pub role: Role,
    /// An init that it coordinates. Lost with a crash.
    pub asked: Option<Asked>,
    /// Stopped for good, because a peer said that it was removed.
    pub stopped: bool,
    /// Only under the rule "a wiped member has a voting ban".
    pub banned: bool,
}

impl Process {
    /// A process with a new, empty disk.
    pub fn waiting(identity: Identity) -> Process {
        Process {
            identity,
            naming: None,
            term: 0,
            voted: 0,
            log: Vec::new(),
            applied: 0,
            role: Role::Follower,
            asked: None,
            stopped: false,
            banned: false,
        }
    }

    /// The last membership among the first `len` entries.
    fn membership_in(&self, len: usize) -> Option<(usize, &Membership)> {
        self.log[..len].iter().enumerate().rev().find_map(|(at, entry)| match &entry.kind {
            Kind::Membership(membership) => Some((at, membership)),
            _ => None,
        })
    }

    /// The membership in force: the last in the log, committed or not.
    pub fn effective(&self) -> Option<&Membership> {
        self.membership_in(self.log.len()).map(|(_, membership)| membership)
    }

    /// The last committed membership that it has applied.
    pub fn applied_membership(&self) -> Option<&Membership> {
        self.membership_in(usize::from(self.applied)).map(|(_, membership)| membership)
    }

    /// Whether the membership in force is committed and no joint change is unfinished.
    pub fn membership_settled(&self) -> bool {
        self.membership_in(self.log.len())
            .is_some_and(|(at, membership)| at < usize::from(self.applied) && membership.outgoing == 0)
    }

    /// The term and number of the last entry: what an election compares.
    pub fn last(&self) -> (u8, usize) {
        (self.log.last().map_or(0, |entry| entry.term), self.log.len())
    }

    /// Whether Raft runs: named, and not a coordinator whose init is unfinished.
    pub fn runs(&self, slot: Slot) -> bool {
        !self.stopped
            && self.naming.is_some_and(|naming| {
                !self.log.is_empty() || naming.founding.is_none_or(|(_, coordinator)| coordinator != slot)
            })
    }

    /// The number of the acquisition that holds the key after the first `len` entries.
    pub fn holder(&self, len: usize) -> Option<u8> {
        let mut holder = None;
        for entry in &self.log[..len] {
            apply_key(&mut holder, entry);
        }
        holder
    }
}

/// Applies an entry to the one key; answers whether it was an acquisition that succeeded.
pub fn apply_key(holder: &mut Option<u8>, entry: &Entry) -> bool {
    match entry.kind {
        Kind::Acquire(number) if holder.is_none() => {
            *holder = Some(number);
            true
        }
        Kind::Release(number) if *holder == Some(number) => {
            *holder = None;
            false
        }
        _ => false,
    }
}

/// A follower's answer to an append, in flight until its leader's term is over. A leader may count it at any
/// later moment, also after the follower has lost its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AppendAck {
    /// The cluster and term of the leader.
    pub term: (ClusterId, u8),
    /// The id under which the follower was asked.
    pub id: MemberId,
    /// The identity that it has.
    pub identity: Identity,
    /// How many entries it has in common with the leader.
    pub len: u8,
}

/// An append that was sent.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct AppendRequest {
    /// The cluster and term of the leader.
    pub term: (ClusterId, u8),
    /// The id of the leader.
    pub leader: MemberId,
    /// The id of the follower.
    pub id: MemberId,
    /// The disk of the follower that welcomed the connection.
    pub identity: Identity,
    /// The log of the leader, from its beginning.
    pub entries: Vec<Entry>,
    /// How many of them the leader has applied.
    pub applied: u8,
}

/// A granted vote, in flight until its candidate gives up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VoteAck {
    /// The cluster and term of the election.
    pub term: (ClusterId, u8),
    /// The identity of the candidate.
    pub candidate: Identity,
    /// The id under which the voter was asked.
    pub id: MemberId,
    /// The identity that the voter has.
    pub identity: Identity,
}

/// What has happened in a cluster, which no process knows in full.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Cluster {
    /// Added to the number of an entry to give its log index: a restore jumps.
    pub base: u8,
    /// The identity that led each term; 0: none.
    pub leaders: Vec<Identity>,
    /// What any leader has committed, and the term of that leader.
    pub acknowledged: Vec<(Entry, u8)>,
    /// A restored cluster acquires nothing before every older lease has ended.
    pub quarantine: bool,
}

/// One state of the world.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct State {
    /// The process at each address, or none.
    pub slots: Vec<Option<Arc<Process>>>,
    /// Sorted.
    pub appended: Vec<AppendAck>,
    /// Sorted.
    pub votes: Vec<VoteAck>,
    /// An append that is still in flight. All others are handled when they are sent.
    pub late: Option<Arc<AppendRequest>>,
    /// What happened in each cluster id that was drawn.
    pub clusters: Vec<Arc<Cluster>>,
    /// The acquisitions that any leader has applied: their backends may run.
    pub granted: Set,
    /// The acquisitions whose lease is over.
    pub ended: Set,
    /// The largest token among them.
    pub last_token: u8,
    /// Acquisitions proposed so far.
    pub acquires: u8,
    /// Disks lost so far.
    pub lost: u8,
    /// Membership changes proposed so far.
    pub changes: u8,
    /// The next identity to draw.
    pub next_identity: Identity,
    /// What has gone wrong. Such a state has no successors.
    pub violations: Vec<Violation>,
}

impl State {
    /// The process at an address.
    pub fn at(&self, slot: Slot) -> Option<&Process> {
        self.slots.get(usize::from(slot))?.as_deref()
    }

    /// The process at an address that must have one, for a change.
    pub fn at_mut(&mut self, slot: Slot) -> Option<&mut Process> {
        self.slots.get_mut(usize::from(slot))?.as_mut().map(Arc::make_mut)
    }

    /// All processes with their addresses.
    pub fn processes(&self) -> impl Iterator<Item = (Slot, &Process)> {
        self.slots.iter().enumerate().filter_map(|(slot, process)| Some((slot as Slot, process.as_deref()?)))
    }

    /// Notes a violation once.
    pub fn violate(&mut self, violation: Violation) {
        if !self.violations.contains(&violation) {
            self.violations.push(violation);
            self.violations.sort();
        }
    }

    /// Draws a disk identity.
    pub fn draw_identity(&mut self) -> Identity {
        self.next_identity += 1;
        self.next_identity - 1
    }

    /// Forgets answers that no process can use any more, so that states which behave alike are equal. Only a
    /// promotion looks at answers of a member that has no more than its leader has applied.
    pub fn prune(&mut self, promotions: bool) {
        let State { slots, appended, votes, .. } = self;
        let processes = || slots.iter().flatten().filter_map(|p| Some((p, p.naming?.cluster)));
        appended.retain(|ack| {
            processes().any(|(p, cluster)| {
                p.role == Role::Leader
                    && (cluster, p.term) == ack.term
                    && (ack.len > p.applied || promotions && ack.len == p.applied)
            })
        });
        votes.retain(|ack| {
            processes().any(|(p, cluster)| {
                p.role == Role::Candidate && (cluster, p.term) == ack.term && p.identity == ack.candidate
            })
        });
    }
}
