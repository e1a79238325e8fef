//! What a drone says of itself (that it is shutting down) and of its backends' connections, on the way to an entry. Pure:
//! the caller proposes and answers.
//!
//! One entry of a session is under way at a time, so that its words count in their order. What does not fit is dropped:
//! the drone repeats whatever is not acknowledged.

use holdfast_core::command::{ActivityReport, FromDrone};
use holdfast_core::kv::{ReadState, StateError};
use holdfast_core::limits::ACTIVITIES_PER_ENTRY_MAX;
use holdfast_core::view::View;
use holdfast_wire::drone::{ActivityItem, BackendActivity, MessageToDrone};
use holdfast_wire::limits::ACTIVITIES_MAX;
use std::collections::VecDeque;

/// Activity messages of one session that wait for an entry.
const QUEUED_MAX: usize = 4;
const _: () = assert!(ACTIVITIES_MAX <= ACTIVITIES_PER_ENTRY_MAX);

/// What comes next.
#[derive(Debug, Clone, PartialEq)]
pub enum Next {
    /// There is nothing to record: this is said at once.
    Answer(MessageToDrone),
    /// This is recorded first. [`Word::recorded`] has to be told of the end.
    Record {
        /// What is proposed.
        command: FromDrone,
        /// What is said then.
        answer: MessageToDrone,
    },
}

/// See the module.
#[derive(Debug, Default)]
pub struct Word {
    leaving: bool,
    activities: VecDeque<BackendActivity>,
    under_way: bool,
}

impl Word {
    /// The drone says that it is shutting down.
    pub fn leaving(&mut self) {
        self.leaving = true;
    }

    /// The drone says what it sees of connections.
    pub fn activity(&mut self, activity: BackendActivity) {
        if self.activities.len() < QUEUED_MAX {
            self.activities.push_back(activity);
        }
    }

    /// Whether [`Self::next`] may give something.
    pub fn waits(&self) -> bool {
        !self.under_way && (self.leaving || !self.activities.is_empty())
    }

    /// What comes next, as of the state here. A state that lags behind only has something recorded that need not be.
    pub fn next<R: ReadState>(
        &mut self,
        drone_id: i32,
        (session, incarnation): (&str, &str),
        view: &View<R>,
    ) -> Result<Option<Next>, StateError> {
        if self.under_way {
            return Ok(None);
        }
        let session = session.to_owned();
        if std::mem::take(&mut self.leaving) {
            let answer = MessageToDrone::AckDraining {};
            if view.drone(drone_id)?.is_some_and(|drone| drone.leaving && drone.session == session) {
                return Ok(Some(Next::Answer(answer)));
            }
            self.under_way = true;
            return Ok(Some(Next::Record { command: FromDrone::Leaving { drone_id, session }, answer }));
        }
        let Some(activity) = self.activities.pop_front() else { return Ok(None) };
        let answer = MessageToDrone::AckActivity { activity_id: activity.activity_id, again: Vec::new() };
        let mut items = Vec::new();
        for item in activity.backends {
            // A drone does not know who asked for it. Most have not.
            if view.backend(&item.backend)?.is_none_or(|backend| backend.max_idle_seconds.is_some()) {
                items.push(report(item));
            }
        }
        if items.is_empty() {
            return Ok(Some(Next::Answer(answer)));
        }
        self.under_way = true;
        let (incarnation, activity_id) = (incarnation.to_owned(), activity.activity_id);
        let command = FromDrone::Activity { drone_id, incarnation, activity_id, items };
        Ok(Some(Next::Record { command, answer }))
    }

    /// The last command has ended, whether it was recorded or not.
    pub fn recorded(&mut self) {
        self.under_way = false;
    }
}

fn report(item: ActivityItem) -> ActivityReport {
    let idle_ms = (item.connections == 0).then_some(item.idle_ms);
    ActivityReport { backend_id: item.backend, token: item.token, idle_ms }
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_core::codec::encode;
    use holdfast_core::kv::{MemState, Table, Writes, keys};
    use holdfast_core::records::{BackendRecord, DroneRecord, Presence};

    fn activity(activity_id: i64, backends: &[(&str, u64)]) -> BackendActivity {
        let item = |(backend, connections): &(&str, u64)| ActivityItem {
            backend: (*backend).to_owned(),
            token: Some(9),
            connections: *connections,
            idle_ms: 5,
        };
        BackendActivity { activity_id, backends: backends.iter().map(item).collect() }
    }

    /// Drone 1 with `limited`, which has a limit, and `free`, which has none.
    fn state(leaving: bool) -> View<MemState> {
        let drone = DroneRecord {
            cluster: String::new(),
            name: String::new(),
            pool: String::new(),
            incarnation: "i".into(),
            data_id: Some("m".into()),
            session: "s".into(),
            address: String::new(),
            registered_index: 1,
            is_listed: true,
            controller: 1,
            version: String::new(),
            git_hash: String::new(),
            draining: false,
            backend_count: 0,
            registered_at_ms: 0,
            heartbeat: None,
            drain_deadline_ms: None,
            leaving,
            heard_filed_at_ms: None,
        };
        let backend = |max_idle_seconds| BackendRecord {
            key: holdfast_wire::KeyConfig::default(),
            cluster: String::new(),
            drone_id: 1,
            presence: Presence::Expected,
            drone: String::new(),
            data_id: Some("m".into()),
            spawn_repeated: false,
            id_supplied: false,
            token: 9,
            history: Vec::new(),
            termination_asked: None,
            lifetime_ends_at_ms: None,
            max_idle_seconds,
            static_token: None,
            secret_token: String::new(),
            subdomain: None,
            revoked_users: Vec::new(),
            terminate_action: None,
            activity: None,
            end_filed_at_ms: None,
        };
        let mut writes = Writes::new();
        writes.insert((Table::Drones, keys::drone(1)), Some(encode(&drone)));
        writes.insert((Table::Backends, b"limited".to_vec()), Some(encode(&backend(Some(7)))));
        writes.insert((Table::Backends, b"free".to_vec()), Some(encode(&backend(None))));
        let mut state = MemState::default();
        state.commit(writes);
        View(state)
    }

    #[test]
    fn words_are_recorded_one_at_a_time_in_their_order() {
        let view = state(false);
        let mut word = Word::default();
        assert!(!word.waits());
        word.activity(activity(5, &[("limited", 2)]));
        word.activity(activity(6, &[("limited", 0), ("free", 1), ("elsewhere", 0)]));
        let next = |word: &mut Word| word.next(1, ("s", "i"), &view).unwrap();
        let Some(Next::Record { command: FromDrone::Activity { activity_id, items, .. }, answer }) =
            next(&mut word)
        else {
            panic!("nothing to record")
        };
        assert_eq!((activity_id, items.len(), items[0].idle_ms), (5, 1, None));
        assert_eq!(answer, MessageToDrone::AckActivity { activity_id: 5, again: Vec::new() });
        word.leaving();
        assert!(!word.waits() && next(&mut word).is_none(), "one is under way");
        word.recorded();
        let leaving = FromDrone::Leaving { drone_id: 1, session: "s".into() };
        let answer = MessageToDrone::AckDraining {};
        assert_eq!(next(&mut word), Some(Next::Record { command: leaving, answer }));
        word.recorded();
        let Some(Next::Record { command: FromDrone::Activity { activity_id, items, .. }, .. }) =
            next(&mut word)
        else {
            panic!("nothing to record")
        };
        // One that is not known here yet is left to the entry.
        let backends: Vec<_> = items.iter().map(|item| (item.backend_id.as_str(), item.idle_ms)).collect();
        assert_eq!((activity_id, backends), (6, vec![("limited", Some(5)), ("elsewhere", Some(5))]));
        word.recorded();
        assert!(!word.waits() && next(&mut word).is_none());
    }

    #[test]
    fn what_nobody_asked_for_or_what_is_recorded_is_acknowledged_without_an_entry() {
        let view = state(true);
        let mut word = Word::default();
        word.leaving();
        word.activity(activity(5, &[("free", 1)]));
        assert_eq!(
            word.next(1, ("s", "i"), &view).unwrap(),
            Some(Next::Answer(MessageToDrone::AckDraining {}))
        );
        let answer = Next::Answer(MessageToDrone::AckActivity { activity_id: 5, again: Vec::new() });
        assert_eq!(word.next(1, ("s", "i"), &view).unwrap(), Some(answer));
        // Said by an earlier session of the drone.
        word.leaving();
        assert!(matches!(word.next(1, ("t", "i"), &view).unwrap(), Some(Next::Record { .. })));
    }

    #[test]
    fn words_that_wait_are_bounded() {
        let mut word = Word::default();
        (0..100).for_each(|id| word.activity(activity(id, &[])));
        assert_eq!(word.activities.len(), QUEUED_MAX);
    }
}
