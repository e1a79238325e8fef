//! A container engine that is stopped, killed and started again, while a drone's backends run on it.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

mod common;
mod docker_support;

use common::*;
use docker_support::engine::Engine;
use docker_support::*;
use holdfast_wire::drone::Action;
use holdfast_wire::{BackendState, BackendStatus, TerminationKind, TerminationReason};
use nix::sys::signal::Signal;
use serde_json::json;

#[tokio::test]
async fn a_stopped_engine_keeps_no_container_past_its_deadline() {
    let Some(engine) = Engine::start() else { return };
    let Some(ground) = Ground::on(&engine.socket()) else { return };
    let mut fake = Fake::start(container_lease()).await;
    let _drone = ground.drone(&fake);
    let mut conn = fake.conn().await;
    for backend in ["ba-killed", "ba-deadline"] {
        ready(&mut conn, backend, ground.executable(json!({"ON_TERM": "ignore"}), json!({}))).await;
    }
    engine.signal(Signal::SIGSTOP);
    conn.act(
        "end",
        "ba-killed",
        Action::Terminate { kind: TerminationKind::Hard, reason: TerminationReason::External },
    );
    conn.expect("ba-killed", BackendStatus::HardTerminating).await;
    conn.expect("ba-killed", BackendStatus::Terminated).await;
    assert_eq!(alive("ba-killed"), 0);
    conn.renew = false;
    conn.expect("ba-deadline", BackendStatus::Terminating).await;
    conn.expect("ba-deadline", BackendStatus::HardTerminating).await;
    conn.expect("ba-deadline", BackendStatus::Terminated).await;
    assert_eq!(alive("ba-deadline"), 0);
    engine.signal(Signal::SIGCONT);
    let state = || ground.inspect("ba-deadline")["State"]["Running"].clone();
    until("the engine finds out", || state() == json!(false)).await;
}

#[tokio::test]
async fn a_container_outlives_its_engine_and_ends_with_its_restart() {
    let Some(mut engine) = Engine::start() else { return };
    let Some(ground) = Ground::on(&engine.socket()) else { return };
    let mut fake = Fake::start(container_lease()).await;
    let _drone = ground.drone(&fake);
    let mut conn = fake.conn().await;
    let backend = "ba-outlives";
    ready(&mut conn, backend, ground.executable(json!({}), json!({}))).await;
    engine.kill();
    // Past the deadlines of the time when the engine was killed.
    let first = conn.renewal().await.local_time;
    while conn.renewal().await.local_time < first + container_lease().hard_terminate_ms as i64 {}
    assert!(alive(backend) > 0);
    // Without live-restore an engine ends what it finds running.
    engine.run();
    let ended = conn.expect(backend, BackendStatus::Terminated).await;
    assert!(matches!(ended, BackendState::Terminated { termination: None, reason: None, .. }), "{ended:?}");
    assert_eq!(alive(backend), 0);
    // And the drone goes on with it.
    ready(&mut conn, "ba-next", ground.executable(json!({}), json!({}))).await;
}

#[tokio::test]
async fn a_container_whose_engine_is_dead_is_ended_at_its_deadline() {
    let Some(mut engine) = Engine::start() else { return };
    let Some(ground) = Ground::on(&engine.socket()) else { return };
    let mut fake = Fake::start(container_lease()).await;
    let mut drone = ground.drone(&fake);
    let mut conn = fake.conn().await;
    let backend = "ba-all-dead";
    ready(&mut conn, backend, ground.executable(json!({"ON_TERM": "ignore"}), json!({}))).await;
    engine.kill();
    drone.process.kill().unwrap();
    drone.ended().await;
    assert!(alive(backend) > 0);
    vanished(backend).await;
    // For the sake of what it has mounted.
    engine.run();
}
