//! One child process: started so that it can't outlive the test, with its log kept.

use super::wait::wait_until;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::OpenOptions;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{OnceLock, mpsc};
use std::time::Duration;

/// How much of a log is shown, in lines.
const LOG_TAIL_LINES: usize = 60;

/// The directory of the binaries: `target/release`.
pub(super) fn target_dir() -> PathBuf {
    let this = std::env::current_exe().expect("the path of this test");
    let dir = this.parent().expect("a directory of this test");
    if dir.ends_with("deps") { dir.parent().expect("target/release").to_owned() } else { dir.to_owned() }
}

/// `target/tmp`, as Cargo's `CARGO_TARGET_TMPDIR`.
pub fn target_tmp() -> PathBuf {
    let tmp = target_dir().with_file_name("tmp");
    std::fs::create_dir_all(&tmp).expect("target/tmp");
    tmp
}

/// A binary of the workspace. Cargo builds those of other crates only when asked to.
pub fn binary(name: &str) -> PathBuf {
    let path = target_dir().join(name);
    assert!(
        path.is_file(),
        "{} is missing. Tests on real processes need the binaries: `cargo build --release --workspace` first (`make test` does it)",
        path.display()
    );
    path
}

/// The library that gives a process another wall clock, if this machine has it.
pub fn libfaketime() -> Option<PathBuf> {
    ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib"]
        .iter()
        .map(|dir| Path::new(dir).join("faketime/libfaketime.so.1"))
        .find(|path| path.is_file())
}

type Job = Box<dyn FnOnce() + Send>;

/// Starts `command` from a thread that lives as long as this process: the death signal that a child asks for comes when
/// the *thread* that started it ends, and the threads of tests come and go.
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

/// A child process that can be killed, paused and started again.
#[derive(Debug)]
pub struct Process {
    /// What it is called in messages.
    pub label: String,
    program: PathBuf,
    /// Flags and their values, changed by [`Process::set_flag`] for the next start.
    flags: Vec<(String, String)>,
    env: Vec<(String, String)>,
    log: PathBuf,
    child: Option<Child>,
}

impl Process {
    pub(super) fn new(label: String, program: PathBuf, flags: Vec<(String, String)>, log: PathBuf) -> Self {
        Self { label, program, flags, env: Vec::new(), log, child: None }
    }

    /// A process like this one under another name, with flags to be changed. It does not run yet.
    pub(super) fn sibling(&self, label: String, log: PathBuf) -> Self {
        let (program, flags, env) = (self.program.clone(), self.flags.clone(), self.env.clone());
        Self { label, program, flags, env, log, child: None }
    }

    /// The value of a flag.
    pub(super) fn flag(&self, flag: &str) -> Option<&str> {
        self.flags.iter().find(|(name, _)| name == flag).map(|(_, value)| value.as_str())
    }

    /// Leaves a flag out at the next start.
    pub fn unset_flag(&mut self, flag: &str) {
        self.flags.retain(|(name, _)| name != flag);
    }

    /// Sets a flag for the next start.
    pub fn set_flag(&mut self, flag: &str, value: &str) {
        self.flags.retain(|(name, _)| name != flag);
        self.flags.push((flag.to_owned(), value.to_owned()));
    }

    /// Sets an environment variable for the next start.
    pub fn set_env(&mut self, name: &str, value: &str) {
        self.env.retain(|(n, _)| n != name);
        self.env.push((name.to_owned(), value.to_owned()));
    }

    /// Forgets all environment variables that were set, for the next start.
    pub fn clear_env(&mut self) {
        self.env.clear();
    }

    /// Moves its wall clock for the next start (`+3650d`, `-2y`), the monotonic clocks not.
    pub fn set_wall_clock(&mut self, library: &Path, offset: &str) {
        self.set_env("LD_PRELOAD", &library.display().to_string());
        self.set_env("FAKETIME", offset);
        self.set_env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        self.set_env("FAKETIME_DONT_RESET", "1");
    }

    /// Lets all its clocks run at another rate from the next start on (`1.05`), `CLOCK_BOOTTIME` and its guards' too.
    pub fn set_clock_rate(&mut self, library: &Path, rate: &str) {
        self.set_env("LD_PRELOAD", &library.display().to_string());
        self.set_env("FAKETIME", &format!("+0 x{rate}"));
        self.set_env("FAKETIME_DONT_RESET", "1");
    }

    /// Lets its wall clock, and that alone, follow what a file says (`+3600`, `-2y`) while it runs, from the next start on.
    pub fn set_wall_clock_file(&mut self, library: &Path, file: &Path) {
        self.set_env("LD_PRELOAD", &library.display().to_string());
        self.set_env("FAKETIME_TIMESTAMP_FILE", &file.display().to_string());
        self.set_env("FAKETIME_NO_CACHE", "1");
        self.set_env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        self.set_env("FAKETIME_DONT_RESET", "1");
    }

    /// Starts it.
    pub fn start(&mut self) {
        assert!(self.child.is_none(), "{} runs already", self.label);
        let log = OpenOptions::new().create(true).append(true).open(&self.log).expect("a log file");
        let mut command = Command::new(&self.program);
        // Settings of whoever runs the tests are not the tests'.
        for (name, _) in
            std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("HOLDFAST_"))
        {
            command.env_remove(name);
        }
        command
            .args(self.flags.iter().flat_map(|(flag, value)| [flag, value]))
            // Logs are shown in plain text.
            .env("NO_COLOR", "1")
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log file"))
            .stderr(log)
            .process_group(0);
        // SAFETY: prctl is async-signal-safe, and nothing is allocated.
        unsafe {
            command.pre_exec(|| Ok(set_pdeathsig(Signal::SIGKILL)?));
        }
        let child =
            spawn(command).unwrap_or_else(|e| panic!("{} can't be started: {e}", self.program.display()));
        self.child = Some(child);
    }

    /// Its process number, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = self.pid().unwrap_or_else(|| panic!("{} does not run", self.label));
        let pid = Pid::from_raw(i32::try_from(pid).expect("a process number"));
        kill(pid, signal).unwrap_or_else(|e| panic!("{signal} to {}: {e}", self.label));
    }

    /// `kill -9`, and waits until it is gone. Nothing if it does not run.
    pub fn kill9(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Both fail only if it was waited for already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Whether it ended by itself, and how.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.as_mut().and_then(|child| child.try_wait().expect("waiting for a child"))
    }

    /// Waits for its end.
    pub async fn wait(&mut self, patience: Duration) -> ExitStatus {
        let what = format!("{} ends", self.label);
        let status = wait_until(&what, patience, async || self.ended().ok_or("it runs")).await;
        self.child = None;
        status
    }

    /// Everything it has written.
    pub fn log(&self) -> String {
        std::fs::read(&self.log)
            .map_or_else(|e| e.to_string(), |log| String::from_utf8_lossy(&log).into_owned())
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

/// Kills everything whose standard output or error is a file below `dir`: guards and backends of killed drones.
pub(super) fn kill_writers_below(dir: &Path) {
    let Ok(processes) = std::fs::read_dir("/proc") else { return };
    let own = std::process::id();
    for entry in processes.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let below = |fd: &str| {
            std::fs::read_link(entry.path().join("fd").join(fd)).is_ok_and(|target| target.starts_with(dir))
        };
        if pid != own && (below("1") || below("2")) {
            // It may be gone by now.
            let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
        }
    }
}
