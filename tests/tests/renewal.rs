//! A drone that is cut off from all controllers: its backends end on the timeline, and only then does anyone else start.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics has found something")]

use holdfast_tests::harness::{Cluster, EventKind, ProxySet, SHORT, boot_ms, wait_until};
use holdfast_wire::http::ConnectResponse;
use holdfast_wire::{BackendStatus, LeaseConfig, TerminationReason};
use std::net::TcpStream;

const LEASE: &str = "renew=1s,soft=2s,hard=3s,expiry=4s";
/// How much later than planned something may happen on a busy machine, in milliseconds. Less than from the hard deadline
/// to the expiry: exclusion does not rest on it.
const LATE_MS: u64 = 700;
/// How long a renewal may have been on its way, in milliseconds: deadlines count from when the drone asked.
const ON_THE_WAY_MS: u64 = 700;

/// What is added to cluster time to get `CLOCK_BOOTTIME`, in milliseconds, at most a request's time too much.
async fn cluster_to_boot_ms(cluster: &Cluster) -> i64 {
    let info = cluster.info().await;
    boot_ms().cast_signed() - info.cluster_time.cast_signed()
}

async fn a_backend_of_a_drone_cut_off_ends_on_the_timeline(cut: impl Fn(&ProxySet)) {
    let lease: LeaseConfig = LEASE.parse().unwrap();
    let cluster = Cluster::builder().drones(2).lease(LEASE).proxied_drones().start().await;
    let client = cluster.client();
    let request = cluster.backend().ignoring_sigterm().request("k");
    let first = client.connect(&request).await.unwrap();
    let info = cluster.wait_status(&first.backend_id, BackendStatus::Ready).await;
    let address = info.address.unwrap();
    let drone = if info.drone == "dr-0" { 0 } else { 1 };
    // Renewed at least once, so that what counts are renewals and not the acquisition.
    wait_until("a renewal", SHORT, async || {
        let key = cluster.key("k").await.unwrap();
        if key.expires_at > key.acquired_at + lease.expiry_ms { Ok(()) } else { Err(key) }
    })
    .await;
    let to_boot = cluster_to_boot_ms(&cluster).await;
    cut(&cluster.links[drone]);
    // One that was on its way may still arrive.
    let last = wait_until("half the lease is over without a renewal", SHORT, async || {
        let key = cluster.key("k").await.unwrap();
        let now = cluster.info().await.cluster_time;
        if key.expires_at < now + lease.expiry_ms - lease.renew_ms - 300 { Ok(key) } else { Err((key, now)) }
    })
    .await;
    let renewed_boot_ms = (last.expires_at - lease.expiry_ms).cast_signed() + to_boot;
    let renewed_boot_ms = renewed_boot_ms.cast_unsigned();
    let expiry_boot_ms = renewed_boot_ms + lease.expiry_ms;

    // Whoever asks before the expiry gets the one that is there; the first other one comes after it.
    let takes_over = async {
        wait_until("another backend", SHORT, async || {
            let at_boot_ms = boot_ms();
            let answer: ConnectResponse = client.connect(&request).await.unwrap();
            if answer.backend_id == first.backend_id {
                assert!(!answer.spawned && answer.fencing_token == first.fencing_token);
                return Err((at_boot_ms, answer));
            }
            Ok(answer)
        })
        .await
    };
    let dies = wait_until("the old backend is gone", SHORT, async || {
        if TcpStream::connect(address).is_err() { Ok(boot_ms()) } else { Err("it answers") }
    });
    let (second, dead_boot_ms) = tokio::join!(takes_over, dies);

    let term = cluster.journal.wait_for(&first.backend_id, EventKind::Term, SHORT).await;
    let within = |what: &str, at: u64, planned: u64| {
        assert!(
            at + ON_THE_WAY_MS >= planned && at <= planned + LATE_MS,
            "{what} at {at}, planned for {planned}; renewed at {renewed_boot_ms}, expiry at {expiry_boot_ms}"
        );
    };
    within("soft", term.boot_ms, renewed_boot_ms + lease.soft_terminate_ms);
    within("hard", dead_boot_ms, renewed_boot_ms + lease.hard_terminate_ms);
    assert!(dead_boot_ms < expiry_boot_ms);

    assert!(second.spawned && second.fencing_token > first.fencing_token);
    assert_ne!(second.drone, first.drone);
    let key = cluster.key("k").await.unwrap();
    assert!(key.acquired_at >= last.expires_at, "acquired early: {key:?} after {last:?}");
    let started = cluster.journal.wait_for(&second.backend_id, EventKind::Start, SHORT).await;
    assert!(started.boot_ms > dead_boot_ms - 100);
    cluster.journal.assert_no_overlap();

    // The drone comes back, and tells what happened; nobody's key is touched by it.
    cluster.links[drone].heal();
    let end = cluster.wait_status(&first.backend_id, BackendStatus::Terminated).await;
    let reasons = [Some(TerminationReason::KeyExpired), Some(TerminationReason::Lost)];
    assert!(reasons.contains(&end.termination_reason), "{end:?}");
    cluster.wait_drone(drone).await;
    let key = cluster.key("k").await.unwrap();
    assert_eq!((key.backend, key.token), (second.backend_id, second.fencing_token));
    cluster.journal.assert_no_overlap();
}

#[tokio::test]
async fn a_backend_whose_drone_gets_connections_refused_ends_on_the_timeline() {
    a_backend_of_a_drone_cut_off_ends_on_the_timeline(ProxySet::cut).await;
}

#[tokio::test]
async fn a_backend_whose_drone_hears_only_silence_ends_on_the_timeline() {
    a_backend_of_a_drone_cut_off_ends_on_the_timeline(ProxySet::silence).await;
}

#[tokio::test]
async fn a_backend_outlives_its_killed_drone_only_until_the_hard_deadline() {
    let lease: LeaseConfig = LEASE.parse().unwrap();
    let mut cluster = Cluster::builder().drones(2).lease(LEASE).start().await;
    let client = cluster.client();
    let request = cluster.backend().ignoring_sigterm().request("k");
    let first = client.connect(&request).await.unwrap();
    let info = cluster.wait_status(&first.backend_id, BackendStatus::Ready).await;
    let drone = if info.drone == "dr-0" { 0 } else { 1 };
    cluster.drones[drone].kill9();
    let to_boot = cluster_to_boot_ms(&cluster).await;
    let last = cluster.key("k").await.unwrap();
    let expiry_boot_ms = (last.expires_at.cast_signed() + to_boot).cast_unsigned();
    // Its guard knows the deadlines.
    let dead_boot_ms = wait_until("the old backend is gone", SHORT, async || {
        if TcpStream::connect(info.address.unwrap()).is_err() { Ok(boot_ms()) } else { Err("it answers") }
    })
    .await;
    let hard_boot_ms = expiry_boot_ms - lease.expiry_ms + lease.hard_terminate_ms;
    assert!(dead_boot_ms <= hard_boot_ms + LATE_MS, "{dead_boot_ms} is late for {hard_boot_ms}");
    let second = wait_until("another backend", SHORT, async || {
        let answer = client.connect(&request).await.unwrap();
        if answer.backend_id == first.backend_id { Err(answer) } else { Ok(answer) }
    })
    .await;
    assert!(second.spawned && second.fencing_token > first.fencing_token);
    assert!(cluster.key("k").await.unwrap().acquired_at >= last.expires_at);
    cluster.wait_status(&second.backend_id, BackendStatus::Ready).await;
    assert_eq!(cluster.journal.kinds("k"), [EventKind::Start, EventKind::Term, EventKind::Start]);
    cluster.journal.assert_no_overlap();
}

#[tokio::test]
async fn a_cut_shorter_than_the_lease_disturbs_nobody() {
    let lease = "renew=1s,soft=5s,hard=6s,expiry=8s";
    let cluster = Cluster::builder().lease(lease).proxied_drones().start().await;
    let first = cluster.connect_ready("k").await;
    cluster.links[0].cut();
    let cut_ms = cluster.info().await.cluster_time;
    wait_until("a renewal is overdue", SHORT, async || {
        let now = cluster.info().await.cluster_time;
        if now > cut_ms + 2_000 { Ok(()) } else { Err(now) }
    })
    .await;
    cluster.links[0].heal();
    wait_until("it is renewed past the old expiry", SHORT, async || {
        let key = cluster.key("k").await.unwrap();
        if key.expires_at > cut_ms + 8_000 + 1_000 { Ok(()) } else { Err(key) }
    })
    .await;
    let key = cluster.key("k").await.unwrap();
    assert_eq!((key.backend, key.token), (first.backend_id, first.fencing_token));
    assert_eq!(cluster.journal.kinds("k"), [EventKind::Start]);
}
