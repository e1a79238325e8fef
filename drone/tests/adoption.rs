//! A drone that ends, and its successor on the same data directory.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "what a test prints is read by people")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

mod common;

use common::{Conn, Drone, Fake, TOKEN, alive, lease, populated, short_lease, soon, vanished};
use holdfast_drone::clock::boot_ms;
use holdfast_drone::journal::Record;
use holdfast_wire::drone::{
    Action, MessageFromDrone, MessageToDrone, RenewKeysResponse, RenewRefusal, RenewedKey,
};
use holdfast_wire::{
    BackendState, BackendStatus, KeyConfig, LeaseConfig, TerminationKind, TerminationReason,
};
use nix::sys::signal::{Signal, kill};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Runs until its directory holds a file, or it is ended.
const UNTIL_TOLD: &str = "echo up; while [ ! -e done ]; do sleep 0.05; done; exit 7";
const FOREVER: &str = "echo up; exec sleep 300";

/// What happens to a journal.
type Harm = fn(&Path);

fn long() -> LeaseConfig {
    lease(30_000, 40_000, 50_000)
}

fn dir_of(data_dir: &Path, backend: &str) -> PathBuf {
    data_dir.join("backends").join(backend)
}

/// The backend's processes.
fn pids(backend: &str) -> BTreeSet<i32> {
    let mark = format!("SESSION_BACKEND_ID={backend}");
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    all.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid: &i32| {
            std::fs::read(format!("/proc/{pid}/environ"))
                .is_ok_and(|all| all.split(|b| *b == 0).any(|variable| variable == mark.as_bytes()))
        })
        .collect()
}

/// A drone with one backend that runs, and their controller's end.
async fn running(fake: &mut Fake, data_dir: &Path, backend: &str, script: &str) -> (Drone, Conn) {
    let drone = Drone::start(&fake.url, data_dir);
    let mut conn = fake.conn().await;
    conn.waiting(backend, script).await;
    drone.wrote(backend, "up").await;
    (drone, conn)
}

fn kill9(mut drone: Drone) {
    drone.process.kill().unwrap();
    drone.process.wait().unwrap();
}

/// Passes over states that are reported once more, until the backend's end.
async fn terminated(conn: &mut Conn, backend: &str) -> BackendState {
    loop {
        let event = conn.event().await;
        assert_eq!((event.backend_id.as_str(), event.token), (backend, Some(TOKEN)));
        if event.state.status() == BackendStatus::Terminated {
            return event.state;
        }
    }
}

/// Waits until nothing is kept of a backend whose end was acknowledged.
async fn forgotten(data_dir: &Path, backend: &str) {
    let journal = dir_of(data_dir, backend).join("journal");
    soon("the journal is removed", async {
        while journal.exists() {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    })
    .await;
}

fn refuse(conn: &Conn, backend: &str) {
    let refused = Some(RenewRefusal::NotHolder);
    let keys = vec![RenewedKey { backend: backend.into(), deadlines: None, refused }];
    conn.send(MessageToDrone::RenewKeysResponse(RenewKeysResponse { keys }));
}

#[tokio::test]
async fn a_successor_goes_on_with_a_running_backend_by_whatever_wall_clock() {
    let mut fake = Fake::start(short_lease()).await;
    let dir = tempfile::tempdir().unwrap();
    let backend = "ba-adopted";
    let (drone, first) = running(&mut fake, dir.path(), backend, FOREVER).await;
    let before = pids(backend);
    kill9(drone);
    let mut incarnations = BTreeSet::from([first.handshake.incarnation.clone()]);
    // The wall clock is set between the starts; the last successor goes by the right one again.
    for shift in [Some("-400d"), Some("+400d"), None] {
        let mut command = Drone::command(&fake.url, dir.path());
        if let Some(shift) = shift {
            let library = holdfast_libfaketime();
            command
                .env("LD_PRELOAD", library)
                .env("FAKETIME", shift)
                .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
                .env("DONT_FAKE_MONOTONIC", "1");
        }
        let drone = Drone { process: command.spawn().unwrap(), data_dir: dir.path().to_owned() };
        let mut conn = fake.conn().await;
        assert!(incarnations.insert(conn.handshake.incarnation.clone()), "each process has its own");
        // Through more than a lease: it is renewed, and not ended.
        let end = boot_ms() + 4_500;
        let first = conn.renewal().await;
        assert_eq!(
            first.keys.iter().map(|key| (key.backend.as_str(), key.token)).collect::<Vec<_>>(),
            [(backend, TOKEN)]
        );
        while boot_ms() < end {
            conn.renewal().await;
        }
        assert_eq!(pids(backend), before, "it was not interrupted");
        kill9(drone);
    }
    let drone = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    conn.act(
        "end",
        backend,
        Action::Terminate { kind: TerminationKind::Soft, reason: TerminationReason::External },
    );
    let state = terminated(&mut conn, backend).await;
    assert!(
        matches!(
            state,
            BackendState::Terminated {
                termination: Some(TerminationKind::Soft),
                reason: Some(TerminationReason::External),
                ..
            }
        ),
        "{state:?}"
    );
    assert_eq!(alive(backend), 0);
    forgotten(dir.path(), backend).await;
    drop(drone);
}

fn holdfast_libfaketime() -> String {
    let found = [
        "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1",
        "/usr/lib/aarch64-linux-gnu/faketime/libfaketime.so.1",
    ];
    found.into_iter().find(|path| Path::new(path).exists()).expect("libfaketime is installed").to_owned()
}

#[tokio::test]
async fn a_backend_that_ended_while_no_drone_was_there_is_reported_with_its_exit_code() {
    let mut fake = Fake::start(long()).await;
    let dir = tempfile::tempdir().unwrap();
    let backend = "ba-ended";
    let (drone, _conn) = running(&mut fake, dir.path(), backend, UNTIL_TOLD).await;
    kill9(drone);
    std::fs::write(dir_of(dir.path(), backend).join("work/done"), "").unwrap();
    vanished(backend).await;
    let _drone = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    let state = terminated(&mut conn, backend).await;
    assert!(
        matches!(state, BackendState::Terminated { termination: None, reason: None, exit_code: Some(7), .. }),
        "{state:?}"
    );
    forgotten(dir.path(), backend).await;
}

#[tokio::test]
async fn an_adopted_backend_that_ends_is_reported_with_its_exit_code() {
    let mut fake = Fake::start(long()).await;
    let dir = tempfile::tempdir().unwrap();
    let backend = "ba-ends-later";
    let (drone, _conn) = running(&mut fake, dir.path(), backend, UNTIL_TOLD).await;
    kill9(drone);
    let _drone = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    conn.renewal().await;
    std::fs::write(dir_of(dir.path(), backend).join("work/done"), "").unwrap();
    let state = terminated(&mut conn, backend).await;
    assert!(matches!(state, BackendState::Terminated { reason: None, exit_code: Some(7), .. }), "{state:?}");
}

#[tokio::test]
async fn a_backend_whose_deadline_passed_while_no_drone_was_there_is_reported_as_expired() {
    let mut fake = Fake::start(lease(500, 1_500, 2_500)).await;
    let dir = tempfile::tempdir().unwrap();
    let backend = "ba-expired";
    let (drone, mut conn) =
        running(&mut fake, dir.path(), backend, "trap '' TERM; echo up; while :; do sleep 300; done").await;
    conn.renew = false;
    kill9(drone);
    vanished(backend).await;
    let _drone = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    let state = terminated(&mut conn, backend).await;
    assert!(
        matches!(
            state,
            BackendState::Terminated {
                termination: Some(TerminationKind::Hard),
                reason: Some(TerminationReason::KeyExpired),
                ..
            }
        ),
        "{state:?}"
    );
}

#[tokio::test]
async fn a_backend_whose_guard_was_killed_or_hangs_for_good_is_ended_and_lost() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root can make PID namespaces");
        return;
    }
    // One that hangs is waited for until its hard deadline is certainly over.
    for (signal, lease) in [(Signal::SIGKILL, long()), (Signal::SIGSTOP, short_lease())] {
        let mut fake = Fake::start(lease).await;
        let dir = tempfile::tempdir().unwrap();
        let backend = format!("ba-guard-{}", signal.as_str().to_lowercase());
        let (drone, _conn) = running(&mut fake, dir.path(), &backend, FOREVER).await;
        let [guard] = drone.guards()[..] else { panic!("one guard: {:?}", drone.guards()) };
        kill9(drone);
        kill(guard, signal).unwrap();
        let _drone = Drone::start(&fake.url, dir.path());
        let mut conn = fake.conn().await;
        let state = terminated(&mut conn, &backend).await;
        assert!(
            matches!(
                state,
                BackendState::Terminated { termination: None, reason: Some(TerminationReason::Lost), .. }
            ),
            "{state:?}"
        );
        assert_eq!(alive(&backend), 0);
    }
}

#[tokio::test]
async fn a_guard_that_greets_late_is_waited_for_and_delays_nothing_else() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root can make PID namespaces");
        return;
    }
    let mut fake = Fake::start(long()).await;
    let dir = tempfile::tempdir().unwrap();
    let (drone, mut conn) = running(&mut fake, dir.path(), "ba-late", FOREVER).await;
    let [guard] = drone.guards()[..] else { panic!("one guard: {:?}", drone.guards()) };
    conn.waiting("ba-well", FOREVER).await;
    drone.wrote("ba-well", "up").await;
    let before = pids("ba-late");
    kill9(drone);
    kill(guard, Signal::SIGSTOP).unwrap();
    let _next = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    let listed: Vec<_> = conn.listed.iter().map(|listed| (listed.backend.as_str(), listed.token)).collect();
    assert_eq!(listed, [("ba-late", Some(TOKEN)), ("ba-well", Some(TOKEN))]);
    let renewed = conn.renewal().await.keys;
    assert_eq!(renewed.iter().map(|key| key.backend.as_str()).collect::<Vec<_>>(), ["ba-well"]);
    // Past the time within which a guard had to greet once.
    let since = boot_ms();
    while boot_ms() < since + 3_000 {
        conn.any().await;
    }
    kill(guard, Signal::SIGCONT).unwrap();
    let renewed = conn.renewal().await.keys;
    assert_eq!(renewed.iter().map(|key| key.backend.as_str()).collect::<Vec<_>>(), ["ba-late"]);
    assert_eq!(pids("ba-late"), before, "it was not interrupted");
    refuse(&conn, "ba-late");
    refuse(&conn, "ba-well");
}

#[tokio::test]
async fn what_may_run_on_another_machine_is_listed_and_not_reported() {
    let mut fake = Fake::start(long()).await;
    let dir = tempfile::tempdir().unwrap();
    let backend = "ba-other-boot";
    let record = Record {
        boot_id: "00000000-0000-0000-0000-000000000000".into(),
        backend: backend.into(),
        key: KeyConfig { name: "room".into(), ..KeyConfig::default() },
        token: TOKEN,
        address: "127.0.0.1:20001".parse().unwrap(),
        soft_boot_ms: i64::MAX - 1,
        hard_boot_ms: i64::MAX,
    };
    std::fs::create_dir_all(dir_of(dir.path(), backend)).unwrap();
    std::fs::write(dir_of(dir.path(), backend).join("journal"), record.encode().unwrap()).unwrap();
    let elsewhere = serde_json::json!({"data_id": "of-the-old-machine", "machine_id": "m", "product_uuid": "u",
                                       "boot_id": record.boot_id});
    std::fs::write(dir.path().join("data_id"), elsewhere.to_string()).unwrap();
    let drone = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    let data_id = conn.handshake.data_id.clone();
    assert!(data_id.as_ref().is_some_and(|id| id.len() == 32), "a new one: {data_id:?}");
    let listed: Vec<_> = conn.listed.iter().map(|listed| (listed.backend.as_str(), listed.token)).collect();
    assert_eq!(listed, [(backend, Some(TOKEN))]);
    // Its spawn is not taken again, and an end that is asked for is remembered.
    conn.spawn(backend, FOREVER).await;
    let end = Action::Terminate { kind: TerminationKind::Hard, reason: TerminationReason::External };
    conn.act("end", backend, end);
    conn.until("the end is acknowledged, and nothing else said", |message| match message {
        MessageFromDrone::AckAction { action_id } => {
            assert_eq!(action_id, "end");
            Some(())
        }
        MessageFromDrone::BackendEvent(event) => panic!("{event:?}"),
        _ => None,
    })
    .await;
    assert!(dir_of(dir.path(), backend).join("end").exists());
    // The drone works, also for the same key, and keeps its data id.
    conn.waiting("ba-here", FOREVER).await;
    kill9(drone);
    let _next = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    assert_eq!(conn.handshake.data_id, data_id);
    conn.renewal().await;
    refuse(&conn, "ba-here");
    vanished("ba-here").await;
}

#[tokio::test]
async fn a_damaged_directory_is_ended_and_delays_nothing_else() {
    let damages: [(&str, Harm); 6] = [
        ("flipped", |journal| {
            let mut bytes = std::fs::read(journal).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            std::fs::write(journal, bytes).unwrap();
        }),
        ("torn", |journal| {
            let bytes = std::fs::read(journal).unwrap();
            std::fs::write(journal, &bytes[..bytes.len() / 2]).unwrap();
        }),
        ("empty", |journal| std::fs::write(journal, "").unwrap()),
        ("missing", |journal| std::fs::remove_file(journal).unwrap()),
        ("fifo", |journal| {
            std::fs::remove_file(journal).unwrap();
            nix::unistd::mkfifo(journal, nix::sys::stat::Mode::S_IRWXU).unwrap();
        }),
        ("dir", |journal| {
            std::fs::remove_file(journal).unwrap();
            std::fs::create_dir_all(journal.join("more")).unwrap();
        }),
    ];
    let mut fake = Fake::start(long()).await;
    let dir = tempfile::tempdir().unwrap();
    let (drone, mut conn) = running(&mut fake, dir.path(), "ba-well", FOREVER).await;
    let backends = damages.map(|(what, _)| format!("ba-{what}"));
    for backend in &backends {
        conn.waiting(backend, "setsid sleep 300 & echo up; exec sleep 300").await;
        populated(backend, 2).await;
    }
    let before = pids("ba-well");
    kill9(drone);
    for (backend, (_, damage)) in backends.iter().zip(damages) {
        damage(&dir_of(dir.path(), backend).join("journal"));
    }
    // A guard cannot leave its outcome: the backend is ended and lost, and that is reported.
    std::fs::create_dir(dir_of(dir.path(), "ba-well").join("outcome")).unwrap();
    let _drone = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    assert_eq!(conn.renewal().await.keys.len(), 1, "the others are not renewed");
    assert_eq!(pids("ba-well"), before, "it was not interrupted");
    for backend in &backends {
        vanished(backend).await;
        forgotten(dir.path(), backend).await;
    }
    // An id whose directory exists in any form is not started again.
    conn.spawn("ba-flipped", FOREVER).await;
    conn.acknowledged("spawn-ba-flipped").await;
    conn.waiting("ba-next", FOREVER).await;
    assert_eq!(alive("ba-flipped"), 0);
    refuse(&conn, "ba-well");
    terminated(&mut conn, "ba-well").await;
}

#[tokio::test]
async fn a_drone_that_is_told_to_hang_up_leaves_its_backends_to_its_successor() {
    let mut fake = Fake::start(long()).await;
    let dir = tempfile::tempdir().unwrap();
    let backend = "ba-left";
    let (mut drone, _conn) = running(&mut fake, dir.path(), backend, FOREVER).await;
    let before = pids(backend);
    drone.signal(Signal::SIGHUP);
    assert_eq!(drone.ended().await.code(), Some(0));
    let _next = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    conn.renewal().await;
    assert_eq!(pids(backend), before);
    refuse(&conn, backend);
    terminated(&mut conn, backend).await;
}

#[tokio::test]
async fn nothing_is_started_before_it_is_known_which_keys_are_still_held() {
    let mut fake = Fake::start(long()).await;
    let dir = tempfile::tempdir().unwrap();
    let backend = "ba-unheld";
    let (drone, _conn) = running(&mut fake, dir.path(), backend, FOREVER).await;
    kill9(drone);
    let _next = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    conn.renew = false;
    conn.renewal().await;
    conn.spawn("ba-new", FOREVER).await;
    // Two heartbeats later it has read the spawn, and neither acknowledged nor begun it.
    for _ in 0..2 {
        conn.until("a heartbeat", |message| match message {
            MessageFromDrone::Heartbeat(_) => Some(()),
            MessageFromDrone::AckAction { .. } => panic!("acknowledged"),
            MessageFromDrone::BackendEvent(event) => {
                assert_eq!(event.backend_id, backend, "{event:?}");
                None
            }
            _ => None,
        })
        .await;
    }
    refuse(&conn, backend);
    let state = terminated(&mut conn, backend).await;
    assert!(
        matches!(
            state,
            BackendState::Terminated {
                termination: Some(TerminationKind::Hard),
                reason: Some(TerminationReason::KeyExpired),
                ..
            }
        ),
        "{state:?}"
    );
    assert_eq!(alive(backend), 0);
    conn.waiting("ba-new", FOREVER).await;
}

#[tokio::test]
async fn a_backend_whose_end_is_asked_for_while_its_spawn_is_put_off_is_not_started_later() {
    let mut fake = Fake::start(long()).await;
    let dir = tempfile::tempdir().unwrap();
    let backend = "ba-unheld-too";
    let (drone, _conn) = running(&mut fake, dir.path(), backend, FOREVER).await;
    kill9(drone);
    let _next = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    conn.renew = false;
    conn.renewal().await;
    conn.spawn("ba-put-off", FOREVER).await;
    let end = Action::Terminate { kind: TerminationKind::Soft, reason: TerminationReason::External };
    conn.act("end-put-off", "ba-put-off", end);
    conn.until("the end's acknowledgement", |message| match message {
        MessageFromDrone::AckAction { action_id } => {
            assert_eq!(action_id, "end-put-off", "the spawn is put off");
            Some(())
        }
        _ => None,
    })
    .await;
    refuse(&conn, backend);
    terminated(&mut conn, backend).await;
    conn.spawn("ba-put-off", FOREVER).await;
    let state = terminated(&mut conn, "ba-put-off").await;
    assert!(
        matches!(
            state,
            BackendState::Terminated {
                last_status: BackendStatus::Scheduled,
                reason: Some(TerminationReason::External),
                ..
            }
        ),
        "{state:?}"
    );
    assert_eq!(alive("ba-put-off"), 0);
}

#[tokio::test]
async fn an_end_that_was_begun_goes_on_under_the_successor() {
    let mut fake = Fake::start(long()).await;
    let dir = tempfile::tempdir().unwrap();
    let backend = "ba-ending";
    let script = "trap 'touch asked; sleep 2; exit 4' TERM; echo up; while :; do sleep 0.05; done";
    let (drone, mut conn) = running(&mut fake, dir.path(), backend, script).await;
    conn.act(
        "end",
        backend,
        Action::Terminate { kind: TerminationKind::Soft, reason: TerminationReason::External },
    );
    conn.expect(backend, BackendStatus::Terminating).await;
    let asked = dir_of(dir.path(), backend).join("work/asked");
    soon("it is asked to end", async {
        while !asked.exists() {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    })
    .await;
    kill9(drone);
    let _next = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    let state = terminated(&mut conn, backend).await;
    assert!(
        matches!(
            state,
            BackendState::Terminated { termination: Some(TerminationKind::Soft), exit_code: Some(4), .. }
        ),
        "{state:?}"
    );
}

#[tokio::test]
async fn a_spawn_that_is_repeated_to_the_successor_starts_nothing_again() {
    let mut fake = Fake::start(long()).await;
    let dir = tempfile::tempdir().unwrap();
    let backend = "ba-once";
    let (drone, _conn) = running(&mut fake, dir.path(), backend, FOREVER).await;
    let before = pids(backend);
    kill9(drone);
    let _next = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    conn.renewal().await;
    conn.heartbeat().await;
    conn.spawn(backend, FOREVER).await;
    conn.until("an acknowledgement", |message| {
        matches!(message, MessageFromDrone::AckAction { .. }).then_some(())
    })
    .await;
    conn.heartbeat().await;
    assert_eq!(pids(backend), before);
    refuse(&conn, backend);
    terminated(&mut conn, backend).await;
}

#[tokio::test]
async fn the_successors_cluster_is_another_one_and_the_old_ones_backends_end_first() {
    let mut fake = Fake::start(long()).await;
    let dir = tempfile::tempdir().unwrap();
    let backend = "ba-moved";
    let (drone, _conn) = running(&mut fake, dir.path(), backend, FOREVER).await;
    kill9(drone);
    fake.set(|setting| setting.cluster_id = "cluster-2".into());
    let _next = Drone::start(&fake.url, dir.path());
    let _conn = fake.conn().await;
    vanished(backend).await;
    forgotten(dir.path(), backend).await;
}

#[tokio::test]
async fn a_backend_that_was_ready_is_so_under_the_successor_unasked() {
    let mut fake = Fake::start(long()).await;
    let dir = tempfile::tempdir().unwrap();
    let backend = "ba-was-ready";
    let (drone, mut conn) = running(&mut fake, dir.path(), backend, FOREVER).await;
    let journal = std::fs::read(dir_of(dir.path(), backend).join("journal")).unwrap();
    let address = Record::decode(&journal).unwrap().address;
    let server = common::answer_http(address).await;
    conn.expect(backend, BackendStatus::Ready).await;
    // From now on it answers nothing, as one that is busy with its connections.
    server.abort();
    // Its guard is told at the same time; two heartbeats later it was.
    conn.heartbeat().await;
    conn.heartbeat().await;
    kill9(drone);
    let _next = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    loop {
        let event = conn.event().await;
        assert!(event.state.status() <= BackendStatus::Ready, "{event:?}");
        if event.state.status() == BackendStatus::Ready {
            break;
        }
    }
}

#[tokio::test]
async fn a_drone_ends_nothing_of_another_drone_with_the_same_backend_id() {
    let (mut fake, mut other_fake) = (Fake::start(long()).await, Fake::start(long()).await);
    let (dir, other_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let backend = "ba-of-two-clusters";
    let (_other, mut other_conn) = running(&mut other_fake, other_dir.path(), backend, FOREVER).await;
    let others = pids(backend);
    let (drone, _conn) = running(&mut fake, dir.path(), backend, FOREVER).await;
    assert!(pids(backend).len() > others.len());
    kill9(drone);
    // What was left has to be ended by its id.
    std::fs::write(dir_of(dir.path(), backend).join("journal"), "").unwrap();
    let _next = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    conn.waiting("ba-of-one", FOREVER).await;
    soon("its own is ended", async {
        while pids(backend).len() > others.len() {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    })
    .await;
    assert_eq!(pids(backend), others, "the other drone's lives on");
    other_conn.heartbeat().await;
}
