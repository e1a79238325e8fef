//! A drone's list of the backends of which anything is on its disk, compared with what the state says of that drone. Pure.
//!
//! ```text
//!   pages of a session ──page──▶ Listing ──finish──▶ entries: Listed, Listed, … Listed { last }
//!                                  ▲                 and backends that the drone must end
//!             state of a replica ──┘
//! ```
//!
//! The controller that has the session compares, and proposes only what differs: after a change of the leader every drone
//! lists everything, and nearly always nothing differs. A replica that has applied the registration knows every backend
//! that was acquired before it, and no action is sent until the list was applied, so nothing that matters can change
//! between the look and the entry; the entry checks all of it again (`apply/listed.rs`).
//!
//! Nothing is proposed before the last page has come, so an interrupted list has no effect.

use crate::command::Listed;
use crate::kv::{ReadState, StateError};
use crate::limits::LISTED_PER_ENTRY_MAX;
use crate::records::{DroneRecord, Presence};
use crate::view::View;
use holdfast_wire::BackendStatus;
use holdfast_wire::drone::ListedBackend;
use std::collections::BTreeMap;

/// Backends that one read of the state gives.
const READ_MAX: usize = 1024;

/// The list of one session, as far as it has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    drone_id: i32,
    session: String,
    data_id: Option<String>,
    /// Backends of the drone that were not listed yet, with their tokens.
    absent: BTreeMap<String, u64>,
    ending: Vec<String>,
    received: Vec<String>,
    not_held: Vec<String>,
    count: usize,
}

/// What follows from a complete list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Differences {
    /// To be applied in this order. There is always one, and only the last one has `last`.
    pub entries: Vec<Listed>,
    /// Backends that the drone has and that hold no key: it must end them.
    pub not_held: Vec<String>,
}

impl Listing {
    /// Begins the list of a session. `view` must show its registration, of which `drone` is the record.
    pub fn begin<R: ReadState>(
        view: &View<R>,
        drone_id: i32,
        drone: &DroneRecord,
    ) -> Result<Self, StateError> {
        let mut absent = BTreeMap::new();
        let mut after: Option<String> = None;
        loop {
            let page = view.drone_backends(drone_id, after.as_deref(), READ_MAX)?;
            let is_last = page.len() < READ_MAX;
            after = page.last().map(|(id, _)| id.clone());
            absent.extend(page.into_iter().filter(|(_, token)| *token < drone.registered_index));
            if is_last {
                break;
            }
        }
        let (session, data_id) = (drone.session.clone(), drone.data_id.clone());
        Ok(Self {
            drone_id,
            session,
            data_id,
            absent,
            ending: Vec::new(),
            received: Vec::new(),
            not_held: Vec::new(),
            count: 0,
        })
    }

    /// How many backends were listed so far.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Takes a page.
    pub fn page<R: ReadState>(&mut self, view: &View<R>, page: &[ListedBackend]) -> Result<(), StateError> {
        self.count += page.len();
        for item in page {
            let has_ended =
                item.state.as_ref().is_some_and(|state| state.status() == BackendStatus::Terminated);
            let known = view.backend(&item.backend)?.filter(|backend| {
                backend.drone_id == self.drone_id
                    && item.token.is_none_or(|token| token == backend.token)
                    // What was started on another disk is not on this machine, whatever was copied here.
                    && backend.data_id == self.data_id
            });
            let Some(backend) = known else {
                if !has_ended {
                    self.not_held.push(item.backend.clone());
                }
                continue;
            };
            self.absent.remove(&item.backend);
            let must_end = backend.state().status() == BackendStatus::Terminated
                || backend.presence == Presence::Leaving;
            if must_end && !has_ended {
                self.not_held.push(item.backend.clone());
                continue;
            }
            if backend.termination_asked.is_some() && !must_end {
                self.ending.push(item.backend.clone());
            }
            // Any report would have done the same.
            if backend.state().status() == BackendStatus::Scheduled {
                self.received.push(item.backend.clone());
            }
        }
        Ok(())
    }

    /// The last page has come.
    pub fn finish(self) -> Differences {
        let empty = || Listed {
            drone_id: self.drone_id,
            session: self.session.clone(),
            absent: Vec::new(),
            ending: Vec::new(),
            received: Vec::new(),
            last: false,
        };
        let mut entries = vec![empty()];
        let mut add = |put: &mut dyn FnMut(&mut Listed)| {
            if entries.last().is_none_or(|entry| entry.items() >= LISTED_PER_ENTRY_MAX) {
                entries.push(empty());
            }
            if let Some(entry) = entries.last_mut() {
                put(entry);
            }
        };
        for (id, token) in &self.absent {
            add(&mut |entry| entry.absent.push((id.clone(), *token)));
        }
        for id in &self.ending {
            add(&mut |entry| entry.ending.push(id.clone()));
        }
        for id in &self.received {
            add(&mut |entry| entry.received.push(id.clone()));
        }
        if let Some(entry) = entries.last_mut() {
            entry.last = true;
        }
        Differences { entries, not_held: self.not_held }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::MemState;

    #[test]
    fn differences_go_into_bounded_entries_of_which_only_the_last_one_takes_effect() {
        for (absent, ending, sizes) in [
            (0, 0, vec![0]),
            (1, 1, vec![2]),
            (LISTED_PER_ENTRY_MAX, 0, vec![LISTED_PER_ENTRY_MAX]),
            (LISTED_PER_ENTRY_MAX - 1, 2, vec![LISTED_PER_ENTRY_MAX, 1]),
            (20_000, 20_000, [vec![LISTED_PER_ENTRY_MAX; 39], vec![64]].concat()),
        ] {
            let listing = Listing {
                drone_id: 1,
                session: "s".into(),
                data_id: Some("m".into()),
                absent: (0..absent).map(|at| (format!("a{at}"), at as u64)).collect(),
                ending: (0..ending).map(|at| format!("e{at}")).collect(),
                received: Vec::new(),
                not_held: Vec::new(),
                count: 0,
            };
            let entries = listing.finish().entries;
            assert_eq!(entries.iter().map(Listed::items).collect::<Vec<_>>(), sizes);
            assert!(entries.iter().rev().skip(1).all(|entry| !entry.last) && entries.last().unwrap().last);
        }
    }

    #[test]
    fn what_the_state_does_not_know_is_to_end_unless_it_has_ended() {
        let view = View(MemState::default());
        let mut listing = Listing {
            drone_id: 1,
            session: "s".into(),
            data_id: Some("m".into()),
            absent: BTreeMap::new(),
            ending: Vec::new(),
            received: Vec::new(),
            not_held: Vec::new(),
            count: 0,
        };
        let item = |backend: &str, state| ListedBackend { backend: backend.into(), token: None, state };
        let ended = holdfast_wire::BackendState::Terminated {
            last_status: BackendStatus::Ready,
            termination: None,
            reason: None,
            exit_code: None,
        };
        listing.page(&view, &[item("unreadable", None), item("ended", Some(ended))]).unwrap();
        assert_eq!(listing.count(), 2);
        assert_eq!(listing.finish().not_held, ["unreadable"]);
    }
}
