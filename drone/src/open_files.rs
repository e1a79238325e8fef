//! The limit of open files (`RLIMIT_NOFILE`): the drone needs a few for each backend, so it takes all it may have; its
//! backends get what the drone was started with, since programs with `select` break on high numbers.

use serde::{Deserialize, Serialize};
use std::io;

/// Backends that a drone is made for.
pub const BACKENDS_MAX: u64 = 20_000;
/// Descriptors of the drone for one backend: its guard's pipes and handles on three processes, and one that comes and goes
/// while its first answer is asked for.
const FILES_PER_BACKEND: u64 = 8;
/// Descriptors of the drone beside those.
const FILES_RESERVED: u64 = 1_024;
/// What a drone with [`BACKENDS_MAX`] backends needs.
pub const WANTED: u64 = BACKENDS_MAX * FILES_PER_BACKEND + FILES_RESERVED;

/// A limit of open files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenFiles {
    /// The limit in force.
    pub soft: u64,
    /// How far a process may raise it.
    pub hard: u64,
}

impl OpenFiles {
    /// This process's limit.
    pub fn current() -> io::Result<Self> {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: `limit` is a valid struct to write to.
        match unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } {
            0 => Ok(Self { soft: limit.rlim_cur, hard: limit.rlim_max }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Makes it this process's limit. Async-signal-safe.
    pub fn apply(self) -> io::Result<()> {
        let limit = libc::rlimit { rlim_cur: self.soft, rlim_max: self.hard };
        // SAFETY: `limit` is a valid struct to read.
        match unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Raises this process's limit as far as it may, and with the right to do so (`CAP_SYS_RESOURCE`) to what is
    /// [`WANTED`]; answers what it was and what it is.
    pub fn raise() -> io::Result<(Self, Self)> {
        let before = Self::current()?;
        let hard = before.hard.max(WANTED);
        let wanted = Self { soft: hard, hard };
        if wanted.apply().is_ok() {
            return Ok((before, wanted));
        }
        let after = Self { soft: before.hard, ..before };
        after.apply()?;
        Ok((before, after))
    }

    /// Backends that this limit is enough for.
    pub fn backends(self) -> u64 {
        self.soft.saturating_sub(FILES_RESERVED) / FILES_PER_BACKEND
    }
}
