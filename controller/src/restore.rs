//! `holdfast-controller restore`: makes a member's data directory from a backup. The command line's `holdfast snapshot
//! restore` starts it, so that RocksDB stays out of that program.

use crate::config::{ConfigError, parse_members};
use clap::Parser;
use holdfast_wire::lease::parse_duration_ms;
use raft_store::restore::{RestoreError, RestoreOptions, Restored, restore};
use serde_json::json;
use std::path::PathBuf;

/// Make the data directory of one member of a new cluster from a backup
#[derive(Debug, Clone, Parser)]
#[command(name = "holdfast-controller restore", version)]
pub struct RestoreFlags {
    /// The backup
    pub file: PathBuf,
    /// Data directory to make: missing or empty
    #[arg(long, value_name = "DIR")]
    pub data_dir: PathBuf,
    /// Member id of this replica in the new cluster
    #[arg(long, value_name = "ID")]
    pub id: u64,
    /// All members of the new cluster and their peer addresses: 1=HOST:PORT,2=HOST:PORT,3=HOST:PORT
    #[arg(long, value_name = "ID=HOST:PORT,...")]
    pub initial_cluster: String,
    /// New tokens are to be larger than this one too: for a backup that was restored before
    #[arg(long, value_name = "TOKEN", default_value_t = 0)]
    pub above_token: u64,
    /// For how long no key is acquired, if longer than the backup's expiry: for lease durations that were raised after
    /// the backup was made
    #[arg(long, value_name = "DURATION")]
    pub quarantine: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Why nothing was restored.
#[derive(Debug, thiserror::Error)]
pub enum Failed {
    /// A flag is wrong.
    #[error(transparent)]
    Flag(#[from] ConfigError),
    /// See there.
    #[error(transparent)]
    Restore(#[from] RestoreError),
}

impl Failed {
    /// Whether another command line would do.
    pub fn is_wrong_use(&self) -> bool {
        matches!(self, Self::Flag(_) | Self::Restore(RestoreError::Arguments(_)))
    }
}

impl RestoreFlags {
    /// Restores; gives what to print.
    pub async fn run(self) -> Result<String, Failed> {
        let quarantine_ms = match &self.quarantine {
            None => 0,
            Some(text) => parse_duration_ms("quarantine", text)
                .map_err(|e| ConfigError::Flag { flag: "quarantine", problem: e.problem })?,
        };
        let options = RestoreOptions {
            file: self.file,
            data_dir: self.data_dir,
            id: self.id,
            members: parse_members(&self.initial_cluster)?,
            above_token: self.above_token,
            quarantine_ms,
        };
        let restored = restore(&options).await?;
        Ok(if self.json { as_json(&options, &restored) } else { as_text(&options, &restored) })
    }
}

fn as_json(options: &RestoreOptions, restored: &Restored) -> String {
    json!({
        "data_dir": options.data_dir,
        "id": options.id,
        "backup": restored.backup,
        "index": restored.index,
        "cluster_id_prefix": restored.id_prefix,
        "quarantine_ms": restored.quarantine_ms,
    })
    .to_string()
}

fn as_text(options: &RestoreOptions, restored: &Restored) -> String {
    let backup = &restored.backup;
    format!(
        "member {} restored in {} from a backup of cluster {} at index {}\n\
         tokens go on above {}; the new cluster's id begins with {}\n\
         {} keys are freed and {} backends given up as lost; no key is acquired for {} s after the start\n\
         end every controller of the old cluster before the new one is started, and restore all members with the same \
         backup and the same --initial-cluster",
        options.id,
        options.data_dir.display(),
        backup.cluster_id,
        backup.index,
        restored.index,
        restored.id_prefix,
        backup.keys_held,
        backup.backends_live,
        restored.quarantine_ms.div_ceil(1000),
    )
}
