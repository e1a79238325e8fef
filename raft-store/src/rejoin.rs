//! A member that lost its disk must not vote as if it had not.
//!
//! It has forgotten what it acknowledged: its vote could elect a leader without an entry that a client was told is
//! durable. So a member that is not formed itself and meets a peer that is refuses to vote and to stand for election,
//! until it has applied what the first leader that it then hears of had committed. That covers everything it can have
//! acknowledged before. The mark is a file, so that a crash on the way does not lift the ban.
//!
//! In a new cluster members are not formed either, and some are a moment before the others. Nothing is lost there: who has
//! heard of a leader before it met a formed peer has been there since before the forming, because whoever is formed says so
//! before anything else.

use crate::files::{sync_dir, write_durably};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing was lost.
    Member,
    /// No leader was heard of yet.
    Waiting,
    /// May vote once this log index is applied.
    Until(u64),
}

/// See the module.
#[derive(Debug)]
pub struct Rejoin {
    mark: PathBuf,
    state: Mutex<State>,
    /// There was a log at the start, or a leader was heard of since, while there was no ban.
    was_there: AtomicBool,
}

impl Rejoin {
    /// Finds out whether the ban of an earlier start stands. `has_log`: there are entries of a leader in the log, so nothing
    /// was lost, whatever the state knows: it is made durable later than the log, and learns of the forming anew.
    pub fn open(data_dir: &Path, has_log: bool) -> io::Result<Self> {
        let mark = data_dir.join("REJOINING");
        let state = if mark.try_exists()? { State::Waiting } else { State::Member };
        Ok(Self { mark, state: Mutex::new(state), was_there: AtomicBool::new(has_log) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A peer is formed and this member is not, so it may have lost its disk.
    pub fn met_formed_peer(&self) -> io::Result<()> {
        let mut state = self.state();
        if *state == State::Member && !self.was_there.load(Ordering::Acquire) {
            write_durably(&self.mark, b"this member waits until it has caught up before it votes\n")?;
            *state = State::Waiting;
        }
        Ok(())
    }

    /// A leader sent entries or a heartbeat with its commit index.
    pub fn heard_leader(&self, committed: Option<u64>) {
        let mut state = self.state();
        match (*state, committed) {
            (State::Waiting, Some(committed)) => *state = State::Until(committed),
            (State::Member, _) => self.was_there.store(true, Ordering::Release),
            _ => {}
        }
    }

    /// Whether there is a ban that applied entries can lift.
    pub fn is_waiting(&self) -> bool {
        *self.state() != State::Member
    }

    /// Whether this member may vote and stand for election, having applied `applied`. Lifts the ban when it is time.
    pub fn may_vote(&self, applied: u64) -> io::Result<bool> {
        let mut state = self.state();
        match *state {
            State::Member => Ok(true),
            State::Until(index) if applied >= index => {
                std::fs::remove_file(&self.mark)?;
                if let Some(dir) = self.mark.parent() {
                    sync_dir(dir)?;
                }
                *state = State::Member;
                Ok(true)
            }
            State::Waiting | State::Until(_) => Ok(false),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_heard_a_leader_before_it_met_a_formed_peer_has_lost_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let rejoin = Rejoin::open(dir.path(), false).unwrap();
        rejoin.heard_leader(None);
        rejoin.met_formed_peer().unwrap();
        assert!(!rejoin.is_waiting() && rejoin.may_vote(0).unwrap());
        // Nor has one with a log, though its state may not know of the forming yet: that is made durable later.
        let killed = Rejoin::open(dir.path(), true).unwrap();
        killed.met_formed_peer().unwrap();
        assert!(!killed.is_waiting() && killed.may_vote(0).unwrap());
        // That is no word on what another process's life begins with.
        let wiped = Rejoin::open(dir.path(), false).unwrap();
        wiped.met_formed_peer().unwrap();
        wiped.heard_leader(Some(7));
        assert!(wiped.is_waiting() && !wiped.may_vote(6).unwrap());
    }

    #[test]
    fn the_ban_lasts_until_what_the_leader_had_committed_is_applied_even_over_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let rejoin = Rejoin::open(dir.path(), false).unwrap();
        assert!(rejoin.may_vote(0).unwrap());
        rejoin.met_formed_peer().unwrap();
        assert!(!rejoin.may_vote(100).unwrap(), "no leader has said how far it had committed");
        rejoin.heard_leader(Some(7));
        rejoin.heard_leader(Some(3));
        assert!(!rejoin.may_vote(6).unwrap());
        let restarted = Rejoin::open(dir.path(), false).unwrap();
        assert!(!restarted.may_vote(100).unwrap());
        restarted.heard_leader(None);
        restarted.heard_leader(Some(9));
        assert!(restarted.may_vote(9).unwrap());
        assert!(Rejoin::open(dir.path(), false).unwrap().may_vote(0).unwrap());
    }
}
