//! A server of a peer: started so that it can't outlive this process, ended when dropped.

use crate::problem::{During, Result, problem};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User, geteuid};
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Whom servers run as that refuse to run as root; Debian's package makes this user.
const UNPRIVILEGED: &str = "postgres";

/// See the module.
#[derive(Debug)]
pub struct Server {
    child: Child,
    log: PathBuf,
    /// How it is asked to end; a postmaster must not be killed before its children.
    stop: Signal,
}

/// The user for a server that refuses to run as root: none if this is not root.
pub fn unprivileged() -> Result<Option<User>> {
    if !geteuid().is_root() {
        return Ok(None);
    }
    let user = User::from_name(UNPRIVILEGED).during("looking for the user postgres")?;
    user.during("there is no user postgres (deploy/prerequisites.sh bench)").map(Some)
}

/// A command as that user, without this process's `prefix` environment.
pub fn command(program: &Path, user: Option<&User>, prefix: &str) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with(prefix)) {
        command.env_remove(name);
    }
    if let Some(user) = user {
        command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
    }
    command.stdin(Stdio::null());
    command
}

impl Server {
    /// Starts it; `log` takes what it says. Call it only from the main thread: the child asks to be ended with the thread
    /// that started it.
    pub fn start(mut command: Command, log: PathBuf, stop: Signal) -> Result<Self> {
        let program = command.get_program().to_string_lossy().into_owned();
        let file = File::create(&log).during(log.display())?;
        command.stdout(file.try_clone().during(log.display())?).stderr(file).process_group(0);
        // SAFETY: prctl is async-signal-safe, and nothing is allocated.
        unsafe {
            command.pre_exec(move || Ok(set_pdeathsig(stop)?));
        }
        let child = command.spawn().during(format!("{program} can't be started"))?;
        Ok(Self { child, log, stop })
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// An error with its log's end if it has ended by itself.
    pub fn check(&mut self) -> Result<()> {
        match self.child.try_wait().during("waiting for a server")? {
            None => Ok(()),
            Some(status) => problem(format!("a server ended ({status}):\n{}", self.log_tail())),
        }
    }

    /// The end of what it said.
    pub fn log_tail(&self) -> String {
        const LINES: usize = 20;
        let log = std::fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log).into_owned();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(LINES)..].join("\n")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = kill(Pid::from_raw(self.child.id().cast_signed()), self.stop);
        let _ = self.child.wait();
    }
}
