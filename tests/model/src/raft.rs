//! Raft: elections, appends and commits, as openraft does them, with the checks of the peers' hello in front.

use crate::config::{Limits, Start, Variant};
use crate::state::{AppendAck, Entry, Kind, MemberId, Naming, Process, Role, Slot, State, VoteAck};
use crate::{Holdfast, Violation};

/// What a receiver answers to the hello of a peer connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hello {
    /// Messages are handled.
    Welcome,
    /// Raft does not run there.
    Unreachable,
    /// It waits.
    Waiting,
    /// It belongs to another cluster.
    OtherCluster,
    /// It is not the member that the sender wants.
    WrongReceiver,
    /// It knows another disk as the sender's.
    OtherIdentity,
    /// It knows that the sender was removed. The sender stops for good.
    Removed,
}

/// What a connection attempt leads to.
enum Reached {
    /// The process at this address handles the message.
    Handles(Slot),
    /// It does not, but something changed.
    Refused,
}

impl Holdfast {
    /// The answer of the process at the recorded address of member `id` to a hello of the process at `from`.
    pub fn hello(&self, state: &State, from: Slot, id: MemberId) -> Option<(Slot, Hello)> {
        let sender = state.at(from)?;
        let naming = sender.naming?;
        let node = sender.effective()?.node(id)?;
        let receiver = state.at(node.slot)?;
        let Some(own) = receiver.naming else { return Some((node.slot, Hello::Waiting)) };
        let answer = if !receiver.runs(node.slot) {
            Hello::Unreachable
        } else if own.cluster != naming.cluster {
            Hello::OtherCluster
        } else if own.id != id || receiver.identity != node.identity {
            Hello::WrongReceiver
        } else {
            self.sender_check(receiver, naming.id, sender)
        };
        Some((node.slot, answer))
    }

    /// Whether the receiver refuses this sender.
    fn sender_check(&self, receiver: &Process, id: MemberId, sender: &Process) -> Hello {
        let applied = receiver.applied_membership();
        let effective = receiver.effective();
        let compared = if self.is(Variant::ComparesUncommitted) { effective } else { applied };
        if compared.and_then(|m| m.node(id)).is_some_and(|node| node.identity != sender.identity) {
            return Hello::OtherIdentity;
        }
        let used = if self.is(Variant::UsedByUncommitted) { effective } else { applied };
        let used = used.is_some_and(|m| id <= m.used);
        match applied {
            Some(membership) if used && membership.node(id).is_none() => Hello::Removed,
            _ => Hello::Welcome,
        }
    }

    /// Opens a connection to member `id`, or uses one that was accepted earlier (`held`).
    fn reach(&self, state: &State, from: Slot, id: MemberId, held: bool) -> Option<(State, Reached)> {
        let (slot, hello) = self.hello(state, from, id)?;
        let sender = state.at(from)?;
        let (naming, node) = (sender.naming?, sender.effective()?.node(id)?);
        let adopts = match hello {
            // A connection that was accepted before stays open: the identities of both processes are the same.
            Hello::OtherIdentity | Hello::Removed if held => None,
            _ if held => return None,
            Hello::Welcome => None,
            Hello::Removed => {
                let mut next = state.clone();
                let sender = next.at_mut(from)?;
                sender.stopped = true;
                sender.role = Role::Follower;
                next.prune();
                return Some((next, Reached::Refused));
            }
            Hello::Waiting | Hello::WrongReceiver if self.is(Variant::BelievesWrongHello) => Some(node.identity),
            Hello::Waiting
                if self.is(Variant::AnswersBindNobody) && state.at(slot)?.identity == node.identity =>
            {
                Some(node.identity)
            }
            _ => return None,
        };
        let mut next = state.clone();
        if let Some(identity) = adopts {
            let receiver = next.at_mut(slot)?;
            receiver.identity = identity;
            receiver.naming = Some(Naming { cluster: naming.cluster, id, founding: None });
        }
        Some((next, Reached::Handles(slot)))
    }

    /// A member becomes a candidate. A process that no membership it knows names as a voter never does.
    pub(crate) fn stand(&self, state: &State, slot: Slot) -> Option<State> {
        let process = state.at(slot)?;
        let id = process.naming?.id;
        let may = process.runs(slot)
            && !process.banned
            && process.role != Role::Leader
            && process.term < self.limits.terms
            && process.effective()?.votes(id);
        // The members of a cluster in which nothing has happened are alike: the first is the first to stand.
        let Limits { start, .. } = &self.limits;
        let alike = matches!(start, Start::Formed(_)) && state.lost == 0 && state.clusters[0].leaders.is_empty();
        if !may || (alike && slot != 0 && state.processes().all(|(_, p)| p.term == 0)) {
            return None;
        }
        let mut next = state.clone();
        let process = next.at_mut(slot)?;
        process.term += 1;
        process.voted = id;
        process.role = Role::Candidate;
        next.prune();
        Some(next)
    }

    /// A candidate asks a voter. The vote is durable before its answer is in flight.
    pub(crate) fn ask_vote(&self, state: &State, from: Slot, id: MemberId, held: bool) -> Option<State> {
        let candidate = state.at(from)?;
        let naming = candidate.naming?;
        if candidate.role != Role::Candidate || id == naming.id || !candidate.effective()?.votes(id) {
            return None;
        }
        let (term, last, identity) = (candidate.term, candidate.last(), candidate.identity);
        let (mut next, reached) = self.reach(state, from, id, held)?;
        let Reached::Handles(slot) = reached else { return Some(next) };
        let voter = next.at_mut(slot)?;
        let granted = !voter.banned
            && (term > voter.term || term == voter.term && [0, naming.id].contains(&voter.voted))
            && last >= voter.last();
        if !granted {
            return (next != *state).then_some(next);
        }
        if voter.term < term {
            voter.role = Role::Follower;
        }
        voter.term = term;
        voter.voted = naming.id;
        let ack =
            VoteAck { term: (naming.cluster, term), candidate: identity, id, identity: voter.identity };
        insert(&mut next.votes, ack);
        next.prune();
        Some(next)
    }

    /// A candidate that has a quorum of votes leads, and appends the first entry of its term.
    pub(crate) fn lead(&self, state: &State, slot: Slot) -> Option<State> {
        let candidate = state.at(slot)?;
        let naming = candidate.naming?;
        let term = (naming.cluster, candidate.term);
        if candidate.role != Role::Candidate || candidate.log.len() >= usize::from(self.limits.log) {
            return None;
        }
        let elected = candidate.effective()?.quorum(|id, node| {
            id == naming.id
                || state.votes.iter().any(|ack| {
                    ack.term == term
                        && ack.candidate == candidate.identity
                        && (ack.id, ack.identity) == (id, node.identity)
                })
        });
        if !elected {
            return None;
        }
        let mut next = state.clone();
        let leader = next.at_mut(slot)?;
        leader.role = Role::Leader;
        leader.log.push(Entry { term: term.1, kind: Kind::Blank });
        let (identity, log) = (leader.identity, leader.log.clone());
        let cluster = self.cluster_mut(&mut next, naming.cluster)?;
        let leaders = &mut cluster.leaders;
        leaders.resize(leaders.len().max(usize::from(term.1) + 1), 0);
        let second = std::mem::replace(&mut leaders[usize::from(term.1)], identity) != 0;
        let lost = cluster
            .acknowledged
            .iter()
            .enumerate()
            .any(|(at, (entry, committed_in))| *committed_in < term.1 && log.get(at) != Some(entry));
        self.check(&mut next, !second, Violation::TwoLeaders);
        self.check(&mut next, !lost, Violation::AcknowledgedLost);
        next.prune();
        Some(next)
    }

    /// A leader sends the first `len` entries of its log to a member.
    pub(crate) fn append(&self, state: &State, from: Slot, id: MemberId, len: u8, held: bool) -> Option<State> {
        let leader = state.at(from)?;
        let naming = leader.naming?;
        if leader.role != Role::Leader || id == naming.id || usize::from(len) > leader.log.len() {
            return None;
        }
        leader.effective()?.node(id)?;
        let (mut next, reached) = self.reach(state, from, id, held)?;
        let Reached::Handles(slot) = reached else { return Some(next) };
        let sent = &leader.log[..usize::from(len)];
        let follower = next.at_mut(slot)?;
        if follower.term > leader.term {
            return (next != *state).then_some(next);
        }
        follower.term = leader.term;
        follower.voted = naming.id;
        follower.role = Role::Follower;
        let same = sent.iter().zip(&follower.log).take_while(|(a, b)| a.term == b.term).count();
        let mut truncates_applied = false;
        if same < sent.len() {
            truncates_applied = usize::from(follower.applied) > same;
            follower.log.truncate(same);
            follower.log.extend_from_slice(&sent[same..]);
            follower.applied = follower.applied.min(same as u8);
        }
        follower.applied = follower.applied.max(leader.applied.min(len));
        let identity = follower.identity;
        let applied = follower.log[..usize::from(follower.applied)].to_vec();
        let acknowledged = &state.clusters[usize::from(naming.cluster)].acknowledged;
        let agrees = applied.iter().zip(acknowledged).all(|(entry, (known, _))| entry == known);
        let term = (naming.cluster, leader.term);
        match next.appended.iter_mut().find(|a| (a.term, a.id, a.identity) == (term, id, identity)) {
            Some(ack) => ack.len = ack.len.max(len),
            None => insert(&mut next.appended, AppendAck { term, id, identity, len }),
        }
        self.check(&mut next, !truncates_applied, Violation::TruncatedApplied);
        self.check(&mut next, agrees, Violation::ReplicasDisagree);
        next.prune();
        Some(next)
    }

    /// A leader commits the last entry of its term that a quorum has, and applies all up to it.
    pub(crate) fn commit(&self, state: &State, slot: Slot) -> Option<State> {
        let leader = state.at(slot)?;
        if leader.role != Role::Leader {
            return None;
        }
        let naming = leader.naming?;
        let membership = leader.effective()?;
        let has = |len: usize| {
            membership.quorum(|id, node| {
                id == naming.id
                    || state.appended.iter().any(|ack| {
                        ack.term == (naming.cluster, leader.term)
                            && (ack.id, ack.identity) == (id, node.identity)
                            && usize::from(ack.len) >= len
                    })
            })
        };
        let len = (usize::from(leader.applied) + 1..=leader.log.len())
            .rev()
            .take_while(|len| leader.log[*len - 1].term == leader.term)
            .find(|len| has(*len))?;
        let mut next = state.clone();
        next.at_mut(slot)?.applied = len as u8;
        let cluster = self.cluster_mut(&mut next, naming.cluster)?;
        let mut lost = false;
        for (at, entry) in leader.log[..len].iter().enumerate() {
            match cluster.acknowledged.get(at) {
                Some((known, _)) => lost |= known != entry,
                None => cluster.acknowledged.push((*entry, leader.term)),
            }
        }
        self.check(&mut next, !lost, Violation::AcknowledgedLost);
        self.check_formed(&mut next, naming.cluster);
        self.grant(&mut next, leader, len);
        next.prune();
        Some(next)
    }
}

/// Inserts into a sorted set.
fn insert<T: Ord>(set: &mut Vec<T>, item: T) {
    if let Err(at) = set.binary_search(&item) {
        set.insert(at, item);
    }
}
