//! A replica: the key state machine of [`holdfast_core`], replicated by openraft over RocksDB.
//!
//! ```text
//!        propose / linearizable                    peers (binary streams, own listener)
//!                │                                        │            ▲
//!          ┌─────▼─────┐  not leader: forward             ▼            │
//!          │   Store   │──────────────────────▶  transport::server  transport::network
//!          └─────┬─────┘                                  │            │
//!                │ leader                                 ▼            │
//!                ▼                                ┌────────────────────┴─┐
//!        client_write ───────────────────────────▶│       openraft       │
//!                                                 └──┬───────────────┬───┘
//!      LogEntry::new stamps it (types::Stamper)      │ append        │ committed
//!                                                    ▼               ▼
//!                                  log_store: group commit,   state_machine: apply in batches,
//!                                  one writer thread          snapshots = checkpoints
//!                                                    │               │
//!                                                 RocksDB log    RocksDB state ──▶ reads, effects
//! ```
//!
//! openraft stays behind `types`, `log_store`, `state_machine`, `transport` and `store`: nothing of it, nor of RocksDB,
//! appears in [`api`] or [`Store`].
//!
//! Invariants (numbered as in the design):
//!
//! 2. *Tokens grow*: a log index is never used twice; a purged log goes on after its purge point.
//! 3. *No early expiry*: an entry is stamped at append, by the term it is appended in ([`holdfast_core::clock`]); the base
//!    of a reign counts only what the log still holds, so a truncated entry's stamp is forgotten.
//! 5. *Acknowledged means durable*: an append is acknowledged after its WAL sync; the state is made durable before the
//!    log that could rebuild it is purged; snapshots and pointers are renamed into place after they are synced.
//! 6. *Replicas agree*: what is applied depends on the entry and the state alone; membership, position and writes of a
//!    batch commit together.
//! 7. *Bounded*: proposals, frames, batches, connections and queues have named limits beside their use.
//! 8. *Unknown is said*: [`ProposeError`] tells "certainly not done" from "done or not done".

pub mod api;
mod background;
pub mod backup;
mod boot_clock;
#[cfg(test)]
mod checkpoint_test;
mod checksums;
mod codec;
#[cfg(test)]
mod contradiction_test;
pub mod disk;
mod effects;
mod files;
mod floors;
#[cfg(test)]
mod floors_test;
mod gauge;
#[cfg(test)]
mod group_commit_test;
mod incoming;
#[doc(hidden)]
pub mod inspect;
mod keeper;
mod log_files;
mod log_store;
mod membership;
mod metrics;
mod overlay;
mod raft_thread;
pub mod restore;
mod row_cache;
mod scrub;
mod snapshots;
pub mod state_db;
mod state_machine;
mod store;
#[cfg(test)]
mod suite_test;
mod table_files;
mod transport;
mod types;

pub use api::*;
pub use gauge::{BUCKETS_US, DiskTimes};
pub use holdfast_backup as backup_file;
pub use holdfast_core as core;
pub use membership::init::{InitError, InitRequest, Initialised};
pub use membership::naming::DiskIdentity;
pub use membership::waiting::{Opened, Waiting, WeakWaiting};
pub use membership::{MEMBERS_MAX, PEER_ADDR_BYTES_MAX};
pub use metrics::StoreMetrics;
pub use store::{PROPOSAL_BYTES_MAX, Store};
