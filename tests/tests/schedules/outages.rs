//! Time that passes without a drone, or without any leader.

use crate::support::{SOON, connect, drone, gone_at, hold, request};
use holdfast_tests::harness::{Cluster, LONG, wait_until};
use holdfast_tests::sim_drone::{Identity, LocalClock};
use holdfast_wire::http::DronePage;
use holdfast_wire::{ApiErrorKind, BackendStatus, TerminationReason};
use std::time::{Duration, Instant};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_an_idle_cluster_the_key_of_a_dead_drone_expires_by_itself() {
    const EXPIRY: Duration = Duration::from_secs(4);
    let cluster = Cluster::builder().drones(0).lease("renew=1s,soft=2s,hard=3s,expiry=4s").start().await;
    let clock = LocalClock::reading(0);
    let mut sim = drone(&cluster, &Identity::new(&cluster.name, "dr-dead", "a"), &clock).await;
    let (answer, key) = hold(&cluster, &mut sim, "k").await;
    let renewed =
        sim.renew_many(&[(answer.backend_id.clone(), key.token)], clock.now_ms(), SOON).await.unwrap();
    assert!(renewed.keys[0].deadlines.is_some(), "{renewed:?}");
    let held = cluster.key("k").await.expect("held");
    let died = Instant::now();
    drop(sim);

    // Stale reads make no entry and no round between controllers: nothing but the leader itself moves the cluster on.
    let url = format!("{}/ctrl/keys?consistency=local&limit=10", cluster.url(cluster.leader().await));
    wait_until("the key is gone from the listing", EXPIRY + Duration::from_secs(4), async || {
        let page: holdfast_wire::http::KeyPage = cluster.http.get(&url).await.ok();
        if page.keys.is_empty() { Ok(()) } else { Err(page.keys) }
    })
    .await;
    let took = died.elapsed();
    assert!(took <= EXPIRY + Duration::from_secs(2), "it took {took:?}");
    let now = cluster.info().await.cluster_time;
    assert!(now >= held.expires_at, "expired at {now} or before, ahead of {held:?}");

    let ended = cluster.wait_status(&answer.backend_id, BackendStatus::Terminated).await;
    assert_eq!(ended.termination_reason, Some(TerminationReason::Lost), "{ended:?}");
    let mut sim = drone(&cluster, &Identity::new(&cluster.name, "dr-alive", "b"), &clock).await;
    let (next, _) = hold(&cluster, &mut sim, "k").await;
    assert!(next.fencing_token > answer.fencing_token, "{next:?} after {answer:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_an_outage_longer_than_the_lease_keys_are_still_held_and_only_new_heartbeats_count() {
    /// Half of `renew`: a heartbeat that is older can't be used anyway, and the test would show nothing.
    const FRESH_MS: u64 = 5_000;
    const EXPIRY_MS: u64 = 15_000;
    const OUTAGE: Duration = Duration::from_secs(17);
    let mut cluster =
        Cluster::builder().drones(0).lease("renew=10s,soft=11s,hard=12s,expiry=15s").start().await;
    let clock = LocalClock::reading(9_000_000);
    let identity = Identity::new(&cluster.name, "dr-sim", "one");
    let mut sim = drone(&cluster, &identity, &clock).await;
    let (answer, key) = hold(&cluster, &mut sim, "k").await;
    let held = cluster.key("k").await.expect("held");
    let before = cluster.info().await;
    let seen = Instant::now();
    cluster.controllers.iter_mut().for_each(holdfast_tests::harness::Process::kill9);
    let ran_ms = seen.elapsed().as_millis() as u64;
    drop(sim);
    tokio::time::sleep(OUTAGE).await;

    let back = Instant::now();
    for index in 0..3 {
        cluster.restart_controller(index);
    }
    let leader = cluster.leader().await;
    let after = cluster.info().await;
    // Time stood still: what was left of the lease is left.
    let awake_ms = back.elapsed().as_millis() as u64 + ran_ms;
    let passed_ms = after.cluster_time.saturating_sub(before.cluster_time);
    assert!(passed_ms <= awake_ms * 105 / 100 + 1, "{passed_ms} ms passed in {awake_ms} ms");
    let still = cluster.key("k").await.expect("held through the outage");
    assert_eq!((still.token, still.expires_at), (answer.fencing_token, held.expires_at));

    // The last heartbeat looks fresh, but its clock is of before the outage: deadlines would be in the past.
    let drones: DronePage = cluster.http.get(&format!("{}/ctrl/drones", cluster.url(leader))).await.ok();
    let age = drones.drones[0].last_heartbeat_age_ms.expect("it had sent some");
    assert!(age < FRESH_MS, "looking took too long to show anything: {drones:?}");
    let refused = cluster.http.connect(&cluster.url(leader), &request(&cluster, "new")).await;
    refused.refused(ApiErrorKind::NoDroneAvailable);

    // The drone comes back, the same process: the first connect succeeds within seconds, in its present time.
    let begin = Instant::now();
    let mut sim = drone(&cluster, &identity, &clock).await;
    let (new, new_key) = hold(&cluster, &mut sim, "new").await;
    assert!(begin.elapsed() < Duration::from_secs(8), "the first connect took {:?}", begin.elapsed());
    assert!(new.fencing_token > answer.fencing_token);
    let ahead_ms = new_key.deadlines.renew_at - clock.now_ms();
    assert!((0..=10_000).contains(&ahead_ms), "renew_at is {ahead_ms} ms ahead of the drone's clock");

    // And the key lives for the rest of its lease, not longer.
    let found = connect(&cluster, "k").await;
    assert_eq!((found.spawned, found.fencing_token), (false, key.token), "{found:?}");
    let gone_ms = gone_at(&cluster, "k", key.token, Duration::from_millis(EXPIRY_MS) + LONG).await;
    assert!(gone_ms >= held.expires_at, "gone at {gone_ms}, ahead of {held:?}");
}
