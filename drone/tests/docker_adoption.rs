//! A drone that is killed while its containers run, and its successor on the same data directory.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

mod common;
mod docker_support;

use common::*;
use docker_support::*;
use holdfast_wire::drone::{Action, MessageFromDrone};
use holdfast_wire::{BackendState, BackendStatus, TerminationKind, TerminationReason};
use serde_json::{Value, json};
use std::path::PathBuf;

/// What is left of a journal; nothing if it is missing.
type Harm = fn(Vec<u8>) -> Option<Vec<u8>>;

async fn kill9(mut drone: Drone) {
    drone.process.kill().unwrap();
    drone.ended().await;
}

/// By what a container that was started again, or is another one, is told.
fn life(ground: &Ground, backend: &str) -> [Value; 3] {
    let known = ground.inspect(backend);
    assert_eq!(known["State"]["Running"], true, "{known}");
    [known["Id"].clone(), known["State"]["StartedAt"].clone(), known["State"]["Pid"].clone()]
}

fn journal(ground: &Ground, backend: &str) -> PathBuf {
    ground.dir.path().join("data/backends").join(backend).join("journal")
}

/// Passes over states that are reported once more, until the backend's end.
async fn terminated(conn: &mut Conn, backend: &str) -> BackendState {
    conn.until("its end", |message| match message {
        MessageFromDrone::BackendEvent(event)
            if event.backend_id == backend && event.state.status() == BackendStatus::Terminated =>
        {
            assert_eq!(event.token, Some(TOKEN));
            Some(event.state)
        }
        _ => None,
    })
    .await
}

#[tokio::test]
async fn a_container_runs_on_under_the_successor_of_a_killed_drone() {
    let Some(ground) = Ground::new() else { return };
    let mut fake = Fake::start(container_lease()).await;
    let drone = ground.drone(&fake);
    let mut conn = fake.conn().await;
    let backend = "ba-adopted";
    let address = ready(&mut conn, backend, ground.executable(json!({"ON_TERM": "3"}), json!({}))).await;
    let before = life(&ground, backend);
    conn.renewal().await;
    kill9(drone).await;
    let drone = ground.drone(&fake);
    let mut conn = fake.conn().await;
    // For longer than the deadlines that its guard had when the first drone died.
    let first = conn.renewal().await;
    assert_eq!(
        first.keys.iter().map(|key| (key.backend.as_str(), key.token)).collect::<Vec<_>>(),
        [(backend, TOKEN)]
    );
    let hard_ms = i64::try_from(container_lease().hard_terminate_ms).unwrap();
    while conn.renewal().await.local_time < first.local_time + hard_ms {}
    assert_eq!(life(&ground, backend), before, "it was not interrupted");
    assert!(page(address).await.contains(backend));
    assert_eq!(drone.guards().len(), 0, "its guard is the first drone's");
    let end = Action::Terminate { kind: TerminationKind::Soft, reason: TerminationReason::External };
    conn.act("end", backend, end);
    let state = terminated(&mut conn, backend).await;
    assert!(
        matches!(
            state,
            BackendState::Terminated {
                termination: Some(TerminationKind::Soft),
                reason: Some(TerminationReason::External),
                exit_code: Some(3),
                ..
            }
        ),
        "{state:?}"
    );
    assert_eq!(alive(backend), 0);
    until("its journal is removed", || !journal(&ground, backend).exists()).await;
    let output = ground.docker(&["logs", &ground.container(backend)]);
    assert!(output.contains("listens"), "it is kept for its output: {output:?}");
}

#[tokio::test]
async fn a_container_that_ended_while_no_drone_was_there_is_reported_with_its_exit_code() {
    let Some(ground) = Ground::new() else { return };
    // No deadline is near.
    let mut fake = Fake::start(lease(30_000, 40_000, 50_000)).await;
    let drone = ground.drone(&fake);
    let mut conn = fake.conn().await;
    let backend = "ba-ended";
    ready(&mut conn, backend, ground.executable(json!({"ON_TERM": "5"}), json!({}))).await;
    kill9(drone).await;
    ground.docker(&["kill", "--signal", "TERM", &ground.container(backend)]);
    vanished(backend).await;
    let _drone = ground.drone(&fake);
    let mut conn = fake.conn().await;
    let state = terminated(&mut conn, backend).await;
    assert!(
        matches!(state, BackendState::Terminated { termination: None, reason: None, exit_code: Some(5), .. }),
        "{state:?}"
    );
    until("its journal is removed", || !journal(&ground, backend).exists()).await;
    let output = ground.docker(&["logs", &ground.container(backend)]);
    assert!(output.contains("listens"), "it is kept for its output: {output:?}");
}

#[tokio::test]
async fn whatever_container_a_damaged_journal_may_have_run_is_ended() {
    let harms: [(&str, Harm); 3] = [
        ("flipped", |mut bytes| {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            Some(bytes)
        }),
        ("torn", |bytes| Some(bytes[..bytes.len() / 2].to_vec())),
        ("missing", |_| None),
    ];
    for (what, harm) in harms {
        let Some(ground) = Ground::new() else { return };
        let mut fake = Fake::start(lease(30_000, 40_000, 50_000)).await;
        let drone = ground.drone(&fake);
        let mut conn = fake.conn().await;
        let backend = format!("ba-{what}");
        ready(&mut conn, &backend, ground.executable(json!({"ON_TERM": "ignore"}), json!({}))).await;
        kill9(drone).await;
        assert!(alive(&backend) > 0);
        let journal = journal(&ground, &backend);
        match harm(std::fs::read(&journal).unwrap()) {
            Some(harmed) => std::fs::write(&journal, harmed).unwrap(),
            None => std::fs::remove_file(&journal).unwrap(),
        }
        let _drone = ground.drone(&fake);
        let mut conn = fake.conn().await;
        vanished(&backend).await;
        until(what, || !ground.exists(&backend) && !journal.exists()).await;
        // And it works.
        ready(&mut conn, "ba-next", ground.executable(json!({}), json!({}))).await;
    }
}
