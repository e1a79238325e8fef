//! What a backend can reach of the drone: nothing but its own directory, and no guard.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "what a test prints is read by people")]

mod common;

use common::{Conn, Drone, Fake, PATIENCE, alive, lease, readable_by_others, soon, vanished};
use holdfast_drone::clock::boot_ms;
use holdfast_drone::guard::{Hello, Update};
use holdfast_wire::{BackendState, BackendStatus, LeaseConfig};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const DRONE: &str = env!("CARGO_BIN_EXE_holdfast-drone");

fn long() -> LeaseConfig {
    lease(30_000, 40_000, 50_000)
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

fn dir_of(data_dir: &Path, backend: &str) -> PathBuf {
    data_dir.join("backends").join(backend)
}

async fn running(fake: &mut Fake, data_dir: &Path, backend: &str, script: &str) -> (Drone, Conn) {
    let drone = Drone::start(&fake.url, data_dir);
    let mut conn = fake.conn().await;
    conn.waiting(backend, script).await;
    drone.wrote(backend, "up\n").await;
    (drone, conn)
}

#[tokio::test]
async fn a_backend_that_removes_all_it_sees_is_adopted_all_the_same() {
    if !is_root() {
        eprintln!("skipped: only root can hide the drone's files");
        return;
    }
    let mut fake = Fake::start(long()).await;
    let dir = tempfile::tempdir().unwrap();
    let backend = "ba-removes";
    let data_dir = dir.path().canonicalize().unwrap();
    let script = format!(
        "echo empty=$(ls -A | wc -l). pwd=$(pwd).; touch mine; rm -rf ./* ../* {0}/* {0}/backends/*/*; \
         ls -AR {0}; cat ../journal; touch again || exit 9; echo up; exec sleep 300",
        data_dir.display()
    );
    let (mut drone, _conn) = running(&mut fake, dir.path(), backend, &script).await;
    let output = drone.output(backend);
    let work = dir_of(&data_dir, backend).join("work");
    assert!(output.contains(&format!("empty=0. pwd={}.", work.display())), "{output}");
    assert!(!output.contains("guard.sock") && !output.contains("journal\n"), "{output}");
    assert!(work.join("again").exists(), "its own directory is the real one");
    for kept in ["journal", "guard.sock", "guard.log", "output.log"] {
        assert!(dir_of(&data_dir, backend).join(kept).exists(), "{kept}");
    }
    drone.process.kill().unwrap();
    drone.process.wait().unwrap();
    let _next = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    let held = conn.renewal().await.keys;
    assert_eq!(held.iter().map(|key| key.backend.as_str()).collect::<Vec<_>>(), [backend]);
    assert_eq!(alive(backend), 1);
}

#[test]
fn where_nothing_can_be_hidden_a_drone_starts_only_with_shared_user() {
    if !is_root() || !readable_by_others(Path::new(DRONE)) {
        eprintln!("skipped: cannot start a drone as another user here");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(dir.path(), Some(65_534), Some(65_534)).unwrap();
    let mut command = Drone::command("http://127.0.0.1:9", dir.path());
    let output = command.env_remove("HOLDFAST_SHARED_USER").uid(65_534).gid(65_534).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains("--shared-user"), "{message}");
}

#[tokio::test]
async fn the_data_directory_is_the_drones_users_alone() {
    let fake = Fake::start(long()).await;
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let _drone = Drone::start(&fake.url, dir.path());
    soon("a data directory", async {
        while !dir.path().join("backends").exists()
            || dir.path().metadata().unwrap().permissions().mode() & 0o777 != 0o700
        {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    })
    .await;
}

/// Connects to a guard, from this process or from one that entered the PID namespace of `pid`, and asks for a deadline
/// that never comes. What the guard says, and how the backend ends.
fn extend(socket: &Path, inside: Option<i32>) -> String {
    let update = Update { soft_boot_ms: i64::MAX - 1, hard_boot_ms: i64::MAX, ..Update::default() };
    let line = serde_json::to_string(&update).unwrap();
    let Some(pid) = inside else {
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut first = String::new();
        BufReader::new(stream.try_clone().unwrap()).read_line(&mut first).unwrap();
        // The guard may have hung up.
        let _ = stream.write_all(format!("{line}\n").as_bytes());
        if !first.is_empty() {
            // It commands as long as it is connected.
            std::mem::forget(stream);
        }
        return first;
    };
    // As a backend that has undone its mounts would: with the machine's files, but in its PID namespace.
    let namespace = std::fs::File::open(format!("/proc/{pid}/ns/pid")).unwrap();
    let mut command = Command::new("perl");
    command
        .args(["-MIO::Socket::UNIX", "-e"])
        .arg("alarm 5; $SIG{PIPE} = q(IGNORE); my $s = IO::Socket::UNIX->new(Peer => $ARGV[0]) or die $!; print $s \"$ARGV[1]\\n\"; $s->flush; print <$s>")
        .arg(socket)
        .arg(&line);
    // SAFETY: async-signal-safe; later children are in the namespace.
    unsafe {
        command.pre_exec(move || {
            if libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWPID) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            match libc::fork() {
                0 => Ok(()),
                child => {
                    let mut status = 0;
                    libc::waitpid(child, &raw mut status, 0);
                    libc::_exit(0)
                }
            }
        });
    }
    String::from_utf8(command.output().unwrap().stdout).unwrap()
}

#[tokio::test]
async fn a_backend_cannot_move_its_own_deadline() {
    if !is_root() {
        eprintln!("skipped: only root can make PID namespaces");
        return;
    }
    let mut fake = Fake::start(lease(500, 2_500, 3_500)).await;
    let dir = tempfile::tempdir().unwrap();
    let backend = "ba-extends";
    let (_drone, mut conn) =
        running(&mut fake, dir.path(), backend, "trap '' TERM; echo up; while :; do sleep 300; done").await;
    let socket = dir_of(dir.path(), backend).join("guard.sock");
    let [main, ..] = pids(backend)[..] else { panic!("it runs") };
    let said = tokio::task::spawn_blocking(move || extend(&socket, Some(main))).await.unwrap();
    assert_eq!(said, "", "a guard tells nothing to its own backend");
    // Still under the drone: renewed, and ended when that is refused.
    let renewed_at = conn.renewal().await.local_time;
    conn.renew = false;
    vanished(backend).await;
    let now = holdfast_drone::clock::DroneClock::start().now_ms();
    assert!(now < renewed_at + 2 * 3_500 + 1_500, "it outlived its deadline");
    loop {
        if let BackendState::Terminated { .. } = conn.event().await.state {
            break;
        }
    }
}

#[tokio::test]
async fn no_deadline_is_taken_beyond_the_expiry() {
    let mut fake = Fake::start(lease(500, 1_500, 2_000)).await;
    let expiry_ms = 4_000;
    let dir = tempfile::tempdir().unwrap();
    let backend = "ba-no-end";
    let (mut drone, _conn) =
        running(&mut fake, dir.path(), backend, "trap '' TERM; echo up; while :; do sleep 300; done").await;
    drone.process.kill().unwrap();
    drone.process.wait().unwrap();
    // Another drone's place is taken by this process, which may: it runs as root, in the machine's PID namespace.
    let socket = dir_of(dir.path(), backend).join("guard.sock");
    let at = boot_ms();
    let hello = tokio::task::spawn_blocking(move || extend(&socket, None)).await.unwrap();
    assert_eq!(serde_json::from_str::<Hello>(&hello).unwrap().backend, backend);
    vanished(backend).await;
    let lived_ms = boot_ms() - at;
    assert!(lived_ms > 2_500, "the later deadline was taken, {lived_ms} ms");
    assert!(lived_ms < expiry_ms + 1_500, "but not beyond the expiry: {lived_ms} ms");
}

#[tokio::test]
async fn without_a_namespace_a_backend_cannot_move_its_deadline_either() {
    if !is_root() || !readable_by_others(Path::new(DRONE)) {
        eprintln!("skipped: cannot start a drone as another user here");
        return;
    }
    let mut fake = Fake::start(lease(500, 1_500, 2_500)).await;
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(dir.path(), Some(65_534), Some(65_534)).unwrap();
    let process = Drone::command(&fake.url, dir.path()).uid(65_534).gid(65_534).spawn().unwrap();
    let mut drone = Drone { process, data_dir: dir.path().to_owned() };
    let mut conn = fake.conn().await;
    let backend = "ba-shared";
    let update = serde_json::to_string(&Update {
        soft_boot_ms: i64::MAX - 1,
        hard_boot_ms: i64::MAX,
        ..Update::default()
    })
    .unwrap();
    let script = format!(
        "trap '' TERM; perl -MIO::Socket::UNIX -e 'alarm 3; $SIG{{PIPE}} = q(IGNORE); my $s = IO::Socket::UNIX->new(Peer => \"../guard.sock\") or die $!; \
         print $s q({update}), \"\\n\"; $s->flush; print \"told: \", <$s>, \"\\n\"'; echo up; while :; do sleep 300; done"
    );
    conn.waiting(backend, &script).await;
    drone.wrote(backend, "up\n").await;
    assert!(drone.output(backend).contains("told: \n"), "{}", drone.output(backend));
    conn.renewal().await;
    drone.process.kill().unwrap();
    drone.process.wait().unwrap();
    let at = boot_ms();
    vanished(backend).await;
    assert!(boot_ms() - at < 2_500 + 1_500);
}

#[tokio::test]
async fn a_log_like_directory_in_a_backends_own_directory_harms_nothing() {
    // Names of control files mean nothing in there.
    let mut fake = Fake::start(long()).await;
    let dir = tempfile::tempdir().unwrap();
    let script = "mkdir output.log journal outcome guard.sock; echo up; exit 4";
    let drone = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    conn.waiting("ba-names", script).await;
    let BackendState::Terminated { exit_code, .. } = conn.expect("ba-names", BackendStatus::Terminated).await
    else {
        unreachable!()
    };
    assert_eq!((exit_code, drone.output("ba-names").as_str()), (Some(4), "up\n"));
}

/// The backend's processes.
fn pids(backend: &str) -> Vec<i32> {
    let mark = format!("SESSION_BACKEND_ID={backend}");
    let has_mark = |pid: &i32| {
        let mut environment = Vec::new();
        std::fs::File::open(format!("/proc/{pid}/environ"))
            .and_then(|mut file| file.read_to_end(&mut environment))
            .is_ok_and(|_| environment.split(|b| *b == 0).any(|variable| variable == mark.as_bytes()))
    };
    holdfast_drone::processes::pids().unwrap().into_iter().filter(has_mark).collect()
}
