//! The types that openraft is configured with, and the one place where an entry is stamped.

use crate::boot_clock::boot_ms;
use crate::membership::naming::DiskIdentity;
use bytes::Bytes;
use holdfast_core::clock::ClusterClock;
use holdfast_core::command::Stamp;
use holdfast_core::outcome::Outcome;
use openraft::entry::{EntryPayload, RaftEntry};
use openraft::impls::leader_id_std;
use openraft::{Membership, RaftTypeConfig};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

pub type CommittedLeader = leader_id_std_committed::CommittedLeaderId;
mod leader_id_std_committed {
    use openraft::vote::RaftLeaderId;
    pub type CommittedLeaderId = <super::LeaderId as RaftLeaderId>::Committed;
}
pub type LeaderId = leader_id_std::LeaderId<u64, u64>;
pub type LogId = openraft::LogId<CommittedLeader>;
pub type Vote = openraft::impls::Vote<LeaderId>;
pub type Payload = EntryPayload<Proposed, u64, Member>;
pub type StoredMembership = openraft::StoredMembership<CommittedLeader, u64, Member>;
pub type SnapshotMeta = openraft::storage::SnapshotMeta<CommittedLeader, u64, Member>;

/// openraft's type configuration.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Ord, PartialOrd)]
pub struct TypeConfig;

impl RaftTypeConfig for TypeConfig {
    type D = Proposed;
    type R = Response;
    type NodeId = u64;
    type Node = Member;
    type Term = u64;
    type LeaderId = LeaderId;
    type Vote = Vote;
    type Payload = Payload;
    type Entry = LogEntry;
    type AsyncRuntime = openraft::impls::TokioRuntime;
    type Responder<T>
        = openraft::impls::OneshotResponder<Self, T>
    where
        T: openraft::OptionalSend + 'static;
    type Batch<T>
        = openraft::impls::InlineBatch<T>
    where
        T: openraft::OptionalSend + 'static;
    type ErrorSource = openraft::impls::BoxedErrorSource;
}

/// A member as the membership records it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Member {
    /// Peer address, `HOST:PORT`.
    pub peer_addr: String,
    /// The disk that the id belongs to. It never changes.
    pub identity: DiskIdentity,
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.peer_addr)
    }
}

/// What applying an entry answers to its proposer. `None` for blank and membership entries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response(pub Option<Applied>);

/// See [`Response`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied {
    pub outcome: Outcome,
    pub replayed: bool,
    pub cluster_time_ms: u64,
}

impl fmt::Display for Response {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// An encoded proposal on its way into the log, or in it.
#[derive(Clone)]
pub struct Proposed {
    /// [`holdfast_core::codec`] bytes of a [`holdfast_core::command::Proposal`].
    pub bytes: Bytes,
    /// Made by [`LogEntry::new`] on the leader, decoded everywhere else.
    pub stamp: Option<Stamp>,
    /// Present from the proposal until it is appended; the codec skips it.
    stamper: Option<Arc<Stamper>>,
    /// Only in the proposal that forms a cluster: where its time starts.
    anchor_ms: u64,
}

impl Proposed {
    /// A proposal that will be stamped when this node appends it.
    pub fn new(bytes: Bytes, stamper: Arc<Stamper>, anchor_ms: Option<u64>) -> Self {
        Self { bytes, stamp: None, stamper: Some(stamper), anchor_ms: anchor_ms.unwrap_or(0) }
    }

    /// What a decoder read.
    pub fn decoded(bytes: Bytes, stamp: Option<Stamp>) -> Self {
        Self { bytes, stamp, stamper: None, anchor_ms: 0 }
    }
}

impl fmt::Debug for Proposed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Proposed({} bytes, {:?})", self.bytes.len(), self.stamp)
    }
}

impl fmt::Display for Proposed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl PartialEq for Proposed {
    fn eq(&self, other: &Self) -> bool {
        self.bytes == other.bytes && self.stamp == other.stamp
    }
}

/// A log entry.
#[derive(Clone, Debug, PartialEq)]
pub struct LogEntry {
    pub log_id: LogId,
    pub payload: Payload,
}

impl fmt::Display for LogEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.log_id, self.payload)
    }
}

impl LogEntry {
    /// The stamp of an ordinary entry.
    pub fn stamp(&self) -> Option<Stamp> {
        match &self.payload {
            EntryPayload::Normal(proposed) => proposed.stamp,
            _ => None,
        }
    }
}

impl RaftEntry for LogEntry {
    type CommittedLeaderId = CommittedLeader;
    type Payload = Payload;

    /// openraft calls this on the leader alone, synchronously and in log order, when it appends a proposal
    /// (alpha.37, `engine/handler/leader_handler`), so this is where the entry gets its time: by the term in which it
    /// is appended, never by the one in which it was proposed. Blank and membership entries are never stamped, and
    /// decoders build the entry literally.
    fn new(log_id: LogId, mut payload: Payload) -> Self {
        if let EntryPayload::Normal(proposed) = &mut payload
            && let Some(stamper) = proposed.stamper.take()
        {
            proposed.stamp = Some(stamper.stamp(log_id.leader_id.term, proposed.anchor_ms));
        }
        Self { log_id, payload }
    }

    fn log_id_parts(&self) -> (&CommittedLeader, u64) {
        (&self.log_id.leader_id, self.log_id.index)
    }

    fn set_log_id(&mut self, new: LogId) {
        self.log_id = new;
    }

    fn get_membership(&self) -> Option<Membership<u64, Member>> {
        match &self.payload {
            EntryPayload::Membership(membership) => Some(membership.clone()),
            _ => None,
        }
    }
}

/// This node's cluster clock with what it reads: the thin IO around [`ClusterClock`].
#[derive(Default)]
pub struct Stamper {
    clock: Mutex<ClusterClock>,
    /// Stamp of the last stamped entry in the log, kept by the log store; 0 = none.
    pub last_in_log_ms: AtomicU64,
    /// Cluster time of the state, kept by the state machine.
    pub last_applied_ms: AtomicU64,
    /// Boot time at which this node last heard of a leader or was one with a quorum; 0 = never since the start.
    pub leader_heard_boot_ms: AtomicU64,
    /// The last term this node led, and how long it had heard of no leader when that term began.
    outage: Mutex<Option<(u64, Option<u64>)>>,
}

impl Stamper {
    fn stamp(&self, term: u64, anchor_ms: u64) -> Stamp {
        let now_ms = boot_ms();
        let logged =
            self.last_in_log_ms.load(Ordering::Acquire).max(self.last_applied_ms.load(Ordering::Acquire));
        let logged = if logged == 0 { anchor_ms } else { logged };
        let leaderless_ms = self.reign_began(term);
        let mut clock = self.clock.lock().unwrap_or_else(PoisonError::into_inner);
        clock.stamp(term, now_ms, logged, leaderless_ms)
    }

    /// This node leads `term`: how long it had heard of no leader when that began (`None` = not since its start). The
    /// first call of a term measures it, so it must come before the first [`Self::heard_of_leader`] of that term.
    pub fn reign_began(&self, term: u64) -> Option<u64> {
        let mut outage = self.outage.lock().unwrap_or_else(PoisonError::into_inner);
        match *outage {
            Some((known, leaderless_ms)) if known == term => leaderless_ms,
            _ => {
                let heard = self.leader_heard_boot_ms.load(Ordering::Acquire);
                let leaderless_ms = (heard != 0).then(|| boot_ms().saturating_sub(heard));
                *outage = Some((term, leaderless_ms));
                leaderless_ms
            }
        }
    }

    /// Cluster time now, while this node leads `term`.
    pub fn now_ms(&self, term: u64) -> Option<u64> {
        self.clock.lock().unwrap_or_else(PoisonError::into_inner).now_ms(term, boot_ms())
    }

    /// A leader was heard of, or this node leads with a quorum.
    pub fn heard_of_leader(&self) {
        self.leader_heard_boot_ms.store(boot_ms(), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(stamper: &Arc<Stamper>, term: u64) -> Stamp {
        let payload = Payload::Normal(Proposed::new(Bytes::new(), stamper.clone(), None));
        let log_id = LogId { leader_id: CommittedLeader::new(term), index: 1 };
        LogEntry::new(log_id, payload).stamp().unwrap()
    }

    #[test]
    fn a_leader_that_just_started_trusts_only_heartbeats_of_its_own_term_however_late_its_first_entry() {
        let stamper = Arc::new(Stamper::default());
        stamper.reign_began(3);
        // Being the leader counts as hearing of one, but not for the outage before.
        stamper.heard_of_leader();
        assert!(stamp(&stamper, 3).own_term_only);
        // A leader that follows at once trusts what was recorded before.
        assert!(!stamp(&stamper, 4).own_term_only);
    }

    #[test]
    fn the_term_of_the_append_stamps_a_proposal_not_the_one_of_the_proposal() {
        let stamper = Arc::new(Stamper::default());
        stamper.last_in_log_ms.store(5_000, Ordering::Release);
        let first = stamp(&stamper, 1);
        assert_eq!(first.cluster_time_ms, 5_000);
        let queued = Payload::Normal(Proposed::new(Bytes::new(), stamper.clone(), None));
        // Another leader reigned meanwhile; its log goes to 9 s, whatever the first reign's count would say.
        stamper.last_in_log_ms.store(9_000, Ordering::Release);
        let entry = LogEntry::new(LogId { leader_id: CommittedLeader::new(3), index: 2 }, queued);
        assert_eq!(entry.stamp().unwrap().cluster_time_ms, 9_000);
    }

    #[test]
    fn blank_and_membership_entries_are_not_stamped() {
        let log_id = LogId { leader_id: CommittedLeader::new(1), index: 1 };
        assert_eq!(LogEntry::new(log_id, Payload::Blank).stamp(), None);
        assert_eq!(LogEntry::new(log_id, Payload::Membership(Membership::default())).stamp(), None);
    }
}
