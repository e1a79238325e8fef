//! Keeps entries that are not committed yet from a learner.
//!
//! A learner's log counts for nothing until it is made a voter. But if it ran ahead of the voters' logs, it could refuse its
//! vote to each of them, while it may not stand itself: with one disk lost at that moment a majority of good disks would
//! never elect a leader again (the model found it). What is committed is in the log of every later leader, so a learner that
//! has nothing else is never ahead of one.
//!
//! Entries wait here, in their order, until a later request brings the commit index, which openraft sends for every commit; or
//! until the target is a voter, whose acknowledgement of the very entry that makes it one is needed. What still waits when
//! the requests end (a probe is a single one) is left out: it was not acknowledged, so openraft sends it again.

use crate::types::{LogId, TypeConfig};
use openraft::raft::AppendEntriesRequest;
use std::time::Duration;

/// How soon a learner that was made a voter gets what waited for it, if no request comes.
pub const PROMOTION_POLL: Duration = Duration::from_millis(5);

type Request = AppendEntriesRequest<TypeConfig>;

/// What waits on one connection. See the module.
#[derive(Default)]
pub struct LearnerGate {
    held: Option<Request>,
    /// Previous entry and commit index of the last request without entries that was made here.
    told: Option<(Option<LogId>, Option<LogId>)>,
}

fn last_of(request: &Request) -> Option<LogId> {
    request.entries.last().map_or(request.prev_log_id, |entry| Some(entry.log_id))
}

impl LearnerGate {
    /// Takes the next request. Gives what may be sent now, in this order.
    pub fn offer(&mut self, request: Request, to_voter: bool) -> Vec<Request> {
        match self.held.take() {
            Some(mut held) if last_of(&held) == request.prev_log_id => {
                held.entries.extend(request.entries);
                held.leader_commit = held.leader_commit.max(request.leader_commit);
                held.vote = request.vote;
                self.pass(held, to_voter)
            }
            // It does not follow: openraft has begun at another place, and sends again what it still wants there.
            Some(_) | None => self.pass(request, to_voter),
        }
    }

    /// Gives what waits, if the target has become a voter.
    pub fn release(&mut self, to_voter: bool) -> Option<Request> {
        self.held.take_if(|_| to_voter)
    }

    /// Whether something waits.
    pub fn is_holding(&self) -> bool {
        self.held.is_some()
    }

    fn pass(&mut self, mut request: Request, to_voter: bool) -> Vec<Request> {
        let committed = request.leader_commit.map_or(0, |id| id.index + 1);
        let cut = request.entries.partition_point(|entry| entry.log_id.index < committed);
        if to_voter || cut == request.entries.len() {
            return vec![request];
        }
        let waits = request.entries.split_off(cut);
        self.held = Some(Request {
            vote: request.vote,
            prev_log_id: last_of(&request),
            leader_commit: request.leader_commit,
            entries: waits,
        });
        let tells = Some((request.prev_log_id, request.leader_commit));
        if request.entries.is_empty() && std::mem::replace(&mut self.told, tells) == tells {
            return Vec::new();
        }
        vec![request]
    }
}

#[cfg(test)]
mod tests {
    use super::super::hold::tests::append;
    use super::*;

    /// Previous entry, last entry and commit index of each.
    fn shape(requests: Vec<Request>) -> Vec<(u64, u64, u64)> {
        let index = |id: Option<LogId>| id.map_or(0, |id| id.index);
        requests.iter().map(|r| (index(r.prev_log_id), index(last_of(r)), index(r.leader_commit))).collect()
    }

    #[test]
    fn a_learner_gets_an_entry_when_it_is_committed() {
        let mut gate = LearnerGate::default();
        assert_eq!(shape(gate.offer(append(3, 6, 4), false)), [(3, 4, 4)]);
        assert!(gate.is_holding());
        assert_eq!(
            shape(gate.offer(append(6, 7, 4), false)),
            [(4, 4, 4)],
            "that it is reached is seen at once"
        );
        assert_eq!(shape(gate.offer(append(7, 8, 4), false)), []);
        assert_eq!(shape(gate.offer(append(8, 8, 6), false)), [(4, 6, 6)]);
        assert_eq!(shape(gate.offer(append(8, 8, 8), false)), [(6, 8, 8)]);
        assert!(!gate.is_holding());
    }

    #[test]
    fn a_voter_gets_everything_at_once_and_what_waited_when_it_becomes_one() {
        let mut gate = LearnerGate::default();
        assert_eq!(shape(gate.offer(append(3, 6, 4), true)), [(3, 6, 4)]);
        assert_eq!(shape(gate.offer(append(6, 8, 6), false)), [(6, 6, 6)]);
        assert!(gate.release(false).is_none());
        assert_eq!(shape(gate.release(true).into_iter().collect()), [(6, 8, 6)]);
        assert_eq!(shape(gate.offer(append(8, 9, 6), false)), [(8, 8, 6)]);
        assert_eq!(shape(gate.offer(append(9, 10, 6), true)), [(8, 10, 6)]);
    }

    #[test]
    fn what_waits_is_left_out_when_a_request_does_not_follow() {
        let mut gate = LearnerGate::default();
        gate.offer(append(3, 6, 3), false);
        assert_eq!(shape(gate.offer(append(2, 4, 3), false)), [(2, 3, 3)]);
        assert_eq!(shape(gate.offer(append(4, 4, 4), false)), [(3, 4, 4)]);
        assert!(!gate.is_holding());
    }
}
