//! A process on a host.

use super::net::Namespace;
use crate::harness::wait_until;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::OpenOptions;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{OnceLock, mpsc};
use std::time::Duration;

/// How much of a log is shown, in lines.
const LOG_TAIL_LINES: usize = 60;

type Job = Box<dyn FnOnce() + Send>;

/// Starts `command` from a thread that lives as long as this process: a child's death signal comes when the *thread* that
/// started it ends.
fn spawn(mut command: Command) -> std::io::Result<Child> {
    static SPAWNER: OnceLock<mpsc::Sender<Job>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (jobs, todo) = mpsc::channel::<Job>();
        std::thread::spawn(move || todo.iter().for_each(|job| job()));
        jobs
    });
    let (done, result) = mpsc::channel();
    let job: Job = Box::new(move || {
        let _ = done.send(command.spawn());
    });
    spawner.send(job).expect("the thread that starts processes");
    result.recv().expect("the thread that starts processes")
}

/// A command that runs in a namespace, without settings of whoever runs the tests.
pub(super) fn command(program: &std::path::Path, namespace: &Namespace) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("HOLDFAST_")) {
        command.env_remove(name);
    }
    let namespace = namespace.clone();
    command.env("NO_COLOR", "1").stdin(Stdio::null());
    // SAFETY: both are system calls and nothing is allocated.
    unsafe {
        command.pre_exec(move || {
            namespace.enter()?;
            Ok(set_pdeathsig(Signal::SIGKILL)?)
        });
    }
    command
}

/// See the module. Killed when dropped.
#[derive(Debug)]
pub struct Process {
    /// What it is called in messages.
    pub label: String,
    program: PathBuf,
    args: Vec<String>,
    namespace: Namespace,
    log: PathBuf,
    child: Option<Child>,
}

impl Process {
    pub(super) fn new(
        label: &str,
        program: PathBuf,
        args: Vec<String>,
        namespace: Namespace,
        log: PathBuf,
    ) -> Self {
        Self { label: label.to_owned(), program, args, namespace, log, child: None }
    }

    /// Sets a flag for the next start.
    pub fn set_flag(&mut self, flag: &str, value: &str) {
        self.unset_flag(flag);
        self.args.extend([flag.to_owned(), value.to_owned()]);
    }

    /// Leaves a flag out at the next start.
    pub fn unset_flag(&mut self, flag: &str) {
        if let Some(at) = self.args.iter().position(|arg| arg == flag) {
            self.args.drain(at..at + 2);
        }
    }

    /// Starts it.
    pub fn start(&mut self) {
        assert!(self.child.is_none(), "{} runs already", self.label);
        let log = OpenOptions::new().create(true).append(true).open(&self.log).expect("a log file");
        let mut command = command(&self.program, &self.namespace);
        command.args(&self.args).stdout(log.try_clone().expect("a log file")).stderr(log).process_group(0);
        let child = spawn(command).unwrap_or_else(|e| panic!("{} can't be started: {e}", self.label));
        self.child = Some(child);
    }

    /// Whether it was started and not killed since.
    pub fn is_started(&self) -> bool {
        self.child.is_some()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = self.child.as_ref().unwrap_or_else(|| panic!("{} does not run", self.label)).id();
        kill(Pid::from_raw(pid.cast_signed()), signal)
            .unwrap_or_else(|e| panic!("{signal} to {}: {e}", self.label));
    }

    /// `kill -9`, and waits until it is gone. Nothing if it does not run.
    pub fn kill9(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Both fail only if it was waited for already.
            let _ = (child.kill(), child.wait());
        }
    }

    /// Waits for its end.
    pub async fn ended(&mut self, patience: Duration) -> ExitStatus {
        let what = format!("{} ends", self.label);
        let child = self.child.as_mut().expect("a started process");
        let status =
            wait_until(&what, patience, async || child.try_wait().expect("a child").ok_or("it runs")).await;
        self.child = None;
        status
    }

    /// Everything it has written.
    pub fn log(&self) -> String {
        let log = std::fs::read(&self.log);
        log.map_or_else(|e| e.to_string(), |log| String::from_utf8_lossy(&log).into_owned())
    }

    /// Where its log ends now, to look only at what comes later.
    pub fn log_len(&self) -> usize {
        self.log().len()
    }

    /// Waits until it has written something after that place of its log.
    pub async fn wait_log(&self, from: usize, text: &str, patience: Duration) {
        wait_until(&format!("{} writes {text:?}", self.label), patience, async || {
            let log = self.log();
            if log.get(from..).is_some_and(|new| new.contains(text)) { Ok(()) } else { Err(self.log_tail()) }
        })
        .await;
    }

    pub(super) fn log_tail(&self) -> String {
        let log = self.log();
        let skip = log.lines().count().saturating_sub(LOG_TAIL_LINES);
        log.lines().skip(skip).map(|line| format!("  {}: {line}\n", self.label)).collect()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill9();
    }
}
