//! What a backup holds, once it is checked from end to end.

use crate::{BackupError, Reader, Row};
use holdfast_core::codec::decode;
use holdfast_core::kv::{Table, keys};
use holdfast_core::records::{BackendRecord, ClusterRecord, DroneRecord, KeyRecord, ProgressRecord};
use holdfast_wire::{BackendStatus, LeaseConfig};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::Read;

/// What is in a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Id of the cluster.
    pub cluster_id: String,
    /// Member that made the backup.
    pub member: u64,
    /// Log index of the state: every token handed out until then is at most this.
    pub index: u64,
    /// Term of that entry.
    pub term: u64,
    /// Cluster time of the state, in milliseconds.
    pub cluster_time: u64,
    /// Wall clock of the member when it made the backup, in milliseconds.
    pub made_at: u64,
    /// Members: id → peer address.
    pub members: BTreeMap<u64, String>,
    /// Those that vote.
    pub voters: Vec<u64>,
    /// Lease durations.
    pub lease: LeaseConfig,
    /// The state's checksum at `index`, the same on every replica.
    pub state_checksum: u64,
    /// Version of the program that made it.
    pub program: String,
    /// Keys held.
    pub keys_held: u64,
    /// Backends that were not terminated.
    pub backends_live: u64,
    /// Backends, those terminated not long before included.
    pub backends: u64,
    /// Drones ever registered.
    pub drones: u64,
    /// Rows in all.
    pub rows: u64,
    /// Bytes in all.
    pub bytes: u64,
    /// SHA-256 of the content, in hexadecimal: names this backup.
    pub sha256: String,
}

/// Reads a backup to its end and checks everything: frames, checksums, that each record decodes, and that header and
/// records agree.
pub fn inspect(source: impl Read) -> Result<Summary, BackupError> {
    let mut reader = Reader::open(source)?;
    let mut counts = Counts::default();
    while let Some(rows) = reader.next_rows()? {
        for row in &rows {
            counts.add(row)?;
        }
    }
    let header = reader.header().clone();
    let differs = |what: &str| BackupError::Content(format!("its header and its records differ in {what}"));
    let (Some(cluster), Some(progress)) = (counts.cluster, counts.progress) else {
        return Err(BackupError::Content("it has no cluster record".to_owned()));
    };
    if (cluster.cluster_id.as_str(), cluster.lease) != (header.cluster_id.as_str(), header.lease) {
        return Err(differs("the cluster's identity"));
    }
    if (progress.cluster_time_ms, progress.checksum) != (header.cluster_time_ms, header.state_checksum) {
        return Err(differs("the position"));
    }
    if progress.keys_held != counts.keys || header.keys_held != counts.keys {
        return Err(differs("the number of keys"));
    }
    let sha256 = reader.sha256().unwrap_or_default();
    Ok(Summary {
        cluster_id: header.cluster_id,
        member: header.member,
        index: header.index,
        term: header.term,
        cluster_time: header.cluster_time_ms,
        made_at: header.made_at_ms,
        members: header.members,
        voters: header.voters,
        lease: header.lease,
        state_checksum: header.state_checksum,
        program: header.program,
        keys_held: counts.keys,
        backends_live: counts.live,
        backends: counts.backends,
        drones: counts.drones,
        rows: counts.rows,
        bytes: reader.bytes(),
        sha256: sha256.iter().map(|byte| format!("{byte:02x}")).collect(),
    })
}

#[derive(Default)]
struct Counts {
    cluster: Option<ClusterRecord>,
    progress: Option<ProgressRecord>,
    keys: u64,
    backends: u64,
    live: u64,
    drones: u64,
    rows: u64,
}

impl Counts {
    fn add(&mut self, row: &Row) -> Result<(), BackupError> {
        self.rows += 1;
        let bad = |error: holdfast_core::kv::StateError| {
            BackupError::Content(format!("a record of table {}: {error}", row.table.name()))
        };
        match row.table {
            Table::Meta if row.key == keys::CLUSTER => self.cluster = Some(decode(&row.value).map_err(bad)?),
            Table::Meta if row.key == keys::PROGRESS => {
                self.progress = Some(decode(&row.value).map_err(bad)?)
            }
            Table::Keys => {
                decode::<KeyRecord>(&row.value).map_err(bad)?;
                self.keys += 1;
            }
            Table::Backends => {
                let backend = decode::<BackendRecord>(&row.value).map_err(bad)?;
                self.backends += 1;
                self.live += u64::from(backend.state().status() != BackendStatus::Terminated);
            }
            Table::Drones => {
                decode::<DroneRecord>(&row.value).map_err(bad)?;
                self.drones += 1;
            }
            _ => {}
        }
        Ok(())
    }
}
