//! Backends that live for a limited time, or only as long as somebody is connected; drones that are started anew.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics has found something")]

use holdfast_tests::harness::{Cluster, EventKind, LONG, wait_until};
use holdfast_wire::http::ConnectRequest;
use holdfast_wire::{BackendStatus, TerminationKind, TerminationReason};
use nix::sys::signal::Signal;
use std::time::{Duration, Instant};
use tokio::net::TcpStream;

const LEASE: &str = "renew=700ms,soft=4s,hard=5s,expiry=7s";

fn request(
    cluster: &Cluster,
    key: &str,
    change: impl FnOnce(&mut holdfast_wire::http::SpawnConfig),
) -> ConnectRequest {
    let mut request = cluster.backend().request(key);
    change(request.spawn_config.as_mut().unwrap());
    request
}

#[tokio::test]
async fn a_backend_ends_softly_when_its_lifetime_is_over_and_its_key_is_free() {
    let cluster = Cluster::builder().lease(LEASE).start().await;
    let request = request(&cluster, "short-lived", |spawn| spawn.lifetime_limit_seconds = Some(3));
    let began = Instant::now();
    let answer = cluster.client().connect(&request).await.unwrap();
    cluster.wait_status(&answer.backend_id, BackendStatus::Ready).await;
    let ended = cluster.wait_status(&answer.backend_id, BackendStatus::Terminated).await;
    // Cluster time may stand still, never run ahead by more than the tolerance.
    assert!(began.elapsed() >= Duration::from_millis(3_000 * 95 / 100), "{:?}", began.elapsed());
    assert_eq!(
        (ended.termination_kind, ended.termination_reason),
        (Some(TerminationKind::Soft), Some(TerminationReason::Swept))
    );
    cluster.wait_free("short-lived").await;
    assert_eq!(cluster.journal.kinds("short-lived"), [EventKind::Start, EventKind::Term, EventKind::Stop]);
    cluster.journal.assert_no_overlap();
}

#[tokio::test]
async fn a_backend_lives_while_somebody_is_connected_and_ends_when_nobody_has_been_for_its_time() {
    let cluster = Cluster::builder().lease(LEASE).start().await;
    let request = request(&cluster, "visited", |spawn| spawn.max_idle_seconds = Some(3));
    let answer = cluster.client().connect(&request).await.unwrap();
    let ready = cluster.wait_status(&answer.backend_id, BackendStatus::Ready).await;
    let visitor = TcpStream::connect(ready.address.unwrap()).await.unwrap();
    // Far beyond its time; there is nothing to await in that nothing happens.
    tokio::time::sleep(Duration::from_secs(7)).await;
    cluster.assert_ready(&answer.backend_id).await;
    let left = Instant::now();
    drop(visitor);
    let ended = cluster.wait_status(&answer.backend_id, BackendStatus::Terminated).await;
    assert!(left.elapsed() >= Duration::from_millis(2_800), "{:?}", left.elapsed());
    assert_eq!(
        (ended.termination_kind, ended.termination_reason),
        (Some(TerminationKind::Soft), Some(TerminationReason::Swept))
    );
    cluster.wait_free("visited").await;
}

#[tokio::test]
async fn a_drone_that_is_killed_and_started_again_at_once_keeps_its_backends() {
    let mut cluster = Cluster::builder().lease(LEASE).start().await;
    let mut held = Vec::new();
    for n in 0..5 {
        held.push(cluster.connect_ready(&format!("kept-{n}")).await);
    }
    for signal in [Signal::SIGKILL, Signal::SIGHUP, Signal::SIGKILL] {
        cluster.drones[0].signal(signal);
        cluster.drones[0].wait(LONG).await;
        let at = cluster.info().await.cluster_time;
        cluster.restart_drone(0);
        // Beyond the expiry that any of them had: the successor has renewed them.
        wait_until("all keys are renewed", LONG, async || {
            let keys = cluster.keys().await;
            assert_eq!(keys.len(), held.len(), "{keys:?}");
            match keys.iter().find(|key| key.expires_at < at + 7_000 + 1_000) {
                None => Ok(()),
                Some(key) => Err(format!("{key:?}")),
            }
        })
        .await;
    }
    for answer in &held {
        let key = cluster.key(&answer.key.name).await.unwrap();
        assert_eq!((&key.backend, key.token), (&answer.backend_id, answer.fencing_token));
        cluster.assert_ready(&answer.backend_id).await;
        assert_eq!(cluster.journal.kinds(&answer.key.name), [EventKind::Start]);
        // And the successor can end them.
        cluster.client().terminate(&answer.backend_id, TerminationKind::Soft).await.unwrap();
        cluster.wait_free(&answer.key.name).await;
        assert_eq!(
            cluster.journal.kinds(&answer.key.name),
            [EventKind::Start, EventKind::Term, EventKind::Stop]
        );
    }
}

#[tokio::test]
async fn a_drone_that_shuts_down_takes_no_new_backends_and_ends_those_it_has() {
    let mut cluster = Cluster::builder().lease(LEASE).drones(2).start().await;
    let mut held = Vec::new();
    for n in 0..6 {
        held.push(cluster.connect_ready(&format!("moved-{n}")).await);
    }
    cluster.drones[0].signal(Signal::SIGTERM);
    cluster.drones[0].wait(LONG).await;
    for answer in &held {
        let again = cluster.connect_ready(&answer.key.name).await;
        assert_eq!(again.drone.as_deref(), Some("dr-1"), "{again:?}");
        if answer.drone.as_deref() == Some("dr-1") {
            assert_eq!(again.fencing_token, answer.fencing_token, "the other drone's go on");
        } else {
            assert!(again.fencing_token > answer.fencing_token);
        }
    }
    cluster.journal.assert_no_overlap();
}
