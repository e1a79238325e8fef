//! Makes the data directory of one member of a *new* cluster from a backup.
//!
//! ```text
//!   backup ──check all of it──▶ mark ──rows──▶ carried over ──▶ state/   ──▶ log/ (empty, vote and purge point) ──▶ unmark
//! ```
//!
//! It is run once for each member, with the same backup and arguments, on machines that need not know of each other. All
//! of them get the same rows, because everything follows from backup and arguments; what must be random (the rest of the
//! new cluster's id, the secret of its tokens) comes with the first entry of the new log, `FormCluster`.
//!
//! A backup cannot know what was handed out after it was made. So:
//!
//! 1. *Tokens grow* (invariant 2): the log goes on [`INDEX_JUMP`] further on, beyond every token that the old cluster can
//!    have handed out. One backup restored for a second time starts at the same place; then the operator says above which
//!    token to start.
//! 2. *Exclusion* (invariant 1): all keys are freed and all backends are lost, so nothing of the old cluster is renewed;
//!    no key is acquired for one full expiry of cluster time, in which every guard of the old cluster has ended its
//!    backend. The drones that come over end theirs at once, because the cluster's id is another one.
//! 3. Members that were restored from different backups, or with different arguments, refuse each other: until the cluster
//!    is formed they go by an id that is made of a digest of both, and the id that it is formed with begins with that.
//! 4. A directory is never half-restored: it is marked until everything in it is durable, and a marked one is not opened.
//!
//! What is carried over and what is not stands with [`Carry`].

use crate::files::{remove_dir_if_there, sync_dir, write_durably};
use crate::log_store::LogStore;
use crate::state_db::{StateHandle, TableRow};
use crate::types::{CommittedLeader, LeaderId, LogId, Stamper, StoredMembership, Vote, members_of};
use holdfast_backup::{BackupError, Reader, Row, Summary, inspect};
use holdfast_core::codec::{decode, encode};
use holdfast_core::kv::{StateError, Table, keys};
use holdfast_core::limits::{SUPPLIED_ID_KEEP_MS, TOKEN_MAX};
use holdfast_core::records::{BackendRecord, ClusterRecord, DroneRecord, ProgressRecord, RestoredRecord};
use holdfast_wire::{BackendState, BackendStatus, TerminationReason};
use openraft::Membership;
use openraft::storage::RaftLogStorage;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How far beyond the backup the new log begins: more entries than a cluster can have written since.
pub const INDEX_JUMP: u64 = 1 << 32;
/// How far beyond the backup's last drone id the new ones begin: ids are not reused, and more drones than these will not
/// have been registered since.
const DRONE_ID_JUMP: i32 = 1 << 16;
/// In a data directory while a restore is writing it.
pub(crate) const MARK: &str = "RESTORING";
/// What is in an empty data directory.
const NOTHING: [&str; 3] = ["LOCK", "lost+found", MARK];

/// How to restore one member.
#[derive(Debug, Clone)]
pub struct RestoreOptions {
    /// The backup.
    pub file: PathBuf,
    /// Data directory to make; missing or empty.
    pub data_dir: PathBuf,
    /// Member id.
    pub id: u64,
    /// All members of the new cluster: id → peer address.
    pub members: BTreeMap<u64, String>,
    /// New tokens are larger than this too, by [`INDEX_JUMP`]: for a backup that was restored before.
    pub above_token: u64,
    /// For how long no key is acquired, in milliseconds, if it is to be longer than the backup's expiry: for lease
    /// durations that were raised after the backup was made.
    pub quarantine_ms: u64,
}

/// What a restore did.
#[derive(Debug, Clone)]
pub struct Restored {
    /// What the backup held.
    pub backup: Summary,
    /// Where the new log begins: every new token is larger.
    pub index: u64,
    /// What the new cluster's id begins with; the same on all of its members.
    pub id_prefix: String,
    /// For how long no key is acquired after the new cluster's start, in milliseconds.
    pub quarantine_ms: u64,
}

/// Why nothing was restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// An argument is wrong.
    #[error("{0}")]
    Arguments(String),
    /// The backup can't be used.
    #[error("{file}: {error}")]
    Backup {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        error: BackupError,
    },
    /// The directory is in use, or there is something in it.
    #[error("{0}")]
    DataDir(String),
    /// Writing the directory failed. It stays marked: run the restore again.
    #[error("{dir}: {error}")]
    Write {
        /// Where.
        dir: PathBuf,
        /// The cause.
        error: io::Error,
    },
}

/// Restores one member. Blocks on the disk and needs a runtime; nothing else may run in it.
pub async fn restore(options: &RestoreOptions) -> Result<Restored, RestoreError> {
    let plan = Plan::new(options)?;
    let dir = &options.data_dir;
    let _lock = crate::store::lock_dir(dir).map_err(|error| RestoreError::DataDir(error.to_string()))?;
    let wrote = |error| RestoreError::Write { dir: dir.clone(), error };
    empty_or_marked(dir)?;
    write_durably(&dir.join(MARK), b"a restore into this directory is not finished; run it again\n")
        .map_err(wrote)?;
    for part in ["state", "log", "snapshots"] {
        remove_dir_if_there(&dir.join(part)).map_err(wrote)?;
    }
    plan.write_state(options)?;
    plan.write_log(options).await.map_err(wrote)?;
    sync_dir(dir).map_err(wrote)?;
    std::fs::remove_file(dir.join(MARK)).and_then(|()| sync_dir(dir)).map_err(wrote)?;
    Ok(Restored {
        index: plan.at.index,
        id_prefix: plan.id_prefix,
        quarantine_ms: plan.quarantine_ms,
        backup: plan.backup,
    })
}

fn empty_or_marked(dir: &Path) -> Result<(), RestoreError> {
    let failed = |e: io::Error| RestoreError::DataDir(format!("{}: {e}", dir.display()));
    if dir.join(MARK).try_exists().map_err(failed)? {
        return Ok(());
    }
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        if !NOTHING.iter().any(|nothing| name == *nothing) {
            return Err(RestoreError::DataDir(format!(
                "{} is not empty (it holds {}): a restore makes a new data directory and touches no other",
                dir.display(),
                name.display()
            )));
        }
    }
    Ok(())
}

/// What follows from backup and arguments alone, the same on every member.
struct Plan {
    backup: Summary,
    at: LogId,
    membership: StoredMembership,
    id_prefix: String,
    quarantine_ms: u64,
}

impl Plan {
    fn new(options: &RestoreOptions) -> Result<Self, RestoreError> {
        if !options.members.contains_key(&options.id) {
            let problem = format!("the new cluster must have this member too (id {})", options.id);
            return Err(RestoreError::Arguments(problem));
        }
        let backup = inspect(open(&options.file)?).map_err(|error| bad(&options.file, error))?;
        let index = backup.index.max(options.above_token).saturating_add(INDEX_JUMP);
        if index > TOKEN_MAX - INDEX_JUMP {
            let problem =
                format!("the new log would begin at {index}, too near the largest token ({TOKEN_MAX})");
            return Err(RestoreError::Arguments(problem));
        }
        let quarantine_ms = backup.lease.expiry_ms.max(options.quarantine_ms);
        let at = LogId { leader_id: CommittedLeader::new(backup.term), index };
        let voters: BTreeSet<u64> = options.members.keys().copied().collect();
        let membership = Membership::new(vec![voters], members_of(&options.members))
            .map_err(|error| RestoreError::Arguments(error.to_string()))?;
        let id_prefix = id_prefix(&backup, index, quarantine_ms, &options.members);
        let membership = StoredMembership::new(Some(at), membership);
        Ok(Self { backup, at, membership, id_prefix, quarantine_ms })
    }

    fn write_state(&self, options: &RestoreOptions) -> Result<(), RestoreError> {
        let dir = options.data_dir.join("state");
        let wrote = |error| RestoreError::Write { dir: dir.clone(), error };
        let bad = |error| bad(&options.file, error);
        let content = |error: StateError| bad(BackupError::Content(error.to_string()));
        let mut reader = Reader::open(open(&options.file)?).map_err(bad)?;
        let state = StateHandle::open(&dir).map_err(wrote)?;
        let mut carry = Carry::new(self.backup.cluster_time);
        while let Some(rows) = reader.next_rows().map_err(bad)? {
            let mut kept = Vec::with_capacity(rows.len());
            for row in rows {
                carry.row(row, &mut kept).map_err(content)?;
            }
            state.load(kept).map_err(wrote)?;
        }
        let sha256 = reader.sha256().unwrap_or_default();
        if hex(&sha256) != self.backup.sha256 {
            return Err(bad(BackupError::Content("it changed while it was read".to_owned())));
        }
        state.load(carry.meta(self).map_err(content)?).map_err(wrote)?;
        state.finish_load(self.at, &self.membership).map_err(wrote)
    }

    /// An empty log whose last entry was the restored state's.
    async fn write_log(&self, options: &RestoreOptions) -> io::Result<()> {
        let dir = options.data_dir.join("log");
        let opened = LogStore::open(&dir, options.id, Arc::new(Stamper::default()), Box::new(|| Ok(())))?;
        let mut log = opened.map_err(|id| io::Error::other(format!("a new log belongs to member {id}")))?;
        // The vote of a term in which nobody leads: elections go on from the next.
        let leader_id = LeaderId { term: self.at.leader_id.term, voted_for: options.id };
        log.save_vote(&Vote { leader_id, committed: false }).await?;
        log.purge(self.at).await?;
        log.stop();
        Ok(())
    }
}

fn open(file: &Path) -> Result<BufReader<File>, RestoreError> {
    let opened = File::open(file).map_err(|error| bad(file, BackupError::Read(error)))?;
    Ok(BufReader::with_capacity(1 << 20, opened))
}

fn bad(file: &Path, error: BackupError) -> RestoreError {
    RestoreError::Backup { file: file.to_owned(), error }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Ends with a dash, as no cluster's id does ([`is_prefix`]).
fn id_prefix(backup: &Summary, index: u64, quarantine_ms: u64, members: &BTreeMap<u64, String>) -> String {
    let mut hash = Sha256::new();
    hash.update(backup.sha256.as_bytes());
    hash.update(index.to_le_bytes());
    hash.update(quarantine_ms.to_le_bytes());
    for (id, addr) in members {
        hash.update(id.to_le_bytes());
        hash.update((addr.len() as u64).to_le_bytes());
        hash.update(addr.as_bytes());
    }
    format!("restored-{}-", hex(&hash.finalize()[..8]))
}

/// Whether `id` is what a restored member goes by until its cluster is formed.
pub(crate) fn is_prefix(id: &str) -> bool {
    id.starts_with("restored-") && id.ends_with('-')
}

/// Which rows a new cluster gets, and what becomes of them.
///
/// | kept | changed | dropped |
/// | --- | --- | --- |
/// | terminated backends, supplied ids ever used, drones' names and numbers, draining | live backends are `terminated` (`lost`), as of the backup; drones have no session, no heartbeat and no backends | keys and their expiry index, actions, ends of backends and drains, idempotency records, cluster id, token secret |
///
/// Idempotency records go because what they tell of has ended: a replay would answer with a backend that is gone. The
/// secret goes because revocations made after the backup are lost: with it all connection tokens of the old cluster are
/// void, and what they connected to has ended.
struct Carry {
    now_ms: u64,
    cluster: Option<ClusterRecord>,
    progress: Option<ProgressRecord>,
}

impl Carry {
    fn new(now_ms: u64) -> Self {
        Self { now_ms, cluster: None, progress: None }
    }

    fn row(&mut self, row: Row, kept: &mut Vec<TableRow>) -> Result<(), StateError> {
        let Row { table, key, value } = row;
        match table {
            Table::Meta if key == keys::CLUSTER => self.cluster = Some(decode(&value)?),
            Table::Meta if key == keys::PROGRESS => self.progress = Some(decode(&value)?),
            Table::Meta
            | Table::Keys
            | Table::KeyExpiry
            | Table::Actions
            | Table::Idempotency
            | Table::IdempotencyExpiry
            | Table::BackendEnds
            | Table::DrainEnds
            | Table::DroneBackends
            | Table::DronesHeard => {}
            Table::Backends => {
                let mut backend = decode::<BackendRecord>(&value)?;
                let last_status = backend.state().status();
                if last_status != BackendStatus::Terminated {
                    let reason = Some(TerminationReason::Lost);
                    let lost =
                        BackendState::Terminated { last_status, termination: None, reason, exit_code: None };
                    backend.history.push((self.now_ms, lost));
                    kept.push((Table::Terminated, keys::timed(self.now_ms, &key), Vec::new()));
                    if backend.id_supplied {
                        let forget_at_ms = self.now_ms.saturating_add(SUPPLIED_ID_KEEP_MS);
                        kept.push((Table::SuppliedEnds, keys::timed(forget_at_ms, &key), Vec::new()));
                    }
                } else if backend.spawn_repeated {
                    // It may have held its key until now, and not be filed yet.
                    let ended_at_ms = backend.history.last().map_or(self.now_ms, |(at_ms, _)| *at_ms);
                    kept.push((Table::Terminated, keys::timed(ended_at_ms, &key), Vec::new()));
                }
                // Its actions are gone, and it has ended before any limit.
                backend.terminate_action = None;
                backend.end_filed_at_ms = None;
                kept.push((table, key, encode(&backend)));
            }
            Table::Drones => {
                let mut drone = decode::<DroneRecord>(&value)?;
                drone.session = String::new();
                drone.heartbeat = None;
                drone.backend_count = 0;
                // There is nothing left on it to end.
                drone.drain_deadline_ms = None;
                drone.leaving = false;
                // Nobody else's name is kept from a drone that comes over.
                drone.registered_at_ms = 0;
                drone.is_listed = false;
                // Silent from now on, so that it is swept some day if it does not come over.
                drone.heard_filed_at_ms = Some(self.now_ms);
                kept.push((Table::DronesHeard, keys::timed(self.now_ms, &key), Vec::new()));
                kept.push((table, key, encode(&drone)));
            }
            Table::Terminated | Table::SuppliedIds | Table::SuppliedEnds | Table::DroneNames => {
                kept.push((table, key, value))
            }
        }
        Ok(())
    }

    /// The rows of the meta table, once all others were seen.
    fn meta(self, plan: &Plan) -> Result<Vec<TableRow>, StateError> {
        let (Some(cluster), Some(mut progress)) = (self.cluster, self.progress) else {
            return Err(StateError::Damaged("there is no cluster record".to_owned()));
        };
        progress.keys_held = 0;
        progress.idempotency_records = 0;
        progress.published = Vec::new();
        // Replicas that were restored differently differ from here on.
        let digest = Sha256::digest(plan.id_prefix.as_bytes());
        progress.checksum =
            digest.iter().take(8).fold(progress.checksum, |sum, byte| sum.rotate_left(8) ^ u64::from(*byte));
        progress.last_drone_id = progress.last_drone_id.saturating_add(DRONE_ID_JUMP);
        let restored = RestoredRecord {
            from_cluster_id: cluster.cluster_id,
            from_index: plan.backup.index,
            id_prefix: plan.id_prefix.clone(),
            lease: cluster.lease,
            terminated_keep_ms: cluster.terminated_keep_ms,
            quarantine_ms: plan.quarantine_ms,
            acquisitions_from_ms: None,
        };
        Ok(vec![
            (Table::Meta, keys::PROGRESS.to_vec(), encode(&progress)),
            (Table::Meta, keys::RESTORED.to_vec(), encode(&restored)),
        ])
    }
}
