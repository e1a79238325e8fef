//! What processes have used, from `/proc`.

use crate::disk::{self, Disk};
use crate::problem::{During, Result};
use nix::unistd::{SysconfVar, sysconf};
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

/// What some processes have used since they began.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Usage {
    /// User and system time, in seconds, with that of their children that have ended.
    pub cpu_s: f64,
    /// `write_bytes` of `/proc/PID/io`. Only where there is nothing better: see [`disk`].
    written_bytes: u64,
}

/// The processes of a system and where they write.
#[derive(Debug, Clone)]
pub struct Servers {
    /// With their descendants.
    pub pids: Vec<u32>,
    dir: PathBuf,
    disk: Option<Disk>,
}

impl Servers {
    /// Servers with their data below `dir`.
    pub fn new(pids: Vec<u32>, dir: &Path) -> Self {
        Self { pids, dir: dir.to_owned(), disk: Disk::below(dir).ok() }
    }

    /// CPU time used so far, in seconds.
    pub fn cpu_s(&self) -> Result<f64> {
        Ok(of(&self.pids)?.cpu_s)
    }

    /// Bytes written to the disk so far: by whatever writes to it, or else what `/proc` says of these processes.
    pub fn written_bytes(&self) -> Result<u64> {
        match self.disk {
            Some(disk) => disk.written_bytes(),
            None => Ok(of(&self.pids)?.written_bytes),
        }
    }

    /// Has written what waits to be.
    pub fn sync(&self) -> Result<()> {
        disk::sync(&self.dir)
    }
}

/// One line of `/proc/PID/stat`.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Stat {
    parent: u32,
    own_ticks: u64,
    /// With those of its children that have ended.
    ticks: u64,
}

/// The command's name may hold blanks and parentheses, so the fields are counted from the last parenthesis.
fn parse_stat(text: &str) -> Option<Stat> {
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    // Fields 3, 4, …: state, ppid, …; utime, stime, cutime, cstime are fields 14 to 17.
    let tick = |at: usize| fields.get(at)?.parse::<u64>().ok();
    let own_ticks = tick(11)? + tick(12)?;
    Some(Stat { parent: fields.get(1)?.parse().ok()?, own_ticks, ticks: own_ticks + tick(13)? + tick(14)? })
}

fn seconds(ticks: u64) -> Result<f64> {
    let per_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().during("the length of a clock tick")?;
    #[allow(clippy::cast_precision_loss, reason = "far below 2^52 ticks")]
    let seconds = ticks as f64 / per_second as f64;
    Ok(seconds)
}

fn written(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/io")).ok()?;
    text.lines().find_map(|line| line.strip_prefix("write_bytes: "))?.trim().parse().ok()
}

fn stats() -> HashMap<u32, Stat> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return HashMap::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            Some((pid, parse_stat(&std::fs::read_to_string(entry.path().join("stat")).ok()?)?))
        })
        .collect()
}

/// `roots` and all that descend from them.
fn with_descendants(roots: &[u32], stats: &HashMap<u32, Stat>) -> HashSet<u32> {
    let mut found: HashSet<u32> = roots.iter().copied().filter(|pid| stats.contains_key(pid)).collect();
    loop {
        let more: Vec<u32> = stats
            .iter()
            .filter(|(pid, stat)| found.contains(&stat.parent) && !found.contains(pid))
            .map(|(pid, _)| *pid)
            .collect();
        if more.is_empty() {
            return found;
        }
        found.extend(more);
    }
}

/// What `roots` and their descendants have used. An error if one of `roots` is gone or must not be looked at.
fn of(roots: &[u32]) -> Result<Usage> {
    let stats = stats();
    let mut usage = Usage::default();
    for pid in with_descendants(roots, &stats) {
        let Some(stat) = stats.get(&pid) else { continue };
        usage.cpu_s += seconds(stat.ticks)?;
        usage.written_bytes += written(pid).unwrap_or(0);
    }
    for pid in roots {
        written(*pid).during(format!("/proc/{pid}/io can't be read"))?;
    }
    Ok(usage)
}

/// User and system time of this process without its children, in seconds.
pub fn own_cpu_s() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/self/stat").during("/proc/self/stat")?;
    seconds(parse_stat(&text).during("/proc/self/stat")?.own_ticks)
}

/// Memory of a process, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Memory {
    /// Resident, with mapped files.
    pub resident_bytes: u64,
    /// Resident without files.
    pub anonymous_bytes: u64,
}

fn parse_status(text: &str) -> Option<Memory> {
    let kib = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()
    };
    Some(Memory { resident_bytes: kib("VmRSS:")? * 1024, anonymous_bytes: kib("RssAnon:")? * 1024 })
}

/// Memory of one process; `None` if it is gone.
pub fn memory(pid: u32) -> Option<Memory> {
    parse_status(&std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stat_line_is_read_whatever_the_name() {
        let line = "42 (a) b (c)) S 7 42 42 0 -1 4194304 100 0 0 0 11 12 13 14 20 0 1 0 5 6 7";
        assert_eq!(parse_stat(line), Some(Stat { parent: 7, own_ticks: 23, ticks: 50 }));
        assert_eq!(parse_stat("42 (a) S 7"), None);
    }

    #[test]
    fn descendants_of_descendants_count_and_others_do_not() {
        let stats = [(1, 0), (2, 1), (3, 2), (4, 9), (9, 0)]
            .map(|(pid, parent)| (pid, Stat { parent, own_ticks: 1, ticks: 1 }))
            .into_iter()
            .collect();
        assert_eq!(with_descendants(&[1, 77], &stats), HashSet::from([1, 2, 3]));
    }

    #[test]
    fn this_process_is_seen_and_one_that_is_not_there_is_an_error() {
        let own = std::process::id();
        let before = of(&[own]).unwrap();
        assert!(before.cpu_s >= 0.0);
        assert!(memory(own).unwrap().resident_bytes > 0);
        assert!(of(&[u32::MAX]).is_err());
    }

    #[test]
    fn memory_is_in_bytes() {
        let text = "Name:\tx\nVmRSS:\t   2048 kB\nRssAnon:\t  1024 kB\n";
        assert_eq!(parse_status(text), Some(Memory { resident_bytes: 2 << 20, anonymous_bytes: 1 << 20 }));
    }
}
