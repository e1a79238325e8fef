//! Makes the data directory of the first member of a *new* cluster from a backup. The others are added to it.
//!
//! ```text
//!   backup ──check all of it──▶ mark ──rows──▶ carried over ──▶ state/   ──▶ log/ (name, vote, purge point) ──▶ unmark
//! ```
//!
//! A backup cannot know what was handed out after it was made. So:
//!
//! 1. *Tokens grow* (invariant 2): the log continues [`INDEX_JUMP`] further on, beyond every token that the old cluster can
//!    have handed out. One backup restored for a second time starts at the same place; then the operator says above which
//!    token to start.
//! 2. *Exclusion* (invariant 1): all keys are freed and all backends are lost, so nothing of the old cluster is renewed;
//!    no key is acquired for one full expiry of cluster time, in which every guard of the old cluster has ended its
//!    backend. The drones that come over end theirs at once, because the cluster's id is another one.
//! 3. The new cluster has a new id, and its only member a new disk identity: no member of the old cluster, and no other
//!    restore of the same backup, is taken for one of it.
//! 4. A directory is never half-restored: it is marked until everything in it is durable, and a marked one is not opened.
//!
//! What is carried over and what is not stands with [`Carry`].

use crate::files::{remove_dir_if_there, sync_dir, write_durably};
use crate::log_store::LogStore;
use crate::membership::check_addr;
use crate::membership::naming::{DiskIdentity, Naming};
use crate::state_db::{StateHandle, TableRow};
use crate::types::{CommittedLeader, LeaderId, LogId, Member, Stamper, StoredMembership, Vote};
use holdfast_backup::{BackupError, Reader, Row, Summary, inspect};
use holdfast_core::codec::{decode, encode};
use holdfast_core::kv::{StateError, Table, keys};
use holdfast_core::limits::TOKEN_MAX;
use holdfast_core::records::{
    BackendRecord, ClusterRecord, DroneRecord, MemberIdsRecord, ProgressRecord, RestoredRecord,
};
use holdfast_wire::{BackendState, BackendStatus, TerminationReason};
use openraft::Membership;
use openraft::storage::RaftLogStorage;
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

/// Id of the only member of the new cluster.
const FIRST_ID: u64 = 1;

/// How to restore.
#[derive(Debug, Clone)]
pub struct RestoreOptions {
    /// The backup.
    pub file: PathBuf,
    /// Data directory to make; missing or empty.
    pub data_dir: PathBuf,
    /// Peer address of the member, `HOST:PORT`, at which those that are added will reach it.
    pub peer_addr: String,
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
    /// The new cluster's id.
    pub cluster_id: String,
    /// Id of its only member.
    pub member_id: u64,
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

/// Restores. Blocks on the disk and needs a runtime; nothing else may run in it.
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
    let identity = plan.write_log(dir).await.map_err(wrote)?;
    plan.write_state(options, identity)?;
    sync_dir(dir).map_err(wrote)?;
    std::fs::remove_file(dir.join(MARK)).and_then(|()| sync_dir(dir)).map_err(wrote)?;
    Ok(Restored {
        index: plan.at.index,
        cluster_id: plan.cluster_id,
        member_id: FIRST_ID,
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

/// What follows from backup and arguments, and the new cluster's id.
struct Plan {
    backup: Summary,
    at: LogId,
    cluster_id: String,
    quarantine_ms: u64,
}

impl Plan {
    fn new(options: &RestoreOptions) -> Result<Self, RestoreError> {
        if let Err(problem) = check_addr(&options.peer_addr) {
            let given = &options.peer_addr;
            return Err(RestoreError::Arguments(format!("the peer address {given:?} {problem}")));
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
        let cluster_id = format!("{:032x}", rand::random::<u128>());
        Ok(Self { backup, at, cluster_id, quarantine_ms })
    }

    fn write_state(&self, options: &RestoreOptions, identity: DiskIdentity) -> Result<(), RestoreError> {
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
        let member = Member { peer_addr: options.peer_addr.clone(), identity };
        let membership =
            Membership::new(vec![BTreeSet::from([FIRST_ID])], BTreeMap::from([(FIRST_ID, member)]))
                .map_err(|error| RestoreError::Arguments(error.to_string()))?;
        let membership = StoredMembership::new(Some(self.at), membership);
        state.finish_load(self.at, &membership).map_err(wrote)
    }

    /// An empty log whose last entry was the restored state's, on a disk that has its name.
    async fn write_log(&self, dir: &Path) -> io::Result<DiskIdentity> {
        let mut log = LogStore::open(&dir.join("log"), Arc::new(Stamper::default()), Box::new(|| Ok(())))?;
        log.name(&Naming { cluster_id: self.cluster_id.clone(), member_id: FIRST_ID, founding: None })?;
        // The vote of a term in which no one leads: elections continue with the next.
        let leader_id = LeaderId { term: self.at.leader_id.term, voted_for: FIRST_ID };
        log.save_vote(&Vote { leader_id, committed: false }).await?;
        log.purge(self.at).await?;
        log.stop();
        Ok(log.disk().identity)
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
            | Table::DrainEnds => {}
            Table::Backends => {
                let mut backend = decode::<BackendRecord>(&value)?;
                let last_status = backend.state().status();
                if last_status != BackendStatus::Terminated {
                    let reason = Some(TerminationReason::Lost);
                    let lost =
                        BackendState::Terminated { last_status, termination: None, reason, exit_code: None };
                    backend.history.push((self.now_ms, lost));
                    kept.push((Table::Terminated, keys::timed(self.now_ms, &key), Vec::new()));
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
                kept.push((table, key, encode(&drone)));
            }
            Table::Terminated | Table::SuppliedIds | Table::DroneNames => kept.push((table, key, value)),
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
        progress.last_drone_id = progress.last_drone_id.saturating_add(DRONE_ID_JUMP);
        let restored = RestoredRecord {
            from_cluster_id: cluster.cluster_id,
            from_index: plan.backup.index,
            lease: cluster.lease,
            terminated_keep_ms: cluster.terminated_keep_ms,
            quarantine_ms: plan.quarantine_ms,
            acquisitions_from_ms: None,
        };
        let mut ids = MemberIdsRecord::default();
        ids.insert(FIRST_ID);
        Ok(vec![
            (Table::Meta, keys::MEMBER_IDS.to_vec(), encode(&ids)),
            (Table::Meta, keys::PROGRESS.to_vec(), encode(&progress)),
            (Table::Meta, keys::RESTORED.to_vec(), encode(&restored)),
        ])
    }
}
