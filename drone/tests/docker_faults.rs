//! Drone, guard and engine of containers fail, one by one and together. Whether a backend lives is asked of the machine.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "what a test prints is read by people")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

mod common;
mod docker_support;

use common::*;
use docker_support::proxy::Mode;
use docker_support::*;
use holdfast_drone::clock::boot_ms;
use holdfast_drone::processes;
use holdfast_wire::drone::{Action, MessageFromDrone};
use holdfast_wire::{BackendState, BackendStatus, TerminationKind, TerminationReason};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use std::time::Duration;

/// How late a kill may be seen on a loaded machine, in milliseconds.
const LATE_MS: i64 = 1_500;

fn terminate(kind: TerminationKind) -> Action {
    Action::Terminate { kind, reason: TerminationReason::External }
}

#[tokio::test]
async fn a_container_whose_drone_is_killed_lives_on_and_ends_at_its_deadlines() {
    let Some(ground) = Ground::new() else { return };
    let mut fake = Fake::start(container_lease()).await;
    let mut drone = ground.drone(&fake);
    let mut conn = fake.conn().await;
    let backend = "ba-orphan";
    ready(&mut conn, backend, ground.executable(json!({"ON_TERM": "ignore"}), json!({}))).await;
    let guards = drone.guards();
    for process in guards.iter().chain(&deputies(&guards)) {
        let [rss, pss, own] = ["Rss:", "Pss:", "Private_Dirty:"].map(|what| memory_kib(*process, what));
        eprintln!(
            "a container's guard or its deputy: {rss} KiB, {pss} KiB with shares, {own} KiB of its own"
        );
        assert!(rss < 10 * 1024, "{rss} KiB");
    }
    conn.renewal().await;
    conn.renewal().await;
    let killed_at = boot_ms();
    drone.process.kill().unwrap();
    drone.ended().await;
    // Nothing is granted from now on. It was granted within the last renewal interval.
    let lease = container_lease();
    let (soft_ms, hard_ms) = (lease.soft_terminate_ms as i64, lease.hard_terminate_ms as i64);
    while boot_ms() < killed_at + soft_ms - 2_000 {
        assert!(alive(backend) > 0, "it lives on without its drone");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    vanished(backend).await;
    let ended_ms = boot_ms() - killed_at;
    assert!(ended_ms > soft_ms - 2_000 && ended_ms < hard_ms + LATE_MS, "{ended_ms} ms");
}

fn memory_kib(process: Pid, what: &str) -> u64 {
    let rollup = std::fs::read_to_string(format!("/proc/{process}/smaps_rollup")).unwrap();
    let line = rollup.lines().find_map(|line| line.strip_prefix(what)).unwrap();
    line.split_ascii_whitespace().next().unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_container_whose_guard_is_killed_is_ended_by_the_drone() {
    let Some(ground) = Ground::new() else { return };
    let mut fake = Fake::start(container_lease()).await;
    let drone = ground.drone(&fake);
    let mut conn = fake.conn().await;
    let backend = "ba-unguarded";
    ready(&mut conn, backend, ground.executable(json!({"ON_TERM": "ignore"}), json!({}))).await;
    for guard in drone.guards() {
        kill(guard, Signal::SIGKILL).unwrap();
    }
    let ended = conn.expect(backend, BackendStatus::Terminated).await;
    let reason = Some(TerminationReason::InternalError);
    assert!(matches!(ended, BackendState::Terminated { reason: r, .. } if r == reason), "{ended:?}");
    assert_eq!(alive(backend), 0);
}

#[tokio::test]
async fn a_stopped_guard_does_not_hold_up_an_end() {
    let Some(ground) = Ground::new() else { return };
    let mut fake = Fake::start(container_lease()).await;
    let drone = ground.drone(&fake);
    let mut conn = fake.conn().await;
    let backend = "ba-guard-stopped";
    ready(&mut conn, backend, ground.executable(json!({}), json!({}))).await;
    for guard in drone.guards() {
        kill(guard, Signal::SIGSTOP).unwrap();
    }
    conn.act("end", backend, terminate(TerminationKind::Hard));
    conn.expect(backend, BackendStatus::HardTerminating).await;
    conn.expect(backend, BackendStatus::Terminated).await;
    assert_eq!(alive(backend), 0);
    until("nothing of its guard is left", || drone.guards().is_empty()).await;
}

/// The processes that guards have forked.
fn deputies(guards: &[Pid]) -> Vec<Pid> {
    let is_deputy =
        |process: &processes::Process| guards.iter().any(|guard| guard.as_raw() == process.parent);
    let deputies: Vec<Pid> =
        processes::all().unwrap().iter().filter(|p| is_deputy(p)).map(|p| Pid::from_raw(p.pid)).collect();
    assert_eq!(deputies.len(), guards.len(), "each has one");
    deputies
}

#[tokio::test]
async fn a_container_whose_drone_and_guard_are_killed_dies_with_them() {
    let Some(ground) = Ground::new() else { return };
    // No deadline is near.
    let mut fake = Fake::start(lease(30_000, 40_000, 50_000)).await;
    let mut drone = ground.drone(&fake);
    let mut conn = fake.conn().await;
    let backend = "ba-of-both";
    ready(&mut conn, backend, ground.executable(json!({"ON_TERM": "ignore"}), json!({}))).await;
    let guards = drone.guards();
    drone.process.kill().unwrap();
    drone.ended().await;
    assert!(alive(backend) > 0);
    for guard in guards {
        kill(guard, Signal::SIGKILL).unwrap();
    }
    vanished(backend).await;
}

#[tokio::test]
async fn a_container_whose_drone_is_killed_and_whose_guard_is_stopped_ends_at_its_deadline() {
    let Some(ground) = Ground::new() else { return };
    let mut fake = Fake::start(container_lease()).await;
    let mut drone = ground.drone(&fake);
    let mut conn = fake.conn().await;
    let backend = "ba-deputy";
    ready(&mut conn, backend, ground.executable(json!({"ON_TERM": "ignore"}), json!({}))).await;
    // The latest deadline has to reach the guard before that is stopped.
    conn.renew = false;
    conn.renewal().await;
    let guards = drone.guards();
    for guard in &guards {
        kill(*guard, Signal::SIGSTOP).unwrap();
    }
    let stopped_at = boot_ms();
    drone.process.kill().unwrap();
    drone.ended().await;
    assert!(alive(backend) > 0);
    vanished(backend).await;
    let ended_ms = boot_ms() - stopped_at;
    assert!(ended_ms < container_lease().hard_terminate_ms as i64 + LATE_MS, "{ended_ms} ms");
    for guard in guards {
        kill(guard, Signal::SIGKILL).unwrap();
    }
}

#[tokio::test]
async fn a_container_whose_drone_guard_and_deputy_are_killed_is_ended_by_the_next_drone_before_it_connects() {
    let Some(ground) = Ground::new() else { return };
    let mut fake = Fake::start(container_lease()).await;
    let mut drone = ground.drone(&fake);
    let mut conn = fake.conn().await;
    let backend = "ba-forgotten";
    ready(&mut conn, backend, ground.executable(json!({}), json!({}))).await;
    // In an order in which none can act for the next.
    let guards = drone.guards();
    drone.signal(Signal::SIGSTOP);
    for process in deputies(&guards).iter().chain(&guards) {
        kill(*process, Signal::SIGKILL).unwrap();
    }
    drone.process.kill().unwrap();
    drone.ended().await;
    assert!(alive(backend) > 0, "nobody is left to end it");
    let _drone = ground.drone(&fake);
    fake.conn().await;
    assert_eq!(alive(backend), 0);
    assert!(!ground.exists(backend));
}

#[tokio::test]
async fn a_container_of_an_earlier_drone_with_a_living_guard_is_left_to_it() {
    let Some(ground) = Ground::new() else { return };
    let mut fake = Fake::start(container_lease()).await;
    let mut drone = ground.drone(&fake);
    let mut conn = fake.conn().await;
    let backend = "ba-guarded";
    ready(&mut conn, backend, ground.executable(json!({"ON_TERM": "ignore"}), json!({}))).await;
    conn.renewal().await;
    drone.process.kill().unwrap();
    drone.ended().await;
    let _drone = ground.drone(&fake);
    fake.conn().await;
    assert!(alive(backend) > 0, "its guard holds its deadline");
    vanished(backend).await;
}

#[tokio::test]
async fn an_engine_that_hangs_holds_up_neither_an_end_nor_a_deadline() {
    let Some(ground) = Ground::new() else { return };
    let mut fake = Fake::start(container_lease()).await;
    let proxy = ground.proxy();
    let _drone = ground.drone_at(&fake, &proxy.path);
    let mut conn = fake.conn().await;
    for backend in ["ba-soft", "ba-hard", "ba-deadline"] {
        let on_term = if backend == "ba-soft" { "3" } else { "ignore" };
        ready(&mut conn, backend, ground.executable(json!({"ON_TERM": on_term}), json!({}))).await;
    }
    proxy.set(Mode::Hang);
    conn.act("soft", "ba-soft", terminate(TerminationKind::Soft));
    conn.expect("ba-soft", BackendStatus::Terminating).await;
    conn.expect("ba-soft", BackendStatus::Terminated).await;
    assert_eq!(alive("ba-soft"), 0);
    conn.act("hard", "ba-hard", terminate(TerminationKind::Hard));
    conn.expect("ba-hard", BackendStatus::HardTerminating).await;
    conn.expect("ba-hard", BackendStatus::Terminated).await;
    assert_eq!(alive("ba-hard"), 0);
    let at = conn.renewal().await.local_time;
    conn.renew = false;
    conn.expect("ba-deadline", BackendStatus::Terminating).await;
    conn.expect("ba-deadline", BackendStatus::HardTerminating).await;
    conn.expect("ba-deadline", BackendStatus::Terminated).await;
    assert_eq!(alive("ba-deadline"), 0);
    let late_ms = conn.heartbeat().await - (at + container_lease().hard_terminate_ms as i64);
    // The heartbeat comes up to its interval later.
    assert!(late_ms < LATE_MS + 1_000, "{late_ms} ms");
}

#[tokio::test]
async fn a_container_runs_on_while_its_engine_is_away() {
    let Some(ground) = Ground::new() else { return };
    let mut fake = Fake::start(container_lease()).await;
    let proxy = ground.proxy();
    let _drone = ground.drone_at(&fake, &proxy.path);
    let mut conn = fake.conn().await;
    let backend = "ba-on";
    let address = ready(&mut conn, backend, ground.executable(json!({"ON_TERM": "3"}), json!({}))).await;
    proxy.set(Mode::Cut);
    let first = conn.renewal().await.local_time;
    while conn.renewal().await.local_time < first + container_lease().hard_terminate_ms as i64 {}
    assert!(page(address).await.contains(backend));
    // A spawn that comes now fails at once.
    spawn(&mut conn, "ba-new", ground.executable(json!({}), json!({})), key("other", "")).await;
    conn.expect("ba-new", BackendStatus::Loading).await;
    conn.expect("ba-new", BackendStatus::Terminated).await;
    proxy.set(Mode::Open);
    conn.act("end", backend, terminate(TerminationKind::Soft));
    conn.expect(backend, BackendStatus::Terminating).await;
    let ended = conn.expect(backend, BackendStatus::Terminated).await;
    assert!(matches!(ended, BackendState::Terminated { exit_code: Some(3), .. }), "{ended:?}");
}

/// The next report that a backend has ended.
async fn terminated(conn: &mut Conn, backend: &str) -> BackendState {
    conn.until("its end", |message| match message {
        MessageFromDrone::BackendEvent(event)
            if event.backend_id == backend && event.state.status() == BackendStatus::Terminated =>
        {
            Some(event.state)
        }
        _ => None,
    })
    .await
}

#[tokio::test]
async fn a_start_whose_answer_is_late_is_undone() {
    let Some(ground) = Ground::new() else { return };
    let mut fake = Fake::start(container_lease()).await;
    let proxy = ground.proxy();
    let _drone = ground.drone_at(&fake, &proxy.path);
    let mut conn = fake.conn().await;
    proxy.set(Mode::HoldStartAnswers);
    conn.renew = false;
    let backend = "ba-late-answer";
    let executable = ground.executable(json!({"ON_TERM": "ignore"}), json!({"mount": "marks"}));
    spawn(&mut conn, backend, executable, key("room", "")).await;
    until("the container begins", || ground.has_begun(backend)).await;
    assert!(alive(backend) > 0);
    let ended = terminated(&mut conn, backend).await;
    let reason = Some(TerminationReason::KeyExpired);
    assert!(matches!(ended, BackendState::Terminated { reason: r, .. } if r == reason), "{ended:?}");
    assert_eq!(alive(backend), 0);
}

#[tokio::test]
async fn a_start_that_the_engine_does_late_does_nothing() {
    let Some(ground) = Ground::new() else { return };
    let mut fake = Fake::start(container_lease()).await;
    let proxy = ground.proxy();
    let _drone = ground.drone_at(&fake, &proxy.path);
    let mut conn = fake.conn().await;
    proxy.set(Mode::HoldStarts);
    conn.renew = false;
    let backend = "ba-late-start";
    let executable = ground.executable(json!({}), json!({"mount": "marks"}));
    spawn(&mut conn, backend, executable, key("room", "")).await;
    soon("a guard asks for a start", proxy.start_asked()).await;
    // From here on the engine does nothing else either, such as to remove the container.
    proxy.set(Mode::Hang);
    terminated(&mut conn, backend).await;
    assert!(ground.exists(backend));
    assert!(
        !ground.docker_can(&["start", &ground.container(backend)]),
        "nobody can start it, past the proxy too"
    );
    // The key is somebody else's by now; and now the engine goes on.
    proxy.set(Mode::Open);
    until("the engine is done with it", || !ground.exists(backend)).await;
    assert_eq!(alive(backend), 0);
    assert!(!ground.has_begun(backend));
}

#[tokio::test]
async fn a_guard_that_is_killed_while_the_engine_starts_leaves_nothing() {
    let Some(ground) = Ground::new() else { return };
    let mut fake = Fake::start(container_lease()).await;
    let proxy = ground.proxy();
    let drone = ground.drone_at(&fake, &proxy.path);
    let mut conn = fake.conn().await;
    proxy.set(Mode::HoldStarts);
    let backend = "ba-guard-killed";
    let executable = ground.executable(json!({}), json!({"mount": "marks"}));
    spawn(&mut conn, backend, executable, key("room", "")).await;
    soon("a guard asks for a start", proxy.start_asked()).await;
    proxy.set(Mode::Hang);
    for guard in drone.guards() {
        kill(guard, Signal::SIGKILL).unwrap();
    }
    terminated(&mut conn, backend).await;
    proxy.set(Mode::Open);
    until("the engine is done with it", || !ground.exists(backend)).await;
    assert_eq!(alive(backend), 0);
    assert!(!ground.has_begun(backend));
}

#[tokio::test]
async fn an_end_that_is_asked_for_during_a_pull_does_not_wait_for_it() {
    let Some(ground) = Ground::new() else { return };
    let mut fake = Fake::start(container_lease()).await;
    // A registry that takes connections and says nothing.
    let registry = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let image = format!("{}/app:1", registry.local_addr().unwrap());
    let _drone = ground.drone(&fake);
    let mut conn = fake.conn().await;
    let backend = "ba-pulling";
    spawn(&mut conn, backend, json!({"image": image}), key("room", "")).await;
    conn.expect(backend, BackendStatus::Loading).await;
    let asked = tokio::task::spawn_blocking(move || registry.accept());
    let _connection = soon("the engine asks the registry", asked).await.unwrap().unwrap();
    conn.act("end", backend, terminate(TerminationKind::Soft));
    conn.expect(backend, BackendStatus::Terminating).await;
    conn.expect(backend, BackendStatus::Terminated).await;
}
