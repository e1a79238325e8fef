//! What was acknowledged survives the death and the replacement of the drone at any moment, and is carried out.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

mod common;

use common::{Conn, Drone, Fake, alive, lease, soon};
use holdfast_wire::drone::{Action, MessageFromDrone};
use holdfast_wire::{BackendStatus, LeaseConfig, TerminationKind, TerminationReason};
use nix::sys::signal::Signal;
use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

const FOREVER: &str = "exec sleep 3000";

/// Nothing ends by a deadline during the test.
fn long() -> LeaseConfig {
    lease(300_000, 400_000, 500_000)
}

fn terminate(kind: TerminationKind) -> Action {
    Action::Terminate { kind, reason: TerminationReason::External }
}

/// Starts backends and waits until all of them run.
async fn all_running(conn: &mut Conn, backends: &BTreeSet<String>) {
    let now = conn.heartbeat().await;
    for backend in backends {
        conn.act(&format!("spawn-{backend}"), backend, conn.spawn_action(FOREVER, now));
    }
    let mut waiting = BTreeSet::new();
    while waiting.len() < backends.len() {
        let event = conn.event().await;
        if event.state.status() == BackendStatus::Waiting {
            waiting.insert(event.backend_id);
        }
    }
}

/// Asks for the end of all backends, and ends the drone at some moment while it works on that. Its successor is asked
/// again only for what was not acknowledged. All end.
async fn terminates_with_a_signal_in_between(count: usize, round: usize, signal: Signal) {
    let mut fake = Fake::start(long()).await;
    let dir = tempfile::tempdir().unwrap();
    let mut drone = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    let name = format!("ba-{}-{round}", signal.as_str().to_lowercase());
    let mut left: BTreeSet<String> = (0..count).map(|n| format!("{name}-{n}")).collect();
    all_running(&mut conn, &left).await;
    let kind = if round.is_multiple_of(2) { TerminationKind::Soft } else { TerminationKind::Hard };
    for backend in &left {
        conn.act(backend, backend, terminate(kind));
    }
    // A moment within the time that all of them take, by what was acknowledged so far.
    let moment = rand::random_range(0..count);
    let mut acknowledged = BTreeSet::new();
    let mut signalled = false;
    loop {
        if acknowledged.len() >= moment && !signalled {
            drone.signal(signal);
            signalled = true;
        }
        match conn.any_until_gone().await {
            Some(MessageFromDrone::AckAction { action_id }) => drop(acknowledged.insert(action_id)),
            Some(MessageFromDrone::BackendEvent(event))
                if event.state.status() == BackendStatus::Terminated =>
            {
                left.remove(&event.backend_id);
            }
            Some(_) => {}
            None => break,
        }
    }
    drone.ended().await;
    let _next = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    let listed: BTreeSet<&str> = conn.listed.iter().map(|listed| listed.backend.as_str()).collect();
    for backend in &left {
        assert!(listed.contains(backend.as_str()), "{backend} is not listed");
        if !acknowledged.contains(backend) {
            conn.act(backend, backend, terminate(kind));
        }
    }
    while !left.is_empty() {
        let event = conn.event().await;
        if event.state.status() == BackendStatus::Terminated {
            assert_eq!(alive(&event.backend_id), 0);
            left.remove(&event.backend_id);
        }
    }
}

#[tokio::test]
async fn an_acknowledged_terminate_survives_a_kill_at_any_moment() {
    for round in 0..4 {
        terminates_with_a_signal_in_between(20, round, Signal::SIGKILL).await;
    }
}

#[tokio::test]
async fn an_acknowledged_terminate_survives_an_upgrade_at_any_moment() {
    for round in 0..4 {
        terminates_with_a_signal_in_between(20, round, Signal::SIGHUP).await;
    }
}

#[tokio::test]
#[ignore = "long: make soak"]
async fn a_thousand_terminates_survive_kills_and_upgrades_for_20_rounds() {
    for round in 0..20 {
        for signal in [Signal::SIGKILL, Signal::SIGHUP] {
            terminates_with_a_signal_in_between(1_000, round, signal).await;
        }
    }
}

fn journal(data_dir: &Path, backend: &str) -> std::path::PathBuf {
    data_dir.join("backends").join(backend).join("journal")
}

#[tokio::test]
async fn a_spawn_is_acknowledged_or_reported_only_once_it_is_durable() {
    for round in 0..10 {
        let mut fake = Fake::start(long()).await;
        let dir = tempfile::tempdir().unwrap();
        let mut drone = Drone::start(&fake.url, dir.path());
        let mut conn = fake.conn().await;
        let now = conn.heartbeat().await;
        let names: Vec<String> = (0..10).map(|n| format!("ba-durable-{round}-{n}")).collect();
        for backend in &names {
            conn.act(backend, backend, conn.spawn_action(FOREVER, now));
        }
        tokio::time::sleep(Duration::from_micros(rand::random_range(0..20_000))).await;
        drone.signal(Signal::SIGKILL);
        let mut said = BTreeSet::new();
        while let Some(message) = conn.any_until_gone().await {
            match message {
                MessageFromDrone::AckAction { action_id } => drop(said.insert(action_id)),
                MessageFromDrone::BackendEvent(event) => drop(said.insert(event.backend_id)),
                _ => {}
            }
        }
        drone.ended().await;
        for backend in &said {
            assert!(journal(dir.path(), backend).exists(), "{backend} is acknowledged and not durable");
        }
        let _next = Drone::start(&fake.url, dir.path());
        let mut conn = fake.conn().await;
        let listed: BTreeSet<String> = conn.listed.iter().map(|listed| listed.backend.clone()).collect();
        assert!(listed.is_superset(&said), "{said:?} in {listed:?}");
        for backend in &listed {
            conn.act("end", backend, terminate(TerminationKind::Hard));
        }
        let mut ended = BTreeSet::new();
        while ended.len() < listed.len() {
            let event = conn.event().await;
            if event.state.status() == BackendStatus::Terminated {
                ended.insert(event.backend_id);
            }
        }
        for backend in &names {
            assert_eq!(alive(backend), 0, "{backend}");
        }
    }
}

#[tokio::test]
async fn a_terminate_that_cannot_be_made_durable_is_still_carried_out() {
    let mut fake = Fake::start(long()).await;
    let dir = tempfile::tempdir().unwrap();
    let _drone = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    let backend = "ba-no-note";
    conn.waiting(backend, FOREVER).await;
    // Nothing can be written there.
    std::fs::create_dir(dir.path().join("backends").join(backend).join("end.new")).unwrap();
    conn.act("end", backend, terminate(TerminationKind::Hard));
    let mut over = false;
    soon("its end, and then the acknowledgement", async {
        loop {
            match conn.any().await {
                MessageFromDrone::BackendEvent(event) => {
                    over |= event.state.status() == BackendStatus::Terminated;
                }
                MessageFromDrone::AckAction { action_id } if action_id == "end" => return,
                _ => {}
            }
        }
    })
    .await;
    assert_eq!(alive(backend), 0, "acknowledged before it was carried out");
    if !over {
        conn.until("its end", |message| match message {
            MessageFromDrone::BackendEvent(event) => {
                (event.state.status() == BackendStatus::Terminated).then_some(())
            }
            _ => None,
        })
        .await;
    }
}

#[tokio::test]
async fn a_spawn_for_another_incarnation_does_nothing() {
    let mut fake = Fake::start(long()).await;
    let dir = tempfile::tempdir().unwrap();
    let _drone = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    let now = conn.heartbeat().await;
    let own = conn.handshake.incarnation.clone();
    for (backend, named) in [("ba-void", Some("0".repeat(32))), ("ba-named", own)] {
        let mut spawn = conn.spawn_action(FOREVER, now);
        if let Action::Spawn { incarnation, .. } = &mut spawn {
            *incarnation = named;
        }
        conn.act(backend, backend, spawn);
    }
    // They are read in order.
    conn.acknowledged("ba-named").await;
    assert!(!dir.path().join("backends/ba-void").exists());
}
