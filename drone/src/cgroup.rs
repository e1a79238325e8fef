//! The processes of a container, found and killed without its engine: by the control group, whose path holds the
//! container's id whatever engine and driver made it. The id is long and random, so that no other process is meant.
//!
//! A process number is never used between two looks: it is first turned into a handle, then the control group is looked
//! at, then the handle is used. So a number that was given to another process meanwhile hits nobody.

use crate::processes;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// A container's first process. The end of it is the end of all: it is PID 1 of the container's PID namespace.
#[derive(Debug)]
pub struct Init {
    /// As this process sees it.
    pub pid: i32,
    /// Readable once the process, and with it everything in its namespace, has ended.
    pub handle: OwnedFd,
}

impl Init {
    /// The process of that number, if it belongs to the container; none if it does not, or has ended.
    pub fn open(container: &str, pid: i32) -> io::Result<Option<Self>> {
        let Some(handle) = processes::handle(pid)? else { return Ok(None) };
        Ok(belongs(container, pid)?.then_some(Self { pid, handle }))
    }

    /// The container's first process, found among all of the machine.
    pub fn find(container: &str) -> io::Result<Option<Self>> {
        for pid in members(container)? {
            if is_first_in_namespace(pid)?
                && let Some(init) = Self::open(container, pid)?
            {
                return Ok(Some(init));
            }
        }
        Ok(None)
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        let mut poll = libc::pollfd { fd: self.handle.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd.
        unsafe { libc::poll(&raw mut poll, 1, 0) > 0 }
    }

    /// Sends it a signal; EPERM if it is not ours to do. It takes effect later if the container is paused.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        signal_by(&self.handle, signal)
    }
}

/// Kills every process of the container, and says how many there were. What was being forked meanwhile is found by the
/// next call. Fails if any process of the machine cannot be looked at: then nothing can be said.
pub fn kill_all(container: &str) -> io::Result<usize> {
    let mut found = 0;
    for pid in members(container)? {
        let Some(handle) = processes::handle(pid)? else { continue };
        if belongs(container, pid)? {
            found += 1;
            // Who may not do this counts what is there all the same, and has the engine do it.
            let _ = signal_by(&handle, libc::SIGKILL);
        }
    }
    Ok(found)
}

/// Numbers of the processes in the container's control group that have not ended.
pub fn members(container: &str) -> io::Result<Vec<i32>> {
    let mut members = Vec::new();
    for pid in processes::pids()? {
        if belongs(container, pid)? {
            members.push(pid);
        }
    }
    Ok(members)
}

/// Whether this process is in the container's control group, or one below it, and has not ended.
fn belongs(container: &str, pid: i32) -> io::Result<bool> {
    let Some(groups) = processes::read(pid, "cgroup")? else { return Ok(false) };
    Ok(names(&String::from_utf8_lossy(&groups), container) && !has_ended(pid)?)
}

/// Whether a line of `/proc/PID/cgroup` names the container: `…/docker/ID`, `…/docker-ID.scope`, or a group below.
fn names(groups: &str, container: &str) -> bool {
    let is_it = |part: &str| {
        let part = part.strip_suffix(".scope").unwrap_or(part);
        part == container || part.rsplit_once('-').is_some_and(|(_, id)| id == container)
    };
    !container.is_empty() && groups.lines().any(|line| line.split('/').any(is_it))
}

/// A zombie has ended, unless only its first thread has.
fn has_ended(pid: i32) -> io::Result<bool> {
    let Some(process) = processes::one(pid)? else { return Ok(true) };
    if !process.zombie {
        return Ok(false);
    }
    let mut threads = 0;
    for thread in processes::if_there(fs::read_dir(format!("/proc/{pid}/task")))?.into_iter().flatten() {
        // A thread that ends while it is listed ends the list.
        threads += usize::from(processes::if_there(thread)?.is_some());
    }
    Ok(threads <= 1)
}

fn is_first_in_namespace(pid: i32) -> io::Result<bool> {
    let status = processes::read(pid, "status")?;
    Ok(status.is_some_and(|status| is_first(&String::from_utf8_lossy(&status))))
}

/// `NSpid` holds the process' numbers from ours to the innermost namespace.
fn is_first(status: &str) -> bool {
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    let numbers: Vec<&str> = numbers.map(|line| line.split_ascii_whitespace().collect()).unwrap_or_default();
    numbers.len() > 1 && numbers.last() == Some(&"1")
}

fn signal_by(handle: &OwnedFd, signal: i32) -> io::Result<()> {
    let none = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: a signal to an open handle; a null siginfo means what kill(2) sends.
    let rc = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, handle.as_raw_fd(), signal, none, 0u32) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "9ec397f5a2c45418b39b2461873f3c2705c5896aec1cc1cfc59c84422ed512a0";

    #[test]
    fn a_group_names_its_container_whatever_made_it() {
        for group in [
            format!("9:pids:/docker/{ID}\n0::/\n"),
            format!("0::/system.slice/docker-{ID}.scope\n"),
            format!("0::/machine.slice/libpod-{ID}.scope/container\n"),
            format!("1:cpu:/\n0::/../{ID}"),
        ] {
            assert!(names(&group, ID), "{group}");
        }
        let longer = format!("0::/docker/a{ID}\n");
        let shorter = format!("0::/docker/{}\n", &ID[1..]);
        for group in [longer.as_str(), shorter.as_str(), "0::/docker\n", "0::/user.slice\n", ""] {
            assert!(!names(group, ID), "{group}");
        }
        assert!(!names("0::/\n", ""), "no id names no container");
    }

    #[test]
    fn the_first_of_an_inner_namespace_is_an_init() {
        assert!(is_first("Name:\tx\nNSpid:\t14486\t1\n"));
        assert!(is_first("NSpid:\t14486\t200\t1\n"));
        assert!(!is_first("NSpid:\t14486\t12\n"));
        assert!(!is_first("NSpid:\t1\n"), "the machine's own");
        assert!(!is_first("Name:\tx\n"));
    }

    #[test]
    fn a_process_of_another_group_is_no_init_of_the_container() {
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(Init::open(ID, own).unwrap().is_none());
        assert_eq!(members(ID).unwrap(), [0i32; 0]);
        assert_eq!(kill_all(ID).unwrap(), 0);
        assert!(Init::find(ID).unwrap().is_none());
    }

    #[test]
    fn a_zombie_has_ended_and_a_living_process_has_not() {
        let mut child = std::process::Command::new("sleep").arg("300").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        assert!(!has_ended(pid).unwrap());
        let init = Init { pid, handle: processes::handle(pid).unwrap().unwrap() };
        assert!(!init.has_ended());
        init.signal(libc::SIGKILL).unwrap();
        let mut poll = libc::pollfd { fd: init.handle.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd.
        assert_eq!(unsafe { libc::poll(&raw mut poll, 1, 20_000) }, 1);
        assert!(init.has_ended() && has_ended(pid).unwrap(), "nobody has reaped it yet");
        child.wait().unwrap();
        assert!(processes::handle(pid).unwrap().is_none());
    }
}
