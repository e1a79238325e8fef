//! Who belongs to the cluster and where, as the peer transport needs it.

use super::naming::DiskIdentity;
use crate::types::{Member, StoredMembership};
use holdfast_core::records::MemberIdsRecord;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// How long connections of a removed member stay, so that what it has in flight is answered.
const GONE_GRACE: Duration = Duration::from_millis(500);

/// The applied membership, and every id that was ever in one: both of the same applied entry.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct AppliedMembers {
    /// Ids that were ever used.
    pub used: MemberIdsRecord,
    /// Disk of each member.
    pub members: BTreeMap<u64, DiskIdentity>,
}

impl AppliedMembers {
    /// Whether that member was removed.
    pub fn is_gone(&self, id: u64) -> bool {
        self.used.contains(id) && !self.members.contains_key(&id)
    }
}

/// Who belongs to the cluster and where, as the peer transport needs it.
#[derive(Debug)]
pub struct Standing {
    /// By the membership in force, be it committed or not.
    members: Mutex<BTreeMap<u64, Member>>,
    /// Those of them that do not vote.
    learners: Mutex<BTreeSet<u64>>,
    /// Told by the thread that applies.
    applied: watch::Sender<AppliedMembers>,
    dismissed: watch::Sender<bool>,
    /// The learner that this leader does not make a voter yet, and why.
    awaits: Mutex<Option<(u64, String)>>,
    /// Log index of the membership in force.
    index: AtomicU64,
    /// Whether this member led when it looked last.
    leads: AtomicBool,
}

impl Standing {
    /// What the peer transport knows at the start. `applied` is told by the thread that applies.
    pub fn new(applied: watch::Sender<AppliedMembers>) -> Self {
        Self {
            members: Mutex::default(),
            learners: Mutex::default(),
            applied,
            dismissed: watch::Sender::new(false),
            awaits: Mutex::default(),
            leads: AtomicBool::new(false),
            index: AtomicU64::new(0),
        }
    }

    /// Sets the membership in force.
    pub fn set_in_force(&self, stored: &StoredMembership) {
        let members = stored.membership().nodes().map(|(id, node)| (*id, node.clone())).collect();
        *self.members.lock().unwrap_or_else(PoisonError::into_inner) = members;
        let learners = stored.membership().learner_ids().collect();
        *self.learners.lock().unwrap_or_else(PoisonError::into_inner) = learners;
        self.index.store(stored.log_id().map_or(0, |at| at.index), Ordering::Relaxed);
    }

    /// Notes the learner that this leader does not make a voter yet, and why.
    pub fn set_awaits(&self, awaits: Option<(u64, String)>) {
        *self.awaits.lock().unwrap_or_else(PoisonError::into_inner) = awaits;
    }

    /// Why this leader does not make that learner a voter yet.
    pub fn awaits(&self, id: u64) -> Option<String> {
        let awaits = self.awaits.lock().unwrap_or_else(PoisonError::into_inner);
        awaits.as_ref().filter(|(learner, _)| *learner == id).map(|(_, why)| why.clone())
    }

    /// Notes whether this member leads.
    pub fn set_leads(&self, leads: bool) {
        self.leads.store(leads, Ordering::Relaxed);
    }

    /// Whether this member led a moment ago.
    pub fn leads(&self) -> bool {
        self.leads.load(Ordering::Relaxed)
    }

    /// Log index of the membership in force.
    pub fn index(&self) -> u64 {
        self.index.load(Ordering::Relaxed)
    }

    /// Changes when the applied membership does.
    pub fn applied_changes(&self) -> watch::Receiver<AppliedMembers> {
        self.applied.subscribe()
    }

    /// Address and disk of a member, by the membership in force.
    pub fn member(&self, id: u64) -> Option<Member> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    /// Whether a member votes, by the membership in force.
    pub fn is_voter(&self, id: u64) -> bool {
        !self.learners.lock().unwrap_or_else(PoisonError::into_inner).contains(&id)
    }

    /// The disk of a member, by the membership that is applied here, and so committed.
    pub fn committed_identity(&self, id: u64) -> Option<DiskIdentity> {
        self.applied.borrow().members.get(&id).copied()
    }

    /// Whether that member was removed, as far as this node has applied the log.
    pub fn is_gone(&self, id: u64) -> bool {
        self.applied.borrow().is_gone(id)
    }

    /// Resolves a little after that member was removed.
    pub async fn until_gone(&self, id: u64) {
        let mut applied = self.applied.subscribe();
        if applied.wait_for(|applied| applied.is_gone(id)).await.is_err() {
            // The sender lives as long as this.
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(GONE_GRACE).await;
    }

    /// A peer of the same cluster says that this member was removed.
    pub fn dismiss(&self) {
        if self.dismissed.send_if_modified(|dismissed| !std::mem::replace(dismissed, true)) {
            tracing::error!(
                "this member was removed from the cluster and serves no one any more; its data can be deleted"
            );
        }
    }

    /// Whether this member was removed.
    pub fn dismissed(&self) -> bool {
        *self.dismissed.borrow()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_used_id_outside_the_membership_is_gone() {
        let mut gone = AppliedMembers::default();
        (1..=4).for_each(|id| gone.used.insert(id));
        gone.members = [1, 2, 4].map(|id| (id, DiskIdentity::default())).into();
        assert!(gone.is_gone(3));
        assert!(!gone.is_gone(4) && !gone.is_gone(5));
    }
}
