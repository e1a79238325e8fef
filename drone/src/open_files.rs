//! The limit of open files (`RLIMIT_NOFILE`): the drone needs a few for each backend, so it takes all it may have; its
//! backends get what the drone was started with, since programs with `select` break on high numbers.

use serde::{Deserialize, Serialize};
use std::io;

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

    /// Raises this process's limit as far as it may; answers what it was and what it is.
    pub fn raise() -> io::Result<(Self, Self)> {
        let before = Self::current()?;
        let after = Self { soft: before.hard, ..before };
        after.apply()?;
        Ok((before, after))
    }
}
