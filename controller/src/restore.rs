//! `holdfast-controller restore`: makes the first member's data directory of a new cluster from a backup. The command line's `holdfast snapshot
//! restore` starts it, so that RocksDB stays out of that program.

use crate::config::ConfigError;
use clap::Parser;
use holdfast_wire::lease::parse_duration_ms;
use raft_store::restore::{RestoreError, RestoreOptions, Restored, restore};
use serde_json::json;
use std::path::PathBuf;

/// Make the data directory of the first member of a new cluster from a backup; the others are added to it
#[derive(Debug, Clone, Parser)]
#[command(name = "holdfast-controller restore", version)]
pub struct RestoreFlags {
    /// The backup
    pub file: PathBuf,
    /// Data directory to make: missing or empty
    #[arg(long, value_name = "DIR")]
    pub data_dir: PathBuf,
    /// Where the members that are added later reach this one
    #[arg(long, value_name = "HOST:PORT")]
    pub advertise_peer: String,
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
            peer_addr: self.advertise_peer,
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
        "id": restored.member_id,
        "backup": restored.backup,
        "index": restored.index,
        "cluster_id": restored.cluster_id,
        "quarantine_ms": restored.quarantine_ms,
    })
    .to_string()
}

fn as_text(options: &RestoreOptions, restored: &Restored) -> String {
    let backup = &restored.backup;
    format!(
        "member {} of the new cluster {} restored in {} from a backup of cluster {} at index {}\n\
         tokens continue above {}\n\
         {} keys are freed and {} backends given up as lost; no key is acquired for {} s after the start\n\
         end every controller of the old cluster before this one is started, then start the others with empty data \
         directories and add them: holdfast cluster add HOST:PORT",
        restored.member_id,
        restored.cluster_id,
        options.data_dir.display(),
        backup.cluster_id,
        backup.index,
        restored.index,
        backup.keys_held,
        backup.backends_live,
        restored.quarantine_ms.div_ceil(1000),
    )
}
