//! A machine whose processes cannot be looked at: what may be left of a backend is not taken for gone.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "what a test prints is read by people")]

mod common;

use common::{Drone, Fake, alive, lease, populated, readable_by_others};
use holdfast_drone::open_files::OpenFiles;
use holdfast_wire::BackendStatus;
use holdfast_wire::drone::MessageFromDrone;
use nix::sys::signal::{Signal, kill};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

const NOBODY: u32 = 65_534;

/// Sets the limit in force of open files of a process of that user, as which it is done: root may lack the right to.
fn limit_files(pid: u32, files: u64) {
    let mut prlimit = Command::new("prlimit");
    prlimit.args(["--pid", &pid.to_string(), &format!("--nofile={files}:")]);
    assert!(prlimit.uid(NOBODY).gid(NOBODY).status().unwrap().success());
}

#[tokio::test]
async fn what_cannot_be_looked_at_is_not_reported_as_ended() {
    if !nix::unistd::geteuid().is_root()
        || !readable_by_others(Path::new(env!("CARGO_BIN_EXE_holdfast-drone")))
    {
        eprintln!("skipped: cannot start a drone as another user here");
        return;
    }
    let mut fake = Fake::start(lease(30_000, 40_000, 50_000)).await;
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(dir.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    // Without a PID namespace, what a killed guard leaves has to be found by looking.
    let process = Drone::command(&fake.url, dir.path()).uid(NOBODY).gid(NOBODY).spawn().unwrap();
    let drone = Drone { process, data_dir: dir.path().to_owned() };
    let mut conn = fake.conn().await;
    let backend = "ba-unseen";
    conn.waiting(backend, "trap '' TERM; setsid sleep 300 & echo up; while :; do sleep 300; done").await;
    drone.wrote(backend, "up").await;
    populated(backend, 2).await;
    let [guard] = drone.guards()[..] else { panic!("one guard: {:?}", drone.guards()) };
    let hard = OpenFiles::current().unwrap().hard;
    limit_files(drone.process.id(), 3);
    kill(guard, Signal::SIGKILL).unwrap();
    // Long enough for many looks, all of which fail.
    for _ in 0..2 {
        conn.until("a heartbeat", |message| match message {
            MessageFromDrone::Heartbeat(_) => Some(()),
            MessageFromDrone::BackendEvent(event) => panic!("reported while processes live: {event:?}"),
            _ => None,
        })
        .await;
    }
    assert!(alive(backend) > 0, "there is something that could have been overlooked");
    limit_files(drone.process.id(), hard);
    conn.expect(backend, BackendStatus::Terminated).await;
    assert_eq!(alive(backend), 0);
}
