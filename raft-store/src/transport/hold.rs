//! Which appends may wait for a moment.
//!
//! openraft sends an append without entries whenever the commit index moves and no entry is there to carry it: for a lone
//! entry as many messages as for two. Such a message is held for [`COMMIT_HOLD`], because the next entry usually comes
//! within that and brings the commit index along; then the held one is left out. Its answer is not missed: the answer to
//! the entry's says more. Whoever waits on the follower for what it commits has it sent at once (`Directory::hurry`).
//!
//! Nothing else waits: not an entry, not a probe, not the first message of a connection.

use crate::types::{LogId, TypeConfig};
use openraft::raft::AppendEntriesRequest;
use std::time::Duration;

/// Longest time that a newer commit index alone is kept from a follower. The timer rounds it up to whole milliseconds.
pub const COMMIT_HOLD: Duration = Duration::from_millis(1);

type Request = AppendEntriesRequest<TypeConfig>;

/// What was sent on one connection, and what is held back. See the module.
#[derive(Default)]
pub struct Hold {
    /// Last entry and commit index that the follower was told of.
    sent: Option<(Option<LogId>, Option<LogId>)>,
    held: Option<Request>,
}

impl Hold {
    /// Takes the next request. Gives what is to be sent now, in this order.
    pub fn offer(&mut self, request: Request) -> impl Iterator<Item = Request> + use<> {
        // A request that begins where the held one stands and knows no less says everything that the held one does.
        let before = self.held.take().filter(|held| {
            request.prev_log_id != held.prev_log_id || request.leader_commit < held.leader_commit
        });
        if let Some(before) = &before {
            self.note(before);
        }
        let only_commits = self.sent.is_some_and(|(last, commit)| {
            request.entries.is_empty() && request.prev_log_id == last && request.leader_commit > commit
        });
        let now = if only_commits {
            self.held = Some(request);
            None
        } else {
            self.note(&request);
            Some(request)
        };
        before.into_iter().chain(now)
    }

    /// As [`Hold::offer`], for several.
    pub fn offer_all(&mut self, requests: impl IntoIterator<Item = Request>) -> Vec<Request> {
        let mut now = Vec::new();
        for request in requests {
            now.extend(self.offer(request));
        }
        now
    }

    /// Gives what is held, to be sent now.
    pub fn release(&mut self) -> Option<Request> {
        let held = self.held.take();
        if let Some(held) = &held {
            self.note(held);
        }
        held
    }

    /// Whether something is held.
    pub fn is_holding(&self) -> bool {
        self.held.is_some()
    }

    fn note(&mut self, sent: &Request) {
        let last = sent.entries.last().map_or(sent.prev_log_id, |entry| Some(entry.log_id));
        self.sent = Some((last, sent.leader_commit));
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::types::{CommittedLeader, LeaderId, LogEntry, Payload, Vote};

    fn id(index: u64) -> Option<LogId> {
        Some(LogId { leader_id: CommittedLeader::new(2), index })
    }

    /// An append of the entries in `(prev, last]`.
    pub(in crate::transport) fn append(prev: u64, last: u64, commit: u64) -> Request {
        Request {
            vote: Vote { leader_id: LeaderId { term: 2, voted_for: 1 }, committed: true },
            prev_log_id: id(prev),
            leader_commit: id(commit),
            entries: (prev + 1..=last)
                .filter_map(id)
                .map(|log_id| LogEntry { log_id, payload: Payload::Blank })
                .collect(),
        }
    }

    /// What is sent, as `(prev, number of entries, commit)`.
    fn sent(requests: impl IntoIterator<Item = Request>) -> Vec<(u64, usize, u64)> {
        let index = |id: Option<LogId>| id.map_or(0, |id| id.index);
        requests
            .into_iter()
            .map(|r| (index(r.prev_log_id), r.entries.len(), index(r.leader_commit)))
            .collect()
    }

    #[test]
    fn a_commit_index_waits_and_goes_with_the_next_entry() {
        let mut hold = Hold::default();
        assert_eq!(sent(hold.offer(append(4, 5, 4))), [(4, 1, 4)]);
        assert_eq!(sent(hold.offer(append(5, 5, 5))), []);
        assert!(hold.is_holding());
        assert_eq!(sent(hold.offer(append(5, 7, 5))), [(5, 2, 5)]);
        assert!(!hold.is_holding());
    }

    #[test]
    fn of_several_the_newest_waits() {
        let mut hold = Hold::default();
        assert_eq!(sent(hold.offer(append(4, 7, 4))), [(4, 3, 4)]);
        assert_eq!(sent(hold.offer(append(7, 7, 5))), []);
        assert_eq!(sent(hold.offer(append(7, 7, 7))), []);
        assert_eq!(sent(hold.release()), [(7, 0, 7)]);
        assert_eq!(sent(hold.release()), []);
    }

    #[test]
    fn the_first_message_and_a_probe_never_wait() {
        let mut hold = Hold::default();
        assert_eq!(sent(hold.offer(append(5, 5, 5))), [(5, 0, 5)]);
        // Nothing new at all: it is sent for its answer.
        assert_eq!(sent(hold.offer(append(5, 5, 5))), [(5, 0, 5)]);
        // Not where the follower was last told to be.
        assert_eq!(sent(hold.offer(append(3, 3, 6))), [(3, 0, 6)]);
    }

    #[test]
    fn what_the_next_one_does_not_say_is_sent_before_it() {
        let mut hold = Hold::default();
        assert_eq!(sent(hold.offer(append(4, 5, 4))), [(4, 1, 4)]);
        assert_eq!(sent(hold.offer(append(5, 5, 5))), []);
        assert_eq!(sent(hold.offer(append(3, 5, 5))), [(5, 0, 5), (3, 2, 5)]);
        assert_eq!(sent(hold.offer(append(5, 5, 7))), []);
        assert_eq!(sent(hold.offer(append(5, 6, 6))), [(5, 0, 7), (5, 1, 6)]);
        // What was sent late counts as well: this tells the follower nothing new.
        assert_eq!(sent(hold.offer(append(6, 6, 6))), [(6, 0, 6)]);
    }
}
