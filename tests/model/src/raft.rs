//! Raft: elections, appends and commits, as openraft does them, with the checks of the peers' hello in front.

use std::sync::Arc;

use crate::config::{Limits, Start, Variant};
use crate::state::{
    AppendAck, AppendRequest, Entry, Kind, MemberId, Naming, Process, Role, Slot, State, VoteAck,
};
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
            // A connection that was accepted before stays open: the identities of both processes are the
            // same.
            Hello::OtherIdentity | Hello::Removed if held => None,
            _ if held => return None,
            Hello::Welcome => None,
            Hello::Removed => {
                let mut next = state.clone();
                let sender = next.at_mut(from)?;
                sender.stopped = true;
                sender.role = Role::Follower;
                self.prune(&mut next);
                return Some((next, Reached::Refused));
            }
            Hello::Waiting | Hello::WrongReceiver if self.is(Variant::BelievesWrongHello) => {
                Some(node.identity)
            }
            Hello::Waiting
                if self.is(Variant::AnswersBindNoOne) && state.at(slot)?.identity == node.identity =>
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

    /// A member becomes a candidate, perhaps after a crash. A process that no membership it knows names as a
    /// voter never does.
    pub(crate) fn stand(&self, state: &State, slot: Slot) -> Option<State> {
        let process = state.at(slot)?;
        let id = process.naming?.id;
        let membership = process.effective()?;
        // As in openraft: a voter in the membership in force, or in the last that it knows to be committed.
        let may_stand = membership.votes(id)
            || process.applied_membership().is_some_and(|applied| applied.votes(id))
            || self.is(Variant::LearnersStand) && membership.node(id).is_some();
        let may = process.runs(slot) && !process.banned && process.term < self.limits.terms && may_stand;
        // The members of a cluster in which nothing has happened are alike: the first is the first to stand.
        let Limits { start, .. } = &self.limits;
        let alike =
            matches!(start, Start::Formed(_)) && state.lost == 0 && state.clusters[0].leaders.is_empty();
        if !may || (alike && slot != 0 && state.processes().all(|(_, p)| p.term == 0)) {
            return None;
        }
        let mut next = state.clone();
        let process = next.at_mut(slot)?;
        process.term += 1;
        process.voted = id;
        process.role = Role::Candidate;
        self.prune(&mut next);
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
        let ack = VoteAck { term: (naming.cluster, term), candidate: identity, id, identity: voter.identity };
        insert(&mut next.votes, ack);
        self.prune(&mut next);
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
        self.prune(&mut next);
        Some(next)
    }

    /// A leader sends the first `len` entries of its log to a member, which handles them at once.
    pub(crate) fn append(
        &self,
        state: &State,
        from: Slot,
        id: MemberId,
        len: u8,
        held: bool,
    ) -> Option<State> {
        let request = self.request(state, from, id, len)?;
        let (mut next, reached) = self.reach(state, from, id, held)?;
        if let Reached::Handles(slot) = reached {
            self.handle(&mut next, slot, &request)?;
        }
        (next != *state).then_some(next)
    }

    /// A leader sends its log to a member over a connection that was welcomed, and the request is late.
    pub(crate) fn send_late(&self, state: &State, from: Slot, id: MemberId) -> Option<State> {
        let (_, hello) = self.hello(state, from, id)?;
        if !self.limits.late_request || state.late.is_some() || hello != Hello::Welcome {
            return None;
        }
        let len = state.at(from)?.log.len() as u8;
        let mut next = state.clone();
        next.late = Some(Arc::new(self.request(state, from, id, len)?));
        Some(next)
    }

    /// The late request arrives, whatever has become of its sender. The connection leads to the disk that was
    /// asked.
    pub(crate) fn deliver_late(&self, state: &State) -> Option<State> {
        let request = state.late.as_ref()?;
        let (slot, _) = state.processes().find(|(slot, p)| {
            let named = p.naming.is_some_and(|n| (n.cluster, n.id) == (request.term.0, request.id));
            named && p.identity == request.identity && p.runs(*slot)
        })?;
        let mut next = state.clone();
        next.late = None;
        self.handle(&mut next, slot, request)?;
        Some(next)
    }

    fn request(&self, state: &State, from: Slot, id: MemberId, len: u8) -> Option<AppendRequest> {
        let leader = state.at(from)?;
        let naming = leader.naming?;
        if leader.role != Role::Leader || id == naming.id {
            return None;
        }
        let membership = leader.effective()?;
        let identity = membership.node(id)?.identity;
        // A learner gets committed entries only. Else its log could be ahead of the voters', and it would
        // refuse its vote to a candidate whose log already counts it as a voter.
        let ends = self.is(Variant::LearnersGetRestAtEnd)
            && state
                .processes()
                .any(|(_, p)| p.naming.is_some_and(|n| n.cluster == naming.cluster) && p.term > leader.term);
        let whole = membership.votes(id) || self.is(Variant::LearnersGetUncommitted) || ends;
        let len = if whole { len } else { len.min(leader.applied) };
        Some(AppendRequest {
            term: (naming.cluster, leader.term),
            leader: naming.id,
            id,
            identity,
            entries: leader.log.get(..usize::from(len))?.to_vec(),
            applied: leader.applied.min(len),
        })
    }

    /// A follower handles an append. Nothing happens if it knows a higher term.
    fn handle(&self, next: &mut State, slot: Slot, request: &AppendRequest) -> Option<()> {
        let follower = next.at_mut(slot)?;
        let (cluster, term) = request.term;
        if follower.term > term {
            return Some(());
        }
        follower.term = term;
        follower.voted = request.leader;
        follower.role = Role::Follower;
        let sent = &request.entries;
        let same = sent.iter().zip(&follower.log).take_while(|(a, b)| a.term == b.term).count();
        let mut truncates_applied = false;
        if same < sent.len() {
            truncates_applied = usize::from(follower.applied) > same;
            follower.log.truncate(same);
            follower.log.extend_from_slice(&sent[same..]);
            follower.applied = follower.applied.min(same as u8);
        }
        follower.applied = follower.applied.max(request.applied);
        let identity = follower.identity;
        let applied = follower.log[..usize::from(follower.applied)].to_vec();
        let acknowledged = &next.clusters[usize::from(cluster)].acknowledged;
        let agrees = applied.iter().zip(acknowledged).all(|(entry, (known, _))| entry == known);
        let ack = AppendAck { term: request.term, id: request.id, identity, len: sent.len() as u8 };
        match next.appended.iter_mut().find(|a| (a.term, a.id, a.identity) == (ack.term, ack.id, identity)) {
            Some(known) => known.len = known.len.max(ack.len),
            None => insert(&mut next.appended, ack),
        }
        self.check(next, !truncates_applied, Violation::TruncatedApplied);
        self.check(next, agrees, Violation::ReplicasDisagree);
        self.prune(next);
        Some(())
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
        self.prune(&mut next);
        Some(next)
    }
}

/// Inserts into a sorted set.
fn insert<T: Ord>(set: &mut Vec<T>, item: T) {
    if let Err(at) = set.binary_search(&item) {
        set.insert(at, item);
    }
}
