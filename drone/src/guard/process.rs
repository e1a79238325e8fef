//! The guard process itself.

use super::contain::{Container, contain, end_if_alone, kill_all, leave_namespace, log_line, term_all};
use super::container;
use super::deadline::SharedDeadline;
use super::isolation::{Isolation, change_dir, show_own_processes};
use super::output::{Output, both};
pub(super) use super::peer::{Input, report};
use super::timeline::{Step, Timeline};
use super::{Arm, Report};
use crate::clock::{BootTimer, boot_ms};
use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, setsid};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};

/// While everything is being killed, the kill is repeated this often, in milliseconds: a process tree may grow while it
/// is walked.
const KILL_REPEAT_MS: i32 = 20;
/// Exit code of a guard that could not do its work at all.
const EXIT_BROKEN: u8 = 70;

/// Runs a guard to its end: see the module above.
pub fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            log_line(&format!("{e}"));
            ExitCode::from(EXIT_BROKEN)
        }
    }
}

fn run() -> io::Result<()> {
    // Nothing of the drone's parent's may be held open from here on, least of all other backends' pipes.
    // SAFETY: no Rust object owns a descriptor from 3 on yet.
    unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, 0u32) };
    let _ = prctl::set_name(c"holdfast-guard");
    // The guard outlives Ctrl-C, hang-ups and a drone's stop; children of ours unblock everything again.
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None)?;
    let mut input = Input::new()?;
    let Some(first) = input.first_line() else { return Ok(()) };
    let mut arm: Arm = serde_json::from_slice(&first).map_err(io::Error::other)?;
    arm.update = input.checked(arm.update);
    let backend = std::env::args().nth(2).unwrap_or_default();
    input.listen(&backend, &arm);
    if let Some(target) = arm.container.take() {
        return container::guard(arm, target, &mut input);
    }
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    let signals = SignalFd::with_flags(&children, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    let timer = BootTimer::new()?;
    let timeline = Timeline::new(arm.update);
    let deadline = SharedDeadline::new(timeline.hard_at())?;
    let container = contain(&deadline);
    match &container {
        Container::Namespace(init) => report(&Report::Contained { init_pid: init.as_raw() }),
        Container::Tree { problem, .. } => {
            log_line(problem);
            report(&Report::Uncontained { problem: problem.clone() });
        }
    }
    let guard =
        Guard { arm, timeline, deadline, container, backend: None, killing: false, looks_fail: false };
    guard.guard(&mut input, &signals, &timer)
}

struct Guard {
    arm: Arm,
    timeline: Timeline,
    /// The timeline's hard deadline, for the one who holds it should this process be stopped or blocked.
    deadline: SharedDeadline,
    container: Container,
    /// The main process, until it is reaped.
    backend: Option<Pid>,
    killing: bool,
    /// The last look for what is left failed, so that it has to be repeated.
    looks_fail: bool,
}

impl Guard {
    fn guard(mut self, input: &mut Input, signals: &SignalFd, timer: &BootTimer) -> io::Result<()> {
        // What the drone has said in the meantime counts before the start.
        self.take_updates(input);
        let (started, mut output) = match Output::new() {
            Ok((output, pipe)) => (self.start(pipe), Some(output)),
            Err(e) => (Err(NotStarted::from_io(e)), None),
        };
        leave_namespace(&self.container);
        if let Some(output) = &output {
            output.write_to(&self.arm.log);
        }
        match started {
            Ok(pid) => {
                self.backend = Some(pid);
                report(&Report::Started { pid: pid.as_raw() });
            }
            Err(NotStarted { late, problem }) => {
                log_line(&format!("not started: {problem}"));
                report(&Report::NotStarted { late, problem });
                self.kill();
            }
        }
        loop {
            match self.timeline.due(boot_ms()) {
                Step::Wait => {}
                Step::Term { by_deadline } => {
                    if by_deadline && self.backend.is_some() {
                        report(&Report::SoftDeadline);
                    }
                    if let Some(backend) = self.backend {
                        term_all(&self.container, backend);
                    }
                }
                Step::Kill => {
                    // What outlived the main process of a soft end, too.
                    if !self.killing {
                        report(&Report::Killing);
                    }
                    self.kill();
                }
            }
            if self.reap() {
                if let Some(output) = output {
                    output.finish();
                }
                report(&Report::Gone);
                return Ok(());
            }
            if self.killing {
                kill_all(&self.container, self.backend);
            } else if self.backend.is_none() {
                self.looks_fail = end_if_alone(&self.container)
                    .inspect_err(|e| log_line(&format!("cannot look for what is left: {e}")))
                    .is_err();
            }
            timer.arm(self.timeline.next_wake())?;
            self.wait(input, signals, timer, output.as_mut())?;
            self.take_updates(input);
        }
    }

    /// Starts the backend, unless its time has passed.
    fn start(&self, output: io::PipeWriter) -> Result<Pid, NotStarted> {
        let late =
            || NotStarted { late: true, problem: "its deadline has passed or its end was asked for".into() };
        if !self.timeline.may_start(boot_ms()) {
            return Err(late());
        }
        let start_before = self.timeline.start_before();
        // In a namespace of its own the backend cannot see its parent, and need not: init is bound to the guard.
        let parent = match self.container {
            Container::Namespace(_) => None,
            Container::Tree { .. } => Some(Pid::this()),
        };
        let mut command = self.command(output).map_err(NotStarted::from_io)?;
        let isolation = match &self.arm.hide {
            Some(hidden) => Some(Isolation::new(hidden, &self.arm.work()).map_err(NotStarted::from_io)?),
            None => None,
        };
        let cwd =
            CString::new(self.arm.cwd.as_os_str().as_bytes()).map_err(|e| NotStarted::from_io(e.into()))?;
        let open_files = self.arm.open_files;
        // SAFETY: only async-signal-safe calls between fork and exec.
        unsafe {
            command.pre_exec(move || {
                setsid()?;
                prctl::set_pdeathsig(Signal::SIGKILL)?;
                if parent.is_some_and(|parent| Pid::parent() != parent) {
                    return Err(Errno::ECHILD.into());
                }
                match &isolation {
                    Some(isolation) => isolation.enter()?,
                    None if parent.is_none() => show_own_processes(),
                    None => {}
                }
                change_dir(&cwd)?;
                for number in 1..32 {
                    libc::signal(number, libc::SIG_DFL);
                }
                sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
                if let Some(open_files) = open_files {
                    // A limit that is not what it should be keeps nobody from running.
                    let _ = open_files.apply();
                }
                // The machine may have slept since: this is the last look before the backend's first instruction.
                if boot_ms() >= start_before { Err(Errno::ETIME.into()) } else { Ok(()) }
            });
        }
        // Blocks until the exec is done, which a file system that hangs may put off for ever. Meanwhile the deadline is
        // held by the namespace's init or the watcher; their kill ends this wait too.
        let child = command.spawn().map_err(|e| match e.raw_os_error() {
            Some(libc::ETIME) => late(),
            _ => NotStarted::from_io(e),
        })?;
        // `child` is reaped by number, with everything else; dropping it does nothing.
        i32::try_from(child.id()).map(Pid::from_raw).map_err(|e| NotStarted::from_io(io::Error::other(e)))
    }

    fn command(&self, output: io::PipeWriter) -> io::Result<Command> {
        let Some((program, arguments)) = self.arm.command.split_first() else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the command is empty"));
        };
        let (stdout, stderr) = both(output)?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env_clear()
            .envs(&self.arm.env)
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(stderr);
        Ok(command)
    }

    fn kill(&mut self) {
        self.killing = true;
        kill_all(&self.container, self.backend);
    }

    /// Reaps what has ended; true when nothing is left.
    fn reap(&mut self) -> bool {
        loop {
            let (pid, code, signal) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, Some(code), None),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, None, Some(signal as i32)),
                Ok(WaitStatus::StillAlive) => return false,
                Ok(_) | Err(Errno::EINTR) => continue,
                Err(_) => return true,
            };
            let is_init = matches!(self.container, Container::Namespace(init) if init == pid);
            if self.backend == Some(pid) {
                self.backend = None;
                // Init or the watcher may have been faster at the deadline.
                let at_deadline = boot_ms() >= self.timeline.hard_at();
                if signal == Some(Signal::SIGKILL as i32) && !self.killing && at_deadline {
                    report(&Report::Killing);
                }
                report(&Report::Exited { code, signal });
                // What it has started does not outlive it, unless it was asked to end: then all of it has the grace.
                if !self.timeline.is_ending_softly() {
                    self.kill();
                }
            } else if is_init && !self.killing && self.backend.is_some() {
                // Somebody killed the init: the kernel kills the rest.
                log_line("the namespace's init has ended");
                self.killing = true;
            }
        }
    }

    /// Waits for the drone, a child's end, output or the timer.
    fn wait(
        &self,
        input: &Input,
        signals: &SignalFd,
        timer: &BootTimer,
        mut output: Option<&mut Output>,
    ) -> io::Result<()> {
        let poll = |fd: RawFd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // A negative descriptor is left out by poll(2).
        let output_fd = output.as_ref().map_or(-1, |output| output.poll_fd());
        let mut fds =
            [poll(signals.as_raw_fd()), poll(timer.as_raw_fd()), poll(input.poll_fd()), poll(output_fd)];
        let timeout_ms = if self.killing || self.looks_fail { KILL_REPEAT_MS } else { -1 };
        // SAFETY: `fds` is a valid array of its length.
        let rc = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout_ms) };
        if rc < 0 && Errno::last() != Errno::EINTR {
            return Err(Errno::last().into());
        }
        timer.clear()?;
        // Several ends share one signal: its count says nothing, and reap() looks at all children.
        while signals.read_signal()?.is_some() {}
        if let Some(output) = output.as_mut() {
            output.take();
        }
        Ok(())
    }

    fn take_updates(&mut self, input: &mut Input) {
        for update in input.updates() {
            self.timeline.update(update);
        }
        self.deadline.set(self.timeline.hard_at());
    }
}

struct NotStarted {
    late: bool,
    problem: String,
}

impl NotStarted {
    fn from_io(e: io::Error) -> Self {
        Self { late: false, problem: e.to_string() }
    }
}
