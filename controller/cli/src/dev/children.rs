//! Child processes that do not outlive this one.

use super::plan::Process;
use crate::error::CliError;
use futures::future::select_all;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, getppid};
use std::fs::OpenOptions;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::process::{Child, Command};
use tokio::time::timeout;

/// What is kept of the environment that Holdfast's programs read: children get their settings as flags.
const KEPT_VARIABLE: &str = "HOLDFAST_LOG";

/// A child process.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) label: String,
    pub(crate) pid: u32,
    pub(crate) log: PathBuf,
    child: Child,
    /// Set once its end has been taken notice of.
    ended: bool,
}

/// Starts `program`, which gets `orphan_signal` if this process dies. Must be called on the main thread: the child gets
/// it when the thread that started it ends.
pub(crate) fn start(program: &Path, process: &Process, orphan_signal: Signal) -> Result<Running, CliError> {
    let failed = |doing: &str, error| CliError::io(format!("{doing} {}", process.label), error);
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&process.log)
        .map_err(|error| failed("opening the log of", error))?;
    let errors = log.try_clone().map_err(|error| failed("opening the log of", error))?;
    let mut command = Command::new(program);
    command.args(&process.args).stdin(Stdio::null()).stdout(log).stderr(errors).kill_on_drop(true);
    // A group of its own: Ctrl-C reaches this process alone, which then ends its children in order.
    command.process_group(0);
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("HOLDFAST_") && name != KEPT_VARIABLE) {
            command.env_remove(name);
        }
    }
    let parent = Pid::this();
    // SAFETY: between fork and exec the closure makes two system calls, which are async-signal-safe, and allocates
    // nothing.
    unsafe {
        command.pre_exec(move || {
            set_pdeathsig(orphan_signal)?;
            // Had the parent died before that, no signal would ever come.
            if getppid() != parent {
                return Err(std::io::ErrorKind::NotConnected.into());
            }
            Ok(())
        });
    }
    let child = command.spawn().map_err(|error| failed("starting", error))?;
    let pid = child.id().unwrap_or_default();
    Ok(Running { label: process.label.clone(), pid, log: process.log.clone(), child, ended: false })
}

impl Running {
    fn signal(&self, signal: Signal) {
        // Once the child is reaped there is no id, so a stranger under the same number is never hit. An error means
        // that it has just ended.
        if let Some(pid) = self.child.id().and_then(|pid| i32::try_from(pid).ok()) {
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }

    fn kill_group(&self) {
        if let Some(pid) = self.child.id().and_then(|pid| i32::try_from(pid).ok()) {
            let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// Waits for the next child to end by itself, and says which and how. Never returns while none of them lives.
pub(crate) async fn next_end(children: &mut [Running]) -> (usize, ExitStatus) {
    let waits: Vec<_> = children
        .iter_mut()
        .enumerate()
        .filter(|(_, running)| !running.ended)
        .map(|(index, running)| Box::pin(async move { (index, running.child.wait().await) }))
        .collect();
    if waits.is_empty() {
        return std::future::pending().await;
    }
    let ((index, status), ..) = select_all(waits).await;
    if let Some(running) = children.get_mut(index) {
        running.ended = true;
    }
    // A child that can't be waited for is as good as ended.
    (index, status.unwrap_or_default())
}

/// Whether any of them lives.
pub(crate) fn any_alive(children: &[Running]) -> bool {
    children.iter().any(|running| !running.ended)
}

/// How long children may take to end.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    /// After they were asked.
    pub(crate) asked: Duration,
    /// After they were asked again.
    pub(crate) urged: Duration,
}

/// Asks all of them to end; asks again once that has taken too long or `hurry` completes; then kills what is left.
pub(crate) async fn stop(children: &mut [Running], patience: Patience, hurry: impl Future<Output = ()>) {
    let ask = |children: &[Running]| children.iter().for_each(|running| running.signal(Signal::SIGTERM));
    ask(children);
    tokio::select! {
        _ = timeout(patience.asked, all_ended(children)) => {}
        () = hurry => {}
    }
    if any_alive(children) {
        ask(children);
        // What is left after that is killed: whether they ended in time makes no difference.
        let _ = timeout(patience.urged, all_ended(children)).await;
    }
    children.iter().for_each(Running::kill_group);
    all_ended(children).await;
}

async fn all_ended(children: &mut [Running]) {
    while any_alive(children) {
        next_end(children).await;
    }
}

/// How a process ended, for people.
pub(crate) fn described(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => match Signal::try_from(signal) {
            Ok(signal) => format!("killed by {signal}"),
            Err(_) => format!("killed by signal {signal}"),
        },
        (None, None) => "in an unknown way".to_owned(),
    }
}
