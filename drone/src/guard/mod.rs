//! The guard: a small process of its own above each backend, which ends the backend at its deadline even if the drone
//! is dead, stopped or cut off. It is this program started anew as `holdfast-drone guard`, without tokio.
//!
//! ```text
//!   drone ──stdin: Arm, then Update…──▶ guard ──fork──▶ init (PID 1 of a PID namespace; reaps, ends at the deadline)
//!     ▲                                   │                 ▲ killed with the guard (PDEATHSIG), and takes
//!     └────────stdout: Report…────────────┤                 │ everything in the namespace with it
//!                                         └─fork, exec──▶ backend ──▶ what the backend starts
//! ```
//!
//! Lines of JSON both ways. The end of stdin means that the drone is gone: the backend then runs on until its soft
//! deadline, where the guard asks it to end, and its hard deadline, where the guard kills everything.
//!
//! Invariants:
//!
//! 1. The guard is armed before the backend's first instruction, and looks at the clock between fork and exec.
//! 2. From the hard deadline on nothing that the backend started is alive (but for the time that a kill takes).
//!    Later deadlines count only while no end has begun. The namespace's init holds the deadline too, which it sees in
//!    a page of memory shared with the guard: so this is also true of a guard that is stopped, or blocked in an exec.
//! 3. The death of the guard is the death of everything below it.
//! 4. [`Report::Gone`] is the last report, and means that nothing is left.
//! 5. A soft end asks every process of the backend to end, and each has the whole grace period, also if the main process
//!    ends before it. If the main process ends by itself, the rest is killed at once.
//!
//! A container is held the same way, but is no child of its guard: see the module `container`.
//!
//! Without the right to make a PID namespace (not root) the guard is a child subreaper and kills all its descendants
//! instead, and a watcher beside it does so at the deadline in init's place. Then 3 holds for the backend's main process only; the drone looks for the rest by their environment.

mod contain;
mod container;
mod deadline;
mod deputy;
mod engine;
mod isolation;
pub(crate) mod output;
pub(crate) mod peer;
mod process;
pub mod timeline;

pub use isolation::probe;
pub use process::main;

use crate::open_files::OpenFiles;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::data_dir::WORK;

/// The argument that makes this program a guard.
pub const GUARD_ARGUMENT: &str = "guard";
/// Longest line of the protocol, in bytes: a command and environment, escaped.
pub const LINE_BYTES_MAX: usize = 8 * 1024 * 1024;

/// The first line to a guard.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Arm {
    /// Program and arguments.
    pub command: Vec<String>,
    /// The whole environment.
    pub env: BTreeMap<String, String>,
    /// Working directory.
    pub cwd: PathBuf,
    /// Receives standard output and error, beside a file of the output before. In the directory of the control files.
    pub log: PathBuf,
    /// A directory that the backend is not to see, but for its [work](Arm::work) below it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hide: Option<PathBuf>,
    /// Its limit of open files, if not the guard's.
    #[serde(default)]
    pub open_files: Option<OpenFiles>,
    /// The container to start in place of the command, which is empty then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<ContainerTarget>,
    /// The deadlines.
    pub update: Update,
}

/// A container that was created and not started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerTarget {
    /// The engine's Unix socket.
    pub engine: PathBuf,
    /// Its id, as the engine gave it.
    pub id: String,
    /// A file that is mounted into it, so that nobody can start it without.
    pub permit: PathBuf,
}

/// Version of what is said through the socket. Fields that one side does not know are ignored by it.
pub const PROTOCOL_VERSION: u32 = 1;

/// The first line to a later drone; the reports so far follow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL_VERSION`] of the guard.
    pub version: u32,
    /// The backend that it guards.
    pub backend: String,
    /// What was wanted last.
    pub update: Update,
    /// The container, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<ContainerTarget>,
}

/// Every later line to a guard: what the drone wants by now. The latest counts; an end that has begun is not taken back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Update {
    /// When to ask the backend to end, in milliseconds of `CLOCK_BOOTTIME`.
    pub soft_boot_ms: i64,
    /// When to kill everything, in milliseconds of `CLOCK_BOOTTIME`.
    pub hard_boot_ms: i64,
    /// End it now.
    pub end: Option<EndNow>,
    /// The lease's expiry, in milliseconds: no deadline is further ahead than that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expiry_ms: Option<u64>,
    /// It has answered HTTP; the guard tells later drones so.
    #[serde(default)]
    pub ready: bool,
}

impl Update {
    /// With no deadline further ahead than `expiry_ms` from `now_boot_ms`: no lease grants more, whatever a drone says.
    pub fn within(mut self, expiry_ms: u64, now_boot_ms: i64) -> Self {
        let latest = now_boot_ms.saturating_add_unsigned(expiry_ms);
        self.soft_boot_ms = self.soft_boot_ms.min(latest);
        self.hard_boot_ms = self.hard_boot_ms.min(latest);
        self
    }
}

impl Arm {
    /// The backend's own directory, which is its working directory by default.
    pub fn work(&self) -> PathBuf {
        self.log.with_file_name(WORK)
    }
}

/// How to end a backend now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndNow {
    /// SIGTERM to all of its processes, and a kill of what is left at this moment of `CLOCK_BOOTTIME` (milliseconds) or the hard deadline.
    Soft {
        /// When grace is over.
        kill_boot_ms: i64,
    },
    /// SIGKILL to everything.
    Hard,
}

/// A line from a guard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    /// The PID namespace stands; its init is this process. Comes before the backend is started.
    Contained {
        /// As the drone sees it.
        init_pid: i32,
    },
    /// There is no PID namespace: the descendants will be hunted down one by one.
    Uncontained {
        /// Why.
        problem: String,
    },
    /// The backend's main process runs.
    Started {
        /// As the drone sees it.
        pid: i32,
    },
    /// It was not started.
    NotStarted {
        /// Because its deadline has passed.
        late: bool,
        /// Why.
        problem: String,
    },
    /// A drone has said that the backend answers.
    Ready,
    /// The guard began a graceful end by itself, at the soft deadline.
    SoftDeadline,
    /// Everything is being killed.
    Killing,
    /// The main process has ended.
    Exited {
        /// Its exit code; none if a signal ended it.
        code: Option<i32>,
        /// The signal that ended it.
        signal: Option<i32>,
    },
    /// Nothing is left.
    Gone,
}
