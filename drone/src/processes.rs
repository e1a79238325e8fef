//! The machine's processes and their parents, as `/proc` shows them.
//!
//! A look that failed (no free descriptor, no memory, no permission) is an error and never an empty look: whoever sees
//! nothing must have looked. Only a process that has ended is missing from an answer.

use std::collections::BTreeMap;
use std::fs;
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

/// Numbers of all processes. It is no snapshot: processes come and go while they are looked at.
pub fn pids() -> io::Result<Vec<i32>> {
    let mut pids = Vec::new();
    for entry in fs::read_dir("/proc")? {
        pids.extend(entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()));
    }
    Ok(pids)
}

/// All processes.
pub fn all() -> io::Result<Vec<Process>> {
    let mut all = Vec::new();
    for pid in pids()? {
        all.extend(one(pid)?);
    }
    Ok(all)
}

/// One process; none if it has been reaped.
pub fn one(pid: i32) -> io::Result<Option<Process>> {
    let Some(stat) = read(pid, "stat")? else { return Ok(None) };
    parse_stat(pid, &stat).map(Some).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/stat is not understood"))
    })
}

/// Reads "pid (name) state ppid …". The name may hold any bytes, also parentheses.
fn parse_stat(pid: i32, stat: &[u8]) -> Option<Process> {
    let name_end = stat.iter().rposition(|byte| *byte == b')')?;
    let after_name = std::str::from_utf8(stat.get(name_end + 1..)?).ok()?;
    let mut fields = after_name.split_ascii_whitespace();
    let state = fields.next()?;
    Some(Process { pid, parent: fields.next()?.parse().ok()?, zombie: matches!(state, "Z" | "X") })
}

/// A file of `/proc/PID`; none if the process has been reaped.
pub fn read(pid: i32, file: &str) -> io::Result<Option<Vec<u8>>> {
    if_there(fs::read(format!("/proc/{pid}/{file}")))
}

/// Takes the error of a process that has been reaped for its absence.
pub fn if_there<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Whether a process has this variable with this value in its environment. A zombie's environment is empty.
///
/// The environment of another user's process, or of a more privileged one, may be hidden from a drone. If the drone cannot
/// have started it, it is none of its backends'; any other that cannot be read (a setuid program, for one) is an error.
pub fn has_variable(pid: i32, variable: &str) -> io::Result<bool> {
    match read(pid, "environ") {
        Ok(environment) => Ok(environment.is_some_and(|environment| {
            environment.split(|byte| *byte == 0).any(|found| found == variable.as_bytes())
        })),
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
            if is_foreign(pid)? {
                Ok(false)
            } else {
                Err(e)
            }
        }
        Err(e) => Err(e),
    }
}

/// Whether this process cannot have started that one, nor anything that it has started: it has nothing of this process's
/// user (no real, effective, saved or file-system user id), or it may do what is beyond this process's bounding set.
pub fn is_foreign(pid: i32) -> io::Result<bool> {
    let Some(status) = read(pid, "status")? else { return Ok(true) };
    let own_status = fs::read("/proc/self/status")?;
    let ids = status_line(&status, "Uid:")?;
    let own_id = nix::unistd::geteuid().to_string();
    let capabilities = |status: &[u8], name: &str| {
        let hex = status_line(status, name)?;
        u64::from_str_radix(hex.trim(), 16).map_err(io::Error::other)
    };
    let beyond = capabilities(&status, "CapPrm:")? & !capabilities(&own_status, "CapBnd:")?;
    Ok(ids.split_ascii_whitespace().all(|id| id != own_id) || beyond != 0)
}

/// The rest of the line of `/proc/PID/status` that begins so.
fn status_line(status: &[u8], name: &str) -> io::Result<String> {
    let status = String::from_utf8_lossy(status);
    let line = status.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned);
    line.ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, format!("a process has no {name} in its status"))
    })
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
        let (seen, below) = (one(pid).unwrap(), descendants(&all().unwrap(), own));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(seen, Some(Process { pid, parent: own, zombie: false }));
        assert!(below.iter().any(|p| p.pid == pid) && below.iter().all(|p| p.pid != own));
    }

    #[test]
    fn a_name_that_is_no_text_hides_no_process() {
        let stat = b"7 (a) b\xff\xfe) S 5 7 7 0";
        assert_eq!(parse_stat(7, stat), Some(Process { pid: 7, parent: 5, zombie: false }));
        assert_eq!(parse_stat(7, b"7 (a"), None);
    }

    #[test]
    fn a_child_is_not_foreign_and_no_process_here_makes_a_look_fail() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let foreign = is_foreign(i32::try_from(child.id()).unwrap());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!foreign.unwrap());
        for pid in pids().unwrap() {
            has_variable(pid, "HOLDFAST_TEST_NOTHING=1").unwrap();
        }
    }

    #[test]
    fn a_process_that_has_ended_is_missing_and_an_unreadable_one_an_error() {
        assert_eq!(one(i32::MAX).unwrap(), None);
        assert!(!has_variable(i32::MAX, "A=b").unwrap());
        for code in [libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::EACCES, libc::EPERM] {
            assert!(if_there::<()>(Err(io::Error::from_raw_os_error(code))).is_err(), "{code}");
        }
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
