//! Standard error that cannot be written to harms neither a drone, nor a guard, nor a watchdog, nor a backend.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

mod common;

use common::{Drone, Fake, PATIENCE, alive, short_lease};
use holdfast_drone::clock::boot_ms;
use holdfast_drone::guard::{Arm, Report, Update};
use holdfast_wire::BackendStatus;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

const NOBODY: u32 = 65_534;

/// Standard errors that take nothing, and what has to be kept for them meanwhile.
fn useless_stderrs() -> Vec<(&'static str, Stdio, Option<std::io::PipeReader>)> {
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let (closed_reader, closed) = std::io::pipe().unwrap();
    drop(closed_reader);
    let (unread_reader, unread) = std::io::pipe().unwrap();
    vec![
        ("full", full.into(), None),
        ("closed", closed.into(), None),
        ("unread", unread.into(), Some(unread_reader)),
    ]
}

#[tokio::test]
async fn a_drone_that_cannot_log_keeps_its_backends() {
    for (what, stderr, reader) in useless_stderrs() {
        let mut fake = Fake::start(short_lease()).await;
        let dir = tempfile::tempdir().unwrap();
        let mut command = Drone::command(&fake.url, dir.path());
        command.env("RUST_LOG", "trace").stderr(stderr);
        let mut drone = Drone { process: command.spawn().unwrap(), data_dir: dir.path().to_owned() };
        drop(command);
        let mut conn = fake.conn().await;
        let backend = format!("ba-mute-{what}");
        conn.waiting(&backend, "exec sleep 300").await;
        // Renewed past the first hard deadline: everything still works.
        let end = boot_ms() + 4_500;
        while boot_ms() < end {
            conn.renewal().await;
        }
        assert_eq!(alive(&backend), 1, "{what}");
        assert!(drone.process.try_wait().unwrap().is_none(), "{what}");
        drone.signal(Signal::SIGTERM);
        conn.expect(&backend, BackendStatus::Terminating).await;
        conn.expect(&backend, BackendStatus::Terminated).await;
        assert_eq!(drone.ended().await.code(), Some(0), "{what}");
        drop(reader);
    }
}

/// A drone that can log nothing still says by its exit code that it was used wrongly.
#[test]
fn wrong_use_without_a_log_ends_with_its_exit_code() {
    for (what, stderr, _reader) in useless_stderrs() {
        let mut command = Command::new(env!("CARGO_BIN_EXE_holdfast-drone"));
        let flags = ["--name", "a", "--controller", "http://h:1", "--cluster", "c", "--data-dir", "/d"];
        assert_eq!(command.args(flags).stderr(stderr).status().unwrap().code(), Some(2), "{what}");
    }
}

/// A guard without a PID namespace says so on its standard error, and has a watchdog, which shares that.
#[test]
fn a_guard_and_a_watchdog_that_cannot_log_keep_the_deadlines() {
    let program = Path::new(env!("CARGO_BIN_EXE_holdfast-drone"));
    for (what, stderr, _reader) in useless_stderrs() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        let mut command = Command::new(program);
        command.arg("guard").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(stderr);
        if nix::unistd::geteuid().is_root() && common::readable_by_others(program) {
            command.uid(NOBODY).gid(NOBODY);
        }
        let mut guard = command.spawn().unwrap();
        drop(command);
        let now = boot_ms();
        let update = Update { soft_boot_ms: now + 2_000, hard_boot_ms: now + 2_500, ..Update::default() };
        let backend = format!("ba-mute-guard-{what}");
        let arm = Arm {
            command: ["sh", "-c", "trap '' TERM; echo up; while :; do sleep 300; done"]
                .map(str::to_owned)
                .into(),
            env: BTreeMap::from([
                ("PATH".to_owned(), std::env::var("PATH").unwrap()),
                ("SESSION_BACKEND_ID".to_owned(), backend.clone()),
            ]),
            ..common::arm(dir.path(), update)
        };
        let mut stdin = guard.stdin.take().unwrap();
        writeln!(stdin, "{}", serde_json::to_string(&arm).unwrap()).unwrap();
        // What is no update is noted, and nothing worse.
        writeln!(stdin, "nonsense").unwrap();
        let mut reports = BufReader::new(guard.stdout.take().unwrap()).lines();
        let mut next = || serde_json::from_str::<Report>(&reports.next().unwrap().unwrap()).unwrap();
        while !matches!(next(), Report::Started { .. }) {}
        // The watchdog alone holds the deadline now.
        let pid = Pid::from_raw(i32::try_from(guard.id()).unwrap());
        kill(pid, Signal::SIGSTOP).unwrap();
        let end = std::time::Instant::now() + PATIENCE;
        while alive(&backend) > 0 {
            assert!(std::time::Instant::now() < end, "{what}");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        assert!(boot_ms() >= update.hard_boot_ms, "{what}: not before its deadline");
        kill(pid, Signal::SIGCONT).unwrap();
        while next() != Report::Gone {}
        assert!(guard.wait().unwrap().success(), "{what}");
    }
}
