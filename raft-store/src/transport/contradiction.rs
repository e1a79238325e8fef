//! Whether a leader contradicts what this replica has committed. Pure.
//!
//! openraft compares nothing at or below its own commit index: it would keep its applied entries, put the tail of a log that
//! differs behind them, and acknowledge a log that it does not have. No leader within the fault model sends such entries; one
//! that was elected by members that had lost what they promised would.

use crate::types::LogId;

/// Whether a log that holds these ids (an append's previous one and its entries, in order) is another log than that of which
/// `committed` is the last committed entry here. By Raft's log matching one comparison at its index is enough; what ends
/// before it must not be of a later term.
pub fn contradicts(committed: Option<LogId>, ids: impl IntoIterator<Item = LogId>) -> bool {
    let Some(committed) = committed else { return false };
    let mut ids = ids.into_iter().take_while(|id| id.index <= committed.index);
    ids.any(|id| match id.index == committed.index {
        true => id != committed,
        false => id.leader_id.term > committed.leader_id.term,
    })
}

/// Whether a snapshot that ends there is of another log.
pub fn snapshot_contradicts(committed: Option<LogId>, last: Option<LogId>) -> bool {
    match (committed, last) {
        (Some(committed), Some(last)) if last.index >= committed.index => last < committed,
        (committed, Some(last)) => contradicts(committed, [last]),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::CommittedLeader;

    fn id(term: u64, index: u64) -> LogId {
        LogId { leader_id: CommittedLeader::new(term), index }
    }

    #[test]
    fn only_another_log_contradicts_what_is_committed() {
        let committed = Some(id(3, 10));
        for same in
            [&[id(3, 10), id(4, 11)][..], &[id(2, 8), id(3, 9), id(3, 10)], &[id(5, 20)], &[id(1, 3)], &[]]
        {
            assert!(!contradicts(committed, same.iter().copied()), "{same:?}");
        }
        for other in
            [&[id(4, 10)][..], &[id(2, 10)], &[id(2, 8), id(4, 9)], &[id(3, 9), id(4, 10), id(4, 11)]]
        {
            assert!(contradicts(committed, other.iter().copied()), "{other:?}");
        }
        assert!(!contradicts(None, [id(4, 10)]));
    }

    #[test]
    fn a_snapshot_of_another_log_contradicts_too() {
        let committed = Some(id(3, 10));
        for (last, contradicts) in [
            (id(3, 10), false),
            (id(4, 12), false),
            (id(2, 9), false),
            (id(2, 12), true),
            (id(2, 10), true),
            (id(4, 9), true),
        ] {
            assert_eq!(snapshot_contradicts(committed, Some(last)), contradicts, "{last:?}");
        }
    }
}
