//! Opens what a replica has on disk without running it: the same checks as at a start, then a look at what is there.
//! For tests that rebuild disks, and for whoever must find out what a disk holds.

use crate::api::OpenError;
use crate::log_store::LogStore;
use crate::snapshots::Snapshots;
use crate::state_db::{StateHandle, scrub_dir};
use crate::store::{lock_dir, storage};
use crate::types::Stamper;
use holdfast_core::codec::decode;
use holdfast_core::command::{Command, Proposal};
use holdfast_core::kv::{Table, Writes};
use holdfast_core::view::View;
use holdfast_wire::KeyConfig;
use openraft::entry::EntryPayload;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

/// What a data directory holds.
pub struct Inspected {
    log: LogStore,
    state: StateHandle,
    snapshots: Snapshots,
    _lock: File,
}

/// How far everything goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ends {
    /// Term that was voted in last.
    pub vote_term: u64,
    /// Term and index of the last entry.
    pub last: Option<(u64, u64)>,
    /// Index up to which the log is purged.
    pub purged: u64,
    /// Index of the last applied entry.
    pub applied: u64,
}

/// Opens what a member has in `dir`, or says why a start would be refused.
pub fn open(dir: &Path) -> Result<Inspected, OpenError> {
    let lock = lock_dir(dir)?;
    let (state_dir, snapshot_dir, log_dir) = (dir.join("state"), dir.join("snapshots"), dir.join("log"));
    let state =
        StateHandle::open(&state_dir).map_err(|e| storage("opening the state", &state_dir)(e.to_string()))?;
    let snapshots = Snapshots::open(&snapshot_dir)
        .map_err(|e| storage("opening the snapshots", &snapshot_dir)(e.to_string()))?;
    let log = LogStore::open(&log_dir, Arc::new(Stamper::default()), Box::new(|| Ok(())))
        .map_err(|e| storage("opening the log", &log_dir)(e.to_string()))?;
    check_ends(&log, &state, &snapshots)
        .map_err(|e| storage("comparing log and state", dir)(e.to_string()))?;
    Ok(Inspected { log, state, snapshots, _lock: lock })
}

/// Whether log and state fit together. They are synced by themselves, so that one can have lost what the other needs; what
/// an ordinary crash leaves always fits.
pub(crate) fn check_ends(log: &LogStore, state: &StateHandle, snapshots: &Snapshots) -> io::Result<()> {
    let (vote, _, purged) = log.ends();
    let (applied, _) = state.applied().map_err(io::Error::other)?;
    let snapshot = snapshots.current().and_then(|(meta, _)| meta.last_log_id);
    let purged = purged.map_or(0, |id| id.index);
    let held = applied.max(snapshot).map_or(0, |id| id.index);
    if held < purged {
        return Err(io::Error::other(format!(
            "the state goes to index {held}, but the log begins after {purged}: state and snapshots have lost what was \
             durable; give this member an empty data directory"
        )));
    }
    if let (Some(vote), Some(applied)) = (vote, applied)
        && vote.leader_id.term < applied.leader_id.term
    {
        return Err(io::Error::other(format!(
            "the state holds an entry of term {}, but the log has voted in term {} at most: the log has lost what was \
             durable; give this member an empty data directory",
            applied.leader_id.term, vote.leader_id.term
        )));
    }
    Ok(())
}

impl Inspected {
    /// See [`Ends`].
    pub fn ends(&self) -> io::Result<Ends> {
        let (vote, last, purged) = self.log.ends();
        let (applied, _) = self.state.applied().map_err(io::Error::other)?;
        Ok(Ends {
            vote_term: vote.map_or(0, |vote| vote.leader_id.term),
            last: last.map(|id| (id.leader_id.term, id.index)),
            purged: purged.map_or(0, |id| id.index),
            applied: applied.map_or(0, |id| id.index),
        })
    }

    /// The acquisition in the log at `index`: its term and its key.
    pub fn acquisition(&self, index: u64) -> io::Result<Option<(u64, KeyConfig)>> {
        let Some(entry) = self.log.entry(index)? else { return Ok(None) };
        let EntryPayload::Normal(proposed) = &entry.payload else { return Ok(None) };
        let proposal: Proposal = decode(&proposed.bytes).map_err(io::Error::other)?;
        Ok(match proposal.command {
            Command::Acquire(acquire) => Some((entry.log_id.leader_id.term, acquire.key)),
            _ => None,
        })
    }

    /// Reads everything that log and state have on disk, so that every checksum is checked.
    pub fn scrub(&self) -> io::Result<()> {
        self.state.scrub(|| true)?;
        self.log.scrub(|| true)?;
        match self.snapshots.current() {
            Some((_, held)) => scrub_dir(&held.path, || true),
            None => Ok(()),
        }
    }

    /// Writes a row of the applied state behind the replica's back, as a fault of memory, disk or program could.
    pub fn overwrite(&self, table: Table, key: &[u8], value: Vec<u8>) -> io::Result<()> {
        let (applied, _) = self.state.applied().map_err(io::Error::other)?;
        let applied = applied.ok_or_else(|| io::Error::other("nothing was applied yet"))?;
        self.state.commit(Writes::from([((table, key.to_vec()), Some(value))]), applied, None)?;
        self.state.make_durable()
    }

    /// The applied state.
    pub fn view(&self) -> View<StateHandle> {
        View(self.state.clone())
    }
}
