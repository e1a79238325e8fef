//! Numbers about a replica, for its controller's `/metrics` and `/ctrl/ready`.

use crate::api::ChecksumStatus;
use crate::gauge::DiskTimes;
use crate::store::Store;
use crate::transport::Problem;
use openraft::async_runtime::watch::WatchReceiver;

/// What a replica can say about itself at any moment, without asking the disk or anybody else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreMetrics {
    /// Whether this replica leads.
    pub is_leader: bool,
    /// The leader's id, if known.
    pub leader: Option<u64>,
    /// Current term.
    pub term: u64,
    /// Last log index here.
    pub last_log: u64,
    /// Last applied index here.
    pub applied: u64,
    /// Index of the last snapshot here.
    pub snapshot: u64,
    /// Up to where the log is purged.
    pub purged: u64,
    /// Free bytes of the data directory's file system; none if they can't be asked for.
    pub disk_free_bytes: Option<u64>,
    /// Bytes to keep free.
    pub disk_reserve_bytes: u64,
    /// Whether less than the reserve is free.
    pub disk_full: bool,
    /// Whether a write has been waiting for the disk for too long.
    pub disk_stuck: bool,
    /// Syncs of the log: one for each batch of votes, entries, truncations and purges.
    pub log_syncs: DiskTimes,
    /// Commits of applied entries to the state, which are not synced.
    pub state_commits: DiskTimes,
    /// How the replicas' checksums compare.
    pub checksums: ChecksumStatus,
    /// Why this replica must not lead, if so.
    pub unfit: Option<String>,
    /// Why it has failed for good, if so.
    pub failed: Option<String>,
}

impl Store {
    /// See [`StoreMetrics`].
    pub fn metrics(&self) -> StoreMetrics {
        let inner = &self.inner;
        let status = self.status();
        let unfit = inner.disk.unfit();
        StoreMetrics {
            is_leader: status.is_leader,
            leader: status.leader.map(|leader| leader.id),
            term: status.term,
            last_log: status.last_log,
            applied: status.applied,
            snapshot: status.snapshot,
            purged: inner.raft.metrics().borrow_watched().purged.map_or(0, |at| at.index),
            disk_free_bytes: inner.disk.free_bytes(),
            disk_reserve_bytes: inner.config.disk_reserve_bytes,
            disk_full: matches!(unfit, Some(crate::disk::Unfit::Full { .. })),
            disk_stuck: matches!(unfit, Some(crate::disk::Unfit::Stuck { .. })),
            log_syncs: inner.log.gauge().times(),
            state_commits: inner.state.gauge().times(),
            checksums: status.checksums,
            unfit: unfit.map(|why| why.to_string()),
            failed: inner.failed.borrow().clone(),
        }
    }

    /// Why this replica is not ready, as far as it knows without asking anybody: it has failed, or its disk is full or
    /// stuck, or it was named and has heard nothing since.
    pub fn not_ready(&self) -> Option<String> {
        let failed = self.inner.failed.borrow().clone();
        failed.or_else(|| self.inner.disk.unfit().map(|why| why.to_string())).or_else(|| self.not_heard_yet())
    }

    /// Why this member can find no majority, and what to do, if what it has met of its peers says so.
    /// For one whose read no majority has confirmed: what it remembers of a leader may be long out of date.
    pub fn no_majority(&self) -> Option<String> {
        let status = self.status();
        let problems: Vec<(u64, Problem)> = status
            .members
            .iter()
            .filter(|member| member.voter)
            .filter_map(|member| Some((member.id, self.inner.directory.problem(member.id)?)))
            .collect();
        let voters = status.members.iter().filter(|member| member.voter).count();
        why_no_majority(voters, &problems)
    }
}

/// Pure. `problems` are those of voters.
fn why_no_majority(voters: usize, problems: &[(u64, Problem)]) -> Option<String> {
    if voters - problems.len() > voters / 2 {
        return None;
    }
    if let Some(lost) = lost_majority(voters, problems.iter().map(|(_, problem)| problem)) {
        return Some(lost);
    }
    let each: Vec<String> = problems.iter().map(|(id, problem)| format!("member {id}: {problem}")).collect();
    Some(format!("no majority of the {voters} voters can be talked to ({})", each.join("; ")))
}

/// What to do when a majority of the disks is lost, if it is. Pure.
pub(crate) fn lost_majority<'a>(
    voters: usize,
    problems: impl Iterator<Item = &'a Problem>,
) -> Option<String> {
    let lost = problems.filter(|problem| **problem == Problem::LostDisk).count();
    (lost > 0 && voters - lost <= voters / 2).then(|| {
        format!(
            "{lost} of {voters} voters have lost their disks, so that what a majority had acknowledged may be gone: restore a \
             backup into a new cluster of one, and add the others with empty data directories"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_majority_says_to_restore_and_a_refused_member_says_why() {
        let lost = |id| (id, Problem::LostDisk);
        let refuses = |id| (id, Problem::Refuses("b:1 refused us: it belongs to cluster d".into()));
        assert_eq!(why_no_majority(3, &[lost(2)]), None);
        assert!(why_no_majority(3, &[lost(2), lost(3)]).is_some_and(|why| why.contains("restore a backup")));
        let both = why_no_majority(3, &[lost(2), refuses(3)]).unwrap();
        assert!(both.contains("member 2: lost disk") && both.contains("member 3: b:1 refused us"), "{both}");
        assert!(why_no_majority(5, &[lost(2), lost(3)]).is_none());
    }
}
