//! Power loss: what a disk holds after it, rebuilt from a journal of everything that was done to it.
//!
//! ```text
//!   controllers under LD_PRELOAD=faultfs ──every write, sync, rename, …──▶ one journal ◀── "acknowledged: …" ── clients
//!                                                                             │ cut anywhere, replay up to there
//!                                                                             ▼
//!                                        Disk of each node ── loses what was not synced ──▶ a directory to start from
//! ```
//!
//! The journal is one file with one order, so that one cut gives a state of all nodes that could have been at one
//! moment. What the model promises is what POSIX does: data is sure after a sync of its file, a name after a sync of its
//! directory. Of the rest a seeded choice survives: nothing, everything, a prefix with a torn end, or for each page and
//! each name by itself.

mod disk;
mod journal;
mod shim;

pub use disk::{Disk, Loss};
pub use journal::{Journal, Op, Record};
pub use shim::{Shim, clean_tmpfs_dir};
