//! The guard with real processes: it is armed as the drone does it, and then the drone, the guard or the backend
//! misbehaves. What is alive is found by a mark in the environment that all descendants inherit.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "what a test prints is read by people")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

mod common;

use common::readable_by_others;
use holdfast_drone::clock::boot_ms;
use holdfast_drone::guard::{Arm, EndNow, Report, Update};
use holdfast_drone::processes;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(20);
/// How late a kill may be seen on a loaded machine, in milliseconds.
const LATE_MS: i64 = 1_500;
const GUARD: &str = env!("CARGO_BIN_EXE_holdfast-drone");
const NOBODY: u32 = 65_534;

struct Guarded {
    guard: Child,
    stdin: Option<ChildStdin>,
    reports: Receiver<Report>,
    mark: String,
    dir: tempfile::TempDir,
}

impl Drop for Guarded {
    fn drop(&mut self) {
        let _ = self.guard.kill();
        let _ = self.guard.wait();
        for pid in marked(&self.mark) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

fn update(soft_in_ms: i64, hard_in_ms: i64, end: Option<EndNow>) -> Update {
    let now = boot_ms();
    Update { soft_boot_ms: now + soft_in_ms, hard_boot_ms: now + hard_in_ms, end, ..Update::default() }
}

/// Arms a guard with a shell script.
fn guarded(script: &str, update: Update) -> Guarded {
    guarded_by(Command::new(GUARD), &["sh", "-c", script], update)
}

fn guarded_by(mut program: Command, command: &[&str], update: Update) -> Guarded {
    let dir = tempfile::tempdir().unwrap();
    let mark = format!("GUARD_TEST_MARK={}", dir.path().file_name().unwrap().to_str().unwrap());
    let (name, value) = mark.split_once('=').unwrap();
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let mut guard = program.arg("guard").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let arm = Arm {
        command: command.iter().map(|s| (*s).to_owned()).collect(),
        env: BTreeMap::from([
            ("PATH".to_owned(), std::env::var("PATH").unwrap()),
            (name.to_owned(), value.to_owned()),
        ]),
        ..common::arm(dir.path(), update)
    };
    let mut stdin = guard.stdin.take().unwrap();
    writeln!(stdin, "{}", serde_json::to_string(&arm).unwrap()).unwrap();
    let stdout = guard.stdout.take().unwrap();
    let (sender, reports) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if sender.send(serde_json::from_str(&line).unwrap()).is_err() {
                return;
            }
        }
    });
    Guarded { guard, stdin: Some(stdin), reports, mark, dir }
}

impl Guarded {
    fn next(&self) -> Report {
        self.reports.recv_timeout(PATIENCE).expect("the guard reports in time")
    }

    /// The next report, not counting the one about the container.
    fn event(&self) -> Report {
        match self.next() {
            Report::Contained { .. } | Report::Uncontained { .. } => self.next(),
            other => other,
        }
    }

    fn started(&self) -> i32 {
        match self.event() {
            Report::Started { pid } => pid,
            other => panic!("started expected, not {other:?}"),
        }
    }

    fn say(&mut self, update: Update) {
        writeln!(self.stdin.as_mut().unwrap(), "{}", serde_json::to_string(&update).unwrap()).unwrap();
    }

    fn wait_for_marked(&self, expected: impl Fn(usize) -> bool) {
        let end = Instant::now() + PATIENCE;
        loop {
            let pids = marked(&self.mark);
            if expected(pids.len()) {
                return;
            }
            assert!(Instant::now() < end, "still alive: {pids:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits for a file that the script makes when it has got so far.
    fn wait_for_file(&self, name: &str) {
        let end = Instant::now() + PATIENCE;
        while !self.dir.path().join(name).exists() {
            assert!(Instant::now() < end, "no {name}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn output(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("output.log")).unwrap()
    }
}

/// Processes with this variable in their environment.
fn marked(mark: &str) -> Vec<i32> {
    let mut pids = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else { continue };
        let environment = std::fs::read(entry.path().join("environ")).unwrap_or_default();
        if environment.split(|b| *b == 0).any(|v| v == mark.as_bytes()) {
            pids.push(pid);
        }
    }
    pids
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// A main process, a child, and a grandchild in a session of its own; all ignore SIGTERM.
const STUBBORN_FAMILY: &str =
    "trap '' TERM; setsid sh -c 'sleep 300; :' & sleep 300 & touch up; wait; wait; sleep 300";

#[test]
fn the_exit_code_and_the_output_pass_through() {
    let guarded = guarded("echo to-stdout; echo to-stderr >&2; exit 7", update(60_000, 70_000, None));
    guarded.started();
    assert_eq!(guarded.event(), Report::Exited { code: Some(7), signal: None });
    assert_eq!(guarded.event(), Report::Gone);
    assert_eq!(guarded.output(), "to-stdout\nto-stderr\n");
}

#[test]
fn what_a_backend_started_does_not_outlive_it() {
    let script = "setsid sleep 300 & sleep 300 & touch up; until [ -e go ]; do sleep 0.02; done; exit 0";
    let guarded = guarded(script, update(60_000, 70_000, None));
    guarded.started();
    guarded.wait_for_file("up");
    guarded.wait_for_marked(|n| n >= 3);
    std::fs::write(guarded.dir.path().join("go"), "").unwrap();
    assert_eq!(guarded.event(), Report::Exited { code: Some(0), signal: None });
    assert_eq!(guarded.event(), Report::Gone);
    assert_eq!(marked(&guarded.mark), [0i32; 0]);
}

#[test]
fn a_backend_that_ignores_sigterm_is_killed_at_the_hard_deadline() {
    let update = update(400, 1_000, None);
    let guarded = guarded(STUBBORN_FAMILY, update);
    guarded.started();
    assert_eq!(guarded.event(), Report::SoftDeadline);
    assert!(boot_ms() >= update.soft_boot_ms);
    assert_eq!(guarded.event(), Report::Killing);
    let at = boot_ms();
    assert!(at >= update.hard_boot_ms && at < update.hard_boot_ms + LATE_MS);
    assert_eq!(guarded.event(), Report::Exited { code: None, signal: Some(9) });
    assert_eq!(guarded.event(), Report::Gone);
    assert_eq!(marked(&guarded.mark), [0i32; 0]);
}

#[test]
fn a_backend_whose_drone_is_dead_runs_on_and_ends_at_its_deadlines() {
    let update = update(700, 1_300, None);
    let mut guarded = guarded(STUBBORN_FAMILY, update);
    guarded.started();
    drop(guarded.stdin.take());
    guarded.wait_for_file("up");
    assert_eq!(guarded.event(), Report::SoftDeadline);
    assert!(boot_ms() >= update.soft_boot_ms);
    assert_eq!(guarded.event(), Report::Killing);
    assert!(boot_ms() >= update.hard_boot_ms);
    assert!(matches!(guarded.event(), Report::Exited { signal: Some(9), .. }));
    assert_eq!(guarded.event(), Report::Gone);
    assert!(boot_ms() < update.hard_boot_ms + LATE_MS);
    assert_eq!(marked(&guarded.mark), [0i32; 0]);
}

#[test]
fn a_graceful_backend_of_a_dead_drone_ends_at_the_soft_deadline() {
    let update = update(500, 60_000, None);
    let mut guarded = guarded("trap 'exit 3' TERM; touch up; while :; do sleep 0.02; done", update);
    guarded.started();
    guarded.wait_for_file("up");
    drop(guarded.stdin.take());
    assert_eq!(guarded.event(), Report::SoftDeadline);
    assert_eq!(guarded.event(), Report::Exited { code: Some(3), signal: None });
    assert_eq!(guarded.event(), Report::Gone);
}

#[test]
fn the_death_of_the_guard_is_the_death_of_everything_below_it() {
    if !is_root() {
        eprintln!("skipped: only root can make PID namespaces");
        return;
    }
    let mut guarded = guarded(STUBBORN_FAMILY, update(60_000, 70_000, None));
    guarded.started();
    guarded.wait_for_file("up");
    guarded.wait_for_marked(|n| n >= 4);
    guarded.guard.kill().unwrap();
    guarded.wait_for_marked(|n| n == 0);
}

/// What a stopped guard's family does: it ends at the hard deadline; the guard finds out when it goes on.
fn ends_though_the_guard_is_stopped(mut guarded: Guarded, update: Update) {
    guarded.started();
    guarded.wait_for_file("up");
    let guard = Pid::from_raw(i32::try_from(guarded.guard.id()).unwrap());
    kill(guard, Signal::SIGSTOP).unwrap();
    // Nobody else is left who could do it.
    drop(guarded.stdin.take());
    guarded.wait_for_marked(|n| n == 0);
    let at = boot_ms();
    assert!(at >= update.hard_boot_ms && at < update.hard_boot_ms + LATE_MS, "{}", at - update.hard_boot_ms);
    kill(guard, Signal::SIGCONT).unwrap();
    assert_eq!(guarded.event(), Report::Killing);
    assert_eq!(guarded.event(), Report::Exited { code: None, signal: Some(9) });
    assert_eq!(guarded.event(), Report::Gone);
}

#[test]
fn a_backend_whose_guard_is_stopped_and_whose_drone_is_dead_ends_at_the_hard_deadline() {
    if !is_root() {
        eprintln!("skipped: only root can make PID namespaces");
        return;
    }
    let update = update(1_500, 2_000, None);
    ends_though_the_guard_is_stopped(guarded(STUBBORN_FAMILY, update), update);
}

#[test]
fn so_it_does_without_a_namespace() {
    if !is_root() || !readable_by_others(Path::new(GUARD)) {
        eprintln!("skipped: cannot start a guard as another user here");
        return;
    }
    let mut guard = Command::new(GUARD);
    guard.uid(NOBODY).gid(NOBODY);
    let update = update(1_500, 2_000, None);
    ends_though_the_guard_is_stopped(guarded_by(guard, &["sh", "-c", STUBBORN_FAMILY], update), update);
}

/// A program whose exec hangs, as on a file system that does not answer.
fn hangs_before_its_exec(guard: Command) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let program = dir.path().join("program");
    let _leased = common::leased_program(&program);
    let update = update(1_500, 2_000, None);
    let mut guarded = guarded_by(guard, &[program.to_str().unwrap()], update);
    drop(guarded.stdin.take());
    let guard = i32::try_from(guarded.guard.id()).unwrap();
    let end = Instant::now() + PATIENCE;
    while processes::all().unwrap().iter().filter(|p| p.parent == guard).count() < 2 {
        assert!(Instant::now() < end, "no child that hangs");
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut reports = Vec::new();
    while reports.last() != Some(&Report::Gone) {
        reports.push(guarded.event());
    }
    let at = boot_ms();
    assert!(at >= update.hard_boot_ms && at < update.hard_boot_ms + LATE_MS, "{}", at - update.hard_boot_ms);
    assert!(reports.contains(&Report::Exited { code: None, signal: Some(9) }), "{reports:?}");
}

#[test]
fn a_backend_that_hangs_before_its_exec_ends_at_the_hard_deadline() {
    hangs_before_its_exec(Command::new(GUARD));
}

#[test]
fn so_does_one_without_a_namespace() {
    if !is_root() || !readable_by_others(Path::new(GUARD)) {
        eprintln!("skipped: cannot start a guard as another user here");
        return;
    }
    let mut guard = Command::new(GUARD);
    guard.uid(NOBODY).gid(NOBODY);
    hangs_before_its_exec(guard);
}

#[test]
fn renewed_deadlines_let_it_run_past_the_first_ones() {
    let first = update(500, 800, None);
    let mut guarded = guarded("exec sleep 300", first);
    guarded.started();
    guarded.say(update(60_000, 70_000, None));
    assert!(guarded.reports.recv_timeout(Duration::from_millis(1_200)).is_err());
    assert!(boot_ms() > first.hard_boot_ms);
    assert_eq!(marked(&guarded.mark).len(), 1);
    guarded.say(update(60_000, 70_000, Some(EndNow::Hard)));
    assert_eq!(guarded.event(), Report::Killing);
    assert_eq!(guarded.event(), Report::Exited { code: None, signal: Some(9) });
    assert_eq!(guarded.event(), Report::Gone);
}

#[test]
fn a_soft_end_gets_its_grace_and_then_a_kill() {
    let mut guarded = guarded(STUBBORN_FAMILY, update(60_000, 70_000, None));
    guarded.started();
    guarded.wait_for_file("up");
    let kill_boot_ms = boot_ms() + 300;
    guarded.say(update(60_000, 70_000, Some(EndNow::Soft { kill_boot_ms })));
    assert_eq!(guarded.event(), Report::Killing);
    assert!(boot_ms() >= kill_boot_ms);
    assert!(matches!(guarded.event(), Report::Exited { signal: Some(9), .. }));
    assert_eq!(guarded.event(), Report::Gone);
}

/// A shell that ends at SIGTERM, and a server that needs a second to flush. `:` keeps the shell from becoming the server.
const SERVER_BELOW_A_SHELL: &str = "PREFIX sh -c 'trap \"sleep 1; touch flushed; exit 0\" TERM; touch up; \
                                    while :; do sleep 0.02; done'; :";

fn the_whole_backend_has_the_grace(guard: impl Fn() -> Command) {
    // In the shell's process group, and in a session of its own.
    for prefix in ["", "setsid"] {
        let script = SERVER_BELOW_A_SHELL.replace("PREFIX", prefix);
        let mut guarded = guarded_by(guard(), &["sh", "-c", &script], update(60_000, 70_000, None));
        guarded.started();
        guarded.wait_for_file("up");
        let kill_boot_ms = boot_ms() + 15_000;
        guarded.say(update(60_000, 70_000, Some(EndNow::Soft { kill_boot_ms })));
        assert!(matches!(guarded.event(), Report::Exited { .. }));
        assert!(!guarded.dir.path().join("flushed").exists(), "the shell ends first");
        assert_eq!(guarded.event(), Report::Gone);
        assert!(guarded.dir.path().join("flushed").exists(), "{prefix}: the server was killed");
        assert!(boot_ms() < kill_boot_ms, "nothing is left to wait for");
        assert_eq!(marked(&guarded.mark), [0i32; 0]);
        assert!(guarded.guard.wait().unwrap().success());
    }
}

#[test]
fn a_soft_end_gives_the_whole_backend_the_grace_period() {
    the_whole_backend_has_the_grace(|| Command::new(GUARD));
}

#[test]
fn a_soft_end_without_a_namespace_gives_all_the_grace_period() {
    if !is_root() || !readable_by_others(Path::new(GUARD)) {
        eprintln!("skipped: cannot start a guard as another user here");
        return;
    }
    the_whole_backend_has_the_grace(|| {
        let mut guard = Command::new(GUARD);
        guard.uid(NOBODY).gid(NOBODY);
        guard
    });
}

fn what_outlives_the_grace_is_killed(guard: Command) {
    let script = "sh -c 'trap \"\" TERM; touch up; while :; do sleep 300; done'; :";
    let mut guarded = guarded_by(guard, &["sh", "-c", script], update(60_000, 70_000, None));
    guarded.started();
    guarded.wait_for_file("up");
    let kill_boot_ms = boot_ms() + 700;
    guarded.say(update(60_000, 70_000, Some(EndNow::Soft { kill_boot_ms })));
    assert!(matches!(guarded.event(), Report::Exited { .. }));
    assert!(boot_ms() < kill_boot_ms && !marked(&guarded.mark).is_empty());
    assert_eq!(guarded.event(), Report::Killing);
    assert!(boot_ms() >= kill_boot_ms);
    assert_eq!(guarded.event(), Report::Gone);
    assert!(boot_ms() < kill_boot_ms + LATE_MS);
    assert_eq!(marked(&guarded.mark), [0i32; 0]);
}

#[test]
fn what_outlives_the_main_process_of_a_soft_end_is_killed_in_time() {
    what_outlives_the_grace_is_killed(Command::new(GUARD));
    if is_root() && readable_by_others(Path::new(GUARD)) {
        let mut guard = Command::new(GUARD);
        guard.uid(NOBODY).gid(NOBODY);
        what_outlives_the_grace_is_killed(guard);
    }
}

#[test]
fn a_backend_whose_soft_deadline_has_passed_is_not_started() {
    let guarded = guarded("touch started", update(0, 60_000, None));
    assert!(matches!(guarded.event(), Report::NotStarted { late: true, .. }));
    assert_eq!(guarded.event(), Report::Gone);
    assert!(!guarded.dir.path().join("started").exists());
}

#[test]
fn a_command_that_does_not_exist_is_said_so() {
    let guarded = guarded_by(Command::new(GUARD), &["/nonexistent/program"], update(60_000, 70_000, None));
    assert!(matches!(guarded.event(), Report::NotStarted { late: false, .. }));
    assert_eq!(guarded.event(), Report::Gone);
}

#[test]
fn a_drone_that_dies_before_arming_leaves_nothing() {
    let mut guard =
        Command::new(GUARD).arg("guard").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    drop(guard.stdin.take());
    assert!(guard.wait().unwrap().success());
}

#[test]
fn a_backend_has_only_its_own_descriptors_and_default_signals() {
    let mut guard = Command::new(GUARD);
    // SAFETY: one async-signal-safe call; the descriptor is left open on purpose, as a careless parent would.
    unsafe {
        guard.pre_exec(|| {
            libc::dup2(2, 77);
            libc::signal(libc::SIGHUP, libc::SIG_IGN);
            Ok(())
        });
    }
    let script = "ls /proc/self/fd | sort | head -3 | tr '\\n' ' '; ls /proc/self/fd | grep -c 77; \
                  grep -E '^Sig(Blk|Ign)' /proc/self/status | cut -f 2";
    let guarded = guarded_by(guard, &["sh", "-c", script], update(60_000, 70_000, None));
    guarded.started();
    assert!(matches!(guarded.event(), Report::Exited { .. }));
    let output = guarded.output();
    let lines: Vec<&str> = output.lines().collect();
    assert_eq!(lines[0], "0 1 2 0");
    for signals in &lines[1..] {
        // The C library keeps the two from 32 on to itself.
        assert_eq!(u64::from_str_radix(signals, 16).unwrap() & 0x7fff_ffff, 0, "{output}");
    }
}

#[test]
fn inside_the_namespace_a_backend_sees_itself_in_proc() {
    if !is_root() {
        eprintln!("skipped: only root can make PID namespaces");
        return;
    }
    let guarded = guarded(
        "[ \"$(readlink /proc/self/cwd)\" ] && ls /proc | grep -c '^[0-9]'",
        update(60_000, 70_000, None),
    );
    let Report::Contained { .. } = guarded.next() else { panic!("root has a PID namespace") };
    guarded.started();
    assert_eq!(guarded.event(), Report::Exited { code: Some(0), signal: None });
    let seen: u32 = guarded.output().trim().parse().unwrap();
    assert!(seen < 10, "only the namespace's own processes, not {seen}");
}

#[test]
fn without_root_descendants_are_killed_all_the_same() {
    if !is_root() || !readable_by_others(Path::new(GUARD)) {
        eprintln!("skipped: cannot start a guard as another user here");
        return;
    }
    let mut guard = Command::new(GUARD);
    guard.uid(NOBODY).gid(NOBODY);
    let update = update(700, 1_200, None);
    let guarded = guarded_by(guard, &["sh", "-c", STUBBORN_FAMILY], update);
    assert!(matches!(guarded.next(), Report::Uncontained { .. }));
    guarded.started();
    guarded.wait_for_file("up");
    assert_eq!(guarded.event(), Report::SoftDeadline);
    assert_eq!(guarded.event(), Report::Killing);
    assert!(matches!(guarded.event(), Report::Exited { signal: Some(9), .. }));
    assert_eq!(guarded.event(), Report::Gone);
    assert_eq!(marked(&guarded.mark), [0i32; 0]);
}
