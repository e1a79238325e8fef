//! What holds a backend and everything it starts: a PID namespace where the guard may make one.

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal, kill, killpg};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, pipe, read, write};
use std::os::fd::{AsFd, AsRawFd};

/// What [`contain`] has achieved.
#[derive(Debug)]
pub enum Container {
    /// A PID namespace with this init.
    Namespace(Pid),
    /// Only the process tree below the guard, for this reason.
    Tree(String),
}

/// Makes a PID namespace for later children, with an init that dies with this process, or says why it cannot.
/// This process must have a single thread.
pub fn contain() -> Container {
    // Orphans of the tree become ours in any case. Inside a namespace they become its init's.
    if let Err(e) = prctl::set_child_subreaper(true) {
        log_line(&format!("cannot become a subreaper: {e}"));
    }
    let with_mounts = CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS;
    let own_mounts = match unshare(with_mounts) {
        Ok(()) => true,
        Err(_) => match unshare(CloneFlags::CLONE_NEWPID) {
            Ok(()) => false,
            Err(e) => return Container::Tree(format!("no PID namespace: {e}")),
        },
    };
    match start_init(own_mounts) {
        Ok(init) => Container::Namespace(init),
        // Children of ours would go to a namespace without an init: without a namespace for children again, the
        // backend could not be started at all. The caller reports that.
        Err(e) => Container::Tree(format!("no init for the PID namespace: {e}")),
    }
}

/// Forks the namespace's init and waits until it is bound to this process.
fn start_init(own_mounts: bool) -> nix::Result<Pid> {
    let (bound_read, bound_write) = pipe()?;
    // SAFETY: a guard has one thread, so the child may do everything the parent may.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => {
            drop(bound_write);
            match read(&bound_read, &mut [0u8]) {
                Ok(1) => Ok(child),
                Ok(_) => Err(Errno::ECHILD),
                Err(e) => Err(e),
            }
        }
        ForkResult::Child => {
            drop(bound_read);
            let _ = prctl::set_name(c"holdfast-init");
            if prctl::set_pdeathsig(Signal::SIGKILL).is_err() {
                exit_now(1);
            }
            if own_mounts {
                mount_proc();
            }
            // The pipes belong to the guard alone: their ends must be seen when it dies.
            detach_stdio();
            // If the guard died before PDEATHSIG was set, nobody reads this and init ends here. (In the namespace
            // getppid() is 0 whether or not the parent lives.)
            if write(&bound_write, &[1]).is_err() {
                exit_now(1);
            }
            drop(bound_write);
            reap_for_ever();
        }
    }
}

/// Replaces stdin and stdout by `/dev/null`.
fn detach_stdio() {
    if let Ok(null) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null") {
        for fd in [libc::STDIN_FILENO, libc::STDOUT_FILENO] {
            // SAFETY: plain descriptor numbers of this process; nothing in it owns 0 and 1 as Rust objects across this.
            unsafe { libc::dup2(null.as_fd().as_raw_fd(), fd) };
        }
    }
}

/// Shows the namespace's own processes in `/proc`, in a mount namespace of its own. Programs that look at `/proc` by
/// their process number need it; the rest does not, so a failure is only noted.
fn mount_proc() {
    let none: Option<&str> = None;
    let result = mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none).and_then(|()| {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("proc"), "/proc", Some("proc"), flags, none)
    });
    if let Err(e) = result {
        log_line(&format!("the backend sees the machine's /proc, not its own: {e}"));
    }
}

/// The whole life of the namespace's init: orphans are reaped. SIGCHLD is blocked, as the guard had it.
fn reap_for_ever() -> ! {
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    loop {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(_) => break,
                Ok(_) => {}
            }
        }
        if children.wait().is_err() {
            exit_now(1);
        }
    }
}

fn exit_now(code: i32) -> ! {
    // SAFETY: ends the process without running the guard's destructors, which are not the child's.
    unsafe { libc::_exit(code) }
}

/// Kills everything below the guard. Called again until nothing is left to wait for: a process tree may grow while it is
/// walked.
pub fn kill_all(container: &Container, backend: Option<Pid>) {
    match container {
        // The kernel kills whatever is in the namespace, and init's end is complete only when all of it is gone.
        Container::Namespace(init) => {
            let _ = kill(*init, Signal::SIGKILL);
        }
        Container::Tree(_) => {
            if let Some(backend) = backend {
                let _ = killpg(backend, Signal::SIGKILL);
            }
            for pid in descendants(Pid::this().as_raw()) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
    }
}

/// All descendants of a process, by the parents that `/proc` names.
fn descendants(root: i32) -> Vec<i32> {
    let mut parents = Vec::new();
    if let Ok(entries) = std::fs::read_dir("/proc") {
        for entry in entries.flatten() {
            if let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok())
                && let Some(parent) = parent_of(pid)
            {
                parents.push((pid, parent));
            }
        }
    }
    let mut found = vec![root];
    let mut at = 0;
    while let Some(&ancestor) = found.get(at) {
        found.extend(parents.iter().filter(|(_, parent)| *parent == ancestor).map(|(pid, _)| *pid));
        at += 1;
    }
    found.remove(0);
    found
}

fn parent_of(pid: i32) -> Option<i32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // "pid (name) state ppid …"; the name may hold anything, also parentheses.
    let after_name = stat.get(stat.rfind(')')? + 1..)?;
    after_name.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// A line for the guard's log: its standard error.
pub fn log_line(text: &str) {
    eprintln!("guard {}: {text}", std::process::id());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_childs_parent_is_this_process_and_it_is_a_descendant() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let own = Pid::this().as_raw();
        let (parent, found) = (parent_of(pid), descendants(own));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(parent, Some(own));
        assert!(found.contains(&pid) && !found.contains(&own));
    }
}
