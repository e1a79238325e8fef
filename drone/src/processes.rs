//! The machine's processes and their parents, as `/proc` shows them.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// A process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    /// Its number.
    pub pid: i32,
    /// Its parent's number; 0 for one that cannot be seen.
    pub parent: i32,
    /// It has ended, and waits to be reaped.
    pub zombie: bool,
}

/// All processes. It is no snapshot: processes come and go while they are looked at.
pub fn all() -> Vec<Process> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter_map(one)
        .collect()
}

/// One process, while it has not been reaped.
pub fn one(pid: i32) -> Option<Process> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // "pid (name) state ppid …"; the name may hold anything, also parentheses.
    let mut after_name = stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace();
    let state = after_name.next()?;
    Some(Process { pid, parent: after_name.next()?.parse().ok()?, zombie: matches!(state, "Z" | "X") })
}

/// A handle on a process that cannot come to mean another one; none if there is no such process.
pub fn handle(pid: i32) -> io::Result<Option<OwnedFd>> {
    // SAFETY: pidfd_open takes two integers and returns a new descriptor (close-on-exec) or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0u32) };
    match i32::try_from(fd) {
        // SAFETY: the descriptor is new and nobody else's.
        Ok(fd) if fd >= 0 => Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) })),
        _ => {
            let error = io::Error::last_os_error();
            if error.raw_os_error() == Some(libc::ESRCH) { Ok(None) } else { Err(error) }
        }
    }
}

/// All descendants of a process.
pub fn descendants(all: &[Process], root: i32) -> Vec<Process> {
    let mut children: BTreeMap<i32, Vec<Process>> = BTreeMap::new();
    for process in all {
        children.entry(process.parent).or_default().push(*process);
    }
    let mut found = Vec::new();
    let mut ancestors = vec![root];
    while let Some(ancestor) = ancestors.pop() {
        // Removed, so that numbers that were used again while we looked make no circle.
        for child in children.remove(&ancestor).unwrap_or_default() {
            found.push(child);
            ancestors.push(child.pid);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_childs_parent_is_this_process_and_it_is_a_descendant() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        let (seen, below) = (one(pid), descendants(&all(), own));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(seen, Some(Process { pid, parent: own, zombie: false }));
        assert!(below.iter().any(|p| p.pid == pid) && below.iter().all(|p| p.pid != own));
    }

    #[test]
    fn descendants_are_found_over_generations_and_circles_end() {
        let process = |pid, parent| Process { pid, parent, zombie: false };
        let all = [process(2, 1), process(3, 2), process(4, 3), process(5, 9), process(7, 8), process(8, 7)];
        let pids = |root| descendants(&all, root).iter().map(|p| p.pid).collect::<Vec<_>>();
        assert_eq!(pids(1), [2, 3, 4]);
        assert_eq!(pids(7), [8, 7]);
        assert_eq!(pids(4), [0i32; 0]);
    }
}
